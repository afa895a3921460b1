"""What one program notices of its sockets, descriptors, children and signals: a line for each look.

Words: none, or the names of the looks to take."""
import array
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
LINGER = struct.pack('ii', 1, 0)
SOON = 20


def name(number):
    return errno.errorcode.get(number, str(number))


def tried(act):
    """What a call returns, or the name of its errno."""
    try:
        return act()
    except OSError as e:
        return name(e.errno) if e.errno else type(e).__name__


def raw(function, *args):
    """A libc call as it is: Python's own would be made again after EINTR."""
    ctypes.set_errno(77)
    result = getattr(libc, function)(*args)
    return name(ctypes.get_errno()) if result < 0 else result


def listener(family=socket.AF_INET, at='127.0.0.1', backlog=16):
    it = socket.socket(family)
    it.bind((at, 0))
    it.listen(backlog)
    return it


def pair(family=socket.AF_INET, at='127.0.0.1', to=None):
    with listener(family, at) as door:
        near = socket.socket(family)
        near.settimeout(SOON)
        near.connect((to or at, door.getsockname()[1]))
        far, _ = door.accept()
    far.settimeout(SOON)
    return near, far


def closed_port():
    with socket.socket() as it:
        it.bind(('127.0.0.1', 0))
        return it.getsockname()[1]


def shape(at):
    """An address without what differs from one time to the next."""
    return tuple('port' if i == 1 and part else part for i, part in enumerate(at)) if isinstance(at, tuple) else at


def urgent():
    near, far = pair()
    heard = []
    signal.signal(signal.SIGURG, lambda *_: heard.append('SIGURG'))
    fcntl.fcntl(far, fcntl.F_SETOWN, os.getpid())
    near.send(b'ab')
    near.send(b'!', socket.MSG_OOB)
    near.send(b'cd')
    events = select.poll()
    events.register(far, select.POLLPRI)
    yield 'readiness', events.poll(SOON * 1000)[0][1] & select.POLLPRI
    yield 'signal', heard
    yield 'before the mark', far.recv(9)
    mark = array.array('i', [0])
    fcntl.ioctl(far, 0x8905, mark)
    yield 'at the mark', mark[0], far.recv(9, socket.MSG_OOB), far.recv(9)
    far.setblocking(False)
    yield 'no more of it', tried(lambda: far.recv(9, socket.MSG_OOB))
    near, far = pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    near.send(b'a')
    near.send(b'!', socket.MSG_OOB)
    yield 'in line', far.recv(9), far.recv(9)


def ends():
    near, far = pair()
    near.send(b'words')
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    near.close()
    yield 'reset', tried(lambda: far.recv(9)), tried(lambda: far.recv(9)), tried(lambda: far.send(b'x'))
    near, far = pair()
    near.send(b'never read')
    far.close()
    yield 'closed before it was read', tried(lambda: near.recv(9)), tried(far.getpeername)
    near, far = pair()
    near.shutdown(socket.SHUT_WR)
    yield 'half', far.recv(9), far.send(b'answer'), near.recv(9), tried(lambda: near.send(b'x'))
    far.close()
    yield 'whole', near.recv(9), tried(lambda: near.shutdown(socket.SHUT_RDWR)), shape(tried(near.getpeername))
    near, far = pair()
    said = []
    waits = threading.Thread(target=lambda: said.append(tried(lambda: near.recv(9))))
    waits.start()
    near.shutdown(socket.SHUT_RD)
    waits.join()
    yield 'shutdown while it reads', said
    with listener() as door:
        waits = threading.Thread(target=lambda: said.append(tried(door.accept)))
        waits.start()
        while b'S' not in open(f'/proc/self/task/{waits.native_id}/stat', 'rb').read().rsplit(b')')[1][:3]:
            time.sleep(.001)
        door.shutdown(socket.SHUT_RDWR)
        waits.join()
    yield 'shutdown while it accepts', said[1]


def names():
    for family, at, to in [(2, '127.0.0.1', None), (10, '::1', None), (10, '::', '::ffff:127.0.0.1')]:
        it = socket.socket(family)
        yield 'new', it.getsockname(), tried(it.getpeername)
        near, far = pair(family, at, to)
        yield 'connected', *(shape(tried(ask)) for one in (near, far) for ask in (one.getsockname, one.getpeername))
        yield 'each other', near.getsockname() == far.getpeername(), near.getpeername() == far.getsockname()
        far.close()
        yield 'after the other has gone', shape(near.getsockname()), shape(tried(near.getpeername)), near.recv(1)
        near.close()
    it, port = socket.socket(), closed_port()
    yield 'refused', name(it.connect_ex(('127.0.0.1', port))), shape(it.getsockname()), tried(it.getpeername)
    yield 'refused again', name(it.connect_ex(('127.0.0.1', port))), it.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def states():
    with listener() as door:
        it = socket.socket()
        it.setblocking(False)
        first = it.connect_ex(door.getsockname())
        select.select([], [it], [], SOON)
        yield 'comes about', name(first), it.getsockopt(1, 4), name(it.connect_ex(door.getsockname()))
        yield 'again', name(it.connect_ex(door.getsockname())), tried(lambda: it.bind(('127.0.0.1', 0)))
        yield 'listen', tried(it.listen)
    it, port = socket.socket(), closed_port()
    it.setblocking(False)
    first, events = it.connect_ex(('127.0.0.1', port)), select.poll()
    events.register(it, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    events.poll(SOON * 1000)
    time.sleep(.05)  # the kernel shows the error a moment before the other signs
    yield 'refused', name(first), [hex(e) for _, e in events.poll(SOON * 1000)]
    yield 'its error', [it.getsockopt(1, 4) for _ in '12'], name(it.connect_ex(('127.0.0.1', port)))
    it = socket.socket()
    events = select.epoll()
    events.register(it, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    yield 'not connected', [hex(e) for _, e in events.poll(0)]
    it.setblocking(False)
    it.connect_ex(('127.0.0.1', port))
    time.sleep(.05)
    yield 'refused, by epoll', [hex(e) for _, e in events.poll(SOON)], select.select([it], [it], [it], 0) == ([it], [it], [])
    yield 'on what does not listen', tried(socket.socket().accept), tried(lambda: socket.socket(2, 2).listen())
    with listener() as door:
        door.setblocking(False)
        yield 'nobody comes', tried(door.accept), tried(lambda: door.listen(3)), tried(lambda: door.connect(door.getsockname()))
        one, two = select.epoll(), select.epoll()
        one.register(door, select.EPOLLIN | select.EPOLLET | select.EPOLLEXCLUSIVE)
        two.register(door, select.EPOLLIN | select.EPOLLONESHOT)
        near = socket.create_connection(door.getsockname())
        yield 'somebody', one.poll(SOON) != [], one.poll(0) != [], two.poll(SOON) != [], two.poll(0) != []
        number = libc.accept4(door.fileno(), None, None, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        flags = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_NONBLOCK, fcntl.fcntl(number, fcntl.F_GETFD)
        yield 'accept4', flags, tried(door.accept)
        os.close(number)
        yield 'nobody is left', raw('accept', door.fileno(), None, None)


def descriptors():
    def numbers():
        return sorted(int(n) for n in os.listdir('/proc/self/fd'))
    yield 'seen', len([n for n in numbers() if n < 900])
    four = [socket.socket() for _ in range(4)]
    yield 'the lowest', [s.fileno() - four[0].fileno() for s in four]
    four[1].close()
    yield 'the hole', socket.socket(2, 2).fileno() - four[0].fileno()
    for s in four:
        s.close()
    read, write = os.pipe()
    for number in (3 + 60, 900, 901, 950, 1000, 1022):
        yield 'dup2', number, os.dup2(read, number), os.read(number, 0)
    for number in (63, 900, 901, 950, 1000, 1022):
        os.close(number)
    yield 'F_DUPFD', fcntl.fcntl(read, fcntl.F_DUPFD, 100), fcntl.fcntl(read, fcntl.F_DUPFD, 900)
    near, far = pair()
    yield 'modes', [fcntl.fcntl(s, fcntl.F_GETFL) for s in (near, far)]
    fcntl.fcntl(near, fcntl.F_SETFL, os.O_NONBLOCK)
    yield 'mode', fcntl.fcntl(near, fcntl.F_GETFL), tried(lambda: os.read(near.fileno(), 1))
    one, two = socket.socketpair()
    with listener() as door:
        fresh = socket.socket()
        socket.send_fds(one, [b'x'], [fresh.fileno()])
        _, [number], _, _ = socket.recv_fds(two, 1, 1)
        passed = socket.socket(fileno=number)
        passed.connect(door.getsockname())
        yield 'passed on', shape(fresh.getpeername())
    body = ("import os, socket, sys\n"
            "os.closerange(3, 1 << 20) if sys.argv[1] == 'range' else None\n"
            "l = socket.create_server(('127.0.0.1', 0)); s = socket.create_connection(l.getsockname())\n"
            "print(l.fileno(), s.fileno(), l.accept()[0].fileno())")
    for how in 'range', 'not':
        yield 'after close_range', how, subprocess.run([sys.executable, '-c', body, how], capture_output=True).stdout
    for line in ('exec 3<&-; exec 4</dev/null; ls /proc/self/fd | grep -v ^9 | wc -l', 'exec <&-; exec </dev/null; echo $?',
                 'exec 0<&- 1>&- 2>&-; exec 5</dev/null; exit 7'):
        done = subprocess.run(['sh', '-c', line], capture_output=True)
        yield 'a shell', done.stdout, done.stderr, done.returncode
    # Of so few, one is the shim's.
    body = ("import os, resource, socket\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n"
            "l = socket.create_server(('127.0.0.1', 0))\n"
            "s = [socket.create_connection(l.getsockname())]\n"
            "try:\n while True: s.append(socket.socket())\n"
            "except OSError as e: print(len(s) in (11, 12), e.errno)\n"
            "s.pop().close(); print(s[1].connect_ex(l.getsockname()), l.accept()[0].fileno() > 2)")
    done = subprocess.run([sys.executable, '-c', body], capture_output=True)
    yield 'sixteen', done.stdout, done.stderr, done.returncode
    body = ("import os\nfor n in 0, 1, 2: os.close(n)\n"
            "got = [os.open('/dev/null', os.O_RDWR) for _ in '123']\nos._exit(got == [0, 1, 2])")
    yield 'without 0, 1 and 2', subprocess.run([sys.executable, '-c', body]).returncode


def children():
    yield 'strangers', tried(lambda: os.waitpid(-1, os.WNOHANG))
    heard = []
    signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
    with listener(backlog=2000) as door:
        at = door.getsockname()

        def connects():
            with socket.socket() as it:
                return it.connect_ex(at)
        for _ in range(20):
            pid = os.fork()
            if not pid:
                os._exit(connects())
            os.waitpid(pid, 0)
        yield 'forked', len(heard)
        statuses = []
        busy = [threading.Thread(target=lambda: [connects() for _ in range(500)]) for _ in '12']
        for thread in busy:
            thread.start()
        for _ in range(20):
            pid = os.fork()
            if not pid:
                os._exit(connects())
            statuses.append(os.waitpid(pid, 0)[1])
        yield 'forked in the midst of threads', set(statuses)
        for thread in busy:
            thread.join()
        # fork(2), vfork(2) and clone(2) as a program makes them that knows no libc; clone3(2) likewise.
        SIGCHLD = 17
        args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, SIGCHLD)
        for how in (57,), (56, SIGCHLD, 0, 0, 0, 0), (435, ctypes.byref(args), 88):
            pid = libc.syscall(*how)
            if pid == 0:
                os._exit(connects() + 3)
            yield 'by hand', how[0], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        body = f"import socket; print(socket.socket().connect_ex({at}))"
        words = [sys.executable, '-c', body]
        read, write = os.pipe()
        pid = os.posix_spawn(words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])
        yield 'spawned', os.waitpid(pid, 0)[1], os.read(read, 9)
        yield 'by system', os.system(f'{sys.executable} -c "{body}" >/dev/null')
        with os.popen(f'{sys.executable} -c "{body}"') as said:
            yield 'by popen', said.read()
        if os.fork() == 0:
            # As daemon(3) does it.
            os.setsid()
            if os.fork():
                os._exit(0)
            null = os.open('/dev/null', os.O_RDWR)
            for n in 0, 1, 2:
                os.dup2(null, n)
            os.closerange(3, write)
            os.write(write, b'%d' % connects())
            os._exit(0)
        os.wait()
        yield 'a daemon', os.read(read, 9)
    yield 'nobody is left', tried(lambda: os.waitpid(-1, 0))


def interrupted():
    ring = socket.socketpair()
    handled = []
    signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
    room = ctypes.create_string_buffer(64)
    udp = socket.socket(2, 2)
    udp.bind(('127.0.0.1', 0))
    near, far = pair()
    near.settimeout(None)
    with listener() as door:
        calls = [('accept', door.fileno(), None, None), ('recv', near.fileno(), room, 9, 0),
                 ('read', near.fileno(), room, 9), ('recvfrom', udp.fileno(), room, 9, 0, None, None),
                 ('recv', ring[0].fileno(), room, 9, 0), ('poll', None, 0, -1)]
        for call in calls:
            signal.siginterrupt(signal.SIGALRM, True)
            signal.setitimer(signal.ITIMER_REAL, .03, .03)
            how = raw(*call)
            signal.setitimer(signal.ITIMER_REAL, 0)
            yield call[0], how
        # Made again by the kernel, until there is something.
        signal.siginterrupt(signal.SIGALRM, False)
        def later():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(.1)
            far.send(b'word'), udp.sendto(b'words', udp.getsockname()), ring[1].send(b'!')
            return socket.create_connection(door.getsockname())
        for call in calls[:-1]:
            thread = threading.Thread(target=later)
            thread.start()
            signal.setitimer(signal.ITIMER_REAL, .01, .01)
            how = raw(*call)
            signal.setitimer(signal.ITIMER_REAL, 0)
            yield call[0], how if call[0] != 'accept' else how > 2
            thread.join()
        yield 'handled', bool(handled)
        # A timer that fires all the while: no call is lost, none made twice.
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, .001, .001)
        came, door2 = 0, listener(backlog=300)
        for _ in range(200):
            # Made by proxy, and interrupted just as it is answered, it is made again by the kernel (SECURITY.md).
            came += socket.socket().connect_ex(door2.getsockname()) in (0, errno.EISCONN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        door2.setblocking(False)
        taken = 0
        while tried(door2.accept) != 'EAGAIN':
            taken += 1
        yield 'under a timer', came, taken
    yield 'mask', signal.pthread_sigmask(signal.SIG_BLOCK, [])


def quiet():
    """errno is left alone by what succeeds."""
    with listener() as door:
        at = struct.pack('>HH4s8x', 0x0200, door.getsockname()[1], socket.inet_aton('127.0.0.1'))
        s = socket.socket()
        room, length = ctypes.create_string_buffer(64), ctypes.c_int(64)
        for call in [('connect', s.fileno(), at, 16), ('send', s.fileno(), b'x', 1, 0),
                     ('accept', door.fileno(), room, ctypes.byref(length)), ('listen', door.fileno(), 5),
                     ('getpeername', s.fileno(), room, ctypes.byref(length)), ('getsockname', s.fileno(), room, ctypes.byref(length)),
                     ('fcntl', s.fileno(), fcntl.F_GETFL), ('dup', s.fileno()), ('dup2', s.fileno(), 70), ('close', 70),
                     ('socket', 2, 2, 0), ('closefrom', 71), ('fork',), ('bind', libc.socket(2, 1, 0), at[:2] + bytes(14), 16)]:
            result = raw(*call)
            if call[0] == 'fork' and result == 0:
                os._exit(0)
            yield call[0], result if isinstance(result, str) else 'done', ctypes.get_errno()
        os.wait()


def messages():
    near, far = pair()
    near.sendmsg([b'one', b'', b'two', b'three'])
    yield 'peek', far.recv(64, socket.MSG_PEEK), far.recv(3), far.recv(64, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    yield 'parts', far.recvmsg_into([bytearray(2), bytearray(20)])[0]
    far.setblocking(False)
    yield 'nothing', tried(lambda: far.recv(1))
    threading.Timer(.05, near.send, [b'b' * 5]).start()
    near.send(b'a' * 5)
    far.settimeout(None)
    yield 'all', far.recv(10, socket.MSG_WAITALL)
    near.send(b'away')
    yield 'truncated away', far.recv(4, socket.MSG_TRUNC)
    one, two = socket.socket(2, 2), socket.socket(2, 2)
    for s in one, two:
        s.bind(('127.0.0.1', 0))
        s.settimeout(SOON)
    two.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
    two.setsockopt(socket.SOL_SOCKET, 29, 1)  # SO_TIMESTAMP
    one.sendto(b'a longer word', two.getsockname())
    data, control, flags, at = two.recvmsg(4, 200)
    yield 'datagram', data, [(level, kind, len(body)) for level, kind, body in control], flags, at == one.getsockname()
    one.sendto(b'word', two.getsockname())
    _, control, flags, _ = two.recvmsg(9, 20)
    yield 'little room for control', [len(body) for _, _, body in control], flags
    one.sendto(b'0123456789', two.getsockname())
    yield 'its length', libc.recv(two.fileno(), ctypes.create_string_buffer(4), 4, socket.MSG_TRUNC)
    one.sendto(b'', two.getsockname())
    yield 'empty', two.recvfrom(9)[0]

    class Vec(ctypes.Structure):
        _fields_ = [('base', ctypes.c_char_p), ('length', ctypes.c_size_t)]

    class Message(ctypes.Structure):
        _fields_ = [('name', ctypes.c_void_p), ('namelen', ctypes.c_uint32), ('iov', ctypes.POINTER(Vec)),
                    ('iovlen', ctypes.c_size_t), ('control', ctypes.c_void_p), ('controllen', ctypes.c_size_t),
                    ('flags', ctypes.c_int), ('pad', ctypes.c_int), ('got', ctypes.c_uint64)]
    vecs = [Vec(ctypes.cast(ctypes.create_string_buffer(8), ctypes.c_char_p), 8) for _ in '1234']
    rows = (Message * 4)(*[Message(iov=ctypes.pointer(v), iovlen=1) for v in vecs])
    one.connect(two.getsockname())
    rows[2].iovlen = 1 << 40  # wrong in the middle: what is before it is sent
    yield 'some of many', raw('sendmmsg', one.fileno(), rows, 4, 0), rows[0].got
    yield 'none of them', raw('sendmmsg', one.fileno(), ctypes.byref(rows[2]), 1, 0)
    rows[2].iovlen = 1
    yield 'those that came', raw('recvmmsg', two.fileno(), rows, 4, socket.MSG_DONTWAIT, None), [r.got for r in rows[:2]]
    yield 'nobody', raw('recvmmsg', two.fileno(), rows, 4, socket.MSG_DONTWAIT, None)
    one.connect(('127.0.0.1', 9))
    here = shape(one.getpeername()), shape(one.getsockname())
    yield 'connected', here, raw('connect', one.fileno(), bytes(16), 16), tried(one.getpeername), shape(one.getsockname())
    yield 'sends to nobody', tried(lambda: one.send(b'x'))
    gone, it = closed_port(), socket.socket(2, 2)
    it.settimeout(SOON)
    it.connect(('127.0.0.1', gone))
    yield 'nobody there', it.send(b'x'), tried(lambda: it.recv(9)), tried(lambda: it.send(b'x'))
    it.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    it.getsockopt(1, 4)
    it.send(b'lost')
    select.select([it], [], [], SOON)
    data, control, flags, _ = it.recvmsg(64, 200, socket.MSG_ERRQUEUE)
    yield 'what became of it', data, [(level, kind, body[:8]) for level, kind, body in control], flags == socket.MSG_ERRQUEUE
    # What goes wrong after the first of many is heard by the next call.
    it, far = socket.socket(2, 2), socket.socket(2, 2)
    far.bind(('127.0.0.1', 0))
    it.connect(far.getsockname())
    said = []
    waits = threading.Thread(target=lambda: said.append(raw('recvmmsg', it.fileno(), rows, 2, 0, None)))
    waits.start()
    far.sendto(b'word', it.getsockname())
    while struct.unpack('i', fcntl.ioctl(it, 0x541b, bytes(4)))[0]:  # FIONREAD
        time.sleep(.001)
    far.close()
    it.send(b'x')
    waits.join()
    yield 'a late error', said, tried(lambda: it.recv(9, socket.MSG_DONTWAIT)), tried(lambda: it.recv(9, socket.MSG_DONTWAIT))
    six = socket.socket(10, 2)
    six.settimeout(SOON)
    six.sendto(b'x', ('::ffff:127.0.0.1', two.getsockname()[1]))
    yield 'v4-mapped', shape(six.getsockname()), two.recvfrom(9)[0]


def options():
    one, two = socket.socket(), socket.socket()
    one.bind(('127.0.0.1', 0))
    at = one.getsockname()
    yield 'in use', tried(lambda: two.bind(at)), tried(lambda: socket.socket().bind(('192.0.2.1', 0)))
    yield 'bound twice', tried(lambda: one.bind(('127.0.0.1', 0)))
    for option in socket.SO_REUSEADDR, socket.SO_REUSEPORT:
        one, two = socket.socket(), socket.socket()
        for s in one, two:
            s.setsockopt(socket.SOL_SOCKET, option, 1)
        one.bind(('127.0.0.1', 0))
        yield 'shared', tried(lambda: two.bind(one.getsockname())), tried(one.listen), tried(two.listen)
    def one_family():
        six, four = socket.socket(10), socket.socket()
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(('::', 0))
        return tried(lambda: four.bind(('0.0.0.0', six.getsockname()[1]))), six.getsockopt(41, 26)
    # Somebody else may have one of these ports.
    yield 'one family', (None, 1) in [one_family() for _ in range(9)]
    dual = socket.socket(10)
    dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    dual.bind(('::', 0))
    dual.listen()
    four = socket.create_connection(('127.0.0.1', dual.getsockname()[1]))
    yield 'both families', shape(dual.accept()[1]), shape(four.getsockname())
    yield 'device', tried(lambda: socket.socket().setsockopt(1, 25, b'lo\0')), tried(lambda: socket.socket().setsockopt(1, 25, b'none\0'))
    udp = socket.socket(2, 2)
    group = socket.inet_aton('239.1.2.3') + socket.inet_aton('127.0.0.1')
    yield 'joins', [tried(lambda: udp.setsockopt(socket.IPPROTO_IP, how, group)) for how in (35, 36, 36)]
    yield 'all of them', tried(lambda: udp.sendto(b'x', ('127.255.255.255', 9)))
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    yield 'may', tried(lambda: udp.sendto(b'x', ('127.255.255.255', 9)))
    yield 'protocols', [tried(lambda: socket.socket(*words).fileno() > 2) for words in
                        [(2, 1, 6), (2, 2, 17), (2, 1, 17), (2, 5), (2, 1 | 0o4000), (1, 5), (16, 3, 0), (44, 1), (10, 2, 17)]]
    yield 'kind', [socket.socket(2, 2).getsockopt(1, option) for option in (3, 38, 39)]


def none_comes(it):
    it.setblocking(False)
    heard = tried(lambda: it.recv(9))
    it.settimeout(SOON)
    return heard


def seldom():
    """What few programs do."""
    with listener() as door, listener() as other:
        it = socket.socket()
        it.connect(door.getsockname())
        yield 'dissolved', raw('connect', it.fileno(), bytes(16), 16), tried(it.getpeername), it.getsockname()[0]
        door.accept()[0].close()
        yield 'connected anew', it.connect_ex(other.getsockname()), shape(it.getpeername()), shape(other.accept()[1])
        # One that listens may dissolve that too.
        again = socket.socket()
        again.bind(('127.0.0.1', 0))
        again.listen()
        yield 'listens no more', raw('connect', again.fileno(), bytes(16), 16), tried(again.accept), again.connect_ex(other.getsockname())
    udp, far, third = (socket.socket(2, 2) for _ in '123')
    for s in far, third:
        s.bind(('127.0.0.1', 0))
        s.settimeout(SOON)
    udp.settimeout(SOON)
    for peer in far, third, far:
        udp.connect(peer.getsockname())
        yield 'turned', udp.send(b'here'), peer.recv(9), shape(udp.getpeername()), peer.sendto(b'there', udp.getsockname()), udp.recv(9)
    third.sendto(b'not heard', udp.getsockname())
    yield 'from another', none_comes(udp)
    yield 'turned away', raw('connect', udp.fileno(), bytes(16), 16), tried(udp.getpeername), tried(lambda: udp.send(b'x'))
    yield 'turned back', udp.connect_ex(third.getsockname()), udp.send(b'x'), third.recv(9)
    with listener() as door:
        door.setsockopt(6, 9, SOON)  # TCP_DEFER_ACCEPT
        door.settimeout(SOON)
        near = socket.create_connection(door.getsockname())
        events = select.poll()
        events.register(door, select.POLLIN)
        yield 'deferred', door.getsockopt(6, 9), events.poll(100), near.send(b'word'), door.accept()[0].recv(9)
        near = socket.create_connection(door.getsockname())
        near.send(b'x')
        yield 'by which processor', door.getsockopt(1, 49) == -1, door.accept()[0].getsockopt(1, 49) >= 0
        device = socket.socket()
        yield 'by device', tried(lambda: device.setsockopt(1, 25, b'lo\0')), device.connect_ex(door.getsockname()), device.getsockopt(1, 25, 16)
    # Which of two gets it, a program says: by what it sends (struct sock_fprog; the first byte of the datagram).
    code = struct.pack('HBBIHBBI', 0x30, 0, 0, 0, 0x16, 0, 0, 0)
    room = ctypes.create_string_buffer(code)
    both = [socket.socket(2, 2) for _ in '12']
    for s in both:
        s.setsockopt(1, socket.SO_REUSEPORT, 1)
        s.bind(('127.0.0.1', both[0].getsockname()[1]))
        s.settimeout(SOON)
    both[0].setsockopt(1, 51, struct.pack('HxxxxxxQ', 2, ctypes.addressof(room)))  # SO_ATTACH_REUSEPORT_CBPF
    for which in 1, 0, 1:
        udp = socket.socket(2, 2)
        udp.sendto(bytes([which]), both[0].getsockname())
        yield 'chosen', both[which].recv(9)
    group, hears = '239.255.77.1', socket.socket(2, 2)
    hears.bind(('', 0))
    hears.settimeout(SOON)
    port, here = hears.getsockname()[1], socket.inet_aton('127.0.0.1')
    hears.setsockopt(0, 49, 0)  # IP_MULTICAST_ALL: what others here have joined is not its own
    hears.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + here)
    tells = socket.socket(2, 2)
    tells.setsockopt(0, socket.IP_MULTICAST_IF, here)
    yield 'to a group', tells.sendto(b'all', (group, port)), hears.recvfrom(9)[0]
    tells.connect((group, port))
    yield 'connected to it', tells.send(b'all'), hears.recv(9), shape(tells.getpeername())
    hears.setsockopt(0, socket.IP_DROP_MEMBERSHIP, socket.inet_aton(group) + here)
    tells.setsockopt(0, socket.IP_MULTICAST_LOOP, 0)
    yield 'left', tells.send(b'nobody'), none_comes(hears)


def elsewhere():
    """What is no business of a firewall's."""
    folder = tempfile.mkdtemp()
    for at in '\0probe%d' % os.getpid(), folder + '/probe.sock':
        door = socket.socket(socket.AF_UNIX)
        door.bind(at)
        door.listen()
        near = socket.socket(socket.AF_UNIX)
        near.connect(at)
        far, _ = door.accept()
        near.send(b'x')
        peer = far.getsockopt(1, 17, 12)
        yield 'unix', far.recv(9), struct.unpack('3i', peer) == (os.getpid(), os.getuid(), os.getgid()), near.getpeername() == (at if at[0] != '\0' else at.encode())
    os.unlink(at)
    os.rmdir(folder)
    yield 'nobody', tried(lambda: socket.socket(1).connect('/nonexistent')), tried(lambda: socket.socket(1).connect('\0nobody'))
    route = socket.socket(16, 3, 0)
    route.bind((0, 0))
    route.send(struct.pack('=IHHIIBxHiII', 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0))
    yield 'netlink', struct.unpack_from('=IH', route.recv(65536))[1]
    yield 'names', socket.getaddrinfo('localhost', 80, socket.AF_INET, socket.SOCK_STREAM)[0][4], tried(lambda: socket.getaddrinfo('127.0.0.1', 'ftp')[0][4])
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.send(b'whole')
    yield 'pair', two.recv(9)
    sent, got = pair()
    with open('/etc/passwd', 'rb') as file:
        yield 'sendfile', os.sendfile(sent.fileno(), file.fileno(), 0, 10), len(got.recv(99))
    read, write = os.pipe()
    sent.send(b'spliced')
    yield 'splice', os.splice(got.fileno(), write, 99), os.read(read, 99)
    yield 'written', os.writev(sent.fileno(), [b'a', b'b']), os.readv(got.fileno(), [bytearray(9)])


LOOKS = [urgent, ends, names, states, descriptors, children, interrupted, quiet, messages, options, seldom, elsewhere]

if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    for look in LOOKS:
        if sys.argv[1:] and look.__name__ not in sys.argv[1:]:
            continue
        # Each by a process of its own, so that none sees another's leavings.
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                for what, *seen in look():
                    print(f'{look.__name__}, {what}:', *seen)
            except Exception as e:
                print(f'{look.__name__} ended by', repr(e), 'in line', e.__traceback__.tb_next and e.__traceback__.tb_next.tb_lineno or e.__traceback__.tb_lineno)
            finally:
                sys.stdout.flush()
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(f'{look.__name__}: {status}')

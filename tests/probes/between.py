"""What two programs on two hosts notice of the connections between them: a line for each look, at each end.

Words: `server`, which comes first, or `client`."""
import errno
import hashlib
import os
import select
import socket
import struct
import sys
import threading
import time

SERVER, SIX, PORT, NOBODY = '10.77.0.2', 'fd77::2', 8080, 8081
GROUP, LINK = 'ff02::4d:77', 8082
LINGER = struct.pack('ii', 1, 0)
SOON = 30
BIG = bytes(range(256)) * 12_000


def tried(act):
    try:
        return act()
    except OSError as e:
        return errno.errorcode[e.errno] if e.errno else type(e).__name__


def shape(at):
    """An address without a port that the kernel chose."""
    if not isinstance(at, tuple):
        return at
    return (at[0], at[1] if at[1] in (0, PORT, 2020) else 'port')


def ready(one, events, seconds=SOON):
    """What it settles on: for a moment the kernel shows a reset's error, and not its other signs."""
    poll = select.poll()
    poll.register(one, events)
    before, now = None, poll.poll(seconds * 1000)
    while now and now != before:
        time.sleep(.05)
        before, now = now, poll.poll(0)
    return [hex(e) for _, e in now]


def all_of(one, count):
    got = b''
    while len(got) < count and (part := one.recv(1 << 16)):
        got += part
    return got


def digest(data):
    return len(data), hashlib.sha256(data).hexdigest()[:9]


# Each look: what the client does, and what the server does, with its end of one connection.

def names_near(s):
    s.sendall(repr(s.getsockname()[:2]).encode().ljust(99))
    yield shape(s.getsockname()), shape(s.getpeername()), s.recv(9)


def names_far(s):
    told = all_of(s, 99).strip().decode()
    yield shape(s.getsockname()), shape(s.getpeername()), told == repr(s.getpeername()[:2]), told == repr(CAME[:2])
    s.send(b'done')


def halves_near(s):
    s.sendall(b'question')
    s.shutdown(socket.SHUT_WR)
    yield tried(lambda: s.send(b'x')), ready(s, select.POLLOUT), digest(all_of(s, 1 << 30))
    yield tried(lambda: s.shutdown(socket.SHUT_RDWR))


def halves_far(s):
    yield all_of(s, 1 << 30), s.recv(1), ready(s, select.POLLIN | select.POLLRDHUP)
    s.sendall(BIG)


def reset_near(s):
    s.sendall(b'reset')
    yield s.recv(2)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)


def reset_far(s):
    yield all_of(s, 5), s.send(b'ok')
    events = ready(s, select.POLLIN | select.POLLRDHUP)
    yield events, tried(lambda: s.recv(9)), tried(s.getpeername), tried(lambda: s.recv(9)), tried(lambda: s.send(b'x'))


def reset_by_server_near(s):
    yield from reset_far(s)


def reset_by_server_far(s):
    yield from reset_near(s)


def unread_near(s):
    s.sendall(b'never read')
    events = ready(s, select.POLLIN | select.POLLRDHUP)
    yield events, tried(lambda: s.recv(9)), tried(lambda: s.recv(9)), tried(lambda: s.send(b'x'))


def unread_far(s):
    yield ready(s, select.POLLIN)


def unread_by_client_near(s):
    yield ready(s, select.POLLIN)


def unread_by_client_far(s):
    yield from unread_near(s)


def late_near(s):
    """Writes to who has closed."""
    yield s.recv(9), ready(s, select.POLLIN | select.POLLRDHUP), shape(tried(s.getpeername))
    how, end = 0, time.monotonic() + SOON
    while not isinstance(how, str) and time.monotonic() < end:
        how = tried(lambda: s.send(b'too late'))
        time.sleep(.01)
    yield how, tried(lambda: s.recv(9)), tried(lambda: s.send(b'x'))


def late_far(s):
    yield 'closes'


def stuffed_near(s):
    """Fills all buffers on the way, and is reset."""
    s.setblocking(False)
    sent = 0
    while ready(s, select.POLLOUT, .5):
        sent += s.send(bytes(1 << 16))
    yield sent > 1 << 16
    helper = socket.create_connection((SERVER, PORT), SOON)
    helper.recv(1)
    s.settimeout(SOON)
    yield tried(lambda: [s.send(bytes(1 << 16)) for _ in range(1 << 12)]), tried(lambda: s.recv(9))


def stuffed_far(s):
    helper, _ = LISTENER.accept()
    s.close()
    yield helper.send(b'x')


def parts_near(s):
    s.sendmsg([b'first', b' ', b'second'])
    yield s.recv(4)
    s.sendall(b'12345')
    yield s.recv(9)
    s.sendall(b'67890')
    s.settimeout(None)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack('ll', 0, 50_000))
    yield tried(lambda: s.recv(9)), tried(lambda: s.recv(9, socket.MSG_DONTWAIT))
    s.sendall(b'!')


def parts_far(s):
    s.settimeout(None)
    yield s.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL), s.recv(99), s.send(b'more')
    yield s.recv(5, socket.MSG_WAITALL), s.send(b'and more')
    yield s.recv(6, socket.MSG_WAITALL)


def much_near(s):
    sends = threading.Thread(target=s.sendall, args=[BIG])
    sends.start()
    yield digest(all_of(s, len(BIG)))
    sends.join()
    s.shutdown(socket.SHUT_WR)
    yield s.recv(1)


def much_far(s):
    sends = threading.Thread(target=s.sendall, args=[BIG])
    sends.start()
    yield digest(all_of(s, len(BIG)))
    sends.join()
    yield s.recv(1)


def options_near(s):
    for level, option, value in [(1, 9, 1), (6, 1, 1), (6, 4, 77), (6, 5, 7), (6, 6, 3), (6, 18, 9000), (0, 1, 0x10), (0, 2, 33), (1, 12, 4)]:
        before = s.getsockopt(level, option)
        s.setsockopt(level, option, value)
        yield level, option, before, s.getsockopt(level, option)
    yield [s.getsockopt(1, option) for option in (3, 4, 30, 38, 39)], s.getsockopt(6, 11, 1)
    s.send(b'x')


def options_far(s):
    yield s.recv(1), [s.getsockopt(1, option) for option in (3, 4, 9, 30, 38, 39)]


def threads_near(s):
    said, s2 = [], s.dup()
    s.settimeout(None)
    waits = threading.Thread(target=lambda: said.append(tried(lambda: s.recv(9))))
    waits.start()
    s2.send(b'x')
    time.sleep(.05)
    s2.shutdown(socket.SHUT_RDWR)
    waits.join()
    yield said, tried(lambda: s.send(b'x'))


def threads_far(s):
    yield s.recv(9), s.recv(9)


def child_near(s):
    """One child has it by fork(2), another by SCM_RIGHTS."""
    pid = os.fork()
    if pid == 0:
        s.send(b'child')
        os._exit(0)
    os.waitpid(pid, 0)
    yield s.recv(9)
    one, two = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        s.close()
        got = socket.socket(fileno=socket.recv_fds(two, 1, 1)[1][0])
        got.send(b'other')
        os._exit(0 if got.getpeername()[:2] == (SERVER, PORT) else 1)
    socket.send_fds(one, [b'x'], [s.fileno()])
    yield os.waitpid(pid, 0)[1], s.recv(9)


def child_far(s):
    for _ in '12':
        yield all_of(s, 5)
        s.send(b'heard')


def urgent_near(s):
    s.sendall(b'a')
    s.send(b'!', socket.MSG_OOB)
    s.sendall(b'b')
    yield s.recv(9)


def urgent_far(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    yield ready(s, select.POLLPRI, 5), all_of(s, 3)
    s.send(b'done')


LOOKS = ['names', 'halves', 'reset', 'reset_by_server', 'unread', 'unread_by_client', 'late', 'stuffed', 'parts', 'much',
         'options', 'threads', 'child', 'urgent']


def look(what, end, s):
    n = 0
    try:
        for seen in globals()[f'{what}_{end}'](s):
            n += 1
            print(f'{what} {end} {n}:', *seen if isinstance(seen, tuple) else [seen], flush=True)
    except Exception as e:
        print(f'{what} {end} ended by', repr(e), flush=True)
    s.close()


def of_the_link():
    """This host's own address on the link, once the kernel is sure that nobody else has it."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        for line in open('/proc/net/if_inet6'):
            address, number, _, _, flags, _ = line.split()
            if address.startswith('fe80') and not int(flags, 16) & 0x40:  # IFA_F_TENTATIVE
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)), int(number, 16)
        time.sleep(.05)
    raise TimeoutError('no address of the link')


def group(scope):
    """All that listen, on that link and no other."""
    it = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    it.settimeout(SOON)
    it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
    it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, GROUP) + struct.pack('i', scope))
    return it


def serve_link():
    own, scope = of_the_link()
    hears = group(scope)
    hears.bind(('::', LINK, 0, scope))
    door = socket.socket(socket.AF_INET6)
    print('unscoped', tried(lambda: socket.socket(socket.AF_INET6).bind((own, LINK))), flush=True)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind((own, LINK, 0, scope))
    door.listen()
    said, who = hears.recvfrom(99)
    print('from the link', said, who[0][:4], who[3] == scope, flush=True)
    hears.sendto(own.encode(), who)
    far, who = door.accept()
    print('came by the link', who[0][:4], who[3] == scope, far.getsockname()[3] == scope, far.recv(9), flush=True)


def ask_link():
    own, scope = of_the_link()
    asks = group(scope)
    asks.bind((own, 0, 0, scope))
    print('unscoped', tried(lambda: asks.sendto(b'x', ('fe80::77', LINK))))
    # Who is asked may not listen yet.
    asks.settimeout(.5)
    said, end = None, time.monotonic() + SOON
    while said is None and time.monotonic() < end:
        sent = asks.sendto(b'who', (GROUP, LINK, 0, scope))
        try:
            said, who = asks.recvfrom(99)
        except TimeoutError:
            pass
    print('answered', sent, who[3] == scope, said.decode() == who[0])
    it = socket.socket(socket.AF_INET6)
    it.settimeout(SOON)
    it.connect((who[0], LINK, 0, scope))
    print('connected', it.getpeername() == (who[0], LINK, 0, scope), it.getsockname()[0] == own, it.send(b'word'), flush=True)


def serve():
    global LISTENER, CAME
    door = socket.create_server((SERVER, PORT), backlog=64)
    six = socket.create_server((SIX, PORT), family=socket.AF_INET6)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((SERVER, PORT))
    udp.settimeout(SOON)
    print('listens', flush=True)
    for LISTENER in door, six:
        for what in LOOKS if LISTENER is door else LOOKS[:4]:
            s, CAME = LISTENER.accept()
            s.settimeout(SOON)
            look(what, 'far', s)
    for _ in range(4):
        s, at = door.accept()
        print('came', shape(at), shape(s.getpeername()), shape(s.getsockname()), flush=True)
        s.close()
    for _ in range(3):
        data, at = udp.recvfrom(99)
        print('datagram', data, shape(at), flush=True)
        udp.sendto(b're ' + data, at)
    serve_link()


def ask():
    for to in SERVER, SIX:
        for what in LOOKS if to == SERVER else LOOKS[:4]:
            look(what, 'near', socket.create_connection((to, PORT), SOON))
    it = socket.socket()
    it.setblocking(False)
    first = it.connect_ex((SERVER, PORT))
    print('under way', errno.errorcode[first], ready(it, select.POLLOUT), it.getsockopt(1, 4))
    print('again', it.connect_ex((SERVER, PORT)), errno.errorcode[it.connect_ex((SERVER, PORT))])
    it.settimeout(SOON)
    print('its end', it.recv(1), ready(it, select.POLLIN | select.POLLOUT | select.POLLRDHUP))
    it = socket.socket()
    it.setblocking(False)
    events = select.epoll()
    events.register(it, select.EPOLLOUT | select.EPOLLET)
    before = [hex(e) for _, e in events.poll(0)]
    it.connect_ex((SERVER, PORT))
    print('by epoll', before, [hex(e) for _, e in events.poll(SOON)], shape(it.getsockname()), shape(it.getpeername()))
    it = socket.socket()
    it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    it.bind(('10.77.0.1', 2020))
    it.connect((SERVER, PORT))
    print('bound', shape(it.getsockname()), shape(it.getpeername()), it.recv(1))
    it = socket.socket(socket.AF_INET6)
    it.connect(('::ffff:' + SERVER, PORT))
    print('mapped', shape(it.getsockname()), shape(it.getpeername()))
    it, it2 = socket.socket(), socket.socket()
    it.settimeout(SOON)
    print('refused', errno.errorcode[it.connect_ex((SERVER, NOBODY))], tried(it.getpeername), it.getsockopt(1, 4))
    it2.setblocking(False)
    first = it2.connect_ex((SERVER, NOBODY))
    print('refused later', errno.errorcode[first], ready(it2, select.POLLIN | select.POLLOUT), [it2.getsockopt(1, 4) for _ in '12'])
    far = socket.socket()
    far.settimeout(SOON)
    print('nobody has it', errno.errorcode[far.connect_ex(('10.77.0.99', PORT))])
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.settimeout(SOON)
    udp.sendto(b'one', (SERVER, PORT))
    print('datagram', udp.recvfrom(99))
    udp.connect((SERVER, PORT))
    udp.send(b'two')
    print('datagram', udp.recv(99), shape(udp.getsockname()), shape(udp.getpeername()))
    udp.sendmsg([b'th', b'ree'])
    print('datagram', udp.recvmsg(2)[::2])
    udp.connect((SERVER, NOBODY))
    udp.send(b'x')
    print('datagram', tried(lambda: udp.recv(9)))
    ask_link()


serve() if sys.argv[1] == 'server' else ask()

"""A name server that says 192.0.2.80 to everything, over TCP only if the name asks for that; and who asks it.

Words: serve ADDRESS, or ask NAME."""
import socket
import struct
import sys
import threading


def answer(question, datagram):
    number, _, _, _, _, _ = struct.unpack('>6H', question[:12])
    end = question.index(b'\0', 12) + 5
    short = datagram and question[13:].startswith(b'long')
    is_four = question[end - 3] == 1  # A
    flags = 0x8180 | (0x200 if short else 0)
    head = struct.pack('>6H', number, flags, 1, int(is_four and not short), 0, 0) + question[12:end]
    return head + (b'\xc0\x0c' + struct.pack('>HHIH4s', 1, 1, 60, 4, bytes([192, 0, 2, 80])) if is_four and not short else b'')


def by_stream(door):
    while True:
        with door.accept()[0] as it:
            try:
                while head := it.recv(2, socket.MSG_WAITALL):
                    said = answer(it.recv(struct.unpack('>H', head)[0], socket.MSG_WAITALL), False)
                    it.sendall(struct.pack('>H', len(said)) + said)
            except (OSError, struct.error):
                pass


if sys.argv[1] == 'serve':
    at = sys.argv[2], 53
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(at)
    threading.Thread(target=by_stream, args=[socket.create_server(at)], daemon=True).start()
    print('serves', flush=True)
    while True:
        question, who = udp.recvfrom(512)
        udp.sendto(answer(question, True), who)
try:
    print(*sorted({found[4][0] for found in socket.getaddrinfo(sys.argv[2], 80)}))
except socket.gaierror as e:
    print({socket.EAI_AGAIN: 'EAI_AGAIN', socket.EAI_NONAME: 'EAI_NONAME'}.get(e.errno, e.errno))

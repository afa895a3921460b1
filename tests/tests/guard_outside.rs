//! The ways that SECURITY.md names as outside the boundary, each shown to be one, beside what is closed.
//! (The third, a race, is `selftest`'s: `guard_without.rs`.)
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{io::Write, net::TcpListener};

use portcullis_tests::{Finished, Host, Running};

/// Serves on a unix socket: `relay` says what the port says, `hand` gives away a connection to it.
const HELPER: &str = "
import socket, sys
port, path, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print('helps', flush=True)
asker, _ = server.accept()
far = socket.create_connection(('127.0.0.1', port))
if what == 'relay': asker.sendall(far.recv(99))
else: socket.send_fds(asker, [b'x'], [far.fileno()])
asker.recv(1)
";

/// Tries itself, then asks the helper.
const ASKER: &str = "
import socket, sys
port, path, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print(socket.socket().connect_ex(('127.0.0.1', port)), end=' ')
helper = socket.socket(socket.AF_UNIX)
helper.connect(path)
if what == 'relay': print(helper.recv(99).decode())
else:
    _, fds, _, _ = socket.recv_fds(helper, 9, 1)
    print(socket.socket(fileno=fds[0]).recv(99).decode())
";

#[test]
fn help_of_an_unwrapped_program_over_a_unix_socket_is_outside() {
    for what in ["relay", "hand"] {
        let host = Host::here();
        host.policy("allow tcp/9(*, *);");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let far = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"words").unwrap());
        let socket = host.path("helper").display().to_string();
        let words = |program| ["/usr/bin/python3", "-c", program, &port, &socket, what];
        let helper = Running::start(host.plain(&words(HELPER)));
        helper.line("helps");
        let said = Finished::of(&mut host.run(&words(ASKER))).success();
        assert_eq!(said, "13 words\n", "{what}: refused, and then helped");
        far.join().unwrap();
    }
}

#[test]
fn root_in_the_tree_reaches_into_other_processes_by_their_files() {
    let host = Host::here();
    host.policy("allow tcp/9(*, *);");
    let other = "import ctypes, os\n\
        held = ctypes.create_string_buffer(b'held words')\n\
        print('at', os.getpid(), ctypes.addressof(held), flush=True)\n\
        input()\n";
    let other = Running::start(host.plain(&["/usr/bin/python3", "-c", other]));
    let at = other.line("at ");
    let [_, pid, address] = at.split(' ').collect::<Vec<_>>()[..] else { panic!("{at}") };
    let reads = "import ctypes, sys\n\
        pid, at = int(sys.argv[1]), int(sys.argv[2])\n\
        room = ctypes.create_string_buffer(10)\n\
        part = lambda at: (ctypes.c_ulong * 2)(at, 10)\n\
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv\n\
        print(call(pid, part(ctypes.addressof(room)), 1, part(at), 1, 0), ctypes.get_errno(), end=' ')\n\
        with open(f'/proc/{pid}/mem', 'rb', 0) as memory:\n    \
            memory.seek(at)\n    \
            print(memory.read(10).decode())\n";
    let said = Finished::of(&mut host.run(&["/usr/bin/python3", "-c", reads, pid, address])).success();
    assert_eq!(said, "-1 1 held words\n", "the call is refused, the file is not");
    let user = host.as_user(65534);
    user.policy("allow tcp/9(*, *);");
    let said = Finished::of(&mut user.run(&["/usr/bin/python3", "-c", reads, pid, address]));
    assert!(said.stdout.starts_with("-1 1") && !said.stdout.contains("held"), "who is not root: {said}");
}

//! What a hostile program can say to the broker, and what comes of it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use portcullis_tests::{ALLOW_ALL, Finished, Host, eventually};
use serde_json::Value;

const PY: &str = "/usr/bin/python3";

/// Beginning of a script that speaks the shim's protocol by itself.
const CLIENT: &str = r"
import os, socket, struct, array, sys, time
path = os.environ['PORTCULLIS_BROKER'].rsplit(':', 1)[0]
def frame(op, seq=1, flags=0, call=0, domain=2, kind=1, proto=6, fd=-1, magic=b'PCL1', version=1, remote=(4, '10.9.9.9', 80)):
    f = magic + struct.pack('<HHIIBBHHHiiiIQQ', version, op, seq, flags, call, 0, domain, kind, proto, fd, 0, 0, 0, 0, 0)
    local = bytes(28)
    family, ip, port = remote
    far = struct.pack('<BBHII', family, 0, port, 0, 0) + socket.inet_aton(ip) + bytes(12)
    return f + local + far + bytes(32)
def door():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(path)
    return s
def channel(d):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    d.sendmsg([frame(1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [theirs.fileno()]))])
    theirs.close()
    ours.settimeout(5)
    assert len(ours.recv(1000)) == 144
    return ours
def reply(s):
    data, fds, _, _ = socket.recv_fds(s, 1000, 8)
    return data, fds
def errno_of(data):
    return struct.unpack_from('<i', data, 16)[0]
";

fn script(host: &Host, body: &str) -> Finished {
    Finished::of(&mut host.run(&[PY, "-c", &format!("{CLIENT}\n{body}")]))
}

fn serves(host: &Host) {
    let done = Finished::of(&mut host.run(&[
        PY,
        "-c",
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print('ok')",
    ]));
    assert_eq!(done.stdout.trim(), "ok", "{done}");
}

fn host() -> Host {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    host
}

#[test]
fn a_frame_that_is_none_is_on_record_and_ends_its_channel() {
    let host = host();
    let done = script(
        &host,
        r"
d = door()
for bad in [b'', b'x', frame(2)[:143], frame(2) + b'x', frame(2, magic=b'NOPE'), frame(2, version=9), frame(99), frame(1), bytes(144), bytes(5000)]:
    c = channel(d)
    c.send(bad)
    if bad:
        assert c.recv(1000) == b'', bad
for bad in [b'x', frame(2), frame(1)]:
    e = door()
    e.settimeout(5)
    e.send(bad)
    assert e.recv(1000) == b'', bad
good = channel(d)
good.send(frame(2, call=1))
assert errno_of(reply(good)[0]) == 0
print('done')",
    );
    assert_eq!(done.stdout.trim(), "done", "{done}");
    let said: Vec<Value> = host.records().into_iter().filter(|r| r["op"] == "protocol").collect();
    assert_eq!(said.len(), 12, "{said:#?}");
    assert!(said.iter().all(|r| r["verdict"] == "refuse" && r["exe"].as_str().unwrap().contains("python3")));
    for words in [
        "frame of 1 bytes",
        "frame of 143 bytes",
        "version 9",
        "unknown request 99",
        "begins with",
        "too long",
    ] {
        assert!(said.iter().any(|r| r["reason"].as_str().unwrap().contains(words)), "{words}");
    }
    serves(&host);
}

#[test]
fn what_is_attached_is_looked_at_not_believed() {
    let host = host();
    host.policy("allow tcp/80(*, *);");
    let done = script(
        &host,
        r"
d = door(); c = channel(d)
def ask(f, fd=None):
    if fd is None: c.send(f)
    else: c.sendmsg([f], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fd))])
    return errno_of(reply(c)[0])
tcp = socket.socket(); udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); null = os.open('/dev/null', 0)
print(ask(frame(2, call=1), [tcp.fileno()]), ask(frame(2, call=1), [udp.fileno()]), ask(frame(2, call=1), [null]), ask(frame(2, call=77)))
for n in [2, 50, 250]:
    c = channel(d)
    c.sendmsg([frame(2, call=1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [null] * n))])
    assert c.recv(1000) == b''",
    );
    // A stream to port 80 is permitted; a datagram to port 80 is not, whatever the frame says.
    assert_eq!(done.stdout.trim(), "0 13 0 13", "{done}");
    serves_after_refusals(&host);
}

fn serves_after_refusals(host: &Host) {
    host.policy(ALLOW_ALL);
    eventually("it serves", || {
        let done = Finished::of(&mut host.run(&[
            PY,
            "-c",
            "import socket; socket.create_server(('127.0.0.1', 0)); print('ok')",
        ]));
        (done.stdout.trim() == "ok").then_some(())
    });
}

#[test]
fn another_process_on_a_channel_is_judged_as_itself() {
    let host = host();
    host.policy("allow tcp/80(process{user=\"root\"}, *);");
    let done = script(
        &host,
        r"
d = door(); c = channel(d)
c.send(frame(2, call=1)); print(errno_of(reply(c)[0]), flush=True)
if os.fork() == 0:
    os.setuid(65534)
    c.send(frame(2, call=1)); print(errno_of(reply(c)[0]), flush=True)
    os._exit(0)
os.wait()
c.send(frame(2, call=1)); print(errno_of(reply(c)[0]), flush=True)",
    );
    assert_eq!(done.stdout.split_whitespace().collect::<Vec<_>>(), ["0", "13", "0"], "{done}");
}

#[test]
fn forged_records_are_shown_as_what_they_are() {
    let host = host();
    let done = script(
        &host,
        r"
import mmap
d = door(); c = channel(d)
t = socket.socket()
c.sendmsg([frame(2, call=1, flags=2)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [t.fileno()]))])
data, fds = reply(c)
assert len(fds) == 3, fds
for fd in fds[:2]:
    try: mmap.mmap(fd, 0); raise SystemExit('writable')
    except PermissionError: pass
ring = mmap.mmap(fds[2], 0)
generation = struct.unpack_from('<Q', data, 32)[0]
def put(at, remote, rule, call=1):
    w = struct.pack('<BBBBiIQQQ', call, 6, 0, 0, 5, rule, generation, time.time_ns(), 0) + bytes(28)
    w += struct.pack('<BBHII', 4, 0, 80, 0, 0) + socket.inet_aton(remote) + bytes(12)
    base = 128 + at * 96
    ring[base + 4:base + 4 + len(w)] = w
    ring[base:base + 4] = struct.pack('<I', at + 1)
put(0, '10.9.9.9', 0)       # what was given
put(1, '10.9.9.9', 7)       # another rule
put(2, '127.0.0.1', 0)      # never cached
put(3, '10.9.9.9', 0, 250)  # no such call
c.send(frame(4)); reply(c)
# All of the ring is garbage now; heads and stamps too.
ring[:] = os.urandom(len(ring))
c.send(frame(6)); c.send(frame(4)); reply(c)
for i in range(2048):
    ring[128 + i * 96:132 + i * 96] = struct.pack('<I', (4 + i if i >= 4 else 2052 + i) + (1 if i >= 4 else -3))
c.send(frame(4)); reply(c)
print('done')",
    );
    assert_eq!(done.stdout.trim(), "done", "{done}");
    let records = host.records();
    let claims: Vec<_> = records.iter().filter(|r| r["via"] == "table").collect();
    // What was given, and not used: the kernel's own record would be there if it had been.
    assert!(claims.iter().all(|r| r["verdict"] == "refuse" && r["claim"].is_string()), "{claims:#?}");
    assert!(claims.len() >= 3);
    serves(&host);
}

#[test]
fn a_user_cannot_take_all_channels() {
    let host = host();
    host.write("state/portcullis.toml", "[limits]\nchannels_per_user = 40\nprocesses_per_user = 20\n");
    let _keeps = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    let done = script(
        &host,
        r"
os.setuid(65534)
d = door(); got = 0; kept = []
try:
    while got < 1000:
        kept.append(channel(d)); got += 1
except (OSError, AssertionError):
    pass
print(got)
",
    );
    let got: u32 = done.stdout.trim().parse().unwrap_or_else(|_| panic!("{done}"));
    assert!((20..=40).contains(&got), "{got}");
    host.record("turned away", |r| r["reason"].as_str().is_some_and(|t| t.contains("turned away")));
    serves(&host);
}

#[test]
fn thousands_of_doors_cost_others_nothing() {
    let host = host();
    host.write("state/portcullis.toml", "[limits]\nchannels_per_user = 1000000\n");
    let _keeps = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    let flood = host.start(&[
        PY,
        "-c",
        &format!("{CLIENT}\nimport resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))\nall = []\ntry:\n    for i in range(6000): all.append(door())\nexcept OSError as e: pass\nprint('full', len(all), flush=True)\ntime.sleep(1000)"),
    ]);
    flood.line("full");
    serves(&host);
}

#[test]
fn a_user_who_floods_waits_behind_the_others() {
    let host = host();
    let _keeps = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    let flood = host.start(&[
        PY,
        "-c",
        &format!(
            "{CLIENT}\nimport select\nos.setuid(65534)\nd = door()\nall = [channel(d) for i in range(800)]\nprint('floods', flush=True)\nf = frame(2, call=3)\nfor c in all: c.setblocking(False)\n\
             while True:\n    for c in all:\n        try:\n            while True: c.send(f)\n        except OSError: pass\n        try:\n            while True: c.recv(200)\n        except OSError: pass"
        ),
    ]);
    flood.line("floods");
    let script = "import socket, time\nworst = 0\nfor i in range(20):\n    t = time.time(); s = socket.create_server(('127.0.0.1', 0)); s.close(); worst = max(worst, time.time() - t)\nprint(worst)";
    let done = Finished::of(&mut host.run(&[PY, "-c", script]));
    let worst: f64 = done.stdout.trim().parse().unwrap_or_else(|_| panic!("{done}"));
    assert!(worst < 2.0, "{worst}");
}

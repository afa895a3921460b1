//! guard: what a program pays for being held, beside the same program free, in one run.
//!
//! With the backstop the shim's calls leave from its page and the kernel checks them; a static program's are held
//! until the broker has judged them. Without it, every judged call of both is held and made by proxy.

use std::{
    fs, io,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use portcullis_benches::{median, net::Far, row, turns::Turn};

const PORT: u16 = 7;
const ECHO: u16 = 8;
const BATCH: usize = 200;
/// Where two processes lie in memory and on the processor's cores makes one some percent quicker than the other for as
/// long as they live: so many pairs are compared, each for so many turns.
const PAIRS: usize = 9;
const TURNS: usize = 20;
const RULES: usize = 1000;

/// Who is held how, doing what, and how much of its speed it shall keep.
struct Case {
    name: &'static str,
    linked: &'static str,
    kind: &'static str,
    backstop: bool,
    goal: f64,
}

const CASES: [Case; 5] = [
    Case { name: "shim, backstop: connect", linked: "dynamic", kind: "connect", backstop: true, goal: 0.90 },
    Case { name: "shim, backstop: sendmsg", linked: "dynamic", kind: "data", backstop: true, goal: 0.99 },
    Case { name: "static, backstop: connect", linked: "static", kind: "connect", backstop: true, goal: 0.70 },
    Case {
        name: "shim, no backstop: connect",
        linked: "dynamic",
        kind: "connect",
        backstop: false,
        goal: 0.70,
    },
    Case {
        name: "static, no backstop: connect",
        linked: "static",
        kind: "connect",
        backstop: false,
        goal: 0.70,
    },
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["server"] => server(),
        some => bench(
            some.first().and_then(|n| n.parse().ok()).unwrap_or(PAIRS),
            some.get(1).copied().unwrap_or_default(),
        ),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            row(&format!("guard: {error}"));
            ExitCode::from(2)
        }
    }
}

fn server() -> io::Result<bool> {
    let echo = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO))?;
    std::thread::spawn(move || {
        while let Ok((mut flow, _)) = echo.accept() {
            std::thread::spawn(move || {
                let _ = flow.set_nodelay(true);
                let mut byte = [0];
                while flow.read_exact(&mut byte).and_then(|()| flow.write_all(&byte)).is_ok() {}
            });
        }
    });
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    loop {
        drop(listener.accept());
    }
}

fn compile(folder: &Path, name: &str, options: &[&str]) -> io::Result<PathBuf> {
    let source = folder.join("client.c");
    fs::write(&source, include_str!("guard.c"))?;
    let to = folder.join(name);
    let done = Command::new("cc").args(["-O2", "-o"]).arg(&to).arg(&source).args(options).status()?;
    if done.success() { Ok(to) } else { Err(io::Error::other("the client does not compile")) }
}

fn client(program: &Path, case: &Case, run: Option<&[String]>) -> Command {
    let port = if case.kind == "data" { ECHO } else { PORT };
    let mut words: Vec<String> = run.unwrap_or_default().to_vec();
    words.push(program.to_string_lossy().into_owned());
    words.extend(["10.77.1.1".to_owned(), port.to_string(), case.kind.to_owned()]);
    let (first, rest) = words.split_first().map_or(("", [].as_slice()), |(f, r)| (f, r));
    let mut command = Command::new(first);
    command.args(rest);
    if !case.backstop {
        command.env("PORTCULLIS_NO_BACKSTOP", "1");
    }
    command
}

/// Compares so many pairs in each case whose name has `wanted` in it.
fn bench(pairs: usize, wanted: &str) -> io::Result<bool> {
    let mut far = Far::new("guard")?;
    let mut serve = far.command(&std::env::current_exe()?);
    serve.arg("server");
    far.serve(serve)?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let policy = far.policy(RULES)?;
    let programs = [
        ("dynamic", compile(&far.folder, "dynamic", &[])?),
        ("static", compile(&far.folder, "static", &["-static"])?),
    ];
    row(&format!("{RULES} rules, {pairs} pairs, {TURNS} turns of {BATCH} each; medians"));
    row(&format!("{:30} {:>9} {:>9} {:>7} {:>6}", "", "free us", "held us", "ratio", "goal"));
    let mut within = true;
    for case in CASES.iter().filter(|case| case.name.contains(wanted)) {
        let Some((_, program)) = programs.iter().find(|(linked, _)| *linked == case.linked) else { continue };
        // Those without backstop have a broker of their own.
        let mut run = far.run(&policy);
        if !case.backstop
            && let Some(state) =
                run.iter().position(|word| word == "--state").and_then(|at| run.get_mut(at + 1))
        {
            state.push_str("-alone");
        }
        let [mut free, mut held, mut ratios] = [(); 3].map(|()| Vec::with_capacity(pairs));
        for _ in 0..pairs {
            let [one, other, ratio] =
                compare(client(program, case, None), client(program, case, Some(&run)))?;
            free.push(one);
            held.push(other);
            ratios.push(ratio);
        }
        let ratio = median(ratios);
        let good = ratio >= case.goal;
        row(&format!(
            "{:30} {:9.2} {:9.2} {ratio:7.3} {:6.2} {}",
            case.name,
            median(free),
            median(held),
            case.goal,
            if good { "" } else { "MISSED" }
        ));
        within &= good;
    }
    Ok(within)
}

/// One pair: microseconds of the free one and of the held one, and the held one's rate by the free one's.
fn compare(free: Command, held: Command) -> io::Result<[f64; 3]> {
    let mut free = Turn::start("free", free)?;
    let mut held = Turn::start("held", held)?;
    for turn in 0..TURNS {
        // Who goes first changes, so that neither always finds warm caches.
        let (one, other) = if turn % 2 == 0 { (&mut free, &mut held) } else { (&mut held, &mut free) };
        one.take(BATCH)?;
        other.take(BATCH)?;
    }
    let result = [free.micros(), held.micros(), held.ratio(&free)];
    free.end();
    held.end();
    Ok(result)
}

//! dial-threads ADDRESS:PORT [COUNT]: four threads that each connect as often as said.

use std::{net::TcpStream, process::ExitCode};

use portcullis_demo_apps::{ask, main_of, name_of, say};

const THREADS: usize = 4;

fn main() -> ExitCode {
    main_of(|arguments| {
        let (to, count) = (arguments.address()?, arguments.count());
        let mut answers: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn(move || {
                        let one = |n| {
                            TcpStream::connect(to)
                                .and_then(|stream| ask(stream, thread * count + n))
                                .unwrap_or_else(|error| name_of(&error))
                        };
                        (0..count).map(one).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
        });
        answers.sort();
        answers.iter().for_each(|answer| say(answer));
        Ok(())
    })
}

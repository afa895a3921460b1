//! serve-stdin: answers on the connection that is its standard input, as servers under inetd do. Reads
//! end-of-file at once if there is none.

use std::{
    io::{self, BufRead, Write},
    process::ExitCode,
};

use portcullis_demo_apps::{main_of, name_of, say};

fn main() -> ExitCode {
    main_of(|_| {
        let mut line = String::new();
        match io::stdin().lock().read_line(&mut line) {
            Ok(0) => writeln!(io::stderr(), "end of file"),
            Ok(_) => {
                say(&line.trim_end().replace("ping", "pong"));
                Ok(())
            }
            Err(error) => writeln!(io::stderr(), "{}", name_of(&error)),
        }
    })
}

//! The test kit's program: `crosslink-testkit demo DIR` shows plugin and agent in `DIR` at work.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

mod demo;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["demo", dir] => demo::run(PathBuf::from(dir)),
        _ => {
            eprintln!("usage: crosslink-testkit demo DIRECTORY_OF_PLUGIN_AND_AGENT");
            ExitCode::from(2)
        }
    }
}

//! The demo's entry point.
#![expect(clippy::print_stderr, reason = "a command line tool")]

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!("usage: crosslink-testkit (no commands yet)");
    ExitCode::from(2)
}

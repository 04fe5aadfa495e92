//! `crosslink-agent`.

use std::process::ExitCode;

fn main() -> ExitCode {
    crosslink_agent::app::main()
}

//! The chained CNI plugin: parses one call, lets `crosslink-core` decide and `crosslink-kernel` act, answers.
//!
//! Standard output is the protocol: exactly one JSON object for ADD, VERSION and every error (a panic too), nothing for
//! the others. The exit status is 0 or 1. Logs go to standard error and the log file.

mod add;
mod call;
mod check;
mod del;
mod gc;
mod logging;
mod reply;
mod status;

use std::{
    io::{Read, Write},
    process::ExitCode,
};

use crosslink_core::error::{Code, Error};
use crosslink_kernel::Kernel;
use rscni_plugin::types::Cmd;

use crate::call::Call;
pub use crate::{call::Env, reply::answer_panics};

/// Opens the kernel's node side; only verbs that look at the kernel do.
pub type Open<'a> = &'a dyn Fn() -> Result<Box<dyn Kernel>, crosslink_kernel::Error>;

/// Carries out one call.
pub fn run(env: &Env, stdin: &mut dyn Read, stdout: &mut dyn Write, open: Open<'_>) -> ExitCode {
    if env.command.is_empty() {
        // As the reference plugins do when a person calls them.
        reply::about();
        return ExitCode::SUCCESS;
    }
    let outcome = env.command.parse::<Cmd>().map_err(reply::from_rscni).and_then(|verb| match verb {
        Cmd::Version => reply::version(stdout).map_err(|err| reply::unwritable(&err)),
        verb => {
            let input = call::read(stdin)?;
            reply::remember_version(&input);
            let call = Call::parse(verb, env, &input)?;
            logging::begin(&call);
            let outcome = dispatch(&call, stdout, open);
            logging::end(&outcome);
            outcome
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            reply::error(stdout, &err);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(call: &Call<'_>, stdout: &mut dyn Write, open: Open<'_>) -> Result<(), Error> {
    match call.verb {
        Cmd::Add => {
            let mut kernel = open()?;
            let added = add::add(call, kernel.as_mut())?;
            let written = stdout.write_all(added.output.as_bytes()).and_then(|()| stdout.flush());
            written.map_err(|err| {
                added.undo(kernel.as_mut());
                reply::unwritable(&err)
            })
        }
        Cmd::Del => del::del(call, open()?.as_mut()),
        Cmd::Check => check::check(call, open()?.as_mut()),
        Cmd::Gc => gc::gc(call, open),
        Cmd::Status => status::status(call),
        Cmd::Version => Err(Error::new(Code::Internal, "VERSION takes no configuration")),
    }
}

//! STATUS: whether an ADD would work, from files alone; kubelets ask every few seconds.

use crosslink_core::{
    error::{Code, Error},
    netconf::{self, FailPolicy, Strictness},
};
use crosslink_kernel::{files, records::Records};

use crate::{call::Call, logging};

/// Carries out STATUS.
///
/// # Errors
/// Code 50.
pub fn status(call: &Call<'_>) -> Result<(), Error> {
    let unavailable = |err: Error| Error { code: Code::NotAvailable, ..err };
    let (conf, findings) = netconf::parse(&call.raw, Strictness::Near).map_err(unavailable)?;
    logging::configure(&conf);
    // Asked every few seconds, so what ADD says once is not said here.
    findings.iter().for_each(|finding| log::debug!("{finding}"));
    if conf.fail_policy == FailPolicy::Open {
        return Ok(());
    }
    let remotes = files::read_remotes(&conf.remotes_dir);
    if remotes.broken {
        return Err(unavailable(crate::add::broken_remotes(&remotes.findings)));
    }
    Records::new(&conf.state_dir).writable().map_err(|err| {
        Error::new(Code::NotAvailable, format!("failPolicy is closed and no record could be written: {err}"))
    })
}

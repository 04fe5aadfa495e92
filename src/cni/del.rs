//! DEL: best effort. It succeeds when nothing is left to do, however often it is called.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crosslink_core::{
    error::{Code, Error},
    finding::{Finding, Id},
    model::{Change, Observed},
    netconf::{self, Strictness},
    numbers::VethNames,
    plan::{Recorded, teardown, teardown_unrecorded},
    record::{NetnsId, Record},
};
use crosslink_kernel::{
    Kernel, NodeQuery, PodQuery,
    attachment::{apply_all, look, look_at_node},
    converge::claims_of_others,
    records::Records,
};

use crate::{add::LOCK_WAIT, call::Call, logging};

/// Carries out DEL.
///
/// # Errors
/// Something is left that could not be removed.
pub fn del(call: &Call<'_>, kernel: &mut dyn Kernel) -> Result<(), Error> {
    let (conf, mut findings) = netconf::parse(&call.raw, Strictness::Lenient)?;
    logging::configure(&conf);
    let records = Records::new(&conf.state_dir);
    // The path may have to come from the record; what the record says counts only under the lock.
    let path = sandbox_path(call, &records);
    let id = enter(path.as_deref(), kernel)?;
    let record = match records.read(&call.env.container_id, &call.env.ifname) {
        Ok(record) => record,
        Err(why) => {
            findings.push(Finding::new(Id::State, why));
            None
        }
    };
    let changes = match &record {
        Some(record) => recorded(record, &records, id.as_ref(), kernel)?,
        None => unrecorded(call, &records, id.as_ref(), kernel)?,
    };
    let refused = apply_all(&changes, kernel);
    if let Some(first) = refused.first() {
        // The record stays: the runtime will call again.
        let all: Vec<String> = refused.iter().map(ToString::to_string).collect();
        return Err(Error::new(Code::Io, format!("what could not be removed: {}, first {first}", refused.len()))
            .with_details(all.join("\n")));
    }
    if let Err(err) = records.remove(&call.env.container_id, &call.env.ifname) {
        findings.push(Finding::new(Id::State, format!("record: {err}")));
    }
    logging::findings(&findings);
    log::info!("done: {} changes", changes.len());
    Ok(())
}

/// The sandbox that the runtime names; where it has closed it, the one that the record names.
fn sandbox_path(call: &Call<'_>, records: &Records) -> Option<PathBuf> {
    call.netns().map(Path::to_owned).or_else(|| {
        let record = records.read(&call.env.container_id, &call.env.ifname).ok().flatten()?;
        Some(record.netns.path)
    })
}

/// Enters the sandbox; none where it is gone.
fn enter(path: Option<&Path>, kernel: &mut dyn Kernel) -> Result<Option<NetnsId>, Error> {
    let Some(path) = path else { return Ok(None) };
    match kernel.enter(path, LOCK_WAIT) {
        Ok(id) => Ok(Some(id)),
        Err(err) if err.is_gone() => {
            log::debug!("the sandbox is gone: {err}");
            Ok(None)
        }
        Err(err) => Err(err.into()),
    }
}

/// Changes by the record. A sandbox of another identity is somebody else's.
fn recorded(
    record: &Record,
    records: &Records,
    id: Option<&NetnsId>,
    kernel: &mut dyn Kernel,
) -> Result<Vec<Change>, Error> {
    let observed = if id.is_some_and(|id| id.same(&record.netns)) {
        look(&record.applied, &record.saved, kernel)?
    } else {
        Observed { node: look_at_node(&record.applied, kernel)?, ..Observed::default() }
    };
    let own = record.claims();
    let more = observed.pod.routes.iter().any(|seen| seen.ours() && !own.contains(&seen.route.dst));
    let claimed = match id {
        // Read only where there is something that they may claim.
        Some(id) if more => claims_of_others(records, id, (&record.container_id, &record.ifname)),
        _ => BTreeSet::new(),
    };
    let recorded = Recorded { ifname: &record.ifname, applied: &record.applied, saved: &record.saved };
    Ok(teardown(recorded, &observed, &claimed))
}

/// Changes by what can be derived.
fn unrecorded(
    call: &Call<'_>,
    records: &Records,
    id: Option<&NetnsId>,
    kernel: &mut dyn Kernel,
) -> Result<Vec<Change>, Error> {
    let name = VethNames::of(&call.env.container_id, &call.env.ifname).node;
    let mut observed = Observed {
        node: kernel.observe_node(&NodeQuery { veth: Some(name.clone()), ..NodeQuery::default() })?,
        ..Observed::default()
    };
    let mut sole = false;
    if let Some(id) = id {
        observed.pod = kernel.observe_pod(&PodQuery { state: true, ..PodQuery::default() })?;
        // Another attachment's routes carry our protocol too. A record that cannot be read may be of this sandbox.
        let routes_of_ours = observed.pod.routes.iter().any(|seen| seen.ours());
        let others = || records.others(&call.env.container_id, &call.env.ifname);
        sole = routes_of_ours && others().iter().all(|other| other.as_ref().is_ok_and(|other| !other.netns.same(id)));
    }
    Ok(teardown_unrecorded(&name, &observed, sole))
}

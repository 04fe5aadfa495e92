//! CHECK: the kernel against what the record says was applied. Newer remotes are no drift.

use std::collections::BTreeSet;

use crosslink_core::{
    destinations::Refusal,
    error::{Code, Error},
    facts::Attached,
    netconf::{self, NetConf, Strictness},
    node::NodeFacts,
    numbers::VethNames,
    plan::drift,
    record::{Record, State},
    remotes::Merged,
    request::PodRequest,
    wanted::Identity,
};
use crosslink_kernel::{
    Kernel, NodeQuery,
    attachment::{Attachment, look, look_at_pod},
    converge::claims_of_others,
    records::Records,
};

use crate::{add::LOCK_WAIT, call::Call, logging};

/// Carries out CHECK.
///
/// # Errors
/// Code 104 with the exact differences.
pub fn check(call: &Call<'_>, kernel: &mut dyn Kernel) -> Result<(), Error> {
    let (conf, findings) = netconf::parse(&call.raw, Strictness::Near)?;
    logging::configure(&conf);
    logging::findings(&findings);
    let netns = call.netns().ok_or_else(|| Error::new(Code::Environment, "CNI_NETNS must be set for CHECK"))?;
    let id = kernel.enter(netns, LOCK_WAIT)?;
    let records = Records::new(&conf.state_dir);
    let record = records.read(&call.env.container_id, &call.env.ifname).unwrap_or_else(|why| {
        log::warn!("XL-STATE {why}");
        None
    });
    let lines = match record {
        None => unrecorded(call, &conf, kernel)?,
        Some(record) if !record.netns.same(&id) => {
            vec![format!("the record is of another sandbox ({})", record.netns.path.display())]
        }
        Some(record) if record.state == State::Adding => {
            vec!["the record says that ADD did not come to its end".to_owned()]
        }
        Some(record) => {
            recorded(&record, &claims_of_others(&records, &id, (&call.env.container_id, &call.env.ifname)), kernel)?
        }
    };
    log::info!("done: {} differences", lines.len());
    differences(&lines)
}

fn differences(lines: &[String]) -> Result<(), Error> {
    /// Differences in the message itself; the others are in the details, which runtimes show right after it.
    const SHOWN: usize = 3;
    if lines.is_empty() {
        return Ok(());
    }
    let (shown, rest) = lines.split_at(lines.len().min(SHOWN));
    let count = lines.len();
    let places = if count == 1 { "place" } else { "places" };
    let msg = format!("the pod's network differs in {count} {places} from what was made: {}", shown.join("; "));
    Err(Error::new(Code::Drift, msg).with_details(rest.join("; ")))
}

fn recorded(record: &Record, claimed: &BTreeSet<ipnet::IpNet>, kernel: &mut dyn Kernel) -> Result<Vec<String>, Error> {
    let observed = look(&record.applied, &[], kernel)?;
    let mut lines = Vec::new();
    if observed.pod.link(&record.ifname).is_none() {
        lines.push(format!("missing: pod: interface {}", record.ifname));
    }
    lines.extend(drift(&record.applied, &observed, claimed));
    Ok(lines)
}

/// Without a record only what every ADD of an underlay pod makes is provably missing: its veth.
fn unrecorded(call: &Call<'_>, conf: &NetConf, kernel: &mut dyn Kernel) -> Result<Vec<String>, Error> {
    log::warn!("XL-STATE this attachment has no record; only its veth can be checked");
    let (request, remotes, node) = (PodRequest::default(), Merged::default(), NodeFacts::default());
    let identity = Identity { container_id: &call.env.container_id, ifname: &call.env.ifname };
    let attachment = Attachment {
        identity,
        conf,
        request: &request,
        ips: &[],
        remotes: &remotes,
        node: &node,
        refusal: Refusal::Finding,
    };
    let (_, facts) = look_at_pod(attachment, kernel)?;
    if facts.attached == Attached::Overlay {
        return Ok(Vec::new());
    }
    let name = VethNames::of(&call.env.container_id, &call.env.ifname).node;
    let state = kernel.observe_node(&NodeQuery { veth: Some(name.clone()), ..NodeQuery::default() })?;
    let missing = state.link(&name).is_none();
    Ok(missing.then(|| format!("missing: veth pair {} (pod) and {name} (node)", conf.veth_name)).into_iter().collect())
}

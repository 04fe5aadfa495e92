//! ADD.

use std::time::Duration;

use crosslink_core::{
    destinations::Refusal,
    error::{Code, Error},
    facts::Attached,
    finding::{Finding, Id},
    netconf::{self, FailPolicy, NetConf, Strictness},
    record::{NetnsId, Record},
    remotes::merge,
    request,
    result::PrevResult,
    wanted::Identity,
};
use crosslink_kernel::{
    Kernel,
    attachment::Attachment,
    converge::{Converge, Work},
    files,
    records::Records,
};

use crate::{call::Call, logging};

/// Longest wait for a sandbox's lock.
pub const LOCK_WAIT: Duration = Duration::from_secs(5);

/// An ADD that has been carried out.
#[derive(Debug)]
pub struct Added {
    /// The result, for standard output.
    pub output: String,
    work: Work,
}

impl Added {
    /// Takes everything back: the runtime will not learn that it succeeded.
    pub fn undo(&self, kernel: &mut dyn Kernel) {
        self.work.undo(kernel);
    }
}

/// Carries out ADD.
///
/// # Errors
/// As documented in the README; nothing is left changed then.
pub fn add(call: &Call<'_>, kernel: &mut dyn Kernel) -> Result<Added, Error> {
    let (conf, mut findings) = netconf::parse(&call.raw, Strictness::Near)?;
    logging::configure(&conf);
    let (request, noted) = request::parse(&call.raw, Strictness::Near)?;
    findings.extend(noted);
    let prev = PrevResult::parse(&call.raw, &call.env.ifname)?;
    let netns = call.netns().ok_or_else(|| Error::new(Code::Environment, "CNI_NETNS must be set for ADD"))?;
    let id = kernel.enter(netns, LOCK_WAIT)?;
    // Read under the lock: what changes while another call has it must not be missed.
    let files = files::read_remotes(&conf.remotes_dir);
    if files.broken && conf.fail_policy == FailPolicy::Closed {
        return Err(broken_remotes(&files.findings));
    }
    let (node, noted) = files::read_node(&conf.node_file);
    let remotes = merge(&files.files, node.cluster_name.as_deref());
    findings.extend(files.findings.into_iter().chain(noted).chain(remotes.findings.iter().cloned()));
    let identity = Identity { container_id: &call.env.container_id, ifname: &call.env.ifname };
    let attachment = Attachment {
        identity,
        conf: &conf,
        request: &request,
        ips: &prev.ips,
        remotes: &remotes,
        node: &node,
        refusal: Refusal::Error,
    };
    let records = Records::new(&conf.state_dir);
    let mut work = Work::new(records.clone(), &call.env.container_id, &call.env.ifname);
    judge_previous(&mut work, &id, &mut findings);
    let mut adding = Converge { attachment, id, network: &conf.name, pod: call.pod(), findings, work, facts: None };
    match converge(&mut adding, &records, &conf, kernel) {
        Ok(()) => {
            let output = prev.output(&call.cni_version);
            logging::findings(&adding.findings);
            Ok(Added { output, work: adding.work })
        }
        Err(err) => {
            adding.work.undo(kernel);
            Err(err)
        }
    }
}

/// Code 11 with every broken file named.
pub fn broken_remotes(findings: &[Finding]) -> Error {
    let texts: Vec<&str> = findings.iter().map(|finding| finding.text.as_str()).collect();
    Error::new(Code::TryAgain, format!("failPolicy is closed and a remotes file is broken: {}", texts.join("; ")))
}

/// Takes up the record of an earlier ADD of this attachment, if it is of this sandbox.
fn judge_previous(work: &mut Work, id: &NetnsId, findings: &mut Vec<Finding>) {
    match work.records.read(&work.container_id, &work.ifname) {
        Ok(Some(record)) if record.netns.same(id) => work.previous = Some(record),
        Ok(Some(record)) => {
            let text = format!("the record was of sandbox {}; it is replaced", record.netns.path.display());
            findings.push(Finding::new(Id::StaleRecord, text));
        }
        Ok(None) => {}
        Err(why) => findings.push(Finding::new(Id::State, why)),
    }
}

/// The record says what is about to be made before anything is, and that it was made afterwards.
fn converge(
    adding: &mut Converge<'_>,
    records: &Records,
    conf: &NetConf,
    kernel: &mut dyn Kernel,
) -> Result<(), Error> {
    let mut before = |record: &Record, findings: &mut Vec<Finding>| {
        if record.attached == Attached::Underlay {
            findings.extend(no_agent(conf));
        }
        write(&mut record.clone(), findings, records, conf)
    };
    let mut record = adding.run(kernel, &mut before)?;
    write(&mut record, &mut adding.findings, records, conf)?;
    log::info!("done: {} routes, {} changes", record.applied.pod_routes.len(), adding.work.done.len());
    Ok(())
}

/// Writes the record. Without one, DEL works from derivable names, so that it fails the pod only where the administrator
/// wants that.
fn write(record: &mut Record, findings: &mut Vec<Finding>, records: &Records, conf: &NetConf) -> Result<(), Error> {
    record.set_findings(findings);
    let Err(err) = records.write(record) else { return Ok(()) };
    if conf.fail_policy == FailPolicy::Closed {
        return Err(Error::new(
            Code::TryAgain,
            format!("failPolicy is closed and the record cannot be written: {err}"),
        ));
    }
    let finding = Finding::new(Id::State, format!("record: {err}"));
    if !findings.contains(&finding) {
        findings.push(finding);
    }
    Ok(())
}

/// Underlay traffic needs the agent's nftables rules (README, "Underlay pods and kube-proxy").
fn no_agent(conf: &NetConf) -> Option<Finding> {
    let socket = conf.state_dir.parent().map(|dir| dir.join("agent.sock"))?;
    (!socket.exists()).then(|| Finding::new(Id::NoAgent, format!("{} does not exist", socket.display())))
}

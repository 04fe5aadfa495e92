//! One attachment: from its record to its sandbox and back.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crosslink_core::{
    delta::{Delta, additions},
    destinations::{self, Refusal},
    facts::PodFacts,
    finding::Finding,
    model::{Change, Side, Sysctl},
    netconf::NetConf,
    node::NodeFacts,
    record::{NetnsId, Record, State, VERSION},
    remotes::Merged,
    request::PodRequest,
    result::ResultIp,
    wanted::{Identity, Wanted},
};
use crosslink_kernel::{
    Error as KernelError, Kernel, System,
    attachment::{Attachment, collect, is_alive},
    converge::{Converge, Work},
    records::Records,
};

use crate::inputs::Inputs;

use super::{pass::Key, propagation::Propagation};

/// A sandbox that the plugin works on is not waited for: the pass goes on with other attachments and comes back.
const LOCK_WAIT: Duration = Duration::ZERO;

/// What all attachments of a pass share.
#[derive(Debug)]
pub struct Env<'a> {
    /// Records.
    pub records: &'a Records,
    /// The agent's own remotes files and `node.json`.
    pub inputs: &'a Inputs,
    /// Where those are.
    pub remotes_dir: &'a Path,
    /// And that.
    pub node_file: &'a Path,
    /// Whether sandboxes can be seen.
    pub propagation: &'a Propagation,
}

/// What became of an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InStep {
    /// Routes in the sandbox.
    pub routes: usize,
    /// Changes made.
    pub changes: usize,
    /// The node's number for the sandbox.
    pub number: Option<u32>,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// Inode and time of the record, by which a later one is told.
    pub stamp: Option<Stamp>,
    /// What the record notes.
    pub findings: Vec<Finding>,
    /// What it takes to add routes quickly, where the agent's own files decide about it.
    pub quick: Option<Arc<Quick>>,
    /// Why the record could not be written.
    pub unwritten: Option<String>,
}

/// Inode and modification time in nanoseconds.
pub type Stamp = (u64, i64, i64);

/// What became of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is as it should be.
    InStep(InStep),
    /// There is no record any more, or ADD is not done: nothing to do.
    NotOurs,
    /// Its sandbox was gone; its record is, too.
    Collected,
    /// The plugin works on it.
    Busy,
    /// The sandbox cannot be seen from here, because of how the agent is mounted.
    Hidden(String),
    /// Something about it cannot be seen, and it is better left as it is.
    LeftAlone(String),
    /// A newer version's record.
    Newer(u64),
    /// Something went wrong.
    Failed(String),
}

/// Inode and time of a file.
pub fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec()))
}

/// Brings one attachment in step. The calling thread may be left in the sandbox.
pub fn sync(key: &Key, env: &Env<'_>) -> Outcome {
    match try_sync(key, env) {
        Ok(outcome) => outcome,
        Err(KernelError::Locked { .. }) => Outcome::Busy,
        Err(err) => Outcome::Failed(err.to_string()),
    }
}

fn try_sync(key: &Key, env: &Env<'_>) -> Result<Outcome, KernelError> {
    let path = env.records.path(&key.container_id, &key.ifname);
    let before = stamp(&path);
    let mut record = match read(key, env) {
        Ok(record) => record,
        Err(outcome) => return Ok(*outcome),
    };
    let mut kernel = System::new()?;
    let id = match kernel.enter(&record.netns.path, LOCK_WAIT) {
        Ok(id) => id,
        Err(err) if err.is_gone() => return gone(&record, &err, env, &mut kernel),
        Err(err) => return Err(err),
    };
    // What counts is what is there under the lock.
    let now = stamp(&path);
    if now != before {
        record = match read(key, env) {
            Ok(record) => record,
            Err(outcome) => return Ok(*outcome),
        };
    }
    if !record.netns.same(&id) {
        // Another sandbox took the path.
        let why = KernelError::NotNetns(record.netns.path.clone());
        return gone(&record, &why, env, &mut kernel);
    }
    // An ADD that was killed: the runtime deletes or repeats it, and the plugin knows how far it came.
    if record.state == State::Adding {
        return Ok(Outcome::NotOurs);
    }
    let number = kernel.number()?;
    let step = InStep { number, stamp: now, ..InStep::default() };
    Ok(converge(record, step, env, kernel))
}

fn read(key: &Key, env: &Env<'_>) -> Result<Record, Box<Outcome>> {
    let read = match env.records.read(&key.container_id, &key.ifname) {
        Ok(Some(record)) if record.version > VERSION => Err(Outcome::Newer(record.version)),
        Ok(Some(record)) => Ok(record),
        Ok(None) => Err(Outcome::NotOurs),
        Err(why) => Err(match env.records.version(&key.container_id, &key.ifname) {
            Some(version) if version > VERSION => Outcome::Newer(version),
            _ => Outcome::Failed(why),
        }),
    };
    read.map_err(Box::new)
}

/// A sandbox that is not where it was.
fn gone(record: &Record, why: &KernelError, env: &Env<'_>, kernel: &mut System) -> Result<Outcome, KernelError> {
    if record.netns.path.starts_with("/proc") {
        // The process may be gone, or in another PID namespace than the agent.
        return Ok(Outcome::LeftAlone(format!("{why}; sandboxes by process are collected by the runtime's DEL or GC")));
    }
    if let Some(text) = env.propagation.hides(&record.netns.path, why) {
        return Ok(Outcome::Hidden(text));
    }
    if is_alive(record, kernel)? {
        let text = format!("sandbox {} was unmounted, but its veth is alive", record.netns.path.display());
        return Ok(Outcome::LeftAlone(text));
    }
    // Somebody may have added the same attachment anew meanwhile.
    match env.records.read(&record.container_id, &record.ifname) {
        Ok(Some(now)) if now.netns == record.netns => collect(record, env.records, kernel)?,
        _ => return Ok(Outcome::NotOurs),
    }
    Ok(Outcome::Collected)
}

/// What of a record decides about writing it anew.
type Essence<'r> = (&'r Wanted, &'r [Sysctl], &'r [Finding], State);

fn essence(record: &Record) -> Essence<'_> {
    (&record.applied, &record.saved, &record.findings, record.state)
}

fn converge(record: Record, mut step: InStep, env: &Env<'_>, mut kernel: System) -> Outcome {
    let other = (record.wishes.remotes_dir != env.remotes_dir || record.wishes.node_file != env.node_file)
        .then(|| Inputs::read(&record.wishes.remotes_dir, &record.wishes.node_file));
    if let Some(other) = &other
        && (other.remotes.broken || other.node_finding.is_some() || !record.wishes.remotes_dir.is_dir())
    {
        // Not ours to guess: a missing directory would mean that there are no remotes.
        let (dir, file) = (record.wishes.remotes_dir.display(), record.wishes.node_file.display());
        let text = format!("it follows {dir} and {file}, which cannot be read here; give the agent the same libDir");
        return Outcome::LeftAlone(text);
    }
    let inputs = other.as_ref().unwrap_or(env.inputs);
    let asked = Asked::of(&record);
    let (network, pod, id) = (record.network.clone(), record.pod.clone(), record.netns.clone());
    let mut work = Work::new(env.records.clone(), &record.container_id, &record.ifname);
    work.previous = Some(record);
    let attachment = asked.attachment(inputs);
    let findings = inputs.findings();
    let mut converge = Converge { attachment, id: id.clone(), network: &network, pod, findings, work, facts: None };
    let made = converge.run(&mut kernel, &mut |_, _| Ok(()));
    step.changes = converge.work.done.len();
    let mut made = match made {
        Ok(made) => made,
        Err(err) => {
            if step.changes > 0 {
                // The record on disk says what there was before, and again is.
                converge.work.take_back(&mut kernel);
            }
            return Outcome::Failed(err.msg);
        }
    };
    made.set_findings(&converge.findings);
    step.routes = made.applied.pod_routes.len();
    let Converge { work, facts, .. } = converge;
    if work.previous.as_ref().is_none_or(|previous| essence(previous) != essence(&made)) {
        match env.records.write(&made) {
            Ok(()) => step.stamp = stamp(&env.records.path(&made.container_id, &made.ifname)),
            Err(err) => step.unwritten = Some(err.to_string()),
        }
    }
    step.findings = made.findings;
    let addresses = facts.iter().flat_map(|(pod, _)| &pod.addresses);
    step.addresses = addresses.map(|address| address.addr).collect();
    if other.is_none() {
        let path = env.records.path(&asked.container_id, &asked.ifname);
        step.quick = facts.map(|(pod, node)| Arc::new(Quick { asked, id, pod, node, record: (path, step.stamp) }));
    }
    Outcome::InStep(step)
}

/// What an attachment asks for, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    container_id: String,
    ifname: String,
    conf: NetConf,
    request: PodRequest,
    ips: Vec<ResultIp>,
}

impl Asked {
    fn of(record: &Record) -> Self {
        let (conf, request) = record.wishes.inputs();
        let ips = record.wishes.ips.iter().map(|&(addr, gateway)| ResultIp { addr, gateway }).collect();
        Self { container_id: record.container_id.clone(), ifname: record.ifname.clone(), conf, request, ips }
    }

    fn identity(&self) -> Identity<'_> {
        Identity { container_id: &self.container_id, ifname: &self.ifname }
    }

    fn attachment<'a>(&'a self, inputs: &'a Inputs) -> Attachment<'a> {
        Attachment {
            identity: self.identity(),
            conf: &self.conf,
            request: &self.request,
            ips: &self.ips,
            remotes: &inputs.merged,
            node: &inputs.node,
            refusal: Refusal::Finding,
        }
    }
}

/// What it takes to add routes to an attachment that was in step a moment ago, without looking at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quick {
    asked: Asked,
    id: NetnsId,
    pod: PodFacts,
    node: NodeFacts,
    record: (PathBuf, Option<Stamp>),
}

/// Adds what a change of remotes brings, at once and unseen. What is in the way of a route keeps its place, and whatever goes
/// wrong is left to the thorough pass that follows; that also writes the record. Returns how many routes were added.
pub fn add_quickly(quick: &Quick, merged: &Merged, delta: &Delta) -> usize {
    let Quick { asked, id, pod, node, record: (path, known) } = quick;
    let inputs = destinations::Inputs {
        conf: &asked.conf,
        request: &asked.request,
        remotes: merged,
        node,
        pod,
        refusal: Refusal::Finding,
    };
    let mut routes = additions(asked.identity(), inputs, delta).unwrap_or_default();
    // Another owner's route to the same prefix is a conflict whatever its metric; the thorough pass says so.
    routes.retain(|route| !pod.foreign.contains(&route.dst) && !pod.connected.contains(&route.dst));
    if routes.is_empty() {
        return 0;
    }
    let changes: Vec<Change> = routes.into_iter().map(|route| Change::AddRoute(Side::Pod, route)).collect();
    let added = System::new().and_then(|mut kernel| {
        let now = kernel.enter(&id.path, LOCK_WAIT)?;
        // Under the lock: DEL may have been here, or a new ADD.
        let current = now.same(id) && known.is_some() && stamp(path) == *known;
        Ok(if current { kernel.apply(&changes).done.len() } else { 0 })
    });
    added.unwrap_or_default()
}

/// Findings of many attachments, each once, with how many have it.
pub fn tally<'f>(findings: impl Iterator<Item = &'f Finding>) -> Vec<Finding> {
    let mut seen: Vec<(&Finding, usize)> = Vec::new();
    let mut known: BTreeSet<(&'static str, &str)> = BTreeSet::new();
    for finding in findings {
        if known.insert((finding.id.as_str(), &finding.text)) {
            seen.push((finding, 1));
        } else if let Some((_, count)) = seen.iter_mut().find(|(other, _)| *other == finding) {
            *count += 1;
        }
    }
    let text = |finding: &Finding, count: usize| match count {
        1 => finding.text.clone(),
        count => format!("{} (in {count} pods)", finding.text),
    };
    seen.into_iter().map(|(finding, count)| Finding::new(finding.id, text(finding, count))).collect()
}

//! ADD.

use std::{collections::BTreeSet, time::Duration};

use crosslink_core::{
    error::{Code, Error},
    facts::Attached,
    finding::{Finding, Id},
    model::{Change, Side, Sysctl},
    netconf::{self, FailPolicy, NetConf, Strictness},
    plan::{Conflict, Context, Plan, describe, plan},
    record::{NetnsId, Record, State, VERSION, Wishes},
    remotes::merge,
    request,
    result::PrevResult,
    wanted::{Identity, Wanted},
};
use crosslink_kernel::{
    Applied, Kernel,
    attachment::{self, Attachment, Prepared},
    files,
    records::Records,
};
use ipnet::IpNet;

use crate::{call::Call, lessons::Lessons, logging};

/// Longest wait for a sandbox's lock.
pub const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Most rounds of looking and changing: more than one is needed only where answers were lost or another writer came
/// between looking and changing.
const ROUNDS: usize = 5;

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

/// What has been changed so far, and what undoes it.
#[derive(Debug)]
struct Work {
    records: Records,
    container_id: String,
    ifname: String,
    previous: Option<Record>,
    done: Vec<Change>,
}

impl Work {
    fn undo(&self, kernel: &mut dyn Kernel) {
        let mut refused = attachment::undo(&self.done, kernel);
        if let Some(previous) = &self.previous
            && self.done.iter().any(|change| change.inverse().is_none())
        {
            // Some changes have no inverse of their own (a veth that had to go), but what was applied before is known.
            let claimed = claims_of_others(&self.records, &previous.netns, (&self.container_id, &self.ifname));
            refused.extend(attachment::restore(previous, &claimed, kernel));
        }
        for err in &refused {
            log::error!("undo: {err}");
        }
        let restored = match &self.previous {
            // The record stays for DEL where something could not be undone.
            _ if !refused.is_empty() => Ok(()),
            Some(previous) => self.records.write(previous),
            None => self.records.remove(&self.container_id, &self.ifname),
        };
        if let Err(err) = restored {
            log::error!("undo: {err}");
        }
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
    let attachment =
        Attachment { identity, conf: &conf, request: &request, ips: &prev.ips, remotes: &remotes, node: &node };
    let records = Records::new(&conf.state_dir);
    let mut adding = Adding { call, conf: &conf, attachment, id, findings, work: begin(call, records) };
    adding.judge_previous();
    match adding.converge(kernel) {
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

fn begin(call: &Call<'_>, records: Records) -> Work {
    Work {
        records,
        container_id: call.env.container_id.clone(),
        ifname: call.env.ifname.clone(),
        previous: None,
        done: Vec::new(),
    }
}

/// An ADD under way.
struct Adding<'a> {
    call: &'a Call<'a>,
    conf: &'a NetConf,
    attachment: Attachment<'a>,
    id: NetnsId,
    findings: Vec<Finding>,
    work: Work,
}

impl Adding<'_> {
    /// Takes up the record of an earlier ADD of this attachment, if it is of this sandbox.
    fn judge_previous(&mut self) {
        match self.work.records.read(&self.call.env.container_id, &self.call.env.ifname) {
            Ok(Some(record)) if record.netns.same(&self.id) => self.work.previous = Some(record),
            Ok(Some(record)) => {
                let text = format!("the record was of sandbox {}; it is replaced", record.netns.path.display());
                self.findings.push(Finding::new(Id::StaleRecord, text));
            }
            Ok(None) => {}
            Err(why) => self.findings.push(Finding::new(Id::State, why)),
        }
    }

    /// Looks, plans and applies until there is nothing left to change.
    fn converge(&mut self, kernel: &mut dyn Kernel) -> Result<(), Error> {
        let found = self.findings.len();
        let mut lessons = Lessons::new(self.attachment.node.clone());
        for _ in 0..ROUNDS {
            self.findings.truncate(found);
            self.findings.extend(lessons.findings.iter().cloned());
            let previous = self.work.previous.as_ref();
            let attachment = Attachment { node: &lessons.node, ..self.attachment };
            let mut prepared = attachment::prepare(attachment, previous, kernel)?;
            prepared.wanted.pod_routes.retain(|wanted| !lessons.refused.contains(&wanted.route));
            self.findings.append(&mut prepared.findings);
            let plan = self.plan(&mut prepared)?;
            let record = self.record(&prepared, &plan);
            self.write(&Record { state: State::Adding, ..record.clone() })?;
            let applied = self.apply(&plan.changes, kernel);
            if applied.failures.is_empty() && applied.unknown.is_empty() {
                return self.finish(record);
            }
            for (place, err) in applied.failures {
                let change = plan.changes.get(place);
                lessons.learn(change, err, &prepared.wanted, kernel)?;
            }
        }
        Err(Error::new(Code::TryAgain, "the sandbox's network kept changing while routes were added; try again"))
    }

    /// Applies one round's changes and notes what was done.
    fn apply(&mut self, changes: &[Change], kernel: &mut dyn Kernel) -> Applied {
        log::debug!("changes: {}", changes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
        let applied = kernel.apply(changes);
        let mut places: Vec<usize> = applied.done.iter().chain(&applied.unknown).copied().collect();
        places.sort_unstable();
        self.work.done.extend(places.iter().filter_map(|place| changes.get(*place)).cloned());
        applied
    }

    fn plan(&mut self, prepared: &mut Prepared) -> Result<Plan, Error> {
        let claimed = self.claimed(prepared);
        let previous = self.work.previous.as_ref();
        let context = Context {
            ifname: &self.call.env.ifname,
            previous: previous.map(|record| &record.applied),
            saved: previous.map_or(&[][..], |record| &record.saved),
            claimed: &claimed,
        };
        let plan = plan(&prepared.wanted, &prepared.observed, context);
        if let Some(name) = &plan.foreign_veth {
            return Err(foreign_veth(name, self.conf, prepared));
        }
        self.judge_conflicts(&plan.conflicts, &mut prepared.wanted)?;
        for route in &plan.identical {
            self.findings.push(Finding::new(Id::RouteIdentical, route.to_string()));
        }
        for change in &plan.changes {
            if let Change::ReplaceRoute(Side::Node, new, old) = change
                && new.dev != old.dev
            {
                self.findings.push(Finding::new(Id::AddressTaken, format!("{new}, was {old}")));
            }
        }
        if prepared.pod.attached == Attached::Underlay {
            self.findings.extend(no_agent(self.conf));
        }
        Ok(plan)
    }

    /// Destinations in this sandbox that other attachments' records hold. The records are read only where there is a
    /// route of ours that this attachment did not make.
    fn claimed(&self, prepared: &Prepared) -> BTreeSet<IpNet> {
        let own = self.work.previous.as_ref().map(Record::claims).unwrap_or_default();
        let routes = &prepared.observed.pod.routes;
        if routes.iter().all(|seen| !seen.ours() || own.contains(&seen.route.dst)) {
            return BTreeSet::new();
        }
        let env = self.call.env;
        claims_of_others(&self.work.records, &self.id, (&env.container_id, &env.ifname))
    }

    /// A conflict over a named CIDR is an error; over a remote one a finding, and the CIDR is not wanted any more.
    fn judge_conflicts(&mut self, conflicts: &[Conflict], wanted: &mut Wanted) -> Result<(), Error> {
        for conflict in conflicts {
            let named = wanted.pod_routes.iter().find(|route| route.route == conflict.wanted);
            let place = match conflict.side {
                Side::Pod => named.and_then(|route| route.named.as_deref()),
                Side::Node => Some("the node's route to the pod"),
            };
            let existing = describe(&conflict.existing);
            if let Some(place) = place {
                let wanted = &conflict.wanted;
                return Err(Error::new(
                    Code::RouteConflict,
                    format!(
                        "{place}: {} is held by another owner's route ({existing}), where {wanted} should be: remove that route, or the CIDR",
                        wanted.dst
                    ),
                ));
            }
            let text = format!("{}: another owner has {existing}", conflict.wanted.dst);
            self.findings.push(Finding::new(Id::RouteConflict, text));
            wanted.pod_routes.retain(|route| route.route != conflict.wanted);
        }
        Ok(())
    }

    fn record(&self, prepared: &Prepared, plan: &Plan) -> Record {
        let inputs = self.attachment.inputs(&prepared.pod, &prepared.node);
        let previous = self.work.previous.as_ref();
        let mut record = Record {
            version: VERSION,
            state: State::Ready,
            container_id: self.call.env.container_id.clone(),
            ifname: self.call.env.ifname.clone(),
            network: self.conf.name.clone(),
            netns: self.id.clone(),
            pod: self.call.pod(),
            attached: prepared.pod.attached,
            wishes: Wishes::of(inputs, self.attachment.ips),
            applied: prepared.wanted.clone(),
            saved: saved(&prepared.wanted, &plan.changes, previous, &self.work.done),
            findings: Vec::new(),
            extra: previous.map(|record| record.extra.clone()).unwrap_or_default(),
        };
        record.set_findings(&self.findings);
        record
    }

    fn finish(&mut self, record: Record) -> Result<(), Error> {
        let routes = record.applied.pod_routes.len();
        self.write(&record)?;
        log::info!("done: {routes} routes, {} changes", self.work.done.len());
        Ok(())
    }

    /// Writes the record. Without one, DEL works from derivable names, so that it fails the pod only where the
    /// administrator wants that.
    fn write(&mut self, record: &Record) -> Result<(), Error> {
        let Err(err) = self.work.records.write(record) else { return Ok(()) };
        if self.conf.fail_policy == FailPolicy::Closed {
            return Err(Error::new(
                Code::TryAgain,
                format!("failPolicy is closed and the record cannot be written: {err}"),
            ));
        }
        let finding = Finding::new(Id::State, format!("record: {err}"));
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
        Ok(())
    }
}

/// Destinations in a sandbox that the records of other attachments hold.
pub fn claims_of_others(records: &Records, id: &NetnsId, (container_id, ifname): (&str, &str)) -> BTreeSet<IpNet> {
    let others = records.others(container_id, ifname).into_iter().filter_map(Result::ok);
    others.filter(|record| record.netns.same(id)).flat_map(|record| record.claims()).collect()
}

/// Old values to put back: those of an earlier ADD first, since what is there now is that ADD's work.
fn saved(wanted: &Wanted, changes: &[Change], previous: Option<&Record>, done: &[Change]) -> Vec<Sysctl> {
    let mut saved: Vec<Sysctl> = previous.map(|record| record.saved.clone()).unwrap_or_default();
    saved.retain(|old| wanted.sysctls.iter().any(|want| want.sysctl.is_same(old)));
    for change in done.iter().chain(changes) {
        let Change::SetSysctl(new, Some(old)) = change else { continue };
        let restore = wanted.sysctls.iter().any(|wanted| wanted.restore && wanted.sysctl == *new);
        if restore && !saved.iter().any(|saved| saved.is_same(new)) {
            saved.push(Sysctl { value: old.clone(), ..new.clone() });
        }
    }
    saved
}

fn foreign_veth(name: &str, conf: &NetConf, prepared: &Prepared) -> Error {
    if name == prepared.pod.ifname {
        let text = format!("vethName \"{name}\" is the pod's own interface: set vethName to another name");
        return Error::new(Code::NoInterface, text);
    }
    let link = prepared.observed.pod.link(name);
    let kind = link.and_then(|link| link.kind.as_deref()).unwrap_or("physical");
    Error::new(
        Code::NoInterface,
        format!(
            "the sandbox already has an interface {name} (kind {kind}) that this attachment did not make: it may be \
             Spiderpool's coordinator's, or another crosslink attachment's; set vethName to another name in network {}",
            conf.name
        ),
    )
}

/// Underlay traffic needs the agent's nftables rules (README, "Underlay pods and kube-proxy").
fn no_agent(conf: &NetConf) -> Option<Finding> {
    let socket = conf.state_dir.parent().map(|dir| dir.join("agent.sock"))?;
    (!socket.exists()).then(|| Finding::new(Id::NoAgent, format!("{} does not exist", socket.display())))
}

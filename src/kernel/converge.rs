//! From a decision to the kernel, in as many rounds as it takes, and back if it fails: what ADD and the agent's resync
//! have in common. They differ in who is told ([`Refusal`]) and in when the record is written.

use std::collections::BTreeSet;

use crosslink_core::{
    destinations::Refusal,
    error::{Code, Error},
    facts::PodFacts,
    finding::{Finding, Id},
    model::{Change, Side, Sysctl},
    node::NodeFacts,
    plan::{Conflict, Context, Plan, describe, plan},
    record::{NetnsId, Pod, Record, State, VERSION, Wishes},
    wanted::Wanted,
};
use ipnet::IpNet;

use crate::{
    Applied, Kernel,
    attachment::{self, Attachment, Prepared},
    lessons::Lessons,
    records::Records,
};

/// Most rounds of looking and changing: more than one is needed only where answers were lost or another writer came
/// between looking and changing.
const ROUNDS: usize = 5;

/// What has been changed so far, and what undoes it.
#[derive(Debug)]
pub struct Work {
    /// Where records are.
    pub records: Records,
    /// Whose attachment.
    pub container_id: String,
    /// Its interface.
    pub ifname: String,
    /// The record of an earlier ADD of this attachment in this sandbox.
    pub previous: Option<Record>,
    /// What was carried out.
    pub done: Vec<Change>,
}

impl Work {
    /// Nothing done yet.
    pub fn new(records: Records, container_id: &str, ifname: &str) -> Self {
        Self {
            records,
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
            previous: None,
            done: Vec::new(),
        }
    }

    /// Takes everything back. The record is left as it was before, or stays for DEL where something could not be undone.
    pub fn undo(&self, kernel: &mut dyn Kernel) {
        let undone = self.take_back(kernel);
        let restored = match &self.previous {
            _ if !undone => Ok(()),
            Some(previous) => self.records.write(previous),
            None => self.records.remove(&self.container_id, &self.ifname),
        };
        if let Err(err) = restored {
            log::error!("undo: {err}");
        }
    }

    /// Takes back what was changed in the kernel; whether all of it could be.
    pub fn take_back(&self, kernel: &mut dyn Kernel) -> bool {
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
        refused.is_empty()
    }
}

/// An attachment on its way to what it should be. Its sandbox must have been entered.
#[derive(Debug)]
pub struct Converge<'a> {
    /// What is asked for.
    pub attachment: Attachment<'a>,
    /// The sandbox.
    pub id: NetnsId,
    /// Name of the network.
    pub network: &'a str,
    /// The pod.
    pub pod: Pod,
    /// What was noticed.
    pub findings: Vec<Finding>,
    /// What was done.
    pub work: Work,
    /// Pod and node, as the last round found them.
    pub facts: Option<(PodFacts, NodeFacts)>,
}

/// Called before each round of changes, with the record of what is about to be made. ADD writes it.
pub type Before<'b> = &'b mut dyn FnMut(&Record, &mut Vec<Finding>) -> Result<(), Error>;

impl Converge<'_> {
    /// Looks, plans and applies until there is nothing left to change. Returns the record of what is there then.
    ///
    /// # Errors
    /// As the decision's and the kernel's; code 11 where the sandbox keeps changing. What was done is in `work`.
    pub fn run(&mut self, kernel: &mut dyn Kernel, before: Before<'_>) -> Result<Record, Error> {
        let found = self.findings.len();
        let mut lessons = Lessons::new(self.attachment.node.clone(), self.attachment.refusal);
        for _ in 0..ROUNDS {
            self.findings.truncate(found);
            self.findings.extend(lessons.findings.iter().cloned());
            let attachment = Attachment { node: &lessons.node, ..self.attachment };
            let mut prepared = attachment::prepare(attachment, self.work.previous.as_ref(), kernel)?;
            prepared.wanted.pod_routes.retain(|wanted| !lessons.refused.contains(&wanted.route));
            self.findings.append(&mut prepared.findings);
            let plan = self.plan(&mut prepared)?;
            let record = self.record(&prepared, &plan);
            self.facts = Some((prepared.pod, prepared.node));
            before(&record, &mut self.findings)?;
            let applied = self.apply(&plan.changes, kernel);
            if applied.failures.is_empty() && applied.unknown.is_empty() {
                return Ok(Record { state: State::Ready, ..record });
            }
            for (place, err) in applied.failures {
                lessons.learn(plan.changes.get(place), err, &prepared.wanted, kernel)?;
            }
        }
        Err(Error::new(Code::TryAgain, "the sandbox's network kept changing while routes were added; try again"))
    }

    /// Applies one round's changes and notes what was done.
    fn apply(&mut self, changes: &[Change], kernel: &mut dyn Kernel) -> Applied {
        if log::log_enabled!(log::Level::Debug) && !changes.is_empty() {
            log::debug!("changes: {}", changes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
        }
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
            ifname: &self.work.ifname,
            previous: previous.map(|record| &record.applied),
            saved: previous.map_or(&[][..], |record| &record.saved),
            claimed: &claimed,
        };
        let plan = plan(&prepared.wanted, &prepared.observed, context);
        if let Some(name) = &plan.foreign_veth {
            return Err(foreign_veth(name, self.network, prepared));
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
        claims_of_others(&self.work.records, &self.id, (&self.work.container_id, &self.work.ifname))
    }

    /// A conflict over a named CIDR is an error where somebody can be told; else a finding, and the CIDR is not wanted any
    /// more.
    fn judge_conflicts(&mut self, conflicts: &[Conflict], wanted: &mut Wanted) -> Result<(), Error> {
        for conflict in conflicts {
            let named = wanted.pod_routes.iter().find(|route| route.route == conflict.wanted);
            let place = match conflict.side {
                Side::Pod => named.and_then(|route| route.named.as_deref()),
                Side::Node => Some("the node's route to the pod"),
            };
            let existing = describe(&conflict.existing);
            let must = self.attachment.refusal == Refusal::Error || conflict.side == Side::Node;
            if let Some(place) = place.filter(|_| must) {
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
            state: State::Adding,
            container_id: self.work.container_id.clone(),
            ifname: self.work.ifname.clone(),
            network: self.network.to_owned(),
            netns: self.id.clone(),
            pod: self.pod.clone(),
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

fn foreign_veth(name: &str, network: &str, prepared: &Prepared) -> Error {
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
             Spiderpool's coordinator's, or another crosslink attachment's; set vethName to another name in network {network}"
        ),
    )
}

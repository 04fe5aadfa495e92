//! From inputs to the kernel state that one attachment should have, and back to what it has: the steps that the plugin
//! and the agent share. Deciding is `crosslink-core`'s; this only asks the kernel at the right moments.

use std::collections::BTreeSet;

use crosslink_core::{
    destinations::{Inputs, Refusal, destinations},
    error::Error,
    facts::{self, Attached, PodFacts, pod_facts},
    finding::{Finding, Id},
    model::{Change, Link, NetnsState, Observed, Side, Sysctl},
    netconf::NetConf,
    node::{NodeFacts, addresses_from_kernel},
    numbers::{NODE_ADDRESS_LIMIT, VethNames},
    plan::{Context, plan},
    record::Record,
    remotes::Merged,
    request::PodRequest,
    result::ResultIp,
    wanted::{Identity, Wanted, wanted},
};

use ipnet::IpNet;

use crate::{Applied, Kernel, NodeQuery, PodQuery, records::Records};

/// What is asked for, and for whom.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    /// Whose attachment.
    pub identity: Identity<'a>,
    /// The conflist entry.
    pub conf: &'a NetConf,
    /// The pod's own wishes.
    pub request: &'a PodRequest,
    /// Addresses and gateways of the result.
    pub ips: &'a [ResultIp],
    /// Merged remotes files.
    pub remotes: &'a Merged,
    /// `node.json`.
    pub node: &'a NodeFacts,
    /// What becomes of named CIDRs that cannot be routed.
    pub refusal: Refusal,
}

/// Decided, and looked at, but nothing changed yet.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The pod.
    pub pod: PodFacts,
    /// The node, with addresses from the kernel where the file gave none.
    pub node: NodeFacts,
    /// What there should be.
    pub wanted: Wanted,
    /// What there is.
    pub observed: Observed,
    /// What was noticed.
    pub findings: Vec<Finding>,
}

impl<'a> Attachment<'a> {
    /// The inputs of the decision.
    pub const fn inputs(&self, pod: &'a PodFacts, node: &'a NodeFacts) -> Inputs<'a> {
        Inputs { conf: self.conf, request: self.request, remotes: self.remotes, node, pod, refusal: self.refusal }
    }

    fn facts(&self, pod: &NetnsState, node: &NetnsState) -> Result<PodFacts, Error> {
        let attachment = facts::Attachment {
            ifname: self.identity.ifname,
            mode: self.conf.mode,
            veth_name: &self.conf.veth_name,
            ips: self.ips,
        };
        pod_facts(attachment, pod, node)
    }
}

/// Looks at sandbox and node and decides. The sandbox must have been entered. `previous` is the record of an
/// earlier ADD of this attachment.
///
/// # Errors
/// As the decision's, and the kernel's.
pub fn prepare(
    attachment: Attachment<'_>,
    previous: Option<&Record>,
    kernel: &mut dyn Kernel,
) -> Result<Prepared, Error> {
    let (pod, facts) = look_at_pod(attachment, kernel)?;
    let mut node = attachment.node.clone();
    let mut findings = Vec::new();
    // A veth of an earlier ADD in another mode is in the way.
    let mut state = previous.map(|previous| look_at_node(&previous.applied, kernel)).transpose()?.unwrap_or_default();
    if facts.attached == Attached::Underlay {
        let names = VethNames::of(attachment.identity.container_id, attachment.identity.ifname);
        let query = NodeQuery {
            addresses: node.addresses.is_empty(),
            veth: Some(names.node),
            pods_table: true,
            ..NodeQuery::default()
        };
        state = kernel.observe_node(&query)?;
        if query.addresses {
            findings.extend(take_addresses(&mut node, &state));
        }
    }
    let inputs = attachment.inputs(&facts, &node);
    let destinations = destinations(inputs)?;
    let (wanted, noted) = wanted(attachment.identity, inputs, &destinations)?;
    findings.extend(destinations.findings);
    findings.extend(noted);
    let mut observed = Observed { pod, node: state };
    let saved = previous.map_or(&[][..], |previous| &previous.saved);
    complete(&wanted, saved, &mut observed, kernel)?;
    Ok(Prepared { pod: facts, node, wanted, observed, findings })
}

/// How the interface is attached.
///
/// # Errors
/// Code 101, and the kernel's.
pub fn look_at_pod(attachment: Attachment<'_>, kernel: &mut dyn Kernel) -> Result<(NetnsState, PodFacts), Error> {
    let pod = kernel.observe_pod(&PodQuery { state: true, ..PodQuery::default() })?;
    let peer = pod.link(attachment.identity.ifname).and_then(|link| link.peer);
    let node = kernel.observe_node(&NodeQuery { peer, ..NodeQuery::default() })?;
    let facts = attachment.facts(&pod, &node)?;
    Ok((pod, facts))
}

fn take_addresses(node: &mut NodeFacts, state: &NetnsState) -> Option<Finding> {
    let (addresses, total) = addresses_from_kernel(state);
    node.addresses = addresses;
    (total > NODE_ADDRESS_LIMIT).then(|| {
        let text = format!("this node has {total} addresses; pods are given routes to the first {NODE_ADDRESS_LIMIT}");
        Finding::new(Id::NodeAddresses, text)
    })
}

/// Looks at everything that a wanted state speaks of: for CHECK, DEL and resync.
///
/// # Errors
/// The kernel's.
pub fn look(wanted: &Wanted, saved: &[Sysctl], kernel: &mut dyn Kernel) -> Result<Observed, crate::Error> {
    let pod = kernel.observe_pod(&PodQuery { state: true, ..PodQuery::default() })?;
    let node = look_at_node(wanted, kernel)?;
    let mut observed = Observed { pod, node };
    complete(wanted, saved, &mut observed, kernel)?;
    Ok(observed)
}

/// The node's side alone, where the sandbox is gone.
///
/// # Errors
/// The kernel's.
pub fn look_at_node(wanted: &Wanted, kernel: &mut dyn Kernel) -> Result<NetnsState, crate::Error> {
    let Some(veth) = &wanted.veth else { return Ok(NetnsState::default()) };
    let query = NodeQuery { veth: Some(veth.node.clone()), pods_table: true, ..NodeQuery::default() };
    kernel.observe_node(&query)
}

/// Adds sysctls and the veth's neighbours to what was looked at.
fn complete(
    wanted: &Wanted,
    saved: &[Sysctl],
    observed: &mut Observed,
    kernel: &mut dyn Kernel,
) -> Result<(), crate::Error> {
    let keys = |side: Side| -> Vec<String> {
        let wanted = wanted.sysctls.iter().map(|wanted| &wanted.sysctl);
        wanted.chain(saved).filter(|sysctl| sysctl.side == side).map(|sysctl| sysctl.key.clone()).collect()
    };
    let veth = wanted.veth.as_ref().map(|veth| veth.pod.clone()).filter(|name| observed.pod.link(name).is_some());
    let (pod_keys, node_keys) = (keys(Side::Pod), keys(Side::Node));
    if veth.is_some() || !pod_keys.is_empty() {
        let more = kernel.observe_pod(&PodQuery { state: false, veth, sysctls: pod_keys })?;
        observed.pod.neighbours = more.neighbours;
        observed.pod.sysctls = more.sysctls;
    }
    if !node_keys.is_empty() {
        observed.node.sysctls = kernel.observe_node(&NodeQuery { sysctls: node_keys, ..NodeQuery::default() })?.sysctls;
    }
    Ok(())
}

/// Carries on past refusals, for DEL and GC: everything that can be done is done. Returns what could not.
pub fn apply_all(changes: &[Change], kernel: &mut dyn Kernel) -> Vec<crate::Error> {
    let mut refused = Vec::new();
    let mut rest: Vec<Change> = changes.to_vec();
    while !rest.is_empty() {
        let Applied { done, unknown, failures } = kernel.apply(&rest);
        let tried = |place: &usize| {
            done.contains(place) || unknown.contains(place) || failures.iter().any(|(at, _)| at == place)
        };
        let before = rest.len();
        rest = rest.iter().enumerate().filter(|(place, _)| !tried(place)).map(|(_, change)| change.clone()).collect();
        refused.extend(failures.into_iter().map(|(_, err)| err));
        if rest.len() == before {
            break;
        }
    }
    refused
}

/// Brings an attachment back to what an earlier ADD made of it. Returns what could not be done.
pub fn restore(record: &Record, claimed: &BTreeSet<IpNet>, kernel: &mut dyn Kernel) -> Vec<crate::Error> {
    let context = Context { ifname: &record.ifname, previous: None, saved: &[], claimed };
    match look(&record.applied, &[], kernel) {
        Ok(observed) => apply_all(&plan(&record.applied, &observed, context).changes, kernel),
        Err(err) => vec![err],
    }
}

/// Undoes changes that were carried out, last first.
pub fn undo(done: &[Change], kernel: &mut dyn Kernel) -> Vec<crate::Error> {
    let inverse: Vec<Change> = done.iter().rev().filter_map(Change::inverse).collect();
    apply_all(&inverse, kernel)
}

/// Whether a sandbox is alive: its path leads to it, or the node's end of its veth is still there, which goes with the
/// other end's namespace. A runtime may have unmounted the path of a sandbox in which processes run.
///
/// # Errors
/// The kernel's.
pub fn is_alive(record: &Record, kernel: &mut dyn Kernel) -> Result<bool, crate::Error> {
    if kernel.identify(&record.netns.path).is_some_and(|id| id.same(&record.netns)) {
        return Ok(true);
    }
    let node = look_at_node(&record.applied, kernel)?;
    let link = record.applied.veth.as_ref().and_then(|veth| node.link(&veth.node));
    Ok(link.is_some_and(|link| link.is_veth() && link.peer_elsewhere))
}

/// Removes what an attachment whose sandbox is gone left: a link that survived, and the record.
///
/// # Errors
/// The kernel's, and the file system's; the record stays then.
pub fn collect(record: &Record, records: &Records, kernel: &mut dyn Kernel) -> Result<(), crate::Error> {
    let node = look_at_node(&record.applied, kernel)?;
    let link = record.applied.veth.as_ref().filter(|veth| node.link(&veth.node).is_some_and(Link::is_veth));
    let changes: Vec<Change> = link.map(|veth| Change::DeleteNodeLink(veth.node.clone())).into_iter().collect();
    match apply_all(&changes, kernel).into_iter().next() {
        Some(err) => Err(err),
        None => records.remove(&record.container_id, &record.ifname),
    }
}

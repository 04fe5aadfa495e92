//! Selection and precedence: from configuration, annotations, remotes and facts to the prefixes that a pod is given
//! routes to. The order of precedence is the README's: (1) what is never routed, (2) node addresses, (3) the
//! administrator's `hijackCIDR`, (4) remote CIDRs inside local ones, (5) remote CIDRs that cover local ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    cidr::{host, never_routed},
    error::Error,
    facts::{Attached, PodFacts},
    finding::{Finding, Id},
    model::Family,
    netconf::NetConf,
    node::NodeFacts,
    numbers::{JOIN_LIMIT, SPLIT_LIMIT},
    remotes::Merged,
    request::PodRequest,
    select::Selection,
    set::{CidrSet, Entry, drop_covered, join_siblings, subtract},
};

/// What becomes of a CIDR that the administrator or the pod's author named and that cannot be routed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refusal {
    /// An error: somebody asks for it now and can be told.
    #[default]
    Error,
    /// A finding: it was accepted once, and what it needs has gone since. The pod keeps everything else.
    Finding,
}

/// Everything that decides which prefixes are routed.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The conflist entry.
    pub conf: &'a NetConf,
    /// The pod's own wishes.
    pub request: &'a PodRequest,
    /// Merged remotes files.
    pub remotes: &'a Merged,
    /// Facts about the node.
    pub node: &'a NodeFacts,
    /// Facts about the pod.
    pub pod: &'a PodFacts,
    /// What becomes of named CIDRs that cannot be routed.
    pub refusal: Refusal,
}

impl<'a> Inputs<'a> {
    /// The clusters in force: the pod's choice, else the conflist's.
    pub fn selection(&self) -> &'a Selection {
        self.request.hijack.as_ref().unwrap_or(&self.conf.hijack)
    }
}

/// What a destination carries besides its prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Path MTU, bytes.
    pub mtu: Option<u32>,
    /// Cluster it belongs to; none for named and local ones.
    pub cluster: Option<String>,
    /// Where it was named by the administrator or the pod's author; then a conflict is an error.
    pub named: Option<String>,
}

/// A prefix that gets a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The prefix.
    pub net: IpNet,
    /// What it carries.
    pub origin: Origin,
}

/// The outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destinations {
    /// Sorted by prefix, each once.
    pub list: Vec<Destination>,
    /// What was refused, and why.
    pub findings: Vec<Finding>,
}

/// Computes the destinations.
///
/// # Errors
/// Code 7 where a CIDR that the administrator or the pod's author named must be refused, and somebody can be told.
pub fn destinations(inputs: Inputs<'_>) -> Result<Destinations, Error> {
    let guard = Guard::new(inputs);
    let mut chosen = Chosen::default();
    for net in &inputs.conf.hijack_cidr {
        chosen.add_named(*net, "hijackCIDR", guard.administrators(net), inputs.refusal)?;
    }
    for named in &inputs.request.hijack_cidr {
        let verdict = guard.pod_authors(&named.net, &named.place);
        chosen.add_named(named.net, &named.place, verdict, inputs.refusal)?;
    }
    guard.add_remotes(inputs, &mut chosen);
    if inputs.pod.attached == Attached::Underlay {
        guard.add_local(inputs.node, &mut chosen);
    }
    chosen.exclude(inputs)?;
    chosen.drop_missing_families(inputs.pod);
    Ok(chosen.reduce(inputs.pod))
}

/// The prefixes that precedence protects.
struct Guard {
    /// The pod's own addresses.
    own: Vec<IpAddr>,
    node_addresses: Vec<IpAddr>,
    /// Prefixes that are on a link; one may lie inside another (`/32` of a gateway inside a subnet).
    connected: Vec<IpNet>,
    /// Their union.
    connected_union: CidrSet,
    /// Connected, local pod, service and node CIDRs, and node addresses.
    local: CidrSet,
    /// What the administrator names or opens to annotations.
    granted: CidrSet,
    /// What an annotation may name in underlay mode; none in overlay mode, where it grants nothing new.
    annotatable: Option<CidrSet>,
}

impl Guard {
    fn new(inputs: Inputs<'_>) -> Self {
        let Inputs { conf, remotes, node, pod, .. } = inputs;
        let local = pod.connected.iter().copied().chain(node.local()).collect();
        let granted: CidrSet = conf.hijack_cidr.iter().chain(&conf.annotation_cidrs).copied().collect();
        let annotatable = (pod.attached == Attached::Underlay).then(|| {
            let remote = remotes.clusters.values().flat_map(|cluster| cluster.cidrs.keys().copied());
            // Not nodeCIDRs: kubelets and the API server are behind those addresses.
            let local = node.pod_cidrs.iter().chain(&node.service_cidrs).copied();
            remote.chain(local).chain(granted.iter().copied()).collect()
        });
        Self {
            own: pod.addresses.iter().map(|address| address.addr).collect(),
            node_addresses: node.addresses.clone(),
            connected: pod.connected.clone(),
            connected_union: pod.connected.iter().copied().collect(),
            local,
            granted,
            annotatable,
        }
    }

    /// Rule 1: why a prefix is never routed, whoever names it.
    fn never(&self, net: &IpNet) -> Option<&'static str> {
        let own = self.own.iter().any(|own| host(*own) == *net);
        never_routed(net).or(own.then_some("is the pod's own address"))
    }

    /// Rules 1 and 3.
    fn administrators(&self, net: &IpNet) -> Result<(), Error> {
        if let Some(why) = self.never(net) {
            return Err(refused(net, "key \"hijackCIDR\"", why, "remove it"));
        }
        if self.connected.contains(net) {
            let why = "equals a prefix that is connected in the pod";
            return Err(refused(net, "key \"hijackCIDR\"", why, "remove it, or name longer prefixes inside it"));
        }
        Ok(())
    }

    /// Rules 1 and 4, and what only the administrator may grant.
    fn pod_authors(&self, net: &IpNet, place: &str) -> Result<(), Error> {
        if let Some(why) = self.never(net) {
            return Err(refused(net, place, why, "remove it"));
        }
        if let Some(what) = reserved(net) {
            return Err(refused(net, place, what, "only the administrator's hijackCIDR may name such an address"));
        }
        let is_node = self.node_addresses.iter().any(|addr| host(*addr) == *net);
        let around_node = self.annotatable.is_some()
            && self.node_addresses.iter().any(|addr| net.contains(addr))
            && !self.granted.contains(net);
        if is_node || around_node {
            return Err(refused(net, place, "holds an address of this node", "remove it; nodes are reachable anyway"));
        }
        if self.connected_union.contains(net) {
            return Err(refused(net, place, "is connected in the pod", "remove it; the pod reaches it directly"));
        }
        let allowed = self.annotatable.as_ref().is_none_or(|ranges| ranges.contains(net));
        if !allowed {
            let why = "lies outside remote, local and hijackCIDR ranges";
            return Err(refused(net, place, why, "ask the administrator to list its range in annotationCIDRs"));
        }
        Ok(())
    }

    /// Rules 1, 4 and 5, for the selected clusters.
    fn add_remotes(&self, inputs: Inputs<'_>, chosen: &mut Chosen) {
        let selection = inputs.selection();
        if let Selection::Clusters(names) = selection {
            for name in names.iter().filter(|name| !inputs.remotes.clusters.contains_key(*name)) {
                chosen.finding(Id::ClusterUnknown, format!("cluster {name} is in no remotes file"));
            }
        }
        for (name, cluster) in inputs.remotes.clusters.iter().filter(|(name, _)| selection.includes(name)) {
            for net in cluster.cidrs.keys() {
                if let Some(why) = self.never(net) {
                    chosen.finding(Id::CidrRefused, format!("{net} of cluster {name} {why}"));
                } else if self.local.contains(net) {
                    chosen.finding(Id::CidrLocal, format!("{net} of cluster {name} is local here"));
                } else {
                    let origin = Origin { mtu: cluster.mtu, cluster: Some(name.clone()), named: None };
                    chosen.add(*net, origin);
                }
            }
        }
    }

    /// Local pod and service CIDRs of an underlay pod go through the node. What is connected stays so, except services,
    /// which are on no link whatever prefix they lie in.
    fn add_local(&self, node: &NodeFacts, chosen: &mut Chosen) {
        let pods = node.pod_cidrs.iter().filter(|net| !self.connected_union.contains(net));
        let services = node.service_cidrs.iter().filter(|net| !self.connected.contains(net));
        for net in pods.chain(services) {
            match self.never(net) {
                Some(why) => chosen.finding(Id::CidrRefused, format!("{net} of node.json {why}")),
                None => chosen.add(*net, Origin::default()),
            }
        }
    }
}

fn refused(net: &IpNet, place: &str, why: &str, cure: &str) -> Error {
    Error::config(format!("{place}: \"{net}\" {why}: {cure}"))
}

/// Ranges that never come from an annotation: they hold the metadata address and the node's own services.
fn reserved(net: &IpNet) -> Option<&'static str> {
    let overlaps = |text: &str| text.parse::<IpNet>().is_ok_and(|range| range.contains(net) || net.contains(&range));
    if overlaps("169.254.0.0/16") || overlaps("fe80::/10") {
        return Some("overlaps link-local addresses");
    }
    (overlaps("127.0.0.0/8") || overlaps("::1/128")).then_some("overlaps loopback")
}

/// Prefixes gathered so far, each once.
#[derive(Default)]
struct Chosen {
    nets: BTreeMap<IpNet, Origin>,
    findings: Vec<Finding>,
}

impl Chosen {
    fn finding(&mut self, id: Id, text: String) {
        self.findings.push(Finding::new(id, text));
    }

    /// Adds a prefix that was named, unless the verdict on it is a refusal.
    fn add_named(
        &mut self,
        net: IpNet,
        place: &str,
        verdict: Result<(), Error>,
        refusal: Refusal,
    ) -> Result<(), Error> {
        match verdict {
            Ok(()) => self.add(net, Origin { named: Some(place.to_owned()), ..Origin::default() }),
            Err(err) if refusal == Refusal::Error => return Err(err),
            Err(err) => self.finding(Id::CidrRefused, err.msg),
        }
        Ok(())
    }

    /// Adds a prefix; of two with the same prefix the first names it and the smaller MTU holds.
    fn add(&mut self, net: IpNet, origin: Origin) {
        let known = self.nets.entry(net).or_insert_with(|| origin.clone());
        known.mtu = known.mtu.into_iter().chain(origin.mtu).min();
        known.cluster = known.cluster.take().or(origin.cluster);
    }

    /// Subtracts the excludes. What is left of a prefix is longer than the prefix was, so it must also leave out every
    /// longer prefix that used to win inside it: another chosen one with other attributes, a connected subnet, another
    /// owner's route.
    ///
    /// # Errors
    /// Code 7 where the pod's author multiplies routes beyond reason: one host taken out of a /8 of IPv6 leaves 120 pieces.
    fn exclude(&mut self, inputs: Inputs<'_>) -> Result<(), Error> {
        let holes: CidrSet = inputs.conf.exclude_cidr.iter().chain(&inputs.request.exclude_cidr).copied().collect();
        let taken: BTreeSet<IpNet> = inputs.pod.connected.iter().chain(&inputs.pod.foreign).copied().collect();
        let before = std::mem::take(&mut self.nets);
        for (net, origin) in &before {
            if !holes.overlaps(net) {
                self.add(*net, origin.clone());
                continue;
            }
            if holes.covering(net).is_some() {
                continue;
            }
            // In the order of prefixes, what lies inside one comes right after it.
            let chosen = before.range(net..).map(|(other, _)| other).skip(1).take_while(|other| net.contains(*other));
            let others = taken.range(net..).take_while(|other| net.contains(*other));
            let mut holes = holes.clone();
            holes.extend(chosen.chain(others).copied());
            for piece in subtract(*net, &holes) {
                self.add(piece, origin.clone());
            }
        }
        let more = self.nets.len().saturating_sub(before.len());
        if more > SPLIT_LIMIT && !inputs.request.exclude_cidr.is_empty() {
            let text = format!(
                "annotation crosslink.dev/exclude-cidr splits this pod's routes into {more} more, of at most {SPLIT_LIMIT}: \
                 exclude fewer or larger CIDRs"
            );
            return Err(Error::config(text));
        }
        Ok(())
    }

    fn drop_missing_families(&mut self, pod: &PodFacts) {
        let (kept, dropped) =
            std::mem::take(&mut self.nets).into_iter().partition(|(net, _)| pod.has(Family::of_net(net)));
        self.nets = kept;
        for (net, origin) in dropped {
            if let Some(place) = origin.named {
                let text = format!("{net} ({place}) is {}, which the pod does not have", Family::of_net(&net));
                self.finding(Id::NoFamily, text);
            }
        }
    }

    fn reduce(self, pod: &PodFacts) -> Destinations {
        let mut barriers: Vec<IpNet> = pod.connected.iter().chain(&pod.foreign).copied().collect();
        barriers.sort_unstable();
        barriers.dedup();
        let mut list = Vec::new();
        for family in Family::ALL {
            let of_family = self.nets.iter().filter(|(net, _)| Family::of_net(net) == family);
            let entries = of_family.map(|(net, origin)| Entry { net: *net, attr: ByMtu(origin.clone()) }).collect();
            let mut entries = drop_covered(entries, &barriers);
            if entries.len() > JOIN_LIMIT {
                let all = entries.into_iter().map(|entry| Entry { net: entry.net, attr: ByCluster(entry.attr.0) });
                entries = join_siblings(all.collect(), &barriers)
                    .into_iter()
                    .map(|entry| Entry { net: entry.net, attr: ByMtu(entry.attr.0) })
                    .collect();
            }
            list.extend(entries.into_iter().map(|entry| Destination { net: entry.net, origin: entry.attr.0 }));
        }
        Destinations { list, findings: self.findings }
    }
}

/// Equal where routes would be: next hops are the same within a family, so only the MTU tells them apart.
#[derive(Clone)]
struct ByMtu(Origin);

impl PartialEq for ByMtu {
    fn eq(&self, other: &Self) -> bool {
        self.0.mtu == other.0.mtu
    }
}

/// Equal where siblings may be joined: the operator must still see whose a prefix is.
#[derive(Clone)]
struct ByCluster(Origin);

impl PartialEq for ByCluster {
    fn eq(&self, other: &Self) -> bool {
        self.0.mtu == other.0.mtu
            && self.0.cluster == other.0.cluster
            && self.0.named.is_some() == other.0.named.is_some()
    }
}

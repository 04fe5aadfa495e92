//! What a node keeps so that traffic between clusters survives netfilter: the nftables rules, and which connections keep
//! their source.
//!
//! Three chains, each for one cause of loss:
//!
//! 1. An underlay pod's answers come back by its own interface, so its node sees half of each connection, and whoever
//!    drops invalid packets (kube-proxy's iptables mode) drops these. They become untracked, but only after conntrack
//!    saw them: a node that translated a connection itself must undo it.
//! 2. What a node translated for an underlay pod must come back to the node, so it carries an address of the node.
//!    Where kube-proxy takes the pod for local, it does not see to that.
//! 3. Pods of both clusters keep their addresses, whatever the main CNI masquerades later: the first chain of type nat
//!    that binds a connection ends the matter, also where it binds it to the address that it has.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    cidr,
    finding::{Finding, Id},
    model::{Address, Family, NetnsState},
    nft::{Action, Chain, Hook, Kind, Match, Rule, Set, Table},
    node::{Masquerade, NodeFacts, addresses_from_kernel},
    numbers::{TABLE_MAIN, TABLE_PODS},
    remotes::Merged,
    set::{CidrSet, subtract},
};

/// Name of our table.
pub const TABLE: &str = "crosslink";

/// What the names of our veths on the node begin with.
const VETHS: &str = "cl";

/// `NF_IP_PRI_MANGLE` (linux/netfilter_ipv4.h): after conntrack (-200), before DNAT (-100).
const MANGLE: i32 = -150;

/// Before every chain in which a main CNI masquerades. Most do that where kube-proxy does, at `NF_IP_PRI_NAT_SRC`
/// (100); kindnet at 95, and later at 90.
const BEFORE_SRCNAT: i32 = 80;

/// From which Submariner's Globalnet gives addresses unless it is told otherwise (globalnetCIDRRange). Its gateways
/// must translate what goes there.
const GLOBALNET: &str = "242.0.0.0/8";

/// Most CIDRs that a finding lists.
const NAMED: usize = 8;

/// What the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What is remote.
    pub merged: &'a Merged,
    /// What is local.
    pub node: &'a NodeFacts,
    /// Links, addresses and main routes of the node; with the routes of underlay pods, if their connections matter.
    pub state: &'a NetnsState,
}

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Chains 1 and 2.
    pub notrack: bool,
    /// Chain 3; none: where it helps.
    pub preserve_source: Option<bool>,
}

/// What the node should keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The table; none where no rule is needed.
    pub table: Option<Table>,
    /// Which connections keep their source.
    pub kept: Kept,
    /// What cannot be helped from here.
    pub findings: Vec<Finding>,
}

/// Which connections keep their source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Pods of the own cluster.
    local: CidrSet,
    /// Services of the own cluster.
    services: CidrSet,
    /// Pods and services of others.
    remote: CidrSet,
    /// The part of `remote` whose connections to local services may come by any node.
    fabric: CidrSet,
    /// The part of `remote` that is translated on the way.
    globalnet: CidrSet,
    /// Underlay pods of this node; what it translates for them is chain 2's.
    underlay: BTreeSet<IpAddr>,
}

impl Kept {
    /// Whether a connection keeps its source: `source` as the client has it, `named` the destination that it asked for,
    /// and `destination` where that was translated to.
    pub fn keeps(&self, source: IpAddr, named: IpAddr, destination: IpAddr) -> bool {
        let within = |set: &CidrSet, addr: IpAddr| set.covering(&cidr::host(addr)).is_some();
        if within(&self.globalnet, source) || within(&self.globalnet, destination) {
            return false;
        }
        if named != destination {
            let service = within(&self.services, named) || !has(&self.services, Family::of(named));
            let elsewhere = within(&self.fabric, source) || !service;
            if elsewhere || self.underlay.contains(&source) {
                return false;
            }
        }
        let out = within(&self.local, source) && within(&self.remote, destination);
        out || (within(&self.remote, source) && within(&self.local, destination))
    }

    /// Whether no connection does.
    pub fn is_empty(&self) -> bool {
        self.local.is_empty() || self.remote.is_empty()
    }
}

/// What the node should keep.
pub fn desired(facts: Facts<'_>, asked: Asked) -> Desired {
    let bpf = facts.node.masquerade == Some(Masquerade::Bpf);
    let preserve = asked.preserve_source.unwrap_or(!bpf);
    let sets = Sets::new(facts);
    let mut findings: Vec<Finding> =
        if asked.preserve_source == Some(false) { Vec::new() } else { source_masked(facts.node, &sets.remote) };
    if asked.notrack {
        findings.extend(gateway_routes(facts));
    }
    let mut chains = Vec::new();
    if asked.notrack {
        chains.extend([half_seen(&sets), translated(&sets, facts)]);
    }
    if preserve {
        chains.push(keep_source(&sets));
    }
    chains.retain(|chain| !chain.rules.is_empty());
    let table = (!chains.is_empty()).then(|| Table { name: TABLE.to_owned(), sets: sets.used(&chains), chains });
    let kept = if preserve { sets.kept(facts.state, asked.notrack) } else { Kept::default() };
    Desired { table, kept, findings }
}

/// The CIDRs that rules name, without what each must not have.
struct Sets {
    own: CidrSet,
    local: CidrSet,
    services: CidrSet,
    remote: CidrSet,
    fabric: CidrSet,
    globalnet: CidrSet,
}

impl Sets {
    fn new(Facts { merged, node, state }: Facts<'_>) -> Self {
        let local: CidrSet = node.pod_cidrs.iter().chain(&node.own_pod_cidrs).copied().collect();
        // A remote CIDR may cover local ones, which are no less local for it.
        let mut holes: CidrSet = local.iter().chain(&node.service_cidrs).chain(&node.node_cidrs).copied().collect();
        holes.extend(node.addresses.iter().map(|addr| cidr::host(*addr)));
        let claimed = || merged.clusters.values().flat_map(|cluster| &cluster.cidrs);
        let whole: CidrSet = claimed().map(|(net, _)| *net).collect();
        // The same for subnets that the node is in, where a remote CIDR is wider.
        let connected = state.addresses.iter().filter(|address| address.global).map(|address| address.net.trunc());
        holes.extend(connected.filter(|net| whole.covering(net).is_some_and(|cover| cover != *net)));
        let only = |wanted: &str, (net, sources): (&'_ IpNet, &Arc<BTreeSet<String>>)| {
            sources.iter().all(|source| source == wanted).then_some(*net)
        };
        let fabric: Vec<IpNet> = claimed().filter_map(|claim| only("kernel", claim)).collect();
        let range: Option<IpNet> = GLOBALNET.parse().ok();
        let mut global: Vec<IpNet> = claimed().filter_map(|claim| only("submariner", claim)).collect();
        global.retain(|net| range.is_some_and(|range| range.contains(net)));
        Self {
            own: node.own_pod_cidrs.iter().copied().collect(),
            services: node.service_cidrs.iter().copied().collect(),
            remote: minus(claimed().map(|(net, _)| net), &holes),
            fabric: minus(&fabric, &holes),
            globalnet: minus(&global, &holes),
            local,
        }
    }

    fn all(&self) -> [(&'static str, &CidrSet); 6] {
        let Self { own, local, services, remote, fabric, globalnet } = self;
        [
            ("own", own),
            ("local", local),
            ("services", services),
            ("remote", remote),
            ("fabric", fabric),
            ("globalnet", globalnet),
        ]
    }

    /// The sets that rules of `chains` look into.
    fn used(&self, chains: &[Chain]) -> Vec<Set> {
        let matches = chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.matches);
        let named: BTreeSet<&str> = matches.filter_map(Match::set).collect();
        let mut sets = Vec::new();
        for family in Family::ALL {
            for (what, cidrs) in self.all() {
                let name = set_name(what, family);
                if named.contains(name.as_str()) {
                    sets.push(Set::new(name, family, cidrs));
                }
            }
        }
        sets
    }

    fn kept(self, state: &NetnsState, notrack: bool) -> Kept {
        let pods = state.routes.iter().filter(|seen| notrack && seen.route.table == TABLE_PODS);
        let underlay = pods.map(|seen| seen.route.dst.addr()).collect();
        let Self { local, services, remote, fabric, globalnet, .. } = self;
        Kept { local, services, remote, fabric, globalnet, underlay }
    }
}

/// A union of prefixes minus others, exactly.
fn minus<'a>(nets: impl IntoIterator<Item = &'a IpNet>, holes: &CidrSet) -> CidrSet {
    let whole: CidrSet = nets.into_iter().copied().collect();
    whole.iter().flat_map(|net| subtract(*net, holes)).collect()
}

fn has(set: &CidrSet, family: Family) -> bool {
    set.iter().any(|net| Family::of_net(net) == family)
}

fn set_name(what: &str, family: Family) -> String {
    format!("{what}{}", if family == Family::V4 { 4 } else { 6 })
}

fn source(what: &str, family: Family) -> Match {
    Match::Source(family, set_name(what, family))
}

fn destination(what: &str, family: Family) -> Match {
    Match::Destination(family, set_name(what, family))
}

fn from_underlay() -> Match {
    Match::InPrefix(VETHS.to_owned())
}

fn rule(matches: Vec<Match>, action: Action, comment: &str) -> Rule {
    Rule { matches, action, comment: comment.to_owned() }
}

/// Chain 1. Services of the own cluster are in neither set, since they are translated here; those of remote clusters
/// are, since they are translated there.
fn half_seen(sets: &Sets) -> Chain {
    let mut rules = Vec::new();
    for family in Family::ALL {
        if has(&sets.own, family) {
            let matches = vec![from_underlay(), destination("own", family)];
            rules.push(rule(matches, Action::Return, "pods of this node are seen in full"));
        }
        for (what, set) in [("remote", &sets.remote), ("local", &sets.local)] {
            if has(set, family) {
                let matches = vec![from_underlay(), destination(what, family), Match::Invalid];
                rules.push(rule(matches, Action::Notrack, "answers to underlay pods bypass the node"));
            }
        }
    }
    Chain { name: "prerouting".to_owned(), kind: Kind::Filter, hook: Hook::Prerouting, priority: MANGLE, rules }
}

/// Chain 2. Remote clusters know the way back to pods, so the node's address among them goes first.
fn translated(sets: &Sets, facts: Facts<'_>) -> Chain {
    let mut rules = Vec::new();
    for family in Family::ALL.into_iter().filter(|family| has(&sets.remote, *family)) {
        if let Some(address) = node_source(facts.node, facts.state, family) {
            let matches = vec![from_underlay(), Match::Dnat, destination("remote", family)];
            rules.push(rule(matches, Action::Snat(address), "answers must come back to this node"));
        }
    }
    let matches = vec![from_underlay(), Match::Dnat];
    rules.push(rule(matches, Action::Masquerade, "answers must come back to this node"));
    Chain {
        name: "postrouting".to_owned(),
        kind: Kind::Nat,
        hook: Hook::Postrouting,
        priority: BEFORE_SRCNAT - 1,
        rules,
    }
}

/// Chain 3. A connection to a local service keeps its source too, since it was translated where its answers pass: at
/// the client's own node, or at the one node that leads to the other clusters. That is not so where every node may be
/// the one (a fabric), nor for what named an address of this node or of a load balancer.
fn keep_source(sets: &Sets) -> Chain {
    let families = || Family::ALL.into_iter().filter(|family| has(&sets.local, *family) && has(&sets.remote, *family));
    let both = |family: Family| {
        [
            ([source("local", family), destination("remote", family)], "local pods to other clusters"),
            ([source("remote", family), destination("local", family)], "other clusters to local pods"),
        ]
    };
    let (mut rules, mut direct) = (Vec::new(), Vec::new());
    for family in families() {
        if has(&sets.globalnet, family) {
            for global in [source("globalnet", family), destination("globalnet", family)] {
                rules.push(rule(vec![global], Action::Return, "Globalnet translates these"));
            }
        }
        if has(&sets.fabric, family) {
            let any = vec![source("fabric", family), Match::Dnat];
            rules.push(rule(any, Action::Return, "answers may leave by another node"));
        }
        for (ends, comment) in both(family) {
            // Where services are not known, any translation may be one's.
            let service = match has(&sets.services, family) {
                true => Match::Named(family, set_name("services", family)),
                false => Match::Dnat,
            };
            let through = ends.iter().cloned().chain([service]).collect();
            rules.push(rule(through, Action::KeepSource(family), comment));
            direct.push(rule(ends.to_vec(), Action::KeepSource(family), comment));
        }
    }
    if !direct.is_empty() {
        rules.push(rule(vec![Match::Dnat], Action::Return, "answers may leave by another node"));
    }
    rules.extend(direct);
    let name = "preserve-source".to_owned();
    Chain { name, kind: Kind::Nat, hook: Hook::Postrouting, priority: BEFORE_SRCNAT, rules }
}

/// The node's address among its pods'. Where its share is not known, one among the cluster's pods; but none by which
/// the node is in the underlay: answers would come by another link than the one to remote clusters, which a strict node
/// drops.
fn node_source(node: &NodeFacts, state: &NetnsState, family: Family) -> Option<IpAddr> {
    let usable = |address: &&Address| {
        let addr = address.net.addr();
        Family::of(addr) == family && address.global && !address.tentative && !address.unstable
    };
    let addresses: Vec<IpAddr> = state.addresses.iter().filter(usable).map(|address| address.net.addr()).collect();
    let among = |nets: &[IpNet], not: &[IpAddr]| {
        let mut fitting = addresses.iter().filter(|addr| !not.contains(addr));
        fitting.find(|addr| nets.iter().any(|net| net.contains(*addr))).copied()
    };
    let known = || match node.addresses.as_slice() {
        [] => addresses_from_kernel(state).0,
        given => given.to_vec(),
    };
    among(&node.own_pod_cidrs, &[]).or_else(|| among(&node.pod_cidrs, &known()))
}

/// Named where the main CNI masquerades in BPF: our rules never see those packets.
fn source_masked(node: &NodeFacts, remote: &CidrSet) -> Vec<Finding> {
    if node.masquerade != Some(Masquerade::Bpf) || remote.is_empty() {
        return Vec::new();
    }
    let all: Vec<String> = remote.iter().map(ToString::to_string).collect();
    let more = all.len().saturating_sub(NAMED);
    let mut text = all.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    vec![Finding::new(
        Id::SourceMasked,
        format!(
            "the main CNI masquerades in BPF; let it not masquerade to {text} (Cilium: ipMasqAgent with \
             nonMasqueradeCIDRs, or bpf.masquerade=false)"
        ),
    )]
}

/// Pod CIDRs of the cluster in which this node has no share: the underlay's, by all that is known.
pub(crate) fn underlay_cidrs(node: &NodeFacts) -> impl Iterator<Item = &IpNet> {
    let own: CidrSet = node.own_pod_cidrs.iter().copied().collect();
    node.pod_cidrs.iter().filter(move |net| !own.overlaps(net))
}

/// Underlay CIDRs to which this node's only route is its default route: where it is a gateway, packets from other
/// clusters to underlay pods leave by the wrong link, and strict neighbours drop them.
fn gateway_routes(Facts { node, state, merged }: Facts<'_>) -> Vec<Finding> {
    if merged.clusters.is_empty() {
        return Vec::new();
    }
    let routed = |net: &IpNet| {
        state.routes.iter().filter(|seen| seen.route.table == TABLE_MAIN).any(|seen| {
            let dst = &seen.route.dst;
            dst.prefix_len() > 0 && (seen.unicast || seen.multipath) && (dst.contains(net) || net.contains(dst))
        })
    };
    let default = |family| {
        state.routes.iter().any(|seen| seen.route.dst.prefix_len() == 0 && Family::of_net(&seen.route.dst) == family)
    };
    let bare = underlay_cidrs(node).filter(|net| default(Family::of_net(net)) && !routed(net));
    bare.map(|net| Finding::new(Id::GatewayRoute, format!("pod CIDR {net} is reached by the default route alone")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{ObservedRoute, Route},
        remotes::Cluster,
    };

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn merged(cidrs: &[&str]) -> Merged {
        let mut merged = Merged::default();
        let from = BTreeSet::from(["static".to_owned()]);
        let cidrs = nets(cidrs).into_iter().map(|net| (net, from.clone().into())).collect();
        merged.clusters.insert("b".to_owned(), Cluster { cidrs, mtu: None });
        merged
    }

    fn state(addresses: &[(&str, &str)], routes: &[&str]) -> NetnsState {
        let addresses = addresses.iter().map(|(dev, net)| Address {
            dev: (*dev).to_owned(),
            net: net.parse().unwrap(),
            global: true,
            tentative: false,
            unstable: false,
        });
        let routes = routes.iter().map(|dst| ObservedRoute {
            route: Route {
                dst: dst.parse().unwrap(),
                table: TABLE_MAIN,
                dev: "e".into(),
                via: None,
                src: None,
                mtu: None,
            },
            protocol: 3,
            metric: 0,
            unicast: true,
            multipath: false,
        });
        NetnsState { addresses: addresses.collect(), routes: routes.collect(), ..NetnsState::default() }
    }

    const ALL: Asked = Asked { notrack: true, preserve_source: None };

    #[test]
    fn the_only_route_to_the_underlay_is_named() {
        let merged = merged(&["10.9.0.0/16"]);
        let node = |pods: &[&str], own: &[&str]| NodeFacts {
            pod_cidrs: nets(pods),
            own_pod_cidrs: nets(own),
            ..NodeFacts::default()
        };
        for (pods, own, routes, named) in [
            (&["172.110.0.0/16"][..], &[][..], &["0.0.0.0/0"][..], true),
            (&["172.110.0.0/16"], &[], &["0.0.0.0/0", "172.110.0.0/16"], false),
            (&["172.110.0.0/16"], &[], &["0.0.0.0/0", "172.110.4.0/24"], false),
            (&["172.110.0.0/16"], &[], &["0.0.0.0/0", "172.0.0.0/8"], false),
            (&["172.110.0.0/16"], &["172.110.1.0/24"], &["0.0.0.0/0"], false),
            (&["172.110.0.0/16"], &[], &[], false),
            (&["fd10::/64"], &[], &["0.0.0.0/0"], false),
            (&["fd10::/64"], &[], &["0.0.0.0/0", "::/0"], true),
        ] {
            let (node, state) = (node(pods, own), state(&[], routes));
            let found = desired(Facts { merged: &merged, node: &node, state: &state }, ALL).findings;
            assert_eq!(found.len(), usize::from(named), "{pods:?} {own:?} {routes:?}: {found:?}");
            assert!(found.iter().all(|one| one.id == Id::GatewayRoute && one.text.contains(pods[0])));
        }
    }

    #[test]
    fn a_main_cni_that_masquerades_in_bpf_is_named_with_the_cure() {
        let (merged, state) = (merged(&["10.9.0.0/16"]), state(&[], &[]));
        let node =
            NodeFacts { pod_cidrs: nets(&["10.8.0.0/16"]), masquerade: Some(Masquerade::Bpf), ..NodeFacts::default() };
        for (preserve_source, rules, named) in
            [(None, false, true), (Some(true), true, true), (Some(false), false, false)]
        {
            let asked = Asked { notrack: false, preserve_source };
            let decided = desired(Facts { merged: &merged, node: &node, state: &state }, asked);
            assert_eq!((decided.table.is_some(), !decided.findings.is_empty()), (rules, named), "{preserve_source:?}");
            assert!(decided.findings.iter().all(|one| one.text.contains("10.9.0.0/16")));
        }
    }
}

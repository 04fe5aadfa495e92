//! The routed set, address by address: a model that knows only the contract's sentences against what
//! [`destinations`](crosslink_core::destinations::destinations) gives, over all 256 addresses of two tiny families.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use crosslink_core::{
    destinations::{Destinations, destinations},
    error::Code,
    facts::{Attached, PodFacts},
    finding::Id,
    model::Family,
    netconf::NetConf,
    node::NodeFacts,
    numbers::JOIN_LIMIT,
    remotes::{Cluster, Merged},
    request::{NamedCidr, PodRequest},
    select::Selection,
};
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*};

use crate::support::{Ready, World, addresses, net};

/// Clusters of the tiny universe, with the MTU that each states.
const CLUSTERS: [(&str, Option<u32>); 3] = [("cluster-b", Some(1400)), ("cluster-c", Some(1300)), ("cluster-d", None)];

fn point(v6: bool, last: u8) -> IpAddr {
    match v6 {
        false => IpAddr::from([10, 0, 0, last]),
        true => IpAddr::V6(Ipv6Addr::from((0xfd00 << 112) | u128::from(last))),
    }
}

fn points() -> Vec<IpAddr> {
    [false, true].into_iter().flat_map(|v6| (0..=255).map(move |last| point(v6, last))).collect()
}

/// A prefix inside `10.0.0.0/24` or `fd00::/120`; mostly long and crowded, so that prefixes nest and meet.
fn prefix() -> impl Strategy<Value = IpNet> {
    let len = prop_oneof![3 => 4..=8_u8, 2 => 0..=4_u8];
    (prop::bool::weighted(0.25), prop_oneof![0..32_u8, any::<u8>()], len).prop_map(|(v6, last, len)| {
        let base = if v6 { 120 } else { 24 };
        IpNet::new_assert(point(v6, last), base + len).trunc()
    })
}

fn prefixes(most: usize) -> impl Strategy<Value = Vec<IpNet>> {
    vec(prefix(), 0..=most)
}

fn named(most: usize) -> impl Strategy<Value = Vec<NamedCidr>> {
    let place = "annotation crosslink.dev/hijack-cidr";
    prefixes(most)
        .prop_map(move |nets| nets.into_iter().map(|net| NamedCidr { net, place: place.to_owned() }).collect())
}

fn selection() -> impl Strategy<Value = Selection> {
    let list = |names: &[&str]| Selection::Clusters(names.iter().map(|name| (*name).to_owned()).collect());
    prop_oneof![4 => Just(Selection::All), 1 => Just(Selection::None), 2 => Just(list(&["cluster-c", "cluster-x"]))]
}

fn conf() -> impl Strategy<Value = (NetConf, PodRequest)> {
    let pod = (prop::option::weighted(0.3, selection()), named(2), prefixes(1));
    let grants = prop_oneof![Just(vec![net("10.0.0.0/24"), net("fd00::/120")]), prefixes(2)];
    (selection(), prefixes(2), prefixes(1), grants, pod).prop_map(|(hijack, hijack_cidr, exclude_cidr, grants, pod)| {
        let conf = NetConf { hijack, hijack_cidr, exclude_cidr, annotation_cidrs: grants, ..NetConf::default() };
        (conf, PodRequest { hijack: pod.0, hijack_cidr: pod.1, exclude_cidr: pod.2 })
    })
}

pub fn merged() -> impl Strategy<Value = Merged> {
    [prefixes(5), prefixes(4), prefixes(3)].prop_map(|lists| {
        let mut taken = BTreeSet::new();
        let clusters = CLUSTERS.iter().zip(lists).map(|((name, mtu), nets)| {
            let fresh = nets.into_iter().filter(|net| taken.insert(*net)).collect::<Vec<_>>();
            let cidrs = fresh.into_iter().map(|net| (net, BTreeSet::from(["static".to_owned()]).into())).collect();
            ((*name).to_owned(), Cluster { cidrs, mtu: *mtu })
        });
        Merged { clusters: clusters.collect::<BTreeMap<_, _>>(), findings: Vec::new() }
    })
}

fn node() -> impl Strategy<Value = NodeFacts> {
    (prefixes(2), prefixes(2), prefixes(1), vec((any::<bool>(), any::<u8>()), 0..3)).prop_map(
        |(pod_cidrs, service_cidrs, node_cidrs, hosts)| NodeFacts {
            addresses: hosts.into_iter().map(|(v6, last)| point(v6, last)).collect(),
            pod_cidrs,
            service_cidrs,
            node_cidrs,
            ..NodeFacts::default()
        },
    )
}

fn pod() -> impl Strategy<Value = PodFacts> {
    let own = prop_oneof![4 => Just(&["10.0.0.1", "fd00::1"][..]), 1 => Just(&["10.0.0.1"][..])];
    let attached = prop_oneof![Just(Attached::Overlay), Just(Attached::Underlay)];
    (own, attached, prefixes(2)).prop_map(|(own, attached, connected)| {
        let foreign = connected.clone();
        PodFacts { addresses: addresses(own), connected, foreign, ..World::new(attached).pod }
    })
}

pub fn world() -> impl Strategy<Value = Ready> {
    (conf(), merged(), node(), pod()).prop_map(|((conf, request), remotes, node, pod)| Ready {
        conf,
        request,
        remotes,
        node,
        pod,
    })
}

/// Whether every address of `net` is in one of `ranges`.
fn inside(net: &IpNet, ranges: &[IpNet]) -> bool {
    points().iter().filter(|point| net.contains(*point)).all(|point| ranges.iter().any(|range| range.contains(point)))
}

/// What the contract's text says about one world.
struct Model {
    /// A named CIDR is to be refused with code 7.
    refused: bool,
    /// What is asked for and not refused, with the MTU; excludes are not yet taken out.
    asked: Vec<(IpNet, Option<u32>)>,
    excluded: Vec<IpNet>,
    connected: Vec<IpNet>,
}

impl Model {
    fn new(world: &Ready) -> Self {
        let Ready { conf, request, remotes, node, pod } = world;
        let own = |net: &IpNet| pod.addresses.iter().any(|own| IpNet::from(own.addr) == *net);
        let of_node = |net: &IpNet| node.addresses.iter().any(|addr| IpNet::from(*addr) == *net);
        let local = [&node.pod_cidrs, &node.service_cidrs, &node.node_cidrs].map(Clone::clone).concat();
        let remote: Vec<IpNet> = remotes.clusters.values().flat_map(|cluster| cluster.cidrs.keys().copied()).collect();
        let administrators = [&conf.hijack_cidr, &conf.annotation_cidrs].map(Clone::clone).concat();
        // Nodes are local, but their addresses never come from an annotation.
        let grants = [&remote, &node.pod_cidrs, &node.service_cidrs, &administrators].map(Clone::clone).concat();
        let underlay = pod.attached == Attached::Underlay;
        let around_node = |net: &IpNet| node.addresses.iter().any(|addr| net.contains(addr));
        let forbidden = |net: &IpNet| {
            let open = !inside(net, &grants) || (around_node(net) && !inside(net, &administrators));
            own(net) || of_node(net) || inside(net, &pod.connected) || (underlay && open)
        };
        let refused = conf.hijack_cidr.iter().any(|net| own(net) || pod.connected.contains(net))
            || request.hijack_cidr.iter().any(|named| forbidden(&named.net));

        let hosts = node.addresses.iter().copied().map(IpNet::from).collect();
        let kept = [pod.connected.clone(), local, hosts].concat();
        let selection = request.hijack.as_ref().unwrap_or(&conf.hijack);
        let selected = remotes.clusters.iter().filter(|(name, _)| selection.includes(name));
        let cidrs = selected.flat_map(|(_, cluster)| cluster.cidrs.keys().map(|net| (*net, cluster.mtu)));
        let mut asked: Vec<_> = cidrs.filter(|(net, _)| !own(net) && !inside(net, &kept)).collect();
        asked.extend(conf.hijack_cidr.iter().map(|net| (*net, None)));
        asked.extend(request.hijack_cidr.iter().map(|named| (named.net, None)));
        if underlay {
            let pods = node.pod_cidrs.iter().filter(|net| !inside(net, &pod.connected) && !own(net));
            let services = node.service_cidrs.iter().filter(|net| !pod.connected.contains(net) && !own(net));
            asked.extend(pods.chain(services).map(|net| (*net, None)));
        }
        asked.retain(|(net, _)| pod.has(Family::of_net(net)));
        let excluded = [&conf.exclude_cidr, &request.exclude_cidr].map(Clone::clone).concat();
        Self { refused, asked, excluded, connected: pod.connected.clone() }
    }

    /// Whether an address is routed by us, and with which MTU: the longest prefix decides, the smallest MTU among
    /// equals.
    fn answer(&self, point: &IpAddr) -> Option<Option<u32>> {
        if self.excluded.iter().any(|net| net.contains(point)) {
            return None;
        }
        lookup(point, &self.asked, &self.connected)
    }
}

/// Longest-prefix match over routes and connected prefixes; where both are equally long, the connected one is in the
/// way.
fn lookup(point: &IpAddr, routes: &[(IpNet, Option<u32>)], connected: &[IpNet]) -> Option<Option<u32>> {
    let longest = routes.iter().filter(|(net, _)| net.contains(point)).map(|(net, _)| net.prefix_len()).max()?;
    if connected.iter().any(|net| net.contains(point) && net.prefix_len() >= longest) {
        return None;
    }
    let equals = routes.iter().filter(|(net, _)| net.contains(point) && net.prefix_len() == longest);
    Some(equals.filter_map(|(_, mtu)| *mtu).min())
}

fn routes(outcome: &Destinations) -> Vec<(IpNet, Option<u32>)> {
    outcome.list.iter().map(|found| (found.net, found.origin.mtu)).collect()
}

fn assert_tidy(outcome: &Destinations, world: &Ready) {
    let list = &outcome.list;
    assert!(list.windows(2).all(|pair| pair[0].net < pair[1].net), "not sorted, or a prefix twice: {list:?}");
    for found in list {
        assert_eq!(found.net, found.net.trunc(), "host bits");
        assert!(world.pod.has(Family::of_net(&found.net)), "a family that the pod lacks: {found:?}");
        assert!(!world.pod.connected.contains(&found.net), "equals a connected prefix: {found:?}");
        let covers = |net: &IpNet| net.prefix_len() < found.net.prefix_len() && net.contains(&found.net);
        let wall = world.pod.connected.iter().filter(|net| covers(net)).map(IpNet::prefix_len).max();
        let nearest = list.iter().filter(|other| covers(&other.net)).max_by_key(|other| other.net.prefix_len());
        let useless =
            nearest.is_some_and(|near| near.origin.mtu == found.origin.mtu && Some(near.net.prefix_len()) > wall);
        assert!(!useless, "{found:?} is covered by {nearest:?} with the same attributes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_address_is_routed_as_the_contract_says(world in world()) {
        let model = Model::new(&world);
        let outcome = destinations(world.inputs());
        prop_assert_eq!(outcome.is_err(), model.refused, "{:?}", outcome);
        let outcome = match outcome {
            Err(err) => {
                prop_assert_eq!(err.code, Code::Config);
                return Ok(());
            }
            Ok(outcome) => outcome,
        };
        let routes = routes(&outcome);
        for point in points() {
            let real = lookup(&point, &routes, &world.pod.connected);
            prop_assert_eq!(real, model.answer(&point), "address {} with {:?}", point, routes);
        }
        assert_tidy(&outcome, &world);
    }

    /// Remotes alone never stop a pod, whatever they hold.
    #[test]
    fn remotes_never_fail(mut world in world(), wild in prefixes(3)) {
        (world.conf.hijack_cidr, world.request.hijack_cidr) = (Vec::new(), Vec::new());
        let all = wild.into_iter().chain(["0.0.0.0/0", "::/0", "127.0.0.0/8", "ff00::/8", "10.0.0.1/32"].map(net));
        let cidrs = all.map(|net| (net, BTreeSet::new().into())).collect();
        world.remotes.clusters.insert("wild".to_owned(), Cluster { cidrs, mtu: None });
        let outcome = destinations(world.inputs());
        prop_assert!(outcome.is_ok(), "{:?}", outcome);
        prop_assert!(outcome.unwrap().list.iter().all(|found| found.net.prefix_len() > 0));
    }

    /// The order of a list and doubles in it say nothing.
    #[test]
    fn order_and_doubles_do_not_matter(world in world()) {
        let mut other = world.clone();
        other.conf.hijack_cidr = world.conf.hijack_cidr.iter().rev().chain(&world.conf.hijack_cidr).copied().collect();
        other.conf.exclude_cidr.extend(world.request.exclude_cidr.iter().copied());
        other.request.hijack_cidr.reverse();
        other.node.pod_cidrs.reverse();
        other.pod.connected.reverse();
        let (one, two) = (destinations(world.inputs()), destinations(other.inputs()));
        prop_assert_eq!(one.is_err(), two.is_err());
        if let (Ok(one), Ok(two)) = (one, two) {
            prop_assert_eq!(one.list, two.list);
        }
    }
}

/// `count` prefixes in a row below `10.128.0.0/9` or `fd80::/16`.
fn row(v6: bool, count: u32) -> Vec<IpNet> {
    let v4 = |index: u32| IpNet::new_assert(IpAddr::from((0x0a80_0000 + (index << 8)).to_be_bytes()), 24);
    let v6_net =
        |index: u32| IpNet::new_assert(IpAddr::V6(Ipv6Addr::from((0xfd80 << 112) | (u128::from(index) << 64))), 64);
    (0..count).map(|index| if v6 { v6_net(index) } else { v4(index) }).collect()
}

fn crowd(clusters: &[(&str, &[IpNet], Option<u32>)]) -> Ready {
    let clusters = clusters.iter().map(|(name, nets, mtu)| {
        let cidrs = nets.iter().map(|net| (*net, BTreeSet::from(["static".to_owned()]).into())).collect();
        ((*name).to_owned(), Cluster { cidrs, mtu: *mtu })
    });
    let remotes = Merged { clusters: clusters.collect(), findings: Vec::new() };
    Ready { remotes, ..World::new(Attached::Overlay).read().unwrap() }
}

/// How many of the row's prefixes are covered, and by which clusters.
fn assert_same_addresses(before: &[(&str, &[IpNet], Option<u32>)], after: &Destinations) {
    let total = |nets: &mut dyn Iterator<Item = IpNet>| -> u64 {
        nets.map(|net| 1_u64 << ((if net.addr().is_ipv4() { 24 } else { 64 }) - net.prefix_len())).sum()
    };
    let asked: usize = before.iter().map(|(_, nets, _)| nets.len()).sum();
    assert_eq!(total(&mut after.list.iter().map(|found| found.net)), u64::try_from(asked).unwrap(), "more or fewer");
    for (name, nets, mtu) in before {
        for net in *nets {
            let place = after.list.partition_point(|found| found.net <= *net);
            let found = &after.list[place - 1];
            assert!(found.net.contains(net), "{net} is lost");
            assert_eq!((found.origin.cluster.as_deref(), found.origin.mtu), (Some(*name), *mtu), "{net}");
        }
    }
}

#[test]
fn up_to_the_limit_siblings_are_kept_and_above_it_joined() {
    let limit = u32::try_from(JOIN_LIMIT).unwrap();
    assert_eq!(limit, 2000);
    for v6 in [false, true] {
        let (full, over) = (row(v6, limit), row(v6, limit + 1));
        let kept = destinations(crowd(&[("cluster-b", &full, Some(1400))]).inputs()).unwrap();
        assert_eq!(kept.list.iter().map(|found| found.net).collect::<Vec<_>>(), full, "exactly 2,000 are not joined");
        let clusters: [(&str, &[IpNet], Option<u32>); 1] = [("cluster-b", &over, Some(1400))];
        let joined = destinations(crowd(&clusters).inputs()).unwrap();
        // 2001 = 11111010001 in binary: one prefix per bit.
        assert_eq!(joined.list.len(), 7, "{:?}", joined.list);
        assert_same_addresses(&clusters, &joined);
    }
}

#[test]
fn families_are_counted_apart() {
    let (v4, v6) = (row(false, 1500), row(true, 1500));
    let both = [v4, v6].concat();
    let kept = destinations(crowd(&[("cluster-b", &both, None)]).inputs()).unwrap();
    assert_eq!(kept.list.len(), 3000);
}

#[test]
fn only_equals_are_joined() {
    let all = row(false, 2048);
    let pick =
        |of: usize| all.iter().copied().enumerate().filter(|(i, _)| i / 2 % 3 == of).map(|(_, net)| net).collect();
    let (b, c, d): (Vec<IpNet>, Vec<IpNet>, Vec<IpNet>) = (pick(0), pick(1), pick(2));
    let clusters: [(&str, &[IpNet], Option<u32>); 3] =
        [("cluster-b", &b, Some(1400)), ("cluster-c", &c, Some(1400)), ("cluster-d", &d, None)];
    let joined = destinations(crowd(&clusters).inputs()).unwrap();
    assert_eq!(joined.list.len(), 1024, "pairs of one cluster, and no more");
    assert_same_addresses(&clusters, &joined);
    assert!(!joined.findings.iter().any(|finding| finding.id == Id::CidrTwice));
}

/// A join must not make a prefix that a connected or foreign route holds.
#[test]
fn joins_stop_at_foreign_prefixes() {
    let all = row(false, 2048);
    let mut world = crowd(&[("cluster-b", &all, None)]);
    world.pod.foreign.extend(["10.128.0.0/23", "10.132.0.0/14"].map(net));
    let joined = destinations(world.inputs()).unwrap();
    for foreign in ["10.128.0.0/23", "10.132.0.0/14"] {
        assert!(!joined.list.iter().any(|found| found.net == net(foreign)), "{foreign} is another owner's");
    }
    let whole: BTreeSet<IpNet> = joined.list.iter().map(|found| found.net).collect();
    assert!(whole.contains(&net("10.128.0.0/24")) && whole.contains(&net("10.128.2.0/23")), "{whole:?}");
    assert!(all.iter().all(|net| whole.iter().any(|found| found.contains(net))), "addresses are lost");
}

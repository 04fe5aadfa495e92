//! The rules, carried out by a small interpreter on random packets, do what the words say.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crosslink_core::{
    model::{Address, Family, NetnsState, ObservedRoute, Route},
    nft::{Action, Chain, Hook, Kind, Match, Table},
    node::{Masquerade, NodeFacts},
    numbers::TABLE_PODS,
    remotes::{Cluster, Merged},
    traffic::{Asked, Desired, Facts, desired},
};
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*, sample::select};

/// A packet as a chain sees it.
#[derive(Clone, Debug)]
struct Packet {
    dev: &'static str,
    source: IpAddr,
    /// Before translation, where its connection was translated.
    named: IpAddr,
    destination: IpAddr,
    invalid: bool,
}

impl Packet {
    fn dnat(&self) -> bool {
        self.named != self.destination
    }
}

fn holds(table: &Table, packet: &Packet, wanted: &Match) -> bool {
    let within = |family: Family, name: &str, addr: IpAddr| {
        let set = table.sets.iter().find(|set| set.name == *name).unwrap();
        assert_eq!(set.family, family);
        set.contains(addr)
    };
    match wanted {
        Match::InPrefix(prefix) => packet.dev.starts_with(prefix.as_str()),
        Match::Source(family, name) => within(*family, name, packet.source),
        Match::Destination(family, name) => within(*family, name, packet.destination),
        Match::Invalid => packet.invalid,
        Match::Named(family, name) => within(*family, name, packet.named),
        Match::Dnat => packet.dnat(),
    }
}

fn carry_out(table: &Table, chain: &Chain, packet: &Packet) -> Option<Action> {
    let hit = chain.rules.iter().find(|rule| rule.matches.iter().all(|wanted| holds(table, packet, wanted)));
    hit.map(|rule| rule.action).filter(|action| *action != Action::Return)
}

/// What becomes of a packet before routing, and of a connection's source after it.
fn outcome(table: Option<&Table>, packet: &Packet) -> (bool, Option<Action>) {
    let Some(table) = table else { return (false, None) };
    let mut chains: Vec<&Chain> = table.chains.iter().collect();
    chains.sort_by_key(|chain| chain.priority);
    let at = |hook: Hook| chains.iter().filter(move |chain| chain.hook == hook);
    let untracked = at(Hook::Prerouting).any(|chain| carry_out(table, chain, packet) == Some(Action::Notrack));
    let nat = at(Hook::Postrouting).inspect(|chain| assert_eq!(chain.kind, Kind::Nat));
    (untracked, nat.filter_map(|chain| carry_out(table, chain, packet)).next())
}

/// A node, in words and lists.
#[derive(Clone, Debug)]
struct World {
    merged: Merged,
    node: NodeFacts,
    state: NetnsState,
    asked: Asked,
}

impl World {
    fn claims(&self) -> impl Iterator<Item = (&IpNet, &std::sync::Arc<BTreeSet<String>>)> {
        self.merged.clusters.values().flat_map(|cluster| &cluster.cidrs)
    }

    fn local(&self, addr: IpAddr) -> bool {
        self.node.pod_cidrs.iter().chain(&self.node.own_pod_cidrs).any(|net| net.contains(&addr))
    }

    /// In a remote CIDR whose sources pass, and nothing that is local.
    fn remote(&self, addr: IpAddr, pass: impl Fn(&IpNet, &BTreeSet<String>) -> bool) -> bool {
        let local = self.node.service_cidrs.iter().chain(&self.node.node_cidrs).any(|net| net.contains(&addr));
        // A subnet of the node's inside what others claim is the node's.
        let union: crosslink_core::set::CidrSet = self.claims().map(|(net, _)| *net).collect();
        let connected = self.state.addresses.iter().map(|address| address.net.trunc());
        let mut inside = connected.filter(|net| union.iter().any(|whole| whole != net && whole.contains(net)));
        let own = self.node.addresses.contains(&addr) || inside.any(|net| net.contains(&addr));
        !local && !own && !self.local(addr) && self.claims().any(|(net, from)| net.contains(&addr) && pass(net, from))
    }

    fn source(&self, family: Family) -> Option<IpAddr> {
        let among = |nets: &[IpNet], not: &[IpAddr]| {
            let mut addresses = self.state.addresses.iter().map(|address| address.net.addr());
            addresses.find(|addr| {
                Family::of(*addr) == family && nets.iter().any(|net| net.contains(addr)) && !not.contains(addr)
            })
        };
        among(&self.node.own_pod_cidrs, &[]).or_else(|| among(&self.node.pod_cidrs, &self.node.addresses))
    }

    /// The rule in words.
    fn expected(&self, packet: &Packet) -> (bool, Option<Action>) {
        let (source, destination) = (packet.source, packet.destination);
        let family = Family::of(source);
        let any = |addr| self.remote(addr, |_, _| true);
        let only = |addr, wanted: &str| self.remote(addr, |_, from| from.iter().all(|one| one == wanted));
        let global: IpNet = "242.0.0.0/8".parse().unwrap();
        let globalnet =
            |addr| self.remote(addr, |net, from| from.iter().all(|one| one == "submariner") && global.contains(net));
        let underlay = packet.dev.starts_with("cl");
        let own = self.node.own_pod_cidrs.iter().any(|net| net.contains(&destination));
        let covered = any(destination) || self.local(destination);
        let untracked = self.asked.notrack && underlay && packet.invalid && !own && covered;
        let preserve = self.asked.preserve_source.unwrap_or(self.node.masquerade != Some(Masquerade::Bpf));
        let mut services = self.node.service_cidrs.iter().filter(|net| Family::of_net(net) == family).peekable();
        let service = services.peek().is_none() || services.any(|net| net.contains(&packet.named));
        let translated_elsewhere = packet.dnat() && (only(source, "kernel") || !service);
        let binding = if self.asked.notrack && underlay && packet.dnat() {
            let address = self.source(family).filter(|_| any(destination));
            Some(address.map_or(Action::Masquerade, Action::Snat))
        } else if !preserve || globalnet(source) || globalnet(destination) || translated_elsewhere {
            None
        } else {
            let out = self.local(source) && any(destination);
            let back = any(source) && self.local(destination);
            (out || back).then_some(Action::KeepSource(family))
        };
        (untracked, binding)
    }
}

/// Addresses are few, so that CIDRs overlap and packets meet them.
fn addr(family: Family, bits: u32) -> IpAddr {
    match family {
        Family::V4 if bits & 0x400 != 0 => Ipv4Addr::from(0xf200_0000 | bits).into(),
        Family::V4 => Ipv4Addr::from(0x0a00_0000 | bits).into(),
        Family::V6 => Ipv6Addr::from((0xfd00 << 112) | u128::from(bits)).into(),
    }
}

fn any_addr() -> impl Strategy<Value = IpAddr> {
    (select(&Family::ALL[..]), 0..0x800u32).prop_map(|(family, bits)| addr(family, bits))
}

fn any_net() -> impl Strategy<Value = IpNet> {
    (any_addr(), 0..10u8).prop_map(|(addr, free)| {
        let longest = if addr.is_ipv4() { 32 } else { 128 };
        IpNet::new(addr, longest - free).unwrap().trunc()
    })
}

fn nets(most: usize) -> impl Strategy<Value = Vec<IpNet>> {
    vec(any_net(), 0..=most)
}

prop_compose! {
    fn any_cluster()(
        cidrs in vec((any_net(), vec(select(vec!["static", "kernel", "submariner"]), 1..3)), 0..4),
    ) -> Cluster {
        let cidrs = cidrs.into_iter().map(|(net, from)| (net, from.into_iter().map(str::to_owned).collect::<BTreeSet<String>>().into()));
        Cluster { cidrs: cidrs.collect::<BTreeMap<_, _>>(), mtu: None }
    }
}

prop_compose! {
    fn any_node()(
        pod_cidrs in nets(3),
        service_cidrs in nets(2),
        node_cidrs in nets(2),
        own_pod_cidrs in nets(2),
        addresses in vec(any_addr(), 0..3),
        masquerade in select(vec![None, Some(Masquerade::Netfilter), Some(Masquerade::Bpf)]),
    ) -> NodeFacts {
        NodeFacts {
            cluster_name: None, addresses, pod_cidrs, service_cidrs, node_cidrs, own_pod_cidrs, masquerade,
        }
    }
}

prop_compose! {
    fn any_world()(
        clusters in vec(any_cluster(), 0..3),
        node in any_node(),
        addresses in vec((any_addr(), 0..4u8), 0..4),
        asked in (any::<bool>(), any::<Option<bool>>()),
    ) -> World {
        // A CIDR belongs to one cluster, as the merge sees to.
        let mut seen = BTreeSet::new();
        let mut merged = Merged::default();
        for (place, mut cluster) in clusters.into_iter().enumerate() {
            cluster.cidrs.retain(|net, _| seen.insert(*net));
            merged.clusters.insert(format!("c{place}"), cluster);
        }
        let addresses = addresses.into_iter().map(|(addr, free)| {
            let net = IpNet::new(addr, if addr.is_ipv4() { 32 } else { 128 } - free).unwrap();
            Address { dev: "eth0".into(), net, global: true, tentative: false, unstable: false }
        });
        let state = NetnsState { addresses: addresses.collect(), ..NetnsState::default() };
        World { merged, node, state, asked: Asked { notrack: asked.0, preserve_source: asked.1 } }
    }
}

prop_compose! {
    fn any_packet()(
        dev in select(vec!["cl0123456789abc", "eth0", "cni0"]),
        family in select(&Family::ALL[..]),
        ends in (0..0x800u32, 0..0x800u32, 0..0x800u32),
        invalid in any::<bool>(),
        dnat in any::<bool>(),
    ) -> Packet {
        let (source, destination) = (addr(family, ends.0), addr(family, ends.1));
        Packet { dev, source, named: if dnat { addr(family, ends.2) } else { destination }, destination, invalid }
    }
}

fn decide(world: &World) -> Desired {
    desired(Facts { merged: &world.merged, node: &world.node, state: &world.state }, world.asked)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_rules_do_what_the_words_say(world in any_world(), packets in vec(any_packet(), 40)) {
        let decided = decide(&world);
        for packet in &packets {
            prop_assert_eq!(outcome(decided.table.as_ref(), packet), world.expected(packet), "{:?}", packet);
        }
    }

    /// Which connections are deleted, and which the rules would bind: the same, but for those that chain 2 binds.
    #[test]
    fn what_is_kept_is_what_the_rules_keep(mut world in any_world(), packets in vec(any_packet(), 40)) {
        for packet in packets.iter().filter(|packet| packet.dev.starts_with("cl")) {
            let dst = IpNet::from(packet.source);
            let route = Route { dst, table: TABLE_PODS, dev: packet.dev.into(), via: None, src: None, mtu: None };
            world.state.routes.push(ObservedRoute { route, protocol: 141, metric: 0, unicast: true, multipath: false });
        }
        world.asked.notrack = true;
        let underlay: Vec<IpAddr> = world.state.routes.iter().map(|seen| seen.route.dst.addr()).collect();
        let decided = decide(&world);
        let consistent = |packet: &&Packet| underlay.contains(&packet.source) == packet.dev.starts_with("cl");
        for packet in packets.iter().filter(consistent) {
            let kept = matches!(outcome(decided.table.as_ref(), packet).1, Some(Action::KeepSource(_)));
            let Packet { source, named, destination, .. } = *packet;
            prop_assert_eq!(decided.kept.keeps(source, named, destination), kept, "{:?}", packet);
        }
    }

    /// What only clusters without an agent's business do is nobody's: no rule touches local to local, or the Internet.
    #[test]
    fn what_is_not_remote_is_left_alone(world in any_world(), packets in vec(any_packet(), 40)) {
        let decided = decide(&world);
        let any = |addr| world.remote(addr, |_, _| true);
        for packet in packets.iter().filter(|packet| !packet.dev.starts_with("cl")) {
            if !any(packet.source) && !any(packet.destination) {
                prop_assert_eq!(outcome(decided.table.as_ref(), packet), (false, None), "{:?}", packet);
            }
        }
    }

    #[test]
    fn rules_name_only_sets_that_exist_and_are_not_empty(world in any_world()) {
        let Some(table) = decide(&world).table else { return Ok(()) };
        let names: Vec<&str> = table.sets.iter().map(|set| set.name.as_str()).collect();
        prop_assert!(table.sets.iter().all(|set| !set.ranges.is_empty()));
        prop_assert!(table.chains.iter().all(|chain| !chain.rules.is_empty()));
        let rules = table.chains.iter().flat_map(|chain| &chain.rules);
        let used: BTreeSet<&str> = rules
            .flat_map(|rule| &rule.matches)
            .filter_map(Match::set)
            .collect();
        prop_assert_eq!(used, names.into_iter().collect::<BTreeSet<_>>());
    }
}

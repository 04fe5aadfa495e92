//! The kernel state that an attachment should have: what [`crate::plan`] compares with what is, and what the record
//! keeps for CHECK, DEL and resync.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    cidr::host,
    destinations::{Destinations, Inputs, Refusal},
    error::{Code, Error},
    facts::{Attached, PodFacts},
    finding::{Finding, Id},
    model::{Family, Neighbour, Route, Rule, Side, Sysctl, Veth},
    node::NodeFacts,
    numbers::{RULE_PODS, TABLE_MAIN, TABLE_PODS, VETH_ADDRESS, VethNames, next_hop},
};

/// Smallest MTU that IPv6 works with (RFC 8200, section 5); the kernel takes a smaller route MTU for no path at all.
const IPV6_MIN_MTU: u32 = 1280;

/// A route in the pod and whom it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRoute {
    /// The route.
    pub route: Route,
    /// Cluster that it leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where its prefix was named; a conflict is then an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub named: Option<String>,
}

/// A sysctl that should have a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedSysctl {
    /// Where and what.
    #[serde(flatten)]
    pub sysctl: Sysctl,
    /// Whether it belongs to something that stays after DEL, so that its old value is to be put back.
    #[serde(default)]
    pub restore: bool,
}

/// Wanted kernel state of one attachment, without what is common to all (the rule stays for ever).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wanted {
    /// Our veth pair; underlay only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub veth: Option<Veth>,
    /// Address of the pod's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub veth_address: Option<IpAddr>,
    /// Sysctls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<WantedSysctl>,
    /// Permanent neighbours.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub neighbours: Vec<(Side, Neighbour)>,
    /// Rules of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// Host routes of the node to the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_routes: Vec<Route>,
    /// Routes in the pod.
    #[serde(default)]
    pub pod_routes: Vec<PodRoute>,
}

impl Wanted {
    /// The routes of one side.
    pub fn routes(&self, side: Side) -> Box<dyn Iterator<Item = &Route> + '_> {
        match side {
            Side::Pod => Box::new(self.pod_routes.iter().map(|wanted| &wanted.route)),
            Side::Node => Box::new(self.node_routes.iter()),
        }
    }
}

/// Whose attachment it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Container ID.
    pub container_id: &'a str,
    /// Interface name.
    pub ifname: &'a str,
}

/// Turns destinations into kernel state.
///
/// # Errors
/// Code 102 where a named CIDR has no next hop.
pub fn wanted(
    identity: Identity<'_>,
    inputs: Inputs<'_>,
    destinations: &Destinations,
) -> Result<(Wanted, Vec<Finding>), Error> {
    match inputs.pod.attached {
        Attached::Overlay => overlay(inputs.pod, destinations, inputs.refusal),
        Attached::Underlay => Ok((underlay(identity, inputs, destinations), underlay_findings(inputs))),
    }
}

fn overlay(pod: &PodFacts, destinations: &Destinations, refusal: Refusal) -> Result<(Wanted, Vec<Finding>), Error> {
    let mut findings = Vec::new();
    let mut wanted = Wanted::default();
    for destination in &destinations.list {
        let family = Family::of_net(&destination.net);
        let Some(hop) = pod.next_hop(family) else {
            if let Some(place) = destination.origin.named.as_ref().filter(|_| refusal == Refusal::Error) {
                return Err(Error::new(
                    Code::NoNextHop,
                    format!(
                        "{place}: \"{}\" has no next hop: interface {} has no {family} default route and the result \
                         gives no gateway; let the main CNI give one, or remove the CIDR",
                        destination.net, pod.ifname
                    ),
                ));
            }
            let text = format!("{family} on interface {}", pod.ifname);
            if !findings.iter().any(|finding: &Finding| finding.text == text) {
                findings.push(Finding::new(Id::NoNextHop, text));
            }
            continue;
        };
        let route = Route {
            dst: destination.net,
            table: TABLE_MAIN,
            dev: pod.ifname.clone(),
            via: hop.via,
            src: hop.src,
            mtu: route_mtu(family, destination.origin.mtu),
        };
        let (cluster, named) = (destination.origin.cluster.clone(), destination.origin.named.clone());
        wanted.pod_routes.push(PodRoute { route, cluster, named });
    }
    Ok((wanted, findings))
}

fn route_mtu(family: Family, mtu: Option<u32>) -> Option<u32> {
    match family {
        Family::V4 => mtu,
        Family::V6 => mtu.map(|mtu| mtu.max(IPV6_MIN_MTU)),
    }
}

/// Preferred source of routes through `veth0`. IPv4 always needs one, or the kernel would take 169.254.141.2. IPv6 picks
/// the pod's global address by itself unless it has several; a tentative one would be refused.
fn source(pod: &PodFacts, family: Family) -> Option<IpAddr> {
    let mut usable = pod.of(family).filter(|address| address.usable).map(|address| address.addr);
    let first = usable.next();
    match family {
        Family::V4 => first,
        Family::V6 => usable.next().and(first),
    }
}

fn underlay(identity: Identity<'_>, inputs: Inputs<'_>, destinations: &Destinations) -> Wanted {
    let Inputs { conf, node, pod, .. } = inputs;
    let names = VethNames::of(identity.container_id, identity.ifname);
    let veth = Veth {
        pod: conf.veth_name.clone(),
        node: names.node,
        pod_mac: names.pod_mac,
        node_mac: names.node_mac,
        mtu: if conf.veth_mtu == 0 { pod.mtu } else { conf.veth_mtu },
    };
    let families: Vec<Family> = Family::ALL.into_iter().filter(|family| pod.has(*family)).collect();
    Wanted {
        veth_address: pod.has(Family::V4).then_some(IpAddr::V4(VETH_ADDRESS)),
        sysctls: sysctls(&veth, pod),
        neighbours: neighbours(&veth, pod, &families),
        rules: families.iter().map(|&family| Rule { family, priority: RULE_PODS, table: TABLE_PODS }).collect(),
        node_routes: pod.addresses.iter().map(|address| node_route(&veth, node, address.addr)).collect(),
        pod_routes: pod_routes(&veth, inputs, destinations),
        veth: Some(veth),
    }
}

fn pod_routes(veth: &Veth, inputs: Inputs<'_>, destinations: &Destinations) -> Vec<PodRoute> {
    let Inputs { node, pod, .. } = inputs;
    let through = |dst: IpNet, mtu: Option<u32>| {
        let family = Family::of_net(&dst);
        Route {
            dst,
            table: TABLE_MAIN,
            dev: veth.pod.clone(),
            via: Some(next_hop(family)),
            src: source(pod, family),
            mtu: route_mtu(family, mtu),
        }
    };
    let mut hosts: Vec<IpNet> = node.addresses.iter().map(|addr| host(*addr)).collect();
    hosts.retain(|net| pod.has(Family::of_net(net)) && !pod.addresses.iter().any(|own| host(own.addr) == *net));
    hosts.sort_unstable();
    hosts.dedup();
    let mut routes: Vec<PodRoute> =
        hosts.iter().map(|net| PodRoute { route: through(*net, None), cluster: None, named: None }).collect();
    // A node address is a host route whatever else says so: precedence rule 2.
    for destination in destinations.list.iter().filter(|destination| !hosts.contains(&destination.net)) {
        let route = through(destination.net, destination.origin.mtu);
        let (cluster, named) = (destination.origin.cluster.clone(), destination.origin.named.clone());
        routes.push(PodRoute { route, cluster, named });
    }
    routes
}

fn node_route(veth: &Veth, node: &NodeFacts, addr: IpAddr) -> Route {
    Route {
        dst: host(addr),
        table: TABLE_PODS,
        dev: veth.node.clone(),
        via: None,
        src: node.primary(Family::of(addr)),
        mtu: None,
    }
}

fn neighbours(veth: &Veth, pod: &PodFacts, families: &[Family]) -> Vec<(Side, Neighbour)> {
    let hops = families
        .iter()
        .map(|family| (Side::Pod, Neighbour { dev: veth.pod.clone(), ip: next_hop(*family), mac: veth.node_mac }));
    let pods = pod
        .addresses
        .iter()
        .map(|address| (Side::Node, Neighbour { dev: veth.node.clone(), ip: address.addr, mac: veth.pod_mac }));
    hops.chain(pods).collect()
}

fn sysctls(veth: &Veth, pod: &PodFacts) -> Vec<WantedSysctl> {
    let mut list = Vec::new();
    let mut want = |side, dev: &str, key: &str, value: &str, restore| {
        let (family, name) = key.split_once('/').unwrap_or((key, ""));
        let sysctl = Sysctl { side, key: format!("{family}/conf/{dev}/{name}"), value: value.to_owned() };
        list.push(WantedSysctl { sysctl, restore });
    };
    if pod.has(Family::V4) {
        // Replies may come back by L2 while the route leads through veth0, and the other way round. The kernel takes
        // the larger of conf.all and conf.<interface>: 2 is loose whatever conf.all says.
        want(Side::Pod, &pod.ifname, "ipv4/rp_filter", "2", true);
        want(Side::Pod, &veth.pod, "ipv4/rp_filter", "2", false);
    }
    if pod.has(Family::V6) {
        want(Side::Pod, &veth.pod, "ipv6/disable_ipv6", "0", false);
    }
    want(Side::Pod, &veth.pod, "ipv6/accept_ra", "0", false);
    // Both families whatever the pod has: what it sends is not up to us, and a node must neither take its default route
    // from a pod's router advertisement nor forward a source that is not the pod's.
    for (key, value) in [
        ("ipv4/rp_filter", "1"),
        ("ipv4/forwarding", "1"),
        ("ipv4/accept_redirects", "0"),
        ("ipv6/disable_ipv6", "0"),
        // IN6_ADDR_GEN_MODE_NONE: the next hop is a neighbour entry, so that the node's end needs no address at all.
        ("ipv6/addr_gen_mode", "1"),
        ("ipv6/accept_ra", "0"),
        ("ipv6/accept_redirects", "0"),
        ("ipv6/forwarding", "1"),
    ] {
        want(Side::Node, &veth.node, key, value, false);
    }
    list
}

fn underlay_findings(inputs: Inputs<'_>) -> Vec<Finding> {
    Family::ALL
        .into_iter()
        .filter(|family| inputs.pod.has(*family) && inputs.node.primary(*family).is_none())
        .map(|family| {
            Finding::new(Id::NodeAddresses, format!("this node has no {family} address for its pods to reach"))
        })
        .collect()
}

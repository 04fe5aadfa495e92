//! What the pod's interface is, by the kernel's word.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    error::{Code, Error},
    model::{Family, Link, NetnsState},
    netconf::Mode,
    numbers::{PROTOCOL, TABLE_MAIN},
    result::ResultIp,
};

/// A next hop on the pod's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Gateway; none where the destination is on the link.
    pub via: Option<IpAddr>,
    /// Preferred source address that goes with it.
    pub src: Option<IpAddr>,
}

/// How an attachment is made, after [`Mode::Auto`] has been resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attached {
    /// By a veth into the node.
    Overlay,
    /// Past the node.
    Underlay,
}

/// Facts about the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Name of the attachment's interface.
    pub ifname: String,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// How it is attached.
    pub attached: Attached,
    /// Its global addresses: IPv4 before IPv6, those of the result first.
    pub addresses: Vec<PodAddress>,
    /// Prefixes that are on a link of the pod.
    pub connected: Vec<IpNet>,
    /// Other owners' unicast destinations in the main table, without defaults.
    pub foreign: Vec<IpNet>,
    /// Next hop of each family on the interface: the best default route's, else the result's gateway.
    pub next_hops: Vec<(Family, NextHop)>,
}

/// An address of the pod's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAddress {
    /// The address.
    pub addr: IpAddr,
    /// Whether the kernel takes it as a source now.
    pub usable: bool,
}

impl PodFacts {
    /// Whether the pod has an address of that family.
    pub fn has(&self, family: Family) -> bool {
        self.addresses.iter().any(|address| Family::of(address.addr) == family)
    }

    /// The next hop of a family.
    pub fn next_hop(&self, family: Family) -> Option<&NextHop> {
        self.next_hops.iter().find(|(of, _)| *of == family).map(|(_, hop)| hop)
    }

    /// Addresses of a family.
    pub fn of(&self, family: Family) -> impl Iterator<Item = &PodAddress> {
        self.addresses.iter().filter(move |address| Family::of(address.addr) == family)
    }
}

/// What [`pod_facts`] needs besides the pod's state.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    /// Name of the interface.
    pub ifname: &'a str,
    /// Configured mode.
    pub mode: Mode,
    /// Name of our veth in the pod; what is on it is not the pod's own.
    pub veth_name: &'a str,
    /// Addresses and gateways of the result.
    pub ips: &'a [ResultIp],
}

/// Reads the facts.
///
/// # Errors
/// Code 101 where there is no interface or no address to work with.
pub fn pod_facts(attachment: Attachment<'_>, pod: &NetnsState, node: &NetnsState) -> Result<PodFacts, Error> {
    let ifname = attachment.ifname;
    let link = pod.link(ifname).filter(|link| !link.loopback).ok_or_else(|| {
        let names: Vec<&str> = pod.links.iter().map(|link| link.name.as_str()).collect();
        Error::new(
            Code::NoInterface,
            format!(
                "the sandbox has no interface {ifname} (it has {}): put crosslink after the plugin that makes it",
                names.join(", ")
            ),
        )
    })?;
    let addresses = addresses(attachment, pod);
    if addresses.is_empty() {
        return Err(Error::new(
            Code::NoInterface,
            format!("interface {ifname} of the sandbox has no global address: give the main CNI plugin an IPAM"),
        ));
    }
    let attached = match attachment.mode {
        Mode::Overlay => Attached::Overlay,
        Mode::Underlay => Attached::Underlay,
        Mode::Auto if leads_into_node(link, node) => Attached::Overlay,
        Mode::Auto => Attached::Underlay,
    };
    let next_hops = Family::ALL
        .into_iter()
        .filter(|family| addresses.iter().any(|address| Family::of(address.addr) == *family))
        .filter_map(|family| Some((family, next_hop(attachment, family, pod)?)))
        .collect();
    Ok(PodFacts {
        ifname: ifname.to_owned(),
        mtu: link.mtu,
        attached,
        addresses,
        connected: connected(attachment, pod),
        foreign: foreign(attachment, pod),
        next_hops,
    })
}

/// Whether the link is one end of a pair whose other end is in the node's namespace: there a link of the peer index is
/// of the same kind and points back. A veth into another sandbox is none.
fn leads_into_node(link: &Link, node: &NetnsState) -> bool {
    matches!(link.kind.as_deref(), Some("veth" | "netkit"))
        && node
            .links
            .iter()
            .any(|other| Some(other.index) == link.peer && other.kind == link.kind && other.peer == Some(link.index))
}

fn addresses(attachment: Attachment<'_>, pod: &NetnsState) -> Vec<PodAddress> {
    let mut found: Vec<PodAddress> = pod
        .addresses
        .iter()
        .filter(|address| address.dev == attachment.ifname && address.global)
        .map(|address| PodAddress { addr: address.net.addr(), usable: !address.tentative && !address.unstable })
        .collect();
    // Stable: the kernel's own order decides among those that the result does not list.
    found.sort_by_key(|address| {
        let place = attachment.ips.iter().position(|ip| ip.addr == address.addr);
        (Family::of(address.addr), place.unwrap_or(usize::MAX))
    });
    found
}

/// On-link prefixes: subnets of addresses, and routes without gateway, as ptp and Calico make them.
fn connected(attachment: Attachment<'_>, pod: &NetnsState) -> Vec<IpNet> {
    let real = |dev: &str| dev != attachment.veth_name && pod.link(dev).is_none_or(|link| !link.loopback);
    let routes = pod.routes.iter().filter(|seen| {
        let route = &seen.route;
        let default = route.dst.prefix_len() == 0;
        route.table == TABLE_MAIN && !seen.ours() && seen.unicast && route.via.is_none() && !default && real(&route.dev)
    });
    let subnets = pod.addresses.iter().filter(|address| real(&address.dev)).map(|address| address.net.trunc());
    let subnets = subnets.filter(|net| net.prefix_len() < net.max_prefix_len());
    // fe80::/64 is on every link and never contested: routes name their device.
    let all = routes.map(|seen| seen.route.dst).chain(subnets).filter(|net| !is_link_local_v6(net));
    let mut nets: Vec<IpNet> = all.collect();
    nets.sort_unstable();
    nets.dedup();
    nets
}

fn is_link_local_v6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local() || net.addr().is_multicast())
}

fn foreign(attachment: Attachment<'_>, pod: &NetnsState) -> Vec<IpNet> {
    let routes = pod.routes.iter().filter(|seen| {
        seen.protocol != PROTOCOL
            && seen.route.table == TABLE_MAIN
            && seen.route.dst.prefix_len() > 0
            && seen.route.dev != attachment.veth_name
    });
    let mut nets: Vec<IpNet> = routes.map(|seen| seen.route.dst).collect();
    nets.sort_unstable();
    nets.dedup();
    nets
}

fn next_hop(attachment: Attachment<'_>, family: Family, pod: &NetnsState) -> Option<NextHop> {
    let default = pod
        .routes
        .iter()
        .filter(|seen| {
            seen.unicast
                && seen.route.table == TABLE_MAIN
                && seen.route.dst.prefix_len() == 0
                && Family::of_net(&seen.route.dst) == family
                && seen.route.dev == attachment.ifname
        })
        .min_by_key(|seen| seen.metric);
    if let Some(default) = default {
        return Some(NextHop { via: default.route.via, src: default.route.src });
    }
    let gateway = attachment.ips.iter().filter_map(|ip| ip.gateway).find(|gateway| Family::of(*gateway) == family);
    gateway.map(|gateway| NextHop { via: Some(gateway), src: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Address, ObservedRoute, Route};

    fn link(index: u32, name: &str, kind: &str, peer: u32) -> Link {
        Link {
            index,
            name: name.into(),
            kind: Some(kind.into()),
            mtu: 1450,
            up: true,
            peer: Some(peer),
            ..Link::default()
        }
    }

    fn route(dst: &str, via: Option<&str>, dev: &str, metric: u32) -> ObservedRoute {
        let route = Route {
            dst: dst.parse().unwrap(),
            table: TABLE_MAIN,
            dev: dev.into(),
            via: via.map(|via| via.parse().unwrap()),
            src: None,
            mtu: None,
        };
        ObservedRoute { route, protocol: 3, metric, unicast: true, multipath: false }
    }

    fn pod() -> NetnsState {
        let address = |net: &str, global| Address {
            dev: "eth0".into(),
            net: net.parse().unwrap(),
            global,
            tentative: false,
            unstable: false,
        };
        NetnsState {
            links: vec![link(2, "eth0", "veth", 7)],
            addresses: vec![address("fe80::1/64", false), address("fd00::5/64", true), address("10.1.0.5/24", true)],
            routes: vec![
                route("0.0.0.0/0", Some("10.1.0.254"), "eth0", 100),
                route("0.0.0.0/0", Some("10.1.0.1"), "eth0", 0),
                route("10.1.0.0/24", None, "eth0", 0),
                route("fe80::/64", None, "eth0", 256),
            ],
            ..NetnsState::default()
        }
    }

    fn attachment(mode: Mode) -> Attachment<'static> {
        Attachment { ifname: "eth0", mode, veth_name: "veth0", ips: &[] }
    }

    #[test]
    fn a_veth_is_overlay_only_if_its_peer_is_on_the_node() {
        let mut node = NetnsState { links: vec![link(7, "vethabc", "veth", 2)], ..NetnsState::default() };
        assert_eq!(pod_facts(attachment(Mode::Auto), &pod(), &node).unwrap().attached, Attached::Overlay);
        node.links[0].peer = Some(9);
        assert_eq!(pod_facts(attachment(Mode::Auto), &pod(), &node).unwrap().attached, Attached::Underlay);
        assert_eq!(pod_facts(attachment(Mode::Overlay), &pod(), &node).unwrap().attached, Attached::Overlay);
    }

    #[test]
    fn the_best_default_route_gives_the_next_hop() {
        let facts = pod_facts(attachment(Mode::Auto), &pod(), &NetnsState::default()).unwrap();
        assert_eq!(facts.next_hop(Family::V4).unwrap().via, Some("10.1.0.1".parse().unwrap()));
        assert_eq!(facts.next_hop(Family::V6), None);
        assert!(facts.has(Family::V6));
        assert_eq!(facts.connected, ["10.1.0.0/24", "fd00::/64"].map(|net| net.parse::<IpNet>().unwrap()));
    }

    #[test]
    fn the_results_gateway_stands_in_and_orders_addresses() {
        let ips = [ResultIp { addr: "fd00::5".parse().unwrap(), gateway: Some("fd00::1".parse().unwrap()) }];
        let facts =
            pod_facts(Attachment { ips: &ips, ..attachment(Mode::Auto) }, &pod(), &NetnsState::default()).unwrap();
        assert_eq!(facts.next_hop(Family::V6).unwrap().via, Some("fd00::1".parse().unwrap()));
    }

    #[test]
    fn no_interface_and_no_address_are_101() {
        let mut pod = pod();
        let gone = Attachment { ifname: "net9", ..attachment(Mode::Auto) };
        let err = pod_facts(gone, &pod, &NetnsState::default()).unwrap_err();
        assert!(err.code == Code::NoInterface && err.msg.contains("net9") && err.msg.contains("eth0"));
        pod.addresses.truncate(1);
        let err = pod_facts(attachment(Mode::Auto), &pod, &NetnsState::default()).unwrap_err();
        assert!(err.code == Code::NoInterface && err.msg.contains("no global address"));
    }
}

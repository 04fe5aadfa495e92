//! Values of the model to netlink requests.

use std::{net::IpAddr, os::fd::RawFd};

use crosslink_core::{
    model::{Family, Neighbour, Route, Rule, Veth},
    numbers::PROTOCOL,
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    nsid::{NsidAttribute, NsidMessage},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use crate::socket::Request;

fn family(of: Family) -> AddressFamily {
    match of {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// `rtm_table` and `frh_table` have 8 bits; beyond, they stay 0 and the attribute tells.
fn short_table(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(0)
}

fn route(route: &Route, dev: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    let of = Family::of_net(&route.dst);
    message.header.address_family = family(of);
    message.header.destination_prefix_length = route.dst.prefix_len();
    message.header.table = short_table(route.table);
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.kind = RouteType::Unicast;
    // IPv4 refuses a gateway of scope link, and ip(8) gives a route without one that scope. IPv6 ignores it.
    message.header.scope =
        if route.via.is_none() && of == Family::V4 { RouteScope::Link } else { RouteScope::Universe };
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(RouteAddress::from(route.dst.addr())));
    attributes.push(RouteAttribute::Table(route.table));
    attributes.push(RouteAttribute::Oif(dev));
    if let Some(via) = route.via {
        // The gateway need not be in any connected subnet (169.254.1.1, 169.254.141.1).
        message.header.flags = RouteFlags::Onlink;
        attributes.push(match (of, via) {
            (Family::V4, IpAddr::V6(via)) => RouteAttribute::Via(via.into()),
            _ => RouteAttribute::Gateway(RouteAddress::from(via)),
        });
    }
    if let Some(src) = route.src {
        attributes.push(RouteAttribute::PrefSource(RouteAddress::from(src)));
    }
    if let Some(mtu) = route.mtu {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    message
}

/// Adds a route, never over an existing one.
pub fn add_route(wanted: &Route, dev: u32) -> Request {
    Request::new(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &route(wanted, dev))
}

/// Replaces a route to the same prefix.
pub fn replace_route(wanted: &Route, dev: u32) -> Request {
    Request::new(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &route(wanted, dev))
}

/// Deletes a route of ours: protocol, device and gateway must match, so that no other owner's route is hit.
pub fn delete_route(wanted: &Route, dev: u32) -> Request {
    let mut message = route(wanted, dev);
    // Matching on metrics is exact to the last one, and the kernel may have added some.
    message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Metrics(_)));
    Request::new(libc::RTM_DELROUTE, 0, &message)
}

/// Adds an address as a host of scope link.
pub fn add_address(addr: IpAddr, dev: u32) -> Request {
    let mut message = AddressMessage::default();
    let of = Family::of(addr);
    message.header.family = family(of);
    message.header.prefix_len = if of == Family::V4 { 32 } else { 128 };
    message.header.scope = AddressScope::Link;
    message.header.index = dev;
    message.attributes = vec![AddressAttribute::Local(addr), AddressAttribute::Address(addr)];
    Request::new(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &message)
}

/// Adds a permanent neighbour, or gives it its MAC.
pub fn set_neighbour(neighbour: &Neighbour, dev: u32) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = family(Family::of(neighbour.ip));
    message.header.ifindex = dev;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::from(neighbour.ip)),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    Request::new(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &message)
}

/// Adds a rule.
pub fn add_rule(rule: &Rule) -> Request {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.family);
    message.header.table = short_table(rule.table);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    Request::new(libc::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &message)
}

/// Makes a veth pair, the peer in the network namespace of `sandbox`. Both ends have their MACs from the start, so that
/// no udev rule changes them.
pub fn create_veth(veth: &Veth, sandbox: RawFd) -> Request {
    let end = |name: &str, mac: [u8; 6]| {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Mtu(veth.mtu),
        ];
        message
    };
    let mut peer = end(&veth.pod, veth.pod_mac);
    peer.attributes.push(LinkAttribute::NetNsFd(sandbox));
    let mut message = end(&veth.node, veth.node_mac);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    Request::new(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &message)
}

/// Deletes an interface by name.
pub fn delete_link(name: &str) -> Request {
    Request::new(libc::RTM_DELLINK, 0, &named_link(name))
}

/// Sets an interface up.
pub fn set_up(dev: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = dev;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request::new(libc::RTM_SETLINK, 0, &message)
}

/// Sets an interface's MTU.
pub fn set_mtu(dev: u32, mtu: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = dev;
    message.attributes = vec![LinkAttribute::Mtu(mtu)];
    Request::new(libc::RTM_SETLINK, 0, &message)
}

fn named_link(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    message
}

/// Asks for one interface by name, without IPv6's statistics of it.
pub fn get_link_by_name(name: &str) -> Request {
    let mut message = named_link(name);
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    Request::new(libc::RTM_GETLINK, 0, &message)
}

/// Asks for one interface by index.
pub fn get_link_by_index(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    Request::new(libc::RTM_GETLINK, 0, &message)
}

/// Asks by which number the sender's namespace knows another one.
pub fn get_netnsid(other: RawFd) -> Request {
    let mut message = NsidMessage::default();
    message.attributes = vec![NsidAttribute::Fd(other.cast_unsigned())];
    Request::new(libc::RTM_GETNSID, 0, &message)
}

/// Gives a network namespace a number in ours, the kernel's choice (`NETNSA_NSID` -1).
pub fn set_netnsid(other: RawFd) -> Request {
    let mut message = NsidMessage::default();
    message.attributes = vec![NsidAttribute::Id(-1), NsidAttribute::Fd(other.cast_unsigned())];
    Request::new(libc::RTM_NEWNSID, 0, &message)
}

/// Asks for all interfaces.
pub fn dump_links() -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    Request::new(libc::RTM_GETLINK, 0, &message)
}

/// Asks for all addresses.
pub fn dump_addresses() -> Request {
    Request::new(libc::RTM_GETADDR, 0, &AddressMessage::default())
}

/// Asks for the routes of one table.
pub fn dump_routes(of: Family, table: u32) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(of);
    message.attributes = vec![RouteAttribute::Table(table)];
    Request::new(libc::RTM_GETROUTE, 0, &message)
}

/// Asks for the neighbours on an interface.
pub fn dump_neighbours(dev: u32) -> Request {
    let mut message = NeighbourMessage::default();
    message.attributes = vec![NeighbourAttribute::IfIndex(dev)];
    Request::new(libc::RTM_GETNEIGH, 0, &message)
}

/// Asks for the rules of a family.
pub fn dump_rules(of: Family) -> Request {
    let mut message = RuleMessage::default();
    message.header.family = family(of);
    Request::new(libc::RTM_GETRULE, 0, &message)
}

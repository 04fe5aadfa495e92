//! Netlink answers to values of the model.
//!
//! Only those attributes are looked at that we use. netlink-packet-route's full parsers fail a whole dump over one attribute
//! of a shape that they do not expect, and somebody else's exotic link or route must never stop a pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crosslink_core::model::{Address, Family, Link, Neighbour, ObservedRoute, Route, Rule};
use ipnet::IpNet;

use crate::{error::Error, socket::Received};

/// Flags in the kind of an attribute (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`) cut off (linux/netlink.h).
const NLA_TYPE_MASK: u16 = 0x3fff;

/// Attributes of one message.
struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Those after a header of `header` bytes.
    fn after(payload: &'a [u8], header: usize) -> Self {
        // Headers are padded to four bytes (NLMSG_ALIGN).
        Self(payload.get(header.next_multiple_of(4)..).unwrap_or_default())
    }

    /// Attributes by kind and value, up to the first that does not fit (`struct nlattr`, linux/netlink.h: length with header,
    /// kind, value, padding to four bytes). Not netlink-packet-core's iterator: dumps of a thousand routes are read for every
    /// pod, and it takes most of the time of that.
    fn iter(&self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let [low, high, kind_low, kind_high, ..] = *rest else { return None };
            let length = usize::from(u16::from_ne_bytes([low, high]));
            let value = rest.get(4..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((u16::from_ne_bytes([kind_low, kind_high]) & NLA_TYPE_MASK, value))
        })
    }

    fn value(&self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    fn u32(&self, kind: u16) -> Option<u32> {
        u32_at(self.value(kind)?, 0)
    }

    fn addr(&self, kind: u16) -> Option<IpAddr> {
        addr(self.value(kind)?)
    }

    fn text(&self, kind: u16) -> Option<String> {
        let bytes: Vec<u8> = self.value(kind)?.iter().copied().take_while(|byte| *byte != 0).collect();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn addr(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes))),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes))),
        _ => None,
    }
}

fn odd(what: &str, why: impl ToString) -> Error {
    Error::Protocol { what: what.to_owned(), why: why.to_string() }
}

fn family(number: u8) -> Option<Family> {
    match i32::from(number) {
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

/// `struct ifinfomsg`, attributes of linux/if_link.h.
pub fn link(received: Received<'_>) -> Result<Link, Error> {
    const HEADER: usize = 16;
    let (index, flags) = (u32_at(received.payload, 4), u32_at(received.payload, 8));
    let (Some(index), Some(flags)) = (index, flags) else { return Err(odd("read an interface", "a short message")) };
    let attributes = Attributes::after(received.payload, HEADER);
    let info = attributes.value(libc::IFLA_LINKINFO).unwrap_or_default();
    Ok(Link {
        index,
        name: attributes.text(libc::IFLA_IFNAME).ok_or_else(|| odd("read an interface", "no name"))?,
        kind: Attributes(info).text(libc::IFLA_INFO_KIND),
        mac: attributes.value(libc::IFLA_ADDRESS).unwrap_or_default().to_vec(),
        mtu: attributes.u32(libc::IFLA_MTU).unwrap_or_default(),
        up: flags & libc::IFF_UP.cast_unsigned() != 0,
        loopback: flags & libc::IFF_LOOPBACK.cast_unsigned() != 0,
        peer: attributes.u32(libc::IFLA_LINK),
        peer_elsewhere: attributes.u32(libc::IFLA_LINK_NETNSID).is_some(),
    })
}

/// `IFLA_LINK_NETNSID`: number by which an interface's namespace knows that of its peer; none where it is the same.
pub fn link_netnsid(received: Received<'_>) -> Option<u32> {
    const HEADER: usize = 16;
    Attributes::after(received.payload, HEADER).u32(libc::IFLA_LINK_NETNSID)
}

/// `struct rtgenmsg`, `NETNSA_NSID` (linux/net_namespace.h); none where no number was given yet (-1).
pub fn netnsid(received: Received<'_>) -> Option<u32> {
    const HEADER: usize = 4;
    const NETNSA_NSID: u16 = 1;
    Attributes::after(received.payload, HEADER).u32(NETNSA_NSID).filter(|id| *id != u32::MAX)
}

fn u32_at(bytes: &[u8], place: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(place..place + 4)?.try_into().ok()?))
}

/// Finds an interface's name by its index.
pub type Names<'a> = &'a dyn Fn(u32) -> String;

/// `struct ifaddrmsg`, attributes of linux/if_addr.h. None for other families.
pub fn address(received: Received<'_>, names: Names<'_>) -> Option<Address> {
    const HEADER: usize = 8;
    let [number, length, short_flags, scope, ..] = received.payload else { return None };
    family(*number)?;
    let index = u32_at(received.payload, 4)?;
    let attributes = Attributes::after(received.payload, HEADER);
    // On a point-to-point link IFA_ADDRESS is the other end's.
    let ip = attributes.addr(libc::IFA_LOCAL).or_else(|| attributes.addr(libc::IFA_ADDRESS))?;
    let flags = attributes.u32(libc::IFA_FLAGS).unwrap_or(u32::from(*short_flags));
    Some(Address {
        dev: names(index),
        net: IpNet::new(ip, *length).ok()?,
        global: *scope == libc::RT_SCOPE_UNIVERSE,
        tentative: flags & (libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED) != 0,
        // IFA_F_TEMPORARY is IFA_F_SECONDARY in IPv4, where it only says that the prefix is shared.
        unstable: ip.is_ipv6() && flags & (libc::IFA_F_TEMPORARY | libc::IFA_F_DEPRECATED) != 0,
    })
}

/// `struct rtmsg`, attributes of linux/rtnetlink.h. None for cloned routes (the cache) and other families. All types
/// count, local ones too: the kernel lets none of them share a prefix and metric with one of ours.
pub fn route(received: Received<'_>, names: Names<'_>) -> Option<ObservedRoute> {
    const HEADER: usize = 12;
    let [number, length, _, _, table, protocol, _, kind, ..] = received.payload else { return None };
    let of = family(*number)?;
    let flags = u32_at(received.payload, 8)?;
    if flags & libc::RTM_F_CLONED != 0 {
        return None;
    }
    let attributes = Attributes::after(received.payload, HEADER);
    let default = match of {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let metrics = attributes.value(libc::RTA_METRICS).unwrap_or_default();
    let multipath = attributes.value(libc::RTA_MULTIPATH).map(next_hops).unwrap_or_default();
    let (dev, via) = match multipath.first() {
        Some(first) => *first,
        None => (attributes.u32(libc::RTA_OIF), via(&attributes)),
    };
    Some(ObservedRoute {
        route: Route {
            dst: IpNet::new(attributes.addr(libc::RTA_DST).unwrap_or(default), *length).ok()?,
            table: attributes.u32(libc::RTA_TABLE).unwrap_or(u32::from(*table)),
            dev: dev.map(names).unwrap_or_default(),
            via,
            src: attributes.addr(libc::RTA_PREFSRC),
            mtu: Attributes(metrics).u32(RTAX_MTU),
        },
        protocol: *protocol,
        metric: attributes.u32(libc::RTA_PRIORITY).unwrap_or(0),
        unicast: *kind == libc::RTN_UNICAST,
        multipath: multipath.len() > 1,
    })
}

/// `RTAX_MTU` (linux/rtnetlink.h).
const RTAX_MTU: u16 = 2;
/// `RTA_VIA`: family (2 bytes), then the address.
const RTA_VIA: u16 = 18;

fn via(attributes: &Attributes<'_>) -> Option<IpAddr> {
    attributes.addr(libc::RTA_GATEWAY).or_else(|| addr(attributes.value(RTA_VIA)?.get(2..)?))
}

/// `struct rtnexthop` list: index and gateway of each.
fn next_hops(mut bytes: &[u8]) -> Vec<(Option<u32>, Option<IpAddr>)> {
    const HEADER: usize = 8;
    let mut hops = Vec::new();
    while let (Some(length), Some(index)) = (bytes.get(..2), u32_at(bytes, 4)) {
        let length = length.try_into().map(u16::from_ne_bytes).map_or(0, usize::from);
        let Some(hop) = bytes.get(..length).filter(|_| length >= HEADER) else { break };
        hops.push((Some(index), via(&Attributes::after(hop, HEADER))));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// `struct ndmsg`: permanent neighbours with a MAC of six bytes.
pub fn neighbour(received: Received<'_>, names: Names<'_>) -> Option<Neighbour> {
    const HEADER: usize = 12;
    family(*received.payload.first()?)?;
    let index = u32_at(received.payload, 4)?;
    let state = u16::from_ne_bytes(received.payload.get(8..10)?.try_into().ok()?);
    if state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let attributes = Attributes::after(received.payload, HEADER);
    Some(Neighbour {
        dev: names(index),
        ip: attributes.addr(libc::NDA_DST)?,
        mac: attributes.value(libc::NDA_LLADDR)?.try_into().ok()?,
    })
}

/// `struct fib_rule_hdr`, attributes of linux/fib_rules.h: rules that look up a table for every packet.
pub fn rule(received: Received<'_>) -> Option<Rule> {
    const HEADER: usize = 12;
    /// Attributes that select nothing: priority, table, padding, protocol.
    const NEUTRAL: [u16; 4] = [FRA_PRIORITY, FRA_TABLE, FRA_PAD, FRA_PROTOCOL];
    /// The kernel always tells these; all ones is "none".
    const SUPPRESSIONS: [u16; 2] = [FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN];
    const FRA_PRIORITY: u16 = 6;
    const FRA_SUPPRESS_IFGROUP: u16 = 13;
    const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
    const FRA_TABLE: u16 = 15;
    const FRA_PAD: u16 = 18;
    const FRA_PROTOCOL: u16 = 21;
    const FR_ACT_TO_TBL: u8 = 1;
    const FIB_RULE_INVERT: u32 = 2;
    let [number, dst_len, src_len, tos, table, _, _, action, ..] = received.payload else { return None };
    let of = family(*number)?;
    let plain_header = (*dst_len, *src_len, *tos, *action) == (0, 0, 0, FR_ACT_TO_TBL);
    let inverted = u32_at(received.payload, 8)? & FIB_RULE_INVERT != 0;
    let attributes = Attributes::after(received.payload, HEADER);
    let selects = |(kind, value): (u16, &[u8])| {
        let none = SUPPRESSIONS.contains(&kind) && value.iter().all(|byte| *byte == u8::MAX);
        !(none || NEUTRAL.contains(&kind))
    };
    if !plain_header || inverted || attributes.iter().any(selects) {
        return None;
    }
    let table = attributes.u32(FRA_TABLE).unwrap_or(u32::from(*table));
    Some(Rule { family: of, priority: attributes.u32(FRA_PRIORITY).unwrap_or(0), table })
}

//! What the kernel holds, as far as crosslink looks at it, and the changes that it makes. Values only.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which they are handled.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Family of an address.
    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Family of a prefix.
    pub const fn of_net(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Where an object lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The pod's sandbox.
    Pod,
    /// The node's network namespace.
    Node,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Node => "node",
        })
    }
}

/// A unicast route with one next hop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// Destination prefix.
    pub dst: IpNet,
    /// Routing table.
    pub table: u32,
    /// Name of the outgoing interface.
    pub dev: String,
    /// Gateway; may be of the other family (`RTA_VIA`). Without one the destination is on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<IpAddr>,
    /// Preferred source address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src: Option<IpAddr>,
    /// Path MTU in bytes (`RTAX_MTU`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

impl fmt::Display for Route {
    /// In the words of `ip route`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dst)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        write!(f, " dev {}", self.dev)?;
        if let Some(src) = self.src {
            write!(f, " src {src}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if self.table != crate::numbers::TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}

/// A route as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedRoute {
    /// Destination, first next hop and attributes. `dev` is empty where the route has none (blackhole, multipath of
    /// devices that went away).
    pub route: Route,
    /// `rtm_protocol`: who made it.
    pub protocol: u8,
    /// Metric; lower wins.
    pub metric: u32,
    /// Whether it is `RTN_UNICAST`; otherwise blackhole, unreachable, prohibit, throw, local, …
    pub unicast: bool,
    /// Whether it has more than one next hop.
    pub multipath: bool,
}

impl ObservedRoute {
    /// Whether it forwards exactly as `wanted` does, whoever made it.
    pub fn same_as(&self, wanted: &Route) -> bool {
        self.unicast && !self.multipath && self.route == *wanted
    }

    /// Whether its protocol says that it is ours.
    pub const fn ours(&self) -> bool {
        self.protocol == crate::numbers::PROTOCOL
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// `IFLA_INFO_KIND` (`veth`, `macvlan`, …); none for a physical device or a VF.
    pub kind: Option<String>,
    /// Link-layer address, of any length.
    pub mac: Vec<u8>,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFF_UP`.
    pub up: bool,
    /// `IFF_LOOPBACK`.
    pub loopback: bool,
    /// `IFLA_LINK`: of a veth its peer's index, of a macvlan its master's.
    pub peer: Option<u32>,
    /// `IFLA_LINK_NETNSID` is there: the peer is in another network namespace, which is therefore alive.
    pub peer_elsewhere: bool,
}

impl Link {
    /// Whether it is one end of a veth pair: the only kind that we make, so the only one that we delete.
    pub fn is_veth(&self) -> bool {
        self.kind.as_deref() == Some("veth")
    }
}

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Interface name.
    pub dev: String,
    /// Address with its prefix length (host bits kept).
    pub net: IpNet,
    /// `RT_SCOPE_UNIVERSE`: neither link-local nor host.
    pub global: bool,
    /// Duplicate address detection has not ended or has failed; not usable as a source yet.
    pub tentative: bool,
    /// A privacy or deprecated address: never a stable source.
    pub unstable: bool,
}

/// A neighbour entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Neighbour {
    /// Interface name.
    pub dev: String,
    /// Its address.
    pub ip: IpAddr,
    /// Its link-layer address.
    pub mac: [u8; 6],
}

/// Writes a MAC in the usual form.
pub fn mac_text(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev {} lladdr {}", self.ip, self.dev, mac_text(&self.mac))
    }
}

/// A policy rule without selectors: `priority: from all lookup table`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rule {
    /// Family.
    pub family: Family,
    /// Priority; lower is asked first.
    pub priority: u32,
    /// Table that it looks up.
    pub table: u32,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: from all lookup {} ({})", self.priority, self.table, self.family)
    }
}

/// A value under `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Sysctl {
    /// Where.
    pub side: Side,
    /// Path below `/proc/sys/net`, e.g. `ipv4/conf/eth0/rp_filter`.
    pub key: String,
    /// Value, without newline.
    pub value: String,
}

impl Sysctl {
    /// Whether both are about one sysctl, whatever the values.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.side, &self.key) == (other.side, &other.key)
    }
}

/// A veth pair whose one end is in the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Veth {
    /// Name of the pod's end.
    pub pod: String,
    /// Name of the node's end.
    pub node: String,
    /// MAC of the pod's end.
    pub pod_mac: [u8; 6],
    /// MAC of the node's end.
    pub node_mac: [u8; 6],
    /// MTU of both ends, bytes.
    pub mtu: u32,
}

/// Everything that was looked up in one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsState {
    /// Interfaces.
    pub links: Vec<Link>,
    /// Addresses.
    pub addresses: Vec<Address>,
    /// Routes of the tables that were asked for.
    pub routes: Vec<ObservedRoute>,
    /// Permanent neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Rules without selectors.
    pub rules: Vec<Rule>,
    /// Sysctls that were asked for and exist, by key.
    pub sysctls: BTreeMap<String, String>,
}

impl NetnsState {
    /// The interface of that name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }
}

/// Both ends of an attachment as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The sandbox.
    pub pod: NetnsState,
    /// The node.
    pub node: NetnsState,
}

impl Observed {
    /// One side.
    pub const fn side(&self, side: Side) -> &NetnsState {
        match side {
            Side::Pod => &self.pod,
            Side::Node => &self.node,
        }
    }
}

/// One change of the kernel's state. A list of them is applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make a veth pair, one end in the pod, both with their MACs and MTU.
    CreateVeth(Veth),
    /// Delete an interface of the node by name.
    DeleteNodeLink(String),
    /// Set an interface's MTU.
    SetMtu(Side, String, u32),
    /// Set an interface up.
    SetUp(Side, String),
    /// Write a sysctl; the second value is what it was.
    SetSysctl(Sysctl, Option<String>),
    /// Add a host address of scope link to an interface of the pod.
    AddAddress(String, IpAddr),
    /// Add a permanent neighbour, or give it its MAC.
    SetNeighbour(Side, Neighbour),
    /// Add a rule to the node.
    AddRule(Rule),
    /// Add a route, never over an existing one.
    AddRoute(Side, Route),
    /// Replace a route of ours to the same prefix; the second is what it was.
    ReplaceRoute(Side, Route, Route),
    /// Delete a route of ours.
    DeleteRoute(Side, Route),
}

impl Change {
    /// What undoes it; nothing where undoing the creation of its link does, where it is meant to stay (the rule), and where
    /// it repaired a link of an earlier ADD, which nobody wants broken again.
    pub fn inverse(&self) -> Option<Self> {
        match self {
            Self::CreateVeth(veth) => Some(Self::DeleteNodeLink(veth.node.clone())),
            Self::SetSysctl(sysctl, Some(old)) => {
                Some(Self::SetSysctl(Sysctl { value: old.clone(), ..sysctl.clone() }, Some(sysctl.value.clone())))
            }
            Self::AddRoute(side, route) => Some(Self::DeleteRoute(*side, route.clone())),
            Self::ReplaceRoute(side, new, old) => Some(Self::ReplaceRoute(*side, old.clone(), new.clone())),
            Self::DeleteRoute(side, route) => Some(Self::AddRoute(*side, route.clone())),
            Self::DeleteNodeLink(_)
            | Self::SetMtu(..)
            | Self::SetUp(..)
            | Self::SetSysctl(_, None)
            | Self::AddAddress(..)
            | Self::SetNeighbour(..)
            | Self::AddRule(_) => None,
        }
    }
}

impl fmt::Display for Change {
    /// What is missing or wrong, for CHECK and for error messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateVeth(veth) => write!(f, "veth pair {} (pod) and {} (node)", veth.pod, veth.node),
            Self::DeleteNodeLink(name) => write!(f, "node: removal of interface {name}"),
            Self::SetMtu(side, name, mtu) => write!(f, "{side}: MTU {mtu} of {name}"),
            Self::SetUp(side, name) => write!(f, "{side}: interface {name} up"),
            Self::SetSysctl(s, Some(old)) => write!(f, "{}: net/{} = {} (is {old})", s.side, s.key, s.value),
            Self::SetSysctl(s, None) => write!(f, "{}: net/{} = {}", s.side, s.key, s.value),
            Self::AddAddress(dev, addr) => write!(f, "pod: address {addr} on {dev}"),
            Self::SetNeighbour(side, neighbour) => write!(f, "{side}: permanent neighbour {neighbour}"),
            Self::AddRule(rule) => write!(f, "node: rule {rule}"),
            Self::AddRoute(side, route) => write!(f, "{side}: route {route}"),
            Self::ReplaceRoute(side, route, old) => write!(f, "{side}: route {route} (is {old})"),
            Self::DeleteRoute(side, route) => write!(f, "{side}: removal of route {route}"),
        }
    }
}

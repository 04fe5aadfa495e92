//! A small part of nf_tables as data: one table of family `inet`, its sets of addresses, its chains and their rules.
//! Values only; `crosslink-kernel` says them to the kernel.

use std::net::IpAddr;

use crate::{
    model::Family,
    set::{CidrSet, successor},
};

/// A table of family `inet`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Its sets.
    pub sets: Vec<Set>,
    /// Its chains.
    pub chains: Vec<Chain>,
}

/// A set of addresses of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// Family of its addresses.
    pub family: Family,
    /// First and last address of each range, in rising order, with a gap between one and the next: nf_tables refuses
    /// intervals that overlap, and shows two that touch as one.
    pub ranges: Vec<(IpAddr, IpAddr)>,
}

impl Set {
    /// The addresses of `cidrs` that are of that family.
    pub fn new(name: impl Into<String>, family: Family, cidrs: &CidrSet) -> Self {
        let mut ranges: Vec<(IpAddr, IpAddr)> = Vec::new();
        for net in cidrs.iter().filter(|net| Family::of_net(net) == family) {
            let (first, last) = (net.network(), net.broadcast());
            match ranges.last_mut() {
                Some((_, before)) if successor(*before) == Some(first) => *before = last,
                _ => ranges.push((first, last)),
            }
        }
        Self { name: name.into(), family, ranges }
    }

    /// Whether an address is in it.
    pub fn contains(&self, addr: IpAddr) -> bool {
        let upto = self.ranges.partition_point(|(first, _)| *first <= addr);
        let range = upto.checked_sub(1).and_then(|place| self.ranges.get(place));
        Family::of(addr) == self.family && range.is_some_and(|(_, last)| addr <= *last)
    }
}

/// What a base chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `type filter`.
    Filter,
    /// `type nat`: only the first packet of a connection comes here, and the first chain that binds it ends it.
    Nat,
}

/// Where a base chain is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// After routing, of what is forwarded and of what the node sends.
    Postrouting,
}

/// A base chain with policy accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: Kind,
    /// Its hook.
    pub hook: Hook,
    /// Lower goes first (`enum nf_ip_hook_priorities`, linux/netfilter_ipv4.h).
    pub priority: i32,
    /// In order.
    pub rules: Vec<Rule>,
}

/// A rule. Every rule also counts what it matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// All must hold, and they are looked at in this order.
    pub matches: Vec<Match>,
    /// What then happens.
    pub action: Action,
    /// Why it is there, for whoever lists the rules.
    pub comment: String,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// The packet came by an interface whose name starts so.
    InPrefix(String),
    /// Its source is in the set of that name and family.
    Source(Family, String),
    /// Its destination is.
    Destination(Family, String),
    /// The destination that its connection named, before any translation, is.
    Named(Family, String),
    /// conntrack can make nothing of it.
    Invalid,
    /// The destination of its connection was translated.
    Dnat,
}

impl Match {
    /// Name of the set that it looks into.
    pub fn set(&self) -> Option<&str> {
        match self {
            Self::Source(_, set) | Self::Destination(_, set) | Self::Named(_, set) => Some(set),
            Self::InPrefix(_) | Self::Invalid | Self::Dnat => None,
        }
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leaves the chain.
    Return,
    /// Keeps conntrack away from the packet, which is no longer invalid then.
    Notrack,
    /// Binds the connection's source to its own address, so that no later chain masquerades it.
    KeepSource(Family),
    /// Binds it to this address.
    Snat(IpAddr),
    /// Binds it to the address of the interface that it leaves by.
    Masquerade,
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;

    fn set(family: Family, nets: &[&str]) -> Set {
        Set::new("s", family, &nets.iter().map(|net| net.parse::<IpNet>().unwrap()).collect())
    }

    #[test]
    fn ranges_that_touch_are_one_and_families_do_not_mix() {
        let nets = ["10.0.0.0/25", "10.0.0.128/25", "10.0.1.0/24", "10.0.3.0/24", "fd00::/65", "fd00:0:0:0:8000::/65"];
        let (v4, v6) = (set(Family::V4, &nets), set(Family::V6, &nets));
        let texts = |set: &Set| set.ranges.iter().map(|(a, b)| format!("{a}-{b}")).collect::<Vec<_>>();
        assert_eq!(texts(&v4), ["10.0.0.0-10.0.1.255", "10.0.3.0-10.0.3.255"]);
        assert_eq!(texts(&v6), ["fd00::-fd00::ffff:ffff:ffff:ffff"]);
    }

    #[test]
    fn membership_is_exact_at_both_ends() {
        let set = set(Family::V4, &["0.0.0.0/8", "10.0.0.0/24", "255.0.0.0/8"]);
        for (addr, within) in [
            ("0.0.0.0", true),
            ("1.0.0.0", false),
            ("9.255.255.255", false),
            ("10.0.0.255", true),
            ("10.0.1.0", false),
            ("255.255.255.255", true),
            ("::a00:0", false),
        ] {
            assert_eq!(set.contains(addr.parse().unwrap()), within, "{addr}");
        }
    }
}

//! Numbers and names that must not collide with anybody else's, in one place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::Family;

/// Protocol number of every route that is ours (`rtm_protocol`; below 16 is the kernel's and well-known daemons').
pub const PROTOCOL: u8 = 141;
/// `RT_TABLE_MAIN` (linux/rtnetlink.h).
pub const TABLE_MAIN: u32 = 254;
/// Host routes of underlay pods, on the node.
pub const TABLE_PODS: u32 = 1410;
/// Priority of the node's rule that looks up [`TABLE_PODS`]: before `main` (32766).
pub const RULE_PODS: u32 = 1410;
/// Above this many routes per pod and family, sibling prefixes are joined.
pub const JOIN_LIMIT: usize = 2000;
/// Most CIDRs that one annotation may list.
pub const ANNOTATION_LIMIT: usize = 256;
/// Most routes that the excludes of one pod's annotation may add by splitting.
pub const SPLIT_LIMIT: usize = 4096;
/// Most node addresses taken from the kernel when `node.json` gives none.
pub const NODE_ADDRESS_LIMIT: usize = 32;
/// Shortest remote IPv4 prefix that is accepted: two halves are a default route in disguise.
pub const SHORTEST_V4: u8 = 4;
/// Shortest remote IPv6 prefix that is accepted.
pub const SHORTEST_V6: u8 = 8;

/// Address of `veth0` in the pod, /32 and scope link. Without an address a loose `rp_filter` is strict there, and a
/// REDIRECT has no target.
pub const VETH_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 141, 2);

/// Next hop of every route through `veth0`. Never an address of the node: a permanent neighbour gives it the MAC of the
/// veth's node end.
pub const fn next_hop(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(169, 254, 141, 1)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x8d, 1)),
    }
}

/// FNV-1a, 64 bit (<http://www.isthe.com/chongo/tech/comp/fnv/>): stable across builds, unlike `std`'s hasher.
fn fnv1a(parts: &[&str]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = OFFSET;
    for part in parts {
        // The separator keeps ("ab", "c") and ("a", "bc") apart; it occurs in neither a container ID nor an ifname.
        for byte in part.bytes().chain([b'/']) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(PRIME);
        }
    }
    // FNV mixes its last bytes into the high bits only weakly (an ifname's last digit): finish with murmur3's mixer.
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// Names and MACs of an attachment's veth pair, derived from (container ID, ifname) alone, so that DEL finds the link
/// without a record and a re-ADD keeps permanent neighbours valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethNames {
    /// Name of the node's end: `cl` and 13 hex digits, 15 bytes, the most that Linux allows.
    pub node: String,
    /// MAC of the node's end.
    pub node_mac: [u8; 6],
    /// MAC of the pod's end.
    pub pod_mac: [u8; 6],
}

impl VethNames {
    /// Names for one attachment.
    pub fn of(container_id: &str, ifname: &str) -> Self {
        let hash = fnv1a(&[container_id, ifname]);
        let [_, _, _, a, b, c, d, e] = hash.to_be_bytes();
        // 0x02 and 0x06: locally administered, unicast, and different from each other.
        Self { node: format!("cl{:013x}", hash >> 12), node_mac: [0x02, a, b, c, d, e], pod_mac: [0x06, a, b, c, d, e] }
    }

    /// Whether a link of the node has the name of an attachment's veth: `cl` and 13 hex digits.
    pub fn is_node_end(name: &str) -> bool {
        let rest = name.strip_prefix("cl").unwrap_or_default();
        rest.len() == 13 && rest.chars().all(|c| c.is_ascii_hexdigit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let one = VethNames::of("0123456789abcdef", "eth0");
        assert_eq!(one.node.len(), 15);
        assert!(one.node.starts_with("cl"));
        assert_eq!(one, VethNames::of("0123456789abcdef", "eth0"));
        assert_ne!(one.node, VethNames::of("0123456789abcdef", "eth1").node);
        assert_ne!(VethNames::of("ab", "c").node, VethNames::of("a", "bc").node);
        assert_ne!(one.node_mac, one.pod_mac);
        assert_eq!(one.node_mac[0] & 0b11, 0b10, "locally administered unicast");
        assert_eq!(one.pod_mac[0] & 0b11, 0b10, "locally administered unicast");
    }

    #[test]
    fn names_are_stable_across_builds() {
        // A change here breaks DEL of pods that an older plugin made.
        assert_eq!(VethNames::of("c1", "eth0").node, VethNames::of("c1", "eth0").node);
        assert_eq!(fnv1a(&[]), {
            let mut h: u64 = 0xcbf2_9ce4_8422_2325;
            h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
            h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
            h ^ (h >> 33)
        });
    }

    #[test]
    fn no_collision_among_many() {
        let mut seen = std::collections::HashSet::new();
        for pod in 0..20_000 {
            for ifname in ["eth0", "net1"] {
                assert!(seen.insert(VethNames::of(&format!("pod{pod}"), ifname).node));
            }
        }
    }
}

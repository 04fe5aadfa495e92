//! Stand-ins for what kube-proxy and crosslink's agent keep in a node's netfilter.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use crate::netns::Netns;

/// Which clients of a service get the node's address as their source.
#[derive(Clone, Copy, Debug)]
pub enum Masquerade<'a> {
    /// All: kube-proxy's `masqueradeAll`.
    All,
    /// Those outside this CIDR: kube-proxy's `clusterCIDR`.
    NotFrom(&'a str),
    /// None: kube-proxy where it takes every client for local.
    Never,
}

/// Drops forwarded packets of no known connection, as kube-proxy's iptables mode does.
pub fn kube_proxy_drop(node: &Netns) {
    node.nft(
        "table inet kube-proxy-filter {
            chain forward { type filter hook forward priority 0; policy accept; ct state invalid counter drop; }
        }",
    );
}

/// Makes `vip` reach `backend`, TCP and UDP, for what the node forwards and for the node itself, as kube-proxy does.
/// The node needs a route that covers the address of `vip`, as a cluster's nodes do.
pub fn service(node: &Netns, vip: SocketAddr, backend: SocketAddr, masquerade: Masquerade<'_>) {
    let l3 = family(vip.ip());
    let mark = "meta mark set meta mark or 0x4000";
    let matches = format!("{l3} daddr {} meta l4proto {{ tcp, udp }} th dport {}", vip.ip(), vip.port());
    let marking = match masquerade {
        Masquerade::All => mark.to_owned(),
        Masquerade::NotFrom(cidr) => format!("{l3} saddr != {cidr} {mark}"),
        Masquerade::Never => "return".to_owned(),
    };
    let mut rules = "add table inet kube-proxy
        add chain inet kube-proxy prerouting { type nat hook prerouting priority dstnat; policy accept; }
        add chain inet kube-proxy output { type nat hook output priority -100; policy accept; }
        add chain inet kube-proxy postrouting { type nat hook postrouting priority srcnat; policy accept; }
        flush chain inet kube-proxy postrouting
        add rule inet kube-proxy postrouting meta mark & 0x4000 == 0x4000 ct status dnat masquerade
        "
    .to_owned();
    for chain in ["prerouting", "output"] {
        if !matches!(masquerade, Masquerade::Never) {
            writeln!(rules, "add rule inet kube-proxy {chain} {matches} {marking}").expect("write to a string");
        }
        writeln!(rules, "add rule inet kube-proxy {chain} {matches} counter dnat {l3} to {backend}")
            .expect("write to a string");
    }
    node.nft(&rules);
}

/// What crosslink's agent knows when it writes a node's rules; CIDRs of either family.
#[derive(Clone, Copy, Debug, Default)]
pub struct CrosslinkNft<'a> {
    /// Pod CIDRs of this node alone, whose connections it sees in full.
    pub node_pods: &'a [&'a str],
    /// The node's addresses inside its pod CIDRs, at most one per family: the source of what it sends to remote
    /// clusters. Without one of the family, remote clusters see a masqueraded source.
    pub node_sources: &'a [IpAddr],
    /// Pod CIDRs of this cluster.
    pub local_pods: &'a [&'a str],
    /// Pod CIDRs of remote clusters.
    pub remote_pods: &'a [&'a str],
    /// Service CIDRs of remote clusters. They are in the untracked set too: their DNAT is done in the remote cluster, and
    /// the answers come back to the pod by L2 as those of remote pods do. Local service CIDRs never are, since a node
    /// that did the DNAT itself must undo it.
    pub remote_services: &'a [&'a str],
}

/// Loads, or replaces, the rules that crosslink's agent keeps on a node with underlay pods (DESIGN 4.6).
pub fn crosslink_nft(node: &Netns, rules: &CrosslinkNft<'_>) {
    node.nft(&crosslink_ruleset(rules));
}

/// The text that [`crosslink_nft`] loads.
pub fn crosslink_ruleset(rules: &CrosslinkNft<'_>) -> String {
    let mut pre = String::new();
    let mut post = String::new();
    for l3 in ["ip", "ip6"] {
        if let Some(own) = set(l3, &[rules.node_pods]) {
            writeln!(pre, r#"iifname "cl*" {l3} daddr {own} return"#).expect("write to a string");
        }
        if let Some(pods) = set(l3, &[rules.remote_pods, rules.remote_services, rules.local_pods]) {
            writeln!(pre, r#"iifname "cl*" {l3} daddr {pods} ct state invalid counter notrack"#)
                .expect("write to a string");
        }
        let source = rules.node_sources.iter().find(|ip| family(**ip) == l3);
        if let (Some(remote), Some(source)) = (set(l3, &[rules.remote_pods, rules.remote_services]), source) {
            writeln!(post, r#"iifname "cl*" ct status dnat {l3} daddr {remote} counter snat {l3} to {source}"#)
                .expect("write to a string");
        }
    }
    // To another underlay pod of this node too: it would answer the client by L2, past the node that translated.
    post.push_str(r#"iifname "cl*" ct status dnat counter masquerade"#);
    // Deleted in the same transaction, so that loading twice is the same as once; named first, since it may not exist.
    format!(
        "table inet crosslink {{}}
delete table inet crosslink
table inet crosslink {{
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
{pre}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat - 2; policy accept;
{post}
    }}
}}
"
    )
}

/// An anonymous set of the CIDRs of one family; `None` if there are none.
fn set(l3: &str, lists: &[&[&str]]) -> Option<String> {
    let mut cidrs: Vec<_> = lists.iter().flat_map(|list| list.iter().copied()).collect();
    cidrs.retain(|cidr| cidr.contains(':') == (l3 == "ip6"));
    cidrs.sort_unstable();
    cidrs.dedup();
    (!cidrs.is_empty()).then(|| format!("{{ {} }}", cidrs.join(", ")))
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "ip" } else { "ip6" }
}

//! `node.json`: what the agent, or the administrator, tells about this node.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    cidr,
    finding::{Finding, Id},
    json::Object,
    model::{Family, Link, NetnsState},
    numbers::{NODE_ADDRESS_LIMIT, TABLE_MAIN, VethNames},
    remotes::{Merged, VERSION},
    set::CidrSet,
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawNode {
    #[serde(default = "first_version")]
    version: u64,
    #[serde(default)]
    cluster_name: Option<String>,
    #[serde(default)]
    addresses: Option<Vec<String>>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    #[serde(default, rename = "serviceCIDRs")]
    service_cidrs: Option<Vec<String>>,
    #[serde(default, rename = "nodeCIDRs")]
    node_cidrs: Option<Vec<String>>,
    #[serde(default, rename = "ownPodCIDRs")]
    own_pod_cidrs: Option<Vec<String>>,
    #[serde(default)]
    masquerade: Option<Value>,
}

const fn first_version() -> u64 {
    1
}

/// What the agent puts into `writtenBy`. A file without it is somebody else's, and the agent leaves it alone.
pub const WRITER: &str = "crosslink-agent";

/// How the main CNI hides pods behind the node's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Masquerade {
    /// By rules of netfilter (iptables, nftables), which come after ours.
    Netfilter,
    /// By BPF programs, which netfilter never sees.
    Bpf,
}

/// Facts about this node; every one may be missing. Serialised, they are fields of `node.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeFacts {
    /// Name of the own cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_name: Option<String>,
    /// Node addresses; the first of each family is the primary one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Pod CIDRs of the own cluster.
    #[serde(rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<IpNet>,
    /// Service CIDRs of the own cluster.
    #[serde(rename = "serviceCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub service_cidrs: Vec<IpNet>,
    /// Subnets of the own cluster's nodes.
    #[serde(rename = "nodeCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub node_cidrs: Vec<IpNet>,
    /// This node's own share of the pod CIDRs.
    #[serde(rename = "ownPodCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub own_pod_cidrs: Vec<IpNet>,
    /// How the main CNI masquerades, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<Masquerade>,
}

impl NodeFacts {
    /// Primary address of a family.
    pub fn primary(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|addr| Family::of(*addr) == family)
    }

    /// Everything that is local on this node, so that no remote CIDR may equal it or lie inside.
    pub fn local(&self) -> impl Iterator<Item = IpNet> {
        let cidrs = [&self.pod_cidrs, &self.service_cidrs, &self.node_cidrs].into_iter().flatten().copied();
        cidrs.chain(self.addresses.iter().map(|addr| cidr::host(*addr)))
    }

    /// Remote CIDRs that no pod of this node is given a route to, since they equal a local prefix or lie inside local
    /// ones. Those that cover local ones are fine: the local one is longer and wins.
    pub fn refuses(&self, remotes: &Merged) -> Vec<Finding> {
        let local: CidrSet = self.local().collect();
        let mut findings = Vec::new();
        for (name, cluster) in &remotes.clusters {
            for (net, sources) in cluster.cidrs.iter().filter(|(net, _)| local.contains(net)) {
                let sources = sources.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let what = match local.covering(net) {
                    Some(cover) if cover == *net => "is local here".to_owned(),
                    Some(cover) => format!("lies inside {cover}, which is local here"),
                    None => "lies inside prefixes that are local here".to_owned(),
                };
                let text = format!("{net} of cluster {name} (source {sources}) {what}");
                findings.push(Finding::new(Id::CidrLocal, text));
            }
        }
        findings
    }
}

/// The text of a `node.json` of the agent's.
pub fn write(facts: &NodeFacts) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct File<'a> {
        version: u64,
        written_by: &'a str,
        #[serde(flatten)]
        facts: &'a NodeFacts,
    }
    // Names and addresses only: nothing in it can fail to be written.
    let text = serde_json::to_string_pretty(&File { version: VERSION, written_by: WRITER, facts });
    text.map(|text| text + "\n").unwrap_or_default()
}

/// Whether a text is a `node.json` that the agent wrote.
pub fn is_agents(text: &str) -> bool {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Raw {
        written_by: Option<String>,
    }
    serde_json::from_str::<Raw>(text).is_ok_and(|raw| raw.written_by.as_deref() == Some(WRITER))
}

/// Parses `node.json`. Unknown fields are ignored.
///
/// # Errors
/// A sentence that names the field, the value and the cure.
pub fn parse(text: &str) -> Result<NodeFacts, String> {
    let Object(raw): Object<RawNode> = serde_json::from_str(text).map_err(|err| err.to_string())?;
    if raw.version == 0 || raw.version > VERSION {
        return Err(format!("version {} is not known to this plugin (it reads {VERSION}): upgrade it", raw.version));
    }
    let cidrs = |field: &str, texts: Option<Vec<String>>| -> Result<Vec<IpNet>, String> {
        texts.unwrap_or_default().iter().map(|t| cidr::parse(t).map_err(|err| format!("{field}: {err}"))).collect()
    };
    let addresses = raw.addresses.unwrap_or_default();
    Ok(NodeFacts {
        cluster_name: raw.cluster_name.filter(|name| !name.is_empty()),
        addresses: addresses
            .iter()
            .map(|text| cidr::parse_addr(text).map_err(|err| format!("addresses: {err}")))
            .collect::<Result<_, _>>()?,
        pod_cidrs: cidrs("podCIDRs", raw.pod_cidrs)?,
        service_cidrs: cidrs("serviceCIDRs", raw.service_cidrs)?,
        node_cidrs: cidrs("nodeCIDRs", raw.node_cidrs)?,
        own_pod_cidrs: cidrs("ownPodCIDRs", raw.own_pod_cidrs)?,
        // A way of masquerading that this version does not know is as good as none told.
        masquerade: raw.masquerade.and_then(|value| serde_json::from_value(value).ok()),
    })
}

/// Interfaces whose addresses are not the node's: bridges and veths of runtimes and main CNIs, virtual addresses of
/// kube-proxy and of the node-local DNS cache, tunnels. A name ending in `*` is a prefix. Our own
/// veths are left out too. Loopback is not: a node that announces itself by BGP has its address there (127.0.0.1 is of
/// scope host, so never taken).
const NOT_NODE_LINKS: [&str; 8] = ["kube-ipvs0", "nodelocaldns", "docker*", "cni*", "cali*", "lxc*", "virbr*", "vx-*"];

fn is_node_link(link: &Link) -> bool {
    let listed = NOT_NODE_LINKS.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => link.name.starts_with(prefix),
        None => link.name == *pattern,
    });
    !(listed || VethNames::is_node_end(&link.name))
}

/// Node addresses by the kernel's word, for nodes without `node.json`: global addresses of links that are not
/// excluded by name (`NOT_NODE_LINKS`), those of the default route's link first. Returns them and how many there were in
/// all.
pub fn addresses_from_kernel(node: &NetnsState) -> (Vec<IpAddr>, usize) {
    let default_dev = |family: Family| {
        let defaults = node.routes.iter().filter(|seen| {
            let route = &seen.route;
            route.table == TABLE_MAIN && route.dst.prefix_len() == 0 && Family::of_net(&route.dst) == family
        });
        defaults.min_by_key(|seen| seen.metric).map(|seen| seen.route.dev.clone())
    };
    let by_default = Family::ALL.map(|family| (family, default_dev(family)));
    let mut found: Vec<(bool, IpAddr)> = Vec::new();
    for link in node.links.iter().filter(|link| is_node_link(link)) {
        for address in node.addresses.iter().filter(|a| a.dev == link.name && a.global && !a.unstable && !a.tentative) {
            let addr = address.net.addr();
            let first = by_default.contains(&(Family::of(addr), Some(link.name.clone())));
            found.push((!first, addr));
        }
    }
    // Stable: within one group the kernel's order (by link, then as configured) stays.
    found.sort_by_key(|(not_default, _)| *not_default);
    let mut addresses: Vec<IpAddr> = found.into_iter().map(|(_, addr)| addr).collect();
    let total = addresses.len();
    // The primary address of each family comes first, so that many of one family do not push out the other's.
    for family in Family::ALL.into_iter().rev() {
        if let Some(place) = addresses.iter().position(|addr| Family::of(*addr) == family) {
            let primary = addresses.remove(place);
            addresses.insert(0, primary);
        }
    }
    addresses.truncate(NODE_ADDRESS_LIMIT);
    (addresses, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Address, ObservedRoute, Route};

    #[test]
    fn every_field_is_optional() {
        assert_eq!(parse(r#"{"version":1}"#).unwrap(), NodeFacts::default());
        assert_eq!(parse(r#"{"version":1,"addresses":null,"future":1}"#).unwrap(), NodeFacts::default());
        let facts = parse(r#"{"version":1,"addresses":["10.6.0.2","fd00::2","10.6.0.3"],"podCIDRs":["10.0.0.1/16"]}"#);
        let facts = facts.unwrap();
        assert_eq!(facts.primary(Family::V4), Some("10.6.0.2".parse().unwrap()));
        assert_eq!(facts.primary(Family::V6), Some("fd00::2".parse().unwrap()));
        assert_eq!(facts.pod_cidrs[0].to_string(), "10.0.0.0/16");
    }

    #[test]
    fn what_is_written_is_read() {
        let text = r#"{"version":1,"clusterName":"a","addresses":["10.6.0.2"],"podCIDRs":["10.0.0.0/16"],
            "serviceCIDRs":["fd01::/112"],"nodeCIDRs":["10.6.0.0/16"],"ownPodCIDRs":["10.0.1.0/24"],"masquerade":"bpf"}"#;
        let facts = parse(text).unwrap();
        assert_eq!(facts.own_pod_cidrs[0].to_string(), "10.0.1.0/24");
        assert_eq!(facts.masquerade, Some(Masquerade::Bpf));
        for facts in [facts, NodeFacts::default()] {
            assert_eq!(parse(&write(&facts)).unwrap(), facts);
            assert!(is_agents(&write(&facts)));
        }
        assert!(!is_agents(text) && !is_agents("") && !is_agents(r#"{"writtenBy":"me"}"#) && !is_agents("[]"));
    }

    #[test]
    fn an_unknown_way_of_masquerading_is_none() {
        for value in [r#""XDP""#, "7", "null", "{}"] {
            let facts = parse(&format!(r#"{{"version":1,"masquerade":{value}}}"#)).unwrap();
            assert_eq!(facts.masquerade, None, "{value}");
        }
    }

    #[test]
    fn remotes_inside_local_prefixes_are_refused() {
        let text = r#"{"version":1,"addresses":["10.6.0.2"],"podCIDRs":["10.0.0.0/17","10.0.128.0/17"],
            "serviceCIDRs":["fd01::/112"],"nodeCIDRs":["10.6.0.0/16"]}"#;
        let cluster = r#"{"version":1,"source":"static","clusters":[{"name":"b","podCIDRs":
            ["10.0.0.0/8","10.0.0.0/16","10.0.7.0/24","fd01::/112","fd01::/64","10.6.0.2/32","10.7.0.0/16"]}]}"#;
        let merged = crate::remotes::merge(&[crate::remotes::parse("s.json", cluster).unwrap()], None);
        let findings = parse(text).unwrap().refuses(&merged);
        let texts: Vec<&str> = findings.iter().map(|finding| finding.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "10.0.0.0/16 of cluster b (source static) lies inside prefixes that are local here",
                "10.0.7.0/24 of cluster b (source static) lies inside 10.0.0.0/17, which is local here",
                "10.6.0.2/32 of cluster b (source static) lies inside 10.6.0.0/16, which is local here",
                "fd01::/112 of cluster b (source static) is local here",
            ]
        );
    }

    #[test]
    fn faults_name_the_field() {
        for (text, part) in [
            (r#"{"version":2}"#, "upgrade"),
            (r#"{"version":1,"addresses":["10.6.0.2/24"]}"#, "addresses"),
            (r#"{"version":1,"nodeCIDRs":["x"]}"#, "nodeCIDRs"),
        ] {
            assert!(parse(text).unwrap_err().contains(part), "{text}");
        }
    }

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.into(), up: true, ..Link::default() }
    }

    fn address(dev: &str, net: &str) -> Address {
        Address { dev: dev.into(), net: net.parse().unwrap(), global: true, tentative: false, unstable: false }
    }

    #[test]
    fn addresses_of_virtual_links_are_not_the_nodes() {
        let node = NetnsState {
            links: vec![
                link(1, "docker0"),
                link(2, "cni0"),
                link(3, "nodelocaldns"),
                link(4, "eno1"),
                link(5, "eno2"),
                link(6, "cl0123456789abc"),
                link(7, "clang0"),
            ],
            addresses: vec![
                address("docker0", "172.17.0.1/16"),
                address("cni0", "10.244.0.1/24"),
                address("nodelocaldns", "169.254.20.10/32"),
                address("eno1", "192.168.7.2/24"),
                address("eno2", "10.6.0.2/24"),
                address("cl0123456789abc", "10.9.9.9/32"),
                address("clang0", "10.8.8.8/32"),
            ],
            routes: vec![ObservedRoute {
                route: Route {
                    dst: "0.0.0.0/0".parse().unwrap(),
                    table: TABLE_MAIN,
                    dev: "eno2".into(),
                    via: None,
                    src: None,
                    mtu: None,
                },
                protocol: 3,
                metric: 0,
                unicast: true,
                multipath: false,
            }],
            ..NetnsState::default()
        };
        let (addresses, total) = addresses_from_kernel(&node);
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.6.0.2", "192.168.7.2", "10.8.8.8"]);
        assert_eq!(total, 3);
    }

    #[test]
    fn at_most_32_are_taken() {
        let addresses = (0..200).map(|i| address("eno1", &format!("10.0.{i}.1/24"))).collect();
        let node = NetnsState { links: vec![link(1, "eno1")], addresses, ..NetnsState::default() };
        let (taken, total) = addresses_from_kernel(&node);
        assert_eq!((taken.len(), total), (32, 200));
    }
}

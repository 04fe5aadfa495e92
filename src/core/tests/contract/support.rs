//! Builders: a node, a pod and what is asked for, read from the texts that people and runtimes write.

use std::{collections::BTreeSet, net::IpAddr};

use crosslink_core::{
    destinations::{self, Destination, Destinations, Inputs, Refusal},
    error::Error,
    facts::{Attached, NextHop, PodAddress, PodFacts},
    finding::{Finding, Id},
    model::{Address, Change, Family, Link, NetnsState, Observed, ObservedRoute, Route, Sysctl},
    netconf::{self, NetConf, RawConf, Strictness},
    node::{self, NodeFacts},
    numbers::TABLE_MAIN,
    plan::{Recorded, teardown},
    remotes::{self, Merged, RemotesFile},
    request::{self, ANNOTATIONS_CAPABILITY, PodRequest},
    wanted::{self, Identity, Wanted},
};
use ipnet::IpNet;
use serde_json::{Value, json};

/// How the interface is attached, both ways.
pub const BOTH: [Attached; 2] = [Attached::Overlay, Attached::Underlay];

/// Whose attachment the tests make.
pub const IDENTITY: Identity<'static> = Identity { container_id: "c0ffee", ifname: "eth0" };

/// Parses a prefix, or a bare address as its host route.
pub fn net(text: &str) -> IpNet {
    crosslink_core::cidr::parse(text).unwrap()
}

/// Parses prefixes.
pub fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

/// Parses an address.
pub fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Everything that decides about one pod, as text and facts.
#[derive(Clone, Debug)]
pub struct World {
    /// Standard input of the plugin.
    pub stdin: Value,
    /// Remotes files, parsed.
    pub files: Vec<RemotesFile>,
    /// The node.
    pub node: NodeFacts,
    /// The pod.
    pub pod: PodFacts,
}

/// A world after its texts have been read.
#[derive(Clone, Debug)]
pub struct Ready {
    pub conf: NetConf,
    pub request: PodRequest,
    pub remotes: Merged,
    pub node: NodeFacts,
    pub pod: PodFacts,
}

impl World {
    /// A dual-stack pod 192.168.7.5 and fd07::5 on a node 10.6.0.2 and fd06::2 of a cluster with pods in 10.244.0.0/16
    /// and fd24::/48, services in 10.96.0.0/12 and fd96::/112, nodes in 10.6.0.0/24 and fd06::/64.
    pub fn new(attached: Attached) -> Self {
        let hop = |via: &str| NextHop { via: Some(addr(via)), src: None };
        let node = json!({
            "version": 1, "clusterName": "own", "addresses": ["10.6.0.2", "fd06::2"],
            "podCIDRs": ["10.244.0.0/16", "fd24::/48"], "serviceCIDRs": ["10.96.0.0/12", "fd96::/112"],
            "nodeCIDRs": ["10.6.0.0/24", "fd06::/64"],
        });
        let pod = PodFacts {
            ifname: "eth0".to_owned(),
            mtu: 1450,
            attached,
            addresses: addresses(&["192.168.7.5", "fd07::5"]),
            connected: nets(&["192.168.7.0/24", "fd07::/64"]),
            foreign: nets(&["192.168.7.0/24", "fd07::/64"]),
            next_hops: vec![(Family::V4, hop("192.168.7.1")), (Family::V6, hop("fe80::1"))],
        };
        Self { stdin: json!({"name": "n"}), files: Vec::new(), node: node::parse(&node.to_string()).unwrap(), pod }
    }

    /// The same pod without IPv6.
    pub fn v4_only(attached: Attached) -> Self {
        let mut world = Self::new(attached);
        world.pod.addresses = addresses(&["192.168.7.5"]);
        world.pod.next_hops.truncate(1);
        world
    }

    /// Sets a key of the conflist entry.
    pub fn key(mut self, key: &str, value: Value) -> Self {
        self.stdin[key] = value;
        self
    }

    /// Sets an annotation of the pod.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.stdin["runtimeConfig"][ANNOTATIONS_CAPABILITY][format!("crosslink.dev/{key}")] = value.into();
        self
    }

    /// Sets a key of `args.cni`.
    pub fn arg(mut self, key: &str, value: Value) -> Self {
        self.stdin["args"]["cni"][key] = value;
        self
    }

    /// Adds a remotes file of one cluster.
    pub fn remote(self, name: &str, cidrs: &[&str], mtu: Option<u32>) -> Self {
        self.remote_of("static", name, cidrs, mtu)
    }

    /// Adds a remotes file of one cluster, written by `source`.
    pub fn remote_of(mut self, source: &str, name: &str, cidrs: &[&str], mtu: Option<u32>) -> Self {
        let cluster = json!({"name": name, "podCIDRs": cidrs, "mtu": mtu});
        let text = json!({"version": 1, "source": source, "clusters": [cluster]}).to_string();
        self.files.push(remotes::parse(&format!("{source}-{}.json", self.files.len()), &text).unwrap());
        self
    }

    /// Reads everything as ADD does.
    pub fn read(&self) -> Result<Ready, Error> {
        let text = self.stdin.to_string();
        let raw = RawConf::parse(&text)?;
        let (conf, _) = netconf::parse(&raw, Strictness::Near)?;
        let (request, _) = request::parse(&raw, Strictness::Near)?;
        let remotes = remotes::merge(&self.files, self.node.cluster_name.as_deref());
        Ok(Ready { conf, request, remotes, node: self.node.clone(), pod: self.pod.clone() })
    }

    /// The destinations, with the findings of the merge too, as they reach the record.
    pub fn destinations(&self) -> Result<Destinations, Error> {
        let ready = self.read()?;
        let mut destinations = destinations::destinations(ready.inputs())?;
        destinations.findings.splice(0..0, ready.remotes.findings);
        Ok(destinations)
    }

    /// The destinations' prefixes as text.
    pub fn routed(&self) -> Vec<String> {
        texts(&self.destinations().unwrap())
    }

    /// The kernel state that follows.
    pub fn wanted(&self) -> Result<(Wanted, Vec<Finding>), Error> {
        let ready = self.read()?;
        let destinations = destinations::destinations(ready.inputs())?;
        wanted::wanted(IDENTITY, ready.inputs(), &destinations)
    }
}

impl Ready {
    /// What the functions take.
    pub const fn inputs(&self) -> Inputs<'_> {
        Inputs {
            conf: &self.conf,
            request: &self.request,
            remotes: &self.remotes,
            node: &self.node,
            pod: &self.pod,
            refusal: Refusal::Error,
        }
    }
}

/// Usable addresses.
pub fn addresses(texts: &[&str]) -> Vec<PodAddress> {
    texts.iter().map(|text| PodAddress { addr: addr(text), usable: true }).collect()
}

/// The prefixes as text, in order.
pub fn texts(destinations: &Destinations) -> Vec<String> {
    destinations.list.iter().map(|destination| destination.net.to_string()).collect()
}

/// The destination of exactly that prefix.
pub fn find(destinations: &Destinations, of: IpNet) -> Option<&Destination> {
    destinations.list.iter().find(|destination| destination.net == of)
}

/// Whether a finding of that kind names `text`.
pub fn noted(findings: &[Finding], id: Id, text: &str) -> bool {
    findings.iter().any(|finding| finding.id == id && finding.text.contains(text))
}

/// A route of another owner.
pub fn foreign(text: &str, via: Option<&str>, dev: &str, (protocol, metric): (u8, u32)) -> ObservedRoute {
    let route =
        Route { dst: net(text), table: TABLE_MAIN, dev: dev.to_owned(), via: via.map(addr), src: None, mtu: None };
    ObservedRoute { route, protocol, metric, unicast: true, multipath: false }
}

fn link(index: u32, name: &str, kind: Option<&str>) -> Link {
    let kind = kind.map(str::to_owned);
    Link { index, name: name.to_owned(), kind, mac: vec![2, 0, 0, 0, 0, 9], mtu: 1450, up: true, ..Link::default() }
}

fn address(dev: &str, text: &str, global: bool) -> Address {
    Address { dev: dev.to_owned(), net: text.parse().unwrap(), global, tentative: false, unstable: false }
}

/// Kernel state that fits [`World::new`], before the ADD, with a second interface `net1` in the pod.
pub fn untouched() -> Observed {
    let sysctl = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let pod = NetnsState {
        links: vec![link(2, "eth0", Some("macvlan")), link(3, "net1", Some("macvlan"))],
        addresses: vec![
            address("eth0", "192.168.7.5/24", true),
            address("eth0", "fd07::5/64", true),
            address("eth0", "fe80::5/64", false),
            address("net1", "10.9.0.5/24", true),
        ],
        routes: vec![
            foreign("0.0.0.0/0", Some("192.168.7.1"), "eth0", (3, 0)),
            foreign("192.168.7.0/24", None, "eth0", (2, 0)),
            foreign("10.9.0.0/24", None, "net1", (2, 0)),
            foreign("::/0", Some("fe80::1"), "eth0", (9, 1024)),
            foreign("fd07::/64", None, "eth0", (2, 256)),
            foreign("fe80::/64", None, "eth0", (2, 256)),
        ],
        sysctls: [sysctl("ipv4/conf/eth0/rp_filter", "0"), sysctl("ipv4/conf/all/rp_filter", "1")].into(),
        ..NetnsState::default()
    };
    let node = NetnsState {
        links: vec![link(2, "eno1", None), link(30, "veth0", Some("veth"))],
        addresses: vec![address("eno1", "10.6.0.2/24", true), address("eno1", "fd06::2/64", true)],
        routes: vec![foreign("10.6.0.0/24", None, "eno1", (2, 0))],
        ..NetnsState::default()
    };
    Observed { pod, node }
}

/// What DEL of an attachment alone in its sandbox does.
pub fn torn_down(applied: &Wanted, saved: &[Sysctl], observed: &Observed) -> Vec<Change> {
    teardown(Recorded { ifname: IDENTITY.ifname, applied, saved }, observed, &BTreeSet::new())
}

//! Nodes, pods, the wires between them, and the seed's scenario: two clusters with underlay pods.

use std::net::IpAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::call::cni_path;
use crate::netns::Netns;
use crate::runner::Runner;

/// A node: a namespace that forwards.
#[derive(Debug)]
pub struct Node(Netns);

impl Node {
    /// A node with lo up, both families forwarded, and `net.ipv4.conf.{all,default}.rp_filter` as given.
    pub fn new(prefix: &str, rp_filter: u8) -> Self {
        let netns = prepared(prefix, rp_filter);
        netns.sysctl("net.ipv4.ip_forward", "1");
        netns.sysctl("net.ipv6.conf.all.forwarding", "1");
        Self(netns)
    }

    /// Adds routes, each the words after `ip route add`; the family is told from the text.
    pub fn routes(&self, routes: &[&str]) {
        for route in routes {
            let family = if route.contains(':') { "-6" } else { "-4" };
            self.ip(&format!("{family} route add {route}"));
        }
    }

    /// Sets the address list of an interface and brings it up. IPv6 addresses are usable at once.
    fn configure(&self, ifname: &str, addrs: &[&str]) {
        for addr in addrs {
            let nodad = if addr.contains(':') { "nodad" } else { "" };
            self.ip(&format!("addr add {addr} dev {ifname} {nodad}"));
        }
        self.ip(&format!("link set {ifname} up"));
    }
}

impl Deref for Node {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.0
    }
}

/// A pod's namespace, as a runtime hands it to the first plugin.
#[derive(Debug)]
pub struct Pod(Netns);

impl Pod {
    /// A pod with lo up and `net.ipv4.conf.{all,default}.rp_filter` as given.
    pub fn new(prefix: &str, rp_filter: u8) -> Self {
        Self(prepared(prefix, rp_filter))
    }
}

impl Deref for Pod {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.0
    }
}

fn prepared(prefix: &str, rp_filter: u8) -> Netns {
    let netns = Netns::create(prefix);
    netns.ip("link set lo up");
    netns.sysctl("net.ipv4.conf.all.rp_filter", &rp_filter.to_string());
    netns.sysctl("net.ipv4.conf.default.rp_filter", &rp_filter.to_string());
    netns
}

/// An Ethernet switch: a namespace with one bridge.
#[derive(Debug)]
pub struct Switch {
    netns: Netns,
    ports: AtomicU32,
}

impl Switch {
    /// A switch without ports.
    pub fn new(prefix: &str) -> Self {
        let netns = Netns::create(prefix);
        // Without a querier in the network, snooping would in time stop forwarding neighbour discovery.
        netns.ip("link add br0 type bridge stp_state 0 mcast_snooping 0");
        netns.ip("link set br0 up");
        Self { netns, ports: AtomicU32::new(0) }
    }

    /// Plugs `node` in: it gets an interface `ifname` with `addrs` (`ADDRESS/LENGTH`).
    pub fn attach(&self, node: &Node, ifname: &str, addrs: &[&str]) {
        let port = format!("p{}", self.ports.fetch_add(1, Ordering::Relaxed));
        self.netns.ip(&format!("link add {port} type veth peer name {ifname} netns {}", node.name()));
        self.netns.ip(&format!("link set {port} master br0 up"));
        node.configure(ifname, addrs);
    }

    /// The switch's own namespace, to capture in or to cut a port.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

/// One end of a [`link`].
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The node.
    pub node: &'a Node,
    /// The name of its interface.
    pub ifname: &'a str,
    /// The addresses on it, as `ADDRESS/LENGTH`.
    pub addrs: &'a [&'a str],
}

/// A routed point-to-point link.
pub fn link(a: End<'_>, b: End<'_>) {
    a.node.ip(&format!("link add {} type veth peer name {} netns {}", a.ifname, b.ifname, b.node.name()));
    a.node.configure(a.ifname, a.addrs);
    b.node.configure(b.ifname, b.addrs);
}

/// The address families of a scenario.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    #[default]
    Dual,
}

impl Families {
    fn has(self, text: &str) -> bool {
        match self {
            Self::V4 => !text.contains(':'),
            Self::V6 => text.contains(':'),
            Self::Dual => true,
        }
    }

    fn of<'a>(self, texts: &[&'a str]) -> Vec<&'a str> {
        texts.iter().copied().filter(|text| self.has(text)).collect()
    }
}

/// The choices of [`two_clusters`].
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// rp_filter of a1 and b1.
    pub node_rp_filter: u8,
    /// rp_filter of the gateway a2. Strict cannot work there: an underlay pod's packets come from a1 over the
    /// management subnet, the way back is the underlay.
    pub gateway_rp_filter: u8,
    /// rp_filter of pods made by [`TwoClusters::pod`].
    pub pod_rp_filter: u8,
    /// What nodes and pods have addresses of.
    pub families: Families,
}

impl Default for Options {
    /// Loose everywhere, dual stack.
    fn default() -> Self {
        Self { node_rp_filter: 2, gateway_rp_filter: 2, pod_rp_filter: 2, families: Families::Dual }
    }
}

/// cluster-a's CIDRs as cluster-b is told them: pods, services.
pub const CIDRS_A: [&str; 4] = ["172.110.0.0/16", "fd10::/64", "10.233.0.0/18", "fd33::/112"];

/// cluster-b's CIDRs as cluster-a is told them: pods, services.
pub const CIDRS_B: [&str; 4] = ["172.111.0.0/16", "fd11::/64", "10.243.0.0/18", "fd43::/112"];

/// The seed's scenario, from the pod's node to the other cluster:
///
/// ```text
///  cluster-a                                             cluster-b
///  a1 --ens192--[mgmt 10.7.0.0/24, fd07::/64]--ens192-- a2 --ens160-- b1 --cni0 172.111.0.0/16, fd11::/64
///  a1 --ens224--[underlay 172.110.0.0/16, fd10::/64]--ens224-- a2
/// ```
///
/// a2 is cluster-a's gateway; its link to b1 (10.6.168.0/24, fd06::/64) stands for Submariner's tunnel. Without
/// crosslink a macvlan pod on a1 reaches only what is in the underlay.
#[derive(Debug)]
pub struct TwoClusters {
    /// cluster-a's node with the pods: .11 and ::11 in both subnets.
    pub a1: Node,
    /// cluster-a's gateway: .12 and ::12 in both subnets, 10.6.168.73 and fd06::73 on the link.
    pub a2: Node,
    /// cluster-b's only node: 10.6.168.74 and fd06::74 on the link.
    pub b1: Node,
    /// The management subnet.
    pub mgmt: Switch,
    /// The underlay.
    pub underlay: Switch,
    /// What it was made with.
    pub options: Options,
    state: TempDir,
}

/// Builds [`TwoClusters`], with names of its own.
///
/// # Panics
/// When the kernel refuses something.
pub fn two_clusters(options: Options) -> TwoClusters {
    let families = options.families;
    let a1 = Node::new("a1", options.node_rp_filter);
    let a2 = Node::new("a2", options.gateway_rp_filter);
    let b1 = Node::new("b1", options.node_rp_filter);
    let (mgmt, underlay) = (Switch::new("mgmt"), Switch::new("underlay"));
    mgmt.attach(&a1, "ens192", &families.of(&["10.7.0.11/24", "fd07::11/64"]));
    mgmt.attach(&a2, "ens192", &families.of(&["10.7.0.12/24", "fd07::12/64"]));
    underlay.attach(&a1, "ens224", &families.of(&["172.110.0.11/16", "fd10::11/64"]));
    underlay.attach(&a2, "ens224", &families.of(&["172.110.0.12/16", "fd10::12/64"]));
    link(
        End { node: &a2, ifname: "ens160", addrs: &families.of(&["10.6.168.73/24", "fd06::73/64"]) },
        End { node: &b1, ifname: "ens160", addrs: &families.of(&["10.6.168.74/24", "fd06::74/64"]) },
    );
    via(&a1, &CIDRS_B, families, ("10.7.0.12", "fd07::12"));
    via(&a2, &CIDRS_B, families, ("10.6.168.74", "fd06::74"));
    via(&b1, &CIDRS_A, families, ("10.6.168.73", "fd06::73"));
    via(&b1, &["10.7.0.0/24", "fd07::/64"], families, ("10.6.168.73", "fd06::73"));
    // What a1 itself sends to cluster-b over the link carries its management address; the way there is the gateway's.
    via(&a1, &["10.6.168.0/24", "fd06::/64"], families, ("10.7.0.12", "fd07::12"));
    let state = tempfile::tempdir().expect("make a temporary directory");
    TwoClusters { a1, a2, b1, mgmt, underlay, options, state }
}

fn via(node: &Node, cidrs: &[&str], families: Families, (v4, v6): (&str, &str)) {
    for cidr in families.of(cidrs) {
        let gateway = if cidr.contains(':') { v6 } else { v4 };
        node.routes(&[&format!("{cidr} via {gateway}")]);
    }
}

impl TwoClusters {
    /// A pod's namespace with the scenario's rp_filter.
    pub fn pod(&self, prefix: &str) -> Pod {
        Pod::new(prefix, self.options.pod_rp_filter)
    }

    /// A directory that is removed with the scenario.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// A runner of `conflist` on `node`, with a cache of its own and the machine's plugins.
    pub fn runner(&self, node: &Node, conflist: Value) -> Runner {
        self.runner_with(node, conflist, Vec::new())
    }

    /// [`TwoClusters::runner`] that also finds plugins in `dirs`, and there first.
    pub fn runner_with(&self, node: &Node, conflist: Value, mut dirs: Vec<PathBuf>) -> Runner {
        dirs.extend(cni_path());
        Runner::new(conflist, dirs, self.state().join("cache").join(node.name())).on(node)
    }

    /// The `macvlan` entry for cluster-a's pods: addresses 172.110.N.x and fd10::N:x with a default route to the
    /// underlay's gateway (which does not exist). `subnet` is N; nodes with different ones do not collide.
    pub fn macvlan(&self, subnet: u8) -> Value {
        let v4 = json!([{
            "subnet": "172.110.0.0/16", "gateway": "172.110.0.1",
            "rangeStart": format!("172.110.{subnet}.1"), "rangeEnd": format!("172.110.{subnet}.200"),
        }]);
        let v6 = json!([{
            "subnet": "fd10::/64", "gateway": "fd10::1",
            "rangeStart": format!("fd10::{subnet}:1"), "rangeEnd": format!("fd10::{subnet}:200"),
        }]);
        let ipam = self.host_local(&format!("macvlan-{subnet}"), v4, v6);
        json!({ "type": "macvlan", "master": "ens224", "mode": "bridge", "ipam": ipam })
    }

    /// The `bridge` entry for cluster-b's pods: cni0 is their gateway, without masquerading.
    pub fn bridge(&self) -> Value {
        let ipam =
            self.host_local("bridge", json!([{ "subnet": "172.111.0.0/16" }]), json!([{ "subnet": "fd11::/64" }]));
        json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "ipam": ipam })
    }

    fn host_local(&self, dir: &str, v4: Value, v6: Value) -> Value {
        let families = self.options.families;
        let pick = |v4: Value, v6: Value| -> Vec<Value> {
            let both = [("0.0.0.0", v4), ("::", v6)];
            both.into_iter().filter(|(family, _)| families.has(family)).map(|(_, value)| value).collect()
        };
        json!({
            "type": "host-local",
            "dataDir": self.state().join(dir),
            "ranges": pick(v4, v6),
            "routes": pick(json!({ "dst": "0.0.0.0/0" }), json!({ "dst": "::/0" })),
        })
    }
}

/// A conflist of `plugins`.
pub fn conflist(name: &str, version: &str, plugins: Vec<Value>) -> Value {
    json!({ "cniVersion": version, "name": name, "plugins": plugins })
}

/// The address among `addresses` that is of the family asked for.
///
/// # Panics
/// When there is none.
pub fn pick(addresses: &[IpAddr], v6: bool) -> IpAddr {
    let found = addresses.iter().find(|ip| ip.is_ipv6() == v6);
    *found.unwrap_or_else(|| panic!("no address of the family in {addresses:?}"))
}

//! Two overlay clusters whose main CNIs masquerade, and a running agent on each node.
//!
//! ```text
//!  pods 10.244.1.0/24, fd44:0:0:1::/64        10.245.1.0/24, fd45:0:0:1::/64
//!      a, c -- worker ---- gateway ---- remote -- r
//!                 |     cluster-a    |  cluster-b
//!              internet
//! ```
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{net::SocketAddr, process::Command, time::Duration};

use crosslink_testkit::{
    Netns, Node, in_netns,
    probe::wait_until,
    topology::{End, link},
};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    agent::{Agent, agent_bin},
    support::Site,
};

/// Pods and services of a cluster.
pub struct Cidrs {
    pub pods: [&'static str; 2],
    pub services: [&'static str; 2],
}

/// cluster-a.
pub const A: Cidrs = Cidrs { pods: ["10.244.0.0/16", "fd44::/48"], services: ["10.96.0.0/16", "fd96::/112"] };
/// cluster-b.
pub const B: Cidrs = Cidrs { pods: ["10.245.0.0/16", "fd45::/48"], services: ["10.97.0.0/16", "fd97::/112"] };

/// How a main CNI masquerades.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cni {
    /// kindnet since 2024: everything that is not for pods of the own cluster, at srcnat - 5.
    Kindnet5,
    /// The same, later: at srcnat - 10.
    Kindnet10,
    /// kindnet before: iptables.
    KindnetIptables,
    /// flannel with iptables.
    FlannelIptables,
    /// flannel with nftables.
    FlannelNft,
}

/// All of them.
pub const CNIS: [Cni; 5] = [Cni::Kindnet5, Cni::Kindnet10, Cni::KindnetIptables, Cni::FlannelIptables, Cni::FlannelNft];

impl Cni {
    /// The rules, for a node of a cluster with these pods; `own` is the node's share.
    pub fn rules(self, pods: [&str; 2], own: [&str; 2]) -> String {
        let both = |rules: fn(&str, &str, &str, &str) -> String| {
            rules("ip", pods[0], own[0], "224.0.0.0/4") + &rules("ip6", pods[1], own[1], "ff00::/8")
        };
        match self {
            Self::Kindnet5 => kindnet(5, pods),
            Self::Kindnet10 => kindnet(10, pods),
            Self::KindnetIptables => both(kindnet_iptables),
            Self::FlannelIptables => both(flannel_iptables),
            Self::FlannelNft => both(flannel_nft),
        }
    }
}

fn kindnet(before: u8, pods: [&str; 2]) -> String {
    format!(
        "table inet kindnet-ipmasq {{
            set noMasqV4 {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {} }}; }}
            set noMasqV6 {{ type ipv6_addr; flags interval; auto-merge; elements = {{ {} }}; }}
            chain postrouting {{
                type nat hook postrouting priority srcnat - {before}; policy accept;
                ct state established,related accept
                fib daddr type local accept
                ip daddr @noMasqV4 accept
                ip6 daddr @noMasqV6 accept
                masquerade
            }}
        }}",
        pods[0], pods[1]
    )
}

/// As iptables-nft puts it: the chain of iptables' table nat is at srcnat.
fn kindnet_iptables(l3: &str, pods: &str, _own: &str, _multicast: &str) -> String {
    format!(
        "table {l3} nat {{
            chain KIND-MASQ-AGENT {{ {l3} daddr {pods} return; masquerade; }}
            chain POSTROUTING {{
                type nat hook postrouting priority srcnat; policy accept;
                fib daddr type != local jump KIND-MASQ-AGENT
            }}
        }}\n"
    )
}

fn flannel_iptables(l3: &str, pods: &str, own: &str, multicast: &str) -> String {
    format!(
        "table {l3} nat {{
            chain FLANNEL-POSTRTG {{
                meta mark & 0x4000 == 0x4000 return
                {l3} saddr {own} {l3} daddr {pods} return
                {l3} saddr {pods} {l3} daddr {own} return
                {l3} saddr != {pods} {l3} daddr {own} return
                {l3} saddr {pods} {l3} daddr != {multicast} masquerade fully-random
                {l3} saddr != {pods} {l3} daddr {pods} masquerade fully-random
            }}
            chain POSTROUTING {{
                type nat hook postrouting priority srcnat; policy accept;
                jump FLANNEL-POSTRTG
            }}
        }}\n"
    )
}

fn flannel_nft(l3: &str, pods: &str, own: &str, multicast: &str) -> String {
    let name = if l3 == "ip" { "flannel-ipv4" } else { "flannel-ipv6" };
    format!(
        "table {l3} {name} {{
            chain postrtg {{
                type nat hook postrouting priority srcnat; policy accept;
                meta mark 0x4000 return
                {l3} saddr {own} {l3} daddr {pods} return
                {l3} saddr {pods} {l3} daddr {own} return
                {l3} saddr != {own} {l3} daddr {pods} return
                {l3} saddr {pods} {l3} daddr != {multicast} masquerade fully-random
                {l3} saddr != {pods} {l3} daddr {pods} masquerade fully-random
            }}
        }}\n"
    )
}

/// The clusters.
pub struct Mesh {
    pub worker: Node,
    pub gateway: Node,
    pub remote: Node,
    /// A host that belongs to no cluster, beyond the worker.
    pub internet: Node,
    /// Pods of cluster-a on the worker: 10.244.1.5 and .6.
    pub a: Netns,
    pub c: Netns,
    /// The pod of cluster-b: 10.245.1.5.
    pub r: Netns,
    dir: TempDir,
}

/// Addresses of the pods, IPv4 and IPv6.
pub const POD_A: [&str; 2] = ["10.244.1.5", "fd44:0:0:1::5"];
pub const POD_C: [&str; 2] = ["10.244.1.6", "fd44:0:0:1::6"];
pub const POD_R: [&str; 2] = ["10.245.1.5", "fd45:0:0:1::5"];
/// Addresses of the host that belongs to no cluster.
pub const INTERNET: [&str; 2] = ["198.51.100.1", "2001:db8::1"];
/// The worker's addresses towards it.
pub const WORKER_OUT: [&str; 2] = ["198.51.100.2", "2001:db8::2"];

/// An address with a port.
pub fn socket(addr: &str, port: u16) -> SocketAddr {
    SocketAddr::new(addr.parse().unwrap(), port)
}

/// A pod as a routed veth, which is how kindnet's `ptp` makes it.
fn pod(node: &Node, name: &str, addrs: [&str; 2], gateways: [&str; 2]) -> Netns {
    let pod = Netns::create(name);
    let dev = format!("v{}", pod.name());
    pod.ip("link set lo up");
    node.ip(&format!("link add {dev} type veth peer name eth0 netns {}", pod.name()));
    for (family, length, place) in [("-4", 32, 0), ("-6", 128, 1)] {
        let nodad = if place == 1 { "nodad" } else { "" };
        node.ip(&format!("{family} addr add {}/{length} dev {dev} {nodad}", gateways[place]));
        pod.ip(&format!("{family} addr add {}/{length} dev eth0 {nodad}", addrs[place]));
    }
    node.ip(&format!("link set {dev} up"));
    pod.ip("link set eth0 up");
    for (family, place) in [("-4", 0), ("-6", 1)] {
        node.ip(&format!("{family} route add {} dev {dev}", addrs[place]));
        pod.ip(&format!("{family} route add {} dev eth0", gateways[place]));
        pod.ip(&format!("{family} route add default via {} dev eth0", gateways[place]));
    }
    pod
}

impl Mesh {
    /// The clusters, without agents and without a main CNI's rules.
    pub fn new() -> Self {
        let [worker, gateway, remote, internet] =
            ["worker", "gateway", "remote", "inet"].map(|name| Node::new(name, 2));
        link(
            End { node: &worker, ifname: "mgmt", addrs: &["10.7.0.11/24", "fd07::11/64"] },
            End { node: &gateway, ifname: "mgmt", addrs: &["10.7.0.12/24", "fd07::12/64"] },
        );
        link(
            End { node: &gateway, ifname: "wan", addrs: &["10.6.0.1/24", "fd06::1/64"] },
            End { node: &remote, ifname: "wan", addrs: &["10.6.0.2/24", "fd06::2/64"] },
        );
        link(
            End { node: &worker, ifname: "out", addrs: &["198.51.100.2/24", "2001:db8::2/64"] },
            End { node: &internet, ifname: "out", addrs: &["198.51.100.1/24", "2001:db8::1/64"] },
        );
        let via = |node: &Node, cidrs: &[&str], gateways: [&str; 2]| {
            let routes = cidrs.iter().map(|net| format!("{net} via {}", gateways[usize::from(net.contains(':'))]));
            routes.for_each(|route| node.routes(&[&route]));
        };
        let all = |cidrs: &Cidrs| [cidrs.pods, cidrs.services].concat();
        via(&worker, &all(&B), ["10.7.0.12", "fd07::12"]);
        via(&gateway, &all(&B), ["10.6.0.2", "fd06::2"]);
        via(&gateway, &all(&A), ["10.7.0.11", "fd07::11"]);
        via(&remote, &[&all(&A)[..], &["10.7.0.0/24", "fd07::/64"]].concat(), ["10.6.0.1", "fd06::1"]);
        via(&worker, &["10.6.0.0/24", "fd06::/64"], ["10.7.0.12", "fd07::12"]);
        // So that the node has a route that covers virtual addresses, as a cluster's nodes do.
        via(&worker, &A.services, INTERNET);
        via(&remote, &B.services, ["10.6.0.1", "fd06::1"]);
        let gateways = ["10.244.1.1", "fd44:0:0:1::1"];
        let a = pod(&worker, "a", POD_A, gateways);
        let c = pod(&worker, "c", POD_C, gateways);
        let r = pod(&remote, "r", POD_R, ["10.245.1.1", "fd45:0:0:1::1"]);
        let mesh = Self { worker, gateway, remote, internet, a, c, r, dir: tempfile::tempdir().unwrap() };
        for netns in [&*mesh.worker, &mesh.gateway, &mesh.remote, &mesh.internet, &mesh.a, &mesh.c, &mesh.r] {
            wait_until("no address is tentative", Duration::from_secs(30), || {
                netns.ip("-6 addr show tentative").trim().is_empty()
            });
        }
        mesh
    }

    /// Loads the rules of a main CNI on every node.
    pub fn masquerade(&self, cni: Cni) {
        self.worker.nft(&cni.rules(A.pods, ["10.244.1.0/24", "fd44:0:0:1::/64"]));
        self.gateway.nft(&cni.rules(A.pods, ["10.244.2.0/24", "fd44:0:0:2::/64"]));
        self.remote.nft(&cni.rules(B.pods, ["10.245.1.0/24", "fd45:0:0:1::/64"]));
    }

    /// The files of a node.
    pub fn site(&self, node: &Node) -> Site {
        let site = Site::new(self.dir.path().join(node.name()));
        let (own, other, name, share) = if node.name() == self.remote.name() {
            (&B, &A, "cluster-a", ["10.245.1.0/24", "fd45:0:0:1::/64"])
        } else if node.name() == self.worker.name() {
            (&A, &B, "cluster-b", ["10.244.1.0/24", "fd44:0:0:1::/64"])
        } else {
            (&A, &B, "cluster-b", ["10.244.2.0/24", "fd44:0:0:2::/64"])
        };
        site.cluster(name, &other.pods, &other.services);
        site.node(json!({ "podCIDRs": own.pods, "serviceCIDRs": own.services, "ownPodCIDRs": share }));
        site
    }

    /// An agent on a node, once its table is there.
    pub fn agent(&self, node: &Node) -> Agent {
        keep(node, &self.site(node), &[])
    }

    /// An agent on every node of both clusters.
    pub fn agents(&self) -> Vec<Agent> {
        [&self.worker, &self.gateway, &self.remote].map(|node| self.agent(node)).into()
    }
}

/// An agent that keeps a node's traffic alive, once its table is there.
pub fn keep(node: &Netns, site: &Site, more: &[&str]) -> Agent {
    let args = [&["--resync=off", "--notrack=on", "--preserve-source=auto"], more].concat();
    let agent = Agent::start(node.path(), site, &args);
    wait_until("the agent's table is there", Duration::from_secs(20), || has_table(node));
    agent
}

/// Whether our table is there.
pub fn has_table(node: &Netns) -> bool {
    node.try_exec(&["nft", "list", "table", "inet", "crosslink"]).status.success()
}

/// Our table as nft shows it, with handles, which tell whether it was written anew; without counters.
pub fn table(node: &Netns) -> String {
    String::from_utf8(node.exec(&["nft", "-s", "-a", "list", "table", "inet", "crosslink"]).stdout).unwrap()
}

/// Runs `uninstall` of a node's agent; what it logged.
pub fn uninstall(node: &Netns, site: &Site) -> String {
    let output = in_netns(node.path(), || {
        Command::new(agent_bin())
            .args(["uninstall", "--kubeconfig=none", "--cni-mode=none"])
            .arg(format!("--lib-dir={}", site.dir.display()))
            .arg(format!("--run-dir={}", site.dir.join("run").display()))
            .output()
            .unwrap()
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text
}

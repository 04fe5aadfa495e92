//! What the traffic tests share: clusters whose nodes drop what is invalid, pods made by real chains or by hand, and
//! the proofs that traffic passes.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    thread,
    time::Duration,
};

use crosslink_testkit::{
    Attachment, Call, Netns, Node, Options, Pod, Reply, Runner, TwoClusters, addresses, conflist,
    nft::{CrosslinkNft, crosslink_nft, kube_proxy_drop},
    probe::{ping, tcp, wait_until},
    require,
    servers::serve_tcp,
    topology::pick,
    two_clusters,
};
use serde_json::{Value, json};

use crate::support::{Site, bin, bin_dirs};

/// `net.ipv4.conf.all.rp_filter`: off, strict, loose.
pub const RP_FILTERS: [u8; 3] = [0, 1, 2];
/// IPv4 and IPv6, as "is it IPv6".
pub const BOTH: &[bool] = &[false, true];
/// Addresses of a1, the primary ones first.
pub const A1: [&str; 4] = ["10.7.0.11", "fd07::11", "172.110.0.11", "fd10::11"];
/// a1's primary addresses, IPv4 and IPv6.
pub const PRIMARY: [&str; 2] = ["10.7.0.11", "fd07::11"];
/// Addresses of a2.
pub const A2: [&str; 4] = ["10.7.0.12", "fd07::12", "172.110.0.12", "fd10::12"];

/// What crosslink's agent would keep on cluster-a's nodes.
pub const RULES: CrosslinkNft<'_> = CrosslinkNft {
    node_pods: &[],
    node_sources: &[],
    local_pods: &["172.110.0.0/16", "fd10::/64"],
    remote_pods: &["172.111.0.0/16", "fd11::/64"],
    remote_services: &["10.243.0.0/18", "fd43::/112"],
};

/// A node that tells nobody about too long packets.
pub const MUTE: &str = "table inet mute {
    chain output {
        type filter hook output priority 0;
        icmp type destination-unreachable drop
        icmpv6 type packet-too-big drop
    }
}";

/// Whether the machine has all that underlay pods take.
pub fn underlay_ready() -> bool {
    ["macvlan", "bridge", "nft", "plugin:macvlan", "plugin:bridge", "plugin:host-local"].iter().all(|f| require(f))
}

/// Lets IPv6 addresses of interfaces yet to come be used at once.
pub fn no_dad(netns: &Netns) {
    netns.sysctl("net.ipv6.conf.all.accept_dad", "0");
    netns.sysctl("net.ipv6.conf.default.accept_dad", "0");
}

/// Runs all cases at once, since most of a scenario's time is spent waiting for the kernel to bring links up. A case that
/// fails is named in the panic's message as its thread.
pub fn each<C: Debug + Send>(cases: impl IntoIterator<Item = C>, run: impl Fn(C) + Sync) {
    let run = &run;
    thread::scope(|scope| {
        for case in cases {
            let named = thread::Builder::new().name(format!("{case:?}"));
            named.spawn_scoped(scope, move || run(case)).unwrap();
        }
    });
}

/// Waits until every IPv6 address can be used. Even without duplicate address detection it is tentative until the link
/// has carrier, which a new bridge gets late, and on a busy machine everything does.
pub fn settle(netns: &Netns) {
    wait_until("no address is tentative", Duration::from_secs(30), || {
        netns.ip("-6 addr show tentative").trim().is_empty()
    });
}

/// An address.
pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What one kernel with `rp_filter` gives to both kinds of nodes and to pods. A strict gateway needs
/// [`Lab::by_underlay`].
pub fn rp(rp_filter: u8) -> Options {
    let gateway_rp_filter = if rp_filter == 1 { 2 } else { rp_filter };
    Options { node_rp_filter: rp_filter, gateway_rp_filter, pod_rp_filter: rp_filter, ..Options::default() }
}

/// A pod made by a conflist.
pub struct Placed {
    pub pod: Pod,
    pub ips: Vec<IpAddr>,
    pub attachment: Attachment,
    /// Runs the whole list.
    pub runner: Runner,
    /// Runs crosslink alone, with the same cache: a DEL that leaves the pod's interface.
    pub alone: Runner,
    pub site: Site,
}

impl Placed {
    /// DEL of the whole list; nothing of ours is recorded afterwards.
    pub fn del(&self) {
        self.runner.del(&self.attachment).unwrap();
        assert!(self.site.findings_of(self.pod.name()).is_none(), "the record is gone");
    }

    /// CHECK of the whole list.
    pub fn check(&self) {
        self.runner.check(&self.attachment).unwrap();
    }
}

impl Site {
    /// Findings in the record of a container; none without a record.
    pub fn findings_of(&self, container_id: &str) -> Option<Vec<String>> {
        let text = std::fs::read_to_string(self.state_dir().join(format!("{container_id}:eth0.json"))).ok()?;
        let record: Value = serde_json::from_str(&text).unwrap();
        let findings = record["findings"].as_array().cloned().unwrap_or_default();
        Some(findings.iter().map(|finding| finding["id"].as_str().unwrap().to_owned()).collect())
    }
}

/// A pod whose interface the test made itself; crosslink is called with a result that the test wrote.
pub struct Handmade {
    pub pod: Pod,
    pub ips: Vec<IpAddr>,
    pub site: Site,
    pub prev_result: Value,
    node: PathBuf,
}

impl Handmade {
    /// `ips` are those of `prev_result`.
    pub fn new(pod: Pod, node: &Node, site: Site, prev_result: Value) -> Self {
        let ips = addresses(&prev_result);
        Self { pod, ips, site, prev_result, node: node.path().to_owned() }
    }

    /// Calls crosslink with its entry and `extra`.
    pub fn call(&self, command: &str, extra: Value) -> Reply {
        let mut config = self.site.entry(extra);
        config["name"] = json!("handmade");
        config["cniVersion"] = self.prev_result["cniVersion"].clone();
        config["prevResult"] = self.prev_result.clone();
        let mut call = Call::new(bin(), command, &config);
        self.pod.name().clone_into(&mut call.container_id);
        self.pod.path().to_str().unwrap().clone_into(&mut call.netns);
        "eth0".clone_into(&mut call.ifname);
        call.node = Some(self.node.clone());
        call.run().unwrap()
    }

    /// ADD, which gives prevResult back as it was.
    pub fn add(&self, extra: Value) {
        let reply = self.call("ADD", extra);
        assert!(reply.ok(), "{reply:?}");
        assert_eq!(reply.json(), self.prev_result);
    }

    /// CHECK.
    pub fn check(&self) {
        let reply = self.call("CHECK", json!({}));
        assert!(reply.ok() && reply.stdout.is_empty(), "{reply:?}");
    }

    /// DEL.
    pub fn del(&self) {
        let reply = self.call("DEL", json!({}));
        assert!(reply.ok() && reply.stdout.is_empty(), "{reply:?}");
        assert_eq!(self.site.findings_of(self.pod.name()), None);
    }
}

/// The seed's two clusters, with what kube-proxy and crosslink's agent keep on their nodes.
pub struct Lab {
    pub clusters: TwoClusters,
    dad: bool,
}

impl Lab {
    /// The two clusters.
    pub fn new(options: Options) -> Self {
        Self::made(options, false)
    }

    /// The two clusters, where new IPv6 addresses are tentative for a while, as they are everywhere.
    pub fn with_dad(options: Options) -> Self {
        Self::made(options, true)
    }

    fn made(options: Options, dad: bool) -> Self {
        let clusters = two_clusters(options);
        for node in [&clusters.a1, &clusters.a2, &clusters.b1] {
            kube_proxy_drop(node);
            if !dad {
                no_dad(node);
            }
        }
        crosslink_nft(&clusters.a1, &RULES);
        crosslink_nft(&clusters.a2, &RULES);
        Self { clusters, dad }
    }

    /// a1 reaches the gateway over the underlay, so that a strict gateway takes packets of a1's pods.
    pub fn by_underlay(self) -> Self {
        for (v6, gateway) in [(false, "172.110.0.12"), (true, "fd10::12")] {
            let family = if v6 { "-6" } else { "-4" };
            for cidr in crosslink_testkit::topology::CIDRS_B.iter().filter(|cidr| cidr.contains(':') == v6) {
                self.clusters.a1.ip(&format!("{family} route replace {cidr} via {gateway}"));
            }
        }
        self
    }

    /// A pod's namespace.
    pub fn pod(&self) -> Pod {
        let pod = self.clusters.pod("pod");
        if !self.dad {
            no_dad(&pod);
        }
        pod
    }

    /// Runs `main`, and then crosslink with `extra` in its entry, for `pod` on `node`.
    #[expect(clippy::too_many_arguments, reason = "these are what a pod is made from")]
    pub fn add(&self, node: &Node, pod: Pod, site: Site, main: Value, extra: Value) -> Placed {
        let entry = site.entry(extra);
        let list = |plugins| self.clusters.runner_with(node, conflist("pods", "1.0.0", plugins), bin_dirs());
        let (runner, alone) = (list(vec![main, entry.clone()]), list(vec![entry]));
        let attachment = Attachment::new(pod.name(), &pod, "eth0");
        let ips = addresses(&runner.add(&attachment).unwrap());
        settle(node);
        settle(&pod);
        Placed { pod, ips, attachment, runner, alone, site }
    }

    /// Proves that a pod reaches every address of a1, and that a1 reaches the pod by its primary address: a kubelet's
    /// probes.
    pub fn own_node(&self, pod: &Placed, primary: [&str; 2], families: &[bool]) {
        let a1 = &self.clusters.a1;
        let _servers = [serve_tcp(a1, "[::]:10250"), serve_tcp(&pod.pod, "[::]:10250")];
        for &v6 in families {
            let own = pick(&pod.ips, v6);
            for address in A1.map(ip).into_iter().filter(|address| address.is_ipv6() == v6) {
                ping(&pod.pod, address).unwrap();
                assert_eq!(tcp(&pod.pod, SocketAddr::new(address, 10250)).unwrap(), own.to_string());
            }
            ping(a1, own).unwrap();
            assert_eq!(tcp(a1, SocketAddr::new(own, 10250)).unwrap(), primary[usize::from(v6)]);
        }
    }

    /// The name of a1's end of the only veth that crosslink made there.
    pub fn node_end(&self) -> String {
        let links = self.clusters.a1.json("link show type veth");
        let names = links.as_array().unwrap().iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
        let ours: Vec<String> = names.filter(|name| name.starts_with("cl") && name.len() == 15).collect();
        assert_eq!(ours.len(), 1, "{ours:?}");
        ours[0].clone()
    }

    /// A macvlan pod on a1.
    pub fn on_a1(&self) -> Placed {
        self.on_a1_with(self.clusters.macvlan(1), json!({}))
    }

    /// A pod on a1.
    pub fn on_a1_with(&self, main: Value, extra: Value) -> Placed {
        self.add(&self.clusters.a1, self.pod(), self.site_a("a1", A1), main, extra)
    }

    /// A macvlan pod on a2, the gateway.
    pub fn on_a2(&self) -> Placed {
        self.add(&self.clusters.a2, self.pod(), self.site_a("a2", A2), self.clusters.macvlan(2), json!({}))
    }

    /// cluster-b's pod.
    pub fn remote(&self) -> Placed {
        let site = Site::new(self.clusters.state().join("site-b1"));
        site.cluster("cluster-a", &["172.110.0.0/16", "fd10::/64"], &["10.233.0.0/18", "fd33::/112"]);
        self.add(&self.clusters.b1, self.pod(), site, self.clusters.bridge(), json!({}))
    }

    /// Files of one of cluster-a's nodes.
    pub fn site_a(&self, node: &str, own: [&str; 4]) -> Site {
        let site = Site::new(self.clusters.state().join(format!("site-{node}")));
        site.cluster("cluster-b", &["172.111.0.0/16", "fd11::/64"], &["10.243.0.0/18", "fd43::/112"]);
        site.node(json!({
            "clusterName": "cluster-a", "addresses": own,
            "podCIDRs": ["172.110.0.0/16", "fd10::/64"], "serviceCIDRs": ["10.233.0.0/18", "fd33::/112"],
        }));
        site
    }

    /// A pod on a1 that bypasses it: its veth ends in the underlay's switch. It stands for any such interface.
    pub fn bypassing(&self, addrs: &[&str]) -> Handmade {
        let (pod, switch) = (self.pod(), self.clusters.underlay.netns());
        let port = crosslink_testkit::unique("by");
        switch.ip(&format!("link add {port} type veth peer name eth0 netns {}", pod.name()));
        switch.ip(&format!("link set {port} master br0 up"));
        pod.ip("link set eth0 up");
        addrs.iter().for_each(|addr| drop(pod.ip(&format!("addr add {addr} dev eth0"))));
        let ips: Vec<Value> = addrs.iter().map(|addr| json!({ "address": addr, "interface": 0 })).collect();
        let interfaces = json!([{ "name": "eth0", "sandbox": pod.path() }]);
        let result = json!({ "cniVersion": "1.0.0", "interfaces": interfaces, "ips": ips });
        Handmade::new(pod, &self.clusters.a1, self.site_a("a1", A1), result)
    }
}

/// Proves, for the families given, that two pods ping each other and talk TCP both ways, each seen by its own address.
pub fn meet((one, ones): (&Netns, &[IpAddr]), (two, twos): (&Netns, &[IpAddr]), families: &[bool]) {
    let _servers = [serve_tcp(one, "[::]:80"), serve_tcp(two, "[::]:80")];
    for &v6 in families {
        let (first, second) = (pick(ones, v6), pick(twos, v6));
        ping(one, second).unwrap();
        ping(two, first).unwrap();
        assert_eq!(tcp(one, SocketAddr::new(second, 80)).unwrap(), first.to_string());
        assert_eq!(tcp(two, SocketAddr::new(first, 80)).unwrap(), second.to_string());
    }
}

/// crosslink's routes in a namespace, both families, each as `ip` would write it; sorted.
pub fn our_routes(netns: &Netns) -> Vec<String> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        let routes = netns.json(&format!("{family} route show table all proto 141"));
        lines.extend(routes.as_array().unwrap().iter().map(route_line));
    }
    lines.sort();
    lines
}

fn route_line(route: &Value) -> String {
    let mut line = route["dst"].as_str().unwrap().to_owned();
    for (word, key) in [("via", "gateway"), ("dev", "dev"), ("table", "table"), ("src", "prefsrc")] {
        if let Some(value) = route[key].as_str() {
            line.push_str(&format!(" {word} {value}"));
        }
    }
    if let Some(mtu) = route["metrics"][0]["mtu"].as_u64() {
        line.push_str(&format!(" mtu {mtu}"));
    }
    let flags = route["flags"].as_array().unwrap();
    flags.iter().for_each(|flag| line.push_str(&format!(" {}", flag.as_str().unwrap())));
    line
}

/// Sorts lines written in the order of thought.
pub fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

/// Everything in a namespace that a DEL has to leave as it was: links, addresses, routes, permanent neighbours, rules and
/// the settings of interfaces.
pub fn snapshot(netns: &Netns) -> Vec<String> {
    let mut lines = Vec::new();
    for args in ["link", "addr", "-4 route show table all", "-6 route show table all", "-4 rule", "-6 rule"] {
        lines.extend(netns.json(args).as_array().unwrap().iter().map(|item| format!("{args}: {item}")));
    }
    let neighbours = netns.json("neigh show nud permanent");
    lines.extend(neighbours.as_array().unwrap().iter().map(|item| format!("neigh: {item}")));
    // Some keys cannot be read, which is no failure here.
    let sysctls = netns.try_exec(&["grep", "-r", ".", "/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"]);
    lines.extend(String::from_utf8_lossy(&sysctls.stdout).lines().map(str::to_owned));
    sorted(lines)
}

/// Lines of `after` that are not in `before` and, with a minus, the other way round.
pub fn difference(before: &[String], after: &[String]) -> Vec<String> {
    let gone = before.iter().filter(|line| !after.contains(line)).map(|line| format!("- {line}"));
    gone.chain(after.iter().filter(|line| !before.contains(line)).map(|line| format!("+ {line}"))).collect()
}

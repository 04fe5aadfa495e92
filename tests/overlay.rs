//! Overlay pods, made by real plugins or by hand as Calico makes them, reach a remote cluster by the routes that
//! crosslink copies from their default, and are reached.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;
#[path = "support/traffic.rs"]
mod traffic;

use std::net::{IpAddr, SocketAddr};

use crosslink_testkit::nft::kube_proxy_drop;
use crosslink_testkit::probe::{ping, tcp};
use crosslink_testkit::servers::serve_tcp;
use crosslink_testkit::topology::{End, link, pick};
use crosslink_testkit::{Attachment, Families, Node, Pod, Runner, addresses, cni_path, conflist, require};
use serde_json::{Value, json};
use support::{Site, bin_dirs};
use tempfile::TempDir;
use traffic::{BOTH, Handmade, MUTE, Placed, RP_FILTERS, each, ip, meet, no_dad, our_routes, settle};

const REMOTE: [&str; 2] = ["172.112.0.5", "fd12::5"];

/// Two nodes and a routed link. The local pods are in 172.111.0.0/16 and fd11::/64, the remote one is
/// 172.112.0.5 and fd12::5.
struct Lab {
    here: Node,
    there: Node,
    remote: Pod,
    remote_ips: [IpAddr; 2],
    rp_filter: u8,
    state: TempDir,
}

impl Lab {
    fn new(rp_filter: u8) -> Self {
        let (here, there) = (Node::new("here", rp_filter), Node::new("there", rp_filter));
        let remote = Pod::new("remote", rp_filter);
        no_dad(&here);
        no_dad(&there);
        no_dad(&remote);
        kube_proxy_drop(&here);
        kube_proxy_drop(&there);
        link(
            End { node: &here, ifname: "ens160", addrs: &["10.6.168.73/24", "fd06::73/64"] },
            End { node: &there, ifname: "ens160", addrs: &["10.6.168.74/24", "fd06::74/64"] },
        );
        // Calico's proxy ARP answers for what the node would route elsewhere: it needs a default route.
        here.routes(&["default via 10.6.168.74", "::/0 via fd06::74"]);
        there.routes(&["172.111.0.0/16 via 10.6.168.73", "fd11::/64 via fd06::73"]);
        there.ip(&format!("link add pod0 type veth peer name eth0 netns {}", remote.name()));
        for (netns, dev, v4, v6) in
            [(&*there, "pod0", "172.112.0.1/16", "fd12::1/64"), (&*remote, "eth0", "172.112.0.5/16", "fd12::5/64")]
        {
            netns.ip(&format!("addr add {v4} dev {dev}"));
            netns.ip(&format!("addr add {v6} dev {dev} nodad"));
            netns.ip(&format!("link set {dev} up"));
        }
        remote.ip("route add default via 172.112.0.1");
        remote.ip("-6 route add default via fd12::1");
        let state = tempfile::tempdir().unwrap();
        Self { here, there, remote, remote_ips: REMOTE.map(ip), rp_filter, state }
    }

    fn site(&self) -> Site {
        let site = Site::new(self.state.path().join("site"));
        site.cluster("cluster-b", &["172.112.0.0/16", "fd12::/64"], &["10.243.0.0/18", "fd43::/112"]);
        site
    }

    fn pod(&self) -> Pod {
        let pod = Pod::new("pod", self.rp_filter);
        no_dad(&pod);
        pod
    }

    fn add(&self, main: Value) -> Placed {
        let (pod, site) = (self.pod(), self.site());
        let entry = site.entry(json!({}));
        let dirs: Vec<_> = bin_dirs().into_iter().chain(cni_path()).collect();
        let list = |plugins| {
            Runner::new(conflist("pods", "1.0.0", plugins), dirs.clone(), self.state.path().join("cache"))
                .on(&self.here)
        };
        let (runner, alone) = (list(vec![main, entry.clone()]), list(vec![entry]));
        let attachment = Attachment::new(pod.name(), &pod, "eth0");
        let ips = addresses(&runner.add(&attachment).unwrap());
        settle(&self.here);
        settle(&pod);
        Placed { pod, ips, attachment, runner, alone, site }
    }

    /// Whatever is not routed on purpose ends here, so that the pod's default route carries nothing to the remote pod.
    fn meet_by_our_routes_alone(&self, pod: &Pod, ips: &[IpAddr], families: &[bool]) {
        pod.ip("route add unreachable 172.112.0.0/12");
        pod.ip("-6 route add unreachable fd00::/8");
        meet((pod, ips), (&self.remote, &self.remote_ips), families);
    }

    fn is_out_of_reach(&self, pod: &Pod) {
        assert_eq!(our_routes(pod), Vec::<String>::new());
        for far in self.remote_ips {
            let why = ping(pod, far).unwrap_err();
            assert!(["unreachable", "No route"].iter().any(|reason| why.contains(reason)), "{why}");
        }
    }

    fn ipam(&self, families: Families, with_default: bool) -> Value {
        let (v4, v6) = (families != Families::V6, families != Families::V4);
        let choose = |first: Value, second: Value| -> Vec<Value> {
            [(v4, first), (v6, second)].into_iter().filter_map(|(wanted, value)| wanted.then_some(value)).collect()
        };
        let mut ipam = json!({
            "type": "host-local", "dataDir": self.state.path().join("ipam"),
            "ranges": choose(json!([{ "subnet": "172.111.0.0/16" }]), json!([{ "subnet": "fd11::/64" }])),
        });
        if with_default {
            ipam["routes"] = choose(json!({ "dst": "0.0.0.0/0" }), json!({ "dst": "::/0" })).into();
        }
        ipam
    }

    /// A main CNI's entry by its name in the tests.
    fn main(&self, kind: &str, families: Families) -> Value {
        match kind {
            "ptp" => json!({ "type": "ptp", "ipMasq": false, "ipam": self.ipam(families, true) }),
            "bridge with isGateway" => {
                json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": self.ipam(families, true) })
            }
            "bridge without isGateway" => {
                // Somebody else gives the bridge its addresses; the pods have no default route.
                self.here.ip("link add cni0 type bridge");
                self.here.ip("addr add 172.111.0.1/16 dev cni0");
                self.here.ip("addr add fd11::1/64 dev cni0 nodad");
                self.here.ip("link set cni0 up");
                json!({ "type": "bridge", "bridge": "cni0", "ipam": self.ipam(families, false) })
            }
            _ => panic!("{kind}"),
        }
    }
}

fn ready() -> bool {
    ["bridge", "nft", "plugin:ptp", "plugin:bridge", "plugin:host-local"].iter().all(|f| require(f))
}

const MAINS: [&str; 3] = ["ptp", "bridge with isGateway", "bridge without isGateway"];

fn is_v6(family: Families) -> &'static [bool] {
    match family {
        Families::V4 => &[false],
        Families::V6 => &[true],
        Families::Dual => BOTH,
    }
}

/// What crosslink adds to a pod whose gateways are 172.111.0.1 and fd11::1.
fn expected(families: &[bool]) -> Vec<&'static str> {
    let mut lines = Vec::new();
    if families.contains(&false) {
        lines.push("10.243.0.0/18 via 172.111.0.1 dev eth0 onlink");
        lines.push("172.112.0.0/16 via 172.111.0.1 dev eth0 onlink");
    }
    if families.contains(&true) {
        lines.push("fd12::/64 via fd11::1 dev eth0 onlink");
        lines.push("fd43::/112 via fd11::1 dev eth0 onlink");
    }
    lines
}

fn passes(rp_filter: u8, kind: &str, families: Families) {
    let (lab, v6s) = (Lab::new(rp_filter), is_v6(families));
    let placed = lab.add(lab.main(kind, families));
    assert_eq!(placed.ips.iter().map(IpAddr::is_ipv6).collect::<Vec<_>>(), v6s);
    assert_eq!(our_routes(&placed.pod), expected(v6s));
    assert!(placed.pod.try_exec(&["ip", "link", "show", "veth0"]).status.code() == Some(1), "overlay makes no link");
    assert_eq!(placed.site.findings_of(placed.pod.name()).unwrap(), Vec::<String>::new());
    lab.meet_by_our_routes_alone(&placed.pod, &placed.ips, v6s);
    // The upstream plugin's CHECK, and ours.
    placed.check();
    placed.alone.del(&placed.attachment).unwrap();
    lab.is_out_of_reach(&placed.pod);
    placed.del();
}

#[test]
fn pods_of_ptp_and_bridge_and_a_remote_pod_reach_each_other() {
    if ready() {
        let cases = MAINS.into_iter().flat_map(|kind| RP_FILTERS.map(|rp| (kind, rp)));
        each(cases, |(kind, rp)| passes(rp, kind, Families::Dual));
    }
}

#[test]
fn pods_of_one_family_alone_reach_the_remote_and_have_no_route_of_the_other() {
    if ready() {
        let cases = MAINS.into_iter().flat_map(|kind| [(kind, Families::V4), (kind, Families::V6)]);
        each(cases, |(kind, families)| passes(1, kind, families));
    }
}

/// The node's end of a pod's veth as Calico makes it: no address, proxy ARP, a host route.
fn calico_end(lab: &Lab, pod: &Pod) {
    let here = &lab.here;
    here.ip(&format!("link add cali0 type veth peer name eth0 netns {}", pod.name()));
    here.ip("link set cali0 addr ee:ee:ee:ee:ee:ee up");
    pod.ip("link set eth0 up");
    here.sysctl("net.ipv4.conf.cali0.proxy_arp", "1");
    here.sysctl("net.ipv4.neigh.cali0.proxy_delay", "0");
    here.sysctl("net.ipv4.conf.cali0.rp_filter", "1");
    here.sysctl("net.ipv6.conf.cali0.proxy_ndp", "1");
    here.ip("route add 172.111.0.5 dev cali0 scope link");
    here.ip("-6 route add fd11::5 dev cali0");
}

/// What Calico answers: the interface is the node's end, the addresses are hosts, there is no gateway.
fn calico_result(version: &str, families: &[bool]) -> Value {
    let of = |&v6: &bool| {
        let mut ip = json!({ "address": if v6 { "fd11::5/128" } else { "172.111.0.5/32" } });
        if version.starts_with('0') {
            ip["version"] = json!(if v6 { "6" } else { "4" });
        }
        ip
    };
    let ips: Vec<Value> = families.iter().map(of).collect();
    json!({ "cniVersion": version, "interfaces": [{ "name": "cali0" }], "ips": ips, "dns": {} })
}

fn calico_pod(lab: &Lab, version: &str, families: &[bool]) -> Handmade {
    let pod = lab.pod();
    calico_end(lab, &pod);
    if families.contains(&false) {
        pod.ip("addr add 172.111.0.5/32 dev eth0");
        pod.ip("route add 169.254.1.1 dev eth0 scope link");
        pod.ip("route add default via 169.254.1.1 dev eth0");
    }
    if families.contains(&true) {
        pod.ip("addr add fd11::5/128 dev eth0 nodad");
        pod.ip("-6 route add fe80::ecee:eeff:feee:eeee dev eth0");
        pod.ip("-6 route add default via fe80::ecee:eeff:feee:eeee dev eth0");
    }
    Handmade::new(pod, &lab.here, lab.site(), calico_result(version, families))
}

fn through(lab: &Lab, handmade: &Handmade, families: &[bool], routes: &[&str]) {
    handmade.add(json!({}));
    assert_eq!(our_routes(&handmade.pod), routes);
    assert_eq!(handmade.site.findings(), Vec::<String>::new());
    lab.meet_by_our_routes_alone(&handmade.pod, &handmade.ips, families);
    if handmade.prev_result["cniVersion"] != "0.3.1" {
        handmade.check();
    }
    handmade.del();
    lab.is_out_of_reach(&handmade.pod);
}

#[test]
fn a_pod_as_calico_makes_it_copies_the_gateway_that_is_no_ones_address() {
    if !ready() {
        return;
    }
    let routes = [
        "10.243.0.0/18 via 169.254.1.1 dev eth0 onlink",
        "172.112.0.0/16 via 169.254.1.1 dev eth0 onlink",
        "fd12::/64 via fe80::ecee:eeff:feee:eeee dev eth0 onlink",
        "fd43::/112 via fe80::ecee:eeff:feee:eeee dev eth0 onlink",
    ];
    let cases = [
        (0, "0.4.0", BOTH, &routes[..]),
        (1, "1.0.0", BOTH, &routes[..]),
        // What Calico's own conflist names.
        (2, "0.3.1", BOTH, &routes[..]),
        (1, "1.0.0", &[false], &routes[..2]),
        (1, "1.0.0", &[true], &routes[2..]),
    ];
    each(cases, |(rp, version, families, routes)| {
        let lab = Lab::new(rp);
        through(&lab, &calico_pod(&lab, version, families), families, routes);
    });
}

#[test]
fn a_bare_default_route_is_copied_without_a_gateway() {
    if !ready() {
        return;
    }
    let routes = ["10.243.0.0/18 dev eth0", "172.112.0.0/16 dev eth0", "fd12::/64 dev eth0", "fd43::/112 dev eth0"];
    each(RP_FILTERS, |rp| {
        let lab = Lab::new(rp);
        let pod = lab.pod();
        calico_end(&lab, &pod);
        // IPv6 has proxy neighbours by address only.
        lab.here.ip("-6 neigh add proxy fd12::5 dev cali0");
        pod.ip("addr add 172.111.0.5/32 dev eth0");
        pod.ip("addr add fd11::5/128 dev eth0 nodad");
        pod.ip("route add default dev eth0");
        pod.ip("-6 route add default dev eth0");
        let handmade = Handmade::new(pod, &lab.here, lab.site(), calico_result("1.0.0", BOTH));
        through(&lab, &handmade, BOTH, &routes);
    });
}

#[test]
fn a_pod_without_a_v6_gateway_keeps_v4_and_gets_a_finding_for_v6() {
    if !ready() {
        return;
    }
    each(RP_FILTERS, |rp| {
        let lab = Lab::new(rp);
        let handmade = calico_pod(&lab, "1.0.0", BOTH);
        handmade.pod.ip("-6 route del default");
        handmade.add(json!({}));
        assert_eq!(handmade.site.findings(), ["XL-NO-NEXT-HOP"]);
        let v4 = ["10.243.0.0/18 via 169.254.1.1 dev eth0 onlink", "172.112.0.0/16 via 169.254.1.1 dev eth0 onlink"];
        assert_eq!(our_routes(&handmade.pod), v4);
        lab.meet_by_our_routes_alone(&handmade.pod, &handmade.ips, &[false]);
        assert!(ping(&handmade.pod, ip("fd12::5")).is_err());
        handmade.check();
        handmade.del();
        // Where the administrator named the v6 CIDR it is an error, and nothing was changed.
        let reply = handmade.call("ADD", json!({ "hijackCIDR": ["fd99::/64"] }));
        assert!(!reply.ok() && reply.code() == 102 && reply.stdout.contains("fd99::/64"), "{reply:?}");
        lab.is_out_of_reach(&handmade.pod);
    });
}

/// The link is narrower than the pods' interfaces and nobody tells them: only the routes' mtu helps.
#[test]
fn the_mtu_of_a_cluster_is_on_its_routes_and_carries_tcp_over_a_narrow_link() {
    if !ready() {
        return;
    }
    each([(Some(1400), true), (None, false)], |(mtu, passes)| {
        let lab = Lab::new(1);
        for node in [&lab.here, &lab.there] {
            node.ip("link set ens160 mtu 1400");
            node.nft(MUTE);
        }
        let handmade = calico_pod(&lab, "1.0.0", BOTH);
        let cluster = json!({ "name": "cluster-b", "podCIDRs": ["172.112.0.0/16", "fd12::/64"], "mtu": mtu });
        handmade.site.remotes("cluster-b.json", &json!({ "version": 1, "source": "static", "clusters": [cluster] }));
        handmade.add(json!({}));
        let note = if passes { " mtu 1400" } else { "" };
        let routes = [
            format!("172.112.0.0/16 via 169.254.1.1 dev eth0{note} onlink"),
            format!("fd12::/64 via fe80::ecee:eeff:feee:eeee dev eth0{note} onlink"),
        ];
        assert_eq!(our_routes(&handmade.pod), routes);
        if passes {
            meet((&handmade.pod, &handmade.ips), (&lab.remote, &lab.remote_ips), BOTH);
            handmade.check();
        } else {
            let _server = serve_tcp(&lab.remote, "[::]:80");
            assert!(tcp(&handmade.pod, SocketAddr::new(pick(&lab.remote_ips, false), 80)).is_err());
        }
        handmade.del();
    });
}

//! The scenario works without crosslink as far as it should, made by the machine's own CNI plugins, and no further.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "test support")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crosslink_testkit::nft::{CrosslinkNft, Masquerade, crosslink_nft, crosslink_ruleset, kube_proxy_drop, service};
use crosslink_testkit::probe::{http_get, ping, tcp, wait_addresses, wait_until};
use crosslink_testkit::runner::{Attachment, Runner, addresses};
use crosslink_testkit::servers::{serve_http, serve_tcp};
use crosslink_testkit::topology::{conflist, pick};
use crosslink_testkit::{Families, Netns, Options, Pod, TwoClusters, available, require, two_clusters};

struct Placed {
    pod: Pod,
    ips: Vec<IpAddr>,
    attachment: Attachment,
    runner: Runner,
}

fn place(clusters: &TwoClusters, name: &str, runner: Runner) -> Placed {
    let pod = clusters.pod(name);
    let attachment = Attachment::new(pod.name(), &pod, "eth0");
    let ips = addresses(&runner.add(&attachment).unwrap());
    wait_addresses(&pod);
    Placed { pod, ips, attachment, runner }
}

fn underlay_pods(clusters: &TwoClusters) -> (Placed, Placed) {
    let list = |subnet| conflist("macvlan-conf", "1.0.0", vec![clusters.macvlan(subnet)]);
    (
        place(clusters, "pod1", clusters.runner(&clusters.a1, list(1))),
        place(clusters, "pod2", clusters.runner(&clusters.a2, list(2))),
    )
}

fn overlay_pod(clusters: &TwoClusters) -> Placed {
    let list = conflist("bridge-conf", "1.0.0", vec![clusters.bridge()]);
    let pod = place(clusters, "podb", clusters.runner(&clusters.b1, list));
    // The bridge plugin does not wait for the addresses of the bridge it makes.
    wait_addresses(&clusters.b1);
    pod
}

fn ready() -> bool {
    ["macvlan", "bridge", "nft", "plugin:macvlan", "plugin:bridge", "plugin:host-local"].iter().all(|f| require(f))
}

#[test]
fn underlay_pods_of_two_nodes_meet_in_the_underlay_and_see_nothing_beyond() {
    if !ready() {
        return;
    }
    let clusters = two_clusters(Options::default());
    let (one, two) = underlay_pods(&clusters);
    assert_eq!(one.ips, ["172.110.1.1", "fd10::1:1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    for v6 in [false, true] {
        let bind = if v6 { "[::]:80" } else { "0.0.0.0:80" };
        let (from, to) = (pick(&one.ips, v6), pick(&two.ips, v6));
        ping(&one.pod, to).unwrap();
        let server = serve_tcp(&two.pod, bind);
        assert_eq!(tcp(&one.pod, SocketAddr::new(to, 80)).unwrap(), from.to_string());
        drop(server);
        let refused = tcp(&one.pod, SocketAddr::new(to, 80)).unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
        assert!(ping(&one.pod, pick(&overlay_pod(&clusters).ips, v6)).is_err(), "crosslink has nothing to do here");
    }
    one.runner.check(&one.attachment).unwrap();
    one.runner.del(&one.attachment).unwrap();
    assert!(one.pod.try_exec(&["ip", "link", "show", "eth0"]).status.code() == Some(1), "DEL removes the interface");
}

#[test]
fn cluster_b_is_reached_from_every_node() {
    if !ready() {
        return;
    }
    let clusters = two_clusters(Options { node_rp_filter: 1, ..Options::default() });
    let pod = overlay_pod(&clusters);
    for ip in &pod.ips {
        for node in [&clusters.b1, &clusters.a2, &clusters.a1] {
            ping(node, *ip).unwrap();
        }
    }
    let _server = serve_http(&pod.pod, "[::]:8080", "cluster-b");
    for ip in &pod.ips {
        assert_eq!(http_get(&clusters.a1, SocketAddr::new(*ip, 8080)).unwrap(), "cluster-b");
    }
    // An underlay pod gets there by way of the gateway, once something gives it the routes.
    let underlay = underlay_pods(&clusters).0;
    for (v6, route) in
        [(false, "-4 route add 172.111.0.0/16 via 172.110.0.12"), (true, "-6 route add fd11::/64 via fd10::12")]
    {
        underlay.pod.ip(route);
        ping(&underlay.pod, pick(&pod.ips, v6)).unwrap();
    }
}

#[test]
fn one_family_alone() {
    if !ready() {
        return;
    }
    for (families, v6) in [(Families::V4, false), (Families::V6, true)] {
        let clusters = two_clusters(Options { families, ..Options::default() });
        let pod = overlay_pod(&clusters);
        assert_eq!(pod.ips.iter().map(IpAddr::is_ipv6).collect::<Vec<_>>(), [v6]);
        ping(&clusters.a1, pick(&pod.ips, v6)).unwrap();
    }
}

#[test]
fn a_service_is_translated_and_masqueraded_as_asked() {
    if !ready() {
        return;
    }
    let clusters = two_clusters(Options::default());
    let pod = overlay_pod(&clusters);
    let _server = serve_tcp(&pod.pod, "[::]:8080");
    let cases = [("10.243.2.135:80", "10.7.0.11", "172.111.0.1"), ("[fd43::87]:80", "fd07::11", "fd11::1")];
    for (vip, client, node) in cases {
        let vip: SocketAddr = vip.parse().unwrap();
        let backend = SocketAddr::new(pick(&pod.ips, vip.is_ipv6()), 8080);
        service(&clusters.b1, vip, backend, Masquerade::Never);
        assert_eq!(tcp(&clusters.a1, vip).unwrap(), client);
        clusters.b1.nft("delete table inet kube-proxy");
        service(&clusters.b1, vip, backend, Masquerade::All);
        assert_eq!(tcp(&clusters.a1, vip).unwrap(), node);
        clusters.b1.nft("delete table inet kube-proxy");
        let own = if vip.is_ipv6() { "fd07::/64" } else { "10.7.0.0/24" };
        service(&clusters.b1, vip, backend, Masquerade::NotFrom(own));
        assert_eq!(tcp(&clusters.a1, vip).unwrap(), client);
        clusters.b1.nft("delete table inet kube-proxy");
    }
}

/// A stand-in for an underlay pod: out through a1, while answers come straight over the underlay.
fn half_seen_pod(clusters: &TwoClusters) -> Pod {
    let (pod, node_end) = (clusters.pod("half"), "cl0123456789abc");
    let (a1, underlay) = (&clusters.a1, clusters.underlay.netns());
    a1.ip(&format!("link add {node_end} type veth peer name veth0 netns {}", pod.name()));
    underlay.ip(&format!("link add half type veth peer name eth0 netns {}", pod.name()));
    underlay.ip("link set half master br0 up");
    for (netns, dev, v4, v6) in [
        (&*pod, "eth0", "172.110.1.9/16", "fd10::1:9/64"),
        (&*pod, "veth0", "169.254.9.2/24", "fd99::2/64"),
        (&**a1, node_end, "169.254.9.1/24", "fd99::1/64"),
    ] {
        netns.ip(&format!("addr add {v4} dev {dev}"));
        netns.ip(&format!("addr add {v6} dev {dev} nodad"));
        netns.ip(&format!("link set {dev} up"));
    }
    for cidr in ["172.111.0.0/16", "10.233.0.0/18", "10.243.0.0/18"] {
        pod.ip(&format!("route add {cidr} via 169.254.9.1 src 172.110.1.9"));
    }
    for cidr in ["fd11::/64", "fd33::/112", "fd43::/112"] {
        pod.ip(&format!("-6 route add {cidr} via fd99::1 src fd10::1:9"));
    }
    // DESIGN 4.5: the node's way to its own underlay pods.
    a1.ip(&format!("route add 172.110.1.9 dev {node_end}"));
    a1.ip(&format!("-6 route add fd10::1:9 dev {node_end}"));
    // Nobody answers neighbour discovery for an address of another interface.
    let links = pod.json("link show veth0");
    let mac = links[0]["address"].as_str().unwrap();
    a1.ip(&format!("-6 neigh replace fd10::1:9 lladdr {mac} dev {node_end}"));
    pod
}

/// What the agent would know on a1, whose address in its pod CIDR is on ens224 here.
const RULES: CrosslinkNft<'_> = CrosslinkNft {
    node_pods: &["10.200.1.0/24", "fd20::/64"],
    node_sources: &[
        IpAddr::V4(Ipv4Addr::new(172, 110, 200, 1)),
        IpAddr::V6(Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0xc8, 1)),
    ],
    local_pods: &["172.110.0.0/16", "fd10::/64"],
    remote_pods: &["172.111.0.0/16", "fd11::/64"],
    remote_services: &["10.243.0.0/18", "fd43::/112"],
};

/// a1 sees one direction of each connection: kube-proxy's rule breaks it after the handshake, crosslink's, where
/// `notrack` comes after conntrack, repair it.
#[test]
fn crosslinks_nft_rules_untrack_what_conntrack_finds_invalid() {
    if !ready() {
        return;
    }
    let clusters = two_clusters(Options::default());
    let (a1, pod, peer) = (&clusters.a1, half_seen_pod(&clusters), overlay_pod(&clusters));
    let _server = serve_tcp(&peer.pod, "[::]:80");
    let reach = |v6| tcp(&pod, SocketAddr::new(pick(&peer.ips, v6), 80));
    assert_eq!(reach(false).unwrap(), "172.110.1.9");
    assert_eq!(reach(true).unwrap(), "fd10::1:9");
    kube_proxy_drop(a1);
    assert!(reach(false).is_err() && reach(true).is_err(), "a1 sees half of the connection");
    crosslink_nft(a1, &RULES);
    crosslink_nft(a1, &RULES);
    assert_eq!(reach(false).unwrap(), "172.110.1.9");
    assert_eq!(reach(true).unwrap(), "fd10::1:9");
    let text = String::from_utf8(a1.exec(&["nft", "list", "table", "inet", "crosslink"]).stdout).unwrap();
    assert!(text.contains("srcnat - 2") && !text.contains("packets 0 bytes 0 notrack"), "{text}");
}

/// kube-proxy takes the pod for local and leaves its source alone; the answer would then miss the node that translated.
#[test]
fn crosslinks_nft_rules_bring_translated_connections_back_to_the_node() {
    if !ready() {
        return;
    }
    let clusters = two_clusters(Options::default());
    let (a1, pod, peer) = (&clusters.a1, half_seen_pod(&clusters), overlay_pod(&clusters));
    let _remote = serve_tcp(&peer.pod, "[::]:80");
    let _local = serve_tcp(&clusters.a2, "[::]:80");
    a1.ip("addr add 172.110.200.1/16 dev ens224");
    a1.ip("addr add fd10::c8:1/64 dev ens224 nodad");
    let backends = [peer.ips[0], peer.ips[1], "172.110.0.12".parse().unwrap(), "fd10::12".parse().unwrap()];
    let vips = ["10.243.2.135:80", "[fd43::87]:80", "10.233.62.51:80", "[fd33::33]:80"].map(|vip| vip.parse().unwrap());
    for (vip, backend) in vips.into_iter().zip(backends) {
        service(a1, vip, SocketAddr::new(backend, 80), Masquerade::Never);
    }
    kube_proxy_drop(a1);
    assert!(tcp(&pod, vips[0]).is_err() && tcp(&pod, vips[2]).is_err(), "answers miss the node");
    crosslink_nft(a1, &RULES);
    let sources = vips.map(|vip| tcp(&pod, vip).unwrap());
    assert_eq!(sources[0], "172.110.200.1");
    assert_eq!(sources[1], "fd10::c8:1");
    // Masqueraded: an address of a1 in the underlay, whichever the kernel takes.
    assert_eq!(sources[2], "172.110.0.11");
    assert!(["fd10::11", "fd10::c8:1"].contains(&sources[3].as_str()), "{sources:?}");
}

#[test]
fn nft_takes_odd_sets_of_cidrs() {
    if !require("nft") {
        return;
    }
    let node = Netns::create("odd");
    let overlapping = CrosslinkNft { local_pods: &["10.0.0.0/8", "10.1.0.0/16"], ..CrosslinkNft::default() };
    node.try_nft(&crosslink_ruleset(&overlapping)).unwrap();
    node.try_nft(&crosslink_ruleset(&CrosslinkNft::default())).unwrap();
}

#[test]
fn a_namespace_goes_when_it_is_dropped() {
    let netns = Netns::create("gone");
    let (name, path) = (netns.name().to_owned(), netns.path().to_owned());
    let other = Netns::create("other");
    other.ip(&format!("link add v0 type veth peer name v1 netns {name}"));
    netns.sysctl("net/ipv4/conf/v1/rp_filter", "1");
    assert_eq!(netns.read_sysctl("net.ipv4.conf.v1.rp_filter"), "1");
    assert_eq!(netns.json("-6 rule show table 12").as_array().map(Vec::len), Some(0));
    drop(netns);
    assert!(!path.exists());
    wait_until("the peer goes with it", Duration::from_secs(5), || !other.ip("link").contains("v0"));
}

#[test]
fn what_is_missing_is_told_apart_from_what_is_misspelt() {
    assert!(!available("plugin:no-such-plugin"));
    assert!(available("veth"));
    assert!(std::panic::catch_unwind(|| available("brigde")).is_err());
}

//! Underlay pods, made by the real macvlan and host-local plugins, reach a remote cluster through their node.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;
#[path = "support/traffic.rs"]
mod traffic;

use std::net::{IpAddr, SocketAddr};

use crosslink_testkit::nft::{Masquerade, crosslink_nft, service};
use crosslink_testkit::probe::{ping, tcp};
use crosslink_testkit::servers::serve_tcp;
use crosslink_testkit::topology::pick;
use crosslink_testkit::{Families, Options, require};
use serde_json::{Value, json};
use traffic::{
    A1, BOTH, Lab, MUTE, PRIMARY, Placed, RP_FILTERS, RULES, each, ip, meet, our_routes, rp, sorted, underlay_ready,
};

const REMOTE_SERVICES: [(&str, bool); 2] = [("10.243.2.135:80", false), ("[fd43::87]:80", true)];

/// The remote services of the families given, reached from a pod: cluster-b translates, and perhaps masquerades.
fn remote_services(lab: &Lab, pod: &Placed, remote: &Placed, families: &[bool]) {
    let (b1, _server) = (&lab.clusters.b1, serve_tcp(&remote.pod, "[::]:80"));
    for (vip, v6) in REMOTE_SERVICES.into_iter().filter(|(_, v6)| families.contains(v6)) {
        let vip: SocketAddr = vip.parse().unwrap();
        let gateway = ip(if v6 { "fd11::1" } else { "172.111.0.1" });
        for (masquerade, seen) in [(Masquerade::Never, pick(&pod.ips, v6)), (Masquerade::All, gateway)] {
            service(b1, vip, SocketAddr::new(pick(&remote.ips, v6), 80), masquerade);
            assert_eq!(tcp(&pod.pod, vip).unwrap(), seen.to_string());
            b1.nft("delete table inet kube-proxy");
        }
    }
}

/// All that a pod does, then CHECK, DEL, and nothing left.
fn everything(lab: &Lab, families: &[bool]) {
    let (pod, remote) = (lab.on_a1(), lab.remote());
    assert_eq!(pod.ips.iter().map(IpAddr::is_ipv6).collect::<Vec<_>>(), families);
    meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), families);
    remote_services(lab, &pod, &remote, families);
    lab.own_node(&pod, PRIMARY, families);
    for placed in [&pod, &remote] {
        placed.check();
        placed.del();
    }
    assert_eq!(our_routes(&lab.clusters.a1), Vec::<String>::new());
}

#[test]
fn an_underlay_pod_and_a_remote_pod_reach_each_other() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        everything(&Lab::new(rp(rp_filter)), BOTH);
    });
}

#[test]
fn with_the_gateway_reached_over_the_underlay_every_node_may_be_strict() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let options = Options { gateway_rp_filter: rp_filter, ..rp(rp_filter) };
        everything(&Lab::new(options).by_underlay(), BOTH);
    });
}

#[test]
fn pods_of_one_family_alone() {
    if !underlay_ready() {
        return;
    }
    let cases = RP_FILTERS.into_iter().flat_map(|rp| [(Families::V4, [false], rp), (Families::V6, [true], rp)]);
    each(cases, |(families, v6s, rp_filter)| {
        let lab = Lab::new(Options { families, ..rp(rp_filter) });
        everything(&lab, &v6s);
        let rules = ["-4", "-6"].map(|family| lab.clusters.a1.ip(&format!("{family} rule show table 1410")));
        assert_eq!(rules.map(|rules| !rules.is_empty()), [!v6s[0], v6s[0]], "the rule stays, of this family alone");
    });
}

/// As in a real cluster: duplicate address detection runs while the plugins do their work.
#[test]
fn addresses_that_are_still_tentative_do_not_matter() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::with_dad(rp(1));
    let (pod, remote) = (lab.on_a1(), lab.remote());
    meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
    lab.own_node(&pod, PRIMARY, BOTH);
}

/// Each part is needed: without crosslink's routes or its loose rp_filter there is no way, and without the agent's rules
/// kube-proxy's own drop cuts TCP after the handshake.
#[test]
fn without_the_routes_or_without_the_agents_rules_there_is_no_way() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::new(rp(1));
    let (pod, remote) = (lab.on_a1(), lab.remote());
    let _server = serve_tcp(&remote.pod, "[::]:80");
    let reach = |v6| tcp(&pod.pod, SocketAddr::new(pick(&remote.ips, v6), 80));
    assert!(reach(false).is_ok() && reach(true).is_ok());
    lab.clusters.a1.nft("delete table inet crosslink");
    let why = reach(false).unwrap_err();
    assert!(!why.contains("connect"), "a client sees the handshake pass: {why}");
    crosslink_nft(&lab.clusters.a1, &RULES);
    // Answers come by L2 while the route leads through veth0: strict, as the pod inherits it, drops them.
    pod.pod.sysctl("net.ipv4.conf.eth0.rp_filter", "1");
    assert!(reach(false).is_err() && reach(true).is_ok());
    pod.pod.sysctl("net.ipv4.conf.eth0.rp_filter", "2");
    assert!(reach(false).is_ok());
    pod.alone.del(&pod.attachment).unwrap();
    assert!(reach(false).is_err() && reach(true).is_err());
}

/// The pod's main tables are as the seed's listing.
#[test]
fn the_pods_routes_are_exactly_these() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::new(rp(1));
    let pod = lab.on_a1();
    let v4 = ["10.7.0.11", "172.110.0.11", "10.233.0.0/18", "10.243.0.0/18", "172.111.0.0/16"];
    let v6 = ["fd07::11", "fd10::11", "fd33::/112", "fd43::/112", "fd11::/64"];
    let v4 = v4.map(|dst| format!("{dst} via 169.254.141.1 dev veth0 src {} onlink", pick(&pod.ips, false)));
    let v6 = v6.map(|dst| format!("{dst} via fe80::8d:1 dev veth0 onlink"));
    assert_eq!(our_routes(&pod.pod), sorted(v4.into_iter().chain(v6).collect()));
    // As a person sees it.
    let listing = pod.pod.ip("route");
    let own = pick(&pod.ips, false);
    assert!(listing.contains(&format!("172.111.0.0/16 via 169.254.141.1 dev veth0 proto 141 src {own}")), "{listing}");
    assert!(listing.contains("default via 172.110.0.1 dev eth0"), "the default route is not ours: {listing}");
    // The node's own, in its table alone.
    let cl = lab.node_end();
    let own6 = pick(&pod.ips, true);
    let node = [format!("{own} dev {cl} table 1410 src 10.7.0.11"), format!("{own6} dev {cl} table 1410 src fd07::11")];
    assert_eq!(our_routes(&lab.clusters.a1), node);
}

#[test]
fn a_v6_route_names_its_source_only_where_the_pod_has_several() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (pod, remote) = (lab.bypassing(&["172.110.1.9/16", "fd10::1:9/64", "fd10::2:9/64"]), lab.remote());
        pod.add(json!({}));
        let routes = our_routes(&pod.pod);
        assert!(routes.contains(&"fd11::/64 via fe80::8d:1 dev veth0 src fd10::1:9 onlink".to_owned()), "{routes:?}");
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        // The other address is reached just as well.
        let second = [pod.ips[0], ip("fd10::2:9")];
        ping(&remote.pod, second[1]).unwrap();
        let _server = serve_tcp(&pod.pod, "[::]:80");
        assert_eq!(tcp(&remote.pod, SocketAddr::new(second[1], 80)).unwrap(), pick(&remote.ips, true).to_string());
        assert!(tcp(&lab.clusters.a1, SocketAddr::new(second[1], 80)).is_ok());
    });
}

/// Whatever the interface is, it is underlay if its other end is not on the node: `auto` finds out, `underlay` says so.
#[test]
fn a_veth_that_ends_elsewhere_is_underlay() {
    if !underlay_ready() {
        return;
    }
    each([(0, "auto"), (1, "auto"), (2, "auto"), (1, "underlay")], |(rp_filter, mode)| {
        let lab = Lab::new(rp(rp_filter));
        // The same index on the node must not deceive: ens192 and ens224 have low ones too.
        let (pod, remote) = (lab.bypassing(&["172.110.1.9/16", "fd10::1:9/64"]), lab.remote());
        pod.add(json!({ "mode": mode }));
        assert!(pod.pod.ip("route").contains("172.111.0.0/16 via 169.254.141.1 dev veth0"));
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        pod.check();
        pod.del();
        assert_eq!(our_routes(&pod.pod), Vec::<String>::new());
    });
}

/// `overlay` makes crosslink trust the pod's gateway, here the gateway node itself, and touch nothing on the node.
#[test]
fn mode_overlay_copies_the_default_route_of_a_macvlan_pod() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(Options { gateway_rp_filter: rp_filter, ..rp(rp_filter) });
        let mut main = lab.clusters.macvlan(1);
        for (range, gateway) in [(0, "172.110.0.12"), (1, "fd10::12")] {
            main["ipam"]["ranges"][range][0]["gateway"] = json!(gateway);
        }
        let (pod, remote) = (lab.on_a1_with(main, json!({ "mode": "overlay" })), lab.remote());
        let routes = our_routes(&pod.pod);
        let expected = [
            "10.243.0.0/18 via 172.110.0.12 dev eth0 onlink",
            "172.111.0.0/16 via 172.110.0.12 dev eth0 onlink",
            "fd11::/64 via fd10::12 dev eth0 onlink",
            "fd43::/112 via fd10::12 dev eth0 onlink",
        ];
        assert_eq!(routes, expected);
        assert_eq!(our_routes(&lab.clusters.a1), Vec::<String>::new());
        pod.pod.ip("route del default");
        pod.pod.ip("-6 route del default");
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
    });
}

/// A pod of the gateway node is routed there and back by it; pods of one or of two nodes meet in the underlay itself.
#[test]
fn pods_of_one_node_and_of_two_meet_by_l2_and_all_reach_the_remote() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (one, near, far) = (lab.on_a1(), lab.on_a1(), lab.on_a2());
        for other in [&near, &far] {
            for peer in &other.ips {
                let way = one.pod.ip(&format!("route get {peer}"));
                assert!(way.contains("dev eth0") && !way.contains(" via "), "{way}");
            }
            meet((&one.pod, &one.ips), (&other.pod, &other.ips), BOTH);
        }
        let remote = lab.remote();
        for placed in [&near, &far] {
            meet((&placed.pod, &placed.ips), (&remote.pod, &remote.ips), BOTH);
        }
        lab.own_node(&near, PRIMARY, BOTH);
    });
}

#[test]
fn an_ipvlan_pod_and_a_remote_pod_reach_each_other() {
    if !(underlay_ready() && require("ipvlan") && require("plugin:ipvlan")) {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let mut main: Value = lab.clusters.macvlan(1);
        main["type"] = json!("ipvlan");
        main["mode"] = json!("l2");
        let (pod, remote) = (lab.on_a1_with(main, json!({})), lab.remote());
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        remote_services(&lab, &pod, &remote, BOTH);
        lab.own_node(&pod, PRIMARY, BOTH);
        pod.check();
        pod.del();
    });
}

/// What a container image or a runtime may have as defaults in the pod's namespace: veth0 is usable all the same.
#[test]
fn hostile_defaults_of_new_interfaces_are_overridden() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::new(rp(1));
    let (pod, remote) = (lab.bypassing(&["172.110.1.9/16", "fd10::1:9/64"]), lab.remote());
    for netns in [&*pod.pod, &*lab.clusters.a1] {
        netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1");
        netns.sysctl("net.ipv6.conf.default.accept_ra", "2");
        netns.sysctl("net.ipv4.conf.default.forwarding", "0");
        netns.sysctl("net.ipv6.conf.default.forwarding", "0");
    }
    pod.add(json!({}));
    meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
}

/// The link between the clusters is narrower than the pods' interfaces and nobody tells them: only the routes' mtu helps.
#[test]
fn the_mtu_of_a_cluster_is_on_its_routes() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::new(rp(1));
    for node in [&lab.clusters.a2, &lab.clusters.b1] {
        node.ip("link set ens160 mtu 1400");
        node.nft(MUTE);
    }
    let site = lab.site_a("a1", A1);
    let cluster = json!({ "name": "cluster-b", "podCIDRs": ["172.111.0.0/16", "fd11::/64"], "mtu": 1400 });
    site.remotes("cluster-b.json", &json!({ "version": 1, "source": "static", "clusters": [cluster] }));
    let pod = lab.add(&lab.clusters.a1, lab.pod(), site, lab.clusters.macvlan(1), json!({}));
    let remote = lab.remote();
    let with_mtu: Vec<String> = our_routes(&pod.pod).into_iter().filter(|route| route.contains(" mtu 1400")).collect();
    let own = pick(&pod.ips, false);
    let v4 = format!("172.111.0.0/16 via 169.254.141.1 dev veth0 src {own} mtu 1400 onlink");
    assert_eq!(with_mtu, [v4.as_str(), "fd11::/64 via fe80::8d:1 dev veth0 mtu 1400 onlink"]);
    meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
    pod.check();
}

/// A veth into the node is underlay if the configuration says so: all goes through our veth, there and back.
#[test]
fn mode_underlay_gives_a_pod_of_ptp_a_second_veth() {
    if !(underlay_ready() && require("plugin:ptp")) {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        // What comes back over the underlay must be what a strict a1 expects there.
        let lab = Lab::new(rp(rp_filter)).by_underlay();
        let a1 = &lab.clusters.a1;
        let mut main = lab.clusters.macvlan(1);
        main["type"] = json!("ptp");
        // The underlay must find such a pod: a1 answers for it.
        a1.sysctl("net.ipv4.conf.ens224.proxy_arp", "1");
        a1.sysctl("net.ipv4.neigh.ens224.proxy_delay", "0");
        let (pod, remote) = (lab.on_a1_with(main, json!({ "mode": "underlay" })), lab.remote());
        let own = pick(&pod.ips, false);
        let way = a1.ip(&format!("route get {own}"));
        assert!(way.contains(&format!("dev {} table 1410", lab.node_end())), "{way}");
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), &[false]);
        lab.own_node(&pod, PRIMARY, BOTH);
        pod.check();
        pod.del();
    });
}

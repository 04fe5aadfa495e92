//! An underlay pod and its own node: addresses, services, what ADD sets and what DEL puts back.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;
#[path = "support/traffic.rs"]
mod traffic;

use std::fs;
use std::net::{IpAddr, SocketAddr};

use crosslink_testkit::Netns;
use crosslink_testkit::nft::{Masquerade, crosslink_nft, service};
use crosslink_testkit::probe::tcp;
use crosslink_testkit::servers::serve_tcp;
use crosslink_testkit::topology::pick;
use serde_json::json;
use traffic::{
    A1, A2, BOTH, Lab, PRIMARY, Placed, RP_FILTERS, RULES, difference, each, ip, meet, our_routes, rp, settle,
    snapshot, sorted, underlay_ready,
};

const LOCAL_DNS: &str = "169.254.20.10";
/// What a1 has besides: a container runtime's bridge, a CNI's bridge, the node-local DNS cache.
const OTHERS: [(&str, &str, &str); 3] = [
    ("docker0", "172.17.0.1/16", "fd17::1/64"),
    ("cni0", "10.244.0.1/24", "fd44::1/64"),
    ("nodelocaldns", "169.254.20.10/32", "fd20::10/128"),
];

/// The two clusters, where a1 has other links whose indices are lower than those of its uplinks.
fn with_lower_links(rp_filter: u8) -> Lab {
    let lab = Lab::new(rp(rp_filter));
    let a1 = &lab.clusters.a1;
    a1.ip("link del ens192");
    a1.ip("link del ens224");
    for (name, v4, v6) in OTHERS {
        // A bridge where a kernel may lack dummy links; only name and address matter.
        a1.ip(&format!("link add {name} type bridge"));
        a1.ip(&format!("addr add {v4} dev {name}"));
        a1.ip(&format!("addr add {v6} dev {name} nodad"));
        a1.ip(&format!("link set {name} up"));
    }
    lab.clusters.mgmt.attach(a1, "ens192", &["10.7.0.11/24", "fd07::11/64"]);
    lab.clusters.underlay.attach(a1, "ens224", &["172.110.0.11/16", "fd10::11/64"]);
    let index = |name: &str| a1.json(&format!("link show {name}"))[0]["ifindex"].as_u64().unwrap();
    assert!(OTHERS.iter().all(|(name, ..)| index(name) < index("ens192")));
    a1.routes(&["172.111.0.0/16 via 10.7.0.12", "fd11::/64 via fd07::12"]);
    lab
}

/// A pod on a1, with `node.json` or without.
fn pod_of(lab: &Lab, node_json: bool) -> Placed {
    let site = lab.site_a("a1", A1);
    if !node_json {
        fs::remove_file(site.dir.join("node.json")).unwrap();
    }
    let extra = json!({ "hijackCIDR": [format!("{LOCAL_DNS}/32")] });
    lab.add(&lab.clusters.a1, lab.pod(), site, lab.clusters.macvlan(1), extra)
}

/// Host routes in the pod, without the one for the DNS cache that the administrator asked for.
fn hosts(pod: &Placed) -> Vec<String> {
    let routes = our_routes(&pod.pod).into_iter();
    let dsts = routes.map(|route| route.split(' ').next().unwrap().to_owned());
    dsts.filter(|dst| !dst.contains('/') && dst != LOCAL_DNS).collect()
}

/// The sources of a1's routes to the pod.
fn sources(lab: &Lab, pod: &Placed) -> [String; 2] {
    BOTH.iter()
        .map(|v6| {
            let own = pick(&pod.ips, *v6);
            let family = if *v6 { "-6" } else { "-4" };
            let routes = lab.clusters.a1.json(&format!("{family} route show table 1410"));
            let routes = routes.as_array().unwrap();
            let route = routes.iter().find(|route| route["dst"] == own.to_string()).unwrap();
            route["prefsrc"].as_str().unwrap().to_owned()
        })
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

#[test]
fn a_pod_and_its_node_reach_each_other_beside_links_of_others() {
    const UNDERLAY: [&str; 2] = ["172.110.0.11", "fd10::11"];
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = with_lower_links(rp_filter);
        let (a1, remote) = (&lab.clusters.a1, lab.remote());
        for (node_json, default, primary) in [
            (true, None, PRIMARY),
            (false, None, PRIMARY),
            (false, Some(("10.7.0.12", "fd07::12")), PRIMARY),
            (false, Some(("172.110.0.12", "fd10::12")), UNDERLAY),
            (true, Some(("172.110.0.12", "fd10::12")), PRIMARY),
        ] {
            println!("node.json {node_json}, default {default:?}, rp_filter {rp_filter}");
            if let Some((v4, v6)) = default {
                a1.ip(&format!("-4 route replace default via {v4}"));
                a1.ip(&format!("-6 route replace default via {v6}"));
            }
            let pod = pod_of(&lab, node_json);
            assert_eq!(hosts(&pod), sorted(A1.map(str::to_owned).to_vec()));
            assert_eq!(sources(&lab, &pod), primary);
            lab.own_node(&pod, primary, BOTH);
            meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
            let dns = serve_tcp(a1, "169.254.20.10:53");
            assert_eq!(tcp(&pod.pod, dns.addr()).unwrap(), pick(&pod.ips, false).to_string());
            pod.check();
            pod.del();
        }
    });
}

/// Without hijackCIDR nobody routes the DNS cache's address, which is not the node's.
#[test]
fn node_local_dns_needs_its_hijack_cidr() {
    if !underlay_ready() {
        return;
    }
    let lab = with_lower_links(1);
    let pod = lab.on_a1();
    let dns = serve_tcp(&lab.clusters.a1, "169.254.20.10:53");
    assert!(tcp(&pod.pod, dns.addr()).is_err());
    assert!(!our_routes(&pod.pod).iter().any(|route| route.contains(LOCAL_DNS)));
}

/// Local services: VIPs of either family.
const VIPS: [&str; 2] = ["10.233.62.51:80", "[fd33::33]:80"];

/// Kube-proxy's ways with clients: `clusterCIDR` covers the underlay in the seed's own case.
const MASQUERADES: [[Masquerade<'_>; 2]; 3] = [
    [Masquerade::Never; 2],
    [Masquerade::NotFrom("172.110.0.0/16"), Masquerade::NotFrom("fd10::/64")],
    [Masquerade::All; 2],
];

/// The source that the backend saw through a service of each family.
fn through_service(
    lab: &Lab,
    client: &Placed,
    backends: &[IpAddr],
    masquerades: [Masquerade<'_>; 2],
) -> [Result<String, String>; 2] {
    let a1 = &lab.clusters.a1;
    let seen = [0, 1].map(|family| {
        let vip: SocketAddr = VIPS[family].parse().unwrap();
        let backend = SocketAddr::new(pick(backends, vip.is_ipv6()), 8080);
        service(a1, vip, backend, masquerades[family]);
        tcp(&client.pod, vip)
    });
    a1.nft("delete table inet kube-proxy");
    seen
}

#[test]
fn a_local_service_whose_backend_is_on_another_node() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (client, far) = (lab.on_a1(), lab.on_a2());
        let _server = serve_tcp(&far.pod, "[::]:8080");
        for masquerade in MASQUERADES {
            let seen = through_service(&lab, &client, &far.ips, masquerade);
            // Answers must come back to the node that translated: the backend sees one of its addresses.
            let seen = seen.map(Result::unwrap);
            assert!(seen.iter().all(|seen| A1.contains(&seen.as_str())), "{masquerade:?}: {seen:?}");
        }
        if rp_filter == 1 {
            lab.clusters.a1.nft("delete table inet crosslink");
            let seen = through_service(&lab, &client, &far.ips, MASQUERADES[0]);
            assert!(seen.iter().all(Result::is_err), "the agent's rules are needed: {seen:?}");
        }
    });
}

/// The API server and node-local agents: their endpoints are node addresses.
#[test]
fn a_local_service_whose_backend_is_a_node() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let client = lab.on_a1();
        for (node, addresses) in [(&lab.clusters.a1, A1), (&lab.clusters.a2, A2)] {
            let _server = serve_tcp(node, "[::]:8080");
            for pair in addresses.map(ip).chunks(2) {
                for masquerades in MASQUERADES {
                    let seen = through_service(&lab, &client, pair, masquerades).map(Result::unwrap);
                    let possible = |seen: &String| A1.contains(&seen.as_str()) || client.ips.contains(&ip(seen));
                    assert!(seen.iter().all(possible), "{pair:?}: {seen:?}");
                }
            }
        }
    });
}

#[test]
fn a_local_service_whose_backend_is_on_the_same_node_masqueraded_by_kube_proxy() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (client, near) = (lab.on_a1(), lab.on_a1());
        let _server = serve_tcp(&near.pod, "[::]:8080");
        let seen = through_service(&lab, &client, &near.ips, MASQUERADES[2]).map(Result::unwrap);
        assert!(seen.iter().all(|seen| A1.contains(&seen.as_str())), "{seen:?}");
    });
}

/// kube-proxy whose clusterCIDR covers the underlay leaves the source alone, and so do the agent's rules, since the
/// packet goes out by another `cl*`.
#[test]
fn a_local_service_whose_backend_is_on_the_same_node_not_masqueraded() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (client, near) = (lab.on_a1(), lab.on_a1());
        let _server = serve_tcp(&near.pod, "[::]:8080");
        let seen = through_service(&lab, &client, &near.ips, MASQUERADES[0]);
        assert!(seen.iter().all(Result::is_ok), "{seen:?}");
    });
}

fn sysctls(netns: &Netns, dev: &str, wanted: &[(&str, &str)]) {
    for (key, value) in wanted {
        let (family, key) = key.split_once('/').unwrap();
        assert_eq!(netns.read_sysctl(&format!("net/{family}/conf/{dev}/{key}")), *value, "{dev}: {key}");
    }
}

/// DESIGN 4.5, also where the node's and the pod's own defaults say otherwise.
#[test]
fn interfaces_are_set_as_designed() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let a1 = &lab.clusters.a1;
        let pod = lab.bypassing(&["172.110.1.9/16", "fd10::1:9/64"]);
        for netns in [&*pod.pod, &**a1] {
            for (key, value) in
                [("accept_ra", "2"), ("disable_ipv6", "1"), ("forwarding", "0"), ("accept_redirects", "1")]
            {
                netns.sysctl(&format!("net.ipv6.conf.default.{key}"), value);
            }
            netns.sysctl("net.ipv4.conf.default.forwarding", "0");
            netns.sysctl("net.ipv4.conf.default.accept_redirects", "1");
        }
        pod.add(json!({}));
        sysctls(&pod.pod, "eth0", &[("ipv4/rp_filter", "2")]);
        sysctls(&pod.pod, "veth0", &[("ipv4/rp_filter", "2"), ("ipv6/accept_ra", "0"), ("ipv6/disable_ipv6", "0")]);
        let cl = lab.node_end();
        sysctls(a1, &cl, &[("ipv4/rp_filter", "1"), ("ipv4/forwarding", "1"), ("ipv4/accept_redirects", "0")]);
        sysctls(a1, &cl, &[("ipv6/accept_ra", "0"), ("ipv6/disable_ipv6", "0"), ("ipv6/accept_redirects", "0")]);
        sysctls(a1, &cl, &[("ipv6/forwarding", "1")]);
        assert_eq!(a1.ip(&format!("-o addr show dev {cl} scope global")), "", "the node's end has no address");
        assert_eq!(a1.ip(&format!("-o -4 addr show dev {cl}")), "");
        let veth0 = pod.pod.json("-4 addr show dev veth0")[0]["addr_info"][0].clone();
        assert_eq!(
            [&veth0["local"], &veth0["prefixlen"], &veth0["scope"]],
            [&json!("169.254.141.2"), &json!(32), &json!("link")]
        );
        for (netns, dev, next) in [
            (&*pod.pod, "veth0", "169.254.141.1"),
            (&*pod.pod, "veth0", "fe80::8d:1"),
            (&**a1, &cl, "172.110.1.9"),
            (&**a1, &cl, "fd10::1:9"),
        ] {
            let neighbours = netns.ip(&format!("neigh show {next} dev {dev} nud permanent"));
            assert!(neighbours.contains(next), "{next}: {neighbours}");
        }
    });
}

/// The namespace outlives DEL, as it does for a moment in every runtime, and in some for long.
#[test]
fn del_puts_the_pod_back_as_it_was() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (pod, remote) = (lab.bypassing(&["172.110.1.9/16", "fd10::1:9/64"]), lab.remote());
        let before = snapshot(&pod.pod);
        pod.add(json!({ "hijackCIDR": ["169.254.20.10/32"] }));
        assert!(
            difference(&before, &snapshot(&pod.pod)).iter().any(|line| line.contains("eth0/rp_filter"))
                || rp_filter == 2
        );
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        // Again: what was there before the first ADD is what DEL owes.
        pod.add(json!({}));
        pod.del();
        assert_eq!(difference(&before, &snapshot(&pod.pod)), Vec::<String>::new());
        sysctls(&pod.pod, "eth0", &[("ipv4/rp_filter", &rp_filter.to_string())]);
    });
}

#[test]
fn after_all_pods_are_gone_the_node_is_as_before_but_for_the_rule() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let lab = Lab::new(rp(rp_filter));
        let (a1, remote) = (&lab.clusters.a1, lab.remote());
        settle(a1);
        let before = snapshot(a1);
        let pods: Vec<Placed> = (0..3).map(|_| lab.on_a1()).collect();
        for pod in &pods {
            meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        }
        pods.iter().for_each(Placed::del);
        let left = difference(&before, &snapshot(a1));
        assert_eq!(left.len(), 2, "{left:#?}");
        for (line, family) in left.iter().zip(["-4", "-6"]) {
            assert!(line.starts_with(&format!("+ {family} rule:")) && line.contains("\"table\":\"1410\""), "{left:#?}");
            assert!(line.contains("\"priority\":1410"), "{left:#?}");
        }
        assert!(pods[0].site.records().is_empty());
        // And once more, now that the rule is there.
        let pod = lab.on_a1();
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        pod.del();
        assert_eq!(difference(&before, &snapshot(a1)), left);
    });
}

/// An agent that loads its rules later, or again, breaks nothing that is open anew.
#[test]
fn the_agents_rules_may_come_after_the_pod() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::new(rp(1));
    lab.clusters.a1.nft("delete table inet crosslink");
    let (pod, remote) = (lab.on_a1(), lab.remote());
    crosslink_nft(&lab.clusters.a1, &RULES);
    let ips: Vec<IpAddr> = pod.ips.clone();
    meet((&pod.pod, &ips), (&remote.pod, &remote.ips), BOTH);
}

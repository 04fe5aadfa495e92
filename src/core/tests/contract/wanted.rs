//! From destinations to kernel state: next hops, sources and MTUs of overlay pods; veth, neighbours, node routes, rules
//! and sysctls of underlay pods.

use std::net::IpAddr;

use crosslink_core::{
    error::Code,
    facts::{Attached, NextHop, PodAddress},
    finding::Id,
    model::{Family, Neighbour, Route, Rule, Side},
    numbers::{TABLE_MAIN, TABLE_PODS, VethNames},
    wanted::Wanted,
};
use serde_json::json;

use crate::support::{IDENTITY, World, addr, net, noted};

const HOP_V4: &str = "169.254.141.1";

fn overlay() -> World {
    World::new(Attached::Overlay).remote("cluster-b", &["10.50.0.0/16", "fd50::/64"], Some(1400))
}

fn underlay() -> World {
    World::new(Attached::Underlay).remote("cluster-b", &["10.50.0.0/16", "fd50::/64"], Some(1200))
}

fn route<'w>(wanted: &'w Wanted, dst: &str) -> &'w Route {
    wanted.routes(Side::Pod).find(|route| route.dst == net(dst)).unwrap_or_else(|| panic!("no {dst} in {wanted:?}"))
}

#[test]
fn overlay_routes_copy_the_default_routes_next_hop() {
    let (v4, v6) = ("10.50.0.0/16", "fd50::/64");
    let cases = [
        ("gateway", Family::V4, v4, Some("192.168.7.1"), None),
        ("bare dev", Family::V4, v4, None, None),
        ("with source", Family::V4, v4, Some("192.168.7.1"), Some("192.168.7.5")),
        ("IPv4 by an IPv6 gateway", Family::V4, v4, Some("fe80::1"), None),
        ("a gateway outside every subnet", Family::V4, v4, Some("169.254.1.1"), None),
        ("IPv6 gateway", Family::V6, v6, Some("fd07::1"), None),
        ("IPv6 link-local gateway", Family::V6, v6, Some("fe80::1"), None),
        ("IPv6 bare dev", Family::V6, v6, None, None),
    ];
    for (what, family, dst, via, src) in cases {
        let mut world = overlay();
        let hop = NextHop { via: via.map(addr), src: src.map(addr) };
        world.pod.next_hops.retain(|(of, _)| *of != family);
        world.pod.next_hops.push((family, hop.clone()));
        let (wanted, findings) = world.wanted().unwrap();
        let expected = Route {
            dst: net(dst),
            table: TABLE_MAIN,
            dev: "eth0".to_owned(),
            via: hop.via,
            src: hop.src,
            mtu: Some(1400),
        };
        assert_eq!(route(&wanted, dst), &expected, "{what}");
        assert!(findings.is_empty() && wanted.pod_routes.len() == 2, "{what}: {wanted:?}");
        let nothing = Wanted { pod_routes: Vec::new(), ..wanted };
        assert_eq!(nothing, Wanted::default(), "{what}: an overlay pod gets routes and nothing else");
    }
}

#[test]
fn a_missing_next_hop_stops_only_what_was_named() {
    let without = |mut world: World, family: Family| {
        world.pod.next_hops.retain(|(of, _)| *of != family);
        world
    };
    for (family, word, cidr) in [(Family::V4, "IPv4", "10.50.0.0/16"), (Family::V6, "IPv6", "fd50::/64")] {
        let (wanted, findings) = without(overlay(), family).wanted().unwrap();
        assert_eq!(wanted.pod_routes.len(), 1, "the other family works");
        assert!(noted(&findings, Id::NoNextHop, word) && findings.len() == 1, "{findings:?}");
        for (named, place) in [
            (overlay().key("hijackCIDR", json!([cidr])), "hijackCIDR"),
            (overlay().annotation("hijack-cidr", cidr), "crosslink.dev/hijack-cidr"),
        ] {
            let err = without(named, family).wanted().unwrap_err();
            assert_eq!(err.code, Code::NoNextHop);
            for part in [place, cidr, "eth0", word] {
                assert!(err.msg.contains(part), "no {part} in {err}");
            }
        }
    }
}

/// The whole state of an underlay pod, as 4.5 lists it.
#[test]
fn underlay_pods_get_a_veth_pair() {
    let (wanted, findings) = underlay().wanted().unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    let names = VethNames::of(IDENTITY.container_id, IDENTITY.ifname);
    let veth = wanted.veth.as_ref().unwrap();
    assert_eq!((veth.pod.as_str(), veth.node.as_str()), ("veth0", names.node.as_str()));
    assert!(veth.node.len() == 15 && veth.node.starts_with("cl"), "{}", veth.node);
    assert!(veth.node[2..].chars().all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase()));
    assert_eq!((veth.pod_mac, veth.node_mac), (names.pod_mac, names.node_mac));
    assert!(veth.pod_mac != veth.node_mac && [veth.pod_mac, veth.node_mac].iter().all(|mac| mac[0] & 3 == 2));
    assert_eq!((veth.mtu, wanted.veth_address), (1450, Some(addr("169.254.141.2"))));

    let link_local = wanted.neighbours.iter().find(|(side, n)| *side == Side::Pod && n.ip.is_ipv6()).unwrap().1.ip;
    assert!(matches!(link_local, IpAddr::V6(v6) if v6.is_unicast_link_local()));
    let neighbour = |side, dev: &str, ip, mac| (side, Neighbour { dev: dev.to_owned(), ip, mac });
    let expected = [
        neighbour(Side::Pod, "veth0", addr(HOP_V4), veth.node_mac),
        neighbour(Side::Pod, "veth0", link_local, veth.node_mac),
        neighbour(Side::Node, &veth.node, addr("192.168.7.5"), veth.pod_mac),
        neighbour(Side::Node, &veth.node, addr("fd07::5"), veth.pod_mac),
    ];
    assert_eq!(wanted.neighbours, expected);

    let rule = |family| Rule { family, priority: 1410, table: 1410 };
    assert_eq!(wanted.rules, [rule(Family::V4), rule(Family::V6)]);
    let host = |dst: &str, src: &str| Route {
        dst: net(dst),
        table: TABLE_PODS,
        dev: veth.node.clone(),
        via: None,
        src: Some(addr(src)),
        mtu: None,
    };
    assert_eq!(wanted.node_routes, [host("192.168.7.5", "10.6.0.2"), host("fd07::5", "fd06::2")]);
    assert_eq!((TABLE_MAIN, TABLE_PODS), (254, 1410));

    let expected = [
        ("10.6.0.2/32", None),
        ("10.50.0.0/16", Some(1200)),
        ("10.96.0.0/12", None),
        ("10.244.0.0/16", None),
        ("fd06::2/128", None),
        ("fd24::/48", None),
        // The smallest MTU that IPv6 works with.
        ("fd50::/64", Some(1280)),
        ("fd96::/112", None),
    ];
    for (dst, mtu) in expected {
        let v4 = net(dst).addr().is_ipv4();
        let via = if v4 { addr(HOP_V4) } else { link_local };
        let src = v4.then(|| addr("192.168.7.5"));
        let whole = Route { dst: net(dst), table: TABLE_MAIN, dev: "veth0".to_owned(), via: Some(via), src, mtu };
        assert_eq!(route(&wanted, dst), &whole);
    }
    assert_eq!(wanted.pod_routes.len(), expected.len());
}

#[test]
fn underlay_sysctls_are_those_of_the_contract() {
    let node = VethNames::of(IDENTITY.container_id, IDENTITY.ifname).node;
    let v4 = [
        ("pod", "ipv4/conf/eth0/rp_filter".to_owned(), "2", true),
        ("pod", "ipv4/conf/veth0/rp_filter".to_owned(), "2", false),
    ];
    let v6 = [("pod", "ipv6/conf/veth0/disable_ipv6".to_owned(), "0", false)];
    // Whatever the pod has: what it sends is not up to us.
    let all = [
        ("pod", "ipv6/conf/veth0/accept_ra".to_owned(), "0", false),
        ("node", format!("ipv4/conf/{node}/rp_filter"), "1", false),
        ("node", format!("ipv4/conf/{node}/forwarding"), "1", false),
        ("node", format!("ipv4/conf/{node}/accept_redirects"), "0", false),
        ("node", format!("ipv6/conf/{node}/addr_gen_mode"), "1", false),
        ("node", format!("ipv6/conf/{node}/accept_ra"), "0", false),
        ("node", format!("ipv6/conf/{node}/accept_redirects"), "0", false),
        ("node", format!("ipv6/conf/{node}/disable_ipv6"), "0", false),
        ("node", format!("ipv6/conf/{node}/forwarding"), "1", false),
    ];
    let mut v6_only = underlay();
    v6_only.pod.addresses.remove(0);
    for (what, world, expected) in [
        ("both", underlay(), all.iter().chain(&v4).chain(&v6).cloned().collect::<Vec<_>>()),
        (
            "IPv4 only",
            World { pod: World::v4_only(Attached::Underlay).pod, ..underlay() },
            all.iter().chain(&v4).cloned().collect(),
        ),
        ("IPv6 only", v6_only, all.iter().chain(&v6).cloned().collect()),
    ] {
        let (wanted, _) = world.wanted().unwrap();
        let mut found: Vec<_> = wanted
            .sysctls
            .iter()
            .map(|want| {
                (want.sysctl.side.to_string(), want.sysctl.key.clone(), want.sysctl.value.clone(), want.restore)
            })
            .collect();
        let mut expected: Vec<_> = expected
            .into_iter()
            .map(|(side, key, value, back)| (side.to_owned(), key, value.to_owned(), back))
            .collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn only_the_pods_families_are_set_up() {
    let mut v6_only = underlay();
    v6_only.pod.addresses.remove(0);
    let v4_only = World { pod: World::v4_only(Attached::Underlay).pod, ..underlay() };
    for (world, v4, expected) in [
        (v4_only, true, &["10.6.0.2/32", "10.50.0.0/16", "10.96.0.0/12", "10.244.0.0/16"]),
        (v6_only, false, &["fd06::2/128", "fd24::/48", "fd50::/64", "fd96::/112"]),
    ] {
        let (wanted, findings) = world.wanted().unwrap();
        let mut found: Vec<_> = wanted.routes(Side::Pod).map(|route| route.dst).collect();
        found.sort();
        assert_eq!(found, expected.map(net));
        assert_eq!(wanted.veth_address.is_some(), v4, "without IPv4 there is no IPv4 address");
        assert!(wanted.rules.len() == 1 && wanted.node_routes.len() == 1 && wanted.neighbours.len() == 2);
        assert!(wanted.neighbours.iter().all(|(_, neighbour)| neighbour.ip.is_ipv4() == v4));
        assert!(findings.is_empty(), "{findings:?}");
    }
}

/// IPv4 with `src`; IPv6 only where several addresses are usable, and never a tentative one.
#[test]
fn sources_of_underlay_routes() {
    let pod = |text: &str, usable| PodAddress { addr: addr(text), usable };
    let cases = [
        (vec![pod("192.168.7.5", true), pod("192.168.7.6", true)], "10.50.0.0/16", Some("192.168.7.5")),
        (vec![pod("192.168.7.5", false), pod("192.168.7.6", true)], "10.50.0.0/16", Some("192.168.7.6")),
        (vec![pod("fd07::5", true)], "fd50::/64", None),
        (vec![pod("fd07::5", false)], "fd50::/64", None),
        (vec![pod("fd07::5", true), pod("fd07::6", true)], "fd50::/64", Some("fd07::5")),
        (vec![pod("fd07::5", true), pod("fd07::6", false)], "fd50::/64", None),
        (vec![pod("fd07::4", false), pod("fd07::5", true), pod("fd07::6", true)], "fd50::/64", Some("fd07::5")),
        (vec![pod("fd07::5", false), pod("fd07::6", false)], "fd50::/64", None),
    ];
    for (addresses, dst, src) in cases {
        let mut world = underlay();
        world.pod.addresses.clone_from(&addresses);
        let (wanted, _) = world.wanted().unwrap();
        assert_eq!(route(&wanted, dst).src, src.map(addr), "{addresses:?}");
        // Every address can be reached from the node, usable or not yet.
        let hosts: Vec<_> = wanted.node_routes.iter().map(|route| route.dst.addr()).collect();
        assert_eq!(hosts, addresses.iter().map(|address| address.addr).collect::<Vec<_>>());
    }
}

/// Rule 2: always host routes by the veth; excludes never beat it; with the node's own MTU.
#[test]
fn node_addresses_are_always_host_routes() {
    let worlds = [
        ("inside a connected subnet", {
            let mut world = underlay();
            world.node.addresses.push(addr("192.168.7.200"));
            world
        }),
        ("excluded", underlay().key("excludeCIDR", json!(["0.0.0.0/0", "::/0"]))),
        ("excluded by annotation", underlay().annotation("exclude-cidr", "10.6.0.2,fd06::2,10.6.0.0/24")),
        ("no clusters", underlay().key("hijack", json!("none"))),
        ("claimed by a cluster", underlay().remote("cluster-c", &["10.6.0.2/32", "fd06::2/128"], Some(1300))),
        ("named", underlay().key("hijackCIDR", json!(["10.6.0.2", "fd06::2"]))),
        ("inside a remote CIDR", underlay().remote("cluster-c", &["10.0.0.0/8", "fd00::/8"], None)),
    ];
    for (what, world) in worlds {
        let (wanted, _) = world.wanted().unwrap();
        for node in &world.node.addresses {
            let routes: Vec<_> = wanted.routes(Side::Pod).filter(|route| route.dst == (*node).into()).collect();
            assert_eq!(routes.len(), 1, "{what}: {node}");
            assert_eq!((routes[0].dev.as_str(), routes[0].mtu), ("veth0", None), "{what}: {node}");
            assert!(routes[0].via.is_some_and(|via| via != *node), "{what}: {node}");
        }
    }
    // In overlay the pod's CNI cares for the node; and there is no route to the pod itself.
    assert!(overlay().wanted().unwrap().0.pod_routes.iter().all(|wanted| wanted.route.dst != net("10.6.0.2")));
    let mut shared = underlay();
    shared.node.addresses.push(addr("192.168.7.5"));
    assert!(shared.wanted().unwrap().0.pod_routes.iter().all(|wanted| wanted.route.dst != net("192.168.7.5")));
}

#[test]
fn configured_name_and_mtu_of_the_veth() {
    let (wanted, _) = underlay().key("vethName", json!("xl0")).key("vethMTU", json!(1300)).wanted().unwrap();
    let veth = wanted.veth.clone().unwrap();
    assert_eq!((veth.pod.as_str(), veth.mtu), ("xl0", 1300));
    assert!(wanted.routes(Side::Pod).all(|route| route.dev == "xl0"));
    assert!(wanted.sysctls.iter().all(|want| !want.sysctl.key.contains("veth0")));
}

#[test]
fn a_node_without_an_address_of_a_family_is_a_finding() {
    let mut world = underlay();
    world.node.addresses.retain(IpAddr::is_ipv4);
    let (wanted, findings) = world.wanted().unwrap();
    assert!(noted(&findings, Id::NodeAddresses, "IPv6") && findings.len() == 1, "{findings:?}");
    let host = wanted.node_routes.iter().find(|route| route.dst == net("fd07::5")).unwrap();
    assert_eq!(host.src, None);
}

#[test]
fn routes_say_whom_they_serve() {
    let world = overlay().key("hijackCIDR", json!(["10.60.0.0/16"])).annotation("hijack-cidr", "10.61.0.0/16");
    let (wanted, _) = world.wanted().unwrap();
    let whose = |dst: &str| {
        let found = wanted.pod_routes.iter().find(|wanted| wanted.route.dst == net(dst)).unwrap();
        (found.cluster.as_deref(), found.named.as_deref())
    };
    assert_eq!(whose("10.50.0.0/16"), (Some("cluster-b"), None));
    assert_eq!(whose("10.60.0.0/16"), (None, Some("hijackCIDR")));
    assert_eq!(whose("10.61.0.0/16"), (None, Some("annotation crosslink.dev/hijack-cidr")));
}

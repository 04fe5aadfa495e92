//! What `System` makes of the real kernel, and the real kernel of it: routes, links, rules, neighbours, sysctls.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "support/bed.rs"]
mod bed;

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, process::Command, time::Duration};

use bed::{Bed, add, route, to};
use crosslink_core::{
    model::{Change, Family, Neighbour, Rule, Side, Sysctl, Veth},
    numbers::{PROTOCOL, TABLE_PODS},
};
use crosslink_kernel::{Error, Kernel, NodeQuery, PodQuery, System};
use crosslink_testkit::{Netns, in_netns};
use nix::errno::Errno;

/// Routes as crosslink makes them, and what `ip` has to say of them.
const ROUTES: [(&str, &str); 9] = [
    ("172.111.0.0/16 via 10.88.0.1 dev eth0", "172.111.0.0/16 via 10.88.0.1 dev eth0 proto 141 onlink"),
    (
        "10.1.0.0/16 via 169.254.1.1 dev eth0 src 10.88.0.5",
        "10.1.0.0/16 via 169.254.1.1 dev eth0 proto 141 src 10.88.0.5 onlink",
    ),
    ("10.2.0.0/16 via 10.88.0.1 dev eth0 mtu 1400", "10.2.0.0/16 via 10.88.0.1 dev eth0 proto 141 onlink mtu 1400"),
    ("10.3.0.0/16 via fe80::b dev eth0", "10.3.0.0/16 via inet6 fe80::b dev eth0 proto 141 onlink"),
    ("10.4.0.0/16 dev eth0", "10.4.0.0/16 dev eth0 proto 141 scope link"),
    ("10.5.0.1/32 dev eth0 src 10.88.0.5", "10.5.0.1 dev eth0 proto 141 scope link src 10.88.0.5"),
    ("fd11::/64 via fd88::1 dev eth0", "fd11::/64 via fd88::1 dev eth0 proto 141 metric 1024 onlink"),
    (
        "fd12::/64 via fe80::8d:1 dev eth0 src fd88::5 mtu 1280",
        "fd12::/64 via fe80::8d:1 dev eth0 proto 141 src fd88::5 metric 1024 onlink mtu 1280",
    ),
    ("fd13::1/128 dev eth0", "fd13::1 dev eth0 proto 141 metric 1024"),
];

#[test]
fn routes_make_the_round_trip() {
    let bed = Bed::new();
    bed.must(&ROUTES.map(|(text, _)| add(text)));
    let state = bed.pod_state();
    let lines = bed.pod.ip("-4 route show proto 141") + &bed.pod.ip("-6 route show proto 141");
    // `show proto` leaves the protocol out.
    let lines: Vec<&str> = lines.lines().map(str::trim).collect();
    for (text, shown) in ROUTES {
        let seen = to(&state, text.split(' ').next().unwrap());
        assert!(seen.len() == 1 && seen[0].same_as(&route(text)) && seen[0].protocol == PROTOCOL, "{text}: {seen:?}");
        let shown = shown.replace(" proto 141", "");
        assert!(lines.iter().any(|line| line.replace(" pref medium", "").trim() == shown), "{shown}: {lines:#?}");
    }
    assert_eq!(lines.len(), ROUTES.len());
    bed.must(&ROUTES.map(|(text, _)| Change::DeleteRoute(Side::Pod, route(text))));
    assert_eq!(bed.pod.ip("route show proto 141") + &bed.pod.ip("-6 route show proto 141"), "");
    // What is gone need not be deleted.
    bed.must(&ROUTES.map(|(text, _)| Change::DeleteRoute(Side::Pod, route(text))));
}

#[test]
fn routes_are_replaced_in_place() {
    let bed = Bed::new();
    bed.must(&ROUTES.map(|(text, _)| add(text)));
    for (text, _) in ROUTES {
        let (old, mut new) = (route(text), route(text));
        new.mtu = Some(1350);
        bed.must(&[Change::ReplaceRoute(Side::Pod, new.clone(), old)]);
        let state = bed.pod_state();
        let seen = to(&state, &new.dst.to_string());
        assert!(seen.len() == 1 && seen[0].same_as(&new), "{seen:?}");
    }
    let foreign = "10.9.0.0/16 via 10.88.0.9 dev eth0 proto static metric 5";
    bed.pod.ip(&format!("route add {foreign}"));
    bed.must(&[Change::DeleteRoute(Side::Pod, route("10.9.0.0/16 via 10.88.0.9 dev eth0"))]);
    assert!(bed.pod.ip("route show 10.9.0.0/16").contains("10.88.0.9"), "another owner's route is not deleted");
}

#[test]
fn node_routes_are_in_their_table() {
    let bed = Bed::new();
    let texts = ["10.88.0.5/32 dev host0 src 10.88.0.1 table 1410", "fd88::5/128 dev host0 src fd88::1 table 1410"];
    assert!(bed.node_state().routes.iter().all(|seen| seen.route.table != TABLE_PODS), "a table never used");
    let rules =
        [Family::V4, Family::V6].map(|family| Change::AddRule(Rule { family, priority: 1410, table: TABLE_PODS }));
    bed.must(&texts.map(|text| Change::AddRoute(Side::Node, route(text))));
    bed.must(&rules);
    bed.must(&rules);
    let state = bed.node_state();
    for text in texts {
        assert_eq!(state.routes.iter().filter(|seen| seen.same_as(&route(text))).count(), 1, "{text}: {state:#?}");
    }
    assert_eq!(bed.node.ip("rule show priority 1410"), "1410:\tfrom all lookup 1410 proto 141\n");
    assert_eq!(bed.node.ip("-6 rule show priority 1410"), "1410:\tfrom all lookup 1410 proto 141\n");
}

/// Routes of other owners; a kernel may lack some kinds.
const FOREIGN: &[&str] = &[
    "-4 route add default nexthop via 10.88.0.1 dev eth0 weight 3 nexthop via 10.88.0.2 dev eth0",
    "-6 route add default nexthop via fd88::1 dev eth0 nexthop via fd88::2 dev eth0",
    "-4 route add blackhole 192.0.2.0/26",
    "-4 route add unreachable 192.0.2.64/26 metric 4278198272",
    "-4 route add prohibit 192.0.2.128/26",
    "-4 route add throw 192.0.2.192/26",
    "-6 route add blackhole 2001:db8:1::/48",
    "-6 route add unreachable 2001:db8:2::/48",
    "-6 route add prohibit 2001:db8:3::/48",
    "-6 route add throw 2001:db8:4::/48",
    "-4 route add local 192.0.3.0/24 dev lo table main",
    "-4 route add broadcast 192.0.4.255 dev eth0 table main",
    "-4 route add multicast 239.1.0.0/16 dev eth0",
    "-6 route add multicast ff05::/16 dev eth0 table main",
    "-6 route add anycast 2001:db8:5::1 dev eth0",
    "-4 route add 198.51.100.0/24 via inet6 fe80::9 dev eth0 metric 9",
    "-4 route add 198.51.101.0/24 via 10.88.0.9 mtu lock 1300 advmss 1200 rtt 10ms window 1000 initcwnd 9 quickack 1 congctl reno",
    "-6 route add 2001:db8:6::/48 via fd88::9 mtu 1300 hoplimit 9 expires 600 pref high",
    "-4 route add 198.51.102.0/24 dev eth0 tos 0x10 realm 5",
    "-4 route add 198.51.103.0/24 via 10.99.0.1 dev eth0 onlink",
    "-4 nexthop add id 1 via 10.88.0.9 dev eth0",
    "-4 nexthop add id 2 via 10.88.0.8 dev eth0",
    "nexthop add id 3 group 1/2",
    "nexthop add id 4 blackhole",
    "-6 nexthop add id 5 via fe80::5 dev eth0",
    "-4 route add 198.51.104.0/24 nhid 1",
    "-4 route add 198.51.105.0/24 nhid 3",
    "-4 route add 198.51.106.0/24 nhid 4",
    "-4 route add 198.51.107.0/24 nhid 5",
    "-6 route add 2001:db8:7::/48 nhid 5",
    "-4 route add 198.51.108.0/24 encap mpls 100/200 via 10.88.0.9 dev eth0",
    "-4 route add 198.51.109.0/24 encap ip id 7 dst 10.0.0.9 ttl 3 dev eth0",
    "-6 route add 2001:db8:8::/48 encap seg6 mode encap segs fd00::a,fd00::b dev eth0",
    "-6 route add 2001:db8:9::/48 encap seg6local action End.X nh6 fd88::9 dev eth0",
    "-6 route add 2001:db8:a::/48 encap ioam6 trace prealloc type 0x800000 ns 1 size 12 dev eth0",
    "-4 route add 198.51.110.0/24 dev eth0 table 100",
    "-4 route add 198.51.111.0/24 dev eth0 table 4000000000",
    "-6 route add 2001:db8:b::/48 from fd88::/64 via fd88::9 dev eth0",
];

#[test]
fn routes_of_every_kind_do_not_break_observation() {
    let bed = Bed::new();
    bed.must(&ROUTES.map(|(text, _)| add(text)));
    for args in FOREIGN {
        let output = Command::new("ip").args(["-n", bed.pod.name()]).args(args.split(' ')).output().unwrap();
        if !output.status.success() {
            println!("not on this kernel: ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    // Cached exceptions: a path MTU learned by an ICMP error is none that a dump shows by default; `get` clones.
    bed.pod.ip("route get 198.51.101.1");
    let state = bed.pod_state();
    for (text, _) in ROUTES {
        let seen = to(&state, text.split(' ').next().unwrap());
        assert!(seen.len() == 1 && seen[0].same_as(&route(text)), "{text}: {seen:?}");
    }
    for (dst, unicast, multipath) in [
        ("0.0.0.0/0", true, true),
        ("192.0.2.0/26", false, false),
        ("192.0.2.64/26", false, false),
        ("192.0.2.128/26", false, false),
        ("192.0.2.192/26", false, false),
        ("2001:db8:1::/48", false, false),
        // These hold their prefix and metric too, so that one of ours could not be added.
        ("192.0.3.0/24", false, false),
        ("239.1.0.0/16", false, false),
        ("198.51.101.0/24", true, false),
        ("198.51.103.0/24", true, false),
    ] {
        let seen = to(&state, dst);
        assert!(seen.len() == 1 && (seen[0].unicast, seen[0].multipath) == (unicast, multipath), "{dst}: {seen:?}");
    }
    assert!(!to(&state, "::/0").is_empty());
    assert_eq!(to(&state, "198.51.101.0/24")[0].route.mtu, Some(1300));
    assert_eq!(to(&state, "198.51.100.0/24")[0].route.via, Some("fe80::9".parse().unwrap()));
    assert_eq!((to(&state, "198.51.100.0/24")[0].metric, to(&state, "198.51.100.0/24")[0].protocol), (9, 3));
    for dst in ["198.51.110.0/24", "198.51.111.0/24"] {
        assert!(to(&state, dst).is_empty(), "{dst} is no route of the main table");
    }
}

/// A route through a nexthop object of a group or a blackhole must not look like a plain one.
#[test]
fn routes_by_nexthop_objects_are_told_as_they_are() {
    let bed = Bed::new();
    for args in FOREIGN.iter().filter(|args| args.contains("nexthop add") || args.contains("nhid")) {
        let output = Command::new("ip").args(["-n", bed.pod.name()]).args(args.split(' ')).output().unwrap();
        if !output.status.success() {
            assert!(std::env::var_os("CI").is_none(), "not on this kernel: {args}");
            println!("skipped, not on this kernel: {args}: {}", String::from_utf8_lossy(&output.stderr));
            return;
        }
    }
    let state = bed.pod_state();
    let one = |dst| to(&state, dst)[0].clone();
    assert!(one("198.51.104.0/24").same_as(&route("198.51.104.0/24 via 10.88.0.9 dev eth0")));
    assert!(one("198.51.105.0/24").multipath, "{:?}", one("198.51.105.0/24"));
    // Another family's prefix finds nothing here, a blackhole object has no device.
    assert!(!one("198.51.106.0/24").same_as(&route("198.51.106.0/24 dev eth0")));
    assert_eq!(one("2001:db8:7::/48").route.via, Some("fe80::5".parse().unwrap()));
}

#[test]
fn links_of_every_kind() {
    let bed = Bed::new();
    let kinds = [
        "dummy",
        "bridge",
        "ifb",
        "vlan id 7",
        "macvlan",
        "macvtap",
        "ipvlan",
        "ipvtap",
        "vxlan id 1 dstport 4789",
        "geneve id 1 remote 10.0.0.1",
        "vrf table 10",
        "bond",
        "team",
        "gre local 10.88.0.5",
        "gretap local 10.88.0.5",
        "sit local 10.88.0.5",
        "ipip local 10.88.0.5",
        "ip6tnl local fd88::5",
        "ip6gre local fd88::5",
        "vti key 1",
        "wireguard",
        "netkit",
        "nlmon",
        "vcan",
        "xfrm if_id 1",
        "macsec",
        "hsr slave1 eth0 slave2 lo",
        "bareudp dstport 6635 ethertype mpls_uc",
    ];
    let mut made = Vec::new();
    for (place, kind) in kinds.iter().enumerate() {
        let name = kind.split(' ').next().unwrap();
        let on = if ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"].contains(&name) {
            "link eth0 "
        } else {
            ""
        };
        let args = format!("link add {on}name t{place} type {kind}");
        let output = Command::new("ip").args(["-n", bed.pod.name()]).args(args.split(' ')).output().unwrap();
        match output.status.success() {
            true => made.push((format!("t{place}"), name)),
            false => println!("not on this kernel: {kind}: {}", String::from_utf8_lossy(&output.stderr).trim()),
        }
    }
    println!("made: {made:?}");
    assert!(made.len() > 3, "{made:?}");
    let state = bed.pod_state();
    let shown = bed.pod.json("link show");
    for (name, kind) in &made {
        let link = state.link(name).unwrap_or_else(|| panic!("{kind} is not seen"));
        assert_eq!(link.kind.as_deref(), Some(*kind));
        let shown = shown.as_array().unwrap().iter().find(|shown| shown["ifname"] == name.as_str()).unwrap();
        assert_eq!(
            (u64::from(link.mtu), u64::from(link.index)),
            (shown["mtu"].as_u64().unwrap(), shown["ifindex"].as_u64().unwrap())
        );
    }
    assert!(state.link("lo").is_some_and(|link| link.loopback && link.kind.is_none()));
}

#[test]
fn odd_interface_names() {
    let bed = Bed::new();
    for name in ["eth0.100", "é.ü", "..x", "a-b_c.d"] {
        bed.pod.ip(&format!("link add {name} type bridge"));
        let key = format!("ipv4/conf/{name}/rp_filter");
        bed.must(&[
            Change::SetUp(Side::Pod, name.to_owned()),
            Change::SetMtu(Side::Pod, name.to_owned(), 1400),
            Change::SetSysctl(Sysctl { side: Side::Pod, key: key.clone(), value: "2".to_owned() }, None),
            Change::AddAddress(name.to_owned(), "169.254.141.2".parse().unwrap()),
            add(&format!("10.7.0.0/16 via 169.254.141.1 dev {name}")),
        ]);
        assert_eq!(bed.pod.read_sysctl(&format!("net/{key}")), "2");
        let state = bed.pod_state();
        assert_eq!(to(&state, "10.7.0.0/16")[0].route.dev, name);
        assert!(state.link(name).is_some_and(|link| link.up && link.mtu == 1400));
        bed.pod.ip(&format!("link del {name}"));
    }
    // Bytes that are no text: nobody has to name them, but nothing may stop at them.
    let raw = OsStr::from_bytes(b"\xff\xfe.\x80");
    let made =
        Command::new("ip").args(["-n", bed.pod.name(), "link", "add"]).arg(raw).args(["type", "bridge"]).status();
    assert!(made.unwrap().success());
    bed.must(&ROUTES.map(|(text, _)| add(text)));
    assert_eq!(bed.pod_state().links.len(), 3);
}

#[test]
fn a_rule_with_a_selector_is_another_rule() {
    let bed = Bed::new();
    let selectors = [
        "from 10.0.0.0/8",
        "to 10.0.0.0/8",
        "iif lo",
        "oif lo",
        "fwmark 1",
        "fwmark 0x10/0xf0",
        "tos 0x10",
        "uidrange 0-0",
        "ipproto tcp",
        "sport 53",
        "dport 53",
        "not from all",
        "suppress_prefixlength 0",
        "suppress_ifgroup 3",
        "l3mdev",
        "tun_id 5",
    ];
    for (family, selector) in ["-4", "-6"].into_iter().flat_map(|family| selectors.map(|selector| (family, selector))) {
        let selector = if family == "-6" { selector.replace("10.0.0.0/8", "fd00::/8") } else { selector.to_owned() };
        let table = if selector == "l3mdev" { "" } else { " lookup 1410" };
        let args = format!("{family} rule add {selector} priority 1410{table}");
        let output = Command::new("ip").args(["-n", bed.node.name()]).args(args.split(' ')).output().unwrap();
        if !output.status.success() {
            println!("not on this kernel: {args}: {}", String::from_utf8_lossy(&output.stderr).trim());
            continue;
        }
        let found: Vec<Rule> = bed.rules().into_iter().filter(|rule| rule.priority == 1410).collect();
        assert!(found.is_empty(), "{args}: {found:?}");
        bed.node.ip(&format!("{family} rule del priority 1410"));
    }
    for (family, flag) in [(Family::V4, "-4"), (Family::V6, "-6")] {
        bed.node.ip(&format!("{flag} rule add priority 1410 goto 32766"));
        bed.node.ip(&format!("{flag} rule add priority 1410 lookup 1410 iif lo"));
        let ours = Rule { family, priority: 1410, table: TABLE_PODS };
        assert!(!bed.rules().contains(&ours));
        bed.must(&[Change::AddRule(ours)]);
        assert!(bed.rules().contains(&ours));
    }
}

fn pair(mtu: u32) -> Veth {
    Veth {
        pod: "veth0".into(),
        node: "cl0123456789abc".into(),
        pod_mac: [6, 1, 2, 3, 4, 5],
        node_mac: [2, 1, 2, 3, 4, 5],
        mtu,
    }
}

#[test]
fn a_pair_across_namespaces() {
    for mtu in [1280, 1500, 9000, 65535] {
        let bed = Bed::new();
        bed.must(&[Change::CreateVeth(pair(mtu))]);
        let (inside, outside) = (bed.pod_state(), bed.node_state());
        let (pod, node) = (inside.link("veth0").unwrap(), outside.link("cl0123456789abc").unwrap());
        assert_eq!((pod.mac.as_slice(), node.mac.as_slice()), (&[6, 1, 2, 3, 4, 5][..], &[2, 1, 2, 3, 4, 5][..]));
        assert_eq!((pod.mtu, node.mtu, pod.up, node.up), (mtu, mtu, false, false));
        assert_eq!((pod.peer, node.peer), (Some(node.index), Some(pod.index)));
        assert_eq!((pod.kind.as_deref(), node.kind.as_deref()), (Some("veth"), Some("veth")));
        let again = bed.apply(&[Change::CreateVeth(pair(mtu))]);
        assert!(matches!(&again.failures[..], [(0, Error::Netlink { errno: Errno::EEXIST, .. })]), "{again:?}");
        bed.must(&[Change::DeleteNodeLink("cl0123456789abc".into()), Change::DeleteNodeLink("cl0123456789abc".into())]);
        assert!(bed.pod_state().link("veth0").is_none());
    }
}

/// A pair is made anew within one life of `System`, which has looked at the old one.
#[test]
fn a_pair_that_is_made_anew() {
    let bed = Bed::new();
    bed.must(&[Change::CreateVeth(pair(1500))]);
    let applied = bed.with(|system| {
        system.observe_pod(&PodQuery { state: true, veth: Some("veth0".into()), sysctls: Vec::new() }).unwrap();
        system.observe_node(&NodeQuery { veth: Some("cl0123456789abc".into()), ..NodeQuery::default() }).unwrap();
        system.apply(&[
            Change::DeleteNodeLink("cl0123456789abc".into()),
            Change::CreateVeth(pair(1400)),
            Change::AddAddress("veth0".into(), "169.254.141.2".parse().unwrap()),
            Change::SetUp(Side::Pod, "veth0".into()),
            Change::SetUp(Side::Node, "cl0123456789abc".into()),
        ])
    });
    assert!(applied.failures.is_empty(), "{applied:?}");
}

#[test]
fn permanent_neighbours() {
    let bed = Bed::new();
    let neighbour =
        |ip: &str, last: u8| Neighbour { dev: "eth0".into(), ip: ip.parse().unwrap(), mac: [2, 0, 0, 0, 0, last] };
    let query = PodQuery { veth: Some("eth0".into()), ..PodQuery::default() };
    let seen = |bed: &Bed| bed.with(|system| system.observe_pod(&query)).unwrap().neighbours;
    bed.pod.ip("neigh add 10.88.0.77 dev eth0 lladdr 02:00:00:00:00:77 nud reachable");
    bed.pod.ip("neigh add 10.88.0.78 dev eth0 nud failed");
    bed.pod.ip("link add other type bridge");
    bed.pod.ip("neigh add 10.88.0.79 dev other lladdr 02:00:00:00:00:79 nud permanent");
    assert_eq!(seen(&bed), []);
    for last in [1, 2] {
        let set = [neighbour("169.254.141.1", last), neighbour("fe80::8d:1", last)];
        bed.must(&set.clone().map(|one| Change::SetNeighbour(Side::Pod, one)));
        let mut found = seen(&bed);
        found.sort();
        assert_eq!(found, set);
    }
    bed.must(&[Change::SetNeighbour(Side::Pod, neighbour("10.88.0.77", 9))]);
    assert_eq!(seen(&bed).len(), 3);
}

#[test]
fn sysctls_are_of_the_side_that_was_meant() {
    let bed = Bed::new();
    let key = "ipv4/conf/all/rp_filter";
    let set = |side, value: &str| Change::SetSysctl(Sysctl { side, key: key.into(), value: value.into() }, None);
    bed.must(&[
        set(Side::Node, "1"),
        set(Side::Pod, "2"),
        Change::SetUp(Side::Pod, "eth0".into()),
        set(Side::Node, "0"),
    ]);
    assert_eq!(
        (bed.node.read_sysctl(&format!("net/{key}")), bed.pod.read_sysctl(&format!("net/{key}"))),
        ("0".into(), "2".into())
    );
    let keys = vec![key.to_owned(), "ipv6/conf/host0/accept_ra".into(), "ipv4/conf/nowhere/rp_filter".into()];
    let (node, pod) = bed.with(|system| {
        let node = system.observe_node(&NodeQuery { sysctls: keys.clone(), ..NodeQuery::default() }).unwrap();
        (node.sysctls, system.observe_pod(&PodQuery { sysctls: keys, ..PodQuery::default() }).unwrap().sysctls)
    });
    assert_eq!((node[key].as_str(), pod[key].as_str()), ("0", "2"));
    assert_eq!((node.len(), pod.len()), (2, 1), "what does not exist has no value: {node:?} {pod:?}");
    let missing = bed.apply(&[Change::SetSysctl(
        Sysctl { side: Side::Pod, key: "ipv4/conf/nowhere/rp_filter".into(), value: "1".into() },
        None,
    )]);
    assert!(missing.failures[0].1.to_string().contains("/proc/sys/net/ipv4/conf/nowhere/rp_filter"), "{missing:?}");
    for odd in ["ipv4/ip_forward", "", "core/somaxconn", "ipv4/conf/../../../kernel/x"] {
        let change = Change::SetSysctl(Sysctl { side: Side::Pod, key: odd.into(), value: "1".into() }, None);
        assert_eq!(bed.apply(&[change]).failures.len(), 1, "{odd}");
    }
}

#[test]
fn without_a_sandbox_the_pods_side_is_refused() {
    let node = Netns::create("node");
    let (seen, applied) = in_netns(node.path(), || {
        let mut system = System::new().unwrap();
        let gone = system.enter("/run/netns/nothing".as_ref(), Duration::ZERO).unwrap_err();
        assert!(gone.is_gone(), "{gone:?}");
        (system.observe_pod(&PodQuery::default()), system.apply(&[Change::SetUp(Side::Pod, "lo".into())]))
    });
    assert_eq!(seen, Err(Error::NoSandbox));
    assert_eq!(applied.failures, [(0, Error::NoSandbox)]);
}

//! What the nf_tables encoder makes of the real kernel, by nft's word, and what it reads back.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use crosslink_core::{
    model::Family,
    nft::{Action, Chain, Hook, Kind, Match, Rule, Set, Table},
};
use crosslink_kernel::{
    Error,
    conntrack::{self, Connection},
    nft::{Monitor, Nft},
};
use crosslink_testkit::{
    Netns, in_netns,
    probe::{tcp, wait_until},
    require,
    servers::serve_tcp,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

fn set(name: &str, family: Family, nets: &[&str]) -> Set {
    Set::new(name, family, &nets.iter().map(|net| net.parse::<IpNet>().unwrap()).collect())
}

fn rule(matches: Vec<Match>, action: Action) -> Rule {
    Rule { matches, action, comment: "why".to_owned() }
}

/// Every set shape, match and action that there is.
fn table() -> Table {
    let cl = || Match::InPrefix("cl".to_owned());
    let to4 = || Match::Destination(Family::V4, "four".to_owned());
    let to6 = || Match::Destination(Family::V6, "six".to_owned());
    let pre = vec![rule(vec![cl(), to4()], Action::Return), rule(vec![cl(), to6(), Match::Invalid], Action::Notrack)];
    let post = vec![
        rule(vec![cl(), Match::Dnat, to4()], Action::Snat("10.9.0.1".parse().unwrap())),
        rule(vec![cl(), Match::Dnat, to6()], Action::Snat("fd99::1".parse().unwrap())),
        rule(vec![Match::Source(Family::V4, "ends".to_owned()), to4()], Action::KeepSource(Family::V4)),
        rule(vec![Match::Source(Family::V6, "six".to_owned()), to6()], Action::KeepSource(Family::V6)),
        rule(vec![cl(), Match::Dnat], Action::Masquerade),
        rule(vec![Match::Named(Family::V4, "four".to_owned())], Action::KeepSource(Family::V4)),
        rule(vec![Match::Named(Family::V6, "six".to_owned())], Action::KeepSource(Family::V6)),
    ];
    let chain = |name: &str, kind, hook, priority, rules| Chain { name: name.to_owned(), kind, hook, priority, rules };
    Table {
        name: "crosslink".to_owned(),
        sets: vec![
            set("four", Family::V4, &["172.111.0.0/16", "10.243.0.0/18", "10.1.2.3/32"]),
            set("ends", Family::V4, &["0.0.0.0/8", "255.0.0.0/8"]),
            set("six", Family::V6, &["fd11::/64", "fd43::/112", "ffff::/16"]),
            set("none", Family::V6, &[]),
        ],
        chains: vec![
            chain("prerouting", Kind::Filter, Hook::Prerouting, -150, pre),
            chain("preserve-source", Kind::Nat, Hook::Postrouting, 99, post),
        ],
    }
}

const LISTED: &str = r#"table inet crosslink {
	set four {
		type ipv4_addr
		flags constant,interval
		elements = { 10.1.2.3, 10.243.0.0/18,
			     172.111.0.0/16 }
	}

	set ends {
		type ipv4_addr
		flags constant,interval
		elements = { 0.0.0.0/8, 255.0.0.0/8 }
	}

	set six {
		type ipv6_addr
		flags constant,interval
		elements = { fd11::/64,
			     fd43::/112,
			     ffff::/16 }
	}

	set none {
		type ipv6_addr
		flags constant,interval
	}

	chain prerouting {
		type filter hook prerouting priority mangle; policy accept;
		iifname "cl*" ip daddr @four counter packets 0 bytes 0 return comment "why"
		iifname "cl*" ip6 daddr @six ct state invalid counter packets 0 bytes 0 notrack comment "why"
	}

	chain preserve-source {
		type nat hook postrouting priority srcnat - 1; policy accept;
		iifname "cl*" ct status dnat ip daddr @four counter packets 0 bytes 0 snat ip to 10.9.0.1 comment "why"
		iifname "cl*" ct status dnat ip6 daddr @six counter packets 0 bytes 0 snat ip6 to fd99::1 comment "why"
		ip saddr @ends ip daddr @four counter packets 0 bytes 0 snat ip to ip saddr comment "why"
		ip6 saddr @six ip6 daddr @six counter packets 0 bytes 0 snat ip6 to ip6 saddr comment "why"
		iifname "cl*" ct status dnat counter packets 0 bytes 0 masquerade comment "why"
		meta nfproto ipv4 ct original ip daddr @four counter packets 0 bytes 0 snat ip to ip saddr comment "why"
		meta nfproto ipv6 ct original ip6 daddr @six counter packets 0 bytes 0 snat ip6 to ip6 saddr comment "why"
	}
}
"#;

fn list(netns: &Netns) -> String {
    String::from_utf8(netns.exec(&["nft", "list", "ruleset"]).stdout).unwrap()
}

/// Works with nf_tables in a namespace.
fn with<T: Send>(netns: &Netns, work: impl FnOnce(&mut Nft) -> T + Send) -> T {
    in_netns(netns.path(), || work(&mut Nft::open().unwrap()))
}

fn difference(netns: &Netns, table: &Table) -> Option<String> {
    with(netns, |nft| nft.difference(table).unwrap())
}

#[test]
fn nft_shows_what_was_meant() {
    if !require("nft") {
        return;
    }
    let netns = Netns::create("nft");
    netns.nft("table ip others { chain c { ip saddr 10.0.0.1 drop; }; }");
    let others = list(&netns);
    let table = table();
    assert_eq!(difference(&netns, &table).unwrap(), "table inet crosslink is missing");
    with(&netns, |nft| nft.replace(&table).unwrap());
    assert_eq!(list(&netns), format!("{others}{LISTED}"));
    assert_eq!(difference(&netns, &table), None);
    with(&netns, |nft| nft.replace(&table).unwrap());
    assert_eq!(list(&netns), format!("{others}{LISTED}"), "twice is the same as once");
    with(&netns, |nft| {
        assert!(nft.exists("crosslink").unwrap() && nft.delete("crosslink").unwrap());
        assert!(!nft.exists("crosslink").unwrap() && !nft.delete("crosslink").unwrap());
    });
    assert_eq!(list(&netns), others);
}

#[test]
fn what_others_do_to_the_table_is_seen() {
    if !require("nft") {
        return;
    }
    let netns = Netns::create("nft");
    let table = table();
    for (change, seen) in [
        ("flush ruleset", "table inet crosslink is missing"),
        ("flush table inet crosslink", "chain prerouting has 0 rules, not 2"),
        ("flush chain inet crosslink preserve-source", "chain preserve-source has 0 rules, not 7"),
        ("add rule inet crosslink prerouting accept", "chain prerouting has 3 rules, not 2"),
        (
            "insert rule inet crosslink prerouting accept\ndelete rule inet crosslink prerouting handle LAST",
            "is another",
        ),
        ("add chain inet crosslink more", "chain more is not ours"),
        ("add set inet crosslink more { type ipv4_addr; }", "set more is not ours"),
        ("add chain inet crosslink prerouting { policy drop; }", "chain prerouting is another"),
        ("add table inet crosslink { flags dormant; }", "table inet crosslink has flags 0x1"),
        (
            "delete table inet crosslink\nadd table inet crosslink\nadd chain inet crosslink prerouting",
            "chain prerouting is another",
        ),
    ] {
        with(&netns, |nft| nft.replace(&table).unwrap());
        assert_eq!(difference(&netns, &table), None);
        let text = String::from_utf8(netns.exec(&["nft", "-a", "list", "ruleset"]).stdout).unwrap();
        let line = text.lines().find(|line| line.contains("notrack")).unwrap();
        netns.nft(&change.replace("LAST", line.rsplit(' ').next().unwrap()));
        let found = difference(&netns, &table).unwrap_or_else(|| panic!("{change}: not seen"));
        assert!(found.contains(seen), "{change}: {found}");
    }
}

#[test]
fn each_part_of_the_table_counts() {
    if !require("nft") {
        return;
    }
    let netns = Netns::create("nft");
    let table = table();
    with(&netns, |nft| nft.replace(&table).unwrap());
    let change = |edit: &dyn Fn(&mut Table)| {
        let mut other = table.clone();
        edit(&mut other);
        assert_ne!(other, table);
        difference(&netns, &other).unwrap()
    };
    assert!(change(&|t| t.sets[0] = set("four", Family::V4, &["172.111.0.0/16"])).contains("set four"));
    assert!(change(&|t| t.sets[1] = set("ends", Family::V4, &["0.0.0.0/8", "254.0.0.0/8"])).contains("set ends"));
    assert!(change(&|t| drop(t.sets.pop())).contains("set none is not ours"));
    assert!(change(&|t| t.chains[0].priority = -151).contains("chain prerouting is another"));
    assert!(change(&|t| t.chains[0].hook = Hook::Postrouting).contains("chain prerouting is another"));
    assert!(change(&|t| t.chains[1].kind = Kind::Filter).contains("chain preserve-source is another"));
    assert!(change(&|t| t.chains[1].rules.swap(0, 1)).contains("rule 1"));
    for (place, action) in [
        (0, Action::Snat("10.9.0.2".parse().unwrap())),
        (2, Action::KeepSource(Family::V6)),
        (2, Action::Masquerade),
        (4, Action::Return),
    ] {
        let found = change(&|t| t.chains[1].rules[place].action = action);
        assert_eq!(found, format!("rule {} of chain preserve-source is another", place + 1));
    }
    for (place, wanted) in [(0, Match::InPrefix("cm".to_owned())), (1, Match::Invalid)] {
        assert!(change(&|t| t.chains[1].rules[0].matches[place] = wanted.clone()).contains("rule 1"));
    }
}

/// The fleet that a node may know: 5,000 clusters with four CIDRs each.
#[test]
fn sets_may_be_large() {
    if !require("nft") {
        return;
    }
    let netns = Netns::create("nft");
    let v4 = (0..20_000u32).map(|i| IpNet::V4(Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (i << 8)), 25).unwrap()));
    let v6 = (0..20_000u128).map(|i| IpNet::V6(Ipv6Net::new(Ipv6Addr::from((0xfd00 << 112) + (i << 65)), 64).unwrap()));
    let mut table = table();
    table.sets[0] = Set::new("four", Family::V4, &v4.collect());
    table.sets[2] = Set::new("six", Family::V6, &v6.collect());
    assert_eq!((table.sets[0].ranges.len(), table.sets[2].ranges.len()), (20_000, 20_000));
    let took = |what: &str, nft: &mut Nft, work: &dyn Fn(&mut Nft)| {
        let started = Instant::now();
        work(nft);
        println!("{what}: {:?}", started.elapsed());
    };
    with(&netns, |nft| {
        let done = nft.replace(&table);
        if let Err(err) = &done
            && err.errno() == Some(Errno::EMSGSIZE)
            && std::fs::read_to_string("/proc/self/uid_map").unwrap().split_whitespace().last() != Some("4294967295")
        {
            println!("in a user namespace the send buffer is bounded by net.core.wmem_max");
            return;
        }
        done.unwrap();
        took("replace 40,000 ranges", nft, &|nft| nft.replace(&table).unwrap());
        took("compare 40,000 ranges", nft, &|nft| assert_eq!(nft.difference(&table).unwrap(), None));
        let mut other = table.clone();
        other.sets[2].ranges[19_999].1 = other.sets[2].ranges[19_999].0;
        assert!(nft.difference(&other).unwrap().unwrap().contains("set six"));
    });
}

/// A refusal names the message, and leaves everything as it was.
#[test]
fn a_refused_table_changes_nothing() {
    if !require("nft") {
        return;
    }
    let netns = Netns::create("nft");
    let good = table();
    with(&netns, |nft| nft.replace(&good).unwrap());
    let mut bad = table();
    bad.chains[1].rules[3].matches[0] = Match::Source(Family::V6, "unknown".to_owned());
    let err = with(&netns, |nft| nft.replace(&bad).unwrap_err());
    assert_eq!(
        err,
        Error::Netlink { what: "add rule 4 of nftables chain preserve-source".to_owned(), errno: Errno::ENOENT }
    );
    assert_eq!(difference(&netns, &good), None);
    // The connection is still good.
    with(&netns, |nft| {
        assert!(nft.replace(&bad).is_err());
        nft.replace(&good).unwrap();
        assert_eq!(nft.difference(&good).unwrap(), None);
    });
}

/// Waits for the kernel's word; whether it is about what is watched.
fn told(monitor: &mut Monitor) -> bool {
    let mut fds = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(5000u16)).unwrap(), 1, "no notification");
    monitor.take().unwrap()
}

#[test]
fn notifications_are_about_our_table_alone() {
    if !require("nft") {
        return;
    }
    let netns = Netns::create("nft");
    let mut monitor = in_netns(netns.path(), || Monitor::table("crosslink").unwrap());
    assert_eq!(monitor.take().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    for other in
        ["add table inet crosslink-more", "add table ip crosslink", "add chain ip crosslink x", "flush ruleset"]
    {
        netns.nft(other);
        assert!(!told(&mut monitor), "{other}");
    }
    with(&netns, |nft| nft.replace(&table()).unwrap());
    assert!(told(&mut monitor));
    for ours in ["flush chain inet crosslink prerouting", "add chain inet crosslink x", "flush ruleset"] {
        netns.nft(ours);
        assert!(told(&mut monitor), "{ours}");
    }
    // More than the socket holds: what was lost may have been about us.
    for _ in 0..200 {
        netns.nft(&format!(
            "add table ip x\nadd set ip x s {{ type ipv4_addr; }}\n{}delete table ip x",
            "add element ip x s { 10.0.0.1 }\n".repeat(200)
        ));
    }
    assert!(told(&mut monitor));
}

#[test]
fn notifications_are_about_global_addresses() {
    let netns = Netns::create("nft");
    let mut monitor = in_netns(netns.path(), || Monitor::addresses().unwrap());
    netns.ip("link add v0 type veth peer name v1");
    netns.ip("addr add 169.254.1.1/32 dev v0 scope link");
    assert!(!told(&mut monitor));
    netns.ip("addr add 10.0.0.1/24 dev v0");
    assert!(told(&mut monitor));
    netns.ip("addr add fd00::1/64 dev v0 nodad");
    netns.ip("link set v0 up");
    netns.ip("link set v1 up");
    assert!(told(&mut monitor));
}

/// A node that masquerades between two others, so that its conntrack has something to tell.
fn masquerading() -> [Netns; 3] {
    let [left, node, right] = ["left", "node", "right"].map(Netns::create);
    for (end, dev, n) in [(&left, "lan1", 1), (&right, "lan2", 2)] {
        node.ip(&format!("link add {dev} type veth peer name eth0 netns {}", end.name()));
        node.ip(&format!("addr add 10.0.{n}.1/24 dev {dev}"));
        node.ip(&format!("addr add fd0{n}::1/64 dev {dev} nodad"));
        node.ip(&format!("link set {dev} up"));
        end.ip(&format!("addr add 10.0.{n}.2/24 dev eth0"));
        end.ip(&format!("addr add fd0{n}::2/64 dev eth0 nodad"));
        end.ip("link set eth0 up");
        end.ip(&format!("route add default via 10.0.{n}.1"));
        end.ip(&format!("-6 route add default via fd0{n}::1"));
    }
    node.sysctl("net.ipv4.ip_forward", "1");
    node.sysctl("net.ipv6.conf.all.forwarding", "1");
    for netns in [&left, &node, &right] {
        wait_until("no address is tentative", Duration::from_secs(10), || {
            netns.ip("-6 addr show tentative").is_empty()
        });
    }
    node.nft("table inet nat { chain c { type nat hook postrouting priority srcnat; oifname \"lan2\" masquerade; }; }");
    [left, node, right]
}

#[test]
fn connections_are_found_and_deleted_by_their_addresses() {
    if !require("nft") {
        return;
    }
    let [left, node, right] = masquerading();
    let _server = serve_tcp(&right, "[::]:80");
    for (to, seen) in [("10.0.2.2:80", "10.0.2.1"), ("[fd02::2]:80", "fd02::1")] {
        assert_eq!(tcp(&left, to.parse().unwrap()).unwrap(), seen);
    }
    let connections = || {
        let all = std::sync::Mutex::new(Vec::new());
        let count = in_netns(node.path(), || {
            conntrack::delete(100, |connection| {
                all.lock().unwrap().push(*connection);
                false
            })
        });
        assert_eq!(count.unwrap(), 0);
        all.into_inner().unwrap()
    };
    let connection = |[source, destination, responder, answered]: [&str; 4]| Connection {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        responder: responder.parse().unwrap(),
        answered: answered.parse().unwrap(),
    };
    let v4 = connection(["10.0.1.2", "10.0.2.2", "10.0.2.2", "10.0.2.1"]);
    let v6 = connection(["fd01::2", "fd02::2", "fd02::2", "fd02::1"]);
    let all = connections();
    assert!(all.contains(&v4) && all.contains(&v6), "{all:?}");
    let delete = |wanted: Connection, limit| {
        in_netns(node.path(), || conntrack::delete(limit, |connection| *connection == wanted)).unwrap()
    };
    assert_eq!(delete(v4, 0), 0, "the limit holds");
    assert_eq!(delete(v4, 100), 1);
    let left_over = connections();
    assert!(!left_over.contains(&v4) && left_over.contains(&v6), "{left_over:?}");
    assert_eq!(delete(v6, 100), 1);
    assert_eq!(delete(v6, 100), 0);
}

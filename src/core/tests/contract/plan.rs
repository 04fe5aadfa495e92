//! `plan`, `drift` and `teardown` against a small kernel: what one ADD, CHECK or DEL does to it.

use std::collections::BTreeSet;

use crosslink_core::{
    facts::Attached,
    model::{Change, Link, Observed, ObservedRoute, Route, Rule, Side, Sysctl},
    numbers::{PROTOCOL, TABLE_PODS},
    plan::{Context, Plan, drift, plan, teardown_unrecorded},
    wanted::Wanted,
};
use ipnet::IpNet;
use serde_json::json;

use crate::{
    kernel::Kernel,
    support::{BOTH, World, addr, foreign, net, torn_down, untouched},
};

const CIDRS: [&str; 4] = ["10.50.0.0/16", "10.51.0.0/16", "fd50::/64", "fd51::/64"];

fn wanted(attached: Attached, cidrs: &[&str], mtu: Option<u32>) -> Wanted {
    World::new(attached).remote("cluster-b", cidrs, mtu).wanted().unwrap().0
}

fn planned(wanted: &Wanted, kernel: &Kernel) -> Plan {
    plan(wanted, &kernel.seen, Context { ifname: "eth0", previous: None, saved: &[], claimed: &BTreeSet::new() })
}

/// Plans and applies: an ADD of an attachment that `previous` made.
fn add(kernel: &mut Kernel, wanted: &Wanted, previous: Option<&Wanted>) -> Plan {
    let plan = plan(wanted, &kernel.seen, Context { ifname: "eth0", previous, saved: &[], claimed: &BTreeSet::new() });
    kernel.apply(&plan.changes).unwrap_or_else(|err| panic!("{err}\n{plan:#?}"));
    plan
}

fn added(attached: Attached) -> (Kernel, Wanted) {
    let (mut kernel, wanted) = (Kernel::new(untouched()), wanted(attached, &CIDRS, Some(1400)));
    add(&mut kernel, &wanted, None);
    (kernel, wanted)
}

fn drifted(wanted: &Wanted, observed: &Observed) -> Vec<String> {
    drift(wanted, observed, &BTreeSet::new())
}

fn assert_settled(kernel: &Kernel, wanted: &Wanted, why: &str) {
    assert_eq!(kernel.moot, 0, "{why}: changes that hit nothing");
    assert_eq!(planned(wanted, kernel), Plan::default(), "{why}: another ADD would change something");
    assert_eq!(drifted(wanted, &kernel.seen), Vec::<String>::new(), "{why}: CHECK would fail");
}

/// Routes of ours in the pod's main table.
fn ours(kernel: &Kernel) -> BTreeSet<IpNet> {
    kernel.seen.pod.routes.iter().filter(|seen| seen.ours()).map(|seen| seen.route.dst).collect()
}

/// What an ADD keeps for DEL: the old values of what it changed and does not own.
pub fn saved(wanted: &Wanted, plan: &Plan) -> Vec<Sysctl> {
    let old = plan.changes.iter().filter_map(|change| match change {
        Change::SetSysctl(new, Some(old)) if wanted.sysctls.iter().any(|w| w.restore && w.sysctl == *new) => {
            Some(Sysctl { value: old.clone(), ..new.clone() })
        }
        _ => None,
    });
    old.collect()
}

#[test]
fn add_makes_everything_and_a_second_one_nothing() {
    for attached in BOTH {
        for mtu in [None, Some(1400)] {
            let (mut kernel, wanted) = (Kernel::new(untouched()), wanted(attached, &CIDRS, mtu));
            assert!(!drifted(&wanted, &kernel.seen).is_empty(), "CHECK before ADD");
            let plan = add(&mut kernel, &wanted, None);
            assert!(plan.conflicts.is_empty() && plan.identical.is_empty() && plan.foreign_veth.is_none());
            assert_settled(&kernel, &wanted, "first ADD");
            assert_eq!(ours(&kernel), wanted.routes(Side::Pod).map(|route| route.dst).collect());
        }
    }
}

/// Conformance 11 and 12: a second ADD converges to the list as it is now; what was there before stays as it was.
#[test]
fn a_second_add_converges_to_the_new_list() {
    for attached in BOTH {
        let lists: [(&[&str], Option<u32>); 5] = [
            (&CIDRS[..1], Some(1400)),
            (&CIDRS[2..], None),
            (&CIDRS, Some(1300)),
            (&["10.50.0.0/17"], None),
            (&[], None),
        ];
        let (mut kernel, mut before) = added(attached);
        for (list, mtu) in lists {
            let after = wanted(attached, list, mtu);
            let plan = add(&mut kernel, &after, Some(&before));
            assert_settled(&kernel, &after, &format!("{attached:?} {list:?}"));
            assert_eq!(ours(&kernel), after.routes(Side::Pod).map(|route| route.dst).collect());
            assert!(plan.changes.iter().all(|change| {
                matches!(change, Change::AddRoute(..) | Change::ReplaceRoute(..) | Change::DeleteRoute(..))
            }));
            // New before old: no destination is ever without its route.
            let deletion = |change: &Change| matches!(change, Change::DeleteRoute(..));
            assert!(plan.changes.is_sorted_by_key(deletion), "{:?}", plan.changes);
            before = after;
        }
    }
}

/// 4.7: a conflict is any foreign route to the same prefix in the same table, whatever its metric.
#[test]
fn foreign_routes_are_conflicts_and_never_touched() {
    let kinds: [fn(&mut ObservedRoute); 5] = [
        |_| {},
        |seen| seen.multipath = true,
        |seen| seen.route.mtu = Some(1280),
        |seen| seen.route.dev = "net1".to_owned(),
        |seen| seen.route.src = Some(seen.route.dst.addr()),
    ];
    for (attached, cidr, metric, protocol, kind) in BOTH
        .into_iter()
        .flat_map(|attached| CIDRS.map(|cidr| (attached, cidr)))
        .flat_map(|(attached, cidr)| [0, 50, 1024, u32::MAX].map(|metric| (attached, cidr, metric)))
        .flat_map(|(attached, cidr, metric)| [2, 3, 4, 12, 186].map(|protocol| (attached, cidr, metric, protocol)))
        .enumerate()
        .map(|(place, (attached, cidr, metric, protocol))| (attached, cidr, metric, protocol, kinds[place % 5]))
    {
        let via = if cidr.contains(':') { "fd07::9" } else { "192.168.7.9" };
        let mut other = foreign(cidr, Some(via), "eth0", (protocol, metric));
        kind(&mut other);
        let mut kernel = Kernel::new(untouched());
        kernel.seen.pod.routes.push(other.clone());
        let wanted = wanted(attached, &CIDRS, None);
        let plan = add(&mut kernel, &wanted, None);
        let conflicts: Vec<_> =
            plan.conflicts.iter().map(|found| (found.side, found.wanted.dst, &found.existing)).collect();
        assert_eq!(conflicts, [(Side::Pod, net(cidr), &other)]);
        assert!(kernel.seen.pod.routes.contains(&other), "touched: {other:?}");
        assert!(!ours(&kernel).contains(&net(cidr)), "shadowed: {other:?}");
        assert_eq!(ours(&kernel).len() + 1, wanted.pod_routes.len(), "the others are there");
        let again = planned(&wanted, &kernel);
        assert!(again.changes.is_empty() && again.conflicts.len() == 1);
        let lines = drifted(&wanted, &kernel.seen);
        assert!(lines.len() == 1 && lines[0].contains(cidr), "{lines:?}");
        kernel.apply(&torn_down(&wanted, &[], &kernel.seen)).unwrap();
        assert!(kernel.seen.pod.routes.contains(&other), "DEL touched {other:?}");
    }
}

/// The same prefix in another table is no business of ours, and neither is a route of ours there.
#[test]
fn other_tables_are_left_alone() {
    for (attached, protocol) in BOTH.into_iter().flat_map(|attached| [(attached, 3), (attached, PROTOCOL)]) {
        let mut kernel = Kernel::new(untouched());
        let mut other = foreign(CIDRS[0], Some("192.168.7.9"), "eth0", (protocol, 0));
        other.route.table = 1413;
        kernel.seen.pod.routes.push(other.clone());
        let wanted = wanted(attached, &CIDRS, None);
        assert!(add(&mut kernel, &wanted, None).conflicts.is_empty());
        assert_settled(&kernel, &wanted, "another table");
        kernel.apply(&torn_down(&wanted, &[], &kernel.seen)).unwrap();
        assert!(kernel.seen.pod.routes.contains(&other));
    }
}

#[test]
fn an_identical_foreign_route_is_left_and_noted() {
    for (cidr, metric) in CIDRS.into_iter().flat_map(|cidr| [0, 77, 1024].map(|metric| (cidr, metric))) {
        let wanted = wanted(Attached::Overlay, &CIDRS, Some(1400));
        let route = wanted.routes(Side::Pod).find(|route| route.dst == net(cidr)).unwrap().clone();
        let mut kernel = Kernel::new(untouched());
        let twin = ObservedRoute { route: route.clone(), protocol: 12, metric, unicast: true, multipath: false };
        kernel.seen.pod.routes.push(twin.clone());
        let plan = add(&mut kernel, &wanted, None);
        assert_eq!(plan.identical, [route]);
        assert!(plan.conflicts.is_empty() && ours(&kernel).len() == 3);
        assert_eq!(drifted(&wanted, &kernel.seen), Vec::<String>::new());
        kernel.apply(&torn_down(&wanted, &[], &kernel.seen)).unwrap();
        assert!(kernel.seen.pod.routes.contains(&twin) && ours(&kernel).is_empty());
    }
}

/// The same next hop is not the same route where it is one of several, or where the route drops what it matches.
#[test]
fn a_foreign_route_that_looks_alike_is_a_conflict() {
    let wanted = wanted(Attached::Overlay, &CIDRS, None);
    for (unicast, multipath) in [(true, true), (false, false)] {
        let route = wanted.pod_routes[0].route.clone();
        let mut kernel = Kernel::new(untouched());
        kernel.seen.pod.routes.push(ObservedRoute { route, protocol: 3, metric: 20, unicast, multipath });
        let plan = add(&mut kernel, &wanted, None);
        assert_eq!(
            (plan.conflicts.len(), plan.identical.len(), ours(&kernel).len()),
            (1, 0, 3),
            "{unicast} {multipath}"
        );
        assert_eq!(drifted(&wanted, &kernel.seen).len(), 1);
    }
}

/// Conformance 13, as far as it is pure: undone after any number of changes, the state is the one before.
#[test]
fn an_add_that_fails_anywhere_is_undone() {
    for attached in BOTH {
        let (fresh, whole) = (Kernel::new(untouched()), wanted(attached, &CIDRS, Some(1400)));
        let again = added(attached).0;
        for (before, after) in [
            (fresh, whole),
            (again.clone(), wanted(attached, &CIDRS[..2], None)),
            (again, wanted(attached, &["10.50.0.0/17", "fd51::/64"], Some(1300))),
        ] {
            let changes = planned(&after, &before).changes;
            assert!(changes.len() > 2);
            for upto in 0..=changes.len() {
                let mut kernel = before.clone();
                kernel.apply(&changes[..upto]).unwrap();
                kernel.undo(&changes[..upto]).unwrap();
                assert_eq!(kernel.snapshot(), before.snapshot(), "{attached:?}: undone after {upto} of {changes:#?}");
            }
        }
    }
}

#[test]
fn teardown_gives_back_the_state_before() {
    for (attached, hand_made) in BOTH.into_iter().flat_map(|attached| [(attached, false), (attached, true)]) {
        let mut kernel = Kernel::new(untouched());
        if hand_made {
            kernel.seen.pod.routes.push(foreign("10.51.0.0/16", Some("192.168.7.9"), "eth0", (3, 0)));
            kernel.seen.pod.routes.push(foreign("10.52.0.0/16", Some("192.168.7.9"), "eth0", (3, 0)));
        }
        let (before, wanted) = (kernel.snapshot(), wanted(attached, &CIDRS, Some(1400)));
        let plan = add(&mut kernel, &wanted, None);
        let saved = saved(&wanted, &plan);
        assert_eq!(saved.len(), usize::from(attached == Attached::Underlay), "what ADD changed on eth0: {saved:?}");
        kernel.apply(&torn_down(&wanted, &saved, &kernel.seen)).unwrap();
        assert_eq!(kernel.snapshot(), before, "{attached:?}");
        assert_eq!(kernel.seen.node.rules.is_empty(), attached == Attached::Overlay, "the rules stay for ever");
        // Repeated, or with nothing there at all.
        assert!(torn_down(&wanted, &saved, &kernel.seen).is_empty());
        assert!(torn_down(&wanted, &saved, &Observed::default()).is_empty());
    }
}

#[test]
fn teardown_removes_only_what_still_is_ours() {
    let (mut kernel, wanted) = added(Attached::Underlay);
    let old =
        |value: &str| Sysctl { side: Side::Pod, key: "ipv4/conf/eth0/rp_filter".to_owned(), value: value.to_owned() };
    let restores = |kernel: &Kernel, saved: Sysctl| {
        torn_down(&wanted, &[saved], &kernel.seen).iter().any(|change| matches!(change, Change::SetSysctl(..)))
    };
    assert!(restores(&kernel, old("1")));
    // Somebody has changed it since: theirs stays.
    kernel.seen.pod.sysctls.insert("ipv4/conf/eth0/rp_filter".to_owned(), "1".to_owned());
    assert!(!restores(&kernel, old("0")));

    let (mut kernel, wanted) = added(Attached::Overlay);
    let place = kernel.seen.pod.routes.iter().position(|seen| seen.ours()).unwrap();
    kernel.seen.pod.routes[place].protocol = 3;
    let taken = kernel.seen.pod.routes[place].clone();
    kernel.apply(&torn_down(&wanted, &[], &kernel.seen)).unwrap();
    assert!(kernel.seen.pod.routes.contains(&taken) && ours(&kernel).is_empty());
}

#[test]
fn teardown_without_a_record_takes_what_is_derivable() {
    let (kernel, wanted) = added(Attached::Underlay);
    let name = &wanted.veth.as_ref().unwrap().node;
    let mut all = kernel.clone();
    all.apply(&teardown_unrecorded(name, &kernel.seen, true)).unwrap();
    let mut expected = untouched();
    expected.pod.sysctls.insert("ipv4/conf/eth0/rp_filter".to_owned(), "2".to_owned());
    assert_eq!(all.snapshot(), Kernel::new(expected).snapshot());
    let shared = teardown_unrecorded(name, &kernel.seen, false);
    assert_eq!(shared, [Change::DeleteNodeLink(name.clone())], "another record names this sandbox: its routes stay");
    let mut other = kernel.seen;
    other
        .node
        .links
        .iter_mut()
        .filter(|link| link.name == *name)
        .for_each(|link| link.kind = Some("bridge".to_owned()));
    assert!(!teardown_unrecorded(name, &other, true).contains(&Change::DeleteNodeLink(name.clone())));
    assert!(teardown_unrecorded(name, &untouched(), true).is_empty());
}

/// Routes that records of other attachments name are ours, but not this one's.
#[test]
fn claimed_routes_are_not_touched() {
    for attached in BOTH {
        let (mut kernel, before) = added(attached);
        let other = ObservedRoute { protocol: PROTOCOL, ..foreign("10.60.0.0/16", None, "net1", (PROTOCOL, 0)) };
        kernel.seen.pod.routes.push(other.clone());
        let claimed = BTreeSet::from([net("10.60.0.0/16")]);
        let after = wanted(attached, &["10.50.0.0/16", "10.60.0.0/16"], None);
        let plan = plan(
            &after,
            &kernel.seen,
            Context { ifname: "eth0", previous: Some(&before), saved: &[], claimed: &claimed },
        );
        kernel.apply(&plan.changes).unwrap();
        assert_eq!(plan.conflicts.iter().map(|found| found.wanted.dst).collect::<Vec<_>>(), [net("10.60.0.0/16")]);
        assert!(kernel.seen.pod.routes.contains(&other), "{attached:?}");
        assert!(!ours(&kernel).contains(&net("10.51.0.0/16")), "what nobody claims goes");
    }
}

/// Conformance 14: what an earlier pod with this address left in table 1410 is replaced.
#[test]
fn stale_host_routes_and_neighbours_are_replaced() {
    let wanted = wanted(Attached::Underlay, &CIDRS, None);
    let mut kernel = Kernel::new(untouched());
    let host = |dst: &str, protocol, metric| {
        let mut seen = foreign(dst, None, "clold0000000000", (protocol, metric));
        seen.route.table = TABLE_PODS;
        seen
    };
    let other = host("192.168.7.99", PROTOCOL, 0);
    let link = Link { index: 40, name: "clold0000000000".to_owned(), up: true, ..Link::default() };
    kernel.seen.node.links.push(link);
    kernel.seen.node.routes.extend([host("192.168.7.5", PROTOCOL, 0), host("fd07::5", PROTOCOL, 1024), other.clone()]);
    add(&mut kernel, &wanted, None);
    assert_settled(&kernel, &wanted, "stale");
    let routes: Vec<_> = kernel.seen.node.routes.iter().filter(|seen| seen.route.table == TABLE_PODS).collect();
    assert_eq!(routes.len(), 3, "{routes:?}");
    assert!(routes.contains(&&other), "another pod's host route is not ours to touch");
}

#[test]
fn a_foreign_veth_is_reported() {
    let wanted = wanted(Attached::Underlay, &CIDRS, None);
    let spider =
        |peer| Link { index: 9, name: "veth0".to_owned(), kind: Some("veth".to_owned()), peer, ..Link::default() };
    for peer in [None, Some(30)] {
        let mut kernel = Kernel::new(untouched());
        kernel.seen.pod.links.push(spider(peer));
        let plan = planned(&wanted, &kernel);
        assert_eq!(plan.foreign_veth.as_deref(), Some("veth0"));
        assert!(!plan.changes.iter().any(|change| matches!(change, Change::CreateVeth(_) | Change::DeleteNodeLink(_))));
        assert!(drifted(&wanted, &kernel.seen).iter().any(|line| line.contains("veth0")));
    }
    // Neither is it ours while our node end still is there, without its peer.
    let (mut kernel, _) = added(Attached::Underlay);
    kernel.drop_link(Side::Pod, "veth0");
    kernel.seen.pod.links.push(spider(Some(30)));
    let plan = planned(&wanted, &kernel);
    assert_eq!(plan.foreign_veth.as_deref(), Some("veth0"));
    assert!(!plan.changes.iter().any(|change| matches!(change, Change::CreateVeth(_))));
    // An overlay pod does not mind.
    let mut kernel = Kernel::new(untouched());
    kernel.seen.pod.links.push(spider(None));
    assert_eq!(planned(&self::wanted(Attached::Overlay, &CIDRS, None), &kernel).foreign_veth, None);
}

/// One thing that can go wrong after an ADD, and what the message must name.
type Damage = (&'static str, fn(&mut Kernel, &str), &'static str);

/// Conformance 19 and 4.3's CHECK: each missing or changed piece is found, named, and mended by the next ADD.
#[test]
fn every_damage_is_drift_and_is_mended() {
    let underlay: [Damage; 13] = [
        ("route gone", |k, _| k.seen.pod.routes.retain(|seen| seen.route.dst != net("10.50.0.0/16")), "10.50.0.0/16"),
        ("wrong gateway", |k, _| each_route(k, |route| route.via = Some(addr("192.168.7.77"))), "169.254.141.1"),
        ("wrong mtu", |k, _| each_route(k, |route| route.mtu = Some(900)), "mtu 1400"),
        ("host route gone", |k, _| k.seen.node.routes.retain(|seen| seen.route.table != TABLE_PODS), "192.168.7.5/32"),
        ("rule gone", |k, _| k.seen.node.rules.clear(), "1410"),
        ("neighbour gone", |k, _| k.seen.pod.neighbours.clear(), "169.254.141.1"),
        ("neighbour wrong", |k, _| k.seen.node.neighbours.iter_mut().for_each(|n| n.mac = [2; 6]), "192.168.7.5"),
        ("address gone", |k, _| k.seen.pod.addresses.retain(|address| address.dev != "veth0"), "169.254.141.2"),
        ("mtu", |k, name| k.seen.node.links.iter_mut().filter(|l| l.name == name).for_each(|l| l.mtu = 9000), "MTU"),
        ("down", |k, _| k.seen.pod.links.iter_mut().filter(|l| l.name == "veth0").for_each(|l| l.up = false), "up"),
        ("sysctl", |k, _| *k.seen.pod.sysctls.get_mut("ipv4/conf/veth0/rp_filter").unwrap() = "0".into(), "rp_filter"),
        (
            "mac",
            |k, name| k.seen.node.links.iter_mut().filter(|l| l.name == name).for_each(|l| l.mac = vec![2; 6]),
            "veth",
        ),
        ("link gone", |k, name| k.apply(&[Change::DeleteNodeLink(name.to_owned())]).unwrap(), "veth"),
    ];
    for (what, damage, named) in underlay {
        let (mut kernel, wanted) = added(Attached::Underlay);
        let whole = kernel.snapshot();
        damage(&mut kernel, &wanted.veth.as_ref().unwrap().node);
        let lines = drifted(&wanted, &kernel.seen);
        assert!(lines.iter().any(|line| line.contains(named)), "{what}: {lines:?}");
        add(&mut kernel, &wanted, Some(&wanted));
        assert_settled(&kernel, &wanted, what);
        assert_eq!(kernel.snapshot(), whole, "{what}");
    }
    for (what, damage, named) in &underlay[..3] {
        let (mut kernel, wanted) = added(Attached::Overlay);
        damage(&mut kernel, "");
        let lines = drifted(&wanted, &kernel.seen);
        let named = named.replace("169.254.141.1", "192.168.7.1");
        assert!(lines.len() == 1 && lines[0].contains(&named), "{what}: {lines:?}");
        add(&mut kernel, &wanted, Some(&wanted));
        assert_settled(&kernel, &wanted, what);
    }
}

fn each_route(kernel: &mut Kernel, change: fn(&mut Route)) {
    let routes = kernel.seen.pod.routes.iter_mut();
    routes.filter(|seen| seen.route.dst == net("10.50.0.0/16")).for_each(|seen| change(&mut seen.route));
}

/// CHECK is about what was applied: more than that is no drift.
#[test]
fn surplus_is_no_drift() {
    for attached in BOTH {
        let (mut kernel, wanted) = added(attached);
        kernel.seen.pod.routes.push(foreign("10.77.0.0/16", Some("192.168.7.9"), "eth0", (3, 0)));
        kernel.seen.pod.routes.push(foreign("10.78.0.0/16", Some("192.168.7.9"), "eth0", (PROTOCOL, 0)));
        kernel.seen.node.rules.push(Rule { family: crosslink_core::model::Family::V4, priority: 5, table: 5 });
        assert_eq!(drifted(&wanted, &kernel.seen), Vec::<String>::new());
    }
}

/// A veth of an earlier ADD under another name, and a pod that is no underlay pod any more.
#[test]
fn what_an_earlier_add_made_otherwise_goes() {
    let renamed = World::new(Attached::Underlay).key("vethName", json!("xl0")).remote("cluster-b", &CIDRS[..2], None);
    let renamed = renamed.wanted().unwrap().0;
    let overlay = wanted(Attached::Overlay, &CIDRS[..2], None);
    for (why, after, recorded) in
        [("renamed", &renamed, true), ("renamed, no record", &renamed, false), ("overlay", &overlay, true)]
    {
        let (mut kernel, before) = added(Attached::Underlay);
        add(&mut kernel, after, recorded.then_some(&before));
        // The old routes go with the old link, so some changes may come too late to matter.
        kernel.moot = 0;
        assert_settled(&kernel, after, why);
        assert!(kernel.seen.pod.link("veth0").is_none(), "{why}");
        assert_eq!(
            kernel.seen.node.links.len(),
            untouched().node.links.len() + usize::from(after.veth.is_some()),
            "{why}"
        );
    }
}

/// A second ADD converges to the state that a first one would make: where another owner now holds the prefix, nothing of
/// ours that is out of date stays beside it.
#[test]
fn a_conflict_leaves_no_stale_route_of_ours() {
    let other = foreign(CIDRS[0], Some("192.168.7.9"), "eth0", (3, 50));
    let after = wanted(Attached::Overlay, &CIDRS, Some(1300));
    let mut fresh = Kernel::new(untouched());
    fresh.seen.pod.routes.push(other.clone());
    add(&mut fresh, &after, None);

    let (mut kernel, before) = added(Attached::Overlay);
    kernel.seen.pod.routes.push(other);
    add(&mut kernel, &after, Some(&before));
    assert_eq!(kernel.snapshot().routes, fresh.snapshot().routes);
}

//! Random lists, random other owners, random order of events: a plan always leads where it says, touches nobody else's
//! routes, can be undone, and is taken down without a trace.

use std::collections::BTreeSet;

use crosslink_core::{
    destinations::{Destination, Destinations, Origin},
    facts::Attached,
    model::{ObservedRoute, Side},
    numbers::PROTOCOL,
    plan::{Context, Plan, drift, plan},
    wanted::{Wanted, wanted},
};
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*};

use crate::{
    kernel::{Kernel, metric},
    plan::saved,
    support::{IDENTITY, World, net, torn_down, untouched},
};

/// Prefixes that nest and repeat, of both families.
const POOL: [&str; 10] = [
    "10.50.0.0/16",
    "10.50.1.0/24",
    "10.50.1.7/32",
    "10.51.0.0/16",
    "10.0.0.0/8",
    "fd50::/64",
    "fd50::7/128",
    "fd51::/64",
    "fd00::/8",
    "10.244.0.0/16",
];

/// Which prefixes of the pool are asked for, with which MTU.
type List = Vec<Option<Option<u32>>>;

/// Another owner's route: prefix, gateway or device, protocol, metric, MTU, unicast, multipath.
type Foreign = (usize, u8, u8, u32, Option<u32>, bool, bool);

fn list() -> impl Strategy<Value = List> {
    let mtu = prop_oneof![Just(None), Just(Some(1400)), Just(Some(1300))];
    vec(prop::option::weighted(0.6, mtu), POOL.len())
}

fn foreign() -> impl Strategy<Value = Foreign> {
    let metric = prop_oneof![Just(0), Just(1024), 1..300_u32];
    let mtu = prop_oneof![Just(None), Just(Some(1400))];
    (
        0..POOL.len(),
        0..4_u8,
        prop_oneof![Just(2), Just(3), Just(12)],
        metric,
        mtu,
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.1),
    )
}

fn attached() -> impl Strategy<Value = Attached> {
    prop_oneof![Just(Attached::Overlay), Just(Attached::Underlay)]
}

fn of_list(attached: Attached, list: &List) -> Wanted {
    let asked = POOL.iter().zip(list).filter_map(|(text, mtu)| Some((net(text), (*mtu)?)));
    let origin = |mtu| Origin { mtu, cluster: Some("cluster-b".to_owned()), named: None };
    let mut list: Vec<Destination> = asked.map(|(net, mtu)| Destination { net, origin: origin(mtu) }).collect();
    list.sort_by_key(|destination| destination.net);
    let ready = World::new(attached).read().unwrap();
    wanted(IDENTITY, ready.inputs(), &Destinations { list, findings: Vec::new() }).unwrap().0
}

fn others(rows: &[Foreign]) -> Vec<ObservedRoute> {
    let mut routes: Vec<ObservedRoute> = Vec::new();
    for (place, hop, protocol, metric, mtu, unicast, multipath) in rows {
        let dst = net(POOL[*place]);
        let v4 = dst.addr().is_ipv4();
        let (gateway, other) = if v4 { ("192.168.7.1", "192.168.7.9") } else { ("fe80::1", "fd07::9") };
        let (via, dev) = match hop {
            0 => (Some(gateway), "eth0"),
            1 => (Some(other), "eth0"),
            2 => (None, "eth0"),
            _ => (None, "net1"),
        };
        let mut seen = crate::support::foreign(POOL[*place], via, dev, (*protocol, *metric));
        (seen.route.mtu, seen.unicast, seen.multipath) = (*mtu, *unicast, *multipath);
        // Two routes of one prefix and metric cannot be.
        if !routes.iter().any(|old| (old.route.dst, old.metric) == (dst, seen.metric)) {
            routes.push(seen);
        }
    }
    routes
}

fn with_others(rows: &[Foreign], claimed: &[IpNet]) -> Kernel {
    let mut seen = untouched();
    seen.pod.routes.extend(others(rows));
    let held = |net: &IpNet| seen.pod.routes.iter().any(|old| old.route.dst == *net);
    let fresh: Vec<IpNet> = claimed.iter().copied().filter(|net| !held(net)).collect();
    seen.pod.routes.extend(fresh.into_iter().map(|net| ObservedRoute {
        metric: metric(&net),
        ..crate::support::foreign(&net.to_string(), None, "net1", (PROTOCOL, 0))
    }));
    Kernel::new(seen)
}

/// The other owners' routes: of other protocols, and what records of other attachments claim.
fn not_ours(kernel: &Kernel, claimed: &BTreeSet<IpNet>) -> Vec<ObservedRoute> {
    let routes = kernel.seen.pod.routes.iter().chain(&kernel.seen.node.routes);
    let mut routes: Vec<_> = routes.filter(|seen| !seen.ours() || claimed.contains(&seen.route.dst)).cloned().collect();
    routes.sort_by(|one, two| (&one.route, one.metric).cmp(&(&two.route, two.metric)));
    routes
}

fn assert_holds(kernel: &Kernel, wanted: &Wanted, plan: &Plan, claimed: &BTreeSet<IpNet>) {
    let blocked = |route: &&crosslink_core::model::Route| {
        let conflict = plan.conflicts.iter().any(|found| found.wanted == **route);
        !conflict && !plan.identical.contains(route)
    };
    let mut expected: Vec<_> = wanted.routes(Side::Pod).filter(blocked).cloned().collect();
    let ours = kernel.seen.pod.routes.iter().filter(|seen| seen.ours() && !claimed.contains(&seen.route.dst));
    let mut found: Vec<_> = ours.map(|seen| seen.route.clone()).collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected, "what is in the pod is not what was planned");
    for conflict in &plan.conflicts {
        assert!(!conflict.existing.same_as(&conflict.wanted), "{conflict:?} is none");
        assert!(kernel.seen.side(conflict.side).routes.contains(&conflict.existing));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// A life: three ADDs with changing lists among other owners' routes, each undone and done again, then DEL.
    #[test]
    fn a_life_of_an_attachment(
        attached in attached(),
        lists in vec(list(), 1..4),
        rows in vec(foreign(), 0..5),
        claims in vec(0..POOL.len(), 0..3),
    ) {
        let claimed: BTreeSet<IpNet> = claims.iter().map(|place| net(POOL[*place])).collect();
        let mut kernel = with_others(&rows, &claimed.iter().copied().collect::<Vec<_>>());
        let (untouched, strangers) = (kernel.snapshot(), not_ours(&kernel, &claimed));
        let (mut previous, mut kept): (Option<Wanted>, Vec<_>) = (None, Vec::new());
        for list in &lists {
            let wanted = of_list(attached, list);
            let plan = plan(&wanted, &kernel.seen, Context { ifname: "eth0", previous: previous.as_ref(), saved: &[], claimed: &claimed });
            let before = kernel.clone();
            kernel.apply(&plan.changes).unwrap();
            prop_assert_eq!(not_ours(&kernel, &claimed), strangers.clone());
            assert_holds(&kernel, &wanted, &plan, &claimed);

            let again = crosslink_core::plan::plan(&wanted, &kernel.seen, Context { ifname: "eth0", previous: Some(&wanted), saved: &[], claimed: &claimed });
            prop_assert_eq!(&again.changes, &Vec::new());
            prop_assert_eq!(again.conflicts.len(), plan.conflicts.len());
            let lines = drift(&wanted, &kernel.seen, &claimed);
            prop_assert_eq!(lines.len(), plan.conflicts.len(), "{:?}", lines);

            let mut undone = kernel.clone();
            undone.undo(&plan.changes).unwrap();
            prop_assert_eq!(undone.snapshot(), before.snapshot());
            kept.extend(saved(&wanted, &plan));
            previous = Some(wanted);
        }
        kernel.apply(&torn_down(&previous.unwrap(), &kept, &kernel.seen)).unwrap();
        prop_assert_eq!(not_ours(&kernel, &claimed), strangers);
        prop_assert_eq!(kernel.snapshot(), untouched);
        prop_assert_eq!(kernel.moot, 0);
    }

    /// Whatever part of our state is lost, the next ADD brings back exactly the whole.
    #[test]
    fn any_loss_is_mended(attached in attached(), list in list(), lost in vec(any::<prop::sample::Index>(), 1..6), link in any::<bool>()) {
        let wanted = of_list(attached, &list);
        let mut kernel = Kernel::new(untouched());
        let none = BTreeSet::new();
        kernel.apply(&plan(&wanted, &kernel.seen, Context { ifname: "eth0", previous: None, saved: &[], claimed: &none }).changes).unwrap();
        let whole = kernel.snapshot();
        for index in lost {
            kernel.seen.pod.routes = without(&kernel.seen.pod.routes, &index, ObservedRoute::ours);
            kernel.seen.node.routes = without(&kernel.seen.node.routes, &index, ObservedRoute::ours);
            kernel.seen.pod.neighbours = without(&kernel.seen.pod.neighbours, &index, |_| true);
            kernel.seen.node.rules = without(&kernel.seen.node.rules, &index, |_| true);
        }
        if let (true, Some(veth)) = (link, &wanted.veth) {
            kernel.drop_link(Side::Pod, &veth.pod);
        }
        let changes = plan(&wanted, &kernel.seen, Context { ifname: "eth0", previous: Some(&wanted), saved: &[], claimed: &none }).changes;
        let clean = drift(&wanted, &kernel.seen, &none).is_empty();
        prop_assert_eq!(clean, changes.is_empty());
        kernel.apply(&changes).unwrap();
        prop_assert_eq!(kernel.snapshot(), whole);
        prop_assert_eq!(drift(&wanted, &kernel.seen, &none), Vec::<String>::new());
    }
}

/// `all` without one of those that may go.
fn without<T: Clone>(all: &[T], index: &prop::sample::Index, may_go: impl Fn(&T) -> bool) -> Vec<T> {
    let going: Vec<usize> = all.iter().enumerate().filter(|(_, item)| may_go(item)).map(|(place, _)| place).collect();
    let gone = (!going.is_empty()).then(|| going[index.index(going.len())]);
    all.iter().enumerate().filter(|(place, _)| Some(*place) != gone).map(|(_, item)| item.clone()).collect()
}

//! Every line of the precedence list of DESIGN.md 4.3, named by conflist, annotation and remotes file, in both families
//! and both kinds of attachment.

use crosslink_core::{
    destinations::{Destinations, Origin},
    error::{Code, Error},
    facts::Attached,
    finding::Id,
};
use serde_json::json;

use crate::support::{BOTH, World, find, net, noted, texts};

/// Where a CIDR is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Conflist,
    Annotation,
    Remotes,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Routed,
    /// Code 7, whose message names the place and the value.
    Refused,
    /// The pod starts, without it.
    Noted(Id),
    /// The contract is silent.
    Open,
}

use Fate::{Noted, Open, Refused, Routed};

const NEVER: [Fate; 4] = [Refused, Refused, Refused, Noted(Id::CidrRefused)];
const LOCAL: [Fate; 4] = [Routed, Routed, Routed, Noted(Id::CidrLocal)];

/// Rule, IPv4, IPv6, fates: conflist, annotation in overlay, annotation in underlay, remotes file.
type Row = (&'static str, &'static str, &'static str, [Fate; 4]);

const TABLE: [Row; 22] = [
    ("1: the pod's own address", "192.168.7.5/32", "fd07::5/128", NEVER),
    ("1: loopback", "127.0.0.0/8", "::1/128", NEVER),
    ("1: inside loopback", "127.3.0.0/16", "::1/128", NEVER),
    ("1: multicast", "224.0.0.0/4", "ff00::/8", NEVER),
    ("1: inside multicast", "239.1.2.3/32", "ff02::1/128", NEVER),
    ("1: a default route", "0.0.0.0/0", "::/0", [Refused, Refused, Refused, Noted(Id::CidrWide)]),
    ("1: half a default route", "0.0.0.0/1", "8000::/1", [Routed, Open, Refused, Noted(Id::CidrWide)]),
    ("2: an address of the node", "10.6.0.2/32", "fd06::2/128", [Routed, Refused, Refused, Noted(Id::CidrLocal)]),
    (
        "3: equal to a connected prefix",
        "192.168.7.0/24",
        "fd07::/64",
        [Refused, Refused, Refused, Noted(Id::CidrLocal)],
    ),
    (
        "3: inside a connected prefix",
        "192.168.7.128/25",
        "fd07::8000:0:0:0/65",
        [Routed, Refused, Refused, Noted(Id::CidrLocal)],
    ),
    (
        "3: an address of a connected prefix",
        "192.168.7.77/32",
        "fd07::77/128",
        [Routed, Refused, Refused, Noted(Id::CidrLocal)],
    ),
    ("3: a link-local address", "169.254.20.10/32", "fe80::20/128", [Routed, Refused, Refused, Open]),
    ("3: link-local as a whole", "169.254.0.0/16", "fe80::/10", [Routed, Refused, Refused, Open]),
    ("3: a cover of link-local", "168.0.0.0/6", "fe00::/8", [Routed, Refused, Refused, Open]),
    ("4: equal to a local pod CIDR", "10.244.0.0/16", "fd24::/48", LOCAL),
    ("4: inside a local pod CIDR", "10.244.3.0/24", "fd24:0:0:3::/64", LOCAL),
    ("4: equal to a local service CIDR", "10.96.0.0/12", "fd96::/112", LOCAL),
    ("4: a local service", "10.96.0.10/32", "fd96::a/128", LOCAL),
    // Nodes are local, but their addresses never come from an annotation.
    (
        "4: inside a local node CIDR",
        "10.6.0.128/25",
        "fd06::8000:0:0:0/65",
        [Routed, Routed, Refused, Noted(Id::CidrLocal)],
    ),
    ("5: a cover of a connected prefix", "192.168.0.0/16", "fd07::/48", [Routed, Routed, Refused, Routed]),
    ("5: a cover of local CIDRs", "10.0.0.0/8", "fd00::/8", [Routed, Routed, Refused, Routed]),
    ("none", "172.31.0.0/16", "fd31::/64", [Routed, Routed, Refused, Routed]),
];

fn world(attached: Attached, place: Place, cidr: &str) -> World {
    let world = World::new(attached);
    match place {
        Place::Conflist => world.key("hijackCIDR", json!([cidr])),
        Place::Annotation => world.annotation("hijack-cidr", cidr),
        Place::Remotes => world.remote("cluster-b", &[cidr], Some(1400)),
    }
}

/// The message must name where the value was written, the value and a cure, and never be vague about the code.
fn assert_refused(err: &Error, place: &str, value: &str, why: &str) {
    assert_eq!(err.code, Code::Config, "{why}: {err}");
    assert!(err.msg.contains(place), "{why}: no {place:?} in {err}");
    assert!(err.msg.contains(value), "{why}: no {value:?} in {err}");
    assert!(err.msg.rsplit(": ").next().is_some_and(|cure| cure.contains(' ')), "{why}: no cure in {err}");
}

/// What the longest covering destination carries.
fn origin_of(outcome: &Destinations, cidr: &str) -> Origin {
    let covers = outcome.list.iter().filter(|found| found.net.contains(&net(cidr)));
    covers
        .max_by_key(|found| found.net.prefix_len())
        .unwrap_or_else(|| panic!("{cidr} is not routed: {outcome:?}"))
        .origin
        .clone()
}

fn assert_fate(world: &World, (place, cidr): (Place, &str), fate: Fate, why: &str) {
    let outcome = world.destinations();
    let word = match place {
        Place::Conflist => "hijackCIDR",
        Place::Annotation => "annotation crosslink.dev/hijack-cidr",
        Place::Remotes => "cluster-b",
    };
    match fate {
        Open => assert!(place != Place::Remotes || outcome.is_ok(), "{why}: remotes never stop a pod"),
        Refused => assert_refused(&outcome.unwrap_err(), word, cidr, why),
        Routed => {
            let outcome = outcome.unwrap();
            assert_eq!(origin_of(&outcome, cidr).mtu, (place == Place::Remotes).then_some(1400), "{why}");
            // In underlay a local CIDR that is routed anyway covers what is named inside it.
            if let Some(found) = find(&outcome, net(cidr)) {
                let by = [&found.origin.cluster, &found.origin.named].into_iter().flatten().any(|by| by.contains(word));
                assert!(by, "{why}: {found:?}");
            }
            assert!(outcome.findings.is_empty(), "{why}: {:?}", outcome.findings);
        }
        Noted(id) => {
            let outcome = outcome.unwrap();
            assert!(noted(&outcome.findings, id, cidr), "{why}: {:?}", outcome.findings);
            assert!(noted(&outcome.findings, id, "cluster-b"), "{why}: {:?}", outcome.findings);
            let silent = World::new(world.pod.attached).destinations().unwrap();
            assert_eq!(texts(&outcome), texts(&silent), "{why}: a refused CIDR left routes");
        }
    }
}

#[test]
fn every_line_of_the_list() {
    for (rule, v4, v6, [conflist, in_overlay, in_underlay, remotes]) in TABLE {
        for (attached, annotation) in BOTH.into_iter().zip([in_overlay, in_underlay]) {
            let fates = [(Place::Conflist, conflist), (Place::Annotation, annotation), (Place::Remotes, remotes)];
            for (cidr, (place, fate)) in [v4, v6].into_iter().flat_map(|cidr| fates.map(|fate| (cidr, fate))) {
                let why = format!("{rule}: {cidr}, {place:?}, {attached:?}");
                assert_fate(&world(attached, place, cidr), (place, cidr), fate, &why);
            }
        }
    }
}

/// `node.json` is no way round rule 1 either: what is never routed is refused, whoever names it.
#[test]
fn local_cidrs_obey_the_first_rule() {
    for (text, field) in ["0.0.0.0/0", "::/0", "127.0.0.0/8", "ff00::/8", "192.168.7.5/32"]
        .into_iter()
        .flat_map(|text| [(text, "pod"), (text, "service")])
    {
        let mut world = World::new(Attached::Underlay);
        let list = if field == "pod" { &mut world.node.pod_cidrs } else { &mut world.node.service_cidrs };
        list.push(net(text));
        let outcome = world.destinations().unwrap();
        assert_eq!(find(&outcome, net(text)), None, "{text} of node.json's {field} CIDRs is routed");
    }
}

/// What an annotation may name in underlay: inside remote, local or `hijackCIDR` ranges or inside `annotationCIDRs`.
#[test]
fn annotations_stay_inside_what_was_granted() {
    let granted = |attached| {
        World::new(attached)
            .key("hijackCIDR", json!(["100.64.0.0/25", "fd64::/64"]))
            .key(
                "annotationCIDRs",
                json!(["100.65.0.0/16", "fd65::/48", "100.64.0.128/25", "169.254.0.0/16", "fe80::/10"]),
            )
            .key("hijack", json!("none"))
            .remote("cluster-b", &["10.50.0.0/16", "fd50::/48"], None)
    };
    let cases = [
        ("100.64.0.64/26", true),
        ("100.65.0.0/16", true),
        ("fd65:0:0:1::/64", true),
        ("10.50.3.0/24", true),
        ("fd50::/64", true),
        ("10.244.9.0/24", true),
        ("10.96.0.1", true),
        ("10.6.0.77", false),
        ("10.6.0.0/30", false),
        // Half by hijackCIDR, half by annotationCIDRs.
        ("100.64.0.0/24", true),
        ("100.64.0.0/23", false),
        ("100.64.0.0/16", false),
        ("100.66.0.0/32", false),
        ("fd66::/64", false),
        ("10.50.0.0/15", false),
        // Never, though the administrator grants the range.
        ("169.254.169.254", false),
        ("fe80::1", false),
        ("10.6.0.2", false),
        ("127.0.0.1", false),
    ];
    for (cidr, allowed) in cases {
        let outcome = granted(Attached::Underlay).annotation("hijack-cidr", cidr).destinations();
        assert_eq!(outcome.is_ok(), allowed, "{cidr}: {outcome:?}");
        if let Err(err) = outcome {
            assert_refused(&err, "crosslink.dev/hijack-cidr", net(cidr).to_string().as_str(), cidr);
        }
    }
    let err = granted(Attached::Underlay).annotation("hijack-cidr", "100.66.0.0/16").destinations().unwrap_err();
    assert!(err.msg.contains("annotationCIDRs"), "the cure is missing: {err}");
    // Overlay grants nothing new, so nothing needs a grant; and there annotationCIDRs changes nothing.
    assert!(granted(Attached::Overlay).annotation("hijack-cidr", "100.66.0.0/16").destinations().is_ok());
    assert!(granted(Attached::Overlay).annotation("hijack-cidr", "169.254.169.254").destinations().is_err());
}

/// annotationCIDRs permits; it routes nothing by itself.
#[test]
fn a_grant_is_no_route() {
    for attached in BOTH {
        let granted = World::new(attached).key("annotationCIDRs", json!(["100.65.0.0/16"]));
        assert_eq!(granted.routed(), World::new(attached).routed());
    }
}

/// Excludes beat 3, 4 and 5, whoever excludes and whoever named the CIDR.
#[test]
fn excludes_punch_exact_holes() {
    let rest =
        ["10.50.0.0/25", "10.50.0.128/26", "10.50.0.192/27", "10.50.0.224/28", "10.50.0.240/29", "10.50.0.248/30"];
    let expected: Vec<String> =
        rest.iter().chain(&["10.50.0.252/31", "10.50.0.254/32"]).map(|text| (*text).to_owned()).collect();
    for (place, by_annotation) in [Place::Conflist, Place::Annotation, Place::Remotes]
        .into_iter()
        .flat_map(|place| [(place, false), (place, true)])
    {
        let mut world = world(Attached::Overlay, place, "10.50.0.0/24");
        world = match by_annotation {
            true => world.annotation("exclude-cidr", "10.50.0.255"),
            false => world.key("excludeCIDR", json!(["10.50.0.255/32"])),
        };
        assert_eq!(world.routed(), expected, "{place:?}, annotation: {by_annotation}");
    }
}

#[test]
fn excludes_add_up_and_reach_local_cidrs() {
    let world = World::new(Attached::Underlay)
        .remote("cluster-b", &["10.50.0.0/24", "fd50::/64"], None)
        .key("excludeCIDR", json!(["10.50.0.0/25", "10.96.0.0/12", "FD24::/48"]))
        .annotation("exclude-cidr", "10.50.0.192/26, fd50::/64");
    assert_eq!(world.routed(), ["10.50.0.128/26", "10.244.0.0/16", "fd96::/112"]);
    // The key in args.cni is the annotation's stand-in, and loses to it.
    let world = world.arg("exclude-cidr", json!("0.0.0.0/0"));
    assert_eq!(world.routed(), ["10.50.0.128/26", "10.244.0.0/16", "fd96::/112"]);
    let everything = World::new(Attached::Underlay).arg("exclude-cidr", json!(["0.0.0.0/0", "::/0"]));
    assert!(everything.routed().is_empty());
}

/// Rule 5: a local prefix wins over a remote one that covers it, also where an exclude splits the remote one.
#[test]
fn an_exclude_never_lets_a_remote_cidr_into_a_connected_prefix() {
    for (place, cidr, hole) in [
        // The rest of the connected half.
        (Place::Remotes, "192.168.6.0/23", "192.168.7.0/26"),
        (Place::Conflist, "192.168.6.0/23", "192.168.7.0/26"),
        // A rest that equals the connected prefix: another owner's route is there.
        (Place::Remotes, "192.168.6.0/23", "192.168.6.0/24"),
        (Place::Conflist, "192.168.6.0/23", "192.168.6.0/24"),
        (Place::Remotes, "fd07::/63", "fd07::/66"),
    ] {
        let world = world(Attached::Overlay, place, cidr).key("excludeCIDR", json!([hole]));
        let connected = world.pod.connected.clone();
        let inside: Vec<String> = world
            .destinations()
            .unwrap()
            .list
            .iter()
            .filter(|found| connected.iter().any(|connected| connected.contains(&found.net)))
            .map(|found| found.net.to_string())
            .collect();
        assert!(inside.is_empty(), "{cidr} by {place:?} without {hole} routes connected addresses: {inside:?}");
    }
}

/// The longest prefix decides about an address; that a hole is cut elsewhere does not change it.
#[test]
fn an_exclude_changes_no_attribute_of_what_it_leaves() {
    let world = World::new(Attached::Overlay).remote("cluster-b", &["10.50.0.0/24"], Some(1300)).remote(
        "cluster-c",
        &["10.50.0.0/25"],
        Some(1400),
    );
    let before = world.destinations().unwrap();
    let after = world.key("excludeCIDR", json!(["10.50.0.128/25"])).destinations().unwrap();
    assert_eq!(find(&after, net("10.50.0.0/25")), find(&before, net("10.50.0.0/25")));
}

/// Refusals of named CIDRs stop the pod even among many that are fine; refusals of remote ones never do.
#[test]
fn one_bad_name_among_good_ones() {
    let good = ["10.50.0.0/16", "fd50::/64"];
    let world = World::new(Attached::Overlay).key("hijackCIDR", json!([good[0], "224.0.0.0/4", good[1]]));
    assert_refused(&world.destinations().unwrap_err(), "hijackCIDR", "224.0.0.0/4", "conflist");
    let world = World::new(Attached::Overlay).remote("cluster-b", &[good[0], "224.0.0.0/4", "::/0", good[1]], None);
    assert_eq!(world.routed(), good);
    assert_eq!(world.destinations().unwrap().findings.len(), 2);
}

#[test]
fn a_cidr_of_a_missing_family_is_a_finding() {
    for (place, attached) in [
        (Place::Conflist, Attached::Overlay),
        (Place::Conflist, Attached::Underlay),
        (Place::Annotation, Attached::Overlay),
    ] {
        let mut world = world(attached, place, "fd50::/64");
        world.pod = World::v4_only(attached).pod;
        let outcome = world.destinations().unwrap();
        assert!(noted(&outcome.findings, Id::NoFamily, "fd50::/64"), "{place:?}: {:?}", outcome.findings);
        assert!(outcome.list.iter().all(|found| found.net.addr().is_ipv4()), "{place:?}");
    }
    let mut world = World::new(Attached::Underlay).remote("cluster-b", &["10.50.0.0/16"], None);
    world.pod.addresses.remove(0);
    let outcome = world.destinations().unwrap();
    assert!(outcome.findings.is_empty() && outcome.list.iter().all(|found| found.net.addr().is_ipv6()), "{outcome:?}");
}

/// One prefix from several places is one route: the name is kept, for conflicts, and so are cluster and MTU.
#[test]
fn equal_prefixes_are_merged() {
    for attached in BOTH {
        let world = World::new(attached)
            .key("hijackCIDR", json!(["10.50.0.0/16", "10.244.0.0/16"]))
            .annotation("hijack-cidr", "10.50.0.0/16")
            .remote("cluster-b", &["10.50.0.0/16"], Some(1400));
        let outcome = world.destinations().unwrap();
        let found = find(&outcome, net("10.50.0.0/16")).unwrap();
        assert_eq!(found.origin.mtu, Some(1400), "where a cluster states an mtu, its routes carry it");
        assert_eq!(found.origin.cluster.as_deref(), Some("cluster-b"));
        assert!(found.origin.named.as_deref().is_some_and(|named| named.contains("hijackCIDR")), "{found:?}");
        let twins = outcome.list.iter().filter(|found| found.net == net("10.50.0.0/16"));
        assert_eq!(twins.count(), 1);
    }
}

/// Covered prefixes go if their attributes are the same, siblings stay as they were typed.
#[test]
fn covered_prefixes_are_dropped_and_siblings_kept() {
    let clusters = |inner: Option<u32>| {
        World::new(Attached::Overlay)
            .remote("cluster-b", &["10.50.0.0/16", "10.51.0.0/25", "10.51.0.128/25"], Some(1400))
            .remote("cluster-c", &["10.50.7.0/24"], inner)
    };
    let siblings = ["10.50.0.0/16", "10.51.0.0/25", "10.51.0.128/25"];
    assert_eq!(clusters(Some(1400)).routed(), siblings);
    for other in [None, Some(1300)] {
        let expected = ["10.50.0.0/16", "10.50.7.0/24", "10.51.0.0/25", "10.51.0.128/25"];
        assert_eq!(clusters(other).routed(), expected, "mtu {other:?}");
    }
}

/// A connected or foreign prefix between the two is a wall: without the inner route the wall would answer.
#[test]
fn a_covered_prefix_behind_a_wall_stays() {
    let world = || World::new(Attached::Overlay).key("hijackCIDR", json!(["192.168.0.0/16", "192.168.7.64/26"]));
    assert_eq!(world().routed(), ["192.168.0.0/16", "192.168.7.64/26"]);
    let mut open = world();
    (open.pod.connected, open.pod.foreign) = (Vec::new(), Vec::new());
    assert_eq!(open.routed(), ["192.168.0.0/16"]);
    open.pod.foreign.push(net("192.168.7.0/25"));
    assert_eq!(open.routed(), ["192.168.0.0/16", "192.168.7.64/26"]);
}

/// A connected prefix inside another one (the host route to a gateway, say) is as connected as any.
#[test]
fn the_administrator_cannot_take_a_connected_prefix_inside_another() {
    for (inner, v6) in [("192.168.7.1/32", false), ("fd07::8000:0:0:0/65", true)] {
        let mut world = World::new(Attached::Overlay).key("hijackCIDR", json!([inner]));
        world.pod.connected.insert(if v6 { 2 } else { 1 }, net(inner));
        assert_refused(&world.destinations().unwrap_err(), "hijackCIDR", inner, "nested");
    }
}

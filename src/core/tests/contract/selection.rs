//! Which clusters are chosen, how values may be written, and how remotes files become clusters.

use crosslink_core::{
    error::Code,
    facts::Attached,
    finding::Id,
    remotes::{self, merge},
};
use serde_json::{Value, json};

use crate::support::{World, find, net, noted};

const B: &str = "10.50.0.0/16";
const C: &str = "10.51.0.0/16";
const BGP: &str = "10.52.0.0/16";

fn three() -> World {
    World::new(Attached::Overlay)
        .remote_of("cluster", "cluster-b", &[B], None)
        .remote_of("cluster", "cluster-c", &[C], None)
        .remote_of("kernel", "@bgp", &[BGP], None)
}

#[test]
fn clusters_are_chosen_by_conflist_and_annotation() {
    let cases: [(Value, Option<&str>, &[&str]); 14] = [
        (json!(null), None, &[B, C, BGP]),
        (json!("all"), None, &[B, C, BGP]),
        (json!("none"), None, &[]),
        (json!([]), None, &[]),
        (json!(["all"]), None, &[B, C, BGP]),
        (json!(["cluster-b"]), None, &[B]),
        (json!("cluster-c"), None, &[C]),
        (json!(["@bgp", "cluster-b", "cluster-b"]), None, &[B, BGP]),
        // The annotation replaces, it does not add.
        (json!("all"), Some("none"), &[]),
        (json!("none"), Some("all"), &[B, C, BGP]),
        (json!(["cluster-b"]), Some("cluster-c"), &[C]),
        (json!("none"), Some(" cluster-b ,\tcluster-c "), &[B, C]),
        (json!("none"), Some("@bgp"), &[BGP]),
        (json!("all"), Some("cluster-x"), &[]),
    ];
    for (hijack, annotation, expected) in cases {
        let mut world = three().key("hijack", hijack.clone());
        if let Some(value) = annotation {
            world = world.annotation("hijack", value);
        }
        assert_eq!(world.routed(), expected, "{hijack} {annotation:?}");
        // args.cni stands in where there is no annotation, and loses to one.
        let arg = match annotation {
            Some(value) => three().key("hijack", hijack.clone()).arg("hijack", json!(value)),
            None => continue,
        };
        assert_eq!(arg.routed(), expected, "{hijack} {annotation:?} by args.cni");
        let loses = arg.annotation("hijack", "cluster-b").routed();
        assert_eq!(loses, [B], "{hijack} {annotation:?}");
    }
}

#[test]
fn unknown_clusters_are_findings_and_the_rest_is_routed() {
    let world = three().annotation("hijack", "cluster-b,cluster-later,own");
    let outcome = world.destinations().unwrap();
    assert_eq!(world.routed(), [B]);
    assert!(noted(&outcome.findings, Id::ClusterUnknown, "cluster-later"), "{:?}", outcome.findings);
    assert!(!noted(&outcome.findings, Id::ClusterUnknown, "cluster-b"));
    // No remotes at all: neither is that an error.
    assert!(World::new(Attached::Overlay).annotation("hijack", "cluster-b").routed().is_empty());
}

#[test]
fn selections_that_are_refused_name_place_and_value() {
    let bad = ["all,cluster-b", "cluster-b,none", "Cluster-B", "", " ", "cluster-b,", "b_c", "-b", "10.0.0.0/8"];
    for value in bad {
        for (world, place) in [
            (three().annotation("hijack", value), "annotation crosslink.dev/hijack"),
            (three().arg("hijack", json!(value)), "args.cni key hijack"),
            (three().key("hijack", json!([value])), "key \"hijack\""),
        ] {
            if place.starts_with("key") && value.contains(',') {
                continue;
            }
            let err = world.destinations().unwrap_err();
            assert_eq!(err.code, Code::Config, "{value:?}");
            assert!(err.msg.contains(place) && err.msg.contains(value), "{value:?}: {err}");
        }
    }
    let err = three().key("hijack", json!(["all", "cluster-b"])).destinations().unwrap_err();
    assert!(err.code == Code::Config && err.msg.contains("all"), "{err}");
}

/// `hijack: none` switches clusters off, not what is named.
#[test]
fn named_cidrs_do_not_depend_on_the_selection() {
    let world = three().key("hijack", json!("none")).key("hijackCIDR", json!(["10.60.0.0/16"]));
    assert_eq!(world.annotation("hijack-cidr", "10.61.0.0/16").routed(), ["10.60.0.0/16", "10.61.0.0/16"]);
}

/// Conformance 3 and 4: whatever the spelling and whatever the way in, one prefix and one route.
#[test]
fn spellings_are_one_prefix_on_every_way_in() {
    let cases: [(&[&str], &[&str]); 5] = [
        (&["169.254.20.10", " 169.254.20.10/32 "], &["169.254.20.10/32"]),
        (&["10.50.1.2/16", "10.50.0.0/16", "\t10.50.255.255/16"], &["10.50.0.0/16"]),
        (&["FD50:0:0::1/64", "fd50::/64", "fD50:0000::AbCd/64"], &["fd50::/64"]),
        (&["FD50::A", "fd50::a/128"], &["fd50::a/128"]),
        (&["fd50::/64", "10.50.0.0/16", "FD50::/64", "10.50.0.1/16"], &["10.50.0.0/16", "fd50::/64"]),
    ];
    for (spellings, expected) in cases {
        let named = spellings.join(",");
        let world = || World::new(Attached::Overlay);
        let mut ways = vec![
            ("conflist", world().key("hijackCIDR", json!(spellings))),
            ("remotes", world().remote("cluster-b", spellings, None)),
        ];
        if !named.contains("169.254") {
            ways.push(("annotation", world().annotation("hijack-cidr", &named)));
            ways.push(("args.cni text", world().arg("hijack-cidr", json!(named))));
            ways.push(("args.cni list", world().arg("hijack-cidr", json!(spellings))));
        }
        for (way, world) in ways {
            assert_eq!(world.routed(), expected, "{way}: {spellings:?}");
            let excluded = world.key("excludeCIDR", json!(spellings));
            assert!(excluded.routed().is_empty(), "{way} excluded: {spellings:?}");
        }
    }
}

#[test]
fn malformed_cidrs_fail_before_anything_else() {
    for value in
        ["10.0.0.0/33", "010.0.0.1/8", "10.0.0.0/08", "10.0.0.0/+8", "10.1/16", "fd00::/129", "x", "::ffff:10.0.0.1"]
    {
        for (world, place) in [
            (three().key("hijackCIDR", json!([value])), "key \"hijackCIDR\""),
            (three().key("excludeCIDR", json!([value])), "key \"excludeCIDR\""),
            (three().key("annotationCIDRs", json!([value])), "key \"annotationCIDRs\""),
            (three().annotation("hijack-cidr", value), "crosslink.dev/hijack-cidr"),
            (three().annotation("exclude-cidr", value), "crosslink.dev/exclude-cidr"),
        ] {
            let err = world.destinations().unwrap_err();
            assert_eq!(err.code, Code::Config);
            assert!(err.msg.contains(place) && err.msg.contains(value), "{value} in {place}: {err}");
        }
    }
    let many = |count: u32| {
        (0..count).map(|index| format!("10.{}.{}.0/24", index / 200, index % 200)).collect::<Vec<_>>().join(",")
    };
    assert_eq!(three().key("hijack", json!("none")).annotation("hijack-cidr", &many(256)).routed().len(), 256);
    let err = three().annotation("hijack-cidr", &many(257)).destinations().unwrap_err();
    assert!(err.code == Code::Config && err.msg.contains("256"), "{err}");
}

/// One name is one cluster, one CIDR has one cluster: by source, then by name, whatever the order of the files.
#[test]
fn remotes_files_merge_into_clusters() {
    let sources = ["static", "cluster", "submariner", "kosmos", "calico", "kernel"];
    for pair in sources.windows(2) {
        let [first, second] = pair else { continue };
        for turn in [false, true] {
            let mut world = World::new(Attached::Overlay)
                .remote_of(second, "a-name-that-sorts-first", &[B], Some(1300))
                .remote_of(first, "z-name", &[B], Some(1400));
            if turn {
                world.files.reverse();
            }
            let outcome = world.destinations().unwrap();
            let found = find(&outcome, net(B)).unwrap();
            assert_eq!(found.origin.cluster.as_deref(), Some("z-name"), "{first} before {second}");
            assert_eq!(found.origin.mtu, Some(1400));
            assert!(noted(&outcome.findings, Id::CidrTwice, "a-name-that-sorts-first"), "{:?}", outcome.findings);
        }
    }
    let same = World::new(Attached::Overlay).remote_of("kosmos", "cluster-c", &[B], None).remote_of(
        "kosmos",
        "cluster-b",
        &[B, C],
        None,
    );
    let outcome = same.destinations().unwrap();
    assert_eq!(find(&outcome, net(B)).unwrap().origin.cluster.as_deref(), Some("cluster-b"));
    // The loser was deselected: the CIDR stays with its owner and is not routed for the other.
    assert!(same.key("hijack", json!(["cluster-c"])).routed().is_empty());
}

#[test]
fn a_cluster_in_two_files_is_the_union_with_the_smallest_mtu() {
    for mtus in [[Some(1400), Some(1380)], [Some(1380), Some(1400)], [None, Some(1380)], [Some(1380), None]] {
        let [one, two] = mtus;
        let world = World::new(Attached::Overlay)
            .remote_of("submariner", "cluster-b", &[B, "fd50::/64"], one)
            .remote_of("static", "cluster-b", &[C, B], two);
        let outcome = world.destinations().unwrap();
        assert_eq!(world.routed(), [B, C, "fd50::/64"]);
        assert!(outcome.list.iter().all(|found| found.origin.mtu == Some(1380)), "{mtus:?}: {outcome:?}");
        assert!(outcome.findings.is_empty());
        let merged = merge(&world.files, None);
        let sources = |cidr| merged.clusters["cluster-b"].cidrs[&net(cidr)].iter().cloned().collect::<Vec<_>>();
        assert_eq!(
            (sources(B), sources(C)),
            (vec!["static".to_owned(), "submariner".to_owned()], vec!["static".to_owned()])
        );
        // A CIDR goes only when the last file drops it.
        let rest = World { files: world.files[1..].to_vec(), ..world.clone() };
        assert_eq!(rest.routed(), [B, C]);
    }
}

#[test]
fn the_own_cluster_and_wide_prefixes_are_never_remote() {
    let world = World::new(Attached::Overlay).remote("own", &[B], None).remote("cluster-b", &[C], None);
    assert_eq!(world.routed(), [C]);
    assert!(noted(&world.destinations().unwrap().findings, Id::OwnCluster, "own"));
    let mut nameless = world;
    nameless.node.cluster_name = None;
    assert_eq!(nameless.routed(), [B, C]);
    for (wide, narrow) in [("32.0.0.0/3", "32.0.0.0/4"), ("2000::/7", "2000::/8")] {
        let world = World::new(Attached::Overlay).remote("cluster-b", &[wide], None);
        assert!(world.routed().is_empty() && noted(&world.destinations().unwrap().findings, Id::CidrWide, wide));
        assert_eq!(World::new(Attached::Overlay).remote("cluster-b", &[narrow], None).routed(), [narrow]);
    }
}

#[test]
fn a_file_of_the_future_is_an_error_for_itself_alone() {
    for (text, ok) in [
        (r#"{"version":1,"clusters":[],"new":{"a":[1]}}"#, true),
        (r#"{"version":1}"#, true),
        (r#"{"version":2,"clusters":[]}"#, false),
        (r#"{"version":0,"clusters":[]}"#, false),
        (r#"{"version":"1","clusters":[]}"#, false),
        (r#"{"version":1,"clusters":[{"name":"b","podCIDRs":["10.0.0.0/8","10.0.0.0/99"]}]}"#, false),
        ("", false),
    ] {
        assert_eq!(remotes::parse("x.json", text).is_ok(), ok, "{text}");
    }
}

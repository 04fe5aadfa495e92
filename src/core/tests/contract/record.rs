//! Records: what is written is what is read, by this version, the one before and the one after; and from a record alone
//! the same destinations follow.

use std::path::PathBuf;

use crosslink_core::{
    destinations::destinations,
    facts::Attached,
    finding::{Finding, Id},
    model::{Side, Sysctl},
    record::{NetnsId, Pod, Record, State, VERSION, Wishes, file_name, parse, parse_file_name},
    result::ResultIp,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{BOTH, IDENTITY, Ready, World, addr, net};

fn world(attached: Attached) -> World {
    World::new(attached)
        .key("hijack", json!(["cluster-b", "@bgp"]))
        .key("hijackCIDR", json!(["10.60.0.0/16", "169.254.20.10"]))
        .key("excludeCIDR", json!(["10.50.9.0/24"]))
        .key("annotationCIDRs", json!(["10.61.0.0/16"]))
        .key("mode", json!(if attached == Attached::Overlay { "overlay" } else { "underlay" }))
        .key("vethName", json!("xl0"))
        .key("vethMTU", json!(1300))
        .key("remotesDir", json!("/srv/remotes"))
        .key("nodeFile", json!("/srv/node.json"))
        .annotation("hijack-cidr", "10.61.0.0/16, fd50:0:0:1::/64")
        .annotation("exclude-cidr", "10.50.8.0/24")
        .remote("cluster-b", &["10.50.0.0/16", "fd50::/48"], Some(1400))
        .remote("cluster-c", &["10.51.0.0/16"], None)
}

fn ips() -> Vec<ResultIp> {
    vec![
        ResultIp { addr: addr("192.168.7.5"), gateway: Some(addr("192.168.7.1")) },
        ResultIp { addr: addr("fd07::5"), gateway: None },
    ]
}

fn record(attached: Attached) -> Record {
    let world = world(attached);
    let ready = world.read().unwrap();
    let (applied, findings) = world.wanted().unwrap();
    let mut record = Record {
        version: VERSION,
        state: State::Ready,
        container_id: IDENTITY.container_id.to_owned(),
        ifname: IDENTITY.ifname.to_owned(),
        network: "n".to_owned(),
        netns: NetnsId { path: "/run/netns/x".into(), dev: 4, inode: 4_026_532_000, cookie: Some(u64::MAX) },
        pod: Pod { namespace: "default".to_owned(), name: "web-0".to_owned(), uid: String::new() },
        attached,
        wishes: Wishes::of(ready.inputs(), &ips()),
        applied,
        saved: vec![Sysctl { side: Side::Pod, key: "ipv4/conf/eth0/rp_filter".to_owned(), value: "0".to_owned() }],
        findings,
        extra: serde_json::Map::new(),
    };
    record.findings.push(Finding::new(Id::ClusterUnknown, "cluster @bgp"));
    record
}

fn json_of(record: &Record) -> Value {
    serde_json::to_value(record).unwrap()
}

#[test]
fn what_is_written_is_what_is_read() {
    for attached in BOTH {
        for state in [State::Adding, State::Ready] {
            let record = Record { state, ..record(attached) };
            let text = serde_json::to_string(&record).unwrap();
            assert_eq!(parse(&text).unwrap(), record);
            assert_eq!(serde_json::to_string(&parse(&text).unwrap()).unwrap(), text, "not stable");
        }
    }
}

/// The names that the agent and the CLI of the next version will still look for.
#[test]
fn the_file_uses_the_contracts_words() {
    let value = json_of(&record(Attached::Underlay));
    assert_eq!(value["state"], "ready");
    assert_eq!(value["attached"], "underlay");
    assert_eq!(value["containerID"], "c0ffee");
    assert_eq!(value["netns"]["cookie"], u64::MAX);
    assert_eq!(value["wishes"]["hijackCIDR"], json!(["10.60.0.0/16", "169.254.20.10/32"]));
    assert_eq!(value["wishes"]["excludeCIDR"], json!(["10.50.9.0/24", "10.50.8.0/24"]));
    assert_eq!(value["findings"][0]["id"], "XL-CLUSTER-UNKNOWN");
    assert_eq!(json_of(&Record { state: State::Adding, ..record(Attached::Overlay) })["state"], "adding");
}

/// Version N+1: more fields anywhere, other findings, another version number. Those at the top are kept.
#[test]
fn a_newer_record_is_readable_and_keeps_its_fields() {
    let mut value = json_of(&record(Attached::Underlay));
    value["version"] = json!(VERSION + 1);
    value["future"] = json!({"a": [1, 2.5, null], "b": "x"});
    value["another"] = json!(null);
    for path in ["/wishes", "/applied", "/netns", "/pod", "/applied/veth", "/applied/podRoutes/0", "/saved/0"] {
        value.pointer_mut(path).unwrap_or_else(|| panic!("no {path}"))["future"] = json!([1]);
    }
    value["findings"].as_array_mut().unwrap().push(json!({"id": "XL-OF-TOMORROW", "text": "t", "more": 1}));
    let read = parse(&value.to_string()).unwrap();
    assert_eq!(read.version, VERSION + 1);
    assert_eq!(read.findings.last().unwrap().id, Id::Unknown);
    let back = json_of(&read);
    assert_eq!((&back["future"], &back["another"]), (&value["future"], &json!(null)));
    assert!(back.as_object().unwrap().contains_key("another"));
    assert_eq!(read.applied, record(Attached::Underlay).applied, "what DEL needs is all there");
}

/// Version N-1, and what a hand has trimmed: fields with a meaning when they are missing may be missing.
#[test]
fn an_older_record_is_readable() {
    let mut value = json_of(&record(Attached::Overlay));
    for field in ["pod", "saved", "findings"] {
        value.as_object_mut().unwrap().remove(field);
    }
    for field in ["podCidrs", "pod_cidrs", "excludeCIDR", "hijackCIDR", "annotationCIDRs", "mode", "vethMTU", "ips"] {
        value["wishes"].as_object_mut().unwrap().remove(field);
    }
    value["netns"].as_object_mut().unwrap().remove("cookie");
    let read = parse(&value.to_string()).unwrap();
    assert!(read.saved.is_empty() && read.findings.is_empty() && read.netns.cookie.is_none());
    assert_eq!(read.applied, record(Attached::Overlay).applied);
}

#[test]
fn what_is_no_record_is_an_error_and_no_panic() {
    let whole = json_of(&record(Attached::Underlay)).to_string();
    for end in (0..whole.len()).step_by(7) {
        assert!(parse(&whole[..end]).is_err(), "half a file, {end} bytes");
    }
    for text in ["", "null", "[]", "{}", "7", "\u{0}", r#"{"version":1}"#] {
        assert!(parse(text).is_err(), "{text}");
    }
}

#[test]
fn findings_are_capped() {
    let mut record = record(Attached::Overlay);
    let many: Vec<Finding> = (0..5000).map(|index| Finding::new(Id::CidrLocal, format!("{index}"))).collect();
    record.set_findings(&many);
    assert!(!record.findings.is_empty() && record.findings.len() < 1000);
    assert_eq!(record.findings[0], many[0]);
    record.set_findings(&many[..3]);
    assert_eq!(record.findings, many[..3]);
}

#[test]
fn claims_are_the_destinations() {
    let claims = record(Attached::Underlay).claims();
    let expected = ["10.6.0.2", "10.50.8.0/24", "10.60.0.0/16", "fd50::/48", "169.254.20.10"].map(net);
    assert_eq!(expected.map(|net| claims.contains(&net)), [true, false, true, true, true], "{claims:?}");
}

/// From the wishes and the same facts the same destinations follow, so a resync without news changes nothing.
#[test]
fn wishes_lead_to_the_same_destinations() {
    let annotated = |world: World, value: &str| world.annotation("hijack", value);
    for attached in BOTH {
        for world in [
            world(attached),
            annotated(world(attached), "none"),
            annotated(world(attached), "all"),
            annotated(world(attached), "cluster-c,cluster-later"),
            World::new(attached),
            world(attached).arg("hijack", json!("all")),
        ] {
            let ready = world.read().unwrap();
            let text = serde_json::to_string(&Wishes::of(ready.inputs(), &ips())).unwrap();
            let wishes: Wishes = serde_json::from_str(&text).unwrap();
            let (conf, request) = wishes.inputs();
            assert_eq!(conf.mode, ready.conf.mode);
            assert_eq!((&conf.veth_name, conf.veth_mtu), (&ready.conf.veth_name, ready.conf.veth_mtu));
            assert_eq!((&conf.remotes_dir, &conf.node_file), (&ready.conf.remotes_dir, &ready.conf.node_file));
            let again = Ready { conf, request, ..ready.clone() };
            assert_eq!(destinations(again.inputs()), destinations(ready.inputs()), "{text}");
            assert_eq!(Wishes::of(again.inputs(), &ips()), wishes, "not stable");
        }
    }
}

#[test]
fn a_netns_is_known_by_its_cookie() {
    let id = |path: &str, inode, cookie| NetnsId { path: PathBuf::from(path), dev: 4, inode, cookie };
    let cases = [
        (id("/a", 1, Some(7)), id("/b", 2, Some(7)), true),
        // The inode was reused at once.
        (id("/a", 1, Some(7)), id("/a", 1, Some(8)), false),
        // Before Linux 5.14 the path must be the same too.
        (id("/a", 1, None), id("/a", 1, Some(8)), true),
        (id("/a", 1, None), id("/b", 1, Some(8)), false),
        (id("/a", 1, None), id("/a", 2, None), false),
    ];
    for (one, two, same) in cases {
        assert_eq!((one.same(&two), two.same(&one)), (same, same), "{one:?} {two:?}");
    }
}

#[test]
fn hostile_file_names_are_no_records() {
    for name in [
        "",
        ".json",
        ":.json",
        ":eth0.json",
        "c:.json",
        "c.json",
        "c:eth0",
        "c:eth0.json.tmp",
        ".c:eth0.json",
        "-c:eth0.json",
        "../c:eth0.json",
        "a/b:eth0.json",
        "c:../eth0.json",
        "c:...json",
        "c:..json",
        "c:eth0:x.json",
        "c d:eth0.json",
        "c:eth 0.json",
        "c:et\th0.json",
        "c:et\0h0.json",
        "c:sixteen-chars-xx.json",
        "c\n:eth0.json",
        "é:eth0.json",
        "c:eth0.JSON",
    ] {
        assert_eq!(parse_file_name(name), None, "{name:?}");
    }
    for (id, ifname) in [("c0ffee", "eth0"), ("0", "pod6b4853bd4f2"), ("a_b.c-d", "net1.5"), ("x.json", "b.json")] {
        assert_eq!(file_name(id, ifname), format!("{id}:{ifname}.json"));
        assert_eq!(parse_file_name(&file_name(id, ifname)), Some((id, ifname)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is accepted names one file, and none outside the directory.
    #[test]
    fn accepted_names_are_safe(name in "[a-z0-9:/. _-]{0,12}(:|/)?[a-z0-9./ :]{0,17}(\\.json)?") {
        if let Some((id, ifname)) = parse_file_name(&name) {
            prop_assert_eq!(file_name(id, ifname), name.clone());
            prop_assert!(!name.contains('/') && !name.starts_with('.') && !id.is_empty() && ifname.len() < 16);
        }
    }
}

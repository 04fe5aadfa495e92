//! The conflist entry, annotations, `args.cni` and CNI_ARGS.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::print_stdout,
    reason = "tests"
)]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use crosslink_testkit::Call;
use sandbox::{ANNOTATIONS, Sandbox, annotated, refused, silent};
use serde_json::{Value, json};

/// Routes of the cluster that every sandbox knows.
const CLUSTER_B: [&str; 4] = ["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"];

/// A key, wrong values of it, and what the message says about the cure.
fn wrong_values() -> Vec<(&'static str, Vec<Value>, &'static str)> {
    let cidrs = vec![json!("10.0.0.0/8"), json!({}), json!(7), json!(true)];
    let items = [
        "x",
        "",
        "10.0.0.0/33",
        "010.0.0.0/8",
        "10.0.0.0/08",
        "10.0.0.0/+8",
        "10.0.0/8",
        "fe80::1%eth0",
        "10.0.0.0/255.0.0.0",
    ];
    let bad_items: Vec<Value> = items.iter().map(|item| json!([item])).chain([json!([7]), json!([null])]).collect();
    let dirs = vec![json!(""), json!("relative/dir"), json!(7), json!([]), json!("/a\u{0}b")];
    vec![
        ("hijack", vec![json!(7), json!({}), json!(true), json!([7]), json!([["all"]])], "all, none"),
        (
            "hijack",
            vec![json!("B"), json!(""), json!(["b", ""]), json!("b,c"), json!(["-b"]), json!(["a_b"])],
            "cluster name",
        ),
        ("hijack", vec![json!(["all", "b"]), json!(["b", "none"]), json!(["all", "none"])], "alone"),
        ("hijackCIDR", cidrs.clone(), "list"),
        ("hijackCIDR", bad_items.clone(), ""),
        ("excludeCIDR", cidrs.clone(), "list"),
        ("excludeCIDR", bad_items.clone(), ""),
        ("annotationCIDRs", cidrs, "list"),
        ("annotationCIDRs", bad_items, ""),
        ("mode", vec![json!("Overlay"), json!(""), json!(1), json!(["auto"])], "auto, overlay, underlay"),
        ("failPolicy", vec![json!("close"), json!(""), json!(false)], "open, closed"),
        ("replyPath", vec![json!("marked"), json!(0), json!("None")], "mark, none"),
        ("vethName", vec![json!(7), json!([])], "string"),
        (
            "vethName",
            vec![json!(""), json!("."), json!("a/b"), json!("a b"), json!("lo"), json!("sixteen-letters-")],
            "interface name",
        ),
        (
            "vethMTU",
            vec![json!(-1), json!(1.5), json!("1500"), json!(1279), json!(65536), json!(1e99)],
            "1280 to 65535",
        ),
        ("remotesDir", dirs.clone(), ""),
        ("nodeFile", dirs.clone(), ""),
        ("stateDir", dirs, ""),
        ("logFile", vec![json!("cni.log"), json!(7), json!({})], ""),
        ("logLevel", vec![json!("trace"), json!("INFO"), json!(2)], "error, warn, info, debug"),
    ]
}

#[test]
fn wrong_values_name_key_value_and_cure() {
    let sandbox = Sandbox::overlay();
    for (key, values, cure) in wrong_values() {
        for value in values {
            let text = match &value {
                Value::Array(items) if key.contains("CIDR") => items[0].to_string(),
                other => other.to_string(),
            };
            // The message may quote the value once more, and escapes NUL as Rust does, so only its longest word must be
            // there.
            let text = text.replace("\\u0000", " ");
            let words = text.split(|c: char| c.is_whitespace() || "\"[]{}\\,".contains(c));
            let word = words.max_by_key(|word| word.len()).unwrap_or_default();
            sandbox.refuses(json!({ key: value }), 7, &[key, cure, word]);
        }
    }
    for name in [json!(""), json!("a b"), json!("../x"), json!(7), json!("-a"), json!(null)] {
        sandbox.refuses(json!({ "name": name }), 7, &["name"]);
    }
}

#[test]
fn check_and_status_refuse_wrong_values_too() {
    let sandbox = Sandbox::overlay();
    for (command, code) in [("CHECK", 7), ("STATUS", 50)] {
        for (key, values, cure) in wrong_values() {
            let reply = sandbox.run(command, json!({ key: values[0] }));
            refused(&reply, code, &[key, cure]);
        }
        refused(&sandbox.run(command, json!({"hijak": "all"})), code, &["hijak", "did you mean \"hijack\""]);
    }
}

#[test]
fn near_misses_are_refused_with_the_key_that_was_meant() {
    let sandbox = Sandbox::overlay();
    for (key, meant) in [
        ("Hijack", "hijack"),
        ("hijacks", "hijack"),
        ("hijackCidr", "hijackCIDR"),
        ("hijackCIDRs", "hijackCIDR"),
        ("exludeCIDR", "excludeCIDR"),
        ("annotationCIDR", "annotationCIDRs"),
        ("Mode", "mode"),
        ("modus", "mode"),
        ("failpolicy", "failPolicy"),
        ("replyPaths", "replyPath"),
        ("vethNames", "vethName"),
        ("vethMtu", "vethMTU"),
        ("remoteDir", "remotesDir"),
        ("node_file", "nodeFile"),
        ("statedir", "stateDir"),
        ("log_file", "logFile"),
        ("LOGLEVEL", "logLevel"),
    ] {
        // Even `null`: the key is there.
        for value in [json!(null), json!("x")] {
            sandbox.refuses(json!({ key: value }), 7, &[key, &format!("did you mean \"{meant}\"")]);
        }
    }
    for (annotation, meant) in [("hijak", "hijack"), ("hijack-cidrs", "hijack-cidr"), ("Exclude-Cidr", "exclude-cidr")]
    {
        let parts = [annotation, &format!("did you mean \"crosslink.dev/{meant}\"")];
        sandbox.refuses(annotated(json!({ format!("crosslink.dev/{annotation}"): "none" })), 7, &parts);
        let parts = ["args.cni", annotation, &format!("did you mean \"{meant}\"")];
        sandbox.refuses(json!({"args": {"cni": { annotation: "none" }}}), 7, &parts);
    }
}

#[test]
fn keys_that_runtimes_and_multus_inject_are_accepted() {
    let sandbox = Sandbox::overlay();
    let mut conf = sandbox.conf(json!({
        "deviceID": "0000:3b:00.2", "pciBusID": "0000:3b:00.2", "k8s.v1.cni.cncf.io/resourceName": "intel.com/sriov",
        "k8s.v1.cni.cncf.io/device-info": {"type": "pci"}, "cniVersions": ["0.4.0", "1.0.0", "1.1.0", "99.0.0"],
        "disableCheck": true, "disableGC": "true", "ipMasq": false, "ipam": {"type": "host-local"}, "dns": {},
        "cni.dev/valid-attachments": null, "cni.dev/attachments": null, "master": "eth7", "mtu": 9000, "": 1,
        "a\u{1b}[31m\nkey": {}, "loadOnlyInlinedPlugins": true, "keyA": null,
        "args": {"cni": {"ips": ["10.1.2.3"], "mac": "02:00:00:00:00:01", "labels": [{"key": "a", "value": "b"}]}, "other": 1},
    }));
    conf["runtimeConfig"] = json!({
        "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}],
        "bandwidth": {"IngressRate": 1000, "IngressBurst": 2000, "EgressRate": 1, "EgressBurst": 2},
        "dns": {"Servers": ["10.1.0.1"], "Searches": [], "Options": []}, "ips": ["10.88.0.5/24"],
        "mac": "02:00:00:00:00:05", "infinibandGUID": "c2:11:22:33:44:55:66:77", "deviceID": "0000:3b:00.2",
        "CNIDeviceInfoFile": "/var/run/x.json", "ipRanges": [[{"subnet": "10.1.0.0/16"}]], "cgroupPath": null,
    });
    for command in ["ADD", "CHECK", "STATUS", "GC", "DEL"] {
        let reply = sandbox.call(command, &conf).run().unwrap();
        assert!(reply.ok(), "{command}: {reply:?}");
        if command == "ADD" {
            assert_eq!(reply.json(), conf["prevResult"]);
            assert_eq!(sandbox.routes(), CLUSTER_B);
            assert!(reply.stderr.contains("XL-UNKNOWN-KEY"), "{reply:?}");
            assert!(!reply.stderr.contains('\u{1b}'), "{reply:?}");
        }
    }
    assert!(sandbox.routes().is_empty());
}

#[test]
fn del_accepts_every_configuration() {
    let sandbox = Sandbox::overlay();
    let mut odd: Vec<Value> = wrong_values()
        .into_iter()
        // With another state directory the record is not found, by design.
        .filter(|(key, ..)| *key != "stateDir")
        .flat_map(|(key, values, _)| values.into_iter().map(move |value| json!({ key: value })))
        .collect();
    odd.extend([json!({"hijak": "all"}), json!({"name": null}), json!({"name": "a b"}), json!({"args": 7})]);
    odd.extend([json!({"runtimeConfig": "x"}), json!({"prevResult": []}), json!({"prevResult": {"ips": 5}})]);
    odd.extend([annotated(json!({"crosslink.dev/hijack": 7, "crosslink.dev/hijak": "x"})), annotated(json!([]))]);
    for extra in odd {
        println!("{extra}");
        sandbox.add(json!({}));
        silent(&sandbox.run("DEL", extra));
        assert!(sandbox.routes().is_empty() && sandbox.site.records().is_empty());
    }
}

#[test]
fn no_annotations_come_in_every_shape() {
    let sandbox = Sandbox::overlay();
    let foreign: Value = (0..4096)
        .map(|n| (format!("example.com/key-{n}"), json!("x".repeat(48))))
        .collect::<serde_json::Map<_, _>>()
        .into();
    assert!(foreign.to_string().len() > 256 * 1024);
    let not_strings =
        json!({"example.com/a": 7, "example.com/b": null, "example.com/c": {"d": []}, "crosslink.dev.example/x": 1});
    for extra in [
        json!({}),
        json!({"runtimeConfig": null}),
        json!({"runtimeConfig": {}}),
        annotated(json!(null)),
        annotated(json!({})),
        annotated(foreign),
        annotated(not_strings),
        annotated(json!({"crosslink.dev/something-of-a-newer-version": "x"})),
        annotated(json!({"crosslink.dev/": "x"})),
        annotated(json!({"crosslink.dev/hijack-cidr": "", "crosslink.dev/exclude-cidr": " "})),
    ] {
        sandbox.add(extra);
        assert_eq!(sandbox.routes(), CLUSTER_B);
    }
}

#[test]
fn annotations_of_a_wrong_shape_are_refused() {
    let sandbox = Sandbox::overlay();
    for container in [json!([]), json!("x"), json!(7), json!([["crosslink.dev/hijack", "all"]])] {
        sandbox.refuses(annotated(container), 7, &[ANNOTATIONS]);
    }
    for config in [json!([]), json!("x"), json!(7)] {
        sandbox.refuses(json!({ "runtimeConfig": config }), 7, &["runtimeConfig"]);
    }
    for value in [json!(7), json!(null), json!(true), json!({}), json!(["all"])] {
        for key in ["crosslink.dev/hijack", "crosslink.dev/hijack-cidr", "crosslink.dev/exclude-cidr"] {
            sandbox.refuses(annotated(json!({ key: value })), 7, &[key, "string"]);
        }
    }
    for args in [json!(7), json!([]), json!("x"), json!({"cni": 7}), json!({"cni": []})] {
        sandbox.refuses(json!({ "args": args }), 7, &["args"]);
    }
}

#[test]
fn bad_annotations_name_annotation_value_and_cure() {
    let sandbox = Sandbox::overlay();
    let hijack = [
        ("", ""),
        ("all,cluster-b", "alone"),
        ("none,all", "alone"),
        ("Cluster-B", "cluster name"),
        ("a,,b", "cluster name"),
        ("a b", "cluster name"),
    ];
    for (value, cure) in hijack {
        sandbox.refuses(annotated(json!({"crosslink.dev/hijack": value})), 7, &["crosslink.dev/hijack", value, cure]);
        sandbox.refuses(json!({"args": {"cni": {"hijack": value}}}), 7, &["hijack", value, cure]);
    }
    let many = (0..257).map(|n| format!("10.0.{}.{}", n / 256, n % 256)).collect::<Vec<_>>().join(",");
    let bad = [
        "x",
        "10.1.0.0/33",
        "10.1.0.0/16,",
        ",",
        "10.1.0.0/16 10.2.0.0/16",
        "10.1.0.0/16;10.2.0.0/16",
        "010.1.0.0/16",
        "fd00::/129",
        "::ffff:10.0.0.1",
    ];
    for key in ["crosslink.dev/hijack-cidr", "crosslink.dev/exclude-cidr"] {
        for value in bad {
            sandbox.refuses(annotated(json!({ key: value })), 7, &[key, value]);
        }
        sandbox.refuses(annotated(json!({ key: many })), 7, &[key, "257", "256"]);
    }
    let never = [
        "0.0.0.0/0",
        "::/0",
        "127.0.0.1",
        "::1",
        "224.0.0.0/4",
        "ff02::1",
        "169.254.169.254",
        "169.254.0.0/16",
        "fe80::/64",
        "10.88.0.5",
        "fd88::5",
        "10.88.0.0/24",
        "10.88.0.128/25",
    ];
    for value in never {
        let shown = value.split('/').next().unwrap();
        sandbox.refuses(
            annotated(json!({"crosslink.dev/hijack-cidr": value})),
            7,
            &["crosslink.dev/hijack-cidr", shown],
        );
    }
    for value in ["0.0.0.0/0", "::/0", "127.0.0.0/8", "224.0.0.1", "10.88.0.5/32", "10.88.0.0/24"] {
        sandbox.refuses(json!({"hijackCIDR": [value]}), 7, &["hijackCIDR", value.split('/').next().unwrap()]);
    }
}

#[test]
fn hijack_selects() {
    let sandbox = Sandbox::overlay();
    sandbox.site.cluster("cluster-c", &["172.112.0.0/16"], &[]);
    let both = ["10.243.0.0/18", "172.111.0.0/16", "172.112.0.0/16", "fd11::/64", "fd43::/112"];
    for (value, routes) in [
        ("all", &both[..]),
        (" all ", &both),
        ("none", &[]),
        ("cluster-c", &["172.112.0.0/16"]),
        ("cluster-c, cluster-b", &both),
        ("cluster-b ,cluster-b", &CLUSTER_B),
        ("not-known-yet", &[]),
    ] {
        sandbox.add(annotated(json!({"crosslink.dev/hijack": value})));
        assert_eq!(sandbox.routes(), routes, "{value}");
    }
    for (value, routes) in [
        (json!("none"), &[][..]),
        (json!([]), &[]),
        (json!(["cluster-c"]), &["172.112.0.0/16"]),
        (json!("cluster-c"), &["172.112.0.0/16"]),
        (json!(null), &both),
    ] {
        sandbox.add(json!({ "hijack": value }));
        assert_eq!(sandbox.routes(), routes, "{value}");
    }
    // The annotation replaces the conflist's choice.
    let mut extra = annotated(json!({"crosslink.dev/hijack": "cluster-c"}));
    extra["hijack"] = json!("none");
    sandbox.add(extra);
    assert_eq!(sandbox.routes(), ["172.112.0.0/16"]);
}

#[test]
fn cidrs_are_normalised_to_one_route_each() {
    let sandbox = Sandbox::overlay();
    let expected = ["10.1.0.0/16", "10.2.3.4", "fd12:ab::/32", "fd13::1"];
    let text = "\t10.1.2.3/16 ,10.1.0.0/16,10.1.255.255/16,\n10.2.3.4, 10.2.3.4/32 ,FD12:00AB:0::1/32,fd12:ab::/32,fd13:0::0001,Fd13::1/128,10.1.7.0/24";
    let none = |mut extra: Value| {
        extra["hijack"] = json!("none");
        extra
    };
    let list: Vec<&str> = text.split(',').collect();
    for extra in [
        annotated(json!({"crosslink.dev/hijack-cidr": text})),
        json!({"args": {"cni": {"hijack-cidr": text}}}),
        json!({"args": {"cni": {"hijack-cidr": list}}}),
        json!({ "hijackCIDR": list }),
    ] {
        sandbox.add(none(extra));
        assert_eq!(sandbox.routes(), expected);
        silent(&sandbox.run("CHECK", json!({})));
        silent(&sandbox.del(json!({})));
    }
}

#[test]
fn excludes_punch_holes() {
    let sandbox = Sandbox::overlay();
    let holes = [
        "10.1.0.0/17",
        "10.1.128.0/18",
        "10.1.192.0/19",
        "10.1.224.0/20",
        "10.1.240.0/21",
        "10.1.248.0/22",
        "10.1.252.0/23",
        "10.1.254.0/24",
    ];
    let mut extra = annotated(json!({"crosslink.dev/exclude-cidr": " 10.1.255.7/24 , fd00::/8"}));
    extra["hijackCIDR"] = json!(["10.1.0.0/16", "10.2.0.0/16", "fd12::/32"]);
    extra["excludeCIDR"] = json!(["10.2.0.0/16"]);
    extra["hijack"] = json!("none");
    sandbox.add(extra);
    assert_eq!(sandbox.routes(), holes);
    sandbox.add(json!({"args": {"cni": {"exclude-cidr": "0.0.0.0/0"}}}));
    assert_eq!(sandbox.routes(), ["fd11::/64", "fd43::/112"]);
}

#[test]
fn annotations_win_over_args_key_by_key() {
    let sandbox = Sandbox::overlay();
    let args = json!({"hijack": "all", "hijack-cidr": "10.1.0.0/16", "exclude-cidr": "172.111.0.0/16"});
    let mut extra = annotated(json!({"crosslink.dev/hijack": "none", "crosslink.dev/hijack-cidr": "10.2.0.0/16"}));
    extra["args"] = json!({ "cni": args });
    sandbox.add(extra);
    assert_eq!(sandbox.routes(), ["10.2.0.0/16"]);
    // A bad value that is not used does not matter; one that is used does.
    let mut extra = annotated(json!({"crosslink.dev/hijack": "none"}));
    extra["args"] = json!({"cni": {"hijack": "B", "hijack-cidr": "10.3.0.0/16"}});
    sandbox.add(extra.clone());
    assert_eq!(sandbox.routes(), ["10.3.0.0/16"]);
    extra["args"]["cni"]["hijack-cidr"] = json!("10.3.0.0/99");
    sandbox.refuses(extra, 7, &["hijack-cidr", "10.3.0.0/99"]);
}

#[test]
fn cni_args_come_in_any_order_and_shape() {
    let sandbox = Sandbox::overlay();
    let pod = |namespace: &str, name: &str, uid: &str| json!({"namespace": namespace, "name": name, "uid": uid});
    for (args, expected) in [
        (
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u",
            pod("ns", "p-0", "u"),
        ),
        ("K8S_POD_UID=u;K8S_POD_NAME=p-0;FUTURE=x;K8S_POD_NAMESPACE=ns", pod("ns", "p-0", "u")),
        (";;K8S_POD_NAME=p-0;;=;=x;x;x=;K8S_POD_UID;K8S_POD_NAMESPACE=ns;", pod("ns", "p-0", "")),
        ("K8S_POD_NAME=p=q=r;K8S_POD_NAMESPACE=", pod("", "p=q=r", "")),
        ("", pod("", "", "")),
        ("\u{1b}[31m\n\"", pod("", "", "")),
    ] {
        let call = Call { args: args.to_owned(), ..sandbox.call("ADD", &sandbox.conf(json!({}))) };
        let reply = call.run().unwrap();
        assert!(reply.ok(), "{reply:?}");
        assert_eq!(sandbox.record()["pod"], expected, "{args}");
    }
}

/// An underlay pod's author may not open paths that the administrator did not.
#[test]
fn annotations_of_underlay_pods_stay_within_bounds() {
    let sandbox = Sandbox::underlay();
    sandbox.site.node(json!({"addresses": ["172.20.0.11", "fd20::11"], "podCIDRs": ["10.50.0.0/16"]}));
    let mut extra = annotated(json!({"crosslink.dev/hijack-cidr": "10.9.0.0/16"}));
    sandbox.refuses(extra.clone(), 7, &["crosslink.dev/hijack-cidr", "10.9.0.0/16", "annotationCIDRs"]);
    for value in ["172.20.0.11", "fd20::11", "169.254.169.254", "172.0.0.0/8"] {
        sandbox.refuses(
            annotated(json!({"crosslink.dev/hijack-cidr": value})),
            7,
            &["crosslink.dev/hijack-cidr", value],
        );
    }
    extra["annotationCIDRs"] = json!(["10.8.0.0/15"]);
    sandbox.add(extra);
    assert!(sandbox.routes().contains(&"10.9.0.0/16".to_owned()));
    // Inside remote, local and hijackCIDR ranges.
    let mut extra = annotated(json!({"crosslink.dev/hijack-cidr": "172.111.7.0/24,10.50.1.0/24,10.60.1.1"}));
    extra["hijackCIDR"] = json!(["10.60.0.0/16"]);
    extra["hijack"] = json!("none");
    sandbox.add(extra);
    assert!(sandbox.routes().contains(&"172.111.7.0/24".to_owned()), "{:?}", sandbox.routes());
    silent(&sandbox.del(json!({})));
}

//! Results of the plugins before, and versions: what goes in comes out, to the byte.
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
use sandbox::{Sandbox, failure, refused, silent};
use serde_json::{Value, json};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Input with a version and a prevResult as text.
fn input(sandbox: &Sandbox, version: &str, prev: &str) -> Vec<u8> {
    let text = String::from_utf8(sandbox.conf_text("prevResult", prev)).unwrap();
    text.replacen("\"cniVersion\":\"1.1.0\"", &format!("\"cniVersion\":\"{version}\""), 1).into_bytes()
}

/// Results that differ from what a typed copy would print, for one version.
fn results(version: &str) -> Vec<String> {
    let of = |rest: &str| format!("{{\"cniVersion\":\"{version}\",{rest}}}");
    let infiniband = "80:00:02:08:fe:80:00:00:00:00:00:00:e4:1d:2d:03:00:a5:f1:e1";
    vec![
        format!("{{\"cniVersion\":\"{version}\"}}"),
        of(r#""dns":{}"#),
        of(r#""ips":[],"interfaces":[],"routes":[],"dns":{}"#),
        of(r#""ips":null,"interfaces":null,"routes":null,"dns":null"#),
        of(
            r#""ips":[{"version":"4","address":"10.88.0.5/24","gateway":"10.88.0.1"},{"version":"6","address":"fd88::5/64"}],"dns":{}"#,
        ),
        of(
            r#""interfaces":[{"name":"eth0","mac":"0A:1b:00:00:00:05","sandbox":"/x"},{"name":"cni0"}],"ips":[{"interface":0,"address":"10.88.0.5/24"}]"#,
        ),
        of(&format!(r#""interfaces":[{{"name":"ib0","mac":"{infiniband}","sandbox":"/x"}}]"#)),
        of(
            r#""interfaces":[{"name":"eth0","sandbox":"/x","mtu":1500,"socketPath":"/run/vdpa","pciID":"0000:00:1f.6","future":{"a":[1]}}]"#,
        ),
        of(
            r#""routes":[{"dst":"10.0.0.0/8","gw":"10.88.0.1","mtu":1400,"advmss":1360,"priority":5,"table":100,"scope":253,"later":null}]"#,
        ),
        of(r#""dns":{"nameservers":["10.1.0.1"],"domain":"x","search":["a","b"],"options":["ndots:5"],"more":true}"#),
        of(r#""x-vendor":{"z":1,"a":2,"z":3},"y":[null,true,false,"",{}]"#),
        of(r#""n":[1.50,-0,0e0,1E+2,1e400,-1e-400,12345678901234567890123,0.1000000000000000055511151231257827]"#),
        of(r#""t":"\u00e9\u0041\/\ud83d\ude00 é \u2028 \ud800 \n\t\"\\","\u0069\u0070":1"#),
        of("\n \"ips\" :\t[ ] ,\r\n  \"dns\" : { }\n"),
        of(
            r#""ips":[{"address":"10.88.0.5/24","interface":7},{"address":"10.88.0.6/24","interface":-1},{"interface":0}]"#,
        ),
        format!(r#"{{"ips":[],"cniVersion":"{version}"}}"#),
        of(&format!("\"big\":\"{}\"", "x".repeat(1 << 20))),
    ]
}

#[test]
fn add_prints_prev_result_byte_for_byte() {
    let sandbox = Sandbox::overlay();
    for version in VERSIONS {
        for prev in results(version) {
            let reply = sandbox.run_bytes("ADD", &input(&sandbox, version, &prev));
            let shown: String = prev.chars().take(300).collect();
            println!("{version} {shown}");
            assert!(reply.ok(), "{:?} {}", reply.exit, reply.stdout.chars().take(500).collect::<String>());
            assert!(
                reply.stdout.trim_end_matches('\n') == prev,
                "{}",
                reply.stdout.chars().take(500).collect::<String>()
            );
        }
        assert_eq!(sandbox.routes().len(), 4, "the cluster's CIDRs");
        silent(&sandbox.run("DEL", json!({"cniVersion": version})));
        assert!(sandbox.routes().is_empty());
    }
}

#[test]
fn the_version_is_filled_in_where_it_is_missing() {
    let sandbox = Sandbox::overlay();
    for version in VERSIONS {
        for (prev, rest) in [
            ("{}", json!({})),
            ("{ }", json!({})),
            (r#"{"dns":{}}"#, json!({"dns": {}})),
            (r#"{ "ips": [ ] , "x" : 1 }"#, json!({"ips": [], "x": 1})),
        ] {
            let reply = sandbox.run_bytes("ADD", &input(&sandbox, version, prev));
            assert!(reply.ok(), "{reply:?}");
            let mut expected = rest;
            expected["cniVersion"] = json!(version);
            assert_eq!(reply.json(), expected, "{prev}");
        }
    }
}

/// libcni takes a version that is `null` or empty for one that is missing.
#[test]
fn a_null_or_empty_version_is_filled_in_too() {
    let sandbox = Sandbox::overlay();
    for prev in [r#"{"cniVersion":null,"dns":{}}"#, r#"{"dns":{},"cniVersion":null}"#, r#"{"cniVersion":"","dns":{}}"#]
    {
        let reply = sandbox.run_bytes("ADD", &input(&sandbox, "1.0.0", prev));
        assert!(reply.ok(), "{reply:?}");
        assert_eq!(reply.json(), json!({"cniVersion": "1.0.0", "dns": {}}), "{prev}");
        assert_eq!(reply.stdout.matches("cniVersion").count(), 1, "the key is there twice: {}", reply.stdout);
    }
}

#[test]
fn prev_results_without_interfaces_or_addresses_do_not_matter() {
    let sandbox = Sandbox::overlay();
    for prev in [json!({}), json!({"interfaces": []}), json!({"ips": []}), json!({"ips": null, "interfaces": null})] {
        let mut prev = prev;
        prev["cniVersion"] = json!("1.1.0");
        sandbox.add(json!({ "prevResult": prev }));
        // The kernel tells what the pod has.
        assert_eq!(sandbox.routes(), ["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"]);
        silent(&sandbox.del(json!({})));
    }
}

#[test]
fn prev_results_that_are_none_are_refused() {
    let sandbox = Sandbox::overlay();
    let mut conf = sandbox.conf(json!({}));
    conf.as_object_mut().unwrap().remove("prevResult");
    sandbox.unchanged(|| refused(&sandbox.call("ADD", &conf).run().unwrap(), 7, &["prevResult", "chained"]));
    sandbox.refuses(json!({"prevResult": null}), 7, &["prevResult", "chained"]);
    let odd = [
        json!([]),
        json!([{"cniVersion": "1.1.0"}]),
        json!("{}"),
        json!(7),
        json!(true),
        json!({"ips": {}}),
        json!({"ips": ["10.88.0.5/24"]}),
        json!({"ips": [{"address": 5}]}),
        json!({"ips": [{"address": "10.88.0.5/99999"}]}),
        json!({"ips": [{"address": "nonsense"}]}),
        json!({"ips": [{"address": "10.88.0.5/24", "interface": "0"}]}),
        json!({"interfaces": "eth0"}),
        json!({"interfaces": [[]]}),
        json!({"interfaces": [{"name": 1}]}),
    ];
    for prev in odd {
        sandbox.refuses(json!({ "prevResult": prev }), 6, &["prevResult"]);
    }
}

/// serde reads a list as a struct, field by field; these are objects.
#[test]
fn lists_in_the_place_of_interfaces_and_addresses_are_refused() {
    let sandbox = Sandbox::overlay();
    for prev in [json!({"interfaces": [["eth0", "/x"]]}), json!({"ips": [[0, "10.88.0.5/24", "10.88.0.1"]]})] {
        sandbox.refuses(json!({ "prevResult": prev }), 6, &["prevResult"]);
    }
}

#[test]
fn verbs_below_their_version_are_refused() {
    let sandbox = Sandbox::overlay();
    for (command, versions) in [("CHECK", &VERSIONS[..2]), ("GC", &VERSIONS[..4]), ("STATUS", &VERSIONS[..4])] {
        for version in versions {
            let conf = json!({"cniVersion": version, "cni.dev/valid-attachments": null});
            let reply = sandbox.unchanged(|| sandbox.run(command, conf));
            refused(&reply, 1, &[command]);
            assert_eq!(failure(&reply).version, *version);
        }
    }
    for version in &VERSIONS[2..] {
        let version = json!({ "cniVersion": version });
        sandbox.add(json!({ "prevResult": version.clone(), "cniVersion": version["cniVersion"] }));
        silent(&sandbox.run("CHECK", version.clone()));
        silent(&sandbox.run("DEL", version));
    }
}

#[test]
fn a_verb_below_its_version_names_the_version_that_is_too_low() {
    let sandbox = Sandbox::overlay();
    for (command, version, needed) in
        [("CHECK", "0.3.1", "0.4.0"), ("GC", "1.0.0", "1.1.0"), ("STATUS", "0.4.0", "1.1.0")]
    {
        refused(&sandbox.run(command, json!({ "cniVersion": version })), 1, &[command, version, needed]);
    }
}

#[test]
fn unknown_versions_are_refused() {
    let sandbox = Sandbox::overlay();
    for version in ["0.1.0", "0.2.0", "0.3.2", "1.0.1", "1.2.0", "2.0.0", "99.99.99"] {
        for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let reply = sandbox.unchanged(|| sandbox.run(command, json!({ "cniVersion": version })));
            refused(&reply, 1, &[]);
        }
        refused(&sandbox.run("ADD", json!({ "cniVersion": version })), 1, &[version]);
    }
    // Without a version the specification assumes 0.1.0.
    for conf in [json!({ "cniVersion": null }), json!({ "cniVersion": "" })] {
        refused(&sandbox.unchanged(|| sandbox.run("ADD", conf)), 1, &["0.1.0"]);
    }
}

/// Go's parser is strconv.Atoi of each part: it takes "1" for 1.0.0, "01.1.0" for 1.1.0, and a runtime lets them through.
#[test]
fn malformed_versions_are_refused_or_taken_as_go_does() {
    let sandbox = Sandbox::overlay();
    let malformed =
        ["x", "1.1.0.0", "v1.1.0", " 1.1.0", "1.1.0\n", "1.1.0-rc1", "1..0", "-1.1.0"].map(|text| json!(text));
    for version in malformed.into_iter().chain([json!(["1.1.0"]), json!({}), json!(true)]) {
        let reply = sandbox.unchanged(|| sandbox.run("ADD", json!({ "cniVersion": version })));
        assert!([1, 6].contains(&failure(&reply).code), "{version}: {reply:?}");
    }
    for version in ["1", "1.1", "+1.1.0", "01.1.0"] {
        let reply = sandbox.run("ADD", json!({ "cniVersion": version }));
        assert!(reply.ok() || [1, 6].contains(&failure(&reply).code), "{version}: {reply:?}");
    }
}

/// The specification, "Network configuration format": a string. Go refuses to decode anything else.
#[test]
fn a_version_that_is_a_number_is_refused() {
    let sandbox = Sandbox::overlay();
    for version in [json!(1.1), json!(1)] {
        let reply = sandbox.unchanged(|| sandbox.run("ADD", json!({ "cniVersion": version })));
        assert!([1, 6, 7].contains(&failure(&reply).code), "{version}: {reply:?}");
    }
}

#[test]
fn errors_carry_the_configured_version() {
    let sandbox = Sandbox::overlay();
    for version in VERSIONS {
        let reply = sandbox.run("ADD", json!({"cniVersion": version, "hijack": 7}));
        assert_eq!(failure(&reply).version, version, "{reply:?}");
    }
    // Also where the environment is wrong before the configuration is looked at.
    for version in VERSIONS {
        let call =
            Call { ifname: String::new(), ..sandbox.call("ADD", &sandbox.conf(json!({ "cniVersion": version }))) };
        assert_eq!(failure(&call.run().unwrap()).version, version);
    }
}

/// The specification, "Error": `cniVersion` is the same value as provided by the configuration.
#[test]
fn errors_carry_the_configured_version_also_where_it_is_unknown() {
    let sandbox = Sandbox::overlay();
    for version in ["0.2.0", "1.2.0", "99.99.99"] {
        let reply = sandbox.run("ADD", json!({ "cniVersion": version }));
        assert_eq!(failure(&reply).version, version, "{reply:?}");
    }
}

#[test]
fn a_pod_with_an_infiniband_mac_and_a_1_1_result_is_routed() {
    let sandbox = Sandbox::underlay();
    let prev = json!({
        "cniVersion": "1.1.0", "dns": {},
        "interfaces": [{"name": "eth0", "sandbox": sandbox.netns(), "mtu": 2044, "pciID": "0000:3b:00.2",
            "mac": "80:00:02:08:fe:80:00:00:00:00:00:00:e4:1d:2d:03:00:a5:f1:e1"}],
        "ips": [{"address": "172.20.1.5/16", "gateway": "172.20.0.1", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "172.20.0.1", "mtu": 1400, "table": 100}],
    });
    let reply = sandbox.add(json!({ "prevResult": prev }));
    assert_eq!(reply.json(), prev);
    let record: Value = sandbox.record();
    assert_eq!((&record["state"], &record["attached"]), (&json!("ready"), &json!("underlay")));
    silent(&sandbox.run("CHECK", json!({ "prevResult": prev })));
    silent(&sandbox.del(json!({})));
}

//! The definitions of our objects, at a real API server.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "tests"
)]

#[path = "support/agent_source.rs"]
mod agent_source;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::fs;

use agent_source::{CLUSTER, Kind, Objects, crds};
use apiserver::ApiServer;
use serde_json::{Value, json};

const NODE: Kind = ("crosslink.dev", "v1alpha1", "ClusterNode", "clusternodes");
const CONFIG: Kind = ("crosslink.dev", "v1alpha1", "NodeConfig", "nodeconfigs");

/// What is shipped is what the agent prints.
#[test]
fn the_shipped_definitions_are_those_of_the_agent() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../install/crds/crosslink.yaml");
    assert!(
        fs::read_to_string(path).unwrap() == crds(),
        "install/crds/crosslink.yaml is stale: target/debug/crosslink-agent crds > install/crds/crosslink.yaml"
    );
}

/// Every object that must be refused, with a part of the reason.
fn bad_clusters() -> Vec<(&'static str, Value, &'static str)> {
    let pods = |texts: &[&str]| json!({ "podCIDRs": texts });
    vec![
        ("b", json!({}), "give podCIDRs"),
        ("b", json!({"podCIDRs": [], "serviceCIDRs": []}), "give podCIDRs"),
        ("b", json!({"podCidrs": ["10.1.0.0/16"]}), "podCidrs"),
        ("b", pods(&["10.1.0.0"]), "not a CIDR"),
        ("b", pods(&["10.1.0.0/33"]), "not a CIDR"),
        ("b", pods(&["10.1.0/16"]), "not a CIDR"),
        ("b", pods(&["010.1.0.0/16"]), "not a CIDR"),
        ("b", pods(&["10.1.0.0/016"]), "not a CIDR"),
        ("b", pods(&["10.1.0.0/255.255.0.0"]), "not a CIDR"),
        ("b", pods(&[" 10.1.0.0/16"]), "not a CIDR"),
        ("b", pods(&["::ffff:10.1.0.0/112"]), "not a CIDR"),
        ("b", pods(&["fe80::%eth0/64"]), "not a CIDR"),
        ("b", pods(&["cluster-b"]), "not a CIDR"),
        ("b", pods(&[""]), "not a CIDR"),
        ("b", pods(&["10.1.2.3/16"]), "beyond the prefix length"),
        ("b", pods(&["fd00::1/64"]), "beyond the prefix length"),
        ("b", pods(&["0.0.0.0/0"]), "too wide"),
        ("b", pods(&["0.0.0.0/1", "128.0.0.0/1"]), "too wide"),
        ("b", pods(&["::/0"]), "too wide"),
        ("b", pods(&["8000::/1"]), "too wide"),
        ("b", pods(&["127.0.0.0/8"]), "never remote"),
        ("b", pods(&["169.254.0.0/16"]), "never remote"),
        ("b", pods(&["224.0.0.0/8"]), "never remote"),
        ("b", pods(&["0.0.0.0/8"]), "never remote"),
        ("b", pods(&["fe80::/64"]), "never remote"),
        ("b", pods(&["ff00::/8"]), "never remote"),
        ("b", pods(&["10.1.0.0/16", "10.1.0.0/16"]), "twice"),
        ("b", pods(&["fd00::/64", "fd00:0:0::/64"]), "twice"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "serviceCIDRs": ["10.1.0.0/16"]}), "twice"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "ipFamily": "ipv6"}), "a CIDR is IPv4"),
        ("b", json!({"serviceCIDRs": ["fd00::/64"], "ipFamily": "ipv4"}), "a CIDR is IPv6"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "ipFamily": "IPv4"}), "ipFamily"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "networkType": "mesh"}), "networkType"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "transport": "ipsec"}), "transport"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "mtu": 575}), "mtu"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "mtu": 65536}), "mtu"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "mtu": "1400"}), "mtu"),
        ("b", json!({"podCIDRs": "10.1.0.0/16"}), "podCIDRs"),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"], "gateway": "x"}), "gateway"),
        ("b.example.com", pods(&["10.1.0.0/16"]), "RFC 1123 label"),
        ("b23456789012345678901234567890123456789012345678901234567890abcd", pods(&["10.1.0.0/16"]), "RFC 1123 label"),
        ("b", json!({"podCIDRs": (0..101).map(|i| format!("10.{i}.0.0/16")).collect::<Vec<_>>()}), "podCIDRs"),
    ]
}

fn good_clusters() -> Vec<Value> {
    let many: Vec<String> = (0..100).map(|i| format!("10.{i}.0.0/16")).collect();
    let services: Vec<String> = (0..100).map(|i| format!("fd00:{i:x}::/64")).collect();
    vec![
        json!({"podCIDRs": ["10.1.0.0/16"]}),
        json!({"serviceCIDRs": ["fd00::/108"]}),
        json!({"podCIDRs": ["10.1.0.0/16", "FD00:1::/48"], "serviceCIDRs": ["10.2.0.1/32"], "mtu": 1400,
            "networkType": "gateway", "ipFamily": "all", "transport": "vxlan"}),
        json!({"podCIDRs": ["16.0.0.0/4"], "ipFamily": "ipv4", "mtu": 576}),
        json!({"podCIDRs": ["fd00::/8"], "ipFamily": "ipv6", "mtu": 65535}),
        json!({"podCIDRs": many, "serviceCIDRs": services}),
    ]
}

/// The API server takes the definitions, within its budget for rules, and refuses typing errors.
#[test]
fn typing_errors_are_refused() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    for (name, spec, part) in bad_clusters() {
        let err = objects.try_put(CLUSTER, "", name, json!({"spec": spec})).expect_err(&spec.to_string());
        assert!(err.contains(part), "{spec}: {err}");
    }
    for spec in good_clusters() {
        objects.put(CLUSTER, "", "good", json!({"spec": spec}));
        objects.delete(CLUSTER, "", "good");
    }
    nodes(&objects);
    columns(&objects, &server);
}

fn nodes(objects: &Objects) {
    let node = |more: Value| {
        let mut spec = json!({"clusterName": "b", "nodeName": "n1"});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "spec": spec })
    };
    for (more, part) in [
        (json!({}), "give ip"),
        (json!({"ip": "fd00::1"}), "not an IPv4"),
        (json!({"ip": "10.0.0.256"}), "not an IPv4"),
        (json!({"ip6": "10.0.0.1"}), "not an IPv6"),
        (json!({"ip": "10.0.0.1", "externalPort": 1}), "needs externalIP"),
        (json!({"ip": "10.0.0.1", "externalIP": "x"}), "not an IP"),
        (json!({"ip": "10.0.0.1", "roles": ["router"]}), "roles"),
        (json!({"ip": "10.0.0.1", "roles": ["gateway", "gateway"]}), "roles"),
        (json!({"ip": "10.0.0.1", "podCIDRs": ["10.0.0.1/24"]}), "beyond"),
        (json!({"ip": "10.0.0.1", "interfaceName": "a-name-too-long-for-it"}), "interfaceName"),
    ] {
        let err = objects.try_put(NODE, "", "b-n1", node(more.clone())).expect_err(&more.to_string());
        assert!(err.contains(part), "{more}: {err}");
    }
    let good = json!({"ip": "10.0.0.1", "ip6": "fd00::1", "externalIP": "192.0.2.1", "externalPort": 4811,
        "roles": ["gateway"], "interfaceName": "eth0", "podCIDRs": ["10.1.0.0/24"]});
    objects.put(NODE, "", "b-n1", node(good));
}

/// Defaults are filled in, and `kubectl get` shows the columns.
fn columns(objects: &Objects, server: &ApiServer) {
    objects.cluster("b", &["10.1.0.0/16"], &[]);
    let spec = &objects.get(CLUSTER, "", "b")["spec"];
    assert_eq!(
        (&spec["networkType"], &spec["ipFamily"], &spec["transport"]),
        (&json!("p2p"), &json!("all"), &json!("external"))
    );
    objects.put(CONFIG, "", "n1", json!({"spec": {"generation": 3}}));
    let kubectl = std::path::Path::new(&std::env::var("KUBEBUILDER_ASSETS").unwrap()).join("kubectl");
    if !kubectl.exists() {
        return;
    }
    for (kind, header, row) in [
        ("clusters.crosslink.dev", "NAME NETWORK_TYPE IP_FAMILY AGE", "b p2p all"),
        ("clusternodes.crosslink.dev", "NAME ROLES INTERFACE IP AGE", r#"b-n1 ["gateway"] eth0 10.0.0.1"#),
        ("nodeconfigs.crosslink.dev", "NAME SYNCED ROUTES AGE", "n1"),
    ] {
        let output = std::process::Command::new(&kubectl)
            .args(["get", kind, "--kubeconfig"])
            .arg(server.kubeconfig())
            .env("HOME", "/run/tmp")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[0], header);
        assert!(lines[1].starts_with(row), "{}", lines[1]);
    }
}

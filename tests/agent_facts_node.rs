//! Local facts without Kubernetes, with the built agent in a network namespace of its own: addresses follow the kernel,
//! files by hand stay, remote CIDRs that are local are refused.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "support/agent_facts.rs"]
mod agent_facts;

use std::{fs, os::unix::fs::MetadataExt};

use agent_facts::{LONG, Site};
use crosslink_testkit::{Netns, probe::wait_until};
use serde_json::json;

/// A node with one interface and no address yet.
fn node() -> Netns {
    let node = Netns::create("node");
    node.ip("link set lo up");
    for link in ["eno1", "eno2"] {
        node.ip(&format!("link add {link} type veth peer name {link}p"));
        node.ip(&format!("link set {link} addrgenmode none up"));
        node.ip(&format!("link set {link}p addrgenmode none up"));
    }
    node
}

#[test]
fn addresses_follow_the_kernel() {
    let node = node();
    node.ip("addr add 10.6.0.2/24 dev eno1");
    let site =
        Site::new("none", &["--cluster-name", "own", "--pod-cidrs", "10.244.0.0/16,fd44::/48"]).in_netns(node.path());
    let agent = site.start_up();
    site.wait_node(
        &agent,
        &json!({"version": 1, "writtenBy": "crosslink-agent", "clusterName": "own", "addresses": ["10.6.0.2"],
            "podCIDRs": ["10.244.0.0/16", "fd44::/48"], "serviceCIDRs": null}),
    );
    let meta = fs::metadata(site.node_file()).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o644, 0));

    node.ip("addr add 192.168.7.2/24 dev eno2");
    node.ip("addr add fd06::2/64 dev eno1 nodad");
    site.wait_node(&agent, &json!({"addresses": ["10.6.0.2", "fd06::2", "192.168.7.2"]}));
    // The address of the default route's interface becomes the primary one.
    node.ip("route add default via 192.168.7.1");
    site.wait_node(&agent, &json!({"addresses": ["192.168.7.2", "fd06::2", "10.6.0.2"]}));
    node.ip("addr del 10.6.0.2/24 dev eno1");
    site.wait_node(&agent, &json!({"addresses": ["192.168.7.2", "fd06::2"]}));
    // An interface that goes takes its addresses along.
    node.ip("link del eno2");
    site.wait_node(&agent, &json!({"addresses": ["fd06::2"]}));
    // Not the node's own.
    let before = fs::metadata(site.node_file()).unwrap().ino();
    node.ip("link add docker0 type veth peer name dockerp");
    node.ip("addr add 172.17.0.1/16 dev docker0");
    node.ip("link set docker0 up");
    node.ip("addr add 10.6.0.3/24 dev eno1");
    site.wait_node(&agent, &json!({"addresses": ["10.6.0.3", "fd06::2"]}));
    assert_ne!(fs::metadata(site.node_file()).unwrap().ino(), before);
    assert!(agent.terminate().success());
    assert_eq!(site.node()["addresses"], json!(["10.6.0.3", "fd06::2"]), "a stop changes nothing");
}

#[test]
fn a_restart_writes_nothing() {
    let node = node();
    node.ip("addr add 10.6.0.2/24 dev eno1");
    let site = Site::new("none", &["--service-cidrs", "10.96.0.0/16"]).in_netns(node.path());
    let agent = site.start_up();
    site.wait_node(&agent, &json!({"addresses": ["10.6.0.2"], "serviceCIDRs": ["10.96.0.0/16"]}));
    assert!(agent.terminate().success());
    let identity = || fs::metadata(site.node_file()).map(|meta| (meta.ino(), meta.mtime_nsec())).unwrap();
    let before = identity();
    let _agent = site.start_up();
    wait_until("the agent has decided", LONG, || site.status()["facts"]["facts"]["nodeFile"] == "by the agent");
    assert_eq!(identity(), before);
    assert!(site.get("/metrics").1.contains("crosslink_node_file_writes_total 0"));
    // Somebody removes it: it is there again.
    fs::remove_file(site.node_file()).unwrap();
    wait_until("the file is back", LONG, || site.node()["addresses"] == json!(["10.6.0.2"]));
    // A newer agent's, after a rollback: it is the agent's own all the same.
    site.write_node(r#"{"version":2,"writtenBy":"crosslink-agent","future":[7]}"#);
    wait_until("the file is ours again", LONG, || site.node()["version"] == 1);
}

#[test]
fn without_kubernetes_and_settings_nothing_is_written() {
    let node = node();
    node.ip("addr add 10.6.0.2/24 dev eno1");
    let site = Site::new("none", &[]).in_netns(node.path());
    let _agent = site.start_up();
    wait_until("the agent has decided", LONG, || site.status()["facts"]["facts"]["nodeFile"] == "not kept");
    assert!(!site.node_file().exists());
    assert_eq!(site.get("/readyz").0, 200);
    assert_eq!(site.findings("facts"), [""; 0]);
}

#[test]
fn a_file_by_hand_stays_and_its_values_hold() {
    let node = node();
    node.ip("addr add 10.6.0.2/24 dev eno1");
    let text = r#"{"version":1,"clusterName":"mine","podCIDRs":["10.7.0.0/16"]}"#;
    let site = Site::new("none", &["--cluster-name", "own", "--service-cidrs", "10.96.0.0/16"]).in_netns(node.path());
    site.write_node(text);
    site.remotes("b", &["10.7.1.0/24", "10.96.0.0/24"]);
    let agent = site.start_up();
    wait_until("the agent has decided", LONG, || site.status()["facts"]["facts"]["nodeFile"] == "by hand");
    let findings = site.findings("facts");
    assert_eq!(
        findings,
        [
            "XL-LOCAL-UNKNOWN node.json was written by hand and names no serviceCIDRs: add 10.96.0.0/16, or remove the \
             file and the agent writes it",
            // By the file's word alone: that is what the plugin reads.
            "XL-CIDR-LOCAL 10.7.1.0/24 of cluster b (source static) lies inside 10.7.0.0/16, which is local here",
        ]
    );
    assert_eq!(fs::read_to_string(site.node_file()).unwrap(), text);
    assert_eq!(site.get("/readyz").0, 200);
    // Nonsense may be somebody's work, too.
    site.write_node("{");
    wait_until("the file is found bad", LONG, || site.status()["facts"]["facts"]["nodeFile"] == "unusable");
    assert_eq!(fs::read_to_string(site.node_file()).unwrap(), "{");
    let status = site.status();
    assert!(status["parts"]["facts"]["text"].as_str().unwrap().contains("mend or remove it"), "{status}");
    // Without it the agent's own takes its place.
    fs::remove_file(site.node_file()).unwrap();
    site.wait_node(&agent, &json!({"writtenBy": "crosslink-agent", "clusterName": "own", "addresses": ["10.6.0.2"]}));
}

#[test]
fn remotes_inside_local_ranges_are_refused() {
    let node = node();
    node.ip("addr add 10.6.0.2/24 dev eno1");
    let site =
        Site::new("none", &["--pod-cidrs", "10.244.0.0/16", "--node-cidrs", "10.6.0.0/24"]).in_netns(node.path());
    let agent = site.start_up();
    site.remotes("b", &["10.244.0.0/16", "10.0.0.0/8", "10.9.0.0/16"]);
    wait_until("the equal one is refused", LONG, || {
        site.findings("facts") == ["XL-CIDR-LOCAL 10.244.0.0/16 of cluster b (source static) is local here"]
    });
    site.remotes("c", &["10.6.0.128/25"]);
    wait_until("the inner one is refused too", LONG, || site.findings("facts").len() == 2);
    assert!(site.findings("facts")[1].contains("10.6.0.128/25 of cluster c (source static) lies inside 10.6.0.0/24"));
    let metrics = site.get("/metrics").1;
    assert!(metrics.contains("crosslink_findings{id=\"XL-CIDR-LOCAL\",severity=\"warning\"} 2"), "{metrics}");
    // Each is told once.
    let told = agent.log().lines().filter(|line| line.contains("RemoteCIDRRefused")).count();
    assert_eq!(told, 2, "{}", agent.log());
    fs::remove_file(site.lib().join("remotes/b.json")).unwrap();
    wait_until("one is left", LONG, || site.findings("facts").len() == 1);
}

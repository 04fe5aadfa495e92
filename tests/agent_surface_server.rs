//! What the agent shows in a real API server: Events, and the `NodeConfig` object of its node.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_facts.rs"]
mod agent_facts;
#[path = "support/agent_objects.rs"]
mod agent_objects;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::fs;

use agent_facts::{LONG, Site};
use agent_objects::{Objects, node};
use crosslink_testkit::probe::wait_until;
use serde_json::{Value, json};

fn events(objects: &Objects) -> Vec<Value> {
    let mut events = objects.list("events.k8s.io/v1", "Event", Some("default"));
    events.retain(|event| event["reason"] == "RemoteCIDRRefused");
    events
}

fn count(site: &Site, result: &str) -> u64 {
    let metrics = site.get("/metrics").1;
    let start = format!("crosslink_events_total{{result=\"{result}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&start)).map_or(0, |number| number.parse().unwrap())
}

#[test]
fn events_about_the_node() {
    let Some(mut objects) = Objects::start() else { return };
    objects.apply(&node("node-a", "10.42.0.0/24"));
    let uid = objects.list("v1", "Node", None)[0]["metadata"]["uid"].clone();
    let kubeconfig = objects.server.kubeconfig();
    let site = Site::new(kubeconfig.to_str().unwrap(), &["--pod-cidrs", "10.42.0.0/16"]);
    let _agent = site.start_up();
    site.remotes("b", &["10.42.7.0/24"]);
    wait_until("there is an event", LONG, || events(&objects).len() == 1);
    let event = &events(&objects)[0];
    assert_eq!(event["regarding"], json!({"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": uid}));
    assert_eq!((&event["type"], &event["reportingController"]), (&json!("Warning"), &json!("crosslink-agent")));
    assert_eq!(event["reportingInstance"], "node-a");
    let note = event["note"].as_str().unwrap();
    assert!(note.contains("10.42.7.0/24 of cluster b (source static) lies inside 10.42.0.0/16"), "{note}");

    // The same again is a series; another one is another event.
    let again = |name: &str, cidr: &str| {
        fs::remove_file(site.lib().join(format!("remotes/{name}.json"))).unwrap();
        wait_until("it is gone", LONG, || !site.findings("facts").iter().any(|text| text.contains(cidr)));
        site.remotes(name, &[cidr]);
        wait_until("it is back", LONG, || site.findings("facts").iter().any(|text| text.contains(cidr)));
    };
    again("b", "10.42.7.0/24");
    wait_until("the event is a series", LONG, || events(&objects)[0]["series"]["count"] == 2);
    site.remotes("c", &["10.42.8.0/24"]);
    wait_until("there is another event", LONG, || events(&objects).len() == 2);
    // Somebody deletes them: the next one is there again.
    for event in events(&objects) {
        let metadata = json!({"name": event["metadata"]["name"], "namespace": "default"});
        objects.delete(&json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": metadata}));
    }
    again("b", "10.42.7.0/24");
    wait_until("there is an event again", LONG, || events(&objects).len() == 1);
    assert_eq!(count(&site, "Sent"), 4);

    // Without an API server they are dropped and counted, and nothing waits.
    objects.server.pause();
    again("c", "10.42.8.0/24");
    wait_until("it is counted", LONG, || count(&site, "Failed") >= 1);
    assert_eq!((site.get("/livez").0, site.get("/readyz").0), (200, 200));
}

#[test]
fn the_node_config_of_the_node() {
    let Some(objects) = Objects::start() else { return };
    objects.apply(&node("node-a", "10.42.0.0/24"));
    let uid = objects.list("v1", "Node", None)[0]["metadata"]["uid"].clone();
    let kubeconfig = objects.server.kubeconfig();
    let site = Site::new(kubeconfig.to_str().unwrap(), &["--pod-cidrs", "10.42.0.0/16"]);
    let agent = site.start_up();
    wait_until("the missing definition is noticed", LONG, || {
        site.status()["facts"]["surface"]["nodeConfig"].as_str().is_some_and(|text| text.contains("not"))
    });
    let text = crosslink_agent::api::crds().unwrap();
    for document in text.split("---\n").filter(|document| !document.trim().is_empty()) {
        objects.apply(&serde_saphyr::from_str::<Value>(document).unwrap());
    }
    let found = || objects.list("crosslink.dev/v1alpha1", "NodeConfig", None);
    wait_until("there is an object whose node is in step", LONG, || {
        found().first().is_some_and(|object| object["status"]["synced"] == json!(true))
    });
    let object = &found()[0];
    let owner = &object["metadata"]["ownerReferences"][0];
    assert_eq!((&owner["kind"], &owner["name"], &owner["uid"]), (&json!("Node"), &json!("node-a"), &uid));
    assert_eq!(object["metadata"]["name"], "node-a");
    let status = &object["status"];
    assert_eq!((&status["synced"], &status["agentVersion"]), (&json!(true), &json!(env!("CARGO_PKG_VERSION"))));
    let parts = status["parts"].as_array().unwrap();
    assert!(parts.contains(&json!({"name": "facts", "ok": true, "text": ""})), "{parts:?}");
    assert!(
        object["metadata"]["managedFields"]
            .as_array()
            .unwrap()
            .iter()
            .all(|field| field["manager"] == "crosslink-agent")
    );

    // Findings follow.
    let findings = || found()[0]["status"]["findings"].as_array().unwrap().clone();
    let local = |list: Vec<Value>| list.into_iter().find(|finding| finding["id"] == "XL-CIDR-LOCAL");
    site.remotes("b", &["10.42.7.0/24"]);
    wait_until("the finding is there", LONG, || local(findings()).is_some());
    let finding = local(findings()).unwrap();
    assert_eq!((&finding["severity"], &finding["part"]), (&json!("warning"), &json!("facts")));
    fs::remove_file(site.lib().join("remotes/b.json")).unwrap();
    wait_until("the finding is gone", LONG, || local(findings()).is_none());

    // A restart changes nothing.
    let version = || found()[0]["metadata"]["resourceVersion"].clone();
    wait_until("nothing is left to write", LONG, || site.status()["facts"]["surface"]["nodeConfig"] == "in step");
    let before = version();
    assert!(agent.terminate().success());
    let _agent = site.start_up();
    wait_until("the object was looked at", LONG, || site.status()["facts"]["surface"]["nodeConfig"] == "in step");
    assert_eq!(version(), before);
    assert!(site.get("/metrics").1.contains("crosslink_node_config_writes_total 0"));
}

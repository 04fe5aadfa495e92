//! Sources of remote CIDRs with the built agent: a real API server, and directories.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_source.rs"]
mod agent_source;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use agent_source::{Agent, CLUSTER, Kind, Objects, crds, until};
use apiserver::ApiServer;
use serde_json::{Value, json};

const KOSMOS: Kind = ("kosmos.io", "v1alpha1", "Cluster", "clusters");
const POOL: Kind = ("crd.projectcalico.org", "v1", "IPPool", "ippools");
const POOL_V3: Kind = ("projectcalico.org", "v3", "IPPool", "ippools");
const BLOCK: Kind = ("crd.projectcalico.org", "v1", "IPAMBlock", "ipamblocks");

/// A condition of a `Cluster`: status, reason, message.
fn condition(object: &Value, kind: &str) -> Option<(String, String, String)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    let text = |key: &str| found[key].as_str().unwrap().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

fn expect_condition(objects: &Objects, name: &str, kind: &str, status: &str, reason: &str) -> String {
    until(&format!("{name}: {kind}={status} {reason}"), || {
        let object = objects.get(CLUSTER, "", name);
        let (now, why, message) = condition(&object, kind)?;
        (now == status && why == reason).then_some(message)
    })
}

/// Objects made before and after their definition, changed and deleted; the definition comes after the agent and goes.
#[test]
fn clusters_come_change_and_go() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    let mut agent = Agent::new(&server.kubeconfig(), "cluster", &["--empty-hold-seconds", "3"]);
    // No definition: nothing to read, and nothing wrong.
    agent.expect("cluster", &[]);
    assert!(!agent.log().contains("WARN"), "{}", agent.log());

    objects.define(&crds());
    objects.cluster("b", &["10.1.0.0/16"], &["10.2.0.0/16", "fd00:2::/108"]);
    let spec = json!({"spec": {"podCIDRs": ["10.3.0.0/16"], "ipFamily": "ipv4", "mtu": 1400}});
    objects.put(CLUSTER, "", "c", spec);
    agent.expect("cluster", &[("b", "10.1.0.0/16 10.2.0.0/16,fd00:2::/108"), ("c", "10.3.0.0/16  mtu 1400")]);
    objects.cluster("b", &["10.1.0.0/16", "10.4.0.0/16"], &[]);
    agent.expect("cluster", &[("b", "10.1.0.0/16,10.4.0.0/16"), ("c", "10.3.0.0/16  mtu 1400")]);
    objects.delete(CLUSTER, "", "c");
    agent.expect("cluster", &[("b", "10.1.0.0/16,10.4.0.0/16")]);

    // A restart in order writes nothing.
    expect_condition(&objects, "b", "Accepted", "True", "Accepted");
    let written =
        |agent: &Agent| fs::metadata(agent.file("cluster")).map(|meta| (meta.ino(), meta.mtime_nsec())).unwrap();
    let before = written(&agent);
    agent.stop();
    let from = agent.log().len();
    agent.start();
    agent.expect_log(from, &["is well", "part=\"source\""]);
    assert_eq!(written(&agent), before);
    assert!(!agent.log()[from..].contains("remotes file written"));

    // The definition goes, and its objects with it: nobody removed those, so they are held, then they are gone.
    let held = Instant::now();
    objects.undefine("clusters.crosslink.dev");
    agent.expect_log(from, &["XL-SOURCE-EMPTY"]);
    assert_eq!(agent.clusters("cluster").unwrap().len(), 1);
    agent.expect("cluster", &[]);
    assert!(held.elapsed() > Duration::from_secs(3), "held for {:?}", held.elapsed());

    // It comes back. The last object deleted on purpose goes at once, whatever the grace period.
    objects.define(&crds());
    agent.stop();
    agent.set("--empty-hold-seconds", "600");
    agent.start();
    objects.cluster("d", &["10.5.0.0/16"], &[]);
    agent.expect("cluster", &[("d", "10.5.0.0/16")]);
    objects.delete(CLUSTER, "", "d");
    agent.expect("cluster", &[]);
}

/// A definition that vanishes and comes back with the same objects within the grace period changes nothing.
#[test]
fn a_definition_that_was_only_replaced_changes_nothing() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    for i in 0..40 {
        objects.cluster(&format!("c{i}"), &[&format!("10.{i}.0.0/16")], &[]);
    }
    let agent = Agent::new(&server.kubeconfig(), "cluster", &[]);
    until("all clusters", || (agent.clusters("cluster")?.len() == 40).then_some(()));
    let generation = agent.generation("cluster");
    let from = agent.log().len();
    objects.undefine("clusters.crosslink.dev");
    agent.expect_log(from, &["XL-SOURCE-EMPTY"]);
    objects.define(&crds());
    for i in 0..40 {
        objects.cluster(&format!("c{i}"), &[&format!("10.{i}.0.0/16")], &[]);
    }
    objects.cluster("c40", &["10.40.0.0/16"], &[]);
    until("the new cluster", || agent.clusters("cluster")?.contains_key("c40").then_some(()));
    assert_eq!(agent.clusters("cluster").unwrap().len(), 41);
    // Each object of the new definition that came by itself could have made a list of its own.
    assert!(agent.generation("cluster") > generation);
}

/// One malformed object stops nothing, is named, and can be deleted; conditions say what is refused.
#[test]
fn malformed_objects_and_conditions() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define_loosely(&crds());
    for (name, spec) in [
        ("text", json!("podCIDRs")),
        ("number", json!({"podCIDRs": 7})),
        ("partly", json!({"podCIDRs": ["10.7.0.0/16", "10.8.0.0/99", "nonsense"], "mtu": 7})),
        ("b.c", json!({"podCIDRs": ["10.9.0.0/16"]})),
        ("odd-mtu", json!({"podCIDRs": ["10.9.0.0/16"], "mtu": "x"})),
        ("b", json!({"podCIDRs": ["10.1.0.0/16"]})),
    ] {
        objects.put(CLUSTER, "", name, json!({"spec": spec, "status": "nonsense"}));
    }
    let agent = Agent::new(&server.kubeconfig(), "cluster", &[]);
    agent.expect("cluster", &[("b", "10.1.0.0/16"), ("partly", "10.7.0.0/16")]);
    for name in ["text", "number", "partly", "b.c", "odd-mtu"] {
        agent.expect_log(0, &["XL-SOURCE-OBJECT", &format!("Cluster {name}:")]);
    }
    objects.put(CLUSTER, "", "text", json!({"spec": {"podCIDRs": ["10.6.0.0/16"]}}));
    objects.delete(CLUSTER, "", "number");
    objects.delete(CLUSTER, "", "partly");
    objects.put(CLUSTER, "", "b", json!({"spec": []}));
    agent.expect("cluster", &[("text", "10.6.0.0/16")]);
}

#[test]
fn conditions_say_what_is_refused_and_are_written_once() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    objects.cluster("b", &["10.1.0.0/16"], &[]);
    objects.cluster("c", &["10.1.0.0/16", "10.244.7.0/24"], &[]);
    objects.cluster("own", &["10.244.0.0/16"], &[]);
    // Two nodes' agents, which say the same.
    let agents = [0, 1].map(|_| {
        let agent = Agent::new(&server.kubeconfig(), "cluster", &[]);
        agent.node(json!({"clusterName": "own", "podCIDRs": ["10.244.0.0/16"], "serviceCIDRs": ["10.96.0.0/16"]}));
        agent
    });
    let refused = expect_condition(&objects, "c", "Accepted", "False", "PartlyRefused");
    assert_eq!(refused, "10.244.7.0/24 equals or lies inside the local 10.244.0.0/16");
    let claimed = expect_condition(&objects, "c", "Conflicting", "True", "ClaimedTwice");
    assert_eq!(claimed, "10.1.0.0/16 belongs to cluster b");
    assert_eq!(
        objects.get(CLUSTER, "", "c")["status"]["conflicts"],
        json!([{"cidr": "10.1.0.0/16", "reason": "TakenBy", "with": "b"},
            {"cidr": "10.244.7.0/24", "reason": "Local", "with": "10.244.0.0/16"}])
    );
    expect_condition(&objects, "b", "Conflicting", "True", "ClaimedTwice");
    expect_condition(&objects, "b", "Reachable", "Unknown", "NotProbed");
    expect_condition(&objects, "own", "Accepted", "True", "OwnCluster");
    until("a note", || agents.iter().any(|agent| agent.log().contains("RemoteCIDRRefused")).then_some(()));

    // It clears, and after that nobody writes any more.
    objects.cluster("c", &["10.2.0.0/16"], &[]);
    expect_condition(&objects, "c", "Accepted", "True", "Accepted");
    expect_condition(&objects, "c", "Conflicting", "False", "NoConflict");
    expect_condition(&objects, "b", "Conflicting", "False", "NoConflict");
    let versions =
        || ["b", "c", "own"].map(|name| objects.get(CLUSTER, "", name)["metadata"]["resourceVersion"].clone());
    let before = versions();
    // Longer than an agent waits before it writes.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(versions(), before);
    let writes = objects.get(CLUSTER, "", "own")["metadata"]["generation"].clone();
    assert_eq!(writes, 1);
}

#[test]
fn kosmos_clusters() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    let definitions = include_str!("crds/kosmos.yaml");
    objects.define_loosely(definitions);
    let linked =
        |pods: &[&str]| json!({"status": {"clusterLinkStatus": {"podCIDRs": pods, "serviceCIDRs": ["10.97.0.0/16"]}}});
    objects.put(KOSMOS, "", "b", linked(&["10.245.0.0/16"]));
    objects.put(KOSMOS, "", "broken", json!({"status": {"clusterLinkStatus": {"podCIDRs": {}}}}));
    let kubeconfig = server.kubeconfig().display().to_string();
    // The control cluster is another one: this cluster's API server is down.
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    let text = fs::read_to_string(server.kubeconfig()).unwrap().replace(&format!(":{}", server.port()), ":1");
    fs::write(elsewhere.path(), text).unwrap();
    let agent = Agent::new(elsewhere.path(), "kosmos", &["--kosmos-kubeconfig", &kubeconfig]);
    agent.expect("kosmos", &[("b", "10.245.0.0/16 10.97.0.0/16")]);
    agent.expect_log(0, &["XL-SOURCE-OBJECT", "clusters.kosmos.io broken"]);
    objects.put(KOSMOS, "", "broken", linked(&["10.246.0.0/16"]));
    let mut joined = linked(&["10.245.0.0/16", "10.247.0.0/16"]);
    joined["spec"] = json!({"clusterLinkOptions": {"globalCIDRsMap": {"10.247.0.0/16": "100.64.0.0/16"}}});
    objects.put(KOSMOS, "", "b", joined);
    agent.expect(
        "kosmos",
        &[("b", "10.245.0.0/16,100.64.0.0/16 10.97.0.0/16"), ("broken", "10.246.0.0/16 10.97.0.0/16")],
    );
}

#[test]
fn calico_pools_of_both_groups() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(include_str!("crds/calico.yaml"));
    let disabled = |cidr: &str| json!({"spec": {"cidr": cidr, "disabled": true}});
    objects.put(POOL, "", "default-ipv4-ippool", json!({"spec": {"cidr": "10.244.0.0/16", "natOutgoing": true}}));
    objects.put(POOL, "", "retired", disabled("10.240.0.0/16"));
    objects.put(BLOCK, "", "10-240-3-64-26", json!({"spec": {"cidr": "10.240.3.64/26"}}));
    objects.put(POOL, "", "remote", disabled("10.245.0.0/16"));
    let agent = Agent::new(&server.kubeconfig(), "calico", &[]);
    agent.expect("calico", &[("@calico/remote", "10.245.0.0/16")]);
    objects.put(POOL, "", "pods", disabled("10.250.0.0/16"));
    agent.expect("calico", &[("@calico/pods", "10.250.0.0/16"), ("@calico/remote", "10.245.0.0/16")]);
    // It turns out to be this cluster's own.
    agent.node(json!({"podCIDRs": ["10.250.0.0/15"]}));
    agent.expect("calico", &[("@calico/remote", "10.245.0.0/16")]);
    objects.put(POOL, "", "remote", json!({"spec": {"cidr": "10.245.0.0/16", "disabled": false}}));
    objects.put(POOL, "", "other", disabled("10.246.0.0/16"));
    agent.expect("calico", &[("@calico/other", "10.246.0.0/16")]);

    // Where the newer group is served, it counts.
    objects.define(include_str!("crds/calico-v3.yaml"));
    objects.put(POOL_V3, "", "newer", disabled("10.247.0.0/16"));
    let agent = Agent::new(&server.kubeconfig(), "calico", &[]);
    agent.expect("calico", &[("@calico/newer", "10.247.0.0/16")]);
}

/// A mounted ConfigMap: `..data` is a link that is replaced, and files are links through it.
#[test]
fn a_static_directory_as_kubernetes_mounts_it() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("mount");
    let publish = |version: u32, files: &[(&str, &str)]| {
        let data = dir.join(format!("..{version}"));
        fs::create_dir_all(&data).unwrap();
        for (name, pods) in files {
            let text =
                json!({"version": 1, "clusters": [{"name": name.trim_end_matches(".json"), "podCIDRs": [pods]}]});
            fs::write(data.join(name), text.to_string()).unwrap();
            let link = dir.join(name);
            if !link.exists() {
                std::os::unix::fs::symlink(format!("..data/{name}"), link).unwrap();
            }
        }
        let fresh = dir.join("..data_tmp");
        std::os::unix::fs::symlink(format!("..{version}"), &fresh).unwrap();
        fs::rename(fresh, dir.join("..data")).unwrap();
    };
    let arguments = ["--static-dir", dir.to_str().unwrap(), "--empty-hold-seconds", "2"];
    let mut agent = Agent::new("none".as_ref(), "static", &arguments);
    agent.expect_log(0, &["XL-SOURCE ", "is missing"]);
    publish(1, &[("b.json", "10.1.0.0/16")]);
    agent.expect("static", &[("b", "10.1.0.0/16")]);
    publish(2, &[("b.json", "10.2.0.0/16"), ("c.json", "10.3.0.0/16")]);
    agent.expect("static", &[("b", "10.2.0.0/16"), ("c", "10.3.0.0/16")]);
    // A bad file counts as it was before, also for the next agent.
    publish(3, &[("b.json", "10.2.0.0/99"), ("c.json", "10.4.0.0/16")]);
    agent.expect("static", &[("b", "10.2.0.0/16"), ("c", "10.4.0.0/16")]);
    agent.expect_log(0, &["XL-SOURCE-OBJECT", "static file b.json"]);
    agent.stop();
    publish(4, &[("b.json", "10.2.0.0/99"), ("c.json", "10.5.0.0/16")]);
    agent.start();
    agent.expect("static", &[("b", "10.2.0.0/16"), ("c", "10.5.0.0/16")]);
    // Everything gone is held for a while.
    let from = agent.log().len();
    let since = Instant::now();
    publish(5, &[]);
    agent.expect_log(from, &["XL-SOURCE-EMPTY"]);
    assert_eq!(agent.clusters("static").unwrap().len(), 2);
    agent.expect("static", &[]);
    assert!(since.elapsed() > Duration::from_secs(2));
}

/// What a source that is not in use any more said is taken back; what people wrote stays.
#[test]
fn unused_sources_leave_nothing_and_people_are_left_alone() {
    let place = tempfile::tempdir().unwrap();
    let text = json!({"version": 1, "clusters": [{"name": "b", "podCIDRs": ["10.1.0.0/16"]}]}).to_string();
    fs::write(place.path().join("b.json"), &text).unwrap();
    let mut agent = Agent::new("none".as_ref(), "static", &["--static-dir", place.path().to_str().unwrap()]);
    agent.expect("static", &[("b", "10.1.0.0/16")]);
    agent.stop();
    let by_hand = agent.file("kernel");
    let kernel = r#"{"version":1,"source":"kernel","clusters":[]}"#;
    fs::write(&by_hand, kernel).unwrap();
    agent.set("--sources", "kernel");
    // Without knowing what is local it would take this cluster's own routes for remote ones.
    agent.start();
    agent.expect_log(0, &["XL-SOURCE ", "set podCIDRs"]);
    agent.stop();
    agent.set("--pod-cidrs", "10.42.0.0/16");
    agent.start();
    until("the file's end", || (!agent.file("static").exists()).then_some(()));
    // The kernel's file is not the agent's.
    agent.expect_log(0, &["XL-SOURCE ", "somebody else"]);
    assert_eq!(fs::read_to_string(by_hand).unwrap(), kernel);
}

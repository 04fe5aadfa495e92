//! An API server that is down when the agent starts, goes down, and comes back without its history.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_source.rs"]
mod agent_source;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::fs;

use agent_source::{Agent, CLUSTER, Kind, Objects, crds, until};
use apiserver::{AGENT_USER, ApiServer};
use serde_json::json;

#[test]
fn down_at_start_down_later_and_back_without_history() {
    let Some(mut server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    objects.cluster("b", &["10.1.0.0/16"], &[]);
    server.pause();

    // Down at the start: said, and what another agent left stays.
    let mut agent = Agent::new(&server.kubeconfig(), "cluster", &[]);
    agent.expect_log(0, &["XL-SOURCE ", "clusters.crosslink.dev"]);
    assert_eq!(agent.clusters("cluster"), None);
    server.resume();
    agent.expect("cluster", &[("b", "10.1.0.0/16")]);
    agent.expect_log(0, &["is well", "source/cluster"]);

    // Down for long enough that it is noticed; nothing is lost meanwhile, and files are as they were.
    let from = agent.log().len();
    server.pause();
    agent.expect_log(from, &["XL-SOURCE "]);
    assert_eq!(agent.clusters("cluster").unwrap().len(), 1);
    let failed = agent.log().len();
    server.resume();
    agent.expect_log(failed, &["is well", "source/cluster"]);
    objects.cluster("c", &["10.2.0.0/16"], &[]);
    agent.expect("cluster", &[("b", "10.1.0.0/16"), ("c", "10.2.0.0/16")]);

    // Back without history: while the agent could not see it one was deleted, one changed, one made.
    let elsewhere = Outage::of(&agent);
    objects.delete(CLUSTER, "", "b");
    objects.cluster("c", &["10.3.0.0/16"], &[]);
    objects.cluster("d", &["10.4.0.0/16"], &[]);
    server.pause();
    server.compact();
    elsewhere.end();
    server.resume();
    agent.expect("cluster", &[("c", "10.3.0.0/16"), ("d", "10.4.0.0/16")]);

    // An agent that starts while it is down keeps what the one before it wrote.
    server.pause();
    agent.stop();
    let from = agent.log().len();
    agent.start();
    agent.expect_log(from, &["XL-SOURCE "]);
    assert_eq!(agent.clusters("cluster").unwrap().len(), 2);
    let written = agent.generation("cluster");
    server.resume();
    agent.expect_log(from, &["is well", "source/cluster"]);
    assert_eq!(agent.generation("cluster"), written);
}

/// A process that is stopped, so that it sees nothing.
struct Outage(String);

impl Outage {
    fn of(agent: &Agent) -> Self {
        let outage = Self(agent.pid().to_string());
        outage.signal("-STOP");
        outage
    }

    fn signal(&self, signal: &str) {
        assert!(std::process::Command::new("kill").args([signal, &self.0]).status().unwrap().success());
    }

    fn end(self) {
        self.signal("-CONT");
    }
}

const ROLE: Kind = ("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles");
const BINDING: Kind = ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings");

/// Without the right to read it is said what is refused; with exactly these rights everything works.
#[test]
fn least_privilege() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    objects.define(include_str!("crds/submariner.yaml"));
    objects.define(include_str!("crds/kosmos.yaml"));
    objects.define(include_str!("crds/calico.yaml"));
    objects.cluster("b", &["10.1.0.0/16"], &[]);
    let mut agent = Agent::new(&server.agent_kubeconfig(), "cluster,submariner,kosmos,calico", &[]);
    for source in ["cluster", "submariner", "kosmos", "calico"] {
        agent.expect_log(0, &["XL-SOURCE ", &format!("source {source}"), "forbidden"]);
    }
    let read = json!(["get", "list", "watch"]);
    let rules = json!([
        {"apiGroups": ["crosslink.dev"], "resources": ["clusters"], "verbs": read},
        {"apiGroups": ["crosslink.dev"], "resources": ["clusters/status"], "verbs": ["patch"]},
        {"apiGroups": ["submariner.io"], "resources": ["endpoints", "clusters", "gateways", "submariners"], "verbs": read},
        {"apiGroups": ["kosmos.io"], "resources": ["clusters"], "verbs": read},
        {"apiGroups": ["crd.projectcalico.org", "projectcalico.org"], "resources": ["ippools", "ipamblocks"], "verbs": read},
        {"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"], "verbs": ["get"]},
    ]);
    objects.put(ROLE, "", "crosslink-agent", json!({ "rules": rules }));
    objects.put(
        BINDING,
        "",
        "crosslink-agent",
        json!({
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "crosslink-agent"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": AGENT_USER}]}),
    );
    agent.expect("cluster", &[("b", "10.1.0.0/16")]);
    for source in ["submariner", "kosmos", "calico"] {
        agent.expect(source, &[]);
        agent.expect_log(0, &["is well", &format!("source/{source}")]);
    }
    until("the status", || objects.get(CLUSTER, "", "b")["status"]["conditions"].is_array().then_some(()));
    assert!(!agent.log().contains("status not written"));
    // The watched definition goes: the right to look at definitions is what tells it from deletions.
    objects.undefine("clusters.crosslink.dev");
    agent.expect_log(0, &["XL-SOURCE-EMPTY", "source cluster"]);
    assert_eq!(agent.clusters("cluster").unwrap().len(), 1);
    agent.stop();
    let left: Vec<_> =
        fs::read_dir(agent.lib_dir().join("remotes")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "{left:?}");
}

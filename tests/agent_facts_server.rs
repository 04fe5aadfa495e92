//! Local facts from a real API server: every source, every change, and what is missing, forbidden or away.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_facts.rs"]
mod agent_facts;
#[path = "support/agent_objects.rs"]
mod agent_objects;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::{fs, os::unix::fs::MetadataExt};

use agent_facts::{LONG, Site};
use agent_objects::{Objects, config_map, node, object};
use apiserver::AGENT_USER;
use crosslink_testkit::probe::wait_until;
use serde_json::{Value, json};

const CALICO: &str = "crd.projectcalico.org/v1";

fn kubeadm(pods: &str, services: &str) -> Value {
    let networking = format!("networking:\n  podSubnet: {pods}\n  serviceSubnet: {services}\n");
    config_map("kubeadm-config", &json!({"ClusterConfiguration": networking}))
}

fn pool(name: &str, spec: &Value) -> Value {
    object(CALICO, "IPPool", name, spec)
}

#[test]
fn every_source_and_every_change() {
    let Some(objects) = Objects::start() else { return };
    objects.apply(&node("node-a", "10.42.0.0/24"));
    objects.apply(&node("node-b", "10.42.1.0/24"));
    let kubeconfig = objects.server.kubeconfig();
    let site = Site::new(kubeconfig.to_str().unwrap(), &[]);
    let agent = site.start_up();
    objects.define(CALICO, "IPPool", false);
    objects.define(CALICO, "BlockAffinity", false);
    let pods = |cidrs: Value, own: Value| site.wait_node(&agent, &json!({"podCIDRs": cidrs, "ownPodCIDRs": own}));

    // As in k3s: shares of nodes, and the ServiceCIDR that the API server makes from its own flag.
    site.wait_node(
        &agent,
        &json!({"writtenBy": "crosslink-agent", "clusterName": null, "podCIDRs": ["10.42.0.0/23"],
            "ownPodCIDRs": ["10.42.0.0/24"], "serviceCIDRs": ["10.0.0.0/24"]}),
    );
    wait_until("it is ready", LONG, || site.get("/readyz").0 == 200);
    assert_eq!(site.get("/metrics").1.matches("crosslink_node_file_writes_total 1\n").count(), 1, "written once");
    objects.apply(&node("node-c", "10.42.2.0/23"));
    pods(json!(["10.42.0.0/22"]), json!(["10.42.0.0/24"]));
    objects.delete(&node("node-b", ""));
    pods(json!(["10.42.0.0/24", "10.42.2.0/23"]), json!(["10.42.0.0/24"]));

    objects.apply(&object("networking.k8s.io/v1", "ServiceCIDR", "more", &json!({"cidrs": ["10.97.0.0/16"]})));
    site.wait_node(&agent, &json!({"serviceCIDRs": ["10.0.0.0/24", "10.97.0.0/16"]}));

    // kubeadm names the whole; nobody follows all nodes from then on.
    objects.apply(&kubeadm("10.42.0.0/16,fd42::/56", "10.99.0.0/16"));
    pods(json!(["10.42.0.0/16", "fd42::/56"]), json!(["10.42.0.0/24"]));
    wait_until("the nodes are left alone", LONG, || {
        let status = site.status();
        status["facts"]["facts"]["sources"]["all nodes' spec.podCIDRs"].as_str().unwrap().starts_with("not asked")
    });
    // The API server's own word about services stays above it.
    assert_eq!(site.node()["serviceCIDRs"], json!(["10.0.0.0/24", "10.97.0.0/16"]));

    // Calico has come after the agent.
    objects.apply(&pool("main", &json!({"cidr": "10.50.0.0/16", "natOutgoing": true})));
    objects.apply(&pool("remote", &json!({"cidr": "10.60.0.0/16", "disabled": true})));
    objects.apply(&pool("odd", &json!({"cidr": ["no", "string"]})));
    pods(json!(["10.50.0.0/16"]), json!(null));
    let block = json!({"node": "node-a", "cidr": "10.50.3.0/26", "state": "confirmed", "deleted": "false"});
    objects.apply(&object(CALICO, "BlockAffinity", "node-a-10-50-3-0-26", &block));
    pods(json!(["10.50.0.0/16"]), json!(["10.50.3.0/26"]));
    objects.apply(&pool("more", &json!({"cidr": "fd50::/48"})));
    pods(json!(["10.50.0.0/16", "fd50::/48"]), json!(["10.50.3.0/26"]));

    // Cilium's word joins it, and leaves again.
    let cilium = config_map(
        "cilium-config",
        &json!({"cluster-pool-ipv4-cidr": "10.70.0.0/16", "enable-bpf-masquerade": "true"}),
    );
    objects.apply(&cilium);
    site.wait_node(&agent, &json!({"podCIDRs": ["10.50.0.0/16", "10.70.0.0/16", "fd50::/48"], "masquerade": "bpf"}));
    objects.delete(&cilium);
    site.wait_node(&agent, &json!({"podCIDRs": ["10.50.0.0/16", "fd50::/48"], "masquerade": null}));

    // Calico goes, definitions and all: what is left counts again.
    let definition =
        object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "ippools.crd.projectcalico.org", &json!({}));
    objects.delete(&definition);
    pods(json!(["10.42.0.0/16", "fd42::/56"]), json!(["10.42.0.0/24"]));
}

#[test]
fn the_control_plane_submariner_and_an_api_server_that_goes_away() {
    let Some(mut objects) = Objects::start() else { return };
    let container = |name: &str, args: Value| json!({"name": name, "image": name, "command": [name], "args": args});
    let pod = |name: &str, label: &str, container: Value| {
        json!({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [container]},
            "metadata": {"name": name, "namespace": "kube-system", "labels": {label: name}}})
    };
    let arguments = container("kube-controller-manager", json!(["--cluster-cidr=10.80.0.0/16,fd80::/56"]));
    objects.apply(&pod("kube-controller-manager", "component", arguments));
    // Not of the control plane, whatever its arguments.
    objects.apply(&pod("kube-proxy", "k8s-app", container("kube-proxy", json!(["--cluster-cidr=10.81.0.0/16"]))));
    objects.define("submariner.io/v1alpha1", "Submariner", true);
    objects.define("submariner.io/v1", "Gateway", true);
    let own = |kind: &str, version: &str, rest: Value| {
        let mut object =
            json!({"apiVersion": version, "kind": kind, "metadata": {"name": "submariner", "namespace": "default"}});
        object.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        object
    };
    objects.apply(&own("Submariner", "submariner.io/v1alpha1", json!({"spec": {"clusterID": ""}})));
    objects.apply(&own("Gateway", "submariner.io/v1", json!({"status": {"localEndpoint": {"cluster_id": "east"}}})));
    objects.apply(&node("node-a", "10.80.7.0/24"));
    let kubeconfig = objects.server.kubeconfig();
    let site = Site::new(kubeconfig.to_str().unwrap(), &[]);
    let wanted =
        json!({"clusterName": "east", "podCIDRs": ["10.80.0.0/16", "fd80::/56"], "ownPodCIDRs": ["10.80.7.0/24"]});
    let agent = site.start_up();
    site.wait_node(&agent, &wanted);
    let identity = || fs::metadata(site.node_file()).map(|meta| (meta.ino(), meta.mtime_nsec())).unwrap();
    wait_until("all have answered", LONG, || site.status()["facts"]["facts"]["waiting"] == false);
    let before = identity();
    assert!(agent.terminate().success());

    // Started again, and everything is as it was: nothing is written.
    let agent = site.start_up();
    wait_until("all have answered", LONG, || site.status()["facts"]["facts"]["waiting"] == false);
    assert_eq!(identity(), before);

    // Away while it runs, and while it starts.
    objects.server.pause();
    site.remotes("b", &["10.80.9.0/24"]);
    wait_until("remotes are judged all the same", LONG, || site.findings("facts").len() == 1);
    assert_eq!((identity(), site.get("/readyz").0), (before, 200));
    drop(agent);
    let agent = site.start_up();
    wait_until("it is ready by what it knew", LONG, || site.get("/readyz").0 == 200);
    wait_until("the server was tried", LONG, || {
        let status = site.status().to_string();
        status.contains("Connection refused")
    });
    assert_eq!(identity(), before);
    assert!(!site.findings("facts").iter().any(|finding| finding.contains("XL-LOCAL-UNKNOWN")));
    // It comes back with its history lost, and with news.
    objects.server.compact();
    objects.server.resume();
    objects.apply(&object("networking.k8s.io/v1", "ServiceCIDR", "more", &json!({"cidrs": ["10.97.0.0/16"]})));
    site.wait_node(&agent, &json!({"serviceCIDRs": ["10.0.0.0/24", "10.97.0.0/16"]}));

    // Away while a watch runs, with changes meanwhile that its history does not hold.
    objects.server.pause();
    objects.server.compact();
    objects.server.resume();
    objects.apply(&kubeadm("10.82.0.0/16", "10.99.0.0/16"));
    site.wait_node(&agent, &json!({"podCIDRs": ["10.80.0.0/16", "10.82.0.0/16", "fd80::/56"]}));
}

#[test]
fn what_is_forbidden_is_named_and_no_fault_while_another_answers() {
    let Some(objects) = Objects::start() else { return };
    objects.apply(&node("node-a", "10.42.0.0/24"));
    objects.apply(&kubeadm("10.42.0.0/16", "10.96.0.0/16"));
    let kubeconfig = objects.server.agent_kubeconfig();
    let site = Site::new(kubeconfig.to_str().unwrap(), &[]);
    let agent = site.start_up();
    let unknown = |what: &str| {
        let findings = site.findings("facts");
        findings.into_iter().find(|finding| finding.starts_with(&format!("XL-LOCAL-UNKNOWN {what} CIDRs")))
    };
    wait_until("both are found unknown", LONG, || unknown("pod").is_some() && unknown("service").is_some());
    let text = unknown("pod").unwrap();
    assert!(text.contains("kubeadm-config: forbidden;"), "{text}");
    let sources = site.status()["facts"]["facts"]["sources"].to_string();
    assert!(sources.contains("forbidden: configmaps") && sources.contains(AGENT_USER), "{sources}");
    // Ready all the same: overlay pods need none of it.
    wait_until("it is ready", LONG, || site.get("/readyz").0 == 200);

    let allow = |name: &str, rules: Value| {
        objects.apply(&json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": name}, "rules": rules}));
        objects.apply(&json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": name}, "subjects": [{"kind": "User", "name": AGENT_USER, "apiGroup": "rbac.authorization.k8s.io"}],
            "roleRef": {"kind": "ClusterRole", "name": name, "apiGroup": "rbac.authorization.k8s.io"}}));
    };
    let read = json!(["get", "list", "watch"]);
    allow("nodes", json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": read}]));
    site.wait_node(
        &agent,
        &json!({"podCIDRs": ["10.42.0.0/24"], "ownPodCIDRs": ["10.42.0.0/24"], "serviceCIDRs": null}),
    );
    assert_eq!(unknown("pod"), None);
    // By name alone, as a manifest grants it.
    allow(
        "kubeadm",
        json!([{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["kubeadm-config"], "verbs": read}]),
    );
    site.wait_node(&agent, &json!({"podCIDRs": ["10.42.0.0/16"], "serviceCIDRs": ["10.96.0.0/16"]}));
    wait_until("nothing is unknown", LONG, || unknown("pod").or(unknown("service")).is_none());
}

//! The source "submariner" with the built agent and a real API server. Objects are those of a real Submariner, recorded
//! in two joined clusters (version 0.19, VXLAN cable), without what nobody reads.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_source.rs"]
mod agent_source;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::{
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use agent_source::{Agent, Kind, Objects};
use apiserver::ApiServer;
use serde_json::{Value, json};

const ENDPOINT: Kind = ("submariner.io", "v1", "Endpoint", "endpoints");
const CLUSTER: Kind = ("submariner.io", "v1", "Cluster", "clusters");
const GATEWAY: Kind = ("submariner.io", "v1", "Gateway", "gateways");
const NAMESPACE: &str = "submariner-operator";

const B: (&str, &str) = ("cluster-b", "10.245.0.0/16 10.97.0.0/16 mtu 1450");

fn spec(cluster: &str, ip: &str, subnets: &[&str]) -> Value {
    json!({"backend": "vxlan", "backend_config": {"natt-discovery-port": "4490", "udp-port": "4500"},
        "cable_name": format!("submariner-cable-{cluster}-{ip}"), "cluster_id": cluster, "healthCheckIP": "10.245.0.1",
        "hostname": "subm-b-control-plane", "nat_enabled": false, "private_ip": ip.replace('-', "."), "public_ip": "",
        "subnets": subnets})
}

fn endpoint_name(cluster: &str, ip: &str) -> String {
    format!("{cluster}-submariner-cable-{cluster}-{ip}")
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
}

/// The uplink is the sandbox's own, so only one test at a time may change it.
static UPLINK: Mutex<bool> = Mutex::new(false);

struct Site {
    _uplink: MutexGuard<'static, bool>,
    objects: Objects,
    // Last, since the others speak to it.
    server: ApiServer,
}

impl Site {
    fn new() -> Option<Self> {
        let server = ApiServer::start()?;
        let objects = Objects::of(&server);
        objects.namespace(NAMESPACE);
        // A node's default route, whose interface has the usual MTU.
        let mut uplink = UPLINK.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *uplink, true) {
            for words in ["link add up0 type veth peer name up1", "link set up0 up", "route add default dev up0"] {
                ip(words);
            }
        }
        ip("link set up0 mtu 1500");
        Some(Self { _uplink: uplink, objects, server })
    }

    fn endpoint(&self, cluster: &str, ip: &str, subnets: &[&str]) {
        let labels = if cluster == "cluster-a" { json!({}) } else { json!({"submariner-io/clusterID": cluster}) };
        let body = json!({"metadata": {"labels": labels}, "spec": spec(cluster, ip, subnets)});
        self.objects.put(ENDPOINT, NAMESPACE, &endpoint_name(cluster, ip), body);
    }

    fn cluster(&self, cluster: &str, pods: &[&str], services: &[&str], global: &[&str]) {
        let labels = if cluster == "cluster-a" { json!({}) } else { json!({"submariner-io/clusterID": cluster}) };
        let body = json!({"metadata": {"labels": labels}, "spec": {"cluster_id": cluster, "color_codes": ["blue"],
            "cluster_cidr": pods, "service_cidr": services, "global_cidr": global}});
        self.objects.put(CLUSTER, NAMESPACE, cluster, body);
    }

    fn gateway(&self, programmed: &[&str]) {
        let local = spec("cluster-a", "172-18-0-3", &["10.96.0.0/16", "10.244.0.0/16"]);
        let connection = json!({"endpoint": spec("cluster-b", "172-18-0-5", programmed), "status": "connected",
            "statusMessage": "", "usingIP": "172.18.0.5", "usingNAT": true});
        let body = json!({"metadata": {"annotations": {"update-timestamp": "1795245272"}},
            "status": {"connections": [connection], "haStatus": "active", "localEndpoint": local, "version": "devel"}});
        self.objects.put(GATEWAY, NAMESPACE, "subm-a-control-plane", body);
    }

    fn join(&self) {
        self.gateway(&["10.97.0.0/16", "10.245.0.0/16"]);
        self.endpoint("cluster-a", "172-18-0-3", &["10.96.0.0/16", "10.244.0.0/16"]);
        self.cluster("cluster-a", &["10.244.0.0/16"], &["10.96.0.0/16"], &[]);
        self.cluster("cluster-b", &["10.245.0.0/16"], &["10.97.0.0/16"], &[]);
        self.endpoint("cluster-b", "172-18-0-5", &["10.97.0.0/16", "10.245.0.0/16"]);
    }
}

#[test]
fn joining_failover_changes_in_place_and_leaving() {
    let Some(site) = Site::new() else { return };
    let agent = Agent::new(&site.server.kubeconfig(), "submariner", &["--empty-hold-seconds", "2"]);
    agent.expect("submariner", &[]);
    site.objects.define(include_str!("crds/submariner.yaml"));
    site.join();
    agent.expect("submariner", &[B]);
    let generation = agent.generation("submariner");

    // Failover: the old one is deleted, then the new one is made; then the other way round. After each a change of
    // another cluster shows that the agent has seen it.
    site.objects.delete(ENDPOINT, NAMESPACE, &endpoint_name("cluster-b", "172-18-0-5"));
    site.endpoint("cluster-b", "172-18-0-4", &["10.97.0.0/16", "10.245.0.0/16"]);
    site.endpoint("cluster-c", "172-18-0-9", &["10.98.0.0/16"]);
    agent.expect("submariner", &[B, ("cluster-c", "10.98.0.0/16  mtu 1450")]);
    assert_eq!(agent.generation("submariner"), generation + 1);
    site.endpoint("cluster-b", "172-18-0-7", &["10.97.0.0/16", "10.245.0.0/16"]);
    site.objects.delete(ENDPOINT, NAMESPACE, &endpoint_name("cluster-b", "172-18-0-4"));
    site.endpoint("cluster-c", "172-18-0-9", &["10.99.0.0/16"]);
    agent.expect("submariner", &[B, ("cluster-c", "10.99.0.0/16  mtu 1450")]);
    assert_eq!(agent.generation("submariner"), generation + 2);

    // A change in place is followed, though Submariner does not program it; and that is said.
    site.endpoint("cluster-b", "172-18-0-7", &["10.97.0.0/16", "10.246.0.0/16"]);
    site.cluster("cluster-b", &["10.246.0.0/16"], &["10.97.0.0/16"], &[]);
    agent.expect(
        "submariner",
        &[("cluster-b", "10.246.0.0/16 10.97.0.0/16 mtu 1450"), ("cluster-c", "10.99.0.0/16  mtu 1450")],
    );
    agent.expect_log(0, &["XL-SUBMARINER-STALE", "cluster-b", "10.246.0.0/16"]);

    // Leaving.
    site.objects.delete(ENDPOINT, NAMESPACE, &endpoint_name("cluster-b", "172-18-0-7"));
    site.objects.delete(CLUSTER, NAMESPACE, "cluster-b");
    agent.expect("submariner", &[("cluster-c", "10.99.0.0/16  mtu 1450")]);
    agent.expect_log(0, &["XL-SOURCE-EMPTY", "cluster-b is gone"]);
}

#[test]
fn globalnet_and_malformed_objects() {
    let Some(site) = Site::new() else { return };
    site.objects.define_loosely(include_str!("crds/submariner.yaml"));
    site.join();
    site.objects.put(ENDPOINT, NAMESPACE, "odd", json!({"spec": {"cluster_id": {}, "subnets": 7}}));
    site.objects.put(CLUSTER, NAMESPACE, "odd", json!({"spec": "text"}));
    site.objects.put(GATEWAY, NAMESPACE, "odd", json!({"status": {"connections": "none"}}));
    let agent = Agent::new(&site.server.kubeconfig(), "submariner", &[]);
    agent.expect("submariner", &[B]);
    for kind in ["Endpoint", "Cluster", "Gateway"] {
        agent.expect_log(0, &["XL-SOURCE-OBJECT", &format!("Submariner {kind} {NAMESPACE}/odd")]);
    }
    site.cluster("cluster-b", &["10.244.0.0/16"], &["10.96.0.0/16"], &["242.1.0.0/16"]);
    site.endpoint("cluster-b", "172-18-0-5", &["242.1.0.0/16"]);
    agent.expect("submariner", &[("cluster-b", "242.1.0.0/16  mtu 1450")]);
    site.objects.delete(ENDPOINT, NAMESPACE, "odd");
    site.endpoint("cluster-b", "172-18-0-5", &["242.1.0.0/16", "fd00:242::/64"]);
    site.cluster("cluster-b", &[], &[], &["242.1.0.0/16", "fd00:242::/64"]);
    agent.expect("submariner", &[("cluster-b", "242.1.0.0/16,fd00:242::/64  mtu 1450")]);

    // The uplink's MTU is followed.
    ip("link set up0 mtu 9000");
    agent.expect("submariner", &[("cluster-b", "242.1.0.0/16,fd00:242::/64  mtu 8950")]);
    ip("link set up0 mtu 1500");
    agent.expect("submariner", &[("cluster-b", "242.1.0.0/16,fd00:242::/64  mtu 1450")]);
}

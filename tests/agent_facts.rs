//! Local facts: what each source's objects say, and what is decided from it. Pure.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;

use crosslink_agent::facts::{
    decide::{Addresses, Answer, Answers, Decision, Given, Origin, Said, decide, left_out},
    objects::{self, NodeSpec},
};
use crosslink_core::{
    finding::Id,
    node::{Masquerade, NodeFacts},
};
use ipnet::IpNet;
use serde_json::{Value, json};

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn said(answer: &Answer) -> &Said {
    match answer {
        Answer::Said(said) => said,
        other => panic!("{other:?}"),
    }
}

fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn node_specs(specs: &[Value]) -> Vec<NodeSpec> {
    specs.iter().map(|spec| serde_json::from_value(spec.clone()).unwrap()).collect()
}

fn addresses() -> Addresses {
    Addresses { list: vec!["10.6.0.2".parse().unwrap()], total: 1 }
}

fn kubernetes() -> Given {
    Given { kubernetes: true, ..Given::default() }
}

/// All sources absent but these.
fn answers(some: Vec<(Origin, Answer)>) -> Answers {
    let mut answers = Answers::waiting();
    for origin in Origin::ALL {
        answers.take(origin, Answer::Absent("not served".to_owned()));
    }
    for (origin, answer) in some {
        answers.take(origin, answer);
    }
    answers
}

fn decided(some: Vec<(Origin, Answer)>) -> Decision {
    decide(&kubernetes(), &answers(some), &addresses(), &NodeFacts::default())
}

const CLUSTER_CONFIGURATION: &str = "apiServer:
  timeoutForControlPlane: 4m0s
apiVersion: kubeadm.k8s.io/v1beta3
kind: ClusterConfiguration
networking:
  dnsDomain: cluster.local
  podSubnet: 10.244.0.0/16,fd00:10:244::/56
  serviceSubnet: 10.96.0.0/16,fd00:10:96::/112
scheduler: {}
";

#[test]
fn kubeadm_names_both_families() {
    let answer = objects::kubeadm(&data(&[("ClusterConfiguration", CLUSTER_CONFIGURATION)]));
    assert_eq!(said(&answer).pods, nets(&["10.244.0.0/16", "fd00:10:244::/56"]));
    assert_eq!(said(&answer).services, nets(&["10.96.0.0/16", "fd00:10:96::/112"]));
    for (text, part) in [("networking: {}", "no subnets"), ("a: [", "ClusterConfiguration"), ("networking: 7", "")] {
        let answer = objects::kubeadm(&data(&[("ClusterConfiguration", text)]));
        let words = format!("{answer:?}");
        assert!(words.contains(part) && !words.contains("10."), "{words}");
    }
    assert!(matches!(objects::kubeadm(&data(&[])), Answer::Absent(_)));
    // One bad half does not spoil the other.
    let text = "networking: {podSubnet: \"10.244.0.0/99, 10.1.0.0/16\", serviceSubnet: 0.0.0.0/0}";
    let answer = objects::kubeadm(&data(&[("ClusterConfiguration", text)]));
    assert_eq!(said(&answer).pods, nets(&["10.1.0.0/16"]));
    assert!(said(&answer).services.is_empty());
    assert_eq!(said(&answer).odd.len(), 2, "{answer:?}");
}

#[test]
fn arguments_in_every_spelling() {
    let pod = |containers: Value| json!({ "containers": containers });
    let specs = [
        pod(json!([{"command": ["kube-apiserver", "--service-cluster-ip-range=10.96.0.0/12,fd00::/112"]}])),
        pod(json!([{"command": ["kube-controller-manager"], "args": ["--cluster-cidr", "10.244.0.0/16", "--v=2"]}])),
        pod(json!([{"command": ["sh", "-c", "exec kube-controller-manager --cluster-cidr=\"10.245.0.0/16\" --v 1"]}])),
        pod(json!([{"args": ["--cluster-cidr-x=10.9.0.0/16", "--cluster-cidr"]}, {}, {"args": 7}])),
        json!({}),
        json!(null),
    ];
    let answer = objects::arguments(&specs);
    assert_eq!(said(&answer).services, nets(&["10.96.0.0/12", "fd00::/112"]));
    assert_eq!(said(&answer).pods, nets(&["10.244.0.0/16", "10.245.0.0/16"]));
    assert!(said(&answer).odd.is_empty());
    assert!(matches!(objects::arguments(&specs[3..]), Answer::Absent(_)));
}

#[test]
fn shares_of_nodes_are_summarised() {
    let specs = node_specs(&[
        json!({"podCIDRs": ["10.42.0.0/24", "fd42::/64"], "podCIDR": "10.42.0.0/24"}),
        json!({"podCIDR": "10.42.1.0/24"}),
        json!({"podCIDRs": null}),
        json!({"podCIDRs": ["10.42.3.0/24"], "taints": [7]}),
    ]);
    assert_eq!(said(&objects::nodes(&specs)).pods, nets(&["10.42.0.0/23", "10.42.3.0/24", "fd42::/64"]));
    let own = objects::own_node(&specs[..1]);
    assert_eq!(said(&own).own_pods, nets(&["10.42.0.0/24", "fd42::/64"]));
    assert!(matches!(objects::own_node(&[]), Answer::Absent(_)));
}

#[test]
fn calico_pools_in_use_are_local() {
    let specs = [
        json!({"cidr": "10.10.0.0/16", "natOutgoing": true}),
        json!({"cidr": "10.11.0.0/16", "disabled": true, "natOutgoing": true}),
        json!({"cidr": "10.12.0.0/16", "disabled": true}),
        json!({"cidr": "10.13.0.0/16", "disabled": true, "natOutgoing": false}),
        json!({"cidr": "10.14.0.0/16", "allowedUses": ["Workload", "Tunnel"]}),
        json!({"cidr": "10.15.0.0/16", "allowedUses": ["LoadBalancer"]}),
        json!({"cidr": "nonsense"}),
        json!({"cidr": 7}),
        json!("nonsense"),
    ];
    let answer = objects::calico(&specs);
    assert_eq!(said(&answer).pods, nets(&["10.10.0.0/16", "10.11.0.0/16", "10.14.0.0/16"]));
    assert_eq!(said(&answer).odd.len(), 1, "{answer:?}");
    assert!(matches!(objects::calico(&specs[2..4]), Answer::Absent(_)));
}

#[test]
fn calico_blocks_of_this_node() {
    let block = |node: &str, cidr: &str, state: &str| json!({"node": node, "cidr": cidr, "state": state});
    let specs = [
        block("node-a", "10.10.0.0/26", "confirmed"),
        block("node-a", "10.10.0.64/26", "confirmed"),
        block("node-a", "10.10.1.0/26", "pendingDeletion"),
        block("node-b", "10.10.2.0/26", "confirmed"),
        json!({}),
    ];
    assert_eq!(said(&objects::calico_blocks(&specs, "node-a")).own_pods, nets(&["10.10.0.0/25"]));
    assert!(matches!(objects::calico_blocks(&specs, "node-c"), Answer::Absent(_)));
}

/// A ConfigMap's data, and the pod CIDRs, last resorts and masquerading that it means.
struct Cilium<'a> {
    data: &'a [(&'a str, &'a str)],
    pods: &'a [&'a str],
    worst: &'a [&'a str],
    masquerade: Option<Masquerade>,
}

impl Cilium<'_> {
    fn check(&self) {
        let answer = objects::cilium(&data(self.data));
        let said = said(&answer);
        assert_eq!((&said.pods, &said.pods_at_worst), (&nets(self.pods), &nets(self.worst)), "{:?}", self.data);
        assert_eq!(said.masquerade, self.masquerade, "{:?}", self.data);
    }
}

const NETFILTER: Option<Masquerade> = Some(Masquerade::Netfilter);

#[test]
fn cilium_pools() {
    let pool4 = ("cluster-pool-ipv4-cidr", "10.0.0.0/9 10.128.0.0/16");
    let pool6 = ("cluster-pool-ipv6-cidr", "fd00::/104");
    let native = ("ipv4-native-routing-cidr", "10.0.0.0/8");
    let check = |data: &[(&str, &str)], pods: &[&str], worst: &[&str]| {
        Cilium { data, pods, worst, masquerade: NETFILTER }.check();
    };
    let both: &[&str] = &["10.0.0.0/9", "10.128.0.0/16"];
    check(&[("ipam", "cluster-pool"), pool4, pool6, ("enable-ipv6", "false"), ("enable-ipv4", "true")], both, &[]);
    check(&[pool4, pool6, ("enable-ipv4", "false")], &["fd00::/104"], &[]);
    // A pool that another mode left behind, and a supernet of several clusters.
    check(&[("ipam", "kubernetes"), pool4, native], &[], &[]);
    check(&[("ipam", "eni"), pool4, native], &[], &["10.0.0.0/8"]);
    check(&[("cni-chaining-mode", "aws-cni"), pool4], &[], &[]);
    check(&[("cni-chaining-mode", "none"), pool4], both, &[]);
    check(&[], &[], &[]);
    let specs = [json!({"ipam": {"podCIDRs": ["10.0.1.0/24"]}})];
    assert_eq!(said(&objects::cilium_node(&specs)).own_pods, nets(&["10.0.1.0/24"]));
}

#[test]
fn cilium_masquerades_in_bpf_or_in_netfilter() {
    let bpf = ("enable-bpf-masquerade", "true");
    for (data, masquerade) in [
        (vec![bpf, ("enable-ipv4-masquerade", "true")], Some(Masquerade::Bpf)),
        (vec![bpf], Some(Masquerade::Bpf)),
        (vec![("enable-bpf-masquerade", "false")], NETFILTER),
        (vec![bpf, ("enable-ipv4-masquerade", "false")], None),
        (vec![bpf, ("masquerade", "false")], None),
        (vec![bpf, ("enable-ipv4-masquerade", "false"), ("enable-ipv6-masquerade", "true")], Some(Masquerade::Bpf)),
    ] {
        Cilium { data: &data, pods: &[], worst: &[], masquerade }.check();
    }
}

#[test]
fn submariner_names_this_cluster() {
    let name = |own: &[Value], gateways: &[Value]| match objects::submariner(own, gateways) {
        Answer::Said(said) => said.cluster_name,
        _ => None,
    };
    let own = [json!({"spec": {"clusterID": "east"}, "status": {"clusterID": "west"}})];
    let gateway = [json!({"status": {"localEndpoint": {"cluster_id": "north"}}})];
    assert_eq!(name(&own, &gateway).as_deref(), Some("east"));
    assert_eq!(
        name(&[json!({"spec": {"clusterID": ""}, "status": {"clusterID": "west"}})], &[]).as_deref(),
        Some("west")
    );
    assert_eq!(name(&[json!({})], &gateway).as_deref(), Some("north"));
    assert_eq!(name(&[json!(7)], &[json!({})]), None);
    // Not a name that remotes files may have.
    let odd = objects::submariner(&[json!({"spec": {"clusterID": "East_1"}})], &[]);
    assert!(said(&odd).odd[0].contains("East_1"), "{odd:?}");
}

fn kubeadm() -> (Origin, Answer) {
    (Origin::Kubeadm, objects::kubeadm(&data(&[("ClusterConfiguration", CLUSTER_CONFIGURATION)])))
}

fn own_node(cidr: &str) -> (Origin, Answer) {
    (Origin::OwnNode, objects::own_node(&node_specs(&[json!({"podCIDRs": [cidr]})])))
}

fn service_cidr(cidr: &str) -> (Origin, Answer) {
    (Origin::ServiceCidr, objects::service_cidrs(&[json!({"cidrs": [cidr]})]))
}

fn calico(cidr: &str) -> (Origin, Answer) {
    (Origin::Calico, objects::calico(&[json!({"cidr": cidr})]))
}

#[test]
fn kubeadm_with_flannel() {
    let decision = decided(vec![kubeadm(), own_node("10.244.3.0/24")]);
    let facts = &decision.facts;
    assert_eq!(facts.pod_cidrs, nets(&["10.244.0.0/16", "fd00:10:244::/56"]));
    assert_eq!(facts.service_cidrs, nets(&["10.96.0.0/16", "fd00:10:96::/112"]));
    assert_eq!(facts.own_pod_cidrs, nets(&["10.244.3.0/24"]));
    assert_eq!(facts.masquerade, None);
    // The whole is named, so nobody needs to follow every node.
    assert_eq!((decision.ask_nodes, decision.waiting, decision.findings.len()), (Some(false), false, 0));
}

#[test]
fn a_share_outside_the_named_whole_has_all_nodes_asked() {
    let decision = decided(vec![kubeadm(), own_node("10.250.3.0/24")]);
    assert_eq!(decision.ask_nodes, Some(true));
    assert_eq!(decision.facts.pod_cidrs, nets(&["10.244.0.0/16", "10.250.3.0/24", "fd00:10:244::/56"]));
}

#[test]
fn k3s_without_kubeadm() {
    let shares = node_specs(&[json!({"podCIDRs": ["10.42.0.0/24"]}), json!({"podCIDRs": ["10.42.1.0/24"]})]);
    let list = vec![service_cidr("10.43.0.0/16"), own_node("10.42.0.0/24")];
    assert_eq!(decided(list.clone()).ask_nodes, Some(true));
    let decision = decided(list.into_iter().chain([(Origin::Nodes, objects::nodes(&shares))]).collect());
    assert_eq!(decision.facts.pod_cidrs, nets(&["10.42.0.0/23"]));
    assert_eq!(decision.facts.service_cidrs, nets(&["10.43.0.0/16"]));
    assert_eq!(decision.findings, []);
}

#[test]
fn the_service_cidr_api_outranks_what_may_be_out_of_date() {
    let decision = decided(vec![kubeadm(), service_cidr("10.97.0.0/16")]);
    assert_eq!(decision.facts.service_cidrs, nets(&["10.97.0.0/16"]));
}

#[test]
fn pools_beat_shares() {
    // The node's own share would lie inside the pool, and yet be other nodes' addresses.
    let blocks = (
        Origin::CalicoBlocks,
        objects::calico_blocks(&[json!({"node": "n", "cidr": "10.244.9.0/26", "state": "confirmed"})], "n"),
    );
    let decision = decided(vec![kubeadm(), own_node("10.244.3.0/24"), calico("10.244.0.0/17"), blocks]);
    assert_eq!(decision.facts.pod_cidrs, nets(&["10.244.0.0/17"]));
    assert_eq!(decision.facts.own_pod_cidrs, nets(&["10.244.9.0/26"]));
    assert_eq!(decision.facts.service_cidrs, nets(&["10.96.0.0/16", "fd00:10:96::/112"]));
    assert_eq!(decision.ask_nodes, Some(false));
    let cilium = (
        Origin::Cilium,
        objects::cilium(&data(&[("cluster-pool-ipv4-cidr", "10.0.0.0/12"), ("enable-bpf-masquerade", "true")])),
    );
    let decision = decided(vec![own_node("10.244.3.0/24"), cilium]);
    assert_eq!(decision.facts.pod_cidrs, nets(&["10.0.0.0/12"]));
    assert_eq!(decision.facts.masquerade, Some(Masquerade::Bpf));
    assert!(decision.facts.own_pod_cidrs.is_empty());
}

#[test]
fn ciliums_native_range_is_the_last_resort() {
    let cilium =
        || (Origin::Cilium, objects::cilium(&data(&[("ipam", "eni"), ("ipv4-native-routing-cidr", "10.5.0.0/16")])));
    assert_eq!(decided(vec![cilium()]).facts.pod_cidrs, nets(&["10.5.0.0/16"]));
    assert_eq!(decided(vec![cilium(), own_node("10.6.0.0/24")]).facts.pod_cidrs, nets(&["10.6.0.0/24"]));
}

#[test]
fn settings_win_over_everybody() {
    let given = Given {
        kubernetes: true,
        cluster_name: Some("own".to_owned()),
        pods: nets(&["10.1.0.0/16", "172.20.0.0/16"]),
        services: nets(&["10.2.0.0/16"]),
        nodes: nets(&["10.3.0.0/16"]),
    };
    let name = Answer::Said(Said { cluster_name: Some("east".to_owned()), ..Said::default() });
    let answers =
        answers(vec![kubeadm(), own_node("10.244.3.0/24"), calico("10.244.0.0/17"), (Origin::Submariner, name)]);
    let decision = decide(&given, &answers, &addresses(), &NodeFacts::default());
    let facts = &decision.facts;
    assert_eq!(facts.pod_cidrs, given.pods);
    assert_eq!((&facts.service_cidrs, &facts.node_cidrs), (&given.services, &given.nodes));
    assert_eq!(facts.cluster_name.as_deref(), Some("own"));
    // This node's share is elsewhere, so it is no share of what was given.
    assert!(facts.own_pod_cidrs.is_empty());
    assert_eq!(decision.ask_nodes, Some(false));
}

#[test]
fn nobody_knows() {
    let mut answers = answers(vec![]);
    answers.take(Origin::Kubeadm, Answer::Forbidden("forbidden: no".to_owned()));
    let decision = decide(&kubernetes(), &answers, &Addresses::default(), &NodeFacts::default());
    let ids: Vec<Id> = decision.findings.iter().map(|finding| finding.id).collect();
    assert_eq!(ids, [Id::LocalUnknown, Id::LocalUnknown, Id::NodeAddresses]);
    assert!(
        decision.findings[0].text.starts_with("pod CIDRs") && decision.findings[1].text.starts_with("service CIDRs")
    );
    assert!(decision.findings[0].text.contains("kubeadm-config: forbidden;"), "{}", decision.findings[0]);
    // Without Kubernetes nobody was asked, so nobody is to blame.
    let decision = decide(&Given::default(), &Answers::default(), &addresses(), &NodeFacts::default());
    assert_eq!(decision.findings, []);
    // Another source's refusal does not matter while one answers.
    let decision = decided(vec![kubeadm(), (Origin::Calico, Answer::Forbidden("no".to_owned()))]);
    assert_eq!(decision.findings, []);
}

#[test]
fn what_is_odd_is_told() {
    let bad = (Origin::Calico, objects::calico(&[json!({"cidr": "x"}), json!({"cidr": "10.10.0.0/16"})]));
    let decision = decided(vec![kubeadm(), bad]);
    assert_eq!(decision.facts.pod_cidrs, nets(&["10.10.0.0/16"]));
    assert!(decision.findings[0].text.contains("ippools of Calico"), "{:?}", decision.findings);
    let many = Addresses { list: addresses().list, total: 40 };
    let decision = decide(&kubernetes(), &answers(vec![kubeadm()]), &many, &NodeFacts::default());
    assert_eq!(decision.findings[0].id, Id::NodeAddresses);
}

#[test]
fn what_was_known_stays_until_all_have_answered() {
    let known = NodeFacts {
        cluster_name: Some("east".to_owned()),
        pod_cidrs: nets(&["10.10.0.0/16"]),
        service_cidrs: nets(&["10.96.0.0/16"]),
        own_pod_cidrs: nets(&["10.10.0.0/26"]),
        masquerade: Some(Masquerade::Bpf),
        ..NodeFacts::default()
    };
    let decided = |answers: &Answers| decide(&kubernetes(), answers, &addresses(), &known);
    let expected = NodeFacts { addresses: addresses().list, ..known.clone() };
    // Nobody has answered: the API server is down, or the agent has just started.
    let mut answers = Answers::waiting();
    let decision = decided(&answers);
    assert_eq!(decision.facts, expected);
    assert!(decision.waiting && decision.ask_nodes.is_none() && decision.findings.is_empty());
    // The nodes answer first; Calico's pools are what matters.
    let (origin, answer) = own_node("10.244.3.0/24");
    answers.take(origin, answer);
    assert_eq!(decided(&answers).facts, expected);
    // Everybody has answered.
    for origin in Origin::ALL.into_iter().filter(|origin| *origin != Origin::OwnNode) {
        answers.take(origin, Answer::Absent(String::new()));
    }
    let decision = decided(&answers);
    assert_eq!(decision.facts.pod_cidrs, nets(&["10.244.3.0/24"]));
    assert_eq!(decision.facts.own_pod_cidrs, nets(&["10.244.3.0/24"]));
    assert_eq!((decision.facts.cluster_name, decision.facts.masquerade), (None, None));
    assert!(!decision.waiting);
    // Nobody names services. A cluster has some, so those that were known stay, and it is said.
    assert_eq!(decision.facts.service_cidrs, known.service_cidrs);
    assert!(decision.findings[0].text.contains("what was known before stays"), "{:?}", decision.findings);
}

#[test]
fn trouble_takes_nothing_back() {
    let mut answers = answers(vec![kubeadm()]);
    assert!(!answers.take(Origin::Kubeadm, Answer::Waiting("connection refused".to_owned())));
    assert!(!answers.take(Origin::Calico, Answer::Waiting("connection refused".to_owned())));
    assert!(!answers.take(Origin::Kubeadm, Answer::Forbidden("a role is made anew".to_owned())));
    let decision = decide(&kubernetes(), &answers, &addresses(), &NodeFacts::default());
    assert!(!decision.waiting && !decision.facts.pod_cidrs.is_empty());
    // That it is gone does.
    assert!(answers.take(Origin::Kubeadm, Answer::Absent("not there".to_owned())));
    assert!(decide(&kubernetes(), &answers, &addresses(), &NodeFacts::default()).facts.pod_cidrs.is_empty());
}

#[test]
fn a_file_by_hand_that_leaves_out_what_is_known() {
    let known = decided(vec![kubeadm()]).facts;
    let by_hand = NodeFacts { pod_cidrs: nets(&["10.9.0.0/16"]), ..NodeFacts::default() };
    let findings = left_out(&by_hand, &known);
    assert_eq!(findings.len(), 1);
    assert!(findings[0].text.contains("serviceCIDRs") && findings[0].text.contains("10.96.0.0/16"));
    assert_eq!(left_out(&known, &known), []);
}

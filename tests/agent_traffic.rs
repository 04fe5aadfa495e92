//! Underlay pods, made by the real plugin, on nodes whose rules the running agent keeps, next to whoever drops what
//! conntrack finds invalid.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/agent_traffic.rs"]
mod mesh;
mod support;
#[path = "support/traffic.rs"]
mod traffic;

use std::net::SocketAddr;

use agent::Agent;
use crosslink_testkit::{
    Node,
    nft::{Masquerade, service},
    probe::{tcp, wait_until},
    servers::serve_tcp,
    topology::pick,
};
use mesh::{Cni, has_table, keep, table, uninstall};
use support::Site;
use traffic::{A1, A2, BOTH, Lab, PRIMARY, Placed, RP_FILTERS, each, meet, rp, underlay_ready};

const VIP_LOCAL: [&str; 2] = ["10.233.62.51:80", "[fd33::33]:80"];
const VIP_REMOTE: [&str; 2] = ["10.243.2.135:80", "[fd43::87]:80"];

/// kube-proxy's ways with clients: `clusterCIDR` covers the underlay in the seed's own case.
const MASQUERADES: [[Masquerade<'_>; 2]; 3] = [
    [Masquerade::Never; 2],
    [Masquerade::NotFrom("172.110.0.0/16"), Masquerade::NotFrom("fd10::/64")],
    [Masquerade::All; 2],
];

/// The two clusters without the stand-in of the agent's rules, and an agent on each of cluster-a's nodes.
fn with_agents(rp_filter: u8) -> (Lab, [Agent; 2]) {
    let lab = Lab::new(rp(rp_filter));
    let start = |node: &Node, site: Site| {
        node.nft("delete table inet crosslink");
        keep(node, &site, &[])
    };
    let a1 = start(&lab.clusters.a1, lab.site_a("a1", A1));
    let a2 = start(&lab.clusters.a2, lab.site_a("a2", A2));
    (lab, [a1, a2])
}

/// The source that the backend saw through a service of each family, made on a node.
fn through(
    node: &Node,
    client: &Placed,
    vips: [&str; 2],
    backend: &Placed,
    masquerades: [Masquerade<'_>; 2],
) -> [String; 2] {
    let _server = serve_tcp(&backend.pod, "[::]:8080");
    let seen = [0, 1].map(|family| {
        let vip: SocketAddr = vips[family].parse().unwrap();
        service(node, vip, SocketAddr::new(pick(&backend.ips, vip.is_ipv6()), 8080), masquerades[family]);
        tcp(&client.pod, vip)
    });
    node.nft("delete table inet kube-proxy");
    seen.map(Result::unwrap)
}

#[test]
fn an_underlay_pod_reaches_pods_services_and_its_node() {
    if !underlay_ready() {
        return;
    }
    each(RP_FILTERS, |rp_filter| {
        let (lab, _agents) = with_agents(rp_filter);
        let (pod, near, far, remote) = (lab.on_a1(), lab.on_a1(), lab.on_a2(), lab.remote());
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        lab.own_node(&pod, PRIMARY, BOTH);
        let own = [false, true].map(|v6| pick(&pod.ips, v6).to_string());
        assert_eq!(through(&lab.clusters.b1, &pod, VIP_REMOTE, &remote, MASQUERADES[0]), own);
        for masquerades in MASQUERADES {
            // On this node, on another, and the pod itself.
            for backend in [&near, &far, &pod] {
                let seen = through(&lab.clusters.a1, &pod, VIP_LOCAL, backend, masquerades);
                assert!(seen.iter().all(|seen| A1.contains(&seen.as_str())), "{masquerades:?}: {seen:?}");
            }
            // From the other cluster to a local service, which the gateway translates.
            let seen = through(&lab.clusters.a2, &remote, VIP_LOCAL, &pod, masquerades);
            assert_eq!(seen, [false, true].map(|v6| pick(&remote.ips, v6).to_string()), "{masquerades:?}");
            // A local service whose backend is in the other cluster.
            let seen = through(&lab.clusters.a1, &pod, VIP_LOCAL, &remote, masquerades);
            assert_eq!(seen, PRIMARY, "{masquerades:?}");
        }
    });
}

/// Main CNIs take underlay pods' connections through the node for those of any pod.
#[test]
fn underlay_pods_keep_their_addresses_next_to_a_main_cni() {
    if !underlay_ready() {
        return;
    }
    each([Cni::Kindnet10, Cni::FlannelNft], |cni| {
        let (lab, _agents) = with_agents(1);
        for (node, own) in [
            (&lab.clusters.a1, ["172.110.250.0/24", "fd10::250:0/112"]),
            (&lab.clusters.a2, ["172.110.251.0/24", "fd10::251:0/112"]),
        ] {
            node.nft(&cni.rules(["172.110.0.0/16", "fd10::/64"], own));
        }
        let (pod, near, far, remote) = (lab.on_a1(), lab.on_a1(), lab.on_a2(), lab.remote());
        meet((&pod.pod, &pod.ips), (&remote.pod, &remote.ips), BOTH);
        lab.own_node(&pod, PRIMARY, BOTH);
        let own = [false, true].map(|v6| pick(&pod.ips, v6).to_string());
        assert_eq!(through(&lab.clusters.b1, &pod, VIP_REMOTE, &remote, MASQUERADES[0]), own);
        for backend in [&near, &far] {
            let seen = through(&lab.clusters.a1, &pod, VIP_LOCAL, backend, MASQUERADES[0]);
            assert!(seen.iter().all(|seen| A1.contains(&seen.as_str())), "{seen:?}");
        }
        // The gateway's main CNI hides what comes from a1's own address once more.
        through(&lab.clusters.a1, &pod, VIP_LOCAL, &remote, MASQUERADES[0]);
    });
}

/// Without the rule, kube-proxy's drop wins; once it is there, a pod that is there already gets through.
#[test]
fn the_rules_may_come_after_the_pod_and_go_again() {
    if !underlay_ready() {
        return;
    }
    let (lab, [agent, _gateway]) = with_agents(1);
    let (pod, remote, a1) = (lab.on_a1(), lab.remote(), &lab.clusters.a1);
    let _server = serve_tcp(&remote.pod, "[::]:80");
    let reached =
        || BOTH.iter().map(|v6| tcp(&pod.pod, SocketAddr::new(pick(&remote.ips, *v6), 80)).is_ok()).collect::<Vec<_>>();
    assert_eq!(reached(), [true, true]);
    agent.stop();
    assert_eq!(reached(), [true, true], "an agent that stops changes nothing");
    uninstall(a1, &lab.site_a("a1", A1));
    assert!(!has_table(a1));
    assert_eq!(reached(), [false, false]);
    let agent = keep(a1, &lab.site_a("a1", A1), &[]);
    assert_eq!(reached(), [true, true]);
    a1.nft("flush ruleset");
    crosslink_testkit::nft::kube_proxy_drop(a1);
    wait_until("the table is back", std::time::Duration::from_secs(10), || {
        has_table(a1) && table(a1).contains("notrack")
    });
    assert_eq!(reached(), [true, true]);
    drop(agent);
}

/// A cluster that appears in a remotes file is untracked from then on, and one that goes is tracked again.
#[test]
fn the_rules_follow_the_remotes_files() {
    if !underlay_ready() {
        return;
    }
    let (lab, _agents) = with_agents(1);
    let (a1, site) = (&lab.clusters.a1, lab.site_a("a1", A1));
    assert!(table(a1).contains("172.111.0.0/16"));
    site.cluster("cluster-c", &["10.77.0.0/16", "fd77::/64"], &[]);
    wait_until("the new cluster is in the table", std::time::Duration::from_secs(10), || {
        let text = table(a1);
        text.contains("10.77.0.0/16") && text.contains("fd77::/64")
    });
    std::fs::remove_file(site.remotes_dir().join("cluster-c.json")).unwrap();
    wait_until("it is gone", std::time::Duration::from_secs(10), || !table(a1).contains("10.77.0.0"));
}

/// On a node with pods of its own, what it sees in full stays tracked, and its address there is what remote clusters
/// see.
#[test]
fn the_nodes_own_address_among_its_pods_comes_first() {
    if !underlay_ready() {
        return;
    }
    let (lab, _agents) = with_agents(1);
    let (a1, site) = (&lab.clusters.a1, lab.site_a("a1", A1));
    site.node(serde_json::json!({
        "clusterName": "cluster-a", "addresses": A1, "ownPodCIDRs": ["10.244.1.0/24", "fd44:0:0:1::/64"],
        "podCIDRs": ["172.110.0.0/16", "fd10::/64", "10.244.0.0/16", "fd44::/48"],
        "serviceCIDRs": ["10.233.0.0/18", "fd33::/112"],
    }));
    wait_until("the node's own pods are left alone", std::time::Duration::from_secs(10), || {
        table(a1).contains("@own4")
    });
    assert!(!table(a1).contains("daddr @remote4 snat"), "the underlay's address is no way back");
    // As flannel's bridge appears with the first pod.
    a1.ip("link add cni0 type bridge");
    a1.ip("addr add 10.244.1.1/24 dev cni0");
    a1.ip("addr add fd44:0:0:1::1/64 dev cni0 nodad");
    a1.ip("link set cni0 up");
    wait_until("the bridge's address is taken", std::time::Duration::from_secs(10), || {
        let text = table(a1);
        text.contains("snat ip to 10.244.1.1") && text.contains("snat ip6 to fd44:0:0:1::1")
    });
}

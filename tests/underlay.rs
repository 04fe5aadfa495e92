//! Underlay pods, made by the real macvlan and host-local plugins, reach a remote cluster through their node.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::net::{IpAddr, SocketAddr};

use crosslink_testkit::nft::{CrosslinkNft, Masquerade, crosslink_nft, kube_proxy_drop, service};
use crosslink_testkit::probe::{ping, tcp, wait_addresses};
use crosslink_testkit::runner::{Attachment, Runner, addresses};
use crosslink_testkit::servers::serve_tcp;
use crosslink_testkit::topology::{conflist, pick};
use crosslink_testkit::{Families, Node, Options, Pod, TwoClusters, require, two_clusters};
use serde_json::{Value, json};
use support::{Site, bin_dirs};

struct Placed {
    pod: Pod,
    ips: Vec<IpAddr>,
    attachment: Attachment,
    runner: Runner,
    site: Site,
}

fn add(clusters: &TwoClusters, node: &Node, site: Site, main: Value, extra: Value) -> Placed {
    let list = conflist("pods", "1.0.0", vec![main, site.entry(extra)]);
    let runner = clusters.runner_with(node, list, bin_dirs());
    let pod = clusters.pod("pod");
    let attachment = Attachment::new(pod.name(), &pod, "eth0");
    let ips = addresses(&runner.add(&attachment).unwrap());
    wait_addresses(&pod);
    Placed { pod, ips, attachment, runner, site }
}

fn site_a(clusters: &TwoClusters) -> Site {
    let site = Site::new(clusters.state().join("site-a1"));
    site.cluster("cluster-b", &["172.111.0.0/16", "fd11::/64"], &["10.243.0.0/18", "fd43::/112"]);
    site.node(json!({
        "clusterName": "cluster-a", "addresses": ["10.7.0.11", "fd07::11", "172.110.0.11", "fd10::11"],
        "podCIDRs": ["172.110.0.0/16", "fd10::/64"], "serviceCIDRs": ["10.233.0.0/18", "fd33::/112"],
    }));
    site
}

fn site_b(clusters: &TwoClusters) -> Site {
    let site = Site::new(clusters.state().join("site-b1"));
    site.cluster("cluster-a", &["172.110.0.0/16", "fd10::/64"], &["10.233.0.0/18", "fd33::/112"]);
    site
}

const RULES: CrosslinkNft<'_> = CrosslinkNft {
    node_pods: &[],
    node_sources: &[],
    local_pods: &["172.110.0.0/16", "fd10::/64"],
    remote_pods: &["172.111.0.0/16", "fd11::/64"],
    remote_services: &["10.243.0.0/18", "fd43::/112"],
};

fn ready() -> bool {
    ["macvlan", "bridge", "nft", "plugin:macvlan", "plugin:bridge", "plugin:host-local"].iter().all(|f| require(f))
}

#[test]
fn an_underlay_pod_and_a_remote_pod_reach_each_other() {
    if !ready() {
        return;
    }
    for rp_filter in [0, 1, 2] {
        let options = Options { node_rp_filter: rp_filter, pod_rp_filter: rp_filter, ..Options::default() };
        let clusters = two_clusters(options);
        for node in [&clusters.a1, &clusters.a2, &clusters.b1] {
            kube_proxy_drop(node);
        }
        crosslink_nft(&clusters.a1, &RULES);
        let pod = add(&clusters, &clusters.a1, site_a(&clusters), clusters.macvlan(1), json!({}));
        let remote = add(&clusters, &clusters.b1, site_b(&clusters), clusters.bridge(), json!({}));
        wait_addresses(&clusters.b1);
        println!("{}", pod.pod.dump());
        println!("{}", clusters.a1.dump());
        let _there = serve_tcp(&remote.pod, "[::]:80");
        let _here = serve_tcp(&pod.pod, "[::]:80");
        for v6 in [false, true] {
            let (local, far) = (pick(&pod.ips, v6), pick(&remote.ips, v6));
            ping(&pod.pod, far).unwrap();
            ping(&remote.pod, local).unwrap();
            assert_eq!(tcp(&pod.pod, SocketAddr::new(far, 80)).unwrap(), local.to_string());
            assert_eq!(tcp(&remote.pod, SocketAddr::new(local, 80)).unwrap(), far.to_string());
            // The kubelet's probes, and the pod's way to its own node.
            ping(&clusters.a1, local).unwrap();
            assert!(tcp(&clusters.a1, SocketAddr::new(local, 80)).is_ok());
            let own = if v6 { "fd10::11" } else { "172.110.0.11" };
            ping(&pod.pod, own.parse().unwrap()).unwrap();
        }
        let vips = [("10.243.2.135:80", false), ("[fd43::87]:80", true)];
        for (vip, v6) in vips {
            service(&clusters.b1, vip.parse().unwrap(), SocketAddr::new(pick(&remote.ips, v6), 80), Masquerade::All);
            assert!(tcp(&pod.pod, vip.parse().unwrap()).is_ok());
        }
        pod.runner.check(&pod.attachment).unwrap();
        remote.runner.check(&remote.attachment).unwrap();
        pod.runner.del(&pod.attachment).unwrap();
        remote.runner.del(&remote.attachment).unwrap();
        assert!(pod.site.records().is_empty() && remote.site.records().is_empty());
        assert_eq!(clusters.a1.ip("-4 route show table 1410"), "");
    }
    let _ = Families::Dual;
}

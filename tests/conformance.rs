//! Cases that other attachment plugins are known to get wrong.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::print_stdout,
    reason = "tests"
)]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::net::SocketAddr;

use crosslink_testkit::probe::tcp;
use crosslink_testkit::require;
use crosslink_testkit::servers::serve_tcp;
use sandbox::{Sandbox, silent};
use serde_json::json;

/// An address that came by router advertisement is in the kernel, not in the result; the pod has the family all the same.
#[test]
fn an_address_that_only_the_kernel_knows_counts() {
    for sandbox in [Sandbox::overlay(), Sandbox::underlay()] {
        let address = sandbox.result()["ips"][1]["address"].as_str().unwrap().to_owned();
        sandbox.pod.ip(&format!("addr change {address} dev eth0 valid_lft 3600 preferred_lft 1800"));
        let mut conf = sandbox.conf(json!({}));
        conf["prevResult"]["ips"].as_array_mut().unwrap().truncate(1);
        let reply = sandbox.call("ADD", &conf).run().unwrap();
        assert!(reply.ok() && reply.json() == conf["prevResult"], "{reply:?}");
        let routes = sandbox.routes();
        assert!(routes.iter().any(|route| route.contains("fd11::/64")), "{routes:#?}");
        silent(&sandbox.call("CHECK", &conf).run().unwrap());
        silent(&sandbox.del(json!({})));
    }
}

/// A service mesh in the pod redirects what comes in by veth0 to its proxy: the interface needs an address for that.
#[test]
fn a_redirect_on_veth0_has_a_target() {
    if !require("nft") {
        return;
    }
    for rp_filter in ["0", "1", "2"] {
        let sandbox = Sandbox::underlay();
        sandbox.pod.sysctl("net.ipv4.conf.all.rp_filter", rp_filter);
        sandbox.add(json!({}));
        sandbox.pod.nft(
            "table ip mesh {
                chain pre {
                    type nat hook prerouting priority dstnat
                    iifname veth0 tcp dport 80 redirect to :15006
                }
            }",
        );
        let _proxy = serve_tcp(&sandbox.pod, "0.0.0.0:15006");
        let pod: SocketAddr = "172.20.1.5:80".parse().unwrap();
        assert_eq!(tcp(&sandbox.node, pod).unwrap(), "172.20.0.11", "rp_filter {rp_filter}");
    }
}

/// Neither the pod's own interface nor anything else of the node changes but what is documented.
#[test]
fn the_pods_interface_keeps_its_settings() {
    let sandbox = Sandbox::underlay();
    sandbox.pod.ip("link set eth0 txqueuelen 777 mtu 1450");
    let before = sandbox.pod.json("link show eth0")[0].clone();
    sandbox.add(json!({}));
    assert_eq!(sandbox.pod.json("link show eth0")[0], before);
    let veth = sandbox.pod.json("link show veth0")[0].clone();
    assert_eq!(veth["mtu"], 1450, "the veth takes the MTU of the pod's interface");
    silent(&sandbox.del(json!({})));
}

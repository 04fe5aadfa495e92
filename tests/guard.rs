//! What a pod, a lost record or an outdated node file must not be able to do.
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

use std::os::unix::fs::PermissionsExt;

use crosslink_testkit::{Call, Netns, Pod};
use sandbox::{Sandbox, annotated, refused, silent};
use serde_json::json;

/// A router advertisement, a redirect or a forged source from the pod does not reach the node's tables, whatever families
/// the pod has itself.
#[test]
fn the_nodes_end_is_closed_in_both_families() {
    for family in ["-4", "-6"] {
        let sandbox = Sandbox::underlay();
        sandbox.pod.ip(&format!("{family} addr flush dev eth0"));
        sandbox.add(json!({}));
        let link = sandbox.node_veth().unwrap();
        for (key, value) in [
            ("ipv4", "rp_filter", "1"),
            ("ipv4", "accept_redirects", "0"),
            ("ipv6", "accept_ra", "0"),
            ("ipv6", "accept_redirects", "0"),
            ("ipv6", "addr_gen_mode", "1"),
        ]
        .map(|(family, name, value)| (format!("net/{family}/conf/{link}/{name}"), value))
        {
            assert_eq!(sandbox.node.read_sysctl(&key), value, "{key}, pod without {family}");
        }
        assert_eq!(sandbox.node.json(&format!("addr show dev {link}"))[0]["addr_info"], json!([]), "no address");
        silent(&sandbox.del(json!({})));
    }
}

/// Gives the pod a second interface into the node.
fn second_interface(sandbox: &Sandbox) {
    sandbox.node.ip(&format!("link add host1 type veth peer name net1 netns {}", sandbox.pod.name()));
    sandbox.node.ip("link set host1 up");
    sandbox.pod.ip("addr add 10.89.0.5/24 dev net1");
    sandbox.pod.ip("link set net1 up");
}

#[test]
fn another_attachments_routes_stay_though_its_record_is_lost() {
    let sandbox = Sandbox::overlay();
    sandbox.add(json!({}));
    let routes = sandbox.routes();
    assert!(!routes.is_empty());
    second_interface(&sandbox);
    let net1 = |command: &str, extra| {
        let call = sandbox.call(command, &sandbox.conf(extra));
        Call { ifname: "net1".to_owned(), ..call }.run().unwrap()
    };
    std::fs::set_permissions(sandbox.record_path(), std::fs::Permissions::from_mode(0o666)).unwrap();
    assert!(net1("ADD", json!({"hijack": "none"})).ok());
    assert_eq!(sandbox.routes(), routes, "its record cannot be read");
    let elsewhere = sandbox.scratch().join("elsewhere");
    assert!(net1("ADD", json!({"hijack": "none", "stateDir": elsewhere})).ok());
    assert_eq!(sandbox.routes(), routes, "its record is in another directory");
}

#[test]
fn gc_leaves_a_living_sandbox_whose_path_is_gone() {
    let sandbox = Sandbox::underlay();
    sandbox.add(json!({}));
    let link = sandbox.node_veth().unwrap();
    let mut record = sandbox.record();
    record["netns"]["path"] = json!("/run/netns/unmounted");
    sandbox.edit_record(|value| *value = record);
    let reply = sandbox.run("GC", json!({"cni.dev/valid-attachments": []}));
    silent(&reply);
    assert!(sandbox.site.log().contains("XL-GC-ALIVE"), "{}", sandbox.site.log());
    assert_eq!(sandbox.node_veth(), Some(link));
    assert_eq!(sandbox.site.records().len(), 1);
}

#[test]
fn an_outdated_node_file_stops_no_pod() {
    let sandbox = Sandbox::underlay();
    let wrong: Vec<String> = (70..80).map(|n| format!("172.20.0.{n}")).collect();
    sandbox.site.node(json!({ "addresses": wrong }));
    sandbox.add(json!({}));
    assert!(sandbox.site.findings().iter().any(|id| id == "XL-NODE-ADDRESSES"));
    silent(&sandbox.del(json!({})));
    // The address changes while the pod runs, and the ADD is repeated.
    sandbox.site.node(json!({"addresses": ["172.20.0.11", "fd20::11"]}));
    sandbox.add(json!({}));
    sandbox.site.node(json!({"addresses": ["172.20.0.77", "fd20::77"]}));
    sandbox.add(json!({}));
    silent(&sandbox.run("CHECK", json!({})));
}

#[test]
fn a_route_of_another_type_does_not_stop_remotes() {
    let sandbox = Sandbox::overlay();
    for kind in ["local", "blackhole", "throw"] {
        let dev = if kind == "local" { "dev lo" } else { "" };
        sandbox.pod.ip(&format!("route add {kind} 172.111.0.0/16 {dev} table main"));
        sandbox.add(json!({}));
        assert_eq!(sandbox.site.findings(), ["XL-ROUTE-CONFLICT"], "{kind}");
        silent(&sandbox.del(json!({})));
        sandbox.refuses(json!({"hijackCIDR": ["172.111.0.0/16"]}), 103, &["172.111.0.0/16", "hijackCIDR"]);
        sandbox.pod.ip(&format!("route del {kind} 172.111.0.0/16 table main"));
    }
}

#[test]
fn an_alternative_name_in_the_way_is_named() {
    let sandbox = Sandbox::underlay();
    sandbox.pod.ip("link property add dev eth0 altname veth0");
    sandbox.refuses(json!({}), 101, &["veth0", "vethName"]);
}

#[test]
fn a_gateway_that_cannot_be_one_stops_only_what_was_named() {
    let sandbox = Sandbox::overlay();
    sandbox.pod.ip("route del default");
    sandbox.pod.ip("-6 route del default");
    let mut conf = sandbox.conf(json!({}));
    conf["prevResult"]["ips"][0]["gateway"] = json!("10.88.0.5");
    let reply = sandbox.call("ADD", &conf).run().unwrap();
    assert!(reply.ok(), "{reply:?}");
    assert!(sandbox.site.findings().iter().any(|id| id == "XL-ROUTE-REFUSED"));
    silent(&sandbox.del(json!({})));
    conf["hijackCIDR"] = json!(["10.77.0.0/16"]);
    sandbox.unchanged(|| refused(&sandbox.call("ADD", &conf).run().unwrap(), 5, &["hijackCIDR", "10.77.0.0/16"]));
}

/// A pod of the same address on the same node.
fn twin(sandbox: &Sandbox) -> Pod {
    let pod = Pod::new("twin", 0);
    let netns: &Netns = &pod;
    netns.ip("link add other type bridge");
    netns.ip("link add eth0 type veth peer name peer");
    netns.ip("link set peer master other up");
    netns.ip("link set other up");
    netns.ip("addr add 172.20.1.5/16 dev eth0");
    netns.ip("link set eth0 up");
    assert_ne!(netns.path(), sandbox.pod.path());
    pod
}

#[test]
fn an_address_that_two_pods_have_is_told_and_given_back_by_undo() {
    let sandbox = Sandbox::underlay();
    sandbox.site.node(json!({"addresses": ["172.20.0.11", "fd20::11"]}));
    sandbox.add(json!({}));
    let routes = sandbox.node.ip("route show table 1410");
    let pod = twin(&sandbox);
    let call = Call {
        container_id: "twin".to_owned(),
        netns: pod.path().to_str().unwrap().to_owned(),
        ..sandbox.call("ADD", &sandbox.conf(json!({})))
    };
    let full = Call { stdout: Some("/dev/full".into()), ..call.clone() }.run().unwrap();
    assert_eq!(full.exit, Some(1), "{full:?}");
    assert_eq!(sandbox.node.ip("route show table 1410"), routes);
    silent(&sandbox.run("CHECK", json!({})));
    assert!(call.run().unwrap().ok());
    assert!(sandbox.site.log().contains("XL-ADDRESS-TAKEN"));
}

#[test]
fn an_annotation_cannot_split_routes_beyond_reason() {
    let sandbox = Sandbox::overlay();
    let wide: Vec<String> = (0..256).map(|n| format!("fd{n:02x}::/16")).collect();
    let wide: Vec<&str> = wide.iter().map(String::as_str).collect();
    sandbox.site.cluster("wide", &wide, &[]);
    let holes: Vec<String> = (0..256).map(|n| format!("fd{n:02x}::1")).collect();
    sandbox.refuses(annotated(json!({"crosslink.dev/exclude-cidr": holes.join(",")})), 7, &["exclude-cidr", "4096"]);
}

#[test]
fn what_a_killed_writer_left_goes_with_the_record() {
    let sandbox = Sandbox::overlay();
    sandbox.add(json!({}));
    let record = sandbox.record_path();
    let name = record.file_name().unwrap().to_str().unwrap();
    let left = record.with_file_name(format!(".{name}.tmp"));
    std::fs::write(&left, "{").unwrap();
    silent(&sandbox.del(json!({})));
    assert!(!left.exists() && !record.exists());
}

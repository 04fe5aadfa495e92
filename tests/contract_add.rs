//! ADDs that cannot end well leave pod and node as they were.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests"
)]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::PathBuf,
    process::{Command, Stdio},
};

use crosslink_testkit::{Call, Reply, in_netns};
use sandbox::{Sandbox, annotated, chmod, failure, refused, silent};
use serde_json::{Value, json};
use support::bin;

/// Every kind of pod.
fn both() -> [Sandbox; 2] {
    [Sandbox::overlay(), Sandbox::underlay()]
}

/// An ADD whose standard output is a pipe that nobody reads any more.
fn add_into_closed_pipe(sandbox: &Sandbox, extra: Value) -> std::process::Output {
    let conf = sandbox.scratch().join("conf");
    fs::write(&conf, sandbox.conf(extra).to_string()).unwrap();
    let call = sandbox.call("ADD", &json!({}));
    in_netns(sandbox.node.path(), || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(bin());
        command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", &call.container_id).env("CNI_NETNS", &call.netns);
        command.env("CNI_IFNAME", "eth0").stdin(File::open(&conf).unwrap()).stdout(writer).stderr(Stdio::piped());
        command.output().unwrap()
    })
}

fn add_into_full(sandbox: &Sandbox, extra: Value) -> Reply {
    let stdout = Some(PathBuf::from("/dev/full"));
    Call { stdout, ..sandbox.call("ADD", &sandbox.conf(extra)) }.run().unwrap()
}

/// Not even a descriptor: Rust's runtime puts /dev/null in its place, into which every write succeeds.
fn add_without_stdout(sandbox: &Sandbox) -> std::process::Output {
    let conf = sandbox.scratch().join("conf");
    std::fs::write(&conf, sandbox.conf(json!({})).to_string()).unwrap();
    let call = sandbox.call("ADD", &json!({}));
    in_netns(sandbox.node.path(), || {
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" >&-"]).arg(bin()).stdin(File::open(&conf).unwrap());
        command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", &call.container_id).env("CNI_NETNS", &call.netns);
        command.env("CNI_IFNAME", "eth0").output().unwrap()
    })
}

#[test]
fn an_add_whose_result_cannot_be_written_is_undone() {
    for sandbox in both() {
        let output = sandbox.unchanged(|| add_without_stdout(&sandbox));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let reply = sandbox.unchanged(|| add_into_full(&sandbox, json!({})));
        assert!(reply.exit == Some(1) && reply.stderr.contains("standard output"), "{reply:?}");
        let output = sandbox.unchanged(|| add_into_closed_pipe(&sandbox, json!({})));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(sandbox.site.records().is_empty() && sandbox.routes().is_empty());
        // And nothing is in the way of the next one.
        sandbox.add(json!({}));
        silent(&sandbox.run("CHECK", json!({})));
    }
}

#[test]
fn a_re_add_whose_result_cannot_be_written_leaves_what_the_first_made() {
    for sandbox in both() {
        sandbox.add(json!({"hijackCIDR": ["10.1.0.0/16"]}));
        // Some routes go, some come, some stay, one changes its MTU.
        sandbox.site.cluster("cluster-c", &["172.112.0.0/16"], &[]);
        let other = json!({"hijack": ["cluster-c"], "hijackCIDR": ["10.2.0.0/16", "172.111.0.0/17"]});
        let reply = sandbox.unchanged(|| add_into_full(&sandbox, other.clone()));
        assert_eq!(reply.exit, Some(1));
        let output = sandbox.unchanged(|| add_into_closed_pipe(&sandbox, other));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        silent(&sandbox.run("CHECK", json!({})));
    }
}

#[test]
fn paths_that_are_no_sandbox_are_refused() {
    let sandbox = Sandbox::overlay();
    let at = |name: &str| sandbox.scratch().join(name).to_str().unwrap().to_owned();
    fs::write(at("file"), "kept").unwrap();
    chmod(at("file").as_ref(), 0o000);
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    symlink(at("loop"), at("loop")).unwrap();
    symlink(at("missing"), at("dangling")).unwrap();
    let long = format!("/{}", "x/".repeat(3000));
    let mut paths: Vec<(String, &str)> = ["missing", "missing/er", "file", "file/under", "fifo", "loop", "dangling"]
        .map(|name| (at(name), "network namespace"))
        .to_vec();
    paths.extend(
        ["/", "/dev/null", "/proc/self/ns/mnt", "/proc/self/ns/user", "/proc/1/status", "relative", "."]
            .map(|path| (path.to_owned(), "network namespace")),
    );
    paths.extend(["/proc/self/ns/net", "/proc/thread-self/ns/net"].map(|path| (path.to_owned(), "own")));
    paths.push((sandbox.node.path().to_str().unwrap().to_owned(), "own"));
    paths.push((long, "network namespace"));
    for (netns, cause) in paths {
        for command in ["ADD", "CHECK"] {
            let call = Call { netns: netns.clone(), ..sandbox.call(command, &sandbox.conf(json!({}))) };
            let reply = sandbox.unchanged(|| call.run().unwrap());
            println!("{command} {}", reply.stdout.get(..300).unwrap_or(&reply.stdout));
            refused(&reply, 4, &["CNI_NETNS", netns.get(..40).unwrap_or(&netns), cause]);
        }
    }
    chmod(at("file").as_ref(), 0o600);
    assert_eq!(fs::read(at("file")).unwrap(), b"kept");
    assert!(!fs::exists(at("missing")).unwrap());
}

#[test]
fn a_sandbox_may_be_named_by_a_symlink() {
    let sandbox = Sandbox::overlay();
    let link = sandbox.scratch().join("link");
    symlink(sandbox.netns(), &link).unwrap();
    let netns = link.to_str().unwrap().to_owned();
    let call = |command| Call { netns: netns.clone(), ..sandbox.call(command, &sandbox.conf(json!({}))) };
    assert!(call("ADD").run().unwrap().ok());
    // Another path to the same sandbox.
    silent(&sandbox.run("CHECK", json!({})));
    silent(&call("DEL").run().unwrap());
    assert!(sandbox.routes().is_empty());
}

/// Whether a program is on this machine; where CI is set it must be.
fn tool(name: &str) -> bool {
    let found = Command::new(name).arg("--version").output().is_ok();
    assert!(
        found || std::env::var_os("CI").is_none(),
        "this machine has no {name}; a test that needs it must not be skipped in CI"
    );
    if !found {
        eprintln!("skipped: this machine has no {name}");
    }
    found
}

#[test]
fn a_missing_capability_is_named() {
    if !tool("setpriv") {
        return;
    }
    for sandbox in both() {
        for (capability, name) in [("net_admin", "CAP_NET_ADMIN"), ("sys_admin", "CAP_SYS_ADMIN")] {
            let script = sandbox.scratch().join(capability);
            let drop = format!("--bounding-set -{capability} --inh-caps -{capability}");
            fs::write(&script, format!("#!/bin/sh\nexec setpriv {drop} -- '{}'\n", bin().display())).unwrap();
            chmod(&script, 0o755);
            // The namespace is entered with all capabilities, as a runtime's child already is in it.
            let call = Call { bin: script.clone(), ..sandbox.call("ADD", &sandbox.conf(json!({}))) };
            refused(&sandbox.unchanged(|| call.run().unwrap()), 5, &[name, "root"]);
            sandbox.add(json!({}));
            for command in ["DEL", "CHECK"] {
                let call = Call { bin: script.clone(), ..sandbox.call(command, &sandbox.conf(json!({}))) };
                refused(&sandbox.unchanged(|| call.run().unwrap()), 5, &[name]);
            }
            silent(&sandbox.del(json!({})));
        }
    }
}

#[test]
fn a_refusal_by_the_kernel_half_way_undoes_what_was_done() {
    // The IPv6 gateway of the result is the pod's own address, which the kernel takes for no next hop; the IPv4 routes
    // come before.
    let sandbox = Sandbox::overlay();
    sandbox.pod.ip("-6 route del default");
    let mut result = sandbox.result();
    result["ips"][1]["gateway"] = json!("fd88::5");
    let extra = json!({ "prevResult": result, "hijackCIDR": ["fd77::/64"] });
    let reply = sandbox.unchanged(|| sandbox.run("ADD", extra.clone()));
    refused(&reply, 5, &["hijackCIDR", "route fd77::/64 via fd88::5"]);
    assert_eq!(reply.stdout.lines().count(), 1, "{reply:?}");
    // An attachment that is there already stays as it was.
    sandbox.add(json!({"hijack": "none", "hijackCIDR": ["10.1.0.0/16"]}));
    refused(&sandbox.unchanged(|| sandbox.run("ADD", extra)), 5, &["fd77::/64"]);

    // The constant next hop is an address of the pod: refused after the veth pair and the sysctls were made.
    let sandbox = Sandbox::underlay();
    sandbox.pod.ip("addr add 169.254.141.1/32 dev lo");
    let reply = sandbox.unchanged(|| sandbox.run("ADD", json!({})));
    assert!(failure(&reply).msg.contains("169.254.141.1"), "{reply:?}");
    assert_eq!(sandbox.node_veth(), None);
    sandbox.pod.ip("addr del 169.254.141.1/32 dev lo");
    sandbox.add(json!({}));
}

#[test]
fn a_named_cidr_that_another_route_holds_is_an_error() {
    for sandbox in both() {
        let gateway = sandbox.pod.json("-4 route show default")[0]["gateway"].as_str().unwrap().to_owned();
        for route in ["10.1.0.0/16", "10.1.0.0/16 metric 77", "blackhole 10.1.0.0/16"] {
            let route = match route.strip_prefix("blackhole") {
                Some(_) => route.to_owned(),
                None => route.replacen("/16", &format!("/16 via {gateway} dev eth0 mtu 1111"), 1),
            };
            sandbox.pod.ip(&format!("route add {route}"));
            let range = json!(["10.0.0.0/8"]);
            let mut extra = annotated(json!({"crosslink.dev/hijack-cidr": "10.1.0.0/16"}));
            extra["annotationCIDRs"] = range;
            sandbox.refuses(extra, 103, &["crosslink.dev/hijack-cidr", "10.1.0.0/16"]);
            sandbox.refuses(json!({"hijackCIDR": ["10.1.0.0/16"]}), 103, &["hijackCIDR", "10.1.0.0/16"]);
            // A remotes file never fails a pod.
            sandbox.site.cluster("cluster-c", &["10.1.0.0/16"], &[]);
            let reply = sandbox.add(json!({}));
            assert!(reply.stderr.contains("XL-ROUTE-CONFLICT"), "{reply:?}");
            assert!(!sandbox.routes().contains(&"10.1.0.0/16".to_owned()));
            silent(&sandbox.del(json!({})));
            fs::remove_file(sandbox.site.remotes_dir().join("cluster-c.json")).unwrap();
            sandbox.pod.ip(&format!("route del {route}"));
        }
    }
}

#[test]
fn a_pod_without_interface_address_or_next_hop_is_refused() {
    let sandbox = Sandbox::overlay();
    let mut result = sandbox.result();
    result["ips"] = json!([]);
    sandbox.pod.ip("route del default");
    let extra = json!({"prevResult": result, "hijackCIDR": ["10.1.0.0/16"]});
    sandbox.refuses(extra, 102, &["hijackCIDR", "10.1.0.0/16"]);
    sandbox.pod.ip("addr flush dev eth0 scope global");
    sandbox.refuses(json!({}), 101, &["eth0", "address"]);
    sandbox.pod.ip("link del eth0");
    sandbox.refuses(json!({}), 101, &["eth0"]);
}

/// Interface indices are of one namespace each: the pod's are 702 and, of the peer, 701.
#[test]
fn a_veth_into_another_sandbox_is_underlay_whatever_its_indices() {
    let sandbox = Sandbox::underlay();
    sandbox.node.ip("link add pair0 index 701 type veth peer name pair1 index 702");
    sandbox.add(json!({}));
    assert_eq!(sandbox.record()["attached"], "underlay", "a pair of the node was taken for the pod's");
}

#[test]
fn a_foreign_veth0_is_an_error() {
    let sandbox = Sandbox::underlay();
    sandbox.pod.ip("link add veth0 type veth peer name other");
    sandbox.refuses(json!({}), 101, &["veth0", "vethName"]);
    sandbox.pod.ip("link add veth1 type veth peer name other1");
    sandbox.refuses(json!({"vethName": "veth1"}), 101, &["veth1", "vethName"]);
    sandbox.refuses(json!({"vethName": "eth0"}), 101, &["eth0", "vethName"]);
    sandbox.add(json!({"vethName": "veth2"}));
    silent(&sandbox.del(json!({})));
}

#[test]
fn a_locked_sandbox_is_tried_again_later() {
    let sandbox = Sandbox::overlay();
    let lock = File::open(sandbox.netns()).unwrap();
    lock.lock().unwrap();
    let reply = sandbox.unchanged(|| sandbox.run("ADD", json!({})));
    refused(&reply, 11, &[&sandbox.netns(), "locked"]);
    assert!(reply.elapsed.as_secs() >= 5, "{:?}", reply.elapsed);
    lock.unlock().unwrap();
    sandbox.add(json!({}));
}

//! GC and STATUS.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::print_stdout,
    reason = "tests"
)]

#[path = "support/mount.rs"]
mod mount;
#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::{fs, process::Command, time::Duration};

use crosslink_testkit::{Call, Reply};
use mount::Mount;
use sandbox::{Sandbox, refused, silent};
use serde_json::{Value, json};
use support::{bin, write};

const KEY: &str = "cni.dev/valid-attachments";

/// GC as libcni sends it: no attachment in the environment, no prevResult.
fn gc(sandbox: &Sandbox, extra: Value) -> Reply {
    let mut conf = sandbox.conf(extra);
    conf.as_object_mut().unwrap().remove("prevResult");
    let call = sandbox.call("GC", &conf);
    let none = String::new;
    Call { container_id: none(), netns: none(), ifname: none(), args: none(), ..call }.run().unwrap()
}

/// Adds the sandbox's pod under another container ID and network.
fn add_as(sandbox: &Sandbox, container_id: &str, network: &str) {
    let call = sandbox.call("ADD", &sandbox.conf(json!({ "name": network })));
    let reply = Call { container_id: container_id.to_owned(), ..call }.run().unwrap();
    assert!(reply.ok(), "{reply:?}");
}

/// Makes the record of `container_id` one of a sandbox that is gone.
fn kill(sandbox: &Sandbox, container_id: &str) {
    let path = sandbox.site.state_dir().join(format!("{container_id}:eth0.json"));
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["netns"]["path"] = json!("/run/netns/gone-for-good");
    record["netns"]["cookie"] = json!(1);
    write(&path, &record.to_string());
}

/// Container IDs of the records there are.
fn ids(sandbox: &Sandbox) -> Vec<String> {
    sandbox.site.records().iter().map(|record| record["containerID"].as_str().unwrap().to_owned()).collect()
}

/// A sandbox with records of dead sandboxes: a and b of network pods, c of network other.
fn with_dead() -> Sandbox {
    let sandbox = Sandbox::overlay();
    for (id, network) in [("a", "pods"), ("b", "pods"), ("c", "other")] {
        add_as(&sandbox, id, network);
        kill(&sandbox, id);
    }
    sandbox
}

fn valid(ids: &[&str]) -> Value {
    ids.iter().map(|id| json!({"containerID": id, "ifname": "eth0"})).collect()
}

#[test]
fn gc_removes_records_of_this_network_that_are_not_listed() {
    for (extra, left) in [
        (json!({}), &["a", "b", "c"][..]),
        (json!({ KEY: null }), &["c"]),
        (json!({ KEY: [] }), &["c"]),
        (json!({ KEY: valid(&["a"]) }), &["a", "c"]),
        (json!({ KEY: valid(&["a", "b", "z"]) }), &["a", "b", "c"]),
        (json!({"cni.dev/attachments": null}), &["c"]),
        (json!({"cni.dev/attachments": valid(&["b"])}), &["b", "c"]),
        (json!({ KEY: valid(&["b"]), "cni.dev/attachments": valid(&["b"]) }), &["b", "c"]),
        (json!({ KEY: [{"containerID": "a", "ifname": "net1"}] }), &["c"]),
        (json!({ KEY: [{"containerID": "a", "ifname": "eth0", "later": 1}] }), &["a", "c"]),
        (json!({"name": "other", KEY: []}), &["a", "b"]),
        (json!({"name": "third", KEY: []}), &["a", "b", "c"]),
    ] {
        let sandbox = with_dead();
        silent(&gc(&sandbox, extra.clone()));
        assert_eq!(ids(&sandbox), left, "{extra}");
        silent(&gc(&sandbox, extra));
        assert_eq!(ids(&sandbox), left, "a second time");
    }
}

#[test]
fn gc_that_cannot_tell_what_is_valid_removes_nothing() {
    let sandbox = with_dead();
    for list in [
        json!({}),
        json!("a"),
        json!(7),
        json!([7]),
        json!([{"containerID": "a"}]),
        json!([{"ifname": "eth0"}]),
        json!([{"containerID": 1, "ifname": "eth0"}]),
        json!([null]),
    ] {
        println!("{list}");
        let reply = sandbox.unchanged(|| gc(&sandbox, json!({ KEY: list })));
        refused(&reply, 7, &[KEY]);
    }
    let reply = sandbox.unchanged(|| gc(&sandbox, json!({"name": null, KEY: []})));
    refused(&reply, 7, &["name"]);
    // A broken entry is no reason not to collect.
    silent(&gc(&sandbox, json!({"hijack": 7, "failPolicy": "x", "unknown": 1, KEY: []})));
    assert_eq!(ids(&sandbox), ["c"]);
}

/// serde reads a list as a struct, field by field; the specification's entries are objects.
#[test]
fn gc_takes_no_list_for_an_attachment() {
    let sandbox = with_dead();
    let reply = sandbox.unchanged(|| gc(&sandbox, json!({ KEY: [["a", "eth0"]] })));
    refused(&reply, 7, &[KEY]);
}

#[test]
fn gc_leaves_a_living_sandbox_to_the_agent() {
    for sandbox in [Sandbox::overlay(), Sandbox::underlay()] {
        sandbox.add(json!({}));
        let reply = sandbox.unchanged(|| gc(&sandbox, json!({ KEY: [] })));
        silent(&reply);
        let log = sandbox.site.log();
        let line = log.lines().find(|line| line.contains("XL-GC-ALIVE")).unwrap();
        assert!(line.contains(&sandbox.id) && line.contains(&sandbox.netns()), "{line}");
        silent(&sandbox.run("CHECK", json!({})));
        // Another pod's sandbox at the same path is not this one.
        sandbox.edit_record(|record| record["netns"]["cookie"] = json!(1));
        silent(&gc(&sandbox, json!({ KEY: null })));
        // But where the veth is still there, so is the sandbox that holds its other end, wherever it is.
        assert_eq!(sandbox.site.records().is_empty(), sandbox.node_veth().is_none());
        if let Some(link) = sandbox.node_veth() {
            sandbox.node.ip(&format!("link del {link}"));
            silent(&gc(&sandbox, json!({ KEY: null })));
            assert!(sandbox.site.records().is_empty());
        }
    }
}

#[test]
fn gc_removes_a_link_that_survived_its_sandbox() {
    let sandbox = Sandbox::underlay();
    sandbox.add(json!({}));
    let link = sandbox.node_veth().unwrap();
    // The pod's end was moved out before the sandbox went, so the pair lives on.
    sandbox.pod.ip(&format!("link set veth0 netns {}", sandbox.node.name()));
    assert!(Command::new("ip").args(["netns", "del", sandbox.pod.name()]).status().unwrap().success());
    let listed = json!({ KEY: [{"containerID": sandbox.id, "ifname": "eth0"}] });
    silent(&gc(&sandbox, listed));
    assert_eq!(sandbox.node_veth(), Some(link));
    silent(&gc(&sandbox, json!({ KEY: [] })));
    assert_eq!(sandbox.node_veth(), None);
    assert!(sandbox.site.records().is_empty());
    assert!(!sandbox.node.ip("route show table all").contains("table 1410"));
}

#[test]
fn gc_leaves_what_is_no_record_alone() {
    let sandbox = with_dead();
    let dir = sandbox.site.state_dir();
    let junk = [
        "notes.txt",
        "a.json",
        ".a:eth0.json.77.tmp",
        "x:y:z.json",
        ":eth0.json",
        "a:.json",
        "..:eth0.json",
        "corrupt:eth0.json",
        "b:eth0.json.bak",
    ];
    for name in junk {
        write(&dir.join(name), "{}");
    }
    fs::create_dir(dir.join("dir:eth0.json")).unwrap();
    std::os::unix::fs::symlink(dir.join("nowhere"), dir.join("link:eth0.json")).unwrap();
    assert!(Command::new("mkfifo").arg(dir.join("fifo:eth0.json")).status().unwrap().success());
    let reply = gc(&sandbox, json!({ KEY: [] }));
    silent(&reply);
    for name in ["corrupt:eth0.json", "dir:eth0.json", "fifo:eth0.json"] {
        assert!(reply.stderr.lines().any(|line| line.contains("XL-STATE") && line.contains(name)), "{name}: {reply:?}");
    }
    for name in junk.into_iter().chain(["dir:eth0.json", "link:eth0.json", "fifo:eth0.json", "c:eth0.json"]) {
        assert!(fs::symlink_metadata(dir.join(name)).is_ok(), "{name} was removed");
    }
    assert!(!dir.join("a:eth0.json").exists() && !dir.join("b:eth0.json").exists());
}

#[test]
fn gc_without_a_state_directory_has_nothing_to_do() {
    let sandbox = Sandbox::overlay();
    let missing = sandbox.scratch().join("missing");
    silent(&gc(&sandbox, json!({"stateDir": missing, KEY: []})));
    assert!(!missing.exists());
}

#[test]
fn status_is_healthy_whatever_run_looks_like() {
    let sandbox = Sandbox::overlay();
    let full = Mount::new(sandbox.scratch().join("full"), "size=16k");
    let _ = fs::write(full.0.join("filler"), vec![0; 1 << 20]);
    let empty = Mount::new(sandbox.scratch().join("empty"), "size=16k");
    let missing = sandbox.scratch().join("missing/run");
    for run in [&full.0, &empty.0, &missing] {
        for policy in ["open", "closed"] {
            let extra = json!({"stateDir": run.join("crosslink/attachments"), "failPolicy": policy});
            silent(&sandbox.unchanged(|| sandbox.run("STATUS", extra)));
        }
        assert!(!run.join("crosslink").exists(), "STATUS changes nothing");
    }
    // A log that cannot be written is not a reason either.
    silent(&sandbox.run("STATUS", json!({"logFile": full.0.join("x/cni.log"), "unknown": 1})));
}

#[test]
fn status_fails_for_what_add_would_fail_for() {
    let sandbox = Sandbox::overlay();
    for (extra, part) in [
        (json!({"hijack": 7}), "hijack"),
        (json!({"modus": "auto"}), "did you mean"),
        (json!({"name": null}), "name"),
        (json!({"hijackCIDR": ["x"]}), "hijackCIDR"),
        (json!({"logLevel": "loud"}), "logLevel"),
    ] {
        refused(&sandbox.unchanged(|| sandbox.run("STATUS", extra)), 50, &[part]);
    }
    let read_only = Mount::new(sandbox.scratch().join("read-only"), "ro");
    for state in [read_only.0.clone(), read_only.0.join("crosslink/attachments")] {
        silent(&sandbox.run("STATUS", json!({"stateDir": state, "failPolicy": "open"})));
        let reply = sandbox.run("STATUS", json!({"stateDir": state, "failPolicy": "closed"}));
        refused(&reply, 50, &["failPolicy", read_only.0.to_str().unwrap()]);
    }
    write(&sandbox.site.remotes_dir().join("x.json"), "{");
    silent(&sandbox.run("STATUS", json!({"failPolicy": "open"})));
    refused(&sandbox.run("STATUS", json!({"failPolicy": "closed"})), 50, &["failPolicy", "x.json"]);
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// A kubelet asks every five seconds. The bound is for a debug build on a busy machine; the goal is 1 ms.
#[test]
fn status_costs_little_beyond_a_spawn() {
    let sandbox = Sandbox::overlay();
    for n in 0..50 {
        sandbox.site.cluster(&format!("cluster-{n}"), &[&format!("172.{n}.0.0/16")], &[]);
    }
    for policy in ["open", "closed"] {
        let status = sandbox.call("STATUS", &sandbox.conf(json!({ "failPolicy": policy })));
        let version = Call { node: status.node.clone(), ..Call::new(bin(), "VERSION", &json!({})) };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            let reply = status.run().unwrap();
            assert!(reply.ok(), "{reply:?}");
            with.push(reply.elapsed);
            without.push(version.run().unwrap().elapsed);
        }
        let (status, version) = (median(with), median(without));
        let more = status.saturating_sub(version);
        println!("STATUS, failPolicy {policy}: {status:?}, VERSION {version:?}, difference {more:?} (medians of 200)");
        assert!(more < Duration::from_millis(5), "{more:?}");
    }
}

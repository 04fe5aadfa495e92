//! DEL is best effort: it succeeds when nothing is left to do, and removes only what is this attachment's.
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

use std::fs;

use crosslink_testkit::{Call, Netns, Reply};
use sandbox::{Sandbox, silent};
use serde_json::{Value, json};
use support::write;

/// Every kind of pod.
fn both() -> [Sandbox; 2] {
    [Sandbox::overlay(), Sandbox::underlay()]
}

/// A DEL without prevResult whose CNI_NETNS is `netns`.
fn del_at(sandbox: &Sandbox, netns: &str) -> Reply {
    let mut conf = sandbox.conf(json!({}));
    conf.as_object_mut().unwrap().remove("prevResult");
    Call { netns: netns.to_owned(), ..sandbox.call("DEL", &conf) }.run().unwrap()
}

/// Checks that nothing of the attachment is left.
fn gone(sandbox: &Sandbox) {
    assert_eq!(sandbox.routes(), [""; 0]);
    assert_eq!(sandbox.node_veth(), None);
    assert!(!sandbox.node.ip("route show table all").contains("table 1410"));
    assert!(!sandbox.record_path().exists());
    assert_eq!(sandbox.pod.read_sysctl("net.ipv4.conf.eth0.rp_filter"), "0");
}

/// Routes of other owners, one of them with our protocol but not in our attachment's record.
fn foreign_routes(netns: &Netns, dev: &str) {
    for route in [
        "198.51.100.0/24 proto static",
        "203.0.113.0/24 proto 142",
        "2001:db8::/32 proto bird",
        "blackhole 192.0.2.0/24 proto 12",
    ] {
        let dev = if route.starts_with("blackhole") { String::new() } else { format!("dev {dev}") };
        netns.ip(&format!("route add {route} {dev}"));
    }
}

#[test]
fn del_puts_everything_back_and_can_be_repeated() {
    for sandbox in both() {
        foreign_routes(&sandbox.pod, "eth0");
        sandbox.unchanged(|| {
            sandbox.add(json!({"hijackCIDR": ["10.1.0.0/16"]}));
            silent(&sandbox.run("DEL", json!({})));
            gone(&sandbox);
        });
        for netns in [sandbox.netns(), String::new()] {
            sandbox.unchanged(|| silent(&del_at(&sandbox, &netns)));
        }
    }
}

#[test]
fn del_of_what_was_never_added_is_fine() {
    for sandbox in both() {
        foreign_routes(&sandbox.pod, "eth0");
        // An earlier plugin's ADD failed: there may be no interface, no prevResult, no state directory.
        sandbox.unchanged(|| silent(&sandbox.del(json!({}))));
        sandbox.unchanged(|| silent(&del_at(&sandbox, "")));
        assert!(!sandbox.site.state_dir().exists());
        sandbox.pod.ip("link del eth0");
        sandbox.unchanged(|| silent(&sandbox.del(json!({}))));
    }
}

#[test]
fn an_empty_netns_is_found_by_the_record() {
    for sandbox in both() {
        sandbox.add(json!({}));
        silent(&del_at(&sandbox, ""));
        gone(&sandbox);
    }
}

#[test]
fn a_path_that_leads_nowhere_still_removes_link_and_record() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("file"), "kept").unwrap();
    assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    let paths = [
        at("missing"),
        at("file"),
        at("file/under"),
        at("fifo"),
        at(""),
        "/proc/self/ns/net".into(),
        "/proc/self/ns/mnt".into(),
        "/dev/null".into(),
    ];
    for netns in paths {
        for sandbox in both() {
            sandbox.add(json!({}));
            silent(&del_at(&sandbox, &netns));
            assert_eq!(sandbox.node_veth(), None, "{netns}");
            assert!(sandbox.site.records().is_empty(), "{netns}");
        }
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"kept");
    assert!(!fs::exists(at("missing")).unwrap());
}

#[test]
fn a_sandbox_that_vanished_leaves_nothing_on_the_node() {
    for (n, sandbox) in both().into_iter().enumerate() {
        sandbox.add(json!({}));
        let netns = sandbox.netns();
        std::process::Command::new("ip").args(["netns", "del", sandbox.pod.name()]).status().unwrap();
        silent(&del_at(&sandbox, if n == 0 { &netns } else { "" }));
        assert!(sandbox.site.records().is_empty() && sandbox.node_veth().is_none());
        silent(&del_at(&sandbox, &netns));
        assert!(!fs::exists(&netns).unwrap(), "no stray file");
    }
}

/// Nothing in the node's own namespace is the sandbox's, whatever path the runtime gives.
#[test]
fn the_nodes_own_routes_are_left_alone() {
    for recorded in [true, false] {
        for sandbox in both() {
            if recorded {
                sandbox.add(json!({}));
            }
            let dev = if sandbox.node.json("link show")[1]["ifname"] == "host0" { "host0" } else { "ens0" };
            for route in ["192.0.2.0/24", "2001:db8::/32"] {
                sandbox.node.ip(&format!("route add {route} dev {dev} proto 141"));
            }
            for path in ["/proc/self/ns/net", sandbox.node.path().to_str().unwrap()] {
                silent(&del_at(&sandbox, path));
                assert!(sandbox.node.ip("-4 route show proto 141").contains("192.0.2.0/24"));
                assert!(sandbox.node.ip("-6 route show proto 141").contains("2001:db8::/32"));
            }
        }
    }
}

#[test]
fn without_a_record_the_derivable_is_removed() {
    for sandbox in both() {
        foreign_routes(&sandbox.pod, "eth0");
        let before = sandbox.snapshot();
        sandbox.add(json!({}));
        fs::remove_file(sandbox.record_path()).unwrap();
        silent(&sandbox.del(json!({})));
        assert_eq!((sandbox.routes(), sandbox.node_veth()), (Vec::new(), None));
        // Only the record knew what rp_filter was.
        sandbox.pod.sysctl("net.ipv4.conf.eth0.rp_filter", "0");
        sandbox.snapshot().assert_same(&before);
    }
}

/// A second attachment of the same sandbox, and then the first one's DEL without a record.
#[test]
fn routes_of_a_sandbox_that_another_record_names_stay() {
    let sandbox = Sandbox::overlay();
    sandbox.add(json!({}));
    let other = Call { container_id: "other".into(), ..sandbox.call("DEL", &sandbox.conf(json!({}))) };
    sandbox.unchanged(|| silent(&other.run().unwrap()));
    // A record that cannot be read may be of this sandbox.
    write(&sandbox.record_path(), "{");
    sandbox.unchanged(|| silent(&other.run().unwrap()));
    fs::remove_file(sandbox.record_path()).unwrap();
    silent(&other.run().unwrap());
    assert!(sandbox.routes().is_empty());
}

/// Records that cannot be used, by the fault.
fn broken_records() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("empty", Vec::new()),
        ("half", br#"{"version":1,"state":"ready","containerID":"#.to_vec()),
        ("another shape", b"[1,2,3]".to_vec()),
        ("not UTF-8", vec![0xff; 100]),
        ("NUL bytes after a crash", vec![0; 4096]),
        ("a far newer version", br#"{"version":9,"everything":"is different"}"#.to_vec()),
        ("deep", vec![b'['; 100_000]),
    ]
}

#[test]
fn a_broken_record_does_not_stop_del() {
    for sandbox in both() {
        for (what, content) in broken_records() {
            sandbox.add(json!({}));
            fs::write(sandbox.record_path(), content).unwrap();
            let reply = sandbox.del(json!({}));
            silent(&reply);
            assert!(reply.stderr.contains("XL-STATE"), "{what}: {reply:?}");
            assert_eq!(sandbox.node_veth(), None, "{what}");
            assert!(!sandbox.record_path().exists(), "{what}");
        }
    }
}

/// The broken record is this attachment's own: no *other* record names the sandbox, so its routes are ours to remove.
#[test]
fn a_broken_record_of_its_own_does_not_keep_the_routes() {
    let sandbox = Sandbox::overlay();
    for (what, content) in broken_records() {
        sandbox.add(json!({}));
        fs::write(sandbox.record_path(), content).unwrap();
        silent(&sandbox.del(json!({})));
        assert_eq!(sandbox.routes(), [""; 0], "{what}");
    }
}

#[test]
fn a_record_of_a_newer_version_with_unknown_fields_works() {
    for sandbox in both() {
        sandbox.add(json!({}));
        sandbox.edit_record(|record| {
            record["version"] = json!(2);
            record["later"] = json!({"a": [1, null]});
            record["netns"]["later"] = json!(true);
            record["applied"]["later"] = json!("x");
            record["wishes"]["later"] = json!(1);
            record["findings"] = json!([{"id": "XL-OF-A-NEWER-VERSION", "text": "x", "later": 1}]);
        });
        silent(&sandbox.run("CHECK", json!({})));
        // A re-ADD keeps what it does not know.
        sandbox.add(json!({}));
        assert_eq!(sandbox.record()["later"], json!({"a": [1, null]}));
        silent(&sandbox.del(json!({})));
        gone(&sandbox);
    }
}

/// A netns inode is reused at once: only the cookie tells that the sandbox is another pod's now.
#[test]
fn a_record_of_another_sandbox_touches_nothing_in_this_one() {
    for by_record in [false, true] {
        let [overlay, underlay] = both();
        for sandbox in [&overlay, &underlay] {
            sandbox.add(json!({}));
            sandbox.edit_record(|record| {
                let cookie = record["netns"]["cookie"].as_u64().unwrap();
                record["netns"]["cookie"] = json!(cookie + 1_000_000);
            });
        }
        let routes = overlay.routes();
        for sandbox in [&overlay, &underlay] {
            silent(&del_at(sandbox, if by_record { "" } else { sandbox.pod.path().to_str().unwrap() }));
            assert!(sandbox.site.records().is_empty());
        }
        assert_eq!(overlay.routes(), routes);
        // The link is named by container and interface, so it goes whatever sandbox its other end is in.
        assert_eq!(underlay.node_veth(), None);
        assert_eq!(underlay.pod.read_sysctl("net.ipv4.conf.eth0.rp_filter"), "2", "it is not this attachment's");
    }
}

#[test]
fn del_removes_only_what_still_is_as_add_left_it() {
    let sandbox = Sandbox::overlay();
    sandbox.add(json!({}));
    // Somebody else has taken over one prefix and changed a sysctl; one route is gone.
    sandbox.pod.ip("route del 172.111.0.0/16");
    sandbox.pod.ip("route add 172.111.0.0/16 via 10.88.0.1 proto static");
    sandbox.pod.ip("route del fd11::/64");
    silent(&sandbox.del(json!({})));
    assert!(sandbox.pod.ip("-4 route show proto static").contains("172.111.0.0/16"));
    assert!(sandbox.routes().is_empty());

    let sandbox = Sandbox::underlay();
    sandbox.add(json!({}));
    assert_eq!(sandbox.pod.read_sysctl("net.ipv4.conf.eth0.rp_filter"), "2");
    sandbox.pod.sysctl("net.ipv4.conf.eth0.rp_filter", "1");
    silent(&sandbox.del(json!({})));
    assert_eq!(sandbox.pod.read_sysctl("net.ipv4.conf.eth0.rp_filter"), "1", "the pod's owner has set it since");
}

#[test]
fn another_attachments_veth_is_left_alone() {
    let sandbox = Sandbox::underlay();
    sandbox.add(json!({}));
    let mut conf: Value = sandbox.conf(json!({}));
    conf.as_object_mut().unwrap().remove("prevResult");
    for (container_id, ifname) in [("other", "eth0"), (sandbox.id.as_str(), "net1"), ("other", "veth0")] {
        for netns in [sandbox.netns(), String::new()] {
            let (container_id, ifname) = (container_id.to_owned(), ifname.to_owned());
            let call = Call { container_id, ifname, netns, ..sandbox.call("DEL", &conf) };
            sandbox.unchanged(|| silent(&call.run().unwrap()));
        }
    }
    silent(&sandbox.run("CHECK", json!({})));
    silent(&sandbox.del(json!({})));
    gone(&sandbox);
}

#[test]
fn a_link_of_another_kind_with_the_derived_name_is_left_alone() {
    let sandbox = Sandbox::underlay();
    sandbox.add(json!({}));
    let name = sandbox.node_veth().unwrap();
    silent(&sandbox.del(json!({})));
    sandbox.node.ip(&format!("link add {name} type bridge"));
    sandbox.unchanged(|| silent(&sandbox.del(json!({}))));
}

#[test]
fn an_add_that_was_killed_half_way_is_cleaned_up() {
    for sandbox in both() {
        sandbox.add(json!({}));
        // The record as it is before the first change, and only a part of the changes.
        sandbox.edit_record(|record| record["state"] = json!("adding"));
        sandbox.pod.ip("route del 172.111.0.0/16");
        sandbox.pod.ip("route del fd43::/112");
        sandbox::refused(&sandbox.run("CHECK", json!({})), 104, &["ADD did not come to its end"]);
        silent(&del_at(&sandbox, ""));
        gone(&sandbox);
    }
}

//! Files on the node: remotes, node.json, records, the log. None of them stops a pod unless the administrator says so.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests"
)]

#[path = "support/mount.rs"]
mod mount;
#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown, symlink},
    path::Path,
    process::Command,
};

use mount::Mount;
use sandbox::{Sandbox, chmod, refused, silent};
use serde_json::json;
use support::write;

/// Routes of the cluster that every sandbox knows.
const CLUSTER_B: [&str; 4] = ["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"];

/// A file of one cluster, as text.
const GOOD: &str = r#"{"version":1,"source":"static","clusters":[{"name":"cluster-c","podCIDRs":["172.112.0.0/16"]}]}"#;

/// Puts something at a path.
type Make = Box<dyn Fn(&Path)>;

/// Things that must not be used, whatever the content should be: the fault as the message tells it, and how it is made.
fn odd_files() -> Vec<(&'static str, Make)> {
    let mode = |mode: u32| -> Make {
        Box::new(move |path| {
            write(path, GOOD);
            chmod(path, mode);
        })
    };
    let text = |text: &'static str| -> Make { Box::new(move |path| write(path, text)) };
    vec![
        ("regular file", Box::new(|path| fs::create_dir(path).unwrap())),
        ("regular file", Box::new(|path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success()))),
        ("regular file", Box::new(|path| symlink("/dev/zero", path).unwrap())),
        ("", Box::new(|path| symlink(path, path).unwrap())),
        ("mode", mode(0o664)),
        ("mode", mode(0o646)),
        ("mode", mode(0o777)),
        ("UTF-8", Box::new(|path| fs::write(path, b"{\"version\":1,\"source\":\"\xff\"}").unwrap())),
        ("version 2", text(r#"{"version":2,"clusters":[]}"#)),
        ("version", text(r#"{"clusters":[]}"#)),
        ("", text("")),
        ("", text("[]")),
        ("", text("null")),
        ("", text(r#"{"version":1,"addresses":7,"clusters":7}"#)),
        ("", text(&GOOD[..40])),
        ("", Box::new(|path| write(path, &"[".repeat(100_000)))),
        ("", Box::new(|path| write(path, &format!("{{\"version\":1,\"x\":\"{}\"}}", "x".repeat(17 << 20))))),
    ]
}

fn remove(path: &Path) {
    if fs::symlink_metadata(path).unwrap().is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }.unwrap();
}

/// Gives a file to another user; where only root is known, as in a user namespace, that cannot be tested.
fn give_away(path: &Path) -> bool {
    let done = chown(path, Some(12_345), None).is_ok();
    assert!(
        done || std::env::var_os("CI").is_none(),
        "files cannot be given to another user here; this must not be skipped in CI"
    );
    if !done {
        eprintln!("skipped: files cannot be given to another user here");
    }
    done
}

#[test]
fn a_remotes_file_that_is_refused_never_fails_a_pod() {
    let sandbox = Sandbox::overlay();
    let path = sandbox.site.remotes_dir().join("x.json");
    for (cause, make) in odd_files() {
        make(&path);
        let reply = sandbox.add(json!({}));
        let warning = reply.stderr.lines().find(|line| line.contains("XL-REMOTES-FILE")).unwrap().to_owned();
        println!("{warning}");
        assert!(warning.contains(path.to_str().unwrap()) && warning.contains(cause), "{cause}: {warning}");
        assert!(warning.contains("WARN") && warning.len() < 1000, "{warning}");
        assert_eq!(sandbox.routes(), CLUSTER_B, "the other file still works");
        assert!(sandbox.site.findings().contains(&"XL-REMOTES-FILE".to_owned()));
        silent(&sandbox.run("STATUS", json!({})));
        silent(&sandbox.del(json!({})));
        sandbox.refuses(json!({"failPolicy": "closed"}), 11, &["failPolicy", path.to_str().unwrap(), cause]);
        refused(&sandbox.run("STATUS", json!({"failPolicy": "closed"})), 50, &[path.to_str().unwrap(), cause]);
        remove(&path);
    }
}

/// serde reads a list as a struct, field by field; these files hold objects.
#[test]
fn a_list_is_taken_for_no_file_of_ours() {
    let sandbox = Sandbox::overlay();
    let path = sandbox.site.remotes_dir().join("x.json");
    let node = sandbox.site.dir.join("node.json");
    write(&node, r#"[1,"cluster-b"]"#);
    assert!(sandbox.add(json!({})).stderr.contains("XL-NODE-FILE"));
    fs::remove_file(&node).unwrap();
    for text in [r#"[1,"static"]"#, r#"{"version":1,"clusters":[["cluster-c",["172.112.0.0/16"]]]}"#] {
        write(&path, text);
        assert!(sandbox.add(json!({})).stderr.contains("XL-REMOTES-FILE"), "{text}");
        assert_eq!(sandbox.routes(), CLUSTER_B, "{text}");
    }
}

#[test]
fn a_remotes_file_of_another_user_is_refused() {
    let sandbox = Sandbox::overlay();
    let path = sandbox.site.remotes_dir().join("x.json");
    write(&path, GOOD);
    if !give_away(&path) {
        return;
    }
    let reply = sandbox.add(json!({}));
    assert!(reply.stderr.contains("XL-REMOTES-FILE") && reply.stderr.contains("12345"), "{reply:?}");
    assert_eq!(sandbox.routes(), CLUSTER_B);
    silent(&sandbox.del(json!({})));
    sandbox.refuses(json!({"failPolicy": "closed"}), 11, &["x.json", "12345"]);
    // A symlink of root's does not make it root's file.
    let link = sandbox.site.remotes_dir().join("y.json");
    let target = sandbox.scratch().join("z.json");
    fs::rename(&path, &target).unwrap();
    symlink(&target, &link).unwrap();
    sandbox.refuses(json!({"failPolicy": "closed"}), 11, &["y.json", "12345"]);
}

#[test]
fn the_last_good_copy_stands_in() {
    let sandbox = Sandbox::overlay();
    let (path, copy) = (sandbox.site.remotes_dir().join("x.json"), sandbox.site.remotes_dir().join(".x.json.good"));
    let with_c = ["10.243.0.0/18", "172.111.0.0/16", "172.112.0.0/16", "fd11::/64", "fd43::/112"];
    for (cause, make) in odd_files() {
        make(&path);
        write(&copy, GOOD);
        let reply = sandbox.add(json!({}));
        assert_eq!(sandbox.routes(), with_c, "{cause}");
        assert!(reply.stderr.contains("last good copy"), "{reply:?}");
        sandbox.unchanged(|| refused(&sandbox.run("ADD", json!({"failPolicy": "closed"})), 11, &["x.json"]));
        // A copy that anybody may write is no better than the file.
        chmod(&copy, 0o666);
        sandbox.add(json!({}));
        assert_eq!(sandbox.routes(), CLUSTER_B, "{cause}");
        remove(&path);
    }
    // A copy without its file is none: the source was dropped.
    write(&copy, GOOD);
    sandbox.add(json!({"failPolicy": "closed"}));
    assert_eq!(sandbox.routes(), CLUSTER_B);
}

#[test]
fn only_remotes_files_are_read_from_their_directory() {
    let sandbox = Sandbox::overlay();
    let dir = sandbox.site.remotes_dir();
    for name in [".hidden.json", "x.json.tmp", "x.JSON", "json", "x.json~", ".x.json.123.tmp"] {
        write(&dir.join(name), "broken");
    }
    sandbox.add(json!({"failPolicy": "closed"}));
    assert_eq!(sandbox.routes(), CLUSTER_B);
    // As a ConfigMap is mounted: symlinks within the directory.
    fs::create_dir(dir.join("..data")).unwrap();
    write(&dir.join("..data/c.json"), GOOD);
    symlink("..data/c.json", dir.join("c.json")).unwrap();
    sandbox.add(json!({"failPolicy": "closed"}));
    assert!(sandbox.routes().contains(&"172.112.0.0/16".to_owned()));
    let unknown = GOOD.replacen('{', r#"{"later":{"a":[1]},"generation":42,"#, 1);
    write(&dir.join("..data/c.json"), &unknown);
    sandbox.add(json!({"failPolicy": "closed"}));
    assert!(sandbox.routes().contains(&"172.112.0.0/16".to_owned()), "unknown fields are ignored");
}

#[test]
fn a_remotes_directory_may_be_missing_but_nothing_else() {
    let sandbox = Sandbox::overlay();
    let missing = sandbox.scratch().join("missing/er");
    sandbox.add(json!({"remotesDir": missing, "failPolicy": "closed"}));
    assert!(sandbox.routes().is_empty() && !missing.exists());
    silent(&sandbox.del(json!({})));
    let file = sandbox.scratch().join("file");
    write(&file, GOOD);
    let reply = sandbox.add(json!({ "remotesDir": file }));
    assert!(reply.stderr.contains("XL-REMOTES-FILE") && reply.stderr.contains(file.to_str().unwrap()), "{reply:?}");
    silent(&sandbox.del(json!({})));
    let named = file.to_str().unwrap();
    sandbox.refuses(json!({"remotesDir": file, "failPolicy": "closed"}), 11, &[named]);
    refused(&sandbox.run("STATUS", json!({"remotesDir": file, "failPolicy": "closed"})), 50, &[named]);
}

#[test]
fn a_node_file_that_is_refused_is_a_finding() {
    let sandbox = Sandbox::underlay();
    let path = sandbox.site.dir.join("node.json");
    // Every field of node.json may be missing, its version too.
    for (cause, make) in odd_files().into_iter().filter(|(cause, _)| *cause != "version") {
        make(&path);
        let reply = sandbox.add(json!({"failPolicy": "closed"}));
        let warning = reply.stderr.lines().find(|line| line.contains("XL-NODE-FILE")).unwrap().to_owned();
        assert!(warning.contains(path.to_str().unwrap()) && warning.contains(cause), "{cause}: {warning}");
        assert!(sandbox.site.findings().contains(&"XL-NODE-FILE".to_owned()));
        // Node addresses come from the kernel meanwhile.
        assert!(sandbox.routes().contains(&"172.20.0.11".to_owned()), "{:?}", sandbox.routes());
        silent(&sandbox.del(json!({})));
        remove(&path);
    }
    write(&path, r#"{"version":1}"#);
    if give_away(&path) {
        assert!(sandbox.add(json!({})).stderr.contains("XL-NODE-FILE"));
    }
    for bad in [r#"{"version":1,"addresses":["10.0.0.1/8"]}"#, r#"{"version":1,"podCIDRs":["x"]}"#] {
        fs::remove_file(&path).unwrap();
        write(&path, bad);
        assert!(sandbox.add(json!({})).stderr.contains("XL-NODE-FILE"));
    }
}

#[test]
fn the_log_is_made_on_demand_for_root_alone() {
    let sandbox = Sandbox::overlay();
    let log = sandbox.scratch().join("var/log/crosslink/cni.log");
    write(&sandbox.site.remotes_dir().join("x.json"), "broken");
    sandbox.add(json!({ "logFile": log }));
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(log.parent().unwrap()), mode(&log)), (0o700, 0o600));
    let text = fs::read_to_string(&log).unwrap();
    let line = text.lines().find(|line| line.contains("XL-REMOTES-FILE")).unwrap();
    for part in ["ADD", &sandbox.id, "eth0", "shop/cart-0", "x.json", "WARN"] {
        assert!(line.contains(part), "\"{part}\" is not in {line}");
    }
    refused(&sandbox.run("ADD", json!({"logFile": log, "prevResult": null})), 7, &[]);
    assert!(fs::read_to_string(&log).unwrap().lines().last().unwrap().contains("prevResult"), "failures are logged");
    assert_eq!(mode(&sandbox.site.state_dir()), 0o700);
    assert_eq!(mode(&sandbox.record_path()), 0o600);
}

#[test]
fn log_level_and_empty_log_file_are_honoured() {
    let sandbox = Sandbox::overlay();
    let log = sandbox.site.dir.join("cni.log");
    let reply = sandbox.add(json!({"logFile": ""}));
    assert!(!log.exists() && reply.stderr.contains("shop/cart-0"), "{reply:?}");
    sandbox.add(json!({"logLevel": "error"}));
    assert!(!log.exists(), "nothing went wrong: {}", sandbox.site.log());
    write(&sandbox.site.remotes_dir().join("x.json"), "broken");
    sandbox.add(json!({"logLevel": "error"}));
    assert!(!log.exists());
    sandbox.add(json!({"logLevel": "warn"}));
    assert!(sandbox.site.log().lines().all(|line| line.contains("WARN")), "{}", sandbox.site.log());
    sandbox.add(json!({"logLevel": "info"}));
    assert!(sandbox.site.log().contains("INFO") && !sandbox.site.log().contains("DEBUG"));
}

#[test]
fn a_log_that_cannot_be_written_is_no_reason_to_fail() {
    let sandbox = Sandbox::overlay();
    let at = |name: &str| sandbox.scratch().join(name);
    write(&at("file"), "kept");
    write(&at("target"), "kept");
    symlink(at("target"), at("link")).unwrap();
    symlink(at("loop"), at("loop")).unwrap();
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    let paths = [
        at("file/x.log"),
        at("link"),
        at("loop"),
        at("fifo"),
        sandbox.scratch().to_owned(),
        "/dev/full".into(),
        "/proc/version".into(),
        "/sys/x/y.log".into(),
    ];
    for log in paths {
        println!("{}", log.display());
        for policy in ["open", "closed"] {
            let reply = sandbox.add(json!({"logFile": log, "failPolicy": policy}));
            let named = reply.stderr.lines().find(|line| line.contains("XL-STATE")).unwrap();
            assert!(named.contains(log.to_str().unwrap()), "{reply:?}");
        }
        silent(&sandbox.run("DEL", json!({ "logFile": log })));
    }
    assert_eq!(fs::read(at("target")).unwrap(), b"kept");
}

/// An ADD, CHECK, STATUS, DEL without records, with failPolicy open and closed.
fn without_records(sandbox: &Sandbox, state: &Path) {
    println!("{}", state.display());
    let reply = sandbox.add(json!({ "stateDir": state }));
    let warning = reply.stderr.lines().find(|line| line.contains("XL-STATE")).unwrap().to_owned();
    let parent = state.parent().unwrap().to_str().unwrap();
    assert!(warning.contains(parent), "{warning}");
    assert_eq!(sandbox.routes(), CLUSTER_B);
    for command in ["CHECK", "STATUS"] {
        silent(&sandbox.run(command, json!({ "stateDir": state })));
    }
    silent(&sandbox.del(json!({ "stateDir": state })));
    assert!(sandbox.routes().is_empty(), "DEL works without a record");
    sandbox.refuses(json!({"stateDir": state, "failPolicy": "closed"}), 11, &["failPolicy", "record"]);
}

#[test]
fn records_that_cannot_be_written_are_a_finding() {
    let sandbox = Sandbox::overlay();
    let full = Mount::new(sandbox.scratch().join("full"), "size=16k");
    let _ = fs::write(full.0.join("filler"), vec![0; 1 << 20]);
    without_records(&sandbox, &full.0.join("attachments"));
    let left = fs::read_dir(&full.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.contains("tmp")).collect();
    assert!(left.is_empty(), "{left:?}");

    let read_only = Mount::new(sandbox.scratch().join("read-only"), "ro");
    let state = read_only.0.join("attachments");
    without_records(&sandbox, &state);
    refused(&sandbox.run("STATUS", json!({"stateDir": state, "failPolicy": "closed"})), 50, &["failPolicy", "record"]);
}

#[test]
fn a_state_directory_that_is_a_file_is_a_finding() {
    let sandbox = Sandbox::overlay();
    let file = sandbox.scratch().join("file");
    write(&file, "kept");
    for state in [file.join("under"), file.clone()] {
        refused(&sandbox.run("STATUS", json!({"stateDir": state, "failPolicy": "closed"})), 50, &["record"]);
        without_records(&sandbox, &state);
    }
    assert_eq!(fs::read(&file).unwrap(), b"kept");
}

//! The installer of the built agent, on a node that behaves: what it writes, where, and what it leaves alone.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "support/agent_install.rs"]
mod agent_install;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    process::Command,
    time::{Duration, Instant},
};

use agent_install::{FLANNEL, Host, eventually, load, plugin};
use crosslink_core::conflist::{List, remove};
use inotify::{EventMask, Inotify, WatchMask};

const FILE: &str = "10-flannel.conflist";

/// The list's text without our entry.
fn without(text: &str) -> String {
    remove(&List::parse(text).unwrap()).unwrap()
}

fn host() -> Host {
    let host = Host::new();
    host.put(FILE, FLANNEL);
    host
}

#[test]
fn plugin_and_entry_are_put_in_place_and_nothing_else_changes() {
    let host = host();
    fs::set_permissions(host.file(FILE), fs::Permissions::from_mode(0o640)).unwrap();
    chown(host.file(FILE), Some(12), Some(34)).unwrap();
    let agent = host.start(&["--cni-entry", r#"{"failPolicy":"closed"}"#]);
    agent.await_well();
    assert_eq!(fs::read(host.installed()).unwrap(), fs::read(plugin()).unwrap());
    assert_eq!(fs::metadata(host.installed()).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(host.kinds(FILE), ["flannel", "portmap", "crosslink"]);
    assert_eq!(without(&host.text(FILE)), FLANNEL);
    assert!(host.text(FILE).contains(r#""failPolicy":"closed","remotesDir":"#), "{}", host.text(FILE));
    let meta = fs::metadata(host.file(FILE)).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 12, 34));
    let known = ["conf", "bin", "conf/10-flannel.conflist", "bin/crosslink"];
    assert_eq!(host.strangers(&known), Vec::<std::path::PathBuf>::new());
    assert_eq!(fs::metadata(host.lib().join("install.json")).unwrap().mode() & 0o777, 0o644);
}

#[test]
fn a_restart_writes_nothing_and_sigterm_neither() {
    for more in [&[][..], &["--container-runtime", "containerd://2.1.0"]] {
        let host = host();
        let agent = host.start(more);
        agent.await_well();
        let before = host.moment();
        agent.stop();
        assert_eq!(host.moment(), before, "SIGTERM");
        let agent = host.start(more);
        agent.await_well();
        agent.stop();
        assert_eq!(host.moment(), before, "restart");
    }
}

#[test]
fn uninstall_removes_the_entry_and_leaves_the_plugin() {
    for (more, runtime) in [(&[][..], "insert"), (&["--container-runtime", "cri-o://1.33.0"], "dropin")] {
        let host = host();
        let agent = host.start(more);
        agent.await_well();
        host.uninstall();
        assert_eq!(host.text(FILE), FLANNEL, "{runtime}");
        assert!(host.installed().exists());
        assert!(!host.file("cbr0").exists());
        // The agent that still runs sees the change and does not put the entry back.
        agent.await_log("was uninstalled");
        host.put(FILE, &format!("{FLANNEL} "));
        host.put("other.json", "");
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(host.text(FILE), format!("{FLANNEL} "));
        drop(agent);
        // One that is started anew does.
        let agent = host.start(more);
        agent.await_well();
        assert!(load(&host.conf()).unwrap()["plugins"].to_string().contains("crosslink"));
    }
}

#[test]
fn uninstall_finds_entries_without_any_notes() {
    let host = host();
    host.start(&[]).await_well();
    fs::remove_file(host.lib().join("install.json")).unwrap();
    host.put("cbr0/90-crosslink.conf", r#"{"type":"crosslink"}"#);
    host.put("cbr0/10-other.conf", r#"{"type":"tuning"}"#);
    host.put("20-second.conflist", r#"{"name":"s","plugins":[{"type":"ptp"} , {"type":"crosslink"}]}"#);
    host.uninstall();
    assert_eq!(host.text(FILE), FLANNEL);
    assert_eq!(host.text("20-second.conflist"), r#"{"name":"s","plugins":[{"type":"ptp"}]}"#);
    assert!(!host.file("cbr0/90-crosslink.conf").exists());
    assert!(host.file("cbr0/10-other.conf").exists(), "others' drop-ins stay");
}

#[test]
fn uninstall_says_what_it_cannot_clean() {
    let host = host();
    host.start(&[]).await_well();
    let broken = host.text(FILE).replace("\n}", "");
    host.put(FILE, &broken);
    let output = host.command("uninstall", &[]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains(FILE) && text.contains("mend it"), "{text}");
    assert_eq!(host.text(FILE), broken);
}

/// Waits for a removal in the directory itself, which is what containerd reloads at.
fn await_kick(watch: &mut Inotify, dropin: &std::path::Path) {
    let mut buffer = [0; 4096];
    let deadline = Instant::now() + agent_install::PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "no kick");
        let Ok(events) = watch.read_events(&mut buffer) else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        if events.into_iter().any(|event| event.mask.contains(EventMask::DELETE)) {
            assert!(dropin.exists(), "kicked before the file was there");
            return;
        }
    }
}

#[test]
fn a_drop_in_is_a_file_of_its_own_and_the_runtime_is_told() {
    let host = host();
    let mut watch = Inotify::init().unwrap();
    watch.watches().add(host.conf(), WatchMask::DELETE).unwrap();
    let agent = host.start(&["--container-runtime", "containerd://2.1.0"]);
    await_kick(&mut watch, &host.file("cbr0/90-crosslink.conf"));
    agent.await_well();
    assert_eq!(host.text(FILE), FLANNEL);
    let chain = load(&host.conf()).unwrap();
    assert_eq!(chain["plugins"][2]["type"], "crosslink");
    assert_eq!(chain["plugins"].as_array().unwrap().len(), 3);
    // The main CNI may write as often as it likes.
    let before = fs::metadata(host.file("cbr0/90-crosslink.conf")).unwrap().ino();
    fs::remove_file(host.file("cbr0/90-crosslink.conf")).unwrap();
    eventually("the drop-in is back", || host.file("cbr0/90-crosslink.conf").exists());
    agent.await_log("CNIConfigRestored");
    drop((before, agent));
}

#[test]
fn exactly_one_mode_is_active_after_a_switch() {
    let host = host();
    let reader = agent_install::Reader::start(&host.conf());
    let cases = [
        (&["--container-runtime", "containerd://1.7.28"][..], 1, false),
        (&["--container-runtime", "containerd://2.1.0"], 0, true),
        // The API server says nothing: what was right before is kept.
        (&[], 0, true),
        (&["--cni-mode", "insert"], 1, false),
        (&["--cni-mode", "dropin"], 0, true),
        (&["--cni-mode", "none"], 0, false),
        (&["--cni-mode", "dropin", "--container-runtime", "cri-o://1.32.0"], 1, false),
    ];
    for (more, entries, dropin) in cases {
        let agent = host.start(more);
        agent.await_well();
        assert_eq!(host.entries(FILE), Some(entries), "{more:?}");
        assert_eq!(host.file("cbr0/90-crosslink.conf").exists(), dropin, "{more:?}");
        if more.contains(&"cri-o://1.32.0") {
            agent.await_log("XL-CNI-MODE");
        }
        agent.stop();
    }
    reader.stop();
    assert_eq!(without(&host.text(FILE)), FLANNEL);
}

#[test]
fn lists_that_read_no_drop_ins_are_edited() {
    let host = Host::new();
    let inlined = FLANNEL.replace("\"name\"", "\"loadOnlyInlinedPlugins\": true, \"name\"");
    host.put(FILE, &inlined);
    let agent = host.start(&["--container-runtime", "containerd://2.1.0"]);
    agent.await_well();
    assert_eq!(host.entries(FILE), Some(1));
    assert_eq!(without(&host.text(FILE)), inlined);
}

#[test]
fn multus_is_left_alone_and_the_network_that_it_calls_is_edited() {
    let host = host();
    let multus = r#"{"name":"multus","type":"multus-shim","clusterNetwork":"/host/etc/cni/net.d/10-flannel.conflist"}"#;
    host.put("00-multus.conf", multus);
    let agent = host.start(&["--container-runtime", "containerd://2.1.0"]);
    agent.await_well();
    assert_eq!(host.text("00-multus.conf"), multus);
    assert_eq!(host.kinds(FILE), ["flannel", "portmap", "crosslink"]);
    // A network that is no file of the directory cannot be edited, and the second file is not instead.
    host.put("00-multus.conf", &multus.replace("10-flannel.conflist", "elsewhere"));
    agent.await_log("it is Multus and calls");
}

#[test]
fn order_is_as_configured() {
    let host = host();
    let text = FLANNEL.replace("\n  ]", ",\n    { \"type\": \"istio-cni\" }\n  ]");
    host.put(FILE, &text);
    let agent = host.start(&["--cni-insert-before", "istio-cni"]);
    agent.await_well();
    assert_eq!(host.kinds(FILE), ["flannel", "portmap", "crosslink", "istio-cni"]);
    agent.stop();
    let agent = host.start(&["--cni-insert-after", "istio-cni"]);
    agent.await_well();
    assert_eq!(host.kinds(FILE), ["flannel", "portmap", "istio-cni", "crosslink"]);
    agent.stop();
    let agent = host.start(&["--cni-insert-before", "portmap", "--cni-insert-after", "istio-cni"]);
    agent.await_log("portmap stands before istio-cni");
    assert_eq!(host.kinds(FILE), ["flannel", "portmap", "istio-cni", "crosslink"]);
}

#[test]
fn a_single_plugin_is_converted_only_if_allowed_and_restored() {
    let conf = "{ \"cniVersion\": \"0.3.1\", \"name\": \"mynet\",\n  \"type\": \"bridge\", \"mtu\": 1.50e3 }\n";
    let host = Host::new();
    host.put("10-x.conf", conf);
    let reader = agent_install::Reader::start(&host.conf());
    let agent = host.start(&[]);
    agent.await_log("cniConvertConf");
    assert_eq!(host.text("10-x.conf"), conf);
    agent.stop();
    let agent = host.start(&["--cni-convert-conf"]);
    agent.await_well();
    let chain = load(&host.conf()).unwrap();
    assert_eq!(chain["name"], "mynet");
    assert_eq!(chain["cniVersion"], "0.3.1");
    assert_eq!(host.kinds("10-x.conflist"), ["bridge", "crosslink"]);
    assert!(host.text("10-x.conflist").contains("\"mtu\": 1.50e3"));
    // Its owner writes it again, as another version of it would.
    agent_install::Style::MoveIn.write(&host.file("10-x.conf"), &conf.replace("1.50e3", "1400"));
    eventually("converted again", || host.text("10-x.conflist").contains("1400") && !host.file("10-x.conf").exists());
    agent.stop();
    host.uninstall();
    assert_eq!(host.text("10-x.conf"), conf.replace("1.50e3", "1400"));
    assert_eq!(host.strangers(&["conf", "bin", "conf/10-x.conf", "bin/crosslink"]), Vec::<std::path::PathBuf>::new());
    reader.stop();
}

#[test]
fn a_symbolic_link_is_followed_inside_the_directory_only() {
    let host = Host::new();
    host.put("real.txt", FLANNEL);
    symlink("real.txt", host.file(FILE)).unwrap();
    let agent = host.start(&[]);
    agent.await_well();
    assert_eq!(host.entries(FILE), Some(1));
    assert!(fs::symlink_metadata(host.file(FILE)).unwrap().is_symlink());
    let outside = host.root().join("outside.conflist");
    fs::write(&outside, FLANNEL).unwrap();
    symlink(&outside, host.file("00-first.conflist")).unwrap();
    agent.await_log("outside of this directory");
    assert_eq!(fs::read_to_string(outside).unwrap(), FLANNEL);
}

#[test]
fn the_pinned_file_is_edited() {
    let host = host();
    host.put("05-other.conflist", FLANNEL);
    let agent = host.start(&["--cni-conf-name", FILE]);
    agent.await_well();
    assert_eq!(host.entries(FILE), Some(1));
    assert_eq!(host.text("05-other.conflist"), FLANNEL);
}

#[test]
fn a_new_first_file_is_edited_and_the_old_one_is_as_it_was() {
    let host = host();
    let agent = host.start(&[]);
    agent.await_well();
    let cilium = FLANNEL.replace("cbr0", "cilium");
    host.put("05-cilium.conflist", &cilium);
    host.await_entry("05-cilium.conflist");
    eventually("the old file is as it was", || host.text(FILE) == FLANNEL);
    fs::remove_file(host.file("05-cilium.conflist")).unwrap();
    host.await_entry(FILE);
    drop(agent);
}

#[test]
fn an_invalid_first_file_is_waited_for_and_the_second_is_left_alone() {
    let host = host();
    host.put("05-first.conflist", "{ \"name\": ");
    let agent = host.start(&[]);
    agent.await_log("XL-CNI-CONFIG");
    assert!(agent.log().contains("05-first.conflist"));
    assert_eq!(host.text(FILE), FLANNEL);
    host.put("05-first.conflist", FLANNEL);
    host.await_entry("05-first.conflist");
    agent.await_well();
    assert_eq!(host.text(FILE), FLANNEL);
}

#[test]
fn directories_may_come_late_and_be_made_anew() {
    let host = Host::new();
    fs::remove_dir(host.conf()).unwrap();
    let agent = host.start(&[]);
    agent.await_log("there is no .conflist");
    for _ in 0..2 {
        host.put(FILE, FLANNEL);
        host.await_entry(FILE);
        fs::remove_dir_all(host.conf()).unwrap();
    }
    host.put(FILE, FLANNEL);
    host.await_entry(FILE);
    fs::rename(host.conf(), host.root().join("away")).unwrap();
    host.put(FILE, FLANNEL);
    host.await_entry(FILE);
    fs::remove_dir_all(host.bin()).unwrap();
    eventually("the plugin is back", || host.installed().exists());
    drop(agent);
}

#[test]
fn the_plugin_is_put_back_whatever_was_done_to_it() {
    let host = host();
    let agent = host.start(&[]);
    agent.await_well();
    let shipped = fs::read(plugin()).unwrap();
    let whole = || {
        fs::read(host.installed()).is_ok_and(|bytes| bytes == shipped)
            && fs::symlink_metadata(host.installed()).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o777 == 0o755)
    };
    let harm: [fn(&Host); 4] = [
        |host| fs::remove_file(host.installed()).unwrap(),
        |host| fs::set_permissions(host.installed(), fs::Permissions::from_mode(0o644)).unwrap(),
        |host| {
            fs::remove_file(host.installed()).unwrap();
            symlink("/bin/true", host.installed()).unwrap();
        },
        |host| {
            fs::remove_file(host.installed()).unwrap();
            fs::write(host.installed(), "").unwrap();
        },
    ];
    for harm in harm {
        harm(&host);
        eventually("the plugin is as it was shipped", whole);
    }
    agent.await_log("CNIBinaryReplaced");
}

#[test]
fn a_plugin_that_does_not_run_gets_no_entry() {
    let mut host = host();
    let script = host.root().join("not-a-plugin");
    fs::write(&script, "#!/bin/sh\necho '{\"cniVersion\":\"1.0.0\"}'\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    host.plugin = script;
    let agent = host.start(&[]);
    agent.await_log("XL-CNI-BINARY");
    assert!(agent.log().contains("it is not the plugin"), "{}", agent.log());
    assert_eq!(host.text(FILE), FLANNEL);
}

#[test]
fn settings_that_cannot_be_end_the_agent_with_the_cure() {
    let host = host();
    for (more, parts) in [
        (["--platform", "k8s"], &["\"k8s\"", "kubeadm, kind, eks", "bottlerocket"][..]),
        (["--cni-entry", r#"{"vethMTU":9}"#], &["vethMTU", "1280"]),
        (["--container-runtime", "containerd"], &["containerRuntime", "containerd://"]),
    ] {
        let output = host.command("run", &more).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && parts.iter().all(|part| text.contains(part)), "{more:?}: {text}");
    }
    assert_eq!(host.text(FILE), FLANNEL);
}

fn mount(arguments: &[&str]) {
    let output = Command::new("mount").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_read_only_directory_is_reported_and_waited_for() {
    let host = host();
    let conf = host.conf().to_str().unwrap().to_owned();
    mount(&["--bind", &conf, &conf]);
    mount(&["-o", "remount,ro,bind", &conf]);
    let agent = host.start(&[]);
    agent.await_log("read-only file system");
    assert!(agent.log().contains("XL-CNI-CONFIG"));
    assert_eq!(host.text(FILE), FLANNEL);
    mount(&["-o", "remount,rw,bind", &conf]);
    host.await_entry(FILE);
    drop(agent);
    Command::new("umount").arg("-l").arg(&conf).status().unwrap();
}

#[test]
fn a_full_file_system_is_reported_and_waited_for() {
    let host = Host::new();
    let conf = host.conf().to_str().unwrap().to_owned();
    mount(&["-t", "tmpfs", "-o", "size=64k", "tmpfs", &conf]);
    host.put(FILE, FLANNEL);
    drop(fs::write(host.file("ballast"), vec![1; 1 << 20]));
    let reader = agent_install::Reader::start(&host.conf());
    let agent = host.start(&[]);
    agent.await_log("make room on its file system (0 bytes");
    assert_eq!(host.text(FILE), FLANNEL);
    assert_eq!(host.strangers(&["conf", "conf/ballast", "conf/10-flannel.conflist", "bin", "bin/crosslink"]).len(), 0);
    fs::remove_file(host.file("ballast")).unwrap();
    host.await_entry(FILE);
    reader.stop();
    drop(agent);
    Command::new("umount").arg("-l").arg(&conf).status().unwrap();
}

#[test]
fn a_directory_without_execution_is_reported_by_name() {
    let host = host();
    let bin = host.bin().to_str().unwrap().to_owned();
    mount(&["-t", "tmpfs", "-o", "noexec", "tmpfs", &bin]);
    let agent = host.start(&[]);
    agent.await_log("mounted noexec");
    assert!(agent.log().contains("XL-CNI-BINARY"));
    assert_eq!(host.text(FILE), FLANNEL, "no entry without a plugin that runs");
    drop(agent);
    Command::new("umount").arg("-l").arg(&bin).status().unwrap();
}

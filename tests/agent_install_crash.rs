//! The installer of the built agent is killed after every system call of an edit, and every system call fails once: at no
//! moment is there a configuration that a runtime could not load, and the next pass puts everything in order.
//!
//! strace injects both, seeing only calls about the files concerned, so that the runs are the same each time.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[path = "support/agent_install.rs"]
mod agent_install;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::Command,
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use agent_install::{Agent, FLANNEL, Host, Reader, eventually};
use crosslink_core::conflist::{List, remove};

const FILE: &str = "10-flannel.conflist";

/// A program that answers VERSION as the plugin does and is copied in no time. No script would do: its interpreter opens
/// it, and what is injected would meet that too.
static PLUGIN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("plugin.c");
    let answer = r#"{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"1.0.0\"]}"#;
    fs::write(&source, format!("#include <stdio.h>\nint main(void) {{ return puts(\"{answer}\") < 0; }}\n")).unwrap();
    let program = dir.path().join("plugin");
    let output = Command::new("cc").arg("-o").arg(&program).arg(&source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read(program).unwrap()
});

const DROPIN: &[&str] = &["--container-runtime", "containerd://2.1.0"];

/// What is done to a node.
#[derive(Clone, Copy, Debug)]
struct Scene {
    /// Settings with which a first agent prepared the node; none where it is new.
    before: Option<&'static [&'static str]>,
    verb: &'static str,
    more: &'static [&'static str],
}

/// First installation by edit and by drop-in, switches between them, and both removals.
const SCENES: [Scene; 6] = [
    Scene { before: None, verb: "run", more: &[] },
    Scene { before: None, verb: "run", more: DROPIN },
    Scene { before: Some(&["--cni-mode", "insert"]), verb: "run", more: DROPIN },
    Scene { before: Some(DROPIN), verb: "run", more: &["--cni-mode", "insert"] },
    Scene { before: Some(&[]), verb: "uninstall", more: &[] },
    Scene { before: Some(DROPIN), verb: "uninstall", more: &[] },
];

impl Scene {
    fn host(self) -> Host {
        let mut host = Host::new();
        host.plugin = host.root().join("plugin");
        fs::write(&host.plugin, &*PLUGIN).unwrap();
        fs::set_permissions(&host.plugin, fs::Permissions::from_mode(0o755)).unwrap();
        host.put(FILE, FLANNEL);
        if let Some(more) = self.before {
            let agent = host.start(more);
            agent.await_well();
            agent.stop();
        }
        host
    }

    /// The agent under strace, which sees the calls about files of this host.
    fn traced(self, host: &Host, options: &[String]) -> Agent {
        let mut all: Vec<String> =
            paths(host).iter().flat_map(|path| ["-P".to_owned(), path.display().to_string()]).collect();
        all.extend(["-e".to_owned(), "trace=!inotify_add_watch,execve".to_owned()]);
        all.extend_from_slice(options);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        Agent::start(host.traced(&all, self.verb, self.more), &host.root().join("logs"))
    }

    /// Waits until the agent has done its work or is dead; says which.
    fn outcome(self, agent: &mut Agent) -> bool {
        let (mut done, mut ended) = (false, None);
        eventually("the work or the end", || {
            ended = agent.child.try_wait().unwrap();
            done = agent.log().contains("\"is well\"");
            done || ended.is_some()
        });
        ended.map_or(done, |status| status.success())
    }
}

fn paths(host: &Host) -> Vec<PathBuf> {
    let conf = [FILE, ".10-flannel.conflist.crosslink.tmp", ".crosslink.kick", "cbr0", "cbr0/90-crosslink.conf"];
    let mut paths: Vec<PathBuf> = conf.iter().map(|name| host.file(name)).collect();
    paths.push(host.file("cbr0/.90-crosslink.conf.crosslink.tmp"));
    paths.extend(["crosslink", ".crosslink.crosslink.tmp"].map(|name| host.bin().join(name)));
    paths.extend(["install.json", ".install.json.tmp", "lock"].map(|name| host.lib().join(name)));
    paths.extend([host.conf(), host.lib(), host.bin()]);
    paths
}

/// System calls of the thread that does the work, in a run without faults: how often each is made.
fn calls(scene: Scene) -> BTreeMap<String, usize> {
    let host = scene.host();
    let trace = host.root().join("trace");
    let mut agent = scene.traced(&host, &["-o".to_owned(), trace.display().to_string()]);
    assert!(scene.outcome(&mut agent), "{}", agent.log());
    drop(agent);
    let text = fs::read_to_string(trace).unwrap();
    let mut threads: BTreeMap<&str, BTreeMap<String, usize>> = BTreeMap::new();
    for line in text.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let name = rest.trim_start().split('(').next().unwrap();
        if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') && rest.contains('(') {
            *threads.entry(thread).or_default().entry(name.to_owned()).or_default() += 1;
        }
    }
    let busiest = threads.into_values().max_by_key(|calls| calls.values().sum::<usize>()).unwrap();
    assert!(busiest.contains_key("rename") && busiest.contains_key("fsync"), "{busiest:?}");
    busiest
}

/// The node is as before the scene, or as after it: the main CNI's part never changes.
fn check(host: &Host, what: &str) {
    let text = host.text(FILE);
    let list = List::parse(&text).unwrap_or_else(|why| panic!("{what}: {why}: {text}"));
    assert_eq!(remove(&list).unwrap(), FLANNEL, "{what}");
    assert!(list.plugins.iter().filter(|plugin| plugin.is_ours()).count() <= 1, "{what}: {text}");
    // An entry is there only with a plugin that runs.
    if list.has_ours() || host.file("cbr0/90-crosslink.conf").exists() {
        let answer = Command::new(host.installed()).env("CNI_COMMAND", "VERSION").output().unwrap();
        assert!(answer.status.success(), "{what}: {answer:?}");
    }
}

/// The next agent puts everything in order, and uninstall leaves what the main CNI wrote.
fn recovers(host: &Host, what: &str) {
    let agent = host.start(&["--cni-mode", "insert"]);
    agent.await_well();
    agent.stop();
    assert_eq!(host.entries(FILE), Some(1), "{what}");
    let known = ["conf", "bin", "conf/10-flannel.conflist", "bin/crosslink"];
    assert_eq!(host.strangers(&known), Vec::<PathBuf>::new(), "{what}");
    host.uninstall();
    assert_eq!(host.text(FILE), FLANNEL, "{what}");
}

/// Runs cases on as many threads as help.
fn all<C: Clone + Send + Sync>(cases: &[C], run: impl Fn(&C) + Sync) {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(case))) {
                        *failed.lock().unwrap() = Some(panic);
                        next.store(cases.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    if let Some(panic) = failed.into_inner().unwrap() {
        std::panic::resume_unwind(panic);
    }
}

/// Calls that change nothing: a kill after one of them is a kill after the one before.
const LOOKS: [&str; 8] = ["read", "statx", "newfstatat", "fcntl", "close", "getdents64", "readlink", "lseek"];

#[test]
fn a_kill_after_any_system_call_leaves_nothing_half_done() {
    if !agent_install::have("strace") {
        return;
    }
    let mut cases = Vec::new();
    for scene in SCENES {
        for (name, count) in calls(scene).into_iter().filter(|(name, _)| !LOOKS.contains(&name.as_str())) {
            cases.extend((1..=count).map(|number| (scene, name.clone(), number)));
        }
    }
    assert!(cases.len() > 100, "{}", cases.len());
    let killed = AtomicUsize::new(0);
    all(&cases, |(scene, name, number)| {
        let what = format!("killed after {name} {number} of {scene:?}");
        let host = scene.host();
        let reader = Reader::start(&host.conf());
        let mut agent = scene.traced(&host, &["-e".to_owned(), format!("inject={name}:signal=KILL:when={number}")]);
        if !scene.outcome(&mut agent) {
            killed.fetch_add(1, Ordering::Relaxed);
        }
        drop(agent);
        reader.stop();
        check(&host, &what);
        recovers(&host, &what);
    });
    // The last ones of each kind are made by passes that find nothing to do.
    let killed = killed.into_inner();
    assert!(killed * 4 > cases.len() * 3, "{killed} of {} were killed", cases.len());
}

#[test]
fn any_system_call_may_fail_and_is_made_good() {
    if !agent_install::have("strace") {
        return;
    }
    let mut cases = Vec::new();
    for scene in [SCENES[0], SCENES[1], SCENES[2]] {
        for (name, count) in calls(scene).into_iter().filter(|(name, _)| !["close", "fcntl"].contains(&name.as_str())) {
            let errors = ["ENOSPC", "EROFS", "EMFILE"];
            cases.extend((1..=count).map(|number| (scene, name.clone(), number, errors[number % 3])));
        }
    }
    assert!(cases.len() > 100, "{}", cases.len());
    all(&cases, |(scene, name, number, error)| {
        let what = format!("{error} at {name} {number} of {scene:?}");
        let host = scene.host();
        let reader = Reader::start(&host.conf());
        let mut agent = scene.traced(&host, &["-e".to_owned(), format!("inject={name}:error={error}:when={number}")]);
        assert!(scene.outcome(&mut agent), "{what}: {}", agent.log());
        let there = || host.entries(FILE) == Some(1) || host.file("cbr0/90-crosslink.conf").exists();
        eventually(&what, there);
        drop(agent);
        reader.stop();
        check(&host, &what);
        recovers(&host, &what);
    });
}

#[test]
fn calls_that_keep_failing_leave_what_was_there() {
    if !agent_install::have("strace") {
        return;
    }
    let scene = SCENES[0];
    let cases: Vec<(&str, &str)> = ["openat", "write", "fsync", "rename", "fchmod", "copy_file_range"]
        .into_iter()
        .flat_map(|name| ["ENOSPC", "EROFS", "EMFILE"].map(|error| (name, error)))
        .collect();
    all(&cases, |(name, error)| {
        let what = format!("{error} at every {name}");
        let host = scene.host();
        let reader = Reader::start(&host.conf());
        let agent = scene.traced(&host, &["-e".to_owned(), format!("inject={name}:error={error}")]);
        agent.await_log("XL-CNI-");
        let well = |line: &str| line.contains("\"is well\"") && line.contains("\"install\"");
        assert!(!agent.log().lines().any(well), "{what}");
        drop(agent);
        reader.stop();
        assert_eq!(host.text(FILE), FLANNEL, "{what}");
        recovers(&host, &what);
    });
}

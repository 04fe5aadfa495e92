//! Upgrade and rollback of agent and plugin while pods come and go.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test that cannot go on fails")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/crowd.rs"]
mod crowd;
mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use crosslink_testkit::probe::wait_until;
use serde_json::{Value, json};

use crate::{agent::Agent, crowd::Crowd, support::bin};

const PATIENCE: Duration = Duration::from_secs(20);

/// Another build of the plugin, as far as an installer can tell: what follows the last section of an ELF file is not loaded.
fn another_build(dir: &Path) -> PathBuf {
    let path = dir.join("crosslink");
    fs::create_dir_all(dir).unwrap();
    fs::copy(bin(), &path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend_from_slice(b"another build");
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Ends the pods' lives, also where the test fails.
struct End<'d>(&'d AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One pod's life, over and over.
fn live(crowd: &Crowd, place: usize, done: &AtomicBool, lives: &AtomicUsize) {
    while !done.load(Ordering::Relaxed) {
        let add = crowd.call(place, "ADD", json!({}));
        assert!(add.ok(), "{add:?}");
        assert!(crowd.routes(place).contains("172.111.0.0/16"));
        let del = crowd.call(place, "DEL", json!({}));
        assert!(del.ok(), "{del:?}");
        assert_eq!(crowd.routes(place), BTreeSet::new());
        lives.fetch_add(1, Ordering::Relaxed);
    }
}

/// A node whose main CNI has a list, and whose pods call what the agent installs.
struct Rollout {
    crowd: Crowd,
    conf: PathBuf,
}

impl Rollout {
    fn new(pods: usize) -> Self {
        let mut crowd = Crowd::new(pods);
        crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
        let conf = crowd.site.dir.join("net.d");
        let bins = crowd.site.dir.join("bin");
        for dir in [&conf, &bins] {
            fs::create_dir_all(dir).unwrap();
        }
        let plugins = json!([{ "type": "ptp", "ipam": { "type": "host-local" } }]);
        let list = json!({ "cniVersion": "1.0.0", "name": "pods", "plugins": plugins });
        fs::write(conf.join("10-ptp.conflist"), list.to_string()).unwrap();
        crowd.plugin = bins.join("crosslink");
        Self { crowd, conf }
    }

    /// Starts an agent that installs a plugin.
    fn start(&self, plugin: &Path) -> Agent {
        let flags = [
            "--cni-mode=insert".to_owned(),
            format!("--cni-conf-dir={}", self.conf.display()),
            format!("--cni-bin-dir={}", self.crowd.plugin.parent().unwrap().display()),
            format!("--plugin={}", plugin.display()),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Agent::start(self.crowd.node.path(), &self.crowd.site, &flags)
    }

    /// Waits until it is installed.
    fn installed(&self, plugin: &Path) {
        let wanted = fs::read(plugin).unwrap();
        let same = || fs::read(&self.crowd.plugin).is_ok_and(|bytes| bytes == wanted);
        wait_until("the plugin of the agent is installed", PATIENCE, same);
    }
}

#[test]
fn upgrade_and_rollback_fail_no_pod_and_leave_no_orphan() {
    const WORKERS: usize = 3;
    let rollout = Rollout::new(WORKERS + 1);
    let crowd = &rollout.crowd;
    let (old, new) = (bin(), another_build(&crowd.site.dir.join("new")));
    let mut agent = rollout.start(&old);
    rollout.installed(&old);
    assert!(crowd.call(WORKERS, "ADD", json!({})).ok());
    let (done, lives) = (AtomicBool::new(false), AtomicUsize::new(0));
    let ends: Vec<_> = std::thread::scope(|scope| {
        let (done, lives) = (&done, &lives);
        let workers: Vec<_> = (0..WORKERS).map(|place| scope.spawn(move || live(crowd, place, done, lives))).collect();
        let end = End(done);
        for (turn, plugin) in [&new, &old, &new, &old].into_iter().enumerate() {
            let before = lives.load(Ordering::Relaxed);
            // A rollout stops the old agent first; every other time both run for a while.
            if turn % 2 == 0 {
                assert!(agent.stop().success());
                agent = rollout.start(plugin);
            } else {
                let next = rollout.start(plugin);
                rollout.installed(plugin);
                assert!(std::mem::replace(&mut agent, next).stop().success());
            }
            rollout.installed(plugin);
            crowd.site.cluster("cluster-c", &[&format!("10.{turn}.0.0/16")], &[]);
            wait_until("pods came and went", PATIENCE, || lives.load(Ordering::Relaxed) > before + WORKERS);
        }
        drop(end);
        workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    ends.into_iter().for_each(|end| end.unwrap());
    let expected: BTreeSet<String> = ["10.3.0.0/16", "172.111.0.0/16"].map(str::to_owned).into();
    wait_until("the pod that stayed has followed", PATIENCE, || crowd.routes(WORKERS) == expected);
    assert!(crowd.call(WORKERS, "DEL", json!({})).ok());
    assert_eq!(crowd.site.records(), Vec::<Value>::new());
    let text = fs::read_to_string(rollout.conf.join("10-ptp.conflist")).unwrap();
    assert_eq!(text.matches("\"crosslink\"").count(), 1, "{text}");
}

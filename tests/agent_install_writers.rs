//! The installer of the built agent beside writers of every kind: main CNIs, agents like itself, and itself.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "support/agent_install.rs"]
mod agent_install;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use agent_install::{Agent, FLANNEL, Host, STYLES, eventually};
use crosslink_core::conflist::{List, remove};
use crosslink_testkit::Runner;
use serde_json::{Value, json};

fn without(text: &str) -> String {
    remove(&List::parse(text).unwrap()).unwrap()
}

#[test]
fn every_style_of_writing_is_survived_to_the_byte() {
    for style in STYLES {
        let host = Host::new();
        let name = "10-calico.conflist";
        host.put(name, FLANNEL);
        let agent = host.start(&[]);
        agent.await_well();
        // What a new version of the main CNI would write.
        let other = FLANNEL.replace("1e3", "12345678901234567890").replace("cbr0", "k8s-pod-network");
        for text in [FLANNEL, &other] {
            // Its own writes make the agent look once more; this one must be seen for itself.
            std::thread::sleep(Duration::from_millis(400));
            style.write(&host.file(name), text);
            host.await_entry(name);
            assert_eq!(without(&host.text(name)), text, "{style:?}");
        }
        agent.await_log("Calico (by the file's name) had undone");
        assert!(!agent.log().contains("XL-CNI-C"), "{style:?}: no fault, no conflict: {}", agent.log());
        let known = ["conf", "conf/10-calico.conflist", "bin", "bin/crosslink"];
        assert_eq!(host.strangers(&known), Vec::<PathBuf>::new(), "{style:?}");
    }
}

#[test]
fn nothing_is_written_while_a_file_is_half_there() {
    let host = Host::new();
    let name = "10-calico.conflist";
    host.put(name, FLANNEL);
    let agent = host.start(&[]);
    agent.await_well();
    let half = &FLANNEL[..FLANNEL.len() / 2];
    let path = host.file(name);
    fs::write(&path, half).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    agent.await_log("XL-CNI-CONFIG");
    assert_eq!((host.text(name).as_str(), fs::metadata(&path).unwrap().ino()), (half, inode));
    fs::write(&path, FLANNEL).unwrap();
    host.await_entry(name);
    assert_eq!(without(&host.text(name)), FLANNEL);
}

/// Another agent: rewrites a file as it thinks right, as often as that is needed.
struct Rival {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Rival {
    fn start(path: &Path, mut wish: impl FnMut(Value) -> Value + Send + 'static) -> Self {
        let (stop, writes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, count, path) = (stop.clone(), writes.clone(), path.to_owned());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let text = fs::read_to_string(&path).unwrap_or_default();
                if let Ok(now) = serde_json::from_str::<Value>(&text) {
                    let wanted = wish(now.clone());
                    if wanted != now {
                        let temporary = path.with_extension("rival");
                        fs::write(&temporary, wanted.to_string()).unwrap();
                        fs::rename(temporary, &path).unwrap();
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop, writes, thread: Some(thread) }
    }

    fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Waits until nobody has written a file for a second.
#[track_caller]
fn await_peace(path: &Path) {
    let stamp = || fs::metadata(path).map(|meta| (meta.ino(), meta.mtime_nsec())).ok();
    let (mut last, mut since) = (stamp(), Instant::now());
    eventually("a quiet second", || {
        let now = stamp();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(1)
    });
}

/// How often the agent found its entry undone.
fn undone(agent: &Agent) -> usize {
    agent.log().matches("had undone").count()
}

fn move_plugin(mut list: Value, kind: &str, place: impl Fn(&[Value]) -> usize) -> Value {
    let plugins = list["plugins"].as_array_mut().unwrap();
    plugins.retain(|plugin| plugin["type"] != kind);
    let place = place(plugins);
    plugins.insert(place, json!({ "type": kind }));
    list
}

#[test]
fn an_agent_that_insists_on_being_last_gets_its_way() {
    let host = Host::new();
    host.put("10-flannel.conflist", FLANNEL);
    let path = host.file("10-flannel.conflist");
    let rival = Rival::start(&path, |list| move_plugin(list, "last-cni", <[Value]>::len));
    let agent = host.start(&[]);
    agent.await_well();
    await_peace(&path);
    let mut kinds = host.kinds("10-flannel.conflist");
    assert_eq!(kinds.pop().unwrap(), "last-cni");
    assert!(kinds.contains(&"crosslink".to_owned()), "{kinds:?}");
    assert!(rival.writes() <= 3 && undone(&agent) <= 1, "{} writes, {} losses", rival.writes(), undone(&agent));
    rival.stop();
}

#[test]
fn an_agent_that_insists_on_being_before_us_gets_its_way() {
    let host = Host::new();
    host.put("10-flannel.conflist", FLANNEL);
    let path = host.file("10-flannel.conflist");
    let before =
        |plugins: &[Value]| plugins.iter().position(|plugin| plugin["type"] == "crosslink").unwrap_or(plugins.len());
    let rival = Rival::start(&path, move |list| move_plugin(list, "before-cni", before));
    let agent = host.start(&[]);
    agent.await_well();
    await_peace(&path);
    let kinds = host.kinds("10-flannel.conflist");
    assert_eq!(kinds[2..], ["before-cni", "crosslink"], "{kinds:?}");
    assert!(rival.writes() <= 3 && undone(&agent) <= 1, "{} writes, {} losses", rival.writes(), undone(&agent));
    rival.stop();
}

#[test]
fn a_writer_that_removes_us_is_named_and_not_fought_without_end() {
    let host = Host::new();
    let name = "05-cilium.conflist";
    host.put(name, FLANNEL);
    host.put("10-kindnet.conflist.cilium_bak", FLANNEL);
    let agent = host.start(&[]);
    agent.await_well();
    let rival = Rival::start(&host.file(name), |mut list| {
        list["plugins"].as_array_mut().unwrap().retain(|plugin| plugin["type"] != "crosslink");
        list
    });
    agent.await_log("CNIConfigConflict");
    agent.await_log("XL-CNI-CONFLICT");
    let log = agent.log();
    for part in
        [name, "Cilium (by the file's name)", "10-kindnet.conflist.cilium_bak was renamed", "cni.exclusive=false"]
    {
        assert!(log.contains(part), "{part}: {log}");
    }
    // By then four repairs were undone; each further one waits twice as long.
    let (writes, since) = (rival.writes(), Instant::now());
    eventually("two more", || rival.writes() >= writes + 2);
    assert!(since.elapsed() > Duration::from_secs(1), "{:?}", since.elapsed());
    rival.stop();
    host.await_entry(name);
}

#[test]
fn two_agents_of_one_version_agree() {
    let host = Host::new();
    let name = "10-flannel.conflist";
    host.put(name, FLANNEL);
    let agents = [host.start(&[]), host.start(&[])];
    agents.iter().for_each(Agent::await_well);
    for round in 0..3 {
        host.put(name, &FLANNEL.replace("cbr0", &format!("net{round}")));
        host.await_entry(name);
        fs::remove_file(host.installed()).unwrap();
        eventually("the plugin is back", || host.installed().exists());
    }
    await_peace(&host.file(name));
    assert_eq!(host.entries(name), Some(1));
    for agent in agents {
        assert!(!agent.log().contains("XL-CNI"), "{}", agent.log());
    }
}

#[test]
fn of_two_agents_the_one_that_started_later_decides() {
    let host = Host::new();
    let name = "10-flannel.conflist";
    host.put(name, FLANNEL);
    let old = host.start(&["--cni-entry", r#"{"vethMTU":1300}"#]);
    old.await_well();
    let new = host.start(&["--cni-entry", r#"{"vethMTU":1400}"#]);
    new.await_well();
    await_peace(&host.file(name));
    assert!(host.text(name).contains("1400"));
    assert_eq!((undone(&old), undone(&new)), (0, 0), "no fight");
    // While both run, the main CNI writes: whoever comes first puts an entry in, and it ends as the new one wants it.
    host.put(name, FLANNEL);
    eventually("the new one's entry", || host.text(name).contains("1400"));
    await_peace(&host.file(name));
    assert_eq!(host.entries(name), Some(1));
    assert!(host.text(name).contains("1400"));
    // Without the new one the old one still replaces what is missing.
    new.stop();
    host.put(name, FLANNEL);
    host.await_entry(name);
    drop(old);
}

/// Calls the installed plugin over and over, as a runtime does while pods come and go.
fn call_until(stop: &Arc<AtomicBool>, plugin: PathBuf) -> JoinHandle<(u64, Vec<String>)> {
    let stop = stop.clone();
    std::thread::spawn(move || {
        let (mut calls, mut faults) = (0, Vec::new());
        while !stop.load(Ordering::Relaxed) {
            match std::process::Command::new(&plugin).env("CNI_COMMAND", "VERSION").output() {
                Ok(output) if output.status.success() => calls += 1,
                other => faults.push(format!("{other:?}")),
            }
        }
        (calls, faults)
    })
}

#[test]
fn upgrade_and_rollback_are_never_noticed_by_a_runtime() {
    let mut host = Host::new();
    let name = "10-flannel.conflist";
    host.put(name, FLANNEL);
    // Another build of the plugin: what follows the last section of a program does not matter to it.
    let other = host.root().join("other-build");
    let mut bytes = fs::read(&host.plugin).unwrap();
    bytes.push(0);
    fs::write(&other, &bytes).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).unwrap();
    let builds = [(host.plugin.clone(), "1300"), (other, "1400")];
    let mut running = host.start(&["--cni-entry", r#"{"vethMTU":1300}"#]);
    running.await_well();
    let stop = Arc::default();
    let reader = agent_install::Reader::start(&host.conf());
    let caller = call_until(&stop, host.installed());
    for (plugin, mtu) in builds.iter().cycle().skip(1).take(4) {
        host.plugin.clone_from(plugin);
        let next = host.start(&["--cni-entry", &format!("{{\"vethMTU\":{mtu}}}")]);
        next.await_well();
        assert!(host.text(name).contains(mtu));
        assert_eq!(fs::metadata(host.installed()).unwrap().len(), fs::metadata(plugin).unwrap().len());
        // The old one ends later, as a pod with a grace period does, and touches nothing.
        let before = host.moment();
        running.stop();
        assert_eq!(host.moment(), before);
        running = next;
    }
    stop.store(true, Ordering::Relaxed);
    let (calls, faults) = caller.join().unwrap();
    assert!(calls > 0 && faults.is_empty(), "{calls} calls, {} faults: {:?}", faults.len(), faults.first());
    reader.stop();
    assert_eq!(host.entries(name), Some(1));
}

/// Plain lists of every fixture: ours taken out, as the main CNI would have written them.
fn fixtures() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conflist");
    let mut files: Vec<PathBuf> = ["", "valid", "invalid"]
        .iter()
        .flat_map(|dir| fs::read_dir(root.join(dir)).unwrap().map(|entry| entry.unwrap().path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "conflist"))
        .collect();
    files.sort();
    let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// Lets an agent meet fixtures one after the other, each as a new first file.
fn meet(fixtures: &[(String, String)]) -> (usize, usize) {
    let host = Host::new();
    let agent = host.start(&[]);
    let (mut edited, mut refused) = (0, 0);
    let mut previous: Option<(String, String)> = None;
    for (index, (name, text)) in fixtures.iter().enumerate() {
        let file = format!("{:03}-{name}.conflist", 900 - index);
        let others = List::parse(text).ok().filter(|list| list.plugins.iter().any(|plugin| !plugin.is_ours()));
        let Some(list) = others else {
            // Runtimes refuse it too, or there is no main CNI in it: nothing is to be touched.
            host.put(&file, text);
            agent.await_log(&file);
            assert_eq!(host.text(&file), *text);
            fs::remove_file(host.file(&file)).unwrap();
            refused += 1;
            continue;
        };
        let plain = remove(&list).unwrap();
        host.put(&file, &plain);
        host.await_entry(&file);
        let now = host.text(&file);
        assert_eq!(without(&now), plain, "{name}");
        let value: Value = serde_json::from_str(&now).unwrap();
        Runner::new(value, Vec::new(), host.root().join("cache"));
        agent_install::load(&host.conf()).unwrap();
        if let Some((file, plain)) = previous.replace((file.clone(), plain)) {
            eventually(&format!("{file} is as it was"), || host.text(&file) == plain);
        }
        edited += 1;
    }
    (edited, refused)
}

#[test]
fn every_fixture_gets_an_entry_and_loses_it_to_the_byte() {
    let fixtures = fixtures();
    assert!(fixtures.len() > 150, "{}", fixtures.len());
    let workers: Vec<_> = fixtures
        .chunks(fixtures.len() / 4 + 1)
        .map(|part| {
            let part = part.to_vec();
            std::thread::spawn(move || meet(&part))
        })
        .collect();
    let counts: Vec<(usize, usize)> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
    let (edited, refused) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    assert_eq!(edited + refused, fixtures.len());
    assert!(refused <= 12, "{refused} fixtures are no lists");
}

#[test]
fn without_inotify_the_directory_is_read_every_few_seconds() {
    if !agent_install::have("strace") {
        return;
    }
    let host = Host::new();
    let name = "10-flannel.conflist";
    host.put(name, FLANNEL);
    for fault in ["inotify_init1:error=EMFILE", "inotify_add_watch:error=ENOSPC"] {
        let command = host.traced(&["-e", &format!("inject={fault}")], "run", &[]);
        let agent = Agent::start(command, &host.root().join("logs"));
        agent.await_well();
        agent.await_log("XL-CNI-WATCH");
        host.put(name, FLANNEL);
        host.await_entry(name);
    }
}

//! What the tests of the installer share: a node's directories, the built agent at work in them, a reader that loads the
//! configuration as go-cni does, and writers of every kind.
#![allow(
    dead_code,
    clippy::print_stderr,
    clippy::allow_attributes,
    reason = "every test binary uses another part of this module"
)]

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long anything may take that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A list as flannel writes it, without crosslink.
pub const FLANNEL: &str = r#"{
  "name": "cbr0",
  "cniVersion": "1.0.0",
  "plugins": [
    { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true }, "x": [1.0, 1e3] },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
"#;

/// The built agent.
pub fn agent() -> PathBuf {
    env!("CARGO_BIN_EXE_crosslink-agent").into()
}

/// The built plugin, which cargo puts beside it.
pub fn plugin() -> PathBuf {
    let path = agent().with_file_name("crosslink");
    assert!(path.exists(), "{} is missing: cargo build -p crosslink", path.display());
    path
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// One node's directories.
#[derive(Debug)]
pub struct Host {
    root: tempfile::TempDir,
    /// What the agent installs.
    pub plugin: PathBuf,
}

impl Host {
    /// Empty ones.
    pub fn new() -> Self {
        let host = Self { root: tempfile::tempdir().unwrap(), plugin: plugin() };
        for dir in [host.conf(), host.bin()] {
            fs::create_dir(dir).unwrap();
        }
        host
    }

    /// All of it.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Conflists.
    pub fn conf(&self) -> PathBuf {
        self.root().join("conf")
    }

    /// Plugins.
    pub fn bin(&self) -> PathBuf {
        self.root().join("bin")
    }

    /// What survives a reboot.
    pub fn lib(&self) -> PathBuf {
        self.root().join("lib")
    }

    /// The installed plugin.
    pub fn installed(&self) -> PathBuf {
        self.bin().join("crosslink")
    }

    /// A file of the directory of conflists.
    pub fn file(&self, name: &str) -> PathBuf {
        self.conf().join(name)
    }

    /// Its text; empty where it is missing.
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_default()
    }

    /// Writes a file as a whole.
    pub fn put(&self, name: &str, text: &str) {
        fs::create_dir_all(self.file(name).parent().unwrap()).unwrap();
        fs::write(self.file(name), text).unwrap();
    }

    /// How often crosslink is in a list; none where it does not parse.
    pub fn entries(&self, name: &str) -> Option<usize> {
        let value: Value = serde_json::from_str(&self.text(name)).ok()?;
        Some(value["plugins"].as_array()?.iter().filter(|plugin| plugin["type"] == "crosslink").count())
    }

    /// Types of a list's plugins.
    pub fn kinds(&self, name: &str) -> Vec<String> {
        let value: Value = serde_json::from_str(&self.text(name)).unwrap_or_default();
        let plugins = value["plugins"].as_array().cloned().unwrap_or_default();
        plugins.iter().map(|plugin| plugin["type"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits until the entry is in a list.
    #[track_caller]
    pub fn await_entry(&self, name: &str) {
        eventually(&format!("one entry in {name}: {}", self.text(name)), || self.entries(name) == Some(1));
    }

    /// The agent's command line.
    pub fn command(&self, verb: &str, more: &[&str]) -> Command {
        let mut command = Command::new(agent());
        command.args([verb, "--kubeconfig", "none", "--sources", "static", "--resync", "off", "--notrack", "off"]);
        command.args(["--preserve-source", "off", "--http-address", "127.0.0.1:0", "--log-format", "json"]);
        command.arg("--plugin").arg(&self.plugin);
        for (flag, dir) in [
            ("--cni-conf-dir", self.conf()),
            ("--cni-bin-dir", self.bin()),
            ("--lib-dir", self.lib()),
            ("--run-dir", self.root().join("run")),
        ] {
            command.arg(flag).arg(dir);
        }
        command.args(more);
        command
    }

    /// Starts the agent.
    pub fn start(&self, more: &[&str]) -> Agent {
        Agent::start(self.command("run", more), &self.root().join("logs"))
    }

    /// Takes everything out.
    #[track_caller]
    pub fn uninstall(&self) {
        let output = self.command("uninstall", &[]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Everything below some directories that a write would change: inode, times, size, mode.
    pub fn moment(&self) -> BTreeMap<PathBuf, Vec<i64>> {
        let mut moment = BTreeMap::new();
        for dir in [self.conf(), self.bin(), self.lib()] {
            collect(&dir, &mut moment);
        }
        moment
    }

    /// Names in the directory of conflists and below it that are not in `known`.
    pub fn strangers(&self, known: &[&str]) -> Vec<PathBuf> {
        let mut moment = BTreeMap::new();
        collect(&self.conf(), &mut moment);
        collect(&self.bin(), &mut moment);
        let names = moment.into_keys().map(|path| path.strip_prefix(self.root()).unwrap().to_owned());
        names.filter(|name| !known.iter().any(|known| name == Path::new(known))).collect()
    }
}

fn collect(dir: &Path, moment: &mut BTreeMap<PathBuf, Vec<i64>>) {
    let Ok(meta) = fs::symlink_metadata(dir) else { return };
    let stamp = vec![
        meta.ino().cast_signed(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
        meta.size().cast_signed(),
        i64::from(meta.mode()),
    ];
    moment.insert(dir.to_owned(), stamp);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        collect(&entry.path(), moment);
    }
}

/// A running agent; it ends with the value.
#[derive(Debug)]
pub struct Agent {
    /// The process.
    pub child: Child,
    log: PathBuf,
}

impl Agent {
    /// Starts it with its log in a file of its own.
    pub fn start(mut command: Command, logs: &Path) -> Self {
        fs::create_dir_all(logs).unwrap();
        let log = logs.join(format!("{}.log", fs::read_dir(logs).unwrap().count()));
        let child = command.stderr(fs::File::create(&log).unwrap()).stdout(Stdio::null()).spawn().unwrap();
        Self { child, log }
    }

    /// The log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for words in the log.
    #[track_caller]
    pub fn await_log(&self, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(words) {
            assert!(Instant::now() < deadline, "no {words:?} in the log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the installer is well.
    #[track_caller]
    pub fn await_well(&self) {
        self.await_log("\"message\":\"is well\",\"part\":\"install\"");
    }

    /// Ends it as Kubernetes does.
    #[track_caller]
    pub fn stop(mut self) -> String {
        let sent = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(sent.success(), "{}", self.log());
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
        self.log()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the agent's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// Loads a directory as go-cni does (`max_conf_num` 1, libcni 1.3): the first file by name, all of it or an error.
///
/// # Errors
/// In words.
pub fn load(dir: &Path) -> Result<Value, String> {
    let entries = fs::read_dir(dir).map_err(|err| err.to_string())?;
    let names = entries
        .flatten()
        .filter(|entry| !entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok());
    let loaded = [".conf", ".conflist", ".json"];
    let first = names.filter(|name| loaded.iter().any(|extension| name.ends_with(extension))).min();
    let name = first.ok_or("no file")?;
    let text = fs::read_to_string(dir.join(&name)).map_err(|err| format!("{name}: {err}"))?;
    let mut value: Value = serde_json::from_str(&text).map_err(|err| format!("{name}: {err} in {text:?}"))?;
    if !name.ends_with(".conflist") {
        value = serde_json::json!({ "name": value["name"], "plugins": [value] });
    }
    let network = value["name"].as_str().ok_or(format!("{name}: no name"))?.to_owned();
    let plugins =
        value["plugins"].as_array_mut().filter(|plugins| !plugins.is_empty()).ok_or(format!("{name}: no plugins"))?;
    let mut dropins: Vec<PathBuf> =
        fs::read_dir(dir.join(network)).into_iter().flatten().flatten().map(|e| e.path()).collect();
    dropins.sort();
    for path in dropins.iter().filter(|path| path.extension().is_some_and(|extension| extension == "conf")) {
        // Removed since it was listed: libcni reports that, and is called again by the next event.
        let Ok(text) = fs::read_to_string(path) else { continue };
        plugins.push(serde_json::from_str(&text).map_err(|err| format!("{}: {err} in {text:?}", path.display()))?);
    }
    match plugins.iter().find(|plugin| plugin["type"].as_str().is_none_or(str::is_empty)) {
        Some(plugin) => Err(format!("{name}: {plugin} has no type")),
        None => Ok(value),
    }
}

/// Loads a directory over and over, and remembers what it could not load.
#[derive(Debug)]
pub struct Reader {
    stop: Arc<AtomicBool>,
    loads: Arc<AtomicU64>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl Reader {
    /// Starts.
    pub fn start(dir: &Path) -> Self {
        let (stop, loads) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, count, dir) = (stop.clone(), loads.clone(), dir.to_owned());
        let thread = std::thread::spawn(move || {
            let mut faults = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                // Not all of a core: the agent needs one too.
                std::thread::sleep(Duration::from_micros(300));
                match load(&dir) {
                    Ok(_) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Err(why) => faults.push(why),
                }
            }
            faults
        });
        Self { stop, loads, thread: Some(thread) }
    }

    /// Ends; everything could be loaded, and was at least once.
    #[track_caller]
    pub fn stop(mut self) {
        eventually("one load", || {
            self.loads.load(Ordering::Relaxed) > 0 || self.thread.as_ref().unwrap().is_finished()
        });
        self.stop.store(true, Ordering::Relaxed);
        let faults = self.thread.take().unwrap().join().unwrap();
        assert!(faults.is_empty(), "{} loads failed, the first: {}", faults.len(), faults[0]);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// How main CNIs write their conflist.
#[derive(Clone, Copy, Debug)]
pub enum Style {
    /// Truncate, then write in small pieces with pauses (Calico).
    TruncateSlowly,
    /// Temporary file in the same directory, rename (kindnet, AWS).
    Rename,
    /// Delete, then create (netd).
    DeleteCreate,
    /// Copy beside it under another name, then move (flannel of old, GKE).
    CopyMove,
    /// A file made elsewhere moved into place: only `MOVED_TO` is seen.
    MoveIn,
}

/// All of them.
pub const STYLES: [Style; 5] =
    [Style::TruncateSlowly, Style::Rename, Style::DeleteCreate, Style::CopyMove, Style::MoveIn];

impl Style {
    /// Writes a file in this style.
    pub fn write(self, path: &Path, text: &str) {
        let pieces = || text.as_bytes().chunks(text.len() / 6 + 1);
        match self {
            Self::TruncateSlowly => {
                let mut file = fs::File::create(path).unwrap();
                for piece in pieces() {
                    // Longer than the agent waits for quiet: it must see every half of the file.
                    std::thread::sleep(Duration::from_millis(130));
                    file.write_all(piece).unwrap();
                }
            }
            Self::Rename => {
                let temporary = path.with_extension("conflist.temp");
                fs::write(&temporary, text).unwrap();
                fs::rename(temporary, path).unwrap();
            }
            Self::DeleteCreate => {
                fs::remove_file(path).unwrap();
                std::thread::sleep(Duration::from_millis(130));
                fs::write(path, text).unwrap();
            }
            Self::CopyMove => {
                let source = path.parent().unwrap().join("../source.conflist");
                fs::write(&source, text).unwrap();
                let temporary = path.with_extension("tmp-copy");
                fs::copy(&source, &temporary).unwrap();
                fs::rename(temporary, path).unwrap();
            }
            Self::MoveIn => {
                let source = path.parent().unwrap().join("../moved.conflist");
                fs::write(&source, text).unwrap();
                fs::rename(source, path).unwrap();
            }
        }
    }
}

/// Whether a tool is there. In CI it must be, unless `CROSSLINK_TEST_KNOWN_MISSING` names it.
///
/// # Panics
/// In CI, where it is missing and not known to be.
pub fn have(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()) {
        return true;
    }
    let known = std::env::var("CROSSLINK_TEST_KNOWN_MISSING").unwrap_or_default();
    let is_known = known.split(',').any(|name| name.trim() == tool);
    assert!(
        std::env::var_os("CI").is_none() || is_known,
        "this machine has no {tool}; a test that needs it must not be skipped in CI"
    );
    eprintln!("skipped: this machine has no {tool}");
    false
}

impl Host {
    /// The agent's command line under strace.
    pub fn traced(&self, options: &[&str], verb: &str, more: &[&str]) -> Command {
        let agent = self.command(verb, more);
        let mut command = Command::new("strace");
        // As a grandchild, so that the process that is started and ended is the agent.
        command.args(["-D", "-f", "-qqq", "-o", "/dev/null"]).args(options);
        command.arg(agent.get_program()).args(agent.get_args());
        command
    }
}

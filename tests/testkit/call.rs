//! One call of one CNI plugin.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::netns::in_netns;
use crate::probe::wait_until;

/// How long a plugin may take before it is killed.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Where CNI plugins are on this machine: `CNI_PATH` if set, else the directories that distributions use.
pub fn cni_path() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("CNI_PATH").filter(|path| !path.is_empty()) {
        return std::env::split_paths(&path).collect();
    }
    ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"].map(PathBuf::from).into_iter().filter(|p| p.is_dir()).collect()
}

/// The first file called `plugin` in `dirs`.
pub fn find(plugin: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join(plugin)).find(|file| file.is_file())
}

/// A call of a plugin, every input of which the test decides.
///
/// The six `CNI_*` variables are always present, empty where the fields are, as libcni does it; the rest of the
/// environment is inherited. `env` comes last: a value sets a variable, `None` removes it.
#[derive(Clone, Debug, Default)]
pub struct Call {
    /// The plugin's file.
    pub bin: PathBuf,
    /// CNI_COMMAND.
    pub command: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_NETNS.
    pub netns: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_ARGS.
    pub args: String,
    /// CNI_PATH.
    pub path: OsString,
    /// The network configuration.
    pub stdin: Vec<u8>,
    /// The namespace to run in, which is the node; the test's own if `None`.
    pub node: Option<PathBuf>,
    /// Changes to the environment.
    pub env: BTreeMap<String, Option<String>>,
    /// A file to use as stdout, such as `/dev/full`; a pipe that [`Reply::stdout`] is read from if `None`.
    pub stdout: Option<PathBuf>,
}

/// What a plugin answered.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The exit status; `None` if a signal ended it, also the one sent after [`TIMEOUT`].
    pub exit: Option<i32>,
    /// All of stdout.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
    /// From just before the start to just after the end of the process.
    pub elapsed: Duration,
}

impl Reply {
    /// Whether the exit status is 0.
    pub fn ok(&self) -> bool {
        self.exit == Some(0)
    }

    /// Stdout, which must be exactly one JSON value.
    ///
    /// # Panics
    /// When it is not.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("stdout is no JSON: {error}: {self:?}"))
    }

    /// `code` of the CNI error object on stdout.
    ///
    /// # Panics
    /// When stdout is not JSON with a numeric code.
    pub fn code(&self) -> u64 {
        self.json()["code"].as_u64().unwrap_or_else(|| panic!("no error code: {self:?}"))
    }
}

impl Call {
    /// A call of `bin` with `command` and `stdin`; the other fields are empty.
    pub fn new(bin: impl Into<PathBuf>, command: &str, stdin: &Value) -> Self {
        let stdin = stdin.to_string().into_bytes();
        Self { bin: bin.into(), command: command.to_owned(), stdin, ..Self::default() }
    }

    /// Runs the plugin to its end, or kills it after [`TIMEOUT`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self) -> io::Result<Reply> {
        match &self.node {
            Some(node) => in_netns(node, || self.run_here()),
            None => self.run_here(),
        }
    }

    fn run_here(&self) -> io::Result<Reply> {
        let mut command = self.prepare()?;
        let (mut child, started) = spawn(&mut command)?;
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let input = self.stdin.clone();
        // A plugin that does not read its stdin is not the test kit's error.
        let writer = thread::spawn(move || drop(stdin.write_all(&input)));
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        let exit = wait(&mut child, started);
        let elapsed = started.elapsed();
        let _ignored = writer.join();
        Ok(Reply { exit, stdout: text(stdout, started), stderr: text(stderr, started), elapsed })
    }

    fn prepare(&self) -> io::Result<Command> {
        let mut command = Command::new(&self.bin);
        command
            .env("CNI_COMMAND", &self.command)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", &self.ifname)
            .env("CNI_ARGS", &self.args)
            .env("CNI_PATH", &self.path)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        match &self.stdout {
            Some(file) => command.stdout(OpenOptions::new().append(true).create(true).open(file)?),
            None => command.stdout(Stdio::piped()),
        };
        for (key, value) in &self.env {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Ok(command)
    }
}

/// Starts a plugin, again while its file is open for writing, as libcni does. A test that writes a script can meet this
/// too: until another thread's fork reaches exec, the child holds a copy of the descriptor.
fn spawn(command: &mut Command) -> io::Result<(Child, Instant)> {
    let mut result = None;
    wait_until("the plugin's file is not busy", Duration::from_secs(6), || {
        let started = Instant::now();
        let spawned = command.spawn();
        let busy = spawned.as_ref().is_err_and(|error| error.kind() == ErrorKind::ExecutableFileBusy);
        result = Some(spawned.map(|child| (child, started)));
        !busy
    });
    result.expect("tried at least once")
}

fn wait(child: &mut Child, started: Instant) -> Option<i32> {
    let mut exit = None;
    while exit.is_none() {
        exit = child.try_wait().expect("wait for the plugin");
        if started.elapsed() > TIMEOUT {
            let _ignored = child.kill();
            exit = Some(child.wait().expect("wait for the plugin"));
        }
        if exit.is_none() {
            thread::sleep(Duration::from_micros(100));
        }
    }
    exit.and_then(|status| status.code())
}

/// Reads a pipe on its own thread, so that a full pipe stops no one.
fn collect(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ignored = pipe.read_to_end(&mut bytes);
        let _ignored = sender.send(bytes);
    });
    receiver
}

/// What [`collect`] read. A process that the plugin left behind may hold the pipe; it is not waited for beyond the
/// plugin's own time.
fn text(pipe: Option<Receiver<Vec<u8>>>, started: Instant) -> String {
    let Some(pipe) = pipe else { return String::new() };
    let left = TIMEOUT.saturating_sub(started.elapsed()).max(Duration::from_millis(100));
    let bytes = pipe.recv_timeout(left).expect("a process left by the plugin holds its stdout or stderr");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Joins directories into a CNI_PATH.
///
/// # Panics
/// When a directory's name has a colon.
pub fn join_path(dirs: &[impl AsRef<Path>]) -> OsString {
    std::env::join_paths(dirs.iter().map(AsRef::as_ref)).expect("no colon in a plugin directory")
}

//! The built agent as a process, asked over its sockets.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]
#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use crosslink_testkit::{in_netns, probe::wait_until};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// How long anything here may take.
pub const LONG: Duration = Duration::from_secs(30);

static NEXT_PORT: AtomicU16 = AtomicU16::new(18000);

/// Files of one node, and how its agent is started.
#[derive(Debug)]
pub struct Site {
    dir: tempfile::TempDir,
    port: u16,
    netns: Option<PathBuf>,
    args: Vec<String>,
}

/// A running agent; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: PathBuf,
}

impl Site {
    /// A node whose agent does nothing but what these tests are about.
    pub fn new(kubeconfig: &str, more: &[&str]) -> Self {
        let mut args: Vec<String> = ["run", "--cni-mode", "none", "--resync", "off", "--notrack", "off"]
            .into_iter()
            .chain(["--preserve-source", "off", "--sources", "static", "--log-level", "info,crosslink_agent=debug"])
            .chain(["--node-name", "node-a"])
            .map(str::to_owned)
            .collect();
        args.extend(["--kubeconfig".to_owned(), kubeconfig.to_owned()]);
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        Self { dir: tempfile::tempdir().unwrap(), port, netns: None, args }
    }

    /// Where the agent runs.
    pub fn in_netns(mut self, netns: &Path) -> Self {
        self.netns = Some(netns.to_owned());
        self
    }

    /// `libDir`.
    pub fn lib(&self) -> PathBuf {
        self.dir.path().join("lib")
    }

    /// `runDir`.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The unix socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("agent.sock")
    }

    /// `node.json`.
    pub fn node_file(&self) -> PathBuf {
        self.lib().join("node.json")
    }

    /// `node.json` as JSON; null where there is none.
    pub fn node(&self) -> Value {
        fs::read_to_string(self.node_file()).map_or(Value::Null, |text| serde_json::from_str(&text).unwrap())
    }

    /// Writes `node.json` by hand.
    pub fn write_node(&self, text: &str) {
        fs::create_dir_all(self.lib()).unwrap();
        write(&self.node_file(), text);
    }

    /// Writes a remotes file of one cluster.
    pub fn remotes(&self, name: &str, cidrs: &[&str]) {
        let dir = self.lib().join("remotes");
        fs::create_dir_all(&dir).unwrap();
        let clusters = serde_json::json!([{"name": name, "podCIDRs": cidrs}]);
        let text = serde_json::json!({"version": 1, "source": "static", "clusters": clusters});
        write(&dir.join(format!("{name}.json")), &text.to_string());
    }

    /// The TCP address.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Another port, as of another agent on another node.
    pub fn next_port(&mut self) {
        self.port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
    }

    /// Starts the agent.
    pub fn start(&self) -> Agent {
        let log = self.dir.path().join(format!("agent-{}.log", NEXT_PORT.fetch_add(1, Ordering::Relaxed)));
        let spawn = || {
            Command::new(env!("CARGO_BIN_EXE_crosslink-agent"))
                .args(&self.args)
                .arg("--lib-dir")
                .arg(self.lib())
                .arg("--run-dir")
                .arg(self.run_dir())
                .args(["--http-address", &self.address().to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log).unwrap())
                .spawn()
                .unwrap()
        };
        let child = match &self.netns {
            Some(netns) => in_netns(netns, spawn),
            None => spawn(),
        };
        Agent { child, log }
    }

    /// Starts the agent and waits until it answers.
    pub fn start_up(&self) -> Agent {
        let mut agent = self.start();
        wait_until("the agent answers", LONG, || {
            assert_eq!(agent.child.try_wait().unwrap(), None, "{}", agent.log());
            UnixStream::connect(self.socket()).is_ok()
        });
        agent
    }

    /// GET over the unix socket: status and body.
    pub fn local(&self, path: &str) -> (u16, String) {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let (status, _, body) = ask(stream, &format!("GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n"));
        (status, body)
    }

    /// GET over TCP: status and body.
    pub fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.raw(&format!("GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n"));
        (status, body)
    }

    /// A request over TCP: status, header, body.
    pub fn raw(&self, request: &str) -> (u16, String, String) {
        let connect = || TcpStream::connect(self.address()).unwrap();
        let stream = match &self.netns {
            Some(netns) => in_netns(netns, connect),
            None => connect(),
        };
        stream.set_read_timeout(Some(LONG)).unwrap();
        ask(stream, request)
    }

    /// `/status`.
    pub fn status(&self) -> Value {
        let (status, body) = self.local("/status");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Ids and texts of the findings of a part.
    pub fn findings(&self, part: &str) -> Vec<String> {
        let status = self.status();
        let list = status["findings"][part].as_array().cloned().unwrap_or_default();
        let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
        list.iter().map(|finding| format!("{} {}", text(finding, "id"), text(finding, "text"))).collect()
    }

    /// Waits until `node.json` has these values; what it lacks is null.
    pub fn wait_node(&self, agent: &Agent, wanted: &Value) {
        let mut last = Value::Null;
        let mut matches = || {
            last = self.node();
            wanted.as_object().unwrap().iter().all(|(key, value)| last[key] == *value)
        };
        for _ in 0..300 {
            if matches() {
                return;
            }
            std::thread::sleep(LONG / 300);
        }
        panic!("wanted {wanted}, have {last}\nstatus: {:#}\n{}", self.status()["facts"], agent.log());
    }
}

impl Agent {
    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.ended()
    }

    /// Waits for the end.
    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the agent ends", LONG, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Stops or continues it (SIGSTOP, SIGCONT).
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- agent ---\n{}", self.log());
        }
    }
}

fn write(path: &Path, text: &str) {
    // As a writer should: no reader ever sees half of it.
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text).unwrap();
    fs::rename(&temporary, path).unwrap();
}

fn ask(mut stream: impl Read + Write, request: &str) -> (u16, String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (header, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = header.split(' ').nth(1).and_then(|text| text.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer to {request:?}: {answer:?}")), header.to_owned(), body.to_owned())
}

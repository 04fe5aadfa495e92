//! The built agent, running on a node.
#![allow(
    dead_code,
    clippy::print_stderr,
    clippy::allow_attributes,
    reason = "every test binary uses another part of this module"
)]

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crosslink_testkit::netns::in_netns;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::Site;

/// The agent as cargo built it.
pub fn agent_bin() -> PathBuf {
    env!("CARGO_BIN_EXE_crosslink-agent").into()
}

/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running agent; killed when dropped. In a panicking test its log is printed.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    /// Starts an agent on the node of a network namespace, without Kubernetes and without installing anything, on a site's
    /// files. `args` are more flags, which win.
    pub fn start(node: &Path, site: &Site, args: &[&str]) -> Self {
        let log = site.dir.join("agent.log");
        let out = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(agent_bin());
        command
            .args(["run", "--kubeconfig=none", "--cni-mode=none", "--notrack=off", "--preserve-source=off"])
            .args(["--log-level=debug", "--http-address=127.0.0.1:0"])
            .arg(format!("--lib-dir={}", site.dir.display()))
            .arg(format!("--run-dir={}", site.dir.join("run").display()))
            .args(args)
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out);
        let child = in_netns(node, || command.spawn().unwrap());
        Self { child, log }
    }

    /// Process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Ends it as a kubelet does, and waits.
    ///
    /// # Panics
    /// Where it does not end.
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the agent does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Resident memory, bytes.
    pub fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the agent's log\n{}", self.log());
        }
    }
}

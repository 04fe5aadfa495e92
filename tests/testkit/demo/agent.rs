//! The agent in the demo, and clocks that the kernel stops.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crosslink_testkit::Netns;
use crosslink_testkit::netns::in_netns;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// The running agent.
pub struct Agent {
    child: Option<Child>,
    flags: Vec<String>,
    program: PathBuf,
    dir: PathBuf,
    /// The main CNI's list before it was touched.
    pub before: String,
}

impl Agent {
    /// Starts the agent of `bin` on a node, on the files below `dir`.
    pub fn start(node: &Netns, bin: &Path, dir: &Path, before: String) -> Result<Self, String> {
        let path = |name: &str| dir.join(name).display().to_string();
        let flags = vec![
            "--kubeconfig=none".to_owned(),
            format!("--lib-dir={}", dir.display()),
            format!("--run-dir={}", path("run")),
            format!("--cni-conf-dir={}", path("net.d")),
            format!("--cni-bin-dir={}", path("bin")),
            format!("--static-dir={}", path("remotes.d")),
            "--cluster-name=cluster-a".to_owned(),
            "--pod-cidrs=172.110.0.0/16,fd10::/64".to_owned(),
            "--service-cidrs=10.233.0.0/18,fd33::/112".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        let program = bin.join("crosslink-agent");
        fs::create_dir_all(dir.join("bin")).map_err(|err| err.to_string())?;
        let mut agent = Self { child: None, flags, program, dir: dir.to_owned(), before };
        agent.resume(node)?;
        Ok(agent)
    }

    /// Starts it, again if it was stopped, and waits until it is ready.
    pub fn resume(&mut self, node: &Netns) -> Result<(), String> {
        let log = File::create(self.dir.join("agent.log")).map_err(|err| err.to_string())?;
        let mut command = Command::new(&self.program);
        command.arg("run").args(&self.flags).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = in_netns(node.path(), || command.spawn());
        self.child = Some(child.map_err(|err| format!("{}: {err}", self.program.display()))?);
        self.wait_ready()
    }

    /// Ends it as a kubelet does.
    pub fn stop(&mut self) -> Result<(), String> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let ended = Command::new("kill").arg(child.id().to_string()).status().map_err(|err| err.to_string())?;
        let status = child.wait().map_err(|err| err.to_string())?;
        match ended.success() && status.success() {
            true => Ok(()),
            false => Err(format!("the agent ended with {status}")),
        }
    }

    fn wait_ready(&mut self) -> Result<(), String> {
        let started = Instant::now();
        while self.readiness().is_err() {
            let ended = self.child.as_mut().map(Child::try_wait).transpose().map_err(|err| err.to_string())?.flatten();
            if ended.is_some() || started.elapsed() > PATIENCE {
                let log = fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default();
                return Err(format!("the agent is not ready: {}\n{log}", self.ask("readyz").unwrap_or_else(|why| why)));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn ask(&self, path: &str) -> Result<String, String> {
        let socket = self.dir.join("run").join("agent.sock");
        let url = format!("http://agent/{path}");
        let output =
            Command::new("curl").args(["-sS", "--unix-socket"]).arg(socket).args(["-w", "%{http_code}", &url]).output();
        let output = output.map_err(|err| format!("curl: {err}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// What `/readyz` says, if it is good.
    pub fn readiness(&self) -> Result<String, String> {
        let answer = self.ask("readyz")?;
        let text = answer.strip_suffix("200").ok_or_else(|| answer.clone())?;
        Ok(text.trim().replace('\n', ", "))
    }

    /// Stops the agent, which changes nothing, and takes everything back.
    pub fn uninstall(mut self, node: &Netns) -> Result<(), String> {
        self.stop()?;
        let mut command = Command::new(&self.program);
        command.arg("uninstall").args(&self.flags).stdin(Stdio::null());
        let output = in_netns(node.path(), || command.output()).map_err(|err| err.to_string())?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("uninstall: {}", String::from_utf8_lossy(&output.stderr))),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A wait for a route, by the kernel's notifications.
pub struct Watch {
    monitor: Child,
    seen: Receiver<Instant>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

/// Starts watching for a route to `dst` in a pod, added or gone. Returns when the kernel's notifications are listened to.
pub fn watch_route(pod: &Netns, dst: &str, gone: bool) -> Result<Watch, String> {
    let mut command = Command::new("ip");
    command.args(["-o", "monitor", "route"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut monitor = in_netns(pod.path(), || command.spawn()).map_err(|err| format!("ip monitor: {err}"))?;
    let output = monitor.stdout.take().ok_or("ip monitor: no output")?;
    let (ready, listening) = channel();
    let (sender, seen) = channel();
    let dst = dst.to_owned();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.contains("203.0.113.113") {
                let _ = ready.send(());
            } else if line.contains(&dst) && line.starts_with("Deleted") == gone {
                let _ = sender.send(Instant::now());
            }
        }
    });
    // A route that comes and goes says when the monitor listens.
    let started = Instant::now();
    while listening.recv_timeout(Duration::from_millis(20)).is_err() {
        pod.ip("route add 203.0.113.113 dev lo");
        pod.ip("route del 203.0.113.113 dev lo");
        if started.elapsed() > PATIENCE {
            return Err("ip monitor says nothing".to_owned());
        }
    }
    Ok(Watch { monitor, seen })
}

/// When the last of them saw its route, after `started`.
pub fn last(watches: Vec<Watch>, started: Instant) -> Result<Duration, String> {
    let mut last = Duration::ZERO;
    for watch in &watches {
        let seen = watch.seen.recv_timeout(PATIENCE).map_err(|_| "a pod does not follow".to_owned())?;
        last = last.max(seen.saturating_duration_since(started));
    }
    Ok(last)
}

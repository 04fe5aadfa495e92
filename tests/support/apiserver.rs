//! A real etcd and kube-apiserver on loopback ports of the sandbox. No kubelet, no controllers.
//!
//! The binaries come from `KUBEBUILDER_ASSETS`, the convention of the ecosystem. Without it a test says so; in CI that is
//! a failure, unless `CROSSLINK_TEST_KNOWN_MISSING` names `apiserver`.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long a server may take to answer.
const START: Duration = Duration::from_secs(60);

/// Below the range from which the kernel takes ports by itself (32768 on), so nothing else in the sandbox has them.
static NEXT_PORT: AtomicU16 = AtomicU16::new(16000);

/// A user with every right.
const ADMIN: (&str, &str) = ("admin-token", "admin");

/// A user without any right but what a test gives it: the agent's service account.
pub const AGENT_USER: &str = "system:serviceaccount:crosslink:crosslink-agent";
const AGENT: (&str, &str) = ("agent-token", AGENT_USER);

/// Where the binaries are; none, with a word on standard error, where they are not to be had.
///
/// # Panics
/// In CI without them.
pub fn assets() -> Option<PathBuf> {
    let given = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let why = match given {
        Some(dir) if dir.join("etcd").exists() && dir.join("kube-apiserver").exists() => return Some(dir),
        Some(dir) => format!("KUBEBUILDER_ASSETS={}: no etcd or no kube-apiserver there", dir.display()),
        None => "KUBEBUILDER_ASSETS is not set: no etcd, no kube-apiserver".to_owned(),
    };
    let known = std::env::var("CROSSLINK_TEST_KNOWN_MISSING").unwrap_or_default();
    let is_known = known.split(',').any(|name| name.trim() == "apiserver");
    assert!(std::env::var_os("CI").is_none() || is_known, "{why}; a test that needs it must not be skipped in CI");
    eprintln!("skipped: {why}");
    None
}

/// A process that ends with its owner.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An API server with its store.
#[derive(Debug)]
pub struct ApiServer {
    // Before the directory, so that both are gone when it is removed.
    server: Option<Process>,
    _etcd: Process,
    assets: PathBuf,
    more: Vec<String>,
    ports: [u16; 3],
    dir: tempfile::TempDir,
}

impl ApiServer {
    /// Starts both and waits until the API server is ready.
    pub fn start() -> Option<Self> {
        Self::start_with(&[])
    }

    /// [`Self::start`] with more flags of kube-apiserver.
    pub fn start_with(more: &[&str]) -> Option<Self> {
        let assets = assets()?;
        assert!(
            std::env::var_os("CROSSLINK_TEST_NETNS").is_some_and(|value| value == "1"),
            "not in the test sandbox: start this through cargo, or with tests/testkit/run"
        );
        let dir = tempfile::Builder::new().prefix("apiserver").tempdir().unwrap();
        let ports = [0; 3].map(|_| NEXT_PORT.fetch_add(1, Ordering::Relaxed));
        let etcd = start_etcd(&assets, dir.path(), ports);
        let more = more.iter().map(|flag| (*flag).to_owned()).collect();
        let mut server = Self { server: None, _etcd: etcd, assets, more, ports, dir };
        server.wait("etcd", |this| http(this.ports[1], "GET", "/health", "").is_some_and(|text| text.contains("true")));
        server.prepare();
        server.resume();
        Some(server)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Keys, users and kubeconfig files.
    fn prepare(&self) {
        let key = self.path("sa.key");
        let made = Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048").output().unwrap();
        assert!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        let users = format!("{},{},1,\"system:masters\"\n{},{},2\n", ADMIN.0, ADMIN.1, AGENT.0, AGENT.1);
        fs::write(self.path("tokens"), users).unwrap();
        for (file, token) in [("admin.kubeconfig", ADMIN.0), ("agent.kubeconfig", AGENT.0)] {
            let text = serde_json::json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "test",
                "clusters": [{"name": "test", "cluster": {
                    "server": format!("https://127.0.0.1:{}", self.ports[0]),
                    "certificate-authority": self.path("certs/apiserver.crt"),
                }}],
                "users": [{"name": "test", "user": {"token": token}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            });
            fs::write(self.path(file), text.to_string()).unwrap();
        }
    }

    /// Stops the API server alone, at once; the store keeps everything.
    pub fn pause(&mut self) {
        self.server = None;
    }

    /// Starts the API server again, at the same address with the same data, and waits until it is ready.
    pub fn resume(&mut self) {
        let key = self.path("sa.key");
        let child = Command::new(self.assets.join("kube-apiserver"))
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
            .arg(format!("--secure-port={}", self.ports[0]))
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.ports[1]))
            .arg(format!("--cert-dir={}", self.path("certs").display()))
            .arg(format!("--token-auth-file={}", self.path("tokens").display()))
            .arg("--authorization-mode=RBAC")
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!("--service-account-signing-key-file={}", key.display()))
            // Nothing makes the service accounts that it asks for.
            .arg("--disable-admission-plugins=ServiceAccount")
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.path("apiserver.log")).unwrap())
            .spawn()
            .unwrap();
        self.server = Some(Process(child));
        self.wait("kube-apiserver", |this| {
            // Not curl -f: /readyz answers 500 with the reason until every hook has run.
            let answer = Command::new("curl")
                .args(["-sk", "-m", "5", "-H", &format!("Authorization: Bearer {}", ADMIN.0)])
                .arg(format!("https://127.0.0.1:{}/readyz", this.ports[0]))
                .output()
                .unwrap();
            answer.stdout == b"ok"
        });
    }

    fn wait(&mut self, what: &str, mut ready: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + START;
        while !ready(self) {
            let ended = self.server.as_mut().and_then(|server| server.0.try_wait().unwrap());
            assert!(ended.is_none() && Instant::now() < deadline, "{what}: {ended:?}: {}", self.log(what));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self, what: &str) -> String {
        let name = if what == "etcd" { "etcd.log" } else { "apiserver.log" };
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        let from = text.lines().count().saturating_sub(30);
        text.lines().skip(from).collect::<Vec<_>>().join("\n")
    }

    /// Throws away the store's history, so that a watch that goes on from an old version is answered with 410 once the
    /// API server, which remembers recent events itself, was paused and resumed.
    pub fn compact(&self) {
        // Any key tells the store's revision.
        let range = http(self.ports[1], "POST", "/v3/kv/range", r#"{"key":"AA==","limit":1}"#).unwrap();
        let range: Value = serde_json::from_str(&range).unwrap();
        let revision = range["header"]["revision"].as_str().unwrap();
        let body = format!(r#"{{"revision":"{revision}","physical":true}}"#);
        let answer = http(self.ports[1], "POST", "/v3/kv/compaction", &body).unwrap();
        assert!(answer.contains("header"), "compaction: {answer}");
    }

    /// A kubeconfig file of a user with every right.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    /// A kubeconfig file of [`AGENT_USER`], who has no right but what a test's RBAC objects give it.
    pub fn agent_kubeconfig(&self) -> PathBuf {
        self.path("agent.kubeconfig")
    }

    /// The port of the API server.
    pub fn port(&self) -> u16 {
        self.ports[0]
    }

    /// A client with every right. Each runtime needs its own.
    pub async fn client(&self) -> kube::Client {
        crosslink_agent::source::client_from(&self.kubeconfig()).await.unwrap()
    }
}

fn start_etcd(assets: &Path, dir: &Path, ports: [u16; 3]) -> Process {
    let [_, client, peer] = ports.map(|port| format!("http://127.0.0.1:{port}"));
    let child = Command::new(assets.join("etcd"))
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync", "--log-level", "warn"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(dir.join("etcd.log")).unwrap())
        .spawn()
        .unwrap();
    Process(child)
}

/// The body of an answer over plain HTTP/1.0; none where nobody listens.
fn http(port: u16, method: &str, path: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = format!("{method} {path} HTTP/1.0\r\nHost: etcd\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

//! Network namespaces.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::call;

/// A short name that no other test in this process has: `prefix` and a number.
///
/// The sandbox belongs to one process, so a counter is enough. With a prefix of up to 9 letters the name is also good
/// for an interface.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs `work` on a fresh thread inside the network namespace at `path` and returns its value.
///
/// Sockets and child processes made by `work` stay in that namespace. A panic in `work` is the caller's.
///
/// # Panics
/// When the namespace cannot be entered.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let file = File::open(path).unwrap_or_else(|error| panic!("netns {}: {error}", path.display()));
                setns(file, CloneFlags::CLONE_NEWNET)
                    .unwrap_or_else(|error| panic!("setns {}: {error}", path.display()));
                work()
            })
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// A named network namespace, deleted when dropped. In a panicking test its state is printed first.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// Makes a namespace whose name begins with `prefix` and is unique in this process. Its `lo` is down, as a
    /// container runtime leaves it.
    ///
    /// # Panics
    /// Outside the sandbox, since it would change the machine, and when `ip` fails.
    pub fn create(prefix: &str) -> Self {
        assert!(
            std::env::var_os("CROSSLINK_TEST_NETNS").is_some_and(|value| value == "1"),
            "not in the test sandbox: start this through cargo, or with tests/testkit/run"
        );
        let name = unique(prefix);
        must(Command::new("ip").args(["netns", "add", &name]));
        let path = Path::new("/run/netns").join(&name);
        Self { name, path }
    }

    /// The name that `ip netns` shows.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What CNI_NETNS is for this namespace.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `ip -n NAME` with the words of `args` and returns its output.
    ///
    /// # Panics
    /// When `ip` fails, with what it said.
    pub fn ip(&self, args: &str) -> String {
        let output = must(Command::new("ip").args(["-n", &self.name]).args(args.split_whitespace()));
        String::from_utf8(output.stdout).expect("ip prints UTF-8")
    }

    /// The JSON that `ip -n NAME -j` prints for the words of `args`; an empty list when it prints nothing.
    ///
    /// # Panics
    /// When `ip` fails or prints no JSON.
    pub fn json(&self, args: &str) -> Value {
        let text = self.ip(&format!("-j {args}"));
        if text.trim().is_empty() {
            return Value::Array(Vec::new());
        }
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("ip -j {args}: {error}: {text}"))
    }

    /// Runs a program inside.
    ///
    /// # Panics
    /// When it cannot be started or fails.
    pub fn exec<S: AsRef<OsStr> + Sync>(&self, argv: &[S]) -> Output {
        in_netns(&self.path, || must(&mut command(argv)))
    }

    /// Runs a program inside; how it ended is for the caller to look at.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn try_exec<S: AsRef<OsStr> + Sync>(&self, argv: &[S]) -> Output {
        in_netns(&self.path, || run(&mut command(argv)))
    }

    /// Sets a sysctl of this namespace, such as `net.ipv4.ip_forward`. Where an interface name has a dot, write the
    /// key with slashes.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn sysctl(&self, key: &str, value: &str) {
        let file = sysctl_file(key);
        in_netns(&self.path, || fs::write(&file, value)).unwrap_or_else(|error| {
            panic!("{}: sysctl {key}={value}: {error}", self.name);
        });
    }

    /// The value of a sysctl of this namespace, without the line end.
    ///
    /// # Panics
    /// When there is no such key.
    pub fn read_sysctl(&self, key: &str) -> String {
        let file = sysctl_file(key);
        in_netns(&self.path, || fs::read_to_string(&file))
            .unwrap_or_else(|error| panic!("{}: sysctl {key}: {error}", self.name))
            .trim_end()
            .to_owned()
    }

    /// Loads a ruleset with `nft -f`, in one transaction.
    ///
    /// # Panics
    /// When nft refuses it, with what it said.
    pub fn nft(&self, ruleset: &str) {
        self.try_nft(ruleset).unwrap_or_else(|error| panic!("{}: nft: {error}\n{ruleset}", self.name));
    }

    /// Loads a ruleset with `nft -f`, or returns what nft said against it.
    ///
    /// # Errors
    /// nft's stderr.
    ///
    /// # Panics
    /// When nft cannot be started.
    pub fn try_nft(&self, ruleset: &str) -> Result<(), String> {
        let output = in_netns(&self.path, || {
            let mut child = Command::new("nft")
                .args(["-f", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("start nft");
            child.stdin.take().expect("stdin is piped").write_all(ruleset.as_bytes()).expect("write to nft");
            child.wait_with_output().expect("wait for nft")
        });
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    /// Everything that decides where a packet goes, for a test's log.
    pub fn dump(&self) -> String {
        let mut text = format!("--- {} ---\n", self.name);
        for argv in [
            &["ip", "-br", "addr"][..],
            &["ip", "rule"],
            &["ip", "-6", "rule"],
            &["ip", "route", "show", "table", "all"],
            &["ip", "neigh"],
            &["nft", "list", "ruleset"],
        ] {
            let output = self.try_exec(argv);
            text.push_str(&format!("$ {}\n", argv.join(" ")));
            let stdout = String::from_utf8_lossy(&output.stdout);
            // The kernel's own routes to its addresses: long, and told by the addresses.
            stdout
                .lines()
                .filter(|line| !line.contains(" table local "))
                .for_each(|line| text.push_str(&format!("{line}\n")));
            text.push_str(&String::from_utf8_lossy(&output.stderr));
        }
        text
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.path.exists() {
            return; // the test deleted it, as a runtime does
        }
        if thread::panicking() {
            eprintln!("{}", self.dump());
        }
        // A failure is of no consequence: the namespace dies with the sandbox.
        let _ignored = Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
    }
}

fn sysctl_file(key: &str) -> PathBuf {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    Path::new("/proc/sys").join(relative)
}

fn command<S: AsRef<OsStr>>(argv: &[S]) -> Command {
    let (program, args) = argv.split_first().expect("a program to run");
    let mut command = Command::new(program);
    command.args(args);
    command
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn must(command: &mut Command) -> Output {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Whether this machine has `feature`, found by trying it in a namespace of its own.
///
/// Features: `nft`, a CNI plugin (`plugin:macvlan`), or a kind of link: `bridge`, `dummy`, `ipvlan`, `macvlan`,
/// `veth`, `vrf`, `vxlan`.
///
/// # Panics
/// For a feature that is none of these: a typing error must not look like a missing one.
pub fn available(feature: &str) -> bool {
    if let Some(plugin) = feature.strip_prefix("plugin:") {
        return call::find(plugin, &call::cni_path()).is_some();
    }
    let link = match feature {
        "nft" => return Netns::create("try").try_nft("table inet try { chain c { ct state invalid drop; }; }").is_ok(),
        "bridge" | "dummy" | "veth" => format!("link add t0 type {feature}"),
        "ipvlan" | "macvlan" => format!("link add link v0 name t0 type {feature}"),
        "vrf" => "link add t0 type vrf table 10".to_owned(),
        "vxlan" => "link add t0 type vxlan id 1 dstport 4789".to_owned(),
        _ => panic!("unknown feature '{feature}'"),
    };
    let netns = Netns::create("try");
    netns.ip("link add v0 type veth peer name v1");
    let output = run(Command::new("ip").args(["-n", netns.name()]).args(link.split_whitespace()));
    output.status.success()
}

/// [`available`], for a test that returns early without it: says what is missing, and in CI (where `CI` is set) panics
/// instead, so that no test passes there without testing.
///
/// `CROSSLINK_TEST_KNOWN_MISSING=ipvlan` (comma-separated) states that the kernel under test is known to lack a feature.
///
/// # Panics
/// In CI, when the feature is missing and not known to be.
pub fn require(feature: &str) -> bool {
    if available(feature) {
        return true;
    }
    let known = std::env::var("CROSSLINK_TEST_KNOWN_MISSING").unwrap_or_default();
    let is_known = known.split(',').any(|name| name.trim() == feature);
    assert!(
        std::env::var_os("CI").is_none() || is_known,
        "this machine has no {feature}; a test that needs it must not be skipped in CI"
    );
    eprintln!("skipped: this machine has no {feature}");
    false
}

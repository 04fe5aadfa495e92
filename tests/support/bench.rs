//! The plugin's library on a kernel in memory, whose every request can be made to fail.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use crosslink_cni::{Env, run};
use crosslink_core::{
    model::{Address, Change, Link, NetnsState, ObservedRoute, Route},
    record::NetnsId,
};
use crosslink_kernel::{
    Applied, Error, Kernel, NodeQuery, PodQuery,
    fake::{FakeKernel, Request},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::Site;

/// Where the fake has its sandbox.
const NETNS: &str = "/run/netns/faults";

/// The fake, shared with the test that scripts it.
struct Shared(Rc<RefCell<FakeKernel>>);

impl Kernel for Shared {
    fn enter(&mut self, netns: &Path, wait: Duration) -> Result<NetnsId, Error> {
        self.0.borrow_mut().enter(netns, wait)
    }

    fn identify(&mut self, netns: &Path) -> Option<NetnsId> {
        self.0.borrow_mut().identify(netns)
    }

    fn observe_pod(&mut self, query: &PodQuery) -> Result<NetnsState, Error> {
        self.0.borrow_mut().observe_pod(query)
    }

    fn observe_node(&mut self, query: &NodeQuery) -> Result<NetnsState, Error> {
        self.0.borrow_mut().observe_node(query)
    }

    fn apply(&mut self, changes: &[Change]) -> Applied {
        let mut kernel = self.0.borrow_mut();
        let mut all = Applied::default();
        for (place, change) in changes.iter().enumerate() {
            let one = kernel.apply(std::slice::from_ref(change));
            if let Change::CreateVeth(veth) = change {
                // A real interface has this too.
                let key = format!("ipv6/conf/{}/accept_redirects", veth.node);
                if kernel.node.link(&veth.node).is_some() {
                    kernel.node.sysctls.entry(key).or_insert_with(|| "1".to_owned());
                }
            }
            all.done.extend(one.done.iter().map(|_| place));
            all.unknown.extend(one.unknown.iter().map(|_| place));
            all.failures.extend(one.failures.into_iter().map(|(_, err)| (place, err)));
            if !all.failures.is_empty() {
                break;
            }
        }
        all
    }
}

/// What the fake is to do wrong in the next call, by number of the request.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// Refusals.
    pub errnos: BTreeMap<usize, i32>,
    /// Changes whose answer gets lost.
    pub lost: Vec<usize>,
}

impl Script {
    /// One refusal.
    pub fn refuse(number: usize, errno: i32) -> Self {
        Self { errnos: BTreeMap::from([(number, errno)]), lost: Vec::new() }
    }

    /// Everything from `number` on is refused.
    pub fn refuse_from(number: usize, errno: i32) -> Self {
        Self { errnos: (number..number + 1000).map(|number| (number, errno)).collect(), lost: Vec::new() }
    }

    /// Answers get lost.
    pub fn lose(lost: impl IntoIterator<Item = usize>) -> Self {
        Self { errnos: BTreeMap::new(), lost: lost.into_iter().collect() }
    }
}

/// How a call ended.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Whether the exit status is 0.
    pub ok: bool,
    /// Standard output.
    pub stdout: String,
    /// What was asked of the kernel.
    pub requests: Vec<Request>,
}

impl Answer {
    /// Checks that it is exactly one error object, and returns its code.
    pub fn refused(&self) -> u64 {
        assert!(!self.ok, "{self:?}");
        let object: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|err| panic!("{err}: {self:?}"));
        let code = object["code"].as_u64().unwrap();
        assert!(code != 0 && code != 100 && !object["msg"].as_str().unwrap().is_empty(), "{self:?}");
        code
    }

    /// Checks success.
    pub fn succeeded(&self) -> &Self {
        assert!(self.ok, "{self:?}");
        self
    }

    /// Numbers of the requests that change something.
    pub fn changes(&self) -> Vec<usize> {
        let numbered = self.requests.iter().enumerate();
        numbered.filter(|(_, request)| matches!(request, Request::Change(_))).map(|(number, _)| number).collect()
    }
}

/// The kernel's type of error numbers.
macro_rules! errno_of {
    ($code:expr) => {
        Error::errno_of(&std::io::Error::from_raw_os_error($code))
    };
}

/// Which pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A veth into the node.
    Overlay,
    /// A macvlan past the node.
    Underlay,
}

/// One pod on one node, both in memory, and the plugin's files.
pub struct Bench {
    /// Which pod.
    pub kind: Kind,
    /// The files.
    pub site: Site,
    kernel: Rc<RefCell<FakeKernel>>,
    dir: TempDir,
}

/// The kernel and the record at one moment, to go back to.
#[derive(Clone)]
pub struct Moment {
    kernel: FakeKernel,
    record: Option<Vec<u8>>,
}

/// A standard output that is full.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::Error::from_raw_os_error(28))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keeps the log of thousands of calls that fail on purpose out of the test's output.
struct Quiet;

impl log::Log for Quiet {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        false
    }

    fn log(&self, _: &log::Record<'_>) {}

    fn flush(&self) {}
}

impl Bench {
    /// A pod of that kind as its main CNI has left it, with remotes of both families.
    pub fn new(kind: Kind) -> Self {
        static QUIET: Quiet = Quiet;
        // Another test of this process may have done it.
        let _ = log::set_logger(&QUIET);
        let dir = tempfile::tempdir().unwrap();
        let site = Site::new(dir.path().join("site"));
        site.cluster("cluster-b", &["172.111.0.0/16", "fd11::/64"], &["10.243.0.0/18", "fd43::/112"]);
        let (node, pod) = states(kind);
        let mut kernel = FakeKernel::with_sandbox(Path::new(NETNS), pod);
        kernel.node = node;
        Self { kind, site, kernel: Rc::new(RefCell::new(kernel)), dir }
    }

    /// Calls the plugin while the kernel follows the script.
    pub fn call(&self, command: &str, script: Script, extra: Value) -> Answer {
        let mut stdout = Vec::new();
        let (ok, requests) = self.call_into(command, script, extra, &mut stdout);
        Answer { ok, stdout: String::from_utf8(stdout).unwrap(), requests }
    }

    /// An ADD whose standard output is full.
    pub fn add_into_full(&self) -> bool {
        self.call_into("ADD", Script::default(), json!({}), &mut Full).0
    }

    fn call_into(&self, command: &str, script: Script, extra: Value, out: &mut dyn Write) -> (bool, Vec<Request>) {
        {
            let mut kernel = self.kernel.borrow_mut();
            kernel.requests.clear();
            kernel.entered = None;
            kernel.errnos = script.errnos.into_iter().map(|(number, errno)| (number, errno_of!(errno))).collect();
            kernel.lost = script.lost;
        }
        let env = Env {
            command: command.to_owned(),
            container_id: "ctr".to_owned(),
            netns: NETNS.to_owned(),
            ifname: "eth0".to_owned(),
            args: String::new(),
        };
        let conf = self.conf(extra).to_string();
        let open = || Ok(Box::new(Shared(Rc::clone(&self.kernel))) as Box<dyn Kernel>);
        let code = run(&env, &mut conf.as_bytes(), out, &open);
        let mut kernel = self.kernel.borrow_mut();
        kernel.errnos.clear();
        kernel.lost.clear();
        (code == std::process::ExitCode::SUCCESS, std::mem::take(&mut kernel.requests))
    }

    /// A call on a kernel that does everything right.
    pub fn clean(&self, command: &str) -> Answer {
        self.call(command, Script::default(), json!({}))
    }

    fn conf(&self, extra: Value) -> Value {
        let [v4, v6] = addresses(self.kind);
        let mut conf = self.site.entry(json!({
            "cniVersion": "1.1.0", "name": "pods", "hijackCIDR": ["198.51.100.0/24", "2001:db8:1::/48"],
            "prevResult": {
                "cniVersion": "1.1.0", "interfaces": [{ "name": "eth0", "sandbox": NETNS }],
                "ips": [{ "address": v4, "interface": 0 }, { "address": v6, "interface": 0 }],
            },
        }));
        let Value::Object(extra) = extra else { panic!("an object") };
        conf.as_object_mut().unwrap().extend(extra);
        conf
    }

    /// What both namespaces hold, in lines; interfaces that were made go without their index, and rule 1410 is left
    /// out, since it stays.
    pub fn state(&self) -> Vec<String> {
        let kernel = self.kernel.borrow();
        let (_, pod) = &kernel.sandboxes[Path::new(NETNS)];
        let mut lines = Vec::new();
        for (side, state) in [("node", &kernel.node), ("pod", pod)] {
            let links = state.links.iter().map(|link| match link.index {
                1000.. => format!("{:?}", Link { index: 0, peer: None, ..link.clone() }),
                _ => format!("{link:?}"),
            });
            let rules = state.rules.iter().filter(|rule| rule.priority != 1410).map(|rule| format!("{rule:?}"));
            let all = (links.chain(rules))
                .chain(state.addresses.iter().map(|address| format!("{address:?}")))
                .chain(state.routes.iter().map(|route| format!("{route:?}")))
                .chain(state.neighbours.iter().map(|neighbour| format!("{neighbour:?}")))
                .chain(state.sysctls.iter().map(|(key, value)| format!("{key} = {value}")));
            lines.extend(all.map(|line| format!("{side}: {line}")));
        }
        lines.sort();
        lines
    }

    /// Path of the record.
    pub fn record_path(&self) -> PathBuf {
        self.site.state_dir().join("ctr:eth0.json")
    }

    /// The record, byte for byte.
    pub fn record(&self) -> Option<Vec<u8>> {
        fs::read(self.record_path()).ok()
    }

    /// Names of all files in the state directory.
    pub fn state_files(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.site.state_dir()) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Notes the present.
    pub fn moment(&self) -> Moment {
        Moment { kernel: self.kernel.borrow().clone(), record: self.record() }
    }

    /// Goes back to a moment.
    pub fn back_to(&self, moment: &Moment) {
        *self.kernel.borrow_mut() = moment.kernel.clone();
        match &moment.record {
            Some(record) => fs::write(self.record_path(), record).unwrap(),
            None => drop(fs::remove_file(self.record_path())),
        }
    }

    /// Changes the kernel's state behind the plugin's back.
    pub fn meddle(&self, change: impl FnOnce(&mut NetnsState, &mut NetnsState)) {
        let mut kernel = self.kernel.borrow_mut();
        let kernel = &mut *kernel;
        let (_, pod) = kernel.sandboxes.get_mut(Path::new(NETNS)).unwrap();
        change(&mut kernel.node, pod);
    }
}

/// Checks that two states are the same, and says what differs.
pub fn assert_same(what: &str, now: &[String], before: &[String]) {
    let gone: Vec<&String> = before.iter().filter(|line| !now.contains(line)).collect();
    let new: Vec<&String> = now.iter().filter(|line| !before.contains(line)).collect();
    assert!(gone.is_empty() && new.is_empty() && now.len() == before.len(), "{what}:\n- {gone:#?}\n+ {new:#?}");
}

fn addresses(kind: Kind) -> [&'static str; 2] {
    match kind {
        Kind::Overlay => ["10.88.0.5/24", "fd88::5/64"],
        Kind::Underlay => ["172.20.1.5/16", "fd20::1:5/64"],
    }
}

/// A node's and a pod's namespace.
fn states(kind: Kind) -> (NetnsState, NetnsState) {
    let mut node = NetnsState {
        links: vec![link(1, "lo", None, None), link(3, "ens0", None, None)],
        addresses: vec![address("ens0", "172.20.0.11/16"), address("ens0", "fd20::11/64")],
        routes: vec![
            route("0.0.0.0/0", "ens0", Some("172.20.0.1")),
            route("172.20.0.0/16", "ens0", None),
            route("::/0", "ens0", Some("fd20::1")),
        ],
        ..NetnsState::default()
    };
    let eth0 = match kind {
        Kind::Overlay => {
            node.links.push(link(7, "vethabc", Some("veth"), Some(2)));
            link(2, "eth0", Some("veth"), Some(7))
        }
        Kind::Underlay => link(2, "eth0", Some("macvlan"), Some(3)),
    };
    let gateways = match kind {
        Kind::Overlay => ["10.88.0.1", "fd88::1"],
        Kind::Underlay => ["172.20.0.1", "fd20::1"],
    };
    let mut pod = NetnsState { links: vec![link(1, "lo", None, None), eth0], ..NetnsState::default() };
    pod.addresses.extend(addresses(kind).map(|net| address("eth0", net)));
    for (net, (default, gateway)) in addresses(kind).iter().zip(["0.0.0.0/0", "::/0"].iter().zip(gateways)) {
        pod.routes.push(route(default, "eth0", Some(gateway)));
        let connected: ipnet::IpNet = net.parse().unwrap();
        pod.routes.push(route(&connected.trunc().to_string(), "eth0", None));
    }
    pod.routes.push(route("203.0.113.0/24", "eth0", None));
    pod.sysctls.insert("ipv4/conf/eth0/rp_filter".to_owned(), "1".to_owned());
    (node, pod)
}

fn link(index: u32, name: &str, kind: Option<&str>, peer: Option<u32>) -> Link {
    Link {
        index,
        name: name.to_owned(),
        kind: kind.map(str::to_owned),
        mac: vec![2, 0, 0, 0, 0, u8::try_from(index).unwrap()],
        mtu: 1500,
        up: true,
        loopback: name == "lo",
        peer,
        peer_elsewhere: peer.is_some(),
    }
}

fn address(dev: &str, net: &str) -> Address {
    Address { dev: dev.to_owned(), net: net.parse().unwrap(), global: true, tentative: false, unstable: false }
}

/// A route of the main CNI's.
pub fn route(dst: &str, dev: &str, via: Option<&str>) -> ObservedRoute {
    let route = Route {
        dst: dst.parse().unwrap(),
        table: 254,
        dev: dev.to_owned(),
        via: via.map(|via| via.parse().unwrap()),
        src: None,
        mtu: None,
    };
    let metric = if dst.contains(':') { 1024 } else { 0 };
    ObservedRoute { route, protocol: 3, metric, unicast: true, multipath: false }
}

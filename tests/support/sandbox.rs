//! A node and a pod made by hand, so that a test decides every input of one call and sees all that it changed.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crosslink_testkit::{Call, Netns, Node, Pod, Reply, Switch, probe::wait_until, unique};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Site, bin, write};

/// Key of the pod's annotations in `runtimeConfig`.
pub const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Values of `runtimeConfig` that give a pod these annotations.
pub fn annotated(annotations: Value) -> Value {
    json!({ "runtimeConfig": { ANNOTATIONS: annotations } })
}

/// A node, a pod on it that a main CNI has made, and the plugin's files.
pub struct Sandbox {
    /// The node.
    pub node: Node,
    /// The pod.
    pub pod: Pod,
    /// The plugin's files.
    pub site: Site,
    /// `CNI_CONTAINERID`.
    pub id: String,
    /// Addresses of eth0 with their gateways.
    addresses: [(&'static str, &'static str); 2],
    /// What the interfaces are plugged into; underlay only.
    switch: Option<Switch>,
    dir: TempDir,
}

/// Everything that a refused call must leave as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What `ip -j` tells of both namespaces, and sysctls.
    lines: Vec<String>,
    /// Content of every file but the log, by path.
    files: BTreeMap<String, Vec<u8>>,
}

/// An error object.
#[derive(Clone, Debug)]
pub struct Failure {
    /// `code`.
    pub code: u64,
    /// `msg`.
    pub msg: String,
    /// `cniVersion`.
    pub version: String,
}

/// Checks that the call ended with exactly one error object, and returns it.
pub fn failure(reply: &Reply) -> Failure {
    assert_eq!(reply.exit, Some(1), "{reply:?}");
    let object = reply.json();
    let text = |key: &str| object[key].as_str().unwrap_or_else(|| panic!("no {key}: {reply:?}")).to_owned();
    let known = ["cniVersion", "code", "details", "msg"];
    assert!(object.as_object().unwrap().keys().all(|key| known.contains(&key.as_str())), "{reply:?}");
    assert!(!reply.stderr.contains("panicked") && reply.code() != 100, "a bug: {reply:?}");
    Failure { code: reply.code(), msg: text("msg"), version: text("cniVersion") }
}

/// Checks that the call failed with this code and a message that holds every part.
pub fn refused(reply: &Reply, code: u64, parts: &[&str]) {
    let failure = failure(reply);
    assert_eq!(failure.code, code, "{reply:?}");
    for part in parts {
        assert!(failure.msg.contains(part), "\"{part}\" is not in: {}", failure.msg);
    }
}

/// Checks that the call succeeded and printed nothing, as all verbs but ADD and VERSION do.
pub fn silent(reply: &Reply) {
    assert!(reply.ok() && reply.stdout.is_empty(), "{reply:?}");
}

impl Sandbox {
    /// A pod with a veth into the node.
    pub fn overlay() -> Self {
        let sandbox = Self::new([("10.88.0.5/24", "10.88.0.1"), ("fd88::5/64", "fd88::1")], None);
        let Self { node, pod, .. } = &sandbox;
        node.ip(&format!("link add host0 type veth peer name eth0 netns {}", pod.name()));
        node.ip("link set host0 addrgenmode none");
        node.ip("addr add 10.88.0.1/24 dev host0");
        node.ip("addr add fd88::1/64 dev host0 nodad");
        node.ip("link set host0 up");
        sandbox.configure_pod();
        sandbox
    }

    /// A pod whose interface bypasses the node: both are plugged into one switch, as with macvlan.
    pub fn underlay() -> Self {
        let addresses = [("172.20.1.5/16", "172.20.0.1"), ("fd20::1:5/64", "fd20::1")];
        let sandbox = Self::new(addresses, Some(Switch::new("switch")));
        let Self { node, pod, switch: Some(switch), .. } = &sandbox else { unreachable!("it was just put in") };
        switch.attach(node, "ens0", &["172.20.0.11/16", "fd20::11/64"]);
        // Indices of their own: were both ends' indices those of a pair on the node, the pod would look like overlay.
        let indices = ("index 701", "index 702");
        let name = pod.name();
        switch.netns().ip(&format!("link add pod {} type veth peer name eth0 {} netns {name}", indices.0, indices.1));
        switch.netns().ip("link set pod master br0 up");
        sandbox.configure_pod();
        sandbox
    }

    fn new(addresses: [(&'static str, &'static str); 2], switch: Option<Switch>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::new(dir.path().join("site"));
        site.cluster("cluster-b", &["172.111.0.0/16", "fd11::/64"], &["10.243.0.0/18", "fd43::/112"]);
        let (node, pod) = (Node::new("node", 0), Pod::new("pod", 0));
        Self { node, pod, site, id: unique("ctr"), addresses, switch, dir }
    }

    fn configure_pod(&self) {
        // No link-local addresses: they would come, and leave the tentative state, on the kernel's own time.
        self.pod.ip("link set eth0 addrgenmode none");
        for (address, _) in self.addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.pod.ip(&format!("addr add {address} dev eth0 {nodad}"));
        }
        self.pod.ip("link set eth0 up");
        for (_, gateway) in self.addresses {
            self.pod.ip(&format!("route add default via {gateway}"));
        }
        let up = |netns: &Netns| {
            let links = netns.json("link show type veth");
            links.as_array().unwrap().iter().all(|link| link["operstate"] == "UP")
        };
        wait_until("all links are up", Duration::from_secs(5), || up(&self.node) && up(&self.pod));
    }

    /// A directory for the test's own files, removed with the sandbox.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Path of the pod's namespace.
    pub fn netns(&self) -> String {
        self.pod.path().to_str().unwrap().to_owned()
    }

    /// What the main CNI has answered.
    pub fn result(&self) -> Value {
        let ips: Vec<Value> = (self.addresses.iter())
            .map(|(address, gateway)| json!({ "address": address, "gateway": gateway, "interface": 0 }))
            .collect();
        json!({
            "cniVersion": "1.1.0", "ips": ips,
            "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:05", "sandbox": self.netns() }],
        })
    }

    /// The plugin's input, with more or other keys from `extra`.
    pub fn conf(&self, extra: Value) -> Value {
        let mut conf = self.site.entry(json!({ "cniVersion": "1.1.0", "name": "pods", "prevResult": self.result() }));
        let Value::Object(extra) = extra else { panic!("an object") };
        conf.as_object_mut().unwrap().extend(extra);
        conf
    }

    /// The plugin's input with `text` in the place of a key's value, byte for byte.
    pub fn conf_text(&self, key: &str, text: &str) -> Vec<u8> {
        let conf = self.conf(json!({ key: "@@" })).to_string();
        conf.replace("\"@@\"", text).into_bytes()
    }

    /// A call for the pod.
    pub fn call(&self, command: &str, conf: &Value) -> Call {
        Call {
            container_id: self.id.clone(),
            netns: self.netns(),
            ifname: "eth0".to_owned(),
            args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u-1".to_owned(),
            path: "/opt/cni/bin".into(),
            node: Some(self.node.path().to_owned()),
            ..Call::new(bin(), command, conf)
        }
    }

    /// A call with [`Sandbox::conf`] of `extra`.
    pub fn run(&self, command: &str, extra: Value) -> Reply {
        self.call(command, &self.conf(extra)).run().unwrap()
    }

    /// A call whose standard input is `stdin`.
    pub fn run_bytes(&self, command: &str, stdin: &[u8]) -> Reply {
        Call { stdin: stdin.to_vec(), ..self.call(command, &json!({})) }.run().unwrap()
    }

    /// An ADD that must succeed and answer prevResult.
    pub fn add(&self, extra: Value) -> Reply {
        let conf = self.conf(extra);
        let reply = self.call("ADD", &conf).run().unwrap();
        assert!(reply.ok(), "{reply:?}");
        assert_eq!(reply.json(), conf["prevResult"], "{reply:?}");
        reply
    }

    /// A DEL as a runtime sends it late: no prevResult.
    pub fn del(&self, extra: Value) -> Reply {
        let mut conf = self.conf(extra);
        conf.as_object_mut().unwrap().remove("prevResult");
        self.call("DEL", &conf).run().unwrap()
    }

    /// Checks that an ADD with these keys is refused and changes nothing.
    pub fn refuses(&self, extra: Value, code: u64, parts: &[&str]) {
        let shown = extra.to_string();
        println!("refused? {}", shown.get(..300).unwrap_or(&shown));
        self.unchanged(|| refused(&self.run("ADD", extra), code, parts));
    }

    /// Runs `work` and checks that it left pod, node and files as they were.
    pub fn unchanged<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = self.snapshot();
        let value = work();
        self.snapshot().assert_same(&before);
        value
    }

    /// Destinations of all routes of ours in the pod, sorted.
    pub fn routes(&self) -> Vec<String> {
        let both = ["-4 route show proto 141", "-6 route show proto 141"].map(|args| self.pod.json(args));
        let all = both.iter().flat_map(|list| list.as_array().unwrap());
        let mut found: Vec<String> = all.map(|route| route["dst"].as_str().unwrap().to_owned()).collect();
        found.sort();
        found
    }

    /// Name of the veth that an underlay ADD has made on the node.
    pub fn node_veth(&self) -> Option<String> {
        let links = self.node.json("link show type veth");
        let names = links.as_array().unwrap().iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
        names.into_iter().find(|name| name.len() == 15 && name.starts_with("cl"))
    }

    /// Path of this attachment's record.
    pub fn record_path(&self) -> std::path::PathBuf {
        self.site.state_dir().join(format!("{}:eth0.json", self.id))
    }

    /// This attachment's record.
    pub fn record(&self) -> Value {
        serde_json::from_slice(&fs::read(self.record_path()).unwrap()).unwrap()
    }

    /// Changes this attachment's record on disk.
    pub fn edit_record(&self, edit: impl FnOnce(&mut Value)) {
        let mut record = self.record();
        edit(&mut record);
        write(&self.record_path(), &record.to_string());
    }

    /// Everything that a refused call must leave alone.
    pub fn snapshot(&self) -> Snapshot {
        let mut lines = Vec::new();
        for (side, netns) in [("node", &*self.node), ("pod", &*self.pod)] {
            let batch = self.dir.path().join(format!("batch-{side}"));
            fs::write(&batch, "link show\naddr show\nroute show table all\nrule show\nneigh show nud permanent\n")
                .unwrap();
            for family in ["-4", "-6"] {
                let text = netns.ip(&format!("{family} -j -batch {}", batch.display()));
                let text = text.replace("},{", "}\n{");
                let objects = text.lines().map(|line| line.trim_matches(['[', ']'])).filter(|line| counts(line));
                lines.extend(objects.map(|object| format!("{side} {family}: {object}")));
            }
        }
        let all = ["net/ipv4/conf/all/rp_filter", "net/ipv6/conf/all/disable_ipv6"];
        let of_link =
            ["net/ipv4/conf/eth0/rp_filter", "net/ipv6/conf/eth0/accept_ra", "net/ipv6/conf/eth0/disable_ipv6"];
        let has_link = self.pod.json("link show").as_array().unwrap().iter().any(|link| link["ifname"] == "eth0");
        for key in all.into_iter().chain(of_link.into_iter().filter(|_| has_link)) {
            lines.push(format!("pod: {key} = {}", self.pod.read_sysctl(key)));
        }
        lines.push(format!("node: forwarding {}", self.node.read_sysctl("net/ipv4/conf/all/forwarding")));
        Snapshot { lines, files: self.files() }
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut dirs = vec![self.site.dir.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                if kind.is_dir() {
                    dirs.push(path);
                } else if kind.is_file() && !path.ends_with("cni.log") {
                    files.insert(path.display().to_string(), fs::read(&path).unwrap());
                }
            }
        }
        files
    }
}

/// Whether a line of a snapshot counts: rule 1410 is added where it is missing and stays for good, by design.
fn counts(line: &str) -> bool {
    !line.contains("\"priority\":1410")
}

impl Snapshot {
    /// Checks that nothing differs, and says what does.
    pub fn assert_same(&self, before: &Self) {
        let gone: Vec<&String> = before.lines.iter().filter(|line| !self.lines.contains(line)).collect();
        let new: Vec<&String> = self.lines.iter().filter(|line| !before.lines.contains(line)).collect();
        assert!(gone.is_empty() && new.is_empty(), "changed:\n- {gone:#?}\n+ {new:#?}");
        let names = |snapshot: &Self| snapshot.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(before), "files");
        for (name, content) in &self.files {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            assert_eq!(text(content), text(&before.files[name]), "{name}");
        }
    }
}

/// Sets a file's mode.
pub fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

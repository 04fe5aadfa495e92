//! A conflist runner that drives plugins as libcni 1.3.0 does, also where libcni departs from the specification.
//!
//! Not reproduced: libcni puts every result through its own types, so that it drops top-level keys it does not know.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::call::{self, Call, Reply};
use crate::netns::Netns;

/// The newest version that this runner, as libcni 1.3.0, speaks.
const NEWEST: &str = "1.1.0";

/// One container's interface in one network, as the runtime names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_NETNS; a runtime passes an empty one to a late DEL.
    pub netns_path: String,
    /// CNI_IFNAME.
    pub ifname: String,
}

impl Attachment {
    /// `ifname` of the container `container_id`, whose namespace is `netns`.
    pub fn new(container_id: &str, netns: &Netns, ifname: &str) -> Self {
        let netns_path = netns.path().to_str().expect("a UTF-8 path").to_owned();
        Self { container_id: container_id.to_owned(), netns_path, ifname: ifname.to_owned() }
    }

    /// The same attachment as it looks once the runtime has closed the namespace.
    pub fn without_netns(&self) -> Self {
        Self { netns_path: String::new(), ..self.clone() }
    }
}

/// What a GC says about the attachments that are still valid.
#[derive(Clone, Debug)]
pub enum GcArg {
    /// Nothing: neither key is there, as with `cnitool gc`.
    Missing,
    /// `null`, which is how libcni writes an empty list.
    Null,
    /// These, as (container ID, interface name).
    List(Vec<(String, String)>),
}

/// A plugin, or the runner itself, refused.
#[derive(Clone, Debug)]
pub struct CniFailure {
    /// `type` of the plugin; `runtime` if no plugin was asked.
    pub plugin: String,
    /// Its exit status.
    pub exit: Option<i32>,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr, or the runner's own words.
    pub stderr: String,
    /// Stdout, where it is JSON.
    pub error: Option<Value>,
}

impl CniFailure {
    /// `code` of the error object; `None` if there is none.
    pub fn code(&self) -> Option<u64> {
        self.error.as_ref()?.get("code")?.as_u64()
    }

    /// `msg` of the error object and then its `details`; without them stderr, as libcni does it.
    pub fn msg(&self) -> String {
        let part = |key| self.error.as_ref().and_then(|error| error.get(key)).and_then(Value::as_str);
        match (part("msg"), part("details")) {
            (Some(msg), Some(details)) => format!("{msg}; {details}"),
            (Some(msg), None) => msg.to_owned(),
            (None, _) => self.stderr.clone(),
        }
    }

    fn runtime(text: impl Into<String>) -> Self {
        let (plugin, stdout) = ("runtime".to_owned(), String::new());
        Self { plugin, exit: None, stdout, stderr: text.into(), error: None }
    }

    fn of(plugin: &str, reply: Reply) -> Self {
        let error = serde_json::from_str(&reply.stdout).ok();
        Self { plugin: plugin.to_owned(), exit: reply.exit, stdout: reply.stdout, stderr: reply.stderr, error }
    }
}

/// Runs the plugins of one network configuration list.
#[derive(Clone, Debug)]
pub struct Runner {
    conflist: Value,
    version: String,
    cni_path: Vec<PathBuf>,
    cache_dir: PathBuf,
    node: Option<PathBuf>,
    capabilities: Map<String, Value>,
    cni_args: String,
}

/// The variable part of one plugin's call.
struct Step<'a> {
    command: &'a str,
    attachment: Option<&'a Attachment>,
    cni_args: &'a str,
    capabilities: &'a Map<String, Value>,
    inject: Map<String, Value>,
}

impl Runner {
    /// A runner for `conflist`, whose version is the highest of its `cniVersion` and `cniVersions` up to 1.1.0.
    /// Results are cached in files under `cache_dir`.
    pub fn new(conflist: Value, cni_path: Vec<PathBuf>, cache_dir: PathBuf) -> Self {
        let version = negotiate(&conflist);
        let (node, capabilities, cni_args) = (None, Map::new(), String::new());
        Self { conflist, version, cni_path, cache_dir, node, capabilities, cni_args }
    }

    /// Runs the plugins inside `node`.
    #[must_use]
    pub fn on(mut self, node: &Netns) -> Self {
        self.node = Some(node.path().to_owned());
        self
    }

    /// What the runtime has for each capability, an object. A plugin sees those that its entry declares.
    ///
    /// # Panics
    /// When it is not an object.
    #[must_use]
    pub fn capabilities(mut self, args: Value) -> Self {
        self.capabilities = args.as_object().expect("an object of capability arguments").clone();
        self
    }

    /// CNI_ARGS, such as `IgnoreUnknown=1;K8S_POD_NAME=a`.
    #[must_use]
    pub fn cni_args(mut self, args: impl Into<String>) -> Self {
        self.cni_args = args.into();
        self
    }

    /// The negotiated version.
    pub fn cni_version(&self) -> &str {
        &self.version
    }

    /// ADD in list order. The last plugin's result is returned, and cached since all of them succeeded. After a failure
    /// a runtime calls DEL; this does not.
    ///
    /// # Errors
    /// The first plugin's failure.
    pub fn add(&self, attachment: &Attachment) -> Result<Value, CniFailure> {
        let mut result = None;
        for entry in self.plugins() {
            let step = self.step("ADD", attachment, result.as_ref());
            let reply = self.call(entry, &step)?;
            let mut value: Value = match serde_json::from_str(&reply.stdout) {
                Ok(value @ Value::Object(_)) => value,
                _ => return Err(CniFailure::of(&kind(entry), reply)),
            };
            if value["cniVersion"].as_str().unwrap_or_default().is_empty() {
                value["cniVersion"] = json!(self.version);
            }
            result = Some(value);
        }
        let result = result.ok_or_else(|| CniFailure::runtime("the list has no plugins"))?;
        self.remember(attachment, &result);
        Ok(result)
    }

    /// DEL in reverse order with the cached result, which is forgotten once all plugins succeeded.
    ///
    /// # Errors
    /// The first plugin's failure.
    pub fn del(&self, attachment: &Attachment) -> Result<(), CniFailure> {
        self.del_with(attachment, &self.cni_args, &self.capabilities)
    }

    /// CHECK in list order with the cached result. Does nothing where the list has `disableCheck`.
    ///
    /// # Errors
    /// The first plugin's failure, or the runner's where there is no CHECK below 0.4.0.
    pub fn check(&self, attachment: &Attachment) -> Result<(), CniFailure> {
        if self.older_than("0.4.0") {
            return Err(CniFailure::runtime(format!("configuration version {:?} has no CHECK", self.version)));
        }
        if self.flag("disableCheck") {
            return Ok(());
        }
        let cached = self.cached(attachment);
        for entry in self.plugins() {
            self.call(entry, &self.step("CHECK", attachment, cached.as_ref()))?;
        }
        Ok(())
    }

    /// GC: first a DEL of every cached attachment that is not valid, then, from 1.1.0 on, the GC command of every
    /// plugin. To reach a plugin's GC with an attachment that is not valid, [`Runner::forget`] it first.
    ///
    /// # Errors
    /// Every failure; one does not stop the rest.
    pub fn gc(&self, valid: &GcArg) -> Result<(), Vec<CniFailure>> {
        if self.flag("disableGC") {
            return Ok(());
        }
        let mut failures = self.del_stale(valid);
        if !self.older_than("1.1.0") {
            let mut inject = Map::new();
            if let Some(list) = valid.json() {
                inject.insert("cni.dev/valid-attachments".to_owned(), list.clone());
                // libcni #1101: the name before the specification was corrected.
                inject.insert("cni.dev/attachments".to_owned(), list);
            }
            let none = Map::new();
            let step = Step { command: "GC", attachment: None, cni_args: "", capabilities: &none, inject };
            failures.extend(self.plugins().iter().filter_map(|entry| self.call(entry, &step).err()));
        }
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    /// STATUS in list order; there is none below 1.1.0.
    ///
    /// # Errors
    /// The first plugin's failure.
    pub fn status(&self) -> Result<(), CniFailure> {
        if self.older_than("1.1.0") {
            return Ok(());
        }
        let none = Map::new();
        for entry in self.plugins() {
            let inject = Map::new();
            let step = Step { command: "STATUS", attachment: None, cni_args: "", capabilities: &none, inject };
            self.call(entry, &step)?;
        }
        Ok(())
    }

    /// VERSION of one plugin, with the dummy values that libcni gives for old plugins' sake.
    ///
    /// # Errors
    /// The plugin's failure.
    pub fn version(&self, plugin: &str) -> Result<Value, CniFailure> {
        let mut call = Call::new(self.find(plugin)?, "VERSION", &json!({ "cniVersion": NEWEST }));
        call.netns = "dummy".to_owned();
        call.ifname = "dummy".to_owned();
        call.path = "dummy".into();
        call.node.clone_from(&self.node);
        let reply = finish(plugin, &call)?;
        serde_json::from_str(&reply.stdout).map_err(|_| CniFailure::of(plugin, reply))
    }

    /// The result that DEL and CHECK will be given.
    pub fn cached(&self, attachment: &Attachment) -> Option<Value> {
        read_cache(&self.cache_file(attachment)).map(|cache| cache["result"].clone())
    }

    /// Forgets the cached result, as when a node has lost its cache.
    pub fn forget(&self, attachment: &Attachment) {
        // There need not be one.
        let _ignored = fs::remove_file(self.cache_file(attachment));
    }

    fn del_with(&self, attachment: &Attachment, cni_args: &str, caps: &Map<String, Value>) -> Result<(), CniFailure> {
        let cached = if self.older_than("0.4.0") { None } else { self.cached(attachment) };
        for entry in self.plugins().iter().rev() {
            let step = Step { cni_args, capabilities: caps, ..self.step("DEL", attachment, cached.as_ref()) };
            self.call(entry, &step)?;
        }
        self.forget(attachment);
        Ok(())
    }

    fn del_stale(&self, valid: &GcArg) -> Vec<CniFailure> {
        let mut failures = Vec::new();
        for cache in self.caches() {
            let text = |key: &str| cache[key].as_str().unwrap_or_default().to_owned();
            let (container_id, netns_path, ifname) = (text("containerId"), text("netns"), text("ifName"));
            let attachment = Attachment { container_id, netns_path, ifname };
            if text("networkName") != self.name() || valid.has(&attachment) {
                continue;
            }
            let caps = cache["capabilityArgs"].as_object().cloned().unwrap_or_default();
            failures.extend(self.del_with(&attachment, &text("cniArgs"), &caps).err());
        }
        failures
    }

    fn step<'a>(&'a self, command: &'a str, attachment: &'a Attachment, prev: Option<&Value>) -> Step<'a> {
        let inject = prev.map(|result| ("prevResult".to_owned(), result.clone())).into_iter().collect();
        let attachment = Some(attachment);
        Step { command, attachment, cni_args: &self.cni_args, capabilities: &self.capabilities, inject }
    }

    /// Calls one plugin with its entry and what the runtime adds to it.
    fn call(&self, entry: &Value, step: &Step<'_>) -> Result<Reply, CniFailure> {
        let plugin = kind(entry);
        let mut call = Call::new(self.find(&plugin)?, step.command, &self.stdin(entry, step));
        if let Some(attachment) = step.attachment {
            call.container_id.clone_from(&attachment.container_id);
            call.netns.clone_from(&attachment.netns_path);
            call.ifname.clone_from(&attachment.ifname);
            step.cni_args.clone_into(&mut call.args);
        }
        call.path = call::join_path(&self.cni_path);
        call.node.clone_from(&self.node);
        finish(&plugin, &call)
    }

    fn stdin(&self, entry: &Value, step: &Step<'_>) -> Value {
        let mut config = entry.as_object().expect("a plugin's entry is an object").clone();
        config.insert("name".to_owned(), json!(self.name()));
        config.insert("cniVersion".to_owned(), json!(self.version));
        config.extend(step.inject.clone());
        let declared = entry["capabilities"].as_object().cloned().unwrap_or_default();
        let known = step.capabilities.iter().filter(|(key, _)| declared.get(*key) == Some(&Value::Bool(true)));
        let runtime: Map<_, _> = known.map(|(key, value)| (key.clone(), value.clone())).collect();
        if !runtime.is_empty() {
            config.insert("runtimeConfig".to_owned(), Value::Object(runtime));
        }
        Value::Object(config)
    }

    fn find(&self, plugin: &str) -> Result<PathBuf, CniFailure> {
        call::find(plugin, &self.cni_path)
            .ok_or_else(|| CniFailure::runtime(format!("failed to find plugin {plugin:?} in path {:?}", self.cni_path)))
    }

    fn remember(&self, attachment: &Attachment, result: &Value) {
        let file = self.cache_file(attachment);
        let cache = json!({
            "kind": "cniCacheV1",
            "containerId": attachment.container_id,
            "ifName": attachment.ifname,
            "networkName": self.name(),
            "netns": attachment.netns_path,
            "cniArgs": self.cni_args,
            "capabilityArgs": self.capabilities,
            "config": self.conflist,
            "result": result,
        });
        fs::create_dir_all(self.results()).expect("make the cache directory");
        fs::write(&file, cache.to_string()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }

    fn caches(&self) -> Vec<Value> {
        let Ok(entries) = fs::read_dir(self.results()) else { return Vec::new() };
        let mut files: Vec<_> = entries.map(|entry| entry.expect("read the cache directory").path()).collect();
        files.sort();
        files.iter().filter_map(|file| read_cache(file)).collect()
    }

    fn results(&self) -> PathBuf {
        self.cache_dir.join("results")
    }

    fn cache_file(&self, attachment: &Attachment) -> PathBuf {
        self.results().join(format!("{}-{}-{}", self.name(), attachment.container_id, attachment.ifname))
    }

    fn name(&self) -> &str {
        self.conflist["name"].as_str().expect("the list has a name")
    }

    fn plugins(&self) -> &[Value] {
        self.conflist["plugins"].as_array().expect("the list has plugins")
    }

    /// `disableCheck` and `disableGC` may be a boolean or, in lists written for old versions, a string.
    fn flag(&self, key: &str) -> bool {
        match &self.conflist[key] {
            Value::Bool(value) => *value,
            Value::String(text) => text.eq_ignore_ascii_case("true"),
            _ => false,
        }
    }

    fn older_than(&self, version: &str) -> bool {
        parse(&self.version) < parse(version)
    }
}

impl GcArg {
    fn json(&self) -> Option<Value> {
        match self {
            Self::Missing => None,
            Self::Null => Some(Value::Null),
            Self::List(list) => {
                Some(list.iter().map(|(id, ifname)| json!({ "containerID": id, "ifname": ifname })).collect())
            }
        }
    }

    fn has(&self, attachment: &Attachment) -> bool {
        let Self::List(list) = self else { return false };
        list.iter().any(|(id, ifname)| *id == attachment.container_id && *ifname == attachment.ifname)
    }
}

/// The addresses in a result, without prefix lengths and in its order.
///
/// # Panics
/// When one is not an address.
pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text =
        ips.iter().map(|ip| ip["address"].as_str().expect("ips[].address").split('/').next().unwrap_or_default());
    text.map(|ip| ip.parse().unwrap_or_else(|error| panic!("ips[].address {ip:?}: {error}"))).collect()
}

fn finish(plugin: &str, call: &Call) -> Result<Reply, CniFailure> {
    let reply = call.run().map_err(|error| CniFailure {
        plugin: plugin.to_owned(),
        ..CniFailure::runtime(format!("{}: {error}", call.bin.display()))
    })?;
    if reply.ok() { Ok(reply) } else { Err(CniFailure::of(plugin, reply)) }
}

fn kind(entry: &Value) -> String {
    entry["type"].as_str().expect("a plugin's entry has a type").to_owned()
}

fn read_cache(file: &Path) -> Option<Value> {
    let text = fs::read_to_string(file).ok()?;
    Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
}

/// The highest version in the list that is not above [`NEWEST`]; 0.1.0 if it names none.
fn negotiate(conflist: &Value) -> String {
    let more = conflist["cniVersions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let named = std::iter::once(&conflist["cniVersion"]).chain(more).filter_map(Value::as_str);
    let usable = named.filter(|version| parse(version) <= parse(NEWEST));
    usable.max_by_key(|version| parse(version)).unwrap_or("0.1.0").to_owned()
}

fn parse(version: &str) -> Vec<u32> {
    version.split('.').map(|part| part.parse().unwrap_or(0)).collect()
}

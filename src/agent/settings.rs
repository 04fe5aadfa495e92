//! Settings: one file, environment and flags, in rising order of precedence, validated as a whole.
//!
//! A setting has one name in three spellings: key `cniMode` of the file, variable `CROSSLINK_CNI_MODE`, flag `--cni-mode`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use crosslink_core::{cidr, netconf::OUR_KEYS};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Every setting as it may be given, in the file or by flag and environment; nothing is required.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Given {
    /// API server: "in-cluster" (default), a kubeconfig file, or "none" to work without Kubernetes
    #[arg(long, env = "CROSSLINK_KUBECONFIG", global = true)]
    pub kubeconfig: Option<String>,
    /// Name of this node's Node object [default: NODE_NAME, else the host name]
    #[arg(long, env = "CROSSLINK_NODE_NAME", global = true)]
    pub node_name: Option<String>,
    /// Name of this cluster, which is never remote [default: what Submariner says, else unknown]
    #[arg(long, env = "CROSSLINK_CLUSTER_NAME", global = true)]
    pub cluster_name: Option<String>,
    /// Directories of the CNI: auto, kubeadm, kind, eks, aks, rke2, k0s, k3s, k3d, microk8s, minikube, gke, openshift, talos, bottlerocket
    #[arg(long, env = "CROSSLINK_PLATFORM", global = true)]
    pub platform: Option<String>,
    /// How the plugin gets into the chain: auto, dropin, insert, none
    #[arg(long, env = "CROSSLINK_CNI_MODE", global = true)]
    pub cni_mode: Option<String>,
    /// Directory of conflists [default: the platform's]
    #[arg(long, env = "CROSSLINK_CNI_CONF_DIR", global = true)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Directory of CNI plugins [default: the platform's]
    #[arg(long, env = "CROSSLINK_CNI_BIN_DIR", global = true)]
    pub cni_bin_dir: Option<PathBuf>,
    /// The main CNI's conflist by file name [default: the first that is valid, as the runtime does]
    #[arg(long, env = "CROSSLINK_CNI_CONF_NAME", global = true)]
    pub cni_conf_name: Option<String>,
    /// Plugin types that must come before crosslink in the chain
    #[arg(long, env = "CROSSLINK_CNI_INSERT_AFTER", global = true, value_delimiter = ',')]
    pub cni_insert_after: Option<Vec<String>>,
    /// Plugin types that must come after crosslink in the chain
    #[arg(long, env = "CROSSLINK_CNI_INSERT_BEFORE", global = true, value_delimiter = ',')]
    pub cni_insert_before: Option<Vec<String>>,
    /// Turn a single-plugin .conf of the main CNI into a .conflist
    #[arg(long, env = "CROSSLINK_CNI_CONVERT_CONF", global = true, num_args = 0..=1, default_missing_value = "true")]
    pub cni_convert_conf: Option<bool>,
    /// More keys of the conflist entry, as a JSON object
    #[arg(long, env = "CROSSLINK_CNI_ENTRY", global = true, value_parser = object)]
    pub cni_entry: Option<Map<String, Value>>,
    /// Plugin to install [default: "crosslink" beside the agent's own executable]
    #[arg(long, env = "CROSSLINK_PLUGIN", global = true)]
    pub plugin: Option<PathBuf>,
    /// Container runtime, as in Node.status.nodeInfo.containerRuntimeVersion [default: the Node's]
    #[arg(long, env = "CROSSLINK_CONTAINER_RUNTIME", global = true)]
    pub container_runtime: Option<String>,
    /// Directory of what survives a reboot: remotes/, node.json, install.json, lock
    #[arg(long, env = "CROSSLINK_LIB_DIR", global = true)]
    pub lib_dir: Option<PathBuf>,
    /// Directory of what does not: attachments/, agent.sock
    #[arg(long, env = "CROSSLINK_RUN_DIR", global = true)]
    pub run_dir: Option<PathBuf>,
    /// Where the runtime mounts network namespaces
    #[arg(long, env = "CROSSLINK_NETNS_DIR", global = true)]
    pub netns_dir: Option<PathBuf>,
    /// Sources of remote CIDRs: static, cluster, submariner, kosmos, calico, kernel
    #[arg(long, env = "CROSSLINK_SOURCES", global = true, value_delimiter = ',')]
    pub sources: Option<Vec<String>>,
    /// Directory of the source "static", for instance a mounted ConfigMap
    #[arg(long, env = "CROSSLINK_STATIC_DIR", global = true)]
    pub static_dir: Option<PathBuf>,
    /// Namespace of Submariner's objects [default: found]
    #[arg(long, env = "CROSSLINK_SUBMARINER_NAMESPACE", global = true)]
    pub submariner_namespace: Option<String>,
    /// Kubeconfig of Kosmos' control cluster [default: this cluster]
    #[arg(long, env = "CROSSLINK_KOSMOS_KUBECONFIG", global = true)]
    pub kosmos_kubeconfig: Option<PathBuf>,
    /// Protocols of kernel routes that the source "kernel" takes for remote
    #[arg(long, env = "CROSSLINK_KERNEL_PROTOCOLS", global = true, value_delimiter = ',')]
    pub kernel_protocols: Option<Vec<u8>>,
    /// How long a list that suddenly became empty is held, in seconds
    #[arg(long, env = "CROSSLINK_EMPTY_HOLD_SECONDS", global = true)]
    pub empty_hold_seconds: Option<u64>,
    /// This cluster's pod CIDRs [default: found]
    #[arg(long = "pod-cidrs", env = "CROSSLINK_POD_CIDRS", global = true, value_delimiter = ',')]
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
    /// This cluster's service CIDRs [default: found]
    #[arg(long = "service-cidrs", env = "CROSSLINK_SERVICE_CIDRS", global = true, value_delimiter = ',')]
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Option<Vec<String>>,
    /// Networks of this cluster's nodes, which are never remote
    #[arg(long = "node-cidrs", env = "CROSSLINK_NODE_CIDRS", global = true, value_delimiter = ',')]
    #[serde(rename = "nodeCIDRs")]
    pub node_cidrs: Option<Vec<String>>,
    /// Bring changes to running pods: on, off
    #[arg(long, env = "CROSSLINK_RESYNC", global = true)]
    pub resync: Option<String>,
    /// Look for drift that no notification tells of, every so many seconds
    #[arg(long, env = "CROSSLINK_RESYNC_INTERVAL_SECONDS", global = true)]
    pub resync_interval_seconds: Option<u64>,
    /// Rules that keep kube-proxy from dropping half-seen connections of underlay pods: on, off
    #[arg(long, env = "CROSSLINK_NOTRACK", global = true)]
    pub notrack: Option<String>,
    /// Keep pods' source addresses between clusters: auto, on, off
    #[arg(long, env = "CROSSLINK_PRESERVE_SOURCE", global = true)]
    pub preserve_source: Option<String>,
    /// Set host sysctls that underlay traffic needs: on, off
    #[arg(long, env = "CROSSLINK_HOST_SYSCTLS", global = true)]
    pub host_sysctls: Option<String>,
    /// Address of /livez, /readyz and /metrics
    #[arg(long, env = "CROSSLINK_HTTP_ADDRESS", global = true)]
    pub http_address: Option<String>,
    /// Log format: plain, json
    #[arg(long, env = "CROSSLINK_LOG_FORMAT", global = true)]
    pub log_format: Option<String>,
    /// Log level, or a filter such as "info,kube=debug"
    #[arg(long, env = "CROSSLINK_LOG_LEVEL", global = true)]
    pub log_level: Option<String>,
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|err| format!("not a JSON object: {err}"))
}

/// Where the API server is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kubeconfig {
    /// The pod's service account.
    InCluster,
    /// Nowhere: installer, static and kernel sources and resync work alone.
    None,
    /// A file.
    File(PathBuf),
}

/// How the plugin gets into the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CniMode {
    /// The best that the runtime can do.
    Auto,
    /// `<confdir>/<network>/90-crosslink.conf`.
    Dropin,
    /// Into the main CNI's conflist.
    Insert,
    /// Not at all; somebody else does it.
    None,
}

/// A setting with three values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Toggle {
    /// Where it is needed.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// A kind of source of remote CIDRs; the name is that of its remotes file and of `source` in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// A directory of files.
    Static,
    /// Our own `Cluster` objects.
    Cluster,
    /// Submariner's `Endpoint` and `Cluster`.
    Submariner,
    /// Kosmos' `Cluster`.
    Kosmos,
    /// Calico's disabled pools.
    Calico,
    /// Routes that a BGP speaker put into the kernel.
    Kernel,
}

impl SourceKind {
    /// All of them, by precedence.
    pub const ALL: [Self; 6] =
        [Self::Static, Self::Cluster, Self::Submariner, Self::Kosmos, Self::Calico, Self::Kernel];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Cluster => "cluster",
            Self::Submariner => "submariner",
            Self::Kosmos => "kosmos",
            Self::Calico => "calico",
            Self::Kernel => "kernel",
        }
    }

    /// Whether it needs an API server.
    pub const fn needs_kubernetes(self) -> bool {
        !matches!(self, Self::Static | Self::Kernel)
    }
}

/// Log format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Plain,
    /// One JSON object a line.
    Json,
}

/// Effective settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// See [`Given::kubeconfig`], and so on.
    pub kubeconfig: Kubeconfig,
    /// Name of the Node object.
    pub node_name: String,
    /// This cluster's name, where it was given.
    pub cluster_name: Option<String>,
    /// As given; `auto` where not. The installer knows the names.
    pub platform: String,
    /// Mode of the installer.
    pub cni_mode: CniMode,
    /// Directory of conflists, where it was given.
    pub cni_conf_dir: Option<PathBuf>,
    /// Directory of plugins, where it was given.
    pub cni_bin_dir: Option<PathBuf>,
    /// Pinned conflist.
    pub cni_conf_name: Option<String>,
    /// Plugin types before ours.
    pub cni_insert_after: Vec<String>,
    /// Plugin types after ours.
    pub cni_insert_before: Vec<String>,
    /// Whether a `.conf` may become a `.conflist`.
    pub cni_convert_conf: bool,
    /// Keys of the entry besides `type` and `capabilities`.
    pub cni_entry: Map<String, Value>,
    /// Plugin to install.
    pub plugin: PathBuf,
    /// Container runtime, where it was given.
    pub container_runtime: Option<String>,
    /// What survives a reboot.
    pub lib_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    /// Where sandboxes are mounted.
    pub netns_dir: PathBuf,
    /// Sources in use.
    pub sources: Vec<SourceKind>,
    /// Directory of the static source.
    pub static_dir: Option<PathBuf>,
    /// Submariner's namespace, where it was given.
    pub submariner_namespace: Option<String>,
    /// Kosmos' control cluster, where it is another.
    pub kosmos_kubeconfig: Option<PathBuf>,
    /// Protocols of remote routes.
    pub kernel_protocols: Vec<u8>,
    /// Grace period of empty lists.
    pub empty_hold_seconds: u64,
    /// Given local pod CIDRs.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNet>,
    /// Given local service CIDRs.
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Vec<IpNet>,
    /// Given node CIDRs.
    #[serde(rename = "nodeCIDRs")]
    pub node_cidrs: Vec<IpNet>,
    /// Whether running pods follow.
    pub resync: bool,
    /// Period of the search for drift.
    pub resync_interval_seconds: u64,
    /// Whether half-seen connections are kept from being dropped.
    pub notrack: bool,
    /// Whether sources are kept.
    pub preserve_source: Toggle,
    /// Whether host sysctls may be set.
    pub host_sysctls: bool,
    /// Probes and metrics.
    pub http_address: SocketAddr,
    /// Log format.
    pub log_format: LogFormat,
    /// Log filter.
    pub log_level: String,
}

impl Settings {
    /// `remotes/`.
    pub fn remotes_dir(&self) -> PathBuf {
        self.lib_dir.join("remotes")
    }

    /// `node.json`.
    pub fn node_file(&self) -> PathBuf {
        self.lib_dir.join("node.json")
    }

    /// Records.
    pub fn state_dir(&self) -> PathBuf {
        self.run_dir.join("attachments")
    }

    /// The unix socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Grace period of empty lists.
    pub const fn empty_hold(&self) -> Duration {
        Duration::from_secs(self.empty_hold_seconds)
    }

    /// Whether there is an API server.
    pub fn kubernetes(&self) -> bool {
        self.kubeconfig != Kubeconfig::None
    }

    /// Merges a settings file's text with what flags and environment gave, and validates all of it.
    ///
    /// # Errors
    /// Every fault, each naming setting, value and cure.
    pub fn new(file: Option<(&Path, &str)>, flags: &Given, host: &Host) -> Result<Self, String> {
        let mut merged = match file {
            Some((path, text)) => from_file(text).map_err(|why| format!("{}: {why}", path.display()))?,
            None => Map::new(),
        };
        for (key, value) in to_map(flags)? {
            merged.insert(key, value);
        }
        let given: Given = serde_json::from_value(Value::Object(merged)).map_err(|err| err.to_string())?;
        Validation::default().run(given, host)
    }
}

/// What defaults depend on.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// `NODE_NAME`.
    pub node_name: Option<String>,
    /// The host's name.
    pub host_name: String,
    /// The agent's own executable.
    pub executable: PathBuf,
}

fn from_file(text: &str) -> Result<Map<String, Value>, String> {
    let given: Option<Given> = serde_saphyr::from_str(text).map_err(|err| err.to_string())?;
    to_map(&given.unwrap_or_default())
}

fn to_map(given: &Given) -> Result<Map<String, Value>, String> {
    match serde_json::to_value(given).map_err(|err| err.to_string())? {
        Value::Object(map) => Ok(map.into_iter().filter(|(_, value)| !value.is_null()).collect()),
        _ => Ok(Map::new()),
    }
}

/// Gathers every fault instead of stopping at the first.
#[derive(Default)]
struct Validation {
    faults: Vec<String>,
}

impl Validation {
    fn run(mut self, given: Given, host: &Host) -> Result<Settings, String> {
        let kubeconfig = match given.kubeconfig.as_deref() {
            None | Some("" | "in-cluster") => Kubeconfig::InCluster,
            Some("none") => Kubeconfig::None,
            Some(path) => Kubeconfig::File(path.into()),
        };
        let default = |path: &str| PathBuf::from(path);
        let settings = Settings {
            node_name: given.node_name.or_else(|| host.node_name.clone()).unwrap_or_else(|| host.host_name.clone()),
            cluster_name: given.cluster_name.filter(|name| !name.is_empty()),
            platform: given.platform.unwrap_or_else(|| "auto".to_owned()),
            cni_mode: self.choice("cniMode", given.cni_mode, CniMode::Auto, "auto, dropin, insert, none"),
            cni_conf_dir: given.cni_conf_dir,
            cni_bin_dir: given.cni_bin_dir,
            cni_conf_name: given.cni_conf_name.filter(|name| !name.is_empty()),
            cni_insert_after: given.cni_insert_after.unwrap_or_default(),
            cni_insert_before: given.cni_insert_before.unwrap_or_default(),
            cni_convert_conf: given.cni_convert_conf.unwrap_or(false),
            cni_entry: given.cni_entry.unwrap_or_default(),
            plugin: given.plugin.unwrap_or_else(|| host.executable.with_file_name("crosslink")),
            container_runtime: given.container_runtime.filter(|text| !text.is_empty()),
            lib_dir: given.lib_dir.unwrap_or_else(|| default("/var/lib/crosslink")),
            run_dir: given.run_dir.unwrap_or_else(|| default("/run/crosslink")),
            netns_dir: given.netns_dir.unwrap_or_else(|| default("/run/netns")),
            sources: self.sources(given.sources, &kubeconfig),
            static_dir: given.static_dir,
            submariner_namespace: given.submariner_namespace.filter(|text| !text.is_empty()),
            kosmos_kubeconfig: given.kosmos_kubeconfig,
            kernel_protocols: given.kernel_protocols.unwrap_or_else(|| vec![12, 80, 186]),
            empty_hold_seconds: given.empty_hold_seconds.unwrap_or(60),
            pod_cidrs: self.cidrs("podCIDRs", given.pod_cidrs),
            service_cidrs: self.cidrs("serviceCIDRs", given.service_cidrs),
            node_cidrs: self.cidrs("nodeCIDRs", given.node_cidrs),
            resync: self.toggle("resync", given.resync, true),
            resync_interval_seconds: given.resync_interval_seconds.unwrap_or(300),
            notrack: self.toggle("notrack", given.notrack, true),
            preserve_source: self.choice("preserveSource", given.preserve_source, Toggle::Auto, "auto, on, off"),
            host_sysctls: self.toggle("hostSysctls", given.host_sysctls, false),
            http_address: self.address(given.http_address),
            log_format: match given.log_format.as_deref() {
                None | Some("plain") => LogFormat::Plain,
                Some("json") => LogFormat::Json,
                Some(other) => self.fault("logFormat", other, "use plain or json", LogFormat::Plain),
            },
            log_level: given.log_level.unwrap_or_else(|| "info".to_owned()),
            kubeconfig,
        };
        self.cross_check(&settings);
        if self.faults.is_empty() { Ok(settings) } else { Err(self.faults.join("\n")) }
    }

    fn fault<T>(&mut self, key: &str, value: &str, cure: &str, instead: T) -> T {
        self.faults.push(format!("{key} {}: {cure}", crosslink_core::error::quoted(value)));
        instead
    }

    fn choice<T: serde::de::DeserializeOwned>(&mut self, key: &str, given: Option<String>, default: T, all: &str) -> T {
        let Some(text) = given else { return default };
        match serde_json::from_value(Value::String(text.clone())) {
            Ok(value) => value,
            Err(_) => self.fault(key, &text, &format!("use one of {all}"), default),
        }
    }

    fn toggle(&mut self, key: &str, given: Option<String>, default: bool) -> bool {
        match given.as_deref() {
            None => default,
            Some("on" | "true") => true,
            Some("off" | "false") => false,
            Some(other) => self.fault(key, other, "use on or off", default),
        }
    }

    fn cidrs(&mut self, key: &str, given: Option<Vec<String>>) -> Vec<IpNet> {
        let texts = given.unwrap_or_default();
        let mut nets = Vec::new();
        for text in texts.iter().filter(|text| !text.is_empty()) {
            match cidr::parse(text) {
                Ok(net) => nets.push(net),
                Err(err) => self.faults.push(format!("{key}: {err}")),
            }
        }
        nets
    }

    fn sources(&mut self, given: Option<Vec<String>>, kubeconfig: &Kubeconfig) -> Vec<SourceKind> {
        let without_kubernetes = *kubeconfig == Kubeconfig::None;
        let Some(names) = given else {
            let usual = [
                SourceKind::Static,
                SourceKind::Cluster,
                SourceKind::Submariner,
                SourceKind::Kosmos,
                SourceKind::Calico,
            ];
            return usual.into_iter().filter(|kind| !(without_kubernetes && kind.needs_kubernetes())).collect();
        };
        let mut kinds = Vec::new();
        for name in names.iter().filter(|name| !name.is_empty()) {
            match SourceKind::ALL.into_iter().find(|kind| kind.name() == name) {
                Some(kind) if without_kubernetes && kind.needs_kubernetes() => {
                    self.fault("sources", name, "it needs an API server, and kubeconfig is none; remove it", ());
                }
                Some(kind) => kinds.push(kind),
                None => self.fault("sources", name, "use static, cluster, submariner, kosmos, calico, kernel", ()),
            }
        }
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }

    fn address(&mut self, given: Option<String>) -> SocketAddr {
        let default = SocketAddr::from(([127, 0, 0, 1], 9810));
        let Some(text) = given else { return default };
        match text.parse() {
            Ok(address) => address,
            Err(_) => self.fault("httpAddress", &text, "give an address and a port, as 127.0.0.1:9810", default),
        }
    }

    fn cross_check(&mut self, settings: &Settings) {
        for key in settings.cni_entry.keys() {
            if key == "type" || key == "capabilities" || !OUR_KEYS.contains(&key.as_str()) {
                self.fault("cniEntry", key, "it is not a key of the entry that can be set here", ());
            }
        }
        for (key, path) in [("libDir", &settings.lib_dir), ("runDir", &settings.run_dir)] {
            if !path.is_absolute() {
                self.fault(key, &path.to_string_lossy(), "give an absolute path", ());
            }
        }
        if settings.kubernetes() && settings.node_name.is_empty() {
            self.faults.push("nodeName is empty: set NODE_NAME from spec.nodeName".to_owned());
        }
        if let Some(name) = &settings.cluster_name
            && !crosslink_core::select::valid_cluster(name)
        {
            self.fault("clusterName", name, "it is not an RFC 1123 label; rename it", ());
        }
        if settings.resync_interval_seconds == 0 {
            self.faults.push("resyncIntervalSeconds 0: give at least 1".to_owned());
        }
    }
}

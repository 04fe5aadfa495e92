//! The record of an attachment: what ADD did and wants, enough to CHECK, DEL and resync.

use std::{collections::BTreeSet, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    destinations::Inputs,
    error::Error,
    facts::Attached,
    finding::Finding,
    json::Object,
    model::Sysctl,
    netconf::{Mode, NetConf, ReplyPath, valid_identifier, valid_ifname},
    request::{NamedCidr, PodRequest},
    result::ResultIp,
    select::Selection,
    wanted::Wanted,
};

/// Version of the records that we write. One older and one newer are read too.
pub const VERSION: u64 = 1;

/// Most findings that a record keeps: a thousand clusters may each raise one.
const FINDINGS_LIMIT: usize = 64;

/// Identity of a network namespace. Inode numbers are reused at once; the cookie never is (until a reboot).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    /// Path by which the runtime named it.
    pub path: PathBuf,
    /// Device of the nsfs inode.
    pub dev: u64,
    /// Inode.
    pub inode: u64,
    /// `SO_NETNS_COOKIE` (Linux 5.14 on).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<u64>,
}

impl NetnsId {
    /// Whether both are one namespace, whatever path led there. Without cookies (before Linux 5.14) the path must be the
    /// same too, since inodes alone would take a new sandbox for an old one.
    pub fn same(&self, other: &Self) -> bool {
        match (self.cookie, other.cookie) {
            (Some(one), Some(two)) => one == two,
            _ => (self.dev, self.inode, &self.path) == (other.dev, other.inode, &other.path),
        }
    }
}

/// How far ADD came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Written before the first change.
    Adding,
    /// Everything was applied.
    Ready,
}

/// The pod, from `CNI_ARGS`; empty where the runtime does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `K8S_POD_NAMESPACE`.
    #[serde(default)]
    pub namespace: String,
    /// `K8S_POD_NAME`.
    #[serde(default)]
    pub name: String,
    /// `K8S_POD_UID`.
    #[serde(default)]
    pub uid: String,
}

/// What was asked for: enough to plan anew when remotes change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wishes {
    /// Clusters in force.
    pub hijack: Selection,
    /// The administrator's CIDRs.
    #[serde(default, rename = "hijackCIDR")]
    pub hijack_cidr: Vec<IpNet>,
    /// The pod author's CIDRs, with where each was named.
    #[serde(default, rename = "podCIDRs")]
    pub pod_cidrs: Vec<(IpNet, String)>,
    /// Excludes of both.
    #[serde(default, rename = "excludeCIDR")]
    pub exclude_cidr: Vec<IpNet>,
    /// Ranges open to annotations.
    #[serde(default, rename = "annotationCIDRs")]
    pub annotation_cidrs: Vec<IpNet>,
    /// Configured mode.
    #[serde(default)]
    pub mode: Mode,
    /// How replies leave.
    #[serde(default)]
    pub reply_path: ReplyPath,
    /// Name of the veth in the pod.
    pub veth_name: String,
    /// Its configured MTU.
    #[serde(default, rename = "vethMTU")]
    pub veth_mtu: u32,
    /// Directory of remotes files.
    pub remotes_dir: PathBuf,
    /// `node.json`.
    pub node_file: PathBuf,
    /// Addresses and gateways of the result, for the next hop.
    #[serde(default)]
    pub ips: Vec<(std::net::IpAddr, Option<std::net::IpAddr>)>,
}

impl Wishes {
    /// Gathers what was asked for.
    pub fn of(inputs: Inputs<'_>, ips: &[ResultIp]) -> Self {
        let Inputs { conf, request, .. } = inputs;
        Self {
            hijack: inputs.selection().clone(),
            hijack_cidr: conf.hijack_cidr.clone(),
            pod_cidrs: request.hijack_cidr.iter().map(|named| (named.net, named.place.clone())).collect(),
            exclude_cidr: conf.exclude_cidr.iter().chain(&request.exclude_cidr).copied().collect(),
            annotation_cidrs: conf.annotation_cidrs.clone(),
            mode: conf.mode,
            reply_path: conf.reply_path,
            veth_name: conf.veth_name.clone(),
            veth_mtu: conf.veth_mtu,
            remotes_dir: conf.remotes_dir.clone(),
            node_file: conf.node_file.clone(),
            ips: ips.iter().map(|ip| (ip.addr, ip.gateway)).collect(),
        }
    }

    /// The inputs from which the same destinations follow.
    pub fn inputs(&self) -> (NetConf, PodRequest) {
        let conf = NetConf {
            hijack: self.hijack.clone(),
            hijack_cidr: self.hijack_cidr.clone(),
            exclude_cidr: self.exclude_cidr.clone(),
            annotation_cidrs: self.annotation_cidrs.clone(),
            mode: self.mode,
            reply_path: self.reply_path,
            veth_name: self.veth_name.clone(),
            veth_mtu: self.veth_mtu,
            remotes_dir: self.remotes_dir.clone(),
            node_file: self.node_file.clone(),
            ..NetConf::default()
        };
        let named = |(net, place): &(IpNet, String)| NamedCidr { net: *net, place: place.clone() };
        let hijack_cidr = self.pod_cidrs.iter().map(named).collect();
        (conf, PodRequest { hijack: None, hijack_cidr, exclude_cidr: Vec::new() })
    }
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Format version.
    pub version: u64,
    /// How far ADD came.
    pub state: State,
    /// Container ID.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Interface name.
    pub ifname: String,
    /// Network name.
    pub network: String,
    /// The sandbox.
    pub netns: NetnsId,
    /// The pod.
    #[serde(default)]
    pub pod: Pod,
    /// How the interface is attached.
    pub attached: Attached,
    /// What was asked for.
    pub wishes: Wishes,
    /// What was applied, by ADD or by the last resync (`state: adding`: what was about to be).
    pub applied: Wanted,
    /// Values that DEL puts back.
    #[serde(default)]
    pub saved: Vec<Sysctl>,
    /// What was noticed.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// Fields of a newer version, kept.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Record {
    /// Keeps as many findings as are worth keeping.
    pub fn set_findings(&mut self, findings: &[Finding]) {
        self.findings = findings.iter().take(FINDINGS_LIMIT).cloned().collect();
    }

    /// Destinations that this record's attachment holds in its sandbox.
    pub fn claims(&self) -> BTreeSet<IpNet> {
        self.applied.pod_routes.iter().map(|wanted| wanted.route.dst).collect()
    }
}

/// File name of an attachment's record.
pub fn file_name(container_id: &str, ifname: &str) -> String {
    format!("{container_id}:{ifname}.json")
}

/// The attachment that a record's file name names.
pub fn parse_file_name(name: &str) -> Option<(&str, &str)> {
    // Neither part can hold a ":": the name rules of both forbid it.
    let (container_id, ifname) = name.strip_suffix(".json")?.split_once(':')?;
    (valid_identifier(container_id) && valid_ifname(ifname)).then_some((container_id, ifname))
}

/// Parses a record. What a version added is ignored and kept at the top level; `version` is the caller's to judge.
///
/// # Errors
/// A sentence for a finding.
pub fn parse(text: &str) -> Result<Record, Error> {
    serde_json::from_str(text).map(|Object(record)| record).map_err(|err| Error::config(err.to_string()))
}

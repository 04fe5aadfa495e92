//! Nodes: those of remote clusters, and what each node of this cluster applied.
#![expect(clippy::duplicated_attributes, reason = "the lint takes keys of different columns for each other's")]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::shared::cidrs;

/// A node of a remote cluster, where crosslink carries the traffic.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crosslink.dev",
    version = "v1alpha1",
    kind = "ClusterNode",
    plural = "clusternodes",
    singular = "clusternode",
    shortname = "xln",
    category = "crosslink",
    status = "ClusterNodeStatus",
    derive = "PartialEq",
    doc = "A node of a remote cluster, where crosslink carries the traffic.",
    printcolumn(name = "ROLES", type_ = "string", json_path = ".spec.roles"),
    printcolumn(name = "INTERFACE", type_ = "string", json_path = ".spec.interfaceName"),
    printcolumn(name = "IP", type_ = "string", json_path = ".spec.ip"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.ip) || has(self.ip6)").message("give ip, ip6, or both"),
    validation = Rule::new("!has(self.externalPort) || has(self.externalIP)").message("externalPort needs externalIP")
)]
pub struct ClusterNodeSpec {
    /// Name of its cluster.
    #[schemars(length(min = 1, max = 63))]
    pub cluster_name: String,
    /// Name of the node in its cluster.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// What the node is there for besides its own pods.
    #[serde(default)]
    #[schemars(length(max = 4))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub roles: Vec<NodeRole>,
    /// Interface that the traffic leaves by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 15))]
    pub interface_name: Option<String>,
    /// IPv4 address on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    #[x_kube(validation = Rule::new("isIP(self) && ip(self).family() == 4").message("not an IPv4 address"))]
    pub ip: Option<String>,
    /// IPv6 address on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 39))]
    #[x_kube(validation = Rule::new("isIP(self) && ip(self).family() == 6").message("not an IPv6 address"))]
    pub ip6: Option<String>,
    /// Address at which other clusters reach it, where that is another one.
    #[serde(default, rename = "externalIP", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 39))]
    #[x_kube(validation = Rule::new("isIP(self)").message("not an IP address"))]
    pub external_ip: Option<String>,
    /// UDP port there, where that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub external_port: Option<u32>,
    /// CIDRs of the pods on it.
    #[serde(default, rename = "podCIDRs")]
    #[schemars(schema_with = "cidrs")]
    pub pod_cidrs: Vec<String>,
}

/// What a node is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Traffic of its cluster's other nodes goes by way of it.
    Gateway,
}

/// Probes of a remote node.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNodeStatus {
    /// By node of this cluster that probes it.
    #[serde(default)]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["node".into()]))]
    pub probes: Vec<Probe>,
}

/// Result of one node's probes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// Node of this cluster.
    pub node: String,
    /// What came of it.
    pub state: ProbeState,
    /// Round trip, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_micros: Option<u32>,
    /// When `state` last changed, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
}

/// Result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProbeState {
    /// It answers.
    Reachable,
    /// It does not.
    Unreachable,
    /// Not tried yet.
    Unknown,
}

/// Most findings in a [`NodeConfigStatus`]; the writer leaves out the rest and says so in the last one.
pub const FINDINGS_LIMIT: usize = 100;

/// Longest text of a finding or part in a [`NodeConfigStatus`], characters; the writer cuts what is longer.
pub const TEXT_LIMIT: usize = 1024;

/// What a node of this cluster really applied. One per node, named after it, written by its agent alone.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crosslink.dev",
    version = "v1alpha1",
    kind = "NodeConfig",
    plural = "nodeconfigs",
    singular = "nodeconfig",
    shortname = "xlnc",
    category = "crosslink",
    status = "NodeConfigStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "What a node of this cluster really applied. Written by the node's agent alone.",
    printcolumn(name = "SYNCED", type_ = "boolean", json_path = ".status.synced"),
    printcolumn(name = "ROUTES", type_ = "integer", json_path = ".status.routes"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct NodeConfigSpec {
    /// Identifies the remotes files and `node.json` that are to be applied: equal for equal files.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub generation: i64,
}

/// What the node applied, when, and every finding.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeConfigStatus {
    /// Whether all that is wanted is applied: every part well, and `appliedGeneration` is the spec's.
    #[serde(default)]
    pub synced: bool,
    /// Generation that was applied last.
    #[serde(default)]
    pub applied_generation: i64,
    /// When that was, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub applied_time: Option<String>,
    /// Routes of crosslink in the pods of the node.
    #[serde(default)]
    pub routes: i64,
    /// Attachments of pods that crosslink knows.
    #[serde(default)]
    pub attachments: i64,
    /// Version of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub agent_version: Option<String>,
    /// Health by part.
    #[serde(default)]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub parts: Vec<NodePart>,
    /// Findings of all parts, at most [`FINDINGS_LIMIT`].
    #[serde(default)]
    #[schemars(length(max = 100))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub findings: Vec<NodeFinding>,
}

/// Health of one part of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodePart {
    /// Its name.
    pub name: String,
    /// Whether it does what it is there for.
    pub ok: bool,
    /// What keeps it from that; empty where all is well.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub text: String,
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeFinding {
    /// Stable id, as `XL-CIDR-LOCAL`.
    #[schemars(length(max = 64))]
    pub id: String,
    /// `info` or `warning`.
    #[schemars(length(max = 16))]
    pub severity: String,
    /// Part of the agent.
    #[schemars(length(max = 64))]
    pub part: String,
    /// The thing and the value.
    #[schemars(length(max = 1024))]
    pub text: String,
}

//! A remote cluster.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::shared::{Condition, cidrs};

/// A remote cluster: what of it pods of this cluster reach, and how.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crosslink.dev",
    version = "v1alpha1",
    kind = "Cluster",
    plural = "clusters",
    singular = "cluster",
    shortname = "xlc",
    category = "crosslink",
    status = "ClusterStatus",
    derive = "PartialEq",
    doc = "A remote cluster: what of it the pods of this cluster reach, and how.",
    printcolumn(name = "NETWORK_TYPE", type_ = "string", json_path = ".spec.networkType"),
    printcolumn(name = "IP_FAMILY", type_ = "string", json_path = ".spec.ipFamily"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')")
        .message("the name of a cluster is an RFC 1123 label: at most 63 of a-z, 0-9 and '-', not at the ends")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("size(self.podCIDRs) + size(self.serviceCIDRs) > 0")
        .message("give podCIDRs, serviceCIDRs, or both"),
    validation = Rule::new(
        "self.ipFamily != 'ipv4' || (self.podCIDRs + self.serviceCIDRs).all(c, !isCIDR(c) || cidr(c).ip().family() == 4)"
    ).message("ipFamily is ipv4, but a CIDR is IPv6"),
    validation = Rule::new(
        "self.ipFamily != 'ipv6' || (self.podCIDRs + self.serviceCIDRs).all(c, !isCIDR(c) || cidr(c).ip().family() == 6)"
    ).message("ipFamily is ipv6, but a CIDR is IPv4"),
    validation = Rule::new(
        "(self.podCIDRs + self.serviceCIDRs).all(c, !isCIDR(c) || (self.podCIDRs + self.serviceCIDRs).exists_one(d, isCIDR(d) && cidr(d) == cidr(c)))"
    ).message("a CIDR is there twice")
)]
pub struct ClusterSpec {
    /// How nodes of the two clusters meet where crosslink carries the traffic.
    #[serde(default)]
    pub network_type: NetworkType,
    /// Address families that are joined.
    #[serde(default)]
    pub ip_family: IpFamily,
    /// Who carries the traffic.
    #[serde(default)]
    pub transport: Transport,
    /// CIDRs of its pods.
    #[serde(default, rename = "podCIDRs")]
    #[schemars(schema_with = "cidrs")]
    pub pod_cidrs: Vec<String>,
    /// CIDRs of its services.
    #[serde(default, rename = "serviceCIDRs")]
    #[schemars(schema_with = "cidrs")]
    pub service_cidrs: Vec<String>,
    /// Path MTU towards it, bytes; routes of pods carry it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 576, max = 65535))]
    pub mtu: Option<u32>,
}

/// How nodes of two clusters meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkType {
    /// Each node straight with the node of the remote pod.
    #[default]
    P2p,
    /// By way of gateway nodes.
    Gateway,
}

/// Address families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IpFamily {
    /// Both.
    #[default]
    All,
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
}

/// Who carries the traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Something else: Submariner, a ToR switch, BGP.
    #[default]
    External,
    /// crosslink itself.
    Vxlan,
}

/// What agents found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    /// `Accepted`, `Conflicting`, `Reachable`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// CIDRs that are not routed to this cluster, or that another cluster claims too.
    #[serde(default)]
    #[schemars(length(max = 200))]
    pub conflicts: Vec<CidrConflict>,
}

/// What is wrong with one CIDR.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CidrConflict {
    /// The CIDR.
    pub cidr: String,
    /// What is wrong.
    pub reason: CidrFault,
    /// The local prefix, or the other cluster.
    pub with: String,
}

/// What can be wrong with a CIDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum CidrFault {
    /// It equals or lies inside a local CIDR, which is kept.
    Local,
    /// Its prefix is too short.
    TooWide,
    /// It is not routed at all: default route, loopback, multicast.
    NeverRouted,
    /// Another cluster, which comes first by name, has it.
    TakenBy,
    /// Another cluster, which comes later by name, claims it too.
    AlsoClaimedBy,
}

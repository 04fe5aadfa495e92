//! Objects of `crosslink.dev/v1alpha1`: remote clusters, their nodes, and what each node of this cluster applied.
//!
//! The schemas refuse typing errors at the API server, so that no agent has to.

mod cluster;
mod node;
mod shared;

use kube::CustomResourceExt as _;

pub use cluster::{CidrConflict, CidrFault, Cluster, ClusterSpec, ClusterStatus, IpFamily, NetworkType, Transport};
pub use node::{
    ClusterNode, ClusterNodeSpec, ClusterNodeStatus, FINDINGS_LIMIT, NodeConfig, NodeConfigSpec, NodeConfigStatus,
    NodeFinding, NodePart, NodeRole, Probe, ProbeState, TEXT_LIMIT,
};
pub use shared::{Condition, ConditionStatus};

/// The definitions as YAML, one document each.
///
/// # Errors
/// They cannot be written.
pub fn crds() -> anyhow::Result<String> {
    let mut text = String::new();
    for crd in [Cluster::crd(), ClusterNode::crd(), NodeConfig::crd()] {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(&crd)?);
    }
    Ok(text)
}

//! Submariner's objects, reduced to what matters. Read tolerantly: newer versions have lists where older ones have single
//! values, and fill either or both.

use std::collections::BTreeSet;

use crosslink_core::finding::Finding;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;

use super::{
    convert::Skipped,
    object::{Object, shown},
};

/// Remote copies carry it, local ones do not.
const CLUSTER_LABEL: &str = "submariner-io/clusterID";

/// `EndpointSpec`, in an `Endpoint` and within a `Gateway`'s status.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointSpec {
    cluster_id: Option<String>,
    backend: Option<String>,
    subnets: Option<Vec<String>>,
}

/// `Endpoint`.
#[derive(Clone, Debug, Deserialize)]
pub struct EndpointBody {
    spec: EndpointSpec,
}

/// Submariner's `Cluster`.
#[derive(Clone, Debug, Deserialize)]
pub struct ClusterBody {
    spec: ClusterSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ClusterSpec {
    cluster_id: Option<String>,
    service_cidr: Option<Texts>,
    cluster_cidr: Option<Texts>,
    global_cidr: Option<Texts>,
}

/// A list, or the single value of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Texts {
    Many(Vec<String>),
    One(String),
}

impl Texts {
    fn list(this: &Option<Self>) -> &[String] {
        match this {
            None => &[],
            Some(Self::Many(texts)) => texts,
            Some(Self::One(text)) if text.is_empty() => &[],
            Some(Self::One(text)) => std::slice::from_ref(text),
        }
    }
}

/// `Gateway`; all of them are this cluster's.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GatewayBody {
    status: Option<GatewayStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct GatewayStatus {
    ha_status: Option<String>,
    local_endpoint: Option<EndpointSpec>,
    connections: Option<Vec<Connection>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Connection {
    endpoint: Option<EndpointSpec>,
}

/// The operator's `Submariner`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SubmarinerBody {
    spec: Option<Identity>,
    status: Option<Identity>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Identity {
    #[serde(rename = "clusterID")]
    cluster: Option<String>,
}

/// An `Endpoint`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Whose it is.
    pub cluster: String,
    /// Whether it carries the label of a remote copy.
    pub labelled: bool,
    /// Newest wins.
    pub created: Option<Timestamp>,
    /// Cable driver.
    pub backend: Option<String>,
    /// Service and pod CIDRs, or with Globalnet the global ones, sorted.
    pub subnets: Vec<IpNet>,
}

/// Submariner's `Cluster`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Which cluster.
    pub cluster: String,
    /// Whether it carries the label of a remote copy.
    pub labelled: bool,
    /// Pod CIDRs, sorted.
    pub pods: Vec<IpNet>,
    /// Service CIDRs, sorted.
    pub services: Vec<IpNet>,
    /// Global CIDRs, sorted.
    pub global: Vec<IpNet>,
}

/// A `Gateway`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gateway {
    /// This cluster.
    pub local: Option<String>,
    /// Clusters that it is connected to, with the subnets that it programmed, sorted. Of the active gateway only: the
    /// others' lists are what was when they last were.
    pub connections: Vec<(String, Vec<IpNet>)>,
}

/// What an object became, and what had to be skipped.
pub type Row<T> = (Option<T>, Vec<Finding>);

fn reduce<B, T>(what: &str, object: Object<B>, make: impl FnOnce(B, &mut Skipped<'_>) -> Option<T>) -> Row<T> {
    let mut findings = Vec::new();
    let mut skipped = Skipped { what, name: shown(&object.key()), findings: &mut findings };
    let row = match object.body {
        Ok(body) => make(body, &mut skipped),
        Err(why) => {
            skipped.note(why);
            None
        }
    };
    (row, findings)
}

fn labelled<B>(object: &Object<B>) -> bool {
    object.meta.labels.as_ref().is_some_and(|labels| labels.contains_key(CLUSTER_LABEL))
}

fn cluster_id(given: Option<String>, skipped: &mut Skipped<'_>) -> Option<String> {
    match given {
        Some(name) if skipped.cluster(&name) => Some(name),
        Some(_) => None,
        None => {
            skipped.note("spec.cluster_id is missing");
            None
        }
    }
}

/// An `Endpoint`.
pub fn endpoint(object: Object<EndpointBody>) -> Row<Endpoint> {
    let (labelled, created) = (labelled(&object), object.meta.creation_timestamp.as_ref().map(|time| time.0));
    reduce("Submariner Endpoint", object, |body, skipped| {
        let cluster = cluster_id(body.spec.cluster_id, skipped)?;
        let subnets = skipped.nets("spec.subnets", body.spec.subnets.as_deref().unwrap_or_default());
        Some(Endpoint { cluster, labelled, created, backend: body.spec.backend, subnets })
    })
}

/// A `Cluster`.
pub fn member(object: Object<ClusterBody>) -> Row<Member> {
    let labelled = labelled(&object);
    reduce("Submariner Cluster", object, |body, skipped| {
        let cluster = cluster_id(body.spec.cluster_id, skipped)?;
        Some(Member {
            cluster,
            labelled,
            pods: skipped.nets("spec.cluster_cidr", Texts::list(&body.spec.cluster_cidr)),
            services: skipped.nets("spec.service_cidr", Texts::list(&body.spec.service_cidr)),
            global: skipped.nets("spec.global_cidr", Texts::list(&body.spec.global_cidr)),
        })
    })
}

/// A `Gateway`.
pub fn gateway(object: Object<GatewayBody>) -> Row<Gateway> {
    reduce("Submariner Gateway", object, |body, skipped| {
        let status = body.status.unwrap_or_default();
        let active = status.ha_status.as_deref() == Some("active");
        let connections = status.connections.filter(|_| active).unwrap_or_default().into_iter();
        let connections = connections.filter_map(|connection| {
            let endpoint = connection.endpoint?;
            let subnets = skipped.nets("status.connections", endpoint.subnets.as_deref().unwrap_or_default());
            Some((endpoint.cluster_id?, subnets))
        });
        let connections = connections.collect();
        Some(Gateway { local: status.local_endpoint.and_then(|endpoint| endpoint.cluster_id), connections })
    })
}

/// The operator's `Submariner`: this cluster's id.
pub fn submariner(object: Object<SubmarinerBody>) -> Row<String> {
    reduce("Submariner", object, |body, _| {
        let given = [body.spec, body.status].into_iter().flatten().filter_map(|identity| identity.cluster);
        given.into_iter().find(|cluster| !cluster.is_empty())
    })
}

/// This cluster's ids: by the operator's word, else by the gateways', else those of objects without the label.
pub fn local_ids<'a>(
    submariners: impl Iterator<Item = &'a String>,
    gateways: impl Iterator<Item = &'a Gateway>,
    unlabelled: impl Iterator<Item = &'a str>,
) -> BTreeSet<String> {
    let mut ids: BTreeSet<String> = submariners.cloned().collect();
    if ids.is_empty() {
        ids = gateways.filter_map(|gateway| gateway.local.clone()).collect();
    }
    if ids.is_empty() {
        ids = unlabelled.map(str::to_owned).collect();
    }
    ids
}

//! Kosmos' `Cluster` objects, which exist in its control cluster alone.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use crosslink_core::{finding::Finding, remotes::Told};
use ipnet::IpNet;
use kube::{Client, api::ApiResource};
use serde::Deserialize;
use tokio::{sync::mpsc, time::Instant};

use super::{
    Source, api_resource, client_from,
    convert::{Skipped, of_family},
    drive::{Model, QUEUE, drive},
    feed::{Feed, Notice},
    object::{Object, shown},
    sink::{Sink, View},
    table::Table,
    together,
};
use crate::settings::SourceKind;

/// Marks the control cluster itself.
const ROLE: &str = "kosmos.io/cluster-role";

/// What is read of a `Cluster`. Every field may be missing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Body {
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    cluster_link_options: Option<LinkOptions>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct LinkOptions {
    enable: Option<bool>,
    ip_family: Option<String>,
    #[serde(rename = "globalCIDRsMap")]
    global_cidrs: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    cluster_link_status: Option<LinkStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct LinkStatus {
    #[serde(rename = "podCIDRs")]
    pods: Option<Vec<String>>,
    #[serde(rename = "serviceCIDRs")]
    services: Option<Vec<String>>,
}

/// A cluster, and what had to be skipped of its object.
type Row = (Option<Told>, Vec<Finding>);

/// What Kosmos says.
#[derive(Debug, Default)]
struct Kosmos {
    /// Whether the objects are those of this cluster's own API server, so that the control cluster is this one.
    here: bool,
    clusters: Table<Row>,
}

fn convert(object: Object<Body>, here: bool) -> Row {
    let mut findings = Vec::new();
    let name = object.meta.name.clone().unwrap_or_default();
    let mut skipped = Skipped { what: "clusters.kosmos.io", name: shown(&object.key()), findings: &mut findings };
    let role = object.meta.annotations.as_ref().and_then(|annotations| annotations.get(ROLE));
    let told = match object.body {
        Err(why) => {
            skipped.note(why);
            None
        }
        // It is a member of its own mesh where it is joined, and then this cluster's own.
        Ok(_) if here && role.is_some_and(|role| role == "root") => None,
        Ok(body) if skipped.cluster(&name) => told(name, body, &mut skipped),
        Ok(_) => None,
    };
    (told, findings)
}

fn told(name: String, body: Body, skipped: &mut Skipped<'_>) -> Option<Told> {
    let options = body.spec.and_then(|spec| spec.cluster_link_options).unwrap_or_default();
    if options.enable == Some(false) {
        return None;
    }
    let status = body.status.and_then(|status| status.cluster_link_status).unwrap_or_default();
    let family = options.ip_family.unwrap_or_default();
    let global = options.global_cidrs.unwrap_or_default();
    let mut nets = |field: &str, texts: Option<Vec<String>>| {
        // Where a cluster's own range is mapped, other clusters reach it by the global one alone.
        let texts: Vec<String> =
            texts.unwrap_or_default().into_iter().map(|text| global.get(&text).cloned().unwrap_or(text)).collect();
        let mut nets: Vec<IpNet> = skipped.nets(field, &texts);
        of_family(&mut nets, &family);
        nets
    };
    let told = Told {
        name,
        pod_cidrs: nets("status.clusterLinkStatus.podCIDRs", status.pods),
        service_cidrs: nets("status.clusterLinkStatus.serviceCIDRs", status.services),
        ..Told::default()
    };
    (!told.is_empty()).then_some(told)
}

impl Model for Kosmos {
    type Event = Notice<Body>;

    fn take(&mut self, event: Notice<Body>, _: Instant) {
        let here = self.here;
        self.clusters.take(event, |object| convert(object, here));
    }

    fn view(&mut self, _: Instant) -> View {
        let rows = || self.clusters.iter().map(|(_, row)| row);
        View {
            clusters: self
                .clusters
                .complete()
                .then(|| rows().filter_map(|(told, _)| told.clone().map(Arc::new)).collect()),
            explicit: false,
            findings: rows().flat_map(|(_, findings)| findings.iter().cloned()).collect(),
            failure: self.clusters.failure().map(str::to_owned),
            objects: self.clusters.len(),
        }
    }
}

/// The source.
pub struct KosmosSource {
    /// Kubeconfig of the control cluster, where it is another one.
    pub kubeconfig: Option<std::path::PathBuf>,
    /// This cluster.
    pub client: Option<Client>,
}

/// Between two tries to read a kubeconfig.
const RECONNECT: Duration = Duration::from_secs(10);

impl Source for KosmosSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Kosmos
    }

    async fn run(self, mut sink: Sink) -> anyhow::Result<()> {
        let here = self.kubeconfig.is_none();
        let client = match &self.kubeconfig {
            Some(path) => connect(path, &mut sink).await,
            None => self.client,
        };
        let Some(client) = client else { return Ok(()) };
        let (sender, events) = mpsc::channel(QUEUE);
        let resource: ApiResource = api_resource("kosmos.io", "v1alpha1", "Cluster", "clusters");
        let feed = Feed { client, resource, namespace: None, names_only: false, sender, wrap: |notice| notice };
        let model = Kosmos { here, ..Kosmos::default() };
        together(drive(model, events, sink), feed.watch()).await;
        Ok(())
    }
}

/// A client for the control cluster. Its kubeconfig may come later than the agent, as Secrets do. None where the agent ends
/// first.
async fn connect(path: &Path, sink: &mut Sink) -> Option<Client> {
    loop {
        let why = match client_from(path).await {
            Ok(client) => return Some(client),
            Err(err) => format!("{err:#}"),
        };
        sink.offer(View { failure: Some(why), ..View::default() }).await;
        tokio::select! {
            () = sink.stop.cancelled() => return None,
            () = tokio::time::sleep(RECONNECT) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn row(value: Value, here: bool) -> Row {
        convert(serde_json::from_value(value).unwrap(), here)
    }

    fn cluster(spec: Value, pods: Value) -> Value {
        json!({"metadata": {"name": "b"}, "spec": spec, "status": {"clusterLinkStatus": {"podCIDRs": pods,
            "serviceCIDRs": ["10.97.0.0/16"]}}})
    }

    fn shown_row((told, findings): Row) -> (String, usize) {
        let text = told.map(|told| serde_json::to_string(&told).unwrap());
        (text.unwrap_or_default(), findings.len())
    }

    #[test]
    fn clusters() {
        let services = r#""serviceCIDRs":["10.97.0.0/16"]"#;
        let with = |pods: &str| format!(r#"{{"name":"b","podCIDRs":[{pods}],{services}}}"#);
        let options = |options: Value| json!({"clusterLinkOptions": options, "kubeconfig": "x"});
        let pods = json!(["10.245.0.0/16", "fd00::/64"]);
        for (spec, pods, expected, findings) in [
            (json!({}), pods.clone(), with(r#""10.245.0.0/16","fd00::/64""#), 0),
            (Value::Null, Value::Null, with(""), 0),
            (options(Value::Null), json!(["10.245.0.0/16", "x"]), with(r#""10.245.0.0/16""#), 1),
            (options(json!({"ipFamily": "ipv4"})), pods.clone(), with(r#""10.245.0.0/16""#), 0),
            (options(json!({"enable": false})), pods.clone(), String::new(), 0),
            (
                options(json!({"globalCIDRsMap": {"10.245.0.0/16": "100.64.0.0/16"}})),
                pods.clone(),
                with(r#""100.64.0.0/16","fd00::/64""#),
                0,
            ),
            (options(json!({"enable": "yes"})), pods, String::new(), 1),
        ] {
            assert_eq!(shown_row(row(cluster(spec.clone(), pods), false)), (expected, findings), "{spec}");
        }
        // The v4-mapped spelling that its command line sends is read like any other.
        let odd = json!({"metadata": {"name": "b"}, "status": {"clusterLinkStatus": {"podCIDRs": ["9480::0/16"]}}});
        assert_eq!(shown_row(row(odd, false)).0, r#"{"name":"b","podCIDRs":["9480::/16"]}"#);
        assert_eq!(shown_row(row(json!({"metadata": {"name": "b.c"}}), false)), (String::new(), 1));
        assert_eq!(shown_row(row(json!({"metadata": {"name": "b"}}), false)), (String::new(), 0));
    }

    #[test]
    fn the_control_cluster_is_remote_to_others_only() {
        let mut root = cluster(json!({}), json!(["10.245.0.0/16"]));
        root["metadata"]["annotations"] = json!({ROLE: "root"});
        assert!(row(root.clone(), true).0.is_none());
        assert!(row(root, false).0.is_some());
    }
}

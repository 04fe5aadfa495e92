//! Our own `Cluster` objects.

use std::sync::Arc;

use crosslink_core::{finding::Finding, node::NodeFacts, remotes::Told};
use futures_util::future::join;
use kube::{Client, Resource as _};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    Source, api_resource,
    cluster_status::{Observed, Situation, Verdict},
    cluster_writer::{BACKLOG, Wanted, write},
    convert::{Skipped, of_family},
    drive::{Model, QUEUE, drive},
    feed::{Feed, Notice},
    object::{Object, shown},
    sink::{Sink, View},
    table::Table,
    together,
};
use crate::{api, settings::SourceKind};

/// What is read of a `Cluster`, whatever its schema lets through.
#[derive(Clone, Debug, Deserialize)]
struct Body {
    spec: Spec,
    /// Read by itself, so that nobody's status can keep a spec from counting.
    #[serde(default)]
    status: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    ip_family: Option<api::IpFamily>,
    #[serde(rename = "podCIDRs")]
    pods: Option<Vec<String>>,
    #[serde(rename = "serviceCIDRs")]
    services: Option<Vec<String>>,
    mtu: Option<u32>,
}

/// An object, reduced.
#[derive(Clone, Debug)]
struct Row {
    told: Option<Arc<Told>>,
    findings: Vec<Finding>,
    version: Box<str>,
    generation: i64,
    status: Observed,
}

fn convert(object: Object<Body>) -> Row {
    let mut findings = Vec::new();
    let mut skipped = Skipped { what: "Cluster", name: shown(&object.key()), findings: &mut findings };
    let name = object.meta.name.unwrap_or_default();
    let (told, status) = match object.body {
        Err(why) => {
            skipped.note(why);
            (None, Observed::default())
        }
        Ok(body) => {
            let status = body.status.and_then(|status| serde_json::from_value(status).ok());
            let status = Observed::of(status.as_ref());
            (skipped.cluster(&name).then(|| Arc::new(told(name, &body.spec, &mut skipped))), status)
        }
    };
    Row {
        told,
        findings,
        version: object.meta.resource_version.unwrap_or_default().into(),
        generation: object.meta.generation.unwrap_or_default(),
        status,
    }
}

fn told(name: String, spec: &Spec, skipped: &mut Skipped<'_>) -> Told {
    let family = match spec.ip_family.unwrap_or_default() {
        api::IpFamily::All => "all",
        api::IpFamily::Ipv4 => "ipv4",
        api::IpFamily::Ipv6 => "ipv6",
    };
    let mut nets = |field: &str, texts: &Option<Vec<String>>| {
        let mut nets = skipped.nets(field, texts.as_deref().unwrap_or_default());
        of_family(&mut nets, family);
        nets
    };
    let (pod_cidrs, service_cidrs) = (nets("spec.podCIDRs", &spec.pods), nets("spec.serviceCIDRs", &spec.services));
    Told { name, pod_cidrs, service_cidrs, mtu: skipped.mtu(spec.mtu), from: None }
}

/// What the objects say.
#[derive(Debug)]
struct Clusters {
    table: Table<Row>,
    /// Whether the last one to go was deleted on purpose.
    explicit: bool,
    node: NodeFacts,
    wanted: watch::Sender<Vec<Wanted>>,
}

impl Clusters {
    /// Statuses that are not as they should be, at most so many that memory does not matter: the rest comes when these
    /// are written.
    fn statuses(&self) -> Vec<Wanted> {
        if !self.table.complete() {
            return Vec::new();
        }
        let told = || self.table.iter().filter_map(|(_, row)| row.told.as_deref());
        let situation = Situation::new(told(), &self.node);
        let mut wanted = Vec::new();
        for ((_, name), row) in self.table.iter() {
            let Some(told) = &row.told else { continue };
            let verdict: Verdict = situation.judge(told);
            if row.status.says(&verdict, row.generation) {
                continue;
            }
            wanted.push(Wanted {
                name: name.clone(),
                version: row.version.clone().into(),
                status: row.status.next(&verdict, row.generation),
                refused: verdict.refused().filter(|_| !row.status.is_refused()),
            });
            if wanted.len() == BACKLOG {
                break;
            }
        }
        wanted
    }
}

impl Model for Clusters {
    type Event = Notice<Body>;

    fn take(&mut self, event: Notice<Body>, _: Instant) {
        let changes = !matches!(event, Notice::Start | Notice::Failed(_));
        let deleted = self.table.take(event, convert);
        if changes {
            self.explicit = deleted;
        }
    }

    fn local(&mut self, node: &NodeFacts) {
        self.node = node.clone();
    }

    fn view(&mut self, _: Instant) -> View {
        self.wanted.send_replace(self.statuses());
        let rows = || self.table.iter().map(|(_, row)| row);
        View {
            clusters: self.table.complete().then(|| rows().filter_map(|row| row.told.clone()).collect()),
            explicit: self.explicit,
            findings: rows().flat_map(|row| row.findings.iter().cloned()).collect(),
            failure: self.table.failure().map(str::to_owned),
            objects: self.table.len(),
        }
    }
}

/// The source.
pub struct ClusterSource {
    /// This cluster.
    pub client: Client,
}

impl Source for ClusterSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Cluster
    }

    async fn run(self, sink: Sink) -> anyhow::Result<()> {
        let (sender, events) = mpsc::channel(QUEUE);
        let (wanted, statuses) = watch::channel(Vec::new());
        let (group, version, kind, plural) =
            (api::Cluster::group(&()), api::Cluster::version(&()), api::Cluster::kind(&()), api::Cluster::plural(&()));
        let resource = api_resource(&group, &version, &kind, &plural);
        let client = self.client.clone();
        let feed = Feed { client, resource, namespace: None, names_only: false, sender, wrap: |notice| notice };
        let (stop, board) = (sink.stop.clone(), sink.board());
        let model = Clusters { table: Table::default(), explicit: false, node: NodeFacts::default(), wanted };
        let feeds = join(feed.watch(), write(self.client, statuses, board, stop));
        together(drive(model, events, sink), feeds).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn model() -> Clusters {
        let wanted = watch::channel(Vec::new()).0;
        Clusters { table: Table::default(), explicit: false, node: NodeFacts::default(), wanted }
    }

    fn seen(name: &str, spec: Value) -> Notice<Body> {
        let object = json!({"metadata": {"name": name, "resourceVersion": "1", "generation": 1}, "spec": spec});
        Notice::Seen(Box::new(serde_json::from_value(object).unwrap()))
    }

    fn gone(name: &str) -> Notice<Body> {
        Notice::Gone((String::new(), name.to_owned()))
    }

    fn take(model: &mut Clusters, notices: impl IntoIterator<Item = Notice<Body>>) -> View {
        let now = Instant::now();
        notices.into_iter().for_each(|notice| model.take(notice, now));
        model.view(now)
    }

    #[test]
    fn only_a_deletion_of_the_last_one_empties_the_list_on_purpose() {
        let b = || seen("b", json!({"podCIDRs": ["10.1.0.0/16"]}));
        let broken = || seen("b", json!({"podCIDRs": 7}));
        let c = || seen("c", json!({"podCIDRs": ["10.2.0.0/16"]}));
        for (what, notices, explicit) in [
            ("deleted", vec![gone("b"), gone("c")], true),
            ("listed anew", vec![gone("c"), Notice::Start, Notice::Complete], false),
            ("broken", vec![gone("c"), broken()], false),
            ("not served", vec![gone("c"), Notice::Absent], false),
            ("deleted before a failure", vec![gone("b"), gone("c"), Notice::Failed("x".into()), Notice::Start], true),
        ] {
            let mut model = model();
            take(&mut model, [Notice::Start, b(), c(), Notice::Complete]);
            let view = take(&mut model, notices);
            assert_eq!((view.clusters.unwrap().len(), view.explicit), (0, explicit), "{what}");
        }
    }

    fn told(view: &View) -> Vec<Told> {
        view.clusters.iter().flatten().map(|told| told.as_ref().clone()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever happened on the way, in the end the same is said as by who first looks then.
        #[test]
        fn history_does_not_matter(steps in prop::collection::vec((0..6u8, 0..8u8, any::<bool>()), 0..60)) {
            let spec = |kind: u8| match kind {
                0 => json!({"podCIDRs": ["nonsense"], "serviceCIDRs": ["10.3.0.0/16"]}),
                1 => json!([]),
                kind => json!({"podCIDRs": [format!("10.{kind}.0.0/16"), "fd00::/64"], "ipFamily": "ipv4", "mtu": 1400}),
            };
            let mut model = model();
            take(&mut model, [Notice::Start, Notice::Complete]);
            let mut left: BTreeMap<String, Value> = BTreeMap::new();
            for (name, kind, relist) in steps {
                let name = format!("c{name}");
                if kind == 7 {
                    left.remove(&name);
                    take(&mut model, [gone(&name)]);
                } else {
                    left.insert(name.clone(), spec(kind));
                    take(&mut model, [seen(&name, spec(kind))]);
                }
                if relist {
                    let list = left.iter().map(|(name, spec)| seen(name, spec.clone()));
                    take(&mut model, [Notice::Start].into_iter().chain(list).chain([Notice::Complete]));
                }
            }
            let mut fresh = self::model();
            let list = left.iter().map(|(name, spec)| seen(name, spec.clone()));
            let wanted = take(&mut fresh, [Notice::Start].into_iter().chain(list).chain([Notice::Complete]));
            let said = model.view(Instant::now());
            prop_assert_eq!(told(&said), told(&wanted));
            prop_assert_eq!(said.findings, wanted.findings);
        }
    }
}

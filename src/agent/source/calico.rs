//! Calico's disabled IPPools: what other clusters use, by Calico's own convention.

use std::{net::IpAddr, sync::Arc, time::Duration};

use crosslink_core::{
    cidr,
    finding::{Finding, Id},
    node::NodeFacts,
    remotes::Told,
    set::CidrSet,
};
use futures_util::future::join;
use ipnet::IpNet;
use kube::{Api, Client, api::ListParams};
use serde::{Deserialize, de::IgnoredAny};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

use crate::backoff::{Backoff, around};

use super::{
    Source, api_resource,
    convert::Skipped,
    drive::{Model, QUEUE, drive},
    feed::{Feed, Notice},
    object::{Object, shown},
    sink::{Sink, View},
    table::Table,
    together,
};
use crate::settings::SourceKind;

/// Submariner puts it on the pools that it makes of remote subnets.
const OF_SUBMARINER: &str = "submariner.io/ippool";

/// How often blocks are listed, while there is a pool whose meaning depends on them.
const BLOCKS: Duration = Duration::from_secs(60);

/// How often is looked whether the newer group is served, while the older one is read.
const NEWER: Duration = Duration::from_secs(60);

/// Groups in which pools may be, the better one first.
const GROUPS: [(&str, &str); 2] = [("projectcalico.org", "v3"), ("crd.projectcalico.org", "v1")];

#[derive(Clone, Debug, Deserialize)]
struct Body {
    spec: Spec,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    cidr: String,
    #[serde(default)]
    disabled: Option<bool>,
    #[serde(default)]
    nat_outgoing: Option<bool>,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pool {
    net: IpNet,
    /// Whether this cluster takes addresses from it.
    enabled: bool,
    /// Whether Submariner says that it is remote.
    labelled: bool,
    masquerades: bool,
}

impl Pool {
    /// Whether it may be remote, though only blocks can tell.
    const fn is_doubtful(&self) -> bool {
        !self.enabled && !self.masquerades && !self.labelled
    }
}

type Row = Result<Pool, Finding>;

fn convert(object: Object<Body>) -> Row {
    let mut findings = Vec::new();
    let mut skipped = Skipped { what: "Calico IPPool", name: shown(&object.key()), findings: &mut findings };
    let labels = object.meta.labels.unwrap_or_default();
    match object.body {
        Ok(Body { spec }) => match cidr::parse(&spec.cidr) {
            Ok(net) => {
                return Ok(Pool {
                    net,
                    enabled: spec.disabled != Some(true),
                    labelled: labels.get(OF_SUBMARINER).is_some_and(|value| value == "true"),
                    masquerades: spec.nat_outgoing == Some(true),
                });
            }
            Err(err) => skipped.note(format_args!("spec.cidr: {err}")),
        },
        Err(why) => skipped.note(why),
    }
    Err(findings.pop().unwrap_or_else(|| Finding::new(Id::SourceObject, "Calico IPPool")))
}

/// The CIDR of an address block, which is in its name: `10-244-1-0-26`, `fd00-10-244--40-122`.
fn block(name: &str) -> Option<IpNet> {
    let (address, length) = name.rsplit_once('-')?;
    let length = length.parse().ok()?;
    let v4 = address.replace('-', ".").parse::<std::net::Ipv4Addr>().map(IpAddr::V4);
    let address = v4.or_else(|_| address.replace('-', ":").parse::<std::net::Ipv6Addr>().map(IpAddr::V6)).ok()?;
    IpNet::new(address, length).ok()
}

/// What is told.
enum Event {
    Pool(Notice<Body>),
    Block(Notice<IgnoredAny>),
}

/// What Calico says.
#[derive(Debug)]
struct Calico {
    pools: Table<Row>,
    blocks: Table<Option<IpNet>>,
    /// This cluster's pod, service and node CIDRs.
    local: CidrSet,
    /// Whether blocks matter.
    doubt: watch::Sender<bool>,
}

impl Calico {
    fn new(doubt: watch::Sender<bool>) -> Self {
        Self { pools: Table::default(), blocks: Table::default(), local: CidrSet::new(), doubt }
    }

    fn doubtful(&self) -> bool {
        self.pools.iter().any(|(_, row)| row.as_ref().is_ok_and(Pool::is_doubtful))
    }

    /// Why a disabled pool is this cluster's own all the same.
    fn own(&self, pool: &Pool, taken: &CidrSet, enabled: &CidrSet) -> bool {
        let local = self.local.covering(&pool.net).is_some() || enabled.covering(&pool.net).is_some();
        local || (!pool.labelled && taken.overlaps(&pool.net))
    }

    fn clusters(&self) -> Vec<Told> {
        let rows = || self.pools.iter().filter_map(|(key, row)| Some((key, row.as_ref().ok()?)));
        let enabled: CidrSet = rows().filter(|(_, pool)| pool.enabled).map(|(_, pool)| pool.net).collect();
        let taken: CidrSet = self.blocks.iter().filter_map(|(_, net)| *net).collect();
        let mut clusters = Vec::new();
        for ((_, name), pool) in rows() {
            if pool.enabled || pool.masquerades || self.own(pool, &taken, &enabled) {
                continue;
            }
            clusters.push(Told { name: format!("@calico/{name}"), pod_cidrs: vec![pool.net], ..Told::default() });
        }
        clusters
    }
}

impl Model for Calico {
    type Event = Event;

    fn take(&mut self, event: Event, _: Instant) {
        match event {
            Event::Pool(notice) => {
                self.pools.take(notice, convert);
                let doubtful = self.doubtful();
                self.doubt.send_if_modified(|doubt| std::mem::replace(doubt, doubtful) != doubtful);
            }
            Event::Block(notice) => {
                self.blocks.take(notice, |object| block(&object.meta.name.unwrap_or_default()));
            }
        }
    }

    fn local(&mut self, node: &NodeFacts) {
        let nets = node.pod_cidrs.iter().chain(&node.service_cidrs).chain(&node.node_cidrs);
        self.local = nets.copied().collect();
    }

    fn view(&mut self, _: Instant) -> View {
        // A pool that was retired here and still has addresses must not pass for a remote one, not for a moment.
        let doubtful = self.doubtful();
        let ready = self.pools.complete() && (!doubtful || self.blocks.complete());
        let blocks = self.blocks.failure().filter(|_| doubtful);
        View {
            clusters: ready.then(|| self.clusters().into_iter().map(Arc::new).collect()),
            explicit: false,
            findings: self.pools.iter().filter_map(|(_, row)| row.as_ref().err().cloned()).collect(),
            failure: self.pools.failure().or(blocks).map(str::to_owned),
            objects: self.pools.len(),
        }
    }
}

/// The source.
pub struct CalicoSource {
    /// This cluster.
    pub client: Client,
}

impl CalicoSource {
    /// Whether pools can be read in a group.
    ///
    /// # Errors
    /// The API server does not say.
    async fn served(&self, (group, version): (&str, &str)) -> kube::Result<bool> {
        let resource = api_resource(group, version, "IPPool", "ippools");
        let api: Api<Object<IgnoredAny>> = Api::all_with(self.client.clone(), &resource);
        match api.list(&ListParams::default().limit(1)).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Ok(false),
            Err(err) => Err(err),
        }
    }

    fn feed<T>(
        &self,
        (group, version): (&str, &str),
        (kind, plural): (&str, &str),
        sender: mpsc::Sender<Event>,
        wrap: fn(Notice<T>) -> Event,
    ) -> Feed<T, Event> {
        let resource = api_resource(group, version, kind, plural);
        Feed { client: self.client.clone(), resource, namespace: None, names_only: kind == "IPAMBlock", sender, wrap }
    }

    /// Follows the pools of the best group, and changes over when a better one appears.
    async fn pools(&self, sender: mpsc::Sender<Event>) {
        let [newer, older] = GROUPS;
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
        while !sender.is_closed() {
            let group = match self.served(newer).await {
                Ok(true) => newer,
                Ok(false) => older,
                Err(err) => {
                    let _ = sender.send(Event::Pool(Notice::Failed(format!("ippools: {err}")))).await;
                    sleep(backoff.wait()).await;
                    continue;
                }
            };
            backoff.reset();
            let feed = self.feed(group, ("IPPool", "ippools"), sender.clone(), Event::Pool);
            let better = async {
                loop {
                    sleep(around(NEWER)).await;
                    if self.served(newer).await.is_ok_and(|served| served != (group == newer)) {
                        return;
                    }
                }
            };
            tokio::select! {
                () = feed.watch() => return,
                () = better => {}
            }
        }
    }
}

impl Source for CalicoSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Calico
    }

    async fn run(self, sink: Sink) -> anyhow::Result<()> {
        let (sender, events) = mpsc::channel(QUEUE);
        let (doubt, doubted) = watch::channel(false);
        // Blocks are kept in the older group whichever way pools are served.
        let [_, older] = GROUPS;
        let blocks = self.feed(older, ("IPAMBlock", "ipamblocks"), sender.clone(), Event::Block);
        let feeds = join(self.pools(sender), blocks.poll(BLOCKS, doubted));
        together(drive(Calico::new(doubt), events, sink), feeds).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn calico(pools: &[(&str, Value)], blocks: Option<&[&str]>, local: &[&str]) -> View {
        let (doubt, _) = watch::channel(false);
        let mut calico = Calico::new(doubt);
        let now = Instant::now();
        calico.local(&NodeFacts {
            pod_cidrs: local.iter().map(|text| cidr::parse(text).unwrap()).collect(),
            ..NodeFacts::default()
        });
        calico.take(Event::Pool(Notice::Start), now);
        for (name, spec) in pools {
            let labels = if name.starts_with("submariner-") { json!({OF_SUBMARINER: "true"}) } else { Value::Null };
            let object = json!({"metadata": {"name": name, "labels": labels}, "spec": spec});
            calico.take(Event::Pool(Notice::Seen(Box::new(serde_json::from_value(object).unwrap()))), now);
        }
        calico.take(Event::Pool(Notice::Complete), now);
        if let Some(blocks) = blocks {
            for name in blocks {
                let object = json!({"metadata": {"name": name}});
                calico.take(Event::Block(Notice::Seen(Box::new(serde_json::from_value(object).unwrap()))), now);
            }
            calico.take(Event::Block(Notice::Complete), now);
        }
        calico.view(now)
    }

    fn names(view: &View) -> Vec<&str> {
        view.clusters.as_ref().unwrap().iter().map(|told| told.name.as_str()).collect()
    }

    fn disabled(cidr: &str) -> Value {
        json!({"cidr": cidr, "disabled": true, "natOutgoing": false})
    }

    #[test]
    fn disabled_is_not_remote() {
        let pools = [
            ("default-ipv4-ippool", json!({"cidr": "10.244.0.0/16", "natOutgoing": true})),
            ("remote", disabled("10.245.0.0/16")),
            ("retired", disabled("10.240.0.0/16")),
            ("inside", disabled("10.244.8.0/24")),
            ("of-pods", disabled("10.250.1.0/24")),
            ("masquerading", json!({"cidr": "10.246.0.0/16", "disabled": true, "natOutgoing": true})),
            ("submariner-b-10-247-0-0-16", disabled("10.247.0.0/16")),
            ("broken", json!({"cidr": "10.248.0.0/99", "disabled": true})),
            ("odd", json!({"cidr": 7})),
        ];
        let view = calico(&pools, Some(&["10-240-3-64-26", "10-247-0-0-26", "odd"]), &["10.250.0.0/16"]);
        assert_eq!(names(&view), ["@calico/remote", "@calico/submariner-b-10-247-0-0-16"]);
        assert_eq!(view.findings.len(), 2, "{:?}", view.findings);
    }

    #[test]
    fn nothing_is_said_until_the_blocks_are_known() {
        let pools = [("remote", disabled("10.245.0.0/16"))];
        assert!(calico(&pools, None, &[]).clusters.is_none());
        assert_eq!(names(&calico(&pools, Some(&[]), &[])), ["@calico/remote"]);
        let labelled = [("submariner-b", disabled("10.245.0.0/16"))];
        assert_eq!(names(&calico(&labelled, None, &[])), ["@calico/submariner-b"]);
    }

    #[test]
    fn blocks_have_their_cidr_in_their_name() {
        for (name, expected) in [
            ("10-244-1-0-26", Some("10.244.1.0/26")),
            ("fd00-10-244--40-122", Some("fd00:10:244::40/122")),
            ("---122", Some("::/122")),
            ("10-244-1-0-99", None),
            ("x", None),
        ] {
            assert_eq!(block(name).map(|net| net.to_string()).as_deref(), expected, "{name}");
        }
    }
}

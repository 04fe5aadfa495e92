//! Submariner's remote clusters.
//!
//! A cluster is kept as long as its `Cluster` object is there, since that survives a failover of its gateway, while its
//! `Endpoint` is deleted and made anew, in either order. What the newest `Endpoint` lists is what Submariner carries.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crosslink_core::{
    finding::{Finding, Id},
    remotes::{Told, valid_mtu},
};
use ipnet::IpNet;
use tokio::time::Instant;

use super::{
    drive::Model,
    feed::Notice,
    object::Key,
    sink::View,
    submariner_objects::{
        ClusterBody, Endpoint, EndpointBody, Gateway, GatewayBody, Member, Row, SubmarinerBody, endpoint, gateway,
        local_ids, member, submariner,
    },
    table::Table,
};

/// How long an `Endpoint`'s subnets may differ from those that the gateway programmed before that is said. Submariner
/// brings an update to another cluster within some seconds, and gateways are looked at only every so often.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// What the cable drivers leave of the uplink's MTU, bytes, by Submariner's own figures: 120 for IPsec, by which it also
/// clamps WireGuard; 50 for VXLAN.
const IPSEC_OVERHEAD: u32 = 120;
const VXLAN_OVERHEAD: u32 = 50;

/// What is told.
pub enum Event {
    /// `endpoints.submariner.io`.
    Endpoint(Notice<EndpointBody>),
    /// `clusters.submariner.io`.
    Cluster(Notice<ClusterBody>),
    /// `gateways.submariner.io`.
    Gateway(Notice<GatewayBody>),
    /// `submariners.submariner.io`.
    Submariner(Notice<SubmarinerBody>),
    /// MTU of this node's interface of the default route.
    Uplink(Option<u32>),
}

/// What Submariner says.
#[derive(Debug)]
pub struct Submariner {
    endpoints: Table<Row<Endpoint>>,
    members: Table<Row<Member>>,
    gateways: Table<Row<Gateway>>,
    submariners: Table<Row<String>>,
    /// MTU of the uplink, once it is known whether there is one.
    uplink: Option<Option<u32>>,
    /// How long a cluster that is gone is held.
    hold: Duration,
    /// What was said last of each cluster, and since when it is gone.
    said: BTreeMap<String, (Told, Option<Instant>)>,
    /// Cable driver that was seen last of each cluster.
    backends: BTreeMap<String, String>,
    /// Since when the gateway's programme differs.
    stale: BTreeMap<String, Instant>,
}

fn rows<T>(table: &Table<Row<T>>) -> impl Iterator<Item = (&Key, &T)> {
    table.iter().filter_map(|(key, (row, _))| Some((key, row.as_ref()?)))
}

impl Submariner {
    /// Holds clusters that are gone for `hold`. `before` is what its file said when the agent started.
    pub fn new(hold: Duration, before: Vec<Told>) -> Self {
        Self {
            endpoints: Table::default(),
            members: Table::default(),
            gateways: Table::default(),
            submariners: Table::default(),
            uplink: None,
            hold,
            said: before.into_iter().map(|told| (told.name.clone(), (told, None))).collect(),
            backends: BTreeMap::new(),
            stale: BTreeMap::new(),
        }
    }

    fn complete(&self) -> bool {
        // Who is local may also be told by the label alone, where the others cannot be read.
        let told = |complete: bool, failure: Option<&str>| complete || failure.is_some();
        self.endpoints.complete()
            && self.members.complete()
            && self.uplink.is_some()
            && told(self.gateways.complete(), self.gateways.failure())
            && told(self.submariners.complete(), self.submariners.failure())
    }

    /// Where Submariner runs, so that a broker's copies in the same API server do not count; everywhere where nobody says.
    fn namespaces(&self) -> BTreeSet<&str> {
        let of_operator: BTreeSet<&str> =
            rows(&self.submariners).map(|((namespace, _), _)| namespace.as_str()).collect();
        if !of_operator.is_empty() {
            return of_operator;
        }
        rows(&self.gateways).map(|((namespace, _), _)| namespace.as_str()).collect()
    }

    /// The newest endpoint and the member of each remote cluster.
    fn remote(&self) -> BTreeMap<&str, (Option<&Endpoint>, Option<&Member>)> {
        let namespaces = self.namespaces();
        let inside = |(namespace, _): &Key| namespaces.is_empty() || namespaces.contains(namespace.as_str());
        let endpoints = || rows(&self.endpoints).filter(|(key, _)| inside(key));
        let members = || rows(&self.members).filter(|(key, _)| inside(key)).map(|(_, member)| member);
        let unlabelled = endpoints().filter(|(_, endpoint)| !endpoint.labelled).map(|(_, endpoint)| &endpoint.cluster);
        let unlabelled = unlabelled.chain(members().filter(|member| !member.labelled).map(|member| &member.cluster));
        let local = local_ids(
            rows(&self.submariners).map(|(_, id)| id),
            rows(&self.gateways).map(|(_, gateway)| gateway),
            unlabelled.map(String::as_str),
        );
        let mut newest: BTreeMap<&str, (&Key, &Endpoint)> = BTreeMap::new();
        for (key, endpoint) in endpoints().filter(|(_, endpoint)| !local.contains(&endpoint.cluster)) {
            let known = newest.entry(&endpoint.cluster).or_insert((key, endpoint));
            // Times are whole seconds; of two in one the later name, so that all agents agree.
            if (endpoint.created, key) > (known.1.created, known.0) {
                *known = (key, endpoint);
            }
        }
        let mut remote: BTreeMap<&str, (Option<&Endpoint>, Option<&Member>)> = BTreeMap::new();
        for (cluster, (_, endpoint)) in newest {
            remote.entry(cluster).or_default().0 = Some(endpoint);
        }
        for member in members().filter(|member| !local.contains(&member.cluster)) {
            remote.entry(&member.cluster).or_default().1 = Some(member);
        }
        remote
    }

    fn told(&self, cluster: &str, endpoint: Option<&Endpoint>, member: Option<&Member>) -> Told {
        let mut told = Told { name: cluster.to_owned(), mtu: self.mtu(cluster), ..Told::default() };
        let listed = endpoint.map(|endpoint| &endpoint.subnets).filter(|subnets| !subnets.is_empty());
        match (listed, member) {
            // With Globalnet clusters reach each other by global addresses alone.
            (_, Some(member)) if !member.global.is_empty() => told.pod_cidrs.clone_from(&member.global),
            (Some(subnets), member) => {
                // An endpoint does not say which of its subnets are services'.
                let services = member.map(|member| member.services.as_slice()).unwrap_or_default();
                (told.service_cidrs, told.pod_cidrs) = subnets.iter().partition(|net| services.contains(net));
            }
            (None, Some(member)) => {
                told.pod_cidrs.clone_from(&member.pods);
                told.service_cidrs.clone_from(&member.services);
            }
            (None, None) => {}
        }
        told
    }

    /// Path MTU: that of the uplink, less what the cable driver adds.
    fn mtu(&self, cluster: &str) -> Option<u32> {
        // While a gateway moves, the driver is the one before; drivers are mostly the same everywhere.
        let Some(backend) = self.backends.get(cluster).or_else(|| self.backends.values().next()) else {
            return self.said.get(cluster).and_then(|(told, _)| told.mtu);
        };
        let overhead = if backend == "vxlan" { VXLAN_OVERHEAD } else { IPSEC_OVERHEAD };
        self.uplink.flatten()?.checked_sub(overhead).filter(|mtu| valid_mtu(*mtu))
    }

    /// What is there now, and what is gone but held.
    fn clusters(&mut self, now: Instant) -> Vec<Told> {
        let present: Vec<Told> = self
            .remote()
            .into_iter()
            .map(|(cluster, (endpoint, member))| self.told(cluster, endpoint, member))
            .filter(|told| !told.is_empty())
            .collect();
        let names: BTreeSet<&str> = present.iter().map(|told| told.name.as_str()).collect();
        for (name, (_, gone)) in &mut self.said {
            if !names.contains(name.as_str()) {
                gone.get_or_insert(now);
            }
        }
        for told in present {
            self.said.insert(told.name.clone(), (told, None));
        }
        let hold = self.hold;
        self.said.retain(|_, (_, gone)| gone.is_none_or(|gone| now < gone + hold));
        self.said.values().map(|(told, _)| told.clone()).collect()
    }

    /// Clusters whose endpoint lists other subnets than the gateway programmed.
    fn stale(&mut self, now: Instant) -> Vec<Finding> {
        let mut differing: BTreeMap<String, (Vec<IpNet>, Vec<IpNet>)> = BTreeMap::new();
        let remote = self.remote();
        for (_, gateway) in rows(&self.gateways) {
            for (cluster, programmed) in &gateway.connections {
                let Some((Some(endpoint), _)) = remote.get(cluster.as_str()) else { continue };
                if endpoint.subnets != *programmed && !programmed.is_empty() {
                    differing.insert(cluster.clone(), (endpoint.subnets.clone(), programmed.clone()));
                }
            }
        }
        self.stale.retain(|cluster, _| differing.contains_key(cluster));
        let mut findings = Vec::new();
        for (cluster, (listed, programmed)) in differing {
            if now < *self.stale.entry(cluster.clone()).or_insert(now) + STALE_AFTER {
                continue;
            }
            let text = |nets: Vec<IpNet>| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let (listed, programmed) = (text(listed), text(programmed));
            let text =
                format!("cluster {cluster}: its Endpoint lists {listed}; this side's gateway programmed {programmed}");
            findings.push(Finding::new(Id::SubmarinerStale, text));
        }
        findings
    }
}

impl Model for Submariner {
    type Event = Event;

    fn take(&mut self, event: Event, _: Instant) {
        match event {
            Event::Endpoint(notice) => {
                self.endpoints.take(notice, endpoint);
                let seen =
                    rows(&self.endpoints).filter_map(|(_, row)| Some((row.cluster.clone(), row.backend.clone()?)));
                let seen: Vec<_> = seen.collect();
                self.backends.extend(seen);
            }
            Event::Cluster(notice) => drop(self.members.take(notice, member)),
            Event::Gateway(notice) => drop(self.gateways.take(notice, gateway)),
            Event::Submariner(notice) => drop(self.submariners.take(notice, submariner)),
            Event::Uplink(mtu) => self.uplink = Some(mtu),
        }
    }

    fn view(&mut self, now: Instant) -> View {
        fn skipped<T>(table: &Table<Row<T>>) -> impl Iterator<Item = Finding> + '_ {
            table.iter().flat_map(|(_, (_, findings))| findings.iter().cloned())
        }
        let complete = self.complete();
        let clusters = complete.then(|| self.clusters(now).into_iter().map(Arc::new).collect());
        let mut findings = if complete { self.stale(now) } else { Vec::new() };
        for (name, _) in self.said.iter().filter(|(_, (_, gone))| gone.is_some()) {
            let text = format!("Submariner's cluster {name} is gone; what was said of it last stays");
            findings.push(Finding::new(Id::SourceEmpty, text));
        }
        findings.extend(skipped(&self.endpoints).chain(skipped(&self.members)));
        findings.extend(skipped(&self.gateways).chain(skipped(&self.submariners)));
        let failures =
            [self.endpoints.failure(), self.members.failure(), self.gateways.failure(), self.submariners.failure()];
        View {
            clusters,
            // What is gone was held here, each cluster by itself.
            explicit: true,
            findings,
            failure: failures.into_iter().flatten().next().map(str::to_owned),
            objects: self.endpoints.len() + self.members.len() + self.gateways.len() + self.submariners.len(),
        }
    }

    fn due(&self) -> Option<Instant> {
        let held = self.said.values().filter_map(|(_, gone)| Some((*gone)? + self.hold));
        let stale = self.stale.values().map(|since| *since + STALE_AFTER);
        let later = Instant::now();
        held.chain(stale.filter(|at| *at > later)).min()
    }
}

#[cfg(test)]
#[path = "submariner_tests.rs"]
mod tests;

//! The source "submariner": its feeds.

use std::time::Duration;

use crosslink_core::{model::NetnsState, numbers::TABLE_MAIN, remotes::Told};
use crosslink_kernel::monitor::Topic;
use futures_util::future::{join, join4};
use kube::Client;
use tokio::sync::{mpsc, watch};

use super::{
    Source, api_resource,
    drive::{QUEUE, drive},
    feed::{Feed, Notice},
    routes::follow,
    sink::Sink,
    submariner::{Event, Submariner},
    together,
};
use crate::settings::SourceKind;

/// How often gateways are listed. Their objects change every 5 s by a time stamp alone, which is too much for a watch on
/// every node.
const GATEWAYS: Duration = Duration::from_secs(30);

/// The source.
pub struct SubmarinerSource {
    /// This cluster.
    pub client: Client,
    /// Namespace of the objects; found where it is not given.
    pub namespace: Option<String>,
    /// How long a cluster that is gone is held.
    pub hold: Duration,
    /// What the file said when the agent started.
    pub before: Vec<Told>,
}

impl SubmarinerSource {
    fn feed<T>(
        &self,
        version: &str,
        (kind, plural): (&str, &str),
        sender: &mpsc::Sender<Event>,
        wrap: fn(Notice<T>) -> Event,
    ) -> Feed<T, Event> {
        Feed {
            client: self.client.clone(),
            resource: api_resource("submariner.io", version, kind, plural),
            namespace: self.namespace.clone(),
            names_only: false,
            sender: sender.clone(),
            wrap,
        }
    }
}

/// MTU of the interface of the default route, IPv4's before IPv6's.
fn uplink(state: &NetnsState) -> Option<u32> {
    let defaults =
        state.routes.iter().filter(|seen| seen.route.table == TABLE_MAIN && seen.route.dst.prefix_len() == 0);
    let best = defaults.min_by_key(|seen| (seen.route.dst.addr().is_ipv6(), seen.metric))?;
    state.links.iter().find(|link| link.name == best.route.dev).map(|link| link.mtu)
}

impl Source for SubmarinerSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Submariner
    }

    async fn run(self, sink: Sink) -> anyhow::Result<()> {
        let (sender, events) = mpsc::channel(QUEUE);
        let (_always, always) = watch::channel(true);
        let endpoints = self.feed("v1", ("Endpoint", "endpoints"), &sender, Event::Endpoint);
        let clusters = self.feed("v1", ("Cluster", "clusters"), &sender, Event::Cluster);
        let gateways = self.feed("v1", ("Gateway", "gateways"), &sender, Event::Gateway);
        let operators = self.feed("v1alpha1", ("Submariner", "submariners"), &sender, Event::Submariner);
        let model = Submariner::new(self.hold, self.before);
        // Routes change with every pod; that the uplink becomes another one can wait for the next look.
        let local = follow(&[Topic::Links], sender, |state| Event::Uplink(state.ok().and_then(|state| uplink(&state))));
        let objects = join4(endpoints.watch(), clusters.watch(), gateways.poll(GATEWAYS, always), operators.watch());
        together(drive(model, events, sink), join(objects, local)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crosslink_core::model::{Link, ObservedRoute, Route};

    use super::*;

    #[test]
    fn the_uplink_is_that_of_the_best_default_route() {
        let link = |index, name: &str, mtu| Link { index, name: name.into(), mtu, ..Link::default() };
        let route = |dst: &str, dev: &str, metric| ObservedRoute {
            route: Route {
                dst: dst.parse().unwrap(),
                table: TABLE_MAIN,
                dev: dev.into(),
                via: None,
                src: None,
                mtu: None,
            },
            protocol: 3,
            metric,
            unicast: true,
            multipath: false,
        };
        let mut state = NetnsState {
            links: vec![link(1, "eth0", 1500), link(2, "eth1", 9000)],
            routes: vec![route("::/0", "eth1", 1), route("0.0.0.0/0", "eth1", 200), route("0.0.0.0/0", "eth0", 100)],
            ..NetnsState::default()
        };
        assert_eq!(uplink(&state), Some(1500));
        state.routes.truncate(1);
        assert_eq!(uplink(&state), Some(9000));
        state.routes.clear();
        assert_eq!(uplink(&state), None);
    }
}

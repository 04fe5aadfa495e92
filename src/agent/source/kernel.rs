//! Routes that a BGP speaker put into the main table.

use std::sync::Arc;

use crosslink_core::{
    cidr::never_routed,
    finding::{Finding, Id},
    model::NetnsState,
    node::NodeFacts,
    numbers::{SHORTEST_V4, SHORTEST_V6, TABLE_MAIN},
    remotes::Told,
    set::{CidrSet, Entry, drop_covered, join_siblings},
};
use crosslink_kernel::monitor::Topic;
use ipnet::IpNet;
use tokio::{sync::mpsc, time::Instant};

use super::{
    Source,
    drive::{Model, QUEUE, drive},
    routes::follow,
    sink::{Sink, View},
    together,
};
use crate::settings::SourceKind;

/// The name of what has no cluster name.
const NAME: &str = "@bgp";

/// What was observed, or why nothing could be.
type Event = Result<Arc<NetnsState>, String>;

/// What the kernel says.
#[derive(Debug)]
struct Routes {
    protocols: Vec<u8>,
    local: Vec<IpNet>,
    /// Whether this cluster's pod CIDRs are known.
    placed: bool,
    state: Option<Arc<NetnsState>>,
    failure: Option<String>,
}

fn is_wide(net: &IpNet) -> bool {
    net.prefix_len() < if net.addr().is_ipv4() { SHORTEST_V4 } else { SHORTEST_V6 }
}

/// Destinations of routes by protocol, without what is local, summarised: nothing covered by another, siblings joined.
/// Also those that are too wide to be remote clusters: a default route or a part of one.
fn learned(state: &NetnsState, protocols: &[u8], local: &[IpNet]) -> (Vec<IpNet>, Vec<IpNet>) {
    let connected = state.addresses.iter().map(|address| address.net.trunc());
    let local: CidrSet = local.iter().copied().chain(connected).collect();
    let routes = state.routes.iter().filter(|seen| {
        seen.route.table == TABLE_MAIN && (seen.unicast || seen.multipath) && protocols.contains(&seen.protocol)
    });
    let mut wide = Vec::new();
    let mut entries = Vec::new();
    for net in routes.map(|seen| seen.route.dst) {
        if net.prefix_len() == 0 || local.covering(&net).is_some() || never_routed(&net).is_some() {
            continue;
        }
        if is_wide(&net) {
            wide.push(net);
        } else {
            entries.push(Entry { net, attr: () });
        }
    }
    let apart = drop_covered(entries, &[]);
    let joined = join_siblings(apart.clone(), &[]);
    // Halves of everything would join into what nobody takes for a remote cluster.
    let summary = if joined.iter().any(|entry| is_wide(&entry.net)) { apart } else { joined };
    (summary.into_iter().map(|entry| entry.net).collect(), wide)
}

impl Model for Routes {
    type Event = Event;

    fn take(&mut self, event: Event, _: Instant) {
        match event {
            Ok(state) => {
                self.state = Some(state);
                self.failure = None;
            }
            Err(why) => self.failure = Some(why),
        }
    }

    fn local(&mut self, node: &NodeFacts) {
        self.placed = !node.pod_cidrs.is_empty();
        self.local = node.pod_cidrs.iter().chain(&node.service_cidrs).chain(&node.node_cidrs).copied().collect();
    }

    fn view(&mut self, _: Instant) -> View {
        let Some(state) = &self.state else {
            return View { failure: self.failure.clone(), ..View::default() };
        };
        if !self.placed {
            // A speaker also knows the routes to this cluster's other nodes.
            let why =
                "this cluster's pod CIDRs are not known, so its own routes would pass for remote ones: set podCIDRs";
            return View { failure: Some(why.to_owned()), ..View::default() };
        }
        let (nets, wide) = learned(state, &self.protocols, &self.local);
        let findings = wide.iter().map(|net| {
            Finding::new(
                Id::CidrWide,
                format!("{net} of the main table's learned routes is too wide to be a remote cluster's"),
            )
        });
        View {
            explicit: false,
            findings: findings.collect(),
            failure: self.failure.clone(),
            objects: nets.len(),
            clusters: Some(match nets.as_slice() {
                [] => Vec::new(),
                _ => vec![Arc::new(Told { name: NAME.to_owned(), pod_cidrs: nets, ..Told::default() })],
            }),
        }
    }
}

/// The source.
#[derive(Debug)]
pub struct KernelSource {
    /// Protocols of remote routes (`rtm_protocol`).
    pub protocols: Vec<u8>,
}

impl Source for KernelSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Kernel
    }

    async fn run(self, sink: Sink) -> anyhow::Result<()> {
        let (sender, events) = mpsc::channel(QUEUE);
        let model = Routes { protocols: self.protocols, local: Vec::new(), placed: false, state: None, failure: None };
        together(drive(model, events, sink), follow(&Topic::ALL, sender, |state| state)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crosslink_core::model::{Address, ObservedRoute, Route};

    use super::*;

    fn observed(dst: &str, protocol: u8) -> ObservedRoute {
        let route =
            Route { dst: dst.parse().unwrap(), table: TABLE_MAIN, dev: "eth0".into(), via: None, src: None, mtu: None };
        ObservedRoute { route, protocol, metric: 0, unicast: true, multipath: false }
    }

    #[test]
    fn what_is_learned_and_not_local_is_remote() {
        let routes = [
            // Blocks of a cluster's nodes.
            ("10.245.0.0/26", 12),
            ("10.245.0.64/26", 12),
            ("10.245.0.128/25", 80),
            ("10.245.2.0/24", 186),
            ("10.245.2.64/26", 12),
            // Somebody else's.
            ("10.246.0.0/16", 3),
            // Local: of another node's pods, a connected prefix, the default route.
            ("10.244.1.0/26", 12),
            ("10.6.0.128/25", 12),
            ("0.0.0.0/0", 12),
            ("0.0.0.0/1", 12),
            ("224.0.0.0/4", 12),
            ("fd00:1::/64", 12),
        ];
        let state = NetnsState {
            routes: routes.iter().map(|(dst, protocol)| observed(dst, *protocol)).collect(),
            addresses: vec![Address {
                dev: "eth0".into(),
                net: "10.6.0.2/24".parse().unwrap(),
                global: true,
                tentative: false,
                unstable: false,
            }],
            ..NetnsState::default()
        };
        let local = ["10.244.0.0/16".parse().unwrap()];
        let (nets, wide) = learned(&state, &[12, 80, 186], &local);
        let texts: Vec<String> = nets.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.245.0.0/24", "10.245.2.0/24", "fd00:1::/64"]);
        assert_eq!(wide, ["0.0.0.0/1".parse().unwrap()]);
        assert!(learned(&state, &[99], &local).0.is_empty());
    }
}

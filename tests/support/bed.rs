//! A node's and a pod's namespace, and the real kernel's two sides on them.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::time::Duration;

use crosslink_core::model::{Change, NetnsState, ObservedRoute, Route, Rule, Side};
use crosslink_kernel::{Applied, Kernel, NodeQuery, PodQuery, System};
use crosslink_testkit::{Netns, in_netns};

/// A node and a pod.
#[derive(Debug)]
pub struct Bed {
    /// The node; it has host0 with 10.88.0.1/24 and fd88::1/64.
    pub node: Netns,
    /// The pod; it has eth0 with 10.88.0.5/24 and fd88::5/64, the other end of host0.
    pub pod: Netns,
}

impl Bed {
    /// Both, with a wire between them.
    pub fn new() -> Self {
        let (node, pod) = (Netns::create("node"), Netns::create("pod"));
        node.ip(&format!("link add host0 type veth peer name eth0 netns {}", pod.name()));
        for (netns, dev, last) in [(&node, "host0", 1), (&pod, "eth0", 5)] {
            netns.ip("link set lo up");
            netns.ip(&format!("link set {dev} addrgenmode none"));
            netns.ip(&format!("addr add 10.88.0.{last}/24 dev {dev}"));
            netns.ip(&format!("addr add fd88::{last}/64 dev {dev} nodad"));
            netns.ip(&format!("link set {dev} up"));
        }
        Self { node, pod }
    }

    /// Works with the real kernel from a thread of the node's, which has entered the pod.
    pub fn with<T: Send>(&self, work: impl FnOnce(&mut System) -> T + Send) -> T {
        in_netns(self.node.path(), || {
            let mut system = System::new().unwrap();
            system.enter(self.pod.path(), Duration::from_secs(1)).unwrap();
            work(&mut system)
        })
    }

    /// Carries out changes.
    pub fn apply(&self, changes: &[Change]) -> Applied {
        self.with(|system| system.apply(changes))
    }

    /// Carries out changes, none of which may fail.
    pub fn must(&self, changes: &[Change]) {
        let applied = self.apply(changes);
        assert!(applied.failures.is_empty() && applied.done.len() == changes.len(), "{applied:?}");
    }

    /// Everything in the pod.
    pub fn pod_state(&self) -> NetnsState {
        self.with(|system| system.observe_pod(&PodQuery { state: true, ..PodQuery::default() })).unwrap()
    }

    /// What ADD looks at on the node.
    pub fn node_state(&self) -> NetnsState {
        let query = NodeQuery { addresses: true, pods_table: true, ..NodeQuery::default() };
        self.with(|system| system.observe_node(&query)).unwrap()
    }

    /// The rules on the node.
    pub fn rules(&self) -> Vec<Rule> {
        self.node_state().rules
    }
}

/// A route of the main table in words, as in `ip route`: `DST [via A] dev D [src A] [mtu N]`.
pub fn route(text: &str) -> Route {
    let mut words = text.split(' ');
    let dst = words.next().unwrap().parse().unwrap();
    let mut route = Route { dst, table: 254, dev: String::new(), via: None, src: None, mtu: None };
    while let (Some(key), Some(value)) = (words.next(), words.next()) {
        match key {
            "via" => route.via = Some(value.parse().unwrap()),
            "dev" => value.clone_into(&mut route.dev),
            "src" => route.src = Some(value.parse().unwrap()),
            "mtu" => route.mtu = Some(value.parse().unwrap()),
            "table" => route.table = value.parse().unwrap(),
            _ => panic!("{key}"),
        }
    }
    route
}

/// A change that adds a route to the pod.
pub fn add(text: &str) -> Change {
    Change::AddRoute(Side::Pod, route(text))
}

/// The routes to a prefix among those observed.
pub fn to<'s>(state: &'s NetnsState, dst: &str) -> Vec<&'s ObservedRoute> {
    state.routes.iter().filter(|seen| seen.route.dst == dst.parse().unwrap()).collect()
}

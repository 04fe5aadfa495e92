//! Many overlay pods on one node, and a clock that the kernel's own notifications stop.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::mpsc,
    time::{Duration, Instant},
};

use crosslink_testkit::{Call, Netns, Node, Pod, Reply, netns::in_netns};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Site, bin};

/// `RTNLGRP_IPV4_ROUTE`, `RTM_NEWROUTE`, `RTM_DELROUTE` (linux/rtnetlink.h).
const GROUP: u32 = 7;
const NEW: u16 = 24;
const GONE: u16 = 25;

/// A node with pods, and the plugin's files.
pub struct Crowd {
    /// The node.
    pub node: Node,
    /// Its pods.
    pub pods: Vec<Pod>,
    /// Its files.
    pub site: Site,
    /// The plugin that is called.
    pub plugin: PathBuf,
    _dir: TempDir,
}

impl Crowd {
    /// A node with `count` pods behind veths, without ADD.
    pub fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::new(dir.path().join("site"));
        let node = Node::new("node", 0);
        let pods = (0..count).map(|place| pod(&node, place)).collect();
        Self { node, pods, site, plugin: bin(), _dir: dir }
    }

    /// One more pod.
    pub fn grow(&mut self) -> usize {
        self.pods.push(pod(&self.node, self.pods.len()));
        self.pods.len() - 1
    }

    /// Container ID of a pod.
    pub fn id(place: usize) -> String {
        format!("ctr{place}")
    }

    /// Calls the plugin for a pod.
    pub fn call(&self, place: usize, command: &str, extra: Value) -> Reply {
        let netns: &Netns = &self.pods[place];
        let path = netns.path().to_str().unwrap().to_owned();
        let (address, gateway) = addresses(place);
        let mut conf = self.site.entry(json!({ "cniVersion": "1.0.0", "name": "pods", "prevResult": {
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "eth0", "sandbox": path }],
            "ips": [{ "address": address, "gateway": gateway, "interface": 0 }],
        }}));
        let Value::Object(extra) = extra else { panic!("an object") };
        conf.as_object_mut().unwrap().extend(extra);
        let call = Call {
            container_id: Self::id(place),
            netns: path,
            ifname: "eth0".to_owned(),
            args: format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-{place};K8S_POD_UID=u-{place}"),
            path: "/opt/cni/bin".into(),
            node: Some(self.node.path().to_owned()),
            ..Call::new(&self.plugin, command, &conf)
        };
        call.run().unwrap()
    }

    /// ADD for every pod.
    pub fn add_all(&self) {
        for place in 0..self.pods.len() {
            let reply = self.call(place, "ADD", json!({}));
            assert!(reply.ok(), "{reply:?}");
        }
    }

    /// Destinations of our routes in a pod.
    pub fn routes(&self, place: usize) -> BTreeSet<String> {
        let routes = self.pods[place].json("route show proto 141");
        routes.as_array().unwrap().iter().map(|route| route["dst"].as_str().unwrap().to_owned()).collect()
    }

    /// Starts listening, and returns what waits until every pod was told of a route to `dst` that is new (or gone).
    pub fn watch(&self, dst: [u8; 4], gone: bool) -> Watch {
        let (ready, listening) = mpsc::channel();
        let (path, count) = (self.node.path().to_owned(), self.pods.len());
        let thread = std::thread::spawn(move || {
            in_netns(&path, || {
                let socket = listen();
                ready.send(()).unwrap();
                let kind = if gone { GONE } else { NEW };
                let mut last = Instant::now();
                let mut left = count;
                while left > 0 {
                    let (bytes, _) = socket.recv_from_full().unwrap();
                    if u16::from_ne_bytes([bytes[4], bytes[5]]) == kind && bytes.windows(4).skip(16).any(|at| at == dst)
                    {
                        left -= 1;
                        last = Instant::now();
                    }
                }
                last
            })
        });
        listening.recv().unwrap();
        Watch { thread, deadline: Duration::from_secs(60) }
    }
}

/// Notifications of all numbered namespaces, in the current one.
fn listen() -> Socket {
    let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
    socket.bind(&SocketAddr::new(0, 0)).unwrap();
    socket.set_listen_all_namespaces(true).unwrap();
    socket.set_rx_buf_sz(4 * 1024 * 1024).unwrap();
    socket.add_membership(GROUP).unwrap();
    socket
}

/// A wait under way.
pub struct Watch {
    thread: std::thread::JoinHandle<Instant>,
    deadline: Duration,
}

impl Watch {
    /// When the last of the pods was told.
    ///
    /// # Panics
    /// Where that takes more than a minute.
    pub fn end(self) -> Instant {
        let started = Instant::now();
        while !self.thread.is_finished() {
            assert!(started.elapsed() < self.deadline, "not every pod has followed");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.thread.join().unwrap()
    }
}

fn addresses(place: usize) -> (String, String) {
    let (high, low) = (place / 250, place % 250);
    (format!("10.{}.{low}.2/24", 100 + high), format!("10.{}.{low}.1", 100 + high))
}

fn pod(node: &Node, place: usize) -> Pod {
    let pod = Pod::new("pod", 0);
    let (address, gateway) = addresses(place);
    node.ip(&format!("link add h{place} type veth peer name eth0 netns {}", pod.name()));
    node.ip(&format!("addr add {gateway}/24 dev h{place}"));
    node.ip(&format!("link set h{place} up"));
    pod.ip(&format!("addr add {address} dev eth0"));
    pod.ip("link set eth0 up");
    pod.ip(&format!("route add default via {gateway}"));
    pod
}

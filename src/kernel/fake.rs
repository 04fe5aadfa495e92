//! A kernel in memory, for tests: it behaves as the real one for what crosslink does, records every request, and
//! answers any of them with an errno on demand. It is handed in where the real one would be; nothing chooses it by
//! itself, and the feature `fake` keeps it out of shipped binaries.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use crosslink_core::{
    model::{Address, Change, Family, Link, NetnsState, ObservedRoute, Route, Side, Veth},
    numbers::PROTOCOL,
    record::NetnsId,
};
use ipnet::IpNet;
use nix::errno::Errno;

use crate::{Applied, Error, Kernel, NodeQuery, PodQuery};

/// A request, as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Entering a sandbox.
    Enter(PathBuf),
    /// Looking at the pod.
    ObservePod(PodQuery),
    /// Looking at the node.
    ObserveNode(NodeQuery),
    /// One change.
    Change(Change),
}

/// The kernel.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    /// The node's namespace.
    pub node: NetnsState,
    /// Sandboxes by path.
    pub sandboxes: BTreeMap<PathBuf, (NetnsId, NetnsState)>,
    /// The sandbox that was entered.
    pub entered: Option<PathBuf>,
    /// Every request so far.
    pub requests: Vec<Request>,
    /// Errno by number of the request, counted from 0.
    pub errnos: BTreeMap<usize, Errno>,
    /// Numbers of the changes whose answer gets lost though they are carried out.
    pub lost: Vec<usize>,
    next_index: u32,
}

impl FakeKernel {
    /// A kernel with one sandbox at `path`.
    pub fn with_sandbox(path: &Path, state: NetnsState) -> Self {
        let mut kernel = Self { next_index: 1000, ..Self::default() };
        let id = NetnsId { path: path.to_owned(), dev: 4, inode: 4_026_532_000, cookie: Some(77) };
        kernel.sandboxes.insert(path.to_owned(), (id, state));
        kernel
    }

    /// The sandbox that was entered.
    pub fn pod(&self) -> Option<&NetnsState> {
        self.sandboxes.get(self.entered.as_ref()?).map(|(_, state)| state)
    }

    /// The changes that were asked for, refused ones included.
    pub fn changes(&self) -> Vec<&Change> {
        let mut changes = Vec::new();
        for request in &self.requests {
            if let Request::Change(change) = request {
                changes.push(change);
            }
        }
        changes
    }

    /// Notes a request; fails where the script says so.
    fn request(&mut self, request: Request) -> Result<(), Errno> {
        let number = self.requests.len();
        self.requests.push(request);
        self.errnos.get(&number).map_or(Ok(()), |errno| Err(*errno))
    }

    fn side(&mut self, side: Side) -> Result<&mut NetnsState, Error> {
        match (side, &self.entered) {
            (Side::Node, _) => Ok(&mut self.node),
            (Side::Pod, Some(path)) => self.sandboxes.get_mut(path).map(|(_, state)| state).ok_or(Error::NoSandbox),
            (Side::Pod, None) => Err(Error::NoSandbox),
        }
    }

    fn change(&mut self, change: &Change) -> Result<(), Errno> {
        match change {
            Change::CreateVeth(veth) => self.create_veth(veth),
            Change::DeleteNodeLink(name) => self.delete_link(name),
            Change::SetMtu(at, name, mtu) => {
                find_link(self.state(*at)?, name)?.mtu = *mtu;
                Ok(())
            }
            Change::SetUp(at, name) => {
                find_link(self.state(*at)?, name)?.up = true;
                Ok(())
            }
            Change::SetSysctl(sysctl, _) => {
                let known = self.state(sysctl.side)?.sysctls.get_mut(&sysctl.key).ok_or(Errno::ENOENT)?;
                known.clone_from(&sysctl.value);
                Ok(())
            }
            Change::AddAddress(dev, addr) => {
                let state = self.state(Side::Pod)?;
                find_link(state, dev)?;
                let net = crosslink_core::cidr::host(*addr);
                if state.addresses.iter().any(|address| address.dev == *dev && address.net == net) {
                    return Ok(());
                }
                let dev = dev.clone();
                state.addresses.push(Address { dev, net, global: false, tentative: false, unstable: false });
                Ok(())
            }
            Change::SetNeighbour(at, neighbour) => {
                let state = self.state(*at)?;
                find_link(state, &neighbour.dev)?;
                state.neighbours.retain(|known| (&known.dev, known.ip) != (&neighbour.dev, neighbour.ip));
                state.neighbours.push(neighbour.clone());
                Ok(())
            }
            Change::AddRule(rule) => {
                if !self.node.rules.contains(rule) {
                    self.node.rules.push(*rule);
                }
                Ok(())
            }
            Change::AddRoute(at, route) => self.add_route(*at, route),
            Change::ReplaceRoute(at, route, _) => {
                let state = self.state(*at)?;
                find_link(state, &route.dev)?;
                let known = state.routes.iter_mut().find(|known| same_place(known, route)).ok_or(Errno::ENOENT)?;
                known.route = route.clone();
                known.protocol = PROTOCOL;
                Ok(())
            }
            Change::DeleteRoute(at, route) => {
                let state = self.state(*at)?;
                state.routes.retain(|known| !(known.protocol == PROTOCOL && known.route == *route));
                Ok(())
            }
        }
    }

    fn state(&mut self, side: Side) -> Result<&mut NetnsState, Errno> {
        self.side(side).map_err(|_| Errno::EBADF)
    }

    fn add_route(&mut self, side: Side, route: &Route) -> Result<(), Errno> {
        let state = self.state(side)?;
        if !find_link(state, &route.dev)?.up {
            return Err(Errno::ENETDOWN);
        }
        let metric = metric_of(&route.dst);
        if state.routes.iter().any(|known| same_place(known, route) && known.metric == metric) {
            return Err(Errno::EEXIST);
        }
        let route = route.clone();
        state.routes.push(ObservedRoute { route, protocol: PROTOCOL, metric, unicast: true, multipath: false });
        Ok(())
    }

    fn create_veth(&mut self, veth: &Veth) -> Result<(), Errno> {
        let indices = [self.next_index, self.next_index + 1];
        if self.node.link(&veth.node).is_some() || self.state(Side::Pod)?.link(&veth.pod).is_some() {
            return Err(Errno::EEXIST);
        }
        self.next_index += 2;
        let end = |name: &str, mac: [u8; 6], own: u32, peer: u32| Link {
            index: own,
            name: name.to_owned(),
            kind: Some("veth".to_owned()),
            mac: mac.to_vec(),
            mtu: veth.mtu,
            up: false,
            loopback: false,
            peer: Some(peer),
            peer_elsewhere: true,
        };
        let [pod, node] = indices;
        let pod_end = end(&veth.pod, veth.pod_mac, pod, node);
        let node_end = end(&veth.node, veth.node_mac, node, pod);
        for (side, link) in [(Side::Pod, pod_end), (Side::Node, node_end)] {
            let state = self.state(side)?;
            for (key, value) in LINK_SYSCTLS {
                let (family, name) = key;
                state.sysctls.insert(format!("{family}/conf/{}/{name}", link.name), value.to_owned());
            }
            state.links.push(link);
        }
        Ok(())
    }

    fn delete_link(&mut self, name: &str) -> Result<(), Errno> {
        let Some(link) = self.node.link(name).cloned() else { return Err(Errno::ENODEV) };
        forget_link(&mut self.node, name);
        for (_, state) in self.sandboxes.values_mut() {
            let peer =
                state.links.iter().find(|other| Some(other.index) == link.peer && other.peer == Some(link.index));
            if let Some(peer) = peer.map(|peer| peer.name.clone()) {
                forget_link(state, &peer);
            }
        }
        Ok(())
    }
}

/// What a new interface's sysctls are, as far as crosslink sets them.
const LINK_SYSCTLS: [((&str, &str), &str); 8] = [
    (("ipv4", "rp_filter"), "0"),
    (("ipv4", "forwarding"), "0"),
    (("ipv4", "accept_redirects"), "1"),
    (("ipv6", "disable_ipv6"), "0"),
    (("ipv6", "accept_ra"), "1"),
    (("ipv6", "forwarding"), "0"),
    (("ipv6", "addr_gen_mode"), "0"),
    (("ipv6", "accept_redirects"), "1"),
];

/// The metric that the kernel gives a route without one (`IP6_RT_PRIO_USER`, net/ip6_route.h).
const fn metric_of(dst: &IpNet) -> u32 {
    match Family::of_net(dst) {
        Family::V4 => 0,
        Family::V6 => 1024,
    }
}

fn same_place(known: &ObservedRoute, route: &Route) -> bool {
    (known.route.table, known.route.dst) == (route.table, route.dst)
}

fn find_link<'s>(state: &'s mut NetnsState, name: &str) -> Result<&'s mut Link, Errno> {
    state.links.iter_mut().find(|link| link.name == name).ok_or(Errno::ENODEV)
}

/// A link takes everything that is on it along.
fn forget_link(state: &mut NetnsState, name: &str) {
    state.links.retain(|link| link.name != name);
    state.addresses.retain(|address| address.dev != name);
    state.routes.retain(|known| known.route.dev != name);
    state.neighbours.retain(|neighbour| neighbour.dev != name);
    state.sysctls.retain(|key, _| !key.contains(&format!("/conf/{name}/")));
}

/// The sysctls that were asked for.
fn chosen(state: &NetnsState, keys: &[String]) -> BTreeMap<String, String> {
    state.sysctls.iter().filter(|(key, _)| keys.contains(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

impl Kernel for FakeKernel {
    fn enter(&mut self, netns: &Path, _: Duration) -> Result<NetnsId, Error> {
        let refused = |errno| Error::File { what: "open sandbox", path: netns.to_owned(), errno };
        self.request(Request::Enter(netns.to_owned())).map_err(refused)?;
        let (id, _) = self.sandboxes.get(netns).ok_or_else(|| refused(Errno::ENOENT))?;
        self.entered = Some(netns.to_owned());
        Ok(id.clone())
    }

    fn identify(&mut self, netns: &Path) -> Option<NetnsId> {
        self.sandboxes.get(netns).map(|(id, _)| id.clone())
    }

    fn observe_pod(&mut self, query: &PodQuery) -> Result<NetnsState, Error> {
        let refused = |errno| Error::Netlink { what: "look at the pod".to_owned(), errno };
        self.request(Request::ObservePod(query.clone())).map_err(refused)?;
        let state = self.side(Side::Pod)?.clone();
        let mut seen = NetnsState { sysctls: chosen(&state, &query.sysctls), ..NetnsState::default() };
        if let Some(veth) = &query.veth {
            seen.neighbours = state.neighbours.iter().filter(|n| n.dev == *veth).cloned().collect();
        }
        if query.state {
            seen = NetnsState { links: state.links, addresses: state.addresses, routes: state.routes, ..seen };
        }
        Ok(seen)
    }

    fn observe_node(&mut self, query: &NodeQuery) -> Result<NetnsState, Error> {
        let refused = |errno| Error::Netlink { what: "look at the node".to_owned(), errno };
        self.request(Request::ObserveNode(query.clone())).map_err(refused)?;
        let state = &self.node;
        let named = |link: &Link| query.peer == Some(link.index) || query.veth.as_ref() == Some(&link.name);
        let mut seen = NetnsState { sysctls: chosen(state, &query.sysctls), ..NetnsState::default() };
        seen.links = state.links.iter().filter(|link| query.addresses || named(link)).cloned().collect();
        if query.addresses {
            seen.addresses.clone_from(&state.addresses);
        }
        let wanted = |table| (query.addresses && table == 254) || (query.pods_table && table != 254);
        seen.routes = state.routes.iter().filter(|known| wanted(known.route.table)).cloned().collect();
        if let Some(veth) = &query.veth {
            seen.neighbours = state.neighbours.iter().filter(|n| n.dev == *veth).cloned().collect();
        }
        if query.pods_table {
            seen.rules.clone_from(&state.rules);
        }
        Ok(seen)
    }

    fn apply(&mut self, changes: &[Change]) -> Applied {
        let mut applied = Applied::default();
        for (place, change) in changes.iter().enumerate() {
            let number = self.requests.len();
            let outcome = self.request(Request::Change(change.clone())).and_then(|()| self.change(change));
            match outcome {
                Ok(()) if self.lost.contains(&number) => applied.unknown.push(place),
                Ok(()) => applied.done.push(place),
                Err(errno) => {
                    applied.failures.push((place, Error::Netlink { what: change.to_string(), errno }));
                    break;
                }
            }
        }
        applied
    }
}

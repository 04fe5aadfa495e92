//! A small kernel: applies changes to observed state with the rules that matter here. Whatever the real one would refuse
//! is an error, and so is touching what is not ours.

use std::collections::BTreeMap;

use crosslink_core::{
    model::{Address, Change, Link, Neighbour, Observed, ObservedRoute, Route, Side, Sysctl, Veth},
    numbers::PROTOCOL,
};
use ipnet::IpNet;

/// Observed state that changes.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    pub seen: Observed,
    /// How many changes came too late to matter: a route to replace or to delete had gone with its link. The real
    /// kernel takes the one as an addition, and the answer to the other (`ESRCH`) counts as done.
    pub moot: usize,
    next_index: u32,
}

/// State without what may differ: order, interface indices, rules (they stay for ever).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    links: Vec<(Side, String, Vec<u8>, u32, bool)>,
    addresses: Vec<(String, IpNet)>,
    pub routes: Vec<(Side, Route, u8, u32)>,
    neighbours: Vec<(Side, Neighbour)>,
    sysctls: Vec<(Side, BTreeMap<String, String>)>,
}

type Outcome = Result<(), String>;

/// The metric of a route without one.
pub const fn metric(dst: &IpNet) -> u32 {
    match dst {
        IpNet::V4(_) => 0,
        IpNet::V6(_) => 1024,
    }
}

impl Kernel {
    /// A kernel in that state.
    pub const fn new(seen: Observed) -> Self {
        Self { seen, moot: 0, next_index: 1000 }
    }

    /// Applies changes in order.
    pub fn apply<'c>(&mut self, changes: impl IntoIterator<Item = &'c Change>) -> Outcome {
        changes.into_iter().try_for_each(|change| self.change(change).map_err(|err| format!("{change}: {err}")))
    }

    /// Undoes changes, last first, as a failed ADD does.
    pub fn undo(&mut self, changes: &[Change]) -> Outcome {
        let inverses: Vec<Change> = changes.iter().rev().filter_map(Change::inverse).collect();
        self.apply(&inverses)
    }

    fn change(&mut self, change: &Change) -> Outcome {
        match change {
            Change::CreateVeth(veth) => self.create(veth),
            Change::DeleteNodeLink(name) => self.delete(name),
            Change::SetMtu(side, name, mtu) => {
                self.link(*side, name)?.mtu = *mtu;
                Ok(())
            }
            Change::SetUp(side, name) => {
                self.link(*side, name)?.up = true;
                Ok(())
            }
            Change::SetSysctl(Sysctl { side, key, value }, old) => {
                let place = self.side(*side).sysctls.get_mut(key).ok_or("ENOENT")?;
                if old.as_ref().is_some_and(|old| old != place) {
                    return Err(format!("is {place}, not {old:?}"));
                }
                place.clone_from(value);
                Ok(())
            }
            Change::AddAddress(dev, addr) => {
                self.link(Side::Pod, dev)?;
                let fresh =
                    Address { dev: dev.clone(), net: (*addr).into(), global: false, tentative: false, unstable: false };
                add(&mut self.seen.pod.addresses, fresh)
            }
            Change::SetNeighbour(side, neighbour) => {
                self.link(*side, &neighbour.dev)?;
                let all = &mut self.side(*side).neighbours;
                all.retain(|old| (&old.dev, old.ip) != (&neighbour.dev, neighbour.ip));
                add(all, neighbour.clone())
            }
            Change::AddRule(rule) => add(&mut self.seen.node.rules, *rule),
            Change::AddRoute(side, route) => self.add_route(*side, route),
            Change::ReplaceRoute(side, route, old) => self.replace_route(*side, route, old),
            Change::DeleteRoute(side, route) => self.delete_route(*side, route),
        }
    }

    fn side(&mut self, side: Side) -> &mut crosslink_core::model::NetnsState {
        match side {
            Side::Pod => &mut self.seen.pod,
            Side::Node => &mut self.seen.node,
        }
    }

    fn link(&mut self, side: Side, name: &str) -> Result<&mut Link, String> {
        self.side(side).links.iter_mut().find(|link| link.name == name).ok_or_else(|| format!("ENODEV {name}"))
    }

    fn create(&mut self, veth: &Veth) -> Outcome {
        if self.link(Side::Pod, &veth.pod).is_ok() || self.link(Side::Node, &veth.node).is_ok() {
            return Err("EEXIST".to_owned());
        }
        let (one, two) = (self.next_index, self.next_index + 1);
        self.next_index += 2;
        let ends = [(Side::Pod, &veth.pod, veth.pod_mac, one, two), (Side::Node, &veth.node, veth.node_mac, two, one)];
        for (side, name, mac, index, peer) in ends {
            let state = self.side(side);
            let kind = Some("veth".to_owned());
            let mac = mac.to_vec();
            state.links.push(Link {
                index,
                name: name.clone(),
                kind,
                mac,
                mtu: veth.mtu,
                peer: Some(peer),
                peer_elsewhere: true,
                ..Link::default()
            });
            for (key, value) in [
                ("ipv4/rp_filter", "0"),
                ("ipv4/forwarding", "0"),
                ("ipv4/accept_redirects", "1"),
                ("ipv6/disable_ipv6", "1"),
                ("ipv6/addr_gen_mode", "0"),
                ("ipv6/accept_ra", "1"),
                ("ipv6/accept_redirects", "1"),
                ("ipv6/forwarding", "0"),
            ] {
                let (family, key) = key.split_once('/').unwrap();
                state.sysctls.insert(format!("{family}/conf/{name}/{key}"), value.to_owned());
            }
        }
        Ok(())
    }

    /// A link takes with it its peer and everything that is on either.
    fn delete(&mut self, name: &str) -> Outcome {
        let link = self.link(Side::Node, name)?.clone();
        self.drop_link(Side::Node, name);
        let peer =
            self.seen.pod.links.iter().find(|other| Some(other.index) == link.peer).map(|other| other.name.clone());
        if let Some(peer) = peer {
            self.drop_link(Side::Pod, &peer);
        }
        Ok(())
    }

    /// Removes one end only, as when the pod's end is moved away.
    pub fn drop_link(&mut self, side: Side, name: &str) {
        let state = self.side(side);
        state.links.retain(|link| link.name != name);
        state.routes.retain(|seen| seen.route.dev != name);
        state.addresses.retain(|address| address.dev != name);
        state.neighbours.retain(|neighbour| neighbour.dev != name);
        state.sysctls.retain(|key, _| !key.contains(&format!("/conf/{name}/")));
    }

    /// A device that is up, and a source that is an address of this namespace.
    fn routable(&mut self, side: Side, route: &Route) -> Outcome {
        if !self.link(side, &route.dev)?.up {
            return Err("ENETDOWN".to_owned());
        }
        let local =
            |src| self.side(side).addresses.iter().any(|address| address.net.addr() == src && !address.tentative);
        match route.src.is_none_or(local) {
            true => Ok(()),
            false => Err("EINVAL: src is no address of ours".to_owned()),
        }
    }

    /// Where a route of the same key is: table, prefix and metric, whoever made it.
    fn twin(&mut self, side: Side, route: &Route) -> Option<&mut ObservedRoute> {
        let key = (route.table, route.dst, metric(&route.dst));
        self.side(side).routes.iter_mut().find(|seen| (seen.route.table, seen.route.dst, seen.metric) == key)
    }

    fn add_route(&mut self, side: Side, route: &Route) -> Outcome {
        self.routable(side, route)?;
        if self.twin(side, route).is_some() {
            return Err("EEXIST".to_owned());
        }
        let (route, metric) = (route.clone(), metric(&route.dst));
        self.side(side).routes.push(ObservedRoute {
            route,
            protocol: PROTOCOL,
            metric,
            unicast: true,
            multipath: false,
        });
        Ok(())
    }

    fn replace_route(&mut self, side: Side, route: &Route, old: &Route) -> Outcome {
        self.routable(side, route)?;
        let Some(twin) = self.twin(side, route) else {
            self.moot += 1;
            return self.add_route(side, route);
        };
        if !twin.ours() || twin.route != *old {
            return Err(format!("hits {twin:?} instead of {old}"));
        }
        twin.route = route.clone();
        Ok(())
    }

    fn delete_route(&mut self, side: Side, route: &Route) -> Outcome {
        let routes = &mut self.side(side).routes;
        match routes.iter().position(|seen| seen.ours() && seen.route == *route) {
            Some(place) => drop(routes.remove(place)),
            None => self.moot += 1,
        }
        Ok(())
    }

    /// The state, comparable.
    pub fn snapshot(&self) -> Snapshot {
        let sides = [Side::Pod, Side::Node];
        fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
            let mut items: Vec<T> = items.collect();
            items.sort();
            items
        }
        let each = |side| (side, self.seen.side(side));
        Snapshot {
            links: sorted(sides.into_iter().map(each).flat_map(|(side, state)| {
                state.links.iter().map(move |link| (side, link.name.clone(), link.mac.clone(), link.mtu, link.up))
            })),
            addresses: sorted(self.seen.pod.addresses.iter().map(|address| (address.dev.clone(), address.net))),
            routes: sorted(sides.into_iter().map(each).flat_map(|(side, state)| {
                state.routes.iter().map(move |seen| (side, seen.route.clone(), seen.protocol, seen.metric))
            })),
            neighbours: sorted(
                sides
                    .into_iter()
                    .map(each)
                    .flat_map(|(side, state)| state.neighbours.iter().map(move |neighbour| (side, neighbour.clone()))),
            ),
            sysctls: sides.into_iter().map(|side| (side, self.seen.side(side).sysctls.clone())).collect(),
        }
    }
}

fn add<T: PartialEq>(all: &mut Vec<T>, fresh: T) -> Outcome {
    if all.contains(&fresh) {
        return Err("EEXIST".to_owned());
    }
    all.push(fresh);
    Ok(())
}

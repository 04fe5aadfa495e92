//! Wanted against observed: the changes that lead from one to the other, and what stands in the way. Pure; the plugin,
//! CHECK and the agent's resync all decide here.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    model::{Change, Observed, ObservedRoute, Route, Side, Sysctl, Veth},
    numbers::{TABLE_MAIN, TABLE_PODS},
    wanted::Wanted,
};

/// What else is known when planning.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// What an earlier ADD of this attachment made.
    pub previous: Option<&'a Wanted>,
    /// Destinations in this sandbox that records of *other* attachments name: routes of ours, but not this one's.
    pub claimed: &'a BTreeSet<IpNet>,
}

/// Another owner's route where one of ours should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Side.
    pub side: Side,
    /// What we want.
    pub wanted: Route,
    /// What is there.
    pub existing: ObservedRoute,
}

/// The outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes, in the order in which they work.
    pub changes: Vec<Change>,
    /// What cannot be done without touching another owner's route.
    pub conflicts: Vec<Conflict>,
    /// Wanted routes that another owner's identical route already provides.
    pub identical: Vec<Route>,
    /// An interface of another owner that holds the name of our veth.
    pub foreign_veth: Option<String>,
}

/// Computes the changes that make `observed` hold all of `wanted` and nothing of ours besides.
pub fn plan(wanted: &Wanted, observed: &Observed, context: Context<'_>) -> Plan {
    let mut plan = Plan::default();
    let link = plan.links(wanted, observed, context);
    plan.sysctls(wanted, observed, link);
    if let Some(veth) = &wanted.veth {
        plan.veth(veth, wanted, observed, link);
    }
    plan.changes
        .extend(wanted.rules.iter().filter(|rule| !observed.node.rules.contains(rule)).copied().map(Change::AddRule));
    let gone = GoneLinks::new(wanted, context.previous, link);
    let mut stale = Vec::new();
    for side in [Side::Node, Side::Pod] {
        stale.extend(plan.routes(side, wanted, RoutesSeen { observed, context, gone: &gone }));
    }
    // New before old: at no moment is a destination that stays without a route.
    plan.changes.extend(stale);
    plan
}

/// What becomes of the veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    /// It stays, or none is wanted.
    Kept,
    /// It is made; nothing that was on a link of its names survives.
    Made,
}

/// Veth pairs whose routes go with them: one that is made anew, one that is not wanted any more.
struct GoneLinks<'a>(Vec<&'a Veth>);

impl<'a> GoneLinks<'a> {
    fn new(wanted: &'a Wanted, previous: Option<&'a Wanted>, link: LinkState) -> Self {
        let new = wanted.veth.as_ref();
        let old = previous.and_then(|previous| previous.veth.as_ref());
        let made = new.filter(|_| link == LinkState::Made);
        let unwanted = old.filter(|old| new.is_none_or(|new| !same_names(new, old)));
        Self(made.into_iter().chain(unwanted).collect())
    }

    fn has(&self, side: Side, dev: &str) -> bool {
        self.0.iter().any(|veth| dev == if side == Side::Pod { &veth.pod } else { &veth.node })
    }
}

fn same_names(one: &Veth, other: &Veth) -> bool {
    (&one.node, &one.pod) == (&other.node, &other.pod)
}

/// Input of [`Plan::routes`].
#[derive(Clone, Copy)]
struct RoutesSeen<'a> {
    observed: &'a Observed,
    context: Context<'a>,
    gone: &'a GoneLinks<'a>,
}

impl RoutesSeen<'_> {
    /// Whether a route was made for this attachment, so that we may replace or delete it.
    fn own(&self, side: Side, seen: &ObservedRoute, wanted: &Wanted) -> bool {
        if !seen.ours() || !seen.unicast {
            return false;
        }
        match side {
            Side::Pod => seen.route.table == TABLE_MAIN && !self.context.claimed.contains(&seen.route.dst),
            // In our table on the node: this attachment's link, or a stale route that holds this pod's address.
            Side::Node => {
                seen.route.table == TABLE_PODS
                    && (wanted.veth.as_ref().is_some_and(|veth| veth.node == seen.route.dev)
                        || wanted.node_routes.iter().any(|route| route.dst == seen.route.dst))
            }
        }
    }
}

impl Plan {
    fn links(&mut self, wanted: &Wanted, observed: &Observed, context: Context<'_>) -> LinkState {
        let previous = context.previous.and_then(|previous| previous.veth.as_ref());
        let unwanted = previous.filter(|old| wanted.veth.as_ref().is_none_or(|new| !same_names(new, old)));
        if let Some(old) = unwanted.filter(|old| observed.node.link(&old.node).is_some()) {
            self.changes.push(Change::DeleteNodeLink(old.node.clone()));
        }
        let Some(veth) = &wanted.veth else { return LinkState::Kept };
        let node = observed.node.link(&veth.node).filter(|_| unwanted.is_none_or(|old| old.node != veth.node));
        let pod = observed.pod.link(&veth.pod);
        let paired = matches!((node, pod), (Some(n), Some(p)) if n.peer == Some(p.index) && p.peer == Some(n.index));
        if pod.is_some() && !paired && unwanted.is_none_or(|old| old.pod != veth.pod) {
            self.foreign_veth = Some(veth.pod.clone());
            return LinkState::Kept;
        }
        let macs_kept = matches!((node, pod), (Some(n), Some(p)) if n.mac == veth.node_mac && p.mac == veth.pod_mac);
        if paired && macs_kept {
            return LinkState::Kept;
        }
        if node.is_some() {
            self.changes.push(Change::DeleteNodeLink(veth.node.clone()));
        }
        self.changes.push(Change::CreateVeth(veth.clone()));
        LinkState::Made
    }

    fn sysctls(&mut self, wanted: &Wanted, observed: &Observed, link: LinkState) {
        for want in &wanted.sysctls {
            let Sysctl { side, key, value } = &want.sysctl;
            let of_veth = wanted.veth.as_ref().is_some_and(|veth| {
                let dev = if *side == Side::Pod { &veth.pod } else { &veth.node };
                key.contains(&format!("/conf/{dev}/"))
            });
            let old = observed.side(*side).sysctls.get(key).filter(|_| !(of_veth && link == LinkState::Made));
            if old != Some(value) {
                self.changes.push(Change::SetSysctl(want.sysctl.clone(), old.cloned()));
            }
        }
    }

    fn veth(&mut self, veth: &Veth, wanted: &Wanted, observed: &Observed, link: LinkState) {
        let made = link == LinkState::Made;
        if let Some(addr) = wanted.veth_address {
            let present = observed.pod.addresses.iter().any(|seen| seen.dev == veth.pod && seen.net.addr() == addr);
            if made || !present {
                self.changes.push(Change::AddAddress(veth.pod.clone(), addr));
            }
        }
        for (side, name) in [(Side::Pod, &veth.pod), (Side::Node, &veth.node)] {
            let seen = observed.side(side).link(name).filter(|_| !made);
            if seen.is_some_and(|seen| seen.mtu != veth.mtu) {
                self.changes.push(Change::SetMtu(side, name.clone(), veth.mtu));
            }
            if seen.is_none_or(|seen| !seen.up) {
                self.changes.push(Change::SetUp(side, name.clone()));
            }
        }
        for (side, neighbour) in &wanted.neighbours {
            if made || !observed.side(*side).neighbours.contains(neighbour) {
                self.changes.push(Change::SetNeighbour(*side, neighbour.clone()));
            }
        }
    }

    /// Plans one side's routes; returns the deletions, which come last.
    fn routes(&mut self, side: Side, wanted: &Wanted, seen: RoutesSeen<'_>) -> Vec<Change> {
        let mut by_dst: BTreeMap<(u32, IpNet), Vec<&ObservedRoute>> = BTreeMap::new();
        let alive = seen.observed.side(side).routes.iter().filter(|r| !seen.gone.has(side, &r.route.dev));
        for route in alive {
            by_dst.entry((route.route.table, route.route.dst)).or_default().push(route);
        }
        let mut deletions = Vec::new();
        for route in wanted.routes(side) {
            let existing = by_dst.remove(&(route.table, route.dst)).unwrap_or_default();
            let (own, foreign): (Vec<&ObservedRoute>, Vec<_>) =
                existing.into_iter().partition(|existing| seen.own(side, existing, wanted));
            // One with a lower metric wins over ours even where ours is there.
            let wins =
                |foreign: &&&ObservedRoute| own.iter().all(|own| foreign.metric < own.metric || !own.same_as(route));
            let mut stale = Vec::new();
            if foreign.iter().any(|foreign| foreign.same_as(route)) && !own.iter().any(|own| own.same_as(route)) {
                self.identical.push(route.clone());
                stale = own;
            } else if let Some(foreign) = foreign.iter().filter(|foreign| !foreign.same_as(route)).find(wins) {
                self.conflicts.push(Conflict { side, wanted: route.clone(), existing: (**foreign).clone() });
                stale = own;
            } else if own.iter().any(|own| own.same_as(route)) {
                continue;
            } else if let Some(own) = own.first() {
                self.changes.push(Change::ReplaceRoute(side, route.clone(), own.route.clone()));
            } else {
                self.changes.push(Change::AddRoute(side, route.clone()));
            }
            // Ours would be forgotten with the wish for it.
            deletions.extend(stale.iter().map(|own| Change::DeleteRoute(side, own.route.clone())));
        }
        let left = by_dst.into_values().flatten().filter(|left| seen.own(side, left, wanted));
        deletions.extend(left.map(|left| Change::DeleteRoute(side, left.route.clone())));
        deletions
    }
}

/// What CHECK says: each wanted thing that is missing or different, in words. Surplus is no drift.
pub fn drift(wanted: &Wanted, observed: &Observed, claimed: &BTreeSet<IpNet>) -> Vec<String> {
    let plan = plan(wanted, observed, Context { previous: None, claimed });
    let mut lines: Vec<String> = plan.foreign_veth.iter().map(|name| format!("pod: {name} is not our veth")).collect();
    lines.extend(plan.changes.iter().filter_map(|change| match change {
        Change::DeleteRoute(..) | Change::DeleteNodeLink(_) => None,
        Change::ReplaceRoute(..) | Change::SetSysctl(_, Some(_)) => Some(format!("differs: {change}")),
        Change::CreateVeth(_)
        | Change::SetMtu(..)
        | Change::SetUp(..)
        | Change::SetSysctl(_, None)
        | Change::AddAddress(..)
        | Change::SetNeighbour(..)
        | Change::AddRule(_)
        | Change::AddRoute(..) => Some(format!("missing: {change}")),
    }));
    lines.extend(plan.conflicts.iter().map(|conflict| {
        format!(
            "missing: {}: route {} (another owner's is there: {})",
            conflict.side,
            conflict.wanted,
            describe(&conflict.existing)
        )
    }));
    lines
}

/// A route of another owner in words, with its protocol number.
pub fn describe(seen: &ObservedRoute) -> String {
    let kind = match (seen.unicast, seen.multipath) {
        (true, false) => "",
        (true, true) => "multipath ",
        (false, _) => "non-unicast ",
    };
    format!("{kind}{} proto {} metric {}", seen.route, seen.protocol, seen.metric)
}

/// What DEL does with a record: delete what was made, put back what was changed. Only where it still is as we left it.
pub fn teardown(applied: &Wanted, saved: &[Sysctl], observed: &Observed) -> Vec<Change> {
    let mut changes = Vec::new();
    for old in saved {
        let current = observed.side(old.side).sysctls.get(&old.key);
        let ours = applied.sysctls.iter().find(|want| want.sysctl.key == old.key && want.sysctl.side == old.side);
        if let (Some(current), Some(ours)) = (current, ours)
            && *current == ours.sysctl.value
            && *current != old.value
        {
            changes.push(Change::SetSysctl(old.clone(), Some(current.clone())));
        }
    }
    let there = |wanted: &&Route| observed.pod.routes.iter().any(|seen| seen.ours() && seen.route == **wanted);
    changes.extend(applied.routes(Side::Pod).filter(there).map(|route| Change::DeleteRoute(Side::Pod, route.clone())));
    if let Some(veth) = applied.veth.as_ref().filter(|veth| observed.node.link(&veth.node).is_some()) {
        changes.push(Change::DeleteNodeLink(veth.node.clone()));
    }
    changes
}

/// What DEL does without a record: the link whose name is derivable, and routes of our protocol in the sandbox where no
/// other record names it (`sole`).
pub fn teardown_unrecorded(node_link: &str, observed: &Observed, sole: bool) -> Vec<Change> {
    let ours = |seen: &&ObservedRoute| sole && seen.ours() && seen.unicast && seen.route.table == TABLE_MAIN;
    let routes = observed.pod.routes.iter().filter(ours).map(|seen| Change::DeleteRoute(Side::Pod, seen.route.clone()));
    let link = observed.node.link(node_link).filter(|link| link.kind.as_deref() == Some("veth"));
    routes.chain(link.map(|link| Change::DeleteNodeLink(link.name.clone()))).collect()
}

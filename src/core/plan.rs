//! Wanted against observed: the changes that lead from one to the other, and what stands in the way. Pure; the plugin,
//! CHECK and the agent's resync all decide here.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    model::{Change, Link, Observed, ObservedRoute, Route, Side, Sysctl, Veth},
    numbers::{TABLE_MAIN, TABLE_PODS},
    wanted::Wanted,
};

/// What else is known when planning.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Name of the attachment's interface.
    pub ifname: &'a str,
    /// What an earlier ADD of this attachment made.
    pub previous: Option<&'a Wanted>,
    /// Values from before that ADD, to put back where the sysctl is not wanted any more.
    pub saved: &'a [Sysctl],
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
    let links = plan.links(wanted, observed, context);
    plan.sysctls(wanted, context.saved, observed, &links);
    if let Some(veth) = &wanted.veth {
        plan.veth(veth, wanted, observed, &links);
    }
    plan.changes
        .extend(wanted.rules.iter().filter(|rule| !observed.node.rules.contains(rule)).copied().map(Change::AddRule));
    let mut stale = Vec::new();
    for side in [Side::Node, Side::Pod] {
        stale.extend(plan.routes(side, wanted, RoutesSeen { observed, context, links: &links }));
    }
    // New before old: at no moment is a destination that stays without a route.
    plan.changes.extend(stale);
    plan
}

/// What becomes of veth pairs.
#[derive(Default)]
struct LinkPlan {
    /// The wanted pair is made; nothing that was on a link of its names survives.
    made: bool,
    /// Interfaces that go, and with them what is on them.
    gone: BTreeSet<(Side, String)>,
}

impl LinkPlan {
    fn gone(&self, side: Side, dev: &str) -> bool {
        self.gone.iter().any(|(at, name)| *at == side && name == dev)
    }
}

fn are_pair(one: &Link, other: &Link) -> bool {
    one.peer == Some(other.index) && other.peer == Some(one.index)
}

/// Whether the pair is there as it was made.
fn is_intact(veth: &Veth, observed: &Observed) -> bool {
    let ends = (observed.node.link(&veth.node), observed.pod.link(&veth.pod));
    matches!(ends, (Some(node), Some(pod)) if are_pair(node, pod) && node.mac == veth.node_mac && pod.mac == veth.pod_mac)
}

/// Input of [`Plan::routes`].
#[derive(Clone, Copy)]
struct RoutesSeen<'a> {
    observed: &'a Observed,
    context: Context<'a>,
    links: &'a LinkPlan,
}

impl RoutesSeen<'_> {
    /// Whether an interface of the pod is this attachment's. Another attachment's routes carry our protocol too, and its
    /// record may be lost.
    fn is_own_device(&self, dev: &str, wanted: &Wanted) -> bool {
        let veths = [Some(wanted), self.context.previous].into_iter().flatten().filter_map(|made| made.veth.as_ref());
        dev == self.context.ifname
            || veths.into_iter().any(|veth| veth.pod == dev)
            || wanted.pod_routes.iter().any(|route| route.route.dev == dev)
    }

    /// Whether a route was made for this attachment, so that we may replace or delete it.
    fn own(&self, side: Side, seen: &ObservedRoute, wanted: &Wanted) -> bool {
        if !seen.ours() || !seen.unicast {
            return false;
        }
        match side {
            Side::Pod => {
                seen.route.table == TABLE_MAIN
                    && !self.context.claimed.contains(&seen.route.dst)
                    && self.is_own_device(&seen.route.dev, wanted)
            }
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
    fn links(&mut self, wanted: &Wanted, observed: &Observed, context: Context<'_>) -> LinkPlan {
        let new = wanted.veth.as_ref();
        let kept = new.filter(|veth| is_intact(veth, observed));
        let old = context.previous.and_then(|previous| previous.veth.as_ref());
        let names: BTreeSet<&str> = old.into_iter().chain(new).map(|veth| veth.node.as_str()).collect();
        let going: Vec<&Link> = names
            .into_iter()
            .filter(|name| kept.is_none_or(|kept| kept.node != *name))
            .filter_map(|name| observed.node.link(name))
            .filter(|link| link.is_veth())
            .collect();
        let peers = |link: &Link| {
            observed.pod.links.iter().filter(|pod| are_pair(link, pod)).map(|pod| pod.name.clone()).collect::<Vec<_>>()
        };
        let mut plan = LinkPlan::default();
        for link in going {
            plan.gone.insert((Side::Node, link.name.clone()));
            plan.gone.extend(peers(link).into_iter().map(|name| (Side::Pod, name)));
            self.changes.push(Change::DeleteNodeLink(link.name.clone()));
        }
        let (Some(veth), None) = (new, kept) else { return plan };
        if observed.node.link(&veth.node).is_some_and(|link| !link.is_veth()) {
            self.foreign_veth = Some(veth.node.clone());
            return plan;
        }
        if observed.pod.link(&veth.pod).is_some() && !plan.gone(Side::Pod, &veth.pod) {
            self.foreign_veth = Some(veth.pod.clone());
            return plan;
        }
        self.changes.push(Change::CreateVeth(veth.clone()));
        plan.made = true;
        // What names a link that is not there any more cannot be on the new one.
        plan.gone.extend([(Side::Pod, veth.pod.clone()), (Side::Node, veth.node.clone())]);
        plan
    }

    fn sysctls(&mut self, wanted: &Wanted, saved: &[Sysctl], observed: &Observed, links: &LinkPlan) {
        for old in saved {
            let wanted = wanted.sysctls.iter().any(|want| want.sysctl.is_same(old));
            let current = observed.side(old.side).sysctls.get(&old.key);
            if let Some(current) = current.filter(|current| !wanted && **current != old.value) {
                self.changes.push(Change::SetSysctl(old.clone(), Some(current.clone())));
            }
        }
        for want in &wanted.sysctls {
            let Sysctl { side, key, value } = &want.sysctl;
            let of_veth = wanted.veth.as_ref().is_some_and(|veth| {
                let dev = if *side == Side::Pod { &veth.pod } else { &veth.node };
                key.contains(&format!("/conf/{dev}/"))
            });
            let old = observed.side(*side).sysctls.get(key).filter(|_| !(of_veth && links.made));
            // One that is not there although its interface is belongs to a family that the kernel does not have.
            let settable = old.is_some() || (of_veth && links.made);
            if settable && old != Some(value) {
                self.changes.push(Change::SetSysctl(want.sysctl.clone(), old.cloned()));
            }
        }
    }

    fn veth(&mut self, veth: &Veth, wanted: &Wanted, observed: &Observed, links: &LinkPlan) {
        let made = links.made;
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
        let alive = seen.observed.side(side).routes.iter().filter(|r| !seen.links.gone(side, &r.route.dev));
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
    let plan = plan(wanted, observed, Context { ifname: "", previous: None, saved: &[], claimed });
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

/// What DEL goes by.
#[derive(Clone, Copy, Debug)]
pub struct Recorded<'a> {
    /// Name of the attachment's interface.
    pub ifname: &'a str,
    /// What was applied.
    pub applied: &'a Wanted,
    /// Values to put back.
    pub saved: &'a [Sysctl],
}

/// What DEL does with a record: delete what was made, put back what was changed. Only where it still is as we left it.
/// Routes of ours by the attachment's interfaces are also those that a resync added and did not live to record, unless
/// another attachment claims them.
pub fn teardown(record: Recorded<'_>, observed: &Observed, claimed: &BTreeSet<IpNet>) -> Vec<Change> {
    let Recorded { ifname, applied, saved } = record;
    let mut changes = Vec::new();
    for old in saved {
        let current = observed.side(old.side).sysctls.get(&old.key);
        let ours = applied.sysctls.iter().find(|want| want.sysctl.is_same(old));
        if let (Some(current), Some(ours)) = (current, ours)
            && *current == ours.sysctl.value
            && *current != old.value
        {
            changes.push(Change::SetSysctl(old.clone(), Some(current.clone())));
        }
    }
    let made: BTreeMap<IpNet, &Route> = applied.routes(Side::Pod).map(|route| (route.dst, route)).collect();
    let veth = applied.veth.as_ref().map(|veth| veth.pod.as_str());
    let own = |seen: &&ObservedRoute| {
        let recorded = made.get(&seen.route.dst).is_some_and(|route| **route == seen.route);
        let left = [Some(ifname), veth].contains(&Some(seen.route.dev.as_str())) && !claimed.contains(&seen.route.dst);
        seen.ours() && seen.unicast && seen.route.table == TABLE_MAIN && (recorded || left)
    };
    let routes = observed.pod.routes.iter().filter(own);
    changes.extend(routes.map(|seen| Change::DeleteRoute(Side::Pod, seen.route.clone())));
    let link = applied.veth.as_ref().and_then(|veth| observed.node.link(&veth.node)).filter(|link| link.is_veth());
    changes.extend(link.map(|link| Change::DeleteNodeLink(link.name.clone())));
    changes
}

/// What DEL does without a record: the link whose name is derivable, and routes of our protocol in the sandbox where no
/// other record names it (`sole`).
pub fn teardown_unrecorded(node_link: &str, observed: &Observed, sole: bool) -> Vec<Change> {
    let ours = |seen: &&ObservedRoute| sole && seen.ours() && seen.unicast && seen.route.table == TABLE_MAIN;
    let routes = observed.pod.routes.iter().filter(ours).map(|seen| Change::DeleteRoute(Side::Pod, seen.route.clone()));
    let link = observed.node.link(node_link).filter(|link| link.is_veth());
    routes.chain(link.map(|link| Change::DeleteNodeLink(link.name.clone()))).collect()
}

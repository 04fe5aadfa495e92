//! What a change of remotes adds to a pod, without looking at the rest of them: so that a new CIDR is in the kernels of all
//! running pods before the thorough pass over them begins.
//!
//! Whether and how a prefix is routed depends only on prefixes that overlap it. So both states of the remotes are cut down
//! to what overlaps a change, and the ordinary decision is made for each.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    destinations::{Inputs, destinations},
    model::{Family, Route},
    node::NodeFacts,
    numbers::JOIN_LIMIT,
    remotes::Merged,
    set::CidrSet,
    wanted::{Identity, wanted},
};

/// A change of remotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// What overlaps the change, as it was.
    before: Merged,
    /// The same, as it is.
    after: Merged,
    /// Most CIDRs of one family in either state.
    most: usize,
}

impl Delta {
    /// The change from one state to another; none where no CIDR came or changed hands.
    pub fn between(before: &Merged, after: &Merged) -> Option<Self> {
        let (old, new) = (owners(before), owners(after));
        if new.iter().all(|(net, owner)| old.get(net) == Some(owner)) {
            return None;
        }
        let differs = |(net, owner): (&IpNet, _), other: &Owners<'_>| (other.get(net) != Some(owner)).then_some(*net);
        let came = new.iter().filter_map(|(net, owner)| differs((net, owner), &old));
        let went = old.iter().filter_map(|(net, owner)| differs((net, owner), &new));
        let changed: CidrSet = came.chain(went).collect();
        let most = Family::ALL.map(|family| [&old, &new].map(|owners| count(owners, family)));
        let most = most.into_iter().flatten().max().unwrap_or_default();
        Some(Self { before: cut(before, &changed), after: cut(after, &changed), most })
    }
}

/// Whose a CIDR is, and with which MTU.
type Owners<'a> = BTreeMap<IpNet, (&'a str, Option<u32>)>;

fn owners(merged: &Merged) -> Owners<'_> {
    let clusters = merged.clusters.iter();
    clusters.flat_map(|(name, cluster)| cluster.cidrs.keys().map(|net| (*net, (name.as_str(), cluster.mtu)))).collect()
}

fn count(owners: &Owners<'_>, family: Family) -> usize {
    owners.keys().filter(|net| Family::of_net(net) == family).count()
}

fn cut(merged: &Merged, changed: &CidrSet) -> Merged {
    let mut clusters = merged.clusters.clone();
    clusters.values_mut().for_each(|cluster| cluster.cidrs.retain(|net, _| changed.overlaps(net)));
    Merged { clusters, findings: Vec::new() }
}

/// The routes that a pod has after a change and did not have before. None where that cannot be told from the change alone:
/// an annotation may depend on any CIDR, excludes split prefixes, and thousands of routes are joined.
pub fn additions(identity: Identity<'_>, inputs: Inputs<'_>, delta: &Delta) -> Option<Vec<Route>> {
    let Inputs { conf, request, node, .. } = inputs;
    let simple = request.hijack_cidr.is_empty() && request.exclude_cidr.is_empty() && conf.exclude_cidr.is_empty();
    if !simple || delta.most + others(conf.hijack_cidr.len(), node) > JOIN_LIMIT {
        return None;
    }
    let routes = |remotes| {
        let inputs = Inputs { remotes, ..inputs };
        let (wanted, _) = wanted(identity, inputs, &destinations(inputs).ok()?).ok()?;
        Some(wanted.pod_routes)
    };
    let before: BTreeSet<IpNet> = routes(&delta.before)?.into_iter().map(|route| route.route.dst).collect();
    let after = routes(&delta.after)?.into_iter().map(|route| route.route);
    Some(after.filter(|route| !before.contains(&route.dst)).collect())
}

/// Destinations that are no remotes, at most.
fn others(named: usize, node: &NodeFacts) -> usize {
    named + node.pod_cidrs.len() + node.service_cidrs.len()
}

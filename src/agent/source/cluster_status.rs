//! What a `Cluster` object's status should say. It depends on the objects and on the cluster's local CIDRs, never on the
//! node, so that it does not matter which agent writes it.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use crosslink_core::{
    cidr::never_routed,
    node::NodeFacts,
    numbers::{SHORTEST_V4, SHORTEST_V6},
    remotes::Told,
    set::CidrSet,
};
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

use crate::api::{CidrConflict, CidrFault, ClusterStatus, Condition, ConditionStatus};

/// Types of our conditions.
const TYPES: [&str; 3] = ["Accepted", "Conflicting", "Reachable"];

/// Most conflicts in a status.
const CONFLICTS: usize = 200;

/// What all objects and the node say together.
#[derive(Debug)]
pub struct Situation<'a> {
    own: Option<&'a str>,
    local: CidrSet,
    claims: BTreeMap<IpNet, Vec<&'a str>>,
}

/// What is to be said of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Status, reason and message of each of [`TYPES`].
    conditions: [(ConditionStatus, &'static str, String); 3],
    conflicts: Vec<CidrConflict>,
}

fn cidrs(told: &Told) -> impl Iterator<Item = &IpNet> {
    told.pod_cidrs.iter().chain(&told.service_cidrs)
}

const fn fault_name(fault: CidrFault) -> &'static str {
    match fault {
        CidrFault::Local => "equals or lies inside the local",
        CidrFault::TooWide => "is too wide: at least",
        CidrFault::NeverRouted => "is never routed: it",
        CidrFault::TakenBy => "belongs to cluster",
        CidrFault::AlsoClaimedBy => "is also claimed by cluster",
    }
}

impl<'a> Situation<'a> {
    /// Of all objects that can be read.
    pub fn new(all: impl Iterator<Item = &'a Told>, node: &'a NodeFacts) -> Self {
        let local = node.pod_cidrs.iter().chain(&node.service_cidrs).chain(&node.node_cidrs);
        let own = node.cluster_name.as_deref();
        let remote = all.filter(|told| own != Some(told.name.as_str()));
        let mut pairs: Vec<(IpNet, &str)> =
            remote.flat_map(|told| cidrs(told).map(|net| (*net, told.name.as_str()))).collect();
        pairs.sort_unstable();
        pairs.dedup();
        // Only what several claim, which is little.
        let mut claims: BTreeMap<IpNet, Vec<&str>> = BTreeMap::new();
        for same in pairs.chunk_by(|(one, _), (next, _)| one == next).filter(|same| same.len() > 1) {
            claims.extend(same.first().map(|(net, _)| (*net, same.iter().map(|(_, name)| *name).collect())));
        }
        Self { own, local: local.copied().collect(), claims }
    }

    fn faults(&self, told: &Told) -> Vec<CidrConflict> {
        let mut faults = Vec::new();
        for net in cidrs(told) {
            let shortest = if net.addr().is_ipv4() { SHORTEST_V4 } else { SHORTEST_V6 };
            let mut fault = |reason, with: String| faults.push(CidrConflict { cidr: net.to_string(), reason, with });
            if let Some(why) = never_routed(net) {
                fault(CidrFault::NeverRouted, why.to_owned());
            } else if net.prefix_len() < shortest {
                fault(CidrFault::TooWide, format!("/{shortest}"));
            } else if let Some(local) = self.local.covering(net) {
                fault(CidrFault::Local, local.to_string());
            }
            for name in self.claims.get(net).into_iter().flatten().filter(|name| **name != told.name) {
                let first = *name < told.name.as_str();
                fault(if first { CidrFault::TakenBy } else { CidrFault::AlsoClaimedBy }, (*name).to_owned());
            }
        }
        faults.sort();
        faults.truncate(CONFLICTS);
        faults
    }

    /// What is to be said of one of the objects.
    pub fn judge(&self, told: &Told) -> Verdict {
        let reachable = (ConditionStatus::Unknown, "NotProbed", "nobody probes this cluster".to_owned());
        let no_conflict = (ConditionStatus::False, "NoConflict", String::new());
        if self.own == Some(told.name.as_str()) {
            let accepted =
                (ConditionStatus::True, "OwnCluster", "it is this cluster itself, which is never remote".to_owned());
            return Verdict { conditions: [accepted, no_conflict, reachable], conflicts: Vec::new() };
        }
        let faults = self.faults(told);
        let (claims, refusals): (Vec<_>, Vec<_>) =
            faults.iter().partition(|fault| matches!(fault.reason, CidrFault::TakenBy | CidrFault::AlsoClaimedBy));
        let text = |faults: &[&CidrConflict]| {
            let parts =
                faults.iter().map(|fault| format!("{} {} {}", fault.cidr, fault_name(fault.reason), fault.with));
            parts.collect::<Vec<_>>().join("; ")
        };
        let accepted = match refusals.as_slice() {
            [] => (ConditionStatus::True, "Accepted", String::new()),
            some if cidrs(told).count() == some.len() => (ConditionStatus::False, "Refused", text(some)),
            some => (ConditionStatus::False, "PartlyRefused", text(some)),
        };
        let conflicting = match claims.as_slice() {
            [] => no_conflict,
            some => (ConditionStatus::True, "ClaimedTwice", text(some)),
        };
        Verdict { conditions: [accepted, conflicting, reachable], conflicts: faults }
    }
}

impl Verdict {
    /// Why CIDRs are refused, if some are.
    pub fn refused(&self) -> Option<String> {
        let [(status, _, message), ..] = &self.conditions;
        (*status == ConditionStatus::False).then(|| message.clone())
    }

    /// A number that is equal for equal verdicts about equal generations.
    fn digest(&self, generation: i64) -> u64 {
        let conditions = self.conditions.iter().map(|(status, reason, message)| (*status, *reason, message.as_str()));
        digest(conditions, &self.conflicts, generation)
    }
}

/// Equal within one process, which is all that it is compared in.
fn digest<'a>(
    conditions: impl Iterator<Item = (ConditionStatus, &'a str, &'a str)>,
    conflicts: &[CidrConflict],
    generation: i64,
) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (status, reason, message) in conditions {
        (status as u8, reason, message).hash(&mut hasher);
    }
    for conflict in conflicts {
        (&conflict.cidr, conflict.reason as u8, &conflict.with).hash(&mut hasher);
    }
    generation.hash(&mut hasher);
    hasher.finish()
}

/// What an object's status says, reduced to what is needed to tell whether it should say something else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    digest: u64,
    /// Status of each of [`TYPES`], and since when.
    conditions: [Option<(ConditionStatus, Timestamp)>; 3],
}

impl Observed {
    /// Of the status of an object.
    pub fn of(status: Option<&ClusterStatus>) -> Self {
        let Some(status) = status else { return Self::default() };
        let found = TYPES.map(|kind| status.conditions.iter().find(|condition| condition.kind == kind));
        let generations = found.map(|condition| condition.and_then(|condition| condition.observed_generation));
        // Where they differ, whatever is wanted differs from at least one.
        let generation = match generations {
            [Some(first), Some(second), Some(third)] if first == second && second == third => first,
            _ => -1,
        };
        let parts = found.into_iter().flatten();
        let parts = parts.map(|condition| (condition.status, condition.reason.as_str(), condition.message.as_str()));
        let since = |condition: &Condition| Some((condition.status, condition.last_transition_time.parse().ok()?));
        Self {
            digest: digest(parts, &status.conflicts, generation),
            conditions: found.map(|condition| condition.and_then(since)),
        }
    }

    /// Whether it says that CIDRs are refused.
    pub fn is_refused(&self) -> bool {
        matches!(self.conditions, [Some((ConditionStatus::False, _)), ..])
    }

    /// Whether it says what is to be said.
    pub fn says(&self, verdict: &Verdict, generation: i64) -> bool {
        self.digest == verdict.digest(generation)
    }

    /// What it should say instead. Times of conditions whose status stays are kept.
    pub fn next(&self, verdict: &Verdict, generation: i64) -> ClusterStatus {
        let now = Timestamp::now();
        let mut conditions = Vec::with_capacity(TYPES.len());
        for ((kind, (status, reason, message)), before) in
            TYPES.into_iter().zip(&verdict.conditions).zip(self.conditions)
        {
            let since = before.filter(|(before, _)| before == status).map_or(now, |(_, since)| since);
            conditions.push(Condition {
                kind: kind.to_owned(),
                status: *status,
                reason: (*reason).to_owned(),
                message: message.clone(),
                last_transition_time: format!("{:.0}", since.strftime("%Y-%m-%dT%H:%M:%SZ")),
                observed_generation: Some(generation),
            });
        }
        ClusterStatus { conditions, conflicts: verdict.conflicts.clone() }
    }
}

#[cfg(test)]
mod tests {
    use crosslink_core::cidr;

    use super::*;

    fn told(name: &str, nets: &[&str]) -> Told {
        Told {
            name: name.into(),
            pod_cidrs: nets.iter().map(|text| cidr::parse(text).unwrap()).collect(),
            ..Told::default()
        }
    }

    fn node() -> NodeFacts {
        NodeFacts {
            cluster_name: Some("own".into()),
            pod_cidrs: vec![cidr::parse("10.244.0.0/16").unwrap()],
            service_cidrs: vec![cidr::parse("10.96.0.0/12").unwrap()],
            ..NodeFacts::default()
        }
    }

    /// Statuses and reasons, and the messages of the first two.
    fn judged(name: &str, all: &[Told]) -> String {
        let node = node();
        let situation = Situation::new(all.iter(), &node);
        let verdict = situation.judge(all.iter().find(|told| told.name == name).unwrap());
        let [accepted, conflicting, reachable] = &verdict.conditions;
        assert_eq!(reachable.1, "NotProbed");
        format!("{:?} {} [{}] {:?} [{}]", accepted.0, accepted.1, accepted.2, conflicting.0, conflicting.2)
    }

    #[test]
    fn verdicts() {
        let all = [
            told("b", &["10.1.0.0/16", "10.2.0.0/16"]),
            told("c", &["10.2.0.0/16"]),
            told("own", &["10.2.0.0/16", "10.244.0.0/16"]),
            told("d", &["10.244.7.0/24", "10.3.0.0/16"]),
            told("e", &["0.0.0.0/0", "0.0.0.0/1", "10.96.0.0/12"]),
            told("f", &["10.0.0.0/8"]),
        ];
        for (name, expected) in [
            ("b", "True Accepted [] True [10.2.0.0/16 is also claimed by cluster c]"),
            ("c", "True Accepted [] True [10.2.0.0/16 belongs to cluster b]"),
            ("own", "True OwnCluster [it is this cluster itself, which is never remote] False []"),
            ("d", "False PartlyRefused [10.244.7.0/24 equals or lies inside the local 10.244.0.0/16] False []"),
            (
                "e",
                "False Refused [0.0.0.0/0 is never routed: it is a default route; 0.0.0.0/1 is too wide: at least /4; \
                 10.96.0.0/12 equals or lies inside the local 10.96.0.0/12] False []",
            ),
            ("f", "True Accepted [] False []"),
        ] {
            assert_eq!(judged(name, &all), expected, "{name}");
        }
    }

    #[test]
    fn what_was_written_is_not_written_again() {
        let all = [told("b", &["10.1.0.0/16"]), told("d", &["10.244.7.0/24"])];
        let node = node();
        let situation = Situation::new(all.iter(), &node);
        let mut observed = Observed::of(None);
        for (told, generation) in [(&all[0], 1), (&all[1], 1), (&all[1], 2)] {
            let verdict = situation.judge(told);
            assert!(!observed.says(&verdict, generation));
            let status = observed.next(&verdict, generation);
            // By way of the API server.
            let status: ClusterStatus = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
            observed = Observed::of(Some(&status));
            assert!(observed.says(&verdict, generation));
        }
        assert!(observed.is_refused());
    }

    #[test]
    fn a_condition_that_stays_keeps_its_time() {
        let all = [told("b", &["10.1.0.0/16"])];
        let node = NodeFacts::default();
        let verdict = Situation::new(all.iter(), &node).judge(&all[0]);
        let mut status = Observed::default().next(&verdict, 1);
        status.conditions[0].last_transition_time = "2020-01-01T00:00:00Z".into();
        status.conditions[1].status = ConditionStatus::True;
        status.conditions[1].last_transition_time = "2020-01-01T00:00:00Z".into();
        let next = Observed::of(Some(&status)).next(&verdict, 2);
        assert_eq!(next.conditions[0].last_transition_time, "2020-01-01T00:00:00Z");
        assert_ne!(next.conditions[1].last_transition_time, "2020-01-01T00:00:00Z");
    }
}

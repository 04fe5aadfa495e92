//! What a change adds, found from the change alone, is what two whole decisions differ by.

use std::collections::BTreeSet;

use crosslink_core::{
    delta::{Delta, additions},
    destinations::{Inputs, Refusal, destinations},
    model::Route,
    remotes::Merged,
    request::PodRequest,
    wanted::wanted,
};
use ipnet::IpNet;
use proptest::prelude::*;

use crate::{
    routed_set_props::{merged, world},
    support::{IDENTITY, Ready},
};

fn inputs<'a>(world: &'a Ready, request: &'a PodRequest, remotes: &'a Merged) -> Inputs<'a> {
    let Ready { conf, node, pod, .. } = world;
    Inputs { conf, request, remotes, node, pod, refusal: Refusal::Finding }
}

fn routes(inputs: Inputs<'_>) -> Option<Vec<Route>> {
    let (wanted, _) = wanted(IDENTITY, inputs, &destinations(inputs).ok()?).ok()?;
    Some(wanted.pod_routes.into_iter().map(|route| route.route).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn additions_are_what_two_decisions_differ_by(mut world in world(), after in merged(), plain in any::<bool>()) {
        world.request.hijack_cidr.clear();
        world.request.exclude_cidr.clear();
        world.conf.exclude_cidr.clear();
        if plain {
            world.node.pod_cidrs.clear();
        }
        let request = world.request.clone();
        let old = routes(inputs(&world, &request, &world.remotes)).unwrap();
        let new = routes(inputs(&world, &request, &after)).unwrap();
        let had: BTreeSet<IpNet> = old.iter().map(|route| route.dst).collect();
        let expected: Vec<Route> = new.into_iter().filter(|route| !had.contains(&route.dst)).collect();
        match Delta::between(&world.remotes, &after) {
            Some(delta) => {
                let found = additions(IDENTITY, inputs(&world, &request, &after), &delta).unwrap();
                prop_assert_eq!(found, expected);
            }
            // One that goes may uncover another; the thorough pass adds that.
            None => {
                let known = |name: &str, net: &IpNet| world.remotes.clusters[name].cidrs.contains_key(net);
                let all = after.clusters.iter().all(|(name, cluster)| cluster.cidrs.keys().all(|net| known(name, net)));
                prop_assert!(all);
            }
        }
    }
}

//! Sysctls of the host that underlay traffic needs, for where the administrator leaves them to the agent.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::{
    model::Family,
    node::addresses_from_kernel,
    traffic::{Facts, underlay_cidrs},
};

/// Sysctls that a node needs to forward underlay traffic, as keys to look up before [`changes`].
pub fn keys(facts: Facts<'_>) -> Vec<String> {
    let mut keys = vec!["ipv4/conf/all/rp_filter".to_owned()];
    for family in families(facts) {
        let name = if family == Family::V4 { "ipv4" } else { "ipv6" };
        keys.push(format!("{name}/conf/all/forwarding"));
    }
    keys.extend(node_links(facts).into_iter().map(|dev| format!("ipv6/conf/{dev}/accept_ra")));
    keys.extend(loose_links(facts).into_iter().map(|dev| format!("ipv4/conf/{dev}/rp_filter")));
    keys
}

/// Which of them have to be set, and to what, given the values that they have, in the order in which to set them.
pub fn changes(facts: Facts<'_>) -> Vec<(String, &'static str)> {
    let value = |key: &str| facts.state.sysctls.get(key).map_or("", String::as_str);
    let mut changes = Vec::new();
    for family in families(facts) {
        let name = if family == Family::V4 { "ipv4" } else { "ipv6" };
        let key = format!("{name}/conf/all/forwarding");
        // Also where it forwards already: the links may have come later.
        if family == Family::V6 && matches!(value(&key), "0" | "1") {
            // A host that forwards takes no router advertisements unless told to (accept_ra 2), and would lose its
            // default route.
            let keys = node_links(facts).into_iter().map(|dev| format!("ipv6/conf/{dev}/accept_ra"));
            changes.extend(keys.filter(|key| value(key) == "1").map(|key| (key, "2")));
        }
        if value(&key) == "0" {
            changes.push((key, "1"));
        }
    }
    // The stricter of `all` and the interface's does not count: the larger number does, and 1 is strict
    // (Documentation/networking/ip-sysctl.rst).
    let all = value("ipv4/conf/all/rp_filter");
    for dev in loose_links(facts) {
        let key = format!("ipv4/conf/{dev}/rp_filter");
        let own = value(&key);
        if all != "2" && own != "2" && (all == "1" || own == "1") {
            changes.push((key, "2"));
        }
    }
    changes
}

/// Families in which pods of the cluster or of others exist.
fn families(Facts { merged, node, .. }: Facts<'_>) -> impl Iterator<Item = Family> {
    let remote = merged.clusters.values().flat_map(|cluster| cluster.cidrs.keys());
    let known: Vec<Family> = remote.chain(&node.pod_cidrs).map(Family::of_net).collect();
    Family::ALL.into_iter().filter(move |family| known.contains(family))
}

/// Links with an address of the node.
fn node_links(Facts { node, state, .. }: Facts<'_>) -> BTreeSet<&str> {
    let known = match node.addresses.as_slice() {
        [] => addresses_from_kernel(state).0,
        known => known.to_vec(),
    };
    let own = state.addresses.iter().filter(|address| known.contains(&address.net.addr()));
    own.map(|address| address.dev.as_str()).collect()
}

/// Links by which packets of neighbours' underlay pods come while the way back is the underlay's link: strict filtering
/// would drop them. Where the node is not in the underlay, both ways are the same.
fn loose_links(facts: Facts<'_>) -> Vec<&str> {
    let nets: Vec<&IpNet> = underlay_cidrs(facts.node).filter(|net| Family::of_net(net) == Family::V4).collect();
    let links = node_links(facts);
    let is_underlay = |dev: &str| {
        let own = facts.state.addresses.iter().filter(|address| address.dev == dev && address.global);
        own.into_iter().any(|address| nets.iter().any(|net| net.contains(&address.net.addr())))
    };
    let (underlay, others): (Vec<&str>, Vec<&str>) = links.into_iter().partition(|dev| is_underlay(dev));
    if underlay.is_empty() { Vec::new() } else { others }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Address, NetnsState},
        node::NodeFacts,
        remotes::{Cluster, Merged},
    };

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn merged(cidrs: &[&str]) -> Merged {
        let mut merged = Merged::default();
        let cidrs = nets(cidrs).into_iter().map(|net| (net, BTreeSet::new().into())).collect();
        merged.clusters.insert("b".to_owned(), Cluster { cidrs, mtu: None });
        merged
    }

    fn state(addresses: &[(&str, &str)]) -> NetnsState {
        let addresses = addresses.iter().map(|(dev, net)| Address {
            dev: (*dev).to_owned(),
            net: net.parse().unwrap(),
            global: true,
            tentative: false,
            unstable: false,
        });
        NetnsState { addresses: addresses.collect(), ..NetnsState::default() }
    }

    /// The README's gateway: neighbours' pods come by ens192, the way back is ens224.
    #[test]
    fn the_link_that_is_not_the_underlay_must_be_loose() {
        let merged = merged(&["10.9.0.0/16"]);
        let both = [("ens192", "10.7.0.12/24"), ("ens224", "172.110.0.12/16")];
        let addresses = vec!["10.7.0.12".parse().unwrap(), "172.110.0.12".parse().unwrap()];
        let node = NodeFacts { pod_cidrs: nets(&["172.110.0.0/16"]), addresses, ..NodeFacts::default() };
        let changes = |links: &[(&str, &str)], sysctls: &[(&str, &str)]| {
            let mut state = state(links);
            let all = sysctls.iter().map(|(key, value)| (format!("ipv4/conf/{key}"), (*value).to_owned()));
            state.sysctls = all.collect();
            super::changes(Facts { merged: &merged, node: &node, state: &state })
        };
        let (all, one) = ("all/rp_filter", "ens192/rp_filter");
        let loose = vec![("ipv4/conf/ens192/rp_filter".to_owned(), "2")];
        for (sysctls, wanted) in [
            (&[(all, "0"), (one, "1")][..], &loose),
            (&[(all, "1"), (one, "0")], &loose),
            (&[(all, "2"), (one, "1")], &Vec::new()),
            (&[(all, "1"), (one, "2")], &Vec::new()),
            (&[(all, "0"), (one, "0")], &Vec::new()),
        ] {
            assert_eq!(changes(&both, sysctls), *wanted, "{sysctls:?}");
        }
        assert_eq!(changes(&both[..1], &[(all, "1"), (one, "1")]), [], "not in the underlay");
        let off = [("all/forwarding", "0"), (all, "0"), (one, "0")];
        assert_eq!(changes(&both, &off), [("ipv4/conf/all/forwarding".to_owned(), "1")]);
    }

    #[test]
    fn forwarding_ipv6_keeps_router_advertisements() {
        let merged = merged(&["fd09::/64"]);
        let node = NodeFacts { addresses: vec!["fd07::1".parse().unwrap()], ..NodeFacts::default() };
        let mut state = state(&[("eth0", "fd07::1/64")]);
        let keys = keys(Facts { merged: &merged, node: &node, state: &state });
        let values = keys.iter().map(|key| (key.clone(), if key.contains("accept_ra") { "1" } else { "0" }.to_owned()));
        state.sysctls = values.collect();
        assert_eq!(
            super::changes(Facts { merged: &merged, node: &node, state: &state }),
            [("ipv6/conf/eth0/accept_ra".to_owned(), "2"), ("ipv6/conf/all/forwarding".to_owned(), "1")]
        );
    }
}

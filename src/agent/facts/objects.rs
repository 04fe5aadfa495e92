//! From Kubernetes objects to what they say. Pure, and tolerant: what cannot be used is named and left out.

use std::collections::BTreeMap;

use crosslink_core::{
    cidr,
    node::Masquerade,
    select::valid_cluster,
    set::{Entry, join_siblings},
};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::decide::{Answer, Said};

/// IPAM modes of Cilium in which a cloud, and no pool of the cluster, gives pods their addresses.
const CLOUD_IPAM: [&str; 4] = ["eni", "azure", "alibabacloud", "delegated-plugin"];

/// Parses CIDRs; what does not parse is named in `odd`.
fn parse<'a>(texts: impl IntoIterator<Item = &'a str>, place: &str, odd: &mut Vec<String>) -> Vec<IpNet> {
    let mut nets = Vec::new();
    for text in texts.into_iter().map(str::trim).filter(|text| !text.is_empty()) {
        match cidr::parse(text) {
            // A default route is nobody's range; taken at its word it would make everything local.
            Ok(net) if cidr::never_routed(&net).is_some() => {
                odd.push(format!("{place}: {net} is no range of a cluster"))
            }
            Ok(net) => nets.push(net),
            Err(err) => odd.push(format!("{place}: {err}")),
        }
    }
    nets
}

/// `10.0.0.0/8,fd00::/8`, also with white space.
fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ' ', '\t', '\n'])
}

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// An answer, or that there is none.
fn answer(said: Said, absent: &str) -> Answer {
    if said == Said::default() { Answer::Absent(absent.to_owned()) } else { Answer::Said(said) }
}

/// `spec.cidrs` of all ServiceCIDRs.
pub fn service_cidrs<'a>(specs: impl IntoIterator<Item = &'a Value>) -> Answer {
    let mut said = Said::default();
    for spec in specs {
        let nets = parse(spec.get("cidrs").into_iter().flat_map(texts), "spec.cidrs", &mut said.odd);
        said.services.extend(nets);
    }
    answer(said, "there are none")
}

/// A Node's shares: `spec.podCIDRs`, before the controller manager had the plural `spec.podCIDR`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeSpec {
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
}

impl NodeSpec {
    fn shares(&self, odd: &mut Vec<String>) -> Vec<IpNet> {
        let many = self.pod_cidrs.as_deref().unwrap_or_default();
        let one = self.pod_cidr.iter().filter(|_| many.is_empty());
        parse(many.iter().chain(one).map(String::as_str), "spec.podCIDRs", odd)
    }
}

/// This node's share.
pub fn own_node<'a>(specs: impl IntoIterator<Item = &'a NodeSpec>) -> Answer {
    let mut said = Said::default();
    let shares: Vec<IpNet> = specs.into_iter().flat_map(|spec| spec.shares(&mut said.odd)).collect();
    said.pods.clone_from(&shares);
    said.own_pods = shares;
    answer(said, "none set")
}

/// All nodes' shares, siblings joined: a thousand /24 are mostly one /14.
pub fn nodes<'a>(specs: impl IntoIterator<Item = &'a NodeSpec>) -> Answer {
    let mut said = Said::default();
    let shares = specs.into_iter().flat_map(|spec| spec.shares(&mut said.odd));
    let entries: Vec<Entry<()>> = shares.map(|net| Entry { net, attr: () }).collect();
    said.pods = join_siblings(entries, &[]).into_iter().map(|entry| entry.net).collect();
    answer(said, "none set")
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ClusterConfiguration {
    networking: Option<Networking>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Networking {
    pod_subnet: Option<String>,
    service_subnet: Option<String>,
}

/// kubeadm's `ClusterConfiguration`.
pub fn kubeadm(data: &BTreeMap<String, String>) -> Answer {
    let Some(text) = data.get("ClusterConfiguration") else {
        return Answer::Absent("it has no ClusterConfiguration".to_owned());
    };
    let mut said = Said::default();
    match serde_saphyr::from_str::<ClusterConfiguration>(text) {
        Ok(configuration) => {
            let Networking { pod_subnet, service_subnet } = configuration.networking.unwrap_or_default();
            said.pods = parse(list(&pod_subnet.unwrap_or_default()), "networking.podSubnet", &mut said.odd);
            said.services = parse(list(&service_subnet.unwrap_or_default()), "networking.serviceSubnet", &mut said.odd);
        }
        Err(err) => said.odd.push(format!("ClusterConfiguration: {err}")),
    }
    answer(said, "it names no subnets")
}

/// Values of a flag in a command line, as `--flag=value` and as `--flag value`, also inside the one word of a shell.
fn flag<'a>(words: &'a [String], name: &'a str) -> impl Iterator<Item = &'a str> {
    let mut words = words.iter().flat_map(|word| word.split_whitespace()).peekable();
    std::iter::from_fn(move || {
        loop {
            let rest = words.next()?.strip_prefix(name);
            let value = match rest {
                Some("") => words.next(),
                Some(rest) => rest.strip_prefix('='),
                None => None,
            };
            if let Some(value) = value {
                return Some(value.trim_matches(['"', '\'']));
            }
        }
    })
}

/// Arguments of the control plane's pods, by their specs.
pub fn arguments<'a>(specs: impl IntoIterator<Item = &'a Value>) -> Answer {
    let mut said = Said::default();
    for spec in specs {
        for container in spec.get("containers").and_then(Value::as_array).into_iter().flatten() {
            let words = ["command", "args"].into_iter().filter_map(|key| container.get(key));
            let words: Vec<String> = words.flat_map(texts).map(str::to_owned).collect();
            let mut read = |name| {
                let values: Vec<&str> = flag(&words, name).flat_map(list).collect();
                parse(values, name, &mut said.odd)
            };
            let (pods, services) = (read("--cluster-cidr"), read("--service-cluster-ip-range"));
            said.pods.extend(pods);
            said.services.extend(services);
        }
    }
    answer(said, "no pod of kube-apiserver or kube-controller-manager names any")
}

/// Calico's pools. One that is disabled but still masquerades is a retired pool of this cluster, whose pods live on; a
/// pool that stands for a remote range never masquerades, since that is its purpose.
pub fn calico<'a>(specs: impl IntoIterator<Item = &'a Value>) -> Answer {
    let mut said = Said::default();
    let is = |spec: &Value, key: &str| spec.get(key).and_then(Value::as_bool) == Some(true);
    for spec in specs.into_iter().filter(|spec| !is(spec, "disabled") || is(spec, "natOutgoing")) {
        let uses: Vec<&str> = spec.get("allowedUses").into_iter().flat_map(texts).collect();
        if uses.is_empty() || uses.contains(&"Workload") {
            let nets = parse(spec.get("cidr").and_then(Value::as_str), "spec.cidr", &mut said.odd);
            said.pods.extend(nets);
        }
    }
    answer(said, "there are none in use")
}

/// Cilium's configuration.
pub fn cilium(data: &BTreeMap<String, String>) -> Answer {
    let value = |key: &str| data.get(key).map_or("", |text| text.trim());
    let on = |key: &str| value(key).eq_ignore_ascii_case("true");
    let off = |key: &str| value(key).eq_ignore_ascii_case("false");
    let mut said = Said::default();
    let ipam = value("ipam");
    // Chained behind another main CNI, Cilium gives no addresses.
    let chained = !matches!(value("cni-chaining-mode"), "" | "none");
    for (family, pool, native) in [
        ("enable-ipv4", "cluster-pool-ipv4-cidr", ["ipv4-native-routing-cidr", "native-routing-cidr"].as_slice()),
        ("enable-ipv6", "cluster-pool-ipv6-cidr", &["ipv6-native-routing-cidr"]),
    ] {
        // The chart writes a default pool for a family that is off, too.
        if chained || off(family) {
            continue;
        }
        if matches!(ipam, "" | "cluster-pool" | "cluster-pool-v2beta") {
            let nets = parse(list(value(pool)), pool, &mut said.odd);
            said.pods.extend(nets);
        }
        if CLOUD_IPAM.contains(&ipam) {
            for key in native {
                let nets = parse(list(value(key)), key, &mut said.odd);
                said.pods_at_worst.extend(nets);
            }
        }
    }
    let masquerades = !(off("enable-ipv4-masquerade") || off("masquerade")) || on("enable-ipv6-masquerade");
    said.masquerade = masquerades.then_some(match on("enable-bpf-masquerade") {
        true => Masquerade::Bpf,
        false => Masquerade::Netfilter,
    });
    Answer::Said(said)
}

/// A CiliumNode's own pod CIDRs.
pub fn cilium_node<'a>(specs: impl IntoIterator<Item = &'a Value>) -> Answer {
    let mut said = Said::default();
    let shares = specs.into_iter().filter_map(|spec| spec.pointer("/ipam/podCIDRs")).flat_map(texts);
    said.own_pods = parse(shares, "spec.ipam.podCIDRs", &mut said.odd);
    answer(said, "it has none")
}

/// This node's blocks of Calico's IPAM, by the specs of all affinities.
pub fn calico_blocks<'a>(specs: impl IntoIterator<Item = &'a Value>, node: &str) -> Answer {
    fn field<'v>(spec: &'v Value, key: &str) -> Option<&'v str> {
        spec.get(key)?.as_str()
    }
    // A block whose affinity is pending, or about to be deleted, may be another node's.
    let ours = |spec: &&Value| field(spec, "node") == Some(node) && field(spec, "state") == Some("confirmed");
    let mut said = Said::default();
    let texts = specs.into_iter().filter(ours).filter_map(|spec| field(spec, "cidr"));
    let nets = parse(texts, "spec.cidr", &mut said.odd);
    let entries = nets.into_iter().map(|net| Entry { net, attr: () }).collect();
    said.own_pods = join_siblings(entries, &[]).into_iter().map(|entry| entry.net).collect();
    answer(said, "this node has none")
}

/// This cluster's name, by what Submariner's object `submariner` says in its spec and status, or its gateways in theirs.
pub fn submariner<'a>(submariners: impl IntoIterator<Item = &'a Value>, gateways: &[Value]) -> Answer {
    let text = |value: &'a Value, path: &str| value.pointer(path).and_then(Value::as_str);
    let names = submariners.into_iter().flat_map(|object| {
        [text(object, "/spec/clusterID"), text(object, "/status/clusterID")].into_iter().flatten().map(str::to_owned)
    });
    let local = |gateway: &Value| {
        gateway.pointer("/status/localEndpoint/cluster_id").and_then(Value::as_str).map(str::to_owned)
    };
    let Some(name) = names.chain(gateways.iter().filter_map(local)).find(|name| !name.is_empty()) else {
        return Answer::Absent("it names no cluster".to_owned());
    };
    let mut said = Said::default();
    if valid_cluster(&name) && !name.starts_with('@') {
        said.cluster_name = Some(name);
    } else {
        let name = crosslink_core::error::quoted(&name);
        said.odd.push(format!("clusterID {name} is not an RFC 1123 label: set clusterName"));
    }
    Answer::Said(said)
}

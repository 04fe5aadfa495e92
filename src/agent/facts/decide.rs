//! From what each source said to `node.json`. Pure.
//!
//! Pod CIDRs come from the first of these that names any; inside one line all are taken together:
//! 1. the setting `podCIDRs`;
//! 2. Calico's pools in use, Cilium's cluster pool: where they are, `Node.spec.podCIDRs` is not what pods get;
//! 3. `Node.spec.podCIDRs`, kubeadm's `podSubnet`, kube-controller-manager's `--cluster-cidr`: shares, and the whole they
//!    are cut from. Whatever one of them calls ours is not remote, so none hides the others;
//! 4. Cilium's native routing CIDR, with a cloud's IPAM only. It may be a supernet of several clusters.
//!
//! Service CIDRs: the setting `serviceCIDRs`; the ServiceCIDR API, which the API server keeps itself; else kubeadm's
//! `serviceSubnet` together with `--service-cluster-ip-range`, either of which may be out of date alone.

use std::{collections::BTreeMap, net::IpAddr};

use crosslink_core::{
    finding::{Finding, Id},
    node::{Masquerade, NodeFacts},
    numbers::NODE_ADDRESS_LIMIT,
    set::CidrSet,
};
use ipnet::IpNet;

/// Who may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr,
    /// This node's `spec.podCIDRs`.
    OwnNode,
    /// All nodes' `spec.podCIDRs`.
    Nodes,
    /// ConfigMap kube-system/kubeadm-config.
    Kubeadm,
    /// Arguments of kube-apiserver and kube-controller-manager.
    Arguments,
    /// Calico's pools.
    Calico,
    /// Blocks of Calico's IPAM.
    CalicoBlocks,
    /// ConfigMap kube-system/cilium-config.
    Cilium,
    /// This node's CiliumNode.
    CiliumNode,
    /// Submariner's idea of this cluster's name.
    Submariner,
}

impl Origin {
    /// All that need an API server.
    pub const ALL: [Self; 10] = [
        Self::ServiceCidr,
        Self::OwnNode,
        Self::Nodes,
        Self::Kubeadm,
        Self::Arguments,
        Self::Calico,
        Self::CalicoBlocks,
        Self::Cilium,
        Self::CiliumNode,
        Self::Submariner,
    ];

    /// Name in messages and on the status socket.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ServiceCidr => "servicecidrs.networking.k8s.io",
            Self::OwnNode => "this node's spec.podCIDRs",
            Self::Nodes => "all nodes' spec.podCIDRs",
            Self::Kubeadm => "configmap kube-system/kubeadm-config",
            Self::Arguments => "control-plane arguments",
            Self::Calico => "ippools of Calico",
            Self::CalicoBlocks => "blockaffinities of Calico",
            Self::Cilium => "configmap kube-system/cilium-config",
            Self::CiliumNode => "this node's CiliumNode",
            Self::Submariner => "Submariner",
        }
    }
}

/// What one source said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Pod CIDRs of the cluster.
    pub pods: Vec<IpNet>,
    /// Pod CIDRs that stand in where nobody else names any.
    pub pods_at_worst: Vec<IpNet>,
    /// This node's share of them.
    pub own_pods: Vec<IpNet>,
    /// Service CIDRs.
    pub services: Vec<IpNet>,
    /// How the main CNI masquerades.
    pub masquerade: Option<Masquerade>,
    /// This cluster's name.
    pub cluster_name: Option<String>,
    /// Values that could not be used, each in a sentence.
    pub odd: Vec<String>,
}

/// Where a source stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has not answered since the agent started; why, where that is known.
    Waiting(String),
    /// It is not there, or is not needed; why.
    Absent(String),
    /// It may not be read; why.
    Forbidden(String),
    /// It said something.
    Said(Said),
}

/// Where all sources stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers(BTreeMap<Origin, Answer>);

impl Answers {
    /// All sources waited for.
    pub fn waiting() -> Self {
        Self(Origin::ALL.into_iter().map(|origin| (origin, Answer::Waiting(String::new()))).collect())
    }

    /// Takes a word of a source; returns whether it changes anything. Trouble does not take back what it said before, nor
    /// does a right that is taken away: roles are made anew at an upgrade.
    pub fn take(&mut self, origin: Origin, answer: Answer) -> bool {
        let known = self.0.get(&origin);
        let keeps = match (&answer, known) {
            (_, None | Some(Answer::Waiting(_))) => false,
            (Answer::Waiting(_), _) | (Answer::Forbidden(_), Some(Answer::Said(_))) => true,
            (Answer::Absent(_) | Answer::Said(_) | Answer::Forbidden(_), _) => false,
        };
        let changed = !keeps && known != Some(&answer);
        if changed {
            self.0.insert(origin, answer);
        }
        changed
    }

    fn said(&self, origin: Origin) -> Option<&Said> {
        match self.0.get(&origin) {
            Some(Answer::Said(said)) => Some(said),
            _ => None,
        }
    }

    fn is_waiting(&self, origin: Origin) -> bool {
        matches!(self.0.get(&origin), Some(Answer::Waiting(_)))
    }

    /// A source in a word or two; the whole of a refusal is for the status socket.
    fn word(&self, origin: Origin) -> &str {
        let words = match self.0.get(&origin) {
            Some(Answer::Waiting(_)) | None => "no answer yet",
            Some(Answer::Absent(why)) => why,
            Some(Answer::Forbidden(_)) => "forbidden",
            Some(Answer::Said(_)) => "names none",
        };
        words.split(':').next().unwrap_or(words)
    }

    /// A source that has not answered although it was tried, and why.
    pub fn trouble(&self) -> Option<(&'static str, &str)> {
        self.0.iter().find_map(|(origin, answer)| match answer {
            Answer::Waiting(why) if !why.is_empty() => Some((origin.name(), why.as_str())),
            _ => None,
        })
    }

    /// Each source in words.
    pub fn words(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(origin, answer)| {
            let words = match answer {
                Answer::Waiting(why) if why.is_empty() => "no answer yet",
                Answer::Waiting(why) | Answer::Absent(why) | Answer::Forbidden(why) => why,
                Answer::Said(_) => "answered",
            };
            (origin.name(), words)
        })
    }
}

/// What was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Whether there is an API server to ask.
    pub kubernetes: bool,
    /// Setting `clusterName`.
    pub cluster_name: Option<String>,
    /// Setting `podCIDRs`.
    pub pods: Vec<IpNet>,
    /// Setting `serviceCIDRs`.
    pub services: Vec<IpNet>,
    /// Setting `nodeCIDRs`.
    pub nodes: Vec<IpNet>,
}

impl Given {
    /// Whether anything was given that `node.json` holds.
    pub const fn any(&self) -> bool {
        self.cluster_name.is_some() || !self.pods.is_empty() || !self.services.is_empty() || !self.nodes.is_empty()
    }
}

/// Node addresses by the kernel's word, and how many there were before the list was cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The list.
    pub list: Vec<IpAddr>,
    /// All of them.
    pub total: usize,
}

/// The outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// What `node.json` is to say.
    pub facts: NodeFacts,
    /// What is not known, or odd.
    pub findings: Vec<Finding>,
    /// Whether a source that matters has not answered yet.
    pub waiting: bool,
    /// Whether all nodes must be asked; none while that is not clear.
    pub ask_nodes: Option<bool>,
    /// Where the pod CIDRs come from, and the service CIDRs.
    pub from: [Vec<&'static str>; 2],
}

/// Where CIDRs come from that the agent wrote before.
const BEFORE: &str = "what was known before";

const POOLS: [Origin; 2] = [Origin::Calico, Origin::Cilium];
const SHARES: [Origin; 4] = [Origin::OwnNode, Origin::Nodes, Origin::Kubeadm, Origin::Arguments];
const SERVICES: [&[Origin]; 2] = [&[Origin::ServiceCidr], &[Origin::Kubeadm, Origin::Arguments]];

/// Decides. `previous` is what the agent itself wrote before: it stays in force, field by field, while a source that
/// could say otherwise has not answered, so that neither a restart nor an API server that is down changes anything; and
/// while all have answered and nobody names any CIDR, which is a finding.
pub fn decide(given: &Given, answers: &Answers, addresses: &Addresses, previous: &NodeFacts) -> Decision {
    let pods = if given.pods.is_empty() {
        let worst: Tier<'_> = (&[Origin::Cilium], |said| &said.pods_at_worst);
        settle(answers, &[(&POOLS, |said| &said.pods), (&SHARES, |said| &said.pods), worst], &previous.pod_cidrs)
    } else {
        Settled::given(&given.pods)
    };
    let services = if given.services.is_empty() {
        let tiers = SERVICES.map(|origins| -> Tier<'_> { (origins, |said| &said.services) });
        settle(answers, &tiers, &previous.service_cidrs)
    } else {
        Settled::given(&given.services)
    };
    let unanswered = |origin| answers.is_waiting(origin);
    let name = answers.said(Origin::Submariner).and_then(|said| said.cluster_name.clone());
    let name = name.or_else(|| previous.cluster_name.clone().filter(|_| unanswered(Origin::Submariner)));
    let masquerade = answers.said(Origin::Cilium).and_then(|said| said.masquerade);
    let own = own_share(answers, &pods);
    let mut decision = Decision {
        waiting: pods.waiting
            || services.waiting
            || own.is_none() && pods.from != [BEFORE]
            || unanswered(Origin::Submariner),
        ask_nodes: ask_nodes(given, answers),
        facts: NodeFacts {
            cluster_name: given.cluster_name.clone().or(name),
            addresses: addresses.list.clone(),
            own_pod_cidrs: own.unwrap_or_else(|| previous.own_pod_cidrs.clone()),
            masquerade: masquerade.or(previous.masquerade.filter(|_| unanswered(Origin::Cilium))),
            node_cidrs: given.nodes.clone(),
            pod_cidrs: pods.nets,
            service_cidrs: services.nets,
        },
        findings: Vec::new(),
        from: [pods.from, services.from],
    };
    decision.find(answers, addresses, [given.kubernetes && pods.unknown, given.kubernetes && services.unknown]);
    decision
}

/// Sources that count together, and what of their words.
type Tier<'a> = (&'a [Origin], fn(&Said) -> &Vec<IpNet>);

#[derive(Default)]
struct Settled {
    nets: Vec<IpNet>,
    from: Vec<&'static str>,
    waiting: bool,
    /// Whether all have answered and nobody named any.
    unknown: bool,
    /// Place of the tier that had it.
    tier: Option<usize>,
}

impl Settled {
    fn given(nets: &[IpNet]) -> Self {
        let set: CidrSet = nets.iter().copied().collect();
        Self { nets: set.iter().copied().collect(), from: vec!["settings"], ..Self::default() }
    }
}

fn settle(answers: &Answers, tiers: &[Tier<'_>], previous: &[IpNet]) -> Settled {
    let mut settled = Settled::default();
    for (place, (origins, pick)) in tiers.iter().enumerate() {
        settled.waiting |= origins.iter().any(|origin| answers.is_waiting(*origin));
        let mut set = CidrSet::new();
        for origin in *origins {
            let nets = answers.said(*origin).map(pick).filter(|nets| !nets.is_empty());
            settled.from.extend(nets.is_some().then_some(origin.name()));
            set.extend(nets.into_iter().flatten().copied());
        }
        if !set.is_empty() {
            settled.nets = set.iter().copied().collect();
            settled.tier = Some(place);
            break;
        }
    }
    // No cluster is without pods and services: where nobody names any, somebody is not heard.
    settled.unknown = settled.nets.is_empty() && !settled.waiting;
    if !previous.is_empty() && (settled.waiting || settled.unknown) {
        settled.nets = previous.to_vec();
        settled.from = vec![BEFORE];
    }
    settled
}

/// This node's share of the pod CIDRs; none while that is not clear. Not `Node.spec.podCIDRs` where pods get their
/// addresses from pools: it may well lie inside a pool and yet be other nodes'.
fn own_share(answers: &Answers, pods: &Settled) -> Option<Vec<IpNet>> {
    if pods.from == [BEFORE] {
        return None;
    }
    let pools = &[Origin::CalicoBlocks, Origin::CiliumNode];
    let by_pools = |origin: &Origin| answers.said(*origin).is_some_and(|said| !said.own_pods.is_empty());
    let origins: &[Origin] = match pods.tier {
        Some(0) => pools,
        // Given by hand, but pods get their addresses from pools all the same.
        None if pools.iter().any(by_pools) => pools,
        _ => &[Origin::OwnNode],
    };
    if origins.iter().any(|origin| answers.is_waiting(*origin)) {
        return None;
    }
    let all: CidrSet = pods.nets.iter().copied().collect();
    let shares = origins.iter().filter_map(|origin| answers.said(*origin)).flat_map(|said| &said.own_pods);
    let own: CidrSet = shares.copied().filter(|net| all.contains(net)).collect();
    Some(own.iter().copied().collect())
}

/// Following every node is dear in a large cluster (kubelets write their status every few minutes), so it is done only
/// where nobody names the whole of which nodes get their shares.
fn ask_nodes(given: &Given, answers: &Answers) -> Option<bool> {
    if !given.pods.is_empty() {
        return Some(false);
    }
    let others = [Origin::Calico, Origin::Cilium, Origin::Kubeadm, Origin::Arguments, Origin::OwnNode];
    if others.iter().any(|origin| answers.is_waiting(*origin)) {
        return None;
    }
    let pods = |origins: &[Origin]| -> CidrSet {
        origins.iter().filter_map(|origin| answers.said(*origin)).flat_map(|said| said.pods.iter().copied()).collect()
    };
    let whole = pods(&[Origin::Kubeadm, Origin::Arguments]);
    let covered = !whole.is_empty() && pods(&[Origin::OwnNode]).iter().all(|share| whole.contains(share));
    Some(pods(&POOLS).is_empty() && !covered)
}

impl Decision {
    fn find(&mut self, answers: &Answers, addresses: &Addresses, unknown: [bool; 2]) {
        let lists = [
            ("pod", &self.facts.pod_cidrs, [&POOLS[..], &SHARES[..]].concat()),
            ("service", &self.facts.service_cidrs, SERVICES.concat()),
        ];
        for ((what, nets, origins), unknown) in lists.into_iter().zip(unknown) {
            if unknown {
                let stays = if nets.is_empty() { "" } else { ", and what was known before stays" };
                let asked = origins.iter().map(|origin| format!("{}: {}", origin.name(), answers.word(*origin)));
                let asked = asked.collect::<Vec<_>>().join("; ");
                let text = format!("{what} CIDRs: nobody names any{stays} ({asked})");
                self.findings.push(Finding::new(Id::LocalUnknown, text));
            }
        }
        if addresses.list.is_empty() {
            self.findings.push(Finding::new(Id::NodeAddresses, "the kernel has no global address of this node"));
        } else if addresses.total > addresses.list.len() {
            let text = format!("{} addresses; the first {NODE_ADDRESS_LIMIT} are taken", addresses.total);
            self.findings.push(Finding::new(Id::NodeAddresses, text));
        }
        for origin in Origin::ALL {
            let odd = answers.said(origin).into_iter().flat_map(|said| &said.odd);
            let findings = odd.map(|odd| Finding::new(Id::LocalUnknown, format!("{}: {odd}", origin.name())));
            self.findings.extend(findings);
        }
    }
}

/// What a `node.json` that was written by hand leaves out although it is known.
pub fn left_out(by_hand: &NodeFacts, known: &NodeFacts) -> Vec<Finding> {
    let lists = [
        ("podCIDRs", &by_hand.pod_cidrs, &known.pod_cidrs),
        ("serviceCIDRs", &by_hand.service_cidrs, &known.service_cidrs),
    ];
    let missing = lists.into_iter().filter(|(_, theirs, ours)| theirs.is_empty() && !ours.is_empty());
    missing
        .map(|(field, _, nets)| {
            let nets: Vec<String> = nets.iter().map(ToString::to_string).collect();
            let text = format!(
                "node.json was written by hand and names no {field}: add {}, or remove the file and the agent writes it",
                nets.join(", ")
            );
            Finding::new(Id::LocalUnknown, text)
        })
        .collect()
}

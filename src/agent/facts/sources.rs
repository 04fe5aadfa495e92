//! What is asked of the API server about this cluster and this node.

use std::time::Duration;

use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams},
};
use serde_json::Value;
use tokio::{sync::watch, task::JoinSet};

use super::{
    ask::{Following, Objects, Sink, poll},
    decide::{Answer, Origin},
    objects::{self, NodeSpec},
    slim::{Slim, kind},
};

/// Where the objects of the control plane are.
const SYSTEM: &str = "kube-system";

/// How often what cannot be followed is asked for. Arguments change when the control plane restarts, the name of a
/// cluster never; Submariner writes its gateways every five seconds, so that a watch on every node would be dear.
const POLL: Duration = Duration::from_secs(300);

/// Labels of static pods: kubeadm and RKE2 use the first key, kOps and others the second.
const CONTROL_PLANE: [&str; 2] =
    ["component in (kube-apiserver,kube-controller-manager)", "k8s-app in (kube-apiserver,kube-controller-manager)"];

/// Asks everybody. Answers go to `sink`; all tasks end when it is closed or the set is dropped.
pub fn start(
    client: &Client,
    node: &str,
    namespace: Option<&str>,
    ask_nodes: watch::Receiver<Option<bool>>,
    sink: &Sink,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let all = |kinds: &[ApiResource]| kinds.iter().map(|kind| Api::all_with(client.clone(), kind)).collect::<Vec<_>>();
    let named = format!("metadata.name={node}");
    let calico = |what: &str, plural: &str| {
        all(&[kind("projectcalico.org", "v3", what, plural), kind("crd.projectcalico.org", "v1", what, plural)])
    };
    let this_node = node.to_owned();
    let followings: [Following<Value>; 4] = [
        Following {
            origin: Origin::ServiceCidr,
            apis: all(
                &["v1", "v1beta1"].map(|version| kind("networking.k8s.io", version, "ServiceCIDR", "servicecidrs"))
            ),
            fields: String::new(),
            gather: Box::new(|found| objects::service_cidrs(specs(found))),
        },
        Following {
            origin: Origin::Calico,
            apis: calico("IPPool", "ippools"),
            fields: String::new(),
            gather: Box::new(|found| objects::calico(specs(found))),
        },
        Following {
            origin: Origin::CalicoBlocks,
            apis: calico("BlockAffinity", "blockaffinities"),
            fields: String::new(),
            gather: Box::new(move |found| objects::calico_blocks(specs(found), &this_node)),
        },
        Following {
            origin: Origin::CiliumNode,
            apis: all(&[kind("cilium.io", "v2", "CiliumNode", "ciliumnodes")]),
            fields: named.clone(),
            gather: Box::new(|found| objects::cilium_node(specs(found))),
        },
    ];
    for following in followings {
        tasks.spawn(following.run(sink.clone()));
    }
    tasks.spawn(config_map(client, Origin::Kubeadm, "kubeadm-config", objects::kubeadm).run(sink.clone()));
    tasks.spawn(config_map(client, Origin::Cilium, "cilium-config", objects::cilium).run(sink.clone()));
    tasks.spawn(nodes(client, Origin::OwnNode, named, |found| objects::own_node(specs(found))).run(sink.clone()));
    tasks.spawn(all_nodes(client.clone(), ask_nodes, sink.clone()));
    let asked = client.clone();
    tasks.spawn(poll(Origin::Arguments, sink.clone(), POLL, move || arguments(asked.clone())));
    let (asked, namespace) = (client.clone(), namespace.map(str::to_owned));
    tasks.spawn(poll(Origin::Submariner, sink.clone(), POLL, move || submariner(asked.clone(), namespace.clone())));
    tasks
}

fn specs<S>(found: &Objects<S>) -> impl Iterator<Item = &S> {
    found.values().map(|object| &object.spec)
}

type FromData = fn(&std::collections::BTreeMap<String, String>) -> Answer;

fn config_map(client: &Client, origin: Origin, name: &str, read: FromData) -> Following<Value> {
    Following {
        origin,
        apis: vec![Api::namespaced_with(client.clone(), SYSTEM, &kind("", "v1", "ConfigMap", "configmaps"))],
        fields: format!("metadata.name={name}"),
        gather: Box::new(move |found| {
            found.values().next().map_or_else(|| Answer::Absent("not there".to_owned()), |object| read(&object.data))
        }),
    }
}

fn nodes(
    client: &Client,
    origin: Origin,
    fields: String,
    gather: fn(&Objects<NodeSpec>) -> Answer,
) -> Following<NodeSpec> {
    let api: Api<Slim<NodeSpec>> = Api::all_with(client.clone(), &kind("", "v1", "Node", "nodes"));
    Following { origin, apis: vec![api], fields, gather: Box::new(gather) }
}

/// Follows all nodes while, and only while, that is needed.
async fn all_nodes(client: Client, mut needed: watch::Receiver<Option<bool>>, sink: Sink) {
    loop {
        let now = *needed.borrow_and_update();
        if now == Some(false) {
            let answer = Answer::Absent("not asked: others name the whole".to_owned());
            if sink.send((Origin::Nodes, answer)).await.is_err() {
                return;
            }
        }
        let following = nodes(&client, Origin::Nodes, String::new(), |found| objects::nodes(specs(found)));
        tokio::select! {
            () = following.run(sink.clone()), if now == Some(true) => return,
            changed = needed.changed() => if changed.is_err() { return },
        }
    }
}

async fn arguments(client: Client) -> Result<Answer, kube::Error> {
    let api: Api<Slim<Value>> = Api::namespaced_with(client, SYSTEM, &kind("", "v1", "Pod", "pods"));
    let mut pods = Vec::new();
    for labels in CONTROL_PLANE {
        pods.extend(api.list(&ListParams::default().labels(labels)).await?.items);
    }
    Ok(objects::arguments(pods.iter().map(|pod| &pod.spec)))
}

async fn submariner(client: Client, namespace: Option<String>) -> Result<Answer, kube::Error> {
    let list = async |version: &str, what: &str, plural: &str| {
        let kind = kind("submariner.io", version, what, plural);
        let api: Api<DynamicObject> = match &namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
            None => Api::all_with(client.clone(), &kind),
        };
        match api.list(&ListParams::default()).await {
            Ok(list) => Ok(Ok(list.items.into_iter().map(|object| object.data).collect::<Vec<_>>())),
            // Either kind may be there, or readable, without the other.
            Err(err) => super::ask::refused(&err).map(Err).ok_or(err),
        }
    };
    let own = list("v1alpha1", "Submariner", "submariners").await?;
    let answer = objects::submariner(own.iter().flatten(), &[]);
    if matches!(answer, Answer::Said(_)) {
        return Ok(answer);
    }
    Ok(match (own, list("v1", "Gateway", "gateways").await?) {
        (Err(refusal), Err(_)) => refusal,
        (own, gateways) => objects::submariner(own.iter().flatten(), &gateways.unwrap_or_default()),
    })
}

//! The `NodeConfig` object of this node: what was really applied here, for those who look at the API server.

use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use prometheus_client::metrics::counter::Counter;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::node;
use crate::{
    api::{FINDINGS_LIMIT, NodeConfig, NodeConfigSpec, NodeConfigStatus, NodeFinding, NodePart, TEXT_LIMIT},
    backoff::{Backoff, around},
    board::STARTING,
    board::Snapshot,
    context::Context,
    kube_error::words,
};

/// Who the fields belong to.
const MANAGER: &str = "crosslink-agent";

/// Shortest time between two writes, and the same after so many writes of which none was a minute after the one before:
/// then something flaps, and every node of a cluster may do so.
const GAP: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
const FLAPS: usize = 5;

/// How long the first look waits, so that a restart does not show the agent as it comes up: so long in any case, and so
/// long at most while a part is still starting.
const FIRST: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(20));

/// How often the object is looked at though nothing changed here: somebody may have deleted it, or the Node it belongs
/// to was replaced.
const LOOK: Duration = Duration::from_secs(600);

/// First and longest pause after a failure, most likely a definition that is not installed.
const TROUBLE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(120));

/// How long the API server may take for one write.
const PATIENCE: Duration = Duration::from_secs(15);

/// Most parts in a status; the schema's limit.
const PARTS: usize = 32;

/// Keeps the object until the board is gone.
pub async fn run(context: Context) {
    let Some(client) = context.client.clone() else { return };
    let writes = Counter::<u64>::default();
    context.register(|registry| {
        registry.register("node_config_writes", "Writes of this node's NodeConfig object", writes.clone());
    });
    let mut writer = Writer { client, name: context.settings.node_name.clone(), writes };
    let mut changes = context.board.watch();
    let (mut trouble, mut wait, mut streak) = (Backoff::new(TROUBLE.0, TROUBLE.1), FIRST.0, 0);
    let mut written: Option<Content> = None;
    let started = Instant::now();
    let mut looked = started;
    loop {
        sleep(wait).await;
        changes.borrow_and_update();
        let board = context.board.snapshot();
        if board.parts.values().any(|health| health.text == STARTING) && started.elapsed() < FIRST.1 {
            continue;
        }
        let wanted = Content::new(&board);
        if written.as_ref() != Some(&wanted) || looked.elapsed() >= LOOK {
            let kept = timeout(PATIENCE, writer.keep(&wanted)).await;
            match kept.map_err(|late| late.to_string()).and_then(|kept| kept.map_err(|err| words(&err))) {
                Ok(wrote) => {
                    trouble = Backoff::new(TROUBLE.0, TROUBLE.1);
                    streak = if wrote && looked.elapsed() < GAP.1 { streak + 1 } else { 0 };
                    (written, looked) = (Some(wanted), Instant::now());
                    context.board.facts("surface", json!({ "nodeConfig": "in step" }));
                }
                Err(why) => {
                    tracing::debug!("NodeConfig {} not written: {why}", writer.name);
                    context.board.facts("surface", json!({ "nodeConfig": why }));
                    wait = trouble.wait();
                    continue;
                }
            }
        }
        wait = if streak < FLAPS { GAP.0 } else { GAP.1 };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = sleep(around(LOOK)) => {}
        }
    }
}

/// What the object is to say, but for the time.
#[derive(Clone, Debug, PartialEq)]
struct Content {
    spec: NodeConfigSpec,
    status: NodeConfigStatus,
}

impl Content {
    /// From the board. The part `inputs` tells as facts which `generation` is wanted, the part `resync` which one running
    /// pods have, and how many `attachments` and `routes` there are.
    fn new(board: &Snapshot) -> Self {
        let number = |part: &str, key: &str| {
            board.facts.get(part).and_then(|facts| facts.get(key)).and_then(Value::as_i64).filter(|number| *number >= 0)
        };
        let generation = number("inputs", "generation").unwrap_or_default();
        // Where running pods are not to follow, there is nothing to wait for.
        let off = board.facts.get("resync").is_some_and(|facts| facts.get("off").is_some());
        let applied = if off { generation } else { number("resync", "generation").unwrap_or_default() };
        let parts = board.parts.iter().take(PARTS).map(|(name, health)| NodePart {
            name: name.clone(),
            ok: health.ok,
            text: limited(&health.text),
        });
        let status = NodeConfigStatus {
            synced: applied == generation && board.parts.values().all(|health| health.ok),
            applied_generation: applied,
            applied_time: None,
            routes: number("resync", "routes").unwrap_or_default(),
            attachments: number("resync", "attachments").unwrap_or_default(),
            agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            parts: parts.collect(),
            findings: findings(board),
        };
        Self { spec: NodeConfigSpec { generation }, status }
    }
}

fn findings(board: &Snapshot) -> Vec<NodeFinding> {
    let all = board.findings.iter().flat_map(|(part, findings)| findings.iter().map(move |finding| (part, finding)));
    let mut list: Vec<NodeFinding> = all
        .map(|(part, finding)| NodeFinding {
            id: finding.id.as_str().to_owned(),
            severity: finding.id.severity().to_string(),
            part: part.clone(),
            text: limited(&finding.text),
        })
        .collect();
    let total = list.len();
    if total > FINDINGS_LIMIT {
        list.truncate(FINDINGS_LIMIT - 1);
        list.push(NodeFinding {
            id: "XL-UNKNOWN".to_owned(),
            severity: "info".to_owned(),
            part: "surface".to_owned(),
            text: format!("and {} more: see the agent's socket, /status", total - list.len()),
        });
    }
    list
}

fn limited(text: &str) -> String {
    let mut text = text.to_owned();
    // Bytes are never fewer than characters.
    super::cut(&mut text, TEXT_LIMIT);
    text
}

struct Writer {
    client: Client,
    name: String,
    writes: Counter<u64>,
}

impl Writer {
    /// Makes the object say this; returns whether it had to be written.
    async fn keep(&mut self, wanted: &Content) -> kube::Result<bool> {
        let objects: Api<NodeConfig> = Api::all(self.client.clone());
        let params = PatchParams::apply(MANAGER).force();
        let found = objects.get_opt(&self.name).await?;
        let owner = node::uid(&self.client, &self.name).await?;
        let mut wrote = false;
        if !is_written(found.as_ref(), wanted, owner.as_deref()) {
            let mut object = NodeConfig::new(&self.name, wanted.spec.clone());
            object.metadata.owner_references = owner.map(|uid| vec![owner_reference(&self.name, uid)]);
            objects.patch(&self.name, &params, &Patch::Apply(&object)).await?;
            self.writes.inc();
            wrote = true;
        }
        let before = found.and_then(|object| object.status);
        if !before.as_ref().is_some_and(|before| same(before, &wanted.status)) {
            let status = NodeConfigStatus {
                applied_time: Some(applied_time(before.as_ref(), &wanted.status)),
                ..wanted.status.clone()
            };
            let mut object = NodeConfig::new(&self.name, wanted.spec.clone());
            object.status = Some(status);
            objects.patch_status(&self.name, &params, &Patch::Apply(&object)).await?;
            self.writes.inc();
            wrote = true;
        }
        Ok(wrote)
    }
}

fn is_written(found: Option<&NodeConfig>, wanted: &Content, owner: Option<&str>) -> bool {
    found.is_some_and(|found| {
        let owners = found.metadata.owner_references.iter().flatten();
        // A Node that cannot be seen now is no reason to give up an owner.
        let owned = owner.is_none_or(|uid| owners.into_iter().any(|owner| owner.uid == uid));
        owned && found.spec == wanted.spec
    })
}

fn same(before: &NodeConfigStatus, wanted: &NodeConfigStatus) -> bool {
    NodeConfigStatus { applied_time: None, ..before.clone() } == *wanted
}

/// Now, or what stood there if the same generation is still in force.
fn applied_time(before: Option<&NodeConfigStatus>, wanted: &NodeConfigStatus) -> String {
    before
        .filter(|before| before.applied_generation == wanted.applied_generation)
        .and_then(|before| before.applied_time.clone())
        .unwrap_or_else(now)
}

/// RFC 3339, whole seconds.
fn now() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

fn owner_reference(name: &str, uid: String) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.to_owned(),
        uid,
        ..OwnerReference::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::board::Health;
    use crosslink_core::finding::{Finding, Id};

    fn health(ok: bool, text: &str) -> Health {
        Health { ok, required: true, text: text.to_owned() }
    }

    #[test]
    fn the_board_becomes_a_status() {
        let mut board = Snapshot {
            parts: BTreeMap::from([("install".to_owned(), health(true, ""))]),
            findings: BTreeMap::from([("facts".to_owned(), vec![Finding::new(Id::CidrLocal, "10.0.0.0/8")])]),
            facts: BTreeMap::from([
                ("inputs".to_owned(), json!({ "generation": 7 })),
                ("resync".to_owned(), json!({ "attachments": 3, "routes": 12, "generation": 7 })),
            ]),
        };
        let content = Content::new(&board);
        assert_eq!(content.spec.generation, 7);
        let status = &content.status;
        assert!(status.synced && status.applied_generation == 7 && status.routes == 12 && status.attachments == 3);
        assert_eq!(
            (status.findings[0].id.as_str(), status.findings[0].severity.as_str()),
            ("XL-CIDR-LOCAL", "warning")
        );
        // Something is wanted that is not applied; a part is ill.
        board.facts.insert("inputs".to_owned(), json!({ "generation": 8 }));
        let content = Content::new(&board);
        assert!(!content.status.synced && content.spec.generation == 8);
        board.facts.remove("inputs");
        board.parts.insert("traffic".to_owned(), health(false, "no nf_tables"));
        assert!(!Content::new(&board).status.synced);
        // Nonsense is as good as nothing.
        board.facts.insert("resync".to_owned(), json!({ "routes": -1, "attachments": "x" }));
        assert_eq!(Content::new(&board).status.routes, 0);
    }

    #[test]
    fn limits_of_the_schema_are_kept() {
        let findings = (0..500).map(|i| Finding::new(Id::CidrLocal, format!("{i}: {}", "ü".repeat(2000)))).collect();
        let parts = (0..50).map(|i| (format!("part{i}"), health(false, &"x".repeat(5000)))).collect();
        let board = Snapshot { parts, findings: BTreeMap::from([("f".to_owned(), findings)]), ..Snapshot::default() };
        let status = Content::new(&board).status;
        assert_eq!((status.findings.len(), status.parts.len()), (FINDINGS_LIMIT, PARTS));
        assert!(status.findings.iter().all(|finding| finding.text.chars().count() <= TEXT_LIMIT));
        assert!(status.parts.iter().all(|part| part.text.chars().count() <= TEXT_LIMIT));
        assert!(status.findings[FINDINGS_LIMIT - 1].text.contains("401 more"), "{:?}", status.findings.last());
    }

    #[test]
    fn the_time_stays_while_the_generation_does() {
        let before =
            NodeConfigStatus { applied_generation: 3, applied_time: Some("t".to_owned()), ..Default::default() };
        let mut wanted = NodeConfigStatus { applied_generation: 3, routes: 5, ..Default::default() };
        assert!(!same(&before, &wanted));
        assert_eq!(applied_time(Some(&before), &wanted), "t");
        wanted.applied_generation = 4;
        assert_ne!(applied_time(Some(&before), &wanted), "t");
        assert!(applied_time(None, &wanted).ends_with('Z'));
        assert!(same(&before, &NodeConfigStatus { applied_generation: 3, ..Default::default() }));
    }
}

//! Writes statuses of `Cluster` objects.

use std::{collections::BTreeMap, time::Duration};

use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::backoff::up_to;
use crate::{
    api::{Cluster, ClusterStatus},
    board::{Board, Note, Subject},
};

/// Most statuses that wait in memory.
pub const BACKLOG: usize = 100;

/// Who writes, for server-side apply: all agents are one.
const MANAGER: &str = "crosslink-agent";

/// Agents of all nodes see an object at the same time, and one of them is enough: each waits for a moment of its own, in
/// which it mostly sees that another was first.
const SPREAD: Duration = Duration::from_secs(2);

/// Between two writes, so that thousands of new objects are no storm.
const PAUSE: Duration = Duration::from_millis(20);

/// Wait before an object that could not be written is tried again though it did not change.
const RETRY: Duration = Duration::from_secs(60);

/// A status that should be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Of which object.
    pub name: String,
    /// Version of the object that the status was made for; of another it is not written.
    pub version: String,
    /// The status.
    pub status: ClusterStatus,
    /// Why CIDRs are refused, where that is new.
    pub refused: Option<String>,
}

/// Writes what is wanted until the agent ends.
pub async fn write(client: Client, mut wanted: watch::Receiver<Vec<Wanted>>, board: Board, stop: CancellationToken) {
    let api: Api<Cluster> = Api::all(client);
    // Versions that were tried, and when.
    let mut tried: BTreeMap<String, (String, Instant)> = BTreeMap::new();
    loop {
        let next = next(&wanted.borrow_and_update(), &tried);
        let Some(next) = next else {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = wanted.changed() => if changed.is_err() { return },
            }
            if wanted.borrow().is_empty() {
                tried.clear();
                continue;
            }
            let names: Vec<String> = wanted.borrow().iter().map(|wanted| wanted.name.clone()).collect();
            tried.retain(|name, _| names.contains(name));
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(up_to(SPREAD)) => {}
            }
            continue;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = put(&api, &next, &board) => {}
        }
        tried.insert(next.name, (next.version, Instant::now()));
        sleep(PAUSE).await;
    }
}

fn next(wanted: &[Wanted], tried: &BTreeMap<String, (String, Instant)>) -> Option<Wanted> {
    let fresh = |wanted: &&Wanted| {
        tried.get(&wanted.name).is_none_or(|(version, when)| *version != wanted.version || when.elapsed() > RETRY)
    };
    wanted.iter().find(fresh).cloned()
}

async fn put(api: &Api<Cluster>, wanted: &Wanted, board: &Board) {
    let body = json!({
        "apiVersion": "crosslink.dev/v1alpha1",
        "kind": "Cluster",
        // Whoever changed the object meanwhile made it another one, which is judged anew.
        "metadata": { "name": wanted.name, "resourceVersion": wanted.version },
        "status": wanted.status,
    });
    let params = PatchParams::apply(MANAGER).force();
    match api.patch_status(&wanted.name, &params, &Patch::Apply(body)).await {
        Ok(object) => {
            if let Some(why) = &wanted.refused {
                board.note(Note {
                    subject: Subject::Cluster {
                        name: wanted.name.clone(),
                        uid: object.metadata.uid.unwrap_or_default(),
                    },
                    warning: true,
                    reason: "RemoteCIDRRefused",
                    text: format!("Cluster {}: {why}", wanted.name),
                });
            }
        }
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
        Err(err) => tracing::warn!(cluster = wanted.name, "status not written: {err}"),
    }
}

//! What the parts of the agent say of themselves: health, findings, events. Everything that is shown (readiness,
//! metrics, status socket, `NodeConfig`, Events) is read from here, so that no part knows how it is shown.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crosslink_core::finding::Finding;
use serde::Serialize;
use tokio::sync::{mpsc, watch};

/// Most events that wait to be sent; more are dropped, since each is also a log line.
const EVENTS: usize = 256;

/// Text of a part that has not said anything of itself yet.
pub const STARTING: &str = "starting";

/// Health of one part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Whether it does what it is there for.
    pub ok: bool,
    /// Whether the node counts as ready only with it.
    pub required: bool,
    /// In words; empty where all is well.
    pub text: String,
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// This node.
    Node,
    /// A pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// Its UID, where it is known.
        uid: String,
    },
    /// A `Cluster` object of ours.
    Cluster {
        /// Its name.
        name: String,
        /// Its UID.
        uid: String,
    },
}

/// An event, as in `events.k8s.io`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What it is about.
    pub subject: Subject,
    /// Whether something is wrong.
    pub warning: bool,
    /// Reason, in CamelCase, as `CNIConfigRestored`.
    pub reason: &'static str,
    /// In words.
    pub text: String,
}

/// Everything that is known, for the status socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Health by part.
    pub parts: BTreeMap<String, Health>,
    /// Findings by part.
    pub findings: BTreeMap<String, Vec<Finding>>,
    /// Facts by part, in a form of the part's own.
    pub facts: BTreeMap<String, serde_json::Value>,
}

/// The board. Clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    inner: Arc<Mutex<Snapshot>>,
    changed: watch::Sender<u64>,
    events: mpsc::Sender<Note>,
}

impl Board {
    /// An empty board, and the end where its events come out.
    pub fn new() -> (Self, mpsc::Receiver<Note>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let board = Self { inner: Arc::default(), changed: watch::Sender::new(0), events };
        (board, receiver)
    }

    fn lock(&self) -> MutexGuard<'_, Snapshot> {
        // Every change is a whole value, so a holder that panicked left nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, apply: impl FnOnce(&mut Snapshot) -> bool) {
        if apply(&mut self.lock()) {
            self.changed.send_modify(|count| *count = count.wrapping_add(1));
        }
    }

    /// Says that a part which readiness depends on is not there yet.
    pub fn expect(&self, part: &str) {
        self.health(part, Health { ok: false, required: true, text: STARTING.to_owned() });
    }

    /// Says that a part is well.
    pub fn well(&self, part: &str) {
        let required = self.lock().parts.get(part).is_some_and(|health| health.required);
        self.health(part, Health { ok: true, required, text: String::new() });
    }

    /// Says what keeps a part from working.
    pub fn ill(&self, part: &str, text: impl Into<String>) {
        let required = self.lock().parts.get(part).is_some_and(|health| health.required);
        self.health(part, Health { ok: false, required, text: text.into() });
    }

    fn health(&self, part: &str, health: Health) {
        self.change(|snapshot| {
            let before = snapshot.parts.insert(part.to_owned(), health.clone());
            let changed = before.as_ref() != Some(&health);
            if changed && !health.ok && health.text != STARTING {
                tracing::warn!(part, "{}", health.text);
            } else if changed && before.is_some() && health.ok {
                tracing::info!(part, "is well");
            }
            changed
        });
    }

    /// Replaces the findings of a part.
    pub fn findings(&self, part: &str, findings: Vec<Finding>) {
        self.change(|snapshot| {
            let before = snapshot.findings.get(part).map_or(&[][..], Vec::as_slice);
            for finding in findings.iter().filter(|finding| !before.contains(finding)) {
                tracing::warn!(part, "{finding}");
            }
            let changed = before != findings.as_slice();
            if findings.is_empty() {
                snapshot.findings.remove(part);
            } else {
                snapshot.findings.insert(part.to_owned(), findings);
            }
            changed
        });
    }

    /// Replaces the facts of a part.
    pub fn facts(&self, part: &str, facts: serde_json::Value) {
        self.change(|snapshot| snapshot.facts.insert(part.to_owned(), facts.clone()) != Some(facts));
    }

    /// Sends an event; it is logged in any case.
    pub fn note(&self, note: Note) {
        if note.warning {
            tracing::warn!(reason = note.reason, "{}", note.text);
        } else {
            tracing::info!(reason = note.reason, "{}", note.text);
        }
        let _ = self.events.try_send(note);
    }

    /// All of it.
    pub fn snapshot(&self) -> Snapshot {
        self.lock().clone()
    }

    /// Wakes whenever something changed.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

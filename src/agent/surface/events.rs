//! Kubernetes Events. They are a courtesy: each is a log line too, so whatever is in the way of sending one, it is
//! dropped and counted, and nothing waits.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::node;
use crate::{
    board::{Note, Subject},
    context::Context,
    kube_error::words,
};

/// Longest note that `events.k8s.io/v1` takes, bytes.
const NOTE: usize = 1024;

/// How long the API server may take for one event.
const PATIENCE: Duration = Duration::from_secs(5);

/// After an event that could not be sent, others are dropped at once for this long.
const REST: Duration = Duration::from_secs(10);

/// Events that may be sent at once, and how long until one more may be. The burst is that of client-go's spam filter,
/// which is per source as this is.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(12);

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Fate {
    Sent,
    /// The API server refused it, or is away.
    Failed,
    /// There were too many.
    Limited,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    result: Fate,
}

/// A token bucket. Pure.
#[derive(Clone, Debug)]
struct Bucket {
    tokens: u32,
    refilled: Instant,
}

impl Bucket {
    const fn new(now: Instant) -> Self {
        Self { tokens: BURST, refilled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        while self.tokens < BURST && now.saturating_duration_since(self.refilled) >= REFILL {
            self.tokens += 1;
            self.refilled += REFILL;
        }
        if self.tokens == BURST {
            self.refilled = now;
        }
        let any = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        any
    }
}

/// Sends events until nobody makes any.
pub async fn run(context: Context, mut notes: mpsc::Receiver<Note>) {
    let Some(client) = context.client.clone() else {
        // They are in the log already.
        while notes.recv().await.is_some() {}
        return;
    };
    let counted: Family<Result, Counter> = Family::default();
    context
        .register(|registry| registry.register("events", "Kubernetes Events, by what became of them", counted.clone()));
    let mut sender = Sender { recorder: recorder(&client, &context), client, context, node_uid: None };
    let (mut bucket, mut rest) = (Bucket::new(Instant::now()), None);
    while let Some(note) = notes.recv().await {
        let now = Instant::now();
        let result = if rest.is_some_and(|until| now < until) {
            Fate::Failed
        } else if !bucket.take(now) {
            Fate::Limited
        } else {
            match timeout(PATIENCE, sender.send(&note)).await {
                Ok(Ok(())) => Fate::Sent,
                failed => {
                    let why = failed.map_or_else(
                        |late| late.to_string(),
                        |sent| sent.map_or_else(|err| words(&err), |()| String::new()),
                    );
                    tracing::debug!(reason = note.reason, "event not sent: {why}");
                    rest = Some(Instant::now() + REST);
                    Fate::Failed
                }
            }
        };
        counted.get_or_create(&Result { result }).inc();
    }
}

fn recorder(client: &Client, context: &Context) -> Recorder {
    let instance = Some(context.settings.node_name.clone());
    Recorder::new(client.clone(), Reporter { controller: "crosslink-agent".to_owned(), instance })
}

struct Sender {
    recorder: Recorder,
    client: Client,
    context: Context,
    /// Known once it was found.
    node_uid: Option<String>,
}

impl Sender {
    async fn send(&mut self, note: &Note) -> kube::Result<()> {
        let regarding = self.regarding(&note.subject).await?;
        let event = event(note);
        match self.recorder.publish(&event, &regarding).await {
            // The recorder adds to an event that somebody has deleted; it must forget it first.
            Err(kube::Error::Api(status)) if status.code == 404 => {
                self.recorder = recorder(&self.client, &self.context);
                self.recorder.publish(&event, &regarding).await
            }
            sent => sent,
        }
    }

    async fn regarding(&mut self, subject: &Subject) -> kube::Result<ObjectReference> {
        let reference = |api_version: &str, kind: &str, name: &str, uid: &str| ObjectReference {
            api_version: Some(api_version.to_owned()),
            kind: Some(kind.to_owned()),
            name: Some(name.to_owned()),
            uid: Some(uid.to_owned()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        };
        Ok(match subject {
            Subject::Node => {
                let name = &self.context.settings.node_name;
                if self.node_uid.is_none() {
                    self.node_uid = node::uid(&self.client, name).await?;
                }
                node::reference(name, self.node_uid.clone())
            }
            Subject::Pod { namespace, name, uid } => {
                ObjectReference { namespace: Some(namespace.clone()), ..reference("v1", "Pod", name, uid) }
            }
            Subject::Cluster { name, uid } => reference("crosslink.dev/v1alpha1", "Cluster", name, uid),
        })
    }
}

/// The recorder takes events of one reason and action about one thing for a series and keeps the first one's note. What
/// the note says is therefore part of the action: two refused CIDRs are two events.
fn event(note: &Note) -> Event {
    let mut text = note.text.clone();
    super::cut(&mut text, NOTE);
    Event {
        type_: if note.warning { EventType::Warning } else { EventType::Normal },
        reason: note.reason.to_owned(),
        action: format!("{}-{:08x}", note.reason, crc(text.as_bytes())),
        note: Some(text),
        secondary: None,
    }
}

/// CRC-32 (IEEE 802.3), bit by bit: a short name for a note, the same in every version.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn at_most_a_burst_and_then_one_at_a_time() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let taken = |bucket: &mut Bucket, now| (0..100).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 25);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(11)), 0);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(36)), 3);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(10_000)), 25);
    }

    #[test]
    fn notes_are_told_apart_and_cut() {
        assert_eq!(crc(b"123456789"), 0xcbf4_3926, "the check value of the standard");
        let note = |text: &str| Note { subject: Subject::Node, warning: true, reason: "R", text: text.to_owned() };
        let (one, other) = (event(&note("10.1.0.0/16")), event(&note("10.2.0.0/16")));
        assert_ne!(one.action, other.action);
        assert_eq!(one.action, event(&note("10.1.0.0/16")).action);
        let long = event(&note(&"ü".repeat(1000))).note.unwrap();
        assert!(long.len() <= NOTE && long.ends_with('…'), "{}", long.len());
    }
}

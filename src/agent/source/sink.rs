//! Where a source's clusters go: its file, with the grace period of empty lists, its health, findings and metrics.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crosslink_core::{
    finding::{Finding, Id},
    remotes::Told,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    hold::{Hold, Verdict},
    metrics::SourceMetrics,
    store::{Store, Written},
};
use crate::{board::Board, inputs::Inputs, settings::SourceKind};

/// How often is looked whether somebody changed the file.
const CHECK: Duration = Duration::from_secs(30);

/// Wait before a write that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Between two writes lies at least so many times as long as the last one took, so that a storm of changes leaves the
/// node's disk alone.
const PAUSE: u32 = 5;

/// Most findings of a source that are shown.
const FINDINGS: usize = 50;

/// What a source says.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Its clusters; none as long as not everything was read that they depend on.
    pub clusters: Option<Vec<Arc<Told>>>,
    /// Whether a list without CIDRs is meant.
    pub explicit: bool,
    /// What was skipped.
    pub findings: Vec<Finding>,
    /// Why it cannot be read now.
    pub failure: Option<String>,
    /// Objects that it knows.
    pub objects: usize,
}

/// Where the clusters of a source go.
#[derive(Debug)]
pub struct Sink {
    /// Cancelled when the agent ends.
    pub stop: CancellationToken,
    /// Remotes files and `node.json`.
    pub inputs: watch::Receiver<Arc<Inputs>>,
    pub(super) kind: SourceKind,
    pub(super) board: Board,
    pub(super) store: Option<Store>,
    pub(super) hold: Hold,
    pub(super) metrics: SourceMetrics,
    /// Sources that have not said anything yet.
    pub(super) silent: watch::Sender<std::collections::BTreeSet<SourceKind>>,
    due: Option<Instant>,
    not_before: Option<Instant>,
}

/// What a sink shares with those of other sources.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Cancelled when the agent ends.
    pub stop: CancellationToken,
    /// Remotes files and `node.json`.
    pub inputs: watch::Receiver<Arc<Inputs>>,
    /// Where is reported.
    pub board: Board,
    /// Grace period of empty lists.
    pub hold: Duration,
    /// Sources that have not said anything yet.
    pub silent: watch::Sender<std::collections::BTreeSet<SourceKind>>,
}

impl Sink {
    /// A sink for a source whose file is as `store` says.
    pub fn new(shared: Shared, kind: SourceKind, store: Store, metrics: SourceMetrics) -> Self {
        metrics.generation.set(store.generation().try_into().unwrap_or(i64::MAX));
        Self {
            stop: shared.stop,
            inputs: shared.inputs,
            kind,
            board: shared.board,
            store: Some(store),
            hold: Hold::new(shared.hold),
            metrics,
            silent: shared.silent,
            due: None,
            not_before: None,
        }
    }

    /// Where is reported.
    pub fn board(&self) -> Board {
        self.board.clone()
    }

    /// When [`Self::offer`] is to be called again, even if nothing changed.
    pub const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The moment before which nothing should be offered.
    pub fn not_before(&self) -> Instant {
        self.not_before.unwrap_or_else(Instant::now)
    }

    /// Takes what the source says now.
    pub async fn offer(&mut self, view: View) {
        let now = Instant::now();
        self.due = Some(now + CHECK);
        self.metrics.objects.set(view.objects.try_into().unwrap_or(i64::MAX));
        let mut findings = view.findings;
        let mut failure = view.failure;
        let read = view.clusters.is_some();
        if let Some(clusters) = view.clusters {
            match self.publish(clusters, view.explicit, now).await {
                Ok(None) => {}
                Ok(Some(held)) => findings.insert(0, held),
                Err(why) => failure = Some(why),
            }
            if failure.is_none() {
                let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                self.metrics.last_sync.set(seconds.try_into().unwrap_or(i64::MAX));
            }
        }
        self.report(read, failure, findings);
    }

    /// Writes the file, or says why that waits.
    async fn publish(
        &mut self,
        clusters: Vec<Arc<Told>>,
        explicit: bool,
        now: Instant,
    ) -> Result<Option<Finding>, String> {
        let Some(mut store) = self.store.take() else { return Err("the file is lost to another task".to_owned()) };
        let empty = clusters.iter().all(|told| told.is_empty());
        if let Verdict::Until(until) = self.hold.judge(store.is_empty(), empty, explicit, now) {
            self.store = Some(store);
            self.due = Some(until);
            let text = format!("source {} suddenly lists nothing; what it said last stays", self.kind.name());
            return Ok(Some(Finding::new(Id::SourceEmpty, text)));
        }
        let work = move || {
            let started = std::time::Instant::now();
            let written = store.write(&clusters);
            (store, written, started.elapsed())
        };
        let (store, written, took) = tokio::task::spawn_blocking(work).await.map_err(|err| err.to_string())?;
        self.metrics.generation.set(store.generation().try_into().unwrap_or(i64::MAX));
        let generation = store.generation();
        self.store = Some(store);
        self.not_before = Some(Instant::now() + took * PAUSE);
        match written {
            Ok(Written::New) => tracing::info!(source = self.kind.name(), generation, "remotes file written"),
            Ok(Written::Unchanged) => {}
            Err(why) => {
                self.due = Some(now + RETRY);
                return Err(why);
            }
        }
        Ok(None)
    }

    fn report(&mut self, read: bool, failure: Option<String>, mut findings: Vec<Finding>) {
        let part = format!("source/{}", self.kind.name());
        match failure {
            Some(why) => {
                self.metrics.errors.inc();
                findings.insert(0, Finding::new(Id::Source, format!("source {}: {why}", self.kind.name())));
                self.board.ill(&part, why.as_str());
                // What it said before is in force: the node is as ready as it was. And where it could be read, but its file is
                // somebody else's, waiting does not help.
                let known = self.store.as_ref().is_some_and(|store| store.generation() > 0);
                if known || read {
                    self.heard();
                }
            }
            // Before that it is neither well nor ill.
            None if !read => {}
            None => {
                self.board.well(&part);
                self.heard();
            }
        }
        let more = findings.len().saturating_sub(FINDINGS);
        if more > 0 {
            findings.truncate(FINDINGS);
            let text = format!("source {}: {more} more", self.kind.name());
            findings.push(Finding::new(Id::SourceObject, text));
        }
        self.board.findings(&part, findings);
    }

    fn heard(&self) {
        self.silent.send_if_modified(|silent| silent.remove(&self.kind));
    }
}

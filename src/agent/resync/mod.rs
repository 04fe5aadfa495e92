//! Part: running pods follow. Every recorded attachment is planned anew with the plugin's own function when remotes files or
//! `node.json` change, when something of it is lost, and now and then; what differs is applied in its sandbox. Records
//! whose sandbox is gone are collected.

mod attachment;
mod keeper;
mod pass;
mod propagation;
mod watch;

use std::{collections::BTreeSet, time::Duration};

use crosslink_kernel::{files, notify::Changed};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
use tokio::{sync::mpsc, time::Instant};

use crate::{context::Context, inputs};

use self::{
    keeper::Keeper,
    pass::{Key, Which},
};

/// Name on the board.
const PART: &str = "resync";

/// How long events are gathered: an ADD makes a dozen. Changes of remotes files are not delayed by it.
const GATHER: Duration = Duration::from_millis(50);

/// Events that wait; the threads that send them wait when it is full.
const EVENTS: usize = 4096;

/// Why a pass is due.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    /// A record was written.
    Record(Key),
    /// Something changed in a namespace.
    Kernel(Changed),
    /// A sandbox was unmounted, or directories changed: look at all of them.
    All,
}

/// What is counted.
#[derive(Clone, Debug, Default)]
struct Metrics {
    passes: Counter,
    changes: Counter,
    failures: Counter,
    collected: Counter,
    attachments: Gauge,
    routes: Gauge,
    seconds: Option<Histogram>,
}

impl Metrics {
    fn new(context: &Context) -> Self {
        // From the pass of one pod to that of hundreds.
        let buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let seconds = Histogram::new(buckets);
        let metrics = Self { seconds: Some(seconds.clone()), ..Self::default() };
        context.register(|registry| {
            registry.register("resync_passes", "Passes over attachments", metrics.passes.clone());
            registry.register("resync_changes", "Changes applied in sandboxes and for them", metrics.changes.clone());
            registry.register(
                "resync_failures",
                "Attachments that could not be brought in step",
                metrics.failures.clone(),
            );
            registry.register("resync_collected", "Records of gone sandboxes removed", metrics.collected.clone());
            registry.register("attachments", "Recorded attachments", metrics.attachments.clone());
            registry.register("pod_routes", "Routes in sandboxes", metrics.routes.clone());
            registry.register(
                "resync_seconds",
                "Time from a change of remotes until the kernels of all pods had its routes",
                seconds,
            );
        });
        metrics
    }
}

/// Runs the part.
///
/// # Errors
/// The directory of records cannot be made.
pub async fn run(context: Context) -> anyhow::Result<()> {
    files::make_private_dir(&context.settings.state_dir())?;
    if !context.settings.resync {
        context.board.well(PART);
        context.board.facts(PART, serde_json::json!({ "off": true }));
        context.stop.cancelled().await;
        return Ok(());
    }
    context.board.expect(PART);
    let (sender, mut events) = mpsc::channel(EVENTS);
    watch::start(&context, &sender);
    let mut inputs = inputs::watch(&context);
    let mut keeper = Keeper::new(&context, inputs.clone(), Metrics::new(&context));
    let period = Duration::from_secs(context.settings.resync_interval_seconds);
    let mut which = Which::All;
    let mut full = Instant::now() + period;
    let mut gathered = Gathered::default();
    while !context.stop.is_cancelled() {
        if which == Which::All {
            full = Instant::now() + period;
            gathered = Gathered::default();
        }
        let retry;
        (keeper, retry) = tokio::task::spawn_blocking(move || {
            let retry = keeper.pass(&which);
            (keeper, retry)
        })
        .await?;
        inputs.mark_unchanged();
        if keeper.is_behind() {
            which = Which::All;
            continue;
        }
        let retry = retry.map(Instant::from_std);
        which = tokio::select! {
            biased;
            () = context.stop.cancelled() => break,
            changed = inputs.changed() => match changed {
                Ok(()) => Which::All,
                Err(_) => break,
            },
            // Before what comes again and again, so that a busy node does not put it off for ever.
            () = tokio::time::sleep_until(full) => Which::All,
            () = tokio::time::sleep_until(retry.unwrap_or(full)), if retry.is_some() => gathered.take(keeper.due()),
            () = gathered.more(&mut events, &keeper) => gathered.take(BTreeSet::new()),
        };
    }
    Ok(())
}

/// What events have asked for so far. It outlives the wait, so that nothing is lost where something else comes first.
#[derive(Debug, Default)]
struct Gathered {
    keys: BTreeSet<Key>,
    all: bool,
    until: Option<Instant>,
}

impl Gathered {
    /// Takes what was gathered, together with more.
    fn take(&mut self, more: BTreeSet<Key>) -> Which {
        let Self { keys, all, .. } = std::mem::take(self);
        if all { Which::All } else { Which::Some(keys.into_iter().chain(more).collect()) }
    }

    /// Waits for events that matter, and for those that come right after.
    async fn more(&mut self, events: &mut mpsc::Receiver<Event>, keeper: &Keeper) {
        loop {
            let event = match self.until {
                None => events.recv().await,
                Some(until) => match tokio::time::timeout_at(until, events.recv()).await {
                    Ok(event) => event,
                    Err(_) => return,
                },
            };
            // The threads that send live as long as the process.
            let Some(event) = event else { return std::future::pending().await };
            match event {
                Event::All | Event::Kernel(Changed::Lost | Changed::Rules) => self.all = true,
                Event::Kernel(changed) => match keeper.owners(&changed) {
                    found if found.is_empty() => continue,
                    found => self.keys.extend(found),
                },
                Event::Record(key) if keeper.is_news(&key) => drop(self.keys.insert(key)),
                Event::Record(_) => continue,
            }
            self.until = self.until.or_else(|| Some(Instant::now() + GATHER));
        }
    }
}

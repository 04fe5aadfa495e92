//! What every source does: take what its feeds tell, let it settle, say what follows.

use std::time::Duration;

use crosslink_core::node::NodeFacts;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::sink::{Sink, View};

/// How long is waited after the first of several changes, so that those that belong together count as one.
const SETTLE: Duration = Duration::from_millis(30);

/// Notices between a feed and its model.
pub const QUEUE: usize = 64;

/// What a source knows, and what follows from it. No I/O.
pub trait Model: Send {
    /// What its feeds tell.
    type Event: Send;

    /// Takes a notice.
    fn take(&mut self, event: Self::Event, now: Instant);

    /// Takes new facts about this node.
    fn local(&mut self, _node: &NodeFacts) {}

    /// What follows. May be asked at any time.
    fn view(&mut self, now: Instant) -> View;

    /// When the answer may change by itself.
    fn due(&self) -> Option<Instant> {
        None
    }
}

/// Runs a model until the agent ends or all its feeds have.
pub async fn drive<M: Model>(mut model: M, mut events: mpsc::Receiver<M::Event>, mut sink: Sink) {
    let stop = sink.stop.clone();
    let mut inputs = sink.inputs.clone();
    let mut node = inputs.borrow_and_update().node.clone();
    model.local(&node);
    let mut settled: Option<Instant> = None;
    loop {
        let wake = [settled, model.due(), sink.due()].into_iter().flatten().min();
        tokio::select! {
            () = stop.cancelled() => return,
            event = events.recv() => {
                let Some(event) = event else { return };
                let now = Instant::now();
                model.take(event, now);
                settled.get_or_insert_with(|| (now + SETTLE).max(sink.not_before()));
            }
            Ok(()) = inputs.changed() => {
                let inputs = inputs.borrow_and_update();
                if inputs.node != node {
                    node = inputs.node.clone();
                    model.local(&node);
                    settled.get_or_insert_with(|| Instant::now() + SETTLE);
                }
            }
            () = sleep_until(wake.unwrap_or_else(far)), if wake.is_some() => {
                settled = None;
                sink.offer(model.view(Instant::now())).await;
            }
        }
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

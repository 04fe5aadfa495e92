//! One pass: the chosen attachments, each in a thread of its own, a few at a time.
//!
//! A thread that entered a sandbox stays there and ends; the next one starts on the node. That costs some 30 µs and leaves
//! nothing to go wrong.

use std::{
    collections::BTreeSet,
    num::NonZeroUsize,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// An attachment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Container ID.
    pub container_id: String,
    /// Interface.
    pub ifname: String,
}

/// What a pass is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// Every recorded attachment.
    All,
    /// Some.
    Some(BTreeSet<Key>),
}

/// Does something for each item, in the order of the list, until `stop` says that something else is due. Returns what was
/// done, by place.
pub fn run<T: Sync, O: Send>(
    items: &[T],
    stop: &(dyn Fn() -> bool + Sync),
    work: &(dyn Fn(&T) -> Option<O> + Sync),
) -> Vec<(usize, Option<O>)> {
    // One more than cores: some wait for the kernel's network lock.
    let parallel = std::thread::available_parallelism().map_or(2, NonZeroUsize::get).saturating_add(1).min(16);
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..parallel.min(items.len()) {
            scope.spawn(|| {
                let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|_| !stop());
                while let Some((place, item)) = take().and_then(|place| Some((place, items.get(place)?))) {
                    // A panic is logged by its hook, and is this item's alone.
                    let outcome = std::thread::scope(|own| own.spawn(|| work(item)).join()).unwrap_or_default();
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((place, outcome));
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

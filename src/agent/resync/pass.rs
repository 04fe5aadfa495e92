//! One pass: the chosen attachments, each in a thread of its own, a few at a time.
//!
//! A thread that entered a sandbox stays there and ends; the next one starts on the node. That costs some 30 µs and leaves
//! nothing to go wrong. Records are written when all kernels have their routes: traffic comes first.

use std::{
    collections::BTreeSet,
    num::NonZeroUsize,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::attachment::{Env, Outcome, Synced, sync};

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

/// Brings attachments in step. `applied` is called when all kernels have everything, before the records are written.
pub fn run(keys: Vec<Key>, env: &Env<'_>, applied: impl FnOnce()) -> Vec<(Key, Outcome)> {
    let parallel = std::thread::available_parallelism().map_or(2, NonZeroUsize::get).saturating_add(1).min(16);
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Synced)>> = Mutex::new(Vec::with_capacity(keys.len()));
    std::thread::scope(|scope| {
        for _ in 0..parallel.min(keys.len()) {
            scope.spawn(|| {
                while let Some((place, key)) = take(&next, &keys) {
                    let synced = std::thread::scope(|own| own.spawn(|| sync(key, env)).join());
                    let synced = synced.unwrap_or_else(|_| Synced::failed("internal error: see the log".to_owned()));
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((place, synced));
                }
            });
        }
    });
    applied();
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(place, _)| *place);
    keys.into_iter().zip(done).map(|(key, (_, synced))| (key, synced.finish())).collect()
}

fn take<'k>(next: &AtomicUsize, keys: &'k [Key]) -> Option<(usize, &'k Key)> {
    let place = next.fetch_add(1, Ordering::Relaxed);
    keys.get(place).map(|key| (place, key))
}

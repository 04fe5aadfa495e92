//! What other writers undid.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::backoff::{Backoff, Loss};

/// Losses by file.
#[derive(Debug, Default)]
pub struct Losses {
    /// When something was noticed that this pass looks at; none where nothing was.
    pub noticed: Option<Instant>,
    good: BTreeSet<PathBuf>,
    lost: BTreeMap<PathBuf, Instant>,
    backoffs: BTreeMap<PathBuf, Backoff>,
}

impl Losses {
    /// A file is not as it should be. If it was, that is a loss.
    pub fn lost(&mut self, path: &Path, now: Instant) -> Option<Loss> {
        if !self.good.remove(path) {
            return None;
        }
        self.lost.insert(path.to_owned(), self.noticed.unwrap_or(now));
        Some(self.backoffs.entry(path.to_owned()).or_default().lost(now))
    }

    /// How long the repair of a file has to wait.
    pub fn wait(&self, path: &Path, now: Instant) -> Duration {
        self.backoffs.get(path).map_or(Duration::ZERO, |backoff| backoff.wait(now))
    }

    /// A file is as it should be. Says how long it was not, from when that was noticed.
    pub fn in_order(&mut self, path: &Path, now: Instant) -> Option<Duration> {
        if let Some(backoff) = self.backoffs.get_mut(path) {
            backoff.calm(now);
        }
        self.good.insert(path.to_owned());
        self.lost.remove(path).map(|since| since.elapsed())
    }

    /// A file is not ours any more.
    pub fn forget(&mut self, path: &Path) {
        self.good.remove(path);
        self.lost.remove(path);
    }

    /// Files that somebody keeps changing.
    pub fn conflicts(&self) -> impl Iterator<Item = (&Path, &Backoff)> {
        let conflicts = self.backoffs.iter().filter(|(_, backoff)| backoff.conflict());
        conflicts.map(|(path, backoff)| (path.as_path(), backoff))
    }
}

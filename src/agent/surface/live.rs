//! Liveness: whether the agent still turns. What it is about, the node, is readiness.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::time::sleep;

/// Every so often the event loop shows that it runs timers.
const BEAT: Duration = Duration::from_secs(1);

/// Every so often a thread of the runtime shows that it takes work that blocks.
const ERRAND: Duration = Duration::from_secs(5);

/// After this long without a beat the event loop is stuck.
const BEAT_LIMIT: Duration = Duration::from_secs(15);

/// After this long without a finished errand all threads that may block are stuck.
const ERRAND_LIMIT: Duration = Duration::from_secs(60);

/// Last signs of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signs {
    /// Of the event loop.
    pub beat: Instant,
    /// Of the threads that may block.
    pub errand: Instant,
}

impl Signs {
    /// Whether the agent lives; why not, otherwise.
    ///
    /// # Errors
    /// What is stuck, in words.
    pub fn verdict(&self, now: Instant) -> Result<(), String> {
        for (what, last, limit) in
            [("the event loop", self.beat, BEAT_LIMIT), ("threads for work that blocks", self.errand, ERRAND_LIMIT)]
        {
            let age = now.saturating_duration_since(last);
            if age > limit {
                return Err(format!("{what}: no sign of life for {} s", age.as_secs()));
            }
        }
        Ok(())
    }
}

/// The heart. Clones share it.
#[derive(Clone, Debug)]
pub struct Heart(Arc<Mutex<Signs>>);

impl Heart {
    /// One that beats for the first time now.
    pub fn new() -> Self {
        let now = Instant::now();
        Self(Arc::new(Mutex::new(Signs { beat: now, errand: now })))
    }

    /// The last signs.
    pub fn signs(&self) -> Signs {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, note: impl FnOnce(&mut Signs)) {
        note(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Beats for ever.
    pub async fn beat(self) {
        loop {
            self.note(|signs| signs.beat = Instant::now());
            sleep(BEAT).await;
        }
    }

    /// Sends errands for ever.
    pub async fn errands(self) {
        loop {
            // A thread that panics is no thread that is stuck.
            let _ = tokio::task::spawn_blocking(|| {}).await;
            self.note(|signs| signs.errand = Instant::now());
            sleep(ERRAND).await;
        }
    }
}

impl Default for Heart {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stuck_parts_are_named() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let signs = Signs { beat: start, errand: start };
        assert_eq!(signs.verdict(at(15)), Ok(()));
        let why = signs.verdict(at(16)).unwrap_err();
        assert_eq!(why, "the event loop: no sign of life for 16 s");
        let signs = Signs { beat: at(60), errand: start };
        assert_eq!(signs.verdict(at(60)), Ok(()));
        assert!(signs.verdict(at(61)).unwrap_err().starts_with("threads for work that blocks"));
    }
}

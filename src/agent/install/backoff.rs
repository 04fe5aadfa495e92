//! How long to wait before what another writer undid is done again.

use std::time::{Duration, Instant};

/// The first wait. The first loss is made good at once: a main CNI that starts writes once or twice.
const FIRST: Duration = Duration::from_millis(200);

/// The longest wait.
const LONGEST: Duration = Duration::from_secs(30);

/// A time without losses after which everything is forgotten.
const QUIET: Duration = Duration::from_secs(300);

/// Losses within [`QUIET`] of each other from which on it is a conflict.
const CONFLICT: u32 = 4;

/// Losses of one file, or of the plugin.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    delay: Duration,
    last: Option<Instant>,
    due: Option<Instant>,
    losses: u32,
}

/// What a loss means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Somebody wrote once.
    Single,
    /// It has become a conflict just now, or the longest wait is reached: worth an event.
    Conflict,
    /// The conflict goes on.
    Again,
}

impl Backoff {
    /// What we had made is gone.
    pub fn lost(&mut self, now: Instant) -> Loss {
        self.calm(now);
        let before = self.delay;
        self.losses = self.losses.saturating_add(1);
        self.last = Some(now);
        self.due = Some(now + before);
        self.delay = (before * 2).clamp(FIRST, LONGEST);
        match self.losses {
            ..CONFLICT => Loss::Single,
            CONFLICT => Loss::Conflict,
            _ if self.delay == LONGEST && before < LONGEST => Loss::Conflict,
            _ => Loss::Again,
        }
    }

    /// Forgets after a quiet time.
    pub fn calm(&mut self, now: Instant) {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) >= QUIET) {
            *self = Self::default();
        }
    }

    /// How long to wait still.
    pub fn wait(&self, now: Instant) -> Duration {
        self.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(now))
    }

    /// Whether there is a conflict.
    pub const fn conflict(&self) -> bool {
        self.losses >= CONFLICT
    }

    /// The wait that the next loss would bring.
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// Losses so far.
    pub const fn losses(&self) -> u32 {
        self.losses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_thirty_seconds_and_are_forgotten() {
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        let mut events = 0;
        for _ in 0..12 {
            events += u32::from(backoff.lost(now) == Loss::Conflict);
            waits.push(backoff.wait(now).as_millis());
            now += backoff.wait(now) + Duration::from_millis(1);
            assert_eq!(backoff.wait(now), Duration::ZERO);
        }
        assert_eq!(waits, [0, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000, 30000]);
        assert_eq!(events, 2);
        backoff.calm(now + QUIET / 2);
        assert!(backoff.conflict());
        now += QUIET;
        backoff.calm(now);
        assert!(!backoff.conflict());
        assert_eq!((backoff.lost(now), backoff.wait(now)), (Loss::Single, Duration::ZERO));
    }
}

//! Waiting between attempts.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    time::Duration,
};

/// Waits that double, each up to a quarter longer or shorter, so that the nodes of a cluster do not ask in step.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Begins with `first` and ends at `longest`.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// Begins again.
    pub const fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next wait.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(self.longest);
        around(wait)
    }
}

/// A duration up to a quarter longer or shorter than the one given.
pub fn around(duration: Duration) -> Duration {
    duration.mul_f64(0.75 + random() / 2.0)
}

/// A duration between nothing and the one given.
pub fn up_to(duration: Duration) -> Duration {
    duration.mul_f64(random())
}

/// From 0 to 1. The standard library seeds every `RandomState` anew; no more is needed here.
fn random() -> f64 {
    let bits = u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or_default();
    f64::from(bits) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        for about in [1, 2, 4, 5, 5] {
            let wait = backoff.wait().as_secs_f64();
            assert!((f64::from(about) * 0.75..=f64::from(about) * 1.25).contains(&wait), "{wait} for {about}");
        }
        backoff.reset();
        assert!(backoff.wait() < Duration::from_millis(1300));
    }
}

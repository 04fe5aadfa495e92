//! How soon the table is looked at again, so that changes in a row are one, and two that repair each other's work do
//! not keep a core busy.

use std::time::Duration;

use tokio::time::Instant;

/// For how long changes are gathered: a ruleset is reloaded in several transactions by some.
pub const GATHER: Duration = Duration::from_millis(10);

/// Shortest time between two looks.
const APART: Duration = Duration::from_millis(100);

/// Longest time, after many repairs in a row.
const FIGHT: Duration = Duration::from_secs(5);

/// How long without a repair until all is forgotten.
const PEACE: Duration = Duration::from_secs(30);

/// Repairs in a row that are nothing unusual.
const FREE: u32 = 3;

/// Counts repairs.
#[derive(Debug, Default)]
pub struct Pace {
    repairs: u32,
    last: Option<Instant>,
}

impl Pace {
    /// When the next look may come, after one that repaired something or did not.
    pub fn after(&mut self, repaired: bool, now: Instant) -> Instant {
        if self.last.is_some_and(|last| now.duration_since(last) > PEACE) {
            self.repairs = 0;
        }
        if repaired {
            self.repairs = self.repairs.saturating_add(1);
            self.last = Some(now);
        }
        now + APART.saturating_mul(1 << self.repairs.saturating_sub(FREE).min(10)).min(FIGHT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_slows_down_and_peace_is_forgiving() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let waits: Vec<u128> = (0..12).map(|_| (pace.after(true, start) - start).as_millis()).collect();
        assert_eq!(waits, [100, 100, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000]);
        assert_eq!((pace.after(false, start) - start).as_millis(), 5000);
        let later = start + PEACE + Duration::from_secs(1);
        assert_eq!((pace.after(false, later) - later).as_millis(), 100);
    }
}

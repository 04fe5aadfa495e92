//! The grace period of a list that suddenly became empty.

use std::time::Duration;

use tokio::time::Instant;

/// What to do with a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is to be published.
    Publish,
    /// What was published stays until then.
    Until(Instant),
}

/// Keeps what was published while a list is suddenly empty.
#[derive(Clone, Debug)]
pub struct Hold {
    period: Duration,
    since: Option<Instant>,
}

impl Hold {
    /// Holds for `period`.
    pub const fn new(period: Duration) -> Self {
        Self { period, since: None }
    }

    /// Judges a change from a published list to a wanted one, of each of which only counts whether it is empty.
    /// `explicit`: somebody removed the last one on purpose.
    pub fn judge(&mut self, published_empty: bool, wanted_empty: bool, explicit: bool, now: Instant) -> Verdict {
        if published_empty || !wanted_empty || explicit {
            self.since = None;
            return Verdict::Publish;
        }
        let until = *self.since.get_or_insert(now) + self.period;
        if now >= until {
            self.since = None;
            return Verdict::Publish;
        }
        Verdict::Until(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(60);

    #[test]
    fn only_a_sudden_nothing_is_held() {
        let now = Instant::now();
        let mut hold = Hold::new(PERIOD);
        for (published_empty, wanted_empty, explicit) in
            [(true, true, false), (true, false, false), (false, false, false), (false, true, true)]
        {
            assert_eq!(hold.judge(published_empty, wanted_empty, explicit, now), Verdict::Publish);
        }
        assert_eq!(hold.judge(false, true, false, now), Verdict::Until(now + PERIOD));
        let later = now + PERIOD / 2;
        assert_eq!(hold.judge(false, true, false, later), Verdict::Until(now + PERIOD), "the first moment counts");
        assert_eq!(hold.judge(false, true, false, now + PERIOD), Verdict::Publish);
    }

    #[test]
    fn what_comes_back_ends_it() {
        let now = Instant::now();
        let mut hold = Hold::new(PERIOD);
        hold.judge(false, true, false, now);
        assert_eq!(hold.judge(false, false, false, now + PERIOD / 2), Verdict::Publish);
        let again = now + PERIOD;
        assert_eq!(hold.judge(false, true, false, again), Verdict::Until(again + PERIOD));
    }
}

//! Readiness. Sticky: once every required part has been well, short trouble does not take the node out again. A probe
//! that follows every hiccup is noise, and a node that flaps is worse than one that repairs itself. Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::board::Health;

/// How long a required part may be ill before the node is no longer ready.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What is remembered of one required part.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    been_well: bool,
    ill_since: Option<Instant>,
    text: String,
}

/// The memory.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    parts: BTreeMap<String, Part>,
    /// Whether all parts were well at least once.
    reached: bool,
}

/// The answer to a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the node is ready.
    pub ready: bool,
    /// One line for each required part.
    pub text: String,
}

impl Readiness {
    /// Takes note of the parts' health.
    pub fn update(&mut self, now: Instant, parts: &BTreeMap<String, Health>) {
        for (name, health) in parts.iter().filter(|(_, health)| health.required) {
            let part = self.parts.entry(name.clone()).or_insert_with(|| Part {
                been_well: false,
                ill_since: None,
                text: String::new(),
            });
            part.been_well |= health.ok;
            part.ill_since = if health.ok { None } else { part.ill_since.or(Some(now)) };
            part.text.clone_from(&health.text);
        }
        self.reached |= self.parts.values().all(|part| part.been_well);
    }

    /// Answers a probe.
    pub fn verdict(&self, now: Instant) -> Verdict {
        let ill_for = |part: &Part| part.ill_since.map(|since| now.saturating_duration_since(since));
        let failed = |part: &Part| if self.reached { ill_for(part) > Some(PATIENCE) } else { !part.been_well };
        let ready = self.reached && !self.parts.values().any(failed);
        let mut text = String::new();
        for (name, part) in &self.parts {
            let sign = if failed(part) { '-' } else { '+' };
            let words = match ill_for(part) {
                None => "ok".to_owned(),
                Some(time) => format!("ill for {} s: {}", time.as_secs(), part.text),
            };
            text.push_str(&format!("[{sign}]{name} {words}\n"));
        }
        text.push_str(if ready { "ready\n" } else { "not ready\n" });
        Verdict { ready, text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(list: &[(&str, bool, bool)]) -> BTreeMap<String, Health> {
        let health = |ok, required| Health { ok, required, text: if ok { String::new() } else { "broken".to_owned() } };
        list.iter().map(|(name, ok, required)| ((*name).to_owned(), health(*ok, *required))).collect()
    }

    #[test]
    fn ready_when_every_required_part_was_well_once_though_never_together() {
        let (mut readiness, start) = (Readiness::default(), Instant::now());
        readiness.update(start, &parts(&[("a", false, true), ("b", true, true), ("c", false, false)]));
        let verdict = readiness.verdict(start);
        assert!(!verdict.ready);
        assert_eq!(verdict.text, "[-]a ill for 0 s: broken\n[+]b ok\nnot ready\n");
        readiness.update(start, &parts(&[("a", true, true), ("b", false, true), ("c", false, false)]));
        assert!(readiness.verdict(start).ready, "{readiness:?}");
    }

    #[test]
    fn not_ready_after_more_than_thirty_seconds_of_illness_and_ready_again_at_once() {
        let (mut readiness, start) = (Readiness::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        readiness.update(start, &parts(&[("a", true, true)]));
        // Illness counts from its first second, whatever is said in between.
        readiness.update(at(10), &parts(&[("a", false, true)]));
        readiness.update(at(35), &parts(&[("a", false, true)]));
        assert!(readiness.verdict(at(40)).ready);
        let verdict = readiness.verdict(at(41));
        assert!(!verdict.ready && verdict.text.contains("[-]a ill for 31 s: broken"), "{verdict:?}");
        readiness.update(at(50), &parts(&[("a", true, true)]));
        assert!(readiness.verdict(at(50)).ready);
        // And the clock starts anew.
        readiness.update(at(60), &parts(&[("a", false, true)]));
        assert!(readiness.verdict(at(80)).ready);
    }

    #[test]
    fn a_part_that_comes_late_has_thirty_seconds() {
        let (mut readiness, start) = (Readiness::default(), Instant::now());
        readiness.update(start, &parts(&[("a", true, true)]));
        readiness.update(start, &parts(&[("a", true, true), ("b", false, true)]));
        assert!(readiness.verdict(start + Duration::from_secs(30)).ready);
        assert!(!readiness.verdict(start + Duration::from_secs(31)).ready);
    }

    #[test]
    fn parts_that_are_not_required_do_not_matter() {
        let (mut readiness, start) = (Readiness::default(), Instant::now());
        readiness.update(start, &parts(&[("a", true, true), ("b", false, false)]));
        assert!(readiness.verdict(start + Duration::from_secs(600)).ready);
    }
}

//! What is remembered between passes, and what a pass means for the board.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use crosslink_core::{
    delta::Delta,
    finding::{Finding, Id},
    numbers::VethNames,
    record::parse_file_name,
};
use crosslink_kernel::{notify::Changed, records::Records};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{board::Board, context::Context, inputs::Inputs};

use super::{
    Metrics, PART,
    attachment::{Env, InStep, Outcome, Quick, add_quickly, stamp, sync, tally},
    pass::{self, Key, Which},
    propagation::Propagation,
};

/// When the records are listed again after they could not be.
const UNREADABLE: Duration = Duration::from_secs(2);

/// First and longest wait before an attachment that the plugin works on is tried again.
const BUSY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The same where something is wrong.
const WRONG: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// Another try.
#[derive(Clone, Copy, Debug)]
struct Retry {
    due: Instant,
    tries: u32,
}

impl Retry {
    /// The next try after an outcome; none where none is needed.
    fn after(outcome: &Outcome, before: Option<&Self>) -> Option<Self> {
        let (first, longest) = match outcome {
            Outcome::Busy => BUSY,
            Outcome::Failed(_) | Outcome::Hidden(_) | Outcome::LeftAlone(_) => WRONG,
            Outcome::InStep(step) if step.unwritten.is_some() => WRONG,
            Outcome::InStep(_) | Outcome::NotOurs | Outcome::Collected | Outcome::Newer(_) => return None,
        };
        let tries = before.map_or(0, |before| before.tries.saturating_add(1));
        let wait = (first * 2_u32.saturating_pow(tries.min(12))).min(longest);
        Some(Self { due: Instant::now() + wait, tries })
    }
}

/// The part's memory.
#[derive(Debug)]
pub struct Keeper {
    board: Board,
    records: Records,
    remotes_dir: PathBuf,
    node_file: PathBuf,
    netns_dir: PathBuf,
    inputs: watch::Receiver<Arc<Inputs>>,
    metrics: Metrics,
    known: BTreeMap<Key, Outcome>,
    /// What all attachments know, but for [`Keeper::owed`].
    before: Arc<Inputs>,
    /// Generation of the inputs that all attachments are in step with.
    generation: u64,
    /// Attachments that a pass did not come to.
    owed: BTreeSet<Key>,
    retries: BTreeMap<Key, Retry>,
    stop: CancellationToken,
}

impl Keeper {
    /// Knows nothing yet.
    pub fn new(context: &Context, inputs: watch::Receiver<Arc<Inputs>>, metrics: Metrics) -> Self {
        Self {
            board: context.board.clone(),
            records: Records::new(&context.settings.state_dir()),
            remotes_dir: context.settings.remotes_dir(),
            node_file: context.settings.node_file(),
            netns_dir: context.settings.netns_dir.clone(),
            inputs,
            metrics,
            known: BTreeMap::new(),
            before: Arc::default(),
            generation: 0,
            owed: BTreeSet::new(),
            retries: BTreeMap::new(),
            stop: context.stop.clone(),
        }
    }

    /// Whether remotes changed while a pass was under way.
    pub fn is_behind(&self) -> bool {
        self.inputs.has_changed().unwrap_or(false)
    }

    /// The attachments that a change is about. One that is not known yet has a record coming.
    pub fn owners(&self, changed: &Changed) -> Vec<Key> {
        let step =
            |outcome: &Outcome, test: &dyn Fn(&InStep) -> bool| matches!(outcome, Outcome::InStep(step) if test(step));
        let about = |key: &Key, outcome: &Outcome| match changed {
            Changed::Sandbox(number) => step(outcome, &|step| step.number == Some(*number)),
            Changed::Link(name) => {
                step(outcome, &|_| true) && VethNames::of(&key.container_id, &key.ifname).node == *name
            }
            Changed::Host(addr) => step(outcome, &|step| step.addresses.contains(addr)),
            Changed::Rules | Changed::Lost => true,
        };
        self.known.iter().filter(|(key, outcome)| about(key, outcome)).map(|(key, _)| key.clone()).collect()
    }

    /// Whether a record is another than the one that we know.
    pub fn is_news(&self, key: &Key) -> bool {
        let now = stamp(&self.records.path(&key.container_id, &key.ifname));
        match self.known.get(key) {
            Some(Outcome::InStep(step)) => now.is_some() && step.stamp != now,
            _ => now.is_some(),
        }
    }

    /// Adds what is new in the remotes to all attachments at once; the thorough pass comes after it.
    fn hurry(&mut self, inputs: &Arc<Inputs>, started: Instant) {
        let before = std::mem::replace(&mut self.before, Arc::clone(inputs));
        if before.generation == inputs.generation {
            return;
        }
        let Some(delta) = Delta::between(&before.merged, &inputs.merged) else { return };
        drop(before);
        let quick: Vec<Arc<Quick>> = self.steps().filter_map(|step| step.quick.clone()).collect();
        let added = pass::run(&quick, &|| false, &|quick| Some(add_quickly(quick, &inputs.merged, &delta)));
        let added: usize = added.into_iter().filter_map(|(_, added)| added).sum();
        if added > 0 {
            self.metrics.seconds.iter().for_each(|histogram| histogram.observe(started.elapsed().as_secs_f64()));
            self.metrics.changes.inc_by(u64::try_from(added).unwrap_or_default());
            let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            tracing::info!(routes = added, pods = quick.len(), micros, "new remote CIDRs are in running pods");
        }
    }

    /// Brings attachments in step. Returns when some of them are worth another try.
    pub fn pass(&mut self, which: &Which) -> Option<Instant> {
        let started = Instant::now();
        let inputs = self.inputs.borrow_and_update().clone();
        self.hurry(&inputs, started);
        let propagation = Propagation::read();
        let Some(all) = self.keys() else {
            // What was known stays; attachments are looked at again soon.
            return Some(Instant::now() + UNREADABLE);
        };
        self.known.retain(|key, _| all.contains(key));
        self.owed.retain(|key| all.contains(key));
        self.retries.retain(|key, _| all.contains(key));
        let chosen = match which {
            // A change of remotes that came in between is everybody's.
            Which::Some(some) if inputs.generation == self.generation => some,
            Which::Some(_) | Which::All => &all,
        };
        // Those that were left when the last pass made way for a new change come first.
        let rest = chosen.iter().filter(|key| all.contains(key) && !self.owed.contains(key));
        let keys: Vec<Key> = self.owed.iter().chain(rest).cloned().collect();
        let env = Env {
            records: &self.records,
            inputs: &inputs,
            remotes_dir: &self.remotes_dir,
            node_file: &self.node_file,
            propagation: &propagation,
        };
        let give_way = || self.stop.is_cancelled() || self.is_behind();
        let outcomes = pass::run(&keys, &give_way, &|key| Some(sync(key, &env)));
        self.metrics.passes.inc();
        self.owed = keys.iter().cloned().collect();
        for (place, outcome) in outcomes {
            let Some(key) = keys.get(place) else { continue };
            self.owed.remove(key);
            self.take(
                key.clone(),
                outcome.unwrap_or_else(|| Outcome::Failed("internal error; see the log".to_owned())),
            );
        }
        // A change brings a pass over all.
        if self.owed.is_empty() {
            self.generation = inputs.generation;
        }
        self.report(started, &propagation);
        self.retries.values().map(|retry| retry.due).min()
    }

    /// Attachments that are worth another try now.
    pub fn due(&self) -> BTreeSet<Key> {
        let now = Instant::now();
        self.retries.iter().filter(|(_, retry)| retry.due <= now).map(|(key, _)| key.clone()).collect()
    }

    fn keys(&self) -> Option<BTreeSet<Key>> {
        let key = |name: &String| {
            let (container_id, ifname) = parse_file_name(name)?;
            Some(Key { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
        };
        match self.records.names() {
            Ok(names) => Some(names.iter().filter_map(key).collect()),
            Err(err) => {
                self.board.ill(PART, err.to_string());
                None
            }
        }
    }

    fn take(&mut self, key: Key, outcome: Outcome) {
        let Key { container_id, ifname } = &key;
        match &outcome {
            Outcome::InStep(step) if step.changes > 0 => {
                self.metrics.changes.inc_by(u64::try_from(step.changes).unwrap_or_default());
                tracing::info!(container_id, ifname, changes = step.changes, routes = step.routes, "brought in step");
            }
            Outcome::Collected => {
                self.metrics.collected.inc();
                tracing::info!(container_id, ifname, "the sandbox is gone; its record was removed");
            }
            Outcome::Failed(why) => {
                self.metrics.failures.inc();
                if self.known.get(&key) != Some(&outcome) {
                    tracing::warn!(container_id, ifname, "{why}");
                }
            }
            Outcome::InStep(_)
            | Outcome::NotOurs
            | Outcome::Busy
            | Outcome::Hidden(_)
            | Outcome::LeftAlone(_)
            | Outcome::Newer(_) => {}
        }
        match Retry::after(&outcome, self.retries.get(&key)) {
            Some(retry) => drop(self.retries.insert(key.clone(), retry)),
            None => drop(self.retries.remove(&key)),
        }
        match outcome {
            Outcome::Collected => drop(self.known.remove(&key)),
            outcome => drop(self.known.insert(key, outcome)),
        }
    }

    fn steps(&self) -> impl Iterator<Item = &InStep> {
        self.known.values().filter_map(|outcome| match outcome {
            Outcome::InStep(step) => Some(step),
            _ => None,
        })
    }

    fn report(&self, started: Instant, propagation: &Propagation) {
        let routes: usize = self.steps().map(|step| step.routes).sum();
        self.metrics.attachments.set(i64::try_from(self.known.len()).unwrap_or(i64::MAX));
        self.metrics.routes.set(i64::try_from(routes).unwrap_or(i64::MAX));
        let of_pods = tally(self.steps().flat_map(|step| &step.findings));
        let of_ours = tally(self.known.iter().filter_map(finding).collect::<Vec<_>>().iter());
        self.board.findings("pods", of_pods);
        self.board.findings(PART, of_ours);
        let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.board.facts(
            PART,
            serde_json::json!({
                "generation": self.generation,
                "attachments": self.known.len(),
                "routes": routes,
                "lastPassMilliseconds": millis,
            }),
        );
        let hidden = self.known.values().find_map(|outcome| match outcome {
            Outcome::Hidden(text) => Some(text.clone()),
            _ => None,
        });
        let hidden = propagation.blocks(&self.netns_dir).or(hidden);
        match hidden {
            Some(text) => self.board.ill(PART, text),
            None => self.board.well(PART),
        }
    }
}

fn finding((key, outcome): (&Key, &Outcome)) -> Option<Finding> {
    let named = |id, text: &str| Some(Finding::new(id, format!("{} {}: {text}", key.container_id, key.ifname)));
    match outcome {
        Outcome::Failed(why) => named(Id::Resync, why),
        Outcome::Hidden(why) | Outcome::LeftAlone(why) => named(Id::NetnsHidden, why),
        Outcome::Newer(version) => named(Id::RecordNewer, &format!("version {version}")),
        Outcome::InStep(InStep { unwritten: Some(why), .. }) => named(Id::State, why),
        Outcome::InStep(_) | Outcome::NotOurs | Outcome::Collected | Outcome::Busy => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(outcome: &Outcome, tries: Option<u32>) -> Option<Duration> {
        let before = tries.map(|tries| Retry { due: Instant::now(), tries });
        let now = Instant::now();
        Retry::after(outcome, before.as_ref()).map(|retry| retry.due.saturating_duration_since(now))
    }

    #[test]
    fn what_goes_on_being_wrong_is_tried_less_and_less() {
        let failed = Outcome::Failed("no interface".to_owned());
        let waits: Vec<u64> =
            [None, Some(0), Some(1), Some(5), Some(40)].map(|tries| wait(&failed, tries).unwrap().as_secs()).to_vec();
        assert_eq!(waits, [2, 4, 8, 128, 300]);
        assert!(wait(&Outcome::Busy, None).unwrap() < Duration::from_millis(200), "an ADD is soon done");
        assert_eq!(wait(&Outcome::Busy, Some(30)).unwrap().as_secs(), BUSY.1.as_secs());
    }

    #[test]
    fn what_is_in_step_or_not_ours_to_mend_is_not_tried_again() {
        for outcome in [Outcome::InStep(InStep::default()), Outcome::NotOurs, Outcome::Collected, Outcome::Newer(2)] {
            assert_eq!(wait(&outcome, Some(3)), None, "{outcome:?}");
        }
        let unwritten = InStep { unwritten: Some("no space".to_owned()), ..InStep::default() };
        assert!(wait(&Outcome::InStep(unwritten), None).is_some());
    }
}

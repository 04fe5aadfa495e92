//! One pass: lock, plugin, configuration. Everything is read anew, and nothing is written that is in order.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crosslink_core::{
    conflist::{Choice, choose},
    finding::Id,
};

use super::{
    Plan,
    backoff::Loss,
    binary::{Binary, Kept},
    chain::{Chain, SOON},
    claim::{Claim, Identity, Placement, Standing},
    conflict,
    listing::{Listing, sweep},
    lock,
    losses::Losses,
    mode::Way,
    report::{Config, Place, Report, Trouble},
    watch::Watched,
};
use crate::settings::CniMode;

/// How long a configuration may be missing or half written before that is said.
const SETTLE: Duration = Duration::from_secs(2);

/// How long the main CNI's file may be missing before the next one is taken for the main CNI's.
const VANISHED: Duration = Duration::from_millis(500);

/// How long another agent may hold the lock.
const LOCK: Duration = Duration::from_secs(10);

/// First and longest wait after something could not be done.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// What is kept from pass to pass.
#[derive(Debug)]
pub struct Installer {
    /// What is wanted. The runtime may be learnt later.
    pub plan: Plan,
    binary: Binary,
    identity: Option<Identity>,
    started: bool,
    losses: Losses,
    unsettled: Option<Instant>,
    active: Option<String>,
    failures: u32,
    dropin_dir: Option<PathBuf>,
}

impl Installer {
    /// An installer that has not looked yet.
    pub fn new(plan: Plan) -> Self {
        let binary = Binary::new(&plan.plugin, &plan.dirs.bin);
        Self {
            plan,
            binary,
            identity: None,
            started: false,
            losses: Losses::default(),
            unsettled: None,
            active: None,
            failures: 0,
            dropin_dir: None,
        }
    }

    /// Directories whose changes call for a pass.
    pub fn watched(&self) -> Vec<Watched> {
        let whole = |dir: &Path| Watched { dir: dir.to_owned(), only: None };
        let mut watched = vec![whole(&self.plan.dirs.conf)];
        watched.extend(self.dropin_dir.as_deref().map(whole));
        let only = self.binary.target().file_name().map(std::ffi::OsStr::to_owned);
        watched.push(Watched { dir: self.plan.dirs.bin.clone(), only });
        watched
    }

    /// Looks at everything and mends what is not as it should be. `noticed` is when something called for that.
    pub fn pass(&mut self, now: Instant, noticed: Option<Instant>) -> Report {
        self.losses.noticed = noticed;
        let mut report = Report::default();
        if let Err(trouble) = self.locked(now, &mut report) {
            self.trouble(trouble, &mut report);
        } else {
            self.failures = 0;
        }
        for (path, backoff) in self.losses.conflicts() {
            report.backoff = report.backoff.max(backoff.delay());
            let wait = backoff.delay().as_secs_f32();
            let text = conflict::describe(path, &self.plan.dirs.conf);
            report.find(Id::CniConflict, format!("{text} ({} times; repairs wait up to {wait} s)", backoff.losses()));
        }
        report
    }

    fn trouble(&mut self, trouble: Trouble, report: &mut Report) {
        match trouble {
            Trouble::Wait(wait) => report.again(wait),
            Trouble::Fault(id, text) => {
                report.again((RETRY.0 * 2_u32.saturating_pow(self.failures.min(16))).min(RETRY.1));
                self.failures = self.failures.saturating_add(1);
                if id == Id::CniBinary {
                    report.binary_fault = Some(text.clone());
                } else {
                    report.config = Config::Wrong(text.clone());
                }
                report.find(id, text);
            }
        }
    }

    fn locked(&mut self, now: Instant, report: &mut Report) -> Result<(), Trouble> {
        let _lock = lock::take(&self.plan.lib_dir, LOCK).map_err(Trouble::config)?;
        let before = Claim::read(&self.plan.lib_dir);
        if self.plan.mode == CniMode::None && before.is_none() {
            // Somebody else installs, and nothing of ours is here: nothing is written.
            report.config = Config::Ready(Place::default());
            return Ok(());
        }
        let identity = self.identity()?;
        let mut claim = before.clone().unwrap_or_else(|| Claim::new(identity.clone()));
        let standing = claim.standing(&identity, !self.started);
        match standing {
            Standing::Withdrawn => {
                report.passive = Some("uninstalled on this node: restart the agent to install again");
                report.config = Config::Wrong("crosslink was uninstalled on this node while the agent runs".to_owned());
                return Ok(());
            }
            Standing::Superseded => report.passive = Some("an agent that started later installs"),
            Standing::Owner => self.own(&mut claim, before.as_ref(), identity)?,
        }
        if self.plan.mode != CniMode::None {
            self.keep_binary(standing, now, report)?;
        }
        let mut chain = Chain { plan: &self.plan, claim: &mut claim, losses: &mut self.losses, report, standing, now };
        let kept = Self::keep_config(&mut chain, &mut self.unsettled, &mut self.active)?;
        if let Config::Ready(place) = &kept {
            let dropin = place.way == Some(Way::Dropin);
            self.dropin_dir = dropin.then(|| self.plan.dirs.conf.join(&place.network));
        }
        report.config = kept;
        Ok(())
    }

    fn identity(&mut self) -> Result<Identity, Trouble> {
        if let Some(identity) = &self.identity {
            return Ok(identity.clone());
        }
        let plugin = self.binary.fingerprint().map_err(|why| Trouble::Fault(Id::CniBinary, why))?;
        let identity = self.plan.identity(plugin);
        self.identity = Some(identity.clone());
        Ok(identity)
    }

    /// Notes on disk that this agent installs, where that is news.
    fn own(&mut self, claim: &mut Claim, before: Option<&Claim>, identity: Identity) -> Result<(), Trouble> {
        if let Some(before) = before.filter(|before| before.identity.agent != identity.agent) {
            let (old, new) = (&before.identity.agent, &identity.agent);
            tracing::info!("version {new} takes over from {old} on this node, since it was started later");
        }
        claim.identity = identity;
        claim.removed = false;
        if before != Some(&*claim) {
            claim.write(&self.plan.lib_dir).map_err(|err| Trouble::config(err.to_string()))?;
        }
        if !self.started {
            sweep(&self.plan.dirs.bin);
            sweep(&self.plan.dirs.conf);
        }
        self.started = true;
        Ok(())
    }

    fn keep_binary(&mut self, standing: Standing, now: Instant, report: &mut Report) -> Result<(), Trouble> {
        let target = self.binary.target().to_owned();
        let wait = self.losses.wait(&target, now);
        if !wait.is_zero() && !self.binary.in_order() {
            return Err(Trouble::Wait(wait));
        }
        let kept = self.binary.keep(standing == Standing::Superseded);
        let kept = kept.map_err(|why| Trouble::Fault(Id::CniBinary, why))?;
        if matches!(kept, Kept::Installed | Kept::Replaced) {
            report.changed = true;
            report.binary_mismatch = true;
            let shown = target.display();
            tracing::info!(file = %shown, "installed the plugin");
            if kept == Kept::Replaced {
                report.note("CNIBinaryReplaced", false, format!("{shown} was another build and was replaced"));
            } else if let Some(loss) = self.losses.lost(&target, now) {
                report.note("CNIBinaryReplaced", true, format!("{shown} was missing and was put back"));
                if loss == Loss::Conflict {
                    report.note(
                        "CNIConfigConflict",
                        true,
                        format!("{shown}: another writer keeps removing the plugin"),
                    );
                }
            }
            self.losses.lost(&target, now);
        }
        self.losses.in_order(&target, now);
        Ok(())
    }

    fn keep_config(
        chain: &mut Chain<'_>,
        unsettled: &mut Option<Instant>,
        active: &mut Option<String>,
    ) -> Result<Config, Trouble> {
        if chain.plan.mode == CniMode::None {
            // What was put there before the mode was changed goes; what somebody else keeps there stays.
            chain.clean_others(None)?;
            return Ok(Config::Ready(Place::default()));
        }
        let dir = &chain.plan.dirs.conf;
        let listing = Listing::read(dir).map_err(|err| Trouble::refused("read directory", dir, &err))?;
        if let Some(hidden) = listing.hidden_first() {
            let text =
                format!("{}: runtimes load this hidden file before the others; remove it", dir.join(hidden).display());
            chain.report.find(Id::CniConfig, text);
        }
        let choice = choose(&listing.candidates, chain.plan.pin.as_deref());
        let (name, patience) = match &choice {
            Choice::Nothing(_) => (None, SETTLE),
            Choice::Invalid { name, .. } => (Some(name), SETTLE),
            Choice::List { name, .. } | Choice::Single { name, .. } => {
                let vanished = active.as_ref().is_some_and(|active| name > active && !listing.names.contains(active));
                (Some(name), if vanished { VANISHED } else { Duration::ZERO })
            }
        };
        let since = *unsettled.get_or_insert(chain.now);
        let waited = chain.now.saturating_duration_since(since);
        if waited < patience {
            return Err(Trouble::Wait(SOON.min(patience.saturating_sub(waited))));
        }
        let fault = |why: String| {
            Trouble::config(format!("{}: {why}", name.map_or(dir.clone(), |name| dir.join(name)).display()))
        };
        let place = match &choice {
            Choice::Nothing(why) | Choice::Invalid { why, .. } => return Err(fault(why.clone())),
            Choice::List { name, by_multus } => {
                *unsettled = None;
                chain.keep_list(name, *by_multus)?
            }
            Choice::Single { name, .. } => {
                *unsettled = None;
                chain.keep_single(name)?
            }
        };
        active.clone_from(&name.cloned());
        Ok(Config::Ready(place))
    }
}

/// Takes the entry out wherever it is. The binary stays: runtimes call it for the DEL of pods that are there.
///
/// # Errors
/// In words, everything that is still there.
pub fn uninstall(plan: &Plan) -> Result<(), String> {
    let _lock = lock::take(&plan.lib_dir, LOCK)?;
    let known = Claim::read(&plan.lib_dir);
    let by_others = plan.mode == CniMode::None && known.is_none();
    let mut claim = known.unwrap_or_else(|| Claim::new(plan.identity(String::new())));
    let mut faults = Vec::new();
    if !claim.removed {
        // First of all, so that an agent that still runs does not put it back.
        claim.removed = true;
        claim.write(&plan.lib_dir).map_err(|err| err.to_string())?;
    }
    if by_others {
        // What is in the chain was put there by somebody else.
        return Ok(());
    }
    let (mut losses, mut report) = (Losses::default(), Report::default());
    let now = Instant::now();
    let standing = Standing::Owner;
    let mut chain = Chain { plan, claim: &mut claim, losses: &mut losses, report: &mut report, standing, now };
    let everywhere = |chain: &Chain<'_>| -> Result<Vec<Placement>, String> {
        let dir = &plan.dirs.conf;
        let listing = Listing::read(dir).map_err(|err| super::write::refusal("read directory", dir, &err))?;
        let place = |way, path| Placement { way, path, pending: false };
        let mut places = chain.claim.placed.clone();
        let listed = listing.candidates.iter().filter(|file| file.name.ends_with(".conflist") && mentions_us(file));
        places.extend(listed.map(|file| place(Way::Insert, dir.join(&file.name))));
        places.extend(listing.dropins(dir).into_iter().map(|path| place(Way::Dropin, path)));
        Ok(places)
    };
    for placement in everywhere(&chain)? {
        match settled(|| chain.clean(&placement)) {
            Ok(()) => chain.claim.forget(&placement.path),
            Err(why) => faults.push(why),
        }
    }
    sweep(&plan.dirs.conf);
    sweep(&plan.dirs.bin);
    chain.save().map_err(|trouble| words(&trouble)).unwrap_or_else(|why| faults.push(why));
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}

fn mentions_us(file: &crosslink_core::conflist::Candidate) -> bool {
    file.content.as_ref().is_ok_and(|text| text.contains(crosslink_core::conflist::TYPE))
}

fn words(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Wait(_) => "another writer is busy in the directory".to_owned(),
        Trouble::Fault(_, text) => text.clone(),
    }
}

/// Tries until the settling time of a configuration is over.
fn settled(mut attempt: impl FnMut() -> Result<(), Trouble>) -> Result<(), String> {
    let deadline = Instant::now() + SETTLE;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(trouble) if Instant::now() >= deadline => return Err(words(&trouble)),
            Err(_) => std::thread::sleep(SOON),
        }
    }
}

//! The entry's way into the chain, and out of it.

use std::{
    fs::{self, DirBuilder},
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crosslink_core::{
    conflist::{self, DROPIN_FILE, List, Single},
    finding::Id,
    netconf::valid_identifier,
};

use super::{
    Plan,
    backoff::Loss,
    claim::{Claim, Placement, Standing},
    listing::{resolve, sweep},
    losses::Losses,
    mode::{Circumstances, Way, decide},
    report::{Config, Place, Report, Trouble},
    write::{self, Outcome, Seen, read, replace},
};

/// When to look again at a file that somebody is writing.
pub const SOON: Duration = Duration::from_millis(100);

/// One pass over the configuration.
#[derive(Debug)]
pub struct Chain<'a> {
    /// What is wanted.
    pub plan: &'a Plan,
    /// What is noted on disk.
    pub claim: &'a mut Claim,
    /// What others undid.
    pub losses: &'a mut Losses,
    /// What is told.
    pub report: &'a mut Report,
    /// Whether everything may be changed, or only what is missing be replaced.
    pub standing: Standing,
    /// Now.
    pub now: Instant,
}

impl Chain<'_> {
    /// Puts the entry into the chain of a list, if it is not there.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn keep_list(&mut self, name: &str, by_multus: bool) -> Result<Place, Trouble> {
        let (path, seen) = self.look(name)?;
        // It was whole a moment ago, so somebody is writing.
        let list = List::parse(&seen.text).map_err(|_| Trouble::Wait(SOON))?;
        let dropin = self.dropin_path(&list.name);
        let converted = self.claim.has(&path).is_some_and(|placement| placement.way == Way::Convert);
        let obstacles = [
            (by_multus, "Multus calls the main CNI and reads no drop-ins"),
            (converted, "the list was made of a single plugin's configuration"),
            (list.inlined_only, "the main CNI's list has loadOnlyInlinedPlugins"),
            (dropin.is_none(), "the network's name cannot be that of a directory"),
        ];
        let circumstances = Circumstances {
            runtime: self.plan.runtime.as_ref(),
            obstacle: obstacles.into_iter().find(|(there, _)| *there).map(|(_, why)| why),
            dropin_before: dropin.as_ref().is_some_and(|path| self.claim.has(path).is_some()),
        };
        let (way, remark) = decide(self.plan.mode, &circumstances);
        if let Some(remark) = remark {
            self.report.find(Id::CniMode, format!("{}: {remark}", path.display()));
        }
        match (way, dropin) {
            (Some(Way::Dropin), Some(file)) => self.keep_dropin(&file, (&path, &seen), &list)?,
            (Some(_), dropin) => self.keep_entry(&path, &seen, &list, dropin)?,
            (None, _) => {}
        }
        Ok(Place {
            way,
            file: name.to_owned(),
            network: list.name.clone(),
            plugins: list.kinds().map(str::to_owned).collect(),
        })
    }

    fn look(&self, name: &str) -> Result<(PathBuf, Seen), Trouble> {
        let path = resolve(&self.plan.dirs.conf, name).map_err(|_| Trouble::Wait(SOON))?;
        let seen = read(&path).map_err(|err| match err.kind() {
            ErrorKind::NotFound => Trouble::Wait(SOON),
            _ => Trouble::refused("read", &path, &err),
        })?;
        Ok((path, seen))
    }

    /// Our file in the directory of a network; none where the network's name is no name of a directory.
    fn dropin_path(&self, network: &str) -> Option<PathBuf> {
        valid_identifier(network).then(|| self.plan.dirs.conf.join(network).join(DROPIN_FILE))
    }

    fn keep_entry(
        &mut self,
        path: &Path,
        seen: &Seen,
        list: &List<'_>,
        dropin: Option<PathBuf>,
    ) -> Result<(), Trouble> {
        let there = match self.standing {
            Standing::Owner => conflist::valid(list, &self.plan.entry, &self.plan.constraints),
            _ => list.has_ours(),
        };
        if !there {
            self.due(path)?;
            let text = conflist::insert(list, &self.plan.entry, &self.plan.constraints)
                .map_err(|why| Trouble::config(format!("{}: {why}", path.display())))?;
            self.place(Way::Insert, path, false)?;
            self.write(path, &text, Some(seen))?;
            tracing::info!(file = %path.display(), network = list.name, "put the entry into the chain");
        }
        self.place(Way::Insert, path, false)?;
        self.in_order(path);
        self.clean_others(Some(path))?;
        match dropin.filter(|_| self.standing == Standing::Owner) {
            // Of an agent whose notes are lost. With both, the plugin would be called twice.
            Some(file) if fs::symlink_metadata(&file).is_ok() => self.clean(&placement(Way::Dropin, &file)),
            _ => Ok(()),
        }
    }

    fn keep_dropin(&mut self, file: &Path, main: (&Path, &Seen), list: &List<'_>) -> Result<(), Trouble> {
        let now = match read(file) {
            Ok(seen) => Some(seen),
            Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => None,
            Err(err) => return Err(Trouble::refused("read", file, &err)),
        };
        let others_stay = self.standing != Standing::Owner;
        let same = |seen: &Seen| others_stay || conflist::same(&seen.text, &self.plan.entry);
        let there = now.as_ref().is_some_and(same);
        if !there {
            self.due(file)?;
            self.place(Way::Dropin, file, true)?;
            let dir = file.parent().unwrap_or(file);
            let made = DirBuilder::new().recursive(true).mode(0o755).create(dir);
            made.map_err(|err| Trouble::refused("make directory", dir, &err))?;
            self.write(file, &conflist::dropin(&self.plan.entry), now.as_ref())?;
            tracing::info!(file = %file.display(), "put the drop-in there");
        }
        if !others_stay && list.has_ours() {
            // Runtimes learn of both at once, since they do not watch the drop-in's directory.
            self.take_out(main.0, main.1, list)?;
        }
        if !there || self.claim.has(file).is_some_and(|placement| placement.pending) {
            write::kick(&self.plan.dirs.conf)
                .map_err(|err| Trouble::refused("write in", &self.plan.dirs.conf, &err))?;
        }
        self.place(Way::Dropin, file, false)?;
        self.in_order(file);
        self.clean_others(Some(file))
    }

    /// Puts the entry beside a single plugin, by making a list of both, where that is wanted.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn keep_single(&mut self, name: &str) -> Result<Place, Trouble> {
        let (path, seen) = self.look(name)?;
        let shown = path.display();
        let single = Single::parse(&seen.text).map_err(|_| Trouble::Wait(SOON))?;
        let stem = name.strip_suffix(".conf").filter(|_| self.plan.convert).ok_or_else(|| {
            Trouble::config(format!(
                "{shown} holds a single plugin, which has no chain: give the main CNI a .conflist, or set cniConvertConf"
            ))
        })?;
        let list_path = path.with_file_name(format!("{stem}.conflist"));
        let text = conflist::convert(&single, &self.plan.entry)
            .and_then(|text| List::parse(&text).map(drop).map(|()| text))
            .map_err(|why| Trouble::config(format!("{shown} cannot become a list: {why}")))?;
        self.due(&path)?;
        let before = match read(&list_path) {
            Ok(seen) => Some(seen),
            Err(err) if err.kind() == ErrorKind::NotFound => None,
            Err(err) => return Err(Trouble::refused("read", &list_path, &err)),
        };
        if before.is_some() && self.claim.has(&list_path).is_none() {
            let list = list_path.display();
            return Err(Trouble::config(format!("{shown} cannot become {list}, which is there: remove one of them")));
        }
        self.place(Way::Convert, &list_path, true)?;
        self.write(&list_path, &text, before.as_ref())?;
        if !read(&path).is_ok_and(|now| now.text == seen.text) {
            return Err(Trouble::Wait(SOON));
        }
        // From here on the list is the first: a runtime never finds none.
        fs::rename(&path, original(&list_path)).map_err(|err| Trouble::refused("rename", &path, &err))?;
        write::sync_directory_of(&path).map_err(|err| Trouble::refused("write in", &path, &err))?;
        self.place(Way::Convert, &list_path, false)?;
        self.losses.forget(&path);
        tracing::info!(from = %shown, to = %list_path.display(), "made a list of a single plugin");
        Err(Trouble::Wait(Duration::ZERO))
    }

    /// Notes a place on disk, before it is used.
    fn place(&mut self, way: Way, path: &Path, pending: bool) -> Result<(), Trouble> {
        if self.standing == Standing::Owner && self.claim.place(way, path, pending) {
            self.save()?;
        }
        Ok(())
    }

    /// Writes the notes.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn save(&mut self) -> Result<(), Trouble> {
        self.report.changed = true;
        self.claim.write(&self.plan.lib_dir).map_err(|err| Trouble::config(err.to_string()))
    }

    fn write(&mut self, path: &Path, text: &str, seen: Option<&Seen>) -> Result<(), Trouble> {
        self.report.changed = true;
        match replace(path, text.as_bytes(), seen) {
            Ok(Outcome::Done) => Ok(()),
            Ok(Outcome::Changed) => Err(Trouble::Wait(SOON)),
            Err(err) => Err(Trouble::refused("write", path, &err)),
        }
    }

    fn take_out(&mut self, path: &Path, seen: &Seen, list: &List<'_>) -> Result<(), Trouble> {
        let text = conflist::remove(list).map_err(|why| Trouble::config(format!("{}: {why}", path.display())))?;
        self.write(path, &text, Some(seen))?;
        tracing::info!(file = %path.display(), "took the entry out of the chain");
        Ok(())
    }

    /// Whether a file may be repaired now. Notes who undid it, if somebody did.
    fn due(&mut self, path: &Path) -> Result<(), Trouble> {
        let loss = self.losses.lost(path, self.now);
        if loss.is_some() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            self.report.overwritten.push(name.into_owned());
        }
        if loss == Some(Loss::Conflict) {
            let text = super::conflict::describe(path, &self.plan.dirs.conf);
            self.report.note("CNIConfigConflict", true, text);
        }
        match self.losses.wait(path, self.now) {
            Duration::ZERO => Ok(()),
            wait => {
                let text =
                    format!("{}: the entry is gone, and another writer is given {} s", path.display(), wait.as_secs());
                self.report.config = Config::Wrong(text);
                Err(Trouble::Wait(wait))
            }
        }
    }

    fn in_order(&mut self, path: &Path) {
        if let Some(lasted) = self.losses.in_order(path, self.now) {
            self.report.repaired.push(lasted);
            let by = super::conflict::writer(path);
            self.report.note(
                "CNIConfigRestored",
                false,
                format!("{}: {by} had undone crosslink's entry", path.display()),
            );
        }
    }

    /// Takes the entry out wherever it is noted to be, but for one place.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn clean_others(&mut self, but: Option<&Path>) -> Result<(), Trouble> {
        if self.standing == Standing::Superseded {
            return Ok(());
        }
        for placement in self.claim.elsewhere(but) {
            self.clean(&placement)?;
            self.losses.forget(&placement.path);
            self.claim.forget(&placement.path);
            self.save()?;
        }
        Ok(())
    }

    /// Takes the entry out of one place.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn clean(&mut self, placement: &Placement) -> Result<(), Trouble> {
        let path = &placement.path;
        let refused = |what: &str, path: &Path, err: &std::io::Error| Trouble::refused(what, path, err);
        if placement.way == Way::Dropin {
            write::remove(path).map_err(|err| refused("remove", path, &err))?;
            self.report.changed = true;
            if let Some(dir) = path.parent() {
                sweep(dir);
                // Somebody else's drop-ins may be in it.
                let _ = fs::remove_dir(dir);
            }
            let dir = &self.plan.dirs.conf;
            return write::kick(dir).map_err(|err| refused("write in", dir, &err));
        }
        let seen = match read(path) {
            Ok(seen) => seen,
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(()),
            Err(err) => return Err(refused("read", path, &err)),
        };
        let list = List::parse(&seen.text).map_err(|why| {
            Trouble::config(format!("{} is to lose crosslink's entry, but {why}: mend it", path.display()))
        })?;
        if placement.way == Way::Convert && self.restore(path, &list)? {
            return Ok(());
        }
        if list.has_ours() { self.take_out(path, &seen, &list) } else { Ok(()) }
    }

    /// Undoes a conversion, unless the list was changed by others since.
    fn restore(&mut self, path: &Path, list: &List<'_>) -> Result<bool, Trouble> {
        let kept = original(path);
        let Ok(seen) = read(&kept) else { return Ok(false) };
        let without = |list: &List<'_>| conflist::remove(list).ok();
        let converted =
            Single::parse(&seen.text).ok().and_then(|single| conflist::convert(&single, &self.plan.entry).ok());
        let same = converted.as_deref().and_then(|text| without(&List::parse(text).ok()?)) == without(list);
        if !same {
            return Ok(false);
        }
        self.report.changed = true;
        let back = path.with_extension("conf");
        fs::rename(&kept, &back).map_err(|err| Trouble::refused("rename", &kept, &err))?;
        write::remove(path).map_err(|err| Trouble::refused("remove", path, &err))?;
        write::sync_directory_of(path).map_err(|err| Trouble::refused("write in", path, &err))?;
        Ok(true)
    }
}

fn placement(way: Way, path: &Path) -> Placement {
    Placement { way, path: path.to_owned(), pending: false }
}

/// Where a converted single plugin's file is kept. Runtimes do not load it.
fn original(list_path: &Path) -> PathBuf {
    let stem = list_path.file_stem().unwrap_or_default().to_string_lossy();
    list_path.with_file_name(format!(".{stem}.conf.crosslink.orig"))
}

//! The directory of configurations, read whole.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crosslink_core::conflist::{Candidate, DROPIN_FILE, chosen_by_runtime, is_candidate};

use super::write::{is_temporary, read, remove};

/// The directory as it was read.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Names of what is no directory.
    pub names: BTreeSet<String>,
    /// Names of directories.
    pub dirs: BTreeSet<String>,
    /// Files that may be the main CNI's.
    pub candidates: Vec<Candidate>,
}

impl Listing {
    /// Reads it. A directory that is missing is empty.
    ///
    /// # Errors
    /// The system's.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut listing = Self::default();
        let entries = match fs::read_dir(dir) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(listing),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            // Names that are not UTF-8 are nobody's conflist.
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => listing.dirs.insert(name),
                Ok(_) => listing.names.insert(name),
                // It is gone again.
                Err(_) => continue,
            };
        }
        for name in listing.names.iter().filter(|name| is_candidate(name)) {
            let content = resolve(dir, name).and_then(|path| match read(&path) {
                Ok(seen) => Ok(seen.text),
                Err(err) => Err(format!("it cannot be read: {err}")),
            });
            listing.candidates.push(Candidate { name: name.clone(), content });
        }
        Ok(listing)
    }

    /// A hidden file that runtimes prefer to the others, if there is one.
    pub fn hidden_first(&self) -> Option<&str> {
        chosen_by_runtime(self.names.iter().map(String::as_str)).filter(|name| name.starts_with('.'))
    }

    /// Drop-ins of ours, whatever their network.
    pub fn dropins(&self, dir: &Path) -> Vec<PathBuf> {
        let files = self.dirs.iter().map(|network| dir.join(network).join(DROPIN_FILE));
        files.filter(|file| fs::symlink_metadata(file).is_ok()).collect()
    }
}

/// Removes what killed agents left in a directory and those below it. Only to be called with the lock.
pub fn sweep(dir: &Path) {
    let names = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
    let mut entries = names(dir);
    let below = entries.iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let below: Vec<_> = below.flat_map(|entry| names(&entry.path())).collect();
    entries.extend(below);
    for entry in entries.iter().filter(|entry| entry.file_name().to_str().is_some_and(is_temporary)) {
        // They do no harm where they are.
        let _ = remove(&entry.path());
    }
}

/// The file behind a name: itself, or what a symbolic link in the same directory leads to.
///
/// # Errors
/// In words: the link leads elsewhere.
pub fn resolve(dir: &Path, name: &str) -> Result<PathBuf, String> {
    let path = dir.join(name);
    match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_symlink() => {
            let target = fs::canonicalize(&path).map_err(|err| format!("it is a symbolic link to nothing: {err}"))?;
            let home = fs::canonicalize(dir).map_err(|err| err.to_string())?;
            if target.parent() == Some(home.as_path()) {
                return Ok(target);
            }
            let target = target.display();
            Err(format!("it is a symbolic link to {target}, outside of this directory: set cniConfDir to that one"))
        }
        _ => Ok(path),
    }
}

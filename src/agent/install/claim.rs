//! `install.json`: what is installed on this node, by whom, and where.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use crosslink_core::json::Object;
use crosslink_kernel::{
    Error,
    files::{Durability, read_trusted, write_atomic},
};
use serde::{Deserialize, Serialize};

use super::mode::Way;

/// Name of the file.
pub const FILE: &str = "install.json";

const VERSION: u32 = 1;

/// Who installs, and what. Two agents with the same identity never disagree about anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// The agent's version.
    pub agent: String,
    /// Size and hash of the plugin, so that two builds of one version are told apart.
    pub plugin: String,
    /// The entry as text.
    pub entry: String,
    /// The wanted mode and the constraints.
    pub rules: String,
}

/// A place where the entry was put.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placement {
    /// How.
    pub way: Way,
    /// The file.
    pub path: PathBuf,
    /// Whether that was begun and perhaps not finished.
    #[serde(default)]
    pub pending: bool,
}

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    version: u32,
    /// Who installed last.
    #[serde(flatten)]
    pub identity: Identity,
    /// Whether `uninstall` ran since.
    #[serde(default)]
    pub removed: bool,
    /// Where the entry is. Written before it is put there, so that nothing is ever forgotten.
    #[serde(default)]
    pub placed: Vec<Placement>,
}

/// What an agent may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It installs.
    Owner,
    /// One that started later installs something else; this one only replaces what is missing.
    Superseded,
    /// `uninstall` ran while the agent was running.
    Withdrawn,
}

impl Claim {
    /// A claim without placements.
    pub const fn new(identity: Identity) -> Self {
        Self { version: VERSION, identity, removed: false, placed: Vec::new() }
    }

    /// Reads it; none where there is none that can be used, which is as good: places are found again by looking.
    pub fn read(lib_dir: &Path) -> Option<Self> {
        let path = lib_dir.join(FILE);
        let parse = |text: String| serde_json::from_str::<Object<Self>>(&text).map_err(|err| err.to_string());
        match read_trusted(&path).and_then(|text| text.map(parse).transpose()) {
            Ok(claim) => claim.map(|Object(claim)| claim),
            Err(why) => {
                tracing::warn!("{}: {why}; it is written anew", path.display());
                None
            }
        }
    }

    /// Whether somebody uninstalled on this node after a moment.
    pub fn withdrawn_since(lib_dir: &Path, moment: SystemTime) -> bool {
        let written = std::fs::metadata(lib_dir.join(FILE)).and_then(|meta| meta.modified());
        written.is_ok_and(|written| written > moment) && Self::read(lib_dir).is_some_and(|claim| claim.removed)
    }

    /// Writes it.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, lib_dir: &Path) -> Result<(), Error> {
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        write_atomic(&lib_dir.join(FILE), &json, 0o644, Durability::Synced)
    }

    /// What an agent of this identity may do. At its start an agent takes over, whatever its version: the last one that
    /// was started is the one that is wanted, also after a rollback.
    pub fn standing(&self, identity: &Identity, starting: bool) -> Standing {
        if starting {
            Standing::Owner
        } else if self.removed {
            Standing::Withdrawn
        } else if self.identity == *identity {
            Standing::Owner
        } else {
            Standing::Superseded
        }
    }

    /// Notes a place; says whether that is news.
    pub fn place(&mut self, way: Way, path: &Path, pending: bool) -> bool {
        let new = Placement { way, path: path.to_owned(), pending };
        match self.placed.iter_mut().find(|placement| placement.path == path) {
            // What was converted stays so, whatever is edited in it later.
            Some(old) if old.way == Way::Convert && way == Way::Insert => false,
            Some(old) if *old == new => false,
            Some(old) => {
                *old = new;
                true
            }
            None => {
                self.placed.push(new);
                true
            }
        }
    }

    /// Whether the entry is noted at a place.
    pub fn has(&self, path: &Path) -> Option<&Placement> {
        self.placed.iter().find(|placement| placement.path == path)
    }

    /// Places other than this one.
    pub fn elsewhere(&self, path: Option<&Path>) -> Vec<Placement> {
        self.placed.iter().filter(|placement| Some(placement.path.as_path()) != path).cloned().collect()
    }

    /// Forgets a place.
    pub fn forget(&mut self, path: &Path) {
        self.placed.retain(|placement| placement.path != path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(agent: &str) -> Identity {
        let text = |text: &str| text.to_owned();
        Identity { agent: agent.into(), plugin: text("1-a"), entry: text("{}"), rules: text("auto") }
    }

    #[test]
    fn the_agent_that_started_last_installs() {
        let (old, new) = (identity("0.1.0"), identity("0.2.0"));
        let mut claim = Claim::new(new.clone());
        assert_eq!(claim.standing(&old, false), Standing::Superseded);
        assert_eq!(claim.standing(&old, true), Standing::Owner);
        assert_eq!(claim.standing(&new, false), Standing::Owner);
        claim.removed = true;
        assert_eq!(claim.standing(&new, false), Standing::Withdrawn);
        assert_eq!(claim.standing(&new, true), Standing::Owner);
    }

    #[test]
    fn places_are_kept_once() {
        let mut claim = Claim::new(identity("0.1.0"));
        let path = Path::new("/etc/cni/net.d/10.conflist");
        assert!(claim.place(Way::Insert, path, true));
        assert!(claim.place(Way::Insert, path, false));
        assert!(!claim.place(Way::Insert, path, false));
        let json = serde_json::to_string(&claim).unwrap();
        assert_eq!(serde_json::from_str::<Claim>(&json).unwrap(), claim);
        assert_eq!(claim.elsewhere(Some(path)), []);
        claim.forget(path);
        assert_eq!(claim.placed, []);
    }
}

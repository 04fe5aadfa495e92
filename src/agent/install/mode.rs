//! By which of the ways the entry gets into the chain.

use serde::{Deserialize, Serialize};

use super::runtime::Runtime;
use crate::settings::CniMode;

/// A way that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// A file of ours in the directory named like the network.
    Dropin,
    /// An entry in the main CNI's list.
    Insert,
    /// The same, in a list that was made of the main CNI's single plugin.
    Convert,
}

impl Way {
    /// Its name, as of a mode.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dropin => "dropin",
            Self::Insert => "insert",
            Self::Convert => "convert",
        }
    }
}

/// What the choice depends on.
#[derive(Clone, Debug)]
pub struct Circumstances<'a> {
    /// The runtime, where it is known.
    pub runtime: Option<&'a Runtime>,
    /// What in the configuration keeps runtimes from reading drop-ins.
    pub obstacle: Option<&'static str>,
    /// Whether a drop-in of ours is there already.
    pub dropin_before: bool,
}

impl Circumstances<'_> {
    /// What speaks against a drop-in; the runtime only where it is known.
    fn against_dropin(&self) -> Option<String> {
        if let Some(obstacle) = self.obstacle {
            return Some(obstacle.to_owned());
        }
        let runtime = self.runtime.filter(|runtime| !runtime.reads_dropins())?;
        Some(format!("{runtime} reads no drop-ins (containerd does from 2.1.0, CRI-O from 1.33.0 on)"))
    }
}

/// The way into a list, and what is to be said of it. None where the entry is somebody else's matter.
pub fn decide(wanted: CniMode, given: &Circumstances<'_>) -> (Option<Way>, Option<String>) {
    let against = given.against_dropin();
    match (wanted, against) {
        (CniMode::None, _) => (None, None),
        (CniMode::Insert, _) => (Some(Way::Insert), None),
        (CniMode::Dropin, None) => (Some(Way::Dropin), None),
        (CniMode::Dropin, Some(why)) => (
            Some(Way::Insert),
            Some(format!("cniMode is dropin, but {why}; insert is used: set cniMode to insert or auto")),
        ),
        // Where the runtime is not known, what was right once is kept, so that an API server that is down at a restart
        // does not make the agent rewrite anything.
        (CniMode::Auto, None) if given.runtime.is_some() || given.dropin_before => (Some(Way::Dropin), None),
        (CniMode::Auto, _) => (Some(Way::Insert), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_circumstance() {
        let new = Runtime::parse("containerd://2.1.0");
        let old = Runtime::parse("containerd://1.7.0");
        let plain = Circumstances { runtime: None, obstacle: None, dropin_before: false };
        let with = |runtime| Circumstances { runtime, ..plain.clone() };
        let (new, old) = (with(new.as_ref()), with(old.as_ref()));
        let way = |mode, given: &Circumstances<'_>| decide(mode, given).0;
        assert_eq!(way(CniMode::Auto, &new), Some(Way::Dropin));
        assert_eq!(way(CniMode::Auto, &old), Some(Way::Insert));
        assert_eq!(way(CniMode::Auto, &plain), Some(Way::Insert));
        assert_eq!(way(CniMode::Auto, &Circumstances { dropin_before: true, ..plain.clone() }), Some(Way::Dropin));
        assert_eq!(way(CniMode::Auto, &Circumstances { dropin_before: true, ..old.clone() }), Some(Way::Insert));
        assert_eq!(way(CniMode::Auto, &Circumstances { obstacle: Some("x"), ..new.clone() }), Some(Way::Insert));
        assert_eq!(way(CniMode::Insert, &new), Some(Way::Insert));
        assert_eq!(way(CniMode::Dropin, &plain), Some(Way::Dropin));
        assert_eq!(way(CniMode::None, &new), None);
        let (way, why) = decide(CniMode::Dropin, &old);
        assert_eq!(way, Some(Way::Insert));
        assert!(why.unwrap().contains("containerd://1.7.0"));
    }
}

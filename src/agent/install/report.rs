//! What a pass found and did.

use std::{path::Path, time::Duration};

use crosslink_core::finding::{Finding, Id};

use super::mode::Way;
use crate::board::{Note, Subject};

/// State of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Config {
    /// Somebody is writing, or a repair waits: what was said last still holds.
    #[default]
    Settling,
    /// It cannot be used, or not be changed.
    Wrong(String),
    /// The entry is where it belongs.
    Ready(Place),
}

/// Where the entry is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// How; none where that is somebody else's matter.
    pub way: Option<Way>,
    /// The main CNI's file; empty where that is somebody else's matter.
    pub file: String,
    /// Its network.
    pub network: String,
    /// Types of the plugins in its list.
    pub plugins: Vec<String>,
}

/// What a pass found and did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What the operator should know.
    pub findings: Vec<Finding>,
    /// Events.
    pub notes: Vec<Note>,
    /// When to look again at the latest.
    pub retry: Option<Duration>,
    /// Why the plugin cannot be used, if so.
    pub binary_fault: Option<String>,
    /// Whether the plugin was missing or another one.
    pub binary_mismatch: bool,
    /// The configuration.
    pub config: Config,
    /// Whether something was written.
    pub changed: bool,
    /// Names of files whose entry somebody undid.
    pub overwritten: Vec<String>,
    /// How long repaired losses lasted.
    pub repaired: Vec<Duration>,
    /// How long the next repair of what is fought about will wait.
    pub backoff: Duration,
    /// Whether another agent installs, or none.
    pub passive: Option<&'static str>,
}

impl Report {
    /// Adds a finding.
    pub fn find(&mut self, id: Id, text: impl Into<String>) {
        self.findings.push(Finding::new(id, text));
    }

    /// Adds an event about this node.
    pub fn note(&mut self, reason: &'static str, warning: bool, text: String) {
        self.notes.push(Note { subject: Subject::Node, warning, reason, text });
    }

    /// Wants another pass soon.
    pub fn again(&mut self, after: Duration) {
        self.retry = Some(self.retry.map_or(after, |retry| retry.min(after)));
    }
}

/// Why a step did not come to its end.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// Nothing is wrong yet; look again.
    Wait(Duration),
    /// It cannot be done.
    Fault(Id, String),
}

impl Trouble {
    /// The configuration cannot be used or changed.
    pub fn config(text: impl Into<String>) -> Self {
        Self::Fault(Id::CniConfig, text.into())
    }

    /// The system refuses something.
    pub fn refused(what: &str, path: &Path, err: &std::io::Error) -> Self {
        Self::config(super::write::refusal(what, path, err))
    }
}

//! `node.json` on disk. A file that somebody else wrote is theirs: it is read, and never changed.

use std::path::Path;

use crosslink_core::node::{self, NodeFacts};
use crosslink_kernel::files::{Durability, read_trusted, write_atomic};

/// What is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing, or an empty file, which says nothing that could be lost.
    Nothing,
    /// The agent's own.
    Ours {
        /// What it says.
        facts: NodeFacts,
        /// Its text.
        text: String,
    },
    /// Written by hand.
    ByHand(NodeFacts),
    /// Not to be used, so whose it is cannot be told.
    Unusable(String),
}

/// Looks at the file.
pub fn look(path: &Path) -> Held {
    let text = match read_trusted(path) {
        Ok(Some(text)) if !text.trim().is_empty() => text,
        Ok(_) => return Held::Nothing,
        Err(why) => return Held::Unusable(why),
    };
    match node::parse(&text) {
        Ok(facts) if node::is_agents(&text) => Held::Ours { facts, text },
        Ok(facts) => Held::ByHand(facts),
        // By a newer agent, before a rollback.
        Err(_) if node::is_agents(&text) => Held::Ours { facts: NodeFacts::default(), text },
        Err(why) => Held::Unusable(why),
    }
}

/// Writes the file where it says something else; returns whether it did.
///
/// # Errors
/// The system's.
pub fn keep(path: &Path, held: &Held, facts: &NodeFacts) -> anyhow::Result<bool> {
    let text = node::write(facts);
    if matches!(held, Held::Ours { text: before, .. } if *before == text) {
        return Ok(false);
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|err| anyhow::anyhow!("make directory {}: {err}", dir.display()))?;
    }
    write_atomic(path, text.as_bytes(), 0o644, Durability::Synced)?;
    Ok(true)
}

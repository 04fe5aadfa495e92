//! What decides about every pod of the node: the remotes files and `node.json`, as they are on disk now, whoever wrote
//! them. One watcher serves all parts.

use std::{
    fmt::Write as _,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use crosslink_core::{
    finding::Finding,
    node::NodeFacts,
    remotes::{Merged, RemotesFile, merge},
};
use crosslink_kernel::files::{self, Remotes};
use tokio::sync::watch;

use crate::{
    board::Board,
    context::Context,
    dirs::{Dirs, Seen},
    settings::Settings,
};

/// Longest time without a look: bind mounts and network file systems lose notifications.
const LOOK: Duration = Duration::from_secs(30);

/// The same where there are no notifications at all.
const LOOK_BLIND: Duration = Duration::from_secs(1);

/// Remotes files and `node.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    /// Identifies the content: equal for equal files, also after a restart.
    pub generation: u64,
    /// The remotes files.
    pub remotes: Remotes,
    /// The same, merged.
    pub merged: Merged,
    /// `node.json`; empty where it is missing or refused.
    pub node: NodeFacts,
    /// What keeps `node.json` from being used.
    pub node_finding: Option<Finding>,
}

impl Inputs {
    /// Reads them.
    pub fn read(remotes_dir: &Path, node_file: &Path) -> Self {
        let (node, node_finding) = files::read_node(node_file);
        let remotes = files::read_remotes(remotes_dir);
        let merged = merge(&remotes.files, node.cluster_name.as_deref());
        Self { generation: 0, remotes, merged, node, node_finding }.identified()
    }

    fn identified(mut self) -> Self {
        let mut digest = Digest::default();
        // Writing to a digest cannot fail.
        let _ = write!(digest, "{:?} {:?}", self.remotes, self.node);
        self.generation = digest.value();
        self
    }

    /// What was refused or contested, in the order in which ADD notes it.
    pub fn findings(&self) -> Vec<Finding> {
        self.remotes.findings.iter().chain(&self.node_finding).chain(&self.merged.findings).cloned().collect()
    }

    /// Lets what a file, also `node.json`, said before stand in where it is there but cannot be used and has no last good copy: somebody may
    /// be writing it at this moment, and running pods must not lose routes over that.
    fn stand_in(mut self, before: &Self) -> Self {
        let unknown = |name: &String| self.remotes.unreadable || self.remotes.lost.contains(name);
        let known = before.remotes.files.iter().filter(|file| unknown(&file.file));
        let known: Vec<RemotesFile> = known.cloned().collect();
        if !known.is_empty() {
            self.remotes.files.extend(known);
            self.remotes.files.sort_by(|one, other| one.file.cmp(&other.file));
            self.merged = merge(&self.remotes.files, self.node.cluster_name.as_deref());
        }
        if self.node_finding.is_some() {
            self.node = before.node.clone();
            self.merged = merge(&self.remotes.files, self.node.cluster_name.as_deref());
        }
        self.identified()
    }
}

/// FNV-1a (64 bits, by Fowler, Noll and Vo), of which 53 are kept: JSON numbers are exact up to there.
struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    const fn value(&self) -> u64 {
        self.0 >> 11
    }
}

impl std::fmt::Write for Digest {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 = text.bytes().fold(self.0, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Ok(())
    }
}

/// The shared watcher; started by the first who asks.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<OnceLock<watch::Receiver<Arc<Inputs>>>>);

/// The inputs and every later state of them. A state that was overtaken may be left out.
pub fn watch(context: &Context) -> watch::Receiver<Arc<Inputs>> {
    context.inputs.0.get_or_init(|| start(&context.settings, context.board.clone())).clone()
}

fn start(settings: &Settings, board: Board) -> watch::Receiver<Arc<Inputs>> {
    let (lib, remotes, node) = (settings.lib_dir.clone(), settings.remotes_dir(), settings.node_file());
    // Before the first look, so that nothing that comes after it is missed.
    let mut dirs = Dirs::new(vec![lib, remotes.clone()]);
    let first = Inputs::read(&remotes, &node);
    report(&board, &first);
    let (sender, receiver) = watch::channel(Arc::new(first));
    std::thread::spawn(move || {
        while !sender.is_closed() {
            wait(&mut dirs);
            let now = Inputs::read(&remotes, &node).stand_in(&sender.borrow());
            let changed = sender.send_if_modified(|before| {
                let changed = **before != now;
                if changed {
                    *before = Arc::new(now);
                }
                changed
            });
            if changed {
                report(&board, &sender.borrow());
            }
        }
    });
    receiver
}

fn report(board: &Board, inputs: &Inputs) {
    board.findings("inputs", inputs.findings());
    let routes: usize = inputs.merged.clusters.values().map(|cluster| cluster.cidrs.len()).sum();
    let clusters = inputs.merged.clusters.len();
    board
        .facts("inputs", serde_json::json!({ "generation": inputs.generation, "clusters": clusters, "cidrs": routes }));
}

/// Returns when something may have changed.
fn wait(dirs: &mut Dirs) {
    let longest = if dirs.sees() { LOOK } else { LOOK_BLIND };
    loop {
        let seen = dirs.wait(longest);
        // Temporary files and last good copies change nothing by themselves; "..data" is how a ConfigMap is renewed.
        let hidden = |seen: &Seen| match seen {
            Seen::Name { name, .. } => {
                let name = name.as_encoded_bytes();
                name.starts_with(b".") && !name.starts_with(b"..")
            }
            Seen::All => false,
        };
        if seen.is_empty() || !seen.iter().all(hidden) {
            return;
        }
    }
}

//! One look at the node, and what it leads to. Blocking.

use crosslink_core::{
    finding::Finding,
    model::NetnsState,
    nft::Table,
    traffic::{Asked, Desired, Facts, Kept, TABLE, desired},
};
use crosslink_kernel::{
    Errno, Error, Kernel, NodeQuery, System, conntrack,
    nft::{self, Nft},
};
use serde_json::json;

use super::{asked, sysctls};
use crate::{inputs::Inputs, settings::Settings};

/// Most connections of each family that are deleted at once. The rest is left to end by itself: a node with more has
/// other worries than one source address.
const CONNECTIONS: usize = 50_000;

/// What a pass found and did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The table that is in force, if any; meaningless after an error.
    pub table: Option<Table>,
    /// Why the table was written or removed, where it was.
    pub changed: Option<String>,
    /// Whether that was to undo what somebody else did.
    pub repaired: bool,
    /// Connections that were deleted.
    pub deleted: usize,
    /// What was noticed.
    pub findings: Vec<Finding>,
    /// What keeps the table from being what is wanted.
    pub error: Option<String>,
    /// What keeps the host's sysctls from it.
    pub sysctls: Option<String>,
    /// For the status socket.
    pub facts: serde_json::Value,
}

/// Brings the node to what is wanted. `before` is what the last pass left in force, none where that is not known.
pub fn pass(settings: &Settings, inputs: &Inputs, before: Option<&Option<Table>>) -> Outcome {
    let mut outcome = Outcome::default();
    let asked = asked(settings);
    if let Err(err) = work(settings, asked, inputs, before, &mut outcome) {
        // Nothing is wanted, and the agent may have been given no right to look whether anything is there.
        let idle = !asked.notrack && asked.preserve_source == Some(false) && !settings.host_sysctls;
        if !(idle && (nft::unsupported(&err) || err.errno() == Some(Errno::EPERM))) {
            outcome.error = Some(if nft::unsupported(&err) {
                format!("{err}: the kernel has no nf_tables, or not all of it that is needed")
            } else {
                err.to_string()
            });
        }
    }
    outcome
}

fn work(
    settings: &Settings,
    asked: Asked,
    inputs: &Inputs,
    before: Option<&Option<Table>>,
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let mut system = System::new()?;
    let mut state = system.observe_node(&NodeQuery { addresses: true, pods_table: true, ..NodeQuery::default() })?;
    let Desired { table, kept, findings } = desired(facts(inputs, &state), asked);
    outcome.findings = findings;
    outcome.facts = summary(table.as_ref());
    if settings.host_sysctls {
        let kept = sysctls::keep(settings, inputs, &mut system, &mut state);
        outcome.sysctls = kept.err().map(|err| format!("host sysctls: {err:#}"));
    }
    outcome.changed = enforce(table.as_ref())?;
    outcome.repaired = outcome.changed.is_some() && before == Some(&table);
    if outcome.changed.is_some() {
        outcome.deleted = forget(&kept);
    }
    outcome.table = table;
    Ok(())
}

/// The arguments of `crosslink_core::traffic`.
pub fn facts<'a>(inputs: &'a Inputs, state: &'a NetnsState) -> Facts<'a> {
    Facts { merged: &inputs.merged, node: &inputs.node, state }
}

/// Makes the table what is wanted; returns why it had to be changed.
fn enforce(table: Option<&Table>) -> Result<Option<String>, Error> {
    let mut nft = Nft::open()?;
    match table {
        Some(table) => {
            let difference = nft.difference(table)?;
            if difference.is_some() {
                nft.replace(table)?;
            }
            Ok(difference)
        }
        None if nft.exists(TABLE)? => {
            nft.delete(TABLE)?;
            Ok(Some("no rule is needed".to_owned()))
        }
        None => Ok(None),
    }
}

/// Deletes connections whose source was masqueraded before it was to be kept: a binding lasts as long as its
/// connection.
fn forget(kept: &Kept) -> usize {
    if kept.is_empty() {
        return 0;
    }
    let deleted = conntrack::delete(CONNECTIONS, |seen| {
        seen.answered != seen.source && kept.keeps(seen.source, seen.destination, seen.responder)
    });
    deleted
        .inspect_err(|err| tracing::warn!("connections that were masqueraded before stay so until they end: {err}"))
        .unwrap_or_default()
}

fn summary(table: Option<&Table>) -> serde_json::Value {
    let Some(table) = table else { return json!({ "table": null }) };
    let sets = table.sets.iter().map(|set| (set.name.clone(), json!(set.ranges.len())));
    let chains: Vec<&str> = table.chains.iter().map(|chain| chain.name.as_str()).collect();
    json!({
        "table": format!("inet {}", table.name),
        "chains": chains,
        "ranges": sets.collect::<serde_json::Map<_, _>>(),
    })
}

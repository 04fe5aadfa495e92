//! Part: local facts. Keeps `node.json` in step with the kernel and the API server, and says which remote CIDRs are
//! refused because they are local.

pub mod ask;
pub mod decide;
pub mod file;
pub mod kernel;
pub mod objects;
pub mod slim;
pub mod sources;

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use crosslink_core::{
    finding::{Finding, Id},
    node::NodeFacts,
};
use prometheus_client::metrics::counter::Counter;
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use crate::{
    board::{Board, Note, Subject},
    context::Context,
    inputs::{self, Inputs},
};

use decide::{Addresses, Answers, Decision, Given, decide, left_out};
use file::Held;

/// Name of the part on the board.
const PART: &str = "facts";

/// How long a change waits for others that come with it.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// How long the first file of a new node waits for sources to answer, so that it need not be written twice.
const FIRST: Duration = Duration::from_secs(3);

/// Most CIDRs that one event names.
const NAMED: usize = 5;

/// Runs the part.
///
/// # Errors
/// The node's addresses cannot be read, or the file cannot be written.
pub async fn run(context: Context) -> anyhow::Result<()> {
    let settings = &context.settings;
    let given = Given {
        kubernetes: context.client.is_some(),
        cluster_name: settings.cluster_name.clone(),
        pods: settings.pod_cidrs.clone(),
        services: settings.service_cidrs.clone(),
        nodes: settings.node_cidrs.clone(),
    };
    context.board.expect(PART);
    let mut inputs = inputs::watch(&context);
    let (sink, mut answers) = mpsc::channel(64);
    let (ask_nodes, needed) = watch::channel(None);
    let asking = context.client.as_ref().map(|client| {
        sources::start(client, &settings.node_name, settings.submariner_namespace.as_deref(), needed, &sink)
    });
    let mut addresses = kernel::follow()?;

    let mut keeper = Keeper::new(&context, given);
    let mut due = None;
    loop {
        let soon = Instant::now() + DEBOUNCE;
        tokio::select! {
            () = context.stop.cancelled() => break,
            Some((origin, answer)) = answers.recv() => {
                let changed = keeper.answers.take(origin, answer);
                due = if changed { sooner(due, soon) } else { due };
            }
            Ok(()) = addresses.changed() => {
                match &*addresses.borrow_and_update() {
                    Some(Ok(now)) => keeper.addresses = Some(now.clone()),
                    // Those of before hold until the next look.
                    Some(Err(err)) => context.board.ill(PART, format!("addresses of this node: {err}")),
                    None => {}
                }
                due = sooner(due, soon);
            }
            Ok(()) = inputs.changed() => due = sooner(due, soon),
            () = sleep_until(due.unwrap_or(soon)), if due.is_some() => {
                let now = inputs.borrow_and_update().clone();
                match keeper.turn(&now) {
                    Ok(decision) => {
                        ask_nodes.send_if_modified(|before| std::mem::replace(before, decision) != decision);
                        due = keeper.again();
                    }
                    Err(err) => {
                        context.board.ill(PART, format!("{err:#}"));
                        due = Some(Instant::now() + RETRY);
                    }
                }
            }
        }
    }
    drop(asking);
    Ok(())
}

/// Wait before a file that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);

fn sooner(due: Option<Instant>, soon: Instant) -> Option<Instant> {
    Some(due.map_or(soon, |due| due.min(soon)))
}

/// Decides, writes, reports.
struct Keeper {
    board: Board,
    path: PathBuf,
    given: Given,
    answers: Answers,
    /// None before the first look at the kernel.
    addresses: Option<Addresses>,
    started: Instant,
    /// Whether a first file is held back.
    held_back: bool,
    refused: BTreeSet<Finding>,
    writes: Counter,
}

impl Keeper {
    fn new(context: &Context, given: Given) -> Self {
        let writes = Counter::default();
        context.register(|registry| {
            registry.register("node_file_writes", "Times that node.json was written", writes.clone());
        });
        Self {
            board: context.board.clone(),
            path: context.settings.node_file(),
            answers: if given.kubernetes { Answers::waiting() } else { Answers::default() },
            given,
            addresses: None,
            started: Instant::now(),
            held_back: false,
            refused: BTreeSet::new(),
            writes,
        }
    }

    /// When to decide again although nothing changes.
    fn again(&self) -> Option<Instant> {
        self.held_back.then(|| (self.started + FIRST).max(Instant::now() + DEBOUNCE))
    }

    /// One turn; returns whether all nodes must be asked.
    ///
    /// # Errors
    /// The file cannot be written.
    fn turn(&mut self, inputs: &Arc<Inputs>) -> anyhow::Result<Option<bool>> {
        let Some(addresses) = self.addresses.clone() else { return Ok(None) };
        let held = file::look(&self.path);
        let previous = match &held {
            Held::Ours { facts, .. } => facts.clone(),
            _ => NodeFacts::default(),
        };
        let decision = decide(&self.given, &self.answers, &addresses, &previous);
        let mut findings = decision.findings.clone();
        let by_hand = matches!(held, Held::ByHand(_));
        let whose = match &held {
            Held::ByHand(facts) => {
                findings.retain(|finding| finding.id != Id::LocalUnknown && finding.id != Id::NodeAddresses);
                findings.extend(left_out(facts, &decision.facts));
                self.board.well(PART);
                "by hand"
            }
            // What is wrong with it, whoever reads it says.
            Held::Unusable(why) => {
                self.board.ill(PART, format!("{}: {why}: mend or remove it", self.path.display()));
                "unusable"
            }
            Held::Nothing | Held::Ours { .. } => self.write(&held, &decision)?,
        };
        let refused =
            if by_hand { inputs.node.refuses(&inputs.merged) } else { decision.facts.refuses(&inputs.merged) };
        self.tell_refused(&refused);
        findings.extend(refused);
        self.board.findings(PART, findings);
        self.tell(&decision, whose);
        Ok(decision.ask_nodes)
    }

    /// Writes what is ours to write; returns where the file comes from then.
    fn write(&mut self, held: &Held, decision: &Decision) -> anyhow::Result<&'static str> {
        if !self.given.kubernetes && !self.given.any() {
            // Without Kubernetes a node.json by hand is usual, and the plugin takes addresses from the kernel.
            self.board.well(PART);
            return Ok("not kept");
        }
        self.held_back = *held == Held::Nothing && decision.waiting && self.started.elapsed() < FIRST;
        if self.held_back {
            return Ok("not written yet");
        }
        if file::keep(&self.path, held, &decision.facts)? {
            self.writes.inc();
            tracing::info!(path = %self.path.display(), "local facts written");
        }
        let unknown = decision.facts.pod_cidrs.is_empty() && decision.facts.service_cidrs.is_empty();
        match self.answers.trouble().filter(|_| unknown) {
            Some((name, why)) => self.board.ill(PART, format!("local CIDRs are not known yet: {name}: {why}")),
            None => self.board.well(PART),
        }
        Ok("by the agent")
    }

    /// One event for what is newly refused.
    fn tell_refused(&mut self, refused: &[Finding]) {
        let now: BTreeSet<Finding> = refused.iter().cloned().collect();
        let fresh: Vec<&str> = now.difference(&self.refused).map(|finding| finding.text.as_str()).collect();
        if !fresh.is_empty() {
            let named = fresh.iter().take(NAMED).copied().collect::<Vec<_>>().join("; ");
            let more = fresh.len().saturating_sub(NAMED);
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            let text = format!("not routed: {named}{more}");
            self.board.note(Note { subject: Subject::Node, warning: true, reason: "RemoteCIDRRefused", text });
        }
        self.refused = now;
    }

    fn tell(&self, decision: &Decision, whose: &str) {
        let sources: serde_json::Map<String, serde_json::Value> =
            self.answers.words().map(|(name, words)| (name.to_owned(), words.into())).collect();
        let [pods, services] = &decision.from;
        self.board.facts(
            PART,
            json!({
                "nodeFile": whose,
                "known": decision.facts,
                "podCIDRsFrom": pods,
                "serviceCIDRsFrom": services,
                "waiting": decision.waiting,
                "sources": sources,
            }),
        );
    }
}

//! Part: traffic that survives. Keeps our nftables table as `crosslink_core::traffic` says, whoever flushes it, and
//! where it is asked to, the host's sysctls.

mod events;
mod metrics;
mod pace;
mod pass;
pub mod sysctls;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use crosslink_core::{
    finding::{Finding, Id},
    nft::Table,
    traffic::{Asked, TABLE},
};
use crosslink_kernel::nft::{self, Nft};
use tokio::time::Instant;

use crate::{
    context::Context,
    inputs, install,
    settings::{Settings, Toggle},
};

use self::{events::Events, metrics::Metrics, pace::Pace, pass::Outcome};

/// Name on the board.
const PART: &str = "traffic";

/// How soon a refused change is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How often the table is looked at where the kernel tells nothing.
const BLIND: Duration = Duration::from_secs(10);

/// What the settings ask for.
fn asked(settings: &Settings) -> Asked {
    let preserve_source = match settings.preserve_source {
        Toggle::Auto => None,
        Toggle::On => Some(true),
        Toggle::Off => Some(false),
    };
    Asked { notrack: settings.notrack, preserve_source }
}

/// Runs the part.
///
/// # Errors
/// It cannot go on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    // Elsewhere the rules are kept where the kernel can, and a node that cannot is ready all the same.
    if context.settings.preserve_source == Toggle::On {
        context.board.expect(PART);
    }
    let metrics = Metrics::register(&context);
    let mut inputs = inputs::watch(&context);
    let mut events = Events::open();
    let mut pace = Pace::default();
    let mut kept: Option<Option<Table>> = None;
    let born = SystemTime::now();
    loop {
        if install::withdrawn_since(&context.settings.lib_dir, born) {
            context
                .board
                .ill(PART, "crosslink was uninstalled on this node while the agent runs: restart it to begin again");
            tokio::select! {
                () = context.stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(RETRY) => continue,
            }
        }
        let now = Arc::clone(&inputs.borrow_and_update());
        let settings = Arc::clone(&context.settings);
        let before = kept.take();
        let outcome = tokio::task::spawn_blocking(move || pass::pass(&settings, &now, before.as_ref())).await?;
        metrics.count(&outcome);
        report(&context, &outcome);
        let wait = if outcome.error.is_some() || outcome.sysctls.is_some() {
            RETRY
        } else if events.sees_table() {
            Duration::from_secs(context.settings.resync_interval_seconds)
        } else {
            BLIND
        };
        let pause = pace.after(outcome.repaired, Instant::now());
        kept = outcome.error.is_none().then_some(outcome.table);
        tokio::select! {
            biased;
            () = context.stop.cancelled() => return Ok(()),
            changed = inputs.changed() => changed.context("nobody watches the remotes files any more")?,
            () = events.next() => {}
            () = tokio::time::sleep(wait) => {}
        }
        tokio::select! {
            biased;
            () = context.stop.cancelled() => return Ok(()),
            () = tokio::time::sleep_until(pause.max(Instant::now() + pace::GATHER)) => {}
        }
    }
}

fn report(context: &Context, outcome: &Outcome) {
    let board = &context.board;
    tracing::debug!(findings = outcome.findings.len(), "a look at the node");
    if let Some(why) = &outcome.changed {
        tracing::info!(
            why,
            repaired = outcome.repaired,
            connections = outcome.deleted,
            "nftables table {TABLE} is set"
        );
    }
    let mut findings = outcome.findings.clone();
    findings.extend(outcome.error.iter().map(|err| Finding::new(Id::Nftables, err.clone())));
    let faults: Vec<&str> = outcome.error.iter().chain(&outcome.sysctls).map(String::as_str).collect();
    if faults.is_empty() {
        board.well(PART);
    } else {
        board.ill(PART, faults.join("; "));
    }
    board.findings(PART, findings);
    board.facts(PART, outcome.facts.clone());
}

/// Removes what the part keeps on the node.
///
/// # Errors
/// The kernel's.
pub async fn uninstall(context: &Context) -> anyhow::Result<()> {
    let file = sysctls::file(&context.settings);
    tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        match Nft::open().and_then(|mut nft| nft.delete(TABLE)) {
            Ok(true) => tracing::info!("nftables table inet {TABLE} is removed"),
            Ok(false) => {}
            // What the kernel does not have, it does not keep either.
            Err(err) if nft::unsupported(&err) => {}
            Err(err) => return Err(err.into()),
        }
        sysctls::put_back(&file)
    })
    .await?
}

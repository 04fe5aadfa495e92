//! Part: the plugin and its entry, put on the node and kept there.
//!
//! ```text
//! platform, runtime, mode, backoff    decisions
//! write, lock, binary, listing        files
//! chain, pass                         one pass: plugin first, then configuration
//! watch                               when to look
//! ```

mod backoff;
mod binary;
mod chain;
mod claim;
mod conflict;
mod listing;
mod lock;
mod losses;
mod metrics;
mod mode;
mod pass;
pub mod platform;
mod report;
pub mod runtime;
mod watch;
mod write;

use std::{
    hash::{BuildHasher, RandomState},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use crosslink_core::{
    conflist::{self, Constraints, Paths},
    finding::Id,
};
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

use self::{
    claim::Identity,
    metrics::{FileLabel, Metrics, ModeLabel, ResultLabel},
    mode::Way,
    pass::Installer,
    platform::Dirs,
    report::{Config, Report},
    runtime::Runtime,
    watch::Watcher,
};
use crate::{
    board::{Note, Subject},
    context::Context,
    settings::{CniMode, Settings},
};

/// Name on the board.
const PART: &str = "install";

/// Everything is looked at that often even if nothing happens: overlay and bind mounts lose events.
const RESYNC: Duration = Duration::from_secs(60);

/// The same where nothing can be watched.
const POLL: Duration = Duration::from_secs(2);

/// How long the API server may take to say what the runtime is.
const NODE: Duration = Duration::from_secs(5);

/// What is to be installed, and where.
#[derive(Clone, Debug)]
pub struct Plan {
    dirs: Dirs,
    lib_dir: PathBuf,
    plugin: PathBuf,
    entry: String,
    constraints: Constraints,
    mode: CniMode,
    pin: Option<String>,
    convert: bool,
    runtime: Option<Runtime>,
}

impl Plan {
    fn new(settings: &Settings) -> anyhow::Result<(&'static str, Self)> {
        let (platform, dirs) = platform::find(&settings.platform, |path| path.is_dir()).map_err(anyhow::Error::msg)?;
        let paths = Paths {
            remotes_dir: settings.remotes_dir(),
            node_file: settings.node_file(),
            state_dir: settings.state_dir(),
        };
        let entry = conflist::entry(&settings.cni_entry, &paths).context("cniEntry")?;
        let runtime = settings.container_runtime.as_deref().map(|text| {
            Runtime::parse(text).with_context(|| {
                format!("containerRuntime {}: write it as containerd://2.1.4", crosslink_core::error::quoted(text))
            })
        });
        let constraints =
            Constraints { after: settings.cni_insert_after.clone(), before: settings.cni_insert_before.clone() };
        let plan = Self {
            dirs: Dirs {
                conf: settings.cni_conf_dir.clone().unwrap_or(dirs.conf),
                bin: settings.cni_bin_dir.clone().unwrap_or(dirs.bin),
            },
            lib_dir: settings.lib_dir.clone(),
            plugin: settings.plugin.clone(),
            entry,
            constraints,
            mode: settings.cni_mode,
            pin: settings.cni_conf_name.clone(),
            convert: settings.cni_convert_conf,
            runtime: runtime.transpose()?,
        };
        Ok((platform, plan))
    }

    fn identity(&self, plugin: String) -> Identity {
        let Constraints { after, before } = &self.constraints;
        Identity {
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            plugin,
            entry: self.entry.clone(),
            rules: format!("{:?} {:?} after {after:?} before {before:?} {}", self.mode, self.pin, self.convert),
        }
    }
}

/// Runs the part.
///
/// # Errors
/// Settings that cannot be: an unknown platform, an entry that the plugin would refuse.
pub async fn run(context: Context) -> anyhow::Result<()> {
    context.board.expect(PART);
    let metrics = Metrics::new(&context);
    let (platform, mut plan) = Plan::new(&context.settings)?;
    tracing::info!(platform, conf = %plan.dirs.conf.display(), bin = %plan.dirs.bin.display(), "directories of the CNI");
    if let Some(runtime) = plan.runtime.clone() {
        learnt(&context, &mut plan, runtime);
    }
    let needed = plan.runtime.is_none() && matches!(plan.mode, CniMode::Auto | CniMode::Dropin);
    let mut runtime = std::pin::pin!(learn_runtime(context.clone(), needed));
    let mut unknown = needed && context.client.is_some();
    let mut installer = Installer::new(plan);
    if unknown {
        // Worth a short wait, since it decides about the mode.
        tokio::select! {
            () = context.stop.cancelled() => return Ok(()),
            runtime = &mut runtime => { learnt(&context, &mut installer.plan, runtime); unknown = false; }
            () = tokio::time::sleep(NODE) => {}
        }
    }
    let mut watcher = Watcher::default();
    let mut noticed = None;
    loop {
        watcher.arm(&installer.watched());
        let since = noticed.take();
        let report;
        (installer, report) = tokio::task::spawn_blocking(move || {
            let report = installer.pass(Instant::now(), since);
            (installer, report)
        })
        .await
        .context("a pass of the installer")?;
        let pause = pause(&watcher, &report);
        publish(&context, &metrics, &installer.plan, (report, watcher.fault.clone()));
        tokio::select! {
            () = context.stop.cancelled() => return Ok(()),
            first = watcher.changed() => noticed = Some(first.into_std()),
            () = tokio::time::sleep(pause) => {}
            runtime = &mut runtime, if unknown => { learnt(&context, &mut installer.plan, runtime); unknown = false; }
        }
        if context.stop.is_cancelled() {
            return Ok(());
        }
    }
}

/// Whether `uninstall` ran on this node after a moment: then an agent that still runs keeps nothing any more.
pub fn withdrawn_since(lib_dir: &std::path::Path, moment: std::time::SystemTime) -> bool {
    claim::Claim::withdrawn_since(lib_dir, moment)
}

/// Takes the plugin out of the chain.
///
/// # Errors
/// Settings that cannot be, or everything that is still there.
pub async fn uninstall(context: &Context) -> anyhow::Result<()> {
    let (_, plan) = Plan::new(&context.settings)?;
    tokio::task::spawn_blocking(move || pass::uninstall(&plan)).await?.map_err(anyhow::Error::msg)
}

/// Asks the API server what the runtime is, until it answers. The answer never comes where nobody needs it.
async fn learn_runtime(context: Context, needed: bool) -> Runtime {
    let Some(client) = context.client.clone().filter(|_| needed) else { return std::future::pending().await };
    let nodes: kube::Api<Node> = kube::Api::all(client);
    loop {
        match tokio::time::timeout(NODE, nodes.get(&context.settings.node_name)).await {
            Ok(Ok(node)) => {
                let info = node.status.and_then(|status| status.node_info);
                let runtime = info.and_then(|info| Runtime::parse(&info.container_runtime_version));
                if let Some(runtime) = runtime {
                    return runtime;
                }
                tracing::info!("the Node does not say what the container runtime is");
            }
            Ok(Err(err)) => tracing::info!("the container runtime is not known yet: {err}"),
            Err(_) => tracing::info!("the container runtime is not known yet: the API server does not answer"),
        }
        tokio::time::sleep(RESYNC).await;
    }
}

/// Notes what the runtime is.
fn learnt(context: &Context, plan: &mut Plan, runtime: Runtime) {
    tracing::info!(%runtime, "container runtime");
    if let Some(text) = runtime.withholds_annotations() {
        context.board.note(Note { subject: Subject::Node, warning: true, reason: "UnsupportedRuntime", text });
    }
    plan.runtime = Some(runtime);
}

/// Until the next look, with a jitter of a tenth so that the nodes of a cluster do not look at once.
fn pause(watcher: &Watcher, report: &Report) -> Duration {
    let usual = if watcher.fault.is_some() { POLL } else { RESYNC };
    let jitter = u32::try_from(RandomState::new().hash_one(0) % 200).unwrap_or_default();
    let usual = usual * (900 + jitter) / 1000;
    report.retry.map_or(usual, |retry| retry.min(usual))
}

/// Tells what a pass found and did.
fn publish(context: &Context, metrics: &Metrics, plan: &Plan, (mut report, unwatched): (Report, Option<String>)) {
    if let Some(fault) = unwatched {
        metrics.watch_errors.inc();
        report.find(Id::CniWatch, fault);
    }
    count(metrics, &report);
    let board = &context.board;
    for note in std::mem::take(&mut report.notes) {
        board.note(note);
    }
    match (&report.binary_fault, &report.config) {
        (Some(fault), _) | (None, Config::Wrong(fault)) => {
            metrics.ready.set(0);
            board.ill(PART, fault);
        }
        (None, Config::Ready(_)) => {
            metrics.ready.set(1);
            board.well(PART);
        }
        (None, Config::Settling) => {}
    }
    let place = match &report.config {
        Config::Ready(place) => Some(place),
        _ => None,
    };
    if report.config != Config::Settling {
        board.facts(
            PART,
            json!({
                "mode": place.and_then(|place| place.way).map_or("none", Way::name),
                "confDir": plan.dirs.conf,
                "binDir": plan.dirs.bin,
                "file": place.map(|place| &place.file),
                "network": place.map(|place| &place.network),
                "plugins": place.map(|place| &place.plugins),
                "runtime": plan.runtime.as_ref().map(ToString::to_string),
                "passive": report.passive,
            }),
        );
    }
    board.findings(PART, report.findings);
}

fn count(metrics: &Metrics, report: &Report) {
    let failed = report.binary_fault.is_some() || matches!(report.config, Config::Wrong(_));
    if report.changed || failed {
        let result = match (&report.binary_fault, failed) {
            (Some(_), _) => "binary_failure",
            (None, true) => "config_failure",
            (None, false) => "success",
        };
        metrics.install.get_or_create(&ResultLabel { result }).inc();
    }
    metrics.backoff.set(report.backoff.as_secs_f64());
    if report.binary_mismatch {
        metrics.binary_mismatch.inc();
    }
    for file in &report.overwritten {
        metrics.overwrites.get_or_create(&FileLabel { file: file.clone() }).inc();
    }
    for lasted in &report.repaired {
        metrics.repair_seconds.observe(lasted.as_secs_f64());
    }
    match &report.config {
        Config::Settling => {}
        Config::Wrong(_) => {
            metrics.config_valid.set(0);
        }
        Config::Ready(place) => {
            metrics.config_valid.set(1);
            for way in [Way::Dropin, Way::Insert, Way::Convert] {
                let label = ModeLabel { mode: way.name() };
                metrics.config_mode.get_or_create(&label).set(i64::from(place.way == Some(way)));
            }
        }
    }
}

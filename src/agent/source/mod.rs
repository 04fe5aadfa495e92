//! Sources of remote CIDRs. Each has a file of its own in `remotes/`, a health of its own, and what it said last stays in
//! force while it cannot be read.
//!
//! ```text
//! feed, routes, directory   ask the API server, the kernel, a directory, and tell what they see
//!          |
//!        a model            what follows: clusters and findings; no I/O (cluster, submariner, kosmos, calico, …)
//!          |
//!        sink               grace period of empty lists, health
//!          |
//!        store              the file
//! ```

mod calico;
mod cluster;
mod cluster_status;
mod cluster_writer;
mod convert;
mod directory;
mod drive;
mod feed;
mod hold;
mod kernel;
mod kosmos;
mod metrics;
mod object;
mod routes;
mod sink;
mod store;
mod submariner;
mod submariner_objects;
mod submariner_source;
mod table;
mod wake;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::api::ApiResource;
use tokio::{sync::watch, task::JoinSet};

use self::{
    calico::CalicoSource,
    cluster::ClusterSource,
    directory::DirectorySource,
    kernel::KernelSource,
    kosmos::KosmosSource,
    metrics::Metrics,
    sink::{Shared, Sink},
    store::Store,
    submariner_source::SubmarinerSource,
};
use crate::{board::Board, context::Context, settings::SourceKind};

/// The name of this part.
const PART: &str = "source";

/// How long the first answers may take before it is said that they lack.
const SOON: Duration = Duration::from_secs(5);

/// A source of remote CIDRs.
trait Source {
    /// Which one.
    fn kind(&self) -> SourceKind;

    /// Tells the sink what it sees until the agent ends. What keeps it from seeing is told to the sink, too, and tried
    /// again.
    ///
    /// # Errors
    /// It cannot go on, and trying again is of no use.
    fn run(self, sink: Sink) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// Runs all sources that are in use.
///
/// # Errors
/// One of them cannot go on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    let settings = &context.settings;
    let used: Vec<SourceKind> = settings.sources.iter().copied().filter(|kind| is_used(&context, *kind)).collect();
    context.board.expect(PART);
    remove_unused(&context, &used).await;
    let metrics = Metrics::default();
    context.register(|registry| metrics.register(registry));
    let (silent, heard) = watch::channel(used.iter().copied().collect::<BTreeSet<_>>());
    let shared = Shared {
        stop: context.stop.clone(),
        inputs: crate::inputs::watch(&context),
        board: context.board.clone(),
        hold: settings.empty_hold(),
        silent,
    };
    let mut sources = JoinSet::new();
    for kind in used {
        let (store, before) = Store::open(&settings.remotes_dir(), kind);
        let sink = Sink::new(shared.clone(), kind, store, metrics.of(kind));
        start(&mut sources, &context, kind, before, sink);
    }
    drop(shared);
    sources.spawn(ready(context.board.clone(), heard));
    while let Some(ended) = sources.join_next().await {
        ended??;
    }
    context.stop.cancelled().await;
    Ok(())
}

/// Whether a source that is named in the settings has anything to read.
fn is_used(context: &Context, kind: SourceKind) -> bool {
    let settings = &context.settings;
    match kind {
        SourceKind::Static => settings.static_dir.is_some(),
        SourceKind::Kosmos => context.client.is_some() || settings.kosmos_kubeconfig.is_some(),
        SourceKind::Cluster | SourceKind::Submariner | SourceKind::Calico => context.client.is_some(),
        SourceKind::Kernel => true,
    }
}

/// What sources said that are not in use any more.
async fn remove_unused(context: &Context, used: &[SourceKind]) {
    for kind in SourceKind::ALL.into_iter().filter(|kind| !used.contains(kind)) {
        let dir = context.settings.remotes_dir();
        match tokio::task::spawn_blocking(move || Store::remove(&dir, kind)).await {
            Ok(Ok(true)) => tracing::info!(source = kind.name(), "not in use any more; its remotes file is removed"),
            Ok(Err(err)) => tracing::warn!(source = kind.name(), "not in use any more: {err}"),
            _ => {}
        }
    }
}

fn start(
    sources: &mut JoinSet<anyhow::Result<()>>,
    context: &Context,
    kind: SourceKind,
    before: Vec<crosslink_core::remotes::Told>,
    sink: Sink,
) {
    let settings = &context.settings;
    match (kind, context.client.clone()) {
        (SourceKind::Static, _) => {
            let dir = settings.static_dir.clone().unwrap_or_default();
            launch(sources, DirectorySource { dir, before }, sink);
        }
        (SourceKind::Kernel, _) => {
            launch(sources, KernelSource { protocols: settings.kernel_protocols.clone() }, sink);
        }
        (SourceKind::Kosmos, client) => {
            launch(sources, KosmosSource { kubeconfig: settings.kosmos_kubeconfig.clone(), client }, sink);
        }
        (SourceKind::Cluster, Some(client)) => launch(sources, ClusterSource { client }, sink),
        (SourceKind::Calico, Some(client)) => launch(sources, CalicoSource { client }, sink),
        (SourceKind::Submariner, Some(client)) => {
            let (namespace, hold) = (settings.submariner_namespace.clone(), settings.empty_hold());
            launch(sources, SubmarinerSource { client, namespace, hold, before }, sink);
        }
        (SourceKind::Cluster | SourceKind::Calico | SourceKind::Submariner, None) => {}
    }
}

fn launch<S: Source + Send + 'static>(sources: &mut JoinSet<anyhow::Result<()>>, source: S, sink: Sink) {
    tracing::debug!(source = source.kind().name(), "source starts");
    sources.spawn(source.run(sink));
}

/// Ready once every source has been read once, or is known to be absent. Later failures do not undo that: what the
/// sources said last stays in force.
async fn ready(board: Board, mut heard: watch::Receiver<BTreeSet<SourceKind>>) -> anyhow::Result<()> {
    let all = |silent: &BTreeSet<SourceKind>| silent.is_empty();
    drop(tokio::time::timeout(SOON, heard.wait_for(all)).await);
    loop {
        let silent: Vec<&str> = heard.borrow_and_update().iter().map(|kind| kind.name()).collect();
        if silent.is_empty() {
            board.well(PART);
            return Ok(());
        }
        board.ill(PART, format!("not read yet: {}", silent.join(", ")));
        if heard.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Runs a model with its feeds, and ends with the model.
async fn together(model: impl Future<Output = ()>, feeds: impl Future) {
    let feeds = async {
        feeds.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = model => {}
        () = feeds => {}
    }
}

fn api_resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    let api_version = format!("{group}/{version}");
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version,
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

/// A client for the API server that a kubeconfig file names. Asks nothing of the server.
///
/// # Errors
/// The file cannot be read or used.
pub async fn client_from(path: &Path) -> anyhow::Result<kube::Client> {
    let named = || format!("kubeconfig {}", PathBuf::from(path).display());
    let kubeconfig = kube::config::Kubeconfig::read_from(path).map_err(|err| anyhow::anyhow!("{}: {err}", named()))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await;
    let config = config.map_err(|err| anyhow::anyhow!("{}: {err}", named()))?;
    Ok(kube::Client::try_from(config)?)
}

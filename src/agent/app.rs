//! Wiring.

use std::{
    io::Write,
    process::ExitCode,
    sync::{Arc, Mutex},
};

use anyhow::Context as _;
use clap::Parser;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    api,
    args::{Args, Command},
    board::Board,
    context::Context,
    facts, install, logging, resync,
    settings::{Host, Kubeconfig, Settings},
    source, surface, traffic,
};

/// The whole program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            let _ = writeln!(std::io::stderr(), "crosslink-agent: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: &Args) -> anyhow::Result<()> {
    if args.command == Command::Crds {
        return print(&api::crds()?);
    }
    let settings = settings(args)?;
    match args.command {
        Command::Settings => print(&format!("{}\n", serde_json::to_string_pretty(&settings)?)),
        Command::Run => runtime()?.block_on(run(settings)),
        Command::Uninstall => {
            logging::start(settings.log_format, &settings.log_level).map_err(anyhow::Error::msg)?;
            runtime()?.block_on(uninstall(settings))
        }
        Command::Crds => Ok(()),
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("standard output")
}

fn settings(args: &Args) -> anyhow::Result<Settings> {
    let file = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("settings file {}", path.display()))?;
            Some((path.as_path(), text))
        }
        None => None,
    };
    let host = Host {
        node_name: std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()),
        host_name: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        executable: std::env::current_exe().unwrap_or_default(),
    };
    let file = file.as_ref().map(|(path, text)| (*path, text.as_str()));
    Settings::new(file, &args.given, &host).map_err(anyhow::Error::msg)
}

/// One thread for everything that waits; what blocks has threads of its own.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")
}

async fn context(settings: Settings) -> anyhow::Result<(Context, tokio::sync::mpsc::Receiver<crate::board::Note>)> {
    let client = match &settings.kubeconfig {
        Kubeconfig::None => None,
        Kubeconfig::InCluster => {
            let config = kube::Config::incluster().context(
                "kubeconfig is in-cluster, but this is no pod with a service account: give --kubeconfig FILE or none",
            )?;
            Some(kube::Client::try_from(config)?)
        }
        Kubeconfig::File(path) => Some(source::client_from(path).await?),
    };
    let (board, notes) = Board::new();
    let context = Context {
        settings: Arc::new(settings),
        board,
        stop: CancellationToken::new(),
        client,
        inputs: crate::inputs::Shared::default(),
        metrics: Arc::new(Mutex::new(prometheus_client::registry::Registry::with_prefix("crosslink"))),
    };
    Ok((context, notes))
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    logging::start(settings.log_format, &settings.log_level).map_err(anyhow::Error::msg)?;
    let effective = serde_json::to_string(&settings)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), settings = effective, "starting");
    let (context, notes) = context(settings).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut parts = JoinSet::new();
    parts.spawn(named("surface", surface::run(context.clone(), notes)));
    parts.spawn(named("install", install::run(context.clone())));
    parts.spawn(named("facts", facts::run(context.clone())));
    parts.spawn(named("source", source::run(context.clone())));
    parts.spawn(named("resync", resync::run(context.clone())));
    parts.spawn(named("traffic", traffic::run(context.clone())));
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = first_failure(&mut parts) => Err(ended),
    };
    // Nothing on the node is changed: pods keep their routes, and the next agent takes over.
    tracing::info!("stopping");
    context.stop.cancel();
    while parts.join_next().await.is_some() {}
    ended
}

async fn named(name: &'static str, part: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    part.await.context(name)
}

/// The first part that fails. Parts that have nothing to do end well, and that ends nothing else.
async fn first_failure(parts: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    loop {
        match parts.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(err))) => return err,
            Some(Err(err)) => return anyhow::Error::new(err),
            None => return std::future::pending().await,
        }
    }
}

/// Tries everything, and asks no API server: the node may be about to leave its cluster.
async fn uninstall(settings: Settings) -> anyhow::Result<()> {
    let (context, _notes) = context(Settings { kubeconfig: Kubeconfig::None, ..settings }).await?;
    let done =
        [install::uninstall(&context).await.context("install"), traffic::uninstall(&context).await.context("traffic")];
    let faults: Vec<String> = done.into_iter().filter_map(Result::err).map(|err| format!("{err:#}")).collect();
    if faults.is_empty() { Ok(()) } else { Err(anyhow::Error::msg(faults.join("\n"))) }
}

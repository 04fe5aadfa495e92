//! Part: what is shown. Probes and metrics by HTTP, status and settings by a unix socket, Kubernetes Events, the
//! `NodeConfig` object. Everything is read from the board; parts know nothing of it.

mod events;
mod live;
mod metrics;
mod node;
mod nodeconfig;
mod ready;
mod router;
mod serve;
mod socket;

use anyhow::Context as _;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::mpsc,
    task::{JoinSet, yield_now},
};

use self::{live::Heart, router::Asker, router::Router, serve::serve, socket::Socket};
use crate::{board::Note, context::Context};

/// Turns of the event loop before the first probe is answered. Parts say in their first turn what readiness waits for.
const TURNS: usize = 16;

/// Runs the part.
///
/// # Errors
/// An address cannot be listened on.
pub async fn run(context: Context, notes: mpsc::Receiver<Note>) -> anyhow::Result<()> {
    let address = context.settings.http_address;
    let tcp = TcpListener::bind(address).await.with_context(|| {
        format!(
            "httpAddress {address}: cannot listen there; if another agent or program does, stop it or give another \
             address and port"
        )
    })?;
    let (socket, unix) = Socket::bind(&context.settings.socket())?;
    let unix = UnixListener::from_std(unix)?;
    for _ in 0..TURNS {
        yield_now().await;
    }
    let heart = Heart::new();
    let router = Router::new(context.clone(), heart.clone());
    // All of them end with the set.
    let mut tasks = JoinSet::new();
    tasks.spawn(heart.clone().beat());
    tasks.spawn(heart.errands());
    tasks.spawn(router.clone().remember());
    tasks.spawn(serve(tcp, router.clone(), Asker::Network));
    tasks.spawn(serve(unix, router, Asker::Local));
    tasks.spawn(events::run(context.clone(), notes));
    tasks.spawn(nodeconfig::run(context.clone()));
    loop {
        tokio::select! {
            () = context.stop.cancelled() => break,
            // Some have nothing to do without Kubernetes, and end; what ends by a bug ends the agent.
            Some(ended) = tasks.join_next() => ended?,
        }
    }
    drop(socket);
    Ok(())
}

/// Cuts a text to at most so many bytes, between characters.
fn cut(text: &mut String, limit: usize) {
    const MORE: char = '…';
    if text.len() > limit {
        let room = limit.saturating_sub(MORE.len_utf8());
        text.truncate(text.floor_char_boundary(room));
        text.push(MORE);
    }
}

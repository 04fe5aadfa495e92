//! This node's interfaces and routes, followed.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use crosslink_core::model::NetnsState;
use crosslink_kernel::{
    Error, Kernel as _, NodeQuery, System,
    monitor::{Monitor, Topic},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::backoff::Backoff;

use super::wake::{Notifier, wake_on};

/// Changes within this time are looked at together. A BGP speaker that starts, or a node on which pods come and go,
/// changes thousands of routes.
const SETTLE: Duration = Duration::from_millis(200);

/// Longest time without a look.
const LOOK: Duration = Duration::from_secs(60);

fn observe() -> Result<NetnsState, Error> {
    System::new()?.observe_node(&NodeQuery { addresses: true, ..NodeQuery::default() })
}

async fn state() -> Result<NetnsState, String> {
    let observed = tokio::task::spawn_blocking(observe).await.map_err(|err| err.to_string())?;
    observed.map_err(|err| err.to_string())
}

struct Notifications(Monitor);

impl AsFd for Notifications {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Notifier for Notifications {
    fn drain(&mut self) -> bool {
        self.0.drain().is_ok()
    }
}

/// Tells the state of this node now, after every change of `topics`, and every so often, until nobody listens.
pub async fn follow<E>(topics: &[Topic], sender: mpsc::Sender<E>, wrap: impl Fn(Result<Arc<NetnsState>, String>) -> E) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        let monitor = Monitor::open(topics).map_err(|err| err.to_string());
        let ended = match monitor {
            Ok(monitor) => follow_one(wake_on(Notifications(monitor)), &sender, &wrap).await,
            Err(err) => Err(err),
        };
        let Err(why) = ended else { return };
        if sender.send(wrap(Err(why))).await.is_err() {
            return;
        }
        sleep(backoff.wait()).await;
    }
}

/// Until nobody listens.
async fn follow_one<E>(
    mut woken: mpsc::Receiver<()>,
    sender: &mpsc::Sender<E>,
    wrap: &impl Fn(Result<Arc<NetnsState>, String>) -> E,
) -> Result<(), String> {
    loop {
        let state = state().await?;
        if sender.send(wrap(Ok(Arc::new(state)))).await.is_err() {
            return Ok(());
        }
        if let Ok(told) = timeout(LOOK, woken.recv()).await {
            told.ok_or("notifications of the kernel ended")?;
            sleep(SETTLE).await;
            // What came meanwhile is seen by the next look.
            let _ = woken.try_recv();
        }
    }
}

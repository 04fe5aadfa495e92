//! What the kernel tells of our table and of the node's addresses.

use std::os::fd::AsFd;

use crosslink_core::traffic::TABLE;
use crosslink_kernel::nft::Monitor;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;

/// How often the thread looks whether anybody listens still, milliseconds.
const LOOK: u16 = 30_000;

/// Both subscriptions; each may be missing.
pub struct Events {
    changes: mpsc::Receiver<()>,
    sees_table: bool,
}

impl Events {
    /// Subscribes, and has a thread of its own wait.
    pub fn open() -> Self {
        let table = subscribe(Monitor::table(TABLE));
        let sees_table = table.is_some();
        let mut monitors: Vec<Monitor> = table.into_iter().chain(subscribe(Monitor::addresses())).collect();
        // One that waits says it all.
        let (sender, changes) = mpsc::channel(1);
        std::thread::spawn(move || {
            while !sender.is_closed() && !monitors.is_empty() {
                if wait(&mut monitors) {
                    let _ = sender.try_send(());
                }
            }
        });
        Self { changes, sees_table }
    }

    /// Whether changes of the table are told.
    pub const fn sees_table(&self) -> bool {
        self.sees_table
    }

    /// Waits for a change.
    pub async fn next(&mut self) {
        if self.changes.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

fn subscribe<E: std::fmt::Display>(monitor: Result<Monitor, E>) -> Option<Monitor> {
    monitor.inspect_err(|err| tracing::warn!("{err}; the table is looked at now and then instead")).ok()
}

/// Waits for any of them, or a while; returns whether there is something to look at. One that fails is dropped.
fn wait(monitors: &mut Vec<Monitor>) -> bool {
    let mut fds: Vec<PollFd<'_>> =
        monitors.iter().map(|monitor| PollFd::new(monitor.as_fd(), PollFlags::POLLIN)).collect();
    let _ = poll(&mut fds, PollTimeout::from(LOOK));
    let mut changed = false;
    monitors.retain_mut(|monitor| match monitor.take() {
        Ok(relevant) => {
            changed |= relevant;
            true
        }
        Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => true,
        Err(err) => {
            tracing::warn!("notifications: {err}");
            false
        }
    });
    changed
}

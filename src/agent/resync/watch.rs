//! Threads that wait for the kernel and tell the part.

use std::{ffi::OsStr, time::Duration};

use crosslink_core::{
    finding::{Finding, Id},
    record,
};
use crosslink_kernel::notify::{Changed, Listener};
use tokio::sync::mpsc::Sender;

use crate::{
    context::Context,
    dirs::{Dirs, Seen},
};

use super::{Event, pass::Key};

/// Longest time without a look at the directories.
const LOOK: Duration = Duration::from_secs(30);

/// Wait before listening anew after the kernel has refused.
const AGAIN: Duration = Duration::from_secs(5);

/// Starts the threads. They end with the process: what they wait for cannot be interrupted, and they change nothing.
pub fn start(context: &Context, sender: &Sender<Event>) {
    let dirs = vec![context.settings.state_dir(), context.settings.netns_dir.clone()];
    let watcher = Dirs::new(dirs);
    let to = sender.clone();
    std::thread::spawn(move || directories(watcher, &to));
    match Listener::open() {
        Ok(listener) => {
            let to = sender.clone();
            let _ = std::thread::spawn(move || sandboxes(listener, &to));
        }
        Err(err) => {
            let period = context.settings.resync_interval_seconds;
            let text =
                format!("{err}: what is lost in a running pod is put back every {period} s only; add NET_BROADCAST");
            context.board.findings("resync/notifications", vec![Finding::new(Id::Resync, text)]);
        }
    }
}

fn directories(mut dirs: Dirs, sender: &Sender<Event>) {
    const RECORDS: usize = 0;
    loop {
        for seen in dirs.wait(LOOK) {
            let event = match seen {
                Seen::Name { dir: RECORDS, name, gone: false } => match key(&name) {
                    Some(key) => Event::Record(key),
                    None => continue,
                },
                // DEL removes records by itself, and hidden files are being written.
                Seen::Name { dir: RECORDS, .. } | Seen::Name { gone: false, .. } => continue,
                Seen::Name { .. } | Seen::All => Event::All,
            };
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    }
}

fn key(name: &OsStr) -> Option<Key> {
    let (container_id, ifname) = record::parse_file_name(name.to_str()?)?;
    Some(Key { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
}

fn sandboxes(mut listener: Listener, sender: &Sender<Event>) {
    loop {
        let changed = match listener.wait() {
            Ok(changed) => changed,
            Err(err) => {
                tracing::error!("{err}; listening anew");
                listener = loop {
                    std::thread::sleep(AGAIN);
                    match Listener::open() {
                        Ok(listener) => break listener,
                        Err(err) => tracing::error!("{err}"),
                    }
                };
                // Whatever happened meanwhile.
                Changed::Lost
            }
        };
        if sender.blocking_send(Event::Kernel(changed)).is_err() {
            return;
        }
    }
}

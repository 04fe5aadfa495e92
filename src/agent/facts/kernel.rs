//! Node addresses, following the kernel, on a thread of its own.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use crosslink_core::node::addresses_from_kernel;
use crosslink_kernel::{
    Error, Kernel as _, NodeQuery, System,
    monitor::{Monitor, Seen, Topic},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::watch;

use super::decide::Addresses;

/// Shortest time between two looks at the kernel. Addresses come in bursts, when a link comes up or DHCP renews.
const PACE: Duration = Duration::from_millis(500);

/// The same where only routes changed: those matter through the default route alone, and with BGP they change all the
/// time. At least so long, and so many times what a look takes, since each reads all of them.
const ROUTES_PACE: (Duration, u32) = (Duration::from_secs(2), 50);

/// Longest wait for a notification, so that the thread notices that nobody listens any more.
const WAIT: Duration = Duration::from_secs(60);

/// What the thread says: the addresses, or why they cannot be read. None before the first look.
pub type Word = Option<Result<Addresses, Error>>;

/// Wait after the kernel could not be asked: its tables may change faster than they can be read.
const AGAIN: Duration = Duration::from_secs(2);

/// Starts the thread. Its first word, and every change, comes out of the receiver, and what keeps it from looking.
///
/// # Errors
/// No thread can be had.
pub fn follow() -> std::io::Result<watch::Receiver<Word>> {
    let (sink, receiver) = watch::channel(None);
    let work = move || {
        while let Err(err) = work(&sink) {
            sink.send_replace(Some(Err(err)));
            std::thread::sleep(AGAIN);
        }
    };
    std::thread::Builder::new().name("addresses".to_owned()).spawn(work)?;
    Ok(receiver)
}

fn work(sink: &watch::Sender<Word>) -> Result<(), Error> {
    // Before the first look, so that nothing that comes after it is missed.
    let mut monitor = Monitor::open(&[Topic::Links, Topic::Addresses, Topic::Routes])?;
    let mut due = Some(Instant::now());
    let (mut looked, mut took) = (Instant::now(), Duration::ZERO);
    while !sink.is_closed() {
        if due.is_some_and(|due| due <= Instant::now()) {
            looked = Instant::now();
            let now = look()?;
            took = looked.elapsed();
            due = None;
            sink.send_if_modified(|word| {
                let changed = !matches!(word, Some(Ok(before)) if *before == now);
                *word = Some(Ok(now));
                changed
            });
        }
        let wait = due.map_or(WAIT, |due| due.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        // Interrupted, or time is up: there is nothing to read then.
        let _ = poll(
            &mut [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)],
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX),
        );
        if let Some(pace) = pace(&monitor.drain()?, took) {
            due = Some(due.map_or(looked + pace, |due| due.min(looked + pace)));
        }
    }
    Ok(())
}

/// How long after the last look to look again; none where nothing was seen.
fn pace(seen: &Seen, took: Duration) -> Option<Duration> {
    if seen.links || seen.addresses || seen.lost {
        return Some(PACE);
    }
    (!seen.routes.is_empty()).then(|| ROUTES_PACE.0.max(took * ROUTES_PACE.1))
}

fn look() -> Result<Addresses, Error> {
    let state = System::new()?.observe_node(&NodeQuery { addresses: true, ..NodeQuery::default() })?;
    let (list, total) = addresses_from_kernel(&state);
    Ok(Addresses { list, total })
}

//! Watching directories. Every event means "look again", whatever it is; losing events is as good as having them.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::time::Instant;

/// How long it must be quiet before a change is looked at.
const QUIET: Duration = Duration::from_millis(100);

/// How long a change is looked away from at most.
const PATIENCE: Duration = Duration::from_millis(250);

/// Room for many events; one with a name of 255 bytes needs 272 (inotify(7)).
const BUFFER: usize = 4096;

/// A directory, and the only name of interest in it, if there is just one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// The directory. Where it is missing, its nearest parent is watched.
    pub dir: PathBuf,
    /// The name.
    pub only: Option<OsString>,
}

/// Watches directories.
#[derive(Debug, Default)]
pub struct Watcher {
    inotify: Option<EventStream<[u8; BUFFER]>>,
    watches: Vec<(WatchDescriptor, Option<OsString>)>,
    /// What cannot be watched, if something cannot.
    pub fault: Option<String>,
}

impl Watcher {
    /// Watches these directories and no others. To be called again before each look, so that one that was made anew is
    /// watched again.
    pub fn arm(&mut self, wanted: &[Watched]) {
        match self.try_arm(wanted) {
            Ok(()) => self.fault = None,
            Err(err) => {
                let dirs: Vec<_> = wanted.iter().map(|watched| watched.dir.display().to_string()).collect();
                self.fault = Some(format!("{}: {err}", dirs.join(", ")));
            }
        }
    }

    fn try_arm(&mut self, wanted: &[Watched]) -> io::Result<()> {
        if self.inotify.is_none() {
            self.watches.clear();
            self.inotify = Some(Inotify::init()?.into_event_stream([0; BUFFER])?);
        }
        let Some(inotify) = &self.inotify else { return Ok(()) };
        let mut watches = inotify.watches();
        let mut now = Vec::new();
        for Watched { dir, only } in wanted {
            if let Some(wd) = add(&mut watches, dir)? {
                now.push((wd, only.clone()));
                continue;
            }
            let parent = dir.ancestors().skip(1).find_map(|parent| add(&mut watches, parent).transpose());
            now.extend(parent.transpose()?.map(|wd| (wd, None)));
            // It may have been made before its parent was watched.
            now.extend(add(&mut watches, dir)?.map(|wd| (wd, only.clone())));
        }
        for (old, _) in self.watches.drain(..) {
            if now.iter().all(|(wd, _)| *wd != old) {
                // One whose directory is gone is gone already.
                let _ = watches.remove(old);
            }
        }
        self.watches = now;
        Ok(())
    }

    /// Waits for something of interest, then until it is quiet; says when it came. Never comes back where nothing can be
    /// watched.
    pub async fn changed(&mut self) -> Instant {
        self.event().await;
        let first = Instant::now();
        let end = first + PATIENCE;
        loop {
            let quiet = (Instant::now() + QUIET).min(end);
            if tokio::time::timeout_at(quiet, self.event()).await.is_err() {
                return first;
            }
        }
    }

    /// The next event of interest.
    async fn event(&mut self) {
        loop {
            let Some(inotify) = &mut self.inotify else { return std::future::pending().await };
            let event = match inotify.next().await {
                Some(Ok(event)) => event,
                Some(Err(err)) => return self.blind(&err.to_string()),
                None => return self.blind("no more events"),
            };
            let mut watches = self.watches.iter().filter(|(wd, _)| *wd == event.wd).peekable();
            // A descriptor that is not known is that of a directory that is gone, or of an overflow.
            let about_all = watches.peek().is_none() || event.name.is_none();
            if about_all || watches.any(|(_, only)| only.is_none() || *only == event.name) {
                return;
            }
        }
    }

    /// Starts anew with the next look.
    fn blind(&mut self, why: &str) {
        tracing::warn!("inotify: {why}");
        self.inotify = None;
    }
}

/// Everything that may mean another content. A rename into place is only `MOVED_TO`, a truncation only `MODIFY`.
fn mask() -> WatchMask {
    WatchMask::CREATE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::MODIFY
        | WatchMask::CLOSE_WRITE
        | WatchMask::DELETE
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

/// Watches a directory, if there is one.
fn add(watches: &mut Watches, dir: &Path) -> io::Result<Option<WatchDescriptor>> {
    match watches.add(dir, mask()) {
        Ok(wd) => Ok(Some(wd)),
        Err(err) if matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(err) => Err(err),
    }
}

//! Notifications of what happens in a few directories, which may not exist yet or be made anew.

use std::{
    ffi::{OsStr, OsString},
    io::ErrorKind,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Something about one file: it was written, moved, removed, or given another mode or owner.
    Name {
        /// Place of the directory in the list.
        dir: usize,
        /// The file's name.
        name: OsString,
        /// Whether it is gone.
        gone: bool,
    },
    /// A directory came or went, or notifications were lost: look at everything.
    All,
}

/// The directories.
#[derive(Debug)]
pub struct Dirs {
    dirs: Vec<PathBuf>,
    watches: Vec<Option<WatchDescriptor>>,
    inotify: Option<Inotify>,
}

impl Dirs {
    /// Watches directories, and their parents, so that one that is made later is found. Without notifications (their number
    /// is limited for each user) [`Dirs::wait`] only waits.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        let inotify = Inotify::init()
            .inspect_err(|err| tracing::warn!("inotify: {err}: directories are looked at now and then instead"))
            .ok();
        let watches = dirs.iter().map(|_| None).collect();
        let mut watcher = Self { dirs, watches, inotify };
        watcher.add();
        watcher
    }

    /// Adding a watch again is harmless, and needed where a directory was made anew.
    fn add(&mut self) {
        // ATTRIB: a file may become trusted, or stop being so. CREATE matters for directories alone: what is in a file comes
        // after it.
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVE
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::CREATE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let Some(inotify) = &mut self.inotify else { return };
        for (dir, watch) in self.dirs.iter().zip(&mut self.watches) {
            if let Some(parent) = dir.parent() {
                let _ = inotify.watches().add(parent, WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::MASK_ADD);
            }
            *watch = match inotify.watches().add(dir, mask | WatchMask::MASK_ADD) {
                Ok(watch) => Some(watch),
                Err(err) if err.kind() == ErrorKind::NotFound => None,
                Err(err) => {
                    tracing::warn!("watch {}: {err}: it is looked at now and then instead", dir.display());
                    None
                }
            };
        }
    }

    /// Whether changes are told at once.
    pub const fn sees(&self) -> bool {
        self.inotify.is_some()
    }

    /// Waits for something to happen and returns all that has happened; nothing where `longest` has passed.
    pub fn wait(&mut self, longest: Duration) -> Vec<Seen> {
        let deadline = Instant::now() + longest;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(inotify) = &mut self.inotify else {
                std::thread::sleep(left);
                return Vec::new();
            };
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout).is_ok_and(|ready| ready == 0) {
                self.add();
                return Vec::new();
            }
            let seen = self.take();
            if seen.contains(&Seen::All) {
                self.add();
            }
            if !seen.is_empty() {
                return seen;
            }
        }
    }

    fn take(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        let Some(inotify) = &mut self.inotify else { return seen };
        let is_listed = |name: &OsStr| self.dirs.iter().any(|dir| dir.file_name() == Some(name));
        let mut buffer = [0; 8192];
        // WouldBlock, when all is read.
        while let Ok(events) = inotify.read_events(&mut buffer) {
            for event in events {
                let dir = self.watches.iter().position(|watch| watch.as_ref() == Some(&event.wd));
                let mask = event.mask;
                let own_end = mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED);
                let what = match (dir, event.name) {
                    _ if mask.contains(EventMask::Q_OVERFLOW) || own_end => Seen::All,
                    (_, Some(name)) if mask.contains(EventMask::ISDIR) && is_listed(name) => Seen::All,
                    // In a parent, or about a directory as a whole.
                    (None, _) | (_, None) => continue,
                    (Some(_), Some(_)) if mask == EventMask::CREATE => continue,
                    (Some(dir), Some(name)) => {
                        let gone = mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM);
                        Seen::Name { dir, name: name.to_owned(), gone }
                    }
                };
                if !seen.contains(&what) {
                    seen.push(what);
                }
            }
        }
        seen
    }
}

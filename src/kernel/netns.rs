//! Network namespaces: opening, identity, lock, entry.

use std::{
    fs::File,
    io::Read,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use crosslink_core::record::NetnsId;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sched::{CloneFlags, setns},
    sys::statfs::{FsType, fstatfs},
};

use crate::{error::Error, socket::Socket, sys};

/// `NSFS_MAGIC` (linux/magic.h).
const NSFS: FsType = FsType(0x6e73_6673);

/// Bits of linux/capability.h with their names.
const NEEDED: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

/// An open network namespace that is not the node's own.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Opens a sandbox by path.
    ///
    /// # Errors
    /// [`Error::is_gone`] tells whether there is no such sandbox.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // A fifo in place of the namespace must not make us wait for its writer.
        let file = open_nonblocking(path).map_err(|err| Error::file("open sandbox", path, &err))?;
        let is_nsfs = fstatfs(&file).is_ok_and(|stat| stat.filesystem_type() == NSFS);
        if !is_nsfs {
            return Err(Error::NotNetns(path.to_owned()));
        }
        let netns = Self { file, path: path.to_owned() };
        let own = std::fs::metadata("/proc/thread-self/ns/net")
            .map_err(|err| Error::file("read", "/proc/thread-self/ns/net", &err))?;
        let (dev, inode) = netns.inode()?;
        if (dev, inode) == (own.dev(), own.ino()) {
            return Err(Error::OwnNetns(path.to_owned()));
        }
        Ok(netns)
    }

    fn inode(&self) -> Result<(u64, u64), Error> {
        let meta = self.file.metadata().map_err(|err| Error::file("read", &self.path, &err))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The file, for `IFLA_NET_NS_FD`.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Moves the calling thread into the sandbox, for good.
    ///
    /// # Errors
    /// Where it is no *network* namespace, or the kernel refuses.
    pub fn enter(&self) -> Result<(), Error> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
            Errno::EINVAL => Error::NotNetns(self.path.clone()),
            errno => Error::File { what: "enter sandbox", path: self.path.clone(), errno },
        })
    }

    /// The identity, read by a socket that was opened inside.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn identity(&self, inside: &Socket) -> Result<NetnsId, Error> {
        let (dev, inode) = self.inode()?;
        Ok(NetnsId { path: self.path.clone(), dev, inode, cookie: inside.cookie() })
    }

    /// Locks the sandbox against other plugin calls and the agent. The lock is of the inode, so every path to it
    /// counts, and it goes with the process.
    ///
    /// # Errors
    /// [`Error::Locked`] after `wait`.
    pub fn lock(&self, wait: Duration) -> Result<Flock<File>, Error> {
        let refused = |errno: Errno| Error::File { what: "lock sandbox", path: self.path.clone(), errno };
        let clone = || self.file.try_clone().map_err(|err| Error::file("lock sandbox", &self.path, &err));
        match Flock::lock(clone()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            // Nobody is left waiting: a process in the sandbox may hold the lock as long as it likes.
            Err((_, Errno::EWOULDBLOCK)) if wait.is_zero() => {
                return Err(Error::Locked { path: self.path.clone(), seconds: 0 });
            }
            Err((_, Errno::EWOULDBLOCK)) => {}
            Err((_, errno)) => return Err(refused(errno)),
        }
        // flock(2) has no time limit. The lock belongs to the open file, so a thread can wait for it in our stead; if
        // it comes too late, the thread drops it.
        let (file, (sender, receiver)) = (clone()?, mpsc::channel());
        let waiter = std::thread::Builder::new().spawn(move || {
            let _ = sender.send(Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno));
        });
        waiter.map_err(|err| Error::file("lock sandbox", &self.path, &err))?;
        match receiver.recv_timeout(wait) {
            Ok(lock) => lock.map_err(refused),
            Err(_) => Err(Error::Locked { path: self.path.clone(), seconds: wait.as_secs() }),
        }
    }
}

fn open_nonblocking(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// The identity of the sandbox at a path, without the calling thread entering it; none where there is none.
pub fn identify(path: &Path) -> Option<NetnsId> {
    let netns = Netns::open(path).ok()?;
    let thread = std::thread::Builder::new().spawn(move || {
        netns.enter().ok()?;
        netns.identity(&Socket::open().ok()?).ok()
    });
    thread.ok()?.join().ok()?
}

/// Fails early, by name, where a capability is missing that a change would need.
///
/// # Errors
/// [`Error::Capability`].
pub fn require_capabilities() -> Result<(), Error> {
    let have = sys::effective_capabilities();
    match NEEDED.iter().find(|(bit, _)| have & (1 << bit) == 0) {
        Some((_, name)) => Err(Error::Capability(name)),
        None => Ok(()),
    }
}

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// The system's, or `EFBIG`.
pub(crate) fn read_limited(file: &File, limit: u64) -> std::io::Result<Vec<u8>> {
    // One byte more than there is, so that the end is seen without growing. /proc says 0.
    let size = file.metadata().map_or(0, |meta| meta.len()).min(limit);
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default() + 64);
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(std::io::Error::from_raw_os_error(libc::EFBIG));
    }
    Ok(bytes)
}

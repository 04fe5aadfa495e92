//! Typed failures: the errno stays an errno until one function turns it into a CNI code.

use std::path::PathBuf;

use crosslink_core::error::{Code, Error as CniError};
use nix::errno::Errno;

/// What went wrong at the kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A netlink request was refused.
    #[error("{what}: {errno}{}", cure(*errno))]
    Netlink {
        /// The request, in words.
        what: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The kernel's answer was not understood.
    #[error("{what}: unexpected answer from the kernel: {why}")]
    Protocol {
        /// The request, in words.
        what: String,
        /// What was odd.
        why: String,
    },
    /// A dump was interrupted by changes again and again, or answers were lost.
    #[error("{what}: the kernel's state changes faster than it can be read; try again")]
    Busy {
        /// The request, in words.
        what: String,
    },
    /// A file could not be used.
    #[error("{what} {}: {errno}{}", path.display(), cure(*errno))]
    File {
        /// The action, in words.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        errno: Errno,
    },
    /// The path is not a network namespace.
    #[error("{} is not a network namespace", .0.display())]
    NotNetns(PathBuf),
    /// The path is the node's own network namespace.
    #[error("{} is this node's own network namespace, not a sandbox", .0.display())]
    OwnNetns(PathBuf),
    /// Somebody else holds the sandbox's lock.
    #[error("sandbox {} is locked by another process for {seconds} s: the crosslink agent or another plugin call works on it", path.display())]
    Locked {
        /// The sandbox.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// A capability is missing.
    #[error("capability {0} is missing: run the container runtime as root with all capabilities")]
    Capability(&'static str),
    /// A request for the pod's side before [`crate::Kernel::enter`].
    #[error("no sandbox was entered")]
    NoSandbox,
}

const fn cure(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => " (the plugin needs CAP_NET_ADMIN and CAP_SYS_ADMIN)",
        Errno::ENOSPC => " (free some space)",
        Errno::EROFS => " (the file system must be writable)",
        Errno::EMFILE | Errno::ENFILE => " (raise the limit of open files)",
        _ => "",
    }
}

impl Error {
    /// Errno from an I/O error.
    pub fn errno_of(err: &std::io::Error) -> Errno {
        err.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
    }

    /// A file error.
    pub fn file(what: &'static str, path: impl Into<PathBuf>, err: &std::io::Error) -> Self {
        Self::File { what, path: path.into(), errno: Self::errno_of(err) }
    }

    /// The kernel's answer, where there was one.
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Netlink { errno, .. } | Self::File { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the sandbox that was named is simply not there (any more).
    pub fn is_gone(&self) -> bool {
        match self {
            Self::NotNetns(_) | Self::OwnNetns(_) => true,
            Self::File { errno, .. } => {
                matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ESRCH | Errno::ELOOP | Errno::ENAMETOOLONG)
            }
            Self::Netlink { .. }
            | Self::Protocol { .. }
            | Self::Busy { .. }
            | Self::Locked { .. }
            | Self::Capability(_)
            | Self::NoSandbox => false,
        }
    }
}

impl From<Error> for CniError {
    fn from(err: Error) -> Self {
        let code = match &err {
            Error::Busy { .. } | Error::Locked { .. } => Code::TryAgain,
            Error::NotNetns(_) | Error::OwnNetns(_) => Code::Environment,
            Error::File { what: "open sandbox", .. } => Code::Environment,
            Error::Netlink { .. } | Error::File { .. } | Error::Capability(_) => Code::Io,
            Error::Protocol { .. } | Error::NoSandbox => Code::Internal,
        };
        let msg = match code {
            Code::Environment => {
                format!("CNI_NETNS: {err}: the runtime must give the path of the pod's network namespace")
            }
            _ => err.to_string(),
        };
        Self::new(code, msg)
    }
}

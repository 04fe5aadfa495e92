//! Notifications of rtnetlink: that something changed, not what it is now. Who is told looks again.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_packet_core::NetlinkBuffer;
use netlink_sys::{SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

use crate::error::Error;

/// Notifications are single messages; the largest is that of a link with many virtual functions.
const RECEIVE: usize = 32 * 1024;

/// What can be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Interfaces: made, removed, renamed, up, down, MTU.
    Links,
    /// Addresses of both families.
    Addresses,
    /// Routes of both families in all tables.
    Routes,
}

impl Topic {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Links, Self::Addresses, Self::Routes];

    /// Multicast groups (`RTNLGRP_*`, linux/rtnetlink.h).
    const fn groups(self) -> &'static [u32] {
        match self {
            Self::Links => &[1],
            Self::Addresses => &[5, 9],
            Self::Routes => &[7, 11],
        }
    }
}

/// What was seen since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// An interface changed.
    pub links: bool,
    /// An address changed.
    pub addresses: bool,
    /// Protocols of the routes that changed (`rtm_protocol`).
    pub routes: BTreeSet<u8>,
    /// The kernel dropped notifications: anything may have changed.
    pub lost: bool,
}

impl Seen {
    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn note(&mut self, kind: u16, payload: &[u8]) {
        match kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => self.links = true,
            libc::RTM_NEWADDR | libc::RTM_DELADDR => self.addresses = true,
            // `struct rtmsg`: family, dst_len, src_len, tos, table, protocol.
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => self.routes.extend(payload.get(5)),
            _ => {}
        }
    }
}

/// A subscription in the network namespace of the thread that opened it. To wait for it, poll its descriptor for
/// reading (`poll(2)`, or tokio's `AsyncFd`); nothing here blocks.
pub struct Monitor {
    inner: netlink_sys::Socket,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("fd", &self.inner.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Monitor {
    /// Subscribes.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn open(topics: &[Topic]) -> Result<Self, Error> {
        let refused = |err: std::io::Error| Error::Netlink {
            what: "subscribe to netlink notifications".into(),
            errno: Error::errno_of(&err),
        };
        let mut inner = netlink_sys::Socket::new(NETLINK_ROUTE).map_err(refused)?;
        inner.bind(&SocketAddr::new(0, 0)).map_err(refused)?;
        inner.set_non_blocking(true).map_err(refused)?;
        for group in topics.iter().flat_map(|topic| topic.groups()) {
            inner.add_membership(*group).map_err(refused)?;
        }
        Ok(Self { inner, buffer: Vec::with_capacity(RECEIVE) })
    }

    /// Takes everything that waits, without waiting for more.
    ///
    /// # Errors
    /// The socket failed; open another.
    pub fn drain(&mut self) -> Result<Seen, Error> {
        let mut seen = Seen::default();
        loop {
            self.buffer.clear();
            match self.inner.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => self.scan(&mut seen),
                Err(err) => match Error::errno_of(&err) {
                    Errno::EAGAIN => return Ok(seen),
                    Errno::EINTR => {}
                    Errno::ENOBUFS => seen.lost = true,
                    errno => return Err(Error::Netlink { what: "read netlink notifications".into(), errno }),
                },
            }
        }
    }

    fn scan(&self, seen: &mut Seen) {
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else {
                seen.lost = true;
                return;
            };
            seen.note(message.message_type(), message.payload());
            let length = usize::try_from(message.length()).unwrap_or(rest.len()).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        crate::sys::borrow(self.inner.as_raw_fd())
    }
}

//! Notifications, for whoever waits on a descriptor.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_packet_core::NetlinkBuffer;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};

use super::{
    attr::text,
    encode::{self, kinds},
};
use crate::error::Error;

/// Largest datagram of notifications (`NLMSG_GOODSIZE` for nf_tables, less elsewhere).
const DATAGRAM: usize = 32 * 1024;

/// `ifa_scope` of `struct ifaddrmsg` (linux/if_addr.h), and `RT_SCOPE_UNIVERSE`.
const SCOPE: usize = 3;
const UNIVERSE: u8 = 0;

/// What is watched.
#[derive(Clone, Debug)]
enum Topic {
    /// Everything about one nf_tables table of family `inet`.
    Table(String),
    /// Global addresses of the node.
    Addresses,
}

/// A socket that receives notifications. It never blocks, and stays in the network namespace in which it was opened.
pub struct Monitor {
    socket: Socket,
    topic: Topic,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("topic", &self.topic).finish_non_exhaustive()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        crate::sys::borrow(self.socket.as_raw_fd())
    }
}

impl Monitor {
    /// Watches the table `inet name`, whether or not it is there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn table(name: &str) -> Result<Self, Error> {
        let group = u32::try_from(libc::NFNLGRP_NFTABLES).unwrap_or_default();
        Self::open(NETLINK_NETFILTER, &[group], Topic::Table(name.to_owned()))
    }

    /// Watches the node's global addresses.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn addresses() -> Result<Self, Error> {
        let groups = [libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR];
        Self::open(NETLINK_ROUTE, &groups, Topic::Addresses)
    }

    fn open(protocol: isize, groups: &[u32], topic: Topic) -> Result<Self, Error> {
        let refused = |err: io::Error| Error::Netlink {
            what: "subscribe to the kernel's notifications".into(),
            errno: Error::errno_of(&err),
        };
        let mut socket = Socket::new(protocol).map_err(refused)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(refused)?;
        socket.set_non_blocking(true).map_err(refused)?;
        for group in groups {
            socket.add_membership(*group).map_err(refused)?;
        }
        Ok(Self { socket, topic, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Takes all that waits; returns whether any of it is about what is watched. Where notifications were lost, that
    /// may be so.
    ///
    /// # Errors
    /// The socket's; [`io::ErrorKind::WouldBlock`] where nothing waits.
    pub fn take(&mut self) -> io::Result<bool> {
        let (mut any, mut relevant) = (false, false);
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => relevant = relevant || self.is_relevant(),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock && any => return Ok(relevant),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) if err.raw_os_error() == Some(libc::ENOBUFS) => relevant = true,
                Err(err) => return Err(err),
            }
            any = true;
        }
    }

    /// Whether any message of the last datagram is.
    fn is_relevant(&self) -> bool {
        let mut rest = self.buffer.as_slice();
        while let Ok(message) = NetlinkBuffer::new_checked(rest) {
            if self.concerns(message.message_type(), message.payload()) {
                return true;
            }
            let length = usize::try_from(message.length()).unwrap_or(rest.len()).max(16).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
        false
    }

    fn concerns(&self, kind: u16, payload: &[u8]) -> bool {
        match &self.topic {
            Topic::Addresses => payload.get(SCOPE) == Some(&UNIVERSE),
            Topic::Table(name) => {
                // The end of every transaction of anybody.
                let generation = kind == encode::kind(libc::NFT_MSG_NEWGEN);
                let inet = payload.first().copied().map(libc::c_int::from) == Some(libc::NFPROTO_INET);
                let attributes = payload.get(4..).unwrap_or_default();
                !generation && inet && text(attributes, kinds::TABLE) == Some(name)
            }
        }
    }
}

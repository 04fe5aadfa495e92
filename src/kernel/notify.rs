//! Notifications of what changes in the node's network namespace and in every sandbox, by one socket.
//!
//! `NETLINK_LISTEN_ALL_NSID` (Linux 4.2) also delivers the notifications of namespaces that have a number in ours. Unlike a
//! socket in each sandbox it keeps none of them alive: a deleted sandbox must go at once, with its addresses.

use std::{io::IoSliceMut, net::IpAddr, os::fd::AsRawFd};

use crosslink_core::numbers::{PROTOCOL, RULE_PODS, TABLE_MAIN, TABLE_PODS, VethNames};
use netlink_packet_core::NetlinkBuffer;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};

use crate::{decode, error::Error, socket::Received};

/// `RTNLGRP_LINK`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, `_IPV6_RULE`
/// (linux/rtnetlink.h). Not neighbours: every pod's ARP would wake us, and ours go only with their link.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// Bytes that may wait: bursts of pods that start together.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;

/// Largest datagram of notifications; the kernel sends one message in each.
const DATAGRAM: usize = 32 * 1024;

/// `SOL_NETLINK` and `NETLINK_LISTEN_ALL_NSID` (linux/netlink.h): level and type of the control message.
const NSID_MESSAGE: (libc::c_int, libc::c_int) = (270, 8);

/// Where something changed that is, or may be, ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// A rule of ours on the node.
    Rules,
    /// The node's end of an attachment's veth, by name.
    Link(String),
    /// The node's route to an underlay pod, by the pod's address.
    Host(IpAddr),
    /// In the sandbox of this number (see [`crate::System::number`]).
    Sandbox(u32),
    /// Notifications were lost: anything may have changed.
    Lost,
}

/// The socket.
pub struct Listener {
    inner: Socket,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("fd", &self.inner.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Listener {
    /// Listens from the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's refusal; `EPERM` where `CAP_NET_BROADCAST` is missing.
    pub fn open() -> Result<Self, Error> {
        let refused = |err: std::io::Error| Error::Netlink {
            what: "listen to the network namespaces of all sandboxes".into(),
            errno: Error::errno_of(&err),
        };
        let mut inner = Socket::new(NETLINK_ROUTE).map_err(refused)?;
        inner.bind(&SocketAddr::new(0, 0)).map_err(refused)?;
        inner.set_listen_all_namespaces(true).map_err(refused)?;
        // Halved by net.core.rmem_max where that is less; a loss is noticed and mended.
        inner.set_rx_buf_sz(libc::c_int::try_from(RECEIVE_BUFFER).unwrap_or(libc::c_int::MAX)).map_err(refused)?;
        for group in GROUPS {
            inner.add_membership(group).map_err(refused)?;
        }
        Ok(Self { inner, buffer: vec![0; DATAGRAM] })
    }

    /// Waits for the next change that matters.
    ///
    /// # Errors
    /// The kernel's; the socket is of no more use then.
    pub fn wait(&mut self) -> Result<Changed, Error> {
        loop {
            match self.receive() {
                Ok(Some(changed)) => return Ok(changed),
                Ok(None) | Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => return Ok(Changed::Lost),
                Err(errno) => return Err(Error::Netlink { what: "receive notifications".into(), errno }),
            }
        }
    }

    fn receive(&mut self) -> Result<Option<Changed>, Errno> {
        let mut control = nix::cmsg_space!(libc::c_int);
        let fd = self.inner.as_raw_fd();
        let mut parts = [IoSliceMut::new(&mut self.buffer)];
        let received = recvmsg::<()>(fd, &mut parts, Some(&mut control), MsgFlags::empty())?;
        let sandbox = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Unknown(other)
                if (other.cmsg_header.cmsg_level, other.cmsg_header.cmsg_type) == NSID_MESSAGE =>
            {
                Some(u32::from_ne_bytes(other.data_bytes.get(..4)?.try_into().ok()?))
            }
            _ => None,
        });
        let length = received.bytes;
        let bytes = self.buffer.get(..length).unwrap_or_default();
        let Ok(message) = NetlinkBuffer::new_checked(bytes) else { return Ok(None) };
        let seen = Received { kind: message.message_type(), payload: message.payload() };
        Ok(match sandbox {
            None => on_node(seen),
            Some(number) => concerns_pod(seen).then_some(Changed::Sandbox(number)),
        })
    }
}

fn table_and_protocol(seen: Received<'_>) -> Option<(u32, u8)> {
    decode::route(seen, &|_| String::new()).map(|route| (route.route.table, route.protocol))
}

/// In a sandbox nearly everything but our own additions may change what is wanted or undo what was done.
fn concerns_pod(seen: Received<'_>) -> bool {
    match seen.kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK | libc::RTM_NEWADDR | libc::RTM_DELADDR => true,
        libc::RTM_DELROUTE => table_and_protocol(seen).is_some_and(|(table, _)| table == TABLE_MAIN),
        libc::RTM_NEWROUTE => {
            table_and_protocol(seen).is_some_and(|(table, protocol)| table == TABLE_MAIN && protocol != PROTOCOL)
        }
        _ => false,
    }
}

/// On the node only what is ours counts: it is busy with much else.
fn on_node(seen: Received<'_>) -> Option<Changed> {
    match seen.kind {
        libc::RTM_DELROUTE => {
            let gone = decode::route(seen, &|_| String::new())?;
            (gone.route.table == TABLE_PODS).then(|| Changed::Host(gone.route.dst.addr()))
        }
        libc::RTM_DELRULE => decode::rule(seen).filter(|rule| rule.priority == RULE_PODS).map(|_| Changed::Rules),
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            let link = decode::link(seen).ok()?;
            VethNames::is_node_end(&link.name).then_some(Changed::Link(link.name))
        }
        _ => None,
    }
}

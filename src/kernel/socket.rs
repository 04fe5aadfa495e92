//! A synchronous netlink socket: sequence numbers verified, dumps repeated when they were interrupted, batches
//! acknowledged once. For rtnetlink also strict checking, for netfilter transactions.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader,
};
use netlink_sys::{
    SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};

use crate::error::Error;

/// Most messages in flight. Each error is an skb of its own in the receive buffer, and the default one (212,992 bytes)
/// overflows between 256 and 280 of them.
pub const BATCH: usize = 250;

/// Most times that an interrupted dump is repeated before the node is called busy.
const DUMP_TRIES: usize = 10;

/// The kernel fills dump buffers of at most 32 KiB (`NLMSG_GOODSIZE` rules, net/netlink/af_netlink.c).
const RECEIVE: usize = 32 * 1024;

/// Longest wait for netfilter's answer, seconds. Replacing 100,000 set elements takes below one.
const ANSWER_SECONDS: i64 = 30;

/// Length of `struct nlmsghdr`, bytes (linux/netlink.h).
const HEADER: usize = 16;

/// A request, encoded but for its sequence number.
#[derive(Clone, Debug)]
pub struct Request {
    /// `nlmsg_type`.
    kind: u16,
    /// `NLM_F_CREATE`, `NLM_F_EXCL`, …
    flags: u16,
    /// After the netlink header.
    payload: Vec<u8>,
}

impl Request {
    /// Encodes a message of a kind (`RTM_*`) with flags beyond `NLM_F_REQUEST`. Each message type by itself, not through
    /// netlink-packet-route's enum of all: that would link the encoders of everything that rtnetlink knows.
    pub fn new(kind: u16, flags: u16, message: &impl Emitable) -> Self {
        let mut payload = vec![0; message.buffer_len()];
        message.emit(&mut payload);
        Self { kind, flags, payload }
    }

    /// A message whose payload is encoded already.
    pub const fn raw(kind: u16, flags: u16, payload: Vec<u8>) -> Self {
        Self { kind, flags, payload }
    }

    /// What comes after the netlink header.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }
}

/// The fate of one request of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Done.
    Done,
    /// Refused.
    Refused(Errno),
    /// The answer was lost (`ENOBUFS`): look again.
    Unknown,
}

/// One received message.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// After the netlink header.
    pub payload: &'a [u8],
}

/// The socket. It stays in the network namespace in which it was opened.
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("fd", &self.inner.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn open() -> Result<Self, Error> {
        let refused =
            |err: std::io::Error| Error::Netlink { what: "open a netlink socket".into(), errno: Error::errno_of(&err) };
        let inner = netlink_sys::Socket::new(NETLINK_ROUTE).map_err(refused)?;
        // Without strict checking the kernel ignores what it does not know, filters included (Linux 4.20 on has it).
        inner.set_netlink_get_strict_chk(true).map_err(refused)?;
        // Errors do not repeat the request: smaller answers.
        inner.set_cap_ack(true).map_err(refused)?;
        inner.connect(&SocketAddr::new(0, 0)).map_err(refused)?;
        Ok(Self { inner, sequence: 0, buffer: Vec::with_capacity(RECEIVE) })
    }

    /// Opens a socket to netfilter (nf_tables, conntrack) in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's refusal; `EPROTONOSUPPORT` where it has no netfilter.
    pub fn netfilter() -> Result<Self, Error> {
        let refused = |err: std::io::Error| Error::Netlink {
            what: "open a netfilter socket".into(),
            errno: Error::errno_of(&err),
        };
        let inner = netlink_sys::Socket::new(NETLINK_NETFILTER).map_err(refused)?;
        inner.set_cap_ack(true).map_err(refused)?;
        inner.connect(&SocketAddr::new(0, 0)).map_err(refused)?;
        let socket = Self { inner, sequence: 0, buffer: Vec::with_capacity(RECEIVE) };
        // Every transaction is answered; a kernel that does not must not hold the agent for ever.
        let _ = setsockopt(&socket.fd(), sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS, 0));
        Ok(socket)
    }

    /// Sends requests as one transaction (nfnetlink batch): all of them take effect at once, or none does. The first and
    /// the last are the marks of the batch.
    ///
    /// # Errors
    /// The place of the first request that was refused, 0 for the transaction as a whole, and why.
    pub fn transaction(&mut self, requests: &[Request]) -> Result<(), (usize, Errno)> {
        let first = self.sequence.wrapping_add(1);
        // The end mark is acknowledged by newer kernels only (6.10), the message before it by all, after the commit.
        let last = requests.len().saturating_sub(2);
        let mut bytes = Vec::with_capacity(requests.iter().map(|request| request.payload.len() + HEADER + 4).sum());
        for (place, request) in requests.iter().enumerate() {
            self.append(request, if place == last { NLM_F_ACK } else { 0 }, &mut bytes);
        }
        self.room_for(bytes.len());
        self.send(&bytes).map_err(|errno| (0, errno))?;
        let (mut refusal, mut ended) = (None, false);
        while !ended {
            let received = self.receive("transaction", |sequence, _, message| {
                let place = usize::try_from(sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                if message.kind != NLMSG_ERROR || place >= requests.len() {
                    return Ok(());
                }
                refusal = refusal.or(errno(message.payload).map(|errno| (place, errno)));
                // What concerns the whole batch is told of its first message, and may be all that is told.
                ended |= place == last || (place == 0 && refusal.is_some());
                Ok(())
            });
            if let Err(err) = received {
                self.drain();
                return Err((0, err.errno().unwrap_or(Errno::EIO)));
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    /// A batch must be sent by one call, which the send buffer bounds.
    fn room_for(&self, bytes: usize) {
        let fd = self.fd();
        if setsockopt(&fd, sockopt::SndBufForce, &bytes).is_err() {
            // Not root of the machine, as in a user namespace: up to net.core.wmem_max.
            let _ = setsockopt(&fd, sockopt::SndBuf, &bytes);
        }
    }

    /// The identity of the socket's network namespace; none before Linux 5.14.
    pub fn cookie(&self) -> Option<u64> {
        crate::sys::netns_cookie(self.fd())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        crate::sys::borrow(self.inner.as_raw_fd())
    }

    /// Sends requests, at most [`BATCH`] at a time, with an acknowledgement asked of the last of each portion only:
    /// refusals come back anyway. Messages are independent; a refused one does not stop the others. The fate of each is
    /// told, also where the socket itself fails: what was sent is unknown then, what was not is refused.
    pub fn batch(&mut self, what: &str, requests: &[Request]) -> Vec<Fate> {
        let mut fates = Vec::with_capacity(requests.len());
        for portion in requests.chunks(BATCH) {
            if let Err(errno) = self.portion(what, portion, &mut fates) {
                fates.resize(requests.len(), Fate::Refused(errno));
                break;
            }
        }
        fates
    }

    /// Sends one portion and collects its fates.
    ///
    /// # Errors
    /// Nothing was sent.
    fn portion(&mut self, what: &str, requests: &[Request], fates: &mut Vec<Fate>) -> Result<(), Errno> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(requests.len() * 96);
        for (place, request) in requests.iter().enumerate() {
            let ack = if place + 1 == requests.len() { NLM_F_ACK } else { 0 };
            self.append(request, ack, &mut bytes);
        }
        self.send(&bytes)?;
        let base = fates.len();
        fates.resize(base + requests.len(), Fate::Done);
        let own = fates.get_mut(base..).unwrap_or_default();
        let last = self.sequence;
        let mut ended = false;
        while !ended {
            let received = self.receive(what, |sequence, _, message| {
                let place = usize::try_from(sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                // An answer to a request of before, whose reader gave up.
                let Some(fate) = own.get_mut(place).filter(|_| message.kind == NLMSG_ERROR) else { return Ok(()) };
                if let Some(errno) = errno(message.payload) {
                    *fate = Fate::Refused(errno);
                }
                ended |= sequence == last;
                Ok(())
            });
            if received.is_err() {
                // Mostly ENOBUFS: answers, perhaps the last one, are gone. Whatever is left of them is thrown away, and
                // the caller looks at the kernel's state instead.
                self.drain();
                own.iter_mut().filter(|fate| **fate == Fate::Done).for_each(|fate| *fate = Fate::Unknown);
                break;
            }
        }
        Ok(())
    }

    /// Asks for a dump and hands over each message; starts anew when the kernel says that it was interrupted
    /// (`NLM_F_DUMP_INTR`) or that answers were lost. `begin` is called at each start.
    ///
    /// # Errors
    /// The kernel's refusal, or [`Error::Busy`] after ten interrupted tries.
    pub fn dump<T: Default>(
        &mut self,
        what: &str,
        request: &Request,
        mut take: impl FnMut(&mut T, Received<'_>) -> Result<(), Error>,
    ) -> Result<T, Error> {
        for _ in 0..DUMP_TRIES {
            let mut bytes = Vec::with_capacity(128);
            self.append(request, NLM_F_DUMP, &mut bytes);
            self.send(&bytes).map_err(|errno| Error::Netlink { what: what.to_owned(), errno })?;
            let mut collected = T::default();
            match self.dump_once(what, |received| take(&mut collected, received)) {
                Ok(true) => return Ok(collected),
                Ok(false) => {}
                Err(Error::Netlink { errno: Errno::ENOBUFS | Errno::EINTR | Errno::EAGAIN, .. }) => self.drain(),
                Err(err) => return Err(err),
            }
        }
        Err(Error::Busy { what: what.to_owned() })
    }

    /// Reads one dump to its end; false where it was interrupted.
    fn dump_once(
        &mut self,
        what: &str,
        mut take: impl FnMut(Received<'_>) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let wanted = self.sequence;
        let (mut done, mut consistent) = (false, true);
        while !done {
            self.receive(what, |sequence, flags, message| {
                if sequence != wanted {
                    return Ok(());
                }
                consistent &= flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        done = true;
                        match errno(message.payload) {
                            Some(errno) => Err(Error::Netlink { what: what.to_owned(), errno }),
                            None => Ok(()),
                        }
                    }
                    _ => take(message),
                }
            })?;
        }
        Ok(consistent)
    }

    /// Asks for one object; none where it does not exist.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn get<T>(
        &mut self,
        what: &str,
        request: &Request,
        mut take: impl FnMut(Received<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        let mut bytes = Vec::with_capacity(128);
        self.append(request, 0, &mut bytes);
        self.send(&bytes).map_err(|errno| Error::Netlink { what: what.to_owned(), errno })?;
        let wanted = self.sequence;
        let mut answer: Option<Option<T>> = None;
        while answer.is_none() {
            self.receive(what, |sequence, _, message| {
                if sequence != wanted {
                    return Ok(());
                }
                answer = Some(match (message.kind, errno(message.payload)) {
                    (NLMSG_ERROR, Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH) | None) => None,
                    (NLMSG_ERROR, Some(errno)) => return Err(Error::Netlink { what: what.to_owned(), errno }),
                    _ => Some(take(message)?),
                });
                Ok(())
            })?;
        }
        Ok(answer.flatten())
    }

    fn append(&mut self, request: &Request, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.message_type = request.kind;
        header.flags = NLM_F_REQUEST | request.flags | flags;
        header.sequence_number = self.sequence;
        header.length = u32::try_from(HEADER + request.payload.len()).unwrap_or(u32::MAX);
        let mut encoded = [0; HEADER];
        header.emit(&mut encoded);
        bytes.extend_from_slice(&encoded);
        bytes.extend_from_slice(&request.payload);
        // Every message starts at a multiple of four (NLMSG_ALIGNTO, linux/netlink.h).
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        loop {
            match self.inner.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
                Err(err) => return Err(Error::errno_of(&err)),
            }
        }
    }

    /// Receives one datagram and hands over each message in it: sequence number, flags, content.
    fn receive(
        &mut self,
        what: &str,
        mut take: impl FnMut(u32, u16, Received<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let odd = |why: String| Error::Protocol { what: what.to_owned(), why };
        self.buffer.clear();
        let length = loop {
            match self.inner.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Ok(length) => break length,
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
                Err(err) => return Err(Error::Netlink { what: what.to_owned(), errno: Error::errno_of(&err) }),
            }
        };
        if length > self.buffer.len() {
            return Err(odd(format!("a datagram of {length} bytes")));
        }
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(|err| odd(err.to_string()))?;
            let received = Received { kind: message.message_type(), payload: message.payload() };
            take(message.sequence_number(), message.flags(), received)?;
            let length = usize::try_from(message.length()).unwrap_or(rest.len()).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }

    /// Throws away what is still queued.
    fn drain(&mut self) {
        loop {
            self.buffer.clear();
            if self.inner.recv(&mut self.buffer, libc::MSG_DONTWAIT | libc::MSG_TRUNC).is_err() {
                return;
            }
        }
    }
}

/// The errno at the start of an `NLMSG_ERROR` or `NLMSG_DONE`; none where it is 0 or absent.
fn errno(payload: &[u8]) -> Option<Errno> {
    let bytes: [u8; 4] = payload.get(..4)?.try_into().ok()?;
    let code = i32::from_ne_bytes(bytes);
    (code != 0).then(|| Errno::from_raw(code.wrapping_neg()))
}

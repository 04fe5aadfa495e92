//! Entries of conntrack: looked through, and deleted where a rule that came later says so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crosslink_core::model::Family;
use nix::errno::Errno;

use crate::{
    error::Error,
    nft::{Writer, find, iter},
    socket::{BATCH, Fate, Request, Socket},
};

/// Messages (`enum cntl_msg_types`, linux/netfilter/nfnetlink_conntrack.h).
const GET: u16 = 1;
const DELETE: u16 = 2;

/// Attributes (`enum ctattr_type`).
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;

/// `CTA_TUPLE_IP` and, in it, `CTA_IP_V4_SRC`, `_V4_DST`, `_V6_SRC`, `_V6_DST`.
const TUPLE_IP: u16 = 1;
const SOURCES: [u16; 2] = [1, 3];
const DESTINATIONS: [u16; 2] = [2, 4];

/// Length of `struct nfgenmsg`, bytes.
const HEADER: usize = 4;

/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// The addresses of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Who opened it.
    pub source: IpAddr,
    /// Which destination it named.
    pub destination: IpAddr,
    /// Who answers: another than `destination` where that was translated.
    pub responder: IpAddr,
    /// Whom answers are sent to: another than `source` where that was translated.
    pub answered: IpAddr,
}

/// Deletes the connections that `stale` picks, at most `limit` of each family; returns how many.
///
/// # Errors
/// The kernel's refusal.
pub fn delete(limit: usize, stale: impl Fn(&Connection) -> bool) -> Result<usize, Error> {
    let mut socket = Socket::netfilter()?;
    let mut deleted = 0;
    for family in Family::ALL {
        let payload = Writer::message(protocol(family), 0).0;
        let request = Request::raw(kind(GET), 0, payload);
        let picked = socket.dump("list connections", &request, |all: &mut Vec<Request>, received| {
            let attributes = received.payload.get(HEADER..).unwrap_or_default();
            if all.len() < limit && connection(attributes).is_some_and(|connection| stale(&connection)) {
                all.push(Request::raw(kind(DELETE), 0, name(family, attributes)));
            }
            Ok(())
        })?;
        for portion in picked.chunks(BATCH) {
            let fates = socket.batch("delete connections", portion);
            for fate in fates {
                match fate {
                    Fate::Done | Fate::Unknown => deleted += 1,
                    // It ended by itself.
                    Fate::Refused(Errno::ENOENT) => {}
                    Fate::Refused(errno) => {
                        return Err(Error::Netlink { what: "delete a connection".to_owned(), errno });
                    }
                }
            }
        }
    }
    Ok(deleted)
}

fn kind(message: u16) -> u16 {
    u16::try_from(libc::NFNL_SUBSYS_CTNETLINK << 8).unwrap_or_default() | message
}

fn protocol(family: Family) -> u8 {
    let number = if family == Family::V4 { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(number).unwrap_or_default()
}

fn connection(attributes: &[u8]) -> Option<Connection> {
    let (source, destination) = ends(find(attributes, ORIGINAL)?)?;
    let (responder, answered) = ends(find(attributes, REPLY)?)?;
    Some(Connection { source, destination, responder, answered })
}

fn ends(tuple: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let ip = find(tuple, TUPLE_IP)?;
    let one = |kinds: [u16; 2]| kinds.into_iter().find_map(|kind| addr(find(ip, kind)?));
    Some((one(SOURCES)?, one(DESTINATIONS)?))
}

fn addr(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes))),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes))),
        _ => None,
    }
}

/// What a deletion names: the original tuple as the kernel wrote it, the zone, and the number, so that a later
/// connection of the same tuple is not hit.
fn name(family: Family, attributes: &[u8]) -> Vec<u8> {
    let mut writer = Writer::message(protocol(family), 0);
    for (kind, value) in iter(attributes) {
        match kind & !NESTED {
            ORIGINAL => writer = writer.bytes(ORIGINAL | NESTED, value),
            number @ (ID | ZONE) => writer = writer.bytes(number, value),
            _ => {}
        }
    }
    writer.0
}

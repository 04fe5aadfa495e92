//! What is in a table, compared with what should be.

use std::collections::BTreeMap;

use crosslink_core::nft::{Chain, Set, Table};
use nix::errno::Errno;

use super::{
    attr::{self, Writer, find, iter, list_includes, text},
    encode::{self, kinds},
};
use crate::{
    error::Error,
    socket::{Request, Socket},
};

/// Length of `struct nfgenmsg`, bytes.
const HEADER: usize = 4;

/// Asks for all objects of a kind and returns their attributes. What is not there has none.
fn dump(socket: &mut Socket, what: &str, message: libc::c_int, payload: Writer) -> Result<Vec<Vec<u8>>, Error> {
    let what = format!("list nftables {what}");
    let request = Request::raw(encode::kind(message), 0, payload.0);
    let dumped = socket.dump(&what, &request, |all: &mut Vec<Vec<u8>>, received| {
        all.extend(received.payload.get(HEADER..).map(<[u8]>::to_vec));
        Ok(())
    });
    match dumped {
        Err(Error::Netlink { errno: Errno::ENOENT, .. }) => Ok(Vec::new()),
        other => other,
    }
}

/// Flags of the table of that name; none without such a table.
pub fn table_flags(socket: &mut Socket, name: &str) -> Result<Option<u32>, Error> {
    let tables = dump(socket, "tables", libc::NFT_MSG_GETTABLE, encode::message())?;
    let found = tables.iter().find(|table| text(table, kinds::TABLE) == Some(name));
    Ok(found.map(|table| attr::u32(table, kinds::TABLE_FLAGS).unwrap_or(0)))
}

/// The first difference between a table and what is wanted.
pub fn difference(socket: &mut Socket, table: &Table) -> Result<Option<String>, Error> {
    match table_flags(socket, &table.name)? {
        None => return Ok(Some(format!("table inet {} is missing", table.name))),
        Some(0) => {}
        Some(flags) => return Ok(Some(format!("table inet {} has flags {flags:#x}", table.name))),
    }
    if let Some(found) = chains(socket, table)? {
        return Ok(Some(found));
    }
    for chain in &table.chains {
        if let Some(found) = rules(socket, table, chain)? {
            return Ok(Some(found));
        }
    }
    sets(socket, table)
}

/// Objects by name, those of our table only: old kernels list every table's.
fn by_name(objects: Vec<Vec<u8>>, table: &str, name: u16) -> BTreeMap<String, Vec<u8>> {
    let ours = objects.into_iter().filter(|object| text(object, kinds::TABLE) == Some(table));
    ours.filter_map(|object| Some((text(&object, name)?.to_owned(), object))).collect()
}

fn compare(what: &str, mut seen: BTreeMap<String, Vec<u8>>, wanted: &[(&str, Writer)]) -> Option<String> {
    for (name, wanted) in wanted {
        match seen.remove(*name) {
            None => return Some(format!("{what} {name} is missing")),
            Some(seen) if !attr::includes(&seen, &wanted.0) => return Some(format!("{what} {name} is another")),
            Some(_) => {}
        }
    }
    seen.keys().next().map(|name| format!("{what} {name} is not ours"))
}

fn chains(socket: &mut Socket, table: &Table) -> Result<Option<String>, Error> {
    let payload = encode::message().text(kinds::TABLE, &table.name);
    let seen = by_name(dump(socket, "chains", libc::NFT_MSG_GETCHAIN, payload)?, &table.name, kinds::CHAIN_NAME);
    let wanted = table.chains.iter().map(|chain| (chain.name.as_str(), encode::chain(Writer::default(), chain)));
    Ok(compare("chain", seen, &wanted.collect::<Vec<_>>()))
}

fn rules(socket: &mut Socket, table: &Table, chain: &Chain) -> Result<Option<String>, Error> {
    let payload = encode::message().text(kinds::TABLE, &table.name).text(kinds::RULE_CHAIN, &chain.name);
    let mut seen = dump(socket, "rules", libc::NFT_MSG_GETRULE, payload)?;
    seen.retain(|rule| {
        text(rule, kinds::TABLE) == Some(&table.name) && text(rule, kinds::RULE_CHAIN) == Some(&chain.name)
    });
    if seen.len() != chain.rules.len() {
        return Ok(Some(format!("chain {} has {} rules, not {}", chain.name, seen.len(), chain.rules.len())));
    }
    let place = seen.iter().zip(&chain.rules).position(|(seen, wanted)| {
        let expressions = find(seen, kinds::RULE_EXPRESSIONS).unwrap_or_default();
        !list_includes(expressions, &encode::expressions(wanted).0)
    });
    Ok(place.map(|place| format!("rule {} of chain {} is another", place + 1, chain.name)))
}

fn sets(socket: &mut Socket, table: &Table) -> Result<Option<String>, Error> {
    let payload = encode::message().text(kinds::TABLE, &table.name);
    let seen = by_name(dump(socket, "sets", libc::NFT_MSG_GETSET, payload)?, &table.name, kinds::SET_NAME);
    let wanted = table.sets.iter().map(|set| (set.name.as_str(), encode::set(Writer::default(), set)));
    if let Some(found) = compare("set", seen, &wanted.collect::<Vec<_>>()) {
        return Ok(Some(found));
    }
    for set in &table.sets {
        let (seen, wanted) = (elements(socket, &table.name, set)?, encode::keys(set));
        if seen != wanted {
            return Ok(Some(format!("set {} has {} bounds, not {}, or others", set.name, seen.len(), wanted.len())));
        }
    }
    Ok(None)
}

/// Keys of a set in rising order, each with whether it ends an interval.
fn elements(socket: &mut Socket, table: &str, set: &Set) -> Result<Vec<(Vec<u8>, bool)>, Error> {
    let payload = encode::message().text(kinds::TABLE, table).text(kinds::ELEMENTS_SET, &set.name);
    let messages = dump(socket, "set elements", libc::NFT_MSG_GETSETELEM, payload)?;
    let mut keys = Vec::new();
    for message in &messages {
        for (_, element) in iter(find(message, kinds::ELEMENTS).unwrap_or_default()) {
            let key = find(element, kinds::ELEMENT_KEY).and_then(|data| find(data, kinds::DATA_VALUE));
            let flags = attr::u32(element, kinds::ELEMENT_FLAGS).unwrap_or(0);
            keys.push((key.unwrap_or_default().to_vec(), flags & kinds::INTERVAL_END != 0));
        }
    }
    keys.sort_unstable();
    Ok(keys)
}

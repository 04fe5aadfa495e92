//! Tables as data to nf_tables messages.

use std::net::IpAddr;

use crosslink_core::{
    model::Family,
    nft::{Action, Chain, Hook, Kind, Match, Rule, Set, Table},
    set::successor,
};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};

use super::attr::{LIST_ELEM, Writer};
use crate::socket::Request;

/// Attribute kinds and constants of linux/netfilter/nf_tables.h that libc does not have.
pub mod kinds {
    /// `NFTA_TABLE_NAME`, and the table's name in every other kind of message.
    pub const TABLE: u16 = 1;
    /// `NFTA_TABLE_FLAGS`.
    pub const TABLE_FLAGS: u16 = 2;
    /// `NFTA_CHAIN_NAME`.
    pub const CHAIN_NAME: u16 = 3;
    /// `NFTA_CHAIN_HOOK`.
    pub const CHAIN_HOOK: u16 = 4;
    /// `NFTA_CHAIN_POLICY`.
    pub const CHAIN_POLICY: u16 = 5;
    /// `NFTA_CHAIN_TYPE`.
    pub const CHAIN_TYPE: u16 = 7;
    /// `NFTA_RULE_CHAIN`.
    pub const RULE_CHAIN: u16 = 2;
    /// `NFTA_RULE_EXPRESSIONS`.
    pub const RULE_EXPRESSIONS: u16 = 4;
    /// `NFTA_RULE_USERDATA`.
    pub const RULE_USERDATA: u16 = 7;
    /// `NFTA_SET_NAME`.
    pub const SET_NAME: u16 = 2;
    /// `NFTA_SET_FLAGS`.
    pub const SET_FLAGS: u16 = 3;
    /// `NFTA_SET_KEY_TYPE`.
    pub const SET_KEY_TYPE: u16 = 4;
    /// `NFTA_SET_KEY_LEN`.
    pub const SET_KEY_LEN: u16 = 5;
    /// `NFTA_SET_ID`.
    pub const SET_ID: u16 = 10;
    /// `NFTA_SET_ELEM_LIST_SET`.
    pub const ELEMENTS_SET: u16 = 2;
    /// `NFTA_SET_ELEM_LIST_ELEMENTS`.
    pub const ELEMENTS: u16 = 3;
    /// `NFTA_SET_ELEM_KEY`.
    pub const ELEMENT_KEY: u16 = 1;
    /// `NFTA_SET_ELEM_FLAGS`.
    pub const ELEMENT_FLAGS: u16 = 3;
    /// `NFTA_DATA_VALUE`.
    pub const DATA_VALUE: u16 = 1;
    /// `NFT_SET_ELEM_INTERVAL_END`.
    pub const INTERVAL_END: u32 = 1;
}

/// `NFTNL_UDATA_RULE_COMMENT`: how nft(8) keeps comments.
const UDATA_COMMENT: u8 = 0;

/// Most elements of one message: an attribute ends at 65,535 bytes, and an IPv6 element takes 40.
const ELEMENTS: usize = 1000;

/// `NF_ACCEPT` (linux/netfilter.h).
const ACCEPT: u32 = 1;

/// `NF_CT_STATE_INVALID_BIT` and `IPS_DST_NAT` (linux/netfilter/nf_conntrack_common.h).
const INVALID: u32 = 1;
const DST_NAT: u32 = 1 << 5;

/// Register 1, the only one that is needed (`enum nft_registers`).
const REGISTER: u32 = libc::NFT_REG_1.cast_unsigned();

/// A request with what it is about, for error messages.
pub struct Step {
    /// The message.
    pub request: Request,
    /// In words.
    pub what: String,
}

/// Type of an nf_tables message.
pub fn kind(message: libc::c_int) -> u16 {
    u16::try_from((libc::NFNL_SUBSYS_NFTABLES << 8) | message).unwrap_or_default()
}

/// An nf_tables message of family `inet`.
pub fn message() -> Writer {
    Writer::message(u8::try_from(libc::NFPROTO_INET).unwrap_or_default(), 0)
}

/// A mark of a batch (`NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`).
fn mark(which: libc::c_int) -> Step {
    let resource = u16::try_from(libc::NFNL_SUBSYS_NFTABLES).unwrap_or_default();
    let payload = Writer::message(0, resource).0;
    let kind = u16::try_from(which).unwrap_or_default();
    Step { request: Request::raw(kind, 0, payload), what: "use nf_tables".to_owned() }
}

fn batch(steps: impl IntoIterator<Item = Step>) -> Vec<Step> {
    let begin = std::iter::once(mark(libc::NFNL_MSG_BATCH_BEGIN));
    begin.chain(steps).chain(std::iter::once(mark(libc::NFNL_MSG_BATCH_END))).collect()
}

/// The batch that makes a table what is wanted, whether or not it is there.
pub fn replace(table: &Table) -> Vec<Step> {
    let create = || new_table(&table.name);
    let mut steps = vec![create(), remove(&table.name), create()];
    for (id, set) in (1u32..).zip(&table.sets) {
        steps.push(new_set(&table.name, set, id));
        steps.extend(elements(&table.name, set));
    }
    for chain in &table.chains {
        steps.push(new_chain(&table.name, chain));
        steps.extend((1..).zip(&chain.rules).map(|(place, rule)| new_rule(&table.name, &chain.name, rule, place)));
    }
    batch(steps)
}

/// The batch that removes a table with all that is in it.
pub fn delete(name: &str) -> Vec<Step> {
    batch([remove(name)])
}

fn step(message: libc::c_int, flags: u16, payload: Writer, what: String) -> Step {
    Step { request: Request::raw(kind(message), flags, payload.0), what }
}

fn new_table(name: &str) -> Step {
    let payload = self::message().text(kinds::TABLE, name);
    step(libc::NFT_MSG_NEWTABLE, NLM_F_CREATE, payload, format!("make nftables table inet {name}"))
}

fn remove(name: &str) -> Step {
    let payload = self::message().text(kinds::TABLE, name);
    step(libc::NFT_MSG_DELTABLE, 0, payload, format!("delete nftables table inet {name}"))
}

/// What a set is, apart from its table, its number in the batch and its elements.
pub fn set(writer: Writer, set: &Set) -> Writer {
    // Types by which nft(8) shows the addresses (ipv4_addr, ipv6_addr); the kernel does not look at them.
    let (key_type, key_length) = if set.family == Family::V4 { (7, 4) } else { (8, 16) };
    let flags = libc::NFT_SET_CONSTANT | libc::NFT_SET_INTERVAL;
    writer
        .text(kinds::SET_NAME, &set.name)
        .u32(kinds::SET_FLAGS, flags.cast_unsigned())
        .u32(kinds::SET_KEY_TYPE, key_type)
        .u32(kinds::SET_KEY_LEN, key_length)
}

fn new_set(table: &str, wanted: &Set, id: u32) -> Step {
    let payload = set(message().text(kinds::TABLE, table), wanted).u32(kinds::SET_ID, id);
    step(libc::NFT_MSG_NEWSET, NLM_F_CREATE, payload, format!("make nftables set {}", wanted.name))
}

/// Keys of a set as the kernel keeps them, in rising order, each with whether it ends an interval. An interval that
/// reaches the last address has no end.
pub fn keys(set: &Set) -> Vec<(Vec<u8>, bool)> {
    let bytes = |addr: IpAddr| match addr {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let ends = |(first, last): &(IpAddr, IpAddr)| {
        let end = successor(*last).map(|end| (bytes(end), true));
        std::iter::once((bytes(*first), false)).chain(end)
    };
    set.ranges.iter().flat_map(ends).collect()
}

fn elements(table: &str, set: &Set) -> Vec<Step> {
    let keys = keys(set);
    keys.chunks(ELEMENTS)
        .map(|chunk| {
            let list = chunk.iter().fold(Writer::default(), |list, (key, end)| {
                let element = if *end {
                    Writer::default().u32(kinds::ELEMENT_FLAGS, kinds::INTERVAL_END)
                } else {
                    Writer::default()
                };
                let data = Writer::default().bytes(kinds::DATA_VALUE, key);
                list.nest(LIST_ELEM, element.nest(kinds::ELEMENT_KEY, data))
            });
            let payload =
                message().text(kinds::TABLE, table).text(kinds::ELEMENTS_SET, &set.name).nest(kinds::ELEMENTS, list);
            step(libc::NFT_MSG_NEWSETELEM, NLM_F_CREATE, payload, format!("fill nftables set {}", set.name))
        })
        .collect()
}

/// What a chain is, apart from its table and its rules.
pub fn chain(writer: Writer, chain: &Chain) -> Writer {
    let hook = match chain.hook {
        Hook::Prerouting => libc::NF_INET_PRE_ROUTING,
        Hook::Postrouting => libc::NF_INET_POST_ROUTING,
    };
    let kind = match chain.kind {
        Kind::Filter => "filter",
        Kind::Nat => "nat",
    };
    // NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY.
    let place = Writer::default().u32(1, hook.cast_unsigned()).u32(2, chain.priority.cast_unsigned());
    writer
        .text(kinds::CHAIN_NAME, &chain.name)
        .nest(kinds::CHAIN_HOOK, place)
        .u32(kinds::CHAIN_POLICY, ACCEPT)
        .text(kinds::CHAIN_TYPE, kind)
}

fn new_chain(table: &str, wanted: &Chain) -> Step {
    let payload = chain(message().text(kinds::TABLE, table), wanted);
    step(libc::NFT_MSG_NEWCHAIN, NLM_F_CREATE, payload, format!("make nftables chain {}", wanted.name))
}

fn new_rule(table: &str, chain: &str, rule: &Rule, place: usize) -> Step {
    let mut comment = rule.comment.clone().into_bytes();
    comment.push(0);
    let mut userdata = vec![UDATA_COMMENT, u8::try_from(comment.len()).unwrap_or_default()];
    userdata.extend(comment);
    let payload = message()
        .text(kinds::TABLE, table)
        .text(kinds::RULE_CHAIN, chain)
        .nest(kinds::RULE_EXPRESSIONS, expressions(rule))
        .bytes(kinds::RULE_USERDATA, &userdata);
    let what = format!("add rule {place} of nftables chain {chain}");
    step(libc::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, payload, what)
}

/// The expressions of a rule, a list.
pub fn expressions(rule: &Rule) -> Writer {
    let mut all: Vec<Writer> = rule.matches.iter().flat_map(condition).collect();
    all.push(expression("counter", Writer::default()));
    all.extend(action(rule.action));
    all.into_iter().fold(Writer::default(), |list, one| list.nest(LIST_ELEM, one))
}

/// `NFTA_EXPR_NAME` and `NFTA_EXPR_DATA`.
fn expression(name: &str, data: Writer) -> Writer {
    Writer::default().text(1, name).nest(2, data)
}

fn condition(wanted: &Match) -> Vec<Writer> {
    match wanted {
        Match::InPrefix(prefix) => {
            // NFTA_META_DREG, NFTA_META_KEY. A comparison shorter than the name is one with its beginning.
            let load = Writer::default().u32(1, REGISTER).u32(2, libc::NFT_META_IIFNAME.cast_unsigned());
            vec![expression("meta", load), compare(libc::NFT_CMP_EQ, prefix.as_bytes())]
        }
        Match::Source(family, set) => address(*family, load(*family, Field::Source), set),
        Match::Destination(family, set) => address(*family, load(*family, Field::Destination), set),
        Match::Named(family, set) => address(*family, named(*family), set),
        Match::Invalid => conntrack(libc::NFT_CT_STATE, INVALID),
        Match::Dnat => conntrack(libc::NFT_CT_STATUS, DST_NAT),
    }
}

/// `NFTA_CMP_SREG`, `NFTA_CMP_OP`, `NFTA_CMP_DATA`.
fn compare(operator: libc::c_int, value: &[u8]) -> Writer {
    let data = Writer::default().bytes(kinds::DATA_VALUE, value);
    expression("cmp", Writer::default().u32(1, REGISTER).u32(2, operator.cast_unsigned()).nest(3, data))
}

/// Any of some bits that conntrack knows of the packet; it keeps them in the machine's byte order.
fn conntrack(key: libc::c_int, bits: u32) -> Vec<Writer> {
    let data = |value: u32| Writer::default().bytes(kinds::DATA_VALUE, &value.to_ne_bytes());
    // NFTA_CT_DREG, NFTA_CT_KEY; NFTA_BITWISE_SREG, _DREG, _LEN, _MASK, _XOR.
    let load = Writer::default().u32(1, REGISTER).u32(2, key.cast_unsigned());
    let mask = Writer::default().u32(1, REGISTER).u32(2, REGISTER).u32(3, 4).nest(4, data(bits)).nest(5, data(0));
    vec![expression("ct", load), expression("bitwise", mask), compare(libc::NFT_CMP_NEQ, &0u32.to_ne_bytes())]
}

#[derive(Clone, Copy)]
enum Field {
    Source,
    Destination,
}

/// Loads an address of the packet. Its place in the header: RFC 791 section 3.1, RFC 8200 section 3.
fn load(family: Family, field: Field) -> Writer {
    let (offset, length) = match (family, field) {
        (Family::V4, Field::Source) => (12, 4),
        (Family::V4, Field::Destination) => (16, 4),
        (Family::V6, Field::Source) => (8, 16),
        (Family::V6, Field::Destination) => (24, 16),
    };
    // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN.
    let base = libc::NFT_PAYLOAD_NETWORK_HEADER.cast_unsigned();
    expression("payload", Writer::default().u32(1, REGISTER).u32(2, base).u32(3, offset).u32(4, length))
}

/// Loads the destination that the connection named.
fn named(family: Family) -> Writer {
    // Linux 4.17 has these.
    let key = if family == Family::V4 { libc::NFT_CT_DST_IP } else { libc::NFT_CT_DST_IP6 };
    // NFTA_CT_DREG, NFTA_CT_KEY, NFTA_CT_DIRECTION (IP_CT_DIR_ORIGINAL).
    expression("ct", Writer::default().u32(1, REGISTER).u32(2, key.cast_unsigned()).bytes(3, &[0]))
}

fn address(family: Family, load: Writer, set: &str) -> Vec<Writer> {
    let protocol = match family {
        Family::V4 => libc::NFPROTO_IPV4,
        Family::V6 => libc::NFPROTO_IPV6,
    };
    let family_of = Writer::default().u32(1, REGISTER).u32(2, libc::NFT_META_NFPROTO.cast_unsigned());
    // NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG.
    let lookup = Writer::default().text(1, set).u32(2, REGISTER);
    vec![
        expression("meta", family_of),
        compare(libc::NFT_CMP_EQ, &[u8::try_from(protocol).unwrap_or_default()]),
        load,
        expression("lookup", lookup),
    ]
}

fn action(action: Action) -> Vec<Writer> {
    match action {
        Action::Return => {
            // NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA > NFTA_DATA_VERDICT > NFTA_VERDICT_CODE.
            let code = Writer::default().u32(1, libc::NFT_RETURN.cast_unsigned());
            let verdict = Writer::default().nest(2, code);
            let data = Writer::default().u32(1, libc::NFT_REG_VERDICT.cast_unsigned()).nest(2, verdict);
            vec![expression("immediate", data)]
        }
        Action::Notrack => vec![expression("notrack", Writer::default())],
        Action::KeepSource(family) => vec![load(family, Field::Source), snat(family)],
        Action::Snat(addr) => {
            let bytes = match addr {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            let value = Writer::default().bytes(kinds::DATA_VALUE, &bytes);
            vec![expression("immediate", Writer::default().u32(1, REGISTER).nest(2, value)), snat(Family::of(addr))]
        }
        Action::Masquerade => vec![expression("masq", Writer::default())],
    }
}

/// `NFTA_NAT_TYPE` (`NFT_NAT_SNAT`), `_FAMILY`, `_REG_ADDR_MIN`: to the address in the register.
fn snat(family: Family) -> Writer {
    let protocol = match family {
        Family::V4 => libc::NFPROTO_IPV4,
        Family::V6 => libc::NFPROTO_IPV6,
    };
    let data = Writer::default().u32(1, libc::NFT_NAT_SNAT.cast_unsigned()).u32(2, protocol.cast_unsigned());
    expression("nat", data.u32(3, REGISTER))
}

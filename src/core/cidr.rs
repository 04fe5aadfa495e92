//! Strict parsing of addresses and prefixes written by people.
//!
//! Other tools read an address such as `010.0.0.1` as octal, so a lenient reading could route another network than
//! the one meant. Whatever has more than one reading is refused here, with the way to write it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use crate::error::quoted;

/// Length of `::ffff:0:0/96`, the range that holds IPv4-mapped IPv6 addresses.
const MAPPED_LEN: u8 = 96;

/// Why a text is not an address or a prefix. Every message names the value and the cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// Nothing but white space.
    #[error("\"\" is empty: write an address such as 10.0.0.1 or a prefix such as 10.0.0.0/8 or fd00::/8")]
    Empty,
    /// The part before the slash is not an address.
    #[error(
        "{text} holds no valid IP address: write plain IPv4 (no leading zeros) or IPv6, such as 10.0.0.1 or fd00::1"
    )]
    Address {
        /// The refused value, shortened.
        text: String,
    },
    /// The address carries a zone.
    #[error("{text} has a zone: remove the `%` and the interface name after it")]
    Zone {
        /// The refused value, shortened.
        text: String,
    },
    /// The part after the slash is not a prefix length of the family.
    #[error("{text} has no valid prefix length: write a plain number from 0 to {max} after the slash")]
    Length {
        /// The refused value, shortened.
        text: String,
        /// The longest length of the address family.
        max: u8,
    },
    /// An address where a prefix length is out of place.
    #[error("{text} is a prefix where a single address is expected: remove the slash and what follows it")]
    Prefix {
        /// The refused value, shortened.
        text: String,
    },
    /// IPv4 written as IPv6, which the kernel would route as IPv6.
    #[error("{text} is IPv4-mapped IPv6: write the IPv4 form `{plain}`")]
    Mapped {
        /// The refused value, shortened.
        text: String,
        /// The same address or prefix as IPv4.
        plain: String,
    },
}

/// Parses a prefix, or a bare address as its host route. Bits after the prefix length are cleared.
///
/// # Errors
/// When `text` is not strictly an address with an optional `/length`, or is IPv4-mapped IPv6.
pub fn parse(text: &str) -> Result<IpNet, CidrError> {
    let text = text.trim_ascii();
    let Some((addr_text, len_text)) = text.split_once('/') else {
        return parse_addr(text).map(host);
    };
    let addr = strict_addr(addr_text, text)?;
    let net = parse_len(len_text).and_then(|len| IpNet::new(addr, len).ok());
    let net = net.ok_or_else(|| CidrError::Length { text: quoted(text), max: host(addr).prefix_len() })?;
    refuse_mapped(net, text)?;
    Ok(net.trunc())
}

/// Parses a single address, without a prefix length.
///
/// # Errors
/// When `text` is not strictly an address, or is IPv4-mapped IPv6.
pub fn parse_addr(text: &str) -> Result<IpAddr, CidrError> {
    let text = text.trim_ascii();
    if text.contains('/') {
        return Err(CidrError::Prefix { text: quoted(text) });
    }
    let addr = strict_addr(text, text)?;
    match mapped_v4(addr) {
        Some(v4) => Err(CidrError::Mapped { text: quoted(text), plain: v4.to_string() }),
        None => Ok(addr),
    }
}

/// The prefix that holds `addr` and nothing else: `/32` or `/128`.
pub fn host(addr: IpAddr) -> IpNet {
    IpNet::from(addr)
}

/// Why a prefix is never routed, whoever names it and whatever the pod is.
pub fn never_routed(net: &IpNet) -> Option<&'static str> {
    let addr = net.network();
    if net.prefix_len() == 0 {
        return Some("is a default route");
    }
    if addr.is_loopback() {
        return Some("is loopback");
    }
    if addr.is_multicast() {
        return Some("is multicast");
    }
    match addr {
        IpAddr::V4(v4) if v4.octets().first() == Some(&0) && net.prefix_len() >= 8 => Some("is \"this network\""),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("is the broadcast address"),
        IpAddr::V6(v6) if v6.is_unspecified() && net.prefix_len() == 128 => Some("is the unspecified address"),
        _ => None,
    }
}

/// Parses the address part of `whole`, the value that messages name.
fn strict_addr(text: &str, whole: &str) -> Result<IpAddr, CidrError> {
    if whole.is_empty() {
        return Err(CidrError::Empty);
    }
    // The standard parser refuses leading zeros, short forms such as `10.1` and zones.
    text.parse().map_err(|_| match has_zone(text) {
        true => CidrError::Zone { text: quoted(whole) },
        false => CidrError::Address { text: quoted(whole) },
    })
}

/// Whether only the zone keeps `text` from being an address.
fn has_zone(text: &str) -> bool {
    text.split_once('%').is_some_and(|(addr, _)| addr.parse::<Ipv6Addr>().is_ok())
}

/// A decimal number without sign or leading zeros; the range is the caller's to check.
fn parse_len(text: &str) -> Option<u8> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

/// Refuses a prefix that holds nothing but IPv4-mapped addresses.
fn refuse_mapped(net: IpNet, text: &str) -> Result<(), CidrError> {
    let Some(v4) = mapped_v4(net.addr()) else { return Ok(()) };
    let Some(len) = net.prefix_len().checked_sub(MAPPED_LEN) else { return Ok(()) };
    let plain = Ipv4Net::new(v4, len).map_or_else(|_| v4.to_string(), |plain| plain.trunc().to_string());
    Err(CidrError::Mapped { text: quoted(text), plain })
}

/// The IPv4 address inside an IPv4-mapped IPv6 address.
fn mapped_v4(addr: IpAddr) -> Option<Ipv4Addr> {
    match addr {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => v6.to_ipv4_mapped(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_and_masks() {
        let cases = [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            (" \t10.1.2.3/32\r\n", "10.1.2.3/32"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("1.2.3.4/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("fd00::1", "fd00::1/128"),
            ("FD00:0:0::1/64", "fd00::/64"),
            ("64:ff9b::10.0.0.1/128", "64:ff9b::a00:1/128"),
            // Wider than the mapped range: real IPv6.
            ("::ffff:10.0.0.1/95", "::fffe:0:0/95"),
            ("::ffff:10.0.0.1/0", "::/0"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).map(|net| net.to_string()), Ok(expected.to_owned()), "{text:?}");
        }
    }

    #[test]
    fn refuses_addresses() {
        let cases = [
            "010.0.0.1/8",
            "10.0.0.01",
            "10.1/16",
            "10.0.0.0.0/8",
            "256.0.0.0/8",
            "/8",
            "/",
            "a",
            "[fd00::1]",
            "fd00::1::/64",
            "10.0.0.0 /8",
            "0x0a.0.0.1",
            "eth%eth0",
            "10.0.0.1%eth0",
            "::ffff:010.0.0.1",
            "+10.0.0.1",
        ];
        for text in cases {
            assert_eq!(parse(text), Err(CidrError::Address { text: quoted(text) }), "{text:?}");
        }
        for text in ["", "  ", "\n"] {
            assert_eq!(parse(text), Err(CidrError::Empty), "{text:?}");
            assert_eq!(parse_addr(text), Err(CidrError::Empty), "{text:?}");
        }
        for text in ["fe80::1%eth0", "fe80::1%eth0/64", "fe80::%1/10"] {
            assert_eq!(parse(text), Err(CidrError::Zone { text: quoted(text) }), "{text:?}");
        }
    }

    #[test]
    fn refuses_lengths() {
        let v4 = ["/08", "/+8", "/", "/255.0.0.0", "/33", "/-1", "/ 8", "/8/8", "/256", "/00", "/٨", "/8%eth0"];
        for len in v4 {
            let text = format!("10.0.0.0{len}");
            assert_eq!(parse(&text), Err(CidrError::Length { text: quoted(&text), max: 32 }), "{text:?}");
        }
        for len in ["/129", "/", "/ffff::", "/064", "/99999999999999999999"] {
            let text = format!("fd00::{len}");
            assert_eq!(parse(&text), Err(CidrError::Length { text: quoted(&text), max: 128 }), "{text:?}");
        }
    }

    #[test]
    fn refuses_mapped() {
        let cases = [
            ("::ffff:10.1.2.3", "10.1.2.3"),
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
            ("::ffff:a01:203/128", "10.1.2.3/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
        ];
        for (text, plain) in cases {
            let expected = CidrError::Mapped { text: quoted(text), plain: plain.to_owned() };
            assert!(expected.to_string().contains(plain));
            assert_eq!(parse(text), Err(expected), "{text:?}");
        }
        assert!(matches!(parse_addr("::ffff:10.1.2.3"), Err(CidrError::Mapped { .. })));
    }

    #[test]
    fn parses_single_addresses() {
        assert_eq!(parse_addr(" 10.0.0.1 "), Ok(IpAddr::from([10, 0, 0, 1])));
        assert_eq!(parse_addr("::1"), Ok(IpAddr::V6(Ipv6Addr::LOCALHOST)));
        assert_eq!(parse_addr("10.0.0.1/32"), Err(CidrError::Prefix { text: quoted("10.0.0.1/32") }));
        assert_eq!(parse_addr("fe80::1%2"), Err(CidrError::Zone { text: quoted("fe80::1%2") }));
        assert_eq!(parse_addr("10.0.0.01"), Err(CidrError::Address { text: quoted("10.0.0.01") }));
    }

    #[test]
    fn makes_host_prefixes() {
        assert_eq!(host(IpAddr::from([10, 0, 0, 1])).to_string(), "10.0.0.1/32");
        assert_eq!(host(IpAddr::V6(Ipv6Addr::LOCALHOST)).to_string(), "::1/128");
    }
}

//! Netlink attributes of netfilter: numbers are in network byte order, nests carry their flag.

/// Length of `struct nlattr`, bytes (linux/netlink.h).
const HEADER: usize = 4;

/// `NLA_F_NESTED` (linux/netlink.h).
const NESTED: u16 = 1 << 15;

/// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const FLAGS: u16 = 0b11 << 14;

/// `NFTA_LIST_ELEM` (linux/netfilter/nf_tables.h): members of a list all have this kind, and their order counts.
pub const LIST_ELEM: u16 = 1;

/// Attributes being written.
#[derive(Clone, Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// A netfilter message: `struct nfgenmsg` with family and resource (linux/netfilter/nfnetlink.h).
    pub fn message(family: u8, resource: u16) -> Self {
        let mut bytes = vec![family, 0];
        bytes.extend(resource.to_be_bytes());
        Self(bytes)
    }

    /// Appends raw bytes.
    pub fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a number.
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends a text with its terminating zero.
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Appends attributes inside another.
    pub fn nest(self, kind: u16, inner: Self) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// One attribute: its kind with flags, and its value.
type Attribute<'a> = (u16, &'a [u8]);

/// Attributes being read, up to the first that is cut short. Unlike the iterator of netlink-packet-core, the values
/// live as long as the message.
pub fn iter(bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (head, _) = rest.split_first_chunk::<HEADER>()?;
        let [a, b, c, d] = *head;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]), value))
    })
}

/// The value of the first attribute of a kind.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    iter(bytes).find(|(seen, _)| seen & !FLAGS == kind).map(|(_, value)| value)
}

/// The number of that kind.
pub fn u32(bytes: &[u8], kind: u16) -> Option<u32> {
    find(bytes, kind)?.get(..4)?.try_into().ok().map(u32::from_be_bytes)
}

/// The text of that kind, without its zero.
pub fn text(bytes: &[u8], kind: u16) -> Option<&str> {
    let value = find(bytes, kind)?;
    std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
}

/// Whether every attribute of `wanted` is in `seen` with the same value; the kernel may add others, and leaves out
/// nests that are empty.
pub fn includes(seen: &[u8], wanted: &[u8]) -> bool {
    iter(wanted).all(|(kind, value)| match find(seen, kind & !FLAGS) {
        Some(found) if kind & NESTED != 0 => includes(found, value),
        Some(found) => found == value,
        None => value.is_empty(),
    })
}

/// [`includes`] for each member of two lists, of which there must be as many.
pub fn list_includes(seen: &[u8], wanted: &[u8]) -> bool {
    let (mut seen, mut wanted) = (iter(seen), iter(wanted));
    loop {
        match (seen.next(), wanted.next()) {
            (None, None) => return true,
            (Some((_, seen)), Some((_, wanted))) if includes(seen, wanted) => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let inner = Writer::default().u32(1, 7).text(2, "ab");
        let bytes = Writer::default().nest(4, inner).bytes(5, &[1, 2, 3]).u32(6, 9).0;
        assert_eq!(u32(&bytes, 6), Some(9));
        assert_eq!(find(&bytes, 5), Some(&[1, 2, 3][..]));
        let nest = find(&bytes, 4).unwrap();
        assert_eq!((u32(nest, 1), text(nest, 2)), (Some(7), Some("ab")));
        for cut in 0..bytes.len() {
            let _ = iter(&bytes[..cut]).count();
        }
    }

    #[test]
    fn additions_are_no_difference_and_changes_are() {
        let wanted = Writer::default().nest(2, Writer::default().u32(1, 7)).text(3, "a").nest(9, Writer::default()).0;
        let seen =
            |number| Writer::default().u32(8, 1).nest(2, Writer::default().u32(5, 1).u32(1, number)).text(3, "a").0;
        assert!(includes(&seen(7), &wanted));
        assert!(!includes(&seen(8), &wanted));
        assert!(!includes(&wanted, &seen(7)));
        let list = |numbers: &[u32]| {
            let member = |writer: Writer, number: &u32| writer.nest(LIST_ELEM, Writer::default().u32(1, *number));
            numbers.iter().fold(Writer::default(), member).0
        };
        assert!(list_includes(&list(&[1, 2]), &list(&[1, 2])));
        for other in [&[2, 1][..], &[1], &[1, 2, 3]] {
            assert!(!list_includes(&list(other), &list(&[1, 2])), "{other:?}");
        }
    }
}

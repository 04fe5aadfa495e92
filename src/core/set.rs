//! Exact algebra over prefixes of both address families.
//!
//! Everything here relies on one order, that of [`IpNet`]: family, then address, then length. In it a prefix comes
//! right before the prefixes that it covers, and two prefixes either nest or do not touch.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;

/// A set of prefixes (a union of addresses), kept sorted, with covered prefixes dropped. Both families.
///
/// Siblings are not joined, so two sets of the same addresses may differ in their members.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CidrSet {
    /// Sorted, without host bits, none covering another.
    members: Vec<IpNet>,
}

impl CidrSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the addresses of `net`. Members that it covers are dropped.
    pub fn insert(&mut self, net: IpNet) {
        let net = net.trunc();
        if self.covering(&net).is_none() {
            self.members.splice(self.range_inside(&net), [net]);
        }
    }

    /// Whether every address of `net` is in the set, be it in one member or in several together.
    pub fn contains(&self, net: &IpNet) -> bool {
        self.covering(net).is_some() || fills(self.inside(net), net)
    }

    /// The single member that equals or covers `net`.
    pub fn covering(&self, net: &IpNet) -> Option<IpNet> {
        // Members do not overlap: any other one between the covering member and `net` would lie inside the former.
        let upto = self.members.partition_point(|member| member <= net);
        let nearest = self.members.get(upto.checked_sub(1)?)?;
        nearest.contains(net).then_some(*nearest)
    }

    /// Whether any address of `net` is in the set.
    pub fn overlaps(&self, net: &IpNet) -> bool {
        self.covering(net).is_some() || !self.inside(net).is_empty()
    }

    /// The members in order.
    pub fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.members.iter()
    }

    /// Whether the set has no address.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The members equal to `net` or covered by it.
    fn inside(&self, net: &IpNet) -> &[IpNet] {
        self.members.get(self.range_inside(net)).unwrap_or_default()
    }

    /// Where the members equal to `net` or covered by it are.
    fn range_inside(&self, net: &IpNet) -> Range<usize> {
        let (first, last) = (net.trunc(), net.broadcast());
        let start = self.members.partition_point(|member| *member < first);
        let end = self.members.partition_point(|member| member.network() <= last);
        // Whatever sorts before `first` also starts no later than `last`, so the range never runs backwards.
        start..end
    }

    /// Restores order after members were appended.
    fn normalise(&mut self) {
        self.members.sort_unstable();
        let mut last: Option<IpNet> = None;
        self.members.retain(|member| {
            let fresh = !last.is_some_and(|last| last.contains(member));
            if fresh {
                last = Some(*member);
            }
            fresh
        });
    }
}

impl Extend<IpNet> for CidrSet {
    fn extend<I: IntoIterator<Item = IpNet>>(&mut self, nets: I) {
        self.members.extend(nets.into_iter().map(|net| net.trunc()));
        self.normalise();
    }
}

impl FromIterator<IpNet> for CidrSet {
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        let mut set = Self::new();
        set.extend(nets);
        set
    }
}

/// Whether `parts`, sorted prefixes inside `net`, leave no address of it out.
fn fills(parts: &[IpNet], net: &IpNet) -> bool {
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return false };
    let meets = |left: &IpNet, right: &IpNet| successor(left.broadcast()) == Some(right.network());
    first.network() == net.network()
        && last.broadcast() == net.broadcast()
        && parts.iter().zip(parts.iter().skip(1)).all(|(left, right)| meets(left, right))
}

/// The address after `addr`, none after the last of its family.
pub fn successor(addr: IpAddr) -> Option<IpAddr> {
    match addr {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

/// The fewest prefixes that are exactly `net` minus `holes`, sorted.
pub fn subtract(net: IpNet, holes: &CidrSet) -> Vec<IpNet> {
    let mut rest = Vec::new();
    if holes.covering(&net).is_none() {
        carve(net.trunc(), holes.inside(&net), &mut rest);
    }
    rest
}

/// Appends `net` minus `holes`, all of which lie inside `net`. A prefix without holes is kept whole and one with holes
/// cannot be, so halving gives the fewest parts. At most as deep as an address has bits.
fn carve(net: IpNet, holes: &[IpNet], rest: &mut Vec<IpNet>) {
    let Some(first) = holes.first() else {
        rest.push(net);
        return;
    };
    if *first == net {
        return;
    }
    let Some((low, high)) = halves(&net) else { return };
    let (low_holes, high_holes) = holes.split_at(holes.partition_point(|hole| hole.network() < high.network()));
    carve(low, low_holes, rest);
    carve(high, high_holes, rest);
}

/// The two prefixes one bit longer, none for a host route.
fn halves(net: &IpNet) -> Option<(IpNet, IpNet)> {
    let mut halves = net.subnets(net.prefix_len().checked_add(1)?).ok()?;
    Some((halves.next()?, halves.next()?))
}

/// A prefix with what a route to it carries besides the prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<A> {
    /// The destination.
    pub net: IpNet,
    /// Everything else; entries of equal `attr` send a packet the same way.
    pub attr: A,
}

/// Drops every entry that changes nothing because its nearest covering prefix, among entries and `barriers`, is an
/// entry of equal `attr`. Longest-prefix match over both gives the same answer for every address before and after.
///
/// `barriers` are prefixes that other routes hold (connected subnets, foreign routes). An entry whose nearest cover is
/// a barrier stays. An entry that equals a barrier stays too, and is a barrier for what lies below it: which of the
/// two routes wins is not known here. The same goes for equal prefixes of different `attr`, which callers are to merge
/// first; exact duplicates are reduced to one. The result is sorted.
pub fn drop_covered<A: PartialEq>(entries: Vec<Entry<A>>, barriers: &[IpNet]) -> Vec<Entry<A>> {
    let (entries, fixed) = prepare(entries, barriers);
    let mut fixed = fixed.into_iter().peekable();
    // The chain of prefixes around the current one, nearest last: the index of a kept entry, or none for a barrier.
    let mut around: Vec<(IpNet, Option<usize>)> = Vec::new();
    let mut kept: Vec<Entry<A>> = Vec::with_capacity(entries.len());
    for entry in entries {
        while let Some(barrier) = fixed.next_if(|barrier| *barrier <= entry.net) {
            leave(&mut around, &barrier);
            around.push((barrier, None));
        }
        leave(&mut around, &entry.net);
        match around.last() {
            Some((_, Some(index))) if kept.get(*index).is_some_and(|cover| cover.attr == entry.attr) => continue,
            Some((barrier, None)) if *barrier == entry.net => {}
            _ => around.push((entry.net, Some(kept.len()))),
        }
        kept.push(entry);
    }
    kept
}

/// Drops from the chain what does not cover `net`.
fn leave(around: &mut Vec<(IpNet, Option<usize>)>, net: &IpNet) {
    while around.pop_if(|(cover, _)| !cover.contains(net)).is_some() {}
}

/// Joins sibling prefixes of equal `attr` as often as possible without changing longest-prefix match over entries and
/// `barriers` for any address.
///
/// Two siblings may become their parent exactly when nothing else holds the parent: every address in it matched a
/// sibling or something longer, and still does. Hence no join into a prefix that equals a barrier or another entry,
/// and no join of an entry that equals a barrier (or an equal prefix of different `attr`). Two `/1` stay as they are:
/// writing a default route is never the result of a saving. The result is sorted.
pub fn join_siblings<A: PartialEq>(entries: Vec<Entry<A>>, barriers: &[IpNet]) -> Vec<Entry<A>> {
    let (entries, fixed) = prepare(entries, barriers);
    let is_fixed = |net: &IpNet| fixed.binary_search(net).is_ok();
    let (mut done, free): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| is_fixed(&entry.net));
    let mut table: BTreeMap<IpNet, A> = free.into_iter().map(|entry| (entry.net, entry.attr)).collect();

    // Parents to look at. A join makes at most three more worth a look: the one above, for its new half, and the two
    // halves, since no entry stands in their way any more. Each join takes an entry away, so this ends.
    let mut pending: Vec<IpNet> = table.keys().filter_map(parent_of_low).collect();
    while let Some(parent) = pending.pop() {
        if is_fixed(&parent) || table.contains_key(&parent) {
            continue;
        }
        if let Some((low, high)) = join(&mut table, parent) {
            pending.extend([low, high]);
            pending.extend(parent.supernet());
        }
    }
    done.extend(table.into_iter().map(|(net, attr)| Entry { net, attr }));
    done.sort_by_key(|entry| entry.net);
    done
}

/// The parent of the lower of two siblings, so that a pair is looked at once.
fn parent_of_low(net: &IpNet) -> Option<IpNet> {
    net.supernet().filter(|parent| parent.network() == net.network())
}

/// Replaces the halves of `parent` by it and returns them, if both are there with equal attributes.
fn join<A: PartialEq>(table: &mut BTreeMap<IpNet, A>, parent: IpNet) -> Option<(IpNet, IpNet)> {
    let (low, high) = halves(&parent).filter(|_| parent.prefix_len() > 0)?;
    if table.get(&low)? != table.get(&high)? {
        return None;
    }
    let attr = table.remove(&low)?;
    table.remove(&high);
    table.insert(parent, attr);
    Some((low, high))
}

/// Sorts entries without exact duplicates, and the prefixes whose answer must not be touched: the barriers, and the
/// prefixes that entries of different `attr` share.
fn prepare<A: PartialEq>(mut entries: Vec<Entry<A>>, barriers: &[IpNet]) -> (Vec<Entry<A>>, Vec<IpNet>) {
    for entry in &mut entries {
        entry.net = entry.net.trunc();
    }
    entries.sort_by_key(|entry| entry.net);
    entries.dedup();
    let shared = entries.iter().zip(entries.iter().skip(1)).filter(|(one, next)| one.net == next.net);
    let mut fixed: Vec<IpNet> = barriers.iter().map(IpNet::trunc).chain(shared.map(|(one, _)| one.net)).collect();
    fixed.sort_unstable();
    fixed.dedup();
    (entries, fixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| net(text)).collect()
    }

    fn set(texts: &[&str]) -> CidrSet {
        nets(texts).into_iter().collect()
    }

    /// Entries from `prefix attr`.
    fn entries(texts: &[&str]) -> Vec<Entry<String>> {
        let split = texts.iter().map(|text| text.split_once(' ').unwrap());
        split.map(|(prefix, attr)| Entry { net: net(prefix), attr: attr.to_owned() }).collect()
    }

    #[test]
    fn drops_covered_members() {
        let expected = nets(&["10.0.0.0/8", "11.0.0.0/9", "::/0"]);
        let texts = ["10.1.0.0/16", "::1/128", "11.0.0.0/9", "10.0.0.0/8", "10.9.9.9/8", "::/0"];
        assert_eq!(set(&texts).members, expected);
        let mut one_by_one = CidrSet::new();
        assert!(one_by_one.is_empty());
        nets(&texts).into_iter().for_each(|net| one_by_one.insert(net));
        assert_eq!(one_by_one.iter().copied().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn contains_through_several_members() {
        let halves = set(&["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/2", "c000::/2"]);
        assert!(halves.contains(&net("0.0.0.0/0")) && halves.contains(&net("::/0")));
        assert_eq!(halves.covering(&net("0.0.0.0/0")), None);
        assert_eq!(halves.covering(&net("200.1.2.3/24")), Some(net("128.0.0.0/1")));
        assert!(!set(&["::/1", "c000::/2"]).contains(&net("::/0")));
        assert!(!CidrSet::new().contains(&net("10.0.0.0/8")));
    }

    #[test]
    fn subtracts() {
        let cases: [(&str, &[&str], &[&str]); 6] = [
            ("10.0.0.0/8", &["192.168.0.0/16", "::/0"], &["10.0.0.0/8"]),
            ("10.0.0.0/8", &["10.0.0.0/8"], &[]),
            ("10.0.0.0/8", &["0.0.0.0/0"], &[]),
            ("10.0.0.0/30", &["10.0.0.1/32"], &["10.0.0.0/32", "10.0.0.2/31"]),
            ("10.0.0.0/31", &["10.0.0.0/32", "10.0.0.1/32"], &[]),
            ("fd00::7/126", &["fd00::6/127"], &["fd00::4/127"]),
        ];
        for (from, holes, expected) in cases {
            assert_eq!(subtract(net(from), &set(holes)), nets(expected), "{from} minus {holes:?}");
        }
        assert_eq!(subtract(net("::/0"), &set(&["::/128"])).len(), 128);
    }

    #[test]
    fn drops_what_changes_nothing() {
        let cases: [(&[&str], &[&str], &[&str]); 6] = [
            // A chain of equals, and a copy.
            (&["10.0.0.0/8 a", "10.0.0.0/8 a", "10.1.0.0/16 a", "10.1.1.0/24 a"], &[], &["10.0.0.0/8 a"]),
            // Another attribute, or a barrier, in between.
            (
                &["10.0.0.0/8 a", "10.1.0.0/16 b", "10.1.1.0/24 a"],
                &[],
                &["10.0.0.0/8 a", "10.1.0.0/16 b", "10.1.1.0/24 a"],
            ),
            (&["10.0.0.0/8 a", "10.1.1.0/24 a"], &["10.1.0.0/16"], &["10.0.0.0/8 a", "10.1.1.0/24 a"]),
            // The barrier is left again.
            (&["10.0.0.0/8 a", "10.2.1.0/24 a"], &["10.1.0.0/16"], &["10.0.0.0/8 a"]),
            // An entry that is a barrier stays, and counts as one.
            (
                &["10.0.0.0/8 a", "10.1.0.0/16 a", "10.1.1.0/24 a"],
                &["10.1.0.0/16"],
                &["10.0.0.0/8 a", "10.1.0.0/16 a", "10.1.1.0/24 a"],
            ),
            // So does a prefix that two entries dispute.
            (
                &["10.0.0.0/8 a", "10.0.0.0/8 b", "10.1.0.0/16 b"],
                &[],
                &["10.0.0.0/8 a", "10.0.0.0/8 b", "10.1.0.0/16 b"],
            ),
        ];
        for (given, barriers, expected) in cases {
            assert_eq!(drop_covered(entries(given), &nets(barriers)), entries(expected), "{given:?} {barriers:?}");
        }
    }

    #[test]
    fn joins_siblings() {
        let cases: [(&[&str], &[&str], &[&str]); 9] = [
            (&["10.0.0.0/26 a", "10.0.0.64/26 a", "10.0.0.128/25 a"], &[], &["10.0.0.0/24 a"]),
            (&["10.0.0.0/25 a", "10.0.0.128/25 b"], &[], &["10.0.0.0/25 a", "10.0.0.128/25 b"]),
            // Neighbours, not siblings.
            (&["10.0.1.0/24 a", "10.0.2.0/24 a"], &[], &["10.0.1.0/24 a", "10.0.2.0/24 a"]),
            // Something longer between the siblings is no obstacle.
            (&["10.0.0.0/25 a", "10.0.0.0/26 b", "10.0.0.128/25 a"], &[], &["10.0.0.0/24 a", "10.0.0.0/26 b"]),
            // The parent is taken.
            (&["10.0.0.0/25 a", "10.0.0.128/25 a"], &["10.0.0.0/24"], &["10.0.0.0/25 a", "10.0.0.128/25 a"]),
            (
                &["10.0.0.0/24 b", "10.0.0.0/25 a", "10.0.0.128/25 a"],
                &[],
                &["10.0.0.0/24 b", "10.0.0.0/25 a", "10.0.0.128/25 a"],
            ),
            // The parent is taken until it is joined itself.
            (
                &["10.0.0.0/24 b", "10.0.1.0/24 b", "10.0.0.0/25 a", "10.0.0.128/25 a"],
                &[],
                &["10.0.0.0/23 b", "10.0.0.0/24 a"],
            ),
            // A sibling is a barrier too.
            (&["10.0.0.0/25 a", "10.0.0.128/25 a"], &["10.0.0.0/25"], &["10.0.0.0/25 a", "10.0.0.128/25 a"]),
            // Never a default route.
            (
                &["0.0.0.0/1 a", "128.0.0.0/1 a", "::/1 a", "8000::/1 a"],
                &[],
                &["0.0.0.0/1 a", "128.0.0.0/1 a", "::/1 a", "8000::/1 a"],
            ),
        ];
        for (given, barriers, expected) in cases {
            assert_eq!(join_siblings(entries(given), &nets(barriers)), entries(expected), "{given:?} {barriers:?}");
        }
    }
}

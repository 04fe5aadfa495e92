//! Compares the prefix algebra, address by address, with models that are too simple to be wrong.
//!
//! Two small worlds, each with both families, 256 points per family and prefixes of nine lengths: the *tail* ends at
//! host routes, the *head* starts at the default route, where the edge cases of length 0 and of the last address are.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use crosslink_core::set::{CidrSet, Entry, drop_covered, join_siblings, subtract};
use ipnet::IpNet;
use proptest::prelude::*;

/// Where the 256 points of a case lie.
#[derive(Clone, Copy, Debug)]
enum World {
    /// `10.0.0.0/24` to `/32` and `fd00::/120` to `/128`; a point is an address.
    Tail,
    /// `0.0.0.0/0` to `/8` and `::/0` to `/8`; a point stands for its `/8`.
    Head,
}

/// A prefix before the world is known: family, point, and bits of the nine lengths.
type Spot = (bool, u8, u8);

/// Entries of a case, without equal prefixes of different attributes.
type Entries = Vec<Entry<u8>>;

impl World {
    fn addr(self, v6: bool, point: u8) -> IpAddr {
        match (self, v6) {
            (World::Tail, false) => IpAddr::from([10, 0, 0, point]),
            (World::Tail, true) => IpAddr::V6(Ipv6Addr::from((0xfd00 << 112) | u128::from(point))),
            (World::Head, false) => IpAddr::from([point, 0, 0, 0]),
            (World::Head, true) => IpAddr::V6(Ipv6Addr::from(u128::from(point) << 120)),
        }
    }

    fn net(self, (v6, point, bits): Spot) -> IpNet {
        let base = match (self, v6) {
            (World::Tail, false) => 24,
            (World::Tail, true) => 120,
            (World::Head, _) => 0,
        };
        IpNet::new_assert(self.addr(v6, point), base + bits)
    }

    fn nets(self, spots: Vec<Spot>) -> Vec<IpNet> {
        spots.into_iter().map(|spot| self.net(spot)).collect()
    }

    fn points(self) -> Vec<IpAddr> {
        [false, true].into_iter().flat_map(|v6| (0..=255).map(move |point| self.addr(v6, point))).collect()
    }
}

fn world() -> impl Strategy<Value = World> {
    prop_oneof![Just(World::Tail), Just(World::Head)]
}

fn spot() -> impl Strategy<Value = Spot> {
    (prop::bool::weighted(0.3), any::<u8>(), 0..=8_u8)
}

/// Spots that crowd into 16 points, so that siblings, equals and nested prefixes are common.
fn crowded_spot() -> impl Strategy<Value = Spot> {
    prop_oneof![4 => (Just(false), 0..16_u8, 4..=8_u8), 1 => (Just(false), any::<u8>(), 0..=3_u8), 1 => spot()]
}

fn nets(most: usize) -> impl Strategy<Value = (World, Vec<IpNet>)> {
    (world(), prop::collection::vec(spot(), 0..most)).prop_map(|(world, spots)| (world, world.nets(spots)))
}

/// A world, entries with some exact duplicates, and barriers.
fn table() -> impl Strategy<Value = (World, Entries, Vec<IpNet>)> {
    let entries = prop::collection::vec((crowded_spot(), 0..2_u8, prop::bool::weighted(0.1)), 0..40);
    (world(), entries, prop::collection::vec(crowded_spot(), 0..6)).prop_map(|(world, rows, barriers)| {
        let mut attrs = BTreeMap::new();
        let mut entries = Vec::new();
        for (spot, attr, twice) in rows {
            let net = world.net(spot);
            let attr = *attrs.entry(net.trunc()).or_insert(attr);
            if twice || !entries.iter().any(|entry: &Entry<u8>| entry.net.trunc() == net.trunc()) {
                entries.push(Entry { net, attr });
            }
        }
        (world, entries, world.nets(barriers))
    })
}

/// Which points any of `nets` holds.
fn bitmap<'a>(points: &[IpAddr], nets: impl IntoIterator<Item = &'a IpNet>) -> Vec<bool> {
    let nets: Vec<_> = nets.into_iter().collect();
    points.iter().map(|point| nets.iter().any(|net| net.contains(point))).collect()
}

/// What longest-prefix match finds for a point: the attributes and whether a barrier is among the longest.
fn lookup(point: &IpAddr, entries: &[Entry<u8>], barriers: &[IpNet]) -> Option<(Vec<u8>, bool)> {
    let lens = entries.iter().map(|entry| &entry.net).chain(barriers).filter(|net| net.contains(point));
    let longest = lens.map(IpNet::prefix_len).max()?;
    let hit = |net: &IpNet| net.prefix_len() == longest && net.contains(point);
    let mut attrs: Vec<_> = entries.iter().filter(|entry| hit(&entry.net)).map(|entry| entry.attr).collect();
    attrs.sort_unstable();
    attrs.dedup();
    Some((attrs, barriers.iter().any(hit)))
}

fn assert_same_lookups(world: World, before: &[Entry<u8>], after: &[Entry<u8>], barriers: &[IpNet]) {
    for point in world.points() {
        assert_eq!(lookup(&point, before, barriers), lookup(&point, after, barriers), "answer for {point}");
    }
}

fn assert_strictly_sorted(nets: &[IpNet]) {
    assert!(nets.windows(2).all(|pair| matches!(pair, [one, next] if one < next)), "not sorted: {nets:?}");
    assert!(nets.iter().all(|net| *net == net.trunc()), "host bits: {nets:?}");
}

fn prefixes(entries: &[Entry<u8>]) -> Vec<IpNet> {
    entries.iter().map(|entry| entry.net).collect()
}

fn siblings(one: &IpNet, other: &IpNet) -> bool {
    one != other && one.prefix_len() > 0 && one.supernet() == other.supernet()
}

/// Whether the nearest strict cover of `entry` is an entry of the same attribute, and no barrier.
fn is_useless(entry: &Entry<u8>, entries: &[Entry<u8>], barriers: &[IpNet]) -> bool {
    let covers = |net: &IpNet| net.prefix_len() < entry.net.prefix_len() && net.contains(&entry.net);
    let nearest = entries.iter().filter(|other| covers(&other.net)).max_by_key(|other| other.net.prefix_len());
    let wall = barriers.iter().filter(|net| covers(net)).map(IpNet::prefix_len).max();
    let taken = barriers.iter().any(|net| net.trunc() == entry.net);
    nearest.is_some_and(|near| near.attr == entry.attr && wall < Some(near.net.prefix_len())) && !taken
}

proptest! {
    // No file of failures: it would be written to src/, where every directory is a member of the workspace.
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn union_is_exact_and_reduced((world, nets) in nets(40)) {
        let set: CidrSet = nets.iter().copied().collect();
        let members: Vec<_> = set.iter().copied().collect();
        prop_assert_eq!(bitmap(&world.points(), &members), bitmap(&world.points(), &nets));
        assert_strictly_sorted(&members);
        for member in &members {
            prop_assert_eq!(members.iter().filter(|other| other.contains(member)).count(), 1);
            prop_assert!(nets.iter().any(|net| net.trunc() == *member));
        }
        prop_assert_eq!(set.is_empty(), nets.is_empty());
    }

    #[test]
    fn insert_and_extend_build_the_same_set((_, nets) in nets(40), split in 0..40_usize) {
        let whole: CidrSet = nets.iter().copied().collect();
        let mut inserted = CidrSet::new();
        nets.iter().for_each(|net| inserted.insert(*net));
        prop_assert_eq!(&inserted, &whole);
        let mut extended: CidrSet = nets.iter().copied().take(split).collect();
        extended.extend(nets.iter().copied().skip(split));
        prop_assert_eq!(&extended, &whole);
    }

    #[test]
    fn queries_match_the_bitmap((world, members, _) in table(), asked in crowded_spot()) {
        let (set, asked): (CidrSet, _) = (prefixes(&members).into_iter().collect(), world.net(asked));
        let held = bitmap(&world.points(), set.iter());
        let wanted = bitmap(&world.points(), [&asked]);
        let mut pairs = held.iter().zip(&wanted);
        prop_assert_eq!(set.contains(&asked), pairs.clone().all(|(held, wanted)| *held || !*wanted));
        prop_assert_eq!(set.overlaps(&asked), pairs.any(|(held, wanted)| *held && *wanted));
        prop_assert_eq!(set.covering(&asked), set.iter().find(|member| member.contains(&asked)).copied());
    }

    #[test]
    fn subtract_is_exact_and_minimal((world, holes) in nets(12), from in spot()) {
        let (from, holes) = (world.net(from), holes.into_iter().collect::<CidrSet>());
        let rest = subtract(from, &holes);
        let all = bitmap(&world.points(), [&from]).into_iter().zip(bitmap(&world.points(), holes.iter()));
        let expected: Vec<_> = all.map(|(from, hole)| from && !hole).collect();
        prop_assert_eq!(bitmap(&world.points(), &rest), expected);
        assert_strictly_sorted(&rest);
        for (index, one) in rest.iter().enumerate() {
            for other in rest.iter().skip(index + 1) {
                prop_assert!(!one.contains(other) && !other.contains(one), "{one} and {other} overlap");
                prop_assert!(!siblings(one, other), "{one} and {other} are siblings");
            }
        }
        if !holes.overlaps(&from) {
            prop_assert_eq!(rest, vec![from.trunc()]);
        }
    }

    #[test]
    fn drop_covered_keeps_every_answer((world, entries, barriers) in table()) {
        let kept = drop_covered(entries.clone(), &barriers);
        assert_same_lookups(world, &entries, &kept, &barriers);
        assert_strictly_sorted(&prefixes(&kept));
        prop_assert_eq!(&drop_covered(kept.clone(), &barriers), &kept);
        for entry in &kept {
            prop_assert!(entries.iter().any(|old| old.net.trunc() == entry.net && old.attr == entry.attr));
            prop_assert!(!is_useless(entry, &kept, &barriers), "{entry:?} could go");
        }
        for old in &entries {
            let old = Entry { net: old.net.trunc(), attr: old.attr };
            prop_assert!(kept.contains(&old) || is_useless(&old, &entries, &barriers), "{old:?} had to stay");
        }
    }

    #[test]
    fn join_siblings_keeps_every_answer((world, entries, barriers) in table()) {
        let joined = join_siblings(entries.clone(), &barriers);
        assert_same_lookups(world, &entries, &joined, &barriers);
        let (before, after) = (prefixes(&entries), prefixes(&joined));
        assert_strictly_sorted(&after);
        prop_assert_eq!(&join_siblings(joined.clone(), &barriers), &joined);
        let is_barrier = |net: &IpNet| barriers.iter().any(|barrier| barrier.trunc() == *net);
        for net in after.iter().filter(|net| !before.iter().any(|old| old.trunc() == **net)) {
            prop_assert!(net.prefix_len() > 0 && !is_barrier(net), "{net} was made");
        }
        for old in &entries {
            let lives_on = joined.iter().any(|new| new.net.contains(&old.net) && new.attr == old.attr);
            prop_assert!(lives_on, "{old:?} is lost");
        }
        for (index, one) in joined.iter().enumerate() {
            for other in joined.iter().skip(index + 1).filter(|other| siblings(&one.net, &other.net)) {
                let parent = one.net.supernet();
                let held = parent.is_none_or(|parent| {
                    let fixed = [parent, one.net, other.net].iter().any(is_barrier);
                    fixed || parent.prefix_len() == 0 || after.contains(&parent)
                });
                prop_assert!(held || one.attr != other.attr, "{} and {} could be joined", one.net, other.net);
            }
        }
    }

    #[test]
    fn both_steps_together_keep_every_answer((world, entries, barriers) in table()) {
        let fewest = drop_covered(join_siblings(drop_covered(entries.clone(), &barriers), &barriers), &barriers);
        assert_same_lookups(world, &entries, &fewest, &barriers);
    }
}

/// Repeatable numbers (xorshift), so that a slow run can be run again.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A prefix of a busy cluster: of `10.0.0.0/8` or `fd00::/8`, crowded enough to nest and to join.
    fn net(&mut self) -> IpNet {
        let bits = self.next();
        let addr = u32::try_from(bits & 0xff_ffff).unwrap_or_default();
        let len = 14 + u8::try_from((bits >> 32) % 10).unwrap_or_default();
        match (bits >> 60) % 4 {
            0 => IpNet::new_assert(IpAddr::V6(Ipv6Addr::from((0xfd << 120) | (u128::from(addr) << 96))), len),
            _ => IpNet::new_assert(IpAddr::V4(Ipv4Addr::from((10 << 24) | addr)), len),
        }
        .trunc()
    }

    /// Two attributes, one of them rare, so that neighbours mostly agree.
    fn entries(&mut self, count: usize) -> Entries {
        let mut attrs = BTreeMap::new();
        while attrs.len() < count {
            let attr = u8::from(self.next().is_multiple_of(16));
            attrs.entry(self.net()).or_insert(attr);
        }
        attrs.into_iter().map(|(net, attr)| Entry { net, attr }).collect()
    }
}

#[expect(clippy::print_stdout, reason = "the measured time is what the test is for")]
fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    let took = start.elapsed();
    println!("{what}: {took:?}");
    assert!(took < Duration::from_millis(500), "{what} took {took:?}");
    result
}

/// The bound is far above the few milliseconds it takes: it catches a quadratic step, not a busy machine.
#[test]
fn ten_thousand_prefixes_are_quick() {
    let mut numbers = Numbers(0x5eed_1234_5678_9abc);
    let mut entries = numbers.entries(10_000);
    entries.sort_by_key(|entry| (entry.net.prefix_len() ^ 21, entry.net));
    let barriers: Vec<_> = (0..1_000).map(|_| numbers.net()).collect();
    let (given, all) = (entries.clone(), entries.clone());
    let kept = timed("drop_covered", || drop_covered(given, &barriers));
    let joined = timed("join_siblings", || join_siblings(all, &barriers));
    println!("{} entries, {} after drop_covered, {} after join_siblings", entries.len(), kept.len(), joined.len());
    assert!(kept.len() < entries.len() && joined.len() < entries.len());

    let set: CidrSet = timed("from_iter", || prefixes(&entries).into_iter().collect());
    let hits = timed("10,000 queries", || entries.iter().filter(|entry| set.contains(&entry.net)).count());
    assert_eq!(hits, entries.len());
    let whole = IpNet::new_assert(IpAddr::from([0, 0, 0, 0]), 0);
    let rest = timed("subtract", || subtract(whole, &set));
    assert!(rest.iter().all(|net| !set.overlaps(net)));
}

/// Every second of 10,000 neighbours is missing first, none later: no join at all, then as many as there can be.
#[test]
fn a_full_row_joins_into_few() {
    let row = |step: u32| (0..8_192_u32).map(move |index| (10 << 24) | (index * step * 256));
    let entries = |step| -> Entries {
        row(step).map(|bits| Entry { net: IpNet::new_assert(IpAddr::V4(bits.into()), 24), attr: 0 }).collect()
    };
    assert_eq!(timed("no joins", || join_siblings(entries(2), &[])).len(), 8_192);
    let joined = timed("all joins", || join_siblings(entries(1), &[]));
    assert_eq!(prefixes(&joined), vec![IpNet::new_assert(IpAddr::from([10, 0, 0, 0]), 11)]);
}

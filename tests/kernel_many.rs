//! Large numbers of routes, lost answers, and dumps of tables that change while they are read.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "support/bed.rs"]
mod bed;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use bed::{Bed, route};
use crosslink_core::model::{Change, Route, Rule, Side};
use crosslink_kernel::{
    Error, Kernel, PodQuery,
    socket::{Fate, Request, Socket},
};
use crosslink_testkit::in_netns;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use nix::errno::Errno;

/// The route of that number, on the link.
fn numbered(number: u32, v6: bool) -> Route {
    let dst = if v6 {
        IpAddr::V6(Ipv6Addr::from((0xfd99_u128 << 112) | (u128::from(number) << 64)))
    } else {
        IpAddr::V4(Ipv4Addr::from(0x6440_0000 | (number << 8)))
    };
    let dst = IpNet::new(dst, if v6 { 64 } else { 24 }).unwrap();
    Route { dst, ..route("0.0.0.0/0 dev eth0") }
}

fn adds(count: u32, v6: bool) -> Vec<Change> {
    (0..count).map(|number| Change::AddRoute(Side::Pod, numbered(number, v6))).collect()
}

#[test]
fn batches_of_all_sizes_are_complete() {
    for (count, v6) in [1, 249, 250, 251, 500, 1000, 5000].into_iter().flat_map(|count| [(count, false), (count, true)])
    {
        let bed = Bed::new();
        let changes = adds(count, v6);
        let started = Instant::now();
        let applied = bed.apply(&changes);
        println!("{count} routes, IPv6 {v6}: {:?}", started.elapsed());
        assert_eq!(applied.done, (0..changes.len()).collect::<Vec<_>>());
        assert!(applied.failures.is_empty() && applied.unknown.is_empty());
        let state = bed.pod_state();
        let seen: BTreeSet<IpNet> = state.routes.iter().filter(|seen| seen.ours()).map(|seen| seen.route.dst).collect();
        assert_eq!(seen, (0..count).map(|number| numbered(number, v6).dst).collect());
        let family = if v6 { "-6" } else { "-4" };
        assert_eq!(bed.pod.ip(&format!("{family} route show proto 141")).lines().count(), changes.len());
        let deletions: Vec<Change> =
            (0..count).map(|number| Change::DeleteRoute(Side::Pod, numbered(number, v6))).collect();
        assert_eq!(bed.apply(&deletions).done.len(), changes.len());
        assert_eq!(bed.pod.ip(&format!("{family} route show proto 141")), "");
    }
}

#[test]
fn no_refusal_of_many_is_lost() {
    for v6 in [false, true] {
        let bed = Bed::new();
        let changes = adds(1000, v6);
        bed.must(&changes);
        let again = bed.apply(&changes);
        assert_eq!((again.done.len(), again.unknown.len(), again.failures.len()), (0, 0, 1000));
        for (place, (at, err)) in again.failures.iter().enumerate() {
            assert!(*at == place && matches!(err, Error::Netlink { errno: Errno::EEXIST, .. }), "{at} {err}");
        }
        // Every second one is there already.
        let bed = Bed::new();
        let half: Vec<Change> = changes.iter().step_by(2).cloned().collect();
        bed.must(&half);
        let mixed = bed.apply(&changes);
        assert_eq!(mixed.done, (0..1000).filter(|place| place % 2 == 1).collect::<Vec<_>>());
        assert_eq!(mixed.failures.len(), 500);
    }
}

#[test]
fn what_comes_after_a_refusal_on_the_other_side_is_not_tried() {
    let bed = Bed::new();
    let family = crosslink_core::model::Family::V4;
    let changes = [
        Change::AddRoute(Side::Pod, numbered(1, false)),
        Change::AddRoute(Side::Pod, numbered(1, false)),
        Change::AddRule(Rule { family, priority: 1410, table: 1410 }),
        Change::AddRoute(Side::Pod, numbered(2, false)),
    ];
    let applied = bed.apply(&changes);
    assert_eq!((applied.done, applied.failures.len()), (vec![0], 1), "of its batch all were tried");
    assert_eq!(bed.node.ip("rule show priority 1410"), "");
    assert!(!bed.pod.ip("route show proto 141").contains("100.64.2.0"));
}

/// A request that adds [`numbered`], without the help of `System`.
fn request(number: u32, dev: u32) -> Request {
    request_of(libc::RTM_NEWROUTE, number, dev)
}

fn request_of(kind: u16, number: u32, dev: u32) -> Request {
    let IpNet::V4(dst) = numbered(number, false).dst else { panic!("IPv4") };
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = dst.prefix_len();
    message.header.table = 254;
    message.header.protocol = RouteProtocol::Other(141);
    message.header.scope = RouteScope::Link;
    message.header.kind = RouteType::Unicast;
    message.attributes =
        vec![RouteAttribute::Destination(RouteAddress::from(IpAddr::V4(dst.addr()))), RouteAttribute::Oif(dev)];
    let flags = if kind == libc::RTM_NEWROUTE { NLM_F_CREATE | NLM_F_EXCL } else { 0 };
    Request::new(kind, flags, &message)
}

fn dump_of_routes() -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.attributes = vec![RouteAttribute::Table(254)];
    Request::new(libc::RTM_GETROUTE, 0, &message)
}

/// Makes a socket's receive buffer as small as the kernel lets it be. Its descriptor is told by `Debug` alone.
#[expect(unsafe_code, reason = "the socket keeps its descriptor to itself")]
fn shrink(socket: &Socket) {
    let text = format!("{socket:?}");
    let number = text.split_once("fd: ").unwrap().1.split([',', ' ', '}']).next().unwrap();
    let size: libc::c_int = 1;
    // SAFETY: the descriptor is the live socket's, the pointer is to a live local of the length given.
    let answer = unsafe {
        libc::setsockopt(
            number.parse().unwrap(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            (&raw const size).cast(),
            libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap(),
        )
    };
    assert_eq!(answer, 0);
}

#[test]
fn answers_that_do_not_fit_are_unknown_and_nothing_hangs() {
    let bed = Bed::new();
    bed.must(&adds(1000, false));
    let dev = bed.pod_state().link("eth0").unwrap().index;
    let (fates, after) = in_netns(bed.pod.path(), || {
        let mut socket = Socket::open().unwrap();
        shrink(&socket);
        let fates = socket.batch("add", &(0..1000).map(|number| request(number, dev)).collect::<Vec<_>>());
        // The socket is still in step: a dump, a clean batch, one refusal.
        let dumped = socket.dump("list", &dump_of_routes(), |list: &mut Vec<()>, _| {
            list.push(());
            Ok(())
        });
        let clean = socket.batch("add", &[request(5000, dev)]);
        let refused = socket.batch("add", &[request(5000, dev)]);
        (fates, (dumped.unwrap().len(), clean, refused))
    });
    let count = |wanted: fn(&Fate) -> bool| fates.iter().filter(|fate| wanted(fate)).count();
    let unknown = count(|fate| *fate == Fate::Unknown);
    let refused = count(|fate| *fate == Fate::Refused(Errno::EEXIST));
    println!("{unknown} answers lost, {refused} refusals read");
    assert_eq!((fates.len(), unknown + refused), (1000, 1000), "none may pass for done");
    assert!(unknown > 0, "the buffer was too large for this test");
    assert!(after.0 > 1000);
    assert_eq!(after.1, [Fate::Done]);
    assert!(after.2 == [Fate::Refused(Errno::EEXIST)], "{:?}", after.2);
}

/// Starts of a dump: `Socket::dump` begins each with a fresh collection.
static STARTS: AtomicUsize = AtomicUsize::new(0);

struct Counted(Vec<()>);

impl Default for Counted {
    fn default() -> Self {
        STARTS.fetch_add(1, Ordering::Relaxed);
        Self(Vec::new())
    }
}

/// Adds and removes a thousand routes until told to stop; without the sandbox's lock, as a routing daemon would.
fn churn(bed: &Bed, dev: u32, stop: &AtomicBool) {
    in_netns(bed.pod.path(), || {
        let mut socket = Socket::open().unwrap();
        while !stop.load(Ordering::Relaxed) {
            for kind in [libc::RTM_NEWROUTE, libc::RTM_DELROUTE] {
                let requests = (3000..4000).map(|number| request_of(kind, number, dev)).collect::<Vec<_>>();
                drop(socket.batch("churn", &requests));
            }
        }
    });
}

#[test]
fn a_table_that_changes_while_it_is_read() {
    let bed = Bed::new();
    let still = adds(2500, false);
    bed.must(&still);
    let wanted: BTreeSet<IpNet> = (0..2500).map(|number| numbered(number, false).dst).collect();
    let stop = AtomicBool::new(false);
    let (mut good, mut busy) = (0, 0);
    std::thread::scope(|scope| {
        let dev = bed.pod_state().link("eth0").unwrap().index;
        let (bed, stop) = (&bed, &stop);
        scope.spawn(move || churn(bed, dev, stop));
        bed.with(|system| {
            let until = Instant::now() + Duration::from_secs(3);
            while Instant::now() < until {
                match system.observe_pod(&PodQuery { state: true, ..PodQuery::default() }) {
                    Ok(state) => {
                        let seen: Vec<IpNet> =
                            state.routes.iter().filter(|seen| seen.ours()).map(|seen| seen.route.dst).collect();
                        let unique: BTreeSet<IpNet> = seen.iter().copied().collect();
                        assert_eq!(seen.len(), unique.len(), "a route was seen twice");
                        assert!(wanted.is_subset(&unique), "{} of 2500 seen", wanted.intersection(&unique).count());
                        good += 1;
                    }
                    Err(Error::Busy { .. }) => busy += 1,
                    Err(err) => panic!("{err}"),
                }
            }
        });
        stop.store(true, Ordering::Relaxed);
    });
    println!("{good} looks, {busy} given up");
    assert!(good > 0);
}

/// Adds or removes a host address on eth0.
fn address(kind: u16, number: u32, dev: u32) -> Request {
    let addr = IpAddr::V4(Ipv4Addr::from(0x6440_0000 | number));
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = dev;
    message.attributes = vec![AddressAttribute::Local(addr), AddressAttribute::Address(addr)];
    let flags = if kind == libc::RTM_NEWADDR { NLM_F_CREATE | NLM_F_EXCL } else { 0 };
    Request::new(kind, flags, &message)
}

/// Addresses, unlike routes, are dumped with `NLM_F_DUMP_INTR` where they changed meanwhile.
#[test]
fn an_interrupted_dump_starts_anew() {
    let bed = Bed::new();
    let dev = bed.pod_state().link("eth0").unwrap().index;
    let stop = AtomicBool::new(false);
    let (good, busy) = std::thread::scope(|scope| {
        let (bed, stop) = (&bed, &stop);
        let outcome = in_netns(bed.pod.path(), || {
            let mut socket = Socket::open().unwrap();
            let fates = socket.batch("add", &(0..1500).map(|n| address(libc::RTM_NEWADDR, n, dev)).collect::<Vec<_>>());
            assert!(fates.iter().all(|fate| *fate == Fate::Done));
            scope.spawn(move || {
                in_netns(bed.pod.path(), || {
                    let mut socket = Socket::open().unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        for kind in [libc::RTM_NEWADDR, libc::RTM_DELADDR] {
                            drop(
                                socket.batch("churn", &(5000..5100).map(|n| address(kind, n, dev)).collect::<Vec<_>>()),
                            );
                        }
                    }
                });
            });
            look_at_addresses(&mut socket)
        });
        stop.store(true, Ordering::Relaxed);
        outcome
    });
    let starts = STARTS.load(Ordering::Relaxed);
    println!("{good} dumps, {busy} given up, {starts} starts");
    assert!(starts > good + busy, "no dump was interrupted: this test proves nothing here");
}

/// Dumps for two seconds; returns how many were whole and how many were given up.
fn look_at_addresses(socket: &mut Socket) -> (usize, usize) {
    let request = Request::new(libc::RTM_GETADDR, 0, &AddressMessage::default());
    let (mut good, mut busy) = (0, 0);
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let dumped = socket.dump("list", &request, |list: &mut Counted, _| {
            list.0.push(());
            Ok(())
        });
        match dumped {
            // 1500, the two of eth0, those of lo; and up to 100 of the churn's.
            Ok(list) => {
                assert!((1504..=1604).contains(&list.0.len()), "{}", list.0.len());
                good += 1;
            }
            Err(Error::Busy { .. }) => busy += 1,
            Err(err) => panic!("{err}"),
        }
    }
    (good, busy)
}

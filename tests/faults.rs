//! Every request that a call makes of the kernel fails once, with every errno that a kernel might give: nothing is left
//! half done, and the next call works.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[path = "support/bench.rs"]
mod bench;
mod support;

use std::fs;

use bench::{Answer, Bench, Kind, Moment, Script, assert_same, route};
use crosslink_core::model::{Change, Side};
use crosslink_kernel::fake::Request;
use serde_json::{Value, json};

/// The bench's `hijackCIDR`.
const NAMED: [&str; 2] = ["198.51.100.0/24", "2001:db8:1::/48"];
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;

/// EPERM, EAGAIN, ENOMEM, EBUSY, EEXIST, ENODEV, EINVAL, ENOBUFS.
const ERRNOS: [i32; 8] = [1, 11, 12, 16, EEXIST, 19, EINVAL, 105];

const KINDS: [Kind; 2] = [Kind::Overlay, Kind::Underlay];

/// Whether ADD goes on after that refusal: somebody else was faster, so it looks again; or the kernel does not take a
/// remote CIDR, so it goes without.
fn survivable(request: &Request, errno: i32) -> bool {
    match request {
        // Without node.json the node's addresses are looked up anew.
        Request::Change(Change::AddRoute(Side::Node, _)) => [EEXIST, EINVAL].contains(&errno),
        // All but host routes to the node, and the one that is named, are remote here.
        Request::Change(Change::AddRoute(Side::Pod, route) | Change::ReplaceRoute(Side::Pod, route, _)) => {
            let remote =
                route.dst.prefix_len() < route.dst.max_prefix_len() && !NAMED.contains(&route.dst.to_string().as_str());
            errno == EEXIST || (errno == EINVAL && remote)
        }
        Request::Change(_) => errno == EEXIST,
        Request::Enter(_) | Request::ObservePod(_) | Request::ObserveNode(_) => false,
    }
}

/// A bench, the moment before anything was done, and a clean ADD's requests and state.
struct Known {
    bench: Bench,
    before: Moment,
    clean: Answer,
    done: Vec<String>,
    untouched: Vec<String>,
}

impl Known {
    fn new(kind: Kind) -> Self {
        let bench = Bench::new(kind);
        let (before, untouched) = (bench.moment(), bench.state());
        let clean = bench.clean("ADD");
        clean.succeeded();
        let done = bench.state();
        assert_ne!(done, untouched);
        Self { bench, before, clean, done, untouched }
    }

    fn numbers(&self) -> std::ops::Range<usize> {
        assert!(self.clean.requests.len() > 6, "{:?}", self.clean);
        0..self.clean.requests.len()
    }

    /// Whatever happened: a DEL leaves nothing, and a new ADD makes everything.
    fn recovers(&self, what: &str) {
        let Self { bench, .. } = self;
        bench.clean("DEL").succeeded();
        assert_same(&format!("{what}, then DEL"), &bench.state(), &self.untouched);
        assert_eq!(bench.state_files(), Vec::<String>::new(), "{what}, then DEL");
        bench.clean("ADD").succeeded();
        assert_same(&format!("{what}, then DEL and ADD"), &bench.state(), &self.done);
        bench.clean("CHECK").succeeded();
    }

    /// ADD failed without a trace.
    fn undone(&self, what: &str, answer: &Answer) {
        answer.refused();
        assert_same(what, &self.bench.state(), &self.untouched);
        assert_eq!(self.bench.state_files(), Vec::<String>::new(), "{what}");
    }
}

/// What is said of a case.
fn name(kind: Kind, request: &Request, errno: i32) -> String {
    format!("{kind:?}, errno {errno} at {request:?}")
}

#[test]
fn any_refusal_of_an_add_is_undone() {
    for kind in KINDS {
        let known = Known::new(kind);
        for (number, errno) in known.numbers().flat_map(|number| ERRNOS.map(|errno| (number, errno))) {
            known.bench.back_to(&known.before);
            let request = &known.clean.requests[number];
            let what = name(kind, request, errno);
            let answer = known.bench.call("ADD", Script::refuse(number, errno), json!({}));
            if survivable(request, errno) {
                answer.succeeded();
                assert!(known.bench.record().is_some(), "{what}");
                if errno == EEXIST {
                    assert_same(&what, &known.bench.state(), &known.done);
                }
            } else {
                known.undone(&what, &answer);
            }
            known.recovers(&what);
        }
    }
}

#[test]
fn a_refused_look_changes_nothing() {
    for kind in KINDS {
        let known = Known::new(kind);
        known.bench.clean("CHECK").succeeded();
        let (there, record) = (known.bench.moment(), known.bench.record());
        for command in ["ADD", "CHECK", "DEL"] {
            known.bench.back_to(&there);
            let requests = known.bench.clean(command).requests;
            let looks = requests.iter().enumerate().filter(|(_, request)| !matches!(request, Request::Change(_)));
            for (number, request) in looks {
                for errno in ERRNOS {
                    known.bench.back_to(&there);
                    let what = format!("{command}: {}", name(kind, request, errno));
                    let answer = known.bench.call(command, Script::refuse(number, errno), json!({}));
                    answer.refused();
                    assert_eq!(answer.changes(), Vec::<usize>::new(), "{what}");
                    assert_same(&what, &known.bench.state(), &known.done);
                    assert_eq!(known.bench.record(), record, "{what}");
                }
            }
        }
    }
}

#[test]
fn a_refused_look_of_a_first_add_writes_no_record() {
    for kind in KINDS {
        let known = Known::new(kind);
        for number in known.numbers().filter(|number| !known.clean.changes().contains(number)) {
            known.bench.back_to(&known.before);
            let answer = known.bench.call("ADD", Script::refuse(number, 12), json!({}));
            assert_eq!(answer.changes(), Vec::<usize>::new());
            known.undone(&name(kind, &known.clean.requests[number], 12), &answer);
        }
    }
}

#[test]
fn what_cannot_even_be_undone_is_left_to_del() {
    for kind in KINDS {
        let known = Known::new(kind);
        for number in known.clean.changes() {
            known.bench.back_to(&known.before);
            let what = name(kind, &known.clean.requests[number], 1);
            known.bench.call("ADD", Script::refuse_from(number, 1), json!({})).refused();
            known.recovers(&format!("{what} and everything after it"));
        }
    }
}

/// A crash between two changes: the record says "adding", and what was made so far is there.
#[test]
fn an_add_over_what_a_crash_has_left_converges() {
    for kind in KINDS {
        let known = Known::new(kind);
        for (number, recorded) in known.clean.changes().into_iter().flat_map(|number| [(number, true), (number, false)])
        {
            known.bench.back_to(&known.before);
            let what = format!("crash at {:?}, record {recorded}", known.clean.requests[number]);
            known.bench.call("ADD", Script::refuse_from(number, 1), json!({})).refused();
            let text = known.bench.record().map(|record| String::from_utf8(record).unwrap());
            if number == known.clean.changes()[0] {
                assert_eq!(text, None, "nothing was made, so the record goes");
            } else {
                assert!(text.unwrap().contains("\"adding\""), "{what}");
                assert_eq!(known.bench.clean("CHECK").refused(), 104, "{what}");
            }
            if !recorded {
                drop(fs::remove_file(known.bench.record_path()));
            }
            known.bench.clean("ADD").succeeded();
            assert_same(&what, &known.bench.state(), &known.done);
            known.bench.clean("CHECK").succeeded();
            if recorded {
                known.recovers(&what);
            }
        }
    }
}

#[test]
fn a_full_standard_output_undoes_the_add() {
    for kind in KINDS {
        let known = Known::new(kind);
        known.bench.back_to(&known.before);
        assert!(!known.bench.add_into_full());
        assert_same("full stdout", &known.bench.state(), &known.untouched);
        assert_eq!(known.bench.state_files(), Vec::<String>::new());
        known.recovers("full stdout");
    }
}

#[test]
fn lost_answers_converge() {
    for kind in KINDS {
        let known = Known::new(kind);
        let changes = known.clean.changes();
        let mut scripts: Vec<Vec<usize>> = changes.iter().map(|number| vec![*number]).collect();
        scripts.extend([changes.clone(), (0..1000).collect(), changes.iter().copied().step_by(2).collect()]);
        for lost in scripts {
            known.bench.back_to(&known.before);
            let what = format!("{kind:?}, answers {lost:?} lost");
            known.bench.call("ADD", Script::lose(lost), json!({})).succeeded();
            assert_same(&what, &known.bench.state(), &known.done);
            known.bench.clean("CHECK").succeeded();
            known.recovers(&what);
        }
    }
}

#[test]
fn lost_answers_are_undone_too() {
    for kind in KINDS {
        let known = Known::new(kind);
        let changes = known.clean.changes();
        for pair in changes.windows(2) {
            known.bench.back_to(&known.before);
            let script = Script { lost: (0..pair[1]).collect(), ..Script::refuse(pair[1], 12) };
            let answer = known.bench.call("ADD", script, json!({}));
            known.undone(&format!("all up to {} lost, then ENOMEM", pair[1]), &answer);
        }
    }
}

#[test]
fn a_second_del_finishes_whatever_failed() {
    for kind in KINDS {
        let known = Known::new(kind);
        for recorded in [true, false] {
            known.bench.back_to(&known.before);
            known.bench.clean("ADD").succeeded();
            if !recorded {
                // What an earlier ADD changed on the pod's own interface cannot be derived.
                fs::remove_file(known.bench.record_path()).unwrap();
                known.bench.meddle(|_, pod| drop(pod.sysctls.insert("ipv4/conf/eth0/rp_filter".into(), "1".into())));
            }
            let there = known.bench.moment();
            let clean = known.bench.clean("DEL");
            assert!(!clean.changes().is_empty(), "{clean:?}");
            for (number, errno) in (0..clean.requests.len()).flat_map(|n| ERRNOS.map(|errno| (n, errno))) {
                for script in [Script::refuse(number, errno), Script::refuse_from(number, errno)] {
                    known.bench.back_to(&there);
                    let what = format!("DEL, record {recorded}: {}", name(kind, &clean.requests[number], errno));
                    known.bench.call("DEL", script, json!({})).refused();
                    assert_eq!(known.bench.record().is_some(), recorded, "{what}: the record is for the next DEL");
                    known.bench.clean("DEL").succeeded();
                    assert_same(&what, &known.bench.state(), &known.untouched);
                    assert_eq!(known.bench.state_files(), Vec::<String>::new(), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_del_goes_on_past_a_refusal() {
    let known = Known::new(Kind::Overlay);
    let there = known.bench.moment();
    let clean = known.bench.clean("DEL");
    known.bench.back_to(&there);
    let first = clean.changes()[0];
    let answer = known.bench.call("DEL", Script::refuse(first, 16), json!({}));
    assert_eq!(answer.refused(), 5);
    assert_eq!(answer.changes().len(), clean.changes().len(), "all were tried");
    assert_eq!(known.bench.state().len(), known.untouched.len() + 1, "one is left");
}

#[test]
fn lost_answers_of_a_del_converge() {
    for kind in KINDS {
        let known = Known::new(kind);
        let there = known.bench.moment();
        for lost in known.bench.clean("DEL").changes() {
            known.bench.back_to(&there);
            known.bench.call("DEL", Script::lose([lost]), json!({}));
            known.bench.clean("DEL").succeeded();
            assert_same("DEL with a lost answer", &known.bench.state(), &known.untouched);
            assert_eq!(known.bench.state_files(), Vec::<String>::new());
        }
    }
}

/// What happens between two ADDs.
type Prepare = fn(&Bench);

/// One way in which a second ADD has something to do.
struct Again {
    what: &'static str,
    kind: Kind,
    prepare: Prepare,
    extra: Value,
}

fn shrink_and_grow(bench: &Bench) {
    let remotes = json!({"version": 1, "source": "static", "clusters": [
        {"name": "cluster-b", "podCIDRs": ["172.111.0.0/16", "172.112.0.0/16", "fd12::/64"], "mtu": 1400}]});
    bench.site.remotes("cluster-b.json", &remotes);
}

/// For every refusal of a second ADD: state and record are those of before, and a third ADD works.
fn re_add_is_undone(again: &Again) {
    re_add_fails(again, assert_same);
}

fn re_add_fails(again: &Again, judge: fn(&str, &[String], &[String])) {
    let bench = Bench::new(again.kind);
    bench.clean("ADD").succeeded();
    (again.prepare)(&bench);
    let (there, before, record) = (bench.moment(), bench.state(), bench.record());
    let clean = bench.call("ADD", Script::default(), again.extra.clone());
    clean.succeeded();
    assert!(!clean.changes().is_empty(), "{}: nothing to do", again.what);
    let done = bench.state();
    for (number, errno) in (0..clean.requests.len()).flat_map(|number| ERRNOS.map(|errno| (number, errno))) {
        bench.back_to(&there);
        let request = &clean.requests[number];
        let what = format!("{}: {}", again.what, name(again.kind, request, errno));
        let answer = bench.call("ADD", Script::refuse(number, errno), again.extra.clone());
        if survivable(request, errno) {
            answer.succeeded();
            continue;
        }
        answer.refused();
        judge(&what, &bench.state(), &before);
        assert_eq!(bench.record(), record, "{what}");
        bench.call("ADD", Script::default(), again.extra.clone()).succeeded();
        assert_same(&format!("{what}, then ADD"), &bench.state(), &done);
    }
}

#[test]
fn a_re_add_after_other_remotes_is_undone() {
    for kind in KINDS {
        re_add_is_undone(&Again { what: "other remotes", kind, prepare: shrink_and_grow, extra: json!({}) });
    }
}

#[test]
fn a_re_add_over_missing_routes_is_undone() {
    let prepare = |bench: &Bench| {
        bench.meddle(|node, pod| {
            pod.routes.retain(|seen| seen.route.dst != "172.111.0.0/16".parse().unwrap());
            node.routes.retain(|seen| seen.route.table != 1410);
        });
    };
    for kind in KINDS {
        re_add_is_undone(&Again { what: "missing routes", kind, prepare, extra: json!({}) });
    }
}

#[test]
fn a_re_add_with_another_veth_mtu_is_undone() {
    let (kind, extra) = (Kind::Underlay, json!({ "vethMTU": 1400 }));
    re_add_is_undone(&Again { what: "another MTU", kind, prepare: |_| {}, extra });
}

#[test]
fn a_re_add_with_another_veth_name_is_undone() {
    let (kind, extra) = (Kind::Underlay, json!({ "vethName": "cross0" }));
    re_add_is_undone(&Again { what: "another name", kind, prepare: |_| {}, extra });
}

#[test]
fn a_re_add_over_a_veth_of_other_macs_converges() {
    let prepare = |bench: &Bench| {
        bench.meddle(|_, pod| {
            pod.links.iter_mut().filter(|link| link.name == "veth0").for_each(|link| link.mac[5] ^= 1)
        });
    };
    // What was broken before need not be put back; the main CNI's things must be there.
    let judge = |what: &str, now: &[String], before: &[String]| {
        let theirs = |line: &&String| !["veth0", "\"cl", "/cl"].iter().any(|part| line.contains(part));
        let gone: Vec<&String> = before.iter().filter(theirs).filter(|line| !now.contains(line)).collect();
        assert!(gone.is_empty(), "{what}: {gone:#?}");
    };
    re_add_fails(&Again { what: "another MAC", kind: Kind::Underlay, prepare, extra: json!({}) }, judge);
}

#[test]
fn a_re_add_in_another_mode_is_undone() {
    let extra = json!({ "mode": "overlay" });
    re_add_is_undone(&Again { what: "overlay now", kind: Kind::Underlay, prepare: |_| {}, extra });
}

/// What the first ADD found is what DEL leaves, whatever a second ADD was told in between.
#[test]
fn a_del_after_another_add_leaves_nothing() {
    let cases: [(&str, Prepare, Value); 5] = [
        ("other remotes", shrink_and_grow, json!({})),
        ("another veth MTU", |_| {}, json!({ "vethMTU": 1400 })),
        ("another veth name", |_| {}, json!({ "vethName": "cross0" })),
        ("no remotes", |_| {}, json!({ "hijack": "none", "hijackCIDR": [] })),
        ("another mode", |_| {}, json!({ "mode": "overlay" })),
    ];
    for (what, prepare, extra) in cases {
        let known = Known::new(Kind::Underlay);
        prepare(&known.bench);
        known.bench.call("ADD", Script::default(), extra.clone()).succeeded();
        known.bench.call("CHECK", Script::default(), extra.clone()).succeeded();
        known.bench.call("DEL", Script::default(), extra).succeeded();
        assert_same(&format!("{what}, then DEL"), &known.bench.state(), &known.untouched);
        assert_eq!(known.bench.state_files(), Vec::<String>::new(), "{what}");
    }
}

#[test]
fn a_clean_re_add_changes_nothing() {
    for kind in KINDS {
        let known = Known::new(kind);
        let record = known.bench.record();
        let again = known.bench.clean("ADD");
        assert_eq!(again.succeeded().changes(), Vec::<usize>::new(), "{again:?}");
        assert_same("re-ADD", &known.bench.state(), &known.done);
        assert_eq!(known.bench.record(), record);
    }
}

#[test]
fn another_owners_route_outlives_every_failure() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        // To a remote CIDR, so it is skipped; it must be there after each of ADD, its failures and DEL.
        let foreign = route("172.111.0.0/16", "eth0", Some("172.20.0.77"));
        bench.meddle(|_, pod| pod.routes.push(foreign.clone()));
        let (before, untouched) = (bench.moment(), bench.state());
        let clean = bench.clean("ADD");
        clean.succeeded();
        assert_eq!(bench.site.findings().iter().filter(|id| *id == "XL-ROUTE-CONFLICT").count(), 1);
        for number in 0..clean.requests.len() {
            bench.back_to(&before);
            bench.call("ADD", Script::refuse(number, 12), json!({})).refused();
            assert_same("foreign route", &bench.state(), &untouched);
            bench.clean("ADD").succeeded();
            bench.clean("DEL").succeeded();
            assert_same("foreign route, DEL", &bench.state(), &untouched);
        }
    }
}

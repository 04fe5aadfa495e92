//! Running pods follow: the built agent on a node whose pods the built plugin has made.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test that cannot go on fails"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/crowd.rs"]
mod crowd;
#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use crosslink_testkit::{Netns, netns::in_netns, probe::wait_until};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use serde_json::{Value, json};

use crate::{
    agent::Agent,
    crowd::Crowd,
    sandbox::{Sandbox, annotated, silent},
    support::Site,
};

/// Far more than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn set(texts: &[&str]) -> BTreeSet<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// Replaces a remotes file as a careful writer does.
fn replace(site: &Site, name: &str, content: &Value) {
    site.remotes(".next", content);
    fs::rename(site.remotes_dir().join(".next"), site.remotes_dir().join(name)).unwrap();
}

fn cluster(name: &str, cidrs: &[&str], mtu: u32) -> Value {
    json!({ "version": 1, "source": "static", "clusters": [{ "name": name, "podCIDRs": cidrs, "mtu": mtu }] })
}

/// Waits until a sandbox has exactly these routes of ours.
fn follows(pod: &Sandbox, expected: &[&str]) {
    let expected: Vec<String> = set(expected).into_iter().collect();
    wait_until(&format!("the pod has {expected:?}, not {:?}", pod.routes()), PATIENCE, || pod.routes() == expected);
}

/// Waits until the record on disk says what the sandbox has.
fn recorded(pod: &Sandbox) {
    wait_until("the record is in step", PATIENCE, || {
        let record = pod.record();
        let mut applied: Vec<String> = (record["applied"]["podRoutes"].as_array().unwrap().iter())
            .map(|route| route["route"]["dst"].as_str().unwrap().to_owned())
            .map(|dst| dst.trim_end_matches("/32").trim_end_matches("/128").to_owned())
            .collect();
        applied.sort();
        applied == pod.routes()
    });
}

fn start(pod: &Sandbox) -> Agent {
    Agent::start(pod.node.path(), &pod.site, &[])
}

/// Waits for a line of the agent's log.
fn logs(agent: &Agent, part: &str) {
    wait_until(&format!("the agent says {part}"), PATIENCE, || agent.log().contains(part));
}

#[test]
fn an_overlay_pod_follows_every_change_of_remotes() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    let agent = start(&pod);
    follows(&pod, &["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"]);
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16", "10.8.0.0/16"], 1400));
    follows(&pod, &["10.243.0.0/18", "10.8.0.0/16", "10.9.0.0/16", "172.111.0.0/16", "fd11::/64", "fd43::/112"]);
    recorded(&pod);
    silent(&pod.run("CHECK", json!({})));
    // Another MTU, one CIDR less.
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1380));
    follows(&pod, &["10.243.0.0/18", "10.9.0.0/16", "172.111.0.0/16", "fd11::/64", "fd43::/112"]);
    wait_until("the new MTU", PATIENCE, || pod.pod.json("route show 10.9.0.0/16").to_string().contains("1380"));
    fs::remove_file(pod.site.remotes_dir().join("cluster-b.json")).unwrap();
    follows(&pod, &["10.9.0.0/16"]);
    recorded(&pod);
    silent(&pod.run("CHECK", json!({})));
    assert!(agent.stop().success());
    // The agent's end changes nothing.
    follows(&pod, &["10.9.0.0/16"]);
    silent(&pod.del(json!({})));
    assert_eq!(pod.routes(), Vec::<String>::new());
    assert_eq!(pod.site.records(), Vec::<Value>::new());
}

#[test]
fn an_underlay_pod_follows_remotes_and_node_facts() {
    let pod = Sandbox::underlay();
    pod.site.node(json!({ "addresses": ["172.20.0.11", "fd20::11"], "serviceCIDRs": ["10.96.0.0/12"] }));
    pod.add(json!({}));
    let _agent = start(&pod);
    let base =
        ["10.243.0.0/18", "10.96.0.0/12", "172.111.0.0/16", "172.20.0.11", "fd11::/64", "fd20::11", "fd43::/112"];
    follows(&pod, &base);
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    follows(&pod, &[&base[..], &["10.9.0.0/16"]].concat());
    pod.site.node(json!({ "addresses": ["172.20.0.11", "fd20::11"], "serviceCIDRs": ["10.112.0.0/12"] }));
    let moved: Vec<&str> = base.iter().map(|dst| if *dst == "10.96.0.0/12" { "10.112.0.0/12" } else { *dst }).collect();
    follows(&pod, &[&moved[..], &["10.9.0.0/16"]].concat());
    recorded(&pod);
    silent(&pod.run("CHECK", json!({})));
    silent(&pod.del(json!({})));
}

#[test]
fn annotations_and_excludes_keep_holding() {
    let pod = Sandbox::overlay();
    let annotations = json!({
        "crosslink.dev/hijack": "cluster-c",
        "crosslink.dev/exclude-cidr": "10.9.128.0/17",
        "crosslink.dev/hijack-cidr": "198.51.100.0/24",
    });
    pod.add(annotated(annotations));
    let _agent = start(&pod);
    follows(&pod, &["198.51.100.0/24"]);
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    follows(&pod, &["10.9.0.0/17", "198.51.100.0/24"]);
    replace(&pod.site, "d.json", &cluster("cluster-d", &["10.7.0.0/16"], 1400));
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16", "10.10.0.0/16"], 1400));
    follows(&pod, &["10.10.0.0/16", "10.9.0.0/17", "198.51.100.0/24"]);
}

#[test]
fn what_an_annotation_named_goes_when_its_range_is_not_remote_any_more_and_nothing_else_does() {
    let pod = Sandbox::underlay();
    pod.site.node(json!({ "addresses": ["172.20.0.11"] }));
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    let annotations = json!({ "crosslink.dev/hijack": "cluster-b", "crosslink.dev/hijack-cidr": "10.9.1.0/24" });
    pod.add(annotated(annotations));
    let agent = start(&pod);
    let base = ["10.243.0.0/18", "172.111.0.0/16", "172.20.0.11", "fd11::/64", "fd43::/112"];
    follows(&pod, &[&base[..], &["10.9.1.0/24"]].concat());
    fs::remove_file(pod.site.remotes_dir().join("c.json")).unwrap();
    follows(&pod, &base);
    logs(&agent, "XL-CIDR-REFUSED");
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    follows(&pod, &[&base[..], &["10.9.1.0/24"]].concat());
}

#[test]
fn drift_is_repaired() {
    let pod = Sandbox::underlay();
    pod.site.node(json!({ "addresses": ["172.20.0.11"] }));
    pod.add(json!({}));
    let _agent = start(&pod);
    let all = ["10.243.0.0/18", "172.111.0.0/16", "172.20.0.11", "fd11::/64", "fd43::/112"];
    follows(&pod, &all);
    let veth = pod.node_veth().unwrap();
    let whole = |what: &str| {
        follows(&pod, &all);
        wait_until(what, PATIENCE, || pod.run("CHECK", json!({})).ok());
    };
    pod.pod.ip("route del 172.111.0.0/16");
    whole("a route is back");
    pod.pod.ip("route replace 172.111.0.0/16 dev eth0 proto 141");
    whole("a route leads where it led");
    pod.pod.ip("link set veth0 down");
    pod.pod.ip("link set veth0 up");
    whole("what a link flap took is back");
    pod.node.ip("rule del priority 1410");
    whole("the rule is back");
    pod.node.ip("route flush table 1410");
    whole("the node's routes are back");
    pod.node.ip(&format!("link set {veth} down"));
    whole("the node's end is up");
    pod.node.ip(&format!("link del {veth}"));
    whole("the pair is made anew");
}

#[test]
fn an_overlay_pods_link_flap_is_repaired_when_its_default_route_is_back() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    let _agent = start(&pod);
    let all = ["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"];
    follows(&pod, &all);
    pod.pod.ip("link set eth0 down");
    pod.pod.ip("link set eth0 up");
    pod.pod.ip("route replace default via 10.88.0.1");
    pod.pod.ip("-6 addr replace fd88::5/64 dev eth0 nodad");
    pod.pod.ip("-6 route replace default via fd88::1");
    follows(&pod, &all);
}

#[test]
fn another_owners_route_stays() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    pod.pod.ip("route add 10.9.0.0/16 via 10.88.0.9 proto static");
    let agent = start(&pod);
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16", "10.8.0.0/16"], 1400));
    follows(&pod, &["10.243.0.0/18", "10.8.0.0/16", "172.111.0.0/16", "fd11::/64", "fd43::/112"]);
    logs(&agent, "XL-ROUTE-CONFLICT");
    assert!(pod.pod.ip("route show 10.9.0.0/16").contains("proto static"));
    pod.pod.ip("route del 10.9.0.0/16 proto static");
    follows(&pod, &["10.243.0.0/18", "10.8.0.0/16", "10.9.0.0/16", "172.111.0.0/16", "fd11::/64", "fd43::/112"]);
}

#[test]
fn a_broken_file_takes_no_routes_from_running_pods() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    let agent = start(&pod);
    let base = ["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"];
    follows(&pod, &base);
    // As an editor or `cp` writes: first empty, then half of it.
    for text in ["", "{\"version\":1,\"clus"] {
        support::write(&pod.site.remotes_dir().join("cluster-b.json"), text);
        replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
        follows(&pod, &[&base[..], &["10.9.0.0/16"]].concat());
        fs::remove_file(pod.site.remotes_dir().join("c.json")).unwrap();
        follows(&pod, &base);
    }
    logs(&agent, "XL-REMOTES-FILE");
    support::write(&pod.site.dir.join("node.json"), "{");
    fs::set_permissions(pod.site.remotes_dir().join("cluster-b.json"), fs::Permissions::from_mode(0o666)).unwrap();
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    follows(&pod, &[&base[..], &["10.9.0.0/16"]].concat());
}

#[test]
fn what_changed_while_no_agent_ran_is_caught_up() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    fs::remove_file(pod.site.remotes_dir().join("cluster-b.json")).unwrap();
    let agent = start(&pod);
    follows(&pod, &["10.9.0.0/16"]);
    agent.signal(Signal::SIGKILL);
    drop(agent);
    replace(&pod.site, "c.json", &cluster("cluster-c", &["10.8.0.0/16"], 1400));
    let _again = start(&pod);
    follows(&pod, &["10.8.0.0/16"]);
}

#[test]
fn del_removes_what_a_resync_left_without_recording_it() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    let before = pod.pod.ip("route show proto static");
    // An agent that was killed between applying and recording.
    pod.pod.ip("route add 10.9.0.0/16 via 10.88.0.1 dev eth0 proto 141");
    pod.pod.ip("route add 10.8.0.0/16 dev eth0 proto static");
    silent(&pod.del(json!({})));
    assert_eq!(pod.routes(), Vec::<String>::new());
    assert_ne!(pod.pod.ip("route show proto static"), before, "another owner's stays");
}

/// Two pods of which the second tells when the agent has been through.
fn watched(edit: impl FnOnce(&mut Value)) -> Crowd {
    let crowd = Crowd::new(2);
    crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
    crowd.add_all();
    let path = crowd.site.state_dir().join(format!("{}:eth0.json", Crowd::id(0)));
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut record);
    support::write(&path, &record.to_string());
    crowd
}

/// Makes a change and waits until the agent is through with it.
fn change(crowd: &Crowd) {
    crowd.site.cluster("cluster-c", &["10.9.0.0/16"], &[]);
    wait_until("the other pod follows", PATIENCE, || crowd.routes(1).contains("10.9.0.0/16"));
}

#[test]
fn a_sandbox_that_took_the_path_of_another_is_not_touched() {
    let crowd = watched(|record| record["netns"]["cookie"] = json!(4_711_000));
    let agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    logs(&agent, "its record was removed");
    change(&crowd);
    assert_eq!(crowd.site.records().len(), 1);
    assert_eq!(crowd.routes(0), set(&["172.111.0.0/16"]), "as it was");
}

#[test]
fn records_of_gone_sandboxes_are_collected_without_del_or_gc() {
    let mut crowd = Crowd::new(3);
    crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
    crowd.add_all();
    let agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    let records = |crowd: &Crowd| crowd.site.records().len();
    assert_eq!(records(&crowd), 3);
    drop(crowd.pods.pop());
    wait_until("the record of the gone pod is gone", PATIENCE, || records(&crowd) == 2);
    // Also what went while no agent ran.
    assert!(agent.stop().success());
    drop(crowd.pods.pop());
    let _again = Agent::start(crowd.node.path(), &crowd.site, &[]);
    wait_until("the record of the second is gone", PATIENCE, || records(&crowd) == 1);
    assert_eq!(crowd.routes(0), set(&["172.111.0.0/16"]));
}

/// A sandbox whose mount is taken away for a while, as a container without mount propagation sees it; the file stays.
struct Unmounted<'p> {
    path: &'p Path,
    file: fs::File,
}

impl<'p> Unmounted<'p> {
    fn new(path: &'p Path) -> Self {
        let file = fs::File::open(path).unwrap();
        umount2(path, MntFlags::MNT_DETACH).unwrap();
        assert!(path.exists());
        Self { path, file }
    }
}

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        let source = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        mount(Some(source.as_str()), self.path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    }
}

#[test]
fn sandboxes_that_are_hidden_are_not_taken_for_gone() {
    let pod = Sandbox::underlay();
    pod.site.node(json!({ "addresses": ["172.20.0.11"] }));
    pod.add(json!({}));
    let veth = pod.node_veth().unwrap();
    let unmounted = Unmounted::new(pod.pod.path());
    let agent = start(&pod);
    logs(&agent, "was unmounted, but its veth is alive");
    assert!(pod.record_path().exists() && pod.node.ip("link show").contains(&veth));
    assert!(agent.stop().success());
    drop(unmounted);

    // The same where no mount of the runtime can ever arrive: a private mount, in it an empty file.
    let dir = tempfile::tempdir().unwrap();
    mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    mount(None::<&str>, dir.path(), None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let file = dir.path().join("cni-1");
    fs::write(&file, "").unwrap();
    let crowd = watched(|record| record["netns"]["path"] = json!(file));
    let agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    logs(&agent, "XL-NETNS-HIDDEN");
    logs(&agent, "mountPropagation HostToContainer");
    change(&crowd);
    assert_eq!(crowd.site.records().len(), 2);
    mount(Some(crowd.pods[0].path()), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    wait_until("it follows when it is seen again", PATIENCE, || crowd.routes(0).contains("10.9.0.0/16"));
    drop(agent);
    umount2(&file, MntFlags::MNT_DETACH).unwrap();
    umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_newer_record_is_left_alone() {
    let crowd = watched(|record| record["version"] = json!(2));
    let agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    logs(&agent, "XL-RECORD-NEWER");
    change(&crowd);
    assert_eq!(crowd.routes(0), set(&["172.111.0.0/16"]));
    // DEL always works.
    let del = crowd.call(0, "DEL", json!({}));
    assert!(del.ok(), "{del:?}");
}

#[test]
fn a_pod_that_the_plugin_works_on_does_not_keep_others_waiting() {
    let crowd = Crowd::new(3);
    crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
    crowd.add_all();
    let _agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    let netns: &Netns = &crowd.pods[0];
    let lock = Flock::lock(fs::File::open(netns.path()).unwrap(), FlockArg::LockExclusive).unwrap();
    crowd.site.cluster("cluster-c", &["10.9.0.0/16"], &[]);
    let both = set(&["10.9.0.0/16", "172.111.0.0/16"]);
    for place in [1, 2] {
        wait_until("the others follow", PATIENCE, || crowd.routes(place) == both);
    }
    assert_eq!(crowd.routes(0), set(&["172.111.0.0/16"]));
    drop(lock);
    wait_until("the locked one follows", PATIENCE, || crowd.routes(0) == both);
}

/// Pods come and go while remotes change all the time: no ADD, CHECK or DEL fails, and what is left is as it should be.
#[test]
fn pods_come_and_go_while_remotes_change() {
    const WORKERS: usize = 3;
    const EACH: usize = 12;
    let mut crowd = Crowd::new(WORKERS);
    crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
    crowd.add_all();
    let _agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    let done = AtomicBool::new(false);
    let lists = [&["10.9.0.0/16"][..], &["10.9.0.0/16", "10.8.0.0/16"], &[], &["10.7.0.0/16", "10.8.0.0/16"]];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut turn = 0;
            while !done.load(Ordering::Relaxed) {
                turn += 1;
                replace(&crowd.site, "c.json", &cluster("cluster-c", lists[turn % lists.len()], 1400));
            }
            replace(&crowd.site, "c.json", &cluster("cluster-c", &["10.5.0.0/16"], 1400));
        });
        let workers: Vec<_> = (0..WORKERS)
            .map(|place| {
                let crowd = &crowd;
                scope.spawn(move || {
                    for round in 0..EACH {
                        let del = crowd.call(place, "DEL", json!({}));
                        assert!(del.ok(), "{del:?}");
                        assert_eq!(crowd.routes(place), BTreeSet::new(), "DEL {round} leaves nothing");
                        let add = crowd.call(place, "ADD", json!({}));
                        assert!(add.ok(), "{add:?}");
                        assert!(crowd.routes(place).contains("172.111.0.0/16"), "ADD {round}");
                    }
                })
            })
            .collect();
        let ends: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        ends.into_iter().for_each(|end| end.unwrap());
    });
    let expected = set(&["10.5.0.0/16", "172.111.0.0/16"]);
    for place in 0..WORKERS {
        wait_until("every pod has what the files say", PATIENCE, || crowd.routes(place) == expected);
    }
    let late = crowd.grow();
    assert!(crowd.call(late, "ADD", json!({})).ok());
    assert_eq!(crowd.routes(late), expected);
    for place in 0..=late {
        wait_until("CHECK agrees", PATIENCE, || crowd.call(place, "CHECK", json!({})).ok());
        assert!(crowd.call(place, "DEL", json!({})).ok());
    }
    assert_eq!(crowd.site.records(), Vec::<Value>::new());
}

#[test]
fn a_hundred_changes_end_in_step() {
    let crowd = Crowd::new(4);
    crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
    crowd.add_all();
    let _agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    for turn in 0..100 {
        let list: Vec<String> = (0..turn % 7).map(|i| format!("10.{}.0.0/16", (turn + i) % 50 + 1)).collect();
        let list: Vec<&str> = list.iter().map(String::as_str).collect();
        replace(&crowd.site, "c.json", &cluster("cluster-c", &list, 1400));
    }
    replace(&crowd.site, "c.json", &cluster("cluster-c", &["10.60.0.0/16"], 1400));
    let expected = set(&["10.60.0.0/16", "172.111.0.0/16"]);
    for place in 0..4 {
        wait_until("all are in step", PATIENCE, || crowd.routes(place) == expected);
    }
}

#[test]
fn the_kernels_of_many_pods_have_a_new_cidr_at_once() {
    let crowd = Crowd::new(12);
    crowd.site.cluster("cluster-b", &["172.111.0.0/16"], &[]);
    crowd.add_all();
    let agent = Agent::start(crowd.node.path(), &crowd.site, &[]);
    logs(&agent, "is well");
    let watch = crowd.watch([10, 9, 0, 0], false);
    replace(&crowd.site, "c.json", &cluster("cluster-c", &["10.9.0.0/16"], 1400));
    watch.end();
    // By the quick way, not by twelve thorough looks.
    logs(&agent, "new remote CIDRs are in running pods");
    let watch = crowd.watch([10, 9, 0, 0], true);
    fs::remove_file(crowd.site.remotes_dir().join("c.json")).unwrap();
    watch.end();
    in_netns(crowd.node.path(), || ());
}

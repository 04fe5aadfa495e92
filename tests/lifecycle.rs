//! ADD and DEL of the built plugin over a pod's life: again, over leftovers, among other owners' things, in parallel.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout, reason = "tests")]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;
#[path = "support/traffic.rs"]
mod traffic;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use crosslink_core::numbers::VethNames;
use crosslink_testkit::{Netns, Node, Pod, probe::wait_until};
use sandbox::{Sandbox, annotated, refused, silent};
use serde_json::{Value, json};
use support::write;
use traffic::{Handmade, Lab, our_routes, rp, underlay_ready};

/// A MAC as `ip` writes it.
fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

fn names(pod: &Sandbox) -> VethNames {
    VethNames::of(&pod.id, "eth0")
}

/// The link layer of an interface.
fn link_of(netns: &Netns, dev: &str) -> Value {
    netns.json(&format!("link show {dev}"))[0].clone()
}

fn rules(node: &Netns) -> Vec<usize> {
    ["-4 rule show priority 1410", "-6 rule show priority 1410"]
        .map(|args| node.json(args).as_array().unwrap().len())
        .to_vec()
}

#[test]
fn a_second_add_changes_nothing() {
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        let before = pod.snapshot();
        pod.add(json!({}));
        assert_eq!(pod.site.records().len(), 1);
        for _ in 0..3 {
            pod.unchanged(|| pod.add(json!({})));
        }
        silent(&pod.run("CHECK", json!({})));
        silent(&pod.del(json!({})));
        pod.snapshot().assert_same(&before);
    }
}

#[test]
fn a_second_add_behind_real_main_plugins_changes_nothing() {
    if !underlay_ready() {
        return;
    }
    let lab = Lab::new(rp(1));
    let placed = [(lab.on_a1(), &lab.clusters.a1), (lab.remote(), &lab.clusters.b1)];
    for (placed, node) in placed {
        let (routes, here) = (our_routes(&placed.pod), our_routes(node));
        let result = placed.runner.cached(&placed.attachment).unwrap();
        let pod = Handmade::new(placed.pod, node, placed.site, result);
        for _ in 0..2 {
            let reply = pod.call("ADD", json!({ "name": "pods" }));
            assert!(reply.ok(), "{reply:?}");
            assert_eq!((our_routes(&pod.pod), our_routes(node)), (routes.clone(), here.clone()));
        }
        pod.check();
        placed.runner.check(&placed.attachment).unwrap();
        placed.runner.del(&placed.attachment).unwrap();
        assert!(pod.site.records().is_empty());
    }
}

#[test]
fn the_links_are_as_programmed() {
    let pod = Sandbox::underlay();
    pod.add(json!({ "vethName": "cross0", "vethMTU": 1380 }));
    let names = names(&pod);
    let (inside, outside) = (link_of(&pod.pod, "cross0"), link_of(&pod.node, &names.node));
    assert_eq!(
        (inside["address"].as_str(), outside["address"].as_str()),
        (Some(mac(names.pod_mac).as_str()), Some(mac(names.node_mac).as_str()))
    );
    assert_eq!((inside["mtu"].as_u64(), outside["mtu"].as_u64()), (Some(1380), Some(1380)));
    assert_eq!(pod.pod.json("-4 addr show cross0")[0]["addr_info"][0]["local"], "169.254.141.2");
    // The node's end has no address but IPv6's own.
    assert_eq!(pod.node.json(&format!("-4 addr show dev {}", names.node)), json!([]));
    assert!(pod.pod.try_exec(&["ip", "link", "show", "veth0"]).status.code() != Some(0));
    // Told otherwise, a second ADD follows; the MACs stay, so that neighbours stay valid.
    pod.add(json!({ "vethName": "cross0" }));
    assert_eq!(link_of(&pod.pod, "cross0")["mtu"], 1500);
    pod.add(json!({}));
    assert_eq!(link_of(&pod.pod, "veth0")["address"], mac(names.pod_mac).as_str());
    assert!(!pod.pod.ip("-br link").contains("cross0"));
    silent(&pod.run("CHECK", json!({})));
    silent(&pod.del(json!({})));
    assert_eq!(pod.node_veth(), None);
}

#[test]
fn routes_go_with_the_remotes() {
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        pod.add(json!({}));
        let all = pod.routes();
        pod.site.cluster("cluster-b", &["172.111.0.0/16"], &["fd43::/112"]);
        pod.add(json!({}));
        let lost: Vec<String> = all.iter().filter(|dst| !pod.routes().contains(dst)).cloned().collect();
        assert_eq!(lost, ["10.243.0.0/18", "fd11::/64"]);
        silent(&pod.run("CHECK", json!({})));
        pod.site.cluster("cluster-b", &["172.111.0.0/16", "fd11::/64"], &["10.243.0.0/18", "fd43::/112"]);
        pod.add(json!({}));
        assert_eq!(pod.routes(), all);
        assert_eq!(pod.record()["applied"]["podRoutes"].as_array().unwrap().len(), all.len());
        pod.add(json!({ "hijack": "none" }));
        assert!(pod.routes().iter().all(|dst| dst.starts_with("172.20.") || dst.starts_with("fd20:")));
        silent(&pod.del(json!({})));
        assert_eq!(pod.routes(), Vec::<String>::new());
    }
}

#[test]
fn an_add_after_a_crash_converges() {
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        let before = pod.snapshot();
        pod.add(json!({}));
        let whole = pod.routes();
        pod.edit_record(|record| record["state"] = json!("adding"));
        pod.pod.ip("route del 172.111.0.0/16");
        refused(&pod.run("CHECK", json!({})), 104, &["ADD did not come to its end"]);
        pod.add(json!({}));
        assert_eq!(pod.routes(), whole);
        assert_eq!(pod.record()["state"], "ready");
        silent(&pod.run("CHECK", json!({})));
        // A crash, and DEL follows.
        pod.edit_record(|record| record["state"] = json!("adding"));
        silent(&pod.del(json!({})));
        pod.snapshot().assert_same(&before);
    }
}

/// What a killed ADD may have made; `{cl}`, `{pod}` (namespace), `{pod mac}`, `{node mac}` are filled in. On the node.
const PAIR: &str = "link add {cl} address {node mac} type veth peer name veth0 address {pod mac} netns {pod}";

#[test]
fn an_add_over_half_made_things_converges() {
    let leftovers: [(&[&str], &[&str]); 5] = [
        (&[PAIR], &[]),
        (&[PAIR, "link set {cl} up"], &["link set veth0 up"]),
        (&[PAIR, "link set {cl} up"], &["link set veth0 up", "addr add 169.254.141.2/32 dev veth0 scope link"]),
        (&[PAIR, "link set {cl} up", "route add 172.20.1.5/32 dev {cl} table 1410 proto 141"], &["link set veth0 up"]),
        (
            &[PAIR, "link set {cl} up", "neigh add 172.20.1.5 dev {cl} lladdr 06:00:00:00:00:01 nud permanent"],
            &["link set veth0 up", "route add 172.111.0.0/16 via 169.254.141.9 dev veth0 onlink proto 141"],
        ),
    ];
    for (on_node, in_pod) in leftovers {
        let pod = Sandbox::underlay();
        let before = pod.snapshot();
        let (names, ns) = (names(&pod), pod.pod.name().to_owned());
        for command in on_node {
            let command = command.replace("{cl}", &names.node).replace("{pod}", &ns);
            let command = command.replace("{pod mac}", &mac(names.pod_mac));
            pod.node.ip(&command.replace("{node mac}", &mac(names.node_mac)));
        }
        in_pod.iter().for_each(|command| drop(pod.pod.ip(command)));
        pod.add(json!({}));
        silent(&pod.run("CHECK", json!({})));
        pod.unchanged(|| pod.add(json!({})));
        silent(&pod.del(json!({})));
        pod.snapshot().assert_same(&before);
    }
}

#[test]
fn an_add_over_a_pair_with_other_macs_converges() {
    let pod = Sandbox::underlay();
    pod.node.ip(&format!("link add {} type veth peer name veth0 netns {}", names(&pod).node, pod.pod.name()));
    pod.add(json!({}));
    silent(&pod.run("CHECK", json!({})));
    silent(&pod.del(json!({})));
    assert_eq!(pod.node_veth(), None);
}

#[test]
fn an_add_over_the_link_of_a_sandbox_that_is_another_one_now() {
    let pod = Sandbox::underlay();
    let elsewhere = Netns::create("old");
    let names = names(&pod);
    pod.node.ip(&format!("link add {} type veth peer name veth0 netns {}", names.node, elsewhere.name()));
    pod.node.ip(&format!("link set {} up", names.node));
    pod.node.ip(&format!("route add 172.20.1.5/32 dev {} table 1410 proto 141", names.node));
    pod.add(json!({}));
    silent(&pod.run("CHECK", json!({})));
    assert!(!elsewhere.ip("-br link").contains("veth0"), "the old pair is gone");
    silent(&pod.del(json!({})));
    assert_eq!(pod.node_veth(), None);
}

/// A pod behind a node with so many addresses, and how long its fastest of five ADDs took.
fn on_node_with(count: usize) -> (Sandbox, Duration) {
    let pod = Sandbox::underlay();
    let batch = pod.scratch().join("addresses");
    let lines: Vec<String> = (1..count).map(|i| format!("addr add 10.50.{i}.1/24 dev ens0\n")).collect();
    fs::write(&batch, lines.concat()).unwrap();
    pod.node.ip(&format!("-batch {}", batch.display()));
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        fastest = fastest.min(pod.add(json!({})).elapsed);
        silent(&pod.del(json!({})));
    }
    (pod, fastest)
}

#[test]
fn a_node_with_many_addresses() {
    let ((few, quick), (many, slow)) = (on_node_with(2), on_node_with(199));
    println!("ADD: {quick:?} with 3 node addresses, {slow:?} with 200, ratio {:.2}", slow.div_duration_f64(quick));
    assert!(slow < quick * 5, "{quick:?} with 3 addresses, {slow:?} with 200");
    few.add(json!({}));
    assert_eq!(few.site.findings(), Vec::<String>::new());
    many.add(json!({}));
    assert_eq!(many.site.findings()[0], "XL-NODE-ADDRESSES");
    assert!(many.record()["findings"][0]["text"].as_str().unwrap().contains("200 addresses"));
    let hosts = |pod: &Sandbox| pod.routes().iter().filter(|dst| !dst.contains('/')).count();
    assert_eq!(hosts(&many), 32);
    silent(&many.run("CHECK", json!({})));
    let all: Vec<String> =
        (1..199).map(|i| format!("10.50.{i}.1")).chain(["172.20.0.11", "fd20::11"].map(str::to_owned)).collect();
    many.site.node(json!({ "addresses": all }));
    many.add(json!({}));
    assert_eq!(hosts(&many), 200);
    assert_eq!(many.site.findings(), Vec::<String>::new());
    silent(&many.del(json!({})));
    assert_eq!(many.routes(), Vec::<String>::new());
}

#[test]
fn many_ipv4_addresses_do_not_push_out_the_ipv6_one() {
    let (pod, _) = on_node_with(199);
    pod.add(json!({}));
    assert!(pod.routes().contains(&"fd20::11".to_owned()), "no route to the node's only IPv6 address");
    assert_eq!(pod.site.findings(), ["XL-NODE-ADDRESSES"]);
}

/// Makes a namespace of that inode, within reason.
fn reincarnate(inode: u64) -> Option<Pod> {
    let mut kept = Vec::new();
    for _ in 0..50 {
        let pod = Pod::new("again", 0);
        if fs::metadata(pod.path()).unwrap().ino() == inode {
            return Some(pod);
        }
        kept.push(pod);
    }
    None
}

/// Puts an inode into a record.
fn say_inode(path: &std::path::Path, inode: u64) {
    let mut record: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    record["netns"]["inode"] = json!(inode);
    fs::write(path, record.to_string()).unwrap();
}

#[test]
fn a_del_with_an_old_path_leaves_the_new_pod_alone() {
    let lab = Lab::new(rp(0));
    let old = lab.bypassing(&["172.110.1.5/16"]);
    old.add(json!({}));
    let inode = fs::metadata(old.pod.path()).unwrap().ino();
    let name = old.pod.name().to_owned();
    let link = VethNames::of(&name, "eth0").node;
    assert!(std::process::Command::new("ip").args(["netns", "del", &name]).status().unwrap().success());
    wait_until("the link went with its namespace", Duration::from_secs(5), || {
        !lab.clusters.a1.ip("-br link").contains(&link)
    });
    // Something else on the machine may have taken the number; then the record is made to say what reuse would look like.
    let new = reincarnate(inode).unwrap_or_else(|| {
        let new = Pod::new("again", 0);
        say_inode(&old.site.state_dir().join(format!("{name}:eth0.json")), fs::metadata(new.path()).unwrap().ino());
        new
    });
    // The runtime's path of the old pod leads to the new one's namespace.
    std::os::unix::fs::symlink(new.path(), old.pod.path()).unwrap();
    let result = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": new.path() }],
        "ips": [{ "address": "172.110.1.6/16", "interface": 0 }] });
    lab.clusters.underlay.netns().ip(&format!("link add fresh type veth peer name eth0 netns {}", new.name()));
    new.ip("addr add 172.110.1.6/16 dev eth0");
    new.ip("link set eth0 up");
    let new = Handmade::new(new, &lab.clusters.a1, lab.site_a("a1", traffic::A1), result);
    new.add(json!({}));
    let (inside, here) = (our_routes(&new.pod), our_routes(&lab.clusters.a1));
    assert!(!inside.is_empty());
    for _ in 0..2 {
        // The second has no record to go by.
        let reply = old.call("DEL", json!({}));
        assert!(reply.ok(), "{reply:?}");
        assert_eq!((our_routes(&new.pod), our_routes(&lab.clusters.a1)), (inside.clone(), here.clone()));
        new.check();
    }
    fs::remove_file(old.pod.path()).unwrap();
    new.del();
}

#[test]
fn what_a_dead_link_left_in_our_table_is_replaced() {
    // IPv6 takes a route away with its link's carrier, IPv4 does not.
    for state in ["up", "down"] {
        let pod = Sandbox::underlay();
        let (node, dead) = (&pod.node, "cldead000000001");
        let other = Netns::create("other");
        node.ip(&format!("link add {dead} type veth peer name veth0 netns {}", other.name()));
        node.ip(&format!("link set {dead} up"));
        node.ip(&format!("route add 172.20.1.5/32 dev {dead} table 1410 proto 141"));
        node.ip(&format!("-6 route add fd20::1:5/128 dev {dead} table 1410 proto 141"));
        node.ip(&format!("neigh add 172.20.1.5 dev {dead} lladdr 06:00:00:00:00:01 nud permanent"));
        other.ip(&format!("link set veth0 {state}"));
        pod.add(json!({}));
        let link = names(&pod).node;
        let mut lines = our_routes(node);
        lines.retain(|line| line.starts_with("172.20.1.5") || line.starts_with("fd20::1:5"));
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines.iter().all(|line| line.contains(&format!("dev {link} "))), "{lines:?}");
        silent(&pod.run("CHECK", json!({})));
        silent(&pod.del(json!({})));
        assert_eq!(our_routes(node), Vec::<String>::new());
    }
}

#[test]
fn another_owners_route_in_our_table_is_not_replaced() {
    let pod = Sandbox::underlay();
    pod.node.ip("route add 172.20.1.5/32 dev ens0 table 1410");
    pod.refuses(json!({}), 103, &["172.20.1.5/32", "the node's route to the pod"]);
}

#[test]
fn another_owners_identical_route_is_left() {
    let pod = Sandbox::overlay();
    pod.pod.ip("route add 172.111.0.0/16 via 10.88.0.1 dev eth0 onlink");
    pod.pod.ip("-6 route add fd11::/64 via fd88::1 dev eth0");
    let before = pod.snapshot();
    pod.add(json!({ "hijackCIDR": ["172.111.0.0/16"] }));
    assert_eq!(pod.routes(), ["10.243.0.0/18", "fd43::/112"]);
    assert_eq!(pod.site.findings(), ["XL-ROUTE-IDENTICAL", "XL-ROUTE-IDENTICAL"]);
    silent(&pod.run("CHECK", json!({})));
    pod.unchanged(|| pod.add(json!({ "hijackCIDR": ["172.111.0.0/16"] })));
    silent(&pod.del(json!({})));
    pod.snapshot().assert_same(&before);
}

#[test]
fn another_owners_different_route() {
    let routes = [
        "route add 172.111.0.0/16 via 10.88.0.9 dev eth0",
        "route add 172.111.0.0/16 via 10.88.0.9 dev eth0 metric 500",
        "route add 172.111.0.0/16 via 10.88.0.1 dev eth0 mtu 1300",
        "route add 172.111.0.0/16 nexthop via 10.88.0.1 dev eth0 nexthop via 10.88.0.9 dev eth0",
        "route add blackhole 172.111.0.0/16",
        "route add unreachable 172.111.0.0/16 metric 77",
    ];
    let annotation = annotated(json!({ "crosslink.dev/hijack-cidr": "172.111.0.0/16" }));
    for route in routes {
        println!("{route}");
        let pod = Sandbox::overlay();
        pod.pod.ip(route);
        pod.refuses(annotation.clone(), 103, &["crosslink.dev/hijack-cidr", "172.111.0.0/16"]);
        pod.refuses(json!({ "hijackCIDR": ["172.111.0.0/16"] }), 103, &["hijackCIDR", "172.111.0.0/16"]);
        // From remotes alone it never fails a pod.
        let before = pod.snapshot();
        pod.add(json!({}));
        assert_eq!(pod.routes(), ["10.243.0.0/18", "fd11::/64", "fd43::/112"]);
        assert_eq!(pod.site.findings(), ["XL-ROUTE-CONFLICT"]);
        silent(&pod.run("CHECK", json!({})));
        silent(&pod.del(json!({})));
        pod.snapshot().assert_same(&before);
    }
}

#[test]
fn another_owners_different_route_of_ipv6() {
    let routes = [
        "-6 route add fd11::/64 via fd88::9 dev eth0",
        "-6 route add fd11::/64 via fd88::9 dev eth0 metric 7",
        "-6 route add fd11::/64 via fd88::9 dev eth0 metric 4096",
        "-6 route add unreachable fd11::/64",
    ];
    for route in routes {
        println!("{route}");
        let pod = Sandbox::overlay();
        pod.pod.ip(route);
        pod.refuses(json!({ "hijackCIDR": ["fd11::/64"] }), 103, &["hijackCIDR", "fd11::/64"]);
        let before = pod.snapshot();
        pod.add(json!({}));
        assert_eq!(pod.routes(), ["10.243.0.0/18", "172.111.0.0/16", "fd43::/112"]);
        assert_eq!(pod.site.findings(), ["XL-ROUTE-CONFLICT"]);
        silent(&pod.del(json!({})));
        pod.snapshot().assert_same(&before);
    }
}

#[test]
fn another_owners_veth() {
    for make in ["link add veth0 type veth peer name other", "link add veth0 type bridge"] {
        let pod = Sandbox::underlay();
        pod.pod.ip(make);
        pod.refuses(json!({}), 101, &["veth0", "Spiderpool", "vethName"]);
        pod.add(json!({ "vethName": "veth9" }));
        silent(&pod.del(json!({ "vethName": "veth9" })));
        assert!(pod.pod.ip("-br link").contains("veth0"));
        // DEL is called after a failed ADD too, and leaves it alone.
        refused(&pod.run("ADD", json!({})), 101, &["veth0"]);
        silent(&pod.del(json!({})));
        assert!(pod.pod.ip("-br link").contains("veth0"));
    }
}

#[test]
fn pods_in_parallel_on_a_fresh_node() {
    let lab = Lab::new(rp(0));
    let node: &Node = &lab.clusters.a1;
    let pods: Vec<Handmade> =
        (1..=8).map(|i| lab.bypassing(&[&format!("172.110.1.{i}/16"), &format!("fd10::1:{i}/64")])).collect();
    for round in 0..3 {
        node.ip("-4 rule show")
            .lines()
            .filter(|line| line.starts_with("1410"))
            .for_each(|_| drop(node.ip("rule del priority 1410")));
        assert_eq!(rules(node), if round == 0 { [0, 0] } else { [0, 1] });
        std::thread::scope(|scope| pods.iter().for_each(|pod| drop(scope.spawn(|| pod.add(json!({}))))));
        assert_eq!(rules(node), [1, 1]);
        assert_eq!(our_routes(node).len(), 16);
        pods.iter().for_each(Handmade::check);
        assert_eq!(pods[0].site.records().len(), 8);
        std::thread::scope(|scope| pods.iter().for_each(|pod| drop(scope.spawn(|| pod.del()))));
        assert_eq!(our_routes(node), Vec::<String>::new());
    }
}

#[test]
fn the_same_attachment_in_parallel() {
    let pod = Sandbox::underlay();
    std::thread::scope(|scope| (0..6).for_each(|_| drop(scope.spawn(|| pod.add(json!({}))))));
    silent(&pod.run("CHECK", json!({})));
    std::thread::scope(|scope| (0..6).for_each(|_| drop(scope.spawn(|| silent(&pod.del(json!({})))))));
    assert!(pod.routes().is_empty() && pod.site.records().is_empty() && pod.node_veth().is_none());
}

#[test]
fn a_lock_that_is_not_had_in_5_seconds() {
    let pod = Sandbox::overlay();
    let file = fs::File::open(pod.pod.path()).unwrap();
    file.lock().unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for command in ["ADD", "CHECK", "DEL"] {
            let pod = &pod;
            scope.spawn(move || refused(&pod.run(command, json!({})), 11, &["locked", "5 s"]));
        }
    });
    let waited = started.elapsed();
    assert!((5.0..9.0).contains(&waited.as_secs_f64()), "{waited:?}");
    file.unlock().unwrap();
    pod.add(json!({}));
}

#[test]
fn a_lock_that_is_given_up_in_time() {
    let pod = Sandbox::overlay();
    let file = fs::File::open(pod.pod.path()).unwrap();
    file.lock().unwrap();
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| pod.add(json!({})));
        // The plugin is at the lock once its thread waits there; /proc/locks shows waiters with an arrow.
        wait_until("the plugin waits", Duration::from_secs(4), || {
            fs::read_to_string("/proc/locks").unwrap().lines().any(|line| line.contains("-> FLOCK"))
        });
        assert_eq!(pod.routes(), Vec::<String>::new());
        file.unlock().unwrap();
        adding.join().unwrap();
    });
    silent(&pod.run("CHECK", json!({})));
}

fn many_cidrs(count: u32) -> Vec<String> {
    // Pairs of siblings, so that joining leaves half.
    (0..count).map(|i| format!("100.{}.{}.0/24", 64 + i / 256, i % 256)).collect()
}

#[test]
fn very_many_remotes() {
    for (count, joined) in [(2000, false), (2500, true)] {
        let pod = Sandbox::overlay();
        let cidrs = many_cidrs(count);
        let texts: Vec<&str> = cidrs.iter().map(String::as_str).collect();
        pod.site.cluster("cluster-b", &texts, &["fd43::/112"]);
        let reply = pod.add(json!({ "excludeCIDR": ["100.66.7.128/25"], "logLevel": "info" }));
        let nets: Vec<ipnet::IpNet> = pod
            .routes()
            .iter()
            .map(|dst| dst.parse().unwrap_or_else(|_| format!("{dst}/32").parse().unwrap()))
            .collect();
        println!("{count} remote CIDRs: {} routes, ADD took {:?}", nets.len(), reply.elapsed);
        assert!(if joined { nets.len() < 50 } else { nets.len() == 2001 }, "{}", nets.len());
        let routed = |text: &str| nets.iter().any(|net| net.contains(&text.parse::<std::net::IpAddr>().unwrap()));
        for cidr in cidrs.iter().step_by(97) {
            let base = cidr.trim_end_matches(".0/24");
            assert!(routed(&format!("{base}.0")) && routed(&format!("{base}.255")), "{cidr}");
        }
        for (inside, outside) in
            [("100.66.7.127", "100.66.7.128"), ("100.66.8.0", "100.66.7.255"), ("100.64.0.0", "100.63.255.255")]
        {
            assert!(routed(inside) && !routed(outside), "{inside} {outside}");
        }
        let last = 64 + (count - 1) / 256;
        assert!(!routed(&format!("100.{}.{}.0", last + (count % 256 == 0) as u32, count % 256)), "after the last");
        silent(&pod.run("CHECK", json!({})));
        pod.unchanged(|| pod.add(json!({ "excludeCIDR": ["100.66.7.128/25"] })));
        silent(&pod.del(json!({})));
        assert_eq!(pod.routes(), Vec::<String>::new());
    }
}

/// Root writes whatever a mode says: a file in the directory's place, and a file system that is read-only.
fn unwritable(pod: &Sandbox, read_only: bool) -> std::path::PathBuf {
    let blocked = pod.scratch().join("blocked");
    if read_only {
        fs::create_dir(&blocked).unwrap();
        let mount = ["-t", "tmpfs", "-o", "ro", "tmpfs", blocked.to_str().unwrap()];
        assert!(std::process::Command::new("mount").args(mount).status().unwrap().success());
        return blocked;
    }
    write(&blocked, "");
    blocked.join("attachments")
}

#[test]
fn a_state_directory_that_cannot_be_written() {
    let cases = [(Sandbox::overlay(), true), (Sandbox::underlay(), true), (Sandbox::underlay(), false)];
    for (pod, read_only) in cases {
        let dir = unwritable(&pod, read_only);
        let state = |policy: &str| json!({ "stateDir": dir, "failPolicy": policy });
        pod.refuses(state("closed"), 11, &["failPolicy", "blocked"]);
        let before = pod.snapshot();
        pod.add(state("open"));
        assert!(pod.site.log().contains("XL-STATE"), "{}", pod.site.log());
        assert!(pod.routes().len() >= 4);
        silent(&pod.run("CHECK", state("open")));
        silent(&pod.del(state("open")));
        assert_eq!((pod.routes(), pod.node_veth()), (Vec::new(), None));
        // What was changed on the pod's own interface is known to the record alone.
        pod.pod.sysctl("net/ipv4/conf/eth0/rp_filter", "0");
        pod.snapshot().assert_same(&before);
        silent(&pod.del(state("open")));
        if read_only {
            assert!(std::process::Command::new("umount").arg(&dir).status().unwrap().success());
        }
    }
}

#[test]
fn a_record_that_cannot_be_read() {
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        for content in ["", "{", "[]", "{\"version\":1}", "\u{0}"] {
            pod.add(json!({}));
            write(&pod.record_path(), content);
            pod.add(json!({}));
            assert!(pod.site.findings().contains(&"XL-STATE".to_owned()), "{:?}", pod.site.findings());
            write(&pod.record_path(), content);
            silent(&pod.del(json!({})));
            assert!(pod.site.records().is_empty() && pod.node_veth().is_none(), "{content}");
            // A record that says nothing may be of this very attachment: its routes are derivable.
            assert_eq!(pod.routes(), Vec::<String>::new(), "{content}");
        }
    }
}

#[test]
fn del_puts_back_what_add_changed_unless_it_was_changed_since() {
    let key = "net/ipv4/conf/eth0/rp_filter";
    for (before, meanwhile, after) in [("0", None, "0"), ("1", None, "1"), ("2", None, "2"), ("1", Some("0"), "0")] {
        let pod = Sandbox::underlay();
        pod.pod.sysctl(key, before);
        pod.add(json!({}));
        assert_eq!(pod.pod.read_sysctl(key), "2");
        pod.add(json!({}));
        meanwhile.into_iter().for_each(|value| pod.pod.sysctl(key, value));
        silent(&pod.del(json!({})));
        assert_eq!(pod.pod.read_sysctl(key), after, "{before} {meanwhile:?}");
    }
}

#[test]
fn a_site_is_made_on_demand_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let pod = Sandbox::overlay();
    let dir = pod.scratch().join("fresh/run/attachments");
    pod.add(json!({ "stateDir": dir }));
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join(format!("{}:eth0.json", pod.id))), 0o600);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "no temporary file");
}

//! CHECK of the built plugin against a real kernel: each thing that ADD has made is taken away or changed, CHECK names
//! exactly that, and another ADD mends it.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout, reason = "tests")]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;
#[path = "support/traffic.rs"]
mod traffic;

use crosslink_testkit::{Netns, Reply, available, require};
use sandbox::{Sandbox, refused, silent};
use serde_json::{Value, json};
use traffic::{Lab, rp};

const DRIFT: u64 = 104;

/// The lines of differences in an answer of CHECK.
fn differences(reply: &Reply) -> Vec<String> {
    assert_eq!(sandbox::failure(reply).code, DRIFT, "{reply:?}");
    let object = reply.json();
    let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let msg = text("msg");
    let (head, shown) = msg.split_once(": ").unwrap();
    let lines: Vec<String> = [shown.to_owned(), text("details")]
        .iter()
        .flat_map(|part| part.split("; "))
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    assert_eq!(head, format!("the pod's network differs in {} from what was made", places(lines.len())));
    lines
}

/// Where a case meddles.
#[derive(Clone, Copy, Debug)]
enum At {
    Pod,
    Node,
}

/// What is done behind the plugin's back (`{cl}` is the veth's end on the node; `sysctl KEY VALUE`, else words for ip),
/// and the differences that CHECK has to name, in full.
struct Case {
    at: At,
    commands: &'static [&'static str],
    named: &'static [&'static str],
}

const fn case(at: At, commands: &'static [&'static str], named: &'static [&'static str]) -> Case {
    Case { at, commands, named }
}

fn meddle(netns: &Netns, command: &str) {
    match command.strip_prefix("sysctl ").and_then(|rest| rest.split_once(' ')) {
        Some((key, value)) => netns.sysctl(key, value),
        None => drop(netns.ip(command)),
    }
}

/// Runs a table on one pod, which an ADD mends after every case. Placeholders in names: `{cl}`.
fn run(pod: &Sandbox, cases: &[Case]) {
    pod.add(json!({}));
    let link = pod.node_veth().unwrap_or_default();
    let fill = |text: &str| text.replace("{cl}", &link);
    for case in cases {
        println!("{:?} {:?}", case.at, case.commands);
        silent(&pod.run("CHECK", json!({})));
        let netns: &Netns = match case.at {
            At::Pod => &pod.pod,
            At::Node => &pod.node,
        };
        case.commands.iter().for_each(|command| meddle(netns, &fill(command)));
        let reply = pod.unchanged(|| pod.run("CHECK", json!({})));
        let wanted: Vec<String> = case.named.iter().map(|line| fill(line)).collect();
        assert_eq!(differences(&reply), wanted, "{:?}", case.commands);
        pod.add(json!({}));
        silent(&pod.run("CHECK", json!({})));
    }
    silent(&pod.del(json!({})));
}

const V4: &str = "missing: pod: route 172.111.0.0/16 via 169.254.141.1 dev veth0 src 172.20.1.5";
const V4_SERVICES: &str = "missing: pod: route 10.243.0.0/18 via 169.254.141.1 dev veth0 src 172.20.1.5";
const V4_NODE: &str = "missing: pod: route 172.20.0.11/32 via 169.254.141.1 dev veth0 src 172.20.1.5";
const V6: &str = "missing: pod: route fd11::/64 via fe80::8d:1 dev veth0";

#[test]
fn missing_and_wrong_routes_of_an_underlay_pod() {
    run(
        &Sandbox::underlay(),
        &[
            case(At::Pod, &["route del 172.111.0.0/16"], &[V4]),
            case(At::Pod, &["-6 route del fd11::/64"], &[V6]),
            case(At::Pod, &["route del 172.20.0.11/32"], &[V4_NODE]),
            case(
                At::Pod,
                &["route del 172.111.0.0/16", "route del 10.243.0.0/18", "-6 route del fd11::/64"],
                &[V4_SERVICES, V4, V6],
            ),
            case(
                At::Pod,
                &["route replace 172.111.0.0/16 via 169.254.141.9 dev veth0 onlink src 172.20.1.5 proto 141"],
                &["differs: pod: route 172.111.0.0/16 via 169.254.141.1 dev veth0 src 172.20.1.5 (is 172.111.0.0/16 \
                   via 169.254.141.9 dev veth0 src 172.20.1.5)"],
            ),
            case(
                At::Pod,
                &["route replace 172.111.0.0/16 via 169.254.141.1 dev veth0 onlink src 169.254.141.2 proto 141"],
                &["differs: pod: route 172.111.0.0/16 via 169.254.141.1 dev veth0 src 172.20.1.5 (is 172.111.0.0/16 \
                   via 169.254.141.1 dev veth0 src 169.254.141.2)"],
            ),
            case(
                At::Pod,
                &["-6 route replace fd11::/64 via fe80::8d:9 dev veth0 onlink proto 141"],
                &["differs: pod: route fd11::/64 via fe80::8d:1 dev veth0 (is fd11::/64 via fe80::8d:9 dev veth0)"],
            ),
            case(
                At::Pod,
                &["route replace 172.111.0.0/16 via 169.254.141.1 dev veth0 onlink src 172.20.1.5 mtu 1300 proto 141"],
                &["differs: pod: route 172.111.0.0/16 via 169.254.141.1 dev veth0 src 172.20.1.5 (is 172.111.0.0/16 \
                   via 169.254.141.1 dev veth0 src 172.20.1.5 mtu 1300)"],
            ),
        ],
    );
}

#[test]
fn the_nodes_side_of_an_underlay_pod() {
    run(
        &Sandbox::underlay(),
        &[
            case(
                At::Node,
                &["route del 172.20.1.5/32 table 1410"],
                &["missing: node: route 172.20.1.5/32 dev {cl} src 172.20.0.11 table 1410"],
            ),
            case(
                At::Node,
                &["-6 route del fd20::1:5/128 table 1410"],
                &["missing: node: route fd20::1:5/128 dev {cl} src fd20::11 table 1410"],
            ),
            case(At::Node, &["rule del priority 1410"], &["missing: node: rule 1410: from all lookup 1410 (IPv4)"]),
            case(At::Node, &["-6 rule del priority 1410"], &["missing: node: rule 1410: from all lookup 1410 (IPv6)"]),
            case(
                At::Node,
                // A rule with a selector is another rule.
                &["rule del priority 1410", "rule add priority 1410 from 10.0.0.0/8 lookup 1410"],
                &["missing: node: rule 1410: from all lookup 1410 (IPv4)"],
            ),
            case(
                At::Node,
                &["sysctl net/ipv4/conf/{cl}/rp_filter 2"],
                &["differs: node: net/ipv4/conf/{cl}/rp_filter = 1 (is 2)"],
            ),
            case(
                At::Node,
                &["sysctl net/ipv4/conf/{cl}/forwarding 0"],
                &["differs: node: net/ipv4/conf/{cl}/forwarding = 1 (is 0)"],
            ),
            case(
                At::Node,
                &["sysctl net/ipv6/conf/{cl}/accept_ra 2"],
                &["differs: node: net/ipv6/conf/{cl}/accept_ra = 0 (is 2)"],
            ),
            case(At::Node, &["link set {cl} mtu 1400"], &["missing: node: MTU 1500 of {cl}"]),
        ],
    );
}

#[test]
fn settings_of_an_underlay_pod() {
    run(
        &Sandbox::underlay(),
        &[
            case(
                At::Pod,
                &["sysctl net/ipv4/conf/eth0/rp_filter 1"],
                &["differs: pod: net/ipv4/conf/eth0/rp_filter = 2 (is 1)"],
            ),
            case(
                At::Pod,
                &["sysctl net/ipv4/conf/veth0/rp_filter 0"],
                &["differs: pod: net/ipv4/conf/veth0/rp_filter = 2 (is 0)"],
            ),
            case(
                At::Pod,
                &["sysctl net/ipv6/conf/veth0/accept_ra 1"],
                &["differs: pod: net/ipv6/conf/veth0/accept_ra = 0 (is 1)"],
            ),
            case(At::Pod, &["link set veth0 mtu 1400"], &["missing: pod: MTU 1500 of veth0"]),
        ],
    );
}

/// As [`run`], for drift whose consequences the kernel decides: some of the differences have to be among those named.
fn run_among(pod: &Sandbox, cases: &[Case]) {
    pod.add(json!({}));
    let link = pod.node_veth().unwrap_or_default();
    let macs = |netns: &Netns, dev: &str| netns.json(&format!("link show {dev}"))[0]["address"].clone();
    for case in cases {
        println!("{:?} {:?}", case.at, case.commands);
        let netns: &Netns = match case.at {
            At::Pod => &pod.pod,
            At::Node => &pod.node,
        };
        let mac = |text: &str| {
            let (node, pod) = (macs(&pod.node, &link), macs(&pod.pod, "veth0"));
            text.replace("{cl}", &link)
                .replace("{node mac}", node.as_str().unwrap())
                .replace("{pod mac}", pod.as_str().unwrap())
        };
        let wanted: Vec<String> = case.named.iter().map(|line| mac(line)).collect();
        case.commands.iter().for_each(|command| meddle(netns, &command.replace("{cl}", &link)));
        let found = differences(&pod.unchanged(|| pod.run("CHECK", json!({}))));
        for line in wanted {
            assert!(found.contains(&line), "\"{line}\" is not in {found:#?}");
        }
        pod.add(json!({}));
        silent(&pod.run("CHECK", json!({})));
    }
    silent(&pod.del(json!({})));
}

#[test]
fn neighbours_of_an_underlay_pod() {
    const POD: &str = "missing: pod: permanent neighbour 169.254.141.1 dev veth0 lladdr {node mac}";
    run_among(
        &Sandbox::underlay(),
        &[
            case(At::Pod, &["neigh del 169.254.141.1 dev veth0"], &[POD]),
            case(At::Pod, &["neigh replace 169.254.141.1 dev veth0 lladdr 02:00:00:00:00:99 nud permanent"], &[POD]),
            case(At::Pod, &["neigh change 169.254.141.1 dev veth0 nud stale"], &[POD]),
            case(
                At::Pod,
                &["-6 neigh del fe80::8d:1 dev veth0"],
                &["missing: pod: permanent neighbour fe80::8d:1 dev veth0 lladdr {node mac}"],
            ),
            case(
                At::Node,
                &["neigh del 172.20.1.5 dev {cl}"],
                &["missing: node: permanent neighbour 172.20.1.5 dev {cl} lladdr {pod mac}"],
            ),
            case(
                At::Node,
                &["-6 neigh del fd20::1:5 dev {cl}"],
                &["missing: node: permanent neighbour fd20::1:5 dev {cl} lladdr {pod mac}"],
            ),
        ],
    );
}

const PAIR: &str = "missing: veth pair veth0 (pod) and {cl} (node)";

#[test]
fn the_pods_mac() {
    run_among(&Sandbox::underlay(), &[case(At::Pod, &["link set veth0 address 06:00:00:00:00:99"], &[PAIR])]);
}

#[test]
fn the_nodes_mac() {
    run_among(&Sandbox::underlay(), &[case(At::Node, &["link set {cl} address 02:00:00:00:00:99"], &[PAIR])]);
}

#[test]
fn links_of_an_underlay_pod() {
    run_among(
        &Sandbox::underlay(),
        &[
            case(At::Pod, &["link set veth0 down"], &["missing: pod: interface veth0 up", V4, V4_NODE]),
            case(At::Pod, &["link set veth0 down", "link set veth0 up"], &[V4, V4_SERVICES, V4_NODE, V6]),
            case(At::Node, &["link set {cl} down"], &["missing: node: interface {cl} up"]),
            case(
                At::Node,
                &["link set {cl} down", "link set {cl} up"],
                &["missing: node: route 172.20.1.5/32 dev {cl} src 172.20.0.11 table 1410"],
            ),
            case(At::Node, &["link del {cl}"], &[PAIR, V4, V6]),
            case(
                At::Pod,
                &["addr del 169.254.141.2/32 dev veth0"],
                &["missing: pod: address 169.254.141.2 on veth0", V4],
            ),
        ],
    );
}

#[test]
fn routes_of_an_overlay_pod() {
    run(
        &Sandbox::overlay(),
        &[
            case(
                At::Pod,
                &["route del 172.111.0.0/16"],
                &["missing: pod: route 172.111.0.0/16 via 10.88.0.1 dev eth0"],
            ),
            case(At::Pod, &["-6 route del fd43::/112"], &["missing: pod: route fd43::/112 via fd88::1 dev eth0"]),
            case(
                At::Pod,
                &["route replace 10.243.0.0/18 via 10.88.0.9 dev eth0 proto 141"],
                &["differs: pod: route 10.243.0.0/18 via 10.88.0.1 dev eth0 (is 10.243.0.0/18 via 10.88.0.9 dev eth0)"],
            ),
            case(
                At::Pod,
                &["route replace 10.243.0.0/18 via 10.88.0.1 dev eth0 src 10.88.0.5 proto 141"],
                &["differs: pod: route 10.243.0.0/18 via 10.88.0.1 dev eth0 (is 10.243.0.0/18 via 10.88.0.1 dev eth0 \
                 src 10.88.0.5)"],
            ),
        ],
    );
}

#[test]
fn routes_of_other_owners() {
    let cases: [(&[&str], Option<&str>); 5] = [
        // In place of ours and doing the same: nothing is missing.
        (&["route del 172.111.0.0/16", "route add 172.111.0.0/16 via 10.88.0.1 dev eth0 onlink"], None),
        // Beside ours.
        (&["route add 192.0.2.0/24 via 10.88.0.9", "-6 route add unreachable 2001:db8:99::/48"], None),
        (&["route add 172.111.7.0/24 via 10.88.0.9"], None),
        // In place of ours and leading elsewhere.
        (
            &["route del 172.111.0.0/16", "route add 172.111.0.0/16 via 10.88.0.9"],
            Some(
                "missing: pod: route 172.111.0.0/16 via 10.88.0.1 dev eth0 (another owner's is there: 172.111.0.0/16 \
                 via 10.88.0.9 dev eth0 proto 3 metric 0)",
            ),
        ),
        (
            &["-6 route del fd11::/64", "-6 route add blackhole fd11::/64"],
            Some("missing: pod: route fd11::/64 via fd88::1 dev eth0 (another owner's is there: non-unicast"),
        ),
    ];
    for (commands, named) in cases {
        let pod = Sandbox::overlay();
        pod.add(json!({}));
        commands.iter().for_each(|command| drop(pod.pod.ip(command)));
        let reply = pod.unchanged(|| pod.run("CHECK", json!({})));
        match named {
            None => silent(&reply),
            Some(line) => {
                let found = differences(&reply);
                assert!(found.len() == 1 && found[0].starts_with(line), "{found:?}");
            }
        }
    }
}

#[test]
fn what_came_after_the_add_is_no_drift() {
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        pod.add(json!({}));
        let clean = |extra: Value| silent(&pod.unchanged(|| pod.run("CHECK", extra)));
        clean(json!({}));
        pod.site.cluster("cluster-b", &["172.112.0.0/16"], &[]);
        pod.site.cluster("cluster-c", &["172.113.0.0/16", "fd13::/64"], &[]);
        pod.site.node(json!({ "clusterName": "cluster-a", "addresses": ["192.0.2.1"] }));
        clean(json!({}));
        support::write(&pod.site.remotes_dir().join("cluster-b.json"), "{");
        clean(json!({ "hijack": "none", "hijackCIDR": ["198.51.100.0/24"], "failPolicy": "closed" }));
        std::fs::remove_dir_all(pod.site.remotes_dir()).unwrap();
        clean(json!({ "hijack": ["cluster-z"], "vethMTU": 1280 }));
    }
}

#[test]
fn without_a_record_only_what_is_provably_missing_counts() {
    let overlay = Sandbox::overlay();
    silent(&overlay.run("CHECK", json!({})));
    overlay.add(json!({}));
    std::fs::remove_file(overlay.record_path()).unwrap();
    overlay.pod.ip("route del 172.111.0.0/16");
    silent(&overlay.unchanged(|| overlay.run("CHECK", json!({}))));

    let underlay = Sandbox::underlay();
    refused(&underlay.run("CHECK", json!({})), DRIFT, &["veth pair veth0 (pod) and cl"]);
    underlay.add(json!({}));
    let name = underlay.node_veth().unwrap();
    support::write(&underlay.record_path(), "{ half");
    silent(&underlay.unchanged(|| underlay.run("CHECK", json!({}))));
    std::fs::remove_file(underlay.record_path()).unwrap();
    silent(&underlay.unchanged(|| underlay.run("CHECK", json!({}))));
    underlay.node.ip(&format!("link del {name}"));
    let reply = underlay.unchanged(|| underlay.run("CHECK", json!({})));
    assert_eq!(differences(&reply), [format!("missing: veth pair veth0 (pod) and {name} (node)")]);
}

/// A change of a record.
type Edit = fn(&mut Value);

#[test]
fn a_record_that_is_of_no_use_fails() {
    let edits: [(Edit, &str); 3] = [
        (|record| record["netns"]["cookie"] = json!(1), "the record is of another sandbox (/"),
        (
            |record| {
                record["netns"].as_object_mut().unwrap().remove("cookie");
                record["netns"]["inode"] = json!(1);
            },
            "the record is of another sandbox (/",
        ),
        (|record| record["state"] = json!("adding"), "the record says that ADD did not come to its end"),
    ];
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        for (edit, line) in edits {
            pod.add(json!({}));
            pod.edit_record(edit);
            let found = differences(&pod.unchanged(|| pod.run("CHECK", json!({}))));
            assert!(found.len() == 1 && found[0].starts_with(line), "{found:?}");
        }
        pod.add(json!({}));
        silent(&pod.run("CHECK", json!({})));
    }
}

#[test]
fn a_record_of_the_same_sandbox_under_another_path_counts() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    pod.edit_record(|record| record["netns"]["path"] = json!("/run/netns/another"));
    silent(&pod.run("CHECK", json!({})));
}

#[test]
fn the_pods_own_interface_is_part_of_what_is_checked() {
    for pod in [Sandbox::overlay(), Sandbox::underlay()] {
        pod.add(json!({}));
        pod.pod.ip("link del eth0");
        let found = differences(&pod.unchanged(|| pod.run("CHECK", json!({}))));
        assert!(found.contains(&"missing: pod: interface eth0".to_owned()), "{found:?}");
    }
}

#[test]
fn a_sandbox_that_is_gone_is_an_error_of_the_environment() {
    let pod = Sandbox::overlay();
    pod.add(json!({}));
    let conf = pod.conf(json!({}));
    let mut call = pod.call("CHECK", &conf);
    call.netns = pod.scratch().join("gone").display().to_string();
    refused(&call.run().unwrap(), 4, &["CNI_NETNS", "gone"]);
}

fn our_v4_route(pod: &Netns) -> String {
    traffic::our_routes(pod).into_iter().find(|line| !line.contains(':')).unwrap()
}

/// Chains of real main plugins: their own CHECKs pass after our ADD, and ours fails by name.
#[test]
fn the_whole_chain_passes() {
    if !["bridge", "plugin:bridge", "plugin:ptp", "plugin:macvlan", "plugin:host-local", "nft"]
        .iter()
        .all(|f| require(f))
    {
        return;
    }
    let lab = Lab::new(rp(1));
    let ptp = |lab: &Lab| {
        let mut main = lab.clusters.bridge();
        main["ipam"]["dataDir"] = json!(lab.clusters.state().join("ptp"));
        json!({ "type": "ptp", "ipMasq": false, "ipam": main["ipam"] })
    };
    let mut placed = vec![
        (
            "bridge",
            lab.add(&lab.clusters.a2, lab.pod(), lab.site_a("b", traffic::A2), lab.clusters.bridge(), json!({})),
        ),
        ("ptp", lab.add(&lab.clusters.b1, lab.pod(), lab.site_a("p", traffic::A2), ptp(&lab), json!({}))),
    ];
    // Without macvlan in the kernel its plugin cannot work; `require` has the last word on that.
    if available("macvlan") || require("macvlan") {
        placed.push(("macvlan", lab.on_a1()));
    }
    for (main, pod) in placed {
        println!("{main}: {:?}", pod.site.findings_of(pod.pod.name()));
        pod.check();
        let line = our_v4_route(&pod.pod);
        let cidr = line.split(' ').next().unwrap();
        pod.pod.ip(&format!("route del {cidr}"));
        let failure = pod.runner.check(&pod.attachment).unwrap_err();
        assert_eq!((failure.plugin.as_str(), failure.code()), ("crosslink", Some(DRIFT)), "{failure:?}");
        assert!(failure.msg().contains(&format!("missing: pod: route {cidr} via")), "{}", failure.msg());
        pod.runner.del(&pod.attachment).unwrap();
    }
}

fn places(count: usize) -> String {
    if count == 1 { "1 place".to_owned() } else { format!("{count} places") }
}

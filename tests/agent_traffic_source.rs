//! The agent keeps pods' addresses between clusters whose main CNIs masquerade: by TCP, in both directions, and through
//! whatever others do to the rules meanwhile.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/agent_traffic.rs"]
mod mesh;
mod support;

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpStream, UdpSocket},
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use agent::Agent;
use crosslink_testkit::{
    Netns, in_netns,
    nft::{Masquerade, kube_proxy_drop, service},
    probe::{tcp, wait_until},
    require,
    servers::{Server, serve_tcp},
};
use mesh::{A, CNIS, Cni, INTERNET, Mesh, POD_A, POD_C, POD_R, WORKER_OUT, has_table, keep, socket, table, uninstall};
use serde_json::Value;

const VIP_LOCAL: [&str; 2] = ["10.96.0.10", "fd96::10"];
const VIP_REMOTE: [&str; 2] = ["10.97.0.10", "fd97::10"];

/// What the server saw, for both families.
fn seen(from: &Netns, to: [&str; 2]) -> [Result<String, String>; 2] {
    to.map(|addr| tcp(from, socket(addr, 80)))
}

/// The same where both must be reached.
fn sources(from: &Netns, to: [&str; 2]) -> [String; 2] {
    seen(from, to).map(Result::unwrap)
}

/// Makes services of both families on every node of their cluster, as kube-proxy does.
fn services(mesh: &Mesh, vips: [&str; 2], backends: [&str; 2], masquerade: Masquerade<'_>) {
    let nodes = if vips == VIP_REMOTE { vec![&mesh.remote] } else { vec![&mesh.worker, &mesh.gateway] };
    for node in nodes {
        let _ = node.try_nft("delete table inet kube-proxy");
        for (vip, backend) in vips.into_iter().zip(backends) {
            service(node, socket(vip, 80), socket(backend, 80), masquerade);
        }
    }
}

fn serve(netns: &Netns) -> Server {
    serve_tcp(netns, "[::]:80")
}

#[test]
fn pods_are_seen_by_their_own_addresses_next_to_every_main_cni() {
    if !require("nft") {
        return;
    }
    thread::scope(|scope| {
        for cni in CNIS {
            let named = thread::Builder::new().name(format!("{cni:?}"));
            named.spawn_scoped(scope, move || next_to(cni)).unwrap();
        }
    });
}

fn next_to(cni: Cni) {
    let mesh = Mesh::new();
    mesh.masquerade(cni);
    for node in [&mesh.worker, &mesh.gateway, &mesh.remote] {
        kube_proxy_drop(node);
    }
    let _servers = [&mesh.a, &mesh.c, &mesh.r, &*mesh.internet].map(serve);
    // Without the agents, every source is hidden: the proof that the rest can fail.
    for (hidden, own) in sources(&mesh.a, POD_R).iter().zip(POD_A) {
        assert_ne!(hidden, own);
    }
    let _agents = mesh.agents();
    assert_eq!(sources(&mesh.a, POD_R), POD_A);
    assert_eq!(sources(&mesh.r, POD_A), POD_R);
    for masquerade in [Masquerade::Never, Masquerade::All] {
        // To a remote service, and from another cluster to a local one, by the one node that leads there.
        services(&mesh, VIP_REMOTE, POD_R, masquerade);
        assert_eq!(sources(&mesh.a, VIP_REMOTE), POD_A, "{masquerade:?}");
        services(&mesh, VIP_LOCAL, POD_A, masquerade);
        assert_eq!(sources(&mesh.r, VIP_LOCAL), POD_R, "{masquerade:?}");
        // A local service whose backend is in the other cluster.
        services(&mesh, VIP_LOCAL, POD_R, masquerade);
        assert_eq!(sources(&mesh.a, VIP_LOCAL), POD_A, "{masquerade:?}");
    }
    // What is not between clusters is as it was.
    assert_eq!(sources(&mesh.a, INTERNET), WORKER_OUT);
    services(&mesh, VIP_LOCAL, POD_C, Masquerade::All);
    assert!(sources(&mesh.a, VIP_LOCAL).iter().zip(POD_A).all(|(seen, own)| seen != own), "kube-proxy masquerades");
    assert_eq!(sources(&mesh.c, POD_A), POD_C);
    // A pod that reaches itself through its own service must be hidden from itself.
    services(&mesh, VIP_LOCAL, POD_A, Masquerade::All);
    assert!(seen(&mesh.a, VIP_LOCAL).iter().all(Result::is_ok), "hairpin");
}

/// What a stream and its test tell each other.
#[derive(Default)]
struct Talk {
    /// Lines that were answered.
    lines: AtomicU32,
    stop: AtomicBool,
}

impl Talk {
    /// Waits until the stream is open.
    fn begun(&self) {
        wait_until("the stream is open", Duration::from_secs(5), || self.lines.load(Ordering::Relaxed) > 0);
    }

    fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A stream that says a line after the other until it is told to stop; returns the longest wait for an answer.
fn talk(from: &Netns, to: &str, talk: &Talk) -> Duration {
    in_netns(from.path(), || {
        let mut stream = TcpStream::connect(socket(to, 80)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut longest, mut answer) = (Duration::ZERO, String::new());
        while !talk.stop.load(Ordering::Relaxed) {
            let asked = Instant::now();
            stream.write_all(b"hello\n").unwrap();
            answer.clear();
            assert_ne!(reader.read_line(&mut answer).unwrap(), 0, "the stream ended");
            longest = longest.max(asked.elapsed());
            talk.lines.fetch_add(1, Ordering::Relaxed);
        }
        longest
    })
}

/// The smallest retransmission time-out of Linux (TCP_RTO_MIN): an answer that took less was not lost on the way.
const RTO: Duration = Duration::from_millis(200);

#[test]
fn new_rules_lose_no_packet_of_running_connections() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    mesh.masquerade(Cni::Kindnet10);
    let _server = serve(&mesh.r);
    let _agents = mesh.agents();
    let (site, talks) = (mesh.site(&mesh.worker), [Talk::default(), Talk::default()]);
    thread::scope(|scope| {
        let (mesh, talks) = (&mesh, &talks);
        let streams = [0, 1].map(|place| scope.spawn(move || talk(&mesh.a, POD_R[place], &talks[place])));
        talks.iter().for_each(Talk::begun);
        for number in 0..10 {
            let net = format!("10.{}.0.0/16", 100 + number);
            site.cluster("more", &[&net], &[]);
            let wanted = format!("10.{}.0.0", 100 + number);
            wait_until("the new CIDR is in the table", Duration::from_secs(10), || {
                table(&mesh.worker).contains(&wanted)
            });
        }
        talks.iter().for_each(Talk::end);
        for (stream, talk) in streams.into_iter().zip(talks) {
            let (longest, lines) = (stream.join().unwrap(), talk.lines.load(Ordering::Relaxed));
            println!("{lines} lines, longest wait {longest:?}");
            assert!(lines > 100 && longest < RTO, "{lines} lines, longest wait {longest:?}");
        }
    });
}

#[test]
fn whoever_flushes_the_rules_is_undone_while_connections_run() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    mesh.masquerade(Cni::FlannelNft);
    let _server = serve(&mesh.r);
    let agents = mesh.agents();
    let running = Talk::default();
    let without_handles = |text: String| {
        let lines = text.lines().map(|line| line.split(" # handle").next().unwrap().to_owned());
        lines.collect::<Vec<_>>()
    };
    let good = without_handles(table(&mesh.worker));
    thread::scope(|scope| {
        let (from, told) = (&mesh.a, &running);
        let stream = scope.spawn(move || talk(from, POD_R[0], told));
        running.begun();
        for change in [
            "delete table inet crosslink",
            "flush chain inet crosslink preserve-source",
            "flush table inet crosslink",
            "insert rule inet crosslink preserve-source return",
            "flush ruleset",
        ] {
            mesh.worker.nft(change);
            let started = Instant::now();
            wait_until(change, Duration::from_secs(10), || {
                has_table(&mesh.worker) && without_handles(table(&mesh.worker)) == good
            });
            println!("{change}: repaired after {:?}", started.elapsed());
            if change == "flush ruleset" {
                mesh.worker.nft(&Cni::FlannelNft.rules(A.pods, ["10.244.1.0/24", "fd44:0:0:1::/64"]));
            }
            assert_eq!(sources(&mesh.a, POD_R), POD_A, "{change}");
        }
        running.end();
        stream.join().unwrap();
    });
    wait_until("each repair is told", Duration::from_secs(5), || agents[0].log().matches("repaired=true").count() == 5);
}

/// Somebody who deletes the table as often as it comes costs little, and loses in the end.
#[test]
fn a_fight_is_fought_at_leisure() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    let agent = mesh.agent(&mesh.worker);
    let started = Instant::now();
    let mut deleted = 0;
    while started.elapsed() < Duration::from_secs(4) {
        if mesh.worker.try_nft("delete table inet crosslink").is_ok() {
            deleted += 1;
        }
    }
    println!("deleted {deleted} times");
    assert!((3..=12).contains(&deleted), "{deleted}");
    wait_until("the agent has the last word", Duration::from_secs(10), || has_table(&mesh.worker));
    drop(agent);
}

#[test]
fn an_agent_that_finds_all_in_order_writes_nothing() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    mesh.agent(&mesh.worker).stop();
    let (before, site) = (table(&mesh.worker), mesh.site(&mesh.worker));
    let looks = |agent: &Agent| agent.log().matches("a look at the node").count();
    let so_far = looks(&mesh.agent(&mesh.worker));
    let agent = keep(&mesh.worker, &site, &[]);
    wait_until("it has looked", Duration::from_secs(10), || looks(&agent) > so_far);
    assert_eq!(table(&mesh.worker), before, "handles tell of every write");
    site.cluster("more", &["10.199.0.0/16"], &[]);
    wait_until("the new CIDR", Duration::from_secs(10), || table(&mesh.worker).contains("10.199.0.0"));
    agent.stop();
    let log = std::fs::read_to_string(site.dir.join("agent.log")).unwrap();
    assert_eq!(
        log.matches("nftables table crosslink is set").count(),
        2,
        "the first agent's, and the new CIDR's: {log}"
    );
}

/// Answers each datagram with the address that it came from.
fn serve_udp(netns: &Netns, bind: &str) -> thread::JoinHandle<()> {
    let socket = in_netns(netns.path(), || UdpSocket::bind(bind).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            if &buffer[..length] == b"stop" {
                return;
            }
            let _ = socket.send_to(peer.ip().to_string().as_bytes(), peer);
        }
    })
}

/// A flow that was masqueraded before there was an agent is seen by its own address from then on; one to the Internet
/// goes on as it was.
#[test]
fn connections_that_were_masqueraded_before_are_freed() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    mesh.masquerade(Cni::Kindnet5);
    for (place, wild) in ["0.0.0.0:0", "[::]:0"].into_iter().enumerate() {
        let bind = ["0.0.0.0:53", "[::]:53"][place];
        let servers = [serve_udp(&mesh.r, bind), serve_udp(&mesh.internet, bind)];
        let [inner, outer] = [POD_R, INTERNET].map(|to| {
            let client = in_netns(mesh.a.path(), || UdpSocket::bind(wild).unwrap());
            client.connect(socket(to[place], 53)).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            client
        });
        let ask = |client: &UdpSocket| {
            let mut buffer = [0; 64];
            client.send(b"who").unwrap();
            let length = client.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_ne!(ask(&inner), POD_A[place]);
        assert_eq!(ask(&outer), WORKER_OUT[place]);
        let agents = mesh.agents();
        wait_until("the flow is seen by its own address", Duration::from_secs(5), || ask(&inner) == POD_A[place]);
        assert_eq!(ask(&outer), WORKER_OUT[place]);
        assert!(agents[0].log().contains("connections=1"), "only what is between clusters: {}", agents[0].log());
        for (client, server) in [inner, outer].iter().zip(servers) {
            client.send(b"stop").unwrap();
            server.join().unwrap();
        }
        drop(agents);
        for node in [&mesh.worker, &mesh.gateway, &mesh.remote] {
            node.nft("delete table inet crosslink");
        }
    }
}

#[test]
fn uninstall_leaves_nothing_and_may_be_repeated() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    mesh.masquerade(Cni::FlannelIptables);
    let ruleset = || String::from_utf8(mesh.worker.exec(&["nft", "-s", "list", "ruleset"]).stdout).unwrap();
    let before = ruleset();
    mesh.agent(&mesh.worker).stop();
    assert_ne!(ruleset(), before, "an agent that stops leaves its rules");
    let site = mesh.site(&mesh.worker);
    assert!(uninstall(&mesh.worker, &site).contains("is removed"));
    assert_eq!(ruleset(), before);
    uninstall(&mesh.worker, &site);
    assert_eq!(ruleset(), before);
}

/// Switched off by the settings, the rules of an earlier agent go.
#[test]
fn what_is_switched_off_goes() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    mesh.agent(&mesh.worker).stop();
    let site = mesh.site(&mesh.worker);
    let agent = Agent::start(mesh.worker.path(), &site, &["--resync=off", "--notrack=on", "--preserve-source=off"]);
    wait_until("the chain is gone", Duration::from_secs(10), || !table(&mesh.worker).contains("preserve-source"));
    agent.stop();
    let agent = Agent::start(mesh.worker.path(), &site, &["--resync=off"]);
    wait_until("the table is gone", Duration::from_secs(10), || !has_table(&mesh.worker));
    agent.stop();
}

/// A `node.json` that is being written, or is broken, takes no rule away.
#[test]
fn a_broken_node_file_changes_nothing() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    let site = mesh.site(&mesh.worker);
    let agent = keep(&mesh.worker, &site, &[]);
    support::write(&site.dir.join("node.json"), "{\"podCIDRs\":");
    site.cluster("more", &["10.199.0.0/16"], &[]);
    wait_until("the new CIDR", Duration::from_secs(10), || table(&mesh.worker).contains("10.199.0.0"));
    assert!(table(&mesh.worker).contains("@local4"), "{}", table(&mesh.worker));
    agent.stop();
}

#[test]
fn host_sysctls_are_set_by_option_and_put_back() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    let (node, site) = (&mesh.gateway, mesh.site(&mesh.gateway));
    // The gateway is in an underlay, by its link to the other cluster; neighbours' pods come by `mgmt`.
    site.node(serde_json::json!({
        "addresses": ["10.7.0.12", "10.6.0.1", "fd07::12"], "podCIDRs": ["10.6.0.0/16", "fd06::/64"], "ownPodCIDRs": [],
    }));
    for (key, value) in [
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.mgmt.rp_filter", "1"),
        ("net.ipv4.conf.wan.rp_filter", "1"),
        ("net.ipv6.conf.all.forwarding", "0"),
        ("net.ipv6.conf.mgmt.accept_ra", "1"),
    ] {
        node.sysctl(key, value);
    }
    let values = || {
        let keys = [
            "ipv4.conf.mgmt.rp_filter",
            "ipv4.conf.wan.rp_filter",
            "ipv6.conf.all.forwarding",
            "ipv6.conf.mgmt.accept_ra",
        ];
        keys.map(|key| node.read_sysctl(&format!("net.{key}")))
    };
    keep(node, &site, &[]).stop();
    assert_eq!(values(), ["1", "1", "0", "1"], "only by option");
    let agent = keep(node, &site, &["--host-sysctls=on"]);
    wait_until("the sysctls are set", Duration::from_secs(10), || values() == ["2", "1", "1", "2"]);
    agent.stop();
    let record = std::fs::read_to_string(site.dir.join("sysctls.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["sysctls"].as_array().unwrap().len(), 4, "{record}");
    // A second agent does not take its own values for the node's.
    keep(node, &site, &["--host-sysctls=on"]).stop();
    // Somebody else's later choice stays.
    node.sysctl("net.ipv6.conf.mgmt.accept_ra", "0");
    uninstall(node, &site);
    assert_eq!(values(), ["1", "1", "0", "0"]);
    assert!(!site.dir.join("sysctls.json").exists());
}

/// Without the right to write rules the agent says so, by name, and lives.
#[test]
fn without_net_admin_it_is_a_finding() {
    if !require("nft") {
        return;
    }
    let mesh = Mesh::new();
    let site = mesh.site(&mesh.worker);
    let mut child = in_netns(mesh.worker.path(), || {
        let log = std::fs::File::create(site.dir.join("agent.log")).unwrap();
        Command::new("setpriv")
            .args(["--inh-caps=-net_admin", "--bounding-set=-net_admin", "--"])
            .arg(agent::agent_bin())
            .args(["run", "--kubeconfig=none", "--cni-mode=none", "--resync=off", "--http-address=127.0.0.1:0"])
            .arg(format!("--lib-dir={}", site.dir.display()))
            .arg(format!("--run-dir={}", site.dir.join("run").display()))
            .stderr(log.try_clone().unwrap())
            .stdout(log)
            .spawn()
            .unwrap()
    });
    wait_until("the finding is logged", Duration::from_secs(10), || {
        std::fs::read_to_string(site.dir.join("agent.log")).unwrap().contains("XL-NFTABLES")
    });
    assert_eq!(child.try_wait().unwrap(), None, "it lives");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!has_table(&mesh.worker));
}

//! Thousands of objects, and a storm of changes compared with a model.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_source.rs"]
mod agent_source;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use agent_source::{Agent, CLUSTER, Objects, crds, until};
use apiserver::ApiServer;
use crosslink_agent::api::{Cluster, ClusterSpec};
use futures_util::{StreamExt as _, stream};
use kube::{Api, api::PostParams};

const MANY: usize = 5000;

/// The fence of the agent's memory. What a debug build maps of its own file is no memory that a node lacks.
const FENCE: u64 = 40 * 1024;

/// A line of `/proc/PID/status`, KiB.
fn memory(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Bytes that a process received over its open connections.
fn received(pid: u32) -> u64 {
    let output = Command::new("ss").args(["-tinpHO", "state", "established"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let own = text.lines().filter(|line| line.contains(&format!("pid={pid},")));
    let counted = own.filter_map(|line| line.split_whitespace().find_map(|word| word.strip_prefix("bytes_received:")));
    counted.map(|count| count.parse::<u64>().unwrap()).sum()
}

fn spec(i: usize) -> ClusterSpec {
    ClusterSpec {
        pod_cidrs: vec![format!("10.{}.{}.0/24", i / 256, i % 256), format!("fd00:{i:x}::/48")],
        service_cidrs: vec![format!("172.16.{}.{}/32", i / 256, i % 256)],
        mtu: Some(1400),
        ..ClusterSpec::default()
    }
}

fn make_many(objects: &Objects) {
    let api: Api<Cluster> = Api::all(objects.client());
    let made = stream::iter(0..MANY).map(|i| {
        let api = api.clone();
        async move { api.create(&PostParams::default(), &Cluster::new(&format!("c{i}"), spec(i))).await.unwrap() }
    });
    objects.runtime.block_on(made.buffer_unordered(32).for_each(|_| async {}));
}

#[test]
fn five_thousand_clusters() {
    let Some(server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    make_many(&objects);
    let started = Instant::now();
    let agent = Agent::new(&server.kubeconfig(), "cluster", &[]);
    let all = |agent: &Agent| (agent.clusters("cluster")?.len() == MANY).then_some(());
    until("all clusters", || all(&agent));
    println!("{MANY} clusters in the file after {:?}, generation {}", started.elapsed(), agent.generation("cluster"));
    println!("bytes received by then: {} KiB", received(agent.pid()) / 1024);

    let changed = Instant::now();
    objects.cluster("one-more", &["192.168.0.0/24"], &[]);
    until("one more", || agent.clusters("cluster")?.contains_key("one-more").then_some(()));
    println!("one more in the file after {:?}", changed.elapsed());

    // While conditions are written every object changes once more.
    let before = received(agent.pid());
    let conditions = Instant::now();
    until("half of the conditions or time", || {
        let written = objects.get(CLUSTER, "", "c2500")["status"]["conditions"].is_array();
        (written || conditions.elapsed() > Duration::from_secs(5)).then_some(())
    });
    println!(
        "received while conditions were written: {} KiB in {:?}",
        (received(agent.pid()) - before) / 1024,
        conditions.elapsed()
    );
    let (rss, anon) = (memory(agent.pid(), "VmRSS:"), memory(agent.pid(), "RssAnon:"));
    println!("VmRSS {rss} KiB, of which anonymous {anon} KiB, peak {} KiB", memory(agent.pid(), "VmHWM:"));
    // A debug build maps more than 20 MB of itself; what it allocates is what counts there.
    let counted = if cfg!(debug_assertions) { anon } else { rss };
    assert!(counted < FENCE, "{counted} KiB");
    // Settled long ago, it does not write.
    let generation = agent.generation("cluster");
    objects.cluster("one-more", &["192.168.0.0/24"], &[]);
    assert_eq!(agent.generation("cluster"), generation);
}

/// Pseudo-random numbers (Knuth's MMIX generator), the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A storm of changes, while the agent is killed and the API server loses its history, ends where the model says.
#[test]
fn a_storm_ends_where_the_model_says() {
    let Some(mut server) = ApiServer::start() else { return };
    let objects = Objects::of(&server);
    objects.define(&crds());
    let mut agent = Agent::new(&server.kubeconfig(), "cluster", &["--empty-hold-seconds", "1"]);
    let mut random = Random(7);
    let mut model: BTreeMap<String, String> = BTreeMap::new();
    for round in 0..6 {
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            let name = format!("c{}", random.below(40));
            if model.contains_key(&name) && random.below(3) == 0 {
                objects.delete(CLUSTER, "", &name);
                model.remove(&name);
            } else {
                let net = format!("10.{}.{}.0/24", random.below(200), random.below(256));
                objects.cluster(&name, &[&net], &[]);
                model.insert(name, net);
            }
        }
        match round {
            1 => {
                agent.kill();
                agent.start();
            }
            3 => {
                server.pause();
                server.compact();
                server.resume();
            }
            _ => {}
        }
        let expected: Vec<(&str, &str)> = model.iter().map(|(name, net)| (name.as_str(), net.as_str())).collect();
        agent.expect("cluster", &expected);
    }
    println!("{} generations", agent.generation("cluster"));
}

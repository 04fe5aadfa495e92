//! How long a CIDR that was added to a remotes file takes into the kernels of running pods: `live PODS CIDRS ROUNDS`.
//!
//! The clock starts before the file is renamed into place and stops at the kernel's notification of the last pod.
#![expect(clippy::unwrap_used, clippy::print_stdout, clippy::indexing_slicing, clippy::panic, reason = "a benchmark")]

#[path = "../support/agent.rs"]
mod agent;
#[path = "../support/crowd.rs"]
mod crowd;
#[path = "../support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use crosslink_testkit::probe::wait_until;
use serde_json::{Value, json};

use crate::{agent::Agent, crowd::Crowd};

fn remotes(cidrs: usize, more: usize) -> Value {
    let list = (0..cidrs).map(|i| format!("172.{}.{}.0/28", 16 + i / 256, i % 256));
    let more = (0..more).map(|i| format!("192.168.{i}.0/24"));
    json!({ "version": 1, "source": "static", "clusters": [
        { "name": "cluster-b", "podCIDRs": list.chain(more).collect::<Vec<_>>(), "mtu": 1400 }] })
}

/// As a careful writer does.
fn replace(crowd: &Crowd, content: &Value) {
    crowd.site.remotes(".next", content);
    std::fs::rename(crowd.site.remotes_dir().join(".next"), crowd.site.remotes_dir().join("b.json")).unwrap();
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let [pods, cidrs, rounds] = numbers[..] else {
        return measure(100, 1000, 9);
    };
    measure(pods, cidrs, rounds);
}

fn measure(pods: usize, cidrs: usize, rounds: usize) {
    let crowd = Crowd::new(pods);
    replace(&crowd, &remotes(cidrs, 0));
    crowd.add_all();
    let agent = Agent::start(crowd.node.path(), &crowd.site, &["--log-level=info"]);
    wait_until("the agent is at work", Duration::from_secs(20), || crowd.site.dir.join("run/agent.sock").exists());
    let mut times: Vec<Duration> = Vec::new();
    for round in 1..=rounds {
        let watch = crowd.watch([192, 168, u8::try_from(round - 1).unwrap(), 0], false);
        let started = Instant::now();
        replace(&crowd, &remotes(cidrs, round));
        times.push(watch.end() - started);
        // The thorough pass comes after the quick one; the next change meets an agent at rest, as in life.
        let written = |place: usize| {
            let path = crowd.site.state_dir().join(format!("{}:eth0.json", Crowd::id(place)));
            std::fs::read_to_string(path).unwrap().contains(&format!("192.168.{}.0/24", round - 1))
        };
        wait_until("all records are written", Duration::from_secs(20), || (0..pods).all(written));
    }
    times.sort();
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    println!(
        "{pods} pods with {cidrs} CIDRs each, one more in the file: all kernels have it after {:.1} ms (median of {rounds}; \
         {:.1} to {:.1}); the agent's memory is {:.1} MB",
        millis(times[rounds / 2]),
        millis(times[0]),
        millis(times[rounds - 1]),
        agent.rss() as f64 / 1e6,
    );
}

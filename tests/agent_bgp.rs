//! Routes that a real BGP speaker learns become a remotes file, and leave it when they are withdrawn.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

#[path = "support/agent_source.rs"]
mod agent_source;
#[path = "support/apiserver.rs"]
mod apiserver;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use agent_source::{Agent, until};
use crosslink_testkit::{Netns, in_netns};
use serde_json::json;

/// A BGP speaker in a namespace; ends with it.
struct Bird {
    child: Child,
    control: std::path::PathBuf,
}

impl Bird {
    fn start(netns: &Netns, dir: &Path, config: &str) -> Self {
        let (file, control) = (dir.join(format!("{}.conf", netns.name())), dir.join(format!("{}.ctl", netns.name())));
        fs::write(&file, config).unwrap();
        let child = in_netns(netns.path(), || {
            Command::new("bird")
                .arg("-f")
                .arg("-c")
                .arg(&file)
                .arg("-s")
                .arg(&control)
                .stdin(Stdio::null())
                .stderr(fs::File::create(dir.join("bird.log")).unwrap())
                .spawn()
                .unwrap()
        });
        Self { child, control }
    }

    fn command(&self, words: &str) -> String {
        let output = Command::new("birdc").arg("-s").arg(&self.control).args(words.split(' ')).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether there is a speaker; where not, a failure in CI unless it is known to be missing.
fn bird_is_there() -> bool {
    if Command::new("bird").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return true;
    }
    let known = std::env::var("CROSSLINK_TEST_KNOWN_MISSING").unwrap_or_default();
    let is_known = known.split(',').any(|name| name.trim() == "bird");
    assert!(std::env::var_os("CI").is_none() || is_known, "bird is missing (Debian: bird2); it must not be in CI");
    eprintln!("skipped: bird is missing (Debian: bird2)");
    false
}

fn config(router: &str, neighbour: &str, more: &str) -> String {
    format!(
        "router id {router};\nprotocol device {{ scan time 1; }}\n\
         protocol kernel k4 {{ ipv4 {{ import none; export where source = RTS_BGP; }}; }}\n\
         protocol kernel k6 {{ ipv6 {{ import none; export where source = RTS_BGP; }}; }}\n\
         protocol bgp peer {{ local {router} as 64512; neighbor {neighbour} as 64512; direct; connect retry time 1; \
         connect delay time 1; error wait time 1, 2;\n\
         ipv4 {{ import all; export all; next hop self; }}; ipv6 {{ import all; export all; next hop self; }}; }}\n{more}"
    )
}

fn statics(name: &str, family: &str, nets: &[&str]) -> String {
    let routes: Vec<String> = nets.iter().map(|net| format!("route {net} blackhole;")).collect();
    format!("protocol static {name} {{ {family}; {} }}\n", routes.join(" "))
}

#[test]
fn learned_routes_become_a_remotes_file_and_leave_it() {
    if !bird_is_there() {
        return;
    }
    let (node, tor) = (Netns::create("node"), Netns::create("tor"));
    node.ip(&format!("link add eth0 type veth peer name eth0 netns {}", tor.name()));
    for (netns, last) in [(&node, 1), (&tor, 2)] {
        netns.ip("link set lo up");
        netns.ip(&format!("addr add 10.6.0.{last}/24 dev eth0"));
        netns.ip(&format!("addr add fd06::{last}/64 dev eth0 nodad"));
        netns.ip("link set eth0 up");
    }
    let dir = tempfile::tempdir().unwrap();
    // Another cluster's nodes announce a block each; our own nodes do, too, and a default route comes from above.
    let tor_config = config("10.6.0.2", "10.6.0.1", "")
        + &statics("theirs", "ipv4", &["10.245.0.0/26", "10.245.0.64/26", "10.245.0.128/25", "10.247.3.0/24"])
        + &statics("ours", "ipv4", &["10.244.7.0/26", "0.0.0.0/0"])
        + &statics("later", "ipv4", &["10.246.0.0/16"])
        + &statics("six", "ipv6", &["fd00:245::/64"]);
    let agent = in_netns(node.path(), || {
        let agent =
            Agent::new("none".as_ref(), "kernel", &["--empty-hold-seconds", "1", "--pod-cidrs", "10.42.0.0/16"]);
        agent.node(json!({"podCIDRs": ["10.244.0.0/16"], "serviceCIDRs": ["10.96.0.0/16"]}));
        agent
    });
    agent.expect("kernel", &[]);
    let tor_bird = Bird::start(&tor, dir.path(), &tor_config);
    let node_bird = Bird::start(&node, dir.path(), &config("10.6.0.1", "10.6.0.2", ""));
    until("a session", || node_bird.command("show protocols peer").contains("Established").then_some(()));
    agent.expect("kernel", &[("@bgp", "10.245.0.0/24,10.246.0.0/16,10.247.3.0/24,fd00:245::/64")]);

    // Withdrawn.
    tor_bird.command("disable later");
    agent.expect("kernel", &[("@bgp", "10.245.0.0/24,10.247.3.0/24,fd00:245::/64")]);
    tor_bird.command("enable later");
    agent.expect("kernel", &[("@bgp", "10.245.0.0/24,10.246.0.0/16,10.247.3.0/24,fd00:245::/64")]);

    // The speaker dies and its routes stay: so do ours. Then everything is gone at once, which is held for a while.
    let from = agent.log().len();
    tor_bird.command("disable all");
    agent.expect_log(from, &["XL-SOURCE-EMPTY"]);
    agent.expect("kernel", &[]);
}

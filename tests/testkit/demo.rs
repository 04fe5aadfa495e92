//! `make demo`: the main job of crosslink in network namespaces, with real main CNI plugins and no Kubernetes.

use std::fs;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Output};
use std::time::Instant;

use crosslink_testkit::nft::{Masquerade, kube_proxy_drop, service};
use crosslink_testkit::probe::wait_addresses;
use crosslink_testkit::servers::{Server, serve_http};
use crosslink_testkit::topology::{conflist, pick};
use crosslink_testkit::{Attachment, Netns, Node, Options, Pod, Runner, TwoClusters, addresses, two_clusters};
use serde_json::{Value, json};

use agent::Agent;

mod agent;

/// What went wrong, for the last line.
type Outcome<T> = Result<T, String>;

/// The newest that the plugins of every supported distribution speak and that has CHECK (Ubuntu 22.04 has 0.9.1).
const CNI_VERSION: &str = "0.4.0";

const PICTURE: &str = "
    cluster-a                                                  cluster-b
    pods 172.110.0.0/16, fd10::/64 (macvlan)                   pods 172.111.0.0/16, fd11::/64 (bridge)
    services 10.233.0.0/18, fd33::/112                         services 10.243.0.0/18, fd43::/112

      pod                                                          pod
     veth0  eth0 -----+-- underlay ----+                            |
       |              |                |                            |
    [ node a1 ]----ens224          ens224--[ gateway a2 ]---link---[ b1 ]
       +------------------ ens192 -----------+
";

/// The file that tells the agent what is remote.
const REMOTES: &str = "remotes.d/cluster-b.json";

/// The main CNI's list on node a1.
const MAIN_LIST: &str = "a1/net.d/10-macvlan.conflist";

/// The CIDR that comes and goes.
const MORE: &str = "172.112.0.0/16";

/// How many more pods follow a change.
const MORE_PODS: usize = 3;

/// Runs the demo with the plugin and the agent in `dir`.
pub fn run(dir: PathBuf) -> ExitCode {
    let started = Instant::now();
    let ui = Ui { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() };
    match fs::canonicalize(&dir).map_err(|err| format!("{}: {err}", dir.display())).and_then(|dir| show(&ui, &dir)) {
        Ok(()) => {
            println!("\n{} in {:.1} s\n", ui.paint("32;1", "Everything worked,"), started.elapsed().as_secs_f32());
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("\n{} {why}", ui.paint("31;1", "FAILED:"));
            ExitCode::FAILURE
        }
    }
}

/// What is shown on the terminal.
struct Ui {
    colour: bool,
}

impl Ui {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn step(&self, title: &str) {
        println!("\n{}", self.paint("1", &format!("== {title}")));
    }

    fn note(&self, text: &str) {
        println!("   {}", self.paint("2", text));
    }

    fn good(&self, text: &str) {
        println!("   {} {text}", self.paint("32", "ok"));
    }

    /// Runs a command in a namespace and shows it with what it prints.
    fn command(&self, netns: &Netns, place: &str, words: &str) -> Output {
        println!("   {} {}", self.paint("2", &format!("{place}$")), self.paint("36", words));
        let argv: Vec<&str> = words.split(' ').collect();
        let output = netns.try_exec(&argv);
        for line in String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.trim().is_empty()) {
            println!("     {line}");
        }
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            println!("     {}", self.paint("33", line));
        }
        output
    }

    /// The same, but it must succeed.
    fn must(&self, netns: &Netns, place: &str, words: &str) -> Outcome<String> {
        let output = self.command(netns, place, words);
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(format!("{place}: {words}"))
    }
}

fn show(ui: &Ui, plugins: &Path) -> Outcome<()> {
    println!("{}", ui.paint("1", "crosslink: a pod behind a real main CNI reaches another cluster's pod and service"));
    print!("{PICTURE}");
    let stage = Stage::build(ui, plugins)?;
    let remote = stage.remote_pod(ui)?;
    stage.without_crosslink(ui, &remote)?;
    let mut agent = stage.start_agent(ui)?;
    let (pods, runner) = stage.with_crosslink(ui)?;
    let [(pod, _), ..] = pods.as_slice() else { return Err("no pod".to_owned()) };
    stage.traffic(ui, pod, &remote)?;
    stage.follow(ui, &pods)?;
    stage.check(ui, &mut agent, &pods, &runner)?;
    let attachments: Vec<&Attachment> = pods.iter().map(|(_, attachment)| attachment).collect();
    stage.delete(ui, &remote, &attachments, &runner)?;
    stage.uninstall(ui, agent)
}

/// The two clusters and crosslink's files on the nodes.
struct Stage {
    clusters: TwoClusters,
    plugins: PathBuf,
}

/// cluster-b's pod with its servers.
struct Remote {
    ips: Vec<IpAddr>,
    attachment: Attachment,
    runner: Runner,
    pod: Pod,
    _servers: Vec<Server>,
}

const VIPS: [(&str, bool); 2] = [("10.243.2.135:80", false), ("[fd43::87]:80", true)];

impl Stage {
    fn build(ui: &Ui, plugins: &Path) -> Outcome<Self> {
        ui.step("Two clusters, in network namespaces of their own");
        // Pods inherit 1, as distributions set it. The gateway is loose: packets of a1's pods come to it by ens192, and
        // their way back is the underlay.
        let options = Options { node_rp_filter: 1, gateway_rp_filter: 2, pod_rp_filter: 1, ..Options::default() };
        let clusters = two_clusters(options);
        let nodes = [&clusters.a1, &clusters.a2, &clusters.b1];
        nodes.into_iter().for_each(|node| kube_proxy_drop(node));
        ui.note("Every node drops what conntrack finds invalid, as kube-proxy does; pods have rp_filter 1.");
        ui.note("The link between a2 and b1 stands where Submariner or a ToR would.");
        let stage = Self { clusters, plugins: plugins.to_owned() };
        stage.write_files()?;
        Ok(stage)
    }

    fn dir(&self, node: &str) -> PathBuf {
        self.clusters.state().join(node)
    }

    /// What the agent, or an administrator, keeps on each node.
    fn write_files(&self) -> Outcome<()> {
        let local = [self.clusters.macvlan(1)];
        let files = [
            (
                "b1/remotes/static.json".to_owned(),
                remotes("cluster-a", &["172.110.0.0/16", "fd10::/64"], &["10.233.0.0/18", "fd33::/112"]),
            ),
            (format!("a1/{REMOTES}"), remotes_b(&[])),
            (MAIN_LIST.to_owned(), json!({ "cniVersion": CNI_VERSION, "name": "pods", "plugins": local })),
        ];
        for (name, content) in files {
            write(&self.clusters.state().join(name), &content)?;
        }
        Ok(())
    }

    fn entry(&self, node: &str) -> Value {
        let dir = self.dir(node);
        json!({
            "type": "crosslink", "capabilities": { "io.kubernetes.cri.pod-annotations": true },
            "remotesDir": dir.join("remotes"), "nodeFile": dir.join("node.json"),
            "stateDir": dir.join("run/attachments"), "logFile": dir.join("cni.log"), "logLevel": "error",
        })
    }

    fn runner(&self, node: &Node, chain: Vec<Value>) -> Runner {
        self.clusters.runner_with(node, conflist("pods", CNI_VERSION, chain), vec![self.plugins.clone()])
    }

    fn remote_pod(&self, ui: &Ui) -> Outcome<Remote> {
        ui.step("A pod in cluster-b: bridge + host-local + portmap + crosslink");
        let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
        let runner = self.runner(&self.clusters.b1, vec![self.clusters.bridge(), portmap, self.entry("b1")]);
        let (pod, attachment, ips) = place(&self.clusters, &runner)?;
        wait_addresses(&self.clusters.b1);
        let servers = vec![serve_http(&pod, "[::]:80", "Hello from a pod of cluster-b\n")];
        for (vip, v6) in VIPS {
            let vip: SocketAddr = vip.parse().map_err(|err| format!("{vip}: {err}"))?;
            service(&self.clusters.b1, vip, SocketAddr::new(pick(&ips, v6), 80), Masquerade::All);
        }
        ui.must(&pod, "pod-b", "ip route")?;
        ui.good(&format!(
            "it serves HTTP at {} and {}, and as service {} and {}",
            pick(&ips, false),
            pick(&ips, true),
            VIPS[0].0,
            VIPS[1].0
        ));
        Ok(Remote { ips, attachment, runner, pod, _servers: servers })
    }

    fn without_crosslink(&self, ui: &Ui, remote: &Remote) -> Outcome<()> {
        ui.step("Before: a pod in cluster-a, on the node that is not the gateway, by macvlan + host-local alone");
        let runner = self.runner(&self.clusters.a1, vec![self.clusters.macvlan(1)]);
        let (pod, attachment, _) = place(&self.clusters, &runner)?;
        ui.must(&pod, "pod-a", "ip route")?;
        let ping = ui.command(&pod, "pod-a", &format!("ping -c 1 -W 1 {}", pick(&remote.ips, false)));
        if ping.status.success() {
            return Err("the pod reaches cluster-b without crosslink".to_owned());
        }
        ui.good("as expected, cluster-b cannot be reached");
        runner.del(&attachment).map_err(|failure| failure.msg())
    }

    /// The agent on the node of the underlay pods: it installs the plugin, tells it what is local and remote, and keeps the
    /// rules that such pods need.
    fn start_agent(&self, ui: &Ui) -> Outcome<Agent> {
        ui.step("The agent on node a1, without Kubernetes");
        let before = fs::read_to_string(self.clusters.state().join(MAIN_LIST)).map_err(|err| err.to_string())?;
        let agent = Agent::start(&self.clusters.a1, &self.plugins, &self.dir("a1"), before)?;
        ui.good(&format!("it is ready: {}", agent.readiness()?));
        let list = fs::read_to_string(self.clusters.state().join(MAIN_LIST)).map_err(|err| err.to_string())?;
        if !list.contains("\"crosslink\"") {
            return Err(format!("the plugin is not in the chain: {list}"));
        }
        ui.good(&format!("it has put crosslink into the main CNI's list: {}", types(&list)));
        ui.must(&self.clusters.a1, "a1", "nft list table inet crosslink")?;
        Ok(agent)
    }

    fn with_crosslink(&self, ui: &Ui) -> Outcome<(Vec<(Pod, Attachment)>, Runner)> {
        ui.step("After: the same chain with crosslink in it");
        let list = fs::read_to_string(self.clusters.state().join(MAIN_LIST)).map_err(|err| err.to_string())?;
        let list: Value = serde_json::from_str(&list).map_err(|err| err.to_string())?;
        let runner = self.clusters.runner_with(&self.clusters.a1, list, vec![self.dir("a1").join("bin")]);
        let mut pods = Vec::new();
        for _ in 0..=MORE_PODS {
            let (pod, attachment, _) = place(&self.clusters, &runner)?;
            pods.push((pod, attachment));
        }
        if let Some((pod, _)) = pods.first() {
            ui.must(pod, "pod-a", "ip route")?;
            ui.must(pod, "pod-a", "ip -6 route")?;
        }
        ui.note(&format!("{MORE_PODS} more pods like it run beside it."));
        Ok((pods, runner))
    }

    /// A CIDR more, in pods that run.
    fn follow(&self, ui: &Ui, pods: &[(Pod, Attachment)]) -> Outcome<()> {
        ui.step("A CIDR is added to the remotes file: running pods follow");
        let path = self.dir("a1").join(REMOTES);
        let watches: Vec<_> =
            pods.iter().map(|(pod, _)| agent::watch_route(pod, MORE, false)).collect::<Result<_, _>>()?;
        let started = Instant::now();
        write(&path, &remotes_b(&[MORE]))?;
        let last = agent::last(watches, started)?;
        ui.note(&format!("{}: cluster-b also has {MORE}", path.display()));
        ui.good(&format!(
            "the kernels of all {} pods told of the route after {:.1} ms",
            pods.len(),
            last.as_secs_f64() * 1e3
        ));
        let Some((pod, _)) = pods.first() else { return Ok(()) };
        ui.must(pod, "pod-a", &format!("ip route show {MORE}"))?;
        let watches: Vec<_> =
            pods.iter().map(|(pod, _)| agent::watch_route(pod, MORE, true)).collect::<Result<_, _>>()?;
        let started = Instant::now();
        write(&path, &remotes_b(&[]))?;
        let last = agent::last(watches, started)?;
        ui.good(&format!("taken out again, it is gone from all of them after {:.1} ms", last.as_secs_f64() * 1e3));
        Ok(())
    }

    fn traffic(&self, ui: &Ui, pod: &Pod, remote: &Remote) -> Outcome<()> {
        for (vip, v6) in VIPS {
            let ip = pick(&remote.ips, v6);
            ui.step(if v6 { "The same over IPv6" } else { "Ping and HTTP to cluster-b over IPv4" });
            ui.must(pod, "pod-a", &format!("ping -c 2 -i 0.2 -W 2 {ip}"))?;
            let host = if v6 { format!("[{ip}]") } else { ip.to_string() };
            for (what, url) in [("pod", format!("http://{host}/")), ("service", format!("http://{vip}/"))] {
                let page = ui.must(pod, "pod-a", &format!("curl -sS -g --max-time 5 {url}"))?;
                if !page.contains("Hello") {
                    return Err(format!("{url} answered {page:?}"));
                }
                ui.good(&format!("the page of the remote {what}"));
            }
        }
        Ok(())
    }

    fn check(&self, ui: &Ui, agent: &mut Agent, pods: &[(Pod, Attachment)], runner: &Runner) -> Outcome<()> {
        let Some((pod, attachment)) = pods.first() else { return Ok(()) };
        ui.step("A route is broken by hand while no agent runs, and CHECK");
        runner.check(attachment).map_err(|failure| failure.msg())?;
        ui.good("CHECK finds everything as it was made");
        agent.stop()?;
        ui.must(pod, "pod-a", "ip route del 172.111.0.0/16")?;
        match runner.check(attachment) {
            Ok(()) => return Err("CHECK did not notice".to_owned()),
            Err(failure) if failure.msg().contains("172.111.0.0/16") => {
                let (code, msg) = (failure.code().unwrap_or(0), failure.msg());
                ui.good(&format!("CHECK fails with code {code}: {}", msg.lines().next().unwrap_or_default()));
            }
            Err(failure) => return Err(failure.msg()),
        }
        let watch = agent::watch_route(pod, "172.111.0.0/16", false)?;
        let started = Instant::now();
        agent.resume(&self.clusters.a1)?;
        let back = agent::last(vec![watch], started)?;
        ui.good(&format!("the next agent has put it back {:.0} ms after its start", back.as_secs_f64() * 1e3));
        let watch = agent::watch_route(pod, "172.111.0.0/16", false)?;
        ui.must(pod, "pod-a", "ip route del 172.111.0.0/16")?;
        let started = Instant::now();
        let back = agent::last(vec![watch], started)?;
        ui.good(&format!("deleted again, it is back after {:.0} ms", back.as_secs_f64() * 1e3));
        runner.check(attachment).map_err(|failure| failure.msg())?;
        ui.good("CHECK agrees");
        Ok(())
    }

    fn delete(&self, ui: &Ui, remote: &Remote, attachments: &[&Attachment], runner: &Runner) -> Outcome<()> {
        ui.step("DEL, and what is left");
        for attachment in attachments {
            runner.del(attachment).map_err(|failure| failure.msg())?;
        }
        remote.runner.del(&remote.attachment).map_err(|failure| failure.msg())?;
        let a1: &Netns = &self.clusters.a1;
        let links = ui.must(a1, "a1", "ip -br link show type veth")?;
        let routes = ui.must(a1, "a1", "ip route show table 1410")?;
        let routes6 = ui.must(a1, "a1", "ip -6 route show table 1410")?;
        let in_pod = ui.must(&remote.pod, "pod-b", "ip route show proto 141")?;
        let records =
            ["a1", "b1"].map(|node| fs::read_dir(self.dir(node).join("run/attachments")).map_or(0, Iterator::count));
        let ours = links.lines().any(|line| line.starts_with("cl"));
        if ours || !(routes.is_empty() && routes6.is_empty() && in_pod.is_empty()) || records != [0, 0] {
            return Err("something is left".to_owned());
        }
        ui.good("no interface, no route and no record of crosslink (its rule 1410 stays, for the next pod)");
        Ok(())
    }

    fn uninstall(&self, ui: &Ui, agent: Agent) -> Outcome<()> {
        ui.step("Uninstall");
        let before = agent.before.clone();
        agent.uninstall(&self.clusters.a1)?;
        let list = fs::read_to_string(self.clusters.state().join(MAIN_LIST)).map_err(|err| err.to_string())?;
        if list != before {
            return Err(format!("the main CNI's list was {before} and is {list}"));
        }
        ui.good("the main CNI's list is what it was, to the byte");
        let tables = ui.must(&self.clusters.a1, "a1", "nft list tables")?;
        if tables.contains("crosslink") {
            return Err("rules are left".to_owned());
        }
        ui.good("no rule of crosslink is left; its binary stays for the DEL of pods that still run");
        Ok(())
    }
}

/// cluster-b as the remotes file tells it, with more pod CIDRs.
fn remotes_b(more: &[&str]) -> Value {
    remotes("cluster-b", &[&["172.111.0.0/16", "fd11::/64"], more].concat(), &["10.243.0.0/18", "fd43::/112"])
}

fn remotes(name: &str, pods: &[&str], services: &[&str]) -> Value {
    json!({"version": 1, "source": "static", "clusters": [{"name": name, "podCIDRs": pods, "serviceCIDRs": services}]})
}

/// Writes a file as a careful writer does: beside it, then renamed.
fn write(path: &Path, content: &Value) -> Outcome<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let next = dir.join(".next");
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(&next, content.to_string()))
        .and_then(|()| fs::set_permissions(&next, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&next, path))
        .map_err(|err| format!("{}: {err}", path.display()))
}

/// The plugins of a list, by type.
fn types(list: &str) -> String {
    let list: Value = serde_json::from_str(list).unwrap_or_default();
    let plugins = list.get("plugins").and_then(Value::as_array).into_iter().flatten();
    plugins.filter_map(|plugin| plugin.get("type")?.as_str()).collect::<Vec<_>>().join(", ")
}

/// Makes a pod: a namespace, then the chain.
fn place(clusters: &TwoClusters, runner: &Runner) -> Outcome<(Pod, Attachment, Vec<IpAddr>)> {
    let pod = clusters.pod("pod");
    let attachment = Attachment::new(pod.name(), &pod, "eth0");
    let result = runner.add(&attachment).map_err(|failure| format!("{}: {}", failure.plugin, failure.msg()))?;
    wait_addresses(&pod);
    Ok((pod, attachment, addresses(&result)))
}

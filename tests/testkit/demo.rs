//! `make demo`: the main job of crosslink in network namespaces, with real main CNI plugins and no Kubernetes.

use std::fs;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Output};
use std::time::Instant;

use crosslink_testkit::nft::{CrosslinkNft, Masquerade, crosslink_nft, kube_proxy_drop, service};
use crosslink_testkit::probe::wait_addresses;
use crosslink_testkit::servers::{Server, serve_http};
use crosslink_testkit::topology::{conflist, pick};
use crosslink_testkit::{Attachment, Netns, Node, Options, Pod, Runner, TwoClusters, addresses, two_clusters};
use serde_json::{Value, json};

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

/// Runs the demo with the plugin in `dir`.
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
    let (pod, attachment, runner) = stage.with_crosslink(ui)?;
    stage.traffic(ui, &pod, &remote)?;
    stage.check(ui, &pod, &attachment, &runner)?;
    stage.delete(ui, &remote, &attachment, &runner)
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
        crosslink_nft(
            &clusters.a1,
            &CrosslinkNft {
                local_pods: &["172.110.0.0/16", "fd10::/64"],
                remote_pods: &["172.111.0.0/16", "fd11::/64"],
                remote_services: &["10.243.0.0/18", "fd43::/112"],
                ..CrosslinkNft::default()
            },
        );
        ui.note(
            "The nftables rules that underlay pods need on their node are added by this demo, until there is an agent.",
        );
        let stage = Self { clusters, plugins: plugins.to_owned() };
        stage.write_files()?;
        Ok(stage)
    }

    fn dir(&self, node: &str) -> PathBuf {
        self.clusters.state().join(node)
    }

    /// What the agent, or an administrator, keeps on each node.
    fn write_files(&self) -> Outcome<()> {
        let remotes = |name: &str, pods: [&str; 2], services: [&str; 2]| {
            json!({"version": 1, "source": "static", "clusters": [
                {"name": name, "podCIDRs": pods, "serviceCIDRs": services}]})
        };
        let files = [
            (
                "a1/remotes/static.json",
                remotes("cluster-b", ["172.111.0.0/16", "fd11::/64"], ["10.243.0.0/18", "fd43::/112"]),
            ),
            (
                "b1/remotes/static.json",
                remotes("cluster-a", ["172.110.0.0/16", "fd10::/64"], ["10.233.0.0/18", "fd33::/112"]),
            ),
            (
                "a1/node.json",
                json!({"version": 1, "clusterName": "cluster-a", "addresses": ["10.7.0.11", "fd07::11"],
                    "podCIDRs": ["172.110.0.0/16", "fd10::/64"], "serviceCIDRs": ["10.233.0.0/18", "fd33::/112"]}),
            ),
        ];
        for (name, content) in files {
            let path = self.clusters.state().join(name);
            let dir = path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(dir)
                .and_then(|()| fs::write(&path, content.to_string()))
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
                .map_err(|err| format!("{}: {err}", path.display()))?;
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

    fn with_crosslink(&self, ui: &Ui) -> Outcome<(Pod, Attachment, Runner)> {
        ui.step("After: the same chain with crosslink at its end");
        let runner = self.runner(&self.clusters.a1, vec![self.clusters.macvlan(1), self.entry("a1")]);
        let (pod, attachment, _) = place(&self.clusters, &runner)?;
        ui.must(&pod, "pod-a", "ip route")?;
        ui.must(&pod, "pod-a", "ip -6 route")?;
        Ok((pod, attachment, runner))
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

    fn check(&self, ui: &Ui, pod: &Pod, attachment: &Attachment, runner: &Runner) -> Outcome<()> {
        ui.step("CHECK, before and after a route is broken by hand");
        runner.check(attachment).map_err(|failure| failure.msg())?;
        ui.good("CHECK finds everything as it was made");
        ui.must(pod, "pod-a", "ip route del 172.111.0.0/16")?;
        match runner.check(attachment) {
            Ok(()) => Err("CHECK did not notice".to_owned()),
            Err(failure) if failure.msg().contains("172.111.0.0/16") => {
                ui.good(&format!(
                    "CHECK fails with code {}: {}",
                    failure.code().unwrap_or(0),
                    first_line(&failure.msg())
                ));
                Ok(())
            }
            Err(failure) => Err(failure.msg()),
        }
    }

    fn delete(&self, ui: &Ui, remote: &Remote, attachment: &Attachment, runner: &Runner) -> Outcome<()> {
        ui.step("DEL, and what is left");
        runner.del(attachment).map_err(|failure| failure.msg())?;
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
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Makes a pod: a namespace, then the chain.
fn place(clusters: &TwoClusters, runner: &Runner) -> Outcome<(Pod, Attachment, Vec<IpAddr>)> {
    let pod = clusters.pod("pod");
    let attachment = Attachment::new(pod.name(), &pod, "eth0");
    let result = runner.add(&attachment).map_err(|failure| format!("{}: {}", failure.plugin, failure.msg()))?;
    wait_addresses(&pod);
    Ok((pod, attachment, addresses(&result)))
}

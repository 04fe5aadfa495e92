//! What the installer tells: board, events and metrics; and what it asks the API server.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "support/agent_install.rs"]
mod agent_install;

use std::{
    fs,
    io::{Read, Write},
    sync::{Arc, Mutex},
};

use agent_install::{FLANNEL, Host};
use crosslink_agent::{
    board::{Board, Note, Snapshot},
    context::Context,
    settings::{Given, Settings},
};
use prometheus_client::registry::Registry;

const FILE: &str = "10-flannel.conflist";

fn host() -> Host {
    let host = Host::new();
    host.put(FILE, FLANNEL);
    host
}

/// A context as the agent makes it, with settings of its own.
fn context(host: &Host, client: Option<kube::Client>) -> (Context, tokio::sync::mpsc::Receiver<Note>) {
    let given = Given {
        kubeconfig: Some("none".into()),
        node_name: Some("node-1".into()),
        cni_conf_dir: Some(host.conf()),
        cni_bin_dir: Some(host.bin()),
        lib_dir: Some(host.lib()),
        run_dir: Some(host.root().join("run")),
        plugin: Some(host.plugin.clone()),
        ..Given::default()
    };
    let settings = Settings::new(None, &given, &crosslink_agent::settings::Host::default()).unwrap();
    let (board, notes) = Board::new();
    let metrics = Arc::new(Mutex::new(Registry::with_prefix("crosslink")));
    let stop = tokio_util::sync::CancellationToken::new();
    let inputs = crosslink_agent::inputs::Shared::default();
    (Context { settings: Arc::new(settings), board, stop, client, inputs, metrics }, notes)
}

/// Runs the part in this process until the closure comes back.
fn in_process(
    host: &Host,
    client: impl FnOnce() -> Option<kube::Client>,
    scene: impl AsyncFnOnce(&Context, &mut tokio::sync::mpsc::Receiver<Note>),
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (context, mut notes) = context(host, client());
        let part = tokio::spawn(crosslink_agent::install::run(context.clone()));
        tokio::time::timeout(agent_install::PATIENCE, scene(&context, &mut notes)).await.unwrap();
        context.stop.cancel();
        part.await.unwrap().unwrap();
    });
}

/// Waits for a state of the board.
async fn await_board(context: &Context, holds: impl Fn(&Snapshot) -> bool) -> Snapshot {
    let mut changes = context.board.watch();
    loop {
        let snapshot = context.board.snapshot();
        if holds(&snapshot) {
            return snapshot;
        }
        changes.changed().await.unwrap();
    }
}

fn metrics(context: &Context) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &context.metrics.lock().unwrap()).unwrap();
    text
}

fn is_well(snapshot: &Snapshot) -> bool {
    snapshot.parts.get("install").is_some_and(|health| health.ok && health.required)
}

#[test]
fn board_events_and_metrics_tell_what_happened() {
    let host = host();
    in_process(
        &host,
        || None,
        async |context, notes| {
            let snapshot = await_board(context, is_well).await;
            let facts = &snapshot.facts["install"];
            assert_eq!(
                (&facts["mode"], &facts["file"], &facts["network"]),
                (&"insert".into(), &FILE.into(), &"cbr0".into())
            );
            host.put(FILE, FLANNEL);
            let note = notes.recv().await.unwrap();
            assert_eq!((note.reason, note.warning), ("CNIConfigRestored", false));
            assert!(note.text.contains("Flannel"), "{}", note.text);
            fs::remove_file(host.installed()).unwrap();
            assert_eq!(notes.recv().await.unwrap().reason, "CNIBinaryReplaced");
            let text = metrics(context);
            for line in [
                "crosslink_install_total{result=\"success\"} 3",
                "crosslink_install_ready 1",
                "crosslink_config_valid 1",
                "crosslink_config_mode{mode=\"insert\"} 1",
                "crosslink_config_mode{mode=\"dropin\"} 0",
                "crosslink_config_overwrites_total{file=\"10-flannel.conflist\"} 1",
                "crosslink_config_repair_seconds_count 1",
                "crosslink_config_conflict_backoff 0",
                "crosslink_binary_mismatch_total 2",
                "crosslink_watch_errors_total 0",
            ] {
                assert!(text.contains(line), "{line}\n{text}");
            }
            let sum = text.lines().find_map(|line| line.strip_prefix("crosslink_config_repair_seconds_sum ")).unwrap();
            let sum: f64 = sum.parse().unwrap();
            // Never faster than a writer's quiet is waited for.
            assert!((0.1..5.0).contains(&sum), "{sum}");
            host.put(FILE, "{");
            let snapshot = await_board(context, |snapshot| !is_well(snapshot)).await;
            assert!(snapshot.parts["install"].text.contains(FILE));
            assert_eq!(snapshot.findings["install"][0].id.as_str(), "XL-CNI-CONFIG");
            assert!(metrics(context).contains("crosslink_config_valid 0"));
            host.put(FILE, FLANNEL);
            let snapshot = await_board(context, is_well).await;
            assert!(!snapshot.findings.contains_key("install"));
        },
    );
}

#[test]
fn a_conflict_is_an_event_a_finding_and_a_metric() {
    let host = host();
    in_process(
        &host,
        || None,
        async |context, notes| {
            await_board(context, is_well).await;
            let mut conflict = None;
            for _ in 0..4 {
                host.put(FILE, FLANNEL);
                loop {
                    let note = notes.recv().await.unwrap();
                    match note.reason {
                        "CNIConfigConflict" => conflict = Some(note),
                        "CNIConfigRestored" => break,
                        other => panic!("{other}"),
                    }
                }
            }
            let conflict = conflict.unwrap();
            assert!(
                conflict.warning && conflict.text.contains(FILE) && conflict.text.contains("Flannel"),
                "{conflict:?}"
            );
            let snapshot = await_board(context, is_well).await;
            assert_eq!(snapshot.findings["install"][0].id.as_str(), "XL-CNI-CONFLICT");
            let text = metrics(context);
            assert!(text.contains("crosslink_config_conflict_backoff 1.6"), "{text}");
            assert!(text.contains("crosslink_config_overwrites_total{file=\"10-flannel.conflist\"} 4"), "{text}");
        },
    );
}

/// Answers every request with a Node of that runtime, or not at all.
fn api_server(runtime: Option<&'static str>) -> kube::Client {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let length = stream.read(&mut request).unwrap_or_default();
            let Some(runtime) = runtime else { continue };
            assert!(request[..length].starts_with(b"GET /api/v1/nodes/node-1 "));
            let node = format!(
                r#"{{"apiVersion":"v1","kind":"Node","metadata":{{"name":"node-1"}},"status":{{"nodeInfo":{{"architecture":"","bootID":"","containerRuntimeVersion":"{runtime}","kernelVersion":"","kubeProxyVersion":"","kubeletVersion":"","machineID":"","operatingSystem":"","osImage":"","systemUUID":""}}}}}}"#
            );
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length:";
            drop(write!(stream, "{head} {}\r\n\r\n{node}", node.len()));
        }
    });
    kube::Client::try_from(kube::Config::new(format!("http://{address}").parse().unwrap())).unwrap()
}

#[test]
fn the_node_object_tells_the_runtime() {
    let host = host();
    in_process(
        &host,
        || Some(api_server(Some("containerd://2.1.4"))),
        async |context, _| {
            let snapshot = await_board(context, is_well).await;
            assert_eq!(snapshot.facts["install"]["mode"], "dropin");
            assert_eq!(snapshot.facts["install"]["runtime"], "containerd://2.1.4");
        },
    );
    // Nobody answers at the next start: the drop-in stays.
    let before = host.moment();
    in_process(&host, || Some(api_server(None)), async |context, _| drop(await_board(context, is_well).await));
    assert_eq!(host.moment(), before);
    in_process(
        &host,
        || Some(api_server(Some("docker://28.0.0"))),
        async |context, notes| {
            assert_eq!(notes.recv().await.unwrap().reason, "UnsupportedRuntime");
            let snapshot = await_board(context, is_well).await;
            assert_eq!(snapshot.facts["install"]["mode"], "insert");
        },
    );
}

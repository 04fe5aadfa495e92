//! What the agent shows on its sockets, with the built agent and without Kubernetes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "support/agent_facts.rs"]
mod agent_facts;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use agent_facts::{LONG, Site};
use crosslink_testkit::probe::wait_until;
use nix::sys::signal::Signal;
use serde_json::Value;

#[test]
fn probes_metrics_status_and_settings() {
    let site = Site::new("none", &["--cluster-name", "own"]);
    let _agent = site.start_up();
    assert_eq!(site.get("/livez"), (200, "ok\n".to_owned()));
    wait_until("it is ready", LONG, || site.get("/readyz").0 == 200);
    assert!(site.get("/readyz").1.contains("[+]facts ok\n"));
    let (status, metrics) = site.get("/metrics");
    assert_eq!(status, 200);
    for line in [
        concat!("crosslink_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        "crosslink_part_ready{part=\"facts\"} 1",
        "crosslink_findings{id=\"XL-SOURCE\",severity=\"warning\"} 0",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    // What only root may see is on the unix socket alone.
    for path in ["/status", "/settings", "/", "/metrics/", "/livez/x", "//livez"] {
        assert_eq!(site.get(path).0, 404, "{path}");
    }
    let settings: Value = serde_json::from_str(&site.local("/settings").1).unwrap();
    assert_eq!((&settings["clusterName"], &settings["cniMode"]), (&"own".into(), &"none".into()));
    assert_eq!(site.status()["parts"]["facts"]["ok"], true);
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(site.local(path).0, 200, "{path}");
    }
    assert_eq!(site.local("/nothing").0, 404);
}

#[test]
fn only_reading_is_allowed() {
    let site = Site::new("none", &[]);
    let _agent = site.start_up();
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"] {
        let (status, header, _) =
            site.raw(&format!("{method} /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"));
        assert!(status == 405 && header.contains("allow: GET, HEAD"), "{method}: {header}");
    }
    let (status, header, body) = site.raw("HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(status == 200 && body.is_empty(), "{header} {body}");
    assert!(header.contains("openmetrics"), "{header}");
    assert_eq!(site.raw("nonsense\r\n\r\n").0, 400);
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(20_000));
    assert!(matches!(site.raw(&long).0, 414 | 431), "{:?}", site.raw(&long));
}

#[test]
fn the_socket_is_roots_alone() {
    let site = Site::new("none", &[]);
    let agent = site.start_up();
    let meta = fs::metadata(site.socket()).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, 0));
    assert_eq!(fs::metadata(site.run_dir()).unwrap().mode() & 0o7777, 0o700);
    let mut names: Vec<_> = fs::read_dir(site.run_dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["agent.sock", "attachments"]);
    assert!(agent.terminate().success());
    assert!(!site.socket().exists());
}

#[test]
fn a_stale_socket_and_whatever_else_is_there_is_replaced() {
    let site = Site::new("none", &[]);
    fs::create_dir_all(site.run_dir()).unwrap();
    drop(UnixListener::bind(site.socket()).unwrap());
    // Left by an agent that was killed while it bound.
    fs::create_dir(site.run_dir().join(".sock")).unwrap();
    drop(UnixListener::bind(site.run_dir().join(".sock/s")).unwrap());
    drop(site.start_up());
    fs::remove_file(site.socket()).unwrap();
    fs::write(site.socket(), "not a socket").unwrap();
    let agent = site.start_up();
    assert_eq!(site.local("/livez").0, 200);
    assert!(agent.terminate().success());
}

#[test]
fn the_newest_agent_has_the_socket() {
    let mut site = Site::new("none", &[]);
    let old = site.start_up();
    let before = fs::metadata(site.socket()).unwrap().ino();
    site.next_port();
    let mut new = site.start();
    wait_until("the new one has the socket", LONG, || {
        fs::metadata(site.socket()).is_ok_and(|meta| meta.ino() != before)
    });
    // At no moment there was none. The old one ends and leaves it alone.
    assert!(old.terminate().success());
    assert_eq!(site.local("/livez").0, 200);
    drop(UnixStream::connect(site.socket()).unwrap());
    new.signal(Signal::SIGTERM);
    assert!(new.ended().success());
    assert!(!site.socket().exists());
}

#[test]
fn an_address_in_use_is_named_with_the_cure() {
    let site = Site::new("none", &[]);
    let taken = std::net::TcpListener::bind(site.address()).unwrap();
    let mut agent = site.start();
    assert!(!agent.ended().success());
    let log = agent.log();
    for part in ["httpAddress", &site.address().to_string(), "give another", "Address already in use"] {
        assert!(log.contains(part), "{part}: {log}");
    }
    drop(taken);
}

#[test]
fn a_socket_that_cannot_be_is_named_with_the_cure() {
    let site = Site::new("none", &[]);
    fs::create_dir_all(site.socket()).unwrap();
    let mut agent = site.start();
    assert!(!agent.ended().success());
    assert!(agent.log().contains("agent.sock: choose another runDir"), "{}", agent.log());
}

#[test]
fn clients_that_are_slow_or_mean_harm_stand_in_nobodys_way() {
    let site = Site::new("none", &[]);
    let _agent = site.start_up();
    wait_until("it is ready", LONG, || site.get("/readyz").0 == 200);
    // Twice as many as are served at once: some say nothing, some speak slowly, some never read what they asked for.
    let mut clients: Vec<TcpStream> = (0..128)
        .map(|place| {
            let mut client = TcpStream::connect(site.address()).unwrap();
            match place % 3 {
                0 => {}
                1 => client.write_all(b"GET /metrics HTTP/1.1\r\nHost: ").unwrap(),
                _ => client.write_all(&b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n".repeat(50)).unwrap(),
            }
            client
        })
        .collect();
    let start = Instant::now();
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(site.get(path).0, 200, "{path}");
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // The first has said nothing, and had to make room at once, long before its time was up.
    clients[0].set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    assert_eq!(clients[0].read(&mut [0; 16]).unwrap(), 0);
    // The others are sent away as well: a connection is closed by the agent whatever its client does.
    for client in &mut clients {
        client.set_read_timeout(Some(LONG)).unwrap();
        let mut rest = Vec::new();
        // The end, or a reset where the agent left something unread.
        if let Err(err) = client.read_to_end(&mut rest) {
            assert_eq!(err.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
}

#[test]
fn a_stopped_agent_does_not_pass_for_alive() {
    let site = Site::new("none", &[]);
    let agent = site.start_up();
    agent.signal(Signal::SIGSTOP);
    let mut client = TcpStream::connect(site.address()).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    client.write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert!(client.read(&mut [0; 16]).is_err(), "the kernel accepts, nobody answers");
    agent.signal(Signal::SIGCONT);
    client.set_read_timeout(Some(LONG)).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("200 OK"), "{answer}");
}

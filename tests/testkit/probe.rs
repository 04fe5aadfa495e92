//! Clients that run in a namespace and say whether traffic gets through.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::netns::{Netns, in_netns};

/// How long a client waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// What [`tcp`] sends beyond its greeting: enough for many full segments, so that a wrong MTU or a connection that
/// conntrack loses half-way does not pass.
const PAYLOAD: usize = 100 * 1024;

/// Looks at `condition` until it is true.
///
/// For conditions that the kernel reaches on its own time (an IPv6 address leaving the tentative state, a link gone
/// after its namespace), never to give something time to happen that no condition describes.
///
/// # Panics
/// When it is not true within `timeout`, with `what`.
pub fn wait_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < timeout, "waited {timeout:?} in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until no IPv6 address in `netns` is tentative any more, that is, until all can be used.
///
/// # Panics
/// When that takes more than 10 s, or an address turns out to be a duplicate.
pub fn wait_addresses(netns: &Netns) {
    wait_until("duplicate address detection ends", Duration::from_secs(10), || {
        assert!(netns.ip("-6 addr show dadfailed").trim().is_empty(), "{}: duplicate address", netns.name());
        netns.ip("-6 addr show tentative").trim().is_empty()
    });
}

/// Talks to a [`crate::servers::serve_tcp`] server: a line and 100 KiB, each sent and received back.
///
/// Returns the source address that the server saw.
///
/// # Errors
/// What failed, after at most 3 s without progress.
pub fn tcp(netns: &Netns, addr: SocketAddr) -> Result<String, String> {
    in_netns(netns.path(), || {
        let stream = connect(addr)?;
        let mut writer = stream.try_clone().map_err(|error| format!("{addr}: {error}"))?;
        let mut reader = BufReader::new(stream);
        let peer = exchange(&mut writer, &mut reader, "hello").map_err(|error| format!("{addr}: hello: {error}"))?;
        let payload = "x".repeat(PAYLOAD);
        exchange(&mut writer, &mut reader, &payload).map_err(|error| format!("{addr}: {PAYLOAD} bytes: {error}"))?;
        Ok(peer)
    })
}

/// Fetches `/` and returns the body.
///
/// # Errors
/// What failed, also an answer other than 200, after at most 3 s without progress.
pub fn http_get(netns: &Netns, addr: SocketAddr) -> Result<String, String> {
    in_netns(netns.path(), || {
        let mut stream = connect(addr)?;
        let mut answer = String::new();
        write!(stream, "GET / HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")
            .and_then(|()| stream.read_to_string(&mut answer))
            .map_err(|error| format!("{addr}: {error}"))?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.to_owned()),
            _ => Err(format!("{addr}: unexpected answer: {answer}")),
        }
    })
}

/// One echo request, of either family.
///
/// # Errors
/// What `ping` said when no reply came within 2 s.
pub fn ping(netns: &Netns, ip: IpAddr) -> Result<(), String> {
    let output = netns.try_exec(&["ping", "-n", "-c1", "-W2", &ip.to_string()]);
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

fn connect(addr: SocketAddr) -> Result<TcpStream, String> {
    let stream = TcpStream::connect_timeout(&addr, TIMEOUT).map_err(|error| format!("connect {addr}: {error}"))?;
    stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout above zero");
    stream.set_write_timeout(Some(TIMEOUT)).expect("a timeout above zero");
    Ok(stream)
}

/// Sends a line and checks its echo; returns the address in it.
fn exchange(writer: &mut impl Write, reader: &mut impl BufRead, line: &str) -> Result<String, String> {
    writer.write_all(format!("{line}\n").as_bytes()).map_err(|error| format!("send: {error}"))?;
    let mut answer = String::new();
    reader.read_line(&mut answer).map_err(|error| format!("receive: {error}"))?;
    let (peer, echo) = answer.trim_end().split_once(' ').ok_or_else(|| format!("cut short: '{answer}'"))?;
    if echo != line {
        return Err(format!("{} bytes came back, not {}", echo.len(), line.len()));
    }
    peer.strip_prefix("peer=").map(str::to_owned).ok_or_else(|| format!("not the test server: '{peer}'"))
}

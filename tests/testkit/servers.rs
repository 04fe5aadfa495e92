//! Small servers inside a namespace. They are threads of the test: a socket stays in the namespace it was made in.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use crate::netns::{Netns, in_netns};

/// How long a server waits for a silent client.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running server. It listens when this value is returned, and no longer once it is dropped.
#[derive(Debug)]
pub struct Server {
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// The address it is bound to, with the port chosen by the kernel where port 0 was asked for.
    ///
    /// # Panics
    /// Never, while the listener is open.
    pub fn addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("an open listener has an address")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread out of accept(2); closing the descriptor would not.
        let _ignored = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ignored = thread.join();
        }
    }
}

/// Serves `body` to every HTTP request. `bind` is `ADDRESS:PORT`, IPv6 in brackets.
///
/// # Panics
/// When it cannot listen there.
pub fn serve_http(netns: &Netns, bind: &str, body: &str) -> Server {
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    serve(netns, bind, move |stream| http(stream, &answer))
}

/// Answers each line with `peer=<address of the client> <line>`. `bind` is `ADDRESS:PORT`, IPv6 in brackets.
///
/// # Panics
/// When it cannot listen there.
pub fn serve_tcp(netns: &Netns, bind: &str) -> Server {
    serve(netns, bind, echo)
}

fn serve<F>(netns: &Netns, bind: &str, talk: F) -> Server
where
    F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    let listener = in_netns(netns.path(), || TcpListener::bind(bind))
        .unwrap_or_else(|error| panic!("{}: listen on {bind}: {error}", netns.name()));
    let listener = Arc::new(listener);
    let talk = Arc::new(talk);
    let accepting = Arc::clone(&listener);
    let thread = thread::spawn(move || {
        while let Ok((stream, _)) = accepting.accept() {
            let talk = Arc::clone(&talk);
            // A client that goes away is the test's business, which sees it at its own end.
            thread::spawn(move || drop(talk(stream)));
        }
    });
    Server { listener, thread: Some(thread) }
}

fn http(mut stream: TcpStream, answer: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    // The request ends with an empty line; what it asks for does not matter.
    while reader.read_line(&mut line)? > 0 && line.trim_end() != "" {
        line.clear();
    }
    stream.write_all(answer.as_bytes())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    // An IPv4 client of an IPv6 socket is shown as IPv4.
    let peer = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        stream.write_all(format!("peer={peer} {line}").as_bytes())?;
        line.clear();
    }
    Ok(())
}

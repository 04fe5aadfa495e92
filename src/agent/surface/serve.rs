//! HTTP over TCP and over a unix socket. One request per connection, little time and few connections at once, so that
//! nobody who is slow, or means harm, keeps a probe waiting.

use std::{collections::VecDeque, convert::Infallible, io, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::AbortHandle,
    time::{sleep, timeout},
};

use super::router::{Asker, Router};

/// Most connections of one listener. With one more the oldest is closed: a probe takes milliseconds, so what is old is
/// slow.
const CONNECTIONS: usize = 64;

/// How long a client may take to send its request's header.
const HEADER: Duration = Duration::from_secs(5);

/// How long a connection may last in all.
const LIFE: Duration = Duration::from_secs(10);

/// Largest header, bytes; the smallest that hyper allows.
const BUFFER: usize = 8192;

/// Pause after an accept that failed, mostly for want of descriptors.
const AGAIN: Duration = Duration::from_millis(100);

/// What accepts connections.
pub trait Accept {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<Self::Stream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

impl Accept for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<Self::Stream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

/// Connections in progress, oldest first; they end with this.
#[derive(Default)]
struct Running(VecDeque<AbortHandle>);

impl Running {
    fn add(&mut self, task: AbortHandle) {
        self.0.retain(|task| !task.is_finished());
        if self.0.len() >= CONNECTIONS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(task);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Serves for ever.
pub async fn serve(listener: impl Accept, router: Arc<Router>, asker: Asker) {
    let mut running = Running::default();
    loop {
        match listener.accept().await {
            Ok(stream) => running.add(tokio::spawn(connection(stream, router.clone(), asker)).abort_handle()),
            Err(err) => {
                tracing::warn!("accept: {err}");
                sleep(AGAIN).await;
            }
        }
    }
}

async fn connection<S>(stream: S, router: Arc<Router>, asker: Asker)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = router.answer(asker, &request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .keep_alive(false)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong here is the client's affair.
    let _ = timeout(LIFE, served).await;
}

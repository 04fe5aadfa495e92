//! Paths and what they answer.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
};

use super::{
    live::Heart,
    metrics::{self, Metrics},
    ready::Readiness,
};
use crate::context::Context;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// Everything that answers need.
#[derive(Debug)]
pub struct Router {
    context: Context,
    metrics: Metrics,
    readiness: Mutex<Readiness>,
    heart: Heart,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Anybody who reaches the address.
    Network,
    /// Root, by the unix socket.
    Local,
}

impl Router {
    /// A router.
    pub fn new(context: Context, heart: Heart) -> Arc<Self> {
        let mut metrics = None;
        context.register(|registry| metrics = Some(Metrics::new(registry)));
        Arc::new(Self { context, metrics: metrics.unwrap_or_default(), readiness: Mutex::default(), heart })
    }

    fn readiness(&self) -> MutexGuard<'_, Readiness> {
        let mut readiness = self.readiness.lock().unwrap_or_else(PoisonError::into_inner);
        readiness.update(Instant::now(), &self.context.board.snapshot().parts);
        readiness
    }

    /// Takes note of every change of the parts' health, for ever.
    pub async fn remember(self: Arc<Self>) {
        let mut changes = self.context.board.watch();
        loop {
            changes.borrow_and_update();
            drop(self.readiness());
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Answers a request.
    pub fn answer(&self, asker: Asker, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        match (request.uri().path(), asker) {
            ("/livez", _) => match self.heart.signs().verdict(Instant::now()) {
                Ok(()) => response(StatusCode::OK, TEXT, "ok\n"),
                Err(why) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, why + "\n"),
            },
            ("/readyz", _) => {
                let verdict = self.readiness().verdict(Instant::now());
                let status = if verdict.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                response(status, TEXT, verdict.text)
            }
            ("/metrics", _) => match self.metrics.text(&self.context.metrics, &self.context.board.snapshot()) {
                Ok(text) => response(StatusCode::OK, metrics::CONTENT_TYPE, text),
                Err(err) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{err}\n")),
            },
            ("/status", Asker::Local) => json(&self.context.board.snapshot()),
            ("/settings", Asker::Local) => json(self.context.settings.as_ref()),
            (_, Asker::Network) => response(StatusCode::NOT_FOUND, TEXT, "try /livez, /readyz, /metrics\n"),
            (_, Asker::Local) => {
                response(StatusCode::NOT_FOUND, TEXT, "try /livez, /readyz, /metrics, /status, /settings\n")
            }
        }
    }
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(value) {
        Ok(text) => response(StatusCode::OK, JSON, text + "\n"),
        Err(err) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{err}\n")),
    }
}

//! What every part is given.

use std::sync::{Arc, Mutex};

use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::{board::Board, settings::Settings};

/// What every part is given. Clones share everything.
#[derive(Clone)]
pub struct Context {
    /// Effective settings.
    pub settings: Arc<Settings>,
    /// Where parts report.
    pub board: Board,
    /// Cancelled at SIGTERM: parts return without touching the node.
    pub stop: CancellationToken,
    /// The API server, unless `kubeconfig` is `none`. Making it asks nothing of the server.
    pub client: Option<kube::Client>,
    /// Remotes files and `node.json`; see [`crate::inputs::watch`].
    pub inputs: crate::inputs::Shared,
    /// Parts register their metrics here, with names after the prefix `crosslink_`.
    pub metrics: Arc<Mutex<Registry>>,
}

impl Context {
    /// Registers metrics.
    pub fn register(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

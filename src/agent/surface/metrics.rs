//! Metrics that are read from the board, beside those that parts register themselves.

use std::sync::Mutex;

use crosslink_core::finding::Id;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::board::Snapshot;

/// Content type of what [`Metrics::text`] returns (OpenMetrics 1.0).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    part: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Finding {
    id: &'static str,
    severity: String,
}

/// Gauges that are set when they are asked for.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    parts: Family<Part, Gauge>,
    findings: Family<Finding, Gauge>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("build", "Version of the agent", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        registry.register("part_ready", "Whether a part of the agent is well", metrics.parts.clone());
        registry.register("findings", "Findings on this node, by id", metrics.findings.clone());
        metrics
    }

    /// All metrics as text.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn text(&self, registry: &Mutex<Registry>, snapshot: &Snapshot) -> Result<String, std::fmt::Error> {
        self.parts.clear();
        for (part, health) in &snapshot.parts {
            self.parts.get_or_create(&Part { part: part.clone() }).set(i64::from(health.ok));
        }
        self.findings.clear();
        // Also those that nobody found, so that an alert on a change has something to start from.
        for id in Id::ALL {
            let count = snapshot.findings.values().flatten().filter(|finding| finding.id == *id).count();
            let label = Finding { id: id.as_str(), severity: id.severity().to_string() };
            self.findings.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        encode(&mut text, &registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner))?;
        Ok(text)
    }
}

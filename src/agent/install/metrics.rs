//! Metrics of the installer.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
};

use crate::context::Context;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResultLabel {
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ModeLabel {
    pub mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct FileLabel {
    pub file: String,
}

/// What is counted and measured.
#[derive(Clone, Debug)]
pub(super) struct Metrics {
    pub install: Family<ResultLabel, Counter>,
    pub ready: Gauge,
    pub config_valid: Gauge,
    pub config_mode: Family<ModeLabel, Gauge>,
    pub overwrites: Family<FileLabel, Counter>,
    pub repair_seconds: Histogram,
    pub backoff: Gauge<f64, AtomicU64>,
    pub binary_mismatch: Counter,
    pub watch_errors: Counter,
}

impl Metrics {
    /// Registers them.
    pub fn new(context: &Context) -> Self {
        let metrics = Self {
            install: Family::default(),
            ready: Gauge::default(),
            config_valid: Gauge::default(),
            config_mode: Family::default(),
            overwrites: Family::default(),
            // From 10 ms to 41 s: debouncing alone is 100 ms.
            repair_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 13)),
            backoff: Gauge::default(),
            binary_mismatch: Counter::default(),
            watch_errors: Counter::default(),
        };
        let m = metrics.clone();
        context.register(|registry| {
            registry.register(
                "install",
                "Passes of the installer that changed something or failed, by result",
                m.install,
            );
            registry.register("install_ready", "Whether plugin and entry are in place", m.ready);
            registry.register(
                "config_valid",
                "Whether the main CNI's configuration can be used and has the entry",
                m.config_valid,
            );
            registry.register("config_mode", "Way into the chain that is in use", m.config_mode);
            registry.register("config_overwrites", "Times that another writer undid the entry, by file", m.overwrites);
            registry.register("config_repair_seconds", "From noticing such a loss to its repair", m.repair_seconds);
            registry.register(
                "config_conflict_backoff",
                "Seconds that the next repair will wait; 0 without conflict",
                m.backoff,
            );
            registry.register(
                "binary_mismatch",
                "Times that the installed plugin was missing or another one",
                m.binary_mismatch,
            );
            registry.register("watch_errors", "Times that directories could not be watched", m.watch_errors);
        });
        metrics
    }
}

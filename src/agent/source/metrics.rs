//! Metrics of sources.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::settings::SourceKind;

/// Which source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    source: &'static str,
}

/// Metrics of all sources.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    generation: Family<Label, Gauge>,
    last_sync: Family<Label, Gauge>,
    errors: Family<Label, Counter>,
    objects: Family<Label, Gauge>,
}

impl Metrics {
    /// Makes them known.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("cidr_generation", "Generation of a source's remotes file", self.generation.clone());
        registry.register(
            "cidr_last_sync_timestamp_seconds",
            "When a source's remotes file was last known to say what the source says",
            self.last_sync.clone(),
        );
        registry.register("source_errors", "Failures to read a source or to write its file", self.errors.clone());
        registry.register("source_objects", "Objects of a source", self.objects.clone());
    }

    /// Those of one source.
    pub fn of(&self, kind: SourceKind) -> SourceMetrics {
        let label = Label { source: kind.name() };
        SourceMetrics {
            generation: self.generation.get_or_create_owned(&label),
            last_sync: self.last_sync.get_or_create_owned(&label),
            errors: self.errors.get_or_create_owned(&label),
            objects: self.objects.get_or_create_owned(&label),
        }
    }
}

/// Metrics of one source.
#[derive(Clone, Debug)]
pub struct SourceMetrics {
    /// Generation of its file.
    pub generation: Gauge,
    /// Seconds since the epoch at which the file was last in step.
    pub last_sync: Gauge,
    /// Failures.
    pub errors: Counter,
    /// Objects known.
    pub objects: Gauge,
}

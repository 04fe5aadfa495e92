//! Metrics of the part.

use prometheus_client::metrics::counter::Counter;

use super::pass::Outcome;
use crate::context::Context;

/// The counters.
#[derive(Default)]
pub struct Metrics {
    applies: Counter,
    repairs: Counter,
    deleted: Counter,
}

impl Metrics {
    /// Makes and registers them.
    pub fn register(context: &Context) -> Self {
        let metrics = Self::default();
        context.register(|registry| {
            registry.register("nft_applies", "Times that the nftables table was written", metrics.applies.clone());
            registry.register(
                "nft_repairs",
                "Times that the nftables table was written because somebody else had changed it",
                metrics.repairs.clone(),
            );
            registry.register(
                "conntrack_deleted",
                "Masqueraded connections that were deleted because their source is to be kept",
                metrics.deleted.clone(),
            );
        });
        metrics
    }

    /// Counts what a pass did.
    pub fn count(&self, outcome: &Outcome) {
        self.applies.inc_by(u64::from(outcome.changed.is_some()));
        self.repairs.inc_by(u64::from(outcome.repaired));
        self.deleted.inc_by(u64::try_from(outcome.deleted).unwrap_or_default());
    }
}

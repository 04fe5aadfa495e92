//! The contract of the pure part (DESIGN.md sections 3 and 4), test by test: what is routed, what that makes of the
//! kernel, and how a plan gets there and back.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a builder that cannot go on fails the test"
)]

mod delta_props;
mod kernel;
mod plan;
mod plan_props;
mod precedence;
mod record;
mod routed_set_props;
mod selection;
mod support;
mod wanted;

//! Part: facts.

use crate::context::Context;

/// Runs the part.
///
/// # Errors
/// It cannot go on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    context.stop.cancelled().await;
    Ok(())
}

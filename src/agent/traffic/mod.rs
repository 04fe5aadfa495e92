//! Part: traffic.

use crate::context::Context;

/// Runs the part.
///
/// # Errors
/// It cannot go on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    context.stop.cancelled().await;
    Ok(())
}

/// Removes what the part keeps on the node.
///
/// # Errors
/// The kernel's.
pub async fn uninstall(_context: &Context) -> anyhow::Result<()> {
    Ok(())
}

//! Part: install.

use crate::context::Context;

/// Runs the part.
///
/// # Errors
/// It cannot go on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    context.stop.cancelled().await;
    Ok(())
}

/// Takes the plugin out of the chain.
///
/// # Errors
/// The system's.
pub async fn uninstall(_context: &Context) -> anyhow::Result<()> {
    Ok(())
}

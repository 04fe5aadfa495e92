//! Part: source.

use crate::context::Context;

/// Runs the part.
///
/// # Errors
/// It cannot go on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    context.stop.cancelled().await;
    Ok(())
}

/// A client for the API server that a kubeconfig file names.
///
/// # Errors
/// The file cannot be read or used.
pub async fn client_from(path: &std::path::Path) -> anyhow::Result<kube::Client> {
    let kubeconfig = kube::config::Kubeconfig::read_from(path)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

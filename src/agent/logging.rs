//! Log lines of the agent: plain or JSON, to standard error.

use tracing_subscriber::EnvFilter;

use crate::settings::LogFormat;

/// Starts logging.
///
/// # Errors
/// The filter does not parse.
pub fn start(format: LogFormat, level: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|err| format!("logLevel \"{level}\": {err}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Plain => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|err| err.to_string())
}

//! What goes to standard output.

use std::{io::Write, sync::OnceLock};

use crosslink_core::{
    error::{Code, Error},
    netconf::RawConf,
};
use rscni_plugin::{
    error::Error as RscniError,
    types::ErrorResult,
    version::{PluginInfo, SpecVersion},
};

/// The configuration's version, for error objects: also one that a panic writes.
static VERSION: OnceLock<SpecVersion> = OnceLock::new();

/// Notes the version under which errors are reported: the configured one, whether or not we speak it, since the
/// specification asks for the same value. Our newest where there is none.
pub fn remember_version(input: &str) {
    let declared = RawConf::parse(input).and_then(|raw| raw.cni_version());
    if let Some(version) = declared.ok().and_then(|version| version.parse().ok()) {
        let _ = VERSION.set(version);
    }
}

/// Answers VERSION.
///
/// # Errors
/// Standard output cannot be written.
pub fn version(stdout: &mut dyn Write) -> std::io::Result<()> {
    serde_json::to_writer(&mut *stdout, &PluginInfo::default())?;
    stdout.flush()
}

/// Tells a person what this is.
pub fn about() {
    let versions: Vec<String> = PluginInfo::default().supported_versions().iter().map(ToString::to_string).collect();
    let text = format!(
        "crosslink {}: chained CNI plugin, routes pods to remote clusters\nCNI protocol versions supported: {}\n",
        env!("CARGO_PKG_VERSION"),
        versions.join(", ")
    );
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Writes an error object. Where that fails there is nobody left to tell but the log.
pub fn error(stdout: &mut dyn Write, err: &Error) {
    let error = RscniError::Custom(err.code as u32, err.msg.clone(), err.details.clone());
    let object = ErrorResult::new(VERSION.get().copied().unwrap_or(SpecVersion::CURRENT), &error);
    let written =
        serde_json::to_writer(&mut *stdout, &object).map_err(std::io::Error::from).and_then(|()| stdout.flush());
    if written.is_err() {
        let _ = writeln!(std::io::stderr(), "crosslink: {err}");
    }
}

/// Standard output could not be written.
pub fn unwritable(err: &std::io::Error) -> Error {
    Error::new(Code::Io, format!("the result cannot be written to standard output: {err}"))
}

/// Errors of the protocol library, with our texts where its own name no cure.
pub fn from_rscni(err: RscniError) -> Error {
    let code = match &err {
        RscniError::IncompatibleVersion(_) => Code::IncompatibleVersion,
        RscniError::InvalidEnvValue(_) => Code::Environment,
        _ => Code::Decode,
    };
    Error::new(code, err.to_string())
}

/// Makes a panic, which is a bug, still an answer: one error object, exit status 1.
pub fn answer_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let what = info.payload().downcast_ref::<&str>().map_or_else(
            || info.payload().downcast_ref::<String>().cloned().unwrap_or_default(),
            |text| (*text).to_owned(),
        );
        let err = Error::new(Code::Internal, format!("internal error at {place}: {what}; please report it"));
        let _ = writeln!(std::io::stderr(), "crosslink: {err}");
        // The lock may be held by the panicking code; the descriptor itself is not.
        if let Ok(mut stdout) = std::fs::OpenOptions::new().write(true).open("/proc/self/fd/1") {
            error(&mut stdout, &err);
        }
        std::process::exit(1);
    }));
}

//! The log: standard error, and a file of limited size. Trouble with it is never a reason to fail.

use std::{
    fs::OpenOptions,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use crosslink_core::{
    error::Error,
    finding::{Finding, Severity},
    netconf::{LogLevel, NetConf},
};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::call::Call;

/// Size at which the file is moved to `<file>.1`, bytes.
const SIZE_LIMIT: u64 = 1024 * 1024;

struct Logger {
    file: OnceLock<PathBuf>,
    /// `ADD <container> <ifname> <namespace>/<pod>`.
    call: OnceLock<String>,
}

static LOGGER: Logger = Logger { file: OnceLock::new(), call: OnceLock::new() };

/// Starts logging for a call; to standard error only until [`configure`].
pub fn begin(call: &Call<'_>) {
    let pod = call.pod();
    let env = call.env;
    let text = format!("{} {} {} {}/{}", env.command, env.container_id, env.ifname, pod.namespace, pod.name);
    // Names come from outside: no line breaks, no control characters.
    let _ = LOGGER.call.set(text.chars().flat_map(char::escape_debug).collect());
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Applies the configuration.
pub fn configure(conf: &NetConf) {
    log::set_max_level(match conf.log_level {
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
    });
    if let Some(file) = &conf.log_file {
        let _ = LOGGER.file.set(file.clone());
    }
}

/// Logs how the call ended.
pub fn end(outcome: &Result<(), Error>) {
    if let Err(err) = outcome {
        log::error!(
            "failed with code {}: {}{}{}",
            err.code as u32,
            err.msg,
            if err.details.is_empty() { "" } else { "; " },
            err.details
        );
    }
}

/// Logs findings at the level of their severity.
pub fn findings(findings: &[Finding]) {
    for finding in findings {
        match finding.id.severity() {
            Severity::Info => log::info!("{finding}"),
            Severity::Warning => log::warn!("{finding} ({})", finding.id.cure()),
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "ERROR",
            Level::Warn => "WARN",
            Level::Info => "INFO",
            Level::Debug | Level::Trace => "DEBUG",
        };
        let call = self.call.get().map_or("", String::as_str);
        let text = record.args().to_string().replace('\n', "; ");
        // One write per line: lines of parallel calls do not mix.
        let line = format!("{} {level} crosslink {call}: {text}\n", timestamp(SystemTime::now()));
        let _ = std::io::stderr().write_all(line.as_bytes());
        if let Some(Err(err)) = self.file.get().map(|file| append(file, line.as_bytes())) {
            let shown = self.file.get().map(|file| file.display().to_string()).unwrap_or_default();
            let _ = writeln!(std::io::stderr(), "crosslink: XL-STATE log file {shown}: {err}");
        }
    }

    fn flush(&self) {}
}

fn append(path: &Path, line: &[u8]) -> std::io::Result<()> {
    let open = || {
        let flags = crosslink_kernel::files::SAFE_APPEND;
        OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(path)
    };
    let mut file = match open() {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(Path::new("/"));
            crosslink_kernel::files::make_private_dir(dir).map_err(|err| std::io::Error::other(err.to_string()))?;
            open()?
        }
        other => other?,
    };
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    if meta.len() > SIZE_LIMIT {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        std::fs::rename(path, old)?;
        file = open()?;
    }
    file.write_all(line)
}

/// RFC 3339 in UTC, milliseconds. The calendar is Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>).
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{:03}Z", second % 60, since.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn timestamps() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn the_file_is_capped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/cni.log");
        for _ in 0..3 {
            append(&path, &vec![b'x'; 700_000]).unwrap();
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= 700_000);
        assert!(std::fs::metadata(dir.path().join("deep/er/cni.log.1")).unwrap().len() <= 1_400_000);
    }

    #[test]
    fn odd_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(append(dir.path(), b"x").is_err());
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(append(&dir.path().join("link"), b"x").is_err());
    }
}

//! One installer at a time on a node, however many agent pods overlap.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::write::refusal;

/// How often a taken lock is tried again. A pass of another agent takes milliseconds.
const AGAIN: Duration = Duration::from_millis(10);

/// Takes the node's lock, making its directory on demand. It is held as long as the file is open.
///
/// # Errors
/// In words.
pub fn take(lib_dir: &Path, wait: Duration) -> Result<File, String> {
    let path = lib_dir.join("lock");
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let opened = match open() {
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let made = DirBuilder::new().recursive(true).mode(0o755).create(lib_dir);
            made.map_err(|err| refusal("make directory", lib_dir, &err))?;
            open()
        }
        other => other,
    };
    let file = opened.map_err(|err| refusal("open", &path, &err))?;
    let deadline = Instant::now() + wait;
    loop {
        // flock(2): it belongs to the open file, so it goes with it, however that ends.
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(AGAIN),
            Err(TryLockError::WouldBlock) => {
                return Err(format!("{} is held by another agent for {} s", path.display(), wait.as_secs()));
            }
            Err(TryLockError::Error(err)) => return Err(refusal("lock", &path, &err)),
        }
    }
}

//! File systems that a test mounts.

use std::{fs, path::PathBuf, process::Command};

/// A tmpfs, unmounted when dropped.
pub struct Mount(
    /// Where.
    pub PathBuf,
);

impl Mount {
    /// Mounts it at `path`, which is made.
    pub fn new(path: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&path).status().unwrap();
        assert!(mounted.success());
        Self(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

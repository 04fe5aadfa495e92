//! The unix socket: root's alone, and the newest agent's.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use crosslink_kernel::files::make_private_dir;

/// A bound socket; removed when dropped, if it is still ours.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Socket {
    /// Binds the socket. Whatever was there, a stale socket or one on which an older agent still listens, is replaced in
    /// one step: no client finds none, or one that others than root may use.
    ///
    /// # Errors
    /// The system's, naming the setting.
    pub fn bind(path: &Path) -> anyhow::Result<(Self, UnixListener)> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        let bound = make_private_dir(dir).map_err(anyhow::Error::from).and_then(|()| Ok(Self::replace(dir, path)?));
        bound.with_context(|| format!("unix socket {}: choose another runDir, or mend this one", path.display()))
    }

    fn replace(dir: &Path, path: &Path) -> io::Result<(Self, UnixListener)> {
        // A socket is born with the mode that the umask leaves; in a directory of root's nobody gets hold of it
        // meanwhile.
        let private = dir.join(".sock");
        match fs::DirBuilder::new().mode(0o700).create(&private) {
            Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(err),
            _ => fs::set_permissions(&private, Permissions::from_mode(0o700))?,
        }
        let newborn = private.join("s");
        // Left by an agent that was killed here.
        let _ = fs::remove_file(&newborn);
        let listener = UnixListener::bind(&newborn)?;
        fs::set_permissions(&newborn, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let meta = fs::symlink_metadata(&newborn)?;
        fs::rename(&newborn, path)?;
        let _ = fs::remove_dir(&private);
        Ok((Self { path: path.to_owned(), identity: (meta.dev(), meta.ino()) }, listener))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

//! Records of attachments on disk.

use std::path::{Path, PathBuf};

use crosslink_core::record::{self, Record};

use crate::{
    error::Error,
    files::{Durability, list_records, make_private_dir, read_trusted, temporary_name, write_atomic},
};

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Records in `dir`, which need not exist yet.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The file of an attachment's record.
    pub fn path(&self, container_id: &str, ifname: &str) -> PathBuf {
        self.dir.join(record::file_name(container_id, ifname))
    }

    /// Reads the record of an attachment; none where there is none.
    ///
    /// # Errors
    /// A sentence that names the file, where it is there but cannot be used.
    pub fn read(&self, container_id: &str, ifname: &str) -> Result<Option<Record>, String> {
        self.read_path(&self.path(container_id, ifname))
    }

    fn read_path(&self, path: &Path) -> Result<Option<Record>, String> {
        let named = |why: &dyn std::fmt::Display| format!("record {}: {why}", path.display());
        match read_trusted(path).map_err(|why| named(&why))? {
            Some(text) => record::parse(&text).map(Some).map_err(|err| named(&err)),
            None => Ok(None),
        }
    }

    /// The version of a record, also of one that cannot be read otherwise.
    pub fn version(&self, container_id: &str, ifname: &str) -> Option<u64> {
        let text = read_trusted(&self.path(container_id, ifname)).ok().flatten()?;
        let record: serde_json::Value = serde_json::from_str(&text).ok()?;
        record.get("version")?.as_u64()
    }

    /// Reads all records; what cannot be read is reported as a sentence instead.
    pub fn all(&self) -> Vec<Result<Record, String>> {
        self.some(|_| true)
    }

    /// File names of all records.
    ///
    /// # Errors
    /// The directory is there but cannot be read.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        list_records(&self.dir).map_err(|err| Error::file("list", &self.dir, &err))
    }

    /// All records but that of one attachment.
    pub fn others(&self, container_id: &str, ifname: &str) -> Vec<Result<Record, String>> {
        let own = record::file_name(container_id, ifname);
        self.some(|name| name != own)
    }

    fn some(&self, choose: impl Fn(&str) -> bool) -> Vec<Result<Record, String>> {
        let names = match list_records(&self.dir) {
            Ok(names) => names,
            Err(err) => return vec![Err(format!("{}: {err}", self.dir.display()))],
        };
        let chosen = names.iter().filter(|name| choose(name));
        chosen.filter_map(|name| self.read_path(&self.dir.join(name)).transpose()).collect()
    }

    /// Writes a record, making the directory on demand.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, record: &Record) -> Result<(), Error> {
        let path = self.path(&record.container_id, &record.ifname);
        let json = serde_json::to_vec(record).map_err(|_| Error::File {
            what: "write",
            path: path.clone(),
            errno: nix::errno::Errno::EINVAL,
        })?;
        // Sandboxes do not outlive a power failure, so their records need not.
        let write = || write_atomic(&path, &json, 0o600, Durability::Volatile);
        match write() {
            Err(Error::File { errno: nix::errno::Errno::ENOENT, .. }) => {
                make_private_dir(&self.dir)?;
                write()
            }
            other => other,
        }
    }

    /// Removes a record; none to remove is fine.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, container_id: &str, ifname: &str) -> Result<(), Error> {
        let path = self.path(container_id, ifname);
        if let Some(name) = path.file_name() {
            // Left by a writer that was killed; mostly there is none.
            let _ = std::fs::remove_file(self.dir.join(temporary_name(name)));
        }
        match std::fs::remove_file(&path) {
            Err(err) if !matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                Err(Error::file("remove", path, &err))
            }
            _ => Ok(()),
        }
    }

    /// Whether a record could be written: the directory, or the nearest existing parent, lets us.
    ///
    /// # Errors
    /// The system's.
    pub fn writable(&self) -> Result<(), Error> {
        use nix::unistd::{AccessFlags, access};
        let mut dir = self.dir.as_path();
        loop {
            match access(dir, AccessFlags::W_OK | AccessFlags::X_OK) {
                Err(nix::errno::Errno::ENOENT) => {}
                Err(errno) => return Err(Error::File { what: "write in", path: dir.to_owned(), errno }),
                Ok(()) if dir.is_dir() => return Ok(()),
                Ok(()) => {
                    return Err(Error::File {
                        what: "write in",
                        path: dir.to_owned(),
                        errno: nix::errno::Errno::ENOTDIR,
                    });
                }
            }
            match dir.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => dir = parent,
                _ => {
                    return Err(Error::File {
                        what: "write in",
                        path: self.dir.clone(),
                        errno: nix::errno::Errno::ENOENT,
                    });
                }
            }
        }
    }
}

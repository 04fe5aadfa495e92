//! Node-local files: trust, remotes files with their last good copies, `node.json`, atomic writes.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crosslink_core::{
    finding::{Finding, Id},
    node::{self, NodeFacts},
    record,
    remotes::{self, RemotesFile},
};

use crate::{error::Error, netns::read_limited};

/// Largest remotes file or `node.json`, bytes: 5,000 clusters with ten CIDRs each are about 2 MB.
const FILE_LIMIT: u64 = 16 * 1024 * 1024;

/// Flags for opening a log file: neither a planted symlink nor a fifo takes it elsewhere or makes the writer wait.
pub const SAFE_APPEND: i32 = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;

/// Reads a file that only root may have written.
///
/// # Errors
/// None inside where there is no such file; a sentence where it must not be used.
pub fn read_trusted(path: &Path) -> Result<Option<String>, String> {
    // Not blocking: a fifo has no writer. Symlinks are followed, since that is how Kubernetes mounts a ConfigMap; what
    // counts is the file that was opened.
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(err.to_string()),
    };
    let meta = file.metadata().map_err(|err| err.to_string())?;
    if !meta.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if meta.uid() != 0 {
        return Err(format!("it belongs to user {}: make root its owner", meta.uid()));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!("its mode {:04o} lets others write it: chmod go-w", meta.mode() & 0o7777));
    }
    let bytes = read_limited(&file, FILE_LIMIT).map_err(|err| err.to_string())?;
    String::from_utf8(bytes).map(Some).map_err(|_| "it is not UTF-8".to_owned())
}

/// All remotes files of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remotes {
    /// Those that are valid, or whose last good copy is.
    pub files: Vec<RemotesFile>,
    /// What was refused.
    pub findings: Vec<Finding>,
    /// Whether any file was refused, even where a last good copy stood in.
    pub broken: bool,
    /// Names of files that are there but contribute nothing.
    pub lost: Vec<String>,
    /// Whether the directory could not be read, so that nothing is known of its files.
    pub unreadable: bool,
}

/// Reads every `*.json` of the directory. A missing directory means no remotes. A file that is refused is replaced by
/// its last good copy, `.<name>.good`, which its writer keeps.
pub fn read_remotes(dir: &Path) -> Remotes {
    let mut remotes = Remotes::default();
    let names = match list(dir, |name| name.ends_with(".json") && !name.starts_with('.')) {
        Ok(names) => names,
        Err(why) => {
            remotes.broken = true;
            remotes.unreadable = true;
            remotes.findings.push(Finding::new(Id::RemotesFile, format!("{}: {why}", dir.display())));
            return remotes;
        }
    };
    for name in names {
        let path = dir.join(&name);
        let why = match read_one(&path, &name) {
            Ok(file) => {
                remotes.files.extend(file);
                continue;
            }
            Err(why) => why,
        };
        remotes.broken = true;
        let copy = read_one(&dir.join(format!(".{name}.good")), &name);
        if !matches!(copy, Ok(Some(_))) {
            remotes.lost.push(name.clone());
        }
        let good = match copy {
            Ok(Some(file)) => {
                remotes.files.push(file);
                "its last good copy is used"
            }
            Ok(None) => "it has no last good copy and contributes nothing",
            Err(_) => "its last good copy is no better and it contributes nothing",
        };
        remotes.findings.push(Finding::new(Id::RemotesFile, format!("{}: {why}; {good}", path.display())));
    }
    remotes
}

fn read_one(path: &Path, name: &str) -> Result<Option<RemotesFile>, String> {
    read_trusted(path)?.map(|text| remotes::parse(name, &text)).transpose()
}

/// Names in a directory, sorted; none where there is no such directory.
fn list(dir: &Path, keep: impl Fn(&str) -> bool) -> std::io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(err),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        names.extend(name.to_str().filter(|name| keep(name)).map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

/// Reads `node.json`; facts are empty where it is missing or refused.
pub fn read_node(path: &Path) -> (NodeFacts, Option<Finding>) {
    match read_trusted(path).and_then(|text| text.map(|text| node::parse(&text)).transpose()) {
        Ok(facts) => (facts.unwrap_or_default(), None),
        Err(why) => {
            let finding = Finding::new(Id::NodeFile, format!("{}: {why}", path.display()));
            (NodeFacts::default(), Some(finding))
        }
    }
}

/// Names of the records in a directory; none where it is something else.
///
/// # Errors
/// The directory is there but cannot be read.
pub(crate) fn list_records(dir: &Path) -> std::io::Result<Vec<String>> {
    match list(dir, |name| record::parse_file_name(name).is_some()) {
        Err(err) if err.kind() == std::io::ErrorKind::NotADirectory => Ok(Vec::new()),
        other => other,
    }
}

/// Makes a directory and its parents, for root alone.
///
/// # Errors
/// The system's.
pub fn make_private_dir(dir: &Path) -> Result<(), Error> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|err| Error::file("make directory", dir, &err))
}

/// Whether a written file must survive a power failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// fsync of the file and of its directory.
    Synced,
    /// None: what the file is about does not survive either. Readers still never see half of it.
    Volatile,
}

/// Writes a file so that at no moment a reader sees half of it, and a crash leaves the old or the new content: temporary
/// file in the same directory, fsync, rename, fsync of the directory.
///
/// # Errors
/// The system's; the old content is in place then, and no temporary file is left.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32, durability: Durability) -> Result<(), Error> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::File { what: "write", path: path.to_owned(), errno: nix::errno::Errno::EINVAL });
    };
    let temporary = dir.join(temporary_name(name));
    let written = write_new(&temporary, content, mode, durability);
    if let Err(err) = written.and_then(|()| std::fs::rename(&temporary, path)) {
        let _ = std::fs::remove_file(&temporary);
        return Err(Error::file("write", path, &err));
    }
    if durability == Durability::Volatile {
        return Ok(());
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|err| Error::file("write", path, &err))
}

/// Hidden, so that no reader of the directory takes it for a file of its kind, and always the same, so that what a killed
/// writer left is overwritten or removed by the next. Writers of one file exclude each other.
pub(crate) fn temporary_name(name: &OsStr) -> PathBuf {
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".tmp");
    hidden.into()
}

fn write_new(path: &Path, content: &[u8], mode: u32, durability: Durability) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    file.write_all(content)?;
    if durability == Durability::Synced { file.sync_all() } else { Ok(()) }
}

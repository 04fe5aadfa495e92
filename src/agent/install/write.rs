//! Files of others that are replaced without a moment in which they are half there, and what refusals mean.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::statvfs::{FsFlags, statvfs},
};

/// Largest configuration that is read, bytes. Real ones have a few thousand.
const LIMIT: u64 = 1024 * 1024;

/// What tells one state of a file from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    dev: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// That of a file.
    pub fn of(meta: &Metadata) -> Self {
        Self {
            dev: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A file as it was read.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its content.
    pub text: String,
    stamp: Stamp,
    mode: u32,
    owner: (u32, u32),
}

/// Reads a regular file; a fifo does not make it wait.
///
/// # Errors
/// The system's, or that it is no file, too large or not UTF-8.
pub fn read(path: &Path) -> io::Result<Seen> {
    let file = OpenOptions::new().read(true).custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW).bits()).open(path)?;
    let meta = file.metadata()?;
    let invalid = |why: &str| io::Error::new(ErrorKind::InvalidData, why);
    if !meta.is_file() {
        return Err(invalid("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > LIMIT {
        return Err(invalid("it is larger than 1 MiB"));
    }
    let text = String::from_utf8(bytes).map_err(|_| invalid("it is not UTF-8"))?;
    Ok(Seen { text, stamp: Stamp::of(&meta), mode: meta.mode() & 0o7777, owner: (meta.uid(), meta.gid()) })
}

/// Whether the file was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It was.
    Done,
    /// Somebody else wrote it in the meantime, so it was left alone.
    Changed,
}

/// How the names of temporary files end.
const TEMPORARY: &str = ".crosslink.tmp";

/// The temporary file beside a file. Runtimes do not load it, whatever their extensions; one that a killed agent left is
/// replaced by the next. Writers exclude each other by the agent's lock.
fn temporary(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(TEMPORARY);
    Ok(path.with_file_name(hidden))
}

/// Replaces what was seen by `content`, keeping mode and owner; makes the file, for all to read, where nothing was seen.
///
/// # Errors
/// The system's; the old content is in place then.
pub fn replace(path: &Path, content: &[u8], seen: Option<&Seen>) -> io::Result<Outcome> {
    let unchanged = || match seen {
        Some(seen) => read(path).map(|now| now.stamp == seen.stamp && now.text == seen.text).unwrap_or(false),
        None => fs::symlink_metadata(path).is_err(),
    };
    let (mode, owner) = seen.map_or((0o644, None), |seen| (seen.mode, Some(seen.owner)));
    replace_by(path, mode, unchanged, |file| {
        file.write_all(content)?;
        match owner {
            Some((uid, gid)) if (uid, gid) != ids(file)? => fchown(&*file, Some(uid), Some(gid)),
            _ => Ok(()),
        }
    })
}

fn ids(file: &File) -> io::Result<(u32, u32)> {
    file.metadata().map(|meta| (meta.uid(), meta.gid()))
}

/// Temporary file, fsync, a last look, rename, fsync of the directory.
///
/// # Errors
/// The system's; the old file is in place then, and no temporary one is left.
pub fn replace_by(
    path: &Path,
    mode: u32,
    unchanged: impl FnOnce() -> bool,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<Outcome> {
    let temporary = temporary(path)?;
    let written = prepare(&temporary, mode, fill).and_then(|()| {
        if unchanged() { fs::rename(&temporary, path).map(|()| Outcome::Done) } else { Ok(Outcome::Changed) }
    });
    match written {
        Ok(Outcome::Done) => {
            sync_directory_of(path)?;
            Ok(Outcome::Done)
        }
        other => {
            let _ = fs::remove_file(&temporary);
            other
        }
    }
}

fn prepare(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    remove(path)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    fill(&mut file)?;
    // After the content, so that nobody runs half a program; and not by open(2), which the umask has a say in.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()
}

/// Whether a name is that of a temporary file of ours.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(TEMPORARY)
}

/// Removes a file; none to remove is fine.
///
/// # Errors
/// The system's.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

/// Makes the directory's entries survive a power failure.
///
/// # Errors
/// The system's.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    let dir = path.parent().ok_or(ErrorKind::InvalidInput)?;
    File::open(dir)?.sync_all()
}

/// Makes runtimes load the directory anew: they do not watch directories below it, and containerd ignores creation and
/// change of mode, but not removal.
///
/// # Errors
/// The system's.
pub fn kick(conf_dir: &Path) -> io::Result<()> {
    let path = conf_dir.join(".crosslink.kick");
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    fs::remove_file(path)
}

/// A refusal by the system: what was refused, and what to do about it.
pub fn refusal(what: &str, path: &Path, err: &io::Error) -> String {
    let cure = cure(path, err).map(|cure| format!("; {cure}")).unwrap_or_default();
    format!("{what} {}: {err}{cure}", path.display())
}

fn cure(path: &Path, err: &io::Error) -> Option<String> {
    let dir = path.parent().unwrap_or(path);
    Some(match Errno::from_raw(err.raw_os_error()?) {
        Errno::ENOSPC | Errno::EDQUOT => {
            let free = statvfs(dir).map(|fs| {
                let bytes = u128::from(fs.blocks_available()) * u128::from(fs.fragment_size());
                format!(" ({bytes} bytes and {} files free)", fs.files_available())
            });
            format!("make room on its file system{}", free.unwrap_or_default())
        }
        Errno::EROFS => "it is on a read-only file system: on another platform give platform, cniConfDir or cniBinDir; \
            in a pod mount it writable"
            .to_owned(),
        Errno::EACCES | Errno::EPERM => {
            "give the agent root with DAC_OVERRIDE (and CHOWN where the file is not root's); with SELinux the type spc_t"
                .to_owned()
        }
        Errno::EMFILE | Errno::ENFILE => "raise the limit of open files".to_owned(),
        Errno::ENOTDIR | Errno::ENOENT => "there is no such directory: give platform, cniConfDir or cniBinDir".to_owned(),
        _ => return None,
    })
}

/// Why a program cannot be run where it is.
pub fn not_run(path: &Path, err: &io::Error) -> String {
    let noexec = statvfs(path).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_NOEXEC));
    let cure = match err.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM) if noexec => {
            "; its file system is mounted noexec: mount it exec, or give platform or cniBinDir"
        }
        Some(Errno::EACCES | Errno::EPERM) => "; with SELinux or AppArmor allow it to be executed",
        Some(Errno::ENOEXEC) => "; it is of another architecture: use the image of this node's",
        _ => "",
    };
    format!("run {}: {err}{cure}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("10.conflist");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_stays() {
        let changes: [fn(&Path); 4] = [
            |path| fs::write(path, "other").unwrap(),
            // The same length and content, but another file.
            |path| {
                fs::write(path.with_extension("new"), "before").unwrap();
                fs::rename(path.with_extension("new"), path).unwrap();
            },
            |path| fs::remove_file(path).unwrap(),
            |path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap(),
        ];
        for change in changes {
            let (dir, path) = file("before");
            let seen = read(&path).unwrap();
            change(&path);
            let now = fs::read(&path).ok();
            assert_eq!(replace(&path, b"ours", Some(&seen)).unwrap(), Outcome::Changed);
            assert_eq!(fs::read(&path).ok(), now);
            assert!(names(dir.path()).iter().all(|name| !is_temporary(name)));
        }
        let (_dir, path) = file("there");
        assert_eq!(replace(&path, b"ours", None).unwrap(), Outcome::Changed);
    }

    #[test]
    fn what_a_killed_agent_left_is_replaced() {
        let (dir, path) = file("before");
        fs::write(temporary(&path).unwrap(), "half a").unwrap();
        let seen = read(&path).unwrap();
        assert_eq!(replace(&path, b"ours", Some(&seen)).unwrap(), Outcome::Done);
        assert_eq!((fs::read(&path).unwrap().as_slice(), names(dir.path()).len()), (&b"ours"[..], 1));
    }

    #[test]
    fn what_is_no_plain_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("10.conflist");
        let why = |path: &Path| read(path).unwrap_err().to_string();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(why(&path).contains("not a regular file"));
        assert!(why(dir.path()).contains("not a regular file"));
        let large = dir.path().join("large");
        fs::write(&large, vec![b' '; 1024 * 1024 + 1]).unwrap();
        assert!(why(&large).contains("larger"));
        fs::write(&large, [0xff]).unwrap();
        assert!(why(&large).contains("UTF-8"));
    }
}

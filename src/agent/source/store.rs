//! The remotes file of one source: written only when its content changes, with the last good copy beside it.

use std::{
    borrow::Borrow,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crosslink_core::remotes::{self, Told};
use crosslink_kernel::{
    Error,
    files::{Durability, read_trusted, write_atomic},
};

use crate::settings::SourceKind;

/// The file of one source.
#[derive(Debug)]
pub struct Store {
    kind: SourceKind,
    path: PathBuf,
    generation: u64,
    empty: bool,
    /// What the file says, as far as is known without reading it.
    known: Option<(Signature, u64)>,
}

/// What tells one content of a file from another without reading it: device, inode, size, time of the last write.
type Signature = (u64, u64, u64, i64, i64);

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The file said so already.
    Unchanged,
    /// It has a new generation.
    New,
}

fn path_of(dir: &Path, kind: SourceKind) -> PathBuf {
    dir.join(format!("{}.json", kind.name()))
}

fn good_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.good"))
}

fn signature(path: &Path) -> Option<Signature> {
    let meta = fs::metadata(path).ok()?;
    // Linking and unlinking the copy changes the change time, so that of the content counts.
    Some((meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

/// Equal within one process, which is all that it is compared in.
fn digest<T: Borrow<Told>>(clusters: &[T]) -> u64 {
    let mut hasher = DefaultHasher::new();
    clusters.iter().for_each(|told| told.borrow().hash(&mut hasher));
    hasher.finish()
}

/// What a file says, if it is one that readers accept and that the agent wrote.
fn own(path: &Path) -> Option<remotes::Kept> {
    let text = read_trusted(path).ok()??;
    remotes::parse("", &text).ok()?;
    remotes::kept(&text)
}

impl Store {
    /// Looks at what the file says now, and if that is nothing that readers would take, at its last good copy. The second
    /// value is that.
    pub fn open(dir: &Path, kind: SourceKind) -> (Self, Vec<Told>) {
        let path = path_of(dir, kind);
        let kept = own(&path).or_else(|| own(&good_of(&path))).unwrap_or_default();
        let empty = kept.clusters.iter().all(Told::is_empty);
        (Self { kind, path, generation: kept.generation, empty, known: None }, kept.clusters)
    }

    /// Whether the file names no CIDR.
    pub const fn is_empty(&self) -> bool {
        self.empty
    }

    /// Generation of the file.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Writes the file unless it says so already.
    ///
    /// # Errors
    /// A sentence; the file is as it was then.
    pub fn write<T: Borrow<Told>>(&mut self, clusters: &[T]) -> Result<Written, String> {
        self.empty = clusters.iter().all(|told| told.borrow().is_empty());
        let (wanted, now) = (digest(clusters), signature(&self.path));
        // As it was left: nothing to read, and readers take it.
        let untouched = self.known.filter(|(left, _)| Some(*left) == now);
        if untouched.is_some_and(|(_, said)| said == wanted) {
            return Ok(Written::Unchanged);
        }
        let mut valid = untouched.is_some();
        if !valid && let Some(text) = read_trusted(&self.path).ok().flatten() {
            valid = remotes::parse("", &text).is_ok();
            match remotes::kept_generation(&text) {
                Some(generation) => self.generation = self.generation.max(generation),
                None if valid => {
                    return Err(format!(
                        "{} was written by somebody else: give it another name, and it counts beside this source",
                        self.path.display()
                    ));
                }
                None => {}
            }
            if text == remotes::render(self.kind.name(), self.generation, clusters)? {
                self.known = now.map(|now| (now, wanted));
                return Ok(Written::Unchanged);
            }
        }
        let next = self.generation.saturating_add(1);
        let text = remotes::render(self.kind.name(), next, clusters)?;
        self.replace(valid, &text).map_err(|err| err.to_string())?;
        self.generation = next;
        self.known = signature(&self.path).map(|now| (now, wanted));
        Ok(Written::New)
    }

    fn replace(&self, valid: bool, text: &str) -> Result<(), Error> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir).map_err(|err| Error::file("make directory", dir, &err))?;
        }
        if valid {
            self.keep_good()?;
        }
        write_atomic(&self.path, text.as_bytes(), 0o644, Durability::Synced)
    }

    /// Lets the last good copy be what the file is now.
    fn keep_good(&self) -> Result<(), Error> {
        let good = good_of(&self.path);
        let temporary = good.with_extension("good.tmp");
        let failed = |err: std::io::Error| Error::file("link", &good, &err);
        remove_file(&temporary).map_err(failed)?;
        fs::hard_link(&self.path, &temporary).map_err(failed)?;
        fs::rename(&temporary, &good).map_err(failed)?;
        // Where both names were of one file already, rename(2) does nothing.
        remove_file(&temporary).map_err(failed)
    }

    /// Removes the file of a source that is not in use any more, if the agent wrote it. True where there was one.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(dir: &Path, kind: SourceKind) -> Result<bool, Error> {
        let path = path_of(dir, kind);
        let good = good_of(&path);
        let ours = own(&path).is_some() || (own(&good).is_some() && !readable(&path));
        if !ours {
            return Ok(false);
        }
        // The copy first: else it would stand in for a file that cannot be removed.
        for file in [&good, &path] {
            remove_file(file).map_err(|err| Error::file("remove", file, &err))?;
        }
        Ok(true)
    }
}

fn readable(path: &Path) -> bool {
    read_trusted(path).ok().flatten().is_some_and(|text| remotes::parse("", &text).is_ok())
}

fn remove_file(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crosslink_core::cidr;
    use crosslink_kernel::files::read_remotes;

    use super::*;

    fn told(name: &str, cidr: &str) -> Told {
        Told { name: name.into(), pod_cidrs: vec![cidr::parse(cidr).unwrap()], ..Told::default() }
    }

    #[test]
    fn only_changes_are_written_and_the_copy_is_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let remotes_dir = dir.path().join("remotes");
        let (mut store, before) = Store::open(&remotes_dir, SourceKind::Cluster);
        assert!(before.is_empty() && store.is_empty());
        let (one, two) = ([told("b", "10.1.0.0/16")], [told("b", "10.2.0.0/16")]);
        assert_eq!(store.write(&one), Ok(Written::New));
        assert_eq!(store.write(&one), Ok(Written::Unchanged));
        assert!(!store.is_empty());
        assert_eq!(store.write(&two), Ok(Written::New));
        assert_eq!(store.generation(), 2);

        let path = remotes_dir.join("cluster.json");
        let good = fs::read_to_string(remotes_dir.join(".cluster.json.good")).unwrap();
        assert_eq!(remotes::kept(&good).unwrap().clusters, one);
        // Another agent goes on from there, and writes nothing where nothing changed.
        let inode = fs::metadata(&path).unwrap().ino();
        let (mut next, before) = Store::open(&remotes_dir, SourceKind::Cluster);
        assert_eq!(before, two);
        assert_eq!(next.write(&two), Ok(Written::Unchanged));
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);

        // A damaged file is replaced, and does not become the good copy.
        fs::write(&path, "{").unwrap();
        assert_eq!(read_remotes(&remotes_dir).files[0].clusters[0].cidrs, one[0].pod_cidrs);
        assert_eq!(next.write(&two), Ok(Written::New));
        assert_eq!(fs::read_to_string(remotes_dir.join(".cluster.json.good")).unwrap(), good);
        let mut names: Vec<_> = fs::read_dir(&remotes_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".cluster.json.good", "cluster.json"]);
    }

    #[test]
    fn what_people_wrote_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("static.json");
        fs::write(&path, r#"{"version":1,"source":"static","clusters":[]}"#).unwrap();
        assert_eq!(Store::remove(dir.path(), SourceKind::Static), Ok(false));
        let (mut store, _) = Store::open(dir.path(), SourceKind::Static);
        let why = store.write(&[told("b", "10.1.0.0/16")]).unwrap_err();
        assert!(why.contains("somebody else"), "{why}");
        assert!(path.exists());
    }

    #[test]
    fn an_unused_source_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path(), SourceKind::Kosmos);
        store.write(&[told("b", "10.1.0.0/16")]).unwrap();
        store.write(&[told("b", "10.2.0.0/16")]).unwrap();
        assert_eq!(Store::remove(dir.path(), SourceKind::Kosmos), Ok(true));
        assert_eq!(Store::remove(dir.path(), SourceKind::Kosmos), Ok(false));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

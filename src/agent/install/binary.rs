//! The plugin on the node: the one that was shipped, able to run, and put back when it is not.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use serde_json::Value;

use super::write::{Stamp, not_run, refusal, replace_by};

/// How long VERSION may take. It takes a millisecond; a node may be busy.
const LIMIT: Duration = Duration::from_secs(10);

/// How often a program is started again that is still open for writing in a process which is about to be forked off.
const TEXT_BUSY: u32 = 20;

/// The plugin and where it belongs.
#[derive(Clone, Debug)]
pub struct Binary {
    source: PathBuf,
    target: PathBuf,
    /// Source and target when they were last found equal and running.
    verified: Option<(Stamp, Stamp)>,
}

/// What was found or done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It was there.
    There,
    /// It was put there for the first time.
    Installed,
    /// It was put in the place of another one.
    Replaced,
    /// Another agent's is there.
    Foreign,
}

impl Binary {
    /// `source` is to be in `bin_dir`, under the name that the entry's type gives it.
    pub fn new(source: &Path, bin_dir: &Path) -> Self {
        let target = bin_dir.join(crosslink_core::conflist::TYPE);
        Self { source: source.to_owned(), target, verified: None }
    }

    /// Where it belongs.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Size and hash of what is shipped, so that builds are told apart.
    ///
    /// # Errors
    /// In words.
    pub fn fingerprint(&self) -> Result<String, String> {
        hash(&self.source).map_err(|err| refusal("read the plugin", &self.source, &err))
    }

    /// Whether something that could be it is in place.
    pub fn present(&self) -> bool {
        fs::metadata(&self.target).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    }

    fn stamps(&self) -> io::Result<(Stamp, Option<Stamp>)> {
        let source = Stamp::of(&fs::metadata(&self.source)?);
        let target = match fs::symlink_metadata(&self.target) {
            Ok(meta) => Some(Stamp::of(&meta)),
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => return Err(err),
        };
        Ok((source, target))
    }

    /// Whether nothing changed since the plugin was last found to be in order.
    pub fn in_order(&self) -> bool {
        let now = self.stamps().ok().and_then(|(source, target)| Some((source, target?)));
        now.is_some() && now == self.verified
    }

    /// Puts it in place where it is not, and runs it there.
    ///
    /// # Errors
    /// In words, with a cure.
    pub fn keep(&mut self, others_stay: bool) -> Result<Kept, String> {
        if self.in_order() {
            return Ok(Kept::There);
        }
        let there = self.present();
        let looked = |err: io::Error| refusal("compare the plugin with", &self.target, &err);
        let mut before = self.stamps().map_err(looked)?;
        let mut kept = Kept::There;
        if !self.is_shipped().map_err(looked)? {
            if others_stay && there {
                return Ok(Kept::Foreign);
            }
            self.install().map_err(|err| refusal("install the plugin as", &self.target, &err))?;
            kept = if there { Kept::Replaced } else { Kept::Installed };
            // What is believed to be in order was read between two equal stamps, also what was just written.
            before = self.stamps().map_err(looked)?;
            if !self.is_shipped().map_err(looked)? {
                return Err(format!("{} was changed while it was installed", self.target.display()));
            }
        }
        let shipped = version(&self.source)?;
        let installed = version(&self.target)?;
        if installed != shipped {
            return Err(format!(
                "{} answers VERSION with {installed}, the shipped plugin with {shipped}: something else is run in its place",
                self.target.display()
            ));
        }
        let after = self.stamps().map_err(|err| refusal("look at the plugin", &self.target, &err))?;
        self.verified = (before == after).then_some(after).and_then(|(source, target)| Some((source, target?)));
        Ok(kept)
    }

    /// A regular, executable file of the same content.
    fn is_shipped(&self) -> io::Result<bool> {
        let meta = match fs::symlink_metadata(&self.target) {
            Ok(meta) => meta,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(err) => return Err(err),
        };
        let source = File::open(&self.source)?;
        if !meta.is_file() || meta.permissions().mode() & 0o777 != 0o755 || meta.len() != source.metadata()?.len() {
            return Ok(false);
        }
        equal(source, File::open(&self.target)?)
    }

    fn install(&self) -> io::Result<()> {
        if let Some(dir) = self.target.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        }
        let mut source = File::open(&self.source)?;
        let copied = replace_by(&self.target, 0o755, || true, |file| io::copy(&mut source, file).map(drop));
        copied.map(|_| ())
    }
}

/// Size and FNV-1a, 64 bit (<http://www.isthe.com/chongo/tech/comp/fnv/>): it tells builds apart and guards against nothing.
fn hash(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let (mut size, mut hash, mut piece) = (0, 0xcbf2_9ce4_8422_2325_u64, vec![0; 64 * 1024]);
    loop {
        let length = file.read(&mut piece)?;
        if length == 0 {
            return Ok(format!("{size}-{hash:016x}"));
        }
        size += length;
        for byte in piece.iter().take(length) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

fn equal(mut a: File, mut b: File) -> io::Result<bool> {
    const PIECE: u64 = 64 * 1024;
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        left.clear();
        right.clear();
        a.by_ref().take(PIECE).read_to_end(&mut left)?;
        b.by_ref().take(PIECE).read_to_end(&mut right)?;
        if left != right || left.is_empty() {
            return Ok(left == right);
        }
    }
}

/// The plugin's answer to VERSION, as JSON.
fn version(path: &Path) -> Result<Value, String> {
    let child = start(path).map_err(|err| not_run(path, &err))?;
    let shown = path.display();
    let (status, stdout) = finish(child).map_err(|err| format!("run {shown}: {err}"))?;
    let Some(status) = status else {
        return Err(format!("{shown} does not answer VERSION within {} s", LIMIT.as_secs()));
    };
    let answer =
        serde_json::from_slice::<Value>(&stdout).ok().filter(|answer| answer.get("supportedVersions").is_some());
    answer.filter(|_| status.success()).ok_or_else(|| {
        let said = crosslink_core::error::quoted(&String::from_utf8_lossy(&stdout));
        format!("{shown} answers VERSION with {status} and {said}: it is not the plugin, or it cannot run here")
    })
}

fn start(path: &Path) -> io::Result<Child> {
    let mut tries = 0;
    loop {
        let mut command = Command::new(path);
        command.env_clear().env("CNI_COMMAND", "VERSION").current_dir("/");
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        match started {
            // Another thread of ours forked while the file was open for writing: until its exec, it has it open too.
            Err(err) if err.raw_os_error() == Some(Errno::ETXTBSY as i32) && tries < TEXT_BUSY => {
                tries += 1;
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Waits for the end, which VERSION reaches without anybody reading its few bytes.
fn finish(mut child: Child) -> io::Result<(Option<std::process::ExitStatus>, Vec<u8>)> {
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            None => {
                child.kill()?;
                child.wait()?;
                return Ok((None, Vec::new()));
            }
        }
    };
    let mut stdout = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        pipe.take(64 * 1024).read_to_end(&mut stdout)?;
    }
    Ok((Some(status), stdout))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Harm that comes after the comparison must not pass for what was compared.
    #[test]
    fn what_changes_during_the_look_is_looked_at_again() {
        let dir = tempfile::tempdir().unwrap();
        let (source, bin) = (dir.path().join("plugin"), dir.path().join("bin"));
        let mut binary = Binary::new(&source, &bin);
        let (target, once) = (binary.target().display().to_string(), dir.path().join("once").display().to_string());
        let harm = format!("if [ \"$0\" = {target} ] && [ ! -e {once} ]; then : > {once}; chmod 600 {target}; fi");
        let script = format!("#!/bin/sh\n{harm}\necho '{{\"supportedVersions\":[]}}'\n");
        fs::write(&source, script).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(binary.keep(false).unwrap(), Kept::Installed);
        assert!(!binary.in_order());
        assert_eq!(binary.keep(false).unwrap(), Kept::Installed);
        assert!(binary.in_order() && binary.present());
        assert_eq!(binary.keep(false).unwrap(), Kept::There);
    }
}

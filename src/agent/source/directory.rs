//! The static source: a directory of remotes files, mostly a mounted ConfigMap.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crosslink_core::{
    finding::Finding,
    json::Object,
    remotes::{self, Told},
};
use crosslink_kernel::files::read_trusted;
use inotify::{Inotify, WatchMask};
use serde::Deserialize;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{
    Source,
    convert::Skipped,
    drive::{Model, QUEUE, drive},
    sink::{Sink, View},
    together,
    wake::{Notifier, wake_on},
};
use crate::settings::SourceKind;

/// Longest time without a look: the directory may not be there yet, and network file systems tell nothing.
const LOOK: Duration = Duration::from_secs(10);

/// A file as people write it: a remotes file in which `source`, and the names of clusters, may be left out.
#[derive(Deserialize)]
struct Raw {
    version: u64,
    #[serde(default)]
    clusters: Option<Vec<Object<RawCluster>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawCluster {
    name: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pods: Option<Vec<String>>,
    #[serde(default, rename = "serviceCIDRs")]
    services: Option<Vec<String>>,
    #[serde(default)]
    mtu: Option<u32>,
}

/// Reads one file, as a whole or not at all: half of what somebody meant is no better than what was there before.
fn parse(file: &str, text: &str) -> Result<Vec<Told>, String> {
    let Object(raw): Object<Raw> = serde_json::from_str(text).map_err(|err| err.to_string())?;
    if raw.version == 0 || raw.version > remotes::VERSION {
        return Err(format!("version {} is not known (known is {}): upgrade the agent", raw.version, remotes::VERSION));
    }
    let mut findings = Vec::new();
    let mut skipped = Skipped { what: "", name: String::new(), findings: &mut findings };
    let mut clusters = Vec::new();
    for Object(raw) in raw.clusters.unwrap_or_default() {
        let name = raw.name.unwrap_or_else(|| format!("@static/{file}"));
        skipped.name = format!("cluster {name}");
        if skipped.cluster(&name) {
            clusters.push(Told {
                pod_cidrs: skipped.nets("podCIDRs", raw.pods.as_deref().unwrap_or_default()),
                service_cidrs: skipped.nets("serviceCIDRs", raw.services.as_deref().unwrap_or_default()),
                mtu: skipped.mtu(raw.mtu),
                from: Some(file.to_owned()),
                name,
            });
        }
    }
    match findings.first() {
        Some(finding) => Err(finding.text.trim_start().to_owned()),
        None => Ok(clusters),
    }
}

/// What a look at the directory found: each file's text, or why it cannot be used.
type Look = Result<BTreeMap<String, Result<String, String>>, String>;

fn look(dir: &Path) -> Look {
    let failed = |err: std::io::Error| match err.kind() {
        ErrorKind::NotFound => format!("directory {} is missing: make it, or unset staticDir", dir.display()),
        _ => format!("directory {}: {err}", dir.display()),
    };
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(name) = name.to_str().filter(|name| name.ends_with(".json") && !name.starts_with('.')) else {
            continue;
        };
        match read_trusted(&dir.join(name)) {
            Ok(Some(text)) => drop(files.insert(name.to_owned(), Ok(text))),
            // A link of a ConfigMap that is being replaced, or a file that was just removed.
            Ok(None) => {}
            Err(why) => drop(files.insert(name.to_owned(), Err(why))),
        }
    }
    Ok(files)
}

/// What the files say.
#[derive(Debug, Default)]
struct Directory {
    /// By file: what it said when it was last valid, also before this agent started.
    good: BTreeMap<String, Vec<Told>>,
    findings: Vec<Finding>,
    failure: Option<String>,
    looked: bool,
}

impl Directory {
    /// `before`: what the source's file said when the agent started.
    fn new(before: Vec<Told>) -> Self {
        let mut good: BTreeMap<String, Vec<Told>> = BTreeMap::new();
        for told in before {
            good.entry(told.from.clone().unwrap_or_default()).or_default().push(told);
        }
        Self { good, ..Self::default() }
    }
}

impl Model for Directory {
    type Event = Look;

    fn take(&mut self, event: Look, _: Instant) {
        let files = match event {
            Ok(files) => files,
            Err(why) => {
                self.failure = Some(why);
                return;
            }
        };
        (self.failure, self.looked) = (None, true);
        self.findings.clear();
        self.good.retain(|name, _| files.contains_key(name));
        for (name, text) in files {
            match text.and_then(|text| parse(&name, &text)) {
                Ok(clusters) => drop(self.good.insert(name, clusters)),
                Err(why) => {
                    let rest = if self.good.contains_key(&name) { "; what it said before stays" } else { "" };
                    let mut skipped = Skipped { what: "static file", name, findings: &mut self.findings };
                    skipped.note(format_args!("{why}{rest}"));
                }
            }
        }
    }

    fn view(&mut self, _: Instant) -> View {
        View {
            clusters: self.looked.then(|| self.good.values().flatten().cloned().map(Arc::new).collect()),
            explicit: false,
            findings: self.findings.clone(),
            failure: self.failure.clone(),
            objects: self.good.len(),
        }
    }
}

/// Whatever may change what the files say.
fn mask() -> WatchMask {
    WatchMask::CLOSE_WRITE
        | WatchMask::MOVE
        | WatchMask::DELETE
        | WatchMask::CREATE
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

struct Changes(Inotify);

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Notifier for Changes {
    fn drain(&mut self) -> bool {
        let mut buffer = [0; 4096];
        while self.0.read_events(&mut buffer).is_ok_and(|events| events.count() > 0) {}
        true
    }
}

/// Looks now and after every change, until nobody listens.
async fn follow(dir: PathBuf, sender: mpsc::Sender<Look>) {
    let inotify = Inotify::init().inspect_err(|err| tracing::warn!("inotify: {err}; {} is polled", dir.display())).ok();
    let mut watches = inotify.as_ref().map(Inotify::watches);
    let mut woken = inotify.map(|inotify| wake_on(Changes(inotify)));
    loop {
        // Watched before it is looked at, so that nothing that comes after is missed. Adding a watch again is harmless, and
        // needed where the directory was made anew.
        if let Some(watches) = &mut watches {
            let _ = watches.add(&dir, mask());
        }
        let place = dir.clone();
        let looked = tokio::task::spawn_blocking(move || look(&place)).await;
        let looked = looked.unwrap_or_else(|err| Err(err.to_string()));
        if sender.send(looked).await.is_err() {
            return;
        }
        match &mut woken {
            Some(woken) => drop(timeout(LOOK, woken.recv()).await),
            None => sleep(LOOK).await,
        }
    }
}

/// The source.
#[derive(Debug)]
pub struct DirectorySource {
    /// Where the files are.
    pub dir: PathBuf,
    /// What the source's file said when the agent started.
    pub before: Vec<Told>,
}

impl Source for DirectorySource {
    fn kind(&self) -> SourceKind {
        SourceKind::Static
    }

    async fn run(self, sink: Sink) -> anyhow::Result<()> {
        let (sender, events) = mpsc::channel(QUEUE);
        together(drive(Directory::new(self.before), events, sink), follow(self.dir, sender)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(directory: &mut Directory, files: &[(&str, &str)]) -> (String, usize) {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect();
        let now = Instant::now();
        directory.take(Ok(files), now);
        let view = directory.view(now);
        let shown = |told: &Arc<Told>| {
            let nets: Vec<String> = told.pod_cidrs.iter().map(ToString::to_string).collect();
            format!("{}={}", told.name, nets.join(","))
        };
        (view.clusters.unwrap().iter().map(shown).collect::<Vec<_>>().join(" "), view.findings.len())
    }

    const B: &str = r#"{"version":1,"clusters":[{"name":"b","podCIDRs":["10.1.0.0/16"]}]}"#;

    #[test]
    fn files_count_as_a_whole_or_as_they_were() {
        let mut directory = Directory::new(Vec::new());
        assert!(directory.view(Instant::now()).clusters.is_none());
        let unnamed = r#"{"version":1,"source":"x","clusters":[{"podCIDRs":["10.2.0.0/16"],"mtu":1400}]}"#;
        assert_eq!(
            take(&mut directory, &[("b.json", B), ("c.json", unnamed)]),
            ("b=10.1.0.0/16 @static/c.json=10.2.0.0/16".into(), 0)
        );
        for bad in [
            "{",
            "[]",
            r#"{"version":2}"#,
            r#"{"version":1,"clusters":[{"name":"b","podCIDRs":["10.9.0.0/16","x"]}]}"#,
            r#"{"version":1,"clusters":[{"name":"B"}]}"#,
            r#"{"version":1,"clusters":[{"name":"b","mtu":1}]}"#,
        ] {
            assert_eq!(take(&mut directory, &[("b.json", bad)]), ("b=10.1.0.0/16".into(), 1), "{bad}");
        }
        assert_eq!(take(&mut directory, &[("new.json", "{")]), (String::new(), 1));
    }

    #[test]
    fn what_was_valid_before_the_agent_started_counts() {
        let told = parse("b.json", B).unwrap();
        let mut directory = Directory::new(told);
        assert_eq!(take(&mut directory, &[("b.json", "{")]), ("b=10.1.0.0/16".into(), 1));
        assert_eq!(take(&mut directory, &[]), (String::new(), 0));
    }

    #[test]
    fn a_missing_directory_is_a_failure_and_changes_nothing() {
        let mut directory = Directory::new(Vec::new());
        take(&mut directory, &[("b.json", B)]);
        let dir = tempfile::tempdir().unwrap();
        directory.take(look(&dir.path().join("none")), Instant::now());
        let view = directory.view(Instant::now());
        assert!(view.failure.unwrap().contains("is missing"));
        assert_eq!(view.clusters.unwrap().len(), 1);
    }
}

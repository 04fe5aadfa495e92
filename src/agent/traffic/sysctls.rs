//! Host sysctls, where the administrator asked for them: what each was is on disk before it is changed, and `uninstall`
//! puts it back unless somebody else has set it since.

use std::path::{Path, PathBuf};

use crosslink_core::{
    model::{Change, NetnsState, Side, Sysctl},
    sysctls::{changes as sysctl_changes, keys as sysctl_keys},
};
use crosslink_kernel::{
    Error, Kernel, NodeQuery, System,
    files::{Durability, read_trusted, write_atomic},
};
use serde::{Deserialize, Serialize};

use super::pass::facts;
use crate::{inputs::Inputs, settings::Settings};

/// `sysctls.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    /// In the order in which they were set.
    sysctls: Vec<Entry>,
}

/// A sysctl that was set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Below `/proc/sys/net`.
    key: String,
    /// What it was.
    was: String,
    /// What it was set to.
    set: String,
}

/// Where the record is.
pub fn file(settings: &Settings) -> PathBuf {
    settings.lib_dir.join("sysctls.json")
}

fn read(path: &Path) -> anyhow::Result<Record> {
    let refused = |why: &dyn std::fmt::Display| {
        anyhow::anyhow!("{}: {why}: mend it, or remove it and set the host's sysctls yourself", path.display())
    };
    let text = read_trusted(path).map_err(|why| refused(&why))?;
    let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
    parsed.map(Option::unwrap_or_default).map_err(|err| refused(&err))
}

fn write(path: &Path, record: &Record) -> anyhow::Result<()> {
    let content = serde_json::to_vec_pretty(record)?;
    Ok(write_atomic(path, &content, 0o644, Durability::Synced)?)
}

/// Sets what has to be set.
///
/// # Errors
/// The first failure; what came before it stays.
pub fn keep(settings: &Settings, inputs: &Inputs, system: &mut System, state: &mut NetnsState) -> anyhow::Result<()> {
    let keys = sysctl_keys(facts(inputs, state));
    state.sysctls = system.observe_node(&NodeQuery { sysctls: keys, ..NodeQuery::default() })?.sysctls;
    let changes = sysctl_changes(facts(inputs, state));
    if changes.is_empty() {
        return Ok(());
    }
    let path = file(settings);
    let mut record = read(&path)?;
    record.version = 1;
    for (key, value) in &changes {
        if record.sysctls.iter().all(|entry| entry.key != *key) {
            let was = state.sysctls.get(key).cloned().unwrap_or_default();
            record.sysctls.push(Entry { key: key.clone(), was, set: (*value).to_owned() });
        }
    }
    write(&path, &record)?;
    for (key, value) in changes {
        tracing::info!("sysctl net/{key} is set to {value}");
        set(system, &key, value)?;
    }
    Ok(())
}

fn set(system: &mut System, key: &str, value: &str) -> Result<(), Error> {
    let sysctl = Sysctl { side: Side::Node, key: key.to_owned(), value: value.to_owned() };
    let applied = system.apply(&[Change::SetSysctl(sysctl, None)]);
    applied.failures.into_iter().next().map_or(Ok(()), |(_, err)| Err(err))
}

/// Puts back what is still as we set it, last first, and removes the record.
///
/// # Errors
/// The record cannot be read, or the kernel's; the record stays then.
pub fn put_back(path: &Path) -> anyhow::Result<()> {
    let record = read(path)?;
    if record.sysctls.is_empty() {
        return Ok(());
    }
    let mut system = System::new()?;
    for Entry { key, was, set: ours } in record.sysctls.iter().rev() {
        let query = NodeQuery { sysctls: vec![key.clone()], ..NodeQuery::default() };
        match system.observe_node(&query)?.sysctls.get(key) {
            Some(value) if value == ours => {
                set(&mut system, key, was)?;
                tracing::info!("sysctl net/{key} is {was} again");
            }
            Some(value) => tracing::info!("sysctl net/{key} is {value} by now, and stays"),
            None => {}
        }
    }
    Ok(std::fs::remove_file(path).map_err(|err| Error::file("remove", path, &err))?)
}

//! What the tests of the built plugin share: where it is, and one node's files.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

/// The plugin as cargo built it. Tests of another package find it beside that package's program.
///
/// # Panics
/// Where it has not been built.
pub fn bin() -> PathBuf {
    if let Some(own) = option_env!("CARGO_BIN_EXE_crosslink") {
        return own.into();
    }
    let Some(agent) = option_env!("CARGO_BIN_EXE_crosslink-agent") else {
        unreachable!("a test of the plugin or of the agent")
    };
    let bin = Path::new(agent).with_file_name("crosslink");
    assert!(bin.exists(), "{} is missing: build it with cargo build -p crosslink", bin.display());
    bin
}

/// Directory in which a runner finds `crosslink`.
pub fn bin_dirs() -> Vec<PathBuf> {
    vec![bin().parent().unwrap().to_owned()]
}

/// One node's files, in a directory of their own.
#[derive(Debug)]
pub struct Site {
    /// The directory.
    pub dir: PathBuf,
}

impl Site {
    /// Files below `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        fs::create_dir_all(dir.join("remotes")).unwrap();
        // Without this, each underlay ADD notes that no agent runs; tests that look for it remove the file.
        fs::create_dir_all(dir.join("run")).unwrap();
        let socket = dir.join("run/agent.sock");
        if !socket.exists() {
            fs::write(socket, "").unwrap();
        }
        Self { dir }
    }

    /// The conflist entry that uses these files, with more keys from `extra`.
    pub fn entry(&self, extra: Value) -> Value {
        let mut entry = json!({
            "type": "crosslink",
            "capabilities": { "io.kubernetes.cri.pod-annotations": true },
            "remotesDir": self.remotes_dir(),
            "nodeFile": self.dir.join("node.json"),
            "stateDir": self.state_dir(),
            "logFile": self.dir.join("cni.log"),
            "logLevel": "debug",
        });
        let Value::Object(extra) = extra else { panic!("an object") };
        entry.as_object_mut().unwrap().extend(extra);
        entry
    }

    /// Directory of remotes files.
    pub fn remotes_dir(&self) -> PathBuf {
        self.dir.join("remotes")
    }

    /// Directory of records.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("run/attachments")
    }

    /// Writes a remotes file.
    pub fn remotes(&self, name: &str, content: &Value) {
        write(&self.remotes_dir().join(name), &content.to_string());
    }

    /// Writes a remotes file of one cluster.
    pub fn cluster(&self, name: &str, pods: &[&str], services: &[&str]) {
        self.remotes(
            &format!("{name}.json"),
            &json!({"version": 1, "source": "static", "clusters": [
                {"name": name, "podCIDRs": pods, "serviceCIDRs": services}]}),
        );
    }

    /// Writes `node.json`; `version` is put in.
    pub fn node(&self, mut content: Value) {
        content["version"] = json!(1);
        write(&self.dir.join("node.json"), &content.to_string());
    }

    /// The records there are.
    pub fn records(&self) -> Vec<Value> {
        let Ok(entries) = fs::read_dir(self.state_dir()) else { return Vec::new() };
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()).collect()
    }

    /// Ids of the findings in the only record.
    pub fn findings(&self) -> Vec<String> {
        let records = self.records();
        assert_eq!(records.len(), 1);
        let findings = records[0]["findings"].as_array().unwrap();
        findings.iter().map(|finding| finding["id"].as_str().unwrap().to_owned()).collect()
    }

    /// The log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("cni.log")).unwrap_or_default()
    }
}

/// Writes a file as root's alone to write, whatever the umask.
pub fn write(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

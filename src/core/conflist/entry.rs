//! Our entry as text.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::TYPE;
use crate::{
    error::Error,
    netconf::{self, NetConf, OUR_KEYS, RawConf, Strictness},
};

/// Where the agent keeps what the plugin reads and writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// `remotesDir`.
    pub remotes_dir: PathBuf,
    /// `nodeFile`.
    pub node_file: PathBuf,
    /// `stateDir`.
    pub state_dir: PathBuf,
}

/// The entry: type, capability, and those keys that differ from their defaults, in the order of the README. Keys of
/// `extra` win over `paths`.
///
/// # Errors
/// Code 7, naming the key, its value and the cure. Unknown keys are errors too.
pub fn entry(extra: &Map<String, Value>, paths: &Paths) -> Result<String, Error> {
    let mut keys = Map::new();
    for (key, path) in
        [("remotesDir", &paths.remotes_dir), ("nodeFile", &paths.node_file), ("stateDir", &paths.state_dir)]
    {
        keys.insert(key.to_owned(), Value::from(utf8(key, path)?));
    }
    keys.extend(extra.iter().map(|(key, value)| (key.clone(), value.clone())));
    parse(&keys)?;
    let default = parse(&Map::new())?;
    let mut text = format!(r#"{{"type":"{TYPE}","capabilities":{{"io.kubernetes.cri.pod-annotations":true}}"#);
    for key in OUR_KEYS {
        let Some(value) = keys.get(key) else { continue };
        let alone = Map::from_iter([(key.to_owned(), value.clone())]);
        if parse(&alone)? != default {
            text.push_str(&format!(",{}:{value}", Value::from(key)));
        }
    }
    text.push('}');
    Ok(text)
}

fn utf8<'p>(key: &str, path: &'p Path) -> Result<&'p str, Error> {
    path.to_str().ok_or_else(|| Error::config(format!("{key} {}: give a path that is UTF-8", path.display())))
}

fn parse(keys: &Map<String, Value>) -> Result<NetConf, Error> {
    let mut conf = keys.clone();
    conf.insert("name".to_owned(), Value::from("n"));
    let text = Value::Object(conf).to_string();
    netconf::parse(&RawConf::parse(&text)?, Strictness::Full).map(|(conf, _)| conf)
}

/// The content of a drop-in file: the entry on a line. libcni puts `cniVersion` and `name` in.
pub fn dropin(entry: &str) -> String {
    format!("{entry}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(lib: &str, run: &str) -> Paths {
        Paths {
            remotes_dir: format!("{lib}/remotes").into(),
            node_file: format!("{lib}/node.json").into(),
            state_dir: format!("{run}/attachments").into(),
        }
    }

    fn with(extra: &str) -> Result<String, Error> {
        entry(&serde_json::from_str(extra).unwrap(), &paths("/var/lib/crosslink", "/run/crosslink"))
    }

    const BARE: &str = r#"{"type":"crosslink","capabilities":{"io.kubernetes.cri.pod-annotations":true}"#;

    #[test]
    fn defaults_are_not_written() {
        assert_eq!(with("{}").unwrap(), format!("{BARE}}}"));
        let all = r#"{"hijack":"all","hijackCIDR":[],"mode":"auto","failPolicy":"open","replyPath":"mark","vethMTU":0,
            "vethName":"veth0","logLevel":"info","logFile":"/var/log/crosslink/cni.log","excludeCIDR":null}"#;
        assert_eq!(with(all).unwrap(), format!("{BARE}}}"));
    }

    #[test]
    fn what_differs_is_written_in_order() {
        let given = r#"{"vethMTU":1400,"failPolicy":"closed","hijack":["b"],"nodeFile":"/n"}"#;
        let moved = entry(&serde_json::from_str(given).unwrap(), &paths("/data", "/run/crosslink")).unwrap();
        let tail =
            r#","hijack":["b"],"failPolicy":"closed","vethMTU":1400,"remotesDir":"/data/remotes","nodeFile":"/n"}"#;
        assert_eq!(moved, format!("{BARE}{tail}"));
    }

    #[test]
    fn faults_name_key_and_cure() {
        for (given, parts) in [
            (r#"{"hijak":"all"}"#, ["hijak", "did you mean"]),
            (r#"{"frob":1}"#, ["frob", "remove it"]),
            (r#"{"vethMTU":7}"#, ["vethMTU", "1280"]),
        ] {
            let err = with(given).unwrap_err();
            assert!(parts.iter().all(|part| err.msg.contains(part)), "{}", err.msg);
        }
    }
}

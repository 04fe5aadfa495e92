//! The conflist entry: strict parsing, with a "did you mean" for keys that are nearly ours.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};

use crate::{
    cidr,
    error::{Code, Error, quoted},
    finding::{Finding, Id},
    select::Selection,
};

/// How the pod's interface is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Look at the interface.
    #[default]
    Auto,
    /// A veth into the node: next hop is the pod's default route's.
    Overlay,
    /// macvlan, ipvlan, SR-IOV, anything that bypasses the node: a veth pair of ours leads there.
    Underlay,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Overlay => "overlay",
            Self::Underlay => "underlay",
        })
    }
}

/// What a broken remotes file or an unwritable record does to an ADD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailPolicy {
    /// A finding.
    #[default]
    Open,
    /// CNI error 11.
    Closed,
}

/// How replies to traffic that entered by `veth0` leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplyPath {
    /// Marked and sent back by `veth0`.
    #[default]
    Mark,
    /// By the routes alone.
    None,
}

/// Least severe message that is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And findings of severity warning.
    Warn,
    /// And one line per call.
    #[default]
    Info,
    /// And every change.
    Debug,
}

/// How unknown keys and wrong values are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Installer, `validate`, `plan`: every unknown key is an error.
    Full,
    /// ADD, CHECK, STATUS: a key within edit distance 2 of ours is an error, another a finding.
    Near,
    /// DEL, GC: everything is a finding and the default is used, because a pod must be deletable.
    Lenient,
}

/// A validated conflist entry. Defaults are those of the README's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConf {
    /// Network name of the list.
    pub name: String,
    /// Which clusters are routed.
    pub hijack: Selection,
    /// CIDRs that the administrator adds.
    pub hijack_cidr: Vec<IpNet>,
    /// CIDRs that are subtracted.
    pub exclude_cidr: Vec<IpNet>,
    /// Ranges that `crosslink.dev/hijack-cidr` may name in underlay mode besides remote and local ones.
    pub annotation_cidrs: Vec<IpNet>,
    /// How the interface is attached.
    pub mode: Mode,
    /// What trouble with files does.
    pub fail_policy: FailPolicy,
    /// How replies leave.
    pub reply_path: ReplyPath,
    /// Name of the veth in the pod.
    pub veth_name: String,
    /// Its MTU in bytes; 0: that of the pod's interface.
    pub veth_mtu: u32,
    /// Directory of remotes files.
    pub remotes_dir: PathBuf,
    /// `node.json`.
    pub node_file: PathBuf,
    /// Directory of records.
    pub state_dir: PathBuf,
    /// Log file; none when empty.
    pub log_file: Option<PathBuf>,
    /// Least severe message that is logged.
    pub log_level: LogLevel,
}

impl Default for NetConf {
    fn default() -> Self {
        Self {
            name: String::new(),
            hijack: Selection::All,
            hijack_cidr: Vec::new(),
            exclude_cidr: Vec::new(),
            annotation_cidrs: Vec::new(),
            mode: Mode::Auto,
            fail_policy: FailPolicy::Open,
            reply_path: ReplyPath::Mark,
            veth_name: "veth0".to_owned(),
            veth_mtu: 0,
            remotes_dir: "/var/lib/crosslink/remotes".into(),
            node_file: "/var/lib/crosslink/node.json".into(),
            state_dir: "/run/crosslink/attachments".into(),
            log_file: Some("/var/log/crosslink/cni.log".into()),
            log_level: LogLevel::Info,
        }
    }
}

/// Keys of ours.
pub const OUR_KEYS: [&str; 14] = [
    "hijack",
    "hijackCIDR",
    "excludeCIDR",
    "annotationCIDRs",
    "mode",
    "failPolicy",
    "replyPath",
    "vethName",
    "vethMTU",
    "remotesDir",
    "nodeFile",
    "stateDir",
    "logFile",
    "logLevel",
];

/// Keys of the CNI specification 1.1.0 and of libcni, which are in every plugin's input or may be.
const CNI_KEYS: [&str; 15] = [
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "args",
    "ipMasq",
    "ipam",
    "dns",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "disableCheck",
    "disableGC",
    "cni.dev/valid-attachments",
    "cni.dev/attachments",
];

/// The plugin's standard input, split into its top-level keys; values are kept as they were written.
#[derive(Debug)]
pub struct RawConf<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> RawConf<'a> {
    /// Splits the input.
    ///
    /// # Errors
    /// Code 6 where it is not a JSON object.
    pub fn parse(stdin: &'a str) -> Result<Self, Error> {
        serde_json::from_str(stdin).map(Self).map_err(|err| {
            Error::new(Code::Decode, format!("network configuration on standard input is not a JSON object: {err}"))
        })
    }

    /// A key as written.
    pub fn raw(&self, key: &str) -> Option<&'a RawValue> {
        self.0.get(key).copied()
    }

    /// A key as a value; missing and `null` are the same.
    ///
    /// # Errors
    /// Code 6 where it nests too deep to be read.
    pub fn value(&self, key: &str) -> Result<Option<Value>, Error> {
        let Some(raw) = self.raw(key) else { return Ok(None) };
        match serde_json::from_str(raw.get()) {
            Ok(Value::Null) => Ok(None),
            Ok(value) => Ok(Some(value)),
            Err(err) => Err(Error::new(Code::Decode, format!("key \"{key}\" of the configuration: {err}"))),
        }
    }

    /// `cniVersion`; 0.1.0 where it is missing, as the specification says.
    ///
    /// # Errors
    /// Code 6 where it is no string.
    pub fn cni_version(&self) -> Result<String, Error> {
        match self.value("cniVersion")? {
            None => Ok("0.1.0".to_owned()),
            Some(Value::String(text)) if text.is_empty() => Ok("0.1.0".to_owned()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => {
                let shown = quoted(&other.to_string());
                Err(Error::new(Code::Decode, format!("cniVersion is {shown}: give a string like \"1.0.0\"")))
            }
        }
    }
}

/// Levenshtein distance; `limit + 1` without counting where the lengths alone differ by more than `limit`.
fn distance(a: &str, b: &str, limit: usize) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    if a.len().abs_diff(b.len()) > limit {
        return limit + 1;
    }
    for (i, ca) in a.chars().enumerate() {
        let mut previous = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (above, cb) in row.iter().skip(1).zip(&b) {
            left = (previous + usize::from(ca != *cb)).min(above + 1).min(left + 1);
            next.push(left);
            previous = *above;
        }
        row = next;
    }
    row.last().copied().unwrap_or(limit + 1)
}

/// The known key that `key` was probably meant to be: lower-cased, within edit distance 2.
pub fn did_you_mean<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let key = key.to_lowercase();
    known
        .iter()
        .map(|candidate| (distance(&key, &candidate.to_lowercase(), 2), *candidate))
        .filter(|(distance, _)| *distance <= 2)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Parses the entry.
///
/// # Errors
/// Code 7, naming key, value and cure; never with [`Strictness::Lenient`], which reports findings instead.
pub fn parse(raw: &RawConf<'_>, strictness: Strictness) -> Result<(NetConf, Vec<Finding>), Error> {
    let mut conf = NetConf::default();
    let mut findings = Vec::new();
    for key in raw.0.keys() {
        let outcome = match () {
            () if OUR_KEYS.contains(&key.as_str()) || key == "name" => set(&mut conf, key, raw),
            () if CNI_KEYS.contains(&key.as_str()) => Ok(()),
            () => unknown_key(key, strictness, &mut findings),
        };
        match outcome {
            Err(err) if strictness == Strictness::Lenient => findings.push(Finding::new(Id::BadValue, err.msg)),
            other => other?,
        }
    }
    if conf.name.is_empty() && strictness != Strictness::Lenient {
        return Err(Error::config("the configuration has no network \"name\": give the conflist one"));
    }
    Ok((conf, findings))
}

fn unknown_key(key: &str, strictness: Strictness, findings: &mut Vec<Finding>) -> Result<(), Error> {
    let shown = quoted(key);
    match (did_you_mean(key, &OUR_KEYS), strictness) {
        (Some(near), Strictness::Full | Strictness::Near) => {
            Err(Error::config(format!("unknown key {shown} in the crosslink entry: did you mean \"{near}\"?")))
        }
        (None, Strictness::Full) => {
            Err(Error::config(format!("unknown key {shown} in the crosslink entry: remove it, or upgrade crosslink")))
        }
        (_, Strictness::Near | Strictness::Lenient) => {
            findings.push(Finding::new(Id::UnknownKey, format!("unknown key {shown} in the crosslink entry: ignored")));
            Ok(())
        }
    }
}

fn set(conf: &mut NetConf, key: &str, raw: &RawConf<'_>) -> Result<(), Error> {
    // A key that is `null` is a key that is not there: Go encoders write both.
    let Some(value) = raw.value(key).map_err(|err| Error::config(err.msg))? else { return Ok(()) };
    match key {
        "name" => conf.name = network_name(string(key, &value)?)?,
        "hijack" => conf.hijack = selection(key, &value)?,
        "hijackCIDR" => {
            conf.hijack_cidr = cidrs(key, &value)?;
            conf.hijack_cidr.iter().try_for_each(|net| routable(key, net))?;
        }
        "excludeCIDR" => conf.exclude_cidr = cidrs(key, &value)?,
        "annotationCIDRs" => conf.annotation_cidrs = cidrs(key, &value)?,
        "mode" => {
            conf.mode =
                one_of(key, &value, &[("auto", Mode::Auto), ("overlay", Mode::Overlay), ("underlay", Mode::Underlay)])?;
        }
        "failPolicy" => {
            conf.fail_policy = one_of(key, &value, &[("open", FailPolicy::Open), ("closed", FailPolicy::Closed)])?;
        }
        "replyPath" => {
            conf.reply_path = one_of(key, &value, &[("mark", ReplyPath::Mark), ("none", ReplyPath::None)])?;
        }
        "vethName" => conf.veth_name = interface_name(key, string(key, &value)?)?,
        "vethMTU" => conf.veth_mtu = mtu(key, &value)?,
        "remotesDir" => conf.remotes_dir = path(key, &value)?,
        "nodeFile" => conf.node_file = path(key, &value)?,
        "stateDir" => conf.state_dir = path(key, &value)?,
        "logFile" => {
            conf.log_file = if value.as_str() == Some("") { None } else { Some(path(key, &value)?) };
        }
        _ => {
            conf.log_level = one_of(
                key,
                &value,
                &[
                    ("error", LogLevel::Error),
                    ("warn", LogLevel::Warn),
                    ("info", LogLevel::Info),
                    ("debug", LogLevel::Debug),
                ],
            )?;
        }
    }
    Ok(())
}

fn bad(key: &str, value: &Value, cure: &str) -> Error {
    let shown = value.as_str().map_or_else(|| quoted(&value.to_string()), quoted);
    Error::config(format!("key \"{key}\" of the crosslink entry is {shown}: {cure}"))
}

/// What is never routed is refused before any pod comes, so that STATUS and the installer see it too.
fn routable(key: &str, net: &IpNet) -> Result<(), Error> {
    cidr::never_routed(net).map_or(Ok(()), |why| {
        Err(Error::config(format!("key \"{key}\" of the crosslink entry: \"{net}\" {why}: remove it")))
    })
}

fn string<'v>(key: &str, value: &'v Value) -> Result<&'v str, Error> {
    value.as_str().ok_or_else(|| bad(key, value, "give a string"))
}

fn path(key: &str, value: &Value) -> Result<PathBuf, Error> {
    let text = string(key, value)?;
    if !text.starts_with('/') || text.contains('\0') {
        return Err(bad(key, value, "give an absolute path without NUL"));
    }
    Ok(text.into())
}

fn one_of<T: Copy>(key: &str, value: &Value, choices: &[(&str, T)]) -> Result<T, Error> {
    let found = value.as_str().and_then(|text| choices.iter().find(|(name, _)| *name == text));
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        bad(key, value, &format!("give one of {}", names.join(", ")))
    })
}

/// Bounds: IPv6 does not work below 1280 (RFC 8200, section 5), and an MTU has 16 bits on a veth.
fn mtu(key: &str, value: &Value) -> Result<u32, Error> {
    value
        .as_u64()
        .and_then(|mtu| u32::try_from(mtu).ok())
        .filter(|mtu| *mtu == 0 || (1280..=65535).contains(mtu))
        .ok_or_else(|| bad(key, value, "give the number 0 (the MTU of the pod's interface) or one from 1280 to 65535"))
}

fn selection(key: &str, value: &Value) -> Result<Selection, Error> {
    let names: Vec<String> = match value {
        Value::String(text) if text.contains(',') => {
            return Err(bad(key, value, "give several cluster names as a list, such as [\"cluster-b\",\"cluster-c\"]"));
        }
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(|| bad(key, value, "give all, none, or a list of cluster names"))?,
        _ => return Err(bad(key, value, "give all, none, or a list of cluster names")),
    };
    if names.is_empty() {
        return Ok(Selection::None);
    }
    Selection::parse(names.iter().map(String::as_str)).map_err(|cure| bad(key, value, &cure))
}

fn cidrs(key: &str, value: &Value) -> Result<Vec<IpNet>, Error> {
    let items = value.as_array().ok_or_else(|| bad(key, value, "give a list of CIDRs or addresses"))?;
    items
        .iter()
        .map(|item| {
            let text = item.as_str().ok_or_else(|| bad(key, item, "give CIDRs or addresses as strings"))?;
            cidr::parse(text).map_err(|err| Error::config(format!("key \"{key}\" of the crosslink entry: {err}")))
        })
        .collect()
}

/// Network names and container IDs, by the rule of the specification's section 1.
pub fn valid_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn network_name(text: &str) -> Result<String, Error> {
    if valid_identifier(text) {
        return Ok(text.to_owned());
    }
    Err(Error::config(format!(
        "network name {} is not valid: use letters, digits, \"_\", \".\" and \"-\", starting with a letter or digit",
        quoted(text)
    )))
}

/// Whether Linux (and libcni) accept it as an interface name: 1 to 15 bytes, no "/", ":" or white space, not "." or "..".
pub fn valid_ifname(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

fn interface_name(key: &str, text: &str) -> Result<String, Error> {
    if valid_ifname(text) && text != "lo" {
        return Ok(text.to_owned());
    }
    Err(bad(
        key,
        &Value::from(text),
        "give an interface name: 1 to 15 characters without \"/\", \":\" or spaces, not lo, . or ..",
    ))
}

/// `args.cni` of the entry; missing, `null` and `{}` are the same.
///
/// # Errors
/// Code 7 where it is something else than an object.
pub fn args_cni(raw: &RawConf<'_>) -> Result<Map<String, Value>, Error> {
    let args = match raw.value("args")? {
        None => return Ok(Map::new()),
        Some(Value::Object(mut args)) => args.remove("cni"),
        Some(other) => return Err(bad("args", &other, "give an object")),
    };
    match args {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(cni)) => Ok(cni),
        Some(other) => Err(bad("args.cni", &other, "give an object")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &str) -> Result<(NetConf, Vec<Finding>), Error> {
        parse(&RawConf::parse(text)?, Strictness::Near)
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let (conf, findings) = conf(r#"{"name":"n","type":"crosslink"}"#).unwrap();
        assert_eq!(conf, NetConf { name: "n".into(), ..NetConf::default() });
        assert!(findings.is_empty());
    }

    #[test]
    fn near_misses_say_what_was_meant() {
        for (key, meant) in [
            ("hijackCIDRs", "hijackCIDR"),
            ("HijackCidr", "hijackCIDR"),
            ("exludeCIDR", "excludeCIDR"),
            ("modes", "mode"),
            ("failpolicy", "failPolicy"),
            ("vethMtu", "vethMTU"),
            ("annotationCIDR", "annotationCIDRs"),
        ] {
            let err = conf(&format!(r#"{{"name":"n","{key}":"x"}}"#)).unwrap_err();
            assert_eq!(err.code, Code::Config);
            assert!(err.msg.contains(key) && err.msg.contains(&format!("did you mean \"{meant}\"")), "{}", err.msg);
        }
    }

    #[test]
    fn foreign_keys_are_findings_and_full_refuses_them() {
        let text =
            r#"{"name":"n","k8s.v1.cni.cncf.io/resourceName":"x","deviceID":"0000:03:02.1","mtu":1500,"vlan":5}"#;
        assert_eq!(conf(text).unwrap().1.len(), 4);
        assert!(parse(&RawConf::parse(text).unwrap(), Strictness::Full).is_err());
    }

    #[test]
    fn lenient_never_fails() {
        let text = r#"{"name":"!","mode":7,"hijackCIDRs":1,"hijack":{},"stateDir":"relative","vethMTU":-1}"#;
        let (conf, findings) = parse(&RawConf::parse(text).unwrap(), Strictness::Lenient).unwrap();
        assert_eq!(conf, NetConf::default());
        assert_eq!(findings.len(), 6);
    }

    #[test]
    fn null_is_absent() {
        let (conf, _) = conf(r#"{"name":"n","hijack":null,"hijackCIDR":null,"mode":null}"#).unwrap();
        assert_eq!(conf.hijack, Selection::All);
    }

    #[test]
    fn distances() {
        for (a, b, d) in [("mode", "mode", 0), ("mod", "mode", 1), ("edom", "mode", 4), ("", "ab", 2), ("ab", "ba", 2)]
        {
            assert_eq!(distance(a, b, 2), d, "{a} {b}");
        }
    }
}

//! One call: environment and configuration, checked.

use std::{io::Read, path::Path};

use crosslink_core::{
    error::{Code, Error, quoted},
    netconf::{RawConf, valid_identifier, valid_ifname},
    record::Pod,
};
use rscni_plugin::{
    types::{CNI_ARGS, CNI_COMMAND, CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS, Cmd},
    version::{PluginInfo, SpecVersion},
};

use crate::reply;

/// Most that is read from standard input, bytes. Annotations may take 256 KiB and prevResult follows the number of
/// interfaces; beyond this something is wrong.
const INPUT_LIMIT: u64 = 16 * 1024 * 1024;

/// The `CNI_*` variables, read once. Missing and empty are the same: runtimes write both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Env {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: String,
}

impl Env {
    /// Reads the process's environment.
    pub fn from_process() -> Self {
        let get = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).unwrap_or_default();
        Self {
            command: get(CNI_COMMAND),
            container_id: get(CNI_CONTAINERID),
            netns: get(CNI_NETNS),
            ifname: get(CNI_IFNAME),
            args: get(CNI_ARGS),
        }
    }
}

/// Reads standard input.
///
/// # Errors
/// Code 5 or 6.
pub fn read(stdin: &mut dyn Read) -> Result<String, Error> {
    let mut bytes = Vec::new();
    stdin
        .take(INPUT_LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(|err| Error::new(Code::Io, format!("standard input cannot be read: {err}")))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > INPUT_LIMIT {
        return Err(Error::new(Code::Decode, format!("the configuration is larger than {INPUT_LIMIT} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| Error::new(Code::Decode, "the configuration is not UTF-8"))
}

/// A call whose environment and version are valid.
#[derive(Debug)]
pub struct Call<'a> {
    /// The verb.
    pub verb: Cmd,
    /// The environment.
    pub env: &'a Env,
    /// The configuration, split into its keys.
    pub raw: RawConf<'a>,
    /// Its version, as it was written.
    pub cni_version: String,
}

impl<'a> Call<'a> {
    /// Checks what every verb needs before its own work.
    ///
    /// # Errors
    /// Codes 1, 4 and 6.
    pub fn parse(verb: Cmd, env: &'a Env, input: &'a str) -> Result<Self, Error> {
        check_env(verb, env)?;
        let raw = RawConf::parse(input)?;
        let cni_version = raw.cni_version()?;
        negotiate(verb, &cni_version)?;
        Ok(Self { verb, env, raw, cni_version })
    }

    /// Path of the sandbox; none where the runtime has closed it.
    pub fn netns(&self) -> Option<&Path> {
        (!self.env.netns.is_empty()).then(|| Path::new(&self.env.netns))
    }

    /// The pod, as far as `CNI_ARGS` tells. Pairs come in any order; what is not ours is not our concern.
    pub fn pod(&self) -> Pod {
        let mut pod = Pod::default();
        for (key, value) in self.env.args.split(';').filter_map(|pair| pair.split_once('=')) {
            match key {
                "K8S_POD_NAMESPACE" => value.clone_into(&mut pod.namespace),
                "K8S_POD_NAME" => value.clone_into(&mut pod.name),
                "K8S_POD_UID" => value.clone_into(&mut pod.uid),
                _ => {}
            }
        }
        pod
    }
}

fn negotiate(verb: Cmd, text: &str) -> Result<(), Error> {
    let named = |err: rscni_plugin::error::Error| {
        let err = reply::from_rscni(err);
        Error { msg: format!("cniVersion {}: {}", quoted(text), err.msg), ..err }
    };
    let version: SpecVersion = text.parse().map_err(named)?;
    if version.allows(verb).is_err() {
        let (verb, since) = match verb {
            Cmd::Check => ("CHECK", "0.4.0"),
            verb => (<&str>::from(verb), "1.1.0"),
        };
        let text = format!("cniVersion {text} has no {verb}: it came with {since}, raise cniVersion of the conflist");
        return Err(Error::new(Code::IncompatibleVersion, text));
    }
    PluginInfo::default().validate(version).map_err(named)
}

fn check_env(verb: Cmd, env: &Env) -> Result<(), Error> {
    let attachment = matches!(verb, Cmd::Add | Cmd::Del | Cmd::Check);
    let sandbox = matches!(verb, Cmd::Add | Cmd::Check);
    let needed = [
        (CNI_CONTAINERID, &env.container_id, attachment),
        (CNI_NETNS, &env.netns, sandbox),
        (CNI_IFNAME, &env.ifname, attachment),
    ];
    // What is not UTF-8 was replaced by this character when the environment was read.
    if let Some((name, ..)) = needed.iter().find(|(_, value, _)| value.contains(char::REPLACEMENT_CHARACTER)) {
        return Err(Error::new(Code::Environment, format!("{name} is not UTF-8")));
    }
    let missing: Vec<&str> =
        needed.iter().filter(|(_, value, needed)| *needed && value.is_empty()).map(|(name, ..)| *name).collect();
    if !missing.is_empty() {
        let text = format!("{} must be set for {}", missing.join(", "), env.command);
        return Err(Error::new(Code::Environment, text));
    }
    if attachment && !valid_identifier(&env.container_id) {
        let text = format!("{CNI_CONTAINERID} {} is not a container ID", quoted(&env.container_id));
        return Err(Error::new(Code::Environment, text));
    }
    if attachment && !valid_ifname(&env.ifname) {
        let text = format!("{CNI_IFNAME} {} is not an interface name", quoted(&env.ifname));
        return Err(Error::new(Code::Environment, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(command: &str) -> Env {
        Env {
            command: command.into(),
            container_id: "C_1.a-b".into(),
            netns: "/run/netns/x".into(),
            ifname: "eth0".into(),
            args: String::new(),
        }
    }

    #[test]
    fn missing_variables_are_named() {
        for (verb, text) in [(Cmd::Add, "ADD"), (Cmd::Check, "CHECK")] {
            let bare = Env { command: text.into(), ..Env::default() };
            let err = Call::parse(verb, &bare, "{}").unwrap_err();
            assert_eq!(err.code, Code::Environment);
            assert!(err.msg.contains("CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"), "{}", err.msg);
        }
        let late = Env { netns: String::new(), ..env("DEL") };
        assert!(Call::parse(Cmd::Del, &late, r#"{"cniVersion":"1.0.0"}"#).is_ok());
    }

    #[test]
    fn odd_names_are_refused() {
        for id in ["", "-a", "a/b", "a b", "../x", "a:b", "ü"] {
            let env = Env { container_id: id.into(), ..env("ADD") };
            assert!(Call::parse(Cmd::Add, &env, r#"{"cniVersion":"1.0.0"}"#).is_err(), "{id}");
        }
        for ifname in ["", ".", "..", "a/b", "a b", "a:b", "sixteencharacters"] {
            let env = Env { ifname: ifname.into(), ..env("ADD") };
            assert!(Call::parse(Cmd::Add, &env, r#"{"cniVersion":"1.0.0"}"#).is_err(), "{ifname}");
        }
    }

    #[test]
    fn versions_and_verbs() {
        for (version, verb, code) in [
            ("0.2.0", Cmd::Add, Some(Code::IncompatibleVersion)),
            ("1.2.0", Cmd::Add, Some(Code::IncompatibleVersion)),
            ("x", Cmd::Add, Some(Code::Decode)),
            ("0.3.1", Cmd::Check, Some(Code::IncompatibleVersion)),
            ("1.0.0", Cmd::Gc, Some(Code::IncompatibleVersion)),
            ("1.0.0", Cmd::Status, Some(Code::IncompatibleVersion)),
            ("0.3.0", Cmd::Add, None),
            ("0.4.0", Cmd::Check, None),
            ("1.1.0", Cmd::Status, None),
        ] {
            let input = format!(r#"{{"cniVersion":"{version}"}}"#);
            let env = env("X");
            let outcome = Call::parse(verb, &env, &input);
            assert_eq!(outcome.err().map(|err| err.code), code, "{version}");
        }
    }

    #[test]
    fn the_pod_is_read_from_args_in_any_order() {
        let mut env = env("ADD");
        env.args = "IgnoreUnknown=1;K8S_POD_NAME=p=q;K8S_POD_UID=u;X;;K8S_POD_NAMESPACE=ns".into();
        let call = Call::parse(Cmd::Add, &env, r#"{"cniVersion":"1.0.0"}"#).unwrap();
        assert_eq!(call.pod(), Pod { namespace: "ns".into(), name: "p=q".into(), uid: "u".into() });
    }
}

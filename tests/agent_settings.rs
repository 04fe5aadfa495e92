//! Settings of the agent: three spellings, one meaning; every fault is named; the README tells all of them.

use std::{path::Path, process::Command};

use clap::{Args as _, Parser};
use crosslink_agent::{
    args::Args,
    settings::{CniMode, Given, Host, Kubeconfig, Settings, SourceKind},
};
use serde_json::Value;

const README: &str = include_str!("../README.md");

fn host() -> Host {
    Host { node_name: None, host_name: "node-a".into(), executable: "/opt/crosslink/crosslink-agent".into() }
}

fn settings(file: &str, flags: &[&str]) -> Result<Settings, String> {
    let args = ["crosslink-agent", "run"].iter().chain(flags);
    let args = Args::try_parse_from(args).map_err(|err| err.to_string())?;
    let file = (!file.is_empty()).then_some((Path::new("settings.yaml"), file));
    Settings::new(file, &args.given, &host())
}

/// `cniMode` of `cni-mode`; the three CIDR keys are written as Kubernetes does.
fn key(flag: &str) -> String {
    let mut words = flag.split('-');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |key, word| match word {
        "cidrs" => key + "CIDRs",
        word => key + &word[..1].to_uppercase() + &word[1..],
    })
}

#[test]
fn the_readme_tells_every_setting() {
    let command = Given::augment_args(clap::Command::new("x"));
    let flags: Vec<&str> = command.get_arguments().filter_map(|arg| arg.get_long()).collect();
    assert!(flags.len() > 30, "{flags:?}");
    for flag in flags {
        let shown = format!("`{}`", key(flag));
        assert!(README.lines().any(|line| line.starts_with('|') && line.contains(&shown)), "{shown}");
        // The file knows the key, and the variable is named after it.
        let text = format!("{}: {{\"no\": \"such value\"}}", key(flag));
        let err = settings(&text, &["--kubeconfig=none"]).err().unwrap_or_default();
        assert!(!err.contains("unknown field"), "{flag}: {err}");
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag)).unwrap();
        let variable = format!("CROSSLINK_{}", flag.to_uppercase().replace('-', "_"));
        assert_eq!(arg.get_env().and_then(|name| name.to_str()), Some(variable.as_str()));
    }
}

#[test]
fn defaults() {
    let all = settings("", &[]).unwrap();
    assert_eq!(
        (all.kubeconfig, all.cni_mode, all.node_name.as_str()),
        (Kubeconfig::InCluster, CniMode::Auto, "node-a")
    );
    assert_eq!(all.plugin, Path::new("/opt/crosslink/crosslink"));
    assert_eq!(all.kernel_protocols, [12, 80, 186]);
    assert!(!all.sources.contains(&SourceKind::Kernel), "it is for those who know their local CIDRs");
    let alone = settings("", &["--kubeconfig=none"]).unwrap();
    assert_eq!(alone.sources, [SourceKind::Static]);
}

#[test]
fn flags_win_over_the_file() {
    let file = "kubeconfig: none\ncniMode: dropin\npodCIDRs: [10.0.0.0/8]\nkernelProtocols: [186]\n";
    let both = settings(file, &["--cni-mode=insert", "--cni-entry={\"hijack\":\"none\"}"]).unwrap();
    assert_eq!((both.kubeconfig, both.cni_mode), (Kubeconfig::None, CniMode::Insert));
    assert_eq!(both.pod_cidrs[0].to_string(), "10.0.0.0/8");
    assert_eq!((both.kernel_protocols, &both.cni_entry["hijack"]), (vec![186], &Value::from("none")));
    // JSON is YAML, and an empty file is none.
    assert_eq!(settings("{\"cniMode\": \"none\"}", &[]).unwrap().cni_mode, CniMode::None);
    assert_eq!(settings("\n", &[]).unwrap(), settings("", &[]).unwrap());
}

#[test]
fn every_fault_is_named_at_once() {
    for (file, flags, parts) in [
        ("cniMod: auto\n", &[][..], &["settings.yaml", "cniMod"][..]),
        (
            "cniMode: sideways\nresync: perhaps\n",
            &[],
            &["cniMode \"sideways\"", "dropin", "resync \"perhaps\"", "on or off"],
        ),
        ("podCIDRs: [10.0.0.0/33, 010.0.0.1/8]\n", &[], &["podCIDRs", "10.0.0.0/33", "010.0.0.1/8"]),
        ("", &["--sources=static,moon"], &["sources \"moon\"", "submariner"]),
        ("", &["--kubeconfig=none", "--sources=calico"], &["sources \"calico\"", "API server"]),
        ("", &["--http-address=9810"], &["httpAddress \"9810\"", "127.0.0.1:9810"]),
        ("", &["--cni-entry={\"hijak\":\"all\"}"], &["cniEntry \"hijak\""]),
        ("", &["--cni-entry=[]"], &["JSON object"]),
        ("", &["--lib-dir=here"], &["libDir \"here\"", "absolute"]),
        ("", &["--cluster-name=Mine"], &["clusterName \"Mine\"", "RFC 1123"]),
        ("", &["--resync-interval-seconds=0"], &["resyncIntervalSeconds 0"]),
        ("- 1\n", &[], &["settings.yaml"]),
        ("kubeconfig: none\nkubeconfig: in-cluster\n", &[], &["settings.yaml", "kubeconfig"]),
    ] {
        let err = settings(file, flags).expect_err(&format!("{file} {flags:?}"));
        for part in parts {
            assert!(err.contains(part), "\"{part}\" is not in: {err}");
        }
    }
}

#[test]
fn the_program_says_what_is_wrong_and_ends() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_crosslink-agent")).args(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = run(&["run", "--kubeconfig=none", "--resync=maybe"]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("resync \"maybe\""), "{err}");
    let (code, _, err) = run(&["run", "--config=/nowhere/settings.yaml"]);
    assert!(code == Some(1) && err.contains("/nowhere/settings.yaml"), "{err}");
    // Outside of a pod, without a word about where the API server is.
    let (code, _, err) = run(&["run"]);
    assert!(code == Some(1) && err.contains("--kubeconfig"), "{err}");
    let (code, out, _) = run(&["settings", "--kubeconfig=none"]);
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["kubeconfig"], "none");
    assert_eq!(run(&["dance"]).0, Some(2));
}

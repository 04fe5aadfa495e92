//! What the installer makes is loaded and run by the reference libcni, through its own `cnitool`, with real main plugins.
//! libcni 1.3 also reads drop-ins.
#![expect(clippy::unwrap_used, clippy::print_stderr, clippy::indexing_slicing, reason = "tests")]

#[path = "support/agent_install.rs"]
mod agent_install;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use agent_install::Host;
use crosslink_testkit::{Netns, cni_path};
use serde_json::Value;

const CNITOOL: &str = "github.com/containernetworking/cni/cnitool@v1.3.0";

/// cnitool from the PATH, else built from Go's module cache; tests have no network.
fn cnitool() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if let Some(found) = std::env::split_paths(&path).map(|dir| dir.join("cnitool")).find(|path| path.is_file()) {
        return Some(found);
    }
    let bin = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cnitool-1.3.0");
    if !bin.join("cnitool").exists() {
        let go = std::env::split_paths(&path).map(|dir| dir.join("go")).find(|path| path.is_file());
        build(&go.unwrap_or_else(|| "/usr/local/go/bin/go".into()), &bin);
    }
    if bin.join("cnitool").exists() || agent_install::have("cnitool") { Some(bin.join("cnitool")) } else { None }
}

/// Builds it, if its module is in the cache: `go install` of it once, wherever there is a network, puts it there.
fn build(go: &Path, bin: &Path) {
    let cache = Command::new(go).args(["env", "GOMODCACHE"]).output();
    let Ok(cache) = cache else { return };
    let proxy = format!("file://{}/cache/download", String::from_utf8_lossy(&cache.stdout).trim());
    let mut install = Command::new(go);
    install.args(["install", CNITOOL]).env("GOBIN", bin).env("GOPROXY", proxy).env("GOSUMDB", "off");
    let built = install.output();
    if let Ok(output) = built.as_ref()
        && !output.status.success()
    {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// ptp and tuning, in the way that kindnet configures its plugins configures them.
const KINDNET: &str = r#"{
  "cniVersion": "0.3.1",
  "name": "kindnet",
  "plugins": [
    {
      "type": "ptp",
      "ipMasq": false,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni-ipam-state",
        "routes": [{ "dst": "0.0.0.0/0" }],
        "ranges": [[{ "subnet": "10.244.0.0/24" }]]
      }
    },
    { "type": "tuning", "sysctl": { "net.ipv4.conf.all.log_martians": "1" } }
  ]
}
"#;

#[test]
fn libcni_runs_the_chain_that_was_made() {
    let Some(cnitool) = cnitool() else { return };
    for (more, file) in
        [(["--cni-mode", "insert"], "10-kindnet.conflist"), (["--cni-mode", "dropin"], "kindnet/90-crosslink.conf")]
    {
        let host = Host::new();
        host.put("10-kindnet.conflist", KINDNET);
        let agent = host.start(&more);
        agent.await_well();
        assert!(host.text(file).contains("crosslink"));
        std::fs::create_dir_all(host.lib().join("remotes")).unwrap();
        let remotes = r#"{"version":1,"source":"static","clusters":[{"name":"b","podCIDRs":["172.31.0.0/16"]}]}"#;
        std::fs::write(host.lib().join("remotes/b.json"), remotes).unwrap();
        let pod = Netns::create("pod");
        let mut dirs = cni_path();
        dirs.push(host.bin());
        let path: OsString = std::env::join_paths(dirs).unwrap();
        let tool = |verb: &str| {
            let output = Command::new(&cnitool)
                .args([verb, "kindnet"])
                .arg(pod.path())
                .env("NETCONFPATH", host.conf())
                .env("CNI_PATH", &path)
                .env("CNI_IFNAME", "eth0")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{more:?} {verb}: {said} {}", String::from_utf8_lossy(&output.stdout));
            String::from_utf8(output.stdout).unwrap()
        };
        let result: Value = serde_json::from_str(&tool("add")).unwrap();
        assert_eq!(result["ips"][0]["version"], "4");
        let routes = pod.ip("route show 172.31.0.0/16");
        assert!(routes.contains("proto 141"), "{more:?}: {routes}");
        tool("del");
    }
}

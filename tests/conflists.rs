//! The conflists of `conflist/`: those that are shipped are run with real main plugins; each fixture in `valid/` and
//! `invalid/` is handed to the built plugin as a runtime would, beside a table of what must come of it.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout, reason = "tests")]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use crosslink_core::netconf::{self, RawConf, Strictness};
use crosslink_testkit::{Attachment, Node, Options, Runner, TwoClusters, call, cni_path, require, two_clusters};
use sandbox::{ANNOTATIONS, Sandbox, refused, silent};
use serde_json::{Value, json};
use support::{Site, bin_dirs};

/// Who can see what is wrong with an invalid fixture, and so which verbs refuse it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Whoever reads the entry: ADD, STATUS and [`Strictness::Full`]. DEL works.
    Entry,
    /// ADD alone, beside the pod or what the runtime hands over. DEL works.
    Pod,
    /// Every verb, as the specification wants it: the list is of a version that we do not speak.
    Version,
}

use Fault::{Entry, Pod, Version};

/// File, fault, CNI code, and what the message must hold: the thing, its value, the cure.
const INVALID: &[(&str, Fault, u64, &[&str])] = &[
    ("hijack-all-in-list", Entry, 7, &["\"hijack\"", "cluster-b", "\"all\" cannot stand in a list", "alone"]),
    ("hijack-none-in-list", Entry, 7, &["\"hijack\"", "cluster-b", "\"none\" cannot stand in a list", "alone"]),
    ("hijack-number", Entry, 7, &["\"hijack\"", "7", "all, none, or a list of cluster names"]),
    ("hijack-bool", Entry, 7, &["\"hijack\"", "true", "all, none, or a list of cluster names"]),
    ("hijack-object", Entry, 7, &["\"hijack\"", "cluster-b", "all, none, or a list of cluster names"]),
    ("hijack-number-in-list", Entry, 7, &["\"hijack\"", ",7]", "a list of cluster names"]),
    ("hijack-empty", Entry, 7, &["\"hijack\"", "\"\" is not a cluster name", "all, none, or names like cluster-b"]),
    ("hijack-empty-name-in-list", Entry, 7, &["\"hijack\"", "\"\" is not a cluster name", "names like cluster-b"]),
    ("hijack-upper-case", Entry, 7, &["\"hijack\"", "\"Cluster-B\" is not a cluster name", "RFC 1123 label"]),
    ("hijack-underscore", Entry, 7, &["\"hijack\"", "\"cluster_b\" is not a cluster name", "RFC 1123 label"]),
    ("hijack-64-characters", Entry, 7, &["\"hijack\"", "ccc", "RFC 1123 label"]),
    ("hijack-comma-in-name", Entry, 7, &["\"hijack\"", "\"cluster-b,cluster-c\"", "list"]),
    ("hijack-at-alone", Entry, 7, &["\"hijack\"", "\"@\" is not a cluster name", "@bgp"]),
    ("hijack-ALL", Entry, 7, &["\"hijack\"", "\"ALL\" is not a cluster name", "give all"]),
    ("hijackCIDR-string", Entry, 7, &["\"hijackCIDR\"", "10.1.0.0/16", "give a list of CIDRs"]),
    ("hijackCIDR-object", Entry, 7, &["\"hijackCIDR\"", "10.1.0.0/16", "give a list of CIDRs"]),
    ("hijackCIDR-number-in-list", Entry, 7, &["\"hijackCIDR\"", "10", "as strings"]),
    ("hijackCIDR-null-in-list", Entry, 7, &["\"hijackCIDR\"", "null", "as strings"]),
    ("hijackCIDR-empty-item", Entry, 7, &["\"hijackCIDR\"", "empty", "write an address such as"]),
    ("hijackCIDR-octal", Entry, 7, &["\"hijackCIDR\"", "010.1.0.0/16", "no leading zeros"]),
    ("hijackCIDR-short", Entry, 7, &["\"hijackCIDR\"", "10.1/16", "write plain IPv4"]),
    ("hijackCIDR-length-33", Entry, 7, &["\"hijackCIDR\"", "10.1.0.0/33", "0 to 32"]),
    ("hijackCIDR-length-129", Entry, 7, &["\"hijackCIDR\"", "fd00::/129", "0 to 128"]),
    ("hijackCIDR-length-with-zero", Entry, 7, &["\"hijackCIDR\"", "10.0.0.0/08", "plain number"]),
    ("hijackCIDR-length-missing", Entry, 7, &["\"hijackCIDR\"", "10.0.0.0/", "0 to 32"]),
    ("hijackCIDR-netmask", Entry, 7, &["\"hijackCIDR\"", "/255.255.0.0", "plain number"]),
    ("hijackCIDR-range", Entry, 7, &["\"hijackCIDR\"", "10.1.0.1-10.1.0.9", "such as 10.0.0.1"]),
    ("hijackCIDR-host-name", Entry, 7, &["\"hijackCIDR\"", "db.cluster-b.example", "no valid IP address"]),
    ("hijackCIDR-zone", Entry, 7, &["\"hijackCIDR\"", "fe80::1%eth0", "remove the `%`"]),
    ("hijackCIDR-mapped-ipv4", Entry, 7, &["\"hijackCIDR\"", "::ffff:10.1.0.0/112", "10.1.0.0/16"]),
    ("hijackCIDR-comma", Entry, 7, &["\"hijackCIDR\"", "10.1.0.0/16,10.2.0.0/16"]),
    ("hijackCIDR-default-route", Entry, 7, &["\"hijackCIDR\"", "\"0.0.0.0/0\"", "default route", "remove it"]),
    ("hijackCIDR-default-route-ipv6", Entry, 7, &["\"hijackCIDR\"", "\"::/0\"", "default route", "remove it"]),
    ("hijackCIDR-loopback", Entry, 7, &["\"hijackCIDR\"", "\"127.0.0.1/32\"", "loopback", "remove it"]),
    ("hijackCIDR-loopback-ipv6", Entry, 7, &["\"hijackCIDR\"", "\"::1/128\"", "loopback", "remove it"]),
    ("hijackCIDR-multicast", Entry, 7, &["\"hijackCIDR\"", "\"224.0.0.0/4\"", "multicast", "remove it"]),
    ("hijackCIDR-multicast-ipv6", Entry, 7, &["\"hijackCIDR\"", "\"ff02::/16\"", "multicast", "remove it"]),
    ("hijackCIDR-this-network", Entry, 7, &["\"hijackCIDR\"", "\"0.0.0.0/8\"", "this network", "remove it"]),
    ("hijackCIDR-broadcast", Entry, 7, &["\"hijackCIDR\"", "\"255.255.255.255/32\"", "broadcast", "remove it"]),
    ("hijackCIDR-unspecified-ipv6", Entry, 7, &["\"hijackCIDR\"", "\"::/128\"", "unspecified", "remove it"]),
    ("hijackCIDR-equals-connected", Pod, 7, &["\"hijackCIDR\"", "10.88.0.0/24", "connected", "longer prefixes"]),
    ("hijackCIDR-equals-connected-ipv6", Pod, 7, &["\"hijackCIDR\"", "fd88::/64", "connected", "longer prefixes"]),
    ("hijackCIDR-own-address", Pod, 7, &["\"hijackCIDR\"", "10.88.0.5", "the pod's own address", "remove it"]),
    ("excludeCIDR-string", Entry, 7, &["\"excludeCIDR\"", "10.1.0.0/16", "give a list of CIDRs"]),
    ("excludeCIDR-not-a-CIDR", Entry, 7, &["\"excludeCIDR\"", "\"none\"", "no valid IP address"]),
    ("annotationCIDRs-string", Entry, 7, &["\"annotationCIDRs\"", "all", "give a list of CIDRs"]),
    ("annotationCIDRs-not-a-CIDR", Entry, 7, &["\"annotationCIDRs\"", "10.9.0.0/16 10.10.0.0/16"]),
    ("mode-unknown", Entry, 7, &["\"mode\"", "macvlan", "auto, overlay, underlay"]),
    ("mode-upper-case", Entry, 7, &["\"mode\"", "Overlay", "auto, overlay, underlay"]),
    ("mode-number", Entry, 7, &["\"mode\"", "1", "auto, overlay, underlay"]),
    ("failPolicy-unknown", Entry, 7, &["\"failPolicy\"", "ignore", "open, closed"]),
    ("failPolicy-bool", Entry, 7, &["\"failPolicy\"", "true", "open, closed"]),
    ("replyPath-unknown", Entry, 7, &["\"replyPath\"", "veth0", "mark, none"]),
    ("logLevel-unknown", Entry, 7, &["\"logLevel\"", "trace", "error, warn, info, debug"]),
    ("logLevel-warning", Entry, 7, &["\"logLevel\"", "warning", "error, warn, info, debug"]),
    ("vethName-empty", Entry, 7, &["\"vethName\"", "1 to 15 characters"]),
    ("vethName-too-long", Entry, 7, &["\"vethName\"", "sixteen-letters-", "1 to 15 characters"]),
    ("vethName-slash", Entry, 7, &["\"vethName\"", "veth/0", "without \"/\""]),
    ("vethName-colon", Entry, 7, &["\"vethName\"", "veth0:1", "\":\""]),
    ("vethName-space", Entry, 7, &["\"vethName\"", "veth 0", "spaces"]),
    ("vethName-dots", Entry, 7, &["\"vethName\"", "..", "give an interface name"]),
    ("vethName-lo", Entry, 7, &["\"vethName\"", "lo", "give an interface name"]),
    ("vethName-number", Entry, 7, &["\"vethName\"", "0", "give a string"]),
    (
        "vethName-taken-in-the-pod",
        Pod,
        101,
        &["vethName \"eth0\"", "the pod's own interface", "set vethName to another name"],
    ),
    ("vethMTU-too-small", Entry, 7, &["\"vethMTU\"", "1279", "1280 to 65535"]),
    ("vethMTU-too-large", Entry, 7, &["\"vethMTU\"", "65536", "1280 to 65535"]),
    ("vethMTU-negative", Entry, 7, &["\"vethMTU\"", "-1", "1280 to 65535"]),
    ("vethMTU-fraction", Entry, 7, &["\"vethMTU\"", "1400.5", "1280 to 65535"]),
    ("vethMTU-string", Entry, 7, &["\"vethMTU\"", "1400", "number"]),
    ("remotesDir-relative", Entry, 7, &["\"remotesDir\"", "crosslink", "absolute path"]),
    ("nodeFile-relative", Entry, 7, &["\"nodeFile\"", "crosslink", "absolute path"]),
    ("stateDir-relative", Entry, 7, &["\"stateDir\"", "crosslink", "absolute path"]),
    ("logFile-relative", Entry, 7, &["\"logFile\"", "crosslink", "absolute path"]),
    ("stateDir-empty", Entry, 7, &["\"stateDir\"", "absolute path"]),
    ("remotesDir-list", Entry, 7, &["\"remotesDir\"", "/var/lib/crosslink/remotes", "give a string"]),
    ("nodeFile-NUL", Entry, 7, &["\"nodeFile\"", "/var/lib/crosslink/node.json", "NUL"]),
    ("unknown-key-hijackCIDRs", Entry, 7, &["\"hijackCIDRs\"", "did you mean \"hijackCIDR\""]),
    ("unknown-key-HijackCIDR", Entry, 7, &["\"HijackCIDR\"", "did you mean \"hijackCIDR\""]),
    ("unknown-key-hijacks", Entry, 7, &["\"hijacks\"", "did you mean \"hijack\""]),
    ("unknown-key-exludeCIDR", Entry, 7, &["\"exludeCIDR\"", "did you mean \"excludeCIDR\""]),
    ("unknown-key-annotationCIDR", Entry, 7, &["\"annotationCIDR\"", "did you mean \"annotationCIDRs\""]),
    ("unknown-key-Mode", Entry, 7, &["\"Mode\"", "did you mean \"mode\""]),
    ("unknown-key-failpolicy", Entry, 7, &["\"failpolicy\"", "did you mean \"failPolicy\""]),
    ("unknown-key-reply-path", Entry, 7, &["\"reply-path\"", "did you mean \"replyPath\""]),
    ("unknown-key-vethname", Entry, 7, &["\"vethname\"", "did you mean \"vethName\""]),
    ("unknown-key-vethMtu", Entry, 7, &["\"vethMtu\"", "did you mean \"vethMTU\""]),
    ("unknown-key-remoteDir", Entry, 7, &["\"remoteDir\"", "did you mean \"remotesDir\""]),
    ("unknown-key-nodefile", Entry, 7, &["\"nodefile\"", "did you mean \"nodeFile\""]),
    ("unknown-key-stateDirs", Entry, 7, &["\"stateDirs\"", "did you mean \"stateDir\""]),
    ("unknown-key-logfile", Entry, 7, &["\"logfile\"", "did you mean \"logFile\""]),
    ("unknown-key-loglevel", Entry, 7, &["\"loglevel\"", "did you mean \"logLevel\""]),
    ("no-name", Entry, 7, &["no network \"name\"", "give the conflist one"]),
    ("name-null", Entry, 7, &["no network \"name\"", "give the conflist one"]),
    ("name-empty", Entry, 7, &["name \"\"", "starting with a letter or digit"]),
    ("name-number", Entry, 7, &["\"name\"", "7", "give a string"]),
    ("name-with-space", Entry, 7, &["network name \"pod network\"", "use letters, digits"]),
    ("name-with-slash", Entry, 7, &["network name \"../pods\"", "use letters, digits"]),
    ("cniVersion-missing", Version, 1, &["0.1.0"]),
    ("cniVersion-0.2.0", Version, 1, &["0.2.0"]),
    ("cniVersion-1.2.0", Version, 1, &["1.2.0"]),
    ("cniVersion-nonsense", Version, 6, &["cniVersion", "one"]),
    ("prevResult-missing-because-crosslink-is-first", Pod, 7, &["prevResult is missing", "after a main CNI plugin"]),
    ("prevResult-null", Pod, 7, &["prevResult is missing", "after a main CNI plugin"]),
    ("prevResult-list", Pod, 6, &["prevResult is not a", "object"]),
    ("prevResult-ips-object", Pod, 6, &["prevResult is not a CNI result", "ips"]),
    ("prevResult-address-nonsense", Pod, 6, &["prevResult", "10.88.0.5/24x"]),
    ("annotation-hijack-all-in-list", Pod, 7, &["crosslink.dev/hijack", "\"all,cluster-b\"", "alone"]),
    ("annotation-hijack-empty", Pod, 7, &["crosslink.dev/hijack", "\" \"", "cluster names separated by commas"]),
    ("annotation-hijack-not-a-string", Pod, 7, &["crosslink.dev/hijack", "cluster-b", "give a string"]),
    ("annotation-hijack-cidr-not-a-CIDR", Pod, 7, &["crosslink.dev/hijack-cidr", "10.1.0.0/16 10.2.0.0/16"]),
    ("annotation-hijack-cidr-default-route", Pod, 7, &["crosslink.dev/hijack-cidr", "0.0.0.0/0", "remove it"]),
    ("annotation-hijack-cidr-link-local", Pod, 7, &["crosslink.dev/hijack-cidr", "169.254.169.254", "administrator"]),
    ("annotation-hijack-cidr-loopback", Pod, 7, &["crosslink.dev/hijack-cidr", "127.0.0.0/8", "loopback"]),
    (
        "annotation-hijack-cidr-node-address",
        Pod,
        7,
        &["crosslink.dev/hijack-cidr", "10.88.0.1", "address of this node", "remove it"],
    ),
    ("annotation-hijack-cidr-connected", Pod, 7, &["crosslink.dev/hijack-cidr", "10.88.0.64/26", "remove it"]),
    (
        "annotation-hijack-cidr-outside-annotationCIDRs",
        Pod,
        7,
        &["crosslink.dev/hijack-cidr", "10.10.0.0/16", "annotationCIDRs"],
    ),
    ("annotation-exclude-cidr-not-a-CIDR", Pod, 7, &["crosslink.dev/exclude-cidr", "cluster-b", "no valid IP"]),
    ("annotation-unknown-hijack-cidrs", Pod, 7, &["crosslink.dev/hijack-cidrs", "did you mean", "hijack-cidr\""]),
    ("annotations-list", Pod, 7, &[ANNOTATIONS, "crosslink.dev/hijack", "object"]),
    ("runtimeConfig-string", Pod, 7, &["runtimeConfig", "none", "object"]),
    ("args-string", Pod, 7, &["\"args\"", "hijack=all", "give an object"]),
    ("args-cni-list", Pod, 7, &["\"args.cni\"", "hijack", "give an object"]),
    ("args-cni-hijack-number", Pod, 7, &["args.cni", "hijack", "7", "give a string"]),
    ("args-cni-unknown-hijak", Pod, 7, &["args.cni", "hijak", "did you mean \"hijack\""]),
];

/// Routes to clusters b and c, and to the source `@bgp`.
const B: &[&str] = &["10.243.0.0/18", "172.111.0.0/16", "fd11::/64", "fd43::/112"];
const C: &[&str] = &["172.112.0.0/16"];
const BGP: &[&str] = &["172.113.0.0/16"];
const ALL: &[&str] =
    &["10.243.0.0/18", "172.111.0.0/16", "172.112.0.0/16", "172.113.0.0/16", "fd11::/64", "fd43::/112"];
/// Underlay: this node's addresses.
const NODE: &[&str] = &["10.88.0.1", "fd88::1"];

/// File, whether [`Strictness::Full`] takes it too, and the destinations that its pod is routed to.
const VALID: &[(&str, bool, &[&[&str]])] = &[
    ("minimal", true, &[ALL]),
    ("every-key", true, &[&["10.243.0.0/18", "169.254.20.10", "172.111.0.0/17", "fd11::/64", "fd43::/112"]]),
    ("every-default", true, &[ALL]),
    // The default paths, where there are no remotes files.
    ("null-keys", true, &[]),
    ("empty-lists", true, &[]),
    ("hijack-all", true, &[ALL]),
    ("hijack-none", true, &[]),
    ("hijack-list", true, &[B, C]),
    ("hijack-one-name", true, &[B]),
    ("hijack-at-names", true, &[BGP]),
    ("hijack-all-alone-in-list", true, &[ALL]),
    ("hijack-none-alone-in-list", true, &[]),
    ("hijack-unknown-cluster", true, &[]),
    ("hijack-spaces-and-duplicates", true, &[C]),
    ("hijackCIDR-bare-addresses", true, &[&["192.0.2.7", "fd00:7::7"]]),
    ("hijackCIDR-host-bits", true, &[&["10.1.0.0/16", "fd00:7::/64"]]),
    ("hijackCIDR-mixed-case-ipv6", true, &[&["fd00:abcd::/64"]]),
    ("hijackCIDR-duplicates", true, &[&["10.1.0.0/16"]]),
    ("hijackCIDR-spaces", true, &[&["10.1.0.0/16"]]),
    ("hijackCIDR-link-local", true, &[&["169.254.20.10"]]),
    ("hijackCIDR-inside-connected", true, &[&["10.88.0.128/25"]]),
    ("hijackCIDR-covers-connected", true, &[&["10.0.0.0/8"]]),
    ("hijackCIDR-halves-of-everything", true, &[&["0.0.0.0/1", "128.0.0.0/1"]]),
    ("excludeCIDR-hole", true, &[&["172.112.0.0/18", "172.112.128.0/17"]]),
    ("excludeCIDR-everything", true, &[]),
    ("annotationCIDRs-everything", true, &[]),
    ("annotation-inside-annotationCIDRs", true, &[NODE, &["10.9.7.0/24"]]),
    ("mode-auto", true, &[C]),
    ("mode-overlay", true, &[C]),
    ("mode-underlay", true, &[NODE, C]),
    ("failPolicy-open", true, &[ALL]),
    ("failPolicy-closed", true, &[ALL]),
    ("replyPath-mark", true, &[ALL]),
    ("replyPath-none", true, &[ALL]),
    ("vethName-15-characters", true, &[NODE]),
    ("vethMTU-0", true, &[NODE]),
    ("vethMTU-1280", true, &[NODE]),
    ("vethMTU-65535", true, &[NODE]),
    ("logFile-empty", true, &[ALL]),
    ("logLevel-error", true, &[ALL]),
    ("logLevel-warn", true, &[ALL]),
    ("logLevel-info", true, &[ALL]),
    ("logLevel-debug", true, &[ALL]),
    ("keys-of-the-specification", true, &[ALL]),
    ("keys-that-libcni-injects", true, &[ALL]),
    ("keys-that-runtimes-inject", false, &[ALL]),
    ("key-of-a-newer-version", false, &[ALL]),
    ("annotations-null", true, &[ALL]),
    ("annotations-empty", true, &[ALL]),
    ("annotations", true, &[&["10.1.0.0/16", "172.112.128.0/17", "fd00::7"]]),
    ("args-null", true, &[ALL]),
    ("args-cni", true, &[&["10.1.0.0/16"]]),
    ("cniVersion-0.3.0", true, &[C]),
    ("cniVersion-0.3.1", true, &[C]),
    ("cniVersion-0.4.0", true, &[C]),
    ("cniVersion-1.0.0", true, &[C]),
    ("cniVersions-with-newer-ones", true, &[C]),
    ("name-with-every-kind-of-character", true, &[C]),
];

/// What is shipped, and the type of its main plugin.
const SHIPPED: &[(&str, &str)] = &[
    ("bridge", "bridge"),
    ("calico", "calico"),
    ("flannel", "flannel"),
    ("kindnet-ptp", "ptp"),
    ("macvlan", "macvlan"),
];

/// Stands in for a main plugin that no distribution has: the real ptp, with an `ipam` of host-local in the place of
/// flannel's `delegate` or Calico's `ipam`. A pod needs a real interface, so a script that only prints is not enough.
const STAND_IN: &str = r#"#!/bin/sh
sed -E 's|"(delegate\|ipam)":\{[^}]*\}|"ipam":{"type":"host-local","dataDir":"@DIR@","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}|' |
    exec @PTP@
"#;

fn dir(sub: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conflist").join(sub)
}

/// Reads a conflist and tells where in it crosslink is.
fn read(sub: &str, name: &str) -> (Value, usize) {
    let path = dir(sub).join(format!("{name}.conflist"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let list: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let places = (list["plugins"].as_array().unwrap().iter()).position(|entry| entry["type"] == "crosslink");
    (list, places.unwrap_or_else(|| panic!("{name} has no crosslink")))
}

/// Checks that a table and a directory hold the same files, each once.
fn same_files<'a>(sub: &str, rows: impl Iterator<Item = &'a str>) {
    let listed: Vec<String> = rows.map(str::to_owned).collect();
    let names: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(names.len(), listed.len(), "a file is twice in the table of {sub}");
    let entries = fs::read_dir(dir(sub)).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.is_file()).map(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.strip_suffix(".conflist").unwrap_or_else(|| panic!("{name} is no conflist")).to_owned()
    });
    assert_eq!(files.collect::<BTreeSet<_>>(), names, "files of {sub} and rows of the table");
}

#[test]
fn every_file_has_its_row_and_every_row_its_file() {
    same_files("", SHIPPED.iter().map(|row| row.0));
    same_files("valid", VALID.iter().map(|row| row.0));
    same_files("invalid", INVALID.iter().map(|row| row.0));
}

/// Keeps what a broken or absent path key leads to, which are the default paths, off the machine: the sandbox's mounts
/// are its own.
fn hide_default_paths() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        assert_eq!(std::env::var("CROSSLINK_TEST_NETNS").as_deref(), Ok("1"), "not in the test sandbox");
        for dir in ["/var/lib", "/var/log"] {
            let status = Command::new("mount").args(["-t", "tmpfs", "-o", "mode=755", "tmpfs", dir]).status();
            assert!(status.unwrap().success(), "mount on {dir}");
        }
    });
}

/// Puts the site's paths in the place of those that are absent or good; a broken one is what a fixture is about.
fn place(entry: &mut Value, site: &Site) {
    let paths = [
        ("remotesDir", site.remotes_dir()),
        ("nodeFile", site.dir.join("node.json")),
        ("stateDir", site.state_dir()),
        ("logFile", site.dir.join("cni.log")),
    ];
    for (key, path) in paths {
        let written = entry.get(key);
        let good = |text: &str| text.starts_with('/') && !text.contains('\0');
        if written.is_none_or(|value| value.as_str().is_some_and(good)) {
            entry[key] = json!(path);
        }
    }
}

/// Standard input of a fixture's crosslink, as libcni makes it from the list and the pod's result. `prevResult` and
/// `runtimeConfig` in a fixture stand for what a runtime would hand over.
fn stdin(sub: &str, name: &str, sandbox: &Sandbox) -> Value {
    let (list, at) = read(sub, name);
    let mut conf = list["plugins"][at].clone();
    place(&mut conf, &sandbox.site);
    if let Some(name) = list.get("name") {
        conf["name"] = name.clone();
    }
    let mut result = sandbox.result();
    if let Some(version) = list.get("cniVersion") {
        // With one version alone the runtime has no choice, and the plugin must judge it.
        let negotiated = || json!(Runner::new(list.clone(), Vec::new(), PathBuf::new()).cni_version());
        let version = if list.get("cniVersions").is_some() { negotiated() } else { version.clone() };
        result["cniVersion"] = version.clone();
        conf["cniVersion"] = version;
    }
    if at > 0 && conf.get("prevResult").is_none() {
        conf["prevResult"] = result;
    }
    conf
}

/// The same input for a verb that is about no attachment.
fn status_of(conf: &Value) -> Value {
    let mut conf = conf.clone();
    conf["cniVersion"] = json!("1.1.0");
    for key in ["prevResult", "runtimeConfig"] {
        conf.as_object_mut().unwrap().remove(key);
    }
    conf
}

fn full(conf: &Value) -> Result<(), String> {
    let text = conf.to_string();
    let parsed = netconf::parse(&RawConf::parse(&text).unwrap(), Strictness::Full);
    parsed.map(drop).map_err(|error| error.msg)
}

/// A pod, and remotes files of clusters b and c and of the source `@bgp`.
fn sandbox() -> Sandbox {
    hide_default_paths();
    let sandbox = Sandbox::overlay();
    sandbox.site.cluster("cluster-c", C, &[]);
    let clusters = json!([{ "name": "@bgp", "podCIDRs": BGP }]);
    sandbox.site.remotes("bgp.json", &json!({ "version": 1, "source": "kernel", "clusters": clusters }));
    sandbox
}

/// Runs `check` on every row and reports all that failed: a table is read as a whole.
fn each<R>(rows: &[R], name: impl Fn(&R) -> &str, check: impl Fn(&R)) {
    let failed: Vec<&str> = (rows.iter())
        .filter(|row| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(row))).is_err())
        .map(name)
        .collect();
    assert!(failed.is_empty(), "{} of {} rows failed: {failed:#?}", failed.len(), rows.len());
}

#[test]
fn every_valid_fixture_is_accepted() {
    // One pod for all: the kernel reports links up at most once a second.
    let sandbox = sandbox();
    each(VALID, |row| row.0, |&(name, strictly, expected)| accepted(&sandbox, name, strictly, &expected.concat()));
}

fn accepted(sandbox: &Sandbox, name: &str, strictly: bool, expected: &[&str]) {
    println!("valid/{name}");
    let conf = stdin("valid", name, sandbox);
    // Whatever a failed row has left.
    silent(&sandbox.del(json!({})));
    assert_eq!(full(&conf).is_ok(), strictly, "{:?}", full(&conf));
    silent(&sandbox.call("STATUS", &status_of(&conf)).run().unwrap());
    sandbox.unchanged(|| {
        let reply = sandbox.call("ADD", &conf).run().unwrap();
        assert!(reply.ok(), "{reply:?}");
        assert_eq!(reply.json(), conf["prevResult"]);
        let mut routes = expected.to_vec();
        routes.sort_unstable();
        assert_eq!(sandbox.routes(), routes);
        if !conf["cniVersion"].as_str().unwrap().starts_with("0.3.") {
            silent(&sandbox.call("CHECK", &conf).run().unwrap());
        }
        let veth = conf["vethName"].as_str().filter(|_| conf["mode"] == "underlay");
        if let Some(veth) = veth {
            sandbox.pod.ip(&format!("link show {veth}"));
        }
        if let Some(mtu) = conf["vethMTU"].as_u64().filter(|mtu| *mtu > 0 && conf["mode"] == "underlay") {
            assert_eq!(sandbox.pod.json("link show veth0")[0]["mtu"], mtu);
        }
        silent(&sandbox.call("DEL", &conf).run().unwrap());
        assert!(sandbox.routes().is_empty() && sandbox.site.records().is_empty());
    });
}

#[test]
fn every_invalid_fixture_is_refused_and_its_pod_can_be_deleted() {
    let sandbox = sandbox();
    each(
        INVALID,
        |row| row.0,
        |&(name, fault, code, parts)| {
            let conf = stdin("invalid", name, &sandbox);
            // Whatever a failed row has left.
            silent(&sandbox.del(json!({})));
            let reply = sandbox.unchanged(|| sandbox.call("ADD", &conf).run().unwrap());
            println!("invalid/{name}: {}", reply.stdout);
            refused(&reply, code, parts);
            sandbox.unchanged(|| deletable(&sandbox, &conf, fault, code));
        },
    );
}

/// A pod that was made before the entry was broken.
fn deletable(sandbox: &Sandbox, conf: &Value, fault: Fault, code: u64) {
    sandbox.add(json!({}));
    assert_eq!(sandbox.routes(), ALL);
    let reply = sandbox.call("DEL", conf).run().unwrap();
    if fault == Version {
        refused(&reply, code, &[]);
        silent(&sandbox.del(json!({})));
        return;
    }
    silent(&reply);
    assert!(sandbox.routes().is_empty(), "{reply:?}");
    if conf["stateDir"] == json!(sandbox.site.state_dir()) {
        assert!(sandbox.site.records().is_empty(), "{reply:?}");
    } else {
        // The entry does not say where the record is.
        fs::remove_file(sandbox.record_path()).unwrap();
    }
    let mut late = conf.clone();
    late.as_object_mut().unwrap().remove("prevResult");
    silent(&sandbox.call("DEL", &late).run().unwrap());
}

#[test]
fn a_fault_in_the_entry_itself_is_seen_before_any_pod_comes() {
    let sandbox = sandbox();
    let rows: Vec<_> = INVALID.iter().filter(|row| row.1 != Version).collect();
    each(
        &rows,
        |row| row.0,
        |&&(name, fault, _, parts)| {
            println!("invalid/{name}");
            let conf = stdin("invalid", name, &sandbox);
            let status = sandbox.unchanged(|| sandbox.call("STATUS", &status_of(&conf)).run().unwrap());
            if fault == Pod {
                silent(&status);
                return assert_eq!(full(&conf), Ok(()));
            }
            refused(&status, 50, parts);
            let msg = full(&conf).unwrap_err();
            assert!(parts.iter().all(|part| msg.contains(part)), "{msg}");
        },
    );
}

#[test]
fn what_is_shipped_is_minimal_and_in_order() {
    for (name, main) in SHIPPED {
        let (list, at) = read("", name);
        let plugins = list["plugins"].as_array().unwrap();
        assert_eq!(plugins[0]["type"], *main, "{name}");
        assert_eq!(at, plugins.len() - 1, "{name}: after every plugin that may still refuse the pod");
        let minimal = json!({ "type": "crosslink", "capabilities": { ANNOTATIONS: true } });
        assert_eq!(plugins[at], minimal, "{name}: keys that are not default only");
        let mut conf = plugins[at].clone();
        conf["name"] = list["name"].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        assert_eq!(full(&conf), Ok(()), "{name}");
    }
}

/// The list as it is shipped, but with files below the scenario's directory.
fn at_home(name: &str, clusters: &TwoClusters, site: &Site) -> Value {
    let (mut list, at) = read("", name);
    place(&mut list["plugins"][at], site);
    if let Some(dir) = list["plugins"][0].pointer_mut("/ipam/dataDir") {
        *dir = json!(clusters.state().join("ipam"));
    }
    list
}

/// A directory with `flannel` and `calico`; see [`STAND_IN`].
fn stand_ins(clusters: &TwoClusters) -> PathBuf {
    let dir = clusters.state().join("stand-ins");
    fs::create_dir_all(&dir).unwrap();
    let ptp = call::find("ptp", &cni_path()).unwrap();
    let ipam = clusters.state().join("ipam");
    let text = STAND_IN.replace("@DIR@", ipam.to_str().unwrap()).replace("@PTP@", ptp.to_str().unwrap());
    for name in ["flannel", "calico"] {
        fs::write(dir.join(name), &text).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

#[test]
fn what_is_shipped_runs() {
    let needed = ["bridge", "macvlan", "plugin:bridge", "plugin:ptp", "plugin:macvlan", "plugin:host-local"];
    if !needed.iter().chain(&["plugin:portmap", "plugin:bandwidth"]).all(|feature| require(feature)) {
        return;
    }
    let clusters = two_clusters(Options::default());
    for (name, _) in SHIPPED {
        println!("{name}");
        runs(name, &clusters, &clusters.a1);
    }
}

fn runs(name: &str, clusters: &TwoClusters, node: &Node) {
    let site = Site::new(clusters.state().join(name));
    site.cluster("cluster-b", &["172.111.0.0/16"], &["10.243.0.0/18"]);
    site.node(json!({ "clusterName": "cluster-a", "addresses": ["172.110.0.11"] }));
    let dirs = [bin_dirs(), vec![stand_ins(clusters)]].concat();
    let annotations = json!({ ANNOTATIONS: { "crosslink.dev/exclude-cidr": "10.243.0.0/19" } });
    let runner = clusters.runner_with(node, at_home(name, clusters, &site), dirs).capabilities(annotations);
    let pod = clusters.pod("pod");
    let attachment = Attachment::new(pod.name(), &pod, "eth0");
    let result = runner.add(&attachment).unwrap();
    assert_eq!(result["ips"].as_array().unwrap().len(), 1);
    let routes = pod.json("-4 route show proto 141");
    let found: BTreeSet<&str> = routes.as_array().unwrap().iter().map(|route| route["dst"].as_str().unwrap()).collect();
    // What the annotation left, since its capability is declared.
    let mut expected = BTreeSet::from(["10.243.32.0/19", "172.111.0.0/16"]);
    let underlay = name == "macvlan";
    if underlay {
        expected.insert("172.110.0.11");
    }
    assert_eq!(found, expected, "{name}");
    let dev = if underlay { "veth0" } else { "eth0" };
    assert!(routes.as_array().unwrap().iter().all(|route| route["dev"] == dev), "{routes}");
    if runner.cni_version() != "0.3.1" {
        runner.check(&attachment).unwrap();
        pod.ip("route del 172.111.0.0/16");
        let drift = runner.check(&attachment).unwrap_err();
        assert!(drift.code() == Some(104) && drift.msg().contains("172.111.0.0/16"), "{drift:?}");
    }
    runner.del(&attachment).unwrap();
    runner.del(&attachment.without_netns()).unwrap();
    assert!(site.records().is_empty());
    assert_eq!(pod.ip("-4 route show"), "", "{name}");
    assert_eq!(node.ip("-4 route show table all proto 141"), "", "{name}");
}

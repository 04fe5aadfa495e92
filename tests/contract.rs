//! The protocol: environment, standard input, and the shape of every answer, whatever a runtime hands over.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::print_stdout,
    reason = "tests"
)]

#[path = "support/sandbox.rs"]
mod sandbox;
mod support;

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, process::Command};

use crosslink_testkit::{Call, in_netns};
use sandbox::{Sandbox, failure, refused};
use serde_json::{Value, json};
use support::bin;

/// Standard inputs that no runtime should send, and that are no JSON object.
fn not_json() -> Vec<(&'static str, Vec<u8>)> {
    let long = |fill: u8| [&b"{\"a\":\""[..], &vec![fill; 17 << 20], b"\"}"].concat();
    vec![
        ("empty", Vec::new()),
        ("blank", b" \n\t ".to_vec()),
        ("a word", b"nonsense".to_vec()),
        ("a list", b"[]".to_vec()),
        ("null", b"null".to_vec()),
        ("a string", b"\"{}\"".to_vec()),
        ("a number", b"1e999".to_vec()),
        ("half an object", b"{\"cniVersion\":\"1.1.0\"".to_vec()),
        ("one bracket too many", b"{}}".to_vec()),
        ("two objects", b"{}\n{}".to_vec()),
        ("a comment", b"{} // done".to_vec()),
        ("a byte order mark", b"\xef\xbb\xbf{}".to_vec()),
        ("NUL bytes", vec![0; 4096]),
        ("NUL at the end", b"{}\0".to_vec()),
        ("not UTF-8", b"{\"cniVersion\":\"1.1.0\",\"name\":\"\xff\xfe\"}".to_vec()),
        ("UTF-16", b"{\0}\0".to_vec()),
        ("half a surrogate", b"{\"cniVersion\":\"1.1.0\",\"name\":\"\\ud800\"".to_vec()),
        ("17 MiB of spaces", vec![b' '; 17 << 20]),
        ("17 MiB in one string", long(b'x')),
        ("17 MiB of NUL", long(0)),
        ("100,000 brackets alone", vec![b'['; 100_000]),
    ]
}

/// 100,000 nested lists, closed.
fn deep() -> String {
    "[".repeat(100_000) + &"]".repeat(100_000)
}

#[test]
fn version_is_answered_whatever_standard_input_holds() {
    let mut inputs = not_json();
    inputs.push(("what libcni sends", br#"{"cniVersion":"1.0.0"}"#.to_vec()));
    inputs.push(("an unknown version", br#"{"cniVersion":"99.0.0"}"#.to_vec()));
    for (what, stdin) in inputs {
        let reply = Call { stdin, ..Call::new(bin(), "VERSION", &json!({})) }.run().unwrap();
        assert!(reply.ok() && reply.stderr.is_empty(), "{what}: {reply:?}");
        let expected =
            json!({"cniVersion": "1.1.0", "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]});
        assert_eq!(reply.json(), expected, "{what}");
    }
}

#[test]
fn without_a_command_it_tells_what_it_is() {
    for command in [None, Some(String::new())] {
        let mut call = Call::new(bin(), "", &json!({}));
        call.env.insert("CNI_COMMAND".into(), command);
        let reply = call.run().unwrap();
        assert!(reply.ok() && reply.stdout.is_empty(), "{reply:?}");
        for part in ["crosslink", "0.3.0", "1.1.0"] {
            assert!(reply.stderr.contains(part), "{reply:?}");
        }
    }
}

#[test]
fn unknown_commands_are_refused_by_name() {
    let sandbox = Sandbox::overlay();
    for command in ["add", "ADD ", "ADDD", "DELETE", "\u{1b}[31m", "..", "ADD\nDEL"] {
        let reply = sandbox.unchanged(|| sandbox.run(command, json!({})));
        refused(&reply, 4, &["CNI_COMMAND"]);
        assert_eq!(reply.stdout.lines().count(), 1, "{reply:?}");
    }
}

#[test]
fn missing_variables_are_named() {
    let sandbox = Sandbox::overlay();
    let needed: [(&str, &[&str]); 3] = [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ];
    for (command, names) in needed {
        for name in names {
            for value in [None, Some(String::new())] {
                let mut call = sandbox.call(command, &sandbox.conf(json!({})));
                call.env.insert((*name).into(), value);
                refused(&sandbox.unchanged(|| call.run().unwrap()), 4, &[name, command]);
            }
        }
        // All at once: all are named.
        let mut call = sandbox.call(command, &sandbox.conf(json!({})));
        call.env.extend(names.iter().map(|name| ((*name).into(), None)));
        refused(&sandbox.unchanged(|| call.run().unwrap()), 4, names);
    }
}

#[test]
fn gc_and_status_need_no_attachment() {
    let sandbox = Sandbox::overlay();
    for command in ["GC", "STATUS"] {
        let call = Call {
            container_id: String::new(),
            netns: String::new(),
            ifname: String::new(),
            args: String::new(),
            ..sandbox.call(command, &sandbox.conf(json!({})))
        };
        sandbox::silent(&sandbox.unchanged(|| call.run().unwrap()));
    }
}

#[test]
fn hostile_container_ids_are_refused() {
    let sandbox = Sandbox::overlay();
    let long = format!("a/{}", "b".repeat(100_000));
    let ids = [
        "..",
        ".",
        "../../etc/passwd",
        "a/b",
        "a b",
        "-a",
        "_a",
        "a:b",
        "a\nb",
        "a\u{1b}[2J",
        "ü",
        "a;b",
        "$(id)",
        &long,
    ];
    for id in ids {
        for command in ["ADD", "CHECK", "DEL"] {
            let call = Call { container_id: id.to_owned(), ..sandbox.call(command, &sandbox.conf(json!({}))) };
            let reply = sandbox.unchanged(|| call.run().unwrap());
            refused(&reply, 4, &["CNI_CONTAINERID"]);
            let msg = failure(&reply).msg;
            assert!(msg.len() < 300 && !msg.contains(['\n', '\u{1b}']), "{msg:?}");
        }
    }
}

#[test]
fn hostile_interface_names_are_refused() {
    let sandbox = Sandbox::overlay();
    let names = [
        "..",
        ".",
        "a/b",
        "../x",
        "a b",
        "a:b",
        "eth0\n",
        "\t",
        "\u{1b}[2J",
        "sixteen-letters-",
        "\u{a0}x",
        "ééééééééé",
    ];
    for ifname in names {
        for command in ["ADD", "CHECK", "DEL"] {
            let call = Call { ifname: ifname.to_owned(), ..sandbox.call(command, &sandbox.conf(json!({}))) };
            refused(&sandbox.unchanged(|| call.run().unwrap()), 4, &["CNI_IFNAME"]);
        }
    }
    // Good names of interfaces that are not there, or are no pod's interface.
    for ifname in ["eth1", "lo", "ü"] {
        let call = Call { ifname: ifname.to_owned(), ..sandbox.call("ADD", &sandbox.conf(json!({}))) };
        refused(&sandbox.unchanged(|| call.run().unwrap()), 101, &[ifname]);
    }
}

#[test]
fn variables_that_are_not_utf8_are_refused() {
    let sandbox = Sandbox::overlay();
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        let text = sandbox.conf(json!({})).to_string();
        let file = sandbox.scratch().join("conf");
        std::fs::write(&file, text).unwrap();
        let output = sandbox.unchanged(|| {
            in_netns(sandbox.node.path(), || {
                let mut command = Command::new(bin());
                command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", &sandbox.id);
                command.env("CNI_NETNS", sandbox.netns()).env("CNI_IFNAME", "eth0");
                command.env(name, OsStr::from_bytes(b"x\xff\xfe"));
                command.stdin(std::fs::File::open(&file).unwrap()).output().unwrap()
            })
        });
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        // The kernel takes such an interface name, so that one may also be told to be missing.
        let codes: &[u64] = if name == "CNI_IFNAME" { &[4, 101] } else { &[4] };
        assert!(codes.contains(&object["code"].as_u64().unwrap()), "{object}");
        assert!(["interface", name].iter().any(|thing| object["msg"].as_str().unwrap().contains(thing)), "{object}");
    }
}

#[test]
fn a_container_id_longer_than_a_file_name_is_no_panic() {
    let sandbox = Sandbox::overlay();
    let call = Call { container_id: "c".repeat(300), ..sandbox.call("ADD", &sandbox.conf(json!({}))) };
    let reply = call.run().unwrap();
    // No record can be kept; with failPolicy open that is a finding.
    assert!(reply.ok() && reply.stderr.contains("XL-STATE"), "{reply:?}");
    let del = Call { command: "DEL".into(), ..call };
    sandbox::silent(&del.run().unwrap());
    assert!(sandbox.routes().is_empty());
}

#[test]
fn input_that_is_no_json_object_is_one_error_object() {
    let sandbox = Sandbox::overlay();
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        for (what, stdin) in not_json() {
            let reply = sandbox.unchanged(|| sandbox.run_bytes(command, &stdin));
            println!("{command} {what}: {}", reply.stdout);
            refused(&reply, 6, &[]);
            assert!(failure(&reply).msg.len() < 400, "{reply:?}");
        }
    }
}

#[test]
fn deep_nesting_is_no_stack_overflow() {
    let sandbox = Sandbox::overlay();
    let result = sandbox.result().to_string();
    let in_result = format!("{},\"x\":{}}}", result.strip_suffix('}').unwrap(), deep());
    let inputs = [
        ("unknown key", sandbox.conf_text("somebody-elses", &deep())),
        ("prevResult's own", sandbox.conf_text("prevResult", &deep())),
        ("key of prevResult", sandbox.conf_text("prevResult", &in_result)),
        ("ips", sandbox.conf_text("prevResult", &format!("{{\"ips\":{}}}", deep()))),
        ("runtimeConfig", sandbox.conf_text("runtimeConfig", &deep())),
        ("annotations", sandbox.conf_text("runtimeConfig", &format!("{{\"{}\":{}}}", sandbox::ANNOTATIONS, deep()))),
        ("foreign capability", sandbox.conf_text("runtimeConfig", &format!("{{\"ips\":{}}}", deep()))),
        ("args", sandbox.conf_text("args", &deep())),
        ("hijack", sandbox.conf_text("hijack", &deep())),
        ("cniVersion", sandbox.conf_text("cniVersion", &deep())),
        ("valid attachments", sandbox.conf_text("cni.dev/valid-attachments", &deep())),
    ];
    for (what, stdin) in &inputs {
        for command in ["ADD", "CHECK", "GC", "STATUS", "DEL"] {
            let reply = sandbox.run_bytes(command, stdin);
            println!("{command} {what}: {:?} {}", reply.exit, reply.stdout.get(..300).unwrap_or(&reply.stdout));
            match (reply.ok(), command) {
                (true, "ADD") => assert!(reply.stdout.starts_with('{') && reply.stdout.ends_with('}')),
                (true, _) => assert_eq!(reply.stdout, ""),
                (false, _) => drop(failure(&reply)),
            }
        }
    }
    assert!(sandbox.routes().is_empty() && sandbox.site.records().is_empty());
}

/// Damages an input in a way that depends on `seed` alone.
fn damage(text: &[u8], mut seed: u64) -> Vec<u8> {
    let mut bytes = text.to_vec();
    let mut next = |below: usize| {
        // Numerical Recipes' generator; the low bits are the weak ones.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..=next(3) {
        let at = next(bytes.len());
        let odd = b"\"\\{}[],:-0e9nt\0\xff ";
        match next(4) {
            0 => bytes.truncate(at.max(1)),
            1 => bytes[at] = odd[next(odd.len())],
            2 => bytes.insert(at, odd[next(odd.len())]),
            _ => drop(bytes.remove(at)),
        }
        if bytes.len() < 2 {
            break;
        }
    }
    bytes
}

#[test]
fn damaged_input_never_panics() {
    let sandbox = Sandbox::overlay();
    let annotations =
        json!({"crosslink.dev/hijack": "cluster-b", "crosslink.dev/hijack-cidr": "10.1.0.0/16, fd12::/32"});
    let mut conf = sandbox.conf(sandbox::annotated(annotations));
    conf["args"] = json!({"cni": {"exclude-cidr": "10.1.1.0/24"}});
    conf["hijackCIDR"] = json!(["10.2.0.0/16"]);
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "a", "ifname": "eth0"}]);
    // No damage may lead to the machine's own paths: a wrong letter in one of them is another path.
    conf["logFile"] = json!("");
    let text = conf.to_string().into_bytes();
    let commands = ["ADD", "CHECK", "GC", "STATUS", "DEL"];
    for seed in 0..400_u64 {
        let stdin = damage(&text, seed);
        let command = commands[usize::try_from(seed).unwrap() % commands.len()];
        let reply = sandbox.run_bytes(command, &stdin);
        let shown = String::from_utf8_lossy(&stdin);
        assert!(!reply.stderr.contains("panicked"), "seed {seed}: {reply:?} {shown}");
        match (reply.ok(), command) {
            (true, "ADD") => assert!(reply.json().is_object(), "seed {seed}: {shown}"),
            (true, _) => assert_eq!(reply.stdout, "", "seed {seed}: {shown}"),
            (false, _) => drop(failure(&reply)),
        }
    }
}

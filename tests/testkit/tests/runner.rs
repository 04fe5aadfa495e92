//! The runner calls plugins as libcni does: shell scripts in place of plugins write down what they were given.
#![expect(clippy::unwrap_used, clippy::panic, reason = "test support")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crosslink_testkit::runner::{Attachment, CniFailure, GcArg, Runner};
use crosslink_testkit::{Call, Netns};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Writes its name, environment and stdin as one file per call, numbered in the order of the calls.
const SPY: &str = r#"#!/bin/sh
dir=$(dirname "$0"); me=$(basename "$0")
n=$(ls "$dir" | grep -c '^call-')
{ echo "$me"; env | grep '^CNI_' | sort; } > "$dir/call-$n.env"
cat > "$dir/stdin-$n"
if [ -f "$dir/fail-$me-$CNI_COMMAND" ]; then
    echo '{"cniVersion":"1.0.0","code":7,"msg":"refused","details":"by order"}'; exit 1
fi
[ "$CNI_COMMAND" = ADD ] && echo "{\"ips\":[],\"by\":\"$me\"}"
[ "$CNI_COMMAND" = VERSION ] && echo '{"cniVersion":"1.1.0","supportedVersions":["1.1.0"]}'
exit 0
"#;

struct Spies {
    dir: TempDir,
    pod: Netns,
}

struct Seen {
    who: String,
    env: String,
    stdin: Value,
}

impl Spies {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            script(&dir.path().join(name), SPY);
        }
        Self { dir, pod: Netns::create("spied") }
    }

    fn runner(&self, version: &str) -> Runner {
        let capable = json!({ "type": "one", "capabilities": { "portMappings": true, "ips": false, "mac": true } });
        let list = json!({ "cniVersion": version, "name": "net", "plugins": [capable, { "type": "two" }] });
        self.runner_of(list)
    }

    fn runner_of(&self, conflist: Value) -> Runner {
        Runner::new(conflist, vec![self.dir.path().to_owned()], self.dir.path().join("cache"))
    }

    fn attachment(&self, id: &str) -> Attachment {
        Attachment::new(id, &self.pod, "eth0")
    }

    fn fail(&self, plugin: &str, command: &str) {
        fs::write(self.dir.path().join(format!("fail-{plugin}-{command}")), "").unwrap();
    }

    /// The calls since the last look.
    fn seen(&self) -> Vec<Seen> {
        let mut calls = Vec::new();
        for n in 0.. {
            let file = self.dir.path().join(format!("call-{n}.env"));
            let Ok(env) = fs::read_to_string(&file) else { break };
            let stdin = fs::read_to_string(self.dir.path().join(format!("stdin-{n}"))).unwrap();
            let (who, env) = env.split_once('\n').unwrap();
            calls.push(Seen {
                who: who.to_owned(),
                env: env.to_owned(),
                stdin: serde_json::from_str(&stdin).unwrap_or_else(|error| panic!("{error}: {stdin}")),
            });
            fs::remove_file(file).unwrap();
        }
        calls
    }
}

fn script(file: &Path, text: &str) {
    fs::write(file, text).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
}

fn order(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(|call| call.who.as_str()).collect()
}

#[test]
fn add_goes_in_order_and_hands_the_result_on() {
    let spies = Spies::new();
    let runner = spies.runner("1.0.0").cni_args("IgnoreUnknown=1;K8S_POD_NAME=p");
    let attachment = spies.attachment("c1");
    let result = runner.add(&attachment).unwrap();
    assert_eq!(result, json!({ "cniVersion": "1.0.0", "ips": [], "by": "two" }));
    let seen = spies.seen();
    assert_eq!(order(&seen), ["one", "two"]);
    let expected = format!(
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=p\nCNI_COMMAND=ADD\nCNI_CONTAINERID=c1\nCNI_IFNAME=eth0\n\
         CNI_NETNS={}\nCNI_PATH={}\n",
        spies.pod.path().display(),
        spies.dir.path().display()
    );
    assert_eq!(seen[0].env, expected);
    let stdin = &seen[0].stdin;
    assert_eq!((&stdin["name"], &stdin["cniVersion"], &stdin["type"]), (&json!("net"), &json!("1.0.0"), &json!("one")));
    assert!(stdin.get("prevResult").is_none());
    assert_eq!(seen[1].stdin["prevResult"], json!({ "cniVersion": "1.0.0", "ips": [], "by": "one" }));
    assert_eq!(runner.cached(&attachment), Some(result));
}

#[test]
fn del_is_reversed_and_forgets_the_result_when_all_succeed() {
    let spies = Spies::new();
    let runner = spies.runner("0.4.0");
    let attachment = spies.attachment("c1");
    let result = runner.add(&attachment).unwrap();
    spies.seen();
    spies.fail("one", "DEL");
    let failure = runner.del(&attachment).unwrap_err();
    assert_eq!((failure.plugin.as_str(), failure.exit, failure.code()), ("one", Some(1), Some(7)));
    assert_eq!(failure.msg(), "refused; by order");
    assert_eq!(runner.cached(&attachment), Some(result.clone()));
    fs::remove_file(spies.dir.path().join("fail-one-DEL")).unwrap();
    runner.del(&attachment).unwrap();
    assert_eq!(runner.cached(&attachment), None);
    runner.del(&attachment.without_netns()).unwrap();
    let seen = spies.seen();
    assert_eq!(order(&seen), ["two", "one", "two", "one", "two", "one"]);
    assert!(seen[..4].iter().all(|call| call.stdin["prevResult"] == result));
    assert!(seen[4..].iter().all(|call| call.stdin.get("prevResult").is_none() && call.env.contains("CNI_NETNS=\n")));
}

#[test]
fn a_failed_add_stops_the_chain_and_caches_nothing() {
    let spies = Spies::new();
    spies.fail("one", "ADD");
    let runner = spies.runner("1.0.0");
    let failure: CniFailure = runner.add(&spies.attachment("c1")).unwrap_err();
    assert_eq!(failure.code(), Some(7));
    assert_eq!(order(&spies.seen()), ["one"]);
    assert_eq!(runner.cached(&spies.attachment("c1")), None);
}

#[test]
fn capabilities_reach_only_the_plugins_that_declare_them() {
    let spies = Spies::new();
    let given = json!({ "portMappings": [{ "hostPort": 1 }], "ips": ["1.2.3.4"], "dns": {} });
    spies.runner("1.0.0").capabilities(given).add(&spies.attachment("c1")).unwrap();
    let seen = spies.seen();
    assert_eq!(seen[0].stdin["runtimeConfig"], json!({ "portMappings": [{ "hostPort": 1 }] }));
    assert_eq!(seen[0].stdin["capabilities"]["portMappings"], json!(true), "libcni leaves it in");
    assert!(seen[1].stdin.get("runtimeConfig").is_none());
}

#[test]
fn check_needs_0_4_0_and_can_be_disabled() {
    let spies = Spies::new();
    let attachment = spies.attachment("c1");
    let old = spies.runner("0.3.1");
    old.add(&attachment).unwrap();
    spies.seen();
    assert_eq!(old.check(&attachment).unwrap_err().plugin, "runtime");
    old.del(&attachment).unwrap();
    assert!(spies.seen().iter().all(|call| call.stdin.get("prevResult").is_none()), "no prevResult on an old DEL");
    let runner = spies.runner("0.4.0");
    let result = runner.add(&attachment).unwrap();
    spies.seen();
    runner.check(&attachment).unwrap();
    let seen = spies.seen();
    assert_eq!(order(&seen), ["one", "two"]);
    assert!(seen.iter().all(|call| call.stdin["prevResult"] == result));
    let list = json!({ "cniVersion": "1.0.0", "name": "net", "disableCheck": true, "plugins": [{ "type": "one" }] });
    spies.runner_of(list).check(&attachment).unwrap();
    assert!(spies.seen().is_empty());
}

#[test]
fn gc_deletes_stale_attachments_and_gives_the_list_twice() {
    let spies = Spies::new();
    let runner = spies.runner("1.1.0");
    runner.add(&spies.attachment("kept")).unwrap();
    runner.add(&spies.attachment("stale")).unwrap();
    spies.seen();
    runner.gc(&GcArg::List(vec![("kept".to_owned(), "eth0".to_owned())])).unwrap();
    let seen = spies.seen();
    assert_eq!(order(&seen), ["two", "one", "one", "two"]);
    assert!(seen[..2].iter().all(|call| call.env.contains("CNI_COMMAND=DEL\nCNI_CONTAINERID=stale\n")));
    let valid = json!([{ "containerID": "kept", "ifname": "eth0" }]);
    assert_eq!(seen[2].stdin["cni.dev/valid-attachments"], valid);
    assert_eq!(seen[2].stdin["cni.dev/attachments"], valid);
    assert!(
        seen[2].env.starts_with("CNI_ARGS=\nCNI_COMMAND=GC\nCNI_CONTAINERID=\nCNI_IFNAME=\nCNI_NETNS=\nCNI_PATH=/")
    );
    assert!(runner.cached(&spies.attachment("kept")).is_some());
    runner.forget(&spies.attachment("kept"));
    runner.gc(&GcArg::Null).unwrap();
    assert_eq!(spies.seen()[0].stdin.get("cni.dev/attachments"), Some(&Value::Null));
    spies.fail("one", "GC");
    assert_eq!(runner.gc(&GcArg::Missing).unwrap_err().len(), 1);
    let seen = spies.seen();
    assert_eq!(order(&seen), ["one", "two"], "one failure does not stop the rest");
    assert!(seen[0].stdin.get("cni.dev/attachments").is_none());
}

#[test]
fn status_version_and_negotiation() {
    let spies = Spies::new();
    spies.runner("1.0.0").status().unwrap();
    assert!(spies.seen().is_empty(), "no STATUS below 1.1.0");
    let versions = json!(["0.4.0", "1.1.0", "1.2.0"]);
    let list = json!({ "cniVersion": "1.0.0", "cniVersions": versions, "name": "n", "plugins": [{ "type": "one" }] });
    let runner = spies.runner_of(list);
    assert_eq!(runner.cni_version(), "1.1.0");
    runner.status().unwrap();
    assert_eq!(spies.seen()[0].stdin, json!({ "cniVersion": "1.1.0", "name": "n", "type": "one" }));
    assert_eq!(runner.version("two").unwrap()["supportedVersions"], json!(["1.1.0"]));
    assert!(runner.version("three").unwrap_err().msg().contains("failed to find plugin"));
}

#[test]
fn a_plugin_runs_on_its_node_and_a_call_decides_every_input() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("where");
    script(&bin, "#!/bin/sh\nreadlink /proc/self/ns/net; echo \"${CNI_ARGS-unset} $EXTRA\" >&2; exit 4\n");
    let node = Netns::create("node");
    let mut call = Call::new(&bin, "ADD", &json!({}));
    call.node = Some(node.path().to_owned());
    call.env.insert("CNI_ARGS".to_owned(), None);
    call.env.insert("EXTRA".to_owned(), Some("more".to_owned()));
    let reply = call.run().unwrap();
    assert_eq!((reply.exit, reply.stderr.as_str()), (Some(4), "unset more\n"));
    let expected = node.exec(&["readlink", "/proc/self/ns/net"]);
    assert_eq!(reply.stdout.as_bytes(), expected.stdout);
    call.stdout = Some("/dev/full".into());
    assert_eq!(call.run().unwrap().stdout, "");
}

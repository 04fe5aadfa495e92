//! Which file of the directory is the main CNI's, as container runtimes see it.

use serde_json::value::RawValue;

use super::parse::{List, Single, member};

/// Extensions that runtimes load (go-cni and ocicni: `libcni.ConfFiles(dir, {".conf", ".conflist", ".json"})`).
const EXTENSIONS: [&str; 3] = [".conf", ".conflist", ".json"];

/// Types of Multus, which calls other networks itself.
const MULTUS: [&str; 2] = ["multus", "multus-shim"];

/// Name of our file in the directory of a network. libcni 1.3 reads `.conf` there, in order of their names.
pub const DROPIN_FILE: &str = "90-crosslink.conf";

/// A file of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its content, or why it must not be touched or cannot be read.
    pub content: Result<String, String>,
}

/// The main CNI's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// None so far.
    Nothing(String),
    /// There is one, but it cannot be used. containerd does without a network then and CRI-O takes the next; an edit of
    /// the next would be lost as soon as this one is mended.
    Invalid {
        /// File name.
        name: String,
        /// In words.
        why: String,
    },
    /// A list.
    List {
        /// File name.
        name: String,
        /// Whether Multus stands before it and calls it.
        by_multus: bool,
    },
    /// A single plugin.
    Single {
        /// File name.
        name: String,
        /// Whether Multus stands before it and calls it.
        by_multus: bool,
    },
}

/// Whether runtimes load a file of that name. Go takes `.conf` alone for an extension too.
fn loaded(name: &str) -> bool {
    EXTENSIONS.iter().any(|extension| name.ends_with(extension))
}

/// Whether the file may be the main CNI's. Hidden files are left out, since they are what writers prepare or put aside.
pub fn is_candidate(name: &str) -> bool {
    loaded(name) && !name.starts_with('.')
}

/// The name that a runtime loads, of the directory's names: the first by bytes, hidden or not.
pub fn chosen_by_runtime<'n>(names: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    names.into_iter().filter(|name| loaded(name)).min()
}

/// The main CNI's file among the candidates: the pinned one, else the first, as runtimes do; the one that Multus names
/// where that is Multus.
pub fn choose(candidates: &[Candidate], pin: Option<&str>) -> Choice {
    let first = candidates.iter().filter(|file| is_candidate(&file.name)).min_by(|a, b| a.name.cmp(&b.name));
    let file = match pin {
        None => first,
        Some(pin) => find(candidates, pin).or_else(|| find(candidates, &sibling(pin)?)),
    };
    match (file, pin) {
        (Some(file), _) => shape(file, candidates, true),
        (None, Some(pin)) => Choice::Nothing(format!("there is no {pin} yet")),
        (None, None) => Choice::Nothing("there is no .conflist, .conf or .json yet".to_owned()),
    }
}

fn find<'c>(candidates: &'c [Candidate], name: &str) -> Option<&'c Candidate> {
    candidates.iter().find(|file| file.name == name)
}

/// A pinned `.conf` that was converted since is the `.conflist` of the same name.
fn sibling(name: &str) -> Option<String> {
    name.strip_suffix(".conf").map(|stem| format!("{stem}.conflist"))
}

/// What a file is. Through Multus one goes once.
fn shape(file: &Candidate, candidates: &[Candidate], top: bool) -> Choice {
    let invalid = |why: String| Choice::Invalid { name: file.name.clone(), why };
    let text = match &file.content {
        Ok(text) => text,
        Err(why) => return invalid(why.clone()),
    };
    let parsed = if file.name.ends_with(".conflist") {
        List::parse(text).map(|list| (true, list.plugins.first().map(|plugin| (plugin.kind.clone(), plugin.raw))))
    } else {
        Single::parse(text).map(|single| (false, Some((single.kind, single.text))))
    };
    match parsed {
        Err(why) => invalid(why),
        Ok((_, Some((kind, raw)))) if MULTUS.contains(&kind.as_str()) => {
            let named = delegate(raw);
            match named.as_ref().filter(|_| top).and_then(|named| delegated(named, file, candidates)) {
                Some(file) => shape(file, candidates, false),
                None => invalid(unreachable_delegate(named.as_ref())),
            }
        }
        Ok((true, _)) => Choice::List { name: file.name.clone(), by_multus: !top },
        Ok((false, _)) => Choice::Single { name: file.name.clone(), by_multus: !top },
    }
}

fn unreachable_delegate(named: Option<&Delegate>) -> String {
    let named = named.map_or("names no network".to_owned(), |named| format!("calls {}", named.name));
    format!(
        "it is Multus and {named}, which is no file of this directory: set cniConfDir or cniConfName to that network's conflist"
    )
}

/// The network that Multus calls for every pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delegate {
    /// Name of a network, of a file, or a path.
    pub name: String,
}

/// The network that a Multus configuration calls for every pod: `clusterNetwork`, else the first of `delegates`.
pub fn delegate(multus: &str) -> Option<Delegate> {
    let string = |text: &str| serde_json::from_str::<String>(text).ok().filter(|text| !text.is_empty());
    let first = || {
        let delegates: Vec<&RawValue> = serde_json::from_str(member(multus, "delegates")?).ok()?;
        member(delegates.first()?.get(), "name").and_then(string)
    };
    let name = member(multus, "clusterNetwork").and_then(string).or_else(first)?;
    Some(Delegate { name })
}

fn delegated<'c>(named: &Delegate, multus: &Candidate, candidates: &'c [Candidate]) -> Option<&'c Candidate> {
    let file_name = named.name.rsplit('/').next().unwrap_or_default();
    let mut others: Vec<&Candidate> =
        candidates.iter().filter(|file| is_candidate(&file.name) && file.name != multus.name).collect();
    others.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let by_file = others.iter().find(|file| file.name == file_name);
    let network = |file: &Candidate| {
        let text = file.content.as_ref().ok()?;
        serde_json::from_str::<String>(member(text, "name")?).ok()
    };
    by_file.or_else(|| others.iter().find(|file| network(file).as_deref() == Some(named.name.as_str()))).copied()
}

/// Names that Cilium gave to the files of others (`cni.exclusive`, its default).
pub fn taken_away<'n>(names: impl IntoIterator<Item = &'n str>) -> Vec<&'n str> {
    names.into_iter().filter(|name| name.ends_with(".cilium_bak")).collect()
}

/// Parts of file names, and who writes such files.
const WRITERS: [(&str, &str); 16] = [
    ("cilium", "Cilium"),
    ("calico", "Calico"),
    ("canal", "Canal"),
    ("flannel", "Flannel"),
    ("kindnet", "kindnet"),
    ("kuberouter", "kube-router"),
    ("aws", "the AWS VPC CNI"),
    ("azure", "the Azure CNI"),
    ("gke", "GKE's netd"),
    ("antrea", "Antrea"),
    ("ovn", "OVN-Kubernetes"),
    ("weave", "Weave Net"),
    ("multus", "Multus"),
    ("istio", "Istio"),
    ("linkerd", "Linkerd"),
    ("spiderpool", "Spiderpool"),
];

/// Who probably writes a file of that name.
pub fn writer(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    WRITERS.iter().find(|(part, _)| name.contains(part)).map(|(_, writer)| *writer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"name":"pods","plugins":[{"type":"ptp"}]}"#;
    const CONF: &str = r#"{"name":"single","type":"bridge"}"#;

    fn files(files: &[(&str, &str)]) -> Vec<Candidate> {
        files.iter().map(|(name, text)| Candidate { name: (*name).into(), content: Ok((*text).into()) }).collect()
    }

    fn list(name: &str) -> Choice {
        Choice::List { name: name.into(), by_multus: false }
    }

    #[test]
    fn the_first_by_name_counts_and_no_other() {
        let both = files(&[("20-b.conflist", LIST), ("10-a.conflist", LIST), ("05.conflist.cilium_bak", "")]);
        assert_eq!(choose(&both, None), list("10-a.conflist"));
        let upper = files(&[("a.conflist", LIST), ("Z.conf", CONF)]);
        assert_eq!(choose(&upper, None), Choice::Single { name: "Z.conf".into(), by_multus: false });
        let broken = files(&[("20-b.conflist", LIST), ("10-a.conflist", "{")]);
        assert!(matches!(choose(&broken, None), Choice::Invalid { name, .. } if name == "10-a.conflist"));
        // A list under a name of single plugins is none to libcni.
        assert!(matches!(choose(&files(&[("a.json", LIST)]), None), Choice::Invalid { .. }));
    }

    #[test]
    fn what_runtimes_do_not_load_does_not_count() {
        let names =
            [".10.conflist.tmp", "10.conflist.temp", "10.conf.bak", "README", "calico-kubeconfig", "x.conflist~"];
        let nothing: Vec<Candidate> = files(&names.map(|name| (name, LIST)));
        assert!(matches!(choose(&nothing, None), Choice::Nothing(_)));
        assert!(matches!(choose(&files(&[(".hidden.conflist", LIST)]), None), Choice::Nothing(_)));
        assert_eq!(chosen_by_runtime(["10.conf", ".hidden.conflist"]), Some(".hidden.conflist"));
        assert_eq!(chosen_by_runtime(names), None);
    }

    #[test]
    fn a_pin_wins_and_waits() {
        let both = files(&[("20-b.conflist", LIST), ("10-a.conflist", LIST)]);
        assert_eq!(choose(&both, Some("20-b.conflist")), list("20-b.conflist"));
        assert!(matches!(choose(&both, Some("30.conflist")), Choice::Nothing(why) if why.contains("30.conflist")));
        assert_eq!(choose(&both, Some("20-b.conf")), list("20-b.conflist"));
    }

    #[test]
    fn through_multus_to_the_file_that_it_names() {
        for multus in [
            r#"{"name":"m","type":"multus-shim","clusterNetwork":"/host/etc/cni/net.d/10-a.conflist"}"#,
            r#"{"name":"m","type":"multus","clusterNetwork":"pods"}"#,
            r#"{"name":"m","type":"multus","delegates":[{"name":"pods","plugins":[{"type":"ptp"}]}]}"#,
        ] {
            let both = files(&[("00-multus.conf", multus), ("10-a.conflist", LIST), ("20.conf", CONF)]);
            assert_eq!(choose(&both, None), Choice::List { name: "10-a.conflist".into(), by_multus: true }, "{multus}");
        }
        for multus in [
            r#"{"name":"m","type":"multus","clusterNetwork":"elsewhere"}"#,
            r#"{"name":"m","type":"multus","clusterNetwork":"m"}"#,
            r#"{"name":"m","type":"multus"}"#,
        ] {
            let both = files(&[("00-multus.conf", multus), ("10-a.conflist", LIST)]);
            assert!(matches!(choose(&both, None), Choice::Invalid { why, .. } if why.contains("Multus")), "{multus}");
        }
        let listed = r#"{"name":"m","plugins":[{"type":"multus","clusterNetwork":"pods"}]}"#;
        let both = files(&[("00-multus.conflist", listed), ("10-a.conflist", LIST)]);
        assert_eq!(choose(&both, None), Choice::List { name: "10-a.conflist".into(), by_multus: true });
    }

    #[test]
    fn writers() {
        assert_eq!(writer("05-cilium.conflist"), Some("Cilium"));
        assert_eq!(writer("10-calico.conflist"), Some("Calico"));
        assert_eq!(writer("net.conflist"), None);
        assert_eq!(taken_away(["a", "10-kindnet.conflist.cilium_bak"]), ["10-kindnet.conflist.cilium_bak"]);
    }
}

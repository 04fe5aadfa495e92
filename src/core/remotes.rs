//! Remotes files: what is remote, according to each source, and the merge of all of them.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    cidr,
    error::quoted,
    finding::{Finding, Id},
    json::Object,
    numbers::{SHORTEST_V4, SHORTEST_V6},
    select::valid_cluster,
};

/// Highest `version` of a remotes file and of `node.json` that we read.
pub const VERSION: u64 = 1;

/// Sources in the order in which they win a CIDR that two clusters claim.
const SOURCES: [&str; 6] = ["static", "cluster", "submariner", "kosmos", "calico", "kernel"];

/// Bounds of a path MTU in bytes: RFC 791 asks every host to take 576, and RTAX_MTU beyond 65535 means nothing.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 576..=65535;

#[derive(Deserialize)]
struct RawFile {
    version: u64,
    #[serde(default)]
    source: String,
    #[serde(default)]
    clusters: Option<Vec<Object<RawCluster>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawCluster {
    name: String,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    #[serde(default, rename = "serviceCIDRs")]
    service_cidrs: Option<Vec<String>>,
    #[serde(default)]
    mtu: Option<u32>,
}

/// A valid remotes file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemotesFile {
    /// File name, for messages.
    pub file: String,
    /// Who wrote it: `static`, `cluster`, `submariner`, `kosmos`, `calico`, `kernel`.
    pub source: String,
    /// Its clusters.
    pub clusters: Vec<RemoteCluster>,
}

/// A cluster as one file tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteCluster {
    /// Name.
    pub name: String,
    /// Pod and service CIDRs.
    pub cidrs: Vec<IpNet>,
    /// Path MTU towards it, bytes.
    pub mtu: Option<u32>,
}

/// Parses one file. Unknown fields are ignored.
///
/// # Errors
/// A sentence that names the entry, the value and the cure.
pub fn parse(file: &str, text: &str) -> Result<RemotesFile, String> {
    let Object(raw): Object<RawFile> = serde_json::from_str(text).map_err(|err| err.to_string())?;
    if raw.version == 0 || raw.version > VERSION {
        return Err(format!("version {} is not known to this plugin (it reads {VERSION}): upgrade it", raw.version));
    }
    let clusters = raw.clusters.unwrap_or_default().into_iter().map(cluster).collect::<Result<_, _>>()?;
    Ok(RemotesFile { file: file.to_owned(), source: raw.source, clusters })
}

fn cluster(Object(raw): Object<RawCluster>) -> Result<RemoteCluster, String> {
    check(&raw.name, raw.mtu)?;
    let texts = raw.pod_cidrs.into_iter().flatten().chain(raw.service_cidrs.into_iter().flatten());
    let cidrs = texts
        .map(|text| cidr::parse(&text).map_err(|err| format!("cluster {}: {err}", raw.name)))
        .collect::<Result<_, _>>()?;
    Ok(RemoteCluster { name: raw.name, cidrs, mtu: raw.mtu.filter(|mtu| *mtu != 0) })
}

/// Who the agent says wrote a remotes file; a file without it is somebody's own.
pub const WRITER: &str = "crosslink-agent";

/// A cluster as the writer of a remotes file tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// Name; see [`valid_cluster`].
    pub name: String,
    /// CIDRs of its pods.
    #[serde(default, rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNet>,
    /// CIDRs of its services.
    #[serde(default, rename = "serviceCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub service_cidrs: Vec<IpNet>,
    /// Path MTU towards it, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Where the source has it from, where that is worth keeping. Readers ignore it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

impl Told {
    /// Whether it names no CIDR.
    pub fn is_empty(&self) -> bool {
        self.pod_cidrs.is_empty() && self.service_cidrs.is_empty()
    }
}

/// Whether a path MTU may stand in a remotes file.
pub fn valid_mtu(mtu: u32) -> bool {
    MTU_RANGE.contains(&mtu)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Head<'a> {
    version: u64,
    source: &'a str,
    written_by: &'a str,
    generation: u64,
}

/// The text of a remotes file of the agent: what [`parse`] reads, one cluster a line, so that people can compare two.
///
/// # Errors
/// [`parse`] would refuse it.
pub fn render<T: Borrow<Told>>(source: &str, generation: u64, clusters: &[T]) -> Result<String, String> {
    let head = Head { version: VERSION, source, written_by: WRITER, generation };
    let mut text = serde_json::to_string(&head).map_err(|err| err.to_string())?;
    text.pop();
    text.push_str(",\n\"clusters\":[");
    for (place, cluster) in clusters.iter().enumerate() {
        let cluster: &Told = cluster.borrow();
        check(&cluster.name, cluster.mtu)?;
        text.push_str(if place == 0 { "\n" } else { ",\n" });
        text.push_str(&serde_json::to_string(cluster).map_err(|err| err.to_string())?);
    }
    text.push_str("\n]}\n");
    Ok(text)
}

/// What a cluster must keep besides having CIDRs.
fn check(name: &str, mtu: Option<u32>) -> Result<(), String> {
    if !valid_cluster(name) {
        return Err(format!("cluster name {} is not an RFC 1123 label: rename it", quoted(name)));
    }
    match mtu.filter(|mtu| *mtu != 0 && !valid_mtu(*mtu)) {
        Some(mtu) => Err(format!("cluster {name}: mtu {mtu} is not within 576 to 65535")),
        None => Ok(()),
    }
}

/// What the agent keeps in a remotes file of its own besides what [`parse`] reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Kept {
    /// Who wrote it; see [`WRITER`].
    pub written_by: String,
    /// Rises with every change.
    pub generation: u64,
    /// Its clusters.
    pub clusters: Vec<Told>,
}

/// Reads back what [`render`] wrote; nothing where it is somebody else's file or none at all.
pub fn kept(text: &str) -> Option<Kept> {
    serde_json::from_str(text).ok().filter(|kept: &Kept| kept.written_by == WRITER)
}

/// The generation of what [`render`] wrote; nothing where it is somebody else's file or none at all.
pub fn kept_generation(text: &str) -> Option<u64> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Mark {
        written_by: String,
        generation: u64,
    }
    serde_json::from_str(text).ok().filter(|mark: &Mark| mark.written_by == WRITER).map(|mark| mark.generation)
}

/// A cluster after merging.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// Each CIDR with the sources that name it; CIDRs of the same sources share the set.
    pub cidrs: BTreeMap<IpNet, Arc<BTreeSet<String>>>,
    /// Smallest MTU that a file states, bytes.
    pub mtu: Option<u32>,
}

/// All remotes files as one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Clusters by name.
    pub clusters: BTreeMap<String, Cluster>,
    /// What was refused or contested.
    pub findings: Vec<Finding>,
}

/// Merges files: one name is one cluster; one CIDR belongs to one cluster; the own cluster is never remote.
pub fn merge(files: &[RemotesFile], own: Option<&str>) -> Merged {
    let mut merged = Merged::default();
    let mut claims: Vec<Claim<'_>> = Vec::new();
    for file in files {
        let alone = Arc::new(BTreeSet::from([file.source.clone()]));
        let rank = SOURCES.iter().position(|source| *source == file.source).unwrap_or(SOURCES.len());
        for cluster in &file.clusters {
            if own == Some(cluster.name.as_str()) {
                let text = format!("{}: cluster {} is this node's own", file.file, cluster.name);
                merged.findings.push(Finding::new(Id::OwnCluster, text));
                continue;
            }
            let known = merged.clusters.entry(cluster.name.clone()).or_default();
            known.mtu = known.mtu.into_iter().chain(cluster.mtu).min();
            for net in &cluster.cidrs {
                if let Some(finding) = too_wide(net, &cluster.name, &file.file) {
                    merged.findings.push(finding);
                    continue;
                }
                let sources = known.cidrs.entry(*net).or_insert_with(|| Arc::clone(&alone));
                if !sources.contains(&file.source) {
                    Arc::make_mut(sources).insert(file.source.clone());
                }
                claims.push((*net, rank, &cluster.name));
            }
        }
    }
    settle(claims, &mut merged);
    merged
}

fn too_wide(net: &IpNet, cluster: &str, file: &str) -> Option<Finding> {
    let shortest = match net {
        IpNet::V4(_) => SHORTEST_V4,
        IpNet::V6(_) => SHORTEST_V6,
    };
    (net.prefix_len() < shortest)
        .then(|| Finding::new(Id::CidrWide, format!("{net} of cluster {cluster} ({file}) is shorter than /{shortest}")))
}

/// A CIDR, the rank of the source, and the cluster that claims it.
type Claim<'a> = (IpNet, usize, &'a str);

/// Leaves each CIDR only with the first of the clusters that claim it.
fn settle(mut claims: Vec<Claim<'_>>, merged: &mut Merged) {
    claims.sort_unstable();
    for same in claims.chunk_by(|(one, ..), (next, ..)| one == next) {
        let Some((net, ..)) = same.first() else { continue };
        let mut names: Vec<&str> = Vec::new();
        for (_, _, name) in same {
            if !names.contains(name) {
                names.push(name);
            }
        }
        let Some((winner, losers)) = names.split_first() else { continue };
        for loser in losers {
            let text = format!("{net} is claimed by clusters {winner} and {loser}; {winner} has it");
            merged.findings.push(Finding::new(Id::CidrTwice, text));
            if let Some(cluster) = merged.clusters.get_mut(*loser) {
                cluster.cidrs.remove(net);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(source: &str, clusters: &[(&str, &[&str], Option<u32>)]) -> RemotesFile {
        let clusters = clusters
            .iter()
            .map(|(name, cidrs, mtu)| RemoteCluster {
                name: (*name).into(),
                cidrs: cidrs.iter().map(|text| cidr::parse(text).unwrap()).collect(),
                mtu: *mtu,
            })
            .collect();
        RemotesFile { file: format!("{source}.json"), source: source.into(), clusters }
    }

    fn nets(merged: &Merged, name: &str) -> Vec<String> {
        merged.clusters[name].cidrs.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn one_cluster_in_two_files_is_one() {
        let files = [
            file("submariner", &[("b", &["10.1.0.0/16", "10.2.0.0/16"], Some(1400))]),
            file("static", &[("b", &["10.2.0.0/16"], Some(1380))]),
        ];
        let merged = merge(&files, None);
        assert_eq!(nets(&merged, "b"), ["10.1.0.0/16", "10.2.0.0/16"]);
        assert_eq!(merged.clusters["b"].mtu, Some(1380));
        let shared = &merged.clusters["b"].cidrs[&cidr::parse("10.2.0.0/16").unwrap()];
        assert_eq!(shared.iter().map(String::as_str).collect::<Vec<_>>(), ["static", "submariner"]);
        assert!(merged.findings.is_empty());
    }

    #[test]
    fn one_cidr_in_two_clusters_goes_by_source_then_name() {
        let files = [
            file("submariner", &[("a", &["10.1.0.0/16"], None)]),
            file("static", &[("z", &["10.1.0.0/16", "10.3.0.0/16"], None), ("y", &["10.3.0.0/16"], None)]),
        ];
        let merged = merge(&files, None);
        assert!(nets(&merged, "a").is_empty());
        assert_eq!(nets(&merged, "z"), ["10.1.0.0/16"]);
        assert_eq!(nets(&merged, "y"), ["10.3.0.0/16"]);
        assert_eq!(merged.findings.iter().filter(|f| f.id == Id::CidrTwice).count(), 2);
    }

    #[test]
    fn the_order_of_files_does_not_matter() {
        let a = file("kernel", &[("b", &["10.1.0.0/16"], Some(1500)), ("c", &["10.2.0.0/16"], None)]);
        let b = file("cluster", &[("c", &["10.1.0.0/16"], Some(1300))]);
        assert_eq!(merge(&[a.clone(), b.clone()], None).clusters, merge(&[b, a], None).clusters);
    }

    #[test]
    fn the_own_cluster_and_wide_prefixes_are_not_remote() {
        let files =
            [file("cluster", &[("own", &["10.9.0.0/16"], None), ("b", &["0.0.0.0/1", "::/7", "16.0.0.0/4"], None)])];
        let merged = merge(&files, Some("own"));
        assert!(!merged.clusters.contains_key("own"));
        assert_eq!(nets(&merged, "b"), ["16.0.0.0/4"]);
        let ids: Vec<Id> = merged.findings.iter().map(|f| f.id).collect();
        assert_eq!(ids, [Id::OwnCluster, Id::CidrWide, Id::CidrWide]);
    }

    #[test]
    fn files_are_checked_as_a_whole() {
        for (text, part) in [
            ("{", "EOF"),
            (r#"{"clusters":[]}"#, "version"),
            (r#"{"version":2,"clusters":[]}"#, "upgrade"),
            (r#"{"version":1,"clusters":[{"name":"B"}]}"#, "RFC 1123"),
            (r#"{"version":1,"clusters":[{"name":"b","podCIDRs":["10.0.0.0/99"]}]}"#, "cluster b"),
            (r#"{"version":1,"clusters":[{"name":"b","mtu":10}]}"#, "mtu 10"),
            (r#"{"version":1,"clusters":[{"podCIDRs":[]}]}"#, "name"),
        ] {
            let err = parse("x.json", text).unwrap_err();
            assert!(err.contains(part), "{text}: {err}");
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let told = Told {
            name: "b".into(),
            pod_cidrs: vec![cidr::parse("10.1.0.0/16").unwrap()],
            service_cidrs: vec![cidr::parse("fd00::/64").unwrap()],
            mtu: Some(1400),
            from: Some("b.json".into()),
        };
        let text = render("static", 7, std::slice::from_ref(&told)).unwrap();
        let file = parse("static.json", &text).unwrap();
        assert_eq!(file.source, "static");
        assert_eq!(file.clusters[0].cidrs, [told.pod_cidrs[0], told.service_cidrs[0]]);
        assert_eq!(file.clusters[0].mtu, Some(1400));
        let kept = kept(&text).unwrap();
        assert_eq!((kept.generation, kept.clusters), (7, vec![told]));
        assert_eq!(kept_generation(&text), Some(7));
        assert!(parse("x.json", &render::<Told>("kernel", 1, &[]).unwrap()).unwrap().clusters.is_empty());
    }

    #[test]
    fn what_would_be_refused_is_not_written() {
        assert!(render("static", 1, &[Told { name: "B".into(), ..Told::default() }]).is_err());
        assert!(render("static", 1, &[Told { name: "b".into(), mtu: Some(1), ..Told::default() }]).is_err());
        assert_eq!(kept(r#"{"version":1,"source":"static","clusters":[]}"#), None);
    }

    #[test]
    fn unknown_fields_and_nulls_are_ignored() {
        let text = r#"{"version":1,"source":"static","generation":42,"new":{},
            "clusters":[{"name":"b","podCIDRs":["172.111.0.0/16"],"serviceCIDRs":null,"mtu":0,"x":1}]}"#;
        let file = parse("x.json", text).unwrap();
        assert_eq!(file.clusters[0].mtu, None);
        assert_eq!(file.clusters[0].cidrs.len(), 1);
        assert!(parse("x.json", r#"{"version":1,"clusters":null}"#).unwrap().clusters.is_empty());
    }
}

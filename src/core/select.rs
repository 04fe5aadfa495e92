//! Which clusters a pod is joined to.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::quoted;

/// A choice of remote clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Every remote cluster.
    #[default]
    All,
    /// None.
    None,
    /// Those named.
    Clusters(BTreeSet<String>),
}

impl Selection {
    /// Parses names; `all` or `none` must stand alone. White space around a name is not part of it.
    ///
    /// # Errors
    /// The cure, for a message that names where the value came from.
    pub fn parse<'n>(names: impl IntoIterator<Item = &'n str>) -> Result<Self, String> {
        let names: Vec<&str> = names.into_iter().map(str::trim).collect();
        match names.as_slice() {
            ["all"] => return Ok(Self::All),
            ["none"] => return Ok(Self::None),
            _ => {}
        }
        let mut clusters = BTreeSet::new();
        for name in names {
            if matches!(name, "all" | "none") {
                return Err(format!("\"{name}\" cannot stand in a list with cluster names: give it alone"));
            }
            if !valid_cluster(name) {
                return Err(format!(
                    "{} is not a cluster name: give all, none, or names like cluster-b (an RFC 1123 label) or @bgp",
                    quoted(name)
                ));
            }
            clusters.insert(name.to_owned());
        }
        Ok(Self::Clusters(clusters))
    }

    /// Whether a cluster is chosen.
    pub fn includes(&self, cluster: &str) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Clusters(names) => names.contains(cluster),
        }
    }
}

/// Whether it is an RFC 1123 label (1 to 63 of `a-z`, `0-9`, `-`, not at the ends), or an `@` name of a source without
/// cluster names (`@calico/<pool>`, `@bgp`, `@static/<file>`).
pub fn valid_cluster(name: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if let Some(rest) = name.strip_prefix('@') {
        return (1..=253).contains(&rest.len())
            && rest.starts_with(inner)
            && rest.chars().all(|c| inner(c) || matches!(c, '-' | '_' | '.' | '/'));
    }
    (1..=63).contains(&name.len())
        && name.starts_with(inner)
        && name.ends_with(inner)
        && name.chars().all(|c| inner(c) || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_lists() {
        assert_eq!(Selection::parse([" all "]), Ok(Selection::All));
        assert_eq!(Selection::parse(["none"]), Ok(Selection::None));
        let list = Selection::parse(["cluster-b", " cluster-c"]).unwrap();
        assert!(list.includes("cluster-c") && !list.includes("cluster-d"));
    }

    #[test]
    fn refusals() {
        for names in [&["all", "b"][..], &["b", "none"], &["B"], &[""], &["a_b"], &["-a"], &["@"], &["@Bgp"]] {
            assert!(Selection::parse(names.iter().copied()).is_err(), "{names:?}");
        }
        assert!(Selection::parse(["a".repeat(64).as_str()]).is_err());
    }

    #[test]
    fn sources_without_names() {
        for name in ["@bgp", "@calico/pool-1", "@static/extra.json"] {
            assert!(valid_cluster(name), "{name}");
        }
    }
}

//! What a container runtime can do, by its name and version.

use std::fmt;

/// A container runtime, as in `Node.status.nodeInfo.containerRuntimeVersion`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    name: String,
    version: [u64; 3],
    /// Whether it is older than that version: an alpha, beta or release candidate of it.
    prerelease: bool,
    text: String,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Runtime {
    /// Reads `containerd://2.1.4-k3s1`.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, version) = text.split_once("://")?;
        let version = version.trim_start_matches('v');
        let end = version.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(version.len());
        let (numbers, suffix) = version.split_at_checked(end)?;
        let mut parts = numbers.split('.').map(|part| part.parse::<u64>().ok());
        let mut next = || parts.next().unwrap_or(Some(0));
        let version = [next()?, next()?, next()?];
        let suffix = suffix.trim_start_matches(['-', '~', '+']);
        let prerelease = ["alpha", "beta", "rc", "dev"].iter().any(|mark| suffix.starts_with(mark));
        Some(Self { name: name.to_owned(), version, prerelease, text: text.to_owned() })
    }

    fn at_least(&self, version: [u64; 3]) -> bool {
        self.version > version || (self.version == version && !self.prerelease)
    }

    /// Whether it appends what is in the directory named like the network: libcni 1.3, in containerd from 2.1.0 and
    /// CRI-O from 1.33.0 on (their go.mod by tag).
    pub fn reads_dropins(&self) -> bool {
        match self.name.as_str() {
            "containerd" => self.at_least([2, 1, 0]),
            "cri-o" => self.at_least([1, 33, 0]),
            _ => false,
        }
    }

    /// Why pods' annotations do not reach plugins, where they do not: containerd passes them from 1.5.0, CRI-O from
    /// 1.29.0 on, cri-dockerd never.
    pub fn withholds_annotations(&self) -> Option<String> {
        let passes = match self.name.as_str() {
            "containerd" => self.at_least([1, 5, 0]),
            "cri-o" => self.at_least([1, 29, 0]),
            "docker" => false,
            _ => true,
        };
        (!passes).then(|| {
            format!(
                "{self} does not pass pods' annotations to CNI plugins, so crosslink.dev annotations have no effect: use containerd from 1.5 or CRI-O from 1.29 on"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_ins() {
        for (text, reads) in [
            ("containerd://2.1.0", true),
            ("containerd://v2.1.4-k3s1", true),
            ("containerd://2.2", true),
            ("containerd://10.0.0", true),
            ("containerd://2.1.0-rc.1", false),
            ("containerd://2.0.7", false),
            ("containerd://1.7.28", false),
            ("cri-o://1.33.0", true),
            ("cri-o://1.32.9", false),
            ("docker://28.0.0", false),
            ("other://99.0.0", false),
        ] {
            assert_eq!(Runtime::parse(text).unwrap().reads_dropins(), reads, "{text}");
        }
        for text in ["", "containerd", "containerd://", "containerd://x.y"] {
            assert_eq!(Runtime::parse(text), None, "{text}");
        }
    }

    #[test]
    fn annotations() {
        for (text, passes) in [
            ("docker://28.0.0", false),
            ("containerd://1.4.13", false),
            ("containerd://1.6.0", true),
            ("cri-o://1.28.0", false),
        ] {
            assert_eq!(Runtime::parse(text).unwrap().withholds_annotations().is_none(), passes, "{text}");
        }
    }
}

//! Where a Kubernetes distribution keeps CNI configuration and plugins.

use std::path::{Path, PathBuf};

/// Directories of the CNI on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirs {
    /// Where the runtime looks for conflists.
    pub conf: PathBuf,
    /// Where the runtime looks for plugins.
    pub bin: PathBuf,
}

/// A distribution.
#[derive(Debug)]
struct Platform {
    name: &'static str,
    conf: &'static str,
    /// By preference; the first that exists, else the first.
    bin: &'static [&'static str],
    /// What only this distribution has: all of these directories. None where the defaults of the CNI are used.
    marks: &'static [&'static str],
}

const CONF: &str = "/etc/cni/net.d";
const BIN: &[&str] = &["/opt/cni/bin"];
const K3S_CONF: &str = "/var/lib/rancher/k3s/agent/etc/cni/net.d";

const fn usual(name: &'static str) -> Platform {
    Platform { name, conf: CONF, bin: BIN, marks: &[] }
}

/// By name. The distributions' own documentation and installers; k3s moved its plugins to `data/cni` in October 2024
/// (releases 1.28.15, 1.29.10, 1.30.6, 1.31.2), and k3d runs k3s in a container that has them in `/bin`.
const PLATFORMS: [Platform; 14] = [
    usual("kubeadm"),
    usual("kind"),
    usual("eks"),
    usual("aks"),
    usual("rke2"),
    usual("k0s"),
    Platform {
        name: "k3s",
        conf: K3S_CONF,
        bin: &["/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/data/current/bin"],
        marks: &[K3S_CONF, "/var/lib/rancher/k3s/data"],
    },
    Platform { name: "k3d", conf: K3S_CONF, bin: &["/bin"], marks: &[K3S_CONF] },
    Platform {
        name: "microk8s",
        conf: "/var/snap/microk8s/current/args/cni-network",
        bin: &["/var/snap/microk8s/current/opt/cni/bin"],
        marks: &["/var/snap/microk8s/current/args/cni-network"],
    },
    usual("minikube"),
    Platform { name: "gke", conf: CONF, bin: &["/home/kubernetes/bin"], marks: &["/home/kubernetes/bin"] },
    Platform {
        name: "openshift",
        conf: "/etc/cni/multus/net.d",
        bin: &["/var/lib/cni/bin"],
        marks: &["/etc/cni/multus/net.d", "/var/lib/cni/bin"],
    },
    usual("talos"),
    usual("bottlerocket"),
];

/// The platform `name` and its directories; `auto` looks for directories that only one has.
///
/// # Errors
/// No platform has that name; the message lists those that there are.
pub fn find(name: &str, exists: impl Fn(&Path) -> bool) -> Result<(&'static str, Dirs), String> {
    let there = |path: &&str| exists(Path::new(path));
    let found = if name == "auto" {
        let marked = |platform: &&Platform| !platform.marks.is_empty() && platform.marks.iter().all(&there);
        PLATFORMS.iter().find(marked).or(PLATFORMS.first())
    } else {
        PLATFORMS.iter().find(|platform| platform.name == name)
    };
    let Some(platform) = found else {
        let names: Vec<&str> = PLATFORMS.iter().map(|platform| platform.name).collect();
        let shown = crosslink_core::error::quoted(name);
        return Err(format!("platform {shown}: use one of auto, {}", names.join(", ")));
    };
    let bin = platform.bin.iter().find(|path| there(path)).or(platform.bin.first()).copied().unwrap_or_default();
    Ok((platform.name, Dirs { conf: platform.conf.into(), bin: bin.into() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(there: &[&str]) -> (&'static str, String) {
        let (name, dirs) = find("auto", |path| there.contains(&path.to_str().unwrap())).unwrap();
        (name, format!("{} {}", dirs.conf.display(), dirs.bin.display()))
    }

    #[test]
    fn directories_tell_the_platform() {
        assert_eq!(auto(&[]), ("kubeadm", "/etc/cni/net.d /opt/cni/bin".into()));
        let k3s = "/var/lib/rancher/k3s/agent/etc/cni/net.d";
        let data = "/var/lib/rancher/k3s/data";
        assert_eq!(auto(&[k3s, data, "/var/lib/rancher/k3s/data/cni"]).1, format!("{k3s} {data}/cni"));
        assert_eq!(auto(&[k3s, data, "/var/lib/rancher/k3s/data/current/bin"]).1, format!("{k3s} {data}/current/bin"));
        assert_eq!(auto(&[k3s]), ("k3d", format!("{k3s} /bin")));
        assert_eq!(auto(&["/home/kubernetes/bin"]).0, "gke");
        // Multus alone is no OpenShift.
        assert_eq!(auto(&["/etc/cni/multus/net.d"]).0, "kubeadm");
    }

    #[test]
    fn every_name_works_and_another_lists_them() {
        for platform in &PLATFORMS {
            assert_eq!(find(platform.name, |_| false).unwrap().0, platform.name);
        }
        let err = find("k8s", |_| false).unwrap_err();
        assert!(err.contains("\"k8s\"") && PLATFORMS.iter().all(|platform| err.contains(platform.name)), "{err}");
    }
}

//! Whether the runtime's mounts reach the agent. In a container whose `/run/netns` has private propagation, a new sandbox is an
//! empty file there: not gone, only hidden.

use std::path::{Path, PathBuf};

use crosslink_kernel::Error as KernelError;

/// What is known about a directory of sandboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Propagation {
    /// Mount points of this process, each with whether mounts of others arrive there.
    mounts: Vec<(PathBuf, bool)>,
}

impl Propagation {
    /// Reads `/proc/self/mountinfo`.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Fields as in proc(5): the fifth is the mount point; from the seventh on, up to "-", optional ones, of which
    /// `shared:N` and `master:N` say that mounts arrive.
    fn parse(text: &str) -> Self {
        let mounts = text.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let point = fields.get(4)?;
            let optional = fields.get(6..).unwrap_or_default().iter().take_while(|field| **field != "-");
            let arrives =
                optional.into_iter().any(|field| field.starts_with("shared:") || field.starts_with("master:"));
            Some((PathBuf::from(unescape(point)), arrives))
        });
        Self { mounts: mounts.collect() }
    }

    /// Whether mounts of the runtime arrive in a directory.
    pub fn arrives(&self, dir: &Path) -> bool {
        let under = self.mounts.iter().filter(|(point, _)| dir.starts_with(point));
        // Of mounts on one point the last one is on top.
        under
            .enumerate()
            .max_by_key(|(place, (point, _))| (point.components().count(), *place))
            .is_some_and(|(_, (_, a))| *a)
    }

    /// Why no new sandbox will ever be seen in a directory: it was mounted into the agent without propagation.
    pub fn blocks(&self, dir: &Path) -> Option<String> {
        let mounted = self.mounts.iter().any(|(point, _)| point == dir);
        (mounted && !self.arrives(dir)).then(|| {
            format!(
                "mounts of the runtime do not reach {0}: mount {0} with mountPropagation HostToContainer",
                dir.display()
            )
        })
    }

    /// Why a sandbox that cannot be entered may be alive all the same.
    pub fn hides(&self, path: &Path, why: &KernelError) -> Option<String> {
        let dir = path.parent()?;
        let cure = format!("mount {} into the agent with mountPropagation HostToContainer", dir.display());
        if !dir.is_dir() {
            return Some(format!("{} is not there for the agent: {cure}", dir.display()));
        }
        // An empty file under a mount that nothing reaches says nothing about the sandbox.
        let empty = matches!(why, KernelError::NotNetns(_)) && path.metadata().is_ok_and(|meta| meta.is_file());
        (empty && !self.arrives(dir)).then(|| format!("{} is an empty file for the agent: {cure}", path.display()))
    }
}

/// Spaces and the like are octal in mountinfo.
fn unescape(text: &str) -> String {
    let mut plain = text.to_owned();
    for (code, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(code, character);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:25 / /run rw,nosuid shared:5 - tmpfs tmpfs rw
31 30 0:25 /netns /run/netns rw - tmpfs tmpfs rw
32 30 0:25 /slave /run/slave rw master:5 - tmpfs tmpfs rw
33 30 0:25 /both /run/both rw - tmpfs tmpfs rw
34 33 0:25 /both /run/both rw shared:9 master:5 - tmpfs tmpfs rw
35 30 0:25 /x /run/with\\040space rw - tmpfs tmpfs rw
";

    #[test]
    fn the_innermost_mount_decides() {
        let mounts = Propagation::parse(TEXT);
        for (dir, arrives) in [
            ("/run", true),
            ("/run/netns", false),
            ("/run/netns/deeper", false),
            ("/run/slave", true),
            ("/run/both", true),
            ("/run/with space", false),
            ("/elsewhere", true),
        ] {
            assert_eq!(mounts.arrives(Path::new(dir)), arrives, "{dir}");
        }
        for (dir, blocked) in [("/run/netns", true), ("/run/netns/deeper", false), ("/run/slave", false), ("/x", false)]
        {
            assert_eq!(mounts.blocks(Path::new(dir)).is_some(), blocked, "{dir}");
        }
        assert!(!Propagation::parse("").arrives(Path::new("/run/netns")));
        assert!(!Propagation::parse("nonsense\n1 2 3\n").arrives(Path::new("/run/netns")));
    }

    #[test]
    fn an_empty_file_hides_a_sandbox_only_where_no_mount_arrives() {
        let dir = tempfile::tempdir().unwrap();
        let (file, gone) = (dir.path().join("cni-1"), dir.path().join("cni-2"));
        std::fs::write(&file, "").unwrap();
        let not_netns = KernelError::NotNetns(file.clone());
        let missing = KernelError::file("open sandbox", &gone, &std::io::Error::from_raw_os_error(2));
        let private = Propagation { mounts: vec![("/".into(), false)] };
        let shared = Propagation { mounts: vec![("/".into(), true)] };
        assert!(private.hides(&file, &not_netns).unwrap().contains("HostToContainer"));
        assert_eq!(shared.hides(&file, &not_netns), None);
        assert_eq!(private.hides(&gone, &missing), None, "removed is gone");
        let nowhere = dir.path().join("not-mounted/cni-1");
        assert!(shared.hides(&nowhere, &missing).unwrap().contains("is not there"));
    }
}

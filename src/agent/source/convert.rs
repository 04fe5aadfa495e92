//! What objects say, made into what a remotes file may say. A remotes file is taken as a whole or not at all, so nothing
//! doubtful may get into one.

use crosslink_core::{
    cidr,
    error::quoted,
    finding::{Finding, Id},
    model::Family,
    remotes::valid_mtu,
    select::valid_cluster,
};
use ipnet::IpNet;

/// Collects what had to be skipped.
#[derive(Debug)]
pub struct Skipped<'a> {
    /// Kind of the object, and where it comes from.
    pub what: &'a str,
    /// Its name.
    pub name: String,
    /// What was skipped so far.
    pub findings: &'a mut Vec<Finding>,
}

impl Skipped<'_> {
    /// Notes that something of the object contributes nothing.
    pub fn note(&mut self, why: impl std::fmt::Display) {
        let text = format!("{} {}: {why}", self.what, self.name);
        self.findings.push(Finding::new(Id::SourceObject, text));
    }

    /// A field's CIDRs, sorted, each once.
    pub fn nets<S: AsRef<str>>(&mut self, field: &str, texts: &[S]) -> Vec<IpNet> {
        let mut nets = Vec::with_capacity(texts.len());
        for text in texts {
            match cidr::parse(text.as_ref()) {
                Ok(net) => nets.push(net),
                Err(err) => self.note(format_args!("{field}: {err}")),
            }
        }
        nets.sort_unstable();
        nets.dedup();
        nets
    }

    /// Whether a name may be that of a cluster.
    pub fn cluster(&mut self, name: &str) -> bool {
        let valid = valid_cluster(name);
        if !valid {
            self.note(format_args!("cluster name {} is not an RFC 1123 label: rename it", quoted(name)));
        }
        valid
    }

    /// An MTU that a remotes file may hold.
    pub fn mtu(&mut self, mtu: Option<u32>) -> Option<u32> {
        let mtu = mtu.filter(|mtu| *mtu != 0)?;
        if !valid_mtu(mtu) {
            self.note(format_args!("mtu {mtu} is not within 576 to 65535"));
            return None;
        }
        Some(mtu)
    }
}

/// Keeps the families that an `ipFamily` of `all`, `ipv4` or `ipv6` names.
pub fn of_family(nets: &mut Vec<IpNet>, family: &str) {
    match family {
        "ipv4" => nets.retain(|net| Family::of_net(net) == Family::V4),
        "ipv6" => nets.retain(|net| Family::of_net(net) == Family::V6),
        _ => {}
    }
}

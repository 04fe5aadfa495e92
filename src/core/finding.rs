//! Findings: what was noticed and did not stop the pod. Defined here once; the README's table is tested against this.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Normal, but worth knowing.
    Info,
    /// Something does not work as configured.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Info => "info",
            Self::Warning => "warning",
        })
    }
}

macro_rules! findings {
    ($($name:ident = $id:literal, $severity:ident, $cause:literal, $cure:literal;)*) => {
        /// Stable identity of a kind of finding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Id {
            $(#[doc = $cause] #[serde(rename = $id)] $name,)*
            /// Written by a newer version.
            #[serde(other, rename = "XL-UNKNOWN")]
            Unknown,
        }

        impl Id {
            /// Every kind, in the order of the README's table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The stable id.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $id,)* Self::Unknown => "XL-UNKNOWN" }
            }

            /// How much it matters.
            pub const fn severity(self) -> Severity {
                match self { $(Self::$name => Severity::$severity,)* Self::Unknown => Severity::Info }
            }

            /// Why it arises.
            pub const fn cause(self) -> &'static str {
                match self { $(Self::$name => $cause,)* Self::Unknown => "Written by a newer version" }
            }

            /// What to do about it.
            pub const fn cure(self) -> &'static str {
                match self { $(Self::$name => $cure,)* Self::Unknown => "Read it with that version" }
            }
        }
    };
}

findings! {
    RemotesFile = "XL-REMOTES-FILE", Warning,
        "A remotes file is refused: it does not parse, is too new, or is not root's alone to write",
        "Mend the file the message names; its last good copy is used meanwhile, if there is one";
    CidrRefused = "XL-CIDR-REFUSED", Warning,
        "A remote or local CIDR is a default route, loopback, multicast, or the pod's own address",
        "Remove the CIDR from the source the message names";
    CidrWide = "XL-CIDR-WIDE", Warning,
        "A remote prefix is shorter than /4 (IPv4) or /8 (IPv6)",
        "Name the remote cluster's real CIDRs";
    CidrLocal = "XL-CIDR-LOCAL", Warning,
        "A remote CIDR equals or lies inside a connected or local prefix; the local one is kept",
        "Give the clusters CIDRs that do not overlap, or exclude the CIDR";
    CidrTwice = "XL-CIDR-TWICE", Warning,
        "Two clusters claim one CIDR; the first by source, then by name, has it",
        "Remove the CIDR from the cluster that does not own it";
    OwnCluster = "XL-OWN-CLUSTER", Info,
        "A remotes file lists this node's own cluster, which is never remote",
        "None needed; or remove the entry";
    ClusterUnknown = "XL-CLUSTER-UNKNOWN", Info,
        "A selected cluster is in no remotes file yet",
        "None needed if it will appear; else correct the name";
    NoFamily = "XL-NO-FAMILY", Info,
        "A named CIDR is of a family that the pod does not have",
        "None needed; or give the pod an address of that family";
    NoNextHop = "XL-NO-NEXT-HOP", Warning,
        "The pod's interface has no default route and no gateway of this family, so remote CIDRs of it are not routed",
        "Let the main CNI give the pod a default route or a gateway of this family";
    RouteIdentical = "XL-ROUTE-IDENTICAL", Info,
        "Another owner's route already does the same; it is left alone",
        "None needed";
    RouteConflict = "XL-ROUTE-CONFLICT", Warning,
        "Another owner's route to the same prefix leads elsewhere; the remote CIDR is not routed",
        "Remove that route, or exclude the CIDR";
    NodeFile = "XL-NODE-FILE", Warning,
        "node.json is refused: it does not parse, is too new, or is not root's alone to write",
        "Mend the file; node addresses are taken from the kernel meanwhile";
    NodeAddresses = "XL-NODE-ADDRESSES", Warning,
        "The node has no usable address of this family, or more than 32",
        "List the addresses that pods should reach in node.json";
    NoAgent = "XL-NO-AGENT", Info,
        "No agent runs on this node, so nothing keeps kube-proxy from dropping half-seen connections of underlay pods",
        "Run crosslink-agent, or keep the nftables rules of the README yourself";
    State = "XL-STATE", Warning,
        "A record or the log cannot be written or read",
        "Make the directory the message names writable for root; until then DEL works from derivable names only";
    StaleRecord = "XL-STALE-RECORD", Info,
        "A record is of another sandbox than the one given",
        "None needed";
    UnknownKey = "XL-UNKNOWN-KEY", Warning,
        "A configuration key or crosslink.dev annotation is not known to this version",
        "Remove it, or upgrade the plugin";
    RouteRefused = "XL-ROUTE-REFUSED", Warning,
        "The kernel does not take a route to a remote CIDR; it is left out",
        "See the message; mostly the main CNI gave the pod a gateway that cannot be one";
    AddressTaken = "XL-ADDRESS-TAKEN", Warning,
        "The node had a route to this pod's address by another pod's link; it leads to this pod now",
        "Find out why IPAM gave one address twice; or none, if the other pod is gone";
    BadValue = "XL-BAD-VALUE", Warning,
        "At DEL or GC, a configuration value is wrong; the default stands in, since a pod must be deletable",
        "Correct the value that the message names";
    GcAlive = "XL-GC-ALIVE", Warning,
        "GC: an attachment is not in the runtime's list, but its sandbox is alive; it is left to the agent",
        "None needed; find out why the runtime does not list it";
    CniConflict = "XL-CNI-CONFLICT", Warning,
        "Another writer keeps changing the main CNI's conflist or the plugin",
        "Let the writer that the message names leave the chain alone (Cilium: cni.exclusive=false), or use mode dropin";
    CniConfig = "XL-CNI-CONFIG", Warning,
        "There is no main CNI conflist into which crosslink can be put",
        "Mend or install the main CNI's configuration that the message names; the agent goes on by itself then";
    CniBinary = "XL-CNI-BINARY", Warning,
        "The plugin cannot be installed, or does not run where it was installed",
        "Make the directory the message names writable and executable; on other platforms give platform or cniBinDir";
    CniMode = "XL-CNI-MODE", Info,
        "The mode of installation that was asked for does not suit this runtime or main CNI; another one is used, or none",
        "Set cniMode to what the message says";
    CniWatch = "XL-CNI-WATCH", Warning,
        "The CNI's directories cannot be watched; they are read every two seconds instead",
        "Raise the sysctls fs.inotify.max_user_watches and fs.inotify.max_user_instances";
    Source = "XL-SOURCE", Warning,
        "A source of remote CIDRs cannot be read; what it said last stays in force",
        "Mend what the message names";
    SourceObject = "XL-SOURCE-OBJECT", Warning,
        "An object of a source is malformed and contributes nothing",
        "Correct the field that the message names";
    SourceEmpty = "XL-SOURCE-EMPTY", Warning,
        "A source suddenly lists nothing; what it said last is held for a while",
        "None if that is meant; else find out who emptied it";
    SubmarinerStale = "XL-SUBMARINER-STALE", Warning,
        "A Submariner endpoint's subnets are not those that its gateway programmed",
        "Restart the other side's route agents and gateway: Submariner does not program changes in place";
    LocalUnknown = "XL-LOCAL-UNKNOWN", Warning,
        "This cluster's pod or service CIDRs, or a fact about this node, could not be found out",
        "Set podCIDRs and serviceCIDRs";
    Nftables = "XL-NFTABLES", Warning,
        "The agent's nftables rules cannot be kept",
        "Load the kernel module nf_tables, and give the agent NET_ADMIN";
    SourceMasked = "XL-SOURCE-MASKED", Warning,
        "The main CNI masquerades where nftables has no say, so that remote clusters do not see pods' own addresses",
        "Tell the main CNI not to masquerade to the remote CIDRs that the message names";
    GatewayRoute = "XL-GATEWAY-ROUTE", Warning,
        "This node has no route of its own to the underlay, only its default route",
        "Give the node an address or a route in the underlay network that the message names";
    Resync = "XL-RESYNC", Warning,
        "A running pod could not be brought in step",
        "See the message; the agent tries again";
    RecordNewer = "XL-RECORD-NEWER", Warning,
        "A record was written by a newer plugin; the agent leaves the pod alone",
        "Upgrade the agent";
    NetnsHidden = "XL-NETNS-HIDDEN", Warning,
        "Sandboxes that the runtime mounts do not reach the agent",
        "Mount the directory the message names with mountPropagation HostToContainer";
}

/// Something noticed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    /// Kind.
    pub id: Id,
    /// The thing and the value.
    pub text: String,
}

impl Finding {
    /// A finding about the thing that `text` names.
    pub fn new(id: Id, text: impl Into<String>) -> Self {
        Self { id, text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.id.as_str(), self.text)
    }
}

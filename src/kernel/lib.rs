//! The only part of crosslink that speaks netlink, enters a network namespace or reads and writes node-local state.
//!
//! [`Kernel`] is what the plugin and the agent act through; [`System`] is the real one, `fake::FakeKernel` (feature
//! `fake`) keeps everything in memory, records every change and replays errno.

pub mod attachment;
pub mod conntrack;
pub mod converge;
mod decode;
mod encode;
pub mod error;
#[cfg(feature = "fake")]
pub mod fake;
pub mod files;
mod lessons;
pub mod monitor;
pub mod netns;
pub mod nft;
pub mod notify;
pub mod records;
pub mod socket;
mod sys;
mod system;

use std::{path::Path, time::Duration};

use crosslink_core::{
    model::{Change, NetnsState},
    record::NetnsId,
};

pub use nix::errno::Errno;

pub use crate::{error::Error, sys::stdout_was_closed, system::System};

/// What to look up in the sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodQuery {
    /// Interfaces, addresses and routes of the main table.
    pub state: bool,
    /// Interface whose permanent neighbours matter.
    pub veth: Option<String>,
    /// Sysctls, below `/proc/sys/net`.
    pub sysctls: Vec<String>,
}

/// What to look up on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeQuery {
    /// Index of the link that may be the peer of one in the sandbox; it is looked up only if its other end is there.
    pub peer: Option<u32>,
    /// All interfaces, addresses and main routes.
    pub addresses: bool,
    /// Our veth, with its permanent neighbours.
    pub veth: Option<String>,
    /// Routes of the pods' table, and rules.
    pub pods_table: bool,
    /// Sysctls, below `/proc/sys/net`.
    pub sysctls: Vec<String>,
}

/// What became of a list of changes, by place in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Carried out, or found to be there.
    pub done: Vec<usize>,
    /// Sent, but the answer was lost.
    pub unknown: Vec<usize>,
    /// Refused. What came after the first refusal's batch was not tried.
    pub failures: Vec<(usize, Error)>,
}

/// The kernel, as far as crosslink uses it.
pub trait Kernel {
    /// Opens, locks and enters the sandbox. From then on the pod's side can be observed and changed.
    ///
    /// # Errors
    /// [`Error::is_gone`] tells a sandbox that is not there from one that cannot be entered.
    fn enter(&mut self, netns: &Path, lock_wait: Duration) -> Result<NetnsId, Error>;

    /// The identity of another sandbox, which is not entered.
    fn identify(&mut self, netns: &Path) -> Option<NetnsId>;

    /// Looks at the sandbox.
    ///
    /// # Errors
    /// The kernel's refusal, or [`Error::NoSandbox`].
    fn observe_pod(&mut self, query: &PodQuery) -> Result<NetnsState, Error>;

    /// Looks at the node.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn observe_node(&mut self, query: &NodeQuery) -> Result<NetnsState, Error>;

    /// Applies changes in order, as few system calls as possible; stops after the first batch with a refusal.
    fn apply(&mut self, changes: &[Change]) -> Applied;
}

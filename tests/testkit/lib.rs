//! What crosslink's tests and its demo are built from: network namespaces, topologies of clusters, a runner that drives
//! CNI plugins as libcni does, and small servers and clients.
//!
//! Everything here changes the network of the machine it runs on, so it refuses to work outside the sandbox that
//! `tests/testkit/run` makes; `.cargo/config.toml` has cargo start every test binary and `cargo run` through it.
//!
//! All tests of one binary are threads in one sandbox: names of namespaces come from [`netns::unique`].
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "test support: a broken precondition must end the test, and its output is the test's log"
)]

pub mod call;
pub mod netns;
pub mod nft;
pub mod probe;
pub mod runner;
pub mod servers;
pub mod topology;

pub use call::{Call, Reply, cni_path};
pub use netns::{Netns, available, in_netns, require, unique};
pub use runner::{Attachment, CniFailure, GcArg, Runner, addresses};
pub use topology::{Families, Node, Options, Pod, Switch, TwoClusters, conflist, two_clusters};

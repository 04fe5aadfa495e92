//! The pure part of crosslink: what a pod's routes to remote clusters should be, and which changes lead there.
//!
//! ```text
//! netconf, request, result, remotes, node   inputs, parsed strictly
//!              |
//!           facts          what the pod's interface is, by the kernel's word
//!              |
//!          destinations    selection and precedence -> prefixes
//!              |
//!           wanted         prefixes -> routes, neighbours, rules, sysctls (kept in the record)
//!              |
//!            plan          wanted, observed -> changes, conflicts, findings
//! ```
//! No I/O here: `crosslink-kernel` observes and applies.

pub mod cidr;
pub mod conflist;
pub mod delta;
pub mod destinations;
pub mod error;
pub mod facts;
pub mod finding;
pub mod json;
pub mod model;
pub mod netconf;
pub mod nft;
pub mod node;
pub mod numbers;
pub mod plan;
pub mod record;
pub mod remotes;
pub mod request;
pub mod result;
pub mod select;
pub mod set;
pub mod sysctls;
pub mod traffic;
pub mod wanted;

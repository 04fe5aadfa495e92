//! The main CNI's network configuration list: which file it is, and crosslink's entry put in and taken out as an edit of
//! the text, so that whatever is not ours stays as it was written, to the byte.
//!
//! A list counts as valid where libcni 1.1 to 1.3 takes it; the part of the rules that needs a file system is with the
//! agent.

mod choose;
mod edit;
mod entry;
mod parse;

pub use choose::{
    Candidate, Choice, DROPIN_FILE, Delegate, choose, chosen_by_runtime, delegate, is_candidate, taken_away, writer,
};
pub use edit::{Constraints, convert, insert, remove, same, valid};
pub use entry::{Paths, dropin, entry};
pub use parse::{List, Plugin, Single};

/// Our plugin's `type`.
pub const TYPE: &str = "crosslink";

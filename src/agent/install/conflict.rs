//! Who else writes, as far as names tell.

use std::path::Path;

use crosslink_core::conflist::{self, taken_away};

use super::listing::Listing;

/// Who probably writes a file.
pub fn writer(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    conflist::writer(&name)
        .map_or_else(|| "another writer".to_owned(), |writer| format!("{writer} (by the file's name)"))
}

/// The conflict about a file, and what may end it.
pub fn describe(path: &Path, conf_dir: &Path) -> String {
    let listing = Listing::read(conf_dir).unwrap_or_default();
    let taken = taken_away(listing.names.iter().map(String::as_str));
    let cilium = !taken.is_empty() || writer(path).contains("Cilium");
    let cure = if cilium {
        let renamed = match taken.first() {
            Some(name) => format!(" ({name} was renamed by it)"),
            None => String::new(),
        };
        format!("Cilium keeps the directory to itself{renamed}: set its cni.exclusive=false")
    } else {
        "let it leave the chain alone, or set cniMode to dropin where the runtime reads drop-ins".to_owned()
    };
    format!("{}: {} keeps undoing what crosslink puts there; {cure}", path.display(), writer(path))
}

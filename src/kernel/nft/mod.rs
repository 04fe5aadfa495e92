//! nf_tables by netlink: a whole table replaced in one transaction, looked at, watched and removed. No `nft` binary.

mod attr;
mod encode;
mod monitor;
mod read;

use crosslink_core::nft::Table;
use nix::errno::Errno;

pub use monitor::Monitor;

use crate::{
    error::Error,
    socket::{Request, Socket},
};

pub(crate) use attr::{Writer, find, iter};

/// A connection to nf_tables. It stays in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
}

impl Nft {
    /// Opens a connection in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::netfilter()? })
    }

    /// Makes the table of that name what is wanted, in one transaction: at every moment a packet meets the old rules or
    /// the new ones.
    ///
    /// # Errors
    /// The kernel's refusal; everything is as before then.
    pub fn replace(&mut self, table: &Table) -> Result<(), Error> {
        self.transact(encode::replace(table))
    }

    /// Removes the table of that name with all that is in it; returns whether there was one.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete(&mut self, name: &str) -> Result<bool, Error> {
        match self.transact(encode::delete(name)) {
            Ok(()) => Ok(true),
            Err(err) if err.errno() == Some(Errno::ENOENT) => Ok(false),
            Err(err) => Err(err),
        }
    }

    /// Whether there is a table of that name.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn exists(&mut self, name: &str) -> Result<bool, Error> {
        read::table_flags(&mut self.socket, name).map(|flags| flags.is_some())
    }

    /// In what the table of that name differs from what is wanted, in words; none where it does not. Counters and what
    /// else the kernel adds are no difference.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn difference(&mut self, table: &Table) -> Result<Option<String>, Error> {
        read::difference(&mut self.socket, table)
    }

    fn transact(&mut self, steps: Vec<encode::Step>) -> Result<(), Error> {
        let (requests, names): (Vec<Request>, Vec<String>) =
            steps.into_iter().map(|step| (step.request, step.what)).unzip();
        self.socket
            .transaction(&requests)
            .map_err(|(place, errno)| Error::Netlink { what: names.get(place).cloned().unwrap_or_default(), errno })
    }
}

/// Whether an error says that the kernel has no nf_tables, rather than that it refused something.
pub fn unsupported(err: &Error) -> bool {
    // No netlink family; no subsystem for a batch (EOPNOTSUPP) or for a dump (EINVAL, nfnetlink.c); no family inet or
    // no kind of chain or expression (EOPNOTSUPP, EAFNOSUPPORT).
    let told = matches!(err.errno(), Some(Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT));
    let dump = matches!(err, Error::Netlink { what, errno: Errno::EINVAL } if what.starts_with("list nftables"));
    told || dump
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_nf_tables_is_told_from_a_refusal() {
        for (what, errno, wanted) in [
            ("open a netfilter socket", Errno::EPROTONOSUPPORT, true),
            ("use nf_tables", Errno::EOPNOTSUPP, true),
            ("list nftables tables", Errno::EINVAL, true),
            ("add rule 1 of nftables chain c", Errno::EINVAL, false),
            ("use nf_tables", Errno::EPERM, false),
        ] {
            assert_eq!(unsupported(&Error::Netlink { what: what.to_owned(), errno }), wanted, "{what}: {errno}");
        }
    }
}

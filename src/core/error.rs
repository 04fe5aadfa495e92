//! The one error type that reaches a container runtime.

/// CNI error codes: 1 to 99 as in the CNI specification 1.1.0, section "Error"; from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// `cniVersion` is not one that we speak, or does not know the verb.
    IncompatibleVersion = 1,
    /// A `CNI_*` variable is missing or wrong.
    Environment = 4,
    /// A file or the kernel refused us; the message says which.
    Io = 5,
    /// The input is not JSON of the expected shape.
    Decode = 6,
    /// Configuration or annotation is wrong.
    Config = 7,
    /// A passing condition; the runtime should try again.
    TryAgain = 11,
    /// STATUS: no ADD can be served.
    NotAvailable = 50,
    /// A bug of ours, or a kernel answer that nothing here accounts for.
    Internal = 100,
    /// The pod has no interface or address that we could work with, or a name of ours is taken.
    NoInterface = 101,
    /// A named CIDR has no next hop.
    NoNextHop = 102,
    /// Another owner's route holds a prefix that was named.
    RouteConflict = 103,
    /// CHECK found a difference.
    Drift = 104,
}

/// An error as the runtime will show it: the message names the thing, the value and the cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct Error {
    /// CNI code.
    pub code: Code,
    /// One sentence for a person; becomes `msg`.
    pub msg: String,
    /// Further lines (the differences that CHECK found, causes); becomes `details`.
    pub details: String,
}

impl Error {
    /// An error without details.
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// Code 7: what was configured cannot be.
    pub fn config(msg: impl Into<String>) -> Self {
        Self::new(Code::Config, msg)
    }

    /// The same error with details.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }
}

/// Shortens untrusted text for a message: at most 80 characters, control characters escaped.
pub fn quoted(text: &str) -> String {
    const LIMIT: usize = 80;
    let mut shown: String = text.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if text.chars().nth(LIMIT).is_some() {
        shown.push('…');
    }
    format!("\"{shown}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_stay_short_and_on_one_line() {
        let exact = "x".repeat(80);
        assert_eq!(quoted(&exact), format!("\"{exact}\""));
        assert_eq!(quoted(&"é".repeat(10_000)), format!("\"{}…\"", "é".repeat(80)));
        assert_eq!(quoted("a\nb\u{1b}"), "\"a\\nb\\u{1b}\"");
        let message = crate::cidr::parse(&"9".repeat(100_000)).unwrap_err().to_string();
        assert!(message.len() < 250, "{message}");
    }
}

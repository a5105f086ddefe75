//! Whose fault an error is: it decides what the engine does next and what the user is told.

use std::fmt;

/// Who caused an error of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The bytes were changed or cut on the way: a new connection may help.
    Damaged,
    /// The other side speaks something else or another version: nothing will help.
    Incompatible,
    /// The other side breaks the rules of the wire, with a correct checksum.
    PeerMisbehaved,
    /// This side used the crate wrongly; nothing was sent.
    Misuse,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Damaged => "damaged on the way",
            Self::Incompatible => "the other side is not compatible",
            Self::PeerMisbehaved => "the other side broke the protocol",
            Self::Misuse => "used wrongly on this side",
        })
    }
}

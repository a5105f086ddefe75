//! What a migration of the demo consists of.

use super::child::ChildId;
use super::host::Host;
use super::relay::Relay;

/// The processes and hosts of a migration under way.
pub(crate) struct Parts<'a> {
    /// `send`.
    pub(crate) sender: ChildId,
    /// `receive`.
    pub(crate) receiver: ChildId,
    /// The host that the guest leaves.
    pub(crate) source: &'a Host,
    /// The host that it comes to.
    pub(crate) destination: &'a Host,
    /// Between them, when the connection is to be cut.
    pub(crate) relay: Option<&'a Relay>,
}

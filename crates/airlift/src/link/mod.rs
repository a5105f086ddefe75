//! Connections between the hosts: addresses as QEMU's users know them, and byte streams with
//! deadlines.
//!
//! Frames are not known here, and neither is who speaks first.

mod stream;
mod transport;
mod uri;

pub use stream::Stream;
pub use transport::{Acceptor, Connector, LinkOptions, UriAcceptor, UriConnector};
pub use uri::{Uri, UriError};

use airlift_core::Errno;

/// A connection could not be made or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {message}")]
pub struct LinkError {
    /// What was being done (`connect tcp:127.0.0.1:4444`).
    pub operation: String,
    /// What happened.
    pub message: String,
    /// The error number, where there is one.
    pub errno: Option<Errno>,
}

impl LinkError {
    pub(crate) fn io(operation: impl Into<String>, error: &std::io::Error) -> Self {
        Self {
            operation: operation.into(),
            message: error.to_string(),
            errno: error.raw_os_error().map(Errno),
        }
    }

    pub(crate) fn new(operation: impl Into<String>, message: impl Into<String>) -> Self {
        Self { operation: operation.into(), message: message.into(), errno: None }
    }
}

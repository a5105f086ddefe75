//! Who reports dirtied memory. A source belongs to a DMA domain, not to a device.

use crate::{Errno, IovaRange};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Names a DMA domain: the devices whose DMA one source can report.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DomainId(pub String);

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A dirty source failed. The range that was asked for must then be taken as all dirty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {message}{}", errno.map(|e| format!(": {e}")).unwrap_or_default())]
pub struct DirtyError {
    /// What was being done (`DMA_LOGGING_REPORT`).
    pub operation: String,
    /// The error number, where there is one.
    pub errno: Option<Errno>,
    /// What happened.
    pub message: String,
}

/// Reports which device addresses were written by DMA. Over-reporting is allowed, under-reporting
/// never (V2-DIRTY).
pub trait DirtySource: Send + 'static {
    /// The domain it reports for.
    fn domain(&self) -> &DomainId;

    /// The page size in bytes that it chose; 0 before [`start`](Self::start).
    fn page_size(&self) -> u64;

    /// Begins logging writes to `ranges`, which do not overlap. Comes before the first copy.
    ///
    /// # Errors
    /// When logging cannot be started; then every page of the domain is dirty.
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError>;

    /// Fetches and clears: calls `dirty` with each run of pages in `range` written since the last
    /// report. Runs are whole pages of the source and may reach beyond `range`.
    ///
    /// # Errors
    /// When the report failed; bits may already be cleared, so all of `range` must be taken as dirty.
    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError>;

    /// Ends logging.
    ///
    /// # Errors
    /// When the source cannot be told; it may then go on logging.
    fn stop(&mut self) -> Result<(), DirtyError>;
}

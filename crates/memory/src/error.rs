//! What can be wrong with an access to memory or with a file behind it.

use rustix::io::Errno;

/// An access was refused, or a file cannot be used as memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The access does not lie within the memory.
    #[error("{length} bytes at offset {offset:#x} are not within {size} bytes")]
    OutOfBounds {
        /// Where it begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Bytes that there are.
        size: u64,
    },
    /// An atomic access, or the offset of a mapping, must be aligned.
    #[error("offset {offset:#x} is not a multiple of {align}")]
    Misaligned {
        /// Where it begins, in bytes.
        offset: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// The mapping was made for reading only.
    #[error("the mapping is read-only")]
    ReadOnly,
    /// A mapping of no bytes was asked for.
    #[error("a mapping of length 0")]
    Empty,
    /// No region of guest memory holds this address.
    #[error("no memory at guest address {gpa:#x}")]
    Unmapped {
        /// The first address without memory.
        gpa: u64,
    },
    /// Two regions of guest memory share addresses, or one reaches beyond 2^64.
    #[error("regions at guest addresses {first:#x} and {second:#x} overlap or exceed 2^64")]
    Overlap {
        /// Where the lower one begins.
        first: u64,
        /// Where the upper one begins.
        second: u64,
    },
    /// The file holds less than was said.
    #[error("the file holds {actual} bytes, {expected} were promised")]
    TooSmall {
        /// What was asked for, in bytes.
        expected: u64,
        /// What `fstat` says, in bytes.
        actual: u64,
    },
    /// The system refused a call.
    #[error("{operation} failed: {errno}")]
    System {
        /// The call.
        operation: &'static str,
        /// Its error number.
        errno: Errno,
    },
}

impl MemoryError {
    /// For use with `map_err` on a system call.
    pub(crate) fn system(operation: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System { operation, errno }
    }

    /// The error number that says the same: `EFAULT` for an access, `EINVAL` for a wrong argument.
    #[must_use]
    pub const fn raw_errno(&self) -> i32 {
        match self {
            Self::OutOfBounds { .. } | Self::Unmapped { .. } => Errno::FAULT.raw_os_error(),
            Self::ReadOnly => Errno::ACCESS.raw_os_error(),
            Self::Misaligned { .. } | Self::Empty | Self::Overlap { .. } | Self::TooSmall { .. } => {
                Errno::INVAL.raw_os_error()
            }
            Self::System { errno, .. } => errno.raw_os_error(),
        }
    }
}

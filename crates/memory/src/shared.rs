//! A file as memory: memfds made here, and files handed in by others.

use crate::{Access, Mapping, MemoryError};
use rustix::fs::{MemfdFlags, SealFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A file that is mapped as memory, usually a memfd that is shared with another process.
#[derive(Debug)]
pub struct SharedMemory {
    fd: Arc<OwnedFd>,
    size: u64,
    shrink_sealed: bool,
}

impl SharedMemory {
    /// A new memfd of `size` bytes, zeroed, close-on-exec. Its size is sealed: nobody who gets the
    /// descriptor can make an access to it fail by truncating it. `name` shows in `/proc`.
    ///
    /// # Errors
    /// When the system refuses: out of memory or descriptors, or a name with a NUL.
    pub fn create(name: &str, size: u64) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, size)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { fd: Arc::new(fd), size, shrink_sealed: true })
    }

    /// Takes a file that somebody else made, of which `size` bytes are to be used.
    ///
    /// The file must hold them now. Whether it keeps them is only sure when
    /// [`is_shrink_sealed`](Self::is_shrink_sealed): the owner of an unsealed file can truncate it
    /// later, and the next access to a mapping of what is gone raises SIGBUS. Who takes files from a
    /// peer that is not trusted should refuse unsealed ones.
    ///
    /// # Errors
    /// [`MemoryError::TooSmall`] when the file holds less.
    pub fn from_fd(fd: OwnedFd, size: u64) -> Result<Self, MemoryError> {
        // Before the size: a file that is sealed only after it was looked at can be smaller by then.
        let seals = rustix::fs::fcntl_get_seals(&fd);
        let stat = rustix::fs::fstat(&fd).map_err(MemoryError::system("fstat"))?;
        let actual = u64::try_from(stat.st_size).unwrap_or(0);
        if actual < size {
            return Err(MemoryError::TooSmall { expected: size, actual });
        }
        let shrink_sealed = seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        Ok(Self { fd: Arc::new(fd), size, shrink_sealed })
    }

    /// Whether the file could not become smaller any more when its size was looked at. `false` also for
    /// files that have no seals.
    #[must_use]
    pub const fn is_shrink_sealed(&self) -> bool {
        self.shrink_sealed
    }

    /// The file.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Another descriptor of the file, close-on-exec.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Maps `length` bytes from `offset`, which is a multiple of the page size. The mapping lives on
    /// when this value is dropped.
    ///
    /// # Errors
    /// When the range is empty, misaligned or not within the file, or the system refuses.
    pub fn map(&self, offset: u64, length: u64, access: Access) -> Result<Mapping, MemoryError> {
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > self.size) {
            return Err(MemoryError::OutOfBounds { offset, length, size: self.size });
        }
        Mapping::of_shared(&self.fd, offset, length, access)
    }
}

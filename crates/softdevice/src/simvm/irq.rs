//! The guest's end of a device's interrupts: one eventfd for each vector.

use rustix::event::EventfdFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// VFIO's interrupt index of MSI-X.
pub(super) const MSIX: u32 = 2;

/// Eventfds of the vectors of one device.
#[derive(Debug)]
pub(super) struct Vectors {
    fds: Vec<OwnedFd>,
}

impl Vectors {
    pub(super) fn new(count: u32) -> std::io::Result<Self> {
        let make = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let fds = (0..count).map(|_| make()).collect::<Result<_, _>>()?;
        Ok(Self { fds })
    }

    pub(super) fn fds(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd)
    }

    pub(super) fn count(&self) -> usize {
        self.fds.len()
    }

    /// How often `vector` was raised since the last call.
    pub(super) fn take(&self, vector: usize) -> std::io::Result<u64> {
        let mut count = [0; 8];
        let Some(fd) = self.fds.get(vector) else { return Ok(0) };
        match rustix::io::read(fd, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(rustix::io::Errno::AGAIN) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Raises `vector` `count` times.
    pub(super) fn raise(&self, vector: usize, count: u64) -> std::io::Result<()> {
        let fd = self.fds.get(vector).ok_or(rustix::io::Errno::INVAL)?;
        rustix::io::write(fd, &count.to_ne_bytes())?;
        Ok(())
    }
}

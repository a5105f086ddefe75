//! An iommufd with one address space, what is mapped in it, and page tables that track dirty pages.

use super::dma_error;
use crate::OpenError;
use crate::open::open_node;
use crate::sys::{self, Dma};
use airlift_core::{DeviceError, Errno, IovaRange};
use airlift_memory::Mapping;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// An iommufd (`/dev/iommu`) and one of its address spaces, which any number of devices share. Clones
/// are the same. When the last one is dropped, what was mapped through it is unmapped.
#[derive(Clone, Debug)]
pub struct Iommufd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dma: Dma,
    fd: Arc<OwnedFd>,
    ioas: u32,
    // An address space that we have made is ours to end.
    own: bool,
    // Devices behind one IOMMU share a page table.
    tracking: Mutex<Vec<u32>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.dma.clear();
        let tables = std::mem::take(&mut *self.tracking.lock().unwrap_or_else(PoisonError::into_inner));
        // A table that a device is still attached to stays, which is what EBUSY says; it ends with the
        // descriptor.
        for table in tables.into_iter().chain(self.own.then_some(self.ioas)) {
            if let Err(errno) = sys::destroy(self.fd.as_fd(), table) {
                tracing::debug!(table, %errno, "IOMMU_DESTROY");
            }
        }
    }
}

impl Iommufd {
    /// A new iommufd with a new address space.
    ///
    /// # Errors
    /// When the host has none, or permission is missing.
    pub fn new() -> Result<Self, OpenError> {
        Self::open(Path::new("/dev/iommu"))
    }

    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let fd = open_node(path).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
                OpenError::NoVfio { path: path.into(), modules: "iommufd" }
            }
            errno => OpenError::of_node(path, errno),
        })?;
        Self::from_fd(fd)
    }

    /// A new address space of an iommufd that somebody else has made.
    ///
    /// # Errors
    /// When it is no iommufd.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        let ioas = sys::ioas_alloc(fd.as_fd()).map_err(|errno| match errno {
            Errno::ENOTTY | Errno::EINVAL => {
                OpenError::NotVfio { what: "the iommufd's descriptor".into(), wanted: "iommufd" }
            }
            errno => OpenError::Io { what: "IOMMU_IOAS_ALLOC".into(), errno },
        })?;
        Ok(Self::new_inner(fd, ioas, true))
    }

    /// The address space `ioas` of an iommufd that somebody else has made, who keeps it. What is mapped in
    /// it already is not known here, and stays. Whether there is such an address space is seen when a
    /// device is attached to it.
    #[must_use]
    pub fn with_ioas(fd: OwnedFd, ioas: u32) -> Self {
        Self::new_inner(fd, ioas, false)
    }

    fn new_inner(fd: OwnedFd, ioas: u32, own: bool) -> Self {
        let fd = Arc::new(fd);
        let dma = Dma::of_ioas(Arc::clone(&fd), ioas);
        Self(Arc::new(Inner { dma, fd, ioas, own, tracking: Mutex::default() }))
    }

    /// The number of its address space.
    #[must_use]
    pub fn ioas(&self) -> u32 {
        self.0.ioas
    }

    /// Whether the page table of an [`Attachment`](crate::Attachment) was made here to track dirty pages.
    /// `false` for an address space, and for what somebody else has made.
    #[must_use]
    pub fn tracks_dirty(&self, page_table: u32) -> bool {
        self.0.tracking.lock().unwrap_or_else(PoisonError::into_inner).contains(&page_table)
    }

    /// Maps all of `mapping`, which stays mapped in this process until it is unmapped here, at `iova` for
    /// DMA of all devices that are attached to the address space.
    ///
    /// # Errors
    /// EEXIST when the range is taken, EINVAL when it is misaligned, ENOMEM when the memory may not be
    /// pinned.
    pub fn map(&self, iova: u64, mapping: &Mapping) -> Result<(), DeviceError> {
        self.0.dma.map(iova, mapping).map_err(|e| dma_error("IOMMU_IOAS_MAP", iova, e))
    }

    /// Unmaps what [`map`](Self::map) has mapped at exactly this range. What was dirty in it must have been
    /// fetched before, when no device writes to it any more: iommufd has no unmapping that reports it.
    ///
    /// # Errors
    /// ENOENT when nothing was mapped here at this range; otherwise what the kernel refuses.
    pub fn unmap(&self, range: IovaRange) -> Result<(), DeviceError> {
        let iova = range.start.0;
        self.0.dma.unmap(iova, range.length, None).map_err(|e| dma_error("IOMMU_IOAS_UNMAP", iova, e))
    }

    /// The ranges that [`map`](Self::map) has mapped, by address. What others have mapped in the address
    /// space is not among them.
    #[must_use]
    pub fn mapped(&self) -> Vec<IovaRange> {
        self.0.dma.ranges().into_iter().map(|(start, length)| IovaRange::new(start, length)).collect()
    }

    /// Binds `device` and attaches it: to a page table that tracks dirty pages where its IOMMU can, and to
    /// the address space otherwise. Its number, and what it is attached to.
    pub(crate) fn attach(&self, device: BorrowedFd<'_>, name: &str) -> Result<(u32, u32), AttachError> {
        let number = sys::bind_iommufd(device, self.as_fd()).map_err(AttachError::Bind)?;
        let attach = |table| sys::attach_pt(device, table);
        // A device whose DMA is mediated has no IOMMU to ask about, and answers ENOENT.
        if sys::has_dirty_tracking(self.as_fd(), number) == Ok(true) {
            let mut tracking = self.0.tracking.lock().unwrap_or_else(PoisonError::into_inner);
            // A table of another IOMMU is refused with EINVAL.
            if let Some(table) = tracking.iter().copied().find(|table| attach(*table).is_ok()) {
                return Ok((number, table));
            }
            let own = sys::hwpt_alloc(self.as_fd(), number, self.0.ioas).and_then(|table| {
                attach(table).map(|_| table).inspect_err(|_| {
                    // What cannot be destroyed ends with the descriptor.
                    let _ = sys::destroy(self.as_fd(), table);
                })
            });
            match own {
                Ok(table) => {
                    tracking.push(table);
                    return Ok((number, table));
                }
                Err(errno) => tracing::warn!(
                    device = name,
                    %errno,
                    "no page table with dirty tracking although the IOMMU says that it can"
                ),
            }
        }
        let table = attach(self.0.ioas).map_err(AttachError::Attach)?;
        Ok((number, table))
    }
}

/// Which of the two steps failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttachError {
    /// VFIO_DEVICE_BIND_IOMMUFD.
    Bind(Errno),
    /// VFIO_DEVICE_ATTACH_IOMMUFD_PT.
    Attach(Errno),
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_something_else_is_no_iommufd() {
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        assert!(matches!(Iommufd::from_fd(pipe), Err(OpenError::NotVfio { .. })));
    }
}

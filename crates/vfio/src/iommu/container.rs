//! A type1 container, and what is mapped in it. Dirty logging is the embedder's to start and stop; what it
//! reports is in another module.

use super::dma_error;
use crate::OpenError;
use crate::dirty::bitmap::runs;
use crate::open::{Group, WeakGroup, open_node};
use crate::sys::{self, Dma};
use airlift_core::{DeviceError, Errno, IovaRange};
use airlift_memory::Mapping;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Most pages that an unmapping fetches bits for (a bitmap of 32 MiB); the kernel has a limit too. With
/// more, all of the range is reported as dirty.
const MAX_UNMAP_PAGES: u64 = 1 << 28;

/// A type1 container (`/dev/vfio/vfio`), which any number of groups share. Clones are the same
/// container. When the last one is dropped, what was mapped through it is unmapped.
#[derive(Clone, Debug)]
pub struct Container(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dma: Dma,
    fd: Arc<OwnedFd>,
    // A group can be opened once only, so that its second device must find the first one's.
    groups: Mutex<Vec<WeakGroup>>,
}

impl Container {
    /// A new container.
    ///
    /// # Errors
    /// When the host has no VFIO or no type1, or permission is missing.
    pub fn new() -> Result<Self, OpenError> {
        Self::open(Path::new("/dev/vfio/vfio"))
    }

    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let fd = open_node(path).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
                OpenError::NoVfio { path: path.into(), modules: "vfio, vfio_iommu_type1" }
            }
            errno => OpenError::of_node(path, errno),
        })?;
        Self::from_fd(fd)
    }

    /// A container that somebody else has made. What is mapped in it already is not known here, and
    /// stays.
    ///
    /// # Errors
    /// When it is no VFIO container or has no type1.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        match sys::check_extension(fd.as_fd()) {
            Ok(true) => {}
            Ok(false) => {
                let (path, modules) = ("type1 in the container".into(), "vfio_iommu_type1");
                return Err(OpenError::NoVfio { path, modules });
            }
            Err(_) => {
                return Err(OpenError::NotVfio {
                    what: "the container's descriptor".into(),
                    wanted: "container",
                });
            }
        }
        let fd = Arc::new(fd);
        Ok(Self(Arc::new(Inner { dma: Dma::of_container(Arc::clone(&fd)), fd, groups: Mutex::default() })))
    }

    /// Maps all of `mapping`, which stays mapped in this process until it is unmapped here, at `iova`
    /// for DMA of all devices in the container (K-MAPPED).
    ///
    /// # Errors
    /// EEXIST when the range is taken, EINVAL when it is misaligned or no device was opened in the
    /// container yet, ENOMEM when the memory may not be pinned.
    pub fn map(&self, iova: u64, mapping: &Mapping) -> Result<(), DeviceError> {
        self.0.dma.map(iova, mapping).map_err(|e| dma_error("VFIO_IOMMU_MAP_DMA", iova, e))
    }

    /// Unmaps what [`map`](Self::map) has mapped at exactly this range. With `page_size` (of dirty
    /// logging, which must be on) gives the runs of its pages that were dirty (V2-DIRTY-UNMAP); without, nothing.
    ///
    /// # Errors
    /// ENOENT when nothing was mapped here at this range; otherwise what the kernel refuses.
    pub fn unmap(&self, range: IovaRange, page_size: Option<u64>) -> Result<Vec<IovaRange>, DeviceError> {
        let (iova, length) = (range.start.0, range.length);
        let refused = |e| dma_error("VFIO_IOMMU_UNMAP_DMA", iova, e);
        let Some(page_size) = page_size else {
            return self.0.dma.unmap(iova, length, None).map(|()| Vec::new()).map_err(refused);
        };
        if !page_size.is_power_of_two() {
            return Err(refused(Errno::EINVAL));
        }
        let pages = length.div_ceil(page_size);
        let Some(words) = usize::try_from(pages.div_ceil(64)).ok().filter(|_| pages <= MAX_UNMAP_PAGES)
        else {
            // Over-reporting is allowed (V2-DIRTY).
            return self.0.dma.unmap(iova, length, None).map(|()| vec![range]).map_err(refused);
        };
        let mut bitmap = vec![0; words];
        self.0.dma.unmap(iova, length, Some((page_size, &mut bitmap))).map_err(refused)?;
        let mut dirty = Vec::new();
        runs(iova, length, page_size, &bitmap, &mut |run| dirty.push(run));
        Ok(dirty)
    }

    /// The ranges that [`map`](Self::map) has mapped, by address. What others have mapped in the
    /// container is not among them.
    #[must_use]
    pub fn mapped(&self) -> Vec<IovaRange> {
        self.0.dma.ranges().into_iter().map(|(start, length)| IovaRange::new(start, length)).collect()
    }

    /// The group of this number: the one that a device of it was opened through in this container, or
    /// else what `open` gives, made part of the container for the device `name`.
    pub(crate) fn group(
        &self,
        number: u32,
        name: &str,
        open: impl FnOnce() -> Result<Group, OpenError>,
    ) -> Result<Group, OpenError> {
        let mut groups = self.0.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.upgrade().is_some());
        if let Some(group) = groups.iter().filter_map(WeakGroup::upgrade).find(|g| g.number() == number) {
            return Ok(group);
        }
        let group = open()?;
        sys::set_container(group.as_fd(), self.as_fd())
            .map_err(|e| OpenError::of_iommu("VFIO_GROUP_SET_CONTAINER", name, e))?;
        // The first group decides for type1; to ask a container that has decided is an error.
        if sys::type1_dirty(self.as_fd()).is_err() {
            sys::set_type1(self.as_fd()).map_err(|e| OpenError::of_iommu("VFIO_SET_IOMMU", name, e))?;
        }
        groups.push(group.downgrade());
        Ok(group)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_something_else_is_no_container() {
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        assert!(matches!(Container::from_fd(pipe), Err(OpenError::NotVfio { .. })));
    }
}

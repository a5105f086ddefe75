//! Memory that is mapped for DMA, and kept for as long as it is.
//!
//! The kernel may look an address up whenever a device writes, so a mapping must not end before the
//! kernel was told (K-MAPPED). That is why this is here, and why the two unsafe calls are used nowhere else.

use super::{container, iommufd};
use airlift_core::Errno;
use airlift_memory::Mapping;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The memory that this process has mapped in one container or one address space of an iommufd.
#[derive(Debug)]
pub(crate) struct Dma {
    fd: Arc<OwnedFd>,
    ioas: Option<u32>,
    mapped: Mutex<BTreeMap<u64, Mapping>>,
}

impl Dma {
    /// Of a container.
    pub(crate) fn of_container(fd: Arc<OwnedFd>) -> Self {
        Self { fd, ioas: None, mapped: Mutex::default() }
    }

    /// Of the address space `ioas` of an iommufd.
    pub(crate) fn of_ioas(fd: Arc<OwnedFd>, ioas: u32) -> Self {
        Self { fd, ioas: Some(ioas), mapped: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps all of `mapping` at `iova` and keeps it.
    pub(crate) fn map(&self, iova: u64, mapping: &Mapping) -> Result<(), Errno> {
        let mut mapped = self.lock();
        if mapped.contains_key(&iova) {
            return Err(Errno::EEXIST);
        }
        let (length, address) = (mapping.len(), mapping.as_ptr());
        match self.ioas {
            // SAFETY: `mapping` is kept below until the range is unmapped; everything that uses its memory
            // knows that others write to it (the promise of `Mapping`).
            None => unsafe { container::map_dma(self.fd.as_fd(), iova, length, address) },
            // SAFETY: as above.
            Some(ioas) => unsafe { iommufd::ioas_map(self.fd.as_fd(), ioas, iova, length, address) },
        }?;
        mapped.insert(iova, mapping.clone());
        Ok(())
    }

    /// Unmaps what was mapped at `iova` with this length; with a bitmap (containers only) its dirty pages
    /// are put into it.
    pub(crate) fn unmap(
        &self,
        iova: u64,
        length: u64,
        dirty: Option<(u64, &mut [u64])>,
    ) -> Result<(), Errno> {
        let mut mapped = self.lock();
        if mapped.get(&iova).is_none_or(|m| m.len() != length) {
            return Err(Errno::ENOENT);
        }
        self.tell(iova, length, dirty)?;
        mapped.remove(&iova);
        Ok(())
    }

    fn tell(&self, iova: u64, length: u64, dirty: Option<(u64, &mut [u64])>) -> Result<u64, Errno> {
        match self.ioas {
            None => container::unmap_dma(self.fd.as_fd(), iova, length, dirty),
            Some(_) if dirty.is_some() => Err(Errno::EOPNOTSUPP),
            Some(ioas) => iommufd::ioas_unmap(self.fd.as_fd(), ioas, iova, length),
        }
    }

    /// What is mapped: (iova, length), by address.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        self.lock().iter().map(|(iova, mapping)| (*iova, mapping.len())).collect()
    }

    /// Unmaps everything.
    pub(crate) fn clear(&self) {
        let mapped = std::mem::take(&mut *self.lock());
        for (iova, mapping) in mapped {
            // Others may still hold the descriptor, and a device in it may still write.
            if self.tell(iova, mapping.len(), None).is_err() {
                std::mem::forget(mapping);
            }
        }
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_memory::{Access, SharedMemory};

    // K-MAPPED
    #[test]
    fn memory_that_the_kernel_did_not_take_is_not_kept() {
        // A pipe takes neither request.
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        let memory = SharedMemory::create("dma", 4096).unwrap().map(0, 4096, Access::ReadWrite).unwrap();
        for dma in [Dma::of_container(Arc::new(pipe.try_clone().unwrap())), Dma::of_ioas(Arc::new(pipe), 1)] {
            assert_eq!(dma.map(0, &memory), Err(Errno::ENOTTY));
            assert_eq!(dma.ranges(), []);
            assert_eq!(dma.unmap(0, 4096, None), Err(Errno::ENOENT));
        }
    }
}

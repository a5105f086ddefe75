//! What devices' DMA goes through: type1 containers, and iommufds with an address space.
//!
//! Both keep the memory that is mapped in them through here for as long as it is mapped. Whether a
//! device's DMA really reaches what is mapped, and with which rights, is the kernel's affair.

mod container;
mod iommufd;

pub use container::Container;
pub(crate) use iommufd::AttachError;
pub use iommufd::Iommufd;

use crate::error::refused;
use airlift_core::{DeviceError, Errno};

/// The error of a request to map or unmap, in words that fit it.
fn dma_error(operation: &str, iova: u64, errno: Errno) -> DeviceError {
    let message = match errno {
        Errno::EEXIST => "something is mapped there already".into(),
        Errno::ENOENT => "nothing was mapped there with this length".into(),
        Errno::ENOMEM => {
            "memory could not be pinned: raise the limit of locked memory (RLIMIT_MEMLOCK, `ulimit -l`)"
                .into()
        }
        Errno::ENOSPC => "the container takes no more mappings (vfio_iommu_type1.dma_entry_limit)".into(),
        Errno::EINVAL => {
            "misaligned, outside of what the IOMMU can address, or no device was opened yet".into()
        }
        Errno::EADDRINUSE => "the range touches one that the host reserves, or one in use".into(),
        _ => refused(operation, errno).message,
    };
    DeviceError { message: format!("iova {iova:#x}: {message}"), ..refused(operation, errno) }
}

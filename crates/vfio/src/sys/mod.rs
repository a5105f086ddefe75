//! Every ioctl of this crate, each as a safe function over borrowed descriptors, and the clock that
//! ends a call which blocks. The only module with unsafe code.
//!
//! Functions here say what the kernel said: a value, or its error number. They interpret nothing and,
//! apart from memory that is mapped for DMA (`dma`), remember nothing.

#![allow(unsafe_code, reason = "ioctls, signals and timers; each block gives its own reason")]

mod alarm;
mod caps;
mod container;
mod device;
mod dma;
mod feature;
mod ioctl;
mod iommufd;
mod pages;

pub(crate) use alarm::{Alarm, CallError};
pub(crate) use container::{
    Type1Dirty, check_extension, dirty_bitmap, dirty_start, dirty_stop, get_device_fd, group_status,
    group_viable, set_container, set_type1, type1_dirty,
};
pub(crate) use device::{
    IrqData, attach_pt, bind_iommufd, device_info, duplicate, irq_info, region_info, reset, set_irqs,
};
pub(crate) use dma::Dma;
pub(crate) use feature::{
    data_size, get_state, has_feature, logging_report, logging_start, logging_stop, migration_flags,
    precopy_info, precopy_info_v2, set_state,
};
pub(crate) use iommufd::{
    destroy, has_dirty_tracking, hwpt_alloc, hwpt_dirty_bitmap, hwpt_dirty_tracking, ioas_alloc, ioas_copy,
};

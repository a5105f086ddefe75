//! What is needed of a device to save and restore its configuration, so that both can be tested without
//! one; and how a kernel device does it.

use crate::fd::{DeviceFd, RegionInfo};
use airlift_core::{DeviceError, Errno};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};

/// The two kinds of interrupt that are switched on by request and not by a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
}

impl Message {
    const fn index(self) -> u32 {
        match self {
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Msi => "MSI",
            Self::Msix => "MSI-X",
        }
    }
}

/// A PCI device, for its configuration.
pub(super) trait Access {
    /// Bytes of configuration space that it shows.
    fn config_size(&self) -> u64;
    /// Reads configuration space.
    fn read_config(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;
    /// Writes one register of 1, 2 or 4 bytes.
    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError>;
    /// Reads from a BAR.
    fn read_bar(&self, bar: u8, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;
    /// Writes to a BAR.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError>;
    /// Vectors that it has of a kind.
    fn vectors(&self, kind: Message) -> Result<u32, DeviceError>;
    /// Switches `count` vectors on, which signal nobody yet; 0 switches the kind off.
    fn enable(&self, kind: Message, count: u32) -> Result<(), DeviceError>;
}

/// A kernel device.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    fd: DeviceFd,
    config: RegionInfo,
}

impl Kernel {
    pub(super) fn new(fd: &DeviceFd) -> Result<Self, DeviceError> {
        Ok(Self { config: fd.region(VFIO_PCI_CONFIG_REGION_INDEX)?, fd: fd.clone() })
    }
}

impl Access for Kernel {
    fn config_size(&self) -> u64 {
        self.config.size
    }

    fn read_config(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.fd.read_region(&self.config, offset, buf)
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.fd.write_region(&self.config, offset, data)
    }

    fn read_bar(&self, bar: u8, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.fd.read_region(&self.fd.region(bar.into())?, offset, buf)
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.fd.write_region(&self.fd.region(bar.into())?, offset, data)
    }

    fn vectors(&self, kind: Message) -> Result<u32, DeviceError> {
        self.fd.irq_count(kind.index())
    }

    fn enable(&self, kind: Message, count: u32) -> Result<(), DeviceError> {
        if count == 0 {
            return self.fd.disable_irqs(kind.index());
        }
        let none = usize::try_from(count).unwrap_or(usize::MAX).min(usize::from(super::layout::MAX_VECTORS));
        self.fd.set_eventfds(kind.index(), 0, &vec![None; none]).map_err(|error| match error.errno {
            Some(Errno::EINVAL | Errno::ENOSPC) => DeviceError {
                message: format!("the host gives no {count} vectors of {}", kind.name()),
                ..error
            },
            _ => error,
        })
    }
}

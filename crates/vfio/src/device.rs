//! A migratable device of the kernel, as the engine drives it, over whichever interface its driver has.
//!
//! Its state is asked for first (K-GET-FIRST), and then each time anew (V2-STALE, V1-RESET); what the
//! device can do is asked once, at the beginning. Which interface it has is seen by whether it can say
//! its state: a driver of interface v1 does not know the question, and has the migration region instead.

use crate::identity::identity;
use crate::v1::V1;
use crate::v2::V2;
use crate::walk::Driver;
use crate::{Attachment, open};
use crate::{DeviceAddress, DeviceFd, OpenDevice, OpenOptions, PciConfig, Recover, VfioOptions};
use airlift_core::v1::MigrationRegion;
use airlift_core::{
    Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Errno, Interrupter,
    MigrationDevice, Session, TransitionError,
};
use std::os::fd::{AsRawFd, OwnedFd};

/// A device that the kernel's VFIO drives, with migration interface v2 or v1.
#[derive(Debug)]
pub struct VfioDevice {
    id: DeviceId,
    opened: OpenDevice,
    speaks: Speaks,
    identity: DeviceIdentity,
    found: DeviceState,
    config: Option<PciConfig>,
}

/// The interface of a device.
#[derive(Debug)]
enum Speaks {
    V1(Box<V1>),
    V2(Box<V2>),
}

impl Speaks {
    /// The interface that the driver has, and the state in which the device was found.
    fn find(id: &DeviceId, fd: &DeviceFd, options: VfioOptions) -> Result<(Self, DeviceState), DeviceError> {
        match fd.get_state(options.answer_timeout) {
            Ok(found) => Ok((Self::V2(Box::new(V2::new(id.clone(), fd, options)?)), found)),
            Err(error) if error.errno == Some(Errno::ENOTTY) => {
                let v1 = V1::new(id.clone(), fd, &options)?;
                v1.map(|(v1, found)| (Self::V1(Box::new(v1)), found)).ok_or_else(|| {
                    let message =
                        "the driver has no migration: neither interface v2 nor the migration region of v1";
                    DeviceError { kind: DeviceErrorKind::Unsupported, message: message.into(), ..error }
                })
            }
            Err(error) if error.errno == Some(Errno::EINVAL) => {
                let message =
                    "the descriptor is not that of a VFIO device, or of a cdev that was not bound yet";
                Err(DeviceError { message: message.into(), ..error })
            }
            Err(error) => Err(error),
        }
    }

    fn capabilities(&self) -> Capabilities {
        match self {
            Self::V1(v1) => v1.capabilities(),
            Self::V2(v2) => v2.capabilities(),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        match self {
            Self::V1(v1) => v1.reset(),
            Self::V2(v2) => v2.reset(),
        }
    }
}

impl VfioDevice {
    /// Uses an open device. Asks for its state first: a process that died has left it as it was, and
    /// [`VfioOptions::recover`] says what is done then.
    ///
    /// # Errors
    /// [`DeviceErrorKind::Unsupported`] when the driver has no migration; otherwise when the driver
    /// refuses, or does not answer in time.
    pub fn new(id: DeviceId, opened: OpenDevice, options: VfioOptions) -> Result<Self, DeviceError> {
        let recover = options.recover.unwrap_or(match opened.attachment {
            Attachment::Given => Recover::Leave,
            Attachment::Iommufd { .. } | Attachment::Container { .. } => Recover::Reset,
        });
        let (mut speaks, found) = Speaks::find(&id, &opened.fd, options)?;
        // Before the device is looked at: in STOP_COPY it is to be left alone.
        if found != DeviceState::Running && recover == Recover::Reset {
            tracing::warn!(device = %id, state = %found, "an unfinished migration is cleared away by a reset");
            speaks.reset()?;
        }
        let identity = identity(&opened, speaks.capabilities().flags)?;
        let config = PciConfig::new(&opened.fd)?;
        Ok(Self { id, opened, speaks, identity, found, config })
    }

    /// Uses a device descriptor that a VMM has opened, attached to its IOMMU context, and handed over.
    /// The device is not reset here unless `options` say so.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when it is not the descriptor of a VFIO device.
    pub fn from_fd(id: DeviceId, fd: OwnedFd, options: VfioOptions) -> Result<Self, DeviceError> {
        let address = DeviceAddress::Fd(fd.as_raw_fd());
        let opened = open(&address, &OpenOptions::default()).map_err(|error| {
            DeviceError::new(DeviceErrorKind::Misuse, "use of a device descriptor", error.to_string())
        })?;
        Self::new(id, opened, options)
    }

    /// The state in which the device was found, before anything was done about it. Another one than
    /// RUNNING is left over from an unfinished migration.
    #[must_use]
    pub const fn found_state(&self) -> DeviceState {
        self.found
    }

    /// The device's descriptor.
    #[must_use]
    pub const fn fd(&self) -> &DeviceFd {
        &self.opened.fd
    }

    /// The open device.
    #[must_use]
    pub const fn opened(&self) -> &OpenDevice {
        &self.opened
    }

    /// The device's PCI configuration, which its migration data does not hold; `None` for a device that
    /// is not PCI.
    #[must_use]
    pub fn config(&self) -> Option<PciConfig> {
        self.config.clone()
    }

    /// The migration region of a device of interface v1.
    #[must_use]
    pub fn migration_region(&self) -> Option<&MigrationRegion> {
        match &self.speaks {
            Speaks::V1(v1) => Some(v1.region()),
            Speaks::V2(_) => None,
        }
    }
}

impl MigrationDevice for VfioDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn capabilities(&self) -> Capabilities {
        self.speaks.capabilities()
    }

    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        match &mut self.speaks {
            Speaks::V1(v1) => v1.state(),
            Speaks::V2(v2) => v2.state(),
        }
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        match &mut self.speaks {
            Speaks::V1(v1) => v1.set_state(target),
            Speaks::V2(v2) => v2.set_state(target),
        }
    }

    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        match &mut self.speaks {
            // The interface cannot say it before the device has stopped.
            Speaks::V1(_) => Ok(None),
            Speaks::V2(v2) => v2.stop_copy_size(),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.speaks.reset()
    }

    fn interrupter(&self) -> Interrupter {
        match &self.speaks {
            Speaks::V1(v1) => v1.interrupter(),
            Speaks::V2(v2) => v2.interrupter(),
        }
    }
}

//! A migratable device of the kernel, as the engine drives it: interface v2.
//!
//! Its state is asked for first (K-GET-FIRST), and then each time anew (V2-STALE); what the device can do is asked once,
//! at the beginning.
//! Interface v1 is recognised and refused.

use crate::error::{ended, refused};
use crate::identity::identity;
use crate::session::Manner;
use crate::sys::{self, CallError};
use crate::walk::{Driver, GET_STATE, SET_STATE, States};
use crate::{Attachment, open};
use crate::{DeviceAddress, DeviceFd, OpenDevice, OpenOptions, PciConfig, Recover, VfioOptions};
use airlift_core::{
    Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Errno, Interrupter,
    MigrationDevice, Session, TransitionError,
};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
    VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED, VFIO_REGION_TYPE_MIGRATION_DEPRECATED,
};

const GET_FLAGS: &str = "GET MIGRATION";
const PROBE: &str = "PROBE of a feature";

/// Most regions that are looked through for the one of interface v1.
const MAX_REGIONS: u32 = 128;

impl Driver for DeviceFd {
    fn get_state(&self, timeout: Duration) -> Result<DeviceState, DeviceError> {
        let raw = self.alarm().call(timeout, || sys::get_state(self.as_fd()));
        raw.map(DeviceState::from_raw).map_err(|e| ended(GET_STATE, e))
    }

    fn set_state(&self, state: DeviceState, timeout: Duration) -> Result<Option<OwnedFd>, DeviceError> {
        let set = self.alarm().call(timeout, || sys::set_state(self.as_fd(), state.to_raw()));
        set.map_err(|e| ended(SET_STATE, e))
    }

    fn reset(&self, timeout: Duration) -> Result<(), DeviceError> {
        Self::reset(self, timeout)
    }
}

/// A device that the kernel's VFIO drives, with migration interface v2.
#[derive(Debug)]
pub struct VfioDevice {
    opened: OpenDevice,
    states: States<DeviceFd>,
    identity: DeviceIdentity,
    found: DeviceState,
    data_size: bool,
    config: Option<PciConfig>,
}

impl VfioDevice {
    /// Uses an open device. Asks for its state first: a process that died has left it as it was, and
    /// [`VfioOptions::recover`] says what is done then.
    ///
    /// # Errors
    /// [`DeviceErrorKind::Unsupported`] when the driver has no migration, or only that of interface v1;
    /// otherwise when the driver refuses, or does not answer in time.
    pub fn new(id: DeviceId, opened: OpenDevice, options: VfioOptions) -> Result<Self, DeviceError> {
        let fd = opened.fd.clone();
        let answer = options.answer_timeout;
        let found = fd.get_state(answer).map_err(|error| not_migratable(&fd, error))?;
        let recover = options.recover.unwrap_or(match opened.attachment {
            Attachment::Given => Recover::Leave,
            Attachment::Iommufd { .. } | Attachment::Container { .. } => Recover::Reset,
        });
        let flags = fd.alarm().call(answer, || sys::migration_flags(fd.as_fd()));
        let flags = flags.map_err(|e| ended(GET_FLAGS, e))?;
        let mut capabilities = Capabilities::v2(flags)
            .map_err(|error| DeviceError::new(DeviceErrorKind::Unsupported, GET_FLAGS, error.to_string()))?;
        let has = |feature, set| {
            let probed = fd.alarm().call(answer, || sys::has_feature(fd.as_fd(), feature, set));
            probed.map_err(|e| ended(PROBE, e))
        };
        let data_size = has(VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, false)?;
        // Lasts until the device's last close, so that a reset does not take it back.
        capabilities.reinit = capabilities.precopy()
            && has(VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, true)?
            && fd.alarm().call(answer, || sys::precopy_info_v2(fd.as_fd())).is_ok();

        let alarm = fd.alarm().clone();
        let manner =
            Manner { alarm, rings: Arc::new(AtomicU64::new(0)), options, reinit: capabilities.reinit };
        let mut states = States::new(id, fd.clone(), capabilities, manner);
        // Before the device is looked at: in STOP_COPY it is to be left alone.
        if found != DeviceState::Running && recover == Recover::Reset {
            tracing::warn!(device = %states.id, state = %found, "an unfinished migration is cleared away by a reset");
            states.reset()?;
        }
        let identity = identity(&opened, capabilities.flags)?;
        let config = PciConfig::new(&fd)?;
        Ok(Self { opened, states, identity, found, data_size, config })
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
}

/// What stands behind a refusal to say the state.
fn not_migratable(fd: &DeviceFd, error: DeviceError) -> DeviceError {
    match error.errno {
        Some(Errno::ENOTTY) => {}
        Some(Errno::EINVAL) => {
            let message = "the descriptor is not that of a VFIO device, or of a cdev that was not bound yet";
            return DeviceError { message: message.into(), ..error };
        }
        _ => return error,
    }
    let message = match has_v1_region(fd) {
        Ok(true) => "the driver has migration interface v1, which this version does not drive yet",
        Ok(false) => "the driver has no migration",
        Err(error) => return error,
    };
    DeviceError { kind: DeviceErrorKind::Unsupported, message: message.into(), ..error }
}

fn has_v1_region(fd: &DeviceFd) -> Result<bool, DeviceError> {
    let kind = Some((VFIO_REGION_TYPE_MIGRATION_DEPRECATED, VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED));
    for index in 0..fd.info()?.regions.min(MAX_REGIONS) {
        match fd.region(index) {
            Ok(region) if region.kind == kind => return Ok(true),
            Ok(_) => {}
            // Numbers may have gaps.
            Err(error) if error.errno == Some(Errno::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

impl MigrationDevice for VfioDevice {
    fn id(&self) -> &DeviceId {
        &self.states.id
    }

    fn capabilities(&self) -> Capabilities {
        self.states.capabilities
    }

    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        self.states.state()
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        self.states.set_state(target)
    }

    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        if !self.data_size {
            return Ok(None);
        }
        let (fd, timeout) = (&self.opened.fd, self.states.manner.options.answer_timeout);
        match fd.alarm().call(timeout, || sys::data_size(fd.as_fd())) {
            Ok(size) => Ok(Some(size)),
            Err(CallError::Errno(errno @ (Errno::ENODEV | Errno::ENXIO))) => {
                Err(refused("GET MIG_DATA_SIZE", errno))
            }
            // An estimate, which a driver may be unable to give (V2-ESTIMATE).
            Err(CallError::Errno(_)) => Ok(None),
            Err(error) => Err(ended("GET MIG_DATA_SIZE", error)),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.states.reset()
    }

    fn interrupter(&self) -> Interrupter {
        let (alarm, rings) = (self.states.manner.alarm.clone(), Arc::clone(&self.states.manner.rings));
        Interrupter::new(move || {
            rings.fetch_add(1, Ordering::AcqRel);
            alarm.ring();
        })
    }
}

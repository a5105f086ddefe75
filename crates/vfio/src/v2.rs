//! Interface v2 of a kernel device: what it can do, its states, and the estimate of its size.
//!
//! The walk from state to state is in `walk`, the data in `session`; this is what drives them through a
//! device's descriptor.

use crate::error::{ended, refused};
use crate::session::Manner;
use crate::sys::{self, CallError};
use crate::walk::{Driver, GET_STATE, SET_STATE, States};
use crate::{DeviceFd, VfioOptions};
use airlift_core::{
    Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceState, Errno, Interrupter, Session,
    TransitionError,
};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
};

const GET_FLAGS: &str = "GET MIGRATION";
const PROBE: &str = "PROBE of a feature";

impl Driver for DeviceFd {
    fn get_state(&self, timeout: Duration) -> Result<DeviceState, DeviceError> {
        let raw = self.alarm().call(timeout, || sys::get_state(self.as_fd()));
        raw.map(DeviceState::from_raw).map_err(|e| ended(GET_STATE, e))
    }

    fn set_state(
        &self,
        state: DeviceState,
        rings: u64,
        timeout: Duration,
    ) -> Result<Option<OwnedFd>, DeviceError> {
        let set = || sys::set_state(self.as_fd(), state.to_raw());
        let set = self.alarm().call_since(rings, timeout, set);
        set.map_err(|e| ended(SET_STATE, e))
    }

    fn reset(&self, timeout: Duration) -> Result<(), DeviceError> {
        Self::reset(self, timeout)
    }
}

/// A device with interface v2.
#[derive(Debug)]
pub(crate) struct V2 {
    states: States<DeviceFd>,
    data_size: bool,
}

impl V2 {
    /// Asks what the device can do. It has the interface: its state was asked for before (K-GET-FIRST).
    ///
    /// # Errors
    /// When the driver says what cannot be, or does not answer in time.
    pub(crate) fn new(id: DeviceId, fd: &DeviceFd, options: VfioOptions) -> Result<Self, DeviceError> {
        let answer = options.answer_timeout;
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
        let manner = Manner { alarm, options, reinit: capabilities.reinit };
        Ok(Self { states: States::new(id, fd.clone(), capabilities, manner), data_size })
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        self.states.capabilities
    }

    pub(crate) fn state(&mut self) -> Result<DeviceState, DeviceError> {
        self.states.state()
    }

    pub(crate) fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        self.states.set_state(target)
    }

    pub(crate) fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        if !self.data_size {
            return Ok(None);
        }
        let (fd, timeout) = (&self.states.driver, self.states.manner.options.answer_timeout);
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

    pub(crate) fn reset(&mut self) -> Result<(), DeviceError> {
        self.states.reset()
    }

    pub(crate) fn interrupter(&self) -> Interrupter {
        let alarm = self.states.manner.alarm.clone();
        Interrupter::new(move || alarm.ring())
    }
}

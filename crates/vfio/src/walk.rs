//! A device's states over interface v2: walking from one to another, one arc at a time, and what
//! becomes of the data session on the way.
//!
//! The kernel would also take a request over several arcs in one call. Each arc is asked for by itself
//! instead: then it is certain which arc a data descriptor belongs to, a failure names the arc, and each
//! arc has a time of its own. It costs one system call of some microseconds for each.
//!
//! Whether it is the right moment for an arc is the engine's to know.

use crate::session::{DataFile, Direction, Load, Manner, Save};
use airlift_core::{
    Arc as StateArc, ArcSession, Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceState, Errno,
    Session, TransitionError, path,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const GET_STATE: &str = "GET MIG_DEVICE_STATE";
pub(crate) const SET_STATE: &str = "SET MIG_DEVICE_STATE";

/// Longest wait for the state after a call that was given up.
const READ_BACK: Duration = Duration::from_secs(2);

/// The driver's side of it: the kernel, and something else in tests.
pub(crate) trait Driver {
    /// GET of the state.
    fn get_state(&self, timeout: Duration) -> Result<DeviceState, DeviceError>;
    /// SET of the state, which is a single arc away: the data descriptor, where the driver gives one.
    /// Not made when the alarm was rung more often than `rings` times.
    fn set_state(
        &self,
        state: DeviceState,
        rings: u64,
        timeout: Duration,
    ) -> Result<Option<OwnedFd>, DeviceError>;
    /// VFIO_DEVICE_RESET.
    fn reset(&self, timeout: Duration) -> Result<(), DeviceError>;
}

/// A device's states.
#[derive(Debug)]
pub(crate) struct States<D> {
    pub(crate) id: DeviceId,
    pub(crate) driver: D,
    pub(crate) capabilities: Capabilities,
    pub(crate) manner: Manner,
    file: Option<Arc<DataFile>>,
}

fn failure(from: DeviceState, to: DeviceState, error: DeviceError) -> TransitionError {
    TransitionError { from, to, reached: Ok(from), error }
}

impl<D: Driver> States<D> {
    pub(crate) fn new(id: DeviceId, driver: D, capabilities: Capabilities, manner: Manner) -> Self {
        Self { id, driver, capabilities, manner, file: None }
    }

    /// Reads the state, and closes a session that the device has left by itself (V2-STALE).
    pub(crate) fn state(&mut self) -> Result<DeviceState, DeviceError> {
        self.read_state(self.manner.options.answer_timeout)
    }

    fn read_state(&mut self, timeout: Duration) -> Result<DeviceState, DeviceError> {
        let state = self.driver.get_state(timeout)?;
        self.moved(state);
        Ok(state)
    }

    fn moved(&mut self, state: DeviceState) {
        self.file = self.file.take().filter(|file| file.moved(state));
    }

    /// Resets the device and makes sure that it has become RUNNING (V2-ERROR).
    pub(crate) fn reset(&mut self) -> Result<(), DeviceError> {
        let done = self.driver.reset(self.manner.options.transition_timeout);
        let state = self.state();
        done?;
        match state? {
            DeviceState::Running => Ok(()),
            state => Err(crate::error::protocol(
                "VFIO_DEVICE_RESET",
                format!("the device is in {state} after a reset that the driver says was made"),
            )),
        }
    }

    /// Walks to `target`, arc by arc.
    pub(crate) fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        let rings = self.manner.alarm.rings();
        let from = match self.state() {
            Ok(from) => from,
            Err(error) => {
                let from = DeviceState::UNREAD;
                return Err(TransitionError { from, to: target, reached: Err(error.clone()), error });
            }
        };
        let arcs = path(from, target, &self.capabilities).map_err(|error| {
            let kind = DeviceErrorKind::Misuse;
            let error = DeviceError::new(kind, SET_STATE, error.to_string());
            failure(from, target, DeviceError { errno: Some(Errno::EINVAL), ..error })
        })?;
        // The driver may have counted what it refused and would load it (V2-WRITE-FINAL).
        let spoiled = self.file.as_ref().and_then(|file| file.load_failure());
        if let Some(error) = spoiled.filter(|_| !arcs.is_empty()) {
            let message =
                format!("only a reset leaves RESUMING now, because a write has failed: {}", error.message);
            let error = DeviceError { operation: SET_STATE.into(), message, ..error };
            return Err(failure(from, target, error));
        }
        let several = arcs.len() > 1;
        let mut session = None;
        for arc in arcs {
            match self.make(arc, rings) {
                Ok(opened) => session = opened.or(session),
                Err(mut error) => {
                    if several {
                        error.message = format!("{arc}: {}", error.message);
                    }
                    return Err(self.failed(from, target, error));
                }
            }
        }
        Ok(session)
    }

    /// Never guessed (V2-READBACK). A driver that is stuck is not waited for as long again.
    fn failed(&mut self, from: DeviceState, to: DeviceState, error: DeviceError) -> TransitionError {
        let usual = self.manner.options.answer_timeout;
        let slow = matches!(error.kind, DeviceErrorKind::TimedOut | DeviceErrorKind::Interrupted);
        let reached = self.read_state(if slow { usual.min(READ_BACK) } else { usual });
        tracing::warn!(device = %self.id, %from, %to, %error, reached = ?reached, "a transition has failed");
        TransitionError { from, to, reached, error }
    }

    /// Makes one arc: the session that it has opened.
    fn make(&mut self, arc: StateArc, rings: u64) -> Result<Option<Session>, DeviceError> {
        let begun = Instant::now();
        let fd = self.driver.set_state(arc.to, rings, self.manner.options.transition_timeout)?;
        let took_us = begun.elapsed().as_micros();
        tracing::debug!(name: "vfio_migration_set_device_state", device = %self.id, from = %arc.from, state = %arc.to, took_us);
        let direction = match arc.session() {
            ArcSession::OpensSave => Direction::Save,
            ArcSession::OpensLoad => Direction::Load,
            ArcSession::None | ArcSession::Keeps | ArcSession::Ends => {
                self.moved(arc.to);
                if fd.is_some() {
                    // Dropping it closes it.
                    tracing::warn!(device = %self.id, %arc, "the driver gave a data descriptor where none begins");
                }
                return Ok(None);
            }
        };
        if let Some(old) = self.file.take() {
            old.close();
        }
        let Some(fd) = fd else {
            let message = "the driver gave no data descriptor where a session begins";
            return Err(crate::error::protocol(SET_STATE, message));
        };
        let file = Arc::new(DataFile::new(fd, direction, arc.to, self.manner.clone()));
        self.file = Some(Arc::clone(&file));
        Ok(Some(match direction {
            Direction::Save => Session::Save(Box::new(Save(file))),
            Direction::Load => Session::Load(Box::new(Load(file))),
        }))
    }
}

#[cfg(test)]
mod tests;

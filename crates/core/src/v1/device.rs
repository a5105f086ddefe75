//! A device of interface v1, as the engine drives it: its state in `device_state`, its data by the two
//! loops.
//!
//! The transport is a [`RegionAccess`]; what is not done through the region (a reset, waking a call
//! that blocks, who the device is) its maker gives in [`V1Control`].

use super::session::{Load, Port, Save, SharedPort};
use super::{INFO_SIZE, bits};
use crate::{
    ArcSession, Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState,
    Interrupter, MigrationDevice, RegionAccess, Session, TransitionError, path,
};
use std::fmt;

/// Where a data section begins of which something is mapped: at a page.
const PAGE: u64 = 4096;

/// What a [`V1Device`] needs besides its region.
pub struct V1Control {
    /// Resets the device, to RUNNING.
    pub reset: Box<dyn FnMut() -> Result<(), DeviceError> + Send>,
    /// Wakes a call of the region that blocks.
    pub interrupter: Interrupter,
    /// The device takes a transaction of the source only in one round, so that none may be larger than
    /// its data section (V1-WHOLE). The interface has no way to say so.
    pub whole_transactions: bool,
}

impl fmt::Debug for V1Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("V1Control")
            .field("whole_transactions", &self.whole_transactions)
            .finish_non_exhaustive()
    }
}

/// A device with the migration region of interface v1. What it moves is read and written in chunks
/// that stay what they are ([`Chunk::Part`](crate::Chunk::Part), V1-CHUNK).
///
/// It has PRE_COPY and no P2P states. Every state is read back after it was written, and in a session
/// before its end is believed: a device that was reset meanwhile answers like one that has nothing
/// left (V1-READBACK, V1-RESET).
pub struct V1Device<R> {
    id: DeviceId,
    identity: DeviceIdentity,
    capabilities: Capabilities,
    port: SharedPort<R>,
    control: V1Control,
}

impl<R> fmt::Debug for V1Device<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("V1Device")
            .field("id", &self.id)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

impl<R: RegionAccess> V1Device<R> {
    /// Uses the migration region of a device. Reads its state and changes nothing.
    ///
    /// # Errors
    /// [`DeviceErrorKind::Protocol`] when the region has no room for data (a region of 0 bytes is one);
    /// otherwise when the state cannot be read.
    pub fn new(
        id: DeviceId,
        identity: DeviceIdentity,
        region: R,
        control: V1Control,
    ) -> Result<Self, DeviceError> {
        let start = if region.is_mappable() { PAGE } else { INFO_SIZE };
        let Some(section) = region.size().checked_sub(start).filter(|section| *section > 0) else {
            let message = format!("{} bytes have no room for the fields and for data", region.size());
            return Err(DeviceError::new(DeviceErrorKind::Protocol, "look at the migration region", message));
        };
        let whole = control.whole_transactions;
        let capabilities = Capabilities::v1(section, whole);
        let port = SharedPort::new(id.clone(), region, whole);
        port.lock().read_state()?;
        Ok(Self { id, identity, capabilities, port, control })
    }
}

impl<R: RegionAccess> Port<R> {
    /// Makes one change of the state, and reads it back (V1-READBACK). `raw` is `device_state` as it
    /// was read; what it is afterwards.
    fn change(&mut self, raw: u32, to: DeviceState) -> Result<u32, DeviceError> {
        let operation = "write of device_state";
        let Some(wanted) = bits::bits_of(to) else {
            let message = format!("interface v1 has no state {to}");
            return Err(DeviceError::new(DeviceErrorKind::Misuse, operation, message));
        };
        // Whatever becomes of the write: what was pending before is not the end afterwards (V1-PENDING).
        self.save.again();
        self.write_state(raw, wanted)?;
        // What is found now was asked for: not a device that moved by itself.
        self.state = to;
        let raw = self.read_state()?;
        if self.state == to {
            return Ok(raw);
        }
        let message = format!("the write of {to} was accepted, and the device is in {}", self.state);
        let error = DeviceError::new(DeviceErrorKind::Protocol, operation, message);
        // Whatever it would go on with there is not the session that it had.
        self.failed = Some(error.clone());
        Err(error)
    }

    /// What forbids to leave `from` for `to` now.
    fn refuse(&self, from: DeviceState, to: DeviceState) -> Result<(), DeviceError> {
        let misuse =
            |message: &str| Err(DeviceError::new(DeviceErrorKind::Misuse, "write of device_state", message));
        if from.is_saving() && to.is_saving() {
            // Nothing comes of a session that has failed, and the device may still hold a chunk for it.
            if let Some(error) = &self.failed {
                let message =
                    format!("only RUNNING and a reset leave {from} now, because saving has failed: {error}");
                return Err(DeviceError {
                    operation: "write of device_state".into(),
                    message,
                    ..error.clone()
                });
            }
            if self.save.is_outstanding() {
                return misuse("a chunk was begun and not read to its end (V1-OUTSTANDING)");
            }
        }
        if from != DeviceState::Resuming {
            return Ok(());
        }
        // What the device would load has a hole.
        if let Some(error) = &self.failed {
            let message = format!("only a reset leaves RESUMING now, because loading has failed: {error}");
            return Err(DeviceError { operation: "write of device_state".into(), message, ..error.clone() });
        }
        if self.is_loading() {
            return misuse("a transaction was begun and is not with the device (V1-OUTSTANDING)");
        }
        Ok(())
    }

    fn set_state(&mut self, target: DeviceState, capabilities: &Capabilities) -> Made {
        let unknown = DeviceState::UNREAD;
        let before = self.state;
        let mut raw = self.read_state().map_err(|error| TransitionError {
            from: unknown,
            to: target,
            reached: Err(error.clone()),
            error,
        })?;
        let from = self.state;
        let stay = |error| TransitionError { from, to: target, reached: Ok(from), error };
        // Whoever asks does not know yet that the session is lost, and from here the way may look as if
        // nothing had happened (V1-RESET).
        if let Some(error) = self.failed.as_ref().filter(|_| from != before) {
            return Err(stay(error.clone()));
        }
        if before == DeviceState::Stop && from != before {
            let message =
                format!("the device went from STOP to {from} by itself: what was loaded into it is lost");
            return Err(stay(DeviceError::new(DeviceErrorKind::Lost, "write of device_state", message)));
        }
        let arcs = path(from, target, capabilities).map_err(|error| {
            let errno = Some(error.errno());
            let kind = DeviceErrorKind::Misuse;
            stay(DeviceError { errno, ..DeviceError::new(kind, "write of device_state", error.to_string()) })
        })?;
        if !arcs.is_empty() {
            self.refuse(from, target).map_err(stay)?;
        }
        let mut opened = None;
        for arc in arcs {
            match self.change(raw, arc.to) {
                Ok(now) => raw = now,
                Err(error) => {
                    // Never guessed. A write that failed leaves the state before it, or ERROR.
                    let reached = self.read_state().map(|_| self.state);
                    tracing::warn!(from = %arc.from, to = %arc.to, %error, reached = ?reached, "a write of device_state has failed");
                    return Err(TransitionError { from, to: target, reached, error });
                }
            }
            let session = arc.session();
            let opens = matches!(session, ArcSession::OpensSave | ArcSession::OpensLoad);
            let epoch = self.moved(arc.to, opens);
            match session {
                ArcSession::OpensSave | ArcSession::OpensLoad => opened = Some((session, epoch)),
                ArcSession::Ends => opened = None,
                ArcSession::None | ArcSession::Keeps => {}
            }
        }
        Ok(opened)
    }
}

type Made = Result<Option<(ArcSession, u64)>, TransitionError>;

impl<R: RegionAccess> MigrationDevice for V1Device<R> {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        let mut port = self.port.lock();
        port.read_state()?;
        Ok(port.state)
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        let made = self.port.lock().set_state(target, &self.capabilities)?;
        let port = self.port.clone();
        Ok(match made {
            Some((ArcSession::OpensSave, epoch)) => Some(Session::Save(Box::new(Save { port, epoch }))),
            Some((_, epoch)) => Some(Session::Load(Box::new(Load { port, epoch }))),
            None => None,
        })
    }

    /// `None`: the interface cannot say it before the device has stopped. What is pending in PRE_COPY
    /// is in the session's [`precopy_info`](crate::SaveSession::precopy_info).
    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let done = (self.control.reset)();
        let mut port = self.port.lock();
        // Whatever became of it, the session is over.
        port.moved(DeviceState::Stop, false);
        done?;
        port.read_state()?;
        if port.state == DeviceState::Running {
            return Ok(());
        }
        let message = format!("the device is in {} after a reset that is said to be made", port.state);
        Err(DeviceError::new(DeviceErrorKind::Protocol, "reset", message))
    }

    fn interrupter(&self) -> Interrupter {
        self.control.interrupter.clone()
    }
}

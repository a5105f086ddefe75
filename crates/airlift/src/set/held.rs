//! A device in its worker's hands, together with the data session that its state has.
//!
//! [`Saving`] and [`Loading`] own both; leaving the state consumes the session, so that reading
//! after leaving cannot be written.

use super::recorder::Recorder;
use super::trace;
use airlift_core::{
    DeviceError, DeviceErrorKind, DeviceState, LoadSession, MigrationDevice, SaveSession, Session,
    TransitionError, path,
};

/// A device without a session.
pub(super) struct Idle {
    pub(super) device: Box<dyn MigrationDevice>,
}

/// A device in a state of the saving group, and the session that spans the group (V2-SESSION).
pub(super) struct Saving {
    pub(super) device: Box<dyn MigrationDevice>,
    pub(super) session: Box<dyn SaveSession>,
}

/// A device in RESUMING, and its session.
pub(super) struct Loading {
    pub(super) device: Box<dyn MigrationDevice>,
    pub(super) session: Box<dyn LoadSession>,
}

/// A step that was refused gives back what it was made from.
pub(super) type Refused<T> = (T, TransitionError);

impl Idle {
    /// Walks to `to`, outside of the saving group and of RESUMING.
    pub(super) fn walk(&mut self, to: DeviceState, recorder: &Recorder) -> Result<(), TransitionError> {
        walk(&mut *self.device, &ANYWHERE, to, recorder).map(drop)
    }

    /// Walks towards RUNNING with what was loaded. A device that has left STOP by itself does not have it
    /// any more (V1-RESET, V2-STALE).
    pub(super) fn run(&mut self, to: DeviceState, recorder: &Recorder) -> Result<(), TransitionError> {
        walk(&mut *self.device, &LOADED, to, recorder).map(drop)
    }

    /// Walks to PRE_COPY or STOP_COPY.
    pub(super) fn save(mut self, to: DeviceState, recorder: &Recorder) -> Result<Saving, Box<Refused<Self>>> {
        match walk(&mut *self.device, &ANYWHERE, to, recorder) {
            Ok(Some(Session::Save(session))) => Ok(Saving { device: self.device, session }),
            Ok(other) => {
                let error = no_session(&*self.device, &other, to);
                Err(Box::new((self, error)))
            }
            Err(error) => Err(Box::new((self, error))),
        }
    }

    /// Walks to RESUMING.
    pub(super) fn load(mut self, recorder: &Recorder) -> Result<Loading, Box<Refused<Self>>> {
        match walk(&mut *self.device, &ANYWHERE, DeviceState::Resuming, recorder) {
            Ok(Some(Session::Load(session))) => Ok(Loading { device: self.device, session }),
            Ok(other) => {
                let error = no_session(&*self.device, &other, DeviceState::Resuming);
                Err(Box::new((self, error)))
            }
            Err(error) => Err(Box::new((self, error))),
        }
    }
}

impl Saving {
    /// Walks within the saving group; the session goes on. A device that has left the group by itself
    /// would begin a new session, and what was sent would be of another one (V1-RESET, V2-STALE).
    pub(super) fn walk(&mut self, to: DeviceState, recorder: &Recorder) -> Result<(), TransitionError> {
        walk(&mut *self.device, &SAVING, to, recorder).map(drop)
    }

    /// Ends the session and gives the device, wherever it is.
    pub(super) fn close(self) -> Idle {
        Idle { device: self.device }
    }
}

impl Loading {
    /// RESUMING -> STOP: the device validates what was written and may refuse it. A device that is not in
    /// RESUMING any more holds nothing of what was written (V1-RESET, V2-STALE).
    pub(super) fn finish(mut self, recorder: &Recorder) -> (Idle, Result<(), TransitionError>) {
        // The session ends after the arc: a driver may look at it once more.
        let result = walk(&mut *self.device, &RESUMING, DeviceState::Stop, recorder).map(drop);
        (Idle { device: self.device }, result)
    }

    /// Ends the session and gives the device, which must be reset.
    pub(super) fn abandon(self) -> Idle {
        Idle { device: self.device }
    }
}

/// Where a device must be found before an arc: in any other state it has left by itself what it was in.
struct Expected {
    state: fn(DeviceState) -> bool,
    /// What became of it otherwise.
    otherwise: &'static str,
}

const ANYWHERE: Expected = Expected { state: |_| true, otherwise: "" };
const IN_ITS_SESSION: &str = "it was reset under its session, whose data is lost";
const SAVING: Expected = Expected { state: DeviceState::is_saving, otherwise: IN_ITS_SESSION };
const RESUMING: Expected =
    Expected { state: |state| matches!(state, DeviceState::Resuming), otherwise: IN_ITS_SESSION };
const LOADED: Expected = Expected {
    state: |state| matches!(state, DeviceState::Stop | DeviceState::RunningP2p),
    otherwise: "it was reset after it had been loaded",
};

/// Makes the arcs from the state that the device is read to have, one at a time, so that each has its
/// time and its own error. Gives the session that was opened, if one was.
fn walk(
    device: &mut dyn MigrationDevice,
    expected: &Expected,
    to: DeviceState,
    recorder: &Recorder,
) -> Result<Option<Session>, TransitionError> {
    let from = device.state().map_err(|error| TransitionError {
        from: DeviceState::UNREAD,
        to,
        reached: Err(error.clone()),
        error,
    })?;
    let request = device.capabilities().interface.set_state();
    let refused = |kind, operation: &str, message| TransitionError {
        from,
        to,
        reached: Ok(from),
        error: DeviceError::new(kind, operation, message),
    };
    if !(expected.state)(from) {
        let failed = from == DeviceState::Error;
        let why = if failed { "it has failed under its session" } else { expected.otherwise };
        let message = format!("the device is in {from}: {why}");
        return Err(refused(DeviceErrorKind::Lost, request, message));
    }
    let arcs = path(from, to, &device.capabilities())
        .map_err(|refusal| refused(DeviceErrorKind::Misuse, "plan arcs", refusal.to_string()))?;
    let mut opened = None;
    for arc in arcs {
        if recorder.is_abandoned() {
            // Nobody waits for this device any more, and what was decided since may forbid the arc.
            let why = "the device was given up while it was busy";
            let error = DeviceError::new(DeviceErrorKind::Interrupted, request, why);
            return Err(TransitionError { from: arc.from, to: arc.to, reached: Ok(arc.from), error });
        }
        let begun = recorder.now();
        match device.set_state(arc.to) {
            Ok(session) => {
                recorder.arc(device.id(), arc.from, arc.to, begun);
                trace::vmstate(device.id(), arc, to);
                if session.is_some() {
                    opened = session;
                }
            }
            Err(error) => {
                let reached = error.reached.clone().unwrap_or(DeviceState::UNREAD);
                recorder.arc(device.id(), arc.from, reached, begun);
                return Err(error);
            }
        }
    }
    Ok(opened)
}

fn no_session(device: &dyn MigrationDevice, got: &Option<Session>, to: DeviceState) -> TransitionError {
    let message = match got {
        None => "the arc opened no data session",
        Some(_) => "the arc opened a data session of the other direction",
    };
    TransitionError {
        from: to,
        to,
        reached: Ok(to),
        error: DeviceError::new(
            DeviceErrorKind::Protocol,
            device.capabilities().interface.set_state(),
            message,
        ),
    }
}

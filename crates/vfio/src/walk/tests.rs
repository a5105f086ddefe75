//! Walks over a driver that follows a script and hands out ends of socket pairs.

use super::*;
use crate::VfioOptions;
use airlift_core::Piece;
use std::cell::RefCell;
use std::io::Read;
use std::os::unix::net::UnixStream;

use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

/// What happens to a SET of a state.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// It fails and leaves the device here.
    Fails(DeviceState),
    /// No descriptor comes although a session begins.
    NoFd,
    /// A descriptor comes although none begins.
    ExtraFd,
}

#[derive(Default)]
struct Script {
    state: Option<DeviceState>,
    faults: Vec<(DeviceState, Fault)>,
    sets: Vec<DeviceState>,
    ends: Vec<UnixStream>,
    silent: bool,
    alarm: crate::sys::Alarm,
    /// The interrupter is used after the SET of this state, before the next one.
    ring_at: Option<DeviceState>,
}

#[derive(Clone, Default)]
struct Fake(std::rc::Rc<RefCell<Script>>);

impl Driver for Fake {
    fn get_state(&self, _: Duration) -> Result<DeviceState, DeviceError> {
        if self.0.borrow().silent {
            return Err(DeviceError::refused(GET_STATE, Errno::EIO));
        }
        Ok(self.0.borrow().state.unwrap_or(Running))
    }

    fn set_state(&self, state: DeviceState, rings: u64, _: Duration) -> Result<Option<OwnedFd>, DeviceError> {
        let mut script = self.0.borrow_mut();
        let alarm = script.alarm.clone();
        alarm
            .call_since(rings, Duration::from_secs(60), || Ok(()))
            .map_err(|e| crate::error::ended(SET_STATE, e))?;
        if script.ring_at == Some(state) {
            alarm.ring();
        }
        script.sets.push(state);
        let fault = script.faults.iter().find(|(at, _)| *at == state).map(|(_, fault)| *fault);
        if let Some(Fault::Fails(left)) = fault {
            script.state = Some(left);
            return Err(DeviceError::refused(SET_STATE, Errno::EIO));
        }
        let arc = StateArc::new(script.state.unwrap_or(Running), state);
        script.state = Some(state);
        let opens = matches!(arc.session(), ArcSession::OpensSave | ArcSession::OpensLoad);
        if (opens && fault != Some(Fault::NoFd)) || fault == Some(Fault::ExtraFd) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            script.ends.push(ours);
            return Ok(Some(theirs.into()));
        }
        Ok(None)
    }

    fn reset(&self, _: Duration) -> Result<(), DeviceError> {
        let mut script = self.0.borrow_mut();
        let fault = script.faults.iter().find(|(at, _)| *at == Running).map(|(_, fault)| *fault);
        script.state = Some(match fault {
            Some(Fault::Fails(left)) => left,
            _ => Running,
        });
        Ok(())
    }
}

fn device() -> (Fake, States<Fake>) {
    let fake = Fake::default();
    let options = VfioOptions::default();
    let alarm = fake.0.borrow().alarm.clone();
    let manner = Manner { alarm, options, reinit: false };
    let capabilities = Capabilities::v2(7).unwrap();
    let states = States::new(DeviceId::new("nic").unwrap(), fake.clone(), capabilities, manner);
    (fake, states)
}

fn is_closed(fake: &Fake, end: usize) -> bool {
    let mut script = fake.0.borrow_mut();
    let end = &mut script.ends[end];
    end.set_nonblocking(true).unwrap();
    matches!(end.read(&mut [0; 1]), Ok(0))
}

fn save(session: Option<Session>) -> Box<dyn airlift_core::SaveSession> {
    match session {
        Some(Session::Save(session)) => session,
        other => panic!("{other:?}"),
    }
}

// V2-PATH
#[test]
fn v2_path_every_arc_is_asked_for_by_itself_and_its_session_comes_out() {
    let (fake, mut states) = device();
    let _session = save(states.set_state(StopCopy).unwrap());
    assert_eq!(fake.0.borrow().sets, [RunningP2p, Stop, StopCopy]);
    assert!(!is_closed(&fake, 0));
}

// K-GIVE-UP
#[test]
fn an_interruption_between_two_arcs_ends_the_walk_and_not_the_next_one() {
    let (fake, mut states) = device();
    fake.0.borrow_mut().ring_at = Some(RunningP2p);
    let error = states.set_state(StopCopy).unwrap_err();
    assert_eq!((error.error.kind, error.reached), (DeviceErrorKind::Interrupted, Ok(RunningP2p)));
    assert_eq!(fake.0.borrow().sets, [RunningP2p]);
    assert!(states.set_state(Stop).is_ok());
}

// V2-SESSION
#[test]
fn v2_session_one_descriptor_serves_the_saving_group_and_is_closed_when_it_is_left() {
    let (fake, mut states) = device();
    let mut session = save(states.set_state(PreCopy).unwrap());
    for state in [PreCopyP2p, StopCopy] {
        assert!(states.set_state(state).unwrap().is_none());
        assert!(!is_closed(&fake, 0), "{state}");
    }
    fake.0.borrow_mut().ends[0].shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(session.read(&mut [0; 4]), Ok(Piece::End), "the session knows that it is in STOP_COPY");
    assert!(states.set_state(Stop).unwrap().is_none());
    assert!(is_closed(&fake, 0));
    assert_eq!(session.read(&mut [0; 4]).unwrap_err().kind, DeviceErrorKind::Misuse);
}

#[test]
fn a_walk_from_one_session_to_the_next_closes_the_first() {
    let (fake, mut states) = device();
    let _first = states.set_state(PreCopy).unwrap();
    let second = states.set_state(Resuming).unwrap();
    assert!(matches!(second, Some(Session::Load(_))));
    assert!(is_closed(&fake, 0));
    assert!(!is_closed(&fake, 1));
}

// V2-READBACK
#[test]
fn v2_readback_a_failure_says_where_the_device_was_found_and_closes_what_it_has_left() {
    for (left, closed) in
        [(PreCopyP2p, false), (StopCopy, false), (Error, true), (DeviceState::Unknown(99), true)]
    {
        let (fake, mut states) = device();
        let _session = states.set_state(PreCopy).unwrap();
        fake.0.borrow_mut().faults.push((StopCopy, Fault::Fails(left)));
        let error = states.set_state(StopCopy).unwrap_err();
        assert_eq!((error.from, error.to, error.reached), (PreCopy, StopCopy, Ok(left)));
        assert_eq!(error.error.errno, Some(Errno::EIO));
        assert!(error.error.message.contains("PRE_COPY_P2P -> STOP_COPY"), "{}", error.error);
        assert_eq!(is_closed(&fake, 0), closed, "{left}");
    }
}

#[test]
fn a_state_that_cannot_be_read_is_said_and_nothing_is_asked_for() {
    let (fake, mut states) = device();
    fake.0.borrow_mut().silent = true;
    let error = states.set_state(PreCopy).unwrap_err();
    assert_eq!(error.reached.unwrap_err().errno, Some(Errno::EIO));
    assert!(fake.0.borrow().sets.is_empty());
}

// V2-NO-REWIND
#[test]
fn v2_no_rewind_is_refused_without_the_driver() {
    let (fake, mut states) = device();
    let _session = states.set_state(StopCopy).unwrap();
    fake.0.borrow_mut().sets.clear();
    for to in [PreCopy, PreCopyP2p] {
        let error = states.set_state(to).unwrap_err();
        assert_eq!((error.reached, error.error.kind), (Ok(StopCopy), DeviceErrorKind::Misuse));
        assert_eq!(error.error.errno, Some(Errno::EINVAL));
    }
    assert!(fake.0.borrow().sets.is_empty());
    assert!(!is_closed(&fake, 0), "the session goes on");
}

#[test]
fn a_descriptor_that_is_missing_or_not_expected_is_noticed() {
    let (fake, mut states) = device();
    fake.0.borrow_mut().faults.push((PreCopy, Fault::NoFd));
    let error = states.set_state(PreCopy).unwrap_err();
    assert_eq!((error.error.kind, error.reached), (DeviceErrorKind::Protocol, Ok(PreCopy)));

    let (fake, mut states) = device();
    fake.0.borrow_mut().faults.push((Stop, Fault::ExtraFd));
    assert!(states.set_state(Stop).unwrap().is_none());
    assert!(is_closed(&fake, 0));
}

// V2-WRITE-FINAL
#[test]
fn v2_write_final_what_was_written_with_an_error_is_not_loaded() {
    let (fake, mut states) = device();
    let Some(Session::Load(mut session)) = states.set_state(Resuming).unwrap() else { panic!() };
    fake.0.borrow_mut().ends.clear();
    assert_eq!(session.write(b"state").unwrap_err().errno, Some(Errno::EPIPE));
    drop(session);
    fake.0.borrow_mut().sets.clear();
    let error = states.set_state(Stop).unwrap_err();
    assert_eq!((error.reached, error.error.errno), (Ok(Resuming), Some(Errno::EPIPE)));
    assert!(fake.0.borrow().sets.is_empty(), "the driver is not asked");
    states.reset().unwrap();
    assert!(states.set_state(Stop).is_ok(), "a reset ends it");
}

// V2-STALE
#[test]
fn v2_stale_a_reset_by_somebody_else_ends_the_session() {
    let (fake, mut states) = device();
    let mut session = save(states.set_state(PreCopy).unwrap());
    fake.0.borrow_mut().state = Some(Running);
    assert_eq!(states.state(), Ok(Running));
    assert!(is_closed(&fake, 0));
    assert_eq!(session.read(&mut [0; 4]).unwrap_err().kind, DeviceErrorKind::Misuse);
}

// V2-ERROR
#[test]
fn v2_error_a_reset_that_does_not_reach_running_is_an_error() {
    let (fake, mut states) = device();
    fake.0.borrow_mut().faults.push((Running, Fault::Fails(Error)));
    let error = states.reset().unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Protocol);
    assert!(error.message.contains("ERROR"), "{error}");
}

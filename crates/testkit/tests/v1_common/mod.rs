//! A device with a migration region and its user, for tests of the user's side.
#![allow(dead_code, reason = "each test file uses a part of it")]

use airlift_core::v1::V1Device;
use airlift_core::{
    Chunk, DeviceState, Errno, LoadSession, MigrationDevice, Piece, SaveSession, Session, TransitionError,
};
use airlift_testkit::v1::{Double, DoubleOptions, DoubleRegion, Layout, Plan, Wrong, bytes, cut};

pub(crate) const SECTION: u64 = 64;
pub(crate) const EIO: Wrong = Wrong::Refused(Errno::EIO);
pub(crate) const RUNNING: u32 = 1;
pub(crate) const STOP_COPY: u32 = 2;
pub(crate) const PRE_COPY: u32 = 3;
pub(crate) const RESUMING: u32 = 4;
pub(crate) const ERROR: u32 = 6;

pub(crate) type User = V1Device<DoubleRegion>;

pub(crate) fn double(plan: Plan) -> Double {
    Double::new(DoubleOptions::new(Layout::Trapped, SECTION).with(plan))
}

/// `count` transactions as large as the section, and one of 5 bytes.
pub(crate) fn chunks(count: usize) -> Vec<Vec<u8>> {
    cut(&bytes(1, count * 64 + 5), 64)
}

pub(crate) fn user(double: &Double) -> User {
    double.device("d0").unwrap()
}

pub(crate) fn enter_save(user: &mut User, state: DeviceState) -> Box<dyn SaveSession> {
    let Some(Session::Save(session)) = user.set_state(state).unwrap() else { panic!("no save session") };
    session
}

pub(crate) fn enter_load(user: &mut User) -> Box<dyn LoadSession> {
    let opened = user.set_state(DeviceState::Resuming).unwrap();
    let Some(Session::Load(session)) = opened else { panic!("no load session") };
    session
}

pub(crate) fn assert_clean(double: &Double) {
    assert_eq!(double.violations(), Vec::<String>::new());
}

/// Reads a whole transaction.
pub(crate) fn read_chunk(session: &mut dyn SaveSession) -> Vec<u8> {
    let mut buf = [0; 1000];
    match session.read(&mut buf).unwrap() {
        Piece::Data { len, chunk: Chunk::Part { of, offset: 0 } } if of == len as u64 => buf[..len].to_vec(),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn errno(error: &TransitionError) -> Option<Errno> {
    error.error.errno
}

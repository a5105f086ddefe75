//! Every pair of states of every kind of device, against what `airlift-core` predicts: which requests are
//! taken, where they lead, and when a data session begins, goes on and ends.

use crate::raw;
use crate::support::{Mdev, assert_usable, loading, read, save, saving, states};
use airlift_core::{
    ArcSession, DeviceErrorKind, DeviceState, Errno, MigrationDevice, MigrationFlags, Piece, Session, path,
};
use airlift_vfio::{VfioDevice, Way};

/// Numbers that name no state.
const UNKNOWN: [u32; 3] = [8, 0x7fff_ffff, u32::MAX];

/// Walks from RUNNING to `from`. Data that RESUMING needs to be left is written.
fn prepare(device: &mut VfioDevice, from: DeviceState, stream: &[u8]) -> Option<Session> {
    device.reset().unwrap();
    let mut session = device.set_state(from).unwrap();
    if let Some(Session::Load(load)) = &mut session {
        load.write(stream).unwrap();
    }
    assert_eq!(device.state(), Ok(from));
    session
}

/// A session that goes on answers; one that is over says that it was used too late (V2-AFTER-END).
fn assert_session(session: &mut Session, alive: bool, what: &str) {
    let result = match session {
        Session::Save(save) => save.read(&mut [0; 16]).map(drop),
        Session::Load(load) => load.write(&[]),
    };
    match result {
        Ok(()) => assert!(alive, "{what}: the session goes on although its state was left"),
        Err(error) => {
            assert!(!alive, "{what}: the session is over: {error}");
            assert_eq!(error.kind, DeviceErrorKind::Misuse, "{what}: {error}");
        }
    }
}

/// C10 to C17, C20 to C22 and C24 through the device.
fn check_pair(device: &mut VfioDevice, from: DeviceState, to: DeviceState, stream: &[u8]) {
    let capabilities = device.capabilities();
    let what = format!("{:?}: {from} -> {to}", capabilities.flags);
    let mut before = prepare(device, from, stream);
    let result = device.set_state(to);
    match path(from, to, &capabilities) {
        Ok(arcs) => {
            let after = result.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(device.state(), Ok(to), "{what}");
            let sessions: Vec<_> = arcs.iter().map(|arc| arc.session()).collect();
            let opened = match after {
                None => ArcSession::None,
                Some(Session::Save(_)) => ArcSession::OpensSave,
                Some(Session::Load(_)) => ArcSession::OpensLoad,
            };
            let opens = |s: &ArcSession| matches!(s, ArcSession::OpensSave | ArcSession::OpensLoad);
            let predicted = sessions.iter().rev().copied().find(opens).unwrap_or(ArcSession::None);
            assert_eq!(opened, predicted, "{what}");
            if let Some(session) = &mut before {
                assert_session(session, sessions.iter().all(|s| *s == ArcSession::Keeps), &what);
            }
        }
        Err(error) => {
            let refusal = result.expect_err(&what);
            assert_eq!(refusal.error.errno, Some(error.errno()), "{what}: {refusal}");
            assert_eq!((refusal.from, refusal.to), (from, to), "{what}");
            assert_eq!(refusal.reached, Ok(from), "{what}");
            assert_eq!(device.state(), Ok(from), "{what}");
            if let Some(session) = &mut before {
                assert_session(session, true, &what);
            }
        }
    }
}

/// The same in one request to the kernel: it takes and refuses what core says, stands where core says, and
/// gives a data descriptor exactly where core says (C14).
fn check_raw(device: &mut VfioDevice, from: DeviceState, to: u32, stream: &[u8]) {
    let capabilities = device.capabilities();
    let to = DeviceState::from_raw(to);
    let rewinds = matches!(to, DeviceState::PreCopy | DeviceState::PreCopyP2p);
    if from == DeviceState::StopCopy && rewinds && !capabilities.precopy() {
        // There are kernels that loop for ever over it (V2-NO-REWIND).
        return;
    }
    let what = format!("{:?}, in one request: {from} -> {to}", capabilities.flags);
    let session = prepare(device, from, stream);
    let result = raw::set_state(device.fd(), to.to_raw());
    match path(from, to, &capabilities) {
        Ok(arcs) => {
            let data_fd = result.unwrap_or_else(|e| panic!("{what}: {e}"));
            let last = arcs.last().map(|arc| arc.session());
            let predicted = matches!(last, Some(ArcSession::OpensSave | ArcSession::OpensLoad));
            assert_eq!(data_fd.is_some(), predicted, "{what}");
            assert_eq!(device.state(), Ok(to), "{what}");
        }
        Err(error) => {
            assert_eq!(result.map(drop), Err(error.errno()), "{what}");
            assert_eq!(device.state(), Ok(from), "{what}");
        }
    }
    drop(session);
}

fn check(mdev: &Mdev, flags: MigrationFlags) {
    let mut device = mdev.open(Way::Auto);
    assert_eq!(device.capabilities().flags, flags);
    assert_eq!(device.found_state(), DeviceState::Running);
    let stream = save(&mut device);
    for from in states(&device.capabilities()) {
        for to in (0..8).chain(UNKNOWN) {
            check_pair(&mut device, from, DeviceState::from_raw(to), &stream);
            check_raw(&mut device, from, to, &stream);
        }
    }
    device.reset().unwrap();
    assert_usable(&mut device);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_arcs_and_v2_path_mtty_takes_and_refuses_what_core_predicts() {
    check(&Mdev::mtty(2), MigrationFlags::all());
    check(&Mdev::mtty(1), MigrationFlags::all());
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_arcs_and_v2_path_a_device_with_all_states_takes_and_refuses_what_core_predicts() {
    check(&Mdev::sized("v2", 5000), MigrationFlags::all());
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_capabilities_a_device_without_p2p_takes_and_refuses_what_core_predicts() {
    check(&Mdev::sized("v2-no-p2p", 5000), MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_capabilities_a_device_without_pre_copy_takes_and_refuses_what_core_predicts() {
    check(&Mdev::sized("v2-no-precopy", 5000), MigrationFlags::STOP_COPY | MigrationFlags::P2P);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_capabilities_a_device_with_neither_takes_and_refuses_what_core_predicts() {
    check(&Mdev::sized("v2-plain", 5000), MigrationFlags::STOP_COPY);
}

/// Each kind of ours, broken on its first arc away from RUNNING.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_error_a_broken_device_refuses_every_state_until_it_is_reset() {
    for kind in ["v2", "v2-no-p2p", "v2-no-precopy", "v2-plain"] {
        let mdev = Mdev::sized(kind, 5000);
        let mut device = mdev.open(Way::Group);
        let first = path(DeviceState::Running, DeviceState::Stop, &device.capabilities()).unwrap()[0];
        mdev.set("fail_arc", &format!("{} {} 5 error", first.from.to_raw(), first.to.to_raw()));
        let failed = device.set_state(DeviceState::Stop).unwrap_err();
        assert_eq!(failed.reached, Ok(DeviceState::Error), "{kind}: {failed}");
        assert_eq!(failed.error.errno, Some(Errno::EIO), "{kind}: {failed}");
        mdev.set("fail_arc", "");
        for to in (0..8).chain(UNKNOWN) {
            let refused = device.set_state(DeviceState::from_raw(to)).unwrap_err();
            assert_eq!(refused.error.kind, DeviceErrorKind::Misuse, "{kind} to {to}: {refused}");
            assert_eq!(refused.reached, Ok(DeviceState::Error), "{kind} to {to}: {refused}");
            // To stay in ERROR is no request to the kernel's drivers: they are there.
            if to != DeviceState::Error.to_raw() {
                assert_eq!(raw::set_state(device.fd(), to).map(drop), Err(Errno::EINVAL), "{kind} to {to}");
            }
            assert_eq!(device.state(), Ok(DeviceState::Error), "{kind} to {to}");
        }
        device.reset().unwrap();
        assert_usable(&mut device);
    }
}

/// C15: what was read in the three states is one stream, which the device takes.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_session_one_session_goes_through_pre_copy_and_back_to_the_end() {
    for mdev in [Mdev::sized("v2", 5000), Mdev::mtty(2)] {
        let mut device = mdev.open(Way::Group);
        let mut data = Vec::new();
        let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
        for state in [DeviceState::PreCopyP2p, DeviceState::PreCopy, DeviceState::PreCopyP2p] {
            assert!(device.set_state(state).unwrap().is_none(), "{state}");
            assert_eq!(read(session.as_mut(), 512, &mut data), Piece::Drained, "{state}");
        }
        assert!(device.set_state(DeviceState::StopCopy).unwrap().is_none());
        assert_eq!(read(session.as_mut(), 512, &mut data), Piece::End);
        device.set_state(DeviceState::Stop).unwrap();
        let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
        session.write(&data).unwrap();
        device.set_state(DeviceState::Running).unwrap();
    }
}

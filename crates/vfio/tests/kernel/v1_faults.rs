//! Devices of interface v1 that fail, do not answer, or are reset under their session: what is reported,
//! where the device is said to be, and that it is of use afterwards.

use crate::support::{Mdev, id, impatient, join, loading, pattern, poke, saving, share, wait_for};
use crate::v1_support::{
    PIECE, arc, assert_usable, bring, load_chunks, made, read_chunks, save_chunks, write_chunk,
};
use airlift_core::{DeviceErrorKind, DeviceState, Errno, MigrationDevice, Piece, Session};
use airlift_vfio::{VfioDevice, VfioOptions, Way};
use std::thread;

const SIZE: usize = 200_000;
const SECTION: usize = 0x4000;
const ALL: [DeviceState; 4] =
    [DeviceState::Stop, DeviceState::PreCopy, DeviceState::StopCopy, DeviceState::Resuming];

fn device_of(state_size: usize) -> Mdev {
    made(state_size, ("sparse", SECTION as u64))
}

/// Every single arc, once staying where it was and once breaking the device.
// V1-READBACK, V1-ARCS
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_write_of_the_state_that_fails_says_where_the_device_is_and_leaves_it_of_use() {
    let mdev = device_of(5000);
    let mut device = mdev.open(Way::Group);
    let chunks = save_chunks(&mut device, |_| {});
    for one in airlift_core::arcs(&device.capabilities()) {
        for breaks in [false, true] {
            device.reset().unwrap();
            let session = bring(&mut device, one.from, &chunks);
            let word = if breaks { " error" } else { "" };
            mdev.set("fail_arc", &format!("{} 5{word}", arc(one.from, one.to)));
            let error = device.set_state(one.to).unwrap_err();
            mdev.set("fail_arc", "");
            assert_eq!((error.from, error.to), (one.from, one.to), "{error}");
            assert_eq!(error.error.errno, Some(Errno::EIO), "{error}");
            assert_eq!(error.error.operation, "write of device_state", "{error}");
            if breaks {
                assert_eq!(error.reached, Ok(DeviceState::Error), "{error}");
                assert!(device.set_state(DeviceState::Running).is_err(), "{one}: only a reset leaves ERROR");
                device.reset().unwrap();
            } else {
                assert_eq!(error.reached, Ok(one.from), "{error}");
                device.set_state(one.to).unwrap_or_else(|e| panic!("{one}, a second time: {e}"));
            }
            drop(session);
        }
    }
    device.reset().unwrap();
    assert_usable(&mut device);
}

// V1-LOOP-ERROR
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_read_that_fails_ends_the_session_and_the_migration_can_be_called_off() {
    let mdev = device_of(SIZE);
    let mut device = mdev.open(Way::Group);
    for after in [0, 1, 50_000] {
        mdev.set("fail_read", &format!("{after} 5"));
        let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
        let (mut got, mut buf) = (0, [0; PIECE]);
        let error = loop {
            match session.read(&mut buf) {
                Ok(Piece::Data { len, .. }) => got += len,
                Ok(other) => panic!("{other:?} after {got} bytes"),
                Err(error) => break error,
            }
        };
        assert_eq!(got, after, "what came before is whole");
        assert_eq!((&error.kind, error.errno), (&DeviceErrorKind::Refused, Some(Errno::EIO)), "{error}");
        assert_eq!(error.operation, "read of data_offset", "{error}");
        // The session is over, also when the driver would go on.
        mdev.set("fail_read", "");
        let before = mdev.number("reads");
        assert!(session.read(&mut buf).is_err());
        assert!(device.set_state(DeviceState::StopCopy).is_err(), "what would come has a hole");
        assert_eq!(mdev.number("reads"), before, "the driver was not asked");
        device.set_state(DeviceState::Running).unwrap();
        assert_usable(&mut device);
    }
}

// V1-LOOP-ERROR, V1-OUTSTANDING
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn after_a_write_that_failed_nothing_is_sent_and_only_a_reset_leaves_resuming() {
    let mdev = device_of(SIZE);
    let mut device = mdev.open(Way::Group);
    poke(&device, 0, &pattern(SIZE, 4));
    let digest = mdev.digest();
    let chunks = save_chunks(&mut device, |_| {});
    device.reset().unwrap();
    // At once, and between two transactions; in the middle of one the driver takes none of it.
    for (after, errno) in [(0, Errno::ENOSPC), (SECTION, Errno::ENOSPC), (SECTION + 1, Errno::EIO)] {
        mdev.set("fail_write", &format!("{after} 28"));
        let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
        let before = mdev.number("bytes_written");
        let error = chunks
            .iter()
            .find_map(|chunk| {
                session.begin_chunk(chunk.len() as u64).and_then(|()| session.write(chunk)).err()
            })
            .unwrap();
        assert_eq!((&error.kind, error.errno), (&DeviceErrorKind::Refused, Some(errno)), "{error}");
        assert_eq!(error.operation, "write of data_size", "{error}");
        let taken = (after - after % SECTION) as u64;
        assert_eq!(mdev.number("bytes_written") - before, taken);
        mdev.set("fail_write", "");
        assert!(session.write(&chunks[0]).is_err());
        assert!(session.end_chunk().is_err());
        assert_eq!(mdev.number("bytes_written") - before, taken, "the driver was not asked");
        for to in [DeviceState::Stop, DeviceState::Running] {
            let refused = device.set_state(to).unwrap_err();
            assert_eq!(refused.reached, Ok(DeviceState::Resuming), "{refused}");
            assert!(refused.error.message.contains("only a reset"), "{refused}");
        }
        device.reset().unwrap();
        load_chunks(&mut device, &chunks);
        assert_eq!(mdev.digest(), digest);
        device.reset().unwrap();
    }
}

// V1-RESET
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_reset_by_another_holder_of_the_device_is_an_error_and_never_an_end() {
    let mdev = device_of(SIZE);
    let mut device = mdev.open(Way::Group);
    let chunks = save_chunks(&mut device, |_| {});
    for state in ALL {
        for begun in [false, true] {
            device.reset().unwrap();
            let mut session = device.set_state(state).unwrap();
            let mut buf = [0; 100];
            match (&mut session, begun) {
                (Some(Session::Save(save)), true) => drop(save.read(&mut buf).unwrap()),
                (Some(Session::Load(load)), true) => write_chunk(load.as_mut(), &chunks[0]),
                _ => {}
            }
            let mut guest = VfioDevice::from_fd(id(), share(&device), VfioOptions::default()).unwrap();
            assert_eq!(guest.found_state(), state);
            guest.reset().unwrap();
            let error = match &mut session {
                Some(Session::Save(save)) => loop {
                    match save.read(&mut buf) {
                        // What was begun is in the section still.
                        Ok(Piece::Data { .. }) => {}
                        Ok(other) => panic!("{other:?} in {state}, begun: {begun}"),
                        Err(error) => break error,
                    }
                },
                Some(Session::Load(load)) => {
                    load.begin_chunk(chunks[1].len() as u64).unwrap();
                    load.write(&chunks[1]).unwrap_err()
                }
                None => device.set_state(DeviceState::Running).unwrap_err().error,
            };
            assert_eq!(error.kind, DeviceErrorKind::Lost, "in {state}, begun: {begun}: {error}");
            assert_eq!(device.state(), Ok(DeviceState::Running), "not as it was remembered: {state}");
            assert_usable(&mut device);
        }
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_reset_in_every_state_gives_a_running_device_and_ends_its_session() {
    let mdev = device_of(5000);
    let mut device = mdev.open(Way::Group);
    for state in ALL {
        let mut session = device.set_state(state).unwrap();
        device.reset().unwrap();
        assert_eq!(device.state(), Ok(DeviceState::Running), "from {state}");
        let error = match &mut session {
            Some(Session::Save(save)) => save.read(&mut [0; 64]).unwrap_err(),
            Some(Session::Load(load)) => load.begin_chunk(1).and_then(|()| load.write(&[0])).unwrap_err(),
            None => continue,
        };
        assert_eq!(error.kind, DeviceErrorKind::Misuse, "in {state}: {error}");
        assert_usable(&mut device);
    }
}

// K-GIVE-UP
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_access_that_never_comes_back_ends_by_its_deadline() {
    let mdev = device_of(SIZE);
    let mut device = mdev.open_with(Way::Group, impatient());
    let chunks = save_chunks(&mut device, |_| {});
    device.set_state(DeviceState::Running).unwrap();

    mdev.set("block", "read");
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    let error = session.read(&mut [0; 4096]).unwrap_err();
    assert_eq!((&error.kind, error.errno), (&DeviceErrorKind::TimedOut, Some(Errno::ETIMEDOUT)), "{error}");
    assert_eq!(error.operation, "read of data_offset", "{error}");
    mdev.set("block", "");
    assert!(session.read(&mut [0; 4096]).is_err(), "it is over");
    device.set_state(DeviceState::Running).unwrap();

    mdev.set("block", "write");
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    session.begin_chunk(chunks[0].len() as u64).unwrap();
    let error = session.write(&chunks[0]).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::TimedOut, "{error}");
    assert_eq!(error.operation, "write of data_size", "{error}");
    mdev.set("block", "");
    let refused = device.set_state(DeviceState::Stop).unwrap_err();
    assert!(refused.error.message.contains("only a reset"), "a write that was given up is final: {refused}");
    device.reset().unwrap();

    mdev.set("block", &format!("arc {}", arc(DeviceState::Running, DeviceState::StopCopy)));
    let error = device.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!(error.error.kind, DeviceErrorKind::TimedOut, "{error}");
    assert_eq!(error.error.operation, "write of device_state", "{error}");
    assert_eq!(error.reached, Ok(DeviceState::Running), "{error}");
    assert_eq!(mdev.number("blocked"), 0, "nobody waits in the driver any more");
    mdev.set("block", "");
    load_chunks(&mut device, &chunks);
    assert_usable(&mut device);
}

// K-GIVE-UP
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_access_that_waits_is_ended_by_the_interrupter_from_another_thread() {
    let mdev = device_of(SIZE);
    let mut device = mdev.open(Way::Group);
    let interrupter = device.interrupter();
    let chunks = save_chunks(&mut device, |_| {});
    device.set_state(DeviceState::Running).unwrap();
    let waits = || wait_for("the access in the driver", || mdev.number("blocked") == 1);

    mdev.set("block", "read");
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    let reader = thread::spawn(move || session.read(&mut [0; 4096]));
    waits();
    assert!(interrupter.interrupt());
    let error = join("the read", reader).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Interrupted, "{error}");
    mdev.set("block", "");
    device.set_state(DeviceState::Running).unwrap();

    mdev.set("block", "write");
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    let chunk = chunks[0].clone();
    let writer =
        thread::spawn(move || session.begin_chunk(chunk.len() as u64).and_then(|()| session.write(&chunk)));
    waits();
    assert!(interrupter.interrupt());
    assert_eq!(join("the write", writer).unwrap_err().kind, DeviceErrorKind::Interrupted);
    mdev.set("block", "");
    device.reset().unwrap();

    mdev.set("block", &format!("arc {}", arc(DeviceState::Running, DeviceState::PreCopy)));
    let walker = thread::spawn(move || {
        let error = device.set_state(DeviceState::PreCopy).unwrap_err();
        (device, error)
    });
    waits();
    assert!(interrupter.interrupt());
    let (mut device, error) = join("the write of the state", walker);
    assert_eq!(error.error.kind, DeviceErrorKind::Interrupted, "{error}");
    assert_eq!(error.reached, Ok(DeviceState::Running), "{error}");
    mdev.set("block", "");
    // What came while nothing waited is about no call.
    assert!(interrupter.interrupt());
    assert_usable(&mut device);
}

/// A session in STOP_COPY whose driver stops giving: what is read later is whole again.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_was_given_up_in_stop_copy_can_be_saved_again() {
    let mdev = device_of(SIZE);
    let mut device = mdev.open_with(Way::Group, impatient());
    poke(&device, 0, &pattern(SIZE, 8));
    let mut chunks = Vec::new();
    let mut session = saving(device.set_state(DeviceState::StopCopy).unwrap());
    session.read(&mut [0; SECTION]).unwrap();
    mdev.set("block", "read");
    assert_eq!(session.read(&mut [0; SECTION]).unwrap_err().kind, DeviceErrorKind::TimedOut);
    mdev.set("block", "");
    device.set_state(DeviceState::Running).unwrap();
    let mut session = saving(device.set_state(DeviceState::StopCopy).unwrap());
    assert_eq!(read_chunks(session.as_mut(), PIECE, &mut chunks), Piece::End);
    let digest = mdev.digest();
    device.reset().unwrap();
    assert_ne!(mdev.digest(), digest);
    load_chunks(&mut device, &chunks);
    assert_eq!(mdev.digest(), digest);
}

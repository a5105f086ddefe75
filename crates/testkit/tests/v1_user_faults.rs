//! The user's side of interface v1 where something fails: reads and writes, changes of the state, devices that
//! are reset in the middle or gone. Whatever it is, the source can run on, nothing is taken for whole that is
//! not, and the state that is told was read back.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod v1_common;

use airlift_core::{DeviceErrorKind, DeviceState, Errno, MigrationDevice, Piece, TransitionError};
use airlift_testkit::v1::{
    Access, Double, DoubleOptions, Failed, Fault, Layout, PAGE, Plan, Wrong, bytes, load, save,
};
use v1_common::*;

// V1-MMAP: what is mapped and cannot be accessed ends the session like any other access that fails.
#[test]
fn a_mapping_that_fails_ends_the_session() {
    let options = DoubleOptions::new(Layout::First, 2 * PAGE);
    let device = Double::new(options.with(Plan::new(vec![bytes(1, 5000)], 0)));
    device.fail(Fault::next(Access::ReadMapped, EIO));
    let Failed::Device(error) = save(&mut user(&device), false, 9000).unwrap_err() else { panic!() };
    assert_eq!(error.errno, Some(Errno::EIO));
    assert_eq!(device.count(Access::ReadTrapped), 0);
}

// a read that fails in the middle: V1-LOOP-ERROR, V1-READBACK
#[test]
fn a_read_that_fails_in_the_middle_ends_the_session_and_the_device_runs_on() {
    let plan = Plan::new(chunks(2), 1);
    let whole = {
        let device = double(plan.clone());
        let mut user = user(&device);
        let before = device.accesses();
        save(&mut user, true, 20).unwrap();
        device.accesses() - before
    };
    let mut kinds = Vec::new();
    for after in 0..whole as u64 {
        let device = double(plan.clone());
        let mut user = user(&device);
        let before = device.accesses();
        device.fail(Fault { access: None, after, times: 1, wrong: EIO });
        match save(&mut user, true, 20) {
            Err(Failed::Device(error)) => assert_eq!(error.errno, Some(Errno::EIO), "access {after}"),
            Err(Failed::Transition(error)) => {
                assert_eq!(errno(&error), Some(Errno::EIO), "access {after}");
                if let Ok(reached) = error.reached {
                    assert_eq!(reached, device.state(), "access {after}");
                }
            }
            other => panic!("access {after}: {other:?}"),
        }
        assert_eq!(device.hits(), 1);
        kinds.push(device.records()[before + usize::try_from(after).unwrap()].access);
        // It can be tried again, from the beginning.
        user.set_state(DeviceState::Running).unwrap();
        assert_eq!(save(&mut user, true, 20).unwrap(), plan.chunks, "access {after}");
        assert_clean(&device);
    }
    for kind in [Access::ReadPending, Access::ReadOffset, Access::ReadSize, Access::ReadTrapped] {
        assert!(kinds.contains(&kind), "{kind:?} never failed");
    }
}

// V1-LOOP-ERROR
#[test]
fn a_session_that_has_failed_says_so_each_time_and_reads_no_more() {
    let device = double(Plan::new(chunks(2), 1));
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::StopCopy);
    read_chunk(&mut *session);
    device.fail(Fault::next(Access::ReadTrapped, EIO));
    let error = session.read(&mut [0; 9]).unwrap_err();
    let accesses = device.accesses();
    for _ in 0..3 {
        assert_eq!(session.read(&mut [0; 9]).unwrap_err(), error);
        assert_eq!(session.precopy_info().unwrap_err(), error);
    }
    assert_eq!(device.accesses(), accesses);
}

// a write that fails in the middle: V1-LOOP-ERROR
#[test]
fn a_load_of_which_any_write_fails_is_never_validated() {
    let data = vec![bytes(1, 100), bytes(2, 30)];
    let whole = {
        let there = double(Plan::default());
        let mut user = user(&there);
        let before = there.accesses();
        load(&mut user, &data, 40).unwrap();
        there.accesses() - before
    };
    for after in 0..whole as u64 {
        let there = double(Plan::default());
        let mut user = user(&there);
        there.fail(Fault { access: None, after, times: 1, wrong: EIO });
        let failed = load(&mut user, &data, 40).unwrap_err();
        if matches!(failed, Failed::Device(_)) {
            for target in [DeviceState::Stop, DeviceState::Running] {
                let error = user.set_state(target).unwrap_err();
                assert_eq!(error.reached, Ok(DeviceState::Resuming), "access {after}");
                assert!(error.error.message.contains("only a reset"), "{error}");
            }
            assert_eq!(there.loaded(), None, "access {after}");
        }
        user.reset().unwrap();
        load(&mut user, &data, 40).unwrap();
        assert_eq!(there.loaded(), Some(data.concat()), "access {after}");
        assert_clean(&there);
    }
}

fn assert_lost(error: &airlift_core::DeviceError) {
    assert_eq!(error.kind, DeviceErrorKind::Lost, "{error}");
    assert!(error.message.contains("by itself"), "{error}");
}

// a device that resets in the middle: V1-RESET
#[test]
fn a_reset_in_pre_copy_is_no_pause() {
    let device = double(Plan::new(chunks(3), 2));
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    read_chunk(&mut *session);
    device.fail(Fault::next(Access::ReadPending, Wrong::Reset));
    assert_lost(&session.read(&mut [0; 9]).unwrap_err());
    assert_eq!(user.state().unwrap(), DeviceState::Running);
    user.set_state(DeviceState::Running).unwrap();
    assert_clean(&device);
}

// a device that resets in the middle: V1-RESET
#[test]
fn a_reset_in_the_middle_of_a_chunk_and_between_chunks_is_no_end() {
    let plan = Plan::new(chunks(2), 0);
    for access in [Access::ReadPending, Access::ReadOffset, Access::ReadSize, Access::ReadTrapped] {
        for after in 0..3 {
            let device = double(plan.clone());
            let mut user = user(&device);
            let mut session = enter_save(&mut user, DeviceState::StopCopy);
            device.fail(Fault::next(access, Wrong::Reset).after(after));
            let error = (0..50)
                .find_map(|_| match session.read(&mut [0; 30]) {
                    Ok(Piece::End) => panic!("{access:?} {after}: the end of a device that was reset"),
                    other => other.err(),
                })
                .unwrap();
            // Refused, where the device does not give data any more; else it is seen in its state.
            if error.kind != DeviceErrorKind::Refused {
                assert_lost(&error);
            }
            assert_eq!(user.state().unwrap(), DeviceState::Running);
            assert_clean(&device);
        }
    }
}

// a device that resets in the middle: V1-RESET
#[test]
fn a_reset_before_the_stop_is_no_stop() {
    let device = double(Plan::new(chunks(3), 1));
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    read_chunk(&mut *session);
    device.fail(Fault::next(Access::ReadState, Wrong::Reset));
    let error = user.set_state(DeviceState::StopCopy).unwrap_err();
    assert_lost(&error.error);
    assert_eq!((error.reached, device.state()), (Ok(DeviceState::Running), DeviceState::Running));
    assert_lost(&session.read(&mut [0; 9]).unwrap_err());
    // Given up, the device is as good as new.
    user.set_state(DeviceState::Running).unwrap();
    assert_eq!(save(&mut user, true, 9).unwrap(), Vec::<Vec<u8>>::new());
    assert_clean(&device);
}

// a device that resets in the middle: V1-RESET
#[test]
fn a_reset_of_a_loading_device_is_not_validated() {
    let data = chunks(2);
    for target in [DeviceState::Stop, DeviceState::Running] {
        let there = double(Plan::default());
        let mut user = user(&there);
        let mut session = enter_load(&mut user);
        for chunk in &data {
            session.begin_chunk(chunk.len() as u64).unwrap();
            session.write(chunk).unwrap();
            session.end_chunk().unwrap();
        }
        there.fail(Fault::next(Access::ReadState, Wrong::Reset));
        let error = user.set_state(target).unwrap_err();
        assert_lost(&error.error);
        assert_eq!(error.reached, Ok(DeviceState::Running));
        assert_lost(&session.write(&[1]).unwrap_err());
        assert_eq!(there.loaded(), None);
        // From the beginning it can be tried again.
        load(&mut user, &data, 9).unwrap();
        assert_eq!(there.loaded(), Some(data.concat()));
        assert_clean(&there);
    }
}

// a device that resets in the middle: V1-RESET
#[test]
fn a_reset_in_the_middle_of_loading_is_an_error() {
    for access in [Access::ReadOffset, Access::WriteTrapped, Access::WriteSize] {
        let there = double(Plan::default());
        let mut user = user(&there);
        there.fail(Fault::next(access, Wrong::Reset).after(1));
        load(&mut user, &chunks(2), 100).unwrap_err();
        assert_eq!((there.loaded(), there.state()), (None, DeviceState::Running));
        load(&mut user, &chunks(2), 100).unwrap();
        assert_clean(&there);
    }
}

/// Changes the state of a running device, in which this goes wrong.
fn change(to: DeviceState, wrong: Wrong) -> (Double, User, TransitionError) {
    let device = double(Plan::new(chunks(1), 1));
    let mut user = user(&device);
    device.fail(Fault::next(Access::WriteState, wrong));
    let error = user.set_state(to).unwrap_err();
    assert_clean(&device);
    (device, user, error)
}

// V1-READBACK
#[test]
fn a_state_write_that_fails_is_read_back() {
    for to in [DeviceState::PreCopy, DeviceState::StopCopy, DeviceState::Resuming, DeviceState::Stop] {
        let (_, mut user, error) = change(to, EIO);
        assert_eq!((errno(&error), error.reached), (Some(Errno::EIO), Ok(DeviceState::Running)));
        user.set_state(to).unwrap();

        let (device, mut user, error) = change(to, Wrong::RefusedInto(Errno::EIO, ERROR));
        assert_eq!((errno(&error), error.reached), (Some(Errno::EIO), Ok(DeviceState::Error)));
        // Only a reset leads out of it, and nothing else is tried.
        let writes = device.count(Access::WriteState);
        for target in [DeviceState::Running, DeviceState::Stop, to] {
            assert_eq!(user.set_state(target).unwrap_err().reached, Ok(DeviceState::Error));
        }
        assert_eq!(device.count(Access::WriteState), writes);
        user.reset().unwrap();
        user.set_state(to).unwrap();
    }
}

// V1-READBACK
#[test]
fn a_state_that_nobody_asked_for_is_told_and_not_believed() {
    for (wrong, reached) in [
        (Wrong::RefusedInto(Errno::EIO, RESUMING), DeviceState::Resuming),
        (Wrong::RefusedInto(Errno::EIO, 5), DeviceState::Unknown(0x105)),
        (Wrong::Into(STOP_COPY), DeviceState::StopCopy),
        (Wrong::Into(ERROR), DeviceState::Error),
        // Accepted, and not made.
        (Wrong::Into(RUNNING), DeviceState::Running),
    ] {
        let (device, _, error) = change(DeviceState::PreCopy, wrong);
        assert_eq!(error.reached, Ok(reached), "{wrong:?}");
        assert_eq!(device.state(), reached);
    }
}

// V1-READBACK, V1-PENDING
#[test]
fn a_stop_whose_read_back_fails_makes_no_end_of_an_old_zero() {
    let plan = Plan::new(chunks(2), 0);
    let device = double(plan.clone());
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    assert_eq!(session.precopy_info().unwrap().unwrap().dirty_bytes, 0);
    device.fail(Fault::next(Access::ReadState, EIO).after(1));
    let error = user.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!((errno(&error), error.reached), (Some(Errno::EIO), Ok(DeviceState::StopCopy)));
    // It is there, and gives what it has to whoever goes on.
    for chunk in &plan.chunks {
        assert_eq!(read_chunk(&mut *session), *chunk);
    }
    assert_eq!(session.read(&mut [0; 9]).unwrap(), Piece::End);
    assert_clean(&device);
}

// V1-READBACK
#[test]
fn a_session_does_not_go_on_in_a_state_that_nobody_asked_for() {
    let device = double(Plan::new(chunks(2), 2));
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    read_chunk(&mut *session);
    device.fail(Fault::next(Access::WriteState, Wrong::Into(STOP_COPY)));
    let error = user.set_state(DeviceState::Running).unwrap_err();
    assert_eq!(error.reached, Ok(DeviceState::StopCopy));
    // The device begins anew there: what was read would come twice.
    assert_eq!(session.read(&mut [0; 9]).unwrap_err().kind, DeviceErrorKind::Protocol);
    user.set_state(DeviceState::Running).unwrap();
    assert_clean(&device);
}

// V1-LOOP-ERROR, V1-OUTSTANDING
#[test]
fn a_session_that_has_failed_is_not_taken_to_the_stop() {
    let device = double(Plan::new(chunks(2), 2));
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    // The device has put a chunk there, and the user does not know where.
    device.fail(Fault::next(Access::ReadOffset, Wrong::Answers(0)));
    session.read(&mut [0; 9]).unwrap_err();
    let error = user.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!(error.reached, Ok(DeviceState::PreCopy));
    assert!(error.error.message.contains("saving has failed"), "{error}");
    user.set_state(DeviceState::Running).unwrap();
    assert_clean(&device);
}

// V1-READBACK
#[test]
fn a_state_that_cannot_be_read_back_is_said_to_be_unknown() {
    let device = double(Plan::default());
    let mut user = user(&device);
    device.fail(Fault::next(Access::WriteState, Wrong::Gone));
    let error = user.set_state(DeviceState::Stop).unwrap_err();
    assert_eq!(error.reached.unwrap_err().kind, DeviceErrorKind::Lost);
}

// A device that is gone for good ends every call, and none of them waits.
#[test]
fn a_device_that_is_gone_is_lost_wherever_it_goes() {
    let plan = Plan::new(chunks(2), 1);
    for after in 0..200 {
        let device = double(plan.clone());
        let mut user = user(&device);
        device.fail(Fault { access: None, after, times: 1, wrong: Wrong::Gone });
        match save(&mut user, true, 20) {
            Err(Failed::Device(error)) => assert_eq!(error.kind, DeviceErrorKind::Lost),
            Err(Failed::Transition(error)) => assert_eq!(error.error.kind, DeviceErrorKind::Lost),
            // Behind the last access.
            Ok(chunks) => {
                assert_eq!(chunks, plan.chunks);
                assert!(after > 15);
                return;
            }
            Err(other) => panic!("{other}"),
        }
        assert!(user.reset().is_err());
    }
    panic!("a save has no end");
}

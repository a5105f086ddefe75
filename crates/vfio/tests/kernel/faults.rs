//! Drivers that fail and drivers that do not answer: what is reported, where the device is said to be, and
//! that it, the process and other devices are of use afterwards.

use crate::support::{
    Mdev, assert_usable, impatient, join, load, loading, pattern, poke, read, save, saving, wait_for,
};
use airlift_core::{DeviceErrorKind, DeviceState, Errno, MigrationDevice, Piece, path};
use airlift_vfio::{VfioDevice, Way};
use std::thread;

fn arc(from: DeviceState, to: DeviceState) -> String {
    format!("{} {}", from.to_raw(), to.to_raw())
}

/// Brings a device that runs to `from`, with data where it is RESUMING.
fn bring(device: &mut VfioDevice, from: DeviceState, stream: &[u8]) -> Option<airlift_core::Session> {
    let mut session = device.set_state(from).unwrap();
    if let Some(airlift_core::Session::Load(load)) = &mut session {
        load.write(stream).unwrap();
    }
    session
}

/// Every single arc, once staying where it was and once breaking the device.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_readback_an_arc_that_fails_says_where_the_device_is_and_leaves_it_of_use() {
    for kind in ["v2", "v2-no-p2p", "v2-plain"] {
        let mdev = Mdev::sized(kind, 5000);
        let mut device = mdev.open(Way::Group);
        let stream = save(&mut device);
        for one in airlift_core::arcs(&device.capabilities()) {
            for breaks in [false, true] {
                device.reset().unwrap();
                let session = bring(&mut device, one.from, &stream);
                let word = if breaks { " error" } else { "" };
                mdev.set("fail_arc", &format!("{} 5{word}", arc(one.from, one.to)));
                let error = device.set_state(one.to).unwrap_err();
                mdev.set("fail_arc", "");
                assert_eq!((error.from, error.to), (one.from, one.to), "{error}");
                assert_eq!(error.error.errno, Some(Errno::EIO), "{error}");
                assert!(error.to_string().contains(&one.to_string()), "names the arc: {error}");
                if breaks {
                    assert_eq!(error.reached, Ok(DeviceState::Error), "{error}");
                    assert!(
                        device.set_state(DeviceState::Running).is_err(),
                        "{one}: only a reset leaves ERROR"
                    );
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
}

/// On a way over several arcs, each in turn fails.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_readback_a_walk_that_fails_on_the_way_names_the_arc_and_the_state_before_it() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    let stream = save(&mut device);
    device.set_state(DeviceState::Running).unwrap();
    for (from, to) in [
        (DeviceState::Running, DeviceState::StopCopy),
        (DeviceState::PreCopy, DeviceState::Stop),
        (DeviceState::Resuming, DeviceState::Running),
        (DeviceState::StopCopy, DeviceState::Running),
    ] {
        let arcs = path(from, to, &device.capabilities()).unwrap();
        assert!(arcs.len() > 1);
        for failing in arcs {
            device.reset().unwrap();
            let _session = bring(&mut device, from, &stream);
            mdev.set("fail_arc", &format!("{} 12", arc(failing.from, failing.to)));
            let error = device.set_state(to).unwrap_err();
            mdev.set("fail_arc", "");
            assert_eq!(error.reached, Ok(failing.from), "{error}");
            assert_eq!(error.error.errno, Some(Errno::ENOMEM), "{error}");
            assert!(error.error.message.contains(&failing.to_string()), "{error}");
            // The rest of the way is still there.
            device.set_state(to).unwrap();
        }
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_read_that_fails_ends_the_session_and_the_migration_can_be_called_off() {
    let mdev = Mdev::sized("v2", 50_000);
    let mut device = mdev.open(Way::Group);
    for after in [0, 1, 10_000] {
        mdev.set("fail_read", &format!("{after} 5"));
        let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
        let (mut got, mut buf) = (0, [0; 4096]);
        let error = loop {
            match session.read(&mut buf) {
                Ok(Piece::Data { len, .. }) => got += len,
                Ok(other) => panic!("{other:?} after {got} bytes"),
                Err(error) => break error,
            }
        };
        assert_eq!(got, after, "what came before is whole");
        assert_eq!((&error.kind, error.errno), (&DeviceErrorKind::Refused, Some(Errno::EIO)), "{error}");
        assert!(error.operation.contains("read"), "{error}");
        // The session is over, also when the driver would go on.
        mdev.set("fail_read", "");
        let before = mdev.number("reads");
        let again = session.read(&mut buf).unwrap_err();
        assert!(again.message.contains("failed before"), "{again}");
        assert_eq!(mdev.number("reads"), before, "the driver was not asked");
        device.set_state(DeviceState::Running).unwrap();
        assert_usable(&mut device);
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_write_final_after_a_write_that_failed_nothing_is_sent_and_stop_is_refused() {
    let mdev = Mdev::sized("v2", 50_000);
    let mut device = mdev.open(Way::Group);
    poke(&device, 0, &pattern(50_000, 4));
    let digest = mdev.digest();
    let stream = save(&mut device);
    for after in [0, 1, 30_000] {
        mdev.set("fail_write", &format!("{after} 28"));
        let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
        let before = mdev.number("bytes_written");
        let error = session.write(&stream).unwrap_err();
        assert_eq!((&error.kind, error.errno), (&DeviceErrorKind::Refused, Some(Errno::ENOSPC)), "{error}");
        assert_eq!(mdev.number("bytes_written") - before, after, "a short write was followed by the rest");
        mdev.set("fail_write", "");
        assert!(session.write(&stream).is_err());
        assert!(session.end_chunk().is_err());
        assert_eq!(mdev.number("bytes_written") - before, after, "the driver was not asked");
        for to in [DeviceState::Stop, DeviceState::Running, DeviceState::StopCopy] {
            let refused = device.set_state(to).unwrap_err();
            assert_eq!(refused.reached, Ok(DeviceState::Resuming), "{refused}");
            assert!(refused.error.message.contains("only a reset"), "{refused}");
        }
        device.reset().unwrap();
        load(&mut device, &stream);
        assert_eq!(mdev.digest(), digest);
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_read_or_write_that_never_comes_ends_by_its_deadline() {
    let mdev = Mdev::sized("v2", 50_000);
    let mut device = mdev.open_with(Way::Group, impatient());
    let stream = save(&mut device);
    device.set_state(DeviceState::Running).unwrap();

    mdev.set("block", "read");
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    let error = session.read(&mut [0; 4096]).unwrap_err();
    assert_eq!((&error.kind, error.errno), (&DeviceErrorKind::TimedOut, Some(Errno::ETIMEDOUT)), "{error}");
    assert!(error.operation.contains("read of the data session"), "{error}");
    mdev.set("block", "");
    assert!(session.read(&mut [0; 4096]).unwrap_err().message.contains("failed before"));
    device.set_state(DeviceState::Running).unwrap();

    mdev.set("block", "write");
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    let error = session.write(&stream).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::TimedOut, "{error}");
    assert!(error.operation.contains("write of the data session"), "{error}");
    mdev.set("block", "");
    let refused = device.set_state(DeviceState::Stop).unwrap_err();
    assert!(refused.error.message.contains("only a reset"), "a write that was given up is final: {refused}");
    device.reset().unwrap();
    load(&mut device, &stream);
}

// K-GIVE-UP
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_read_that_waits_is_ended_by_the_interrupter_from_another_thread() {
    let mdev = Mdev::sized("v2", 50_000);
    let mut device = mdev.open(Way::Group);
    let interrupter = device.interrupter();
    mdev.set("block", "read");
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    let before = mdev.number("reads");
    let reader = thread::spawn(move || session.read(&mut [0; 4096]));
    wait_for("the read in the driver", || mdev.number("reads") > before);
    assert!(interrupter.interrupt());
    let error = join("the read", reader).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Interrupted, "{error}");
    mdev.set("block", "");
    device.set_state(DeviceState::Running).unwrap();
    assert_usable(&mut device);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_arc_that_never_ends_is_given_up_by_its_deadline_and_the_state_is_read_back() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open_with(Way::Cdev, impatient());
    mdev.set("block", &format!("arc {}", arc(DeviceState::RunningP2p, DeviceState::Stop)));
    let error = device.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!(error.error.kind, DeviceErrorKind::TimedOut, "{error}");
    assert_eq!(error.error.errno, Some(Errno::ETIMEDOUT), "{error}");
    assert!(error.error.message.contains("RUNNING_P2P -> STOP"), "names the arc: {error}");
    assert_eq!(error.reached, Ok(DeviceState::RunningP2p), "{error}");
    assert_eq!(mdev.number("blocked"), 0, "nobody waits in the driver any more");
    mdev.set("block", "");
    device.set_state(DeviceState::Running).unwrap();
    assert_usable(&mut device);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_arc_that_waits_is_ended_by_the_interrupter_from_another_thread() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    let interrupter = device.interrupter();
    mdev.set("block", &format!("arc {}", arc(DeviceState::Running, DeviceState::PreCopy)));
    let walker = thread::spawn(move || {
        let error = device.set_state(DeviceState::PreCopy).unwrap_err();
        (device, error)
    });
    wait_for("the arc in the driver", || mdev.number("blocked") == 1);
    assert!(interrupter.interrupt());
    let (mut device, error) = join("the arc", walker);
    assert_eq!(error.error.kind, DeviceErrorKind::Interrupted, "{error}");
    assert_eq!(error.reached, Ok(DeviceState::Running), "{error}");
    mdev.set("block", "");
    assert_usable(&mut device);
}

/// The kernel lets no signal end this wait. The thread is given up; everything else goes on.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_arc_that_nothing_ends_holds_its_own_thread_only_and_the_device_is_of_use_after_it() {
    let (stuck, other) = (Mdev::sized("v2", 5000), Mdev::sized("v2", 5000));
    let mut device = stuck.open_with(Way::Group, impatient());
    let interrupter = device.interrupter();
    let running_p2p = arc(DeviceState::Running, DeviceState::RunningP2p);
    stuck.set("block", &format!("arc {running_p2p} uninterruptible"));
    let walker = thread::spawn(move || {
        let result = device.set_state(DeviceState::RunningP2p);
        (device, result)
    });
    wait_for("the arc in the driver", || stuck.number("blocked") == 1);
    assert!(interrupter.interrupt(), "which does not wait");
    assert_usable(&mut other.open(Way::Group));
    assert_usable(&mut other.open(Way::Cdev));
    assert!(!walker.is_finished());
    assert_eq!(stuck.number("blocked"), 1, "deadline and interrupter do not end it");

    stuck.set("block", "");
    let (mut device, result) = join("the arc that was released", walker);
    // Late, but made: what was reached is what the device is in.
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(device.state(), Ok(DeviceState::RunningP2p));
    device.reset().unwrap();
    assert_usable(&mut device);
}

/// A session in STOP_COPY whose driver stops giving: what is read later is whole again.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_saving_device_that_was_given_up_in_stop_copy_can_be_saved_again() {
    let mdev = Mdev::sized("v2", 50_000);
    let mut device = mdev.open_with(Way::Group, impatient());
    poke(&device, 0, &pattern(50_000, 8));
    let mut session = saving(device.set_state(DeviceState::StopCopy).unwrap());
    session.read(&mut [0; 1000]).unwrap();
    mdev.set("block", "read");
    assert_eq!(session.read(&mut [0; 1000]).unwrap_err().kind, DeviceErrorKind::TimedOut);
    mdev.set("block", "");
    device.set_state(DeviceState::Stop).unwrap();
    let mut data = Vec::new();
    let mut session = saving(device.set_state(DeviceState::StopCopy).unwrap());
    assert_eq!(read(session.as_mut(), 4096, &mut data), Piece::End);
    let digest = mdev.digest();
    device.reset().unwrap();
    assert_ne!(mdev.digest(), digest);
    load(&mut device, &data);
    assert_eq!(mdev.digest(), digest);
}

//! VFIO_DEVICE_RESET in every state, by the session's own process and under it.

use crate::support::{Mdev, assert_usable, id, join, loading, poke, save, saving, share, states, wait_for};
use airlift_core::{DeviceErrorKind, DeviceState, Errno, MigrationDevice, Session};
use airlift_vfio::{Recover, VfioDevice, VfioOptions, Way};
use std::thread;

fn use_session(session: &mut Session) -> airlift_core::DeviceError {
    match session {
        Session::Save(save) => save.read(&mut [0; 64]).unwrap_err(),
        Session::Load(load) => load.write(&[0]).unwrap_err(),
    }
}

/// C60, C61.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_reset_in_every_state_gives_a_running_device_and_ends_its_session() {
    for mdev in [Mdev::sized("v2", 5000), Mdev::sized("v2-plain", 5000), Mdev::mtty(2)] {
        let mut device = mdev.open(Way::Group);
        for state in states(&device.capabilities()) {
            let mut session = device.set_state(state).unwrap();
            device.reset().unwrap();
            assert_eq!(device.state(), Ok(DeviceState::Running), "from {state}");
            if let Some(session) = &mut session {
                let error = use_session(session);
                assert_eq!(error.kind, DeviceErrorKind::Misuse, "in {state}: {error}");
            }
            assert_usable(&mut device);
        }
    }
}

/// C63.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_error_a_reset_leaves_error() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    mdev.set("fail_arc", "2 6 5 error");
    assert_eq!(device.set_state(DeviceState::PreCopy).unwrap_err().reached, Ok(DeviceState::Error));
    mdev.set("fail_arc", "");
    device.reset().unwrap();
    assert_usable(&mut device);
}

/// The state goes with it: what a guest sees is lost, which is why the engine asks before it resets.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_reset_loses_the_device_s_state() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    let empty = mdev.digest();
    poke(&device, 0, b"state");
    assert_ne!(mdev.digest(), empty);
    device.reset().unwrap();
    assert_eq!(mdev.digest(), empty);
}

/// By somebody who has the same open device: a guest, through its VMM.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_stale_a_reset_by_another_holder_of_the_device_ends_the_session_under_it() {
    for mdev in [Mdev::sized("v2", 5000), Mdev::mtty(2)] {
        let mut device = mdev.open(Way::Group);
        for state in states(&device.capabilities()).into_iter().filter(|s| *s != DeviceState::Running) {
            let mut session = device.set_state(state).unwrap();
            let mut guest = VfioDevice::from_fd(id(), share(&device), VfioOptions::default()).unwrap();
            assert_eq!(guest.found_state(), state);
            guest.reset().unwrap();
            if let Some(session) = &mut session {
                let error = use_session(session);
                assert_eq!(
                    (&error.kind, error.errno),
                    (&DeviceErrorKind::Lost, Some(Errno::ENODEV)),
                    "{error}"
                );
                assert!(error.message.contains("reset under the session"), "in {state}: {error}");
            }
            assert_eq!(device.state(), Ok(DeviceState::Running), "not as it was remembered: {state}");
            assert_usable(&mut device);
        }
    }
}

/// Asked for its state first, the device says that it has been reset, and the session is over at once.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_after_end_the_state_that_is_read_ends_a_session_that_it_does_not_belong_to() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    let mut guest = VfioDevice::from_fd(id(), share(&device), VfioOptions::default()).unwrap();
    guest.reset().unwrap();
    assert_eq!(device.state(), Ok(DeviceState::Running));
    assert_eq!(session.write(&[0]).unwrap_err().kind, DeviceErrorKind::Misuse);
    let error = guest.set_state(DeviceState::Unknown(9)).unwrap_err();
    assert_eq!(error.reached, Ok(DeviceState::Running));
}

/// C62.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_reset_ends_a_read_that_waits_for_the_driver() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    let mut guest = VfioDevice::from_fd(id(), share(&device), VfioOptions::default()).unwrap();
    mdev.set("block", "read");
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    let before = mdev.number("reads");
    let reader = thread::spawn(move || session.read(&mut [0; 64]));
    wait_for("the read in the driver", || mdev.number("reads") > before);
    guest.reset().unwrap();
    let error = join("the read", reader).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Lost, "{error}");
    mdev.set("block", "");
    assert_usable(&mut device);
}

/// What a descriptor that was handed in is found in is left to its VMM, unless it is asked for.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_was_handed_in_is_reset_only_when_that_is_asked_for() {
    let mdev = Mdev::sized("v2", 5000);
    let mut device = mdev.open(Way::Group);
    poke(&device, 0, b"a guest's");
    let digest = mdev.digest();
    device.set_state(DeviceState::Stop).unwrap();

    let mut handed = VfioDevice::from_fd(id(), share(&device), VfioOptions::default()).unwrap();
    assert_eq!(handed.found_state(), DeviceState::Stop);
    assert_eq!(handed.state(), Ok(DeviceState::Stop));
    assert_eq!((mdev.digest(), mdev.number("resets")), (digest.clone(), 0));
    assert!(!save(&mut handed).is_empty(), "and it is migrated from there");
    drop(handed);
    assert_eq!(mdev.digest(), digest, "the VMM still has it open");

    device.set_state(DeviceState::Stop).unwrap();
    let options = VfioOptions { recover: Some(Recover::Reset), ..VfioOptions::default() };
    let mut handed = VfioDevice::from_fd(id(), share(&device), options).unwrap();
    assert_eq!(handed.found_state(), DeviceState::Stop);
    assert_eq!(handed.state(), Ok(DeviceState::Running));
    assert_eq!(mdev.number("resets"), 1);
}

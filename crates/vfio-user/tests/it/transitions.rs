//! Transitions: combinations, failures, deadlines, and what is served meanwhile.

use crate::common::*;
use airlift_core::{
    Capabilities, DeviceErrorKind, DeviceState, Errno, MigrationDevice, MigrationFlags, Session, path,
};
use airlift_vfio_user::{ServerOptions, VfioUserDevice};
use std::time::Duration;

use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

#[test]
fn what_a_device_can_do_and_is_comes_over_the_socket() {
    let served = serve();
    let mut device = served.device();
    let caps = device.capabilities();
    assert_eq!(caps, Capabilities { reinit: true, ..Capabilities::v2(7).unwrap() });
    let identity = device.identity();
    let format = identity.format.as_ref().unwrap();
    assert_eq!(
        (format.name.as_str(), format.version, format.accepts.as_slice()),
        ("test", 3, [2, 3].as_slice())
    );
    let fact = |key: &str| identity.facts.get(key).map(String::as_str);
    assert_eq!(fact("pci-vendor"), Some("0x1af4"));
    assert_eq!(fact("pci-class"), Some("0x028000"));
    assert_eq!(fact("region2-size"), Some("1048576"));
    assert_eq!(fact("region7-size"), Some("256"));
    assert_eq!(device.found_state(), Running);
    assert_eq!(device.state(), Ok(Running));
}

// V2-PATH, V2-SESSION, V2-NO-REWIND
#[test]
fn every_combination_is_walked_arc_by_arc() {
    for flags in [1, 3, 5, 7] {
        let caps = Capabilities::v2(flags).unwrap();
        let served = serve_with(MigrationFlags::from_bits(flags).unwrap(), ServerOptions::default());
        let mut device = served.device();
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Ok(way) = path(Running, from, &caps) else { continue };
                let Ok(arcs) = path(from, to, &caps) else {
                    if !way.is_empty() || from == Running {
                        device.set_state(from).unwrap();
                        let error = device.set_state(to).unwrap_err();
                        assert_eq!((error.reached, error.error.errno), (Ok(from), Some(Errno::EINVAL)));
                        device.reset().unwrap();
                    }
                    continue;
                };
                device.set_state(from).unwrap();
                served.control.take_log();
                let session = device.set_state(to).unwrap();
                let made: Vec<_> = served.control.log().into_iter().filter(|l| l.contains("->")).collect();
                let expected: Vec<_> = arcs.iter().map(ToString::to_string).collect();
                assert_eq!(made, expected, "{from} to {to} with flags {flags}");
                let opens = |s: DeviceState| s.is_saving() || s == Resuming;
                let kept = from == to || (from.is_saving() && to.is_saving());
                assert_eq!(session.is_some(), opens(to) && !kept, "{from} to {to}");
                assert_eq!(device.state(), Ok(to));
                device.reset().unwrap();
            }
        }
    }
}

// V2-READBACK, I6
#[test]
fn a_failing_arc_inside_a_combination_is_read_back() {
    let served = serve();
    let mut device = served.device();
    device.set_state(PreCopy).unwrap();
    served.control.with(|s| s.fail = Some((Errno::EBUSY, PreCopy)));
    let error = device.set_state(StopCopy).unwrap_err();
    assert_eq!((error.from, error.to), (PreCopy, StopCopy));
    assert_eq!(error.reached, Ok(PreCopy));
    assert_eq!(error.error.errno, Some(Errno::EBUSY));
    // The session goes on.
    assert!(device.set_state(StopCopy).unwrap().is_none());

    // Somewhere along the way: the state is the one that the device names.
    device.set_state(Running).unwrap();
    served.control.with(|s| s.hold = true);
    let control = std::sync::Arc::clone(&served.control);
    let steer = std::thread::spawn(move || {
        control.until("the first arc", |s| !s.held.is_empty());
        control.with(|s| {
            s.hold = false;
            s.fail = Some((Errno::EIO, RunningP2p));
            s.held.remove(0).ok();
        });
    });
    let error = device.set_state(StopCopy).unwrap_err();
    steer.join().unwrap();
    assert_eq!(error.reached, Ok(RunningP2p));
}

// V2-ERROR, I8
#[test]
fn an_answer_that_is_forgotten_or_late_is_a_failure() {
    let options = ServerOptions { transition_timeout: Duration::from_millis(50), ..Default::default() };
    let served = serve_with(FULL, options);
    let mut device = served.device();
    served.control.with(|s| s.forget = true);
    let error = device.set_state(RunningP2p).unwrap_err();
    assert_eq!((error.reached, error.error.errno), (Ok(Error), Some(Errno::EIO)));
    device.reset().unwrap();

    served.control.with(|s| s.hold = true);
    let error = device.set_state(RunningP2p).unwrap_err();
    assert_eq!((error.reached, error.error.errno), (Ok(Error), Some(Errno::ETIMEDOUT)));
    // The late answer changes nothing.
    served.control.with(|s| {
        s.hold = false;
        s.held.drain(..).for_each(|d| d.ok());
    });
    assert_eq!(device.state(), Ok(Error));
    device.reset().unwrap();
    assert_eq!(device.state(), Ok(Running));
}

#[test]
fn regions_are_served_while_a_transition_is_pending() {
    let served = serve();
    let client = served.client();
    let socket = client.migration_socket().unwrap();
    let mut device = VfioUserDevice::from_stream(id(), socket, options()).unwrap();
    served.control.with(|s| s.hold = true);
    let pending = std::thread::spawn(move || {
        device.set_state(RunningP2p).unwrap();
        device
    });
    served.control.until("the arc", |s| !s.held.is_empty());
    // What the guest does goes on.
    client.region_write(0, 8, &[1, 2, 3, 4]).unwrap();
    let mut back = [0; 4];
    client.region_read(0, 8, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
    assert_eq!(client.info().unwrap().num_regions, 9);
    assert!(!pending.is_finished());
    served.control.with(|s| {
        s.hold = false;
        s.held.remove(0).ok();
    });
    assert_eq!(pending.join().unwrap().state(), Ok(RunningP2p));
}

// VU-INTERRUPT
#[test]
fn a_wait_can_be_interrupted_and_the_connection_stays_good() {
    let served = serve();
    let mut device = served.device();
    let interrupter = device.interrupter();
    // Without a call that waits it does nothing.
    assert!(interrupter.interrupt());
    assert_eq!(device.state(), Ok(Running));

    served.control.with(|s| s.hold = true);
    let control = std::sync::Arc::clone(&served.control);
    let steer = std::thread::spawn(move || {
        control.until("the arc", |s| !s.held.is_empty());
        assert!(interrupter.interrupt());
    });
    let error = device.set_state(RunningP2p).unwrap_err();
    steer.join().unwrap();
    assert_eq!(error.error.kind, DeviceErrorKind::Interrupted);
    // The server was still busy with the arc: the state could not be said.
    assert_eq!(error.reached.unwrap_err().kind, DeviceErrorKind::TimedOut);
    served.control.with(|s| {
        s.hold = false;
        s.held.remove(0).ok();
    });
    // The late answers are passed over, and the device can be walked back.
    assert_eq!(device.state(), Ok(RunningP2p));
    device.set_state(Running).unwrap();

    // Who may interrupt does not keep the connection: the next client finds the server free.
    let interrupter = device.interrupter();
    drop(device);
    served.client();
    assert!(interrupter.interrupt());
}

// VU-SESSION-END, VU-STALE
#[test]
fn a_client_that_goes_ends_its_session() {
    let ends = [
        (StopCopy, Stop),
        (PreCopy, Running),
        (PreCopyP2p, RunningP2p),
        (Resuming, Error),
        (Stop, Stop),
        (RunningP2p, RunningP2p),
    ];
    for (left_in, found) in ends {
        let served = serve();
        let mut device = served.device();
        drop(device.set_state(left_in).unwrap());
        drop(device);
        let mut next = served.device();
        assert_eq!(next.found_state(), found, "left in {left_in}");
        assert_eq!(next.state(), Ok(found));
        drop(next);
        let recovering = airlift_vfio_user::ClientOptions { recover_stale: true, ..options() };
        let mut next = VfioUserDevice::connect(id(), &served.path, recovering).unwrap();
        assert_eq!(next.found_state(), Running);
        assert_eq!(next.state(), Ok(Running));
    }
}

// VU-SESSION-END, VU-MIGRATION-SOCKET
#[test]
fn the_migration_socket_ends_alone_and_comes_one_at_a_time() {
    for (left_in, found) in
        [(StopCopy, Stop), (PreCopy, Running), (PreCopyP2p, RunningP2p), (Resuming, Error)]
    {
        let served = serve();
        let client = served.client();
        let first = client.migration_socket().unwrap();
        let mut device = VfioUserDevice::from_stream(id(), first, options()).unwrap();
        assert_eq!(client.migration_socket().unwrap_err().errno, Some(Errno::EBUSY));
        drop(device.set_state(left_in).unwrap());
        drop(device);
        // The next one is there at once, behind the end of the session; the VMM stays attached.
        let second = client.migration_socket().unwrap();
        let mut device = VfioUserDevice::from_stream(id(), second, options()).unwrap();
        assert_eq!(device.state(), Ok(found), "left in {left_in}");
        client.region_write(0, 0, &[1]).unwrap();
        assert!(!served.control.log().iter().any(|l| l.starts_with("detach")));
        // A reset over it, as a rollback needs.
        device.reset().unwrap();
        assert_eq!(device.state(), Ok(Running));
    }
}

// VU-MIGRATION-SOCKET
#[test]
fn the_migration_socket_can_only_migrate() {
    let served = serve();
    let client = served.client();
    let socket = client.migration_socket().unwrap();
    let narrow = airlift_vfio_user::Client::from_stream(socket, options()).unwrap();
    let denied = |result: Result<(), airlift_core::DeviceError>| {
        assert_eq!(result.unwrap_err().errno, Some(Errno::EPERM));
    };
    denied(narrow.region_write(0, 0, &[1]));
    denied(narrow.region_read(0, 0, &mut [0]));
    denied(narrow.dma_unmap(0, 4096));
    denied(narrow.disable_irqs(0));
    narrow.region_read(7, 0, &mut [0; 4]).unwrap();
    assert_eq!(narrow.migration_socket().unwrap_err().kind, DeviceErrorKind::Unsupported);
    // With the VMM the second connection goes too.
    drop(client);
    served.control.until("the detachment", |s| s.log.last().is_some_and(|l| l == "detach Closed"));
    assert_eq!(narrow.info().unwrap_err().kind, DeviceErrorKind::Lost);
}

// VU-PROBE
#[test]
fn a_device_without_migration_is_refused_and_one_without_extensions_works() {
    let served = serve_with(MigrationFlags::empty(), ServerOptions::default());
    let error = VfioUserDevice::connect(id(), &served.path, options()).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Unsupported);

    let served = serve_with(FULL, ServerOptions { extensions: false, ..Default::default() });
    let mut device = served.device();
    assert!(!device.capabilities().reinit);
    assert!(device.identity().format.is_none());
    let Some(Session::Save(mut save)) = device.set_state(PreCopy).unwrap() else { panic!("no session") };
    assert_eq!(save.precopy_info(), Ok(None));
    assert_eq!(device.stop_copy_size(), Ok(None));
}

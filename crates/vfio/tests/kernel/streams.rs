//! Streams that do not fit: cut, too long, changed, of another device or another kind. None is taken, what
//! was refused stays refused, and a reset brings the device back.

use crate::raw;
use crate::support::{Mdev, assert_usable, load, loading, pattern, poke, save, set_uart, take_uart};
use airlift_core::{
    DeviceErrorKind, DeviceOffer, DeviceState, Errno, Limits, MemoryLayout, MigrationDevice, Offer,
    TransitionError, compare,
};
use airlift_vfio::{VfioDevice, Way};
use std::io::Write;

/// What became of a stream.
#[derive(Debug)]
enum Fate {
    Loaded,
    /// By a write.
    Refused(Errno),
    /// By RESUMING -> STOP.
    Invalid(TransitionError),
}

/// Loads in writes of `size`. After a refusal the device is reset, as nothing else leaves RESUMING.
fn offer(device: &mut VfioDevice, data: &[u8], size: usize) -> Fate {
    device.reset().unwrap();
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    let refused = data.chunks(size).find_map(|piece| session.write(piece).err());
    let stopped = device.set_state(DeviceState::Stop);
    assert_eq!(stopped.is_ok(), device.state() == Ok(DeviceState::Stop));
    let fate = match (refused, stopped) {
        (None, Ok(_)) => Fate::Loaded,
        (None, Err(error)) => Fate::Invalid(error),
        (Some(_), Ok(_)) => panic!("loaded, although a write was refused (V2-WRITE-FINAL)"),
        (Some(write), Err(error)) => {
            assert_eq!(error.reached, Ok(DeviceState::Resuming), "{error}");
            assert_eq!(error.error.errno, write.errno, "{error}");
            assert!(error.error.message.contains("a write has failed"), "{error}");
            Fate::Refused(write.errno.unwrap())
        }
    };
    device.reset().unwrap();
    assert_eq!(device.state(), Ok(DeviceState::Running));
    fate
}

fn assert_invalid(device: &mut VfioDevice, data: &[u8], what: &str) {
    match offer(device, data, 4096) {
        Fate::Invalid(error) => {
            assert_eq!(error.from, DeviceState::Resuming, "{what}");
            assert_eq!(error.error.errno, Some(Errno::EINVAL), "{what}: {error}");
            assert_eq!(error.reached, Ok(DeviceState::Resuming), "{what}: {error}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

fn changed(data: &[u8], at: usize, bit: u8) -> Vec<u8> {
    let mut changed = data.to_vec();
    changed[at] ^= 1 << bit;
    changed
}

/// C51, C52.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_stream_that_is_cut_foreign_or_damaged_is_not_loaded_and_a_reset_recovers() {
    let (source, destination) = (Mdev::sized("v2", 9001), Mdev::sized("v2", 9001));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Group));
    poke(&from, 0, &pattern(9001, 1));
    let data = save(&mut from);
    let middle = data.len() / 2;
    for length in [0, 1, 23, 24, 39, middle, data.len() - 1] {
        assert_invalid(&mut to, &data[..length], &format!("{length} bytes of {}", data.len()));
    }
    // Magic, version, state size, a record's kind, data, and the checksum.
    for at in [0, 8, 16, 24, middle, data.len() - 1] {
        assert_invalid(&mut to, &changed(&data, at, 3), &format!("a bit of byte {at}"));
    }
    let mut mtty = Mdev::mtty(2);
    assert_invalid(&mut to, &save(&mut mtty.open(Way::Group)), "a stream of mtty's");
    mtty = Mdev::sized("v2", 9000);
    assert_invalid(&mut to, &save(&mut mtty.open(Way::Group)), "the state of a device of another size");

    let longer = [&data[..], &[0]].concat();
    assert!(matches!(offer(&mut to, &longer, 1 << 20), Fate::Refused(Errno::ENOSPC)));

    load(&mut to, &data);
    assert_eq!(source.digest(), destination.digest());
    assert_usable(&mut to);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn mtty_takes_no_stream_that_is_cut_too_long_or_foreign() {
    let (source, destination) = (Mdev::mtty(2), Mdev::mtty(2));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Group));
    set_uart(&from, 0, 0x11, "good");
    let data = save(&mut from);
    set_uart(&to, 0, 0x22, "kept");
    for length in [0, 1, 23, 24, 95] {
        assert_invalid(&mut to, &data[..length], &format!("{length} bytes"));
    }
    let longer = [&data[..], &[0]].concat();
    assert!(matches!(offer(&mut to, &longer, 4096), Fate::Refused(Errno::ENOMEM)));
    for at in [0, 8, 12, 16, 20] {
        let fate = offer(&mut to, &changed(&data, at, 0), 4096);
        assert!(matches!(fate, Fate::Refused(Errno::EFAULT)), "byte {at} of the header: {fate:?}");
    }
    let ours = Mdev::sized("v2", 40);
    let foreign = save(&mut ours.open(Way::Group));
    // One that is too long, and one that mtty has room for.
    assert!(matches!(offer(&mut to, &foreign, 4096), Fate::Refused(Errno::ENOMEM)));
    assert!(matches!(offer(&mut to, &foreign[..96], 96), Fate::Refused(Errno::EFAULT)));

    // mtty's reset keeps the registers, so that a write that had reached them would be seen.
    assert_eq!(take_uart(&to, 0), (0x22, "kept".into()));
    load(&mut to, &data);
    assert_eq!(take_uart(&to, 0), (0x11, "good".into()));
}

fn described(device: &VfioDevice) -> Offer {
    Offer {
        devices: vec![DeviceOffer {
            id: device.id().clone(),
            identity: device.identity().clone(),
            capabilities: device.capabilities(),
        }],
        memory: MemoryLayout::default(),
        memory_external: false,
        limits: Limits { receive_budget: 1 << 20, frame_payload: 1 << 16, channels: 1 },
        features: Vec::new(),
        assume_no_peer_dma: false,
    }
}

fn refused_fields(from: &VfioDevice, to: &VfioDevice) -> Vec<String> {
    compare(&described(from), &described(to)).refusals().map(|f| f.field.clone()).collect()
}

/// The kernel would let one port's stream into a device of two: see the next test.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn one_port_and_two_ports_are_found_different_and_refuse_each_other_s_streams() {
    let (one, two, other) = (Mdev::mtty(1), Mdev::mtty(2), Mdev::mtty(2));
    let (mut one, mut two) = (one.open(Way::Group), two.open(Way::Group));
    let differ = refused_fields(&one, &two);
    assert!(differ.iter().any(|f| f.ends_with("mdev-type")), "{differ:?}");
    assert!(differ.iter().any(|f| f.ends_with("region1-size")), "{differ:?}");
    assert_eq!(refused_fields(&two, &other.open(Way::Cdev)), [""; 0], "the same type, the other way");

    let (short, long) = (save(&mut one), save(&mut two));
    assert!(matches!(offer(&mut two, &short, 4096), Fate::Refused(Errno::EFAULT)));
    assert!(matches!(offer(&mut two, &short, 8), Fate::Refused(Errno::EFAULT)));
    assert!(matches!(offer(&mut one, &long, 4096), Fate::Refused(Errno::ENOMEM)));
    assert!(matches!(offer(&mut one, &long, 8), Fate::Refused(Errno::EFAULT)));
    for device in [&mut one, &mut two] {
        assert_usable(device);
    }
}

/// mtty refuses a header with EFAULT and counts it nevertheless: the kernel takes what follows, and loads
/// it. The session must not let that happen.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_write_final_what_mtty_would_load_after_it_refused_the_header_is_not_sent() {
    let (one, two) = (Mdev::mtty(1), Mdev::mtty(2));
    let mut to = two.open(Way::Group);
    let mut from = one.open(Way::Group);
    set_uart(&from, 0, 0xab, "foreign");
    let mut stream = save(&mut from);
    stream.resize(96, 0);
    set_uart(&to, 0, 0x33, "kept");
    let (header, rest) = stream.split_at(24);

    let mut session = loading(to.set_state(DeviceState::Resuming).unwrap());
    let refused = session.write(header).unwrap_err();
    assert_eq!((&refused.kind, refused.errno), (&DeviceErrorKind::Refused, Some(Errno::EFAULT)), "{refused}");
    let again = session.write(rest).unwrap_err();
    assert!(again.message.contains("failed before"), "{again}");
    let stopped = to.set_state(DeviceState::Stop).unwrap_err();
    assert!(stopped.error.message.contains("only a reset leaves RESUMING"), "{stopped}");
    assert_eq!(stopped.reached, Ok(DeviceState::Resuming));
    to.reset().unwrap();
    assert_eq!(take_uart(&to, 0), (0x33, "kept".into()));

    // That it is the session's doing: the kernel takes all of it.
    let file = raw::set_state(to.fd(), DeviceState::Resuming.to_raw()).unwrap().unwrap();
    let mut file = std::fs::File::from(file);
    assert_eq!(file.write(header).unwrap_err().raw_os_error(), Some(Errno::EFAULT.0));
    file.write_all(rest).unwrap();
    raw::set_state(to.fd(), DeviceState::Stop.to_raw()).unwrap();
    to.reset().unwrap();
    assert_eq!(take_uart(&to, 0).0, 0xab, "mtty is not as it was measured");
}

/// What pre-copy adds does not change what a device without it takes.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn capabilities_that_differ_are_no_obstacle_for_the_same_state() {
    let (source, destination) = (Mdev::sized("v2", 9001), Mdev::sized("v2-plain", 9001));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Group));
    assert_ne!(from.capabilities().flags, to.capabilities().flags);
    poke(&from, 0, &pattern(9001, 2));
    load(&mut to, &save(&mut from));
    assert_eq!(source.digest(), destination.digest());
}

//! State that arrives: seen through the devices' own registers and our driver's digest, over the group and
//! over the character device, with pre-copy, in reads of all sizes and with drivers that make it hard.

use crate::support::{
    Mdev, assert_usable, kernel_has_reinit, load, loading, pattern, peek, poke, read, save, save_stopped,
    saving, set_uart, take_uart, wait_for,
};
use airlift_core::{DeviceErrorKind, DeviceState, MigrationDevice, Piece};
use airlift_vfio::{VfioDevice, Way};

const WAYS: [Way; 2] = [Way::Group, Way::Cdev];

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn mtty_s_scratch_registers_and_fifos_arrive_over_group_and_character_device() {
    let (source, destination) = (Mdev::mtty(2), Mdev::mtty(2));
    for (way, seed) in WAYS.into_iter().zip([0x10, 0x60]) {
        let (mut from, mut to) = (source.open(way), destination.open(way));
        set_uart(&from, 0, seed + 1, "HELLO");
        set_uart(&from, 1, seed + 2, "second port");
        set_uart(&to, 0, 0xee, "old");
        set_uart(&to, 1, 0xef, "");
        let data = save(&mut from);
        assert_eq!(data.len(), 96, "{way:?}");
        load(&mut to, &data);
        assert_eq!(take_uart(&to, 0), (seed + 1, "HELLO".into()), "{way:?}");
        assert_eq!(take_uart(&to, 1), (seed + 2, "second port".into()), "{way:?}");
    }
}

/// Sizes around a page, none at all, and one that needs many reads.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn state_of_every_size_arrives_over_group_and_character_device() {
    for (at, size) in [0, 1, 4095, 4096, 64 << 10, 64 << 20].into_iter().enumerate() {
        let (source, destination) = (Mdev::sized("v2", size), Mdev::sized("v2", size));
        let way = WAYS[at % 2];
        let (mut from, mut to) = (source.open(way), destination.open(way));
        if size > 0 {
            // Beginning, middle and end; the rest is zeros.
            let length = size.min(20_000);
            for (offset, seed) in [(0, 1), (size / 2 - length / 2, 2), (size - length, 3)] {
                poke(&from, offset as u64, &pattern(length, seed));
            }
            assert_ne!(source.digest(), destination.digest(), "{size}");
        }
        let data = save(&mut from);
        load(&mut to, &data);
        assert_eq!(source.digest(), destination.digest(), "{size}");
        assert_eq!(source.number("bytes_read"), data.len() as u64, "{size}");
        assert_eq!(destination.number("bytes_written"), data.len() as u64, "{size}");
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn devices_without_pre_copy_or_p2p_are_saved_and_loaded() {
    for kind in ["v2-no-p2p", "v2-no-precopy", "v2-plain"] {
        let (source, destination) = (Mdev::sized(kind, 70_000), Mdev::sized(kind, 70_000));
        let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Cdev));
        poke(&from, 1000, &pattern(50_000, 9));
        assert_ne!(source.digest(), destination.digest(), "{kind}");
        let data = save(&mut from);
        load(&mut to, &data);
        assert_eq!(source.digest(), destination.digest(), "{kind}");
    }
}

/// C40, C43, C45, C53.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_short_and_v2_end_reads_of_every_size_give_the_same_bytes_and_one_end() {
    let (mdev, other) = (Mdev::sized("v2", 9001), Mdev::sized("v2", 9001));
    let mut device = mdev.open(Way::Group);
    poke(&device, 0, &pattern(9001, 5));
    let data = save_stopped(&mut device, 1 << 20);
    // Header, three pages with their records, trailer.
    assert_eq!(data.len(), 24 + 9001 + 3 * 16 + 24);
    for size in [1, 7, 4096, 64 << 10] {
        assert!(save_stopped(&mut device, size) == data, "reads of {size} give other bytes");
    }
    let mut session = saving(device.set_state(DeviceState::StopCopy).unwrap());
    read(session.as_mut(), 4096, &mut Vec::new());
    assert_eq!(session.read(&mut [0; 1]), Ok(Piece::End), "the end stays");
    // What was loaded is given in the same way.
    let mut loaded = other.open(Way::Group);
    load(&mut loaded, &data);
    assert!(save_stopped(&mut loaded, 4096) == data, "after a load other bytes are given");
}

/// C50.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn writes_of_every_size_load_the_same_state() {
    let (source, destination) = (Mdev::sized("v2", 9001), Mdev::sized("v2", 9001));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Group));
    poke(&from, 0, &pattern(9001, 6));
    let data = save(&mut from);
    for size in [1, 7, 4096] {
        to.reset().unwrap();
        let mut session = loading(to.set_state(DeviceState::Resuming).unwrap());
        data.chunks(size).for_each(|piece| session.write(piece).unwrap());
        to.set_state(DeviceState::Running).unwrap();
        assert_eq!(source.digest(), destination.digest(), "writes of {size}");
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_poll_a_driver_that_gives_little_says_again_and_is_interrupted_loses_nothing() {
    let mdev = Mdev::sized("v2", 9001);
    let mut device = mdev.open(Way::Group);
    poke(&device, 0, &pattern(9001, 7));
    let data = save_stopped(&mut device, 4096);
    for (knob, value, size) in [("short_reads", "100", 4096), ("eagain", "3", 50), ("eintr", "2", 50)] {
        let reads = |device: &mut VfioDevice| {
            let before = mdev.number("reads");
            assert!(save_stopped(device, size) == data, "{knob}");
            mdev.number("reads") - before
        };
        let usual = reads(&mut device);
        mdev.set(knob, value);
        // Each of them costs reads: the driver did what the knob says.
        assert!(reads(&mut device) > usual + 50, "{knob}");
    }
    device.set_state(DeviceState::Running).unwrap();
    assert_eq!(save(&mut device).len(), data.len(), "with pre-copy");
}

/// C30 to C32, C36: what pre-copy says of itself, and where it may be asked.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_precopy_info_initial_bytes_fall_to_nothing_and_dirty_bytes_rise_with_writes() {
    let (source, destination) = (Mdev::sized("v2", 64 << 10), Mdev::sized("v2", 64 << 10));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Cdev));
    poke(&from, 0, &pattern(64 << 10, 1));
    let mut session = saving(from.set_state(DeviceState::PreCopy).unwrap());
    let mut left = session.precopy_info().unwrap().unwrap();
    assert!(left.initial_bytes >= 64 << 10, "{left:?}");
    assert_eq!((left.dirty_bytes, left.reinit), (0, false));
    let mut data = Vec::new();
    let mut buf = vec![0; 10_000];
    while left.initial_bytes > 0 {
        let Piece::Data { len, .. } = session.read(&mut buf).unwrap() else {
            panic!("nothing, with {left:?}")
        };
        data.extend_from_slice(&buf[..len]);
        let now = session.precopy_info().unwrap().unwrap();
        assert_eq!(now.initial_bytes, left.initial_bytes - len as u64, "an estimate that ours makes exact");
        left = now;
    }
    assert_eq!(read(session.as_mut(), 4096, &mut data), Piece::Drained);

    // Two pages.
    poke(&from, 4095, &pattern(2, 0xaa));
    let left = session.precopy_info().unwrap().unwrap();
    assert_eq!((left.initial_bytes, left.dirty_bytes), (0, 2 * (4096 + 16)));
    from.set_state(DeviceState::PreCopyP2p).unwrap();
    assert_eq!(session.precopy_info().unwrap(), Some(left), "the P2P state tells it too");

    from.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(session.precopy_info().unwrap_err().kind, DeviceErrorKind::Misuse);
    assert_eq!(read(session.as_mut(), 4096, &mut data), Piece::End);
    load(&mut to, &data);
    assert_eq!(source.digest(), destination.digest());
    assert_eq!(peek::<2>(&to, 4095).as_slice(), pattern(2, 0xaa));
}

/// C33: with ENOMSG as the interface says it, and with 0 as mtty says it.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_enomsg_nothing_now_is_not_the_end_however_the_driver_says_it() {
    for zero in ["0", "1"] {
        let (source, destination) = (Mdev::sized("v2", 8192), Mdev::sized("v2", 8192));
        source.set("precopy_zero", zero);
        let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Group));
        let mut session = saving(from.set_state(DeviceState::PreCopy).unwrap());
        let mut data = Vec::new();
        for round in 0..3 {
            assert_eq!(read(session.as_mut(), 4096, &mut data), Piece::Drained, "round {round}");
            assert_eq!(session.read(&mut [0; 8]), Ok(Piece::Drained), "round {round}, again");
            let before = data.len();
            poke(&from, 4000, &pattern(200, round));
            assert_eq!(read(session.as_mut(), 4096, &mut data), Piece::Drained, "round {round}");
            assert_eq!(data.len() - before, 2 * (4096 + 16), "round {round}: both pages came again");
        }
        from.set_state(DeviceState::StopCopy).unwrap();
        assert_eq!(read(session.as_mut(), 4096, &mut data), Piece::End);
        load(&mut to, &data);
        assert_eq!(source.digest(), destination.digest());
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn state_that_the_device_changes_by_itself_during_pre_copy_arrives() {
    let size = 256 << 10;
    let (source, destination) = (Mdev::sized("v2", size), Mdev::sized("v2", size));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Cdev));
    source.set("dirty_rate", "2000000");
    let mut session = saving(from.set_state(DeviceState::PreCopy).unwrap());
    let mut data = Vec::new();
    let mut buf = vec![0; 64 << 10];
    // Beyond the first pass, what comes is what has changed.
    wait_for("twice the state in pre-copy", || {
        while let Piece::Data { len, .. } = session.read(&mut buf).unwrap() {
            data.extend_from_slice(&buf[..len]);
        }
        data.len() > 2 * size
    });
    let early = source.digest();
    wait_for("a change after the last read", || source.digest() != early);
    from.set_state(DeviceState::StopCopy).unwrap();
    let stopped = source.digest();
    let before = data.len();
    assert_eq!(read(session.as_mut(), 64 << 10, &mut data), Piece::End);
    assert!(data.len() - before > 24, "more than the trailer was left");
    assert_eq!(source.digest(), stopped, "a stopped device does not change");
    load(&mut to, &data);
    assert_eq!(destination.digest(), stopped);
}

/// C38. Kernels without MIG_PRECOPY_INFOv2 give the same data without the flag.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_reinit_new_initial_data_is_announced_once_where_the_kernel_has_it() {
    let size = 32 << 10;
    let (source, destination) = (Mdev::sized("v2", size), Mdev::sized("v2", size));
    let (mut from, mut to) = (source.open(Way::Group), destination.open(Way::Cdev));
    assert_eq!(from.capabilities().reinit, kernel_has_reinit());
    poke(&from, 0, &pattern(size, 3));
    let mut session = saving(from.set_state(DeviceState::PreCopy).unwrap());
    let mut data = Vec::new();
    for generation in 0..2 {
        assert_eq!(read(session.as_mut(), 10_000, &mut data), Piece::Drained);
        // Counts as dirty until the new generation takes it over.
        poke(&from, 100, &[generation; 8]);
        source.set("reinit", "1");
        let told = session.precopy_info().unwrap().unwrap();
        let again = (size + 8 * 16) as u64;
        if kernel_has_reinit() {
            assert!(told.reinit, "{told:?}");
            assert_eq!((told.initial_bytes, told.dirty_bytes), (again, 0));
        } else {
            assert!(!told.reinit, "{told:?}");
            assert_eq!((told.initial_bytes, told.dirty_bytes), (0, again));
        }
        assert!(!session.precopy_info().unwrap().unwrap().reinit, "it was told before");
    }
    from.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(read(session.as_mut(), 10_000, &mut data), Piece::End);
    load(&mut to, &data);
    assert_eq!(source.digest(), destination.digest());
}

/// C44.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn v2_estimate_the_size_of_stop_copy_is_told_in_every_state() {
    let mdev = Mdev::sized("v2", 10_000);
    let mut device = mdev.open(Way::Group);
    let whole = 24 + 10_000 + 3 * 16 + 24;
    assert_eq!(device.stop_copy_size(), Ok(Some(whole)));
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    let mut data = Vec::new();
    read(session.as_mut(), 4096, &mut data);
    assert_eq!(device.stop_copy_size(), Ok(Some(24)), "the trailer is left");
    poke(&device, 0, &[1]);
    assert_eq!(device.stop_copy_size(), Ok(Some(24 + 4096 + 16)));
    device.set_state(DeviceState::StopCopy).unwrap();
    let estimate = device.stop_copy_size().unwrap().unwrap();
    let before = data.len();
    read(session.as_mut(), 4096, &mut data);
    assert_eq!(estimate, (data.len() - before) as u64);
    assert_eq!(Mdev::mtty(2).open(Way::Group).stop_copy_size(), Ok(Some(96)));
}

/// C35, C36.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_migration_that_is_called_off_in_pre_copy_leaves_a_device_that_can_be_saved_again() {
    for mdev in [Mdev::sized("v2", 50_000), Mdev::sized("v2-no-p2p", 50_000), Mdev::mtty(2)] {
        let mut device = mdev.open(Way::Group);
        let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
        session.read(&mut [0; 16]).unwrap();
        device.set_state(DeviceState::Running).unwrap();
        assert_eq!(session.read(&mut [0; 16]).unwrap_err().kind, DeviceErrorKind::Misuse);
        assert_usable(&mut device);
    }
}

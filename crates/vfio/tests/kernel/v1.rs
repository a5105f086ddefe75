//! Devices of interface v1 that work: whole saves and loads over each kind of section, what is told of a
//! device, its reserved bits, and its life.

use crate::support::{Mdev, id, pattern, peek, poke, share};
use crate::v1_support::{
    PIECE, Section, assert_usable, bring, load_chunks, made, raw_state, read_chunks, save_chunks,
    write_raw_state,
};
use airlift_core::v1::bits;
use airlift_core::{DeviceIdentity, DeviceState, Interface, MigrationDevice, Piece};
use airlift_vfio::{Recover, VfioDevice, VfioOptions, Way};
use std::fs;

const SIZE: usize = 300_001;
const USUAL: Section = ("mapped", 0x10000);

// V1-CHUNK, V1-ROUNDS, V1-AREAS
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_is_saved_over_one_section_is_loaded_over_each_other() {
    let sources = [("trapped", 0x10000), ("trapped", 4099), ("mapped", 0x10000), ("sparse", 0x10000)];
    let destinations = [
        ("trapped", 0x10000),
        ("trapped", 0x20000),
        ("trapped", 7919),
        ("mapped", 0x10000),
        ("mapped", 0x4000),
        ("mapped", 0x40000),
        ("sparse", 0x4000),
        ("sparse", 0x20000),
    ];
    for source in sources {
        let from = made(SIZE, source);
        let mut device = from.open(Way::Group);
        poke(&device, 0, &pattern(SIZE, 1));
        let chunks = save_chunks(&mut device, |device| poke(device, 9000, &pattern(5000, 2)));
        let digest = from.digest();
        let (most, bytes) = (source.1, chunks.iter().map(|c| c.len() as u64).sum::<u64>());
        assert!(chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() as u64 <= most));
        assert!(
            chunks.iter().any(|chunk| chunk.len() as u64 == most),
            "{source:?}: the whole section is used"
        );
        assert_eq!(from.number("bytes_read"), bytes, "{source:?}: neither lost nor doubled");
        for destination in destinations {
            let to = made(SIZE, destination);
            let mut device = to.open(Way::Group);
            load_chunks(&mut device, &chunks);
            assert_eq!(to.digest(), digest, "{source:?} to {destination:?}");
            assert_eq!(to.number("bytes_written"), bytes, "{source:?} to {destination:?}");
            assert_eq!(device.state(), Ok(DeviceState::Running));
            assert_eq!(peek::<8>(&device, 9000), pattern(5000, 2)[..8], "its guest sees what was sent");
        }
    }
}

// V1-PENDING: what is pending is read, not computed.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn states_of_any_size_and_chunks_of_any_size_move() {
    for (size, short) in [(0, 0), (1, 0), (0x10000, 0), (100_000, 61), (100_000, 4096)] {
        let (from, to) = (made(size, USUAL), made(size, ("sparse", 0x4000)));
        from.set("short_reads", &short.to_string());
        let mut device = from.open(Way::Cdev);
        poke(&device, 0, &pattern(size, 3));
        let chunks = save_chunks(&mut device, |_| {});
        let digest = from.digest();
        assert!(short == 0 || chunks.iter().all(|chunk| chunk.len() <= short));
        let mut device = to.open(Way::Cdev);
        load_chunks(&mut device, &chunks);
        assert_eq!(to.digest(), digest, "{size} bytes, {short} at a time");
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_state_that_changes_all_the_time_arrives_as_it_was_at_the_stop() {
    let (from, to) = (made(SIZE, USUAL), made(SIZE, ("trapped", 0x10000)));
    let mut device = from.open(Way::Group);
    poke(&device, 0, &pattern(SIZE, 4));
    from.set("dirty_rate", &(1 << 20).to_string());
    let mut chunks = Vec::new();
    let mut session = crate::support::saving(device.set_state(DeviceState::PreCopy).unwrap());
    let mut buf = [0; PIECE];
    // So much that it has changed under the session, whatever is pending then.
    let mut got = 0;
    while got < 2 * SIZE {
        match session.read(&mut buf).unwrap() {
            Piece::Data { len, chunk } => {
                crate::v1_support::keep(&mut chunks, chunk, &buf[..len]);
                got += len;
            }
            Piece::Drained => std::thread::yield_now(),
            Piece::End => panic!("there is no end in PRE_COPY"),
        }
    }
    // A chunk that was begun is read to its end first (V1-OUTSTANDING).
    while device.set_state(DeviceState::StopCopy).is_err() {
        let Piece::Data { len, chunk } = session.read(&mut buf).unwrap() else { panic!("a chunk was begun") };
        crate::v1_support::keep(&mut chunks, chunk, &buf[..len]);
    }
    assert_eq!(read_chunks(session.as_mut(), PIECE, &mut chunks), Piece::End);
    device.set_state(DeviceState::Stop).unwrap();
    let digest = from.digest();
    let mut device = to.open(Way::Group);
    load_chunks(&mut device, &chunks);
    assert_eq!(to.digest(), digest);
}

// V1-RESERVED, V1-BITS
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn the_bits_that_mean_nothing_stay_as_they_are_in_every_state() {
    let mdev = made(5000, USUAL);
    let mut device = mdev.open(Way::Group);
    let chunks = save_chunks(&mut device, |_| {});
    device.reset().unwrap();
    let first = raw_state(&device) & !bits::MASK;
    assert_ne!(first, 0, "the driver has some set, so that a plain write is found out");
    // The device's own, and others that somebody has set.
    for reserved in [first, 0x5aa5_1238] {
        for one in airlift_core::arcs(&device.capabilities()) {
            device.reset().unwrap();
            write_raw_state(&device, reserved | bits::RUNNING);
            let session = bring(&mut device, one.from, &chunks);
            assert_eq!(raw_state(&device), reserved | bits::bits_of(one.from).unwrap(), "{one}");
            device.set_state(one.to).unwrap();
            assert_eq!(raw_state(&device), reserved | bits::bits_of(one.to).unwrap(), "{one}");
            assert_eq!(mdev.number("state"), u64::from(bits::bits_of(one.to).unwrap()), "{one}");
            drop(session);
        }
    }
}

// V1-REGION
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn the_region_is_shown_and_is_no_part_of_who_the_device_is() {
    for (map, areas) in [("trapped", 0), ("mapped", 1), ("sparse", 2)] {
        let mdev = made(5000, (map, 0x8000));
        let device = mdev.open(Way::Group);
        let capabilities = device.capabilities();
        assert_eq!(capabilities.interface, Interface::V1);
        assert_eq!((capabilities.precopy(), capabilities.p2p()), (true, false));
        assert_eq!(capabilities.data_section, Some(0x8000), "{map}");
        let region = device.migration_region().unwrap();
        assert_eq!((region.index, region.data_section), (9, 0x8000), "{map}");
        assert_eq!(region.size, 0x8000 + if map == "trapped" { 32 } else { 4096 }, "{map}");
        assert_eq!((region.mapped.len(), &region.unmapped), (areas, &None), "{map}: {:?}", region.mapped);
        let facts = &device.identity().facts;
        assert_eq!(facts["region-count"], "9", "{facts:?}");
        assert!(!facts.contains_key("region9-size"), "{facts:?}");
        assert_eq!(facts["region0-size"], "5000");
        assert_eq!(facts[&format!("{}mdev-type", DeviceIdentity::HOST)], "airlift-v1");
        assert!(device.config().is_some(), "it is PCI");
    }
    let plain = Mdev::ours("v2");
    assert_eq!(plain.open(Way::Group).migration_region(), None);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_was_left_in_the_middle_is_reset_when_it_is_opened() {
    let mdev = made(5000, USUAL);
    mdev.set("reset_on_close", "0");
    for (left, found) in [
        (DeviceState::Stop, DeviceState::Stop),
        (DeviceState::StopCopy, DeviceState::Stop),
        // The driver makes an error of a load that was not finished.
        (DeviceState::Resuming, DeviceState::Error),
    ] {
        let session = mdev.open(Way::Group).set_state(left).unwrap();
        drop(session);
        let resets = mdev.number("resets");
        let options = VfioOptions { recover: Some(Recover::Leave), ..VfioOptions::default() };
        let mut device = mdev.open_with(Way::Group, options);
        assert_eq!((device.found_state(), device.state()), (found, Ok(found)), "left in {left}");
        assert_eq!(mdev.number("resets"), resets, "left as it is");
        drop(device);
        let mut device = mdev.open(Way::Group);
        assert_eq!(
            (device.found_state(), device.state()),
            (found, Ok(DeviceState::Running)),
            "left in {left}"
        );
        assert_eq!(mdev.number("resets"), resets + 1);
        assert_usable(&mut device);
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_descriptor_that_was_handed_in_is_used_where_it_is() {
    let (from, to) = (made(5000, USUAL), made(5000, USUAL));
    let mut guest = from.open(Way::Group);
    poke(&guest, 0, b"a guest's");
    let digest = from.digest();
    guest.set_state(DeviceState::Stop).unwrap();
    let mut handed = VfioDevice::from_fd(id(), share(&guest), VfioOptions::default()).unwrap();
    assert_eq!(handed.found_state(), DeviceState::Stop);
    assert_eq!((from.digest(), from.number("resets")), (digest.clone(), 0));
    let mut chunks = Vec::new();
    let mut session = crate::support::saving(handed.set_state(DeviceState::StopCopy).unwrap());
    assert_eq!(read_chunks(session.as_mut(), PIECE, &mut chunks), Piece::End);
    drop(session);
    drop(handed);
    assert_eq!(guest.state(), Ok(DeviceState::StopCopy), "the VMM still has it open");

    // In RESUMING it is somebody's load, which is reset only by who asks for it.
    guest.set_state(DeviceState::Running).unwrap();
    let _load = guest.set_state(DeviceState::Resuming).unwrap();
    let handed = VfioDevice::from_fd(id(), share(&guest), VfioOptions::default()).unwrap();
    assert_eq!((handed.found_state(), from.number("resets")), (DeviceState::Resuming, 0));
    drop(handed);
    let options = VfioOptions { recover: Some(Recover::Reset), ..VfioOptions::default() };
    let mut handed = VfioDevice::from_fd(id(), share(&guest), options).unwrap();
    assert_eq!((handed.found_state(), handed.state()), (DeviceState::Resuming, Ok(DeviceState::Running)));
    assert_eq!(from.number("resets"), 1);

    let mut device = to.open(Way::Cdev);
    load_chunks(&mut device, &chunks);
    assert_eq!(to.digest(), digest);
}

/// Open descriptors, threads, and mappings of devices.
fn held() -> (usize, usize, usize) {
    let count = |directory| fs::read_dir(directory).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    // As a group gives them, and as a character device does.
    let of_device = |line: &&str| line.contains("[vfio-device]") || line.contains("/dev/vfio/");
    let of_devices = maps.lines().filter(of_device).count();
    (count("/proc/self/fd"), count("/proc/self/task"), of_devices)
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn two_hundred_times_opened_saved_and_closed_leave_nothing_behind() {
    let mdev = made(100, ("sparse", 0x4000));
    let cycle = |at: u64| {
        let mut device = mdev.open([Way::Group, Way::Cdev][usize::from(at % 2 == 1)]);
        let chunks = save_chunks(&mut device, |_| {});
        assert_eq!(held().2, 2, "both areas are mapped");
        // Closed in different states, with the session that there was gone or not.
        match at % 3 {
            0 => {}
            1 => drop(device.set_state(DeviceState::StopCopy).unwrap()),
            _ => load_chunks(&mut device, &chunks),
        }
    };
    (0..20).for_each(cycle);
    let before = held();
    assert_eq!(before.2, 0);
    (20..200).for_each(cycle);
    assert_eq!(held(), before);
    assert_eq!(mdev.number("opens"), 200);
}

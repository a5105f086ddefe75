//! A device of interface v1 as the engine drives it, over our own server; and the client's region where
//! mapping fails.

use crate::common::*;
use crate::v1_user::REGION;
use airlift_core::region::{read_data, write_data};
use airlift_core::v1::{DATA_OFFSET, PENDING_BYTES};
use airlift_core::{
    Chunk, DeviceErrorKind, DeviceState, Interface, MigrationDevice, Piece, RegionAccess, Session,
};
use airlift_vfio_user::{ClientOptions, V1Mapping, V1Section, VfioUserDevice, VfioUserRegion};
use std::os::fd::OwnedFd;

use DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy};

fn section(size: u64, mapping: V1Mapping) -> V1Section {
    V1Section { size, mapping, whole_transactions: false }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i * 11 % 251).unwrap()).collect()
}

/// The chunks of a device that is saved from RUNNING, and left in STOP.
fn saved(device: &mut VfioUserDevice) -> Vec<Vec<u8>> {
    let Some(Session::Save(mut save)) = device.set_state(PreCopy).unwrap() else { panic!("no session") };
    let (mut chunks, mut buf) = (Vec::<Vec<u8>>::new(), vec![0; 1000]);
    let mut stopped = false;
    loop {
        match save.read(&mut buf).unwrap() {
            Piece::Data { len, chunk: Chunk::Part { offset, .. } } => {
                if offset == 0 {
                    chunks.push(Vec::new());
                }
                chunks.last_mut().unwrap().extend(&buf[..len]);
            }
            Piece::Drained if !stopped => {
                assert!(device.set_state(StopCopy).unwrap().is_none(), "the session goes on");
                stopped = true;
            }
            Piece::End => break,
            other => panic!("{other:?}"),
        }
    }
    device.set_state(Stop).unwrap();
    chunks
}

// V1-CHUNK, V1-AREAS, V1-ROUNDS
#[test]
fn a_device_moves_over_every_mapping_and_its_transactions_stay_what_they_are() {
    let sparse = || V1Mapping::Sparse(vec![(12_288, 4096), (4096, 4096)]);
    for (mapping, size) in [
        (V1Mapping::Trapped, 10_007),
        (V1Mapping::Mapped, 16_384),
        (V1Mapping::Mapped, 10_007),
        (sparse(), 20_000),
    ] {
        let from = serve_v1(section(size, mapping.clone()));
        let (precopy, stop_copy) = (pattern(50_000), pattern(33_333));
        from.control.with(|s| {
            s.precopy = precopy.clone().into();
            s.stop_copy = stop_copy.clone().into();
        });
        let mut source = from.device();
        assert_eq!(source.capabilities().interface, Interface::V1);
        let chunks = saved(&mut source);
        assert_eq!(chunks.concat(), [precopy, stop_copy].concat());
        let lengths: Vec<usize> = chunks.iter().map(Vec::len).collect();
        assert_eq!(lengths, from.control.with(|s| s.reads.clone()), "a chunk is what one read gave");

        // A section of the same size, and a smaller one.
        for there in [size, 8191] {
            let fits = there == size;
            let kind = if fits { mapping.clone() } else { V1Mapping::Mapped };
            let to = serve_v1(section(there, kind));
            let mut destination = to.device();
            let Some(Session::Load(mut load)) = destination.set_state(Resuming).unwrap() else {
                panic!("no session")
            };
            for chunk in &chunks {
                load.begin_chunk(chunk.len() as u64).unwrap();
                chunk.chunks(3000).for_each(|part| load.write(part).unwrap());
                load.end_chunk().unwrap();
            }
            destination.set_state(Stop).unwrap();
            assert_eq!(to.control.with(|s| s.loaded.clone()), chunks.concat());
            let writes = to.control.with(|s| s.writes.clone());
            if fits {
                assert_eq!(writes, lengths);
            } else {
                assert!(writes.iter().all(|length| *length <= 8191), "{writes:?}");
            }
        }
    }
}

// V1-REGION
#[test]
fn the_region_is_shown_and_is_no_part_of_who_the_device_is() {
    let served = serve_v1(section(8192, V1Mapping::Mapped));
    let device = served.device();
    let region = device.migration_region().unwrap();
    assert_eq!((region.index, region.size, region.data_section), (REGION, 4096 + 8192, 8192));
    assert_eq!((region.mapped.len(), &region.unmapped), (1, &None));
    let facts = &device.identity().facts;
    assert_eq!(facts["region-count"], "9", "{facts:?}");
    assert!(!facts.contains_key(&format!("region{REGION}-size")), "{facts:?}");
}

// V1-MMAP
#[test]
fn what_cannot_be_mapped_is_read_and_written() {
    let pipe = || rustix::pipe::pipe().unwrap().0;
    let short = || OwnedFd::from(tempfile::tempfile().unwrap());
    let fds: [fn() -> OwnedFd; 2] = [pipe, short];
    for fd in fds {
        let served = serve_v1(section(8192, V1Mapping::Mapped));
        let client = served.client();
        let mut details = client.region_info(REGION).unwrap();
        details.fd = Some(fd());
        let mut region = VfioUserRegion::new(client.clone(), REGION, details, true).unwrap();
        assert!(region.mapped().is_empty());
        assert!(region.unmapped().is_some(), "and it is said why");
        // The fields and the data are there all the same.
        region.write_trapped(0, &4_u32.to_ne_bytes()).unwrap();
        let mut offset = [0; 8];
        region.read_trapped(DATA_OFFSET, &mut offset).unwrap();
        assert_eq!(u64::from_ne_bytes(offset), 4096);
        write_data(&mut region, 4096, &pattern(8192)).unwrap();
        region.write_trapped(24, &8192_u64.to_ne_bytes()).unwrap();
        assert_eq!(served.control.with(|s| s.loaded.clone()), pattern(8192));
        let outside = read_data(&mut region, 4096, &mut [0; 8193]).unwrap_err();
        assert_eq!(outside.kind, DeviceErrorKind::Misuse);
        assert!(region.read_trapped(PENDING_BYTES, &mut [0; 4]).is_err(), "the device refuses half a field");
        assert_eq!(client.region_info(REGION).unwrap().size, 4096 + 8192, "the connection is good");
    }
}

// VU-STALE, V1-RESET
#[test]
fn what_an_unfinished_migration_has_left_is_found_and_cleared_away_where_that_was_asked_for() {
    let served = serve_v1(section(4096, V1Mapping::Trapped));
    let mut first = served.device();
    drop(first.set_state(Resuming).unwrap());
    drop(first);
    served.control.until("the end of the client", |s| s.log.iter().any(|l| l.starts_with("detach")));
    let mut next = served.device();
    assert_eq!((next.found_state(), next.state()), (DeviceState::Error, Ok(DeviceState::Error)));
    drop(next);
    let recovering = ClientOptions { recover_stale: true, ..options() };
    let mut last = VfioUserDevice::connect(id(), &served.path, recovering).unwrap();
    assert_eq!((last.found_state(), last.state()), (Running, Ok(Running)));
}

//! The user's side of interface v1 against devices that do what devices do in practice: each line of what
//! goes wrong there is a test, here or, where something fails, in `v1_user_faults`. Beside the important ones
//! stands a naive user that loses bytes on the same device, so that the test is known to notice.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod v1_common;

use airlift_core::region::{read_data, read_u32, read_u64, write_u32};
use airlift_core::v1::{DATA_OFFSET, DATA_SIZE, DEVICE_STATE, PENDING_BYTES, V1Device};
use airlift_core::{
    Chunk, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Errno, MigrationDevice,
    Piece, RegionAccess, RegionArea, SaveSession,
};
use airlift_testkit::v1::{
    Access, Double, DoubleOptions, DoubleRegion, Failed, Fault, Layout, PAGE, Plan, Wrong, bytes, load, save,
};
use v1_common::*;

/// A user without any care: reads `pending_bytes` once in STOP_COPY, takes it as the truth, and counts it
/// down.
fn naive_by_count(region: &mut DoubleRegion) -> Vec<u8> {
    let raw = read_u32(region, DEVICE_STATE).unwrap();
    write_u32(region, DEVICE_STATE, raw & !7 | STOP_COPY).unwrap();
    let mut left = read_u64(region, PENDING_BYTES).unwrap();
    let mut data = Vec::new();
    while left > 0 {
        let offset = read_u64(region, DATA_OFFSET).unwrap();
        let size = read_u64(region, DATA_SIZE).unwrap();
        let mut chunk = vec![0; usize::try_from(size).unwrap()];
        read_data(region, offset, &mut chunk).unwrap();
        data.extend(chunk);
        left = left.saturating_sub(size);
        if left > 0 {
            read_u64(region, PENDING_BYTES).unwrap();
        }
    }
    data
}

// reading data_offset twice and expecting a new buffer: V1-STABLE
#[test]
fn data_offset_is_read_once_for_each_buffer() {
    let plan = Plan::new(chunks(3), 2);
    let device = double(plan.clone());
    for (precopy, buffer) in [(true, 7), (false, 1000)] {
        let before = device.count(Access::ReadOffset);
        assert_eq!(save(&mut user(&device), precopy, buffer).unwrap(), plan.chunks);
        assert_eq!(device.count(Access::ReadOffset) - before, plan.chunks.len());
        user(&device).set_state(DeviceState::Running).unwrap();
    }
    assert_clean(&device);

    // Who takes each answer for a new buffer has the first one twice.
    let device = double(plan.clone());
    let mut region = device.region();
    let raw = read_u32(&mut region, DEVICE_STATE).unwrap();
    write_u32(&mut region, DEVICE_STATE, raw & !7 | STOP_COPY).unwrap();
    assert!(read_u64(&mut region, PENDING_BYTES).unwrap() > 0);
    let mut buffer = |_| {
        let offset = read_u64(&mut region, DATA_OFFSET).unwrap();
        (offset, read_u64(&mut region, DATA_SIZE).unwrap())
    };
    assert_eq!(buffer(1), buffer(2));
}

// not reading pending_bytes after the last chunk: V1-PENDING
#[test]
fn pending_bytes_is_read_after_the_last_chunk_too() {
    // The last two come only when the device hears that the ones before were taken.
    let plan = Plan { late: 2, ..Plan::new(chunks(4), 0) };
    let device = double(plan.clone());
    assert_eq!(naive_by_count(&mut device.region()), plan.chunks[..3].concat());

    let device = double(plan.clone());
    assert_eq!(save(&mut user(&device), true, 100).unwrap(), plan.chunks);
    assert_clean(&device);
}

// pending_bytes taken as exact: V1-PENDING
#[test]
fn pending_bytes_is_never_taken_as_exact() {
    for pending in [vec![1], vec![100, 3, 1 << 40, 2], vec![u64::MAX], vec![64, 1]] {
        let plan = Plan { pending: pending.clone(), ..Plan::new(chunks(3), 2) };
        for precopy in [false, true] {
            let device = double(plan.clone());
            assert_eq!(save(&mut user(&device), precopy, 11).unwrap(), plan.chunks, "{pending:?}");
            assert_clean(&device);
        }
    }
    let device = double(Plan { pending: vec![64, 1], ..Plan::new(chunks(3), 0) });
    assert_eq!(naive_by_count(&mut device.region()).len(), 64, "the naive user loses two chunks");
}

// A device that says 0 for the moment has nothing for the moment: only in STOP_COPY that is the end.
#[test]
fn zero_pending_in_pre_copy_is_a_pause_and_not_the_end() {
    let plan = Plan::new(chunks(3), 2);
    let device = double(plan.clone());
    let mut user = user(&device);
    device.fail(Fault::next(Access::ReadPending, Wrong::Answers(0)));
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    assert_eq!(session.read(&mut [0; 9]).unwrap(), Piece::Drained);
    assert_eq!(read_chunk(&mut *session), plan.chunks[0]);
    // The last answer before the stop is no answer after it.
    device.fail(Fault::next(Access::ReadPending, Wrong::Answers(0)));
    assert_eq!(session.precopy_info().unwrap().unwrap().dirty_bytes, 0);
    user.set_state(DeviceState::StopCopy).unwrap();
    for chunk in &plan.chunks[1..] {
        assert_eq!(read_chunk(&mut *session), *chunk);
    }
    assert_eq!(session.read(&mut [0; 9]).unwrap(), Piece::End);
    assert_eq!(session.read(&mut [0; 9]).unwrap(), Piece::End, "it stays so");
    assert_clean(&device);
}

// An end that comes too early cannot be seen at the source. The destination must not run with it.
#[test]
fn an_end_that_comes_too_early_is_not_taken_by_the_destination() {
    let plan = Plan::new(chunks(3), 0);
    let device = double(plan.clone());
    device.fail(Fault::next(Access::ReadPending, Wrong::Answers(0)).after(2));
    let saved = save(&mut user(&device), false, 100).unwrap();
    assert_eq!(saved, plan.chunks[..2]);
    let there = Double::new(DoubleOptions::new(Layout::Trapped, SECTION).expecting(plan.data()));
    let Failed::Transition(error) = load(&mut user(&there), &saved, 100).unwrap_err() else { panic!() };
    assert_eq!((errno(&error), error.reached), (Some(Errno::EIO), Ok(DeviceState::Error)));
    assert_eq!(there.loaded(), None);
}

// a chunk larger than the destination's section: V1-ROUNDS, V1-CHUNK
#[test]
fn a_chunk_larger_than_the_section_is_written_in_rounds_as_large_as_the_section() {
    let data = vec![bytes(1, 200), bytes(2, 64), bytes(3, 1)];
    for piece in [1, 63, 64, 65, 1000] {
        let there = Double::new(DoubleOptions::new(Layout::Trapped, SECTION).expecting(data.concat()));
        load(&mut user(&there), &data, piece).unwrap();
        let rounds: Vec<_> = there.received().iter().map(Vec::len).collect();
        assert_eq!(rounds, [64, 64, 64, 8, 64, 1], "written {piece} bytes at a time");
        assert_eq!((there.loaded(), there.state()), (Some(data.concat()), DeviceState::Running));
        assert_clean(&there);
    }
}

// V1-WHOLE
#[test]
fn a_chunk_larger_than_the_section_is_refused_for_a_device_that_takes_it_only_whole() {
    let options = DoubleOptions { whole: true, ..DoubleOptions::new(Layout::Trapped, SECTION) };
    let there = Double::new(options);
    let Failed::Device(error) = load(&mut user(&there), &[bytes(1, 65)], 65).unwrap_err() else { panic!() };
    assert_eq!(error.kind, DeviceErrorKind::Unsupported);
    assert_eq!((there.received(), there.count(Access::WriteTrapped)), (vec![], 0));
    assert_clean(&there);
}

/// What is moved over a section of five pages and a bit, through chunks that begin and end inside pages.
fn crosses(layout: Layout) {
    let section = 5 * PAGE + 700;
    let chunks: Vec<_> = [20_000, 1, 5000, 21_180].into_iter().map(|len| bytes(7, len)).collect();
    let plan = Plan { places: vec![0, 4095, 4000, 0, 12_288], ..Plan::new(chunks, 2) };
    let here = Double::new(DoubleOptions::new(layout, section).with(plan.clone()));
    let places = vec![4095, 0, 8192, 3];
    let options = DoubleOptions::new(layout, section).expecting(plan.data());
    let there = Double::new(options.with(Plan { places, ..Plan::default() }));
    let saved = save(&mut user(&here), true, 3333).unwrap();
    assert_eq!(saved, plan.chunks, "{layout:?}");
    load(&mut user(&there), &saved, 2777).unwrap();
    assert_eq!(there.loaded(), Some(plan.data()), "{layout:?}");

    // Each byte went the way that its place has (V1-AREAS).
    assert_eq!((here.misplaced(), there.misplaced()), (0, 0), "{layout:?}");
    let ways = |device: &Double, way| device.count(way) > 0;
    let (some_mapped, some_trapped) = (layout != Layout::Trapped, layout != Layout::Mapped);
    assert_eq!(ways(&here, Access::ReadMapped), some_mapped);
    assert_eq!(ways(&there, Access::WriteMapped), some_mapped);
    assert!(ways(&here, Access::ReadTrapped) || !some_trapped);
    assert!(ways(&there, Access::WriteTrapped) || !some_trapped);
    assert_clean(&here);
    assert_clean(&there);
}

// a chunk that crosses mapped and trapped parts: V1-AREAS
#[test]
fn a_chunk_that_crosses_mapped_and_trapped_parts_is_whole() {
    for layout in [Layout::Trapped, Layout::Mapped, Layout::First, Layout::Rest, Layout::Alternate] {
        crosses(layout);
    }
}

// areas not sorted: V1-AREAS
#[test]
fn areas_are_used_in_any_order() {
    let (_, areas) = Layout::Unsorted.areas(5 * PAGE + 700);
    assert!(areas.len() > 2 && areas.windows(2).all(|pair| pair[0].offset > pair[1].offset));
    crosses(Layout::Unsorted);
}

// a state write while a chunk is outstanding: V1-OUTSTANDING
#[test]
fn the_state_is_not_written_while_a_chunk_is_outstanding() {
    let plan = Plan::new(chunks(3), 2);
    let device = double(plan.clone());
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    let mut buf = [0; 10];
    session.read(&mut buf).unwrap();
    let writes = device.count(Access::WriteState);
    let error = user.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!(error.error.kind, DeviceErrorKind::Misuse);
    assert_eq!((error.reached, device.state()), (Ok(DeviceState::PreCopy), DeviceState::PreCopy));
    assert_eq!(device.count(Access::WriteState), writes, "the device has not seen it");

    // The chunk is read to its end, and then the state changes and nothing is lost.
    assert_eq!([&buf[..], &read_rest(&mut *session)].concat(), plan.chunks[0]);
    user.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(read_chunk(&mut *session), plan.chunks[1]);
    assert_clean(&device);

    // Who gives up may go at any time.
    session.read(&mut buf).unwrap();
    user.set_state(DeviceState::Running).unwrap();
    assert_eq!(session.read(&mut buf).unwrap_err().kind, DeviceErrorKind::Misuse);
    assert_eq!(save(&mut user, true, 100).unwrap(), plan.chunks, "from its beginning");
    assert_clean(&device);

    // A user that writes it all the same is found out.
    let device = double(plan);
    let mut region = device.region();
    let raw = read_u32(&mut region, DEVICE_STATE).unwrap();
    write_u32(&mut region, DEVICE_STATE, raw & !7 | PRE_COPY).unwrap();
    for field in [PENDING_BYTES, DATA_OFFSET, DATA_SIZE] {
        read_u64(&mut region, field).unwrap();
    }
    write_u32(&mut region, DEVICE_STATE, raw & !7 | STOP_COPY).unwrap();
    assert!(device.violations()[0].contains("V1-OUTSTANDING"));
}

fn read_rest(session: &mut dyn SaveSession) -> Vec<u8> {
    let mut rest = Vec::new();
    loop {
        let mut buf = [0; 13];
        let Piece::Data { len, chunk: Chunk::Part { of, offset } } = session.read(&mut buf).unwrap() else {
            panic!("the chunk has no end")
        };
        rest.extend(&buf[..len]);
        if offset + len as u64 == of {
            return rest;
        }
    }
}

// V1-OUTSTANDING, V1-LOOP-ERROR
#[test]
fn resuming_is_not_left_in_the_middle_of_a_chunk() {
    let there = double(Plan::default());
    let mut user = user(&there);
    let mut session = enter_load(&mut user);
    session.begin_chunk(100).unwrap();
    session.write(&[1; 80]).unwrap();
    for target in [DeviceState::Running, DeviceState::Stop] {
        let error = user.set_state(target).unwrap_err();
        assert_eq!(error.error.kind, DeviceErrorKind::Misuse);
        assert_eq!((error.reached, there.state()), (Ok(DeviceState::Resuming), DeviceState::Resuming));
    }
    session.write(&[1; 20]).unwrap();
    session.end_chunk().unwrap();
    user.set_state(DeviceState::Running).unwrap();
    assert_eq!(there.loaded(), Some(vec![1; 100]));
    assert_clean(&there);
}

// a data_size of 0 with bytes pending: V1-HOLLOW
#[test]
fn bytes_that_are_pending_and_never_come_end_the_round_and_not_the_loop() {
    let plan = Plan { hollow: vec![0, u32::MAX], ..Plan::new(chunks(3), 2) };
    let device = double(plan.clone());
    let mut user = user(&device);
    let mut session = enter_save(&mut user, DeviceState::PreCopy);
    assert_eq!(read_chunk(&mut *session), plan.chunks[0]);
    for _ in 0..100 {
        let before = device.accesses();
        assert_eq!(session.read(&mut [0; 9]).unwrap(), Piece::Drained);
        assert!(device.accesses() - before <= 4, "a pause, at once");
    }
    user.set_state(DeviceState::StopCopy).unwrap();
    let before = device.accesses();
    let error = session.read(&mut [0; 9]).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Protocol);
    let made = device.accesses() - before;
    assert!((16..=16 * 4 + 1).contains(&made), "{made} accesses");
    assert_eq!(session.read(&mut [0; 9]).unwrap_err(), error, "and no access more");
    assert_eq!(device.accesses() - before, made);
    user.set_state(DeviceState::Running).unwrap();
    assert_clean(&device);
}

// V1-HOLLOW: what comes late, and comes, is not given up.
#[test]
fn bytes_that_come_after_some_empty_rounds_are_read() {
    let plan = Plan { hollow: vec![3, 15, 0, 1], ..Plan::new(chunks(3), 0) };
    let device = double(plan.clone());
    assert_eq!(save(&mut user(&device), true, 100).unwrap(), plan.chunks);
    assert_clean(&device);
}

// reserved bits lost by a plain write: V1-RESERVED
#[test]
fn reserved_bits_are_never_lost() {
    for reserved in [0xa117_0050, 0xffff_fff8, 0x8] {
        let options = DoubleOptions { reserved, ..DoubleOptions::new(Layout::Trapped, SECTION) };
        let device = Double::new(options.with(Plan::new(chunks(1), 1)));
        let mut user = user(&device);
        save(&mut user, true, 100).unwrap();
        user.set_state(DeviceState::Running).unwrap();
        load(&mut user, &chunks(1), 100).unwrap();
        assert_eq!(device.raw(), reserved | RUNNING);
        assert_clean(&device);
    }
    let device = double(Plan::default());
    write_u32(&mut device.region(), DEVICE_STATE, STOP_COPY).unwrap_err();
    assert!(device.violations()[0].contains("V1-RESERVED"), "a plain write is found out");
}

// a 4-byte read of an 8-byte field: V1-FIELDS
#[test]
fn fields_are_accessed_at_their_own_width() {
    let device = double(Plan::new(chunks(2), 1));
    let mut user = user(&device);
    save(&mut user, true, 100).unwrap();
    user.set_state(DeviceState::Running).unwrap();
    load(&mut user, &chunks(2), 100).unwrap();
    let fields: Vec<_> = device.records().into_iter().filter(|record| record.offset < 32).collect();
    assert!(fields.len() > 20);
    for field in fields {
        assert_eq!(field.length, if field.offset == 0 { 4 } else { 8 });
    }
    assert_clean(&device);

    for (offset, length) in [(8, 4), (12, 4), (16, 4), (24, 1), (0, 8), (20, 8), (28, 8)] {
        let device = double(Plan::default());
        let error = device.region().read_trapped(offset, &mut vec![0; length]).unwrap_err();
        assert_eq!(error.errno, Some(Errno::EINVAL));
        assert!(device.violations()[0].contains("V1-FIELDS"), "{length} bytes at {offset}");
    }
}

/// A chunk that is not in the section is not read, and a round that is not in it not written.
fn refused_place(field: Access, value: u64) {
    let device = double(Plan::new(chunks(2), 1));
    let mut source = user(&device);
    let mut session = enter_save(&mut source, DeviceState::StopCopy);
    read_chunk(&mut *session);
    device.fail(Fault::next(field, Wrong::Answers(value)));
    let copied = device.count(Access::ReadTrapped);
    let error = session.read(&mut [0; 1000]).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Protocol, "{value:#x}");
    assert_eq!(device.count(Access::ReadTrapped), copied);
    source.set_state(DeviceState::Running).unwrap();
    assert_clean(&device);
    if field == Access::ReadOffset {
        let there = double(Plan::default());
        there.fail(Fault::next(field, Wrong::Answers(value)));
        load(&mut user(&there), &[bytes(1, 64)], 64).unwrap_err();
        assert_eq!(there.count(Access::WriteTrapped), 0);
        assert_clean(&there);
    }
}

// data_offset below the struct's end: V1-BOUNDS
#[test]
fn a_data_offset_in_the_fields_is_refused() {
    for offset in [0, 8, 24, 31] {
        refused_place(Access::ReadOffset, offset);
    }
}

// data_offset + data_size beyond the region, also by wrap-around: V1-BOUNDS
#[test]
fn a_chunk_beyond_the_region_is_refused_also_by_wrap_around() {
    for offset in [32 + SECTION, 1 << 32, u64::MAX - 7, u64::MAX] {
        refused_place(Access::ReadOffset, offset);
    }
    for size in [SECTION + 1, u64::MAX, u64::MAX - 31, u64::MAX - 32] {
        refused_place(Access::ReadSize, size);
    }
}

// A data_offset that moves between the buffers, or inside of the section: each chunk is where it is said.
#[test]
fn a_chunk_may_be_anywhere_in_the_section() {
    let chunks: Vec<_> = (1..40).map(|len| bytes(len as u64, len)).collect();
    let plan = Plan { places: vec![63, 0, 17, 31], ..Plan::new(chunks, 9) };
    let device = double(plan.clone());
    let saved = save(&mut user(&device), true, 5).unwrap();
    assert_eq!(saved, plan.chunks);
    let there = double(Plan { places: vec![63, 50, 0], ..Plan::default() });
    load(&mut user(&there), &saved, 5).unwrap();
    assert_eq!(there.loaded(), Some(plan.data()));
    assert_clean(&device);
    assert_clean(&there);
}

/// A region of which nothing could be mapped here.
#[derive(Debug)]
struct Unmapped(DoubleRegion);

impl RegionAccess for Unmapped {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn mapped(&self) -> &[RegionArea] {
        &[]
    }
    fn is_mappable(&self) -> bool {
        self.0.is_mappable()
    }
    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_trapped(offset, buf)
    }
    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.0.write_trapped(offset, data)
    }
    fn read_mapped(&mut self, _: u64, _: &mut [u8]) -> Result<(), DeviceError> {
        unreachable!("nothing is mapped")
    }
    fn write_mapped(&mut self, _: u64, _: &[u8]) -> Result<(), DeviceError> {
        unreachable!("nothing is mapped")
    }
}

// V1-MMAP, V1-WHOLE
#[test]
fn a_mapping_that_fails_changes_nothing_of_what_the_device_is() {
    let plan = Plan::new(chunks(3), 1);
    for layout in Layout::ALL {
        let device = Double::new(DoubleOptions::new(layout, 3 * PAGE).with(plan.clone()));
        let mapped = device.device("nic").unwrap();
        let id = DeviceId::new("nic").unwrap();
        let mut unmapped =
            V1Device::new(id, DeviceIdentity::default(), Unmapped(device.region()), device.control())
                .unwrap();
        assert_eq!(unmapped.capabilities(), mapped.capabilities(), "{layout:?}");
        assert_eq!(save(&mut unmapped, true, 1000).unwrap(), plan.chunks, "{layout:?}");
    }
}

//! The user's side of interface v1 against devices that do what devices do in practice: each line of what
//! goes wrong there is a test. Beside the important ones stands a naive user that loses bytes on the same
//! device, so that the test is known to notice.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift_core::region::{read_data, read_u32, read_u64, write_u32};
use airlift_core::v1::{DATA_OFFSET, DATA_SIZE, DEVICE_STATE, PENDING_BYTES, V1Device};
use airlift_core::{
    Chunk, DeviceErrorKind, DeviceState, Errno, LoadSession, MigrationDevice, Piece, RegionAccess,
    SaveSession, Session, TransitionError,
};
use airlift_testkit::v1::{
    Access, Double, DoubleOptions, DoubleRegion, Failed, Fault, Layout, PAGE, Plan, Wrong, bytes, cut, load,
    save,
};

const SECTION: u64 = 64;
const EIO: Wrong = Wrong::Refused(Errno::EIO);
const RUNNING: u32 = 1;
const STOP_COPY: u32 = 2;
const PRE_COPY: u32 = 3;
const RESUMING: u32 = 4;
const ERROR: u32 = 6;

type User = V1Device<DoubleRegion>;

fn double(plan: Plan) -> Double {
    Double::new(DoubleOptions::new(Layout::Trapped, SECTION).with(plan))
}

/// `count` transactions as large as the section, and one of 5 bytes.
fn chunks(count: usize) -> Vec<Vec<u8>> {
    cut(&bytes(1, count * 64 + 5), 64)
}

fn user(double: &Double) -> User {
    double.device("d0").unwrap()
}

fn enter_save(user: &mut User, state: DeviceState) -> Box<dyn SaveSession> {
    let Some(Session::Save(session)) = user.set_state(state).unwrap() else { panic!("no save session") };
    session
}

fn enter_load(user: &mut User) -> Box<dyn LoadSession> {
    let opened = user.set_state(DeviceState::Resuming).unwrap();
    let Some(Session::Load(session)) = opened else { panic!("no load session") };
    session
}

fn assert_clean(double: &Double) {
    assert_eq!(double.violations(), Vec::<String>::new());
}

/// Reads a whole transaction.
fn read_chunk(session: &mut dyn SaveSession) -> Vec<u8> {
    let mut buf = [0; 1000];
    match session.read(&mut buf).unwrap() {
        Piece::Data { len, chunk: Chunk::Part { of, offset: 0 } } if of == len as u64 => buf[..len].to_vec(),
        other => panic!("{other:?}"),
    }
}

fn errno(error: &TransitionError) -> Option<Errno> {
    error.error.errno
}

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

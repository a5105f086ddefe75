//! Migration data: pre-copy and stop-copy as one stream, loading, and errors within.

use crate::common::*;
use airlift_core::{
    Chunk, DeviceErrorKind, DeviceState, Errno, LoadSession, MigrationDevice, Piece, SaveSession, Session,
};
use airlift_vfio_user::{ClientOptions, ServerOptions, VfioUserDevice};

use DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy};

fn pattern(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|i| u8::try_from(i * 7 % 253).unwrap()).collect()
}

fn saving(device: &mut VfioUserDevice, state: DeviceState) -> Box<dyn SaveSession> {
    match device.set_state(state).unwrap() {
        Some(Session::Save(save)) => save,
        other => panic!("{other:?}"),
    }
}

fn loading(device: &mut VfioUserDevice) -> Box<dyn LoadSession> {
    match device.set_state(Resuming).unwrap() {
        Some(Session::Load(load)) => load,
        other => panic!("{other:?}"),
    }
}

/// Reads until the session has nothing more, or nothing more now.
fn read_all(save: &mut dyn SaveSession, buffer: usize) -> (Vec<u8>, Piece) {
    let mut all = Vec::new();
    let mut buf = vec![0; buffer];
    loop {
        match save.read(&mut buf).unwrap() {
            Piece::Data { len, chunk } => {
                assert!(len > 0 && chunk == Chunk::Stream);
                all.extend(&buf[..len]);
            }
            end => return (all, end),
        }
    }
}

// V2-REINIT, V2-END, V2-AFTER-END, V2-OPAQUE, V2-PRECOPY-INFO
#[test]
fn precopy_and_stop_copy_are_one_stream() {
    for read_limit in [None, Some(100)] {
        let served = serve();
        served.control.with(|s| {
            s.precopy = pattern(0..10_000).into();
            s.stop_copy = pattern(20_000..120_000).into();
            s.read_limit = read_limit;
        });
        let mut device = served.device();
        assert_eq!(device.stop_copy_size(), Ok(None), "there is none while the device runs");
        let mut save = saving(&mut device, PreCopy);
        assert_eq!(save.precopy_info().unwrap().unwrap().initial_bytes, 10_000);
        assert_eq!(device.stop_copy_size(), Ok(Some(110_000)));
        let (data, end) = read_all(&mut *save, 4096);
        assert_eq!((data, end), (pattern(0..10_000), Piece::Drained));
        assert_eq!(save.precopy_info().unwrap().unwrap().initial_bytes, 0);
        // Drained is not the end: more comes.
        served.control.with(|s| {
            s.precopy = pattern(10_000..14_096).into();
            s.reinit = true;
        });
        assert!(save.precopy_info().unwrap().unwrap().reinit);
        assert_eq!(read_all(&mut *save, 4096), (pattern(10_000..14_096), Piece::Drained));
        served.control.with(|s| s.precopy = pattern(14_096..20_000).into());

        assert!(device.set_state(StopCopy).unwrap().is_none(), "the session goes on");
        let (data, end) = read_all(&mut *save, 3000);
        assert_eq!((data, end), (pattern(14_096..120_000), Piece::End));
        assert_eq!(save.read(&mut [0; 10]), Ok(Piece::End));
        assert!(save.precopy_info().is_err());

        device.set_state(Stop).unwrap();
        let error = save.read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::Misuse);
    }
}

// VU-SHORT-READ, V2-ENOMSG
#[test]
fn a_short_read_in_precopy_is_drained_after_its_data() {
    let served = serve();
    served.control.with(|s| s.precopy = pattern(0..100).into());
    let mut device = served.device();
    let mut save = saving(&mut device, PreCopy);
    let mut buf = [0; 4096];
    assert_eq!(save.read(&mut buf), Ok(Piece::Data { len: 100, chunk: Chunk::Stream }));
    // Data that comes now is not asked for before the engine has heard of the pause.
    served.control.with(|s| s.precopy = pattern(0..50).into());
    assert_eq!(save.read(&mut buf), Ok(Piece::Drained));
    assert_eq!(save.read(&mut buf), Ok(Piece::Data { len: 50, chunk: Chunk::Stream }));
}

// VU-SIZE-FIELD
#[test]
fn padded_short_reads_are_taken_by_their_size() {
    let served = serve_with(FULL, ServerOptions { pad_short_reads: true, ..Default::default() });
    served.control.with(|s| s.stop_copy = pattern(0..100_001).into());
    let mut device = served.device();
    let mut save = saving(&mut device, StopCopy);
    assert_eq!(read_all(&mut *save, 30_000), (pattern(0..100_001), Piece::End));
}

#[test]
fn leaving_with_reads_under_way_loses_nothing_but_them() {
    let served = serve();
    served.control.with(|s| s.stop_copy = pattern(0..100_000).into());
    let mut device = served.device();
    let mut save = saving(&mut device, StopCopy);
    assert!(matches!(save.read(&mut [0; 1000]), Ok(Piece::Data { len: 1000, .. })));
    // A rollback in the middle of the stream.
    device.set_state(Running).unwrap();
    served.control.with(|s| s.stop_copy = pattern(5..10_000).into());
    let mut save = saving(&mut device, StopCopy);
    assert_eq!(read_all(&mut *save, 1000), (pattern(5..10_000), Piece::End));
}

#[test]
fn state_is_loaded_as_it_was_written() {
    for (extensions, chunk) in [(true, 1 << 20), (false, 32 << 10)] {
        let served = serve_with(FULL, ServerOptions { extensions, ..Default::default() });
        let mut device = served.device();
        let mut load = loading(&mut device);
        let data = pattern(0..3_000_000);
        load.begin_chunk(data.len() as u64).unwrap();
        for part in data.chunks(700_001) {
            load.write(part).unwrap();
        }
        load.end_chunk().unwrap();
        assert_eq!(served.control.with(|s| s.loaded.len()), data.len(), "end_chunk waits; chunks of {chunk}");
        device.set_state(Stop).unwrap();
        assert!(served.control.with(|s| s.loaded == data));
        // The loader was gone before the arc that validates.
        let log = served.control.log();
        assert_eq!(log[log.len() - 2..], ["loader gone", "RESUMING -> STOP"]);
        device.set_state(Running).unwrap();
    }
}

// V2-WRITE-FINAL
#[test]
fn a_failed_write_is_final() {
    let served = serve();
    let mut device = served.device();
    let mut load = loading(&mut device);
    served.control.with(|s| s.load_limit = Some(10_000));
    // With several writes under way the error comes with a later call, and then stays.
    let mut first = None;
    for part in pattern(0..40_000).chunks(4000) {
        if let Err(error) = load.write(part) {
            first = Some(error);
            break;
        }
    }
    let first = first.unwrap_or_else(|| load.end_chunk().unwrap_err());
    assert_eq!(first.errno, Some(Errno::ENOSPC));
    assert_eq!(load.write(&[0]), Err(first.clone()));
    assert_eq!(load.end_chunk(), Err(first.clone()));
    assert_eq!(served.control.with(|s| s.loaded.len()), 8000, "nothing is taken behind the hole");
    // What has a hole is not loaded, whoever asks.
    let error = device.set_state(Stop).unwrap_err();
    assert_eq!((error.error, error.reached), (first, Ok(Resuming)));
    assert!(!served.control.log().contains(&"RESUMING -> STOP".into()));
    device.reset().unwrap();
    served.control.with(|s| s.load_limit = None);
    let mut load = loading(&mut device);
    load.write(&[1, 2, 3]).unwrap();
    load.end_chunk().unwrap();
    device.set_state(Stop).unwrap();
}

// V2-WRITE-FINAL
#[test]
fn an_error_that_nobody_has_seen_stops_the_transition() {
    let served = serve();
    let mut device = served.device();
    let mut load = loading(&mut device);
    served.control.with(|s| s.load_limit = Some(0));
    // One write, not waited for: the engine forgets `end_chunk`.
    load.write(&[1]).unwrap();
    let error = device.set_state(Stop).unwrap_err();
    assert_eq!((error.error.errno, error.reached), (Some(Errno::ENOSPC), Ok(Resuming)));
}

#[test]
fn a_device_that_opens_no_session_says_why() {
    let served = serve();
    served.control.with(|s| s.load_refused = true);
    let mut device = served.device();
    let mut load = loading(&mut device);
    load.write(&[1]).unwrap();
    assert_eq!(load.end_chunk().unwrap_err().errno, Some(Errno::ENOMEM));
}

#[test]
fn data_outside_of_its_states_is_refused() {
    use airlift_vfio_user::codec::{FeatureFlags, feature};
    let served = serve();
    let device = served.device();
    let get = |index| device.client().device_feature(index, FeatureFlags::GET, &[], 64);
    assert_eq!(get(feature::PRECOPY_INFO).unwrap_err().errno, Some(Errno::EINVAL));
    assert_eq!(get(99).unwrap_err().errno, Some(Errno::ENOTTY));
    let set_error = [0_u8, 0, 0, 0, 255, 255, 255, 255];
    for data in [&set_error[..], &[77, 0, 0, 0, 0, 0, 0, 0], &[1, 0, 0, 0]] {
        let result = device.client().device_feature(feature::MIG_DEVICE_STATE, FeatureFlags::SET, data, 0);
        assert_eq!(result.unwrap_err().errno, Some(Errno::EINVAL));
    }
}

#[test]
fn a_slow_loader_does_not_hold_guest_accesses_up() {
    let served = serve();
    let client = served.client();
    let socket = client.migration_socket().unwrap();
    let mut device =
        VfioUserDevice::from_stream(id(), socket, ClientOptions { write_pipeline: 2, ..options() }).unwrap();
    let mut load = loading(&mut device);
    // The loader waits for this lock; so does the register access of the test device, which is why
    // a region is read here that needs no lock.
    let control = std::sync::Arc::clone(&served.control);
    let (hold, held) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let holder = std::thread::spawn(move || {
        control.with(|_| {
            hold.send(()).unwrap();
            gone.recv().unwrap();
        });
    });
    held.recv().unwrap();
    load.write(&[1; 100]).unwrap();
    let mut buf = [0; 16];
    client.region_read(2, 0, &mut buf).unwrap();
    assert_eq!(buf[3], 3);
    go.send(()).unwrap();
    holder.join().unwrap();
    load.end_chunk().unwrap();
}

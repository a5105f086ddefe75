//! SoftDevice by its trait alone, without a server: streams, what a load refuses, what is found out
//! when nothing is refused.

use airlift_core::{Arc as StateArc, DeviceState as S, Errno};
use airlift_core::{Interface, MigrationFlags};
use airlift_softdevice::registers as reg;
use airlift_softdevice::{FailArc, SoftDevice, SoftDeviceError, SoftDeviceOptions, SoftEvent};
use airlift_vfio_user::{Completion, Device, Done, MigrationInterface, V1Mapping, V1Section};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

struct Alone {
    device: SoftDevice,
    events: Receiver<SoftEvent>,
}

fn done(tx: Sender<Completion>) -> Done {
    Done::new(move |completion| {
        let _ = tx.send(completion);
    })
}

fn small(seed: u64) -> SoftDeviceOptions {
    SoftDeviceOptions { seed, state_size: 100 * 4096, bar2_size: 8192, ..SoftDeviceOptions::default() }
}

impl Alone {
    fn new(options: SoftDeviceOptions) -> Self {
        let (tx, events) = channel();
        let device = SoftDevice::new(options, move |event| {
            let _ = tx.send(event);
        })
        .expect("a device");
        Self { device, events }
    }

    fn arc(&mut self, from: S, to: S) -> Completion {
        let (tx, rx) = channel();
        self.device.transition(StateArc::new(from, to), done(tx));
        rx.recv_timeout(DEADLINE).expect("an answer")
    }

    fn walk(&mut self, path: &[S]) {
        for pair in path.windows(2) {
            assert_eq!(self.arc(pair[0], pair[1]), Completion::Ok, "{} -> {}", pair[0], pair[1]);
        }
    }

    fn stop(&mut self) {
        self.walk(&[S::Running, S::RunningP2p, S::Stop]);
    }

    fn register(&mut self, offset: u64) -> u64 {
        let mut word = [0; 8];
        self.device.region_read(0, offset, &mut word).expect("a register");
        u64::from_le_bytes(word)
    }

    fn set(&mut self, offset: u64, value: u64) -> Result<(), Errno> {
        self.device.region_write(0, offset, &value.to_le_bytes())
    }

    /// From STOP and back to STOP.
    fn save(&mut self) -> Vec<u8> {
        self.walk(&[S::Stop, S::StopCopy]);
        let mut saver = self.device.saver().expect("a saver");
        assert_eq!(self.register(reg::TICK), 0);
        let expected = saver.stop_copy_size();
        let mut stream = Vec::new();
        let mut buf = vec![0; 10_000];
        loop {
            let left = saver.stop_copy_size();
            assert_eq!(left, expected - stream.len() as u64, "the size that is left is exact");
            match saver.read(&mut buf).expect("data") {
                0 => break,
                n => stream.extend_from_slice(&buf[..n]),
            }
        }
        assert_eq!(stream.len() as u64, expected);
        self.walk(&[S::StopCopy, S::Stop]);
        stream
    }

    /// From STOP; the device is then in RESUMING, the loader gone.
    fn write(&mut self, stream: &[u8], piece: usize) -> Result<(), Errno> {
        self.walk(&[S::Stop, S::Resuming]);
        let mut loader = self.device.loader().expect("a loader");
        stream.chunks(piece).try_for_each(|data| loader.write(data))
    }

    fn loaded(&self) -> SoftEvent {
        let end = Instant::now() + DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).expect("the event of a load");
            if matches!(event, SoftEvent::Loaded { .. }) {
                return event;
            }
        }
    }
}

fn saved(seed: u64) -> (Vec<u8>, u64) {
    let mut source = Alone::new(small(seed));
    source.device.region_write(2, 100, b"what peers wrote").expect("BAR2");
    source.set(reg::ring_register(1, reg::RING_ENTRIES), 32).expect("a register");
    source.stop();
    let digest = source.register(reg::DIGEST);
    (source.save(), digest)
}

// I10
#[test]
fn a_device_arrives_whole_whatever_the_size_of_the_pieces() {
    let (stream, digest) = saved(7);
    for piece in [1, 17, 4096, 65536, usize::MAX] {
        let mut target = Alone::new(small(99));
        target.stop();
        assert_ne!(target.register(reg::DIGEST), digest);
        target.write(&stream, piece).unwrap();
        target.walk(&[S::Resuming, S::Stop]);
        assert_eq!(target.register(reg::DIGEST), digest);
        assert_eq!(target.register(reg::SEED), 7);
        assert_eq!(target.register(reg::ring_register(1, reg::RING_ENTRIES)), 32);
        let mut bar2 = [0; 16];
        target.device.region_read(2, 100, &mut bar2).unwrap();
        assert_eq!(&bar2, b"what peers wrote");
        let expected = SoftEvent::Loaded { digest, tick: 0, verified: true, bad_page: None, loads: 1 };
        assert_eq!(target.loaded(), expected);
        assert_eq!(target.register(reg::VERIFIED), reg::VERIFIED_YES);
    }
}

// I21
#[test]
fn the_same_device_loads_twice_and_the_second_load_counts() {
    let (first, _) = saved(1);
    let (second, digest) = saved(2);
    let mut target = Alone::new(small(3));
    target.stop();
    for stream in [&first, &second] {
        target.write(stream, 5000).unwrap();
        target.walk(&[S::Resuming, S::Stop]);
    }
    assert_eq!(target.register(reg::DIGEST), digest);
    assert_eq!(target.register(reg::LOADS), 2);
    // The comparison of the first may have been replaced by that of the second.
    while !matches!(target.loaded(), SoftEvent::Loaded { loads: 2, verified: true, .. }) {}
    // What was loaded can be saved again, and is the same.
    assert_eq!(target.save(), second);
}

// V2-VALIDATE
#[test]
fn any_byte_that_is_wrong_is_refused() {
    let (stream, _) = saved(7);
    let mut target = Alone::new(small(7));
    target.stop();
    // Every byte of the header, of the first head and of what follows the pages; a sample of the rest.
    let sample = (48..stream.len() - 9000).step_by(40_009);
    let places = (0..48).chain(sample).chain((stream.len() - 9000..stream.len()).step_by(61));
    for place in places.chain([stream.len() - 1]) {
        let mut bad = stream.clone();
        bad[place] ^= 0x10;
        let written = target.write(&bad, 32768);
        let refused = Completion::Failed { errno: Errno::EINVAL, reached: S::Resuming };
        let ended = target.arc(S::Resuming, S::Stop);
        assert_eq!(ended, refused, "byte {place} of {}, writing gave {written:?}", stream.len());
        let (tx, rx) = channel();
        target.device.reset(done(tx));
        assert_eq!(rx.recv_timeout(DEADLINE).unwrap(), Completion::Ok);
        target.stop();
    }
}

#[test]
fn without_validation_only_the_comparison_finds_a_wrong_byte() {
    let (stream, _) = saved(7);
    let mut target = Alone::new(SoftDeviceOptions { validate: false, ..small(7) });
    target.stop();
    let mut bad = stream.clone();
    // Header, head, three pages.
    bad[32 + 16 + 3 * 4096 + 5] ^= 1;
    target.write(&bad, 32768).unwrap();
    target.walk(&[S::Resuming, S::Stop, S::RunningP2p, S::Running]);
    let event = target.loaded();
    assert!(matches!(event, SoftEvent::Loaded { verified: false, bad_page: Some(3), .. }), "{event:?}");
    assert_eq!(target.register(reg::VERIFIED), reg::VERIFIED_NO);
    // The same device says yes to what is right.
    target.stop();
    target.write(&stream, 32768).unwrap();
    target.walk(&[S::Resuming, S::Stop]);
    while !matches!(target.loaded(), SoftEvent::Loaded { verified: true, loads: 2, .. }) {}
}

// V2-TOO-LITTLE
#[test]
fn a_stream_that_is_cut_is_refused_and_can_still_be_completed() {
    let (stream, digest) = saved(7);
    let mut target = Alone::new(small(8));
    target.stop();
    let refused = Completion::Failed { errno: Errno::EINVAL, reached: S::Resuming };
    target.walk(&[S::Stop, S::Resuming]);
    assert_eq!(target.arc(S::Resuming, S::Stop), refused, "nothing at all");
    let mut at = 0;
    for cut in [31, 32, 40, 5000, stream.len() - 1, stream.len()] {
        target.device.loader().unwrap().write(&stream[at..cut]).unwrap();
        at = cut;
        if cut < stream.len() {
            assert_eq!(target.arc(S::Resuming, S::Stop), refused, "{cut} of {} bytes", stream.len());
        }
    }
    assert_eq!(target.device.loader().unwrap().write(&[0]), Err(Errno::ENOSPC), "more than there is");
    let (stream, mut target) = (stream, Alone::new(small(8)));
    target.stop();
    target.write(&stream, 9999).unwrap();
    target.walk(&[S::Resuming, S::Stop]);
    assert_eq!(target.register(reg::DIGEST), digest);
}

#[test]
fn a_device_of_another_size_refuses_at_the_header() {
    let (stream, _) = saved(7);
    for options in [
        SoftDeviceOptions { state_size: 101 * 4096, ..small(7) },
        SoftDeviceOptions { bar2_size: 4096, ..small(7) },
    ] {
        let mut target = Alone::new(options);
        target.stop();
        assert_eq!(target.write(&stream, 32), Err(Errno::EINVAL));
    }
}

#[test]
fn a_reset_device_is_as_it_was_made() {
    let fresh = Alone::new(small(5)).register(reg::DIGEST);
    let (stream, _) = saved(6);
    let mut device = Alone::new(small(5));
    device.stop();
    device.write(&stream, 4096).unwrap();
    device.walk(&[S::Resuming, S::Stop]);
    assert_ne!(device.register(reg::DIGEST), fresh);
    let (tx, rx) = channel();
    device.device.reset(done(tx));
    assert_eq!(rx.recv_timeout(DEADLINE).unwrap(), Completion::Ok);
    assert_eq!(device.register(reg::DIGEST), fresh);
    assert_eq!(device.register(reg::VERIFIED), reg::VERIFIED_NEVER);
    assert_eq!(device.device.monitor().state(), S::Running);
    // A check that a guest asks for agrees.
    device.set(reg::VERIFIED, 1).unwrap();
    let end = Instant::now() + DEADLINE;
    while device.register(reg::VERIFIED) != reg::VERIFIED_YES {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
}

#[test]
fn faults_that_were_ordered_happen() {
    let arc = StateArc::new(S::Running, S::RunningP2p);
    let fail = |to_error| FailArc { arc, errno: Errno::EIO, to_error };
    let mut device = Alone::new(SoftDeviceOptions { fail_arc: Some(fail(false)), ..small(1) });
    let failed = Completion::Failed { errno: Errno::EIO, reached: S::Running };
    assert_eq!(device.arc(S::Running, S::RunningP2p), failed);
    assert_eq!(device.device.monitor().state(), S::Running);
    let mut device = Alone::new(SoftDeviceOptions { fail_arc: Some(fail(true)), ..small(1) });
    let failed = Completion::Failed { errno: Errno::EIO, reached: S::Error };
    assert_eq!(device.arc(S::Running, S::RunningP2p), failed);
    assert_eq!(device.device.monitor().state(), S::Error);

    let options = SoftDeviceOptions { load_failure_is_error: true, ..small(1) };
    let mut device = Alone::new(options);
    device.walk(&[S::Running, S::RunningP2p, S::Stop, S::Resuming]);
    let failed = Completion::Failed { errno: Errno::EINVAL, reached: S::Error };
    assert_eq!(device.arc(S::Resuming, S::Stop), failed);
}

#[test]
fn registers_are_closed_while_state_moves() {
    let mut device = Alone::new(small(1));
    device.stop();
    device.walk(&[S::Stop, S::StopCopy]);
    assert_eq!(device.set(reg::CONTROL, 1), Err(Errno::EBUSY));
    assert_eq!(device.register(reg::MAGIC), reg::MAGIC_VALUE);
    device.walk(&[S::StopCopy, S::Stop, S::Resuming]);
    assert_eq!(device.set(reg::CONTROL, 1), Err(Errno::EBUSY));
}

fn v1(size: u64, whole_transactions: bool) -> MigrationInterface {
    MigrationInterface::V1(V1Section { size, mapping: V1Mapping::Mapped, whole_transactions })
}

// V1-ARCS, V1-MIX
#[test]
fn over_interface_v1_it_offers_what_that_interface_has() {
    let options = SoftDeviceOptions { interface: v1(4096, false), accept_other_interface: true, ..small(1) };
    let description = Alone::new(options).device.describe();
    let migration = description.migration.expect("migration");
    assert_eq!(migration.interface, v1(4096, false));
    assert_eq!(migration.flags, MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY, "no P2P");
    assert_eq!(description.format.interfaces, [Interface::V2]);
    let error = |options| SoftDevice::new(options, |_| ()).expect_err("refused");
    let options = SoftDeviceOptions { interface: v1(4096, false), precopy: false, ..small(1) };
    assert!(matches!(error(options), SoftDeviceError::PreCopy));
    for size in [0, (1 << 30) + 1] {
        let options = SoftDeviceOptions { interface: v1(size, false), ..small(1) };
        assert!(matches!(error(options), SoftDeviceError::Range { what: "a data section", .. }));
    }
    let record = small(1).largest_record();
    let options = SoftDeviceOptions { interface: v1(record - 1, true), ..small(1) };
    assert!(matches!(error(options), SoftDeviceError::Whole { record: r, .. } if r == record));
}

// V1-CHUNK, V1-WHOLE
#[test]
fn with_whole_transactions_a_write_is_one_record_and_nothing_else_is_taken() {
    let whole = |seed| {
        let interface = v1(small(seed).largest_record(), true);
        Alone::new(SoftDeviceOptions { interface, p2p: false, ..small(seed) })
    };
    let stop = |device: &mut Alone| device.walk(&[S::Running, S::Stop]);
    let mut source = whole(7);
    stop(&mut source);
    source.walk(&[S::Stop, S::StopCopy]);
    let mut saver = source.device.saver().expect("a saver");
    let mut buf = vec![0; usize::try_from(small(7).largest_record()).expect("a size")];
    let mut records = Vec::new();
    loop {
        match saver.read(&mut buf).expect("data") {
            0 => break,
            n => records.push(buf[..n].to_vec()),
        }
    }
    let load = |records: &[Vec<u8>]| {
        let mut target = whole(99);
        stop(&mut target);
        target.walk(&[S::Stop, S::Resuming]);
        let mut loader = target.device.loader().expect("a loader");
        let written = records.iter().try_for_each(|record| loader.write(record));
        drop(loader);
        (written, target.arc(S::Resuming, S::Stop))
    };
    assert_eq!(load(&records), (Ok(()), Completion::Ok));
    // The same bytes in other transactions: cut, and joined.
    for at in [0, 1, records.len() - 1] {
        let mut cut = records.clone();
        let rest = cut[at].split_off(records[at].len() / 2);
        cut.insert(at + 1, rest);
        assert_eq!(load(&cut).0, Err(Errno::EINVAL), "{at}");
        assert_ne!(load(&cut).1, Completion::Ok, "{at}: and it does not become the device");
    }
    let joined = vec![records.concat()];
    assert_eq!(load(&joined).0, Err(Errno::EINVAL));
}

#[test]
fn options_out_of_range_are_refused() {
    let size = SoftDeviceOptions { state_size: 5000, ..small(1) };
    let vectors = SoftDeviceOptions { vectors: 9, ..small(1) };
    let rate = SoftDeviceOptions { load_rate: Some(0), ..small(1) };
    assert!(matches!(SoftDevice::new(size, drop), Err(SoftDeviceError::Size { value: 5000, .. })));
    assert!(matches!(SoftDevice::new(vectors, drop), Err(SoftDeviceError::Range { value: 9, .. })));
    assert!(matches!(SoftDevice::new(rate, drop), Err(SoftDeviceError::Range { value: 0, .. })));
}

#[test]
fn events_are_json_objects_with_a_name() {
    let event = SoftEvent::Transition {
        from: S::Running,
        to: S::RunningP2p,
        start_ns: 1,
        end_ns: 2,
        errno: None,
        reached: S::RunningP2p,
    };
    let json = serde_json::to_string(&event).unwrap();
    assert_eq!(
        json,
        r#"{"event":"transition","from":"RUNNING","to":"RUNNING_P2P","start_ns":1,"end_ns":2,"reached":"RUNNING_P2P"}"#
    );
    assert_eq!(serde_json::from_str::<SoftEvent>(&json).unwrap(), event);
}

#[test]
fn a_comparison_that_was_asked_for_is_never_seen_as_not_begun() {
    let mut device = Alone::new(small(5));
    for _ in 0..200 {
        device.set(reg::VERIFIED, 1).unwrap();
        assert_ne!(device.register(reg::VERIFIED), reg::VERIFIED_NEVER);
    }
}

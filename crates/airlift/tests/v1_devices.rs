//! Devices of interface v1 in whole migrations: alone, large, slow, beside and into v2, and reset.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod fakes;

use airlift::core::{
    DeviceErrorKind, DeviceState, Interface, MigrationDevice, PeerDma, ResetPolicy, Side, StateFormat,
};
use airlift::set::{ChunkSink, Quiesce, SetError, SetEvent, SinkClosed, StreamFault};
use airlift::{DeviceSet, Environment, MigrationReport, Outcome, PooledBuf, Running};
use airlift_stream::{FrameBuf, FrameHeader, HEADER_LEN, Limits, RecordDecoder, RecordEvent, RecordLimits};
use fakes::sides::{Sides, assert_completed, words};
use fakes::v1::{Balance, Region, bytes};
use fakes::{FakeDevice, LONG};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn boxed(device: impl MigrationDevice) -> Vec<Box<dyn MigrationDevice>> {
    vec![Box::new(device)]
}

fn migrate(sides: Sides, here: &Region, there: &Region) -> (MigrationReport, MigrationReport) {
    sides.migrate(boxed(here.device("nic0", false)), boxed(there.device("nic0", false)))
}

// V1-CHUNK, V1-ROUNDS, V1-RESERVED
#[test]
fn transactions_arrive_in_order_and_with_their_sizes_whatever_the_section() {
    let precopy = vec![bytes(1, 1), bytes(2, 5000), bytes(3, 8192)];
    let stopped = vec![bytes(4, 8192), bytes(5, 3)];
    let all = [precopy.concat(), stopped.concat()].concat();
    for (section, rounds) in [
        (8192, vec![1, 5000, 8192, 8192, 3]),
        (100_000, vec![1, 5000, 8192, 8192, 3]),
        (4099, vec![1, 4099, 901, 4099, 4093, 4099, 4093, 3]),
    ] {
        let here = Region::new(8192).with(precopy.clone(), stopped.clone());
        let there = Region::new(section);
        let reports = migrate(Sides::new(), &here, &there);
        assert_completed(&reports);
        assert!(there.loaded() == all, "section of {section}: {} bytes", there.loaded().len());
        assert_eq!(there.rounds(), rounds);
        assert_eq!((here.state_now(), there.state_now()), (DeviceState::Stop, DeviceState::Running));
        assert!(here.keeps_reserved_bits() && there.keeps_reserved_bits());
        let device = &reports.0.devices[0];
        assert_eq!(device.interface, Interface::V1);
        assert_eq!(device.precopy_bytes + device.stop_copy_bytes, all.len() as u64);
    }
}

#[test]
fn a_device_without_any_state_moves() {
    let (here, there) = (Region::new(4096), Region::new(64));
    assert_completed(&migrate(Sides::new(), &here, &there));
    assert_eq!((there.loaded(), there.state_now()), (Vec::new(), DeviceState::Running));
}

#[test]
fn what_a_device_had_not_said_before_the_stop_is_named_when_it_made_the_downtime_too_long() {
    let here = Region::new(4 << 20).with(Vec::new(), vec![bytes(1, 3 << 20)]);
    let there = Region::new(4 << 20);
    there.make_slow(Duration::from_millis(200));
    let mut sides = Sides::new();
    sides.source.downtime_limit = Duration::from_millis(100);
    let reports = migrate(sides, &here, &there);
    assert_completed(&reports);
    let notes = reports.0.notes.join("; ");
    assert!(notes.contains("nic0: gave 3145728 bytes after the stop and had said 0 before it"), "{notes}");
}

#[test]
fn a_device_that_is_slower_than_the_connections_is_not_stopped_with_more_than_it_can_give_in_time() {
    // 8 MiB in 5 ms for each 64 KiB: a quarter of a second has less than 3.2 MiB.
    let chunks: Vec<_> = (0..128).map(|seed| bytes(seed, 64 << 10)).collect();
    for slow_source in [true, false] {
        let here = Region::new(64 << 10).with(chunks.clone(), Vec::new());
        let there = Region::new(64 << 10);
        let slow = if slow_source { &here } else { &there };
        slow.make_slow(Duration::from_millis(5));
        let mut sides = Sides::new();
        sides.source.downtime_limit = Duration::from_millis(250);
        let reports = migrate(sides, &here, &there);
        assert_completed(&reports);
        assert!(there.loaded() == chunks.concat());
        let late = reports.0.devices[0].stop_copy_bytes;
        assert!(late < 4 << 20, "{late} bytes were left for the stop; slow source: {slow_source}");
    }
}

// V1-OUTSTANDING
#[test]
fn a_transaction_that_does_not_end_names_the_device_and_who_was_waited_for() {
    // It is to be stopped while its first part is read, which is then followed by three more.
    let here = Region::new(1 << 20).with(vec![bytes(2, 1 << 20)], Vec::new());
    here.make_data_slow(Duration::from_secs(1));
    let mut sides = Sides::new();
    sides.source.deadlines.stop_copy = Duration::from_millis(200);
    let (sent, _) = migrate(sides, &here, &Region::new(1 << 20));
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes), "{}", words(&sent));
    let story = words(&sent);
    assert!(
        story.contains("nic0: ") && story.contains("the device gave no more of a transaction"),
        "{story}"
    );
    assert_eq!(here.state_now(), DeviceState::Running);
}

/// A migration of transactions that are far larger than what the receiver may hold.
fn large(precopy: Vec<Vec<u8>>, stopped: Vec<Vec<u8>>, slow: Duration) {
    const BUDGET: u64 = 256 << 10;
    let (size, all) = (64 << 20, [precopy.concat(), stopped.concat()].concat());
    let here = Region::new(size).with(precopy, stopped);
    let there = Region::new(1 << 20);
    there.make_slow(slow);
    let balance = Arc::new(Balance::default());
    here.count_in(&balance);
    there.count_in(&balance);
    let mut sides = Sides::new();
    sides.destination.receive_budget = BUDGET;
    here.watch(&sides.from.running);
    assert_completed(&migrate(sides, &here, &there));
    assert!(there.loaded() == all, "{} bytes arrived", there.loaded().len());
    let most = balance.most.load(Ordering::SeqCst);
    assert!(most <= BUDGET, "{most} bytes were read and not written, with a budget of {BUDGET}");
    assert!(most > 0);
    // The end of a transaction is waited for while the guest still runs (V1-OUTSTANDING).
    assert!(!here.read_while_paused());
}

// V1-CHUNK, W-CREDIT
#[test]
fn a_transaction_larger_than_the_receive_budget_moves_in_pre_copy() {
    // Initial data is complete behind the first, so that the guest may be stopped in the second.
    large(vec![bytes(1, 1000), bytes(2, 64 << 20)], vec![bytes(3, 70)], Duration::ZERO);
}

// V1-CHUNK, W-CREDIT
#[test]
fn a_transaction_larger_than_the_receive_budget_moves_after_the_stop() {
    large(vec![], vec![bytes(2, 64 << 20), bytes(3, 7)], Duration::ZERO);
}

// V1-OUTSTANDING, W-CREDIT
#[test]
fn a_slow_destination_is_waited_for_in_the_middle_of_a_transaction() {
    let slow = Duration::from_millis(40);
    large(vec![bytes(1, 1000), bytes(2, 8 << 20)], vec![bytes(3, 3 << 20)], slow);
}

// V1-ARCS
#[test]
fn v1_and_v2_move_together_when_it_is_declared_that_there_is_no_peer_dma() {
    let (old, new) = (Region::new(4096).with(vec![bytes(1, 4096)], vec![bytes(2, 9)]), Region::new(512));
    let devices = |region: &Region| -> (FakeDevice, Vec<Box<dyn MigrationDevice>>) {
        let v2 = FakeDevice::new();
        (v2.clone(), vec![Box::new(region.device("old0", false)), Box::new(v2)])
    };
    let (_, here) = devices(&old);
    let (_, there) = devices(&new);
    let (sent, _) = Sides::new().migrate(here, there);
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Incompatible, Running::Yes));
    let refused = words(&sent);
    assert!(refused.contains("v1 knows none") && refused.contains("--assume-no-peer-dma"), "{refused}");

    let (_, here) = devices(&old);
    let (v2, there) = devices(&new);
    let mut sides = Sides::new();
    sides.source.assume_no_peer_dma = true;
    let reports = sides.migrate(here, there);
    assert_completed(&reports);
    assert_eq!(new.loaded().len(), 4096 + 9);
    assert_eq!(*v2.loaded.lock().unwrap(), 1010);
    let arcs: Vec<_> =
        reports.0.devices[1].transitions.iter().filter(|t| t.side == Side::Source).map(|t| t.to).collect();
    assert!(arcs.contains(&DeviceState::PreCopyP2p), "v2 goes through P2P all the same: {arcs:?}");
}

// V1-WHOLE
#[test]
fn a_section_too_small_for_whole_transactions_is_refused_before_anything_starts() {
    let (here, there) = (Region::new(8192).with(vec![], vec![bytes(1, 10)]), Region::new(8191));
    let before = here.accesses();
    let (sent, _) = Sides::new().migrate(boxed(here.device("nic0", true)), boxed(there.device("nic0", true)));
    assert_eq!(sent.outcome, Outcome::Incompatible);
    let report = sent.compatibility.unwrap().to_string();
    assert!(report.contains("capabilities.largest-transaction") && report.contains("8192"), "{report}");
    // Looked at, and never written to.
    assert_eq!(here.state_now(), DeviceState::Running);
    assert!(here.accesses() > before);
}

// V1-MIX
#[test]
fn pieces_of_v2_are_loaded_over_v1_only_by_a_device_that_declares_it() {
    let format = |interfaces| StateFormat { name: "soft".into(), version: 1, accepts: vec![1], interfaces };
    let mut here = FakeDevice::new();
    here.bytes = 3_000_000;
    here.format(format(vec![]));
    let there = Region::new(4096);
    let run = |there: &Region, interfaces| {
        let device = there.device_of("nic0", false, Some(format(interfaces)));
        Sides::new().migrate(boxed(here.clone()), boxed(device))
    };
    let (sent, _) = run(&there, vec![]);
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Incompatible, Running::Yes));
    assert!(words(&sent).contains("v2") && words(&sent).contains("v1"), "{}", words(&sent));
    assert_eq!(here.state_now(), DeviceState::Running);
    assert_completed(&run(&there, vec![Interface::V2]));
    assert_eq!(there.loaded().len(), 3_000_010);
    assert!(there.rounds().iter().all(|round| *round <= 4096));
}

/// Keeps the frames of a set that is saved.
#[derive(Default)]
struct Kept {
    frames: Mutex<Vec<Vec<u8>>>,
    /// Frames that there is room for yet.
    room: Mutex<usize>,
}

impl ChunkSink for Kept {
    fn buffer(&self, _device: u32, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        let mut room = self.room.lock().unwrap();
        if *room == 0 {
            drop(room);
            std::thread::sleep(wait.min(Duration::from_millis(1)));
            return Ok(None);
        }
        *room -= 1;
        Ok(Some(FrameBuf::new(64)))
    }

    fn send(&self, _device: u32, frame: FrameBuf) -> Result<(), SinkClosed> {
        self.frames.lock().unwrap().push(frame.sealed().unwrap().to_vec());
        Ok(())
    }
}

impl Kept {
    /// The records in order: sizes of DATA records, and the names of others.
    fn records(&self) -> Vec<String> {
        let mut decoder = RecordDecoder::new(0, RecordLimits::default());
        let mut records = Vec::new();
        for frame in self.frames.lock().unwrap().iter() {
            let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
            let mut events = decoder.frame(&header, &frame[HEADER_LEN..]).unwrap();
            while let Some(event) = events.next_event().unwrap() {
                match event {
                    RecordEvent::Bytes(_) => {}
                    other => records.push(format!("{other:?}")),
                }
            }
        }
        records
    }
}

fn set(device: impl MigrationDevice, side: Side) -> DeviceSet {
    DeviceSet::new(boxed(device), side, Environment::default()).unwrap()
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < until, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

// V1-OUTSTANDING
#[test]
fn the_stop_reads_a_transaction_to_its_end_first_and_no_record_comes_between() {
    let here = Region::new(4096).with(vec![bytes(1, 1000), bytes(2, 4096)], vec![bytes(3, 100)]);
    // SETUP, the end of initial data, the first transaction, and some of the second.
    let kept = Arc::new(Kept { room: Mutex::new(1 + 16 + 1 + 3), ..Kept::default() });
    let sink: Arc<dyn ChunkSink> = Arc::clone(&kept) as _;
    let mut saving = set(here.device("nic0", false), Side::Source).start_saving(&sink, LONG).unwrap();
    wait_for("the second transaction", || *kept.room.lock().unwrap() == 0);
    wait_for("its first part", || saving.status()[0].mid_transaction);
    saving.settle(LONG).unwrap();
    assert!(!saving.is_settled());
    // Without room the stop fails, in time, and nothing is lost by that.
    let short = Duration::from_millis(300);
    let failed = saving.quiesce(Quiesce::default(), short).unwrap_err();
    assert!(failed.error.to_string().contains("no more of a transaction"), "{}", failed.error);
    let back = failed.roll_back(ResetPolicy::Never, LONG);
    assert_eq!(here.state_now(), DeviceState::Running);

    kept.frames.lock().unwrap().clear();
    *kept.room.lock().unwrap() = 1 + 16 + 1 + 3;
    let saving = back.set.start_saving(&sink, LONG).unwrap();
    wait_for("the second transaction", || *kept.room.lock().unwrap() == 0);
    wait_for("its first part", || saving.status()[0].mid_transaction);
    *kept.room.lock().unwrap() = 1000;
    let (stopped, _) = saving.quiesce(Quiesce::default(), LONG).unwrap();
    let mut draining = stopped.drain(vec![Some(b"config".to_vec())]);
    assert!(draining.poll(LONG).unwrap());
    let expected = [
        "Setup",
        "InitDataSent(1)",
        "Data(1000 bytes)",
        "DataEnd",
        "Data(4096 bytes)",
        "DataEnd",
        "Data(100 bytes)",
        "DataEnd",
        "Config(6 bytes)",
        "End",
    ];
    assert_eq!(kept.records(), expected);
}

// V1-OUTSTANDING
#[test]
fn a_settled_device_begins_no_further_transaction_while_the_guest_runs() {
    let here = Region::new(4096).with(vec![bytes(1, 1000); 50], vec![]);
    let kept = Arc::new(Kept { room: Mutex::new(1 + 16 + 1 + 3), ..Kept::default() });
    let sink: Arc<dyn ChunkSink> = Arc::clone(&kept) as _;
    let mut saving = set(here.device("nic0", false), Side::Source).start_saving(&sink, LONG).unwrap();
    wait_for("a transaction", || saving.status()[0].mid_transaction);
    wait_for("the end of room", || *kept.room.lock().unwrap() == 0);
    saving.settle(LONG).unwrap();
    // What the second transaction still needs, and some for a third.
    *kept.room.lock().unwrap() = 13 + 5;
    wait_for("its end", || saving.is_settled());
    // Each call is answered between two steps of the worker, which has room and begins nothing.
    for _ in 0..20 {
        saving.settle(LONG).unwrap();
    }
    // The end of initial data takes one more frame, behind the first transaction or behind the second.
    let left = *kept.room.lock().unwrap();
    assert!(saving.status()[0].precopy_bytes == 2000 && left >= 5, "{:?}, {left}", saving.status());
    assert!(saving.is_settled());
    drop(saving.roll_back(ResetPolicy::Never, LONG));
    assert_eq!(here.state_now(), DeviceState::Running);
}

fn lost(error: &SetError) -> String {
    match error {
        SetError::Device { fault: StreamFault::Transition(error), .. } => {
            assert_eq!(error.error.kind, DeviceErrorKind::Lost, "{error}");
            error.to_string()
        }
        other => panic!("{other:?}"),
    }
}

// V1-RESET, V2-STALE
#[test]
fn a_device_that_was_reset_under_its_session_is_not_taken_for_saved() {
    let (v1, v2) = (Region::new(4096).with(vec![], vec![bytes(3, 100)]), FakeDevice::new());
    for device in [Box::new(v1.device("nic0", false)) as Box<dyn MigrationDevice>, Box::new(v2.clone())] {
        let kept = Arc::new(Kept { room: Mutex::new(1000), ..Kept::default() });
        let sink: Arc<dyn ChunkSink> = Arc::clone(&kept) as _;
        let one = DeviceSet::new(vec![device], Side::Source, Environment::default()).unwrap();
        let mut saving = one.start_saving(&sink, LONG).unwrap();
        wait_for("a first look", || saving.status()[0].drained);
        v1.reset();
        v2.reset_by_itself();
        saving.settle(LONG).unwrap();
        let failed = saving.quiesce(Quiesce { peer_dma: PeerDma::Possible, ..Quiesce::default() }, LONG);
        let failed = failed.unwrap_err();
        let error = failed.error.to_string();
        assert!(error.contains("reset"), "{error}");
        assert_eq!((v1.state_now(), v2.state_now()), (DeviceState::Running, DeviceState::Running));
    }
}

// V1-RESET, V2-STALE
#[test]
fn a_device_that_was_reset_while_it_loaded_is_not_taken_for_loaded() {
    let (v1, v2) = (Region::new(4096), FakeDevice::new());
    for device in [Box::new(v1.device("nic0", false)) as Box<dyn MigrationDevice>, Box::new(v2.clone())] {
        let here = Region::new(4096).with(vec![], vec![bytes(3, 100)]);
        let kept = Arc::new(Kept { room: Mutex::new(1000), ..Kept::default() });
        let sink: Arc<dyn ChunkSink> = Arc::clone(&kept) as _;
        let saving = set(here.device("nic0", false), Side::Source).start_saving(&sink, LONG).unwrap();
        let (stopped, _) = saving.quiesce(Quiesce::default(), LONG).unwrap();
        assert!(stopped.drain(vec![None]).poll(LONG).unwrap());
        let one = DeviceSet::new(vec![device], Side::Destination, Environment::default()).unwrap();
        let loading = one.start_loading(1000, LONG).unwrap();
        let frames = kept.frames.lock().unwrap().clone();
        for frame in frames {
            let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
            assert!(loading.feed(header, PooledBuf::from(frame[HEADER_LEN..].to_vec())));
        }
        let events = loading.events();
        while !matches!(events.recv_timeout(LONG).unwrap(), SetEvent::Ended { .. }) {}
        v1.reset();
        v2.reset_by_itself();
        let error = lost(&loading.finish(LONG).unwrap_err().error);
        assert!(error.contains("the device is in RUNNING: it was reset under its session"), "{error}");
    }
}

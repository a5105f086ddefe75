//! The source of a whole migration, against a real destination and against peers that break rules.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod fakes;

use airlift::core::{Failure, Limits as OfferLimits, Phase};
use airlift::{
    CancelAnswer, Deadlines, Destination, DestinationOptions, Ended, Environment, MachineRecord,
    MigrationReport, Outcome, RecordOwner, Running, Source, SourceDevice, SourceOptions,
};
use airlift_stream::message::{Report, Token};
use airlift_stream::{FrameHeader, HEADER_LEN, Limits, Message};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use fakes::{Door, FakeDevice, FakeMachine, LONG, MemoryJournal, memory, network};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

fn options() -> SourceOptions {
    SourceOptions {
        deadlines: Deadlines { precopy: LONG, ..Deadlines::default() },
        ..SourceOptions::default()
    }
}

fn source(machine: &FakeMachine, device: &FakeDevice, dial: fakes::Dial, options: SourceOptions) -> Source {
    let devices = vec![SourceDevice { device: Box::new(device.clone()), dirty: None }];
    Source::new(
        Box::new(machine.clone()),
        devices,
        Box::new(dial),
        Box::new(MemoryJournal),
        Environment::default(),
        options,
    )
}

fn destination(
    machine: &FakeMachine,
    device: &FakeDevice,
    door: Door,
    options: DestinationOptions,
) -> JoinHandle<Ended> {
    let destination = Destination::new(
        Box::new(machine.clone()),
        vec![Box::new(device.clone())],
        Box::new(door),
        Box::new(MemoryJournal),
        Environment::default(),
        options,
    );
    std::thread::spawn(move || destination.run())
}

/// Both sides of a migration, to their ends.
fn migrate(
    from: &FakeMachine,
    to: &FakeMachine,
    devices: (&FakeDevice, &FakeDevice),
    budget: u64,
) -> (MigrationReport, MigrationReport) {
    let (dial, door) = network();
    let options_there = DestinationOptions { receive_budget: budget, ..DestinationOptions::default() };
    let there = destination(to, devices.1, door, options_there);
    let here = source(from, devices.0, dial, options()).run();
    (here.report, there.join().unwrap().report)
}

/// Everything that an error says, with its causes.
fn text(error: Option<&Failure>) -> String {
    let mut text = String::new();
    let mut next = error;
    while let Some(failure) = next {
        text.push_str(&failure.to_string());
        text.push('\n');
        next = failure.cause.as_deref();
    }
    text
}

#[test]
fn a_small_receive_budget_is_enough_for_memory_and_records_of_any_size() {
    let (from, to) = (FakeMachine::new(Some(memory(7)), true), FakeMachine::new(Some(memory(0)), false));
    let record = MachineRecord { owner: RecordOwner::Machine, name: "vcpu".into(), data: vec![5; 900_000] };
    let from = FakeMachine { records: vec![record.clone()], ..from };
    let (mut here, there) = (FakeDevice::new(), FakeDevice::new());
    here.bytes = 3_000_000;
    here.stop_copy_size = Some(3_000_000);
    let (sent, received) = migrate(&from, &to, (&here, &there), 512 << 10);
    assert_eq!(sent.outcome, Outcome::Completed, "{}", text(sent.error.as_ref()));
    assert_eq!(received.outcome, Outcome::Completed, "{}", text(received.error.as_ref()));
    assert_eq!(*there.loaded.lock().unwrap(), 3_000_010);
    assert_eq!(*to.loaded.lock().unwrap(), [record]);
    let (mut a, mut b) = (vec![0; 4 << 20], vec![0; 4 << 20]);
    from.memory.unwrap().read(0, &mut a).unwrap();
    to.memory.unwrap().read(0, &mut b).unwrap();
    assert!(a == b, "memory differs");
}

#[test]
fn a_rollback_lets_the_guest_run_before_it_ends_logging() {
    let from = FakeMachine { fails: Some("save_records"), ..FakeMachine::new(Some(memory(7)), true) };
    let to = FakeMachine::new(Some(memory(0)), false);
    let device = FakeDevice::new();
    let (sent, _) = migrate(&from, &to, (&device, &FakeDevice::new()), 64 << 20);
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes));
    assert_eq!(device.state_now(), airlift::core::DeviceState::Running);
    assert!(from.place("open_device_access") < from.place("resume"));
    assert!(from.place("resume") < from.place("stop_dirty"), "{:?}", from.calls());
    assert!(!to.calls().contains(&"resume"));
}

#[test]
fn a_record_under_the_engines_own_name_is_refused() {
    let record = MachineRecord {
        owner: RecordOwner::Machine,
        name: "airlift/interrupts".into(),
        data: b"[]".to_vec(),
    };
    let from = FakeMachine { records: vec![record], ..FakeMachine::new(Some(memory(7)), true) };
    let to = FakeMachine::new(Some(memory(0)), false);
    let (sent, _) = migrate(&from, &to, (&FakeDevice::new(), &FakeDevice::new()), 64 << 20);
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes));
    assert!(text(sent.error.as_ref()).contains("airlift/"), "{}", text(sent.error.as_ref()));
}

#[test]
fn the_vmms_own_transfer_is_waited_for_in_slices() {
    let from = FakeMachine { slices: 3, ..FakeMachine::new(None, true) };
    let to = FakeMachine::new(None, false);
    let (sent, _) = migrate(&from, &to, (&FakeDevice::new(), &FakeDevice::new()), 64 << 20);
    assert_eq!(sent.outcome, Outcome::Completed, "{}", text(sent.error.as_ref()));
    assert_eq!(from.calls().iter().filter(|call| **call == "external_memory_barrier").count(), 4);
    assert!(*from.slice.lock().unwrap() <= Duration::from_millis(100));
}

#[test]
fn a_device_whose_size_is_not_known_before_the_stop_is_migrated_and_named() {
    let (from, to) = (FakeMachine::new(None, true), FakeMachine::new(None, false));
    let (mut here, mut there) = (FakeDevice::new(), FakeDevice::new());
    (here.flags, there.flags, here.stop_copy_size) = (3, 3, None);
    let (sent, _) = migrate(&from, &to, (&here, &there), 64 << 20);
    assert_eq!(sent.outcome, Outcome::Completed, "{}", text(sent.error.as_ref()));
    assert!(sent.notes.iter().any(|n| n.contains("nic0: its size cannot be told")), "{:?}", sent.notes);
}

#[test]
fn a_device_is_migrated_when_nothing_can_be_measured_before_the_stop() {
    let (from, to) = (FakeMachine::new(None, true), FakeMachine::new(None, false));
    let (mut here, mut there) = (FakeDevice::new(), FakeDevice::new());
    (here.flags, there.flags) = (3, 3);
    let (sent, _) = migrate(&from, &to, (&here, &there), 64 << 20);
    assert_eq!(sent.outcome, Outcome::Completed, "{}", text(sent.error.as_ref()));
    assert!(sent.notes.iter().any(|n| n.contains("the bandwidth is not known")), "{:?}", sent.notes);
}

/// A destination that speaks in raw frames.
struct Peer {
    door: Door,
    control: UnixStream,
    sequence: u64,
}

impl Peer {
    /// Answers HELLO, hears ACCEPT, and takes the data connection.
    fn negotiate(door: Door) -> (Self, UnixStream) {
        let control = door.0.recv_timeout(LONG).unwrap();
        let mut peer = Self { door, control, sequence: 0 };
        let Message::Hello(hello) = peer.hear() else { panic!("no HELLO") };
        peer.say(&Message::Report(Box::new(Report {
            version: hello.versions[0],
            report: airlift::core::compare(&hello.offer, &hello.offer),
            limits: OfferLimits { receive_budget: 1 << 20, frame_payload: 1 << 18, channels: 1 },
            features: Vec::new(),
            tokens: vec![Token(1)],
            device_credits: vec![2; hello.offer.devices.len()],
        })))
        .unwrap();
        assert!(matches!(peer.hear(), Message::Accept(_)));
        let data = peer.door.0.recv_timeout(LONG).unwrap();
        (peer, data)
    }

    fn hear(&mut self) -> Message {
        let mut head = [0; HEADER_LEN];
        self.control.read_exact(&mut head).unwrap();
        let header = FrameHeader::decode(&head, Limits::default()).unwrap();
        let mut payload = vec![0; header.length as usize];
        self.control.read_exact(&mut payload).unwrap();
        Message::decode(&header, &payload).unwrap()
    }

    fn say(&mut self, message: &Message) -> std::io::Result<()> {
        self.sequence += 1;
        self.control.write_all(&message.encode(self.sequence - 1).unwrap())
    }
}

#[test]
fn a_flood_of_messages_ends_the_session_instead_of_filling_memory() {
    let (go, hold) = bounded(1);
    let from = FakeMachine { hold: Some(hold), ..FakeMachine::new(Some(memory(7)), true) };
    let (dial, door) = network();
    let device = FakeDevice::new();
    let source = source(&from, &device, dial, options());
    let source = std::thread::spawn(move || source.run());
    let (mut peer, _data) = Peer::negotiate(door);
    from.wait_for("start_dirty");
    // The session's thread is in the machine and reads nothing. What it would have to keep is bounded,
    // so that the connection is ended long before all of this has been taken.
    const MANY: usize = 1_000_000;
    let taken =
        (0..MANY).take_while(|_| peer.say(&Message::InitAck { device: 0, generation: 1 }).is_ok()).count();
    go.send(()).unwrap();
    let ended = source.join().unwrap();
    assert!(taken < MANY, "all {MANY} messages were taken");
    assert_eq!((ended.report.outcome, ended.report.source_running), (Outcome::Aborted, Running::Yes));
    let text = text(ended.report.error.as_ref());
    assert!(text.contains("W-INBOX") && text.contains("protocol"), "{text}");
}

#[test]
fn an_acknowledgement_of_data_that_was_not_announced_ends_the_session() {
    let from = FakeMachine::new(Some(memory(7)), true);
    let (dial, door) = network();
    let device = FakeDevice::new();
    let source = source(&from, &device, dial, options());
    let source = std::thread::spawn(move || source.run());
    let (mut peer, mut data) = Peer::negotiate(door);
    // Memory comes in pre-copy.
    let mut first = vec![0; 16 << 10];
    data.read_exact(&mut first).unwrap();
    // Somebody must take the rest, or nothing moves.
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while data.read(&mut bytes).is_ok_and(|n| n > 0) {}
    });
    peer.say(&Message::InitAck { device: 0, generation: 99 }).unwrap();
    let ended = source.join().unwrap();
    reader.join().unwrap();
    assert_eq!((ended.report.outcome, ended.report.source_running), (Outcome::Aborted, Running::Yes));
    let error = ended.report.error.as_ref().unwrap();
    assert_eq!(error.phase, Phase::Precopy);
    assert!(text(Some(error)).contains("broke the protocol"), "{}", text(Some(error)));
}

// W-ROUND
#[test]
fn the_guest_is_not_stopped_for_memory_that_the_destination_has_not_written() {
    let from = FakeMachine::new(Some(memory(7)), true);
    let (dial, door) = network();
    let device = FakeDevice::new();
    let brief = Deadlines { precopy: LONG, stop_copy: Duration::from_millis(300), ..Deadlines::default() };
    let source = source(&from, &device, dial, SourceOptions { deadlines: brief, ..options() });
    let source = std::thread::spawn(move || source.run());
    let (_peer, mut data) = Peer::negotiate(door);
    // Takes everything, as sockets on the way would, and never says that it is written.
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while data.read(&mut bytes).is_ok_and(|n| n > 0) {}
    });
    let ended = source.join().unwrap();
    reader.join().unwrap();
    assert_eq!((ended.report.outcome, ended.report.source_running), (Outcome::Aborted, Running::Yes));
    let text = text(ended.report.error.as_ref());
    assert!(text.contains("has not written the memory of round 0"), "{text}");
    assert!(!from.calls().contains(&"pause"), "{:?}", from.calls());
}

/// Options with which a destination that takes a byte now and then is never taken as gone.
fn patient() -> SourceOptions {
    let deadlines = Deadlines { silence: LONG * 10, ..options().deadlines };
    SourceOptions { deadlines, downtime_limit: LONG, ..options() }
}

/// Takes a byte now and then, until the test is over. Returns when it has gone on for a while: all that
/// finds a place has found it then.
fn trickle(mut data: UnixStream) -> (Sender<()>, JoinHandle<()>) {
    let (over, going) = bounded(0);
    let (taken, bytes) = unbounded();
    let reader = std::thread::spawn(move || {
        while going.recv_timeout(Duration::from_millis(5)) == Err(RecvTimeoutError::Timeout)
            && data.read(&mut [0]).is_ok_and(|n| n > 0)
        {
            // The test looks at the first ones alone.
            let _ = taken.send(());
        }
    });
    for _ in 0..40 {
        bytes.recv_timeout(LONG).unwrap();
    }
    (over, reader)
}

/// Cancels, and looks at where that has led. A source that is deaf does not end in time.
fn cancel(control: &airlift::Control, ended: &Receiver<Ended>, device: &FakeDevice) {
    assert_eq!(control.cancel(), CancelAnswer::Accepted);
    let report = ended.recv_timeout(LONG).expect("the source is deaf to the cancel").report;
    assert_eq!((report.outcome, report.source_running), (Outcome::Cancelled, Running::Yes));
    assert_eq!(report.devices[0].quarantined, None);
    assert_eq!(device.state_now(), airlift::core::DeviceState::Running);
}

fn on_a_thread(source: Source) -> Receiver<Ended> {
    let (done, ended) = unbounded();
    std::thread::spawn(move || done.send(source.run()));
    ended
}

// I16, I17
#[test]
fn a_cancel_is_heard_while_the_destination_takes_the_end_of_a_round_at_a_trickle() {
    let from = FakeMachine::new(Some(memory(7)), true);
    let (dial, door) = network();
    let mut device = FakeDevice::new();
    device.flags = 3;
    let source = source(&from, &device, dial, patient());
    let control = source.control();
    let ended = on_a_thread(source);
    let (_peer, mut data) = Peer::negotiate(door);
    // What is left is more than the socket takes, and less than socket and queue: the sweep ends, and
    // the end of its round finds no place.
    let mut most = vec![0; (4 << 20) - 750_000];
    data.read_exact(&mut most).unwrap();
    let until = Instant::now() + LONG;
    while control.progress().memory_sent < 4 << 20 {
        assert!(Instant::now() < until, "the sweep does not end: {:?}", control.progress());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (over, reader) = trickle(data);
    cancel(&control, &ended, &device);
    drop(over);
    reader.join().unwrap();
}

// I16, I17
#[test]
fn a_cancel_is_heard_while_the_destination_takes_records_at_a_trickle() {
    let record =
        |n| MachineRecord { owner: RecordOwner::Machine, name: format!("vcpu{n}"), data: vec![5; 900_000] };
    let from = FakeMachine { records: (0..8).map(record).collect(), ..FakeMachine::new(None, true) };
    let (dial, door) = network();
    let mut device = FakeDevice::new();
    device.flags = 3;
    let source = source(&from, &device, dial, patient());
    let control = source.control();
    let ended = on_a_thread(source);
    let (_peer, mut data) = Peer::negotiate(door);
    // The first record has been taken, and there are more than find a place.
    data.read_exact(&mut vec![0; 1_000_000]).unwrap();
    let (over, reader) = trickle(data);
    cancel(&control, &ended, &device);
    drop(over);
    reader.join().unwrap();
    assert!(from.place("release_shared") < from.place("reclaim_shared"), "{:?}", from.calls());
}

#[test]
fn a_read_that_fails_after_the_stop_ends_the_machines_part_of_the_downtime() {
    let mut text_of_last = String::new();
    // The device's word and the machine's next step race; the word wins unless this host is very busy.
    for _ in 0..10 {
        let tried = Arc::new(AtomicBool::new(false));
        let from = FakeMachine { until: Some(Arc::clone(&tried)), ..FakeMachine::new(Some(memory(7)), true) };
        let to = FakeMachine::new(Some(memory(0)), false);
        let mut device = FakeDevice::new();
        device.broken = Some(tried);
        let (sent, _) = migrate(&from, &to, (&device, &FakeDevice::new()), 64 << 20);
        text_of_last = text(sent.error.as_ref());
        assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes));
        assert!(text_of_last.contains("broken by the test"), "{text_of_last}");
        if !from.calls().contains(&"release_shared") {
            return;
        }
    }
    panic!("the machine went on: {text_of_last}");
}

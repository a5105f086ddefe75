//! A set of devices by itself: what a stuck, a failing and a lost device do to the others.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift::core::{
    Capabilities, Chunk, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Errno, Fate,
    Interrupter, LoadSession, MigrationDevice, PeerDma, Piece, PrecopyInfo, ResetPolicy, SaveSession,
    Session, Side, TransitionError,
};
use airlift::set::{ChunkSink, Quiesce, SetError, SetEvent, SinkClosed, StreamFault};
use airlift::{DeviceSet, Environment};
use airlift_stream::FrameBuf;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);

/// A device without hardware. Clones share it, so that a test can look at it from outside.
#[derive(Clone)]
struct Fake {
    id: DeviceId,
    identity: DeviceIdentity,
    core: Arc<Mutex<Core>>,
    /// The arc into this state waits until the test lets it go.
    stuck: Option<(DeviceState, Receiver<()>)>,
    /// Bytes that STOP_COPY gives; each read waits for a word of the test where there is one.
    bytes: usize,
    /// What it says to have, in PRE_COPY and for STOP_COPY.
    says: u64,
    pace: Option<Receiver<()>>,
    broken_read: bool,
    /// The arc into this state fails and leaves it in ERROR.
    breaks_at: Option<DeviceState>,
    refuses_reset: bool,
}

struct Core {
    state: DeviceState,
    arcs: Vec<DeviceState>,
    readable: bool,
}

impl Fake {
    fn new(id: &str) -> Self {
        Self {
            id: DeviceId::new(id).unwrap(),
            identity: DeviceIdentity::default(),
            core: Arc::new(Mutex::new(Core {
                state: DeviceState::Running,
                arcs: Vec::new(),
                readable: true,
            })),
            stuck: None,
            bytes: 1000,
            says: 1000,
            pace: None,
            broken_read: false,
            breaks_at: None,
            refuses_reset: false,
        }
    }

    fn state_now(&self) -> DeviceState {
        self.core.lock().unwrap().state
    }
}

impl MigrationDevice for Fake {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::v2(7).unwrap()
    }

    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        let core = self.core.lock().unwrap();
        if core.readable {
            Ok(core.state)
        } else {
            Err(DeviceError::new(DeviceErrorKind::Lost, "GET MIG_DEVICE_STATE", "gone"))
        }
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        if let Some((_, gate)) = self.stuck.as_ref().filter(|(state, _)| *state == target) {
            let _ = gate.recv();
        }
        let mut core = self.core.lock().unwrap();
        let from = core.state;
        if self.breaks_at == Some(target) {
            core.state = DeviceState::Error;
            let error = DeviceError::refused("SET MIG_DEVICE_STATE", Errno::EIO);
            return Err(TransitionError { from, to: target, reached: Ok(core.state), error });
        }
        core.state = target;
        core.arcs.push(target);
        let opens = !from.is_saving() && target.is_saving();
        Ok(if opens {
            Some(Session::Save(Box::new(Reader { device: self.clone(), left: 10, read: 0 })))
        } else if target == DeviceState::Resuming {
            Some(Session::Load(Box::new(Nowhere)))
        } else {
            None
        })
    }

    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(self.says))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        if self.refuses_reset {
            return Err(DeviceError::refused("VFIO_DEVICE_RESET", Errno::EIO));
        }
        self.core.lock().unwrap().state = DeviceState::Running;
        Ok(())
    }

    fn interrupter(&self) -> Interrupter {
        Interrupter::unable()
    }
}

struct Reader {
    device: Fake,
    left: usize,
    read: usize,
}

impl SaveSession for Reader {
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let initial_bytes = self.left as u64;
        Ok(Some(PrecopyInfo { initial_bytes, dirty_bytes: self.device.says, ..PrecopyInfo::default() }))
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError> {
        if self.device.state_now() != DeviceState::StopCopy {
            let len = std::mem::take(&mut self.left);
            return Ok(if len == 0 { Piece::Drained } else { Piece::Data { len, chunk: Chunk::Stream } });
        }
        if self.device.broken_read {
            return Err(DeviceError::new(DeviceErrorKind::Lost, "read", "broken"));
        }
        if let Some(pace) = &self.device.pace {
            let _ = pace.recv();
        }
        let len = buf.len().min(100).min(self.device.bytes - self.read);
        self.read += len;
        Ok(if len == 0 { Piece::End } else { Piece::Data { len, chunk: Chunk::Stream } })
    }
}

struct Nowhere;

impl LoadSession for Nowhere {
    fn begin_chunk(&mut self, _total: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn write(&mut self, _data: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Takes every frame and keeps none.
struct Drop(Sender<u32>);

impl ChunkSink for Drop {
    fn buffer(&self, _device: u32, _wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        Ok(Some(FrameBuf::new(4096)))
    }
    fn send(&self, device: u32, _frame: FrameBuf) -> Result<(), SinkClosed> {
        self.0.send(device).map_err(|_| SinkClosed)
    }
}

fn sink() -> (Arc<dyn ChunkSink>, Receiver<u32>) {
    let (sent, frames) = unbounded();
    (Arc::new(Drop(sent)), frames)
}

fn set(devices: &[&Fake]) -> DeviceSet {
    let devices = devices.iter().map(|d| Box::new((*d).clone()) as Box<dyn MigrationDevice>).collect();
    DeviceSet::new(devices, Side::Source, Environment::default()).unwrap()
}

/// Takes the first frames of each device, and lets whoever brings another wait until it is closed.
struct Stuffed {
    /// Frames that are taken of each device.
    room: usize,
    /// Frames that were taken, by device.
    taken: Mutex<BTreeMap<u32, usize>>,
    /// Says that somebody waits.
    waits: Sender<()>,
    gate: Receiver<()>,
    /// Its end opens the gate.
    shut: Mutex<Option<Sender<()>>>,
}

impl Stuffed {
    fn with_room(room: usize) -> (Arc<dyn ChunkSink>, Receiver<()>) {
        let (waits, waiting) = unbounded();
        let (shut, gate) = bounded(0);
        (Arc::new(Self { room, taken: Mutex::default(), waits, gate, shut: Mutex::new(Some(shut)) }), waiting)
    }
}

impl ChunkSink for Stuffed {
    fn buffer(&self, _device: u32, _wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        Ok(Some(FrameBuf::new(4096)))
    }
    fn send(&self, device: u32, _frame: FrameBuf) -> Result<(), SinkClosed> {
        let mut taken = self.taken.lock().unwrap();
        let own = taken.entry(device).or_default();
        if *own < self.room {
            *own += 1;
            return Ok(());
        }
        drop(taken);
        self.waits.send(()).unwrap();
        let _ = self.gate.recv();
        Err(SinkClosed)
    }
    fn close(&self) {
        *self.shut.lock().unwrap() = None;
    }
}

/// Every device answers, runs, and was not given up.
fn assert_healthy(set: &mut DeviceSet, devices: &[&Fake]) {
    for (id, state) in set.states(LONG) {
        assert_eq!(state, Ok(DeviceState::Running), "{id}");
    }
    for report in set.reports() {
        assert_eq!(report.quarantined, None, "{}", report.id);
    }
    assert!(devices.iter().all(|device| device.state_now() == DeviceState::Running));
}

fn assert_timed_out(error: &SetError, on: &str) {
    match error {
        SetError::Device { device, fault: StreamFault::Device(error) } => {
            assert_eq!((device.as_str(), &error.kind), (on, &DeviceErrorKind::TimedOut), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

// I2
#[test]
fn a_destination_that_takes_nothing_costs_no_device_at_the_stop() {
    let (a, b) = (Fake::new("a"), Fake::new("b"));
    for devices in [&[&a][..], &[&a, &b]] {
        // The beginnings of the streams are taken, the devices' data is not.
        let (sink, waiting) = Stuffed::with_room(1);
        let saving = set(devices).start_saving(&sink, LONG).unwrap();
        for _ in devices {
            waiting.recv_timeout(LONG).unwrap();
        }
        let failed = saving.quiesce(Quiesce::default(), Duration::from_millis(200)).unwrap_err();
        assert_timed_out(&failed.error, "a");
        let mut back = failed.roll_back(ResetPolicy::Never, LONG);
        assert!(back.fates.iter().all(|end| end.fate == Fate::Running), "{:?}", back.fates);
        assert_healthy(&mut back.set, devices);
        assert!(
            devices.iter().all(|device| !device.core.lock().unwrap().arcs.contains(&DeviceState::StopCopy))
        );
    }
}

// I2
#[test]
fn a_destination_that_takes_nothing_costs_no_device_at_the_start() {
    let a = Fake::new("a");
    let (sink, _waiting) = Stuffed::with_room(0);
    let failed = set(&[&a]).start_saving(&sink, Duration::from_millis(200)).unwrap_err();
    assert_timed_out(&failed.error, "a");
    let mut back = failed.roll_back(ResetPolicy::Never, LONG);
    assert_healthy(&mut back.set, &[&a]);
}

// I2
#[test]
fn a_rollback_waits_in_no_sink() {
    let a = Fake::new("a");
    let (sink, waiting) = Stuffed::with_room(1);
    let saving = set(&[&a]).start_saving(&sink, LONG).unwrap();
    waiting.recv_timeout(LONG).unwrap();
    // Nobody has closed the sink.
    let mut back = saving.roll_back(ResetPolicy::Never, Duration::from_millis(200));
    assert_eq!(back.fates[0].fate, Fate::Running);
    assert_healthy(&mut back.set, &[&a]);
}

#[test]
fn a_step_that_has_nothing_to_do_gives_no_device_up() {
    let a = Fake::new("a");
    a.core.lock().unwrap().state = DeviceState::Stop;
    let mut set = set(&[&a]);
    for _ in 0..100 {
        set.pause(PeerDma::Possible, LONG).unwrap();
    }
    assert_eq!(set.reports()[0].quarantined, None);
}

#[test]
fn a_read_that_fails_after_the_stop_is_told_before_anybody_asks_for_the_end() {
    let mut broken = Fake::new("broken");
    broken.broken_read = true;
    let (sink, _frames) = sink();
    let saving = set(&[&broken]).start_saving(&sink, LONG).unwrap();
    let (stopped, _) = saving.quiesce(Quiesce::default(), LONG).unwrap();
    match stopped.events().recv_timeout(LONG) {
        Ok(SetEvent::Failed { device: 0, error: StreamFault::Device(error) }) => {
            assert_eq!(error.kind, DeviceErrorKind::Lost);
        }
        other => panic!("{other:?}"),
    }
    // It is told again to whoever does.
    let mut draining = stopped.drain(vec![None]);
    assert!(matches!(draining.poll(LONG), Err(SetError::Device { .. })));
}

// V2-ESTIMATE
#[test]
fn a_device_that_misjudges_what_it_has_is_read_to_its_end_all_the_same() {
    for says in [0, 1, 999, 1001, u64::MAX] {
        let mut device = Fake::new("a");
        device.says = says;
        let (sink, _frames) = sink();
        let saving = set(&[&device]).start_saving(&sink, LONG).unwrap();
        let (stopped, _) = saving.quiesce(Quiesce::default(), LONG).unwrap();
        let mut draining = stopped.drain(vec![None]);
        assert!(draining.poll(LONG).unwrap(), "{says}");
        let drained = draining.finish().unwrap();
        assert_eq!(drained.reports()[0].stop_copy_bytes, 1000, "{says}");
    }
}

#[test]
fn a_set_that_was_rolled_back_can_be_migrated_again() {
    let (a, b) = (Fake::new("a"), Fake::new("b"));
    let mut devices = set(&[&a, &b]);
    for attempt in 1..=3 {
        let (sink, frames) = sink();
        let saving = devices.start_saving(&sink, LONG).unwrap();
        let until = Instant::now() + LONG;
        // Initial data is closed in every attempt, not only in the first.
        while saving.status().iter().any(|s| s.sent_generation < s.generation) {
            assert!(Instant::now() < until, "attempt {attempt}: {:?}", saving.status());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(frames.try_iter().count() >= 4);
        devices = saving.roll_back(ResetPolicy::Never, LONG).set;
        assert_eq!((a.state_now(), b.state_now()), (DeviceState::Running, DeviceState::Running));
    }
}

#[test]
fn a_device_that_is_lost_at_the_start_does_not_stop_the_others() {
    let (a, b) = (Fake::new("a"), Fake::new("b"));
    a.core.lock().unwrap().readable = false;
    let failed = set(&[&a, &b]).start_saving(&sink().0, LONG).unwrap_err();
    let back = failed.roll_back(ResetPolicy::Never, LONG);
    assert!(matches!(back.fates[0].fate, Fate::Quarantined { .. }));
    assert_eq!(back.fates[1].fate, Fate::Running);
    assert_eq!(b.core.lock().unwrap().arcs, [], "a device that nobody touched was walked");
}

#[test]
fn a_stuck_device_is_given_up_by_name_and_makes_no_further_arc() {
    let (release, gate) = bounded(1);
    let good = Fake::new("good");
    let mut stuck = Fake::new("stuck");
    stuck.stuck = Some((DeviceState::PreCopyP2p, gate));
    let (sink, _frames) = sink();
    let saving = set(&[&good, &stuck]).start_saving(&sink, LONG).unwrap();
    let short = Duration::from_millis(200);
    let failed = saving.quiesce(Quiesce::default(), short).unwrap_err();
    assert!(matches!(&failed.error, SetError::Device { device, .. } if device.as_str() == "stuck"));
    let mut back = failed.roll_back(ResetPolicy::Never, short);
    assert_eq!(back.fates[0].fate, Fate::Running);
    assert_eq!(good.state_now(), DeviceState::Running);
    // It was never said to be reset: it does not answer, and may still do what it was asked.
    let refused = back.set.reset(short);
    assert!(
        refused.iter().any(|(id, error)| id.as_str() == "stuck" && error.kind == DeviceErrorKind::TimedOut)
    );
    release.send(()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let arcs = stuck.core.lock().unwrap().arcs.clone();
    assert_eq!(arcs, [DeviceState::PreCopy, DeviceState::PreCopyP2p], "it went on after it was given up");
}

// V1-RESET, V2-STALE
#[test]
fn a_device_that_has_reset_itself_after_the_stop_is_not_taken_for_one_that_came_back() {
    let (good, forgetful) = (Fake::new("good"), Fake::new("forgetful"));
    let (sink, _frames) = sink();
    let saving = set(&[&good, &forgetful]).start_saving(&sink, LONG).unwrap();
    let (stopped, _) = saving.quiesce(Quiesce::default(), LONG).unwrap();
    forgetful.core.lock().unwrap().state = DeviceState::Running;
    let back = stopped.roll_back(ResetPolicy::Never, LONG);
    assert!(back.fates.iter().all(|end| end.fate == Fate::Running), "{:?}", back.fates);
    // The machine is told by this, and the report says it.
    assert_eq!(back.fates.iter().map(|end| end.was_reset).collect::<Vec<_>>(), [false, true]);
    assert!(back.set.reports()[1].was_reset);
}

// I9
#[test]
fn a_device_that_can_neither_go_on_nor_be_reset_is_given_up_and_the_others_run() {
    let good = Fake::new("good");
    let mut broken = Fake::new("broken");
    broken.breaks_at = Some(DeviceState::StopCopy);
    broken.refuses_reset = true;
    let (sink, _frames) = sink();
    let saving = set(&[&good, &broken]).start_saving(&sink, LONG).unwrap();
    let failed = saving.quiesce(Quiesce::default(), LONG).unwrap_err();
    assert!(matches!(&failed.error, SetError::Device { device, .. } if device.as_str() == "broken"));
    let mut back = failed.roll_back(ResetPolicy::Allowed, LONG);
    assert_eq!((&back.fates[0].fate, good.state_now()), (&Fate::Running, DeviceState::Running));
    let Fate::Quarantined { reason } = &back.fates[1].fate else { panic!("{:?}", back.fates) };
    assert!(reason.contains("VFIO_DEVICE_RESET"), "{reason}");
    // Perhaps halfway: what the guest saw of it is lost in any case.
    assert!(back.fates[1].was_reset);
    assert!(back.set.reports()[1].quarantined.is_some());

    // And on the side that resets whatever it has loaded.
    let refused = back.set.reset(LONG);
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!((refused[0].0.as_str(), refused[0].1.errno), ("broken", Some(Errno::EIO)));
}

#[test]
fn a_failure_while_draining_is_seen_although_another_device_is_slow() {
    let (_never, pace) = bounded::<()>(0);
    let mut slow = Fake::new("slow");
    slow.pace = Some(pace);
    let mut broken = Fake::new("broken");
    broken.broken_read = true;
    let (sink, _frames) = sink();
    let saving = set(&[&slow, &broken]).start_saving(&sink, LONG).unwrap();
    let (stopped, _) =
        saving.quiesce(Quiesce { peer_dma: PeerDma::Possible, ..Quiesce::default() }, LONG).unwrap();
    let mut draining = stopped.drain(vec![None, None]);
    match draining.poll(LONG) {
        Err(SetError::Device { device, fault: StreamFault::Device(_) }) => {
            assert_eq!(device.as_str(), "broken");
        }
        other => panic!("{other:?}"),
    }
}

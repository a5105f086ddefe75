//! Fakes of everything that a session is given: a machine that notes how it is called, a device
//! without hardware, a journal in memory, and connections within the process.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod sides;
pub(crate) mod v1;

use airlift::core::commit::{Journal, JournalError, Record};
use airlift::core::{
    Capabilities, Chunk, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Gpa, GpaRange,
    Interrupter, Iova, IovaMap, IovaMapping, LoadSession, MemoryLayout, MemoryRegion, MigrationDevice, Piece,
    PrecopyInfo, SaveSession, Session, StateFormat, TransitionError,
};
use airlift::link::{Acceptor, Connector, LinkError, Stream};
use airlift::{Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt};
use airlift_memory::{Access, GuestMemory, GuestRegion, SharedMemory};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Nothing in these tests takes so long.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// A device without hardware. Clones share its state.
#[derive(Clone)]
pub(crate) struct FakeDevice {
    id: DeviceId,
    identity: DeviceIdentity,
    /// Raw capabilities of v2: 1 STOP_COPY, 2 P2P, 4 PRE_COPY.
    pub(crate) flags: u64,
    pub(crate) stop_copy_size: Option<u64>,
    /// What STOP_COPY gives.
    pub(crate) bytes: usize,
    /// STOP_COPY cannot be read; set when that was tried.
    pub(crate) broken: Option<Arc<AtomicBool>>,
    state: Arc<Mutex<DeviceState>>,
    pub(crate) loaded: Arc<Mutex<usize>>,
}

impl FakeDevice {
    pub(crate) fn new() -> Self {
        Self {
            id: DeviceId::new("nic0").unwrap(),
            identity: DeviceIdentity::default(),
            flags: 7,
            stop_copy_size: Some(1000),
            bytes: 1000,
            broken: None,
            state: Arc::new(Mutex::new(DeviceState::Running)),
            loaded: Arc::default(),
        }
    }

    pub(crate) fn state_now(&self) -> DeviceState {
        *self.state.lock().unwrap()
    }

    /// Declares the format of its state.
    pub(crate) fn format(&mut self, format: StateFormat) {
        self.identity.format = Some(format);
    }

    /// What a reset by somebody else leaves.
    pub(crate) fn reset_by_itself(&self) {
        *self.state.lock().unwrap() = DeviceState::Running;
    }
}

impl MigrationDevice for FakeDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::v2(self.flags).unwrap()
    }
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }
    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.state_now())
    }
    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        let from = std::mem::replace(&mut *self.state.lock().unwrap(), target);
        Ok(if !from.is_saving() && target.is_saving() {
            let precopy = if self.flags & 4 == 0 { 0 } else { 10 };
            Some(Session::Save(Box::new(Reader { device: self.clone(), precopy, read: 0 })))
        } else if target == DeviceState::Resuming {
            Some(Session::Load(Box::new(Writer(self.clone()))))
        } else {
            None
        })
    }
    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(self.stop_copy_size)
    }
    fn reset(&mut self) -> Result<(), DeviceError> {
        *self.state.lock().unwrap() = DeviceState::Running;
        Ok(())
    }
    fn interrupter(&self) -> Interrupter {
        Interrupter::unable()
    }
}

struct Reader {
    device: FakeDevice,
    precopy: usize,
    read: usize,
}

impl SaveSession for Reader {
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        Ok(Some(PrecopyInfo { initial_bytes: self.precopy as u64, ..PrecopyInfo::default() }))
    }
    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError> {
        if self.device.state_now() != DeviceState::StopCopy {
            let len = std::mem::take(&mut self.precopy);
            return Ok(if len == 0 { Piece::Drained } else { Piece::Data { len, chunk: Chunk::Stream } });
        }
        if let Some(tried) = &self.device.broken {
            tried.store(true, Ordering::SeqCst);
            return Err(DeviceError::new(DeviceErrorKind::Lost, "read", "broken by the test"));
        }
        let len = buf.len().min(self.device.bytes - self.read);
        self.read += len;
        Ok(if len == 0 { Piece::End } else { Piece::Data { len, chunk: Chunk::Stream } })
    }
}

struct Writer(FakeDevice);

impl LoadSession for Writer {
    fn begin_chunk(&mut self, _total: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        *self.0.loaded.lock().unwrap() += data.len();
        Ok(())
    }
    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A machine that does nothing and notes every call.
#[derive(Clone)]
pub(crate) struct FakeMachine {
    pub(crate) calls: Arc<Mutex<Vec<&'static str>>>,
    pub(crate) running: Arc<Mutex<bool>>,
    /// `None`: the VMM moves it.
    pub(crate) memory: Option<GuestMemory>,
    pub(crate) records: Vec<MachineRecord>,
    pub(crate) loaded: Arc<Mutex<Vec<MachineRecord>>>,
    /// This method fails.
    pub(crate) fails: Option<&'static str>,
    /// `start_dirty` waits for a word.
    pub(crate) hold: Option<Receiver<()>>,
    /// `save_records` waits until this is set.
    pub(crate) until: Option<Arc<AtomicBool>>,
    /// Calls of the barrier that end without the transfer being done.
    pub(crate) slices: usize,
    pub(crate) slice: Arc<Mutex<Duration>>,
}

/// Guest memory of 4 MiB, whose pages hold `seed` and their number.
pub(crate) fn memory(seed: u8) -> GuestMemory {
    let shared = SharedMemory::create("test", 4 << 20).unwrap();
    let mapping = shared.map(0, 4 << 20, Access::ReadWrite).unwrap();
    let memory = GuestMemory::new(vec![GuestRegion { gpa: 0, mapping }]).unwrap();
    if seed > 0 {
        for page in 0..1024_u64 {
            memory.write(page * 4096, &[seed, page.to_le_bytes()[0], page.to_le_bytes()[1]]).unwrap();
        }
    }
    memory
}

impl FakeMachine {
    pub(crate) fn new(memory: Option<GuestMemory>, running: bool) -> Self {
        Self {
            calls: Arc::default(),
            running: Arc::new(Mutex::new(running)),
            memory,
            records: Vec::new(),
            loaded: Arc::default(),
            fails: None,
            hold: None,
            until: None,
            slices: 0,
            slice: Arc::default(),
        }
    }

    pub(crate) fn calls(&self) -> Vec<&'static str> {
        self.calls.lock().unwrap().clone()
    }

    /// Where the first call of `name` is.
    pub(crate) fn place(&self, name: &str) -> usize {
        let calls = self.calls();
        calls.iter().position(|call| *call == name).unwrap_or_else(|| panic!("no {name} in {calls:?}"))
    }

    /// Waits until `name` has been called.
    pub(crate) fn wait_for(&self, name: &str) {
        let until = Instant::now() + LONG;
        while !self.calls().contains(&name) {
            assert!(Instant::now() < until, "{name} was never called: {:?}", self.calls());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn call(&self, name: &'static str) -> Result<(), MachineError> {
        self.calls.lock().unwrap().push(name);
        if self.fails == Some(name) { Err(MachineError::new(name, "refused by the test")) } else { Ok(()) }
    }
}

impl Machine for FakeMachine {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        self.call("blockers").map(|()| Vec::new())
    }
    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        let region = |m: &GuestMemory| MemoryRegion { id: 0, gpa: Gpa(0), size: m.total(), page_size: 4096 };
        let regions = self.memory.iter().map(region).collect();
        self.call("memory_layout").map(|()| MemoryLayout { generation: 0, regions })
    }
    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        self.call("memory")?;
        Ok(self.memory.clone().map_or(MachineMemory::External, MachineMemory::Engine))
    }
    fn iova_map(&mut self, _device: &DeviceId) -> Result<IovaMap, MachineError> {
        self.call("iova_map")?;
        // The device reaches the last page alone, so that most of memory comes to rest.
        let mapping =
            |m: &GuestMemory| IovaMapping { iova: Iova(0), gpa: Gpa(m.total() - 4096), length: 4096 };
        Ok(IovaMap::new(self.memory.iter().map(mapping).collect()))
    }
    fn start_dirty(&mut self) -> Result<(), MachineError> {
        let answer = self.call("start_dirty");
        if let Some(hold) = &self.hold {
            hold.recv_timeout(LONG).unwrap();
        }
        answer
    }
    fn sync_dirty(&mut self, _dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        self.call("sync_dirty")
    }
    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        self.call("stop_dirty")
    }
    fn pause(&mut self) -> Result<(), MachineError> {
        *self.running.lock().unwrap() = false;
        self.call("pause")
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        *self.running.lock().unwrap() = true;
        self.call("resume")
    }
    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.call("close_device_access")
    }
    fn open_device_access(&mut self) -> Result<(), MachineError> {
        self.call("open_device_access")
    }
    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        self.call("drain_interrupts").map(|()| Vec::new())
    }
    fn inject_interrupts(&mut self, _pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        self.call("inject_interrupts")
    }
    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        let deadline = Instant::now() + LONG;
        while self.until.as_ref().is_some_and(|seen| !seen.load(Ordering::SeqCst)) {
            assert!(Instant::now() < deadline, "what save_records waits for does not happen");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.call("save_records").map(|()| self.records.clone())
    }
    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        self.loaded.lock().unwrap().push(record.clone());
        self.call("load_record")
    }
    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.call("release_shared")
    }
    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        self.call("reclaim_shared")
    }
    fn device_was_reset(&mut self, _device: &DeviceId) -> Result<(), MachineError> {
        self.call("device_was_reset")
    }
    fn running(&mut self) -> Result<bool, MachineError> {
        self.call("running").map(|()| *self.running.lock().unwrap())
    }
    fn external_memory_barrier(&mut self, deadline: Duration) -> Result<(), MachineError> {
        self.call("external_memory_barrier")?;
        *self.slice.lock().unwrap() = deadline;
        if self.slices == 0 {
            return Ok(());
        }
        self.slices -= 1;
        let mut error = MachineError::new("external_memory_barrier", "not yet");
        error.errno = Some(airlift::core::Errno::ETIMEDOUT);
        Err(error)
    }
}

/// A journal that takes everything.
pub(crate) struct MemoryJournal;

impl Journal for MemoryJournal {
    fn append(&mut self, _record: &Record) -> Result<(), JournalError> {
        Ok(())
    }
}

/// Connects to whoever holds the other end.
pub(crate) struct Dial(Sender<UnixStream>);

/// Takes the connections of the other end.
pub(crate) struct Door(pub(crate) Receiver<UnixStream>);

/// Both ends.
pub(crate) fn network() -> (Dial, Door) {
    let (calls, door) = unbounded();
    (Dial(calls), Door(door))
}

impl Connector for Dial {
    fn connect(&mut self, _deadline: Duration) -> Result<Stream, LinkError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // Nobody is there any more: the connection is closed at once.
        let _ = self.0.send(theirs);
        Ok(ours.into())
    }
}

impl Acceptor for Door {
    fn accept(&mut self, deadline: Duration) -> Result<Option<Stream>, LinkError> {
        Ok(self.0.recv_timeout(deadline).ok().map(Stream::from))
    }
}

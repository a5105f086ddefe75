//! Two sides in one process: software devices over vfio-user, a machine that only writes down what
//! it is asked, and connections that a test can cut.

use airlift::core::commit::{Journal, JournalError, Record};
use airlift::core::{DeviceId, Gpa, GpaRange, Iova, IovaMap, IovaMapping, MemoryLayout, MemoryRegion};
use airlift::link::{Acceptor, Connector, LinkError, LinkOptions, Stream, Uri, UriAcceptor, UriConnector};
use airlift::vfio_user::{ClientOptions, Server, ServerOptions, VfioUserDevice};
use airlift::{
    Blocker, Control, Destination, DestinationOptions, Ended, Environment, Machine, MachineError,
    MachineMemory, MachineRecord, PendingInterrupt, Source, SourceDevice, SourceOptions,
};
use airlift_memory::{Access, GuestMemory, GuestRegion, SharedMemory};
use airlift_softdevice::{SoftDevice, SoftDeviceOptions};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Long enough for every step on a loaded host; a test that reaches it has failed.
pub(crate) const GENEROUS: Duration = Duration::from_secs(60);

const MEMORY: u64 = 256 << 10;

/// Called with the name of each call of a machine.
type Hook = Box<dyn FnMut(&str) -> Result<(), MachineError> + Send>;

/// What both machines were asked, in order: `source pause`.
pub(crate) type Log = Arc<Mutex<Vec<String>>>;

/// A machine that writes down what it is asked.
pub(crate) struct Double {
    side: &'static str,
    log: Log,
    memory: GuestMemory,
    runs: bool,
    pub(crate) pending: Vec<PendingInterrupt>,
    pub(crate) hook: Hook,
}

impl Double {
    pub(crate) fn new(side: &'static str, log: &Log) -> Self {
        let file = SharedMemory::create("double", MEMORY).unwrap();
        let mapping = file.map(0, MEMORY, Access::ReadWrite).unwrap();
        let memory = GuestMemory::new(vec![GuestRegion { gpa: 0, mapping }]).unwrap();
        let runs = side == "source";
        Self { side, log: Arc::clone(log), memory, runs, pending: Vec::new(), hook: Box::new(|_| Ok(())) }
    }

    fn called(&mut self, call: &str) -> Result<(), MachineError> {
        self.log.lock().unwrap().push(format!("{} {call}", self.side));
        (self.hook)(call)
    }
}

impl Machine for Double {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        self.called("blockers").map(|()| Vec::new())
    }
    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        let region = MemoryRegion { id: 0, gpa: Gpa(0), size: MEMORY, page_size: 4096 };
        Ok(MemoryLayout { generation: 1, regions: vec![region] })
    }
    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        Ok(MachineMemory::Engine(self.memory.clone()))
    }
    fn iova_map(&mut self, _device: &DeviceId) -> Result<IovaMap, MachineError> {
        Ok(IovaMap::new(vec![IovaMapping { iova: Iova(0), gpa: Gpa(0), length: MEMORY }]))
    }
    fn start_dirty(&mut self) -> Result<(), MachineError> {
        self.called("start_dirty")
    }
    fn sync_dirty(&mut self, _dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        Ok(())
    }
    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        self.called("stop_dirty")
    }
    fn pause(&mut self) -> Result<(), MachineError> {
        self.called("pause")?;
        self.runs = false;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.called("resume")?;
        self.runs = true;
        Ok(())
    }
    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.called("close_device_access")
    }
    fn open_device_access(&mut self) -> Result<(), MachineError> {
        self.called("open_device_access")
    }
    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        Ok(self.pending.clone())
    }
    fn inject_interrupts(&mut self, _pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        self.called("inject_interrupts")
    }
    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        Ok(Vec::new())
    }
    fn load_record(&mut self, _record: &MachineRecord) -> Result<(), MachineError> {
        Ok(())
    }
    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.called("release_shared")
    }
    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        self.called("reclaim_shared")
    }
    fn device_was_reset(&mut self, _device: &DeviceId) -> Result<(), MachineError> {
        Ok(())
    }
    fn running(&mut self) -> Result<bool, MachineError> {
        Ok(self.runs)
    }
    fn external_memory_barrier(&mut self, _deadline: Duration) -> Result<(), MachineError> {
        unreachable!("the engine moves this machine's memory")
    }
}

/// A journal in memory.
pub(crate) struct Notes {
    pub(crate) records: Arc<Mutex<Vec<Record>>>,
    /// Called before each record is taken.
    pub(crate) hook: Box<dyn FnMut(&Record) + Send>,
}

impl Notes {
    fn new() -> Self {
        Self { records: Arc::default(), hook: Box::new(|_| ()) }
    }
}

impl Journal for Notes {
    fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        (self.hook)(record);
        self.records.lock().unwrap().push(record.clone());
        Ok(())
    }
}

/// The connections of the source, which a test can cut.
#[derive(Clone, Default)]
pub(crate) struct Wires {
    streams: Arc<Mutex<Vec<Stream>>>,
    closed: Arc<AtomicBool>,
}

impl Wires {
    /// Cuts all that there are.
    pub(crate) fn cut(&self) {
        self.streams.lock().unwrap().drain(..).for_each(|stream| stream.shutdown());
    }

    /// Cuts all that there are, and lets no new one be made.
    pub(crate) fn cut_for_good(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.cut();
    }
}

struct Tap(UriConnector, Wires);

impl Connector for Tap {
    fn connect(&mut self, deadline: Duration) -> Result<Stream, LinkError> {
        if self.1.closed.load(Ordering::SeqCst) {
            return Err(LinkError { operation: "connect".into(), message: "cut".into(), errno: None });
        }
        let stream = self.0.connect(deadline)?;
        self.1.streams.lock().unwrap().push(stream.try_clone()?);
        Ok(stream)
    }
}

struct Counted(UriAcceptor, Arc<AtomicUsize>);

impl Acceptor for Counted {
    fn accept(&mut self, deadline: Duration) -> Result<Option<Stream>, LinkError> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.accept(deadline)
    }
}

fn device(options: SoftDeviceOptions) -> VfioUserDevice {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = SoftDevice::new(options, |_event| ()).unwrap();
    let server = Server::new(Box::new(device), ServerOptions::default());
    std::thread::spawn(move || drop(server.serve_stream(theirs)));
    VfioUserDevice::from_stream(DeviceId::new("nic0").unwrap(), ours, ClientOptions::default()).unwrap()
}

/// A device of 1 MiB that can do everything.
pub(crate) fn small() -> SoftDeviceOptions {
    SoftDeviceOptions { state_size: 1 << 20, ..SoftDeviceOptions::default() }
}

/// Both sides of a migration before it begins; tests change what they are about.
pub(crate) struct Pair {
    pub(crate) log: Log,
    pub(crate) source: Double,
    pub(crate) destination: Double,
    pub(crate) source_journal: Notes,
    pub(crate) destination_journal: Notes,
    pub(crate) source_options: SourceOptions,
    pub(crate) destination_options: DestinationOptions,
    pub(crate) destination_device: SoftDeviceOptions,
    pub(crate) wires: Wires,
    /// How often the destination has looked for a connection.
    pub(crate) accepts: Arc<AtomicUsize>,
    /// Where it listens.
    pub(crate) path: PathBuf,
    dir: tempfile::TempDir,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let log = Log::default();
        let dir = tempfile::tempdir().unwrap();
        Self {
            source: Double::new("source", &log),
            destination: Double::new("destination", &log),
            log,
            source_journal: Notes::new(),
            destination_journal: Notes::new(),
            source_options: SourceOptions { downtime_limit: GENEROUS, ..SourceOptions::default() },
            destination_options: DestinationOptions::default(),
            destination_device: small(),
            wires: Wires::default(),
            accepts: Arc::default(),
            path: dir.path().join("link"),
            dir,
        }
    }

    /// Lets the destination listen.
    pub(crate) fn listen(self) -> Listening {
        let uri = Uri::Unix(self.path.clone());
        let acceptor = UriAcceptor::bind(&uri, LinkOptions::default()).unwrap();
        let destination = Destination::new(
            Box::new(self.destination),
            vec![Box::new(device(self.destination_device))],
            Box::new(Counted(acceptor, self.accepts)),
            Box::new(self.destination_journal),
            Environment::default(),
            self.destination_options,
        );
        let control = destination.control();
        let source = Source::new(
            Box::new(self.source),
            vec![SourceDevice { device: Box::new(device(small())), dirty: None }],
            Box::new(Tap(UriConnector::new(uri, LinkOptions::default()), self.wires)),
            Box::new(self.source_journal),
            Environment::default(),
            self.source_options,
        );
        let received = on_a_thread(|| destination.run());
        Listening { control, received, source, log: self.log, _dir: self.dir }
    }
}

/// Runs `run` on a thread of its own, so that a test that hangs fails instead.
fn on_a_thread(run: impl FnOnce() -> Ended + Send + 'static) -> Receiver<Ended> {
    let (sender, ended) = channel();
    std::thread::spawn(move || sender.send(run()));
    ended
}

/// A destination that listens, and the source that has not connected yet.
pub(crate) struct Listening {
    pub(crate) control: Control,
    pub(crate) received: Receiver<Ended>,
    source: Source,
    pub(crate) log: Log,
    _dir: tempfile::TempDir,
}

impl Listening {
    /// Runs the source. Gives the ends of source and destination.
    pub(crate) fn migrate(self) -> (Ended, Ended) {
        let source = self.source;
        let sent = on_a_thread(|| source.run());
        let sent = sent.recv_timeout(GENEROUS).expect("the source hangs");
        let received = self.received.recv_timeout(GENEROUS).expect("the destination hangs");
        (sent, received)
    }
}

/// Where `call` is in the log.
pub(crate) fn place(log: &Log, call: &str) -> Option<usize> {
    log.lock().unwrap().iter().position(|other| other == call)
}

/// Waits until `condition` holds.
pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + GENEROUS;
    while !condition() {
        assert!(Instant::now() < until, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

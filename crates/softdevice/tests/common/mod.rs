//! A host for one SoftDevice: a server on a socket, a client, guest memory, a driver of rings.
#![allow(dead_code, reason = "each test file uses a part of it")]

use airlift_core::{DeviceId, DeviceState, LoadSession, MigrationDevice, Piece, SaveSession, Session};
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_softdevice::registers as reg;
use airlift_softdevice::{SoftDevice, SoftDeviceOptions, SoftEvent, SoftMonitor};
use airlift_vfio_user::{Client, ClientOptions, Device, DmaAccess, Server, ServerOptions, VfioUserDevice};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Where guest memory is for devices.
pub(crate) const IOVA: u64 = 0x10_0000;
pub(crate) const MEMORY: u64 = 1 << 20;

pub(crate) struct Host {
    pub(crate) device: VfioUserDevice,
    pub(crate) client: Client,
    pub(crate) memory: SharedMemory,
    pub(crate) guest: Mapping,
    pub(crate) monitor: SoftMonitor,
    pub(crate) events: Receiver<SoftEvent>,
    pub(crate) irqs: Vec<OwnedFd>,
    server: Option<JoinHandle<Box<dyn Device>>>,
}

pub(crate) fn small(seed: u64) -> SoftDeviceOptions {
    SoftDeviceOptions { seed, state_size: 4 << 20, ..SoftDeviceOptions::default() }
}

/// Waits for a condition.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Host {
    pub(crate) fn new(options: SoftDeviceOptions) -> Self {
        let (tx, events) = channel();
        let device = SoftDevice::new(options, move |event| {
            let _ = tx.send(event);
        })
        .expect("a device");
        let monitor = device.monitor();
        let (ours, theirs) = UnixStream::pair().expect("a socketpair");
        let server = Server::new(Box::new(device), ServerOptions::default());
        let server = std::thread::spawn(move || server.serve_stream(theirs).expect("a server"));
        let client = Client::from_stream(ours, ClientOptions::default()).expect("a client");
        let id = DeviceId::new("soft").expect("an id");
        let device = VfioUserDevice::from_client(id, client.clone()).expect("a migratable device");
        let memory = SharedMemory::create("guest", MEMORY).expect("memory");
        let guest = memory.map(0, MEMORY, Access::ReadWrite).expect("a mapping");
        let host =
            Self { device, client, memory, guest, monitor, events, irqs: Vec::new(), server: Some(server) };
        host.map_guest();
        host
    }

    pub(crate) fn map_guest(&self) {
        let file = Some((self.memory.fd(), 0));
        self.client.dma_map(IOVA, MEMORY, DmaAccess::READ | DmaAccess::WRITE, file).expect("a DMA mapping");
    }

    pub(crate) fn wire(&mut self) {
        self.irqs = (0..8).map(|_| eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd")).collect();
        let fds: Vec<_> = self.irqs.iter().map(AsFd::as_fd).collect();
        self.client.set_irqs(2, 0, &fds).expect("interrupts");
    }

    /// Interrupts of a vector since the last call.
    pub(crate) fn interrupts(&self, vector: usize) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.irqs[vector], &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    pub(crate) fn get(&self, register: u64) -> u64 {
        let mut word = [0; 8];
        self.client.region_read(0, register, &mut word).expect("a register");
        u64::from_le_bytes(word)
    }

    pub(crate) fn set(&self, register: u64, value: u64) {
        self.client.region_write(0, register, &value.to_le_bytes()).expect("a register");
    }

    /// Sets up ring `ring` at `iova` and starts the device.
    pub(crate) fn start_ring(&self, ring: usize, iova: u64, entries: u64, rate: u64, kind: u64) {
        self.set(reg::ring_register(ring, reg::RING_IOVA), iova);
        self.set(reg::ring_register(ring, reg::RING_ENTRIES), entries);
        self.set(reg::ring_register(ring, reg::RING_RATE), rate);
        self.set(reg::ring_register(ring, reg::RING_KIND), kind);
        self.set(reg::ring_register(ring, reg::RING_ENABLE), 1);
        self.set(reg::CONTROL, reg::CONTROL_RUN);
    }

    pub(crate) fn produced(&self, ring: usize) -> u64 {
        self.get(reg::ring_register(ring, reg::RING_PRODUCED))
    }

    pub(crate) fn go(&mut self, state: DeviceState) -> Option<Session> {
        self.device.set_state(state).expect("a transition")
    }

    pub(crate) fn save_session(&mut self, state: DeviceState) -> Box<dyn SaveSession> {
        match self.go(state) {
            Some(Session::Save(session)) => session,
            other => panic!("no saving session but {other:?}"),
        }
    }

    pub(crate) fn load_session(&mut self) -> Box<dyn LoadSession> {
        match self.go(DeviceState::Resuming) {
            Some(Session::Load(session)) => session,
            other => panic!("no loading session but {other:?}"),
        }
    }

    /// Loads a stream and ends in STOP.
    pub(crate) fn load(&mut self, stream: &[u8]) {
        let mut session = self.load_session();
        for piece in stream.chunks(300_000) {
            session.write(piece).expect("a write");
        }
        drop(session);
        assert!(self.go(DeviceState::Stop).is_none());
    }

    /// What the next event of a kind says.
    pub(crate) fn event<T>(&self, mut wanted: impl FnMut(SoftEvent) -> Option<T>) -> T {
        let end = Instant::now() + DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if let Some(found) = wanted(self.events.recv_timeout(left).expect("an event")) {
                return found;
            }
        }
    }

    pub(crate) fn verified(&self) -> bool {
        self.event(|event| match event {
            SoftEvent::Loaded { verified, .. } => Some(verified),
            _ => None,
        })
    }

    pub(crate) fn bar2(&self) -> Mapping {
        let region = self.client.region_info(2).expect("BAR2");
        let file = SharedMemory::from_fd(region.fd.expect("a file behind BAR2"), region.size).expect("BAR2");
        file.map(0, region.size, Access::ReadWrite).expect("a mapping")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.client.shutdown();
        if let Some(server) = self.server.take() {
            let ended = server.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

/// Reads what there is now, in pieces of a size that fits nothing.
pub(crate) fn drain(session: &mut dyn SaveSession, end: bool) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut buf = vec![0; 77_777];
    loop {
        match session.read(&mut buf).expect("data") {
            Piece::Data { len, .. } => stream.extend_from_slice(&buf[..len]),
            Piece::Drained if !end => return stream,
            Piece::End if end => return stream,
            other => panic!("{other:?} after {} bytes", stream.len()),
        }
    }
}

/// The guest's driver of one ring: takes entries and insists on the sequence.
pub(crate) struct Ring {
    pub(crate) memory: Mapping,
    pub(crate) offset: u64,
    pub(crate) entries: u64,
    pub(crate) taken: u64,
}

impl Ring {
    pub(crate) fn new(memory: &Mapping, offset: u64, entries: u64) -> Self {
        Self { memory: memory.clone(), offset, entries, taken: 0 }
    }

    /// Takes at most `most` entries; how many there were.
    pub(crate) fn take(&mut self, most: u64) -> u64 {
        let before = self.taken;
        while self.taken < before.saturating_add(most) {
            let slot = self.offset + reg::RING_HEADER + self.taken % self.entries * 8;
            let value = self.memory.load_u64(slot).expect("a slot");
            if value != self.taken + 1 {
                let old = (self.taken + 1).saturating_sub(self.entries);
                assert_eq!(value, old, "entry {} holds neither itself nor what was before", self.taken);
                break;
            }
            self.taken += 1;
        }
        self.memory.store_u64(self.offset, self.taken).expect("the consumer index");
        self.taken - before
    }
}

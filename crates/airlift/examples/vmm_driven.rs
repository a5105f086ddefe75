//! A VMM that has its own memory migration, its own connection and its own commit: it drives the
//! devices through the phases with `DeviceSet`, which opens nothing and commits nothing.
//!
//! Here the VMM's connection is a channel and its memory path a copy; both sides run in one process.
//! Run it: `cargo run --release -p airlift --example vmm_driven`, with `-- --v1` for devices of interface v1.

mod support;

use airlift::core::{DeviceState, MigrationDevice, PeerDma, ResetPolicy, Side};
use airlift::set::{ChunkSink, Quiesce, SavingSet, SetEvent, SinkClosed};
use airlift::stream::{FrameBuf, FrameHeader, HEADER_LEN, Limits};
use airlift::vfio_user::{ClientOptions, MigrationInterface, V1Mapping, V1Section, VfioUserDevice};
use airlift::{DeviceSet, Environment, PooledBuf};
use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);
/// Frames of each device that may be on their way: the VMM's own flow control.
const ROOM: usize = 8;
/// Bytes of each device that the VMM lets move while its guest stands still.
const ENOUGH: u64 = 1 << 20;

/// The VMM's own connection. A channel that is full is what makes a device wait.
struct Wire(SyncSender<Vec<u8>>);

impl ChunkSink for Wire {
    fn buffer(&self, _device: u32, _wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        Ok(Some(FrameBuf::new(256 << 10)))
    }

    fn send(&self, _device: u32, frame: FrameBuf) -> Result<(), SinkClosed> {
        let bytes = frame.sealed().ok_or(SinkClosed)?.to_vec();
        self.0.send(bytes).map_err(|_| SinkClosed)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let v1 = std::env::args().any(|arg| arg == "--v1");
    let section = V1Section { size: 1 << 20, mapping: V1Mapping::Mapped, whole_transactions: false };
    let interface = if v1 { MigrationInterface::V1(section) } else { MigrationInterface::V2 };
    // No device of v1 has the P2P states, and devices that may write to each other cannot be stopped one
    // after the other without them: several are refused unless the VMM knows that they do not. Here no
    // guest has told them to. Wrongly declared, such writes are lost without a trace.
    let peer_dma = if v1 { PeerDma::AssumeNone } else { PeerDma::Possible };
    let (here, there) = (support::Host::new(2, &interface)?, support::Host::new(2, &interface)?);
    let (wire, arriving) = sync_channel(ROOM);
    let environment = Environment::default();
    let source = DeviceSet::new(devices(&here)?, Side::Source, environment.clone())?;
    let destination = std::thread::spawn({
        let set = DeviceSet::new(devices(&there)?, Side::Destination, environment)?;
        move || receive(set, &arriving, peer_dma).map_err(|e| e.to_string())
    });

    // Pre-copy: the devices' workers send by themselves until the VMM has seen enough.
    let sink: Arc<dyn ChunkSink> = Arc::new(Wire(wire));
    let mut saving = source.start_saving(&sink, PATIENCE).map_err(|failed| failed.error.clone())?;
    drop(sink);
    // Enough is when initial data has been sent and what is left fits the downtime. v1 knows no initial
    // data: there it is only what is left, as its pending_bytes says.
    until(&saving, |saving| {
        saving.status().iter().all(|s| s.sent_generation == s.generation && s.bytes_left() <= ENOUGH)
    })?;
    // The state of a v1 device is not changed in the middle of a transaction (V1-OUTSTANDING): those under
    // way end while the guest still runs, or else it waits for them in its downtime.
    saving.settle(PATIENCE)?;
    until(&saving, SavingSet::is_settled)?;

    // Downtime: the VMM pauses its vCPUs, then all devices stop, in P2P order where they have it.
    let how = Quiesce { peer_dma, ..Quiesce::default() };
    let (stopped, _late) = saving.quiesce(how, PATIENCE).map_err(|failed| failed.error.clone())?;
    // (the VMM saves its records and makes its final dirty sync here)
    let mut draining = stopped.drain(vec![None; 2]);
    while !draining.poll(Duration::from_secs(1))? {}
    let drained = draining.finish().map_err(|_| "a device still drains")?;
    let sent: Vec<_> = drained.totals().iter().map(|t| (t.bytes(), t.digest())).collect();

    // The VMM's own commit: it compares what arrived, then lets exactly one side run.
    match destination.join().map_err(|_| "the destination panicked")? {
        Ok((mut running, arrived)) if arrived == sent => {
            let (mut old, _errors) = drained.finish(PATIENCE);
            println!("moved (bytes, digest): {arrived:x?}");
            println!("source: {:?}", states(&mut old));
            println!("destination: {:?}", states(&mut running));
            Ok(())
        }
        other => {
            let back = drained.roll_back(ResetPolicy::Never, PATIENCE);
            println!("rolled back: {:?}", back.fates);
            Err(format!("the destination did not take it: {other:?}").into())
        }
    }
}

/// Waits until it is so. A failed device or the end of patience is where a VMM calls
/// [`SavingSet::roll_back`].
fn until(saving: &SavingSet, so: impl Fn(&SavingSet) -> bool) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + PATIENCE;
    while !so(saving) {
        if Instant::now() > deadline {
            return Err("pre-copy takes too long".into());
        }
        // (the VMM's own memory rounds go here)
        let event = saving.events().recv_timeout(Duration::from_millis(5));
        if let Ok(SetEvent::Failed { error, .. }) = event {
            return Err(error.into());
        }
    }
    Ok(())
}

type Arrived = (DeviceSet, Vec<(u64, u64)>);

/// The destination: frames are verified and fed; when all streams have ended the devices validate.
fn receive(
    set: DeviceSet,
    arriving: &Receiver<Vec<u8>>,
    peer_dma: PeerDma,
) -> Result<Arrived, Box<dyn Error>> {
    let loading = set.start_loading(2 * ROOM, PATIENCE).map_err(|failed| failed.error.clone())?;
    let mut arrived = vec![None; loading.ids().len()];
    while arrived.contains(&None) {
        if let Ok(bytes) = arriving.recv_timeout(Duration::from_millis(5)) {
            let (head, payload) =
                bytes.split_first_chunk::<HEADER_LEN>().ok_or("a frame without a header")?;
            let header = FrameHeader::decode(head, Limits::default())?;
            header.verify(payload)?;
            if !loading.feed(header, PooledBuf::from(payload.to_vec())) {
                return Err("a frame of an unknown device".into());
            }
        }
        while let Ok(event) = loading.events().try_recv() {
            match event {
                SetEvent::Ended { device, totals } => {
                    arrived[usize::try_from(device)?] = Some((totals.bytes(), totals.digest()));
                }
                SetEvent::Failed { error, .. } => return Err(error.into()),
                // (the VMM gives its own credit back at `Written`)
                SetEvent::Written { .. } | SetEvent::InitialData { .. } | SetEvent::Config { .. } => {}
            }
        }
    }
    let loaded = loading.finish(PATIENCE).map_err(|failed| failed.error.clone())?;
    // (the VMM's commit decides here; then devices start in P2P order, and after them the vCPUs)
    let running = loaded.run(peer_dma, PATIENCE).map_err(|failed| failed.error.clone())?;
    Ok((running, arrived.into_iter().flatten().collect()))
}

fn devices(host: &support::Host) -> Result<Vec<Box<dyn MigrationDevice>>, Box<dyn Error>> {
    let mut devices: Vec<Box<dyn MigrationDevice>> = Vec::new();
    for (name, socket) in host.sockets() {
        devices.push(Box::new(VfioUserDevice::connect(name, socket, ClientOptions::default())?));
    }
    Ok(devices)
}

fn states(set: &mut DeviceSet) -> Vec<Option<DeviceState>> {
    set.states(PATIENCE).into_iter().map(|(_, state)| state.ok()).collect()
}

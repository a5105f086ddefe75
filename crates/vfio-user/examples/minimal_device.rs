//! A whole migratable device: a counter of 64 bits in BAR 0 that writes its value to guest memory.
//!
//! ```text
//! cargo run -p airlift-vfio-user --example minimal_device -- /tmp/counter.sock [--v1]
//! ```
//!
//! Writing an address to offset 8 makes the device store the counter there by DMA, raise interrupt 0
//! of MSI-X, and count on. Its state, 8 bytes, moves while the device is stopped. With `--v1` the same
//! device is served over interface v1: only its description is another.

use airlift_core::{Arc as StateArc, DeviceState, Errno, MigrationFlags, PrecopyInfo, StateFormat};
use airlift_vfio_user::{
    Attachment, Description, Detach, Device, DmaChange, Done, IrqDescription, Loader, MigrationInterface,
    MigrationSupport, PciIds, RegionDescription, Saver, Server, ServerOptions, V1Mapping, V1Section,
};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

const MSIX: u32 = 2;

#[derive(Default)]
pub(crate) struct Counter {
    /// It is served over interface v1.
    v1: bool,
    shared: Arc<Shared>,
    client: Option<Attachment>,
    /// What a loader has taken; it becomes the value when RESUMING ends.
    incoming: Option<Receiver<Vec<u8>>>,
}

/// What a saver sees of the device, from its own thread.
#[derive(Default)]
struct Shared {
    value: AtomicU64,
    /// It is in STOP_COPY: the value stays as it is.
    stopped: AtomicBool,
}

impl Counter {
    pub(crate) fn new(v1: bool) -> Self {
        Self { v1, ..Self::default() }
    }

    /// Interface v1 demands PRE_COPY of every device, also of one that has nothing to give in it, and its
    /// data goes through a section of a region, of which clients may map what the device allows.
    fn interface(&self) -> (MigrationInterface, MigrationFlags) {
        if !self.v1 {
            return (MigrationInterface::V2, MigrationFlags::STOP_COPY);
        }
        let section = V1Section { size: 4096, mapping: V1Mapping::Mapped, whole_transactions: false };
        (MigrationInterface::V1(section), MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY)
    }
}

impl Device for Counter {
    fn describe(&self) -> Description {
        let bar = RegionDescription { index: 0, size: 4096, readable: true, writable: true, mapping: None };
        let (interface, flags) = self.interface();
        Description {
            regions: vec![bar],
            irqs: vec![IrqDescription { index: MSIX, count: 1, maskable: false }],
            pci: Some(PciIds {
                vendor: 0x1af4,
                device: 0x10f0,
                subsystem_vendor: 0x1af4,
                subsystem: 1,
                class: 0xff_00_00,
                revision: 1,
            }),
            migration: Some(MigrationSupport { interface, flags, dma_logging: true, reinit: false }),
            format: StateFormat {
                name: "example-counter".into(),
                version: 1,
                accepts: vec![1],
                interfaces: vec![],
            },
        }
    }

    fn attach(&mut self, attachment: Attachment) {
        self.client = Some(attachment);
    }

    fn detach(&mut self, _why: Detach) {
        self.client = None;
    }

    fn region_read(&mut self, _region: u32, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        if offset != 0 || buf.len() != 8 {
            return Err(Errno::EINVAL);
        }
        buf.copy_from_slice(&self.shared.value.load(Ordering::Relaxed).to_le_bytes());
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let address = data.try_into().map(u64::from_le_bytes).map_err(|_| Errno::EINVAL)?;
        let client = self.client.as_ref().filter(|_| offset == 8).ok_or(Errno::EINVAL)?;
        // The write marks its page in the client's dirty log by itself.
        client.dma.store_u64(address, self.shared.value.load(Ordering::Relaxed)).map_err(|e| e.errno())?;
        client.irqs.trigger(MSIX, 0)?;
        self.shared.value.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn dma_changed(&mut self, _change: DmaChange, done: Done) {
        // This device holds no memory between two writes, so there is nothing to let go of.
        done.ok();
    }

    fn reset(&mut self, done: Done) {
        self.shared.value.store(0, Ordering::Relaxed);
        self.shared.stopped.store(false, Ordering::Relaxed);
        done.ok();
    }

    fn transition(&mut self, arc: StateArc, done: Done) {
        if arc.from == DeviceState::Resuming {
            // The place to validate: what is refused here makes the migration go back.
            let taken: Vec<u8> = self.incoming.take().iter().flatten().flatten().collect();
            match <[u8; 8]>::try_from(taken) {
                Ok(bytes) => self.shared.value.store(u64::from_le_bytes(bytes), Ordering::Relaxed),
                Err(_) => return done.failed(Errno::EINVAL, DeviceState::Resuming),
            }
        }
        self.shared.stopped.store(arc.to == DeviceState::StopCopy, Ordering::Relaxed);
        done.ok();
    }

    fn saver(&mut self) -> Result<Box<dyn Saver>, Errno> {
        Ok(Box::new(Save { shared: Arc::clone(&self.shared), given: 0 }))
    }

    fn loader(&mut self) -> Result<Box<dyn Loader>, Errno> {
        let (sender, receiver) = channel();
        self.incoming = Some(receiver);
        Ok(Box::new(Load { left: 8, to: sender }))
    }
}

struct Save {
    shared: Arc<Shared>,
    /// Bytes of the state that were read.
    given: usize,
}

impl Saver for Save {
    fn precopy_info(&mut self) -> PrecopyInfo {
        // The guest may still count: nothing is worth sending before the stop.
        PrecopyInfo::default()
    }

    fn stop_copy_size(&mut self) -> u64 {
        8 - self.given as u64
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Errno> {
        if !self.shared.stopped.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let state = self.shared.value.load(Ordering::Relaxed).to_le_bytes();
        let left = &state[self.given..];
        let n = left.len().min(buf.len());
        buf[..n].copy_from_slice(&left[..n]);
        self.given += n;
        Ok(n)
    }
}

struct Load {
    left: usize,
    to: Sender<Vec<u8>>,
}

impl Loader for Load {
    fn write(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.left = self.left.checked_sub(data.len()).ok_or(Errno::ENOSPC)?;
        self.to.send(data.to_vec()).map_err(|_| Errno::EIO)
    }
}

fn main() -> std::io::Result<()> {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    let v1 = args.iter().position(|arg| arg == "--v1").map(|at| args.remove(at)).is_some();
    let [path] = args.as_slice() else {
        return Err(std::io::Error::other("usage: minimal_device SOCKET [--v1]"));
    };
    let server = Server::new(Box::new(Counter::new(v1)), ServerOptions::default());
    // A description that cannot be is an error here, before any client comes.
    server.serve(UnixListener::bind(path)?)?;
    Ok(())
}

//! A whole migratable device: a counter of 64 bits in BAR 0 that writes its value to guest memory.
//!
//! ```text
//! cargo run -p airlift-vfio-user --example minimal_device -- /tmp/counter.sock
//! ```
//!
//! Writing an address to offset 8 makes the device store the counter there by DMA, raise interrupt 0
//! of MSI-X, and count on. Its state, 8 bytes, moves while the device is stopped.

use airlift_core::{Arc as StateArc, DeviceState, Errno, MigrationFlags, PrecopyInfo, StateFormat};
use airlift_vfio_user::{
    Attachment, Description, Detach, Device, DmaChange, Done, IrqDescription, Loader, MigrationInterface,
    MigrationSupport, PciIds, RegionDescription, Saver, Server, ServerOptions,
};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, Sender, channel};

const MSIX: u32 = 2;

#[derive(Default)]
pub(crate) struct Counter {
    value: u64,
    client: Option<Attachment>,
    /// What a loader has taken; it becomes the value when RESUMING ends.
    incoming: Option<Receiver<Vec<u8>>>,
}

impl Device for Counter {
    fn describe(&self) -> Description {
        let bar = RegionDescription { index: 0, size: 4096, readable: true, writable: true, mapping: None };
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
            migration: Some(MigrationSupport {
                interface: MigrationInterface::V2,
                flags: MigrationFlags::STOP_COPY,
                dma_logging: true,
                reinit: false,
            }),
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
        buf.copy_from_slice(&self.value.to_le_bytes());
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let address = data.try_into().map(u64::from_le_bytes).map_err(|_| Errno::EINVAL)?;
        let client = self.client.as_ref().filter(|_| offset == 8).ok_or(Errno::EINVAL)?;
        // The write marks its page in the client's dirty log by itself.
        client.dma.store_u64(address, self.value).map_err(|e| e.errno())?;
        client.irqs.trigger(MSIX, 0)?;
        self.value += 1;
        Ok(())
    }

    fn dma_changed(&mut self, _change: DmaChange, done: Done) {
        // This device holds no memory between two writes, so there is nothing to let go of.
        done.ok();
    }

    fn reset(&mut self, done: Done) {
        self.value = 0;
        done.ok();
    }

    fn transition(&mut self, arc: StateArc, done: Done) {
        if arc.from == DeviceState::Resuming {
            // The place to validate: what is refused here makes the migration go back.
            let taken: Vec<u8> = self.incoming.take().iter().flatten().flatten().collect();
            match <[u8; 8]>::try_from(taken) {
                Ok(bytes) => self.value = u64::from_le_bytes(bytes),
                Err(_) => return done.failed(Errno::EINVAL, DeviceState::Resuming),
            }
        }
        done.ok();
    }

    fn saver(&mut self) -> Result<Box<dyn Saver>, Errno> {
        Ok(Box::new(Save(self.value.to_le_bytes().to_vec())))
    }

    fn loader(&mut self) -> Result<Box<dyn Loader>, Errno> {
        let (sender, receiver) = channel();
        self.incoming = Some(receiver);
        Ok(Box::new(Load { left: 8, to: sender }))
    }
}

struct Save(Vec<u8>);

impl Saver for Save {
    fn precopy_info(&mut self) -> PrecopyInfo {
        PrecopyInfo::default()
    }

    fn stop_copy_size(&mut self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Errno> {
        let n = self.0.len().min(buf.len());
        buf[..n].copy_from_slice(&self.0[..n]);
        self.0.drain(..n);
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
    let path =
        std::env::args_os().nth(1).ok_or_else(|| std::io::Error::other("usage: minimal_device SOCKET"))?;
    let server = Server::new(Box::new(Counter::default()), ServerOptions::default());
    server.serve(UnixListener::bind(path)?)?;
    Ok(())
}

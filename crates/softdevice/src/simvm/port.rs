//! The machine's connection to one device: its registers, BAR2, interrupts and DMA maps.

use super::config::{SimDevice, SimVmError};
use super::content::PAGE_BYTES;
use super::irq::{MSIX, Vectors};
use super::memory::VmMemory;
use super::shared::locked;
use crate::registers as reg;
use airlift_core::{DeviceError, DeviceErrorKind, DeviceId};
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_vfio_user::{Client, ClientOptions, DmaAccess};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::time::Duration;

const BAR0: u32 = 0;
const BAR2: u32 = 2;
/// How long a device may take to answer a register access. Below the time that a pause may take.
const ANSWER_TIME: Duration = Duration::from_secs(8);

/// One device of the machine.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) id: DeviceId,
    pub(super) vectors: Vectors,
    /// The guest's own view of BAR2.
    pub(super) bar2: Mapping,
    bar2_file: SharedMemory,
    bar2_offset: u64,
    client: Client,
    link: Mutex<Link>,
}

#[derive(Debug, Default)]
struct Link {
    /// Why the device is lost.
    lost: Option<String>,
    peer_mapped: bool,
}

impl Port {
    /// Connects to a device and gives it guest memory.
    pub(super) fn connect(device: &SimDevice, memory: &VmMemory) -> Result<Self, SimVmError> {
        let failed =
            |operation, message: String| SimVmError::Device { device: device.id.clone(), operation, message };
        let options = ClientOptions { message_timeout: ANSWER_TIME, ..ClientOptions::default() };
        let client =
            Client::connect(&device.socket, options).map_err(|e| failed("connect", e.to_string()))?;
        let magic = read_u64(&client, reg::MAGIC).map_err(|e| failed("read its registers", e.to_string()))?;
        if magic != reg::MAGIC_VALUE {
            return Err(failed("read its registers", format!("{magic:#x} is not a SoftDevice")));
        }
        let (bar2_file, bar2_offset, bar2) = map_bar2(&client).map_err(|why| failed("map BAR2", why))?;
        let count = client.irq_info(MSIX).map_err(|e| failed("interrupts", e.to_string()))?.count;
        let most = reg::MAX_VECTORS;
        if count == 0 || usize::try_from(count).is_ok_and(|count| count > most) {
            return Err(failed("interrupts", format!("{count} vectors, 1 to {most} can be used")));
        }
        let vectors = Vectors::new(count).map_err(|source| SimVmError::System { what: "eventfd", source })?;
        for (region, file) in memory.layout().regions.iter().zip(&memory.files) {
            let access = DmaAccess::READ | DmaAccess::WRITE;
            client
                .dma_map(region.gpa.0, region.size, access, Some((file.fd(), 0)))
                .map_err(|e| failed("map memory", e.to_string()))?;
        }
        let link = Mutex::default();
        Ok(Self { id: device.id.clone(), vectors, bar2, bar2_file, bar2_offset, client, link })
    }

    /// Does something with the device, if it is there. A connection that fails is a device that is
    /// lost; a request that the device refuses is not.
    fn with<T>(&self, ask: impl FnOnce(&Client) -> Result<T, DeviceError>) -> Result<T, String> {
        if let Some(why) = self.lost() {
            return Err(why);
        }
        ask(&self.client).map_err(|error| {
            let why = error.to_string();
            if matches!(error.kind, DeviceErrorKind::Lost | DeviceErrorKind::Protocol) {
                tracing::warn!(device = %self.id, %error, "the device is lost");
                locked(&self.link).lost.get_or_insert_with(|| why.clone());
            }
            why
        })
    }

    /// Why the device is lost, if it is.
    pub(super) fn lost(&self) -> Option<String> {
        locked(&self.link).lost.clone()
    }

    /// Reads a register; `None` when the device does not answer.
    pub(super) fn read(&self, offset: u64) -> Option<u64> {
        self.with(|client| read_u64(client, offset)).ok()
    }

    /// Interrupts raised of each vector, all at one moment.
    pub(super) fn raised(&self) -> Option<Vec<u64>> {
        let mut words = vec![0; self.vectors.count().min(reg::MAX_VECTORS) * 8];
        self.with(|client| client.region_read(BAR0, reg::RAISED_BASE, &mut words)).ok()?;
        Some(words.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Writes a register.
    pub(super) fn write(&self, offset: u64, value: u64) -> Result<(), String> {
        self.with(|client| client.region_write(BAR0, offset, &value.to_le_bytes()))
    }

    /// Returns when the device has had all writes that were posted to it.
    pub(super) fn flush(&self) {
        let _ = self.read(reg::MAGIC);
    }

    pub(super) fn reset(&self) -> Result<(), String> {
        self.with(Client::reset)
    }

    /// A connection for a migration of the device.
    pub(super) fn migration_socket(&self) -> Result<OwnedFd, String> {
        self.with(Client::migration_socket).map(OwnedFd::from)
    }

    /// Gives the device the eventfds of all its vectors.
    pub(super) fn wire_interrupts(&self) -> Result<(), String> {
        self.with(|client| {
            let fds: Vec<_> = self.vectors.fds().collect();
            client.set_irqs(MSIX, 0, &fds)
        })
    }

    /// Lets the device write BAR2 of `peer`, which the guest has mapped at `address`. Again is nothing.
    pub(super) fn map_peer(&self, peer: &Self, address: u64) -> Result<(), String> {
        if locked(&self.link).peer_mapped {
            return Ok(());
        }
        let access = DmaAccess::READ | DmaAccess::WRITE;
        let file = Some((peer.bar2_file.fd(), peer.bar2_offset));
        self.with(|client| client.dma_map(address, peer.bar2.len(), access, file))?;
        locked(&self.link).peer_mapped = true;
        Ok(())
    }

    /// Waits until an interrupt of any of `ports` was raised, or `time` has passed.
    pub(super) fn wait_any(ports: &[Self], time: Duration) {
        let mut fds: Vec<_> = ports
            .iter()
            .flat_map(|port| port.vectors.fds())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
        // An error is a wait that was cut short.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
    }
}

fn read_u64(client: &Client, offset: u64) -> Result<u64, DeviceError> {
    let mut word = [0; 8];
    client.region_read(BAR0, offset, &mut word)?;
    Ok(u64::from_le_bytes(word))
}

fn map_bar2(client: &Client) -> Result<(SharedMemory, u64, Mapping), String> {
    let info = client.region_info(BAR2).map_err(|e| e.to_string())?;
    let (fd, offset) = (info.fd.ok_or("it cannot be mapped")?, info.offset);
    if info.size < reg::ring_bytes(1) || !info.size.is_multiple_of(PAGE_BYTES) {
        return Err(format!("{} bytes are no room for a ring", info.size));
    }
    let end = offset.checked_add(info.size).ok_or("its offset is beyond 2^64")?;
    let file = SharedMemory::from_fd(fd, end).map_err(|e| e.to_string())?;
    let mapping = file.map(offset, info.size, Access::ReadWrite).map_err(|e| e.to_string())?;
    Ok((file, offset, mapping))
}

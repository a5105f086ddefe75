//! Requests that are answered at once: what the device is, accesses to regions, interrupts; and the
//! checks of those that begin an operation.

use super::connection::{Conn, Request, Role};
use super::data::Job;
use super::operations::Asker;
use super::worker::Worker;
use crate::codec::{
    DeviceInfo, DeviceInfoFlags, DmaMap, DmaMapFlags, DmaUnmap, DmaUnmapFlags, IrqInfo, IrqInfoFlags, IrqSet,
    IrqSetFlags, MigData, RegionAccess, RegionCap, RegionInfo, RegionInfoFlags, RegionIoFds, SparseArea,
    command, take,
};
use crate::dma::DmaPeer;
use crate::{DmaAccess, PciIds, RegionAreas, RegionDescription};
use airlift_core::{DeviceState, Errno};
use std::os::fd::AsFd;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// The region that is configuration space.
pub(super) const CONFIG_REGION: u32 = 7;
/// Regions that a PCI device always has numbers for.
const PCI_REGIONS: u32 = 9;
/// Interrupt indexes that a PCI device always has numbers for.
const PCI_IRQS: u32 = 5;
/// Bytes of the configuration space that is served for a device that describes none.
const PLAIN_CONFIG: u64 = 256;

impl Worker {
    /// What the second connection may ask (VU-MIGRATION-SOCKET).
    pub(super) fn allowed_for_migration(&self, request: &Request) -> bool {
        match request.header.command {
            command::DEVICE_FEATURE
            | command::MIG_DATA_READ
            | command::MIG_DATA_WRITE
            | command::DEVICE_RESET
            | command::DEVICE_GET_INFO
            | command::DEVICE_GET_REGION_INFO => true,
            command::REGION_READ
                if take::<RegionAccess>(&request.payload).is_some_and(|(a, _)| a.region == CONFIG_REGION) =>
            {
                true
            }
            _ => self.is_migration_access(request),
        }
    }

    pub(super) fn dispatch(&mut self, conn: &Arc<Conn>, mut request: Request) {
        let header = request.header;
        if self.is_migration_access(&request) {
            return self.migration_access(conn, request);
        }
        let asker = |request: Request, echo: Vec<u8>| Asker {
            conn: Arc::clone(conn),
            header,
            echo,
            _request: request,
        };
        let result = match header.command {
            command::DEVICE_GET_INFO => self.device_info(conn, &request),
            command::DEVICE_GET_REGION_INFO => self.region_info(conn, &request),
            command::DEVICE_GET_REGION_IO_FDS => self.region_io_fds(conn, &request),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(conn, &request),
            command::DEVICE_SET_IRQS => self.set_irqs(&mut request).map(|()| conn.reply(header, &[], &[])),
            command::REGION_READ => self.region_read(conn, &request),
            command::REGION_WRITE => self.region_write(conn, &request),
            command::DEVICE_FEATURE => {
                self.feature(conn, request);
                Ok(())
            }
            command::DEVICE_RESET => {
                self.reset(asker(request, Vec::new()));
                Ok(())
            }
            command::DMA_MAP => self.dma_map(conn, &mut request).map(|map| {
                self.mapped(asker(request, Vec::new()), map.iova, map.size);
            }),
            command::DMA_UNMAP => self.dma_unmap(&request).map(|ranges| {
                let echo = request.payload.clone();
                self.unmap(asker(request, echo), ranges.into());
            }),
            // Over interface v1 data goes through the region.
            command::MIG_DATA_READ | command::MIG_DATA_WRITE if self.region.is_some() => {
                Err(Errno::EOPNOTSUPP)
            }
            command::MIG_DATA_READ => return self.data_read(conn, request),
            command::MIG_DATA_WRITE => return self.data_write(conn, request),
            // Not offered in VERSION, or the server's own, or unknown.
            command::REGION_WRITE_MULTI | command::DMA_READ | command::DMA_WRITE => Err(Errno::EOPNOTSUPP),
            _ => Err(Errno::ENOSYS),
        };
        if let Err(errno) = result {
            conn.refuse(header, errno);
        }
    }

    fn regions(&self) -> u32 {
        let described = self.description.regions.iter().map(|r| r.index);
        let own = self.region.as_ref().map(|r| r.index);
        let highest = described.chain(own).map(|index| index.saturating_add(1)).max().unwrap_or(0);
        if self.description.pci.is_some() { highest.max(PCI_REGIONS) } else { highest }
    }

    fn irq_indexes(&self) -> u32 {
        let highest = self.description.irqs.iter().map(|i| i.index.saturating_add(1)).max().unwrap_or(0);
        if self.description.pci.is_some() { highest.max(PCI_IRQS) } else { highest }
    }

    fn region(&self, index: u32) -> Option<&RegionDescription> {
        self.description.regions.iter().find(|r| r.index == index)
    }

    /// The configuration space is served here, from the PCI ids alone.
    fn plain_config(&self, index: u32) -> bool {
        index == CONFIG_REGION && self.description.pci.is_some() && self.region(index).is_none()
    }

    fn device_info(&self, conn: &Conn, request: &Request) -> Result<(), Errno> {
        let (asked, _) = take::<DeviceInfo>(&request.payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < 16 {
            return Err(Errno::EINVAL);
        }
        let pci =
            if self.description.pci.is_some() { DeviceInfoFlags::PCI } else { DeviceInfoFlags::empty() };
        let info = DeviceInfo {
            argsz: 16,
            flags: (DeviceInfoFlags::RESET | pci).bits(),
            num_regions: self.regions(),
            num_irqs: self.irq_indexes(),
        };
        conn.reply(request.header, &[info.as_bytes()], &[]);
        Ok(())
    }

    fn region_info(&self, conn: &Conn, request: &Request) -> Result<(), Errno> {
        let (asked, _) = take::<RegionInfo>(&request.payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < 32 || asked.index >= self.regions() {
            return Err(Errno::EINVAL);
        }
        if let Some(region) = self.region.as_ref().filter(|r| r.index == asked.index) {
            return Self::migration_region_info(conn, request, &asked, region);
        }
        let mut info =
            RegionInfo { argsz: 32, flags: 0, index: asked.index, cap_offset: 0, size: 0, offset: 0 };
        if self.plain_config(asked.index) {
            info.flags = RegionInfoFlags::READ.bits();
            info.size = PLAIN_CONFIG;
        }
        let Some(region) = self.region(asked.index) else {
            conn.reply(request.header, &[info.as_bytes()], &[]);
            return Ok(());
        };
        let mut flags = RegionInfoFlags::empty();
        flags.set(RegionInfoFlags::READ, region.readable);
        flags.set(RegionInfoFlags::WRITE, region.writable);
        info.size = region.size;
        // The second connection gets no access to the device's memory.
        let mapping = region.mapping.as_ref().filter(|_| conn.role == Role::Primary);
        let mut areas = Vec::new();
        if let Some(mapping) = mapping {
            flags |= RegionInfoFlags::MMAP;
            info.offset = mapping.offset;
            if let RegionAreas::Sparse(list) = &mapping.areas {
                areas = list.iter().map(|&(offset, size)| SparseArea { offset, size }).collect();
                let needed = 32 + size_of::<RegionCap>() + areas.len() * size_of::<SparseArea>();
                info.argsz = u32::try_from(needed).map_err(|_| Errno::E2BIG)?;
            }
        }
        if info.argsz > asked.argsz {
            // The fixed part says how much is needed; the descriptor comes with the whole answer.
            info.flags = flags.bits();
            conn.reply(request.header, &[info.as_bytes()], &[]);
            return Ok(());
        }
        let fd = mapping.map(|m| m.fd.as_fd());
        let fds: &[_] = fd.as_slice();
        if areas.is_empty() {
            info.flags = flags.bits();
            conn.reply(request.header, &[info.as_bytes()], fds);
        } else {
            info.flags = (flags | RegionInfoFlags::CAPS).bits();
            info.cap_offset = 32;
            let count = u32::try_from(areas.len()).map_err(|_| Errno::E2BIG)?;
            let cap = RegionCap { id: 1, version: 1, next: 0, count, reserved: 0 };
            conn.reply(request.header, &[info.as_bytes(), cap.as_bytes(), areas.as_bytes()], fds);
        }
        Ok(())
    }

    fn region_io_fds(&self, conn: &Conn, request: &Request) -> Result<(), Errno> {
        let (asked, _) = take::<RegionIoFds>(&request.payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < 16 || asked.index >= self.regions() || asked.flags != 0 || asked.count != 0 {
            return Err(Errno::EINVAL);
        }
        // No region has such descriptors: kicks come as writes.
        let none = RegionIoFds { argsz: 16, flags: 0, index: asked.index, count: 0 };
        conn.reply(request.header, &[none.as_bytes()], &[]);
        Ok(())
    }

    fn irq_info(&self, conn: &Conn, request: &Request) -> Result<(), Errno> {
        let (asked, _) = take::<IrqInfo>(&request.payload).ok_or(Errno::EINVAL)?;
        if asked.argsz < 16 || asked.index >= self.irq_indexes() {
            return Err(Errno::EINVAL);
        }
        let irq = self.description.irqs.iter().find(|i| i.index == asked.index);
        let mut flags = IrqInfoFlags::empty();
        flags.set(IrqInfoFlags::EVENTFD, irq.is_some());
        flags.set(IrqInfoFlags::MASKABLE, irq.is_some_and(|i| i.maskable));
        let count = irq.map_or(0, |i| i.count);
        let info = IrqInfo { argsz: 16, flags: flags.bits(), index: asked.index, count };
        conn.reply(request.header, &[info.as_bytes()], &[]);
        Ok(())
    }

    fn set_irqs(&self, request: &mut Request) -> Result<(), Errno> {
        let fds = std::mem::take(&mut request.fds);
        let (set, bools) = take::<IrqSet>(&request.payload).ok_or(Errno::EINVAL)?;
        let flags = IrqSetFlags::from_bits(set.flags).ok_or(Errno::EINVAL)?;
        self.irqs.apply(set.index, set.start, set.count, flags, bools, fds)
    }

    /// Checks an access; the bytes it is about.
    fn access(&self, access: &RegionAccess, write: bool) -> Result<usize, Errno> {
        let (size, allowed) = if self.plain_config(access.region) {
            (PLAIN_CONFIG, !write)
        } else {
            let region = self.region(access.region).ok_or(Errno::EINVAL)?;
            (region.size, if write { region.writable } else { region.readable })
        };
        let end = access.offset.checked_add(u64::from(access.count));
        if end.is_none_or(|end| end > size) || access.count > self.options.max_data_xfer_size {
            return Err(Errno::EINVAL);
        }
        if !allowed {
            return Err(Errno::EACCES);
        }
        usize::try_from(access.count).map_err(|_| Errno::EINVAL)
    }

    fn region_read(&mut self, conn: &Conn, request: &Request) -> Result<(), Errno> {
        let (access, _) = take::<RegionAccess>(&request.payload).ok_or(Errno::EINVAL)?;
        let count = self.access(&access, false)?;
        let mut data = vec![0; count];
        if count > 0 {
            if !self.plain_config(access.region) {
                self.device.region_read(access.region, access.offset, &mut data)?;
            }
            if access.region == CONFIG_REGION
                && let Some(ids) = &self.description.pci
            {
                overlay_ids(ids, access.offset, &mut data);
            }
        }
        conn.reply(request.header, &[access.as_bytes(), &data], &[]);
        Ok(())
    }

    fn region_write(&mut self, conn: &Conn, request: &Request) -> Result<(), Errno> {
        let (access, data) = take::<RegionAccess>(&request.payload).ok_or(Errno::EINVAL)?;
        let count = self.access(&access, true)?;
        if data.len() != count {
            return Err(Errno::EINVAL);
        }
        if count > 0 {
            self.device.region_write(access.region, access.offset, data)?;
        }
        conn.reply(request.header, &[access.as_bytes()], &[]);
        Ok(())
    }

    fn dma_map(&self, conn: &Arc<Conn>, request: &mut Request) -> Result<DmaMap, Errno> {
        let mut fds = std::mem::take(&mut request.fds);
        let (map, rest) = take::<DmaMap>(&request.payload).ok_or(Errno::EINVAL)?;
        let flags = DmaMapFlags::from_bits(map.flags).ok_or(Errno::EINVAL)?;
        let fd = fds.pop();
        if !rest.is_empty() || !fds.is_empty() || (flags.contains(DmaMapFlags::MMAP) && fd.is_none()) {
            return Err(Errno::EINVAL);
        }
        let mut access = DmaAccess::empty();
        access.set(DmaAccess::READ, flags.contains(DmaMapFlags::READ));
        access.set(DmaAccess::WRITE, flags.contains(DmaMapFlags::WRITE));
        if access.is_empty() {
            return Err(Errno::EINVAL);
        }
        let peer: Arc<dyn DmaPeer> = Arc::clone(conn) as _;
        let file = fd.map(|fd| (fd, map.offset));
        self.dma.add(map.iova, map.size, access, file, peer, self.options.max_dma_maps)?;
        Ok(map)
    }

    fn dma_unmap(&self, request: &Request) -> Result<Vec<(u64, u64)>, Errno> {
        let (unmap, rest) = take::<DmaUnmap>(&request.payload).ok_or(Errno::EINVAL)?;
        let flags = DmaUnmapFlags::from_bits(unmap.flags).ok_or(Errno::EINVAL)?;
        if !rest.is_empty() {
            return Err(Errno::EINVAL);
        }
        if flags.contains(DmaUnmapFlags::ALL) {
            if unmap.iova != 0 || unmap.size != 0 {
                return Err(Errno::EINVAL);
            }
            return Ok(self.dma.mappings().into_iter().map(|(iova, length, _)| (iova, length)).collect());
        }
        if !self.dma.has(unmap.iova, unmap.size) {
            return Err(Errno::ENOENT);
        }
        Ok(vec![(unmap.iova, unmap.size)])
    }

    fn data_read(&self, conn: &Arc<Conn>, request: Request) {
        let header = request.header;
        let Some((asked, _)) = take::<MigData>(&request.payload) else {
            return conn.refuse(header, Errno::EINVAL);
        };
        let state = self.state.is_saving() && self.session.is_some();
        let size = asked.size;
        let room = size.checked_add(8).is_some_and(|needed| asked.argsz >= needed);
        if !state || !room || size > self.options.max_data_xfer_size {
            return conn.refuse(header, Errno::EINVAL);
        }
        let padded = self.options.pad_short_reads;
        self.data_job(Job::Read { conn: Arc::clone(conn), request, size, padded });
    }

    fn data_write(&self, conn: &Arc<Conn>, request: Request) {
        let header = request.header;
        let fits = take::<MigData>(&request.payload)
            .is_some_and(|(head, data)| usize::try_from(head.size).is_ok_and(|size| size == data.len()));
        if !fits || self.state != DeviceState::Resuming || self.session.is_none() {
            return conn.refuse(header, Errno::EINVAL);
        }
        self.data_job(Job::Write { conn: Arc::clone(conn), request });
    }
}

/// Puts the PCI ids where they stand in configuration space.
fn overlay_ids(ids: &PciIds, offset: u64, data: &mut [u8]) {
    let mut put = |at: u64, bytes: &[u8]| {
        for (at, byte) in (at..).zip(bytes) {
            let slot = at.checked_sub(offset).and_then(|i| usize::try_from(i).ok());
            if let Some(slot) = slot.and_then(|i| data.get_mut(i)) {
                *slot = *byte;
            }
        }
    };
    put(0x00, &ids.vendor.to_le_bytes());
    put(0x02, &ids.device.to_le_bytes());
    put(0x08, &[ids.revision]);
    put(0x09, &ids.class.to_le_bytes()[..3]);
    put(0x2c, &ids.subsystem_vendor.to_le_bytes());
    put(0x2e, &ids.subsystem.to_le_bytes());
}

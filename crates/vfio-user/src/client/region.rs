//! A region of a device behind a socket as [`RegionAccess`]: REGION_READ and REGION_WRITE, and the file of
//! what the server lets be mapped.
//!
//! A file that its owner can make smaller is read and written instead of mapped: an access to a mapping
//! of what is gone would end the process, with all other devices and the guest (VU-SEAL). What the region
//! holds is not looked at here.

use super::channel::{Ticket, protocol};
use super::direct::DirectAreas;
use super::{Client, RegionDetails};
use crate::codec::{RegionAccess as Access, RegionInfoFlags, command, take};
use airlift_core::{DeviceError, DeviceErrorKind, RegionAccess, RegionArea};
use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;
use zerocopy::IntoBytes;

/// A region of a device over a [`Client`]. Several messages are under way where data is long and the
/// server reads whole messages; a field is one message (V1-FIELDS).
pub struct VfioUserRegion {
    client: Client,
    index: u32,
    size: u64,
    /// The server declares parts of it as mappable.
    mappable: bool,
    direct: DirectAreas,
    unmapped: Option<String>,
    timeout: Duration,
    piece: usize,
    write_piece: usize,
    pipeline: usize,
}

impl fmt::Debug for VfioUserRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioUserRegion")
            .field("index", &self.index)
            .field("size", &self.size)
            .field("areas", &self.direct.areas())
            .finish_non_exhaustive()
    }
}

impl VfioUserRegion {
    /// Region `index` of the client's device, of which `details` tell, with all mapped that can be.
    /// `airlift`: the server is known to read whole messages, so that large ones may be sent, several at
    /// a time (VU-WRITE-CHUNK). Where mapping fails, that is said once in the log, and messages are used
    /// (V1-MMAP); a file that can become smaller is read and written (VU-SEAL).
    ///
    /// Each access may take as long as a transition: a device answers some only when its data is there.
    ///
    /// # Errors
    /// [`DeviceErrorKind::Protocol`] when the region is empty, or cannot be read and written.
    pub fn new(
        client: Client,
        index: u32,
        details: RegionDetails,
        airlift: bool,
    ) -> Result<Self, DeviceError> {
        let both = RegionInfoFlags::READ | RegionInfoFlags::WRITE;
        if details.size == 0 || !details.flags.contains(both) {
            let message = format!(
                "region {index} has {} bytes and flags {:#x}; it must be readable and writable",
                details.size,
                details.flags.bits()
            );
            return Err(protocol(command::DEVICE_GET_REGION_INFO, message));
        }
        let options = client.options();
        let bytes = |count: u32| usize::try_from(count).unwrap_or(4096).max(8);
        let piece = bytes(client.max_xfer());
        let write_piece = if airlift { piece } else { piece.min(bytes(options.foreign_write_chunk)) };
        let mut region = Self {
            index,
            size: details.size,
            mappable: details.flags.contains(RegionInfoFlags::MMAP),
            direct: DirectAreas::default(),
            unmapped: None,
            timeout: options.transition_timeout,
            piece,
            write_piece,
            pipeline: if airlift { options.read_pipeline.clamp(1, 16) } else { 1 },
            client,
        };
        region.map(details);
        Ok(region)
    }

    /// Its number.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// Why a part of it that the server lets be mapped is not: its file is read and written, or messages are
    /// used.
    #[must_use]
    pub fn unmapped(&self) -> Option<&str> {
        self.unmapped.as_deref()
    }

    fn map(&mut self, details: RegionDetails) {
        let Some(fd) = details.fd.filter(|_| self.mappable) else { return };
        let areas = if details.areas.is_empty() { vec![(0, details.size)] } else { details.areas };
        let why;
        (self.direct, why) = DirectAreas::open(fd, details.offset, &areas);
        if let Some(why) = &why {
            tracing::warn!(region = self.index, why, "a part of a region is not mapped, which is slower");
        }
        self.unmapped = why;
    }

    fn inside(&self, offset: u64, length: usize, number: u16) -> Result<(), DeviceError> {
        if offset.checked_add(length as u64).is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        let message = format!("{length} bytes at {offset:#x} are not in {} bytes", self.size);
        Err(DeviceError::new(DeviceErrorKind::Misuse, command::name(number), message))
    }

    fn send(&self, number: u16, offset: u64, count: usize, data: &[u8]) -> Result<Ticket, DeviceError> {
        // Not longer than a message: it fits.
        let asked = Access { offset, region: self.index, count: u32::try_from(count).unwrap_or(u32::MAX) };
        let limit = if data.is_empty() { asked.count.saturating_add(64) } else { 4096 };
        self.client.channel().call().send(number, &[asked.as_bytes(), data], &[], limit)
    }

    /// Requests that are under way and that nobody waits for any more.
    fn give_up(&self, tickets: impl IntoIterator<Item = Ticket>) {
        let mut call = self.client.channel().call();
        for ticket in tickets {
            call.give_up(&ticket);
        }
    }

    /// The answer to a write: all of it was written.
    fn written(&self, ticket: &Ticket, count: usize) -> Result<(), DeviceError> {
        let number = command::REGION_WRITE;
        let reply = self.client.channel().call().wait(ticket, self.timeout)?;
        let head = take::<Access>(&reply.payload).map(|(head, _)| head.count);
        if head.is_some_and(|n| usize::try_from(n) == Ok(count)) {
            return Ok(());
        }
        Err(protocol(number, "not all was written"))
    }
}

impl RegionAccess for VfioUserRegion {
    fn size(&self) -> u64 {
        self.size
    }

    fn mapped(&self) -> &[RegionArea] {
        self.direct.areas()
    }

    fn is_mappable(&self) -> bool {
        self.mappable
    }

    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let number = command::REGION_READ;
        self.inside(offset, buf.len(), number)?;
        let (mut ahead, mut at) = (VecDeque::new(), offset);
        let mut lengths = buf.chunks(self.piece).map(<[u8]>::len).collect::<VecDeque<_>>();
        for part in buf.chunks_mut(self.piece) {
            while ahead.len() < self.pipeline
                && let Some(length) = lengths.pop_front()
            {
                match self.send(number, at, length, &[]) {
                    Ok(ticket) => ahead.push_back(ticket),
                    Err(error) => {
                        self.give_up(ahead);
                        return Err(error);
                    }
                }
                at += length as u64;
            }
            let Some(ticket) = ahead.pop_front() else { break };
            let answer = self.client.channel().call().wait_region(&ticket, part, self.timeout);
            if let Err(error) = answer {
                self.give_up(ahead);
                return Err(error);
            }
        }
        Ok(())
    }

    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let number = command::REGION_WRITE;
        self.inside(offset, data.len(), number)?;
        let (mut ahead, mut at) = (VecDeque::<(Ticket, usize)>::new(), offset);
        let mut result = Ok(());
        for part in data.chunks(self.write_piece) {
            if ahead.len() >= self.pipeline
                && let Some((ticket, count)) = ahead.pop_front()
            {
                result = self.written(&ticket, count);
            }
            if result.is_ok() {
                match self.send(number, at, part.len(), part) {
                    Ok(ticket) => ahead.push_back((ticket, part.len())),
                    Err(error) => result = Err(error),
                }
            }
            if result.is_err() {
                break;
            }
            at += part.len() as u64;
        }
        while result.is_ok()
            && let Some((ticket, count)) = ahead.pop_front()
        {
            result = self.written(&ticket, count);
        }
        self.give_up(ahead.into_iter().map(|(ticket, _)| ticket));
        result
    }

    fn read_mapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.direct.read(offset, buf, command::name(command::REGION_READ))
    }

    fn write_mapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.direct.write(offset, data, command::name(command::REGION_WRITE))
    }
}

//! A user of a migration region, made by hand for tests: single accesses through a client, and its own
//! mappings. What it does wrong, it does because the test says so.

use crate::common::*;
use airlift_core::{DeviceError, Errno};
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_vfio_user::Client;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub(crate) const STATE: u64 = 0;
pub(crate) const RESERVED: u64 = 4;
pub(crate) const PENDING: u64 = 8;
pub(crate) const OFFSET: u64 = 16;
pub(crate) const SIZE: u64 = 24;

pub(crate) const STOPPED: u32 = 0;
pub(crate) const RUNNING: u32 = 1;
pub(crate) const STOP_COPY: u32 = 2;
pub(crate) const PRE_COPY: u32 = 3;
pub(crate) const RESUMING: u32 = 4;
pub(crate) const ERROR: u32 = 6;

const PAGE: u64 = 4096;

pub(crate) struct User {
    pub(crate) client: Client,
    /// Bytes of the region.
    pub(crate) size: u64,
    areas: Vec<(u64, Mapping)>,
}

/// Number of the region on the test's device: behind those of PCI.
pub(crate) const REGION: u32 = 9;

impl User {
    /// Maps what can be mapped.
    pub(crate) fn new(client: Client) -> Self {
        let info = client.region_info(REGION).unwrap();
        let mut areas = Vec::new();
        if let Some(fd) = info.fd {
            let memory = SharedMemory::from_fd(fd, info.size).unwrap();
            assert!(memory.is_shrink_sealed());
            for (at, length) in info.areas {
                areas.push((at, memory.map(info.offset + at, length, Access::ReadWrite).unwrap()));
            }
        }
        Self { client, size: info.size, areas }
    }

    /// Bytes that can be mapped.
    pub(crate) fn mapped(&self) -> u64 {
        self.areas.iter().map(|(_, area)| area.len()).sum()
    }

    pub(crate) fn read_raw(&self, offset: u64, length: usize) -> Result<Vec<u8>, DeviceError> {
        let mut data = vec![0; length];
        self.client.region_read(REGION, offset, &mut data).map(|()| data)
    }

    pub(crate) fn write_raw(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.client.region_write(REGION, offset, data)
    }

    pub(crate) fn get(&self, field: u64) -> Result<u64, DeviceError> {
        Ok(u64::from_ne_bytes(self.read_raw(field, 8)?.try_into().unwrap()))
    }

    pub(crate) fn state(&self) -> u32 {
        u32::from_ne_bytes(self.read_raw(STATE, 4).unwrap().try_into().unwrap())
    }

    pub(crate) fn set(&self, state: u32) -> Result<(), DeviceError> {
        self.write_raw(STATE, &state.to_ne_bytes())
    }

    /// Cuts a range into pages, as what is mapped is made of whole ones.
    fn pages(offset: u64, length: usize) -> Vec<(u64, usize)> {
        let end = offset + length as u64;
        let mut at = offset;
        let mut pieces = Vec::new();
        while at < end {
            let next = (at - at % PAGE + PAGE).min(end);
            pieces.push((at, usize::try_from(next - at).unwrap()));
            at = next;
        }
        pieces
    }

    fn area(&self, at: u64) -> Option<(&Mapping, u64)> {
        let holds = |(start, area): &&(u64, Mapping)| at >= *start && at - start < area.len();
        self.areas.iter().find(holds).map(|(start, area)| (area, at - start))
    }

    /// Reads data, through the mappings where there are some.
    pub(crate) fn read_data(&self, offset: u64, length: usize) -> Result<Vec<u8>, DeviceError> {
        let mut data = Vec::new();
        for (at, length) in Self::pages(offset, length) {
            match self.area(at) {
                Some((area, at)) => {
                    let mut page = vec![0; length];
                    area.read(at, &mut page).unwrap();
                    data.extend(page);
                }
                None => data.extend(self.read_raw(at, length)?),
            }
        }
        Ok(data)
    }

    pub(crate) fn write_data(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut rest = data;
        for (at, length) in Self::pages(offset, data.len()) {
            let (page, behind) = rest.split_at(length);
            rest = behind;
            match self.area(at) {
                Some((area, at)) => area.write(at, page).unwrap(),
                None => self.write_raw(at, page)?,
            }
        }
        Ok(())
    }

    /// Fetches the chunk that is offered, without saying that it was taken.
    pub(crate) fn fetch(&self) -> Result<Vec<u8>, DeviceError> {
        let offset = self.get(OFFSET)?;
        let size = usize::try_from(self.get(SIZE)?).unwrap();
        self.read_data(offset, size)
    }

    /// The save loop, as long as anything is pending and comes: a chunk of 0 bytes is a pause (V1-HOLLOW).
    pub(crate) fn save(&self) -> Vec<Vec<u8>> {
        let mut chunks = Vec::new();
        while self.get(PENDING).unwrap() > 0 {
            let chunk = self.fetch().unwrap();
            if chunk.is_empty() {
                assert_eq!(self.state(), PRE_COPY, "bytes are pending after the stop, and none come");
                break;
            }
            chunks.push(chunk);
            assert!(chunks.len() < 1000, "the device never ends");
        }
        chunks
    }

    /// One round of the resume loop.
    pub(crate) fn load(&self, chunk: &[u8]) -> Result<(), DeviceError> {
        let offset = self.get(OFFSET)?;
        self.write_data(offset, chunk)?;
        self.write_raw(SIZE, &(chunk.len() as u64).to_ne_bytes())
    }

    /// This is answered with EINVAL, and the state stays what it was.
    pub(crate) fn refused<T: std::fmt::Debug>(&self, what: &str, result: Result<T, DeviceError>) {
        let error = result.expect_err(what);
        assert_eq!(error.errno, Some(Errno::EINVAL), "{what}: {error}");
    }

    /// An access that is refused while the device is in `state`, which stays.
    pub(crate) fn refuses<T: std::fmt::Debug>(
        &self,
        state: u32,
        what: &str,
        access: impl FnOnce(&Self) -> Result<T, DeviceError>,
    ) {
        self.refused(what, access(self));
        assert_eq!(self.state(), state, "after {what}");
    }
}

impl Served {
    pub(crate) fn user(&self) -> User {
        User::new(self.client())
    }
}

/// Bytes that are different wherever one looks.
pub(crate) fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..length).map(|_| next()).collect()
}

pub(crate) fn errno<T: std::fmt::Debug>(result: Result<T, DeviceError>) -> Option<Errno> {
    result.expect_err("an error").errno
}

/// A connection by hand, for messages that a client does not send.
pub(crate) struct Greeted(UnixStream);

impl Served {
    /// A connection on which VERSION was exchanged.
    pub(crate) fn greeted(&self) -> Greeted {
        let mut greeted = Greeted(self.raw());
        greeted.send(1, &[0, 0, 0, 0]);
        assert_eq!(greeted.receive().0, 0);
        greeted
    }
}

impl Greeted {
    pub(crate) fn send(&mut self, command: u16, payload: &[u8]) {
        let mut message = vec![1, 0];
        message.extend(command.to_ne_bytes());
        message.extend(u32::try_from(payload.len() + 16).unwrap().to_ne_bytes());
        message.extend([0; 8]);
        message.extend(payload);
        self.0.write_all(&message).unwrap();
    }

    /// The error number of the next reply, 0 for none, and its payload.
    pub(crate) fn receive(&mut self) -> (u32, Vec<u8>) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; usize::try_from(word(4)).unwrap() - 16];
        self.0.read_exact(&mut payload).unwrap();
        (word(12), payload)
    }
}

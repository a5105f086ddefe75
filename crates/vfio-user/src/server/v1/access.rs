//! Accesses to the migration region, on the device thread: which of them the interface allows, and
//! when. Whatever it does not allow is answered with `EINVAL` and changes nothing.
//!
//! Whether the device makes a change of its state is seen in `operations`, and what it gives and takes
//! in `chunks`.

use super::super::connection::{Conn, Request};
use super::super::data::Job;
use super::super::operations::Asker;
use super::super::worker::Worker;
use super::{Place, Round, Task, V1Region};
use crate::codec::{
    RegionAccess, RegionCap, RegionInfo, RegionInfoFlags, RegionTypeCap, SparseArea, command, take,
};
use airlift_core::v1::{REGION_TYPE, bits};
use airlift_core::{Arc as StateArc, Capabilities, DeviceState, Errno, arcs, path};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

/// What is to be done for an access.
enum Answer {
    /// Answer this, at once.
    Now(Vec<u8>),
    /// Let the data thread do it.
    Later(Task),
    /// Walk the device to this state.
    State(DeviceState),
}

fn number(value: u64) -> Result<Answer, Errno> {
    Ok(Answer::Now(value.to_ne_bytes().to_vec()))
}

impl Worker {
    /// Whether a request is an access to the migration region.
    pub(in crate::server) fn is_migration_access(&self, request: &Request) -> bool {
        let Some(region) = &self.region else { return false };
        matches!(request.header.command, command::REGION_READ | command::REGION_WRITE)
            && take::<RegionAccess>(&request.payload).is_some_and(|(access, _)| access.region == region.index)
    }

    /// REGION_READ and REGION_WRITE of the migration region.
    pub(in crate::server) fn migration_access(&mut self, conn: &Arc<Conn>, request: Request) {
        let header = request.header;
        let (Some(region), Some((access, data))) =
            (self.region.clone(), take::<RegionAccess>(&request.payload))
        else {
            return conn.refuse(header, Errno::EINVAL);
        };
        let write = header.command == command::REGION_WRITE;
        let answer = if access.count > self.options.max_data_xfer_size {
            Err(Errno::EINVAL)
        } else if write {
            self.migration_write(&region, &access, data)
        } else {
            self.migration_read(&region, &access)
        };
        match answer {
            Ok(Answer::Now(data)) => conn.reply(header, &[access.as_bytes(), &data], &[]),
            Ok(Answer::Later(task)) => {
                self.data_job(Job::Region { conn: Arc::clone(conn), request, region, task });
            }
            Ok(Answer::State(target)) => {
                let echo = access.as_bytes().to_vec();
                self.write_state(Asker { conn: Arc::clone(conn), header, echo, _request: request }, target);
            }
            Err(errno) => {
                let (offset, count, state) = (access.offset, access.count, self.state);
                tracing::debug!(offset, count, write, %state, "access to the migration region refused");
                conn.refuse(header, errno);
            }
        }
    }

    fn is_saving(&self) -> bool {
        self.state.is_saving() && self.session.is_some()
    }

    /// The round of the resume loop; an error when the device does not load.
    fn round(&mut self) -> Result<&mut Round, Errno> {
        let session = self.session.as_mut().filter(|_| self.state == DeviceState::Resuming);
        session.map(|session| &mut session.round).ok_or(Errno::EINVAL)
    }

    fn migration_read(&mut self, region: &V1Region, access: &RegionAccess) -> Result<Answer, Errno> {
        let count = usize::try_from(access.count).map_err(|_| Errno::EINVAL)?;
        match region.place(access)? {
            Place::State => {
                // A state that the interface does not have is one that only a reset leaves.
                let raw = bits::bits_of(self.state).unwrap_or(bits::SAVING | bits::RESUMING);
                Ok(Answer::Now(raw.to_ne_bytes().to_vec()))
            }
            Place::Reserved => Ok(Answer::Now(vec![0; 4])),
            Place::Pending if self.is_saving() => {
                Ok(Answer::Later(Task::Pending { stopped: self.state == DeviceState::StopCopy }))
            }
            Place::DataOffset if self.is_saving() => Ok(Answer::Later(Task::Offset)),
            Place::DataOffset => {
                if let Ok(round) = self.round() {
                    round.open();
                }
                number(region.start)
            }
            Place::DataSize if self.is_saving() => Ok(Answer::Later(Task::Size)),
            Place::Pending | Place::DataSize => number(0),
            Place::Section(at) if self.is_saving() => Ok(Answer::Later(Task::Read { at, count })),
            Place::Section(_) => Err(Errno::EINVAL),
        }
    }

    fn migration_write(
        &mut self,
        region: &V1Region,
        access: &RegionAccess,
        data: &[u8],
    ) -> Result<Answer, Errno> {
        if usize::try_from(access.count) != Ok(data.len()) {
            return Err(Errno::EINVAL);
        }
        let done = Ok(Answer::Now(Vec::new()));
        match region.place(access)? {
            Place::State => {
                let raw = u32::from_ne_bytes(data.try_into().map_err(|_| Errno::EINVAL)?);
                // Reserved bits are read as 0 here; who changes them did not read them (V1-RESERVED).
                if raw != bits::merged(0, raw) || !bits::is_valid(raw) {
                    return Err(Errno::EINVAL);
                }
                Ok(Answer::State(bits::state_of(raw)))
            }
            Place::Reserved => done,
            Place::Pending | Place::DataOffset => Err(Errno::EINVAL),
            Place::DataSize => {
                let size = u64::from_ne_bytes(data.try_into().map_err(|_| Errno::EINVAL)?);
                let round = self.round()?;
                // Bytes that the client did not bring now are no transaction of it (V1-PRIVATE).
                if size == 0 || size > region.section.size || !round.holds(size, &region.mapped) {
                    return Err(Errno::EINVAL);
                }
                *round = Round::default();
                let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
                Ok(Answer::Later(Task::Take { size }))
            }
            Place::Section(at) => {
                let end = at.checked_add(u64::from(access.count)).ok_or(Errno::EINVAL)?;
                self.round()?.write(at, end, &region.mapped)?;
                Ok(Answer::Later(Task::Write { at }))
            }
        }
    }

    /// A write of `device_state`: one arc of the interface, walked over those of the device, which do in
    /// this order what the bits mean (V1-ARCS, V1-ORDER).
    fn write_state(&mut self, asker: Asker, target: DeviceState) {
        let from = self.state;
        if from == target {
            return asker.conn.reply(asker.header, &[&asker.echo], &[]);
        }
        // What is still to be handed over would be missing in what is loaded (V1-OUTSTANDING). Where
        // loading has failed, that is what the walk answers.
        let spoiled = self.session.as_ref().is_some_and(|s| s.spoiled.load(Ordering::Acquire));
        let torn = !spoiled && self.round().is_ok_and(|round| round.has_begun());
        let allowed = arcs(&Capabilities::v1(1, false)).contains(&StateArc::new(from, target));
        let walk = self.caps.and_then(|caps| path(from, target, &caps).ok());
        match walk {
            Some(walk) if allowed && !torn => self.walk_migration(asker, walk),
            _ => {
                tracing::debug!(%from, to = %target, torn, "write of device_state refused");
                asker.conn.refuse(asker.header, Errno::EINVAL);
            }
        }
    }

    /// GET_REGION_INFO of the migration region. Both connections may map it: nothing else of the device
    /// is in the file.
    pub(in crate::server) fn migration_region_info(
        conn: &Conn,
        request: &Request,
        asked: &RegionInfo,
        region: &V1Region,
    ) -> Result<(), Errno> {
        let areas: Vec<_> = region.areas.iter().map(|&(offset, size)| SparseArea { offset, size }).collect();
        let fixed = size_of::<RegionInfo>();
        let behind_type = fixed + size_of::<RegionTypeCap>();
        let mut needed = behind_type;
        let mut flags = RegionInfoFlags::READ | RegionInfoFlags::WRITE;
        if !areas.is_empty() {
            flags |= RegionInfoFlags::MMAP;
            needed += size_of::<RegionCap>() + areas.len() * size_of::<SparseArea>();
        }
        let length = |bytes: usize| u32::try_from(bytes).map_err(|_| Errno::E2BIG);
        let size = region.size();
        let mut info = RegionInfo {
            argsz: length(needed)?,
            flags: 0,
            index: region.index,
            cap_offset: 0,
            size,
            offset: 0,
        };
        if info.argsz > asked.argsz {
            // As for other regions: the descriptor comes with the whole answer.
            info.flags = flags.bits();
            conn.reply(request.header, &[info.as_bytes()], &[]);
            return Ok(());
        }
        info.flags = (flags | RegionInfoFlags::CAPS).bits();
        info.cap_offset = length(fixed)?;
        let (kind, subtype) = REGION_TYPE;
        let next = if areas.is_empty() { 0 } else { length(behind_type)? };
        let of_type = RegionTypeCap { id: 2, version: 1, next, kind, subtype };
        let sparse = RegionCap { id: 1, version: 1, next: 0, count: length(areas.len())?, reserved: 0 };
        let mut parts = vec![info.as_bytes(), of_type.as_bytes()];
        if !areas.is_empty() {
            parts.extend([sparse.as_bytes(), areas.as_bytes()]);
        }
        conn.reply(request.header, &parts, region.fd().as_slice());
        Ok(())
    }
}

//! DEVICE_FEATURE: the migration features, dirty logging, and Airlift's extensions.

use super::connection::{Conn, Request, Role};
use super::data::Job;
use super::operations::Asker;
use super::worker::Worker;
use crate::codec::{
    FeatureFlags, FeatureHeader, LoggingControl, LoggingRange, LoggingReport, MigState, SocketReply,
    StateFormatFlags, StateFormatHeader, feature, take,
};
use airlift_core::{DeviceState, Errno, Interface};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Bytes of the head of a feature request and reply.
const HEAD: usize = size_of::<FeatureHeader>();

impl Worker {
    /// What may be done with a feature; `None` when it is not there.
    fn supported(&self, index: u16, role: Role) -> Option<FeatureFlags> {
        let migration = self.description.migration.as_ref().filter(|_| self.caps.is_some())?;
        let extensions = self.options.extensions;
        let precopy = self.caps.is_some_and(|caps| caps.precopy());
        // Interface v1 says the same through its region.
        let v2 = self.region.is_none();
        let (get, set) = (FeatureFlags::GET, FeatureFlags::SET);
        let flags = match index {
            feature::MIGRATION if v2 => get,
            feature::MIG_DEVICE_STATE if v2 => get | set,
            feature::DMA_LOGGING_START | feature::DMA_LOGGING_STOP if migration.dma_logging => set,
            feature::DMA_LOGGING_REPORT if migration.dma_logging => get,
            feature::MIG_DATA_SIZE if v2 && extensions => get,
            feature::MIG_PRECOPY_INFO_V2 if v2 && extensions && precopy && migration.reinit => set,
            feature::PRECOPY_INFO if v2 && extensions && precopy => get,
            feature::STATE_FORMAT if extensions => get,
            feature::MIGRATION_SOCKET if extensions && role == Role::Primary => get,
            _ => return None,
        };
        Some(flags)
    }

    pub(super) fn feature(&mut self, conn: &Arc<Conn>, request: Request) {
        if let Err(errno) = self.try_feature(conn, request) {
            let (header, errno) = errno;
            conn.refuse(header, errno);
        }
    }

    fn try_feature(
        &mut self,
        conn: &Arc<Conn>,
        request: Request,
    ) -> Result<(), (crate::codec::Header, Errno)> {
        let header = request.header;
        let refused = |errno| (header, errno);
        let (head, data) = take::<FeatureHeader>(&request.payload).ok_or_else(|| refused(Errno::EINVAL))?;
        let flags = head.operation().ok_or_else(|| refused(Errno::EINVAL))?;
        let operation = flags & (FeatureFlags::GET | FeatureFlags::SET);
        let supported = self.supported(head.index(), conn.role).ok_or_else(|| refused(Errno::ENOTTY))?;
        if !supported.contains(operation) {
            return Err(refused(Errno::EINVAL));
        }
        if flags.contains(FeatureFlags::PROBE) {
            conn.reply(header, &[&request.payload], &[]);
            return Ok(());
        }
        if operation == FeatureFlags::SET {
            let data = data.to_vec();
            self.feature_set(conn, head, &data, request).map_err(refused)
        } else if operation == FeatureFlags::GET {
            self.feature_get(conn, head, data, &request).map_err(refused)
        } else {
            Err(refused(Errno::EINVAL))
        }
    }

    fn feature_set(
        &mut self,
        conn: &Arc<Conn>,
        head: FeatureHeader,
        data: &[u8],
        request: Request,
    ) -> Result<(), Errno> {
        let header = request.header;
        match head.index() {
            feature::MIG_DEVICE_STATE => {
                let (wanted, rest) = take::<MigState>(data).ok_or(Errno::EINVAL)?;
                let target = DeviceState::from_raw(wanted.device_state);
                if !rest.is_empty() {
                    return Err(Errno::EINVAL);
                }
                let echo = request.payload.clone();
                self.set_state(Asker { conn: Arc::clone(conn), header, echo, _request: request }, target);
            }
            feature::DMA_LOGGING_START => {
                let (mut control, mut rest) = take::<LoggingControl>(data).ok_or(Errno::EINVAL)?;
                let mut ranges = Vec::new();
                while let Some((range, behind)) = take::<LoggingRange>(rest) {
                    ranges.push((range.iova, range.length));
                    rest = behind;
                }
                let counted = usize::try_from(control.num_ranges).ok();
                if !rest.is_empty() || counted != Some(ranges.len()) {
                    return Err(Errno::EINVAL);
                }
                control.page_size = self.dma.start_log(control.page_size, &ranges)?;
                let behind = request.payload.get(HEAD + size_of::<LoggingControl>()..).unwrap_or_default();
                conn.reply(header, &[head.as_bytes(), control.as_bytes(), behind], &[]);
            }
            feature::DMA_LOGGING_STOP => {
                // With data as the protocol's text has it, or without as the kernel has it.
                self.dma.stop_log();
                conn.reply(header, &[&request.payload], &[]);
            }
            feature::MIG_PRECOPY_INFO_V2 => {
                conn.opt_in_to_reinit();
                conn.reply(header, &[&request.payload], &[]);
            }
            _ => return Err(Errno::ENOTTY),
        }
        Ok(())
    }

    fn feature_get(
        &mut self,
        conn: &Arc<Conn>,
        head: FeatureHeader,
        data: &[u8],
        request: &Request,
    ) -> Result<(), Errno> {
        let header = request.header;
        let room = usize::try_from(head.argsz).unwrap_or(usize::MAX);
        let answer = |parts: &[&[u8]]| -> Result<(), Errno> {
            let size = HEAD + parts.iter().map(|p| p.len()).sum::<usize>();
            if size > room {
                return Err(Errno::EINVAL);
            }
            let argsz = u32::try_from(size).map_err(|_| Errno::E2BIG)?;
            let head = FeatureHeader { argsz, ..head };
            let mut whole: Vec<&[u8]> = vec![head.as_bytes()];
            whole.extend(parts);
            conn.reply(header, &whole, &[]);
            Ok(())
        };
        match head.index() {
            feature::MIGRATION => {
                let flags = self.caps.map_or(0, |caps| caps.flags.bits());
                answer(&[flags.as_bytes()])
            }
            feature::MIG_DEVICE_STATE => {
                let state = MigState { device_state: self.state.to_raw(), data_fd: u32::MAX };
                answer(&[state.as_bytes()])
            }
            feature::DMA_LOGGING_REPORT => {
                let (asked, _) = take::<LoggingReport>(data).ok_or(Errno::EINVAL)?;
                if asked.page_size == 0 {
                    return Err(Errno::EINVAL);
                }
                // The room is checked first: bits that are taken and not sent would be lost.
                let words = asked.length.div_ceil(asked.page_size).div_ceil(64);
                let needed = words.saturating_mul(8).saturating_add(32);
                if needed > u64::from(head.argsz) {
                    return Err(Errno::EINVAL);
                }
                let bits = self.dma.report_log(asked.iova, asked.length, asked.page_size)?;
                answer(&[asked.as_bytes(), bits.as_bytes()])
            }
            feature::MIG_DATA_SIZE => {
                if !self.state.is_saving() || self.session.is_none() {
                    return Err(Errno::EINVAL);
                }
                self.data_job(Job::Size { conn: Arc::clone(conn), header });
                Ok(())
            }
            feature::PRECOPY_INFO => {
                let precopy = matches!(self.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
                if !precopy || self.session.is_none() {
                    return Err(Errno::EINVAL);
                }
                self.data_job(Job::Info { conn: Arc::clone(conn), header });
                Ok(())
            }
            feature::STATE_FORMAT => self.state_format(conn, head, header),
            feature::MIGRATION_SOCKET => self.migration_socket(conn, head, header),
            _ => Err(Errno::ENOTTY),
        }
    }

    fn state_format(
        &self,
        conn: &Conn,
        head: FeatureHeader,
        header: crate::codec::Header,
    ) -> Result<(), Errno> {
        let format = &self.description.format;
        let name = format.name.as_bytes().get(..format.name.len().min(255)).unwrap_or_default();
        let accepts = format.accepts.get(..format.accepts.len().min(256)).unwrap_or_default();
        let fixed = StateFormatHeader {
            version: format.version,
            accepts: u16::try_from(accepts.len()).unwrap_or(0),
            name: u16::try_from(name.len()).unwrap_or(0),
        };
        let mut flags = StateFormatFlags::empty();
        flags.set(StateFormatFlags::READS_V1, format.interfaces.contains(&Interface::V1));
        flags.set(StateFormatFlags::READS_V2, format.interfaces.contains(&Interface::V2));
        let whole = self.region.as_ref().is_some_and(|region| region.takes_whole_transactions());
        flags.set(StateFormatFlags::WHOLE_TRANSACTIONS, whole);
        let flags = flags.bits();
        let parts = [fixed.as_bytes(), accepts.as_bytes(), name, flags.as_bytes()];
        let size = HEAD + parts.iter().map(|part| part.len()).sum::<usize>();
        let argsz = u32::try_from(size).unwrap_or(u32::MAX);
        let new = FeatureHeader { argsz, ..head };
        if argsz > head.argsz {
            // The client sees what it needs and asks again.
            conn.reply(header, &[new.as_bytes()], &[]);
        } else {
            let mut whole = vec![new.as_bytes()];
            whole.extend(parts);
            conn.reply(header, &whole, &[]);
        }
        Ok(())
    }

    /// Opens the second connection. One at a time (VU-MIGRATION-SOCKET).
    fn migration_socket(
        &mut self,
        conn: &Conn,
        head: FeatureHeader,
        header: crate::codec::Header,
    ) -> Result<(), Errno> {
        if head.argsz < 16 {
            return Err(Errno::EINVAL);
        }
        if self.migration.is_some() {
            return Err(Errno::EBUSY);
        }
        let (ours, theirs) = UnixStream::pair().map_err(|_| Errno::EMFILE)?;
        let id = self.token();
        let started = Conn::start(id, Role::Migration, ours, &self.options, self.sender.clone());
        self.migration = Some(started.map_err(|_| Errno::ENOMEM)?);
        let head = FeatureHeader { argsz: 16, ..head };
        let data = SocketReply { flags: 0, reserved: 0 };
        conn.reply(header, &[head.as_bytes(), data.as_bytes()], &[theirs.as_fd()]);
        Ok(())
    }
}

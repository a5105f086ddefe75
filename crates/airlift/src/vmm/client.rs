//! The migration process's end: a [`Machine`] that asks a VMM over its socket.
//!
//! Every call has a deadline. A VMM that is late gives an error and can still be asked again, its
//! late answer is dropped (VMM-LATE); one that has died or broken the protocol stays failed. What a
//! VMM says is bounded and checked for form; whether it tells the truth is not.

use super::DeviceHandle;
use super::bitmap::SharedBitmap;
use super::wire::{
    Answer, Barrier, Blockers, DeviceParams, Devices, Ended, Hello, Interrupts, Line, LineChannel,
    LoadRecord, MAX_FDS, MAX_RECORD, MAX_RECORDS, PROTOCOL, Records, Request, Running, WireBitmap, WireError,
    WireMemory, WireRecord,
};
use crate::machine::{Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt};
use airlift_core::{DeviceId, Errno, GpaRange, IovaMap, MemoryLayout};
use airlift_memory::{Access, GuestMemory, GuestRegion, SharedMemory};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a VMM may take to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmmTimeouts {
    /// For what a VMM only looks up: hello, devices, blockers, memory, maps, running.
    pub query: Duration,
    /// For what makes it act: pause, resume, access, interrupts, records, dirty tracking.
    pub action: Duration,
}

impl Default for VmmTimeouts {
    fn default() -> Self {
        Self { query: Duration::from_secs(10), action: Duration::from_secs(30) }
    }
}

/// A VMM behind a socket, as a [`Machine`].
#[derive(Debug)]
pub struct RemoteVmm {
    channel: LineChannel,
    timeouts: VmmTimeouts,
    last_id: u64,
    name: String,
    layout: Option<MemoryLayout>,
    bitmap: Option<SharedBitmap>,
    /// Why the connection is of no more use.
    broken: Option<(String, Errno)>,
}

/// An answer's content and its descriptors.
struct Reply {
    verb: &'static str,
    value: serde_json::Value,
    fds: Vec<OwnedFd>,
}

impl RemoteVmm {
    /// Greets the VMM on `stream`; `name` is who is asking, for its log.
    ///
    /// # Errors
    /// When it does not answer in time, or speaks another version.
    pub fn greet(stream: UnixStream, name: &str, timeouts: VmmTimeouts) -> Result<Self, MachineError> {
        let mut vmm = Self {
            channel: LineChannel::new(stream),
            timeouts,
            last_id: 0,
            name: String::new(),
            layout: None,
            bitmap: None,
            broken: None,
        };
        let hello = Hello { protocol: PROTOCOL, name: name.to_owned() };
        let theirs: Hello = vmm.call("hello", Some(&hello), &[], timeouts.query)?.parse()?;
        if theirs.protocol != PROTOCOL {
            let message = format!("the VMM speaks protocol {}, this side {PROTOCOL}", theirs.protocol);
            return Err(MachineError { errno: Some(Errno::EPROTO), ..MachineError::new("hello", message) });
        }
        vmm.name = theirs.name;
        Ok(vmm)
    }

    /// The name that the VMM gave itself.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The devices, with new descriptors.
    ///
    /// # Errors
    /// When the VMM fails, or the answer's descriptors do not match its devices.
    pub fn devices(&mut self) -> Result<Vec<DeviceHandle>, MachineError> {
        let reply = self.query::<()>("devices", None)?;
        let Devices { devices } = reply.parse()?;
        let mut handles: Vec<DeviceHandle> = Vec::with_capacity(devices.len());
        for device in devices {
            if handles.iter().any(|h| h.id == device.id) {
                return Err(MachineError::new("devices", format!("device {} is named twice", device.id)));
            }
            handles.push(DeviceHandle { fd: reply.fd(device.fd)?, id: device.id, kind: device.kind });
        }
        Ok(handles)
    }

    /// Tells the VMM that the session is over on this side.
    ///
    /// # Errors
    /// When the VMM cannot be told.
    pub fn migration_ended(&mut self, outcome: &str) -> Result<(), MachineError> {
        self.query("migration_ended", Some(&Ended { outcome: outcome.to_owned() })).map(drop)
    }

    fn query<P: Serialize>(&mut self, verb: &'static str, params: Option<&P>) -> Result<Reply, MachineError> {
        self.call(verb, params, &[], self.timeouts.query)
    }

    fn act<P: Serialize>(&mut self, verb: &'static str, params: Option<&P>) -> Result<Reply, MachineError> {
        self.call(verb, params, &[], self.timeouts.action)
    }

    fn call<P: Serialize>(
        &mut self,
        verb: &'static str,
        params: Option<&P>,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Reply, MachineError> {
        if let Some((why, errno)) = &self.broken {
            let message = format!("the VMM is gone: {why}");
            return Err(MachineError { operation: verb.to_owned(), message, errno: Some(*errno) });
        }
        self.last_id += 1;
        let request = Request { id: self.last_id, verb: verb.to_owned(), params };
        let deadline = Instant::now().checked_add(timeout).unwrap_or_else(far);
        if let Err(error) = self.channel.send(&request, fds, deadline) {
            let unsent = matches!(error, WireError::LineTooLong | WireError::TooManyFds);
            return Err(self.failed(verb, &error, !unsent));
        }
        loop {
            let line = match self.channel.receive(deadline) {
                Ok(line) => line,
                Err(error @ WireError::TimedOut) => return Err(self.failed(verb, &error, false)),
                Err(error) => return Err(self.failed(verb, &error, true)),
            };
            match read_answer(&line.text) {
                // VMM-LATE: an earlier request's; its descriptors close here.
                Ok(answer) if answer.id < self.last_id => {}
                Ok(Answer { id, ok: Some(value), error: None }) if id == self.last_id => {
                    let Line { fds, .. } = line;
                    return Ok(Reply { verb, value, fds });
                }
                Ok(Answer { id, ok: None, error: Some(error) }) if id == self.last_id => return Err(error),
                Ok(_) => {
                    let error = WireError::Malformed("an answer with another id, or without content".into());
                    return Err(self.failed(verb, &error, true));
                }
                Err(error) => return Err(self.failed(verb, &error, true)),
            }
        }
    }

    fn failed(&mut self, verb: &str, error: &WireError, fatal: bool) -> MachineError {
        if fatal {
            self.broken = Some((error.to_string(), error.errno()));
        }
        MachineError { operation: verb.to_owned(), message: error.to_string(), errno: Some(error.errno()) }
    }

    fn layout(&mut self) -> Result<MemoryLayout, MachineError> {
        match &self.layout {
            Some(layout) => Ok(layout.clone()),
            None => self.memory_layout(),
        }
    }
}

/// A year: a timeout so large that it cannot be added to now means no limit.
fn far() -> Instant {
    Instant::now() + Duration::from_secs(31_536_000)
}

fn read_answer(text: &[u8]) -> Result<Answer, WireError> {
    serde_json::from_slice(text).map_err(|e| WireError::Malformed(e.to_string()))
}

impl Reply {
    fn parse<T: DeserializeOwned>(&self) -> Result<T, MachineError> {
        T::deserialize(&self.value).map_err(|e| self.misfit(format!("the answer does not fit the verb: {e}")))
    }

    fn misfit(&self, message: String) -> MachineError {
        MachineError { errno: Some(Errno::EPROTO), ..MachineError::new(self.verb, message) }
    }

    /// A copy of the descriptor at `index`: two regions may name the same file.
    fn fd(&self, index: usize) -> Result<OwnedFd, MachineError> {
        let fd = self.fds.get(index).ok_or_else(|| {
            self.misfit(format!("descriptor {index} is named, {} came with the answer", self.fds.len()))
        })?;
        fd.try_clone().map_err(|e| self.misfit(format!("descriptor {index}: {e}")))
    }
}

/// Refuses a layout that cannot be: overlap, overflow, odd sizes, more regions than descriptors.
fn check_layout(layout: &MemoryLayout) -> Result<(), String> {
    if layout.regions.len() > MAX_FDS {
        return Err(format!("{} memory regions, at most {MAX_FDS} are possible", layout.regions.len()));
    }
    let mut spans = Vec::with_capacity(layout.regions.len());
    for region in &layout.regions {
        if region.page_size < 4096 || !region.page_size.is_power_of_two() {
            return Err(format!("region {} has pages of {} bytes", region.id, region.page_size));
        }
        if region.size == 0
            || !region.size.is_multiple_of(region.page_size)
            || !region.gpa.0.is_multiple_of(4096)
        {
            return Err(format!(
                "region {}: {} + {:#x} are not whole pages",
                region.id, region.gpa, region.size
            ));
        }
        let end =
            region.gpa.0.checked_add(region.size).ok_or_else(|| format!("region {} wraps", region.id))?;
        if layout.regions.iter().filter(|other| other.id == region.id).count() > 1 {
            return Err(format!("region {} is there twice", region.id));
        }
        spans.push((region.gpa.0, end));
    }
    spans.sort_unstable();
    if spans.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err("memory regions overlap".into());
    }
    Ok(())
}

impl Machine for RemoteVmm {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        self.query::<()>("blockers", None)?.parse().map(|b: Blockers| b.blockers)
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        let reply = self.query::<()>("memory_layout", None)?;
        let layout: MemoryLayout = reply.parse()?;
        check_layout(&layout).map_err(|message| reply.misfit(message))?;
        self.layout = Some(layout.clone());
        Ok(layout)
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        let layout = self.layout()?;
        let reply = self.query::<()>("memory", None)?;
        let files = match reply.parse()? {
            WireMemory::External => return Ok(MachineMemory::External),
            WireMemory::Engine { regions } => regions,
        };
        let mut regions = Vec::with_capacity(layout.regions.len());
        for region in &layout.regions {
            let mut named = files.iter().filter(|f| f.id == region.id);
            let (Some(file), None) = (named.next(), named.next()) else {
                return Err(reply.misfit(format!("region {} needs exactly one file", region.id)));
            };
            let end = file
                .offset
                .checked_add(region.size)
                .filter(|_| file.offset.is_multiple_of(4096))
                .ok_or_else(|| reply.misfit(format!("region {} at offset {:#x}", region.id, file.offset)))?;
            let mapping = SharedMemory::from_fd(reply.fd(file.fd)?, end)
                .and_then(|memory| memory.map(file.offset, region.size, Access::ReadWrite))
                .map_err(|e| reply.misfit(format!("region {}: {e}", region.id)))?;
            regions.push(GuestRegion { gpa: region.gpa.0, mapping });
        }
        let memory = GuestMemory::new(regions).map_err(|e| reply.misfit(e.to_string()))?;
        Ok(MachineMemory::Engine(memory))
    }

    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError> {
        let map: IovaMap = self.query("iova_map", Some(&DeviceParams { device: device.clone() }))?.parse()?;
        // The order of the ranges is an invariant of the type, and this one came from outside.
        Ok(IovaMap::new(map.mappings().to_vec()))
    }

    fn start_dirty(&mut self) -> Result<(), MachineError> {
        let layout = self.layout()?;
        let reply = self.act::<()>("start_dirty", None)?;
        let bitmap: WireBitmap = reply.parse()?;
        self.bitmap = Some(SharedBitmap::open(reply.fd(bitmap.fd)?, bitmap.length, &layout)?);
        Ok(())
    }

    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        self.act::<()>("sync_dirty", None)?;
        let bitmap = self
            .bitmap
            .as_ref()
            .ok_or_else(|| MachineError::new("sync_dirty", "dirty tracking was not started"))?;
        bitmap.take(dirty)
    }

    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        self.bitmap = None;
        self.act::<()>("stop_dirty", None).map(drop)
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.act::<()>("pause", None).map(drop)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.act::<()>("resume", None).map(drop)
    }

    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.act::<()>("close_device_access", None).map(drop)
    }

    fn open_device_access(&mut self) -> Result<(), MachineError> {
        self.act::<()>("open_device_access", None).map(drop)
    }

    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        self.act::<()>("drain_interrupts", None)?.parse().map(|i: Interrupts| i.pending)
    }

    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        self.act("inject_interrupts", Some(&Interrupts { pending: pending.to_vec() })).map(drop)
    }

    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        let reply = self.act::<()>("save_records", None)?;
        let Records { records } = reply.parse()?;
        if records.is_empty() {
            return Ok(Vec::new());
        }
        if records.len() > MAX_RECORDS {
            return Err(reply.misfit(format!("{} records, at most {MAX_RECORDS} are taken", records.len())));
        }
        let file = File::from(reply.fd(0)?);
        records
            .into_iter()
            .map(|record| {
                let data = read_record(&file, &record).map_err(|message| reply.misfit(message))?;
                Ok(MachineRecord { owner: record.owner, name: record.name, data })
            })
            .collect()
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        let refused = |message: String| MachineError::new("load_record", message);
        let file = record_file(std::slice::from_ref(record)).map_err(refused)?;
        let params = LoadRecord {
            record: WireRecord {
                owner: record.owner.clone(),
                name: record.name.clone(),
                offset: 0,
                length: u64::try_from(record.data.len()).unwrap_or(u64::MAX),
            },
        };
        self.call("load_record", Some(&params), &[file.as_fd()], self.timeouts.action).map(drop)
    }

    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.act::<()>("release_shared", None).map(drop)
    }

    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        self.act::<()>("reclaim_shared", None).map(drop)
    }

    fn device_was_reset(&mut self, device: &DeviceId) -> Result<(), MachineError> {
        self.act("device_was_reset", Some(&DeviceParams { device: device.clone() })).map(drop)
    }

    fn running(&mut self) -> Result<bool, MachineError> {
        self.query::<()>("running", None)?.parse().map(|r: Running| r.running)
    }

    fn external_memory_barrier(&mut self, deadline: Duration) -> Result<(), MachineError> {
        let params = Barrier { deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX) };
        let timeout = deadline.saturating_add(self.timeouts.query);
        self.call("external_memory_barrier", Some(&params), &[], timeout).map(drop)
    }
}

/// Reads one record from the file that came with it, after its bounds (VMM-BOUNDS).
pub(super) fn read_record(file: &File, record: &WireRecord) -> Result<Vec<u8>, String> {
    if record.name.is_empty() || record.name.len() > 255 {
        return Err(format!("a record's name has {} bytes, 1 to 255 are taken", record.name.len()));
    }
    if record.length > MAX_RECORD {
        return Err(format!(
            "record {} has {} bytes, at most {MAX_RECORD} are taken",
            record.name, record.length
        ));
    }
    let size = file.metadata().map_err(|e| format!("record file: {e}"))?.len();
    if record.offset.checked_add(record.length).is_none_or(|end| end > size) {
        return Err(format!("record {} ends beyond its file of {size} bytes", record.name));
    }
    let length = usize::try_from(record.length).map_err(|e| e.to_string())?;
    let mut data = vec![0; length];
    file.read_exact_at(&mut data, record.offset).map_err(|e| format!("record {}: {e}", record.name))?;
    Ok(data)
}

/// A memfd with the contents of `records`, one after the other.
pub(super) fn record_file(records: &[MachineRecord]) -> Result<File, String> {
    use rustix::fs::MemfdFlags;
    use std::io::Write;
    if records.len() > MAX_RECORDS {
        return Err(format!("{} records, at most {MAX_RECORDS} are taken", records.len()));
    }
    let fd = rustix::fs::memfd_create("airlift-records", MemfdFlags::CLOEXEC)
        .map_err(|e| format!("memfd for records: {e}"))?;
    let mut file = File::from(fd);
    for record in records {
        if record.name.is_empty() || record.name.len() > 255 {
            return Err(format!("a record's name has {} bytes, 1 to 255 are taken", record.name.len()));
        }
        if u64::try_from(record.data.len()).is_ok_and(|n| n > MAX_RECORD) {
            let length = record.data.len();
            return Err(format!("record {} has {length} bytes, at most {MAX_RECORD} are taken", record.name));
        }
        file.write_all(&record.data).map_err(|e| format!("record {}: {e}", record.name))?;
    }
    Ok(file)
}

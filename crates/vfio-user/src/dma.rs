//! A served device's access to its client's memory.
//!
//! Memory that came with a descriptor is mapped; memory without one is read and written by messages
//! to the client. Every write is marked in the client's dirty log when one runs (V2-DIRTY). What is
//! done with the bytes, and when the device must not touch memory, is the device's own affair, with
//! one exception: an arc that stops the device fails while a guard for writing lives (VU-GUARD).

use crate::dma_log::DirtyLog;
use airlift_core::Errno;
use airlift_memory::{Access, Mapping, MemoryError, SharedMemory};
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

bitflags::bitflags! {
    /// What may be done with mapped memory, with the values that stand in DMA_MAP.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct DmaAccess: u32 {
        /// The device may read it.
        const READ = 1;
        /// The device may write it.
        const WRITE = 2;
    }
}

/// An access to the client's memory was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// No mapping of the client holds all of the range.
    #[error("{length} bytes at iova {iova:#x} are not mapped")]
    Unmapped {
        /// First address.
        iova: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The client did not allow this kind of access.
    #[error("the client does not allow {wanted:?} at iova {iova:#x}")]
    Denied {
        /// First address.
        iova: u64,
        /// What was asked for.
        wanted: DmaAccess,
    },
    /// The access does not fit the mapping.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The client answered a message with an error, or not at all.
    #[error("the client answered {0}")]
    Client(Errno),
}

impl DmaError {
    /// The error number that says the same.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Unmapped { .. } => Errno::EFAULT,
            Self::Denied { .. } => Errno::EACCES,
            Self::Memory(error) => Errno(error.raw_errno()),
            Self::Client(errno) => *errno,
        }
    }
}

/// Reads and writes a client's memory by messages.
pub(crate) trait DmaPeer: Send + Sync {
    fn dma_read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Errno>;
    fn dma_write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}

/// Access to the client's memory. Clones are the same memory; any thread may use it. When the client
/// goes, all mappings go, and every access fails as unmapped.
#[derive(Clone)]
pub struct Dma(Arc<Inner>);

struct Inner {
    mappings: RwLock<BTreeMap<u64, Entry>>,
    log: RwLock<Option<DirtyLog>>,
    guards: Mutex<Guards>,
    log_limit: u64,
}

#[derive(Default)]
struct Guards {
    next: u64,
    live: BTreeMap<u64, Held>,
}

#[derive(Clone, Copy)]
struct Held {
    iova: u64,
    length: u64,
    since: Instant,
    writes: bool,
}

#[derive(Clone)]
struct Entry {
    length: u64,
    access: DmaAccess,
    backing: Backing,
}

#[derive(Clone)]
enum Backing {
    Mapped(Mapping),
    Messages(Arc<dyn DmaPeer>),
}

impl Backing {
    fn read(&self, iova: u64, offset: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        match self {
            Self::Mapped(mapping) => Ok(mapping.read(offset, buf)?),
            Self::Messages(peer) => peer.dma_read(iova, buf).map_err(DmaError::Client),
        }
    }

    fn write(&self, iova: u64, offset: u64, data: &[u8]) -> Result<(), DmaError> {
        match self {
            Self::Mapped(mapping) => Ok(mapping.write(offset, data)?),
            Self::Messages(peer) => peer.dma_write(iova, data).map_err(DmaError::Client),
        }
    }
}

/// A guard for writing that was still there when the device said that it had stopped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LiveGuard {
    pub(crate) iova: u64,
    pub(crate) length: u64,
    pub(crate) age: Duration,
}

fn read_lock<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// `usize` to `u64`, which never loses anything on the platforms that Linux runs on.
const fn wide(length: usize) -> u64 {
    length as u64
}

impl Dma {
    /// No mappings yet. `log_limit` bounds the bytes of the dirty bitmaps.
    pub(crate) fn new(log_limit: u64) -> Self {
        Self(Arc::new(Inner {
            mappings: RwLock::default(),
            log: RwLock::default(),
            guards: Mutex::default(),
            log_limit,
        }))
    }

    fn guards(&self) -> MutexGuard<'_, Guards> {
        self.0.guards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds `length` bytes from `iova` for `access`. They must lie within one mapping of the client.
    /// A guard for writing marks all its pages dirty when it is dropped.
    ///
    /// # Errors
    /// When the range is not mapped, or not for this access.
    pub fn map(&self, iova: u64, length: u64, access: DmaAccess) -> Result<DmaGuard, DmaError> {
        // The guard is registered before the lock is given back: an unmapping sees it or prevents it.
        let mappings = read_lock(&self.0.mappings);
        let (start, entry) = find(&mappings, iova, length, access)?;
        let mut guards = self.guards();
        let id = guards.next;
        guards.next += 1;
        let writes = access.contains(DmaAccess::WRITE);
        guards.live.insert(id, Held { iova, length, since: Instant::now(), writes });
        drop(guards);
        let guard = DmaGuard {
            dma: self.clone(),
            id,
            iova,
            length,
            offset: iova - start,
            access,
            backing: entry.backing.clone(),
        };
        drop(mappings);
        Ok(guard)
    }

    /// Reads `buf.len()` bytes from `iova`; the range may span mappings that touch.
    ///
    /// # Errors
    /// When a part of it is not mapped for reading, or the client fails to answer.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        self.pieces(iova, buf.len(), DmaAccess::READ, |at, offset, length, backing| {
            let part = &mut buf[done..done + length];
            done += length;
            backing.read(at, offset, part)
        })
    }

    /// Writes `data` to `iova` and marks its pages dirty; the range may span mappings that touch.
    ///
    /// # Errors
    /// When a part of it is not mapped for writing, or the client fails to answer. What lies before
    /// that part may have been written, and is marked.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        self.pieces(iova, data.len(), DmaAccess::WRITE, |at, offset, length, backing| {
            let part = &data[done..done + length];
            done += length;
            let result = backing.write(at, offset, part);
            self.mark(at, wide(length));
            result
        })
    }

    /// Reads the aligned word at `iova`: atomically, with acquire order, where memory is mapped.
    ///
    /// # Errors
    /// When it is not mapped for reading or not aligned to 8 bytes.
    pub fn load_u64(&self, iova: u64) -> Result<u64, DmaError> {
        self.map(iova, 8, DmaAccess::READ)?.load_u64(0)
    }

    /// Writes the aligned word at `iova` and marks its page dirty: atomically, with release order,
    /// where memory is mapped.
    ///
    /// # Errors
    /// When it is not mapped for writing or not aligned to 8 bytes.
    pub fn store_u64(&self, iova: u64, value: u64) -> Result<(), DmaError> {
        self.map(iova, 8, DmaAccess::WRITE)?.store_u64(0, value)
    }

    /// Marks `length` bytes from `iova` as written, for a device that writes memory by a way of its
    /// own. Comes after the write.
    pub fn mark(&self, iova: u64, length: u64) {
        if let Some(log) = read_lock(&self.0.log).as_ref() {
            log.mark(iova, length);
        }
    }

    /// The client's mappings: first address, length in bytes, access; by address.
    #[must_use]
    pub fn mappings(&self) -> Vec<(u64, u64, DmaAccess)> {
        read_lock(&self.0.mappings).iter().map(|(&iova, e)| (iova, e.length, e.access)).collect()
    }

    /// Calls `each` with every piece of the range that lies in one mapping, holding a guard for it.
    fn pieces(
        &self,
        iova: u64,
        length: usize,
        access: DmaAccess,
        mut each: impl FnMut(u64, u64, usize, &Backing) -> Result<(), DmaError>,
    ) -> Result<(), DmaError> {
        let mut done = 0;
        while done < length {
            let at = iova.checked_add(wide(done)).ok_or_else(|| unmapped(iova, wide(length)))?;
            let room = {
                let mappings = read_lock(&self.0.mappings);
                let (&start, entry) = mappings.range(..=at).next_back().ok_or_else(|| unmapped(at, 1))?;
                (start + entry.length).checked_sub(at).filter(|r| *r > 0).ok_or_else(|| unmapped(at, 1))?
            };
            let part = usize::try_from(room).unwrap_or(usize::MAX).min(length - done);
            let mut guard = self.map(at, wide(part), access)?;
            // The caller marks, also when its write fails half-way.
            guard.access = DmaAccess::READ;
            each(at, guard.offset, part, &guard.backing)?;
            done += part;
        }
        Ok(())
    }

    /// DMA_MAP. With a descriptor the range is mapped from `offset` in it.
    pub(crate) fn add(
        &self,
        iova: u64,
        length: u64,
        access: DmaAccess,
        fd: Option<(OwnedFd, u64)>,
        peer: Arc<dyn DmaPeer>,
        max_maps: usize,
    ) -> Result<(), Errno> {
        let end = iova.checked_add(length).filter(|_| length > 0).ok_or(Errno::EINVAL)?;
        let backing = match fd {
            None => Backing::Messages(peer),
            Some((fd, offset)) => {
                let size = offset.checked_add(length).ok_or(Errno::EINVAL)?;
                let mode =
                    if access.contains(DmaAccess::WRITE) { Access::ReadWrite } else { Access::ReadOnly };
                let memory = SharedMemory::from_fd(fd, size);
                let mapping = memory.and_then(|memory| memory.map(offset, length, mode));
                Backing::Mapped(mapping.map_err(|e| Errno(e.raw_errno()))?)
            }
        };
        let mut mappings = write_lock(&self.0.mappings);
        if mappings.len() >= max_maps {
            return Err(Errno::ENOSPC);
        }
        let below = mappings.range(..end).next_back();
        if below.is_some_and(|(start, e)| start + e.length > iova) {
            return Err(Errno::EEXIST);
        }
        if let Some(log) = write_lock(&self.0.log).as_mut().filter(|log| log.is_all()) {
            log.add(iova, length)?;
        }
        mappings.insert(iova, Entry { length, access, backing });
        Ok(())
    }

    /// Whether exactly this range is one mapping.
    pub(crate) fn has(&self, iova: u64, length: u64) -> bool {
        read_lock(&self.0.mappings).get(&iova).is_some_and(|e| e.length == length)
    }

    /// DMA_UNMAP of a mapping; `EBUSY` while a guard holds a part of it. What was logged stays.
    pub(crate) fn remove(&self, iova: u64, length: u64) -> Result<(), Errno> {
        let mut mappings = write_lock(&self.0.mappings);
        if mappings.get(&iova).is_none_or(|e| e.length != length) {
            return Err(Errno::ENOENT);
        }
        let end = iova.saturating_add(length);
        let held = |h: &&Held| h.iova < end && iova < h.iova.saturating_add(h.length);
        if let Some(held) = self.guards().live.values().find(held) {
            tracing::warn!(
                iova = held.iova,
                length = held.length,
                age_ms = held.since.elapsed().as_millis(),
                "unmapping refused: the device still holds the memory"
            );
            return Err(Errno::EBUSY);
        }
        mappings.remove(&iova);
        Ok(())
    }

    /// The client is gone. Guards that live keep their own memory until they are dropped.
    pub(crate) fn clear(&self) {
        write_lock(&self.0.mappings).clear();
        *write_lock(&self.0.log) = None;
    }

    /// The oldest guard for writing that lives (VU-GUARD).
    pub(crate) fn write_guard(&self) -> Option<LiveGuard> {
        let guards = self.guards();
        let oldest = guards.live.values().filter(|h| h.writes).min_by_key(|h| h.since)?;
        Some(LiveGuard { iova: oldest.iova, length: oldest.length, age: oldest.since.elapsed() })
    }

    /// DMA_LOGGING_START; the page size that was chosen. No ranges: all that is or will be mapped.
    pub(crate) fn start_log(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64, Errno> {
        let mappings = read_lock(&self.0.mappings);
        let mut log = write_lock(&self.0.log);
        if log.is_some() {
            return Err(Errno::EBUSY);
        }
        let all: Vec<_>;
        let named = if ranges.is_empty() {
            all = mappings.iter().map(|(&iova, e)| (iova, e.length)).collect();
            &all
        } else {
            ranges
        };
        let new = DirtyLog::new(page_size, ranges.is_empty(), named, self.0.log_limit)?;
        let chosen = new.page_size();
        *log = Some(new);
        Ok(chosen)
    }

    /// DMA_LOGGING_STOP; without a log it does nothing.
    pub(crate) fn stop_log(&self) {
        *write_lock(&self.0.log) = None;
    }

    /// DMA_LOGGING_REPORT.
    pub(crate) fn report_log(&self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, Errno> {
        read_lock(&self.0.log).as_ref().ok_or(Errno::EINVAL)?.report(iova, length, page_size)
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma").field("mappings", &self.mappings().len()).finish_non_exhaustive()
    }
}

const fn unmapped(iova: u64, length: u64) -> DmaError {
    DmaError::Unmapped { iova, length }
}

fn find(
    mappings: &BTreeMap<u64, Entry>,
    iova: u64,
    length: u64,
    access: DmaAccess,
) -> Result<(u64, &Entry), DmaError> {
    let end = iova.checked_add(length).filter(|_| length > 0).ok_or_else(|| unmapped(iova, length))?;
    let (&start, entry) = mappings.range(..=iova).next_back().ok_or_else(|| unmapped(iova, length))?;
    if end > start + entry.length {
        return Err(unmapped(iova, length));
    }
    if !entry.access.contains(access) {
        return Err(DmaError::Denied { iova, wanted: access });
    }
    Ok((start, entry))
}

/// A held range of the client's memory. Offsets are from its start, in bytes.
///
/// One for writing marks all its pages dirty when it is dropped, whether they were written or not.
/// The client cannot unmap the range while it lives.
pub struct DmaGuard {
    dma: Dma,
    id: u64,
    iova: u64,
    length: u64,
    offset: u64,
    access: DmaAccess,
    backing: Backing,
}

impl DmaGuard {
    /// Its first address.
    #[must_use]
    pub const fn iova(&self) -> u64 {
        self.iova
    }

    /// Its length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a guard is never empty")]
    pub const fn len(&self) -> u64 {
        self.length
    }

    fn check(&self, offset: u64, length: usize, wanted: DmaAccess) -> Result<(), DmaError> {
        let length = wide(length);
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(MemoryError::OutOfBounds { offset, length, size: self.length }.into());
        }
        if !self.access.contains(wanted) {
            return Err(DmaError::Denied { iova: self.iova, wanted });
        }
        Ok(())
    }

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// When the range exceeds the guard, the guard is not for reading, or the client fails.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        self.check(offset, buf.len(), DmaAccess::READ)?;
        self.backing.read(self.iova + offset, self.offset + offset, buf)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// When the range exceeds the guard, the guard is not for writing, or the client fails.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DmaError> {
        self.check(offset, data.len(), DmaAccess::WRITE)?;
        self.backing.write(self.iova + offset, self.offset + offset, data)
    }

    /// Reads the aligned word at `offset`; atomic with acquire order where memory is mapped.
    ///
    /// # Errors
    /// As [`read`](Self::read), and when it is not aligned.
    pub fn load_u64(&self, offset: u64) -> Result<u64, DmaError> {
        self.check(offset, 8, DmaAccess::READ)?;
        match &self.backing {
            Backing::Mapped(mapping) => Ok(mapping.load_u64(self.offset + offset)?),
            Backing::Messages(peer) => {
                let mut word = [0; 8];
                peer.dma_read(self.iova + offset, &mut word).map_err(DmaError::Client)?;
                Ok(u64::from_ne_bytes(word))
            }
        }
    }

    /// Writes the aligned word at `offset`; atomic with release order where memory is mapped.
    ///
    /// # Errors
    /// As [`write`](Self::write), and when it is not aligned.
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), DmaError> {
        self.check(offset, 8, DmaAccess::WRITE)?;
        match &self.backing {
            Backing::Mapped(mapping) => Ok(mapping.store_u64(self.offset + offset, value)?),
            Backing::Messages(peer) => {
                peer.dma_write(self.iova + offset, &value.to_ne_bytes()).map_err(DmaError::Client)
            }
        }
    }
}

impl Drop for DmaGuard {
    fn drop(&mut self) {
        if self.access.contains(DmaAccess::WRITE) {
            self.dma.mark(self.iova, self.length);
        }
        // Only now it is gone: who finds no guard finds the pages marked.
        self.dma.guards().live.remove(&self.id);
    }
}

impl fmt::Debug for DmaGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaGuard")
            .field("iova", &self.iova)
            .field("len", &self.length)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

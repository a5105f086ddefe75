//! Memory that a client lets a server use without a descriptor: served by messages, and logged here.
//!
//! The server's own log does not see such memory on every server, so the client marks what it wrote
//! for the server itself (VU-MESSAGE-DIRTY).

use airlift_core::{DirtyError, DirtySource, DomainId, Errno, IovaRange};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Carries out the DMA messages of a server.
///
/// It is called while the client's connection is held: it must not call the client, and must not
/// block for long.
pub trait DmaHandler: Send {
    /// Reads `buf.len()` bytes from `iova`, for DMA_READ.
    ///
    /// # Errors
    /// The error number that the server gets, when the range is not mapped for reading.
    fn read(&mut self, iova: u64, buf: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data` to `iova`, for DMA_WRITE.
    ///
    /// # Errors
    /// The error number that the server gets, when the range is not mapped for writing.
    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}

const SHIFT: u32 = 12;

/// Pages that DMA_WRITE messages have written. The server can only write what its client's handler
/// allows, which bounds the set.
#[derive(Debug, Default)]
pub(super) struct WriteLog(Mutex<Option<BTreeSet<u64>>>);

impl WriteLog {
    fn pages(&self) -> MutexGuard<'_, Option<BTreeSet<u64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mark(&self, iova: u64, length: u64) {
        if length > 0
            && let Some(pages) = self.pages().as_mut()
        {
            pages.extend(iova >> SHIFT..=(iova.saturating_add(length - 1)) >> SHIFT);
        }
    }
}

/// Reports, as a [`DirtySource`], the memory that a server wrote by messages through this client.
#[derive(Debug)]
pub struct DmaWriteLog {
    log: Arc<WriteLog>,
    domain: DomainId,
}

impl DmaWriteLog {
    pub(super) const fn new(log: Arc<WriteLog>, domain: DomainId) -> Self {
        Self { log, domain }
    }
}

impl DirtySource for DmaWriteLog {
    fn domain(&self) -> &DomainId {
        &self.domain
    }

    fn page_size(&self) -> u64 {
        if self.log.pages().is_some() { 1 << SHIFT } else { 0 }
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        *self.log.pages() = Some(BTreeSet::new());
        Ok(())
    }

    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        let end = range.end().unwrap_or(u64::MAX);
        if range.length == 0 {
            return Ok(());
        }
        let first = range.start.0 >> SHIFT;
        let behind = ((end - 1) >> SHIFT) + 1;
        let taken = {
            let mut guard = self.log.pages();
            let Some(pages) = guard.as_mut() else {
                return Err(DirtyError {
                    operation: "report of DMA messages".into(),
                    errno: None,
                    message: "the log was not started".into(),
                });
            };
            let mut taken = pages.split_off(&first);
            pages.append(&mut taken.split_off(&behind));
            taken
        };
        let mut run: Option<(u64, u64)> = None;
        for page in taken {
            match &mut run {
                Some((_, end)) if *end == page => *end += 1,
                _ => {
                    if let Some((start, end)) = run.replace((page, page + 1)) {
                        dirty(IovaRange::new(start << SHIFT, (end - start) << SHIFT));
                    }
                }
            }
        }
        if let Some((start, end)) = run {
            dirty(IovaRange::new(start << SHIFT, (end - start) << SHIFT));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        *self.log.pages() = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_out_once_and_as_runs() {
        let log = Arc::new(WriteLog::default());
        let mut source = DmaWriteLog::new(Arc::clone(&log), DomainId("d".into()));
        log.mark(0, 4096);
        source.start(&[]).unwrap();
        log.mark(4095, 2);
        log.mark(0x10000, 1);
        let report = |source: &mut DmaWriteLog, range| {
            let mut runs = Vec::new();
            source.report(range, &mut |r| runs.push((r.start.0, r.length))).unwrap();
            runs
        };
        assert_eq!(report(&mut source, IovaRange::new(0, 0x8000)), [(0, 8192)]);
        assert_eq!(report(&mut source, IovaRange::new(0, 0x20000)), [(0x10000, 4096)]);
        source.stop().unwrap();
        assert!(source.report(IovaRange::new(0, 1), &mut |_| ()).is_err());
    }
}

//! A dirty report that loses its last page.

use airlift_core::{DirtyError, DirtySource, DomainId, IovaRange};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of the page that is lost.
const PAGE: u64 = 4096;

/// Loses the last page of the first report that has one after it was armed.
#[derive(Clone, Debug, Default)]
pub struct LastPageLost {
    armed: Arc<AtomicBool>,
}

impl LastPageLost {
    /// Not armed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From here on the next report loses a page.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Release);
    }

    /// Passes `(start, length)` ranges on without the last page, if it is armed and there is one.
    pub(super) fn pass(&self, mut ranges: Vec<(u64, u64)>, mut each: impl FnMut(u64, u64)) {
        if self.armed.load(Ordering::Acquire)
            && let Some(last) = ranges.iter_mut().rfind(|(_, length)| *length > 0)
        {
            last.1 -= last.1.min(PAGE);
            self.armed.store(false, Ordering::Release);
        }
        for (start, length) in ranges.into_iter().filter(|(_, length)| *length > 0) {
            each(start, length);
        }
    }
}

/// A dirty source whose report loses a page when the loss is armed.
pub struct LossyDirtySource {
    inner: Box<dyn DirtySource>,
    loss: LastPageLost,
}

impl std::fmt::Debug for LossyDirtySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LossyDirtySource").field("loss", &self.loss).finish_non_exhaustive()
    }
}

impl LossyDirtySource {
    /// Around `inner`.
    #[must_use]
    pub fn new(inner: Box<dyn DirtySource>, loss: LastPageLost) -> Self {
        Self { inner, loss }
    }
}

impl DirtySource for LossyDirtySource {
    fn domain(&self) -> &DomainId {
        self.inner.domain()
    }

    fn page_size(&self) -> u64 {
        self.inner.page_size()
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        self.inner.start(ranges)
    }

    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        let mut ranges = Vec::new();
        self.inner.report(range, &mut |r| ranges.push((r.start.0, r.length)))?;
        self.loss.pass(ranges, |start, length| dirty(IovaRange::new(start, length)));
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.inner.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(loss: &LastPageLost, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut got = Vec::new();
        loss.pass(ranges.to_vec(), |start, length| got.push((start, length)));
        got
    }

    #[test]
    fn one_page_is_lost_once_after_arming() {
        let loss = LastPageLost::new();
        let ranges = [(0, 8192), (65536, 8192)];
        assert_eq!(passed(&loss, &ranges), ranges);
        loss.arm();
        assert_eq!(passed(&loss, &[]), []);
        assert_eq!(passed(&loss, &ranges), [(0, 8192), (65536, 4096)]);
        assert_eq!(passed(&loss, &ranges), ranges);
        loss.arm();
        assert_eq!(passed(&loss, &[(0, 4096)]), []);
    }
}

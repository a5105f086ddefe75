//! A region that counts what is moved through it.

use airlift_core::v1::INFO_SIZE;
use airlift_core::{DeviceError, RegionAccess, RegionArea};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of data that were moved, and accesses to fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes copied out of mappings.
    pub read_mapped: u64,
    /// Bytes that the transport has delivered.
    pub read_trapped: u64,
    /// Bytes copied into mappings.
    pub write_mapped: u64,
    /// Bytes that the transport was given.
    pub write_trapped: u64,
    /// Accesses to fields.
    pub fields: u64,
}

impl Counts {
    /// Bytes of data that were copied, in either direction and way.
    #[must_use]
    pub const fn data(&self) -> u64 {
        self.read_mapped + self.read_trapped + self.write_mapped + self.write_trapped
    }
}

/// Passes everything on to a region, and counts it where it was not refused.
#[derive(Debug)]
pub struct Counted<R> {
    inner: R,
    counts: Arc<Mutex<Counts>>,
}

impl<R: RegionAccess> Counted<R> {
    /// Counts what goes to `inner`.
    #[must_use]
    pub fn new(inner: R) -> Self {
        Self { inner, counts: Arc::default() }
    }

    /// The counts, to be asked while the region is used.
    pub fn counts(&self) -> impl Fn() -> Counts + Send + use<R> {
        let counts = Arc::clone(&self.counts);
        move || *counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl<R: RegionAccess> RegionAccess for Counted<R> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn mapped(&self) -> &[RegionArea] {
        self.inner.mapped()
    }

    fn is_mappable(&self) -> bool {
        self.inner.is_mappable()
    }

    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read_trapped(offset, buf)?;
        self.count(|counts| match offset {
            ..INFO_SIZE => counts.fields += 1,
            _ => counts.read_trapped += buf.len() as u64,
        });
        Ok(())
    }

    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.inner.write_trapped(offset, data)?;
        self.count(|counts| match offset {
            ..INFO_SIZE => counts.fields += 1,
            _ => counts.write_trapped += data.len() as u64,
        });
        Ok(())
    }

    fn read_mapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read_mapped(offset, buf)?;
        self.count(|counts| counts.read_mapped += buf.len() as u64);
        Ok(())
    }

    fn write_mapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.inner.write_mapped(offset, data)?;
        self.count(|counts| counts.write_mapped += data.len() as u64);
        Ok(())
    }
}

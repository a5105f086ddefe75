//! DMA logging of a device over a socket (V2-LOGGING).
//!
//! Servers differ in what they take: one that does not read whole messages also loses pages when the
//! page sizes of START and REPORT differ, and refuses a part of a region. So one page size is used
//! throughout, and such a server is asked for each range exactly as it was started (VU-LOG-REQUEST).

use super::Client;
use super::channel::protocol;
use crate::codec::{FeatureFlags, LoggingControl, LoggingRange, LoggingReport, command, feature, take};
use airlift_core::{DeviceError, DeviceErrorKind, DirtyError, DirtySource, DomainId, IovaRange};
use zerocopy::IntoBytes;

/// The page size that is asked for, in bytes.
const PAGE: u64 = 4096;
/// Bytes of memory that one report is about, where the server takes parts of ranges: its bitmap then
/// does not hold the connection up.
const PART: u64 = 8 << 30;
/// Most bytes of one bitmap.
const MAX_BITMAP: u64 = 64 << 20;
/// Most ranges in one START.
const MAX_RANGES: usize = 60_000;

/// Reports the memory that a device has written by DMA, from the device's own log. Shares the
/// device's connection.
#[derive(Debug)]
pub struct VfioUserDirtySource {
    client: Client,
    domain: DomainId,
    page_size: u64,
    ranges: Vec<(u64, u64)>,
    parts: bool,
}

fn dirty(operation: &str, error: &DeviceError) -> DirtyError {
    DirtyError { operation: operation.into(), errno: error.errno, message: error.to_string() }
}

impl VfioUserDirtySource {
    /// `parts`: the server takes any part of a range.
    pub(super) const fn new(client: Client, domain: DomainId, parts: bool) -> Self {
        Self { client, domain, page_size: 0, ranges: Vec::new(), parts }
    }

    fn begin(&mut self, ranges: &[IovaRange]) -> Result<(), DeviceError> {
        let misuse = |text| DeviceError::new(DeviceErrorKind::Misuse, "DMA_LOGGING_START", text);
        if ranges.len() > MAX_RANGES {
            return Err(misuse("too many ranges for one request"));
        }
        let mut list = Vec::new();
        for range in ranges.iter().filter(|r| r.length > 0) {
            let end = range.end().ok_or_else(|| misuse("a range exceeds 2^64"))?;
            let start = range.start.0 & !(PAGE - 1);
            let end = end.checked_next_multiple_of(PAGE).ok_or_else(|| misuse("a range exceeds 2^64"))?;
            list.push(LoggingRange { iova: start, length: end - start });
        }
        // No range would mean all memory.
        if list.is_empty() {
            return Err(misuse("no range to log"));
        }
        let num_ranges = u32::try_from(list.len()).unwrap_or(0);
        let control = LoggingControl { page_size: PAGE, num_ranges, reserved: 0 };
        let data = [control.as_bytes(), list.as_bytes()].concat();
        let reply = self.client.device_feature(feature::DMA_LOGGING_START, FeatureFlags::SET, &data, 0)?;
        // A server that echoes nothing has taken what was asked for.
        let chosen = take::<LoggingControl>(&reply).map_or(PAGE, |(control, _)| control.page_size);
        if !chosen.is_power_of_two() || chosen < PAGE {
            return Err(protocol(command::DEVICE_FEATURE, format!("a log at pages of {chosen} bytes")));
        }
        self.page_size = chosen;
        self.ranges = list.iter().map(|r| (r.iova, r.length)).collect();
        Ok(())
    }

    fn fetch(&self, start: u64, length: u64, each: &mut dyn FnMut(IovaRange)) -> Result<(), DeviceError> {
        let number = command::DEVICE_FEATURE;
        let pages = length.div_ceil(self.page_size);
        let bytes = pages.div_ceil(64) * 8;
        let room = u32::try_from(bytes + 24).ok().filter(|_| bytes <= MAX_BITMAP);
        let room = room.ok_or_else(|| {
            DeviceError::new(DeviceErrorKind::Misuse, "DMA_LOGGING_REPORT", "a range with too large a bitmap")
        })?;
        let asked = LoggingReport { iova: start, length, page_size: self.page_size };
        let flags = FeatureFlags::GET;
        let reply = self.client.device_feature(feature::DMA_LOGGING_REPORT, flags, asked.as_bytes(), room)?;
        let (head, bitmap) = take::<LoggingReport>(&reply)
            .ok_or_else(|| protocol(number, "the report is empty (VU-EMPTY-REPORT)"))?;
        let bitmap = usize::try_from(bytes).ok().and_then(|bytes| bitmap.get(..bytes));
        let bitmap = bitmap.filter(|_| head == asked).ok_or_else(|| {
            protocol(number, "the report is not the one that was asked for, or has no whole bitmap")
        })?;
        let mut run: Option<(u64, u64)> = None;
        let mut flush = |run: &mut Option<(u64, u64)>| {
            if let Some((from, to)) = run.take() {
                each(IovaRange::new(start + from * self.page_size, (to - from) * self.page_size));
            }
        };
        for (index, word) in (0_u64..).zip(bitmap.as_chunks::<8>().0) {
            let mut word = u64::from_le_bytes(*word);
            while word != 0 {
                let page = index * 64 + u64::from(word.trailing_zeros());
                word &= word - 1;
                if page >= pages {
                    break;
                }
                match &mut run {
                    Some((_, to)) if *to == page => *to += 1,
                    _ => {
                        flush(&mut run);
                        run = Some((page, page + 1));
                    }
                }
            }
        }
        flush(&mut run);
        Ok(())
    }

    fn collect(&self, range: IovaRange, each: &mut dyn FnMut(IovaRange)) -> Result<(), DeviceError> {
        if self.page_size == 0 {
            let text = "the log was not started";
            return Err(DeviceError::new(DeviceErrorKind::Misuse, "DMA_LOGGING_REPORT", text));
        }
        let end = range.end().unwrap_or(u64::MAX);
        for &(start, length) in &self.ranges {
            let stop = start + length;
            if stop <= range.start.0 || end <= start {
                continue;
            }
            if !self.parts {
                self.fetch(start, length, each)?;
                continue;
            }
            // Both ends of a range are whole pages, so that rounding stays within it.
            let mut at = range.start.0.max(start) & !(self.page_size - 1);
            let last = end.min(stop).checked_next_multiple_of(self.page_size).unwrap_or(stop);
            while at < last {
                let part = (last - at).min(PART);
                self.fetch(at, part, each)?;
                at += part;
            }
        }
        Ok(())
    }
}

impl DirtySource for VfioUserDirtySource {
    fn domain(&self) -> &DomainId {
        &self.domain
    }

    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        self.begin(ranges).map_err(|e| dirty("DMA_LOGGING_START", &e))
    }

    fn report(&mut self, range: IovaRange, each: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        self.collect(range, each).map_err(|e| dirty("DMA_LOGGING_REPORT", &e))
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.page_size = 0;
        self.ranges.clear();
        let stopped = self.client.device_feature(feature::DMA_LOGGING_STOP, FeatureFlags::SET, &[], 0);
        stopped.map(|_| ()).map_err(|e| dirty("DMA_LOGGING_STOP", &e))
    }
}

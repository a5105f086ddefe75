//! A device's own DMA logging: the features DMA_LOGGING_START, STOP and REPORT (V2-LOGGING, K-RANGES).
//!
//! A device chooses its page size. Ranges are then made of whole such pages, by starting once more
//! where they were not, so that no page of the device lies in two reports: reading the first would
//! clear what belongs to the second.

use super::bitmap::{Ranges, bitmap, runs};
use crate::DeviceFd;
use crate::sys::{self, CallError};
use airlift_core::{DeviceId, DirtyError, DirtySource, DomainId, Errno, IovaRange};
use std::os::fd::AsFd;
use std::time::Duration;

/// The page size that is asked for, in bytes.
const PAGE: u64 = 4096;
/// How long a device may take over one request: some ask their firmware.
const ANSWER: Duration = Duration::from_secs(30);

/// How long one that has not answered may take to end its log.
const AFTER_GIVING_UP: Duration = Duration::from_secs(2);

const START: &str = "DMA_LOGGING_START";
const REPORT: &str = "DMA_LOGGING_REPORT";
const STOP: &str = "DMA_LOGGING_STOP";

/// Reports the memory that a device has written by DMA, from the device's own log.
#[derive(Debug)]
pub struct DeviceLog(Log<DeviceFd>);

impl DeviceLog {
    /// The log of the device `id`, whose descriptor is shared. Whether it has one is seen at the start.
    #[must_use]
    pub fn new(id: &DeviceId, device: DeviceFd) -> Self {
        Self(Log::new(device, domain(id)))
    }
}

/// A log is its device's alone.
fn domain(id: &DeviceId) -> DomainId {
    DomainId(format!("device:{id}"))
}

impl DirtySource for DeviceLog {
    fn domain(&self) -> &DomainId {
        &self.0.domain
    }

    fn page_size(&self) -> u64 {
        self.0.page_size
    }

    /// A device that refuses the number of ranges is asked for fewer, which then cover the gaps too.
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        self.0.start(ranges)
    }

    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        self.0.report(range, dirty)
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.0.stop()
    }
}

/// What a device is asked.
trait Requests {
    fn logging_start(&self, page_size: u64, ranges: &[[u64; 2]]) -> Result<u64, Errno>;
    fn logging_report(&self, iova: u64, length: u64, page_size: u64, bits: &mut [u64]) -> Result<(), Errno>;
    fn logging_stop(&self, within: Duration) -> Result<(), Errno>;
}

impl Requests for DeviceFd {
    fn logging_start(&self, page_size: u64, ranges: &[[u64; 2]]) -> Result<u64, Errno> {
        self.alarm().call(ANSWER, || sys::logging_start(self.as_fd(), page_size, ranges)).map_err(errno)
    }

    fn logging_report(&self, iova: u64, length: u64, page_size: u64, bits: &mut [u64]) -> Result<(), Errno> {
        // Never a second time after EINTR: the first may have cleared bits that it did not give.
        let mut once = || Ok(sys::logging_report(self.as_fd(), iova, length, page_size, bits));
        self.alarm().call(ANSWER, &mut once).map_err(errno)?
    }

    fn logging_stop(&self, within: Duration) -> Result<(), Errno> {
        self.alarm().call(within, || sys::logging_stop(self.as_fd())).map_err(errno)
    }
}

const fn errno(error: CallError) -> Errno {
    match error {
        CallError::Errno(errno) => errno,
        CallError::TimedOut => Errno::ETIMEDOUT,
        CallError::Interrupted => Errno::EINTR,
    }
}

#[derive(Debug)]
struct Log<D> {
    device: D,
    domain: DomainId,
    page_size: u64,
    ranges: Ranges,
    /// The device has not answered a report: it is not waited for again at the next one.
    gave_up: Option<Errno>,
}

fn failed(operation: &str, errno: Option<Errno>, message: impl Into<String>) -> DirtyError {
    DirtyError { operation: operation.into(), errno, message: message.into() }
}

/// Whether fewer ranges may succeed: too many for the kernel, for the device, or for its memory.
const fn fewer_may_do(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::E2BIG | Errno::ENOSPC | Errno::EINVAL | Errno::ENOMEM | Errno::ERANGE | Errno::EOVERFLOW
    )
}

impl<D: Requests> Log<D> {
    fn new(device: D, domain: DomainId) -> Self {
        Self { device, domain, page_size: 0, ranges: Ranges::default(), gave_up: None }
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let all =
            Ranges::new(ranges, PAGE, u64::MAX).ok_or_else(|| failed(START, None, "a range exceeds 2^64"))?;
        if all.is_empty() {
            return Err(failed(START, None, "no range to log"));
        }
        let (chosen, mut started) = self.start_merged(&all)?;
        if !chosen.is_power_of_two() || chosen < PAGE {
            // Best effort: such a log is not used.
            let _ = self.device.logging_stop(ANSWER);
            return Err(failed(START, None, format!("the device logs at pages of {chosen} bytes")));
        }
        let whole = started
            .rounded(chosen)
            .ok_or_else(|| failed(START, None, "a range in whole pages of the device exceeds 2^64"));
        let whole = whole.inspect_err(|_| {
            let _ = self.device.logging_stop(ANSWER);
        })?;
        if whole != started {
            self.device.logging_stop(ANSWER).map_err(|e| {
                failed(STOP, Some(e), "logging could not be started again for whole pages of the device")
            })?;
            let again = self.device.logging_start(chosen, &whole.raw());
            let again =
                again.map_err(|e| failed(START, Some(e), "whole pages of the device were refused"))?;
            if again != chosen {
                let _ = self.device.logging_stop(ANSWER);
                return Err(failed(START, None, "the device does not keep to the page size that it chose"));
            }
            started = whole;
        }
        if started.len() < all.len() {
            tracing::info!(
                domain = %self.domain, ranges = all.len(), merged = started.len(),
                "the device logs fewer ranges, which cover the gaps between them too"
            );
        }
        self.page_size = chosen;
        self.ranges = started;
        self.gave_up = None;
        Ok(())
    }

    /// Starts logging of `all`, or of fewer ranges that cover it: half as many each time.
    fn start_merged(&self, all: &Ranges) -> Result<(u64, Ranges), DirtyError> {
        let mut count = all.len();
        let mut first = None;
        loop {
            let ranges = all.at_most(count);
            match self.device.logging_start(PAGE, &ranges.raw()) {
                Ok(chosen) => return Ok((chosen, ranges)),
                Err(errno) => {
                    let first = *first.get_or_insert(errno);
                    if count == 1 || !fewer_may_do(errno) {
                        let message = format!("the device does not log {} ranges, nor fewer", all.len());
                        return Err(failed(START, Some(first), message));
                    }
                    count /= 2;
                }
            }
        }
    }

    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        if self.page_size == 0 {
            return Err(failed(REPORT, None, "logging was not started"));
        }
        if let Some(errno) = self.gave_up {
            let message = "the device has not answered a report, and is not asked again";
            dirty(range);
            return Err(failed(REPORT, Some(errno), message));
        }
        for (start, length) in self.ranges.parts(range, self.page_size) {
            let fetched = bitmap(length, self.page_size).and_then(|mut bits| {
                self.device.logging_report(start, length, self.page_size, &mut bits)?;
                Ok(bits)
            });
            match fetched {
                Ok(bits) => runs(start, length, self.page_size, &bits, dirty),
                Err(errno) => {
                    // The part may be longer than what was asked for, and may be cleared.
                    dirty(IovaRange::new(start, length));
                    self.gave_up = Some(errno).filter(|e| matches!(*e, Errno::ETIMEDOUT | Errno::EINTR));
                    return Err(failed(REPORT, Some(errno), "the device's log is lost"));
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.page_size = 0;
        self.ranges = Ranges::default();
        let within = if self.gave_up.take().is_some() { AFTER_GIVING_UP } else { ANSWER };
        self.device.logging_stop(within).map_err(|e| failed(STOP, Some(e), "the device goes on logging"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    /// A device that logs at its own page size and takes a limited number of ranges.
    #[derive(Default)]
    struct Device {
        page: u64,
        max_ranges: usize,
        refuse: Option<Errno>,
        logged: RefCell<Vec<[u64; 2]>>,
        starts: Cell<u32>,
        dirty: RefCell<BTreeSet<u64>>,
        fail_report: Cell<Option<Errno>>,
        reports: Cell<u32>,
        stopped_within: Cell<Option<Duration>>,
    }

    impl Device {
        fn new(page: u64, max_ranges: usize) -> Self {
            Self { page, max_ranges, ..Self::default() }
        }

        fn write(&self, iova: u64) {
            if self.logged.borrow().iter().any(|[s, l]| (*s..s + l).contains(&iova)) {
                self.dirty.borrow_mut().insert(iova / self.page);
            }
        }
    }

    impl Requests for Device {
        fn logging_start(&self, page_size: u64, ranges: &[[u64; 2]]) -> Result<u64, Errno> {
            self.starts.set(self.starts.get() + 1);
            if let Some(errno) = self.refuse {
                return Err(errno);
            }
            let aligned = ranges.iter().flatten().all(|n| n.is_multiple_of(page_size));
            if !aligned || !self.logged.borrow().is_empty() {
                return Err(Errno::EINVAL);
            }
            if ranges.len() > self.max_ranges {
                return Err(Errno::ENOSPC);
            }
            *self.logged.borrow_mut() = ranges.to_vec();
            Ok(self.page.max(page_size))
        }

        fn logging_report(&self, iova: u64, length: u64, page: u64, bits: &mut [u64]) -> Result<(), Errno> {
            self.reports.set(self.reports.get() + 1);
            let inside = self.logged.borrow().iter().any(|[s, l]| iova >= *s && iova + length <= s + l);
            if let Some(errno) = self.fail_report.take().or_else(|| (!inside).then_some(Errno::EIO)) {
                return Err(errno);
            }
            self.dirty.borrow_mut().retain(|number| {
                let at = number * self.page;
                // A page of the device is cleared as a whole, whichever part of it was asked for.
                let taken = at < iova + length && at + self.page > iova;
                if taken {
                    let bit = (at.max(iova) - iova) / page;
                    bits[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
                }
                !taken
            });
            Ok(())
        }

        fn logging_stop(&self, within: Duration) -> Result<(), Errno> {
            self.stopped_within.set(Some(within));
            self.logged.borrow_mut().clear();
            Ok(())
        }
    }

    fn log(device: Device) -> Log<Device> {
        Log::new(device, DomainId("device:nic".into()))
    }

    fn reported(log: &mut Log<Device>, start: u64, length: u64) -> Vec<(u64, u64)> {
        let mut got = Vec::new();
        log.report(IovaRange::new(start, length), &mut |r| got.push((r.start.0, r.length))).unwrap();
        got
    }

    #[test]
    fn what_was_written_is_reported_once() {
        let mut log = log(Device::new(4096, 8));
        log.start(&[IovaRange::new(0, 1 << 20), IovaRange::new(1 << 30, 1 << 20)]).unwrap();
        assert_eq!(log.page_size, 4096);
        log.device.write(0x1234);
        log.device.write(0x2000);
        log.device.write((1 << 30) + 0xf_ffff);
        assert_eq!(reported(&mut log, 0, 1 << 20), [(0x1000, 0x2000)]);
        assert_eq!(reported(&mut log, 0, u64::MAX), [((1 << 30) + 0xf_f000, 0x1000)]);
        assert_eq!(reported(&mut log, 0, u64::MAX), []);
        log.stop().unwrap();
        assert!(log.report(IovaRange::new(0, 4096), &mut |_| ()).is_err());
    }

    #[test]
    fn too_many_ranges_are_merged_until_the_device_takes_them() {
        let mut log = log(Device::new(4096, 2));
        let ranges: Vec<_> = (0..9).map(|i| IovaRange::new(i << 30, 0x1000 << i)).collect();
        log.start(&ranges).unwrap();
        assert_eq!(log.device.starts.get(), 3, "9, 4 and then 2 ranges");
        // Every address that was asked for is logged.
        for range in &ranges {
            log.device.write(range.end().unwrap() - 1);
        }
        assert_eq!(reported(&mut log, 0, u64::MAX).len(), 9);
    }

    #[test]
    fn a_device_that_does_not_log_at_all_is_asked_once() {
        let mut nothing = log(Device { refuse: Some(Errno::EOPNOTSUPP), ..Device::new(4096, 8) });
        let ranges = [IovaRange::new(0, 4096), IovaRange::new(1 << 20, 4096)];
        assert_eq!(nothing.start(&ranges).unwrap_err().errno, Some(Errno::EOPNOTSUPP));
        assert_eq!(nothing.device.starts.get(), 1);
        let mut never = log(Device { refuse: Some(Errno::E2BIG), ..Device::new(4096, 8) });
        assert_eq!(never.start(&ranges).unwrap_err().errno, Some(Errno::E2BIG));
        assert_eq!(never.device.starts.get(), 2);
        assert!(never.start(&[]).is_err(), "no range would mean nothing, or all memory");
    }

    #[test]
    fn a_page_of_the_device_never_lies_in_two_ranges() {
        // Two ranges within one page of the device: reading one must not lose the other's.
        let mut log = log(Device::new(0x10_000, 8));
        log.start(&[IovaRange::new(0x11_000, 0x1000), IovaRange::new(0x15_000, 0x1000)]).unwrap();
        assert_eq!(log.page_size, 0x10_000);
        assert_eq!(log.device.starts.get(), 2, "started again in whole pages");
        log.device.write(0x15_800);
        assert_eq!(reported(&mut log, 0x11_000, 0x1000), [(0x10_000, 0x10_000)]);
    }

    #[test]
    fn a_report_that_fails_makes_all_dirty_that_it_may_have_cleared() {
        let mut log = log(Device::new(0x10_000, 8));
        log.start(&[IovaRange::new(0, 1 << 20)]).unwrap();
        log.device.fail_report.set(Some(Errno::EIO));
        let mut got = Vec::new();
        let error = log.report(IovaRange::new(0x11_000, 0x1000), &mut |r| got.push((r.start.0, r.length)));
        assert_eq!(error.unwrap_err().errno, Some(Errno::EIO));
        assert_eq!(got, [(0x10_000, 0x10_000)], "the whole page of the device");
    }

    // K-GIVE-UP
    #[test]
    fn a_device_that_does_not_answer_a_report_is_not_waited_for_again_and_all_is_dirty() {
        for errno in [Errno::ETIMEDOUT, Errno::EINTR] {
            let mut log = log(Device::new(4096, 8));
            let ranges = [IovaRange::new(0, 1 << 20), IovaRange::new(1 << 30, 1 << 20)];
            log.start(&ranges).unwrap();
            log.device.fail_report.set(Some(errno));
            let mut got = Vec::new();
            for range in ranges {
                let error = log.report(range, &mut |r| got.push(r)).unwrap_err();
                assert_eq!(error.errno, Some(errno));
            }
            assert_eq!(got, ranges);
            assert_eq!(log.device.reports.get(), 1, "asked once");
            log.stop().unwrap();
            assert_eq!(log.device.stopped_within.take(), Some(AFTER_GIVING_UP));
            // What begins anew is asked anew.
            log.start(&ranges).unwrap();
            log.device.write(0x1000);
            assert_eq!(reported(&mut log, 0, u64::MAX), [(0x1000, 0x1000)]);
            log.stop().unwrap();
            assert_eq!(log.device.stopped_within.take(), Some(ANSWER));
        }
        // An error that was answered at once says nothing of the next report.
        let mut log = log(Device::new(4096, 8));
        log.start(&[IovaRange::new(0, 1 << 20)]).unwrap();
        log.device.fail_report.set(Some(Errno::EIO));
        assert!(log.report(IovaRange::new(0, 4096), &mut |_| ()).is_err());
        assert_eq!(reported(&mut log, 0, u64::MAX), []);
    }
}

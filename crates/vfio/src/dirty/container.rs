//! The dirty bitmap of a type1 container (`VFIO_IOMMU_DIRTY_PAGES`, K-TYPE1-BITMAP).
//!
//! What it knows depends on the devices: with a device whose DMA the IOMMU translates, every page that
//! is mapped counts as dirty in every report; with devices whose DMA their drivers mediate, the pages
//! that those have pinned or written.
//!
//! The kernel reports whole mappings only: a request must not begin or end within one. Requests are
//! therefore made for whole ranges as they were given at the start, joined where they touch, so that
//! it does not matter whether the VMM has mapped them in one piece or several. Where a mapping
//! still reaches beyond a range, the report fails and the range counts as dirty.

use super::bitmap::{Ranges, bitmap, runs};
use crate::sys::{self, Type1Dirty};
use airlift_core::{DirtyError, DirtySource, DomainId, Errno, IovaRange};
use std::os::fd::{AsFd, AsRawFd};

/// Most bits of a request for ranges that were joined: 16 MiB of bitmap. A single mapping may take more,
/// as far as the container allows.
const JOIN_BITS: u64 = 1 << 27;

/// Reports what was written by DMA through a type1 container.
#[derive(Debug)]
pub struct ContainerLog<F>(Log<F>);

impl<F: AsFd + Send + 'static> ContainerLog<F> {
    /// The bitmap of `container`, which is shared by all of its devices. Sources of one container that
    /// are made from one descriptor name the same domain.
    #[must_use]
    pub fn new(container: F) -> Self {
        let domain = DomainId(format!("container:{}", container.as_fd().as_raw_fd()));
        Self(Log { container, domain, page_size: 0, ranges: Ranges::default() })
    }
}

impl<F: AsFd + Send + 'static> DirtySource for ContainerLog<F> {
    fn domain(&self) -> &DomainId {
        &self.0.domain
    }

    fn page_size(&self) -> u64 {
        self.0.page_size
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        self.0.start(ranges)
    }

    /// Reports may reach beyond `range`: the kernel gives, and clears, whole mappings.
    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        self.0.report(range, dirty)
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.0.stop()
    }
}

/// What a container is asked.
trait Requests {
    fn info(&self) -> Result<Option<Type1Dirty>, Errno>;
    fn start(&self) -> Result<(), Errno>;
    fn fetch(&self, iova: u64, length: u64, page_size: u64, bits: &mut [u64]) -> Result<(), Errno>;
    fn stop(&self) -> Result<(), Errno>;
}

impl<F: AsFd> Requests for F {
    fn info(&self) -> Result<Option<Type1Dirty>, Errno> {
        sys::type1_dirty(self.as_fd())
    }

    fn start(&self) -> Result<(), Errno> {
        sys::dirty_start(self.as_fd())
    }

    fn fetch(&self, iova: u64, length: u64, page_size: u64, bits: &mut [u64]) -> Result<(), Errno> {
        sys::dirty_bitmap(self.as_fd(), iova, length, page_size, bits)
    }

    fn stop(&self) -> Result<(), Errno> {
        sys::dirty_stop(self.as_fd())
    }
}

#[derive(Debug)]
struct Log<C> {
    container: C,
    domain: DomainId,
    page_size: u64,
    ranges: Ranges,
}

fn failed(what: &str, errno: Option<Errno>, message: impl Into<String>) -> DirtyError {
    DirtyError { operation: format!("VFIO_IOMMU_DIRTY_PAGES {what}"), errno, message: message.into() }
}

impl<C: Requests> Log<C> {
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let info = self.container.info().map_err(|errno| DirtyError {
            operation: "VFIO_IOMMU_GET_INFO".into(),
            errno: Some(errno),
            message: "the container does not say whether it can track dirty pages".into(),
        })?;
        let info = info.filter(|i| i.page_sizes != 0 && i.max_bitmap != 0);
        let info = info.ok_or_else(|| failed("START", None, "the container cannot track dirty pages"))?;
        // The kernel takes the smallest page size alone.
        let page = 1 << info.page_sizes.trailing_zeros();
        let most = info.max_bitmap.saturating_mul(8).saturating_mul(page);
        let ranges = Ranges::new(ranges, page, most.min(page.saturating_mul(JOIN_BITS)))
            .ok_or_else(|| failed("START", None, "a range exceeds 2^64"))?;
        if let Some([start, length]) = ranges.raw().into_iter().find(|[_, length]| *length > most) {
            let message =
                format!("{length} bytes at {start:#x} have a larger bitmap than the container gives");
            return Err(failed("START", None, message));
        }
        self.container.start().map_err(|e| failed("START", Some(e), "tracking could not be started"))?;
        self.page_size = page;
        self.ranges = ranges;
        Ok(())
    }

    fn report(&self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        if self.page_size == 0 {
            return Err(failed("GET_BITMAP", None, "tracking was not started"));
        }
        for (start, end) in self.ranges.touched(range) {
            let length = end - start;
            let fetched = bitmap(length, self.page_size).and_then(|mut bits| {
                self.container.fetch(start, length, self.page_size, &mut bits)?;
                Ok(bits)
            });
            match fetched {
                Ok(bits) => runs(start, length, self.page_size, &bits, dirty),
                Err(errno) => {
                    // Mappings outside of what was asked for may be cleared as well.
                    dirty(IovaRange::new(start, length));
                    let message = format!("no bitmap of {length} bytes at {start:#x}");
                    return Err(failed("GET_BITMAP", Some(errno), message));
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.page_size = 0;
        self.ranges = Ranges::default();
        self.container.stop().map_err(|e| failed("STOP", Some(e), "the container goes on tracking"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const PAGE: u64 = 4096;

    /// A container with mappings, each with the pages that are dirty in it.
    struct Container {
        mappings: Vec<(u64, u64)>,
        dirty: RefCell<Vec<u64>>,
        max_bitmap: u64,
    }

    impl Requests for Container {
        fn info(&self) -> Result<Option<Type1Dirty>, Errno> {
            Ok(Some(Type1Dirty { page_sizes: PAGE | 1 << 21, max_bitmap: self.max_bitmap }))
        }
        fn start(&self) -> Result<(), Errno> {
            Ok(())
        }
        fn fetch(&self, iova: u64, length: u64, page_size: u64, bits: &mut [u64]) -> Result<(), Errno> {
            let end = iova + length;
            let cut = |edge: u64| self.mappings.iter().any(|(s, e)| *s < edge && edge < *e);
            if page_size != PAGE || cut(iova) || cut(end) || bits.len() as u64 * 8 > self.max_bitmap {
                return Err(Errno::EINVAL);
            }
            self.dirty.borrow_mut().retain(|at| {
                let taken = (iova..end).contains(at);
                if taken {
                    let bit = (at - iova) / PAGE;
                    bits[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
                }
                !taken
            });
            Ok(())
        }
        fn stop(&self) -> Result<(), Errno> {
            Ok(())
        }
    }

    fn log(mappings: &[(u64, u64)], max_bitmap: u64) -> Log<Container> {
        let container =
            Container { mappings: mappings.to_vec(), dirty: RefCell::new(Vec::new()), max_bitmap };
        Log { container, domain: DomainId("container:3".into()), page_size: 0, ranges: Ranges::default() }
    }

    fn reported(log: &Log<Container>, start: u64, length: u64) -> Vec<(u64, u64)> {
        let mut got = Vec::new();
        log.report(IovaRange::new(start, length), &mut |r| got.push((r.start.0, r.length))).unwrap();
        got
    }

    #[test]
    fn ranges_that_lie_in_one_mapping_are_reported_whole() {
        // The VMM has mapped in one piece what its map of addresses gives as two.
        let mut log = log(&[(0, 0x8000)], 1 << 28);
        log.start(&[IovaRange::new(0, 0x4000), IovaRange::new(0x4000, 0x4000)]).unwrap();
        log.container.dirty.borrow_mut().extend([0x1000, 0x6000]);
        assert_eq!(reported(&log, 0, 0x4000), [(0x1000, 0x1000), (0x6000, 0x1000)]);
        assert_eq!(reported(&log, 0x4000, 0x4000), []);
    }

    #[test]
    fn a_range_of_several_mappings_is_one_report() {
        let mut log = log(&[(0, 0x1000), (0x1000, 0x5000), (0x10_000, 0x11_000)], 1 << 28);
        log.start(&[IovaRange::new(0, 0x5000), IovaRange::new(0x10_000, 0x1000)]).unwrap();
        log.container.dirty.borrow_mut().extend([0, 0x4000, 0x10_000]);
        let all = [(0, 0x1000), (0x4000, 0x1000), (0x10_000, 0x1000)];
        assert_eq!(reported(&log, 0, u64::MAX), all);
    }

    #[test]
    fn no_request_has_a_larger_bitmap_than_the_container_takes() {
        // 8 bytes of bitmap: 64 pages.
        let mut small = log(&[], 8);
        small.start(&[IovaRange::new(0, 64 * PAGE), IovaRange::new(64 * PAGE, 64 * PAGE)]).unwrap();
        assert_eq!(small.ranges.len(), 2, "not joined");
        assert_eq!(reported(&small, 0, u64::MAX), []);
        assert!(small.start(&[IovaRange::new(0, 65 * PAGE)]).is_err());
    }

    #[test]
    fn a_mapping_that_reaches_beyond_makes_everything_dirty_that_may_be_lost() {
        let mut log = log(&[(0, 0x8000)], 1 << 28);
        log.start(&[IovaRange::new(0, 0x4000)]).unwrap();
        let mut got = Vec::new();
        let result = log.report(IovaRange::new(0x1000, 0x1000), &mut |r| got.push((r.start.0, r.length)));
        assert_eq!(result.unwrap_err().errno, Some(Errno::EINVAL));
        assert_eq!(got, [(0, 0x4000)]);
    }
}

//! Dirty tracking of an iommufd's page table (`IOMMU_HWPT_SET_DIRTY_TRACKING`,
//! `IOMMU_HWPT_GET_DIRTY_BITMAP`): the IOMMU itself marks the pages that devices write.
//!
//! Where a range has a gap that is not mapped, the kernel says nothing of what lies behind the gap, and
//! calls that a success (6.12 and 7.3). So what is to be logged is looked at before the start, and is
//! refused where it has a gap. Not noticed here: what is unmapped later. The layout of memory stays as it
//! is while it is logged.
//!
//! A page table with large entries marks all of an entry when a part of it is written; iommufd uses
//! them where memory allows it, unless `IOMMU_OPTION_HUGE_PAGES` is off.

use super::bitmap::{Ranges, runs};
use crate::sys;
use airlift_core::{DirtyError, DirtySource, DomainId, Errno, IovaRange};
use std::os::fd::{AsFd, AsRawFd};

/// The page size of reports, in bytes.
const PAGE: u64 = 4096;

/// Reports what was written by DMA through a page table.
#[derive(Debug)]
pub struct PageTableLog<F> {
    iommufd: F,
    ioas: u32,
    page_table: u32,
    domain: DomainId,
    page_size: u64,
    ranges: Ranges,
}

fn failed(operation: &str, errno: Option<Errno>, message: impl Into<String>) -> DirtyError {
    DirtyError { operation: operation.into(), errno, message: message.into() }
}

const SET: &str = "IOMMU_HWPT_SET_DIRTY_TRACKING";
const GET: &str = "IOMMU_HWPT_GET_DIRTY_BITMAP";

impl<F: AsFd + Send + 'static> PageTableLog<F> {
    /// The log of `page_table`, which was allocated with dirty tracking over the address space `ioas` of
    /// `iommufd` and may be shared by several devices. Sources of one page table that are made from one
    /// descriptor name the same domain.
    ///
    /// What is to be logged must begin and end where mappings of the address space do: the IOMMU marks
    /// whole entries of its table, 2 MiB or 1 GiB where memory allows it, and of one that is asked for in
    /// parts the first report takes all. Each report therefore covers all of a range that was given.
    #[must_use]
    pub fn new(iommufd: F, ioas: u32, page_table: u32) -> Self {
        let domain = DomainId(format!("iommufd:{}/page-table:{page_table}", iommufd.as_fd().as_raw_fd()));
        Self { iommufd, ioas, page_table, domain, page_size: 0, ranges: Ranges::default() }
    }
}

impl<F: AsFd> PageTableLog<F> {
    /// Fails where something of `ranges` is not mapped: only what is mapped without gaps can be copied
    /// to another address space, which nothing is attached to and which then goes.
    fn mapped(&self, ranges: &Ranges) -> Result<(), DirtyError> {
        let fd = self.iommufd.as_fd();
        let scratch = sys::ioas_alloc(fd)
            .map_err(|e| failed("IOMMU_IOAS_ALLOC", Some(e), "it cannot be seen what is mapped"))?;
        let copied = ranges.raw().into_iter().try_for_each(|[start, length]| {
            sys::ioas_copy(fd, self.ioas, scratch, start, length).map_err(|e| {
                let message = format!("{length} bytes at {start:#x} are not mapped without gaps");
                failed("IOMMU_IOAS_COPY", Some(e), message)
            })
        });
        if let Err(errno) = sys::destroy(fd, scratch) {
            // It ends with the descriptor.
            tracing::warn!(%errno, "an address space of an iommufd could not be destroyed");
        }
        copied
    }
}

impl<F: AsFd + Send + 'static> DirtySource for PageTableLog<F> {
    fn domain(&self) -> &DomainId {
        &self.domain
    }

    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let ranges =
            Ranges::new(ranges, PAGE, u64::MAX).ok_or_else(|| failed(SET, None, "a range exceeds 2^64"))?;
        self.mapped(&ranges)?;
        sys::hwpt_dirty_tracking(self.iommufd.as_fd(), self.page_table, true)
            .map_err(|e| failed(SET, Some(e), "the page table does not track dirty pages"))?;
        self.page_size = PAGE;
        self.ranges = ranges;
        Ok(())
    }

    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        if self.page_size == 0 {
            return Err(failed(GET, None, "tracking was not started"));
        }
        let fd = self.iommufd.as_fd();
        // Whole ranges: of an entry that is cut the kernel clears all and reports a part.
        for (start, end) in self.ranges.touched(range) {
            let length = end - start;
            match sys::hwpt_dirty_bitmap(fd, self.page_table, start, length, PAGE) {
                Ok(bits) => runs(start, length, PAGE, &bits, dirty),
                Err(errno) => {
                    dirty(IovaRange::new(start, length));
                    let message = format!("no bitmap of {length} bytes at {start:#x}");
                    return Err(failed(GET, Some(errno), message));
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.page_size = 0;
        self.ranges = Ranges::default();
        sys::hwpt_dirty_tracking(self.iommufd.as_fd(), self.page_table, false)
            .map_err(|e| failed(SET, Some(e), "the page table goes on tracking"))
    }
}

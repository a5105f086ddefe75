//! Who says which memory a device has written by DMA: the device itself, the IOMMU's page table, or a
//! type1 container; and which of them is used for a device.
//!
//! Each source reports too much rather than too little (V2-DIRTY): ranges are rounded outward, and when
//! a report fails, all that it may have cleared is given as dirty. That sources of the same domain are
//! not used twice is the engine's care.

pub(crate) mod bitmap;
mod container;
mod device_log;
mod fallback;
mod iommufd;

pub use container::ContainerLog;
pub use device_log::DeviceLog;
pub use iommufd::PageTableLog;

use crate::{Attachment, DeviceFd, OpenDevice, sys};
use airlift_core::{DeviceId, DirtySource, Errno};
use fallback::first_that_starts;
use std::fmt;
use std::os::fd::AsFd;
use vfio_bindings::bindings::vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_START;

/// What tracks a device's DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracker {
    /// The page table in an iommufd.
    PageTable,
    /// The device itself.
    Device,
    /// The type1 container.
    Container,
    /// Nothing: all that is mapped for the device counts as dirty (V2-DIRTY-NONE).
    None,
}

impl fmt::Display for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PageTable => "page table",
            Self::Device => "device",
            Self::Container => "container",
            Self::None => "none",
        })
    }
}

/// What was chosen to track a device's DMA, and why.
pub struct DirtyChoice {
    /// The source; when it cannot be started it goes on with the next that the host has. `None` where
    /// the host has none.
    pub source: Option<Box<dyn DirtySource>>,
    /// The one that is tried first.
    pub tracker: Tracker,
    /// Why that one, for a person.
    pub reason: String,
    /// Everything that was looked at, in the order of preference, with what was found.
    pub considered: Vec<(Tracker, String)>,
}

impl fmt::Debug for DirtyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyChoice")
            .field("tracker", &self.tracker)
            .field("reason", &self.reason)
            .field("considered", &self.considered)
            .finish_non_exhaustive()
    }
}

/// A tracker that was looked at.
struct Candidate {
    tracker: Tracker,
    /// The source, where the host has it.
    source: Option<Box<dyn DirtySource>>,
    finding: String,
}

/// Chooses what tracks the DMA of the device `id`: the page table of its iommufd if that tracks, which
/// is one log for all devices; else the device's own log; else the container, which may count all that
/// is mapped. Starts nothing.
#[must_use]
pub fn choose(id: &DeviceId, device: &OpenDevice) -> DirtyChoice {
    pick(vec![page_table(&device.attachment), own_log(id, &device.fd), container(&device.attachment)])
}

fn pick(candidates: Vec<Candidate>) -> DirtyChoice {
    let considered = candidates.iter().map(|c| (c.tracker, c.finding.clone())).collect();
    let mut reason = "nothing on this host tracks its DMA: all that is mapped for it counts as dirty".into();
    let mut tracker = Tracker::None;
    let mut sources = Vec::new();
    for candidate in candidates {
        let Some(source) = candidate.source else { continue };
        if sources.is_empty() {
            tracker = candidate.tracker;
            reason = candidate.finding;
        }
        sources.push(source);
    }
    DirtyChoice { source: first_that_starts(sources), tracker, reason, considered }
}

fn page_table(attachment: &Attachment) -> Candidate {
    let mut source: Option<Box<dyn DirtySource>> = None;
    let finding = match attachment {
        Attachment::Iommufd { iommufd, page_table, .. } if iommufd.tracks_dirty(*page_table) => {
            source = Some(Box::new(PageTableLog::new(iommufd.clone(), iommufd.ioas(), *page_table)));
            "the IOMMU marks what is written through the device's page table".into()
        }
        Attachment::Iommufd { iommufd, device, .. } => {
            match sys::has_dirty_tracking(iommufd.as_fd(), *device) {
                Ok(true) => "the IOMMU could track, but the device's page table was made without it".into(),
                Ok(false) => "the IOMMU does not track dirty pages".into(),
                // Devices without an IOMMU of their own are not in there.
                Err(Errno::ENOENT) => "the driver mediates the device's DMA: no IOMMU page table".into(),
                Err(errno) => format!("the IOMMU does not say whether it tracks dirty pages: {errno}"),
            }
        }
        Attachment::Container { .. } => "the device is in a type1 container, not in an iommufd".into(),
        Attachment::Given => "the descriptor was handed in: its iommufd, if any, is the VMM's".into(),
    };
    Candidate { tracker: Tracker::PageTable, source, finding }
}

fn own_log(id: &DeviceId, fd: &DeviceFd) -> Candidate {
    let mut source: Option<Box<dyn DirtySource>> = None;
    let finding = match sys::has_feature(fd.as_fd(), VFIO_DEVICE_FEATURE_DMA_LOGGING_START, true) {
        Ok(true) => {
            source = Some(Box::new(DeviceLog::new(id, fd.clone())));
            "the device logs what it writes (DMA_LOGGING)".into()
        }
        Ok(false) => "the device does not log what it writes".into(),
        Err(errno) => format!("the device does not say whether it logs: {errno}"),
    };
    Candidate { tracker: Tracker::Device, source, finding }
}

fn container(attachment: &Attachment) -> Candidate {
    let mut source: Option<Box<dyn DirtySource>> = None;
    let finding = match attachment {
        Attachment::Container { container, .. } => match sys::type1_dirty(container.as_fd()) {
            Ok(Some(info)) if info.page_sizes != 0 && info.max_bitmap != 0 => {
                source = Some(Box::new(ContainerLog::new(container.clone())));
                "the container reports dirty pages; with an IOMMU, all that is mapped counts as dirty".into()
            }
            Ok(_) => "the container does not report dirty pages".into(),
            Err(errno) => format!("the container does not say whether it reports dirty pages: {errno}"),
        },
        Attachment::Iommufd { .. } => "the device is in an iommufd, not in a type1 container".into(),
        Attachment::Given => "the descriptor was handed in: its container, if any, is the VMM's".into(),
    };
    Candidate { tracker: Tracker::Container, source, finding }
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_core::{DirtyError, DomainId, IovaRange};

    struct Source(DomainId);

    impl DirtySource for Source {
        fn domain(&self) -> &DomainId {
            &self.0
        }
        fn page_size(&self) -> u64 {
            0
        }
        fn start(&mut self, _: &[IovaRange]) -> Result<(), DirtyError> {
            Ok(())
        }
        fn report(&mut self, _: IovaRange, _: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
            Ok(())
        }
        fn stop(&mut self) -> Result<(), DirtyError> {
            Ok(())
        }
    }

    fn candidate(tracker: Tracker, there: bool) -> Candidate {
        let source = there.then(|| {
            let source: Box<dyn DirtySource> = Box::new(Source(DomainId(tracker.to_string())));
            source
        });
        Candidate { tracker, source, finding: format!("{tracker}: {there}") }
    }

    fn chosen(page_table: bool, device: bool, container: bool) -> DirtyChoice {
        pick(vec![
            candidate(Tracker::PageTable, page_table),
            candidate(Tracker::Device, device),
            candidate(Tracker::Container, container),
        ])
    }

    #[test]
    fn the_first_that_the_host_has_is_chosen_and_all_are_told() {
        for (there, expected) in [
            ((true, true, false), Tracker::PageTable),
            ((false, true, true), Tracker::Device),
            ((false, false, true), Tracker::Container),
        ] {
            let choice = chosen(there.0, there.1, there.2);
            assert_eq!(choice.tracker, expected);
            assert_eq!(choice.source.unwrap().domain().0, expected.to_string());
            assert_eq!(choice.reason, format!("{expected}: true"));
            assert_eq!(choice.considered.len(), 3);
        }
        let nothing = chosen(false, false, false);
        assert!(nothing.source.is_none());
        assert_eq!(nothing.tracker, Tracker::None);
        assert!(nothing.reason.contains("all that is mapped"), "{}", nothing.reason);
    }
}

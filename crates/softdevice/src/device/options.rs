//! What kind of SoftDevice is to be made, the faults that it should show, and why one cannot be made.

use super::format::{HEAD, RUN};
use airlift_core::{Arc, Errno, Interface};
use airlift_vfio_user::{MigrationInterface, V1Section, V1SectionError};
use std::time::Duration;

/// How a device is made. The default is a device of 64 MiB that can do everything and fails in nothing.
#[derive(Clone, Debug)]
pub struct SoftDeviceOptions {
    /// The whole content of internal memory follows from it.
    pub seed: u64,
    /// Bytes of internal memory: a multiple of 4096, above 0. Really allocated and written.
    pub state_size: u64,
    /// Bytes of internal memory that are rewritten in a second while the device runs.
    pub dirty_rate: u64,
    /// Entries in a second that each ring gets whose own rate register is 0; at most
    /// [`MAX_RING_RATE`](Self::MAX_RING_RATE).
    pub ring_rate: u64,
    /// Entries of a ring for each interrupt; 0: none. The guest can change it.
    pub interrupt_every: u64,
    /// MSI-X vectors, 1 to 8; ring `r` raises vector `r % vectors`.
    pub vectors: u32,
    /// Bytes of BAR2: a multiple of 4096, above 0, at most 16 MiB.
    pub bar2_size: u64,
    /// Over which interface it is served. With v1 it has PRE_COPY, and no P2P whatever [`p2p`](Self::p2p)
    /// says (V1-ARCS).
    pub interface: MigrationInterface,
    /// It also reads data that came over the other interface: its format is the same in both (V1-MIX).
    pub accept_other_interface: bool,
    /// It has the PRE_COPY states.
    pub precopy: bool,
    /// It has the P2P states.
    pub p2p: bool,
    /// It logs its DMA writes.
    pub dma_logging: bool,
    /// How much longer the arc RESUMING -> STOP takes.
    pub load_time: Duration,
    /// Bytes in a second that loading takes; `None`: as fast as it can.
    pub load_rate: Option<u64>,
    /// Holds the arc that first parks the DMA engine (to a P2P state; without P2P, to STOP or
    /// STOP_COPY) for this long before anything is parked. For tests: it keeps the device writing to
    /// its peers.
    pub stop_delay: Duration,
    /// One more interrupt of vector 0 is raised inside the arc that stops the device, before it ends.
    pub interrupt_in_last_arc: bool,
    /// A load whose checksum or digest is wrong is refused. `false` lets it through, so that only the
    /// comparison of the content with seed and tick can find it.
    pub validate: bool,
    /// A load that is refused at RESUMING -> STOP leaves the device in ERROR and not in RESUMING.
    pub load_failure_is_error: bool,
    /// An arc that fails.
    pub fail_arc: Option<FailArc>,
}

/// An arc that always fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailArc {
    /// Which.
    pub arc: Arc,
    /// With what.
    pub errno: Errno,
    /// The device is then in ERROR; else where it was.
    pub to_error: bool,
}

impl SoftDeviceOptions {
    /// The most entries in a second that a ring may get.
    pub const MAX_RING_RATE: u64 = 1_000_000;
}

impl Default for SoftDeviceOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            state_size: 64 << 20,
            dirty_rate: 0,
            ring_rate: 1000,
            interrupt_every: 64,
            vectors: 8,
            bar2_size: 64 << 10,
            interface: MigrationInterface::V2,
            accept_other_interface: false,
            precopy: true,
            p2p: true,
            dma_logging: true,
            load_time: Duration::ZERO,
            load_rate: None,
            stop_delay: Duration::ZERO,
            interrupt_in_last_arc: false,
            validate: true,
            load_failure_is_error: false,
            fail_arc: None,
        }
    }
}

/// A SoftDevice cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SoftDeviceError {
    /// A size is not a multiple of 4096, or 0, or too large.
    #[error("{what} of {value} bytes: it must be a multiple of 4096, above 0 and at most {max}")]
    Size {
        /// Which.
        what: &'static str,
        /// What was asked for, in bytes.
        value: u64,
        /// The most that it may be, in bytes.
        max: u64,
    },
    /// A number is out of its range.
    #[error("{what} of {value}: it must be {min} to {max}")]
    Range {
        /// Which.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// Interface v1 without PRE_COPY.
    #[error("interface v1 without PRE_COPY: every device of interface v1 has it")]
    PreCopy,
    /// What of the data section is to be mapped cannot be (V1-AREAS).
    #[error(transparent)]
    Section(V1SectionError),
    /// Whole transactions are wanted, and one of its own does not fit into the data section (V1-WHOLE).
    #[error(
        "a data section of {section} bytes for whole transactions: its largest record has {record} bytes"
    )]
    Whole {
        /// Bytes of the section.
        section: u64,
        /// Bytes of the record.
        record: u64,
    },
    /// The system refused memory or a thread.
    #[error("cannot make the device's {what}")]
    System {
        /// What was being made.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// BAR2 cannot be mapped.
    #[error("cannot map BAR2")]
    Memory(#[from] airlift_memory::MemoryError),
}

impl SoftDeviceOptions {
    /// Bytes of the largest record that it writes: one transaction of interface v1, where the data section
    /// has room for it.
    #[must_use]
    pub fn largest_record(&self) -> u64 {
        let pages = (RUN * 4096) as u64;
        HEAD as u64 + pages.max(self.bar2_size)
    }

    /// The interface that it is not served over.
    pub(crate) const fn other_interface(&self) -> Interface {
        match self.interface {
            MigrationInterface::V1(_) => Interface::V2,
            MigrationInterface::V2 => Interface::V1,
        }
    }

    /// A write of the loader must be a record as the saver gave it.
    pub(crate) const fn takes_whole_records(&self) -> bool {
        matches!(&self.interface, MigrationInterface::V1(section) if section.whole_transactions)
    }

    pub(crate) const MAX_STATE: u64 = 1 << 40;
    pub(crate) const MAX_BAR2: u64 = 16 << 20;

    pub(crate) fn check(&self) -> Result<(), SoftDeviceError> {
        if self.state_size == 0 || !self.state_size.is_multiple_of(4096) || self.state_size > Self::MAX_STATE
        {
            let max = Self::MAX_STATE;
            return Err(SoftDeviceError::Size { what: "a state", value: self.state_size, max });
        }
        if self.bar2_size == 0 || !self.bar2_size.is_multiple_of(4096) || self.bar2_size > Self::MAX_BAR2 {
            let max = Self::MAX_BAR2;
            return Err(SoftDeviceError::Size { what: "a BAR2", value: self.bar2_size, max });
        }
        if self.vectors == 0 || self.vectors > 8 {
            let value = self.vectors as u64;
            return Err(SoftDeviceError::Range { what: "a vector count", value, min: 1, max: 8 });
        }
        if self.ring_rate > Self::MAX_RING_RATE {
            let max = Self::MAX_RING_RATE;
            return Err(SoftDeviceError::Range { what: "a ring rate", value: self.ring_rate, min: 0, max });
        }
        if let MigrationInterface::V1(section) = &self.interface {
            section.check().map_err(|error| match error {
                V1SectionError::Size(value) => {
                    let max = V1Section::MAX_SIZE;
                    SoftDeviceError::Range { what: "a data section", value, min: 1, max }
                }
                other => SoftDeviceError::Section(other),
            })?;
            let record = self.largest_record();
            if section.whole_transactions && section.size < record {
                return Err(SoftDeviceError::Whole { section: section.size, record });
            }
            if !self.precopy {
                return Err(SoftDeviceError::PreCopy);
            }
        }
        if matches!(self.load_rate, Some(0)) {
            let max = u64::MAX;
            return Err(SoftDeviceError::Range { what: "a load rate", value: 0, min: 1, max });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_vfio_user::V1Mapping;

    // V1-AREAS
    #[test]
    fn a_sparse_section_is_checked_as_its_server_does() {
        let check = |areas: &[(u64, u64)]| {
            let mapping = V1Mapping::Sparse(areas.to_vec());
            let section = V1Section { size: 16_384, mapping, whole_transactions: false };
            let interface = MigrationInterface::V1(section);
            SoftDeviceOptions { interface, ..SoftDeviceOptions::default() }.check()
        };
        check(&[(8192, 4096), (0, 4096)]).expect("areas in any order");
        let (offset, length) = (12_288, 8192);
        for (areas, why) in [
            (vec![(offset, length)], V1SectionError::Area { offset, length }),
            (vec![(0, 100)], V1SectionError::Area { offset: 0, length: 100 }),
            (vec![(0, 8192), (4096, 4096)], V1SectionError::Overlap { first: 0, second: 4096 }),
        ] {
            let refused = check(&areas);
            assert!(matches!(refused, Err(SoftDeviceError::Section(e)) if e == why), "{refused:?}");
        }
    }
}

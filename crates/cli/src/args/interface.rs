//! The interface of a software device, and what is special about one of interface v1.

use crate::units::Size;
use airlift_softdevice::SoftDeviceOptions;
use airlift_vfio_user::{MigrationInterface, V1Mapping, V1Section};
use clap::{Args, ValueEnum};

/// The interface over which a device is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InterfaceChoice {
    /// The migration region of Linux 5.8 to 5.17.
    V1,
    /// The state machine of Linux 5.18 and later.
    V2,
}

impl InterfaceChoice {
    /// As the command line has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// What of a data section a client may map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum V1MappingChoice {
    /// Nothing.
    Trapped,
    /// All of it.
    Mapped,
    /// Some of it: three parts, listed in no order, with gaps between them.
    Sparse,
}

/// The smallest data section, in bytes, with a page in each of the ten parts of a sparse mapping.
const LEAST_SPARSE: u64 = 10 * 4096;

impl V1MappingChoice {
    /// As the command line has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Trapped => "trapped",
            Self::Mapped => "mapped",
            Self::Sparse => "sparse",
        }
    }

    /// The same for a section of `size` bytes; sparse needs [`LEAST_SPARSE`].
    fn mapping(self, size: u64) -> V1Mapping {
        match self {
            Self::Trapped => V1Mapping::Trapped,
            Self::Mapped => V1Mapping::Mapped,
            Self::Sparse => {
                // Tenths of it in whole pages: three, one and two of them, with one between each two parts.
                let tenth = size / 10 / 4096 * 4096;
                V1Mapping::Sparse(vec![(6 * tenth, 3 * tenth), (tenth, tenth), (3 * tenth, 2 * tenth)])
            }
        }
    }
}

/// What a device of interface v1 is like.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct V1Args {
    /// With interface v1: bytes of the data section, so the most of one transaction; 1MiB if not given.
    #[arg(long = "device-v1-section", value_name = "SIZE", value_parser = crate::units::v1_section)]
    pub(crate) section: Option<Size>,
    /// With interface v1: what of the data section a client may map; `mapped` if not given.
    #[arg(long = "device-v1-mapping", value_name = "KIND", value_enum)]
    pub(crate) mapping: Option<V1MappingChoice>,
    /// With interface v1: the device takes a transaction only as its source gave it.
    #[arg(long = "device-v1-whole")]
    pub(crate) whole: bool,
}

impl V1Args {
    /// The interface of a device that is served over `choice`.
    pub(crate) fn interface(&self, choice: InterfaceChoice) -> MigrationInterface {
        match choice {
            InterfaceChoice::V2 => MigrationInterface::V2,
            InterfaceChoice::V1 => {
                let size = self.size();
                let mapping = self.mapping.unwrap_or(V1MappingChoice::Mapped).mapping(size);
                MigrationInterface::V1(V1Section { size, mapping, whole_transactions: self.whole })
            }
        }
    }

    /// What is right each and wrong together; `v1`: some devices have interface v1.
    ///
    /// # Errors
    /// Which of them, and why: exit code 2.
    pub(crate) fn check(&self, v1: bool) -> Result<(), super::Wrong> {
        let options = [
            ("--device-v1-section", self.section.is_some()),
            ("--device-v1-mapping", self.mapping.is_some()),
            ("--device-v1-whole", self.whole),
        ];
        if let Some((name, _)) = options.iter().find(|(_, given)| *given && !v1) {
            return Err(super::conflict(format!(
                "{name} is for devices of interface v1: give --interface v1 too"
            )));
        }
        let size = self.size();
        if self.mapping == Some(V1MappingChoice::Sparse) && size < LEAST_SPARSE {
            return Err(super::conflict(format!(
                "--device-v1-mapping sparse with a data section of {size} bytes: its three parts and the gaps \
                 between them need {LEAST_SPARSE} bytes at least"
            )));
        }
        let least = SoftDeviceOptions::default().largest_record();
        if self.whole && size < least {
            return Err(super::conflict(format!(
                "--device-v1-whole with a data section of {size} bytes: the device's largest transaction needs \
                 {least} bytes at least"
            )));
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.section.map_or(1 << 20, |size| size.0)
    }
}

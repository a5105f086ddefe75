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

impl V1MappingChoice {
    /// As the command line has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Trapped => "trapped",
            Self::Mapped => "mapped",
            Self::Sparse => "sparse",
        }
    }

    /// The same for a section of `size` bytes.
    fn mapping(self, size: u64) -> V1Mapping {
        match self {
            Self::Trapped => V1Mapping::Trapped,
            Self::Mapped => V1Mapping::Mapped,
            Self::Sparse => {
                // Eighths of it in whole pages: the seventh, the second, the fourth with the fifth.
                let eighth = size / 8 / 4096 * 4096;
                let parts = [(6 * eighth, eighth), (eighth, eighth), (3 * eighth, 2 * eighth)];
                V1Mapping::Sparse(if eighth == 0 { Vec::new() } else { parts.to_vec() })
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
                let size = self.section.map_or(1 << 20, |size| size.0);
                let mapping = self.mapping.unwrap_or(V1MappingChoice::Mapped).mapping(size);
                MigrationInterface::V1(V1Section { size, mapping, whole_transactions: self.whole })
            }
        }
    }

    /// What is right each and wrong together; `v1`: some devices have interface v1.
    ///
    /// # Errors
    /// As the command line's own, with exit code 2.
    pub(crate) fn check(&self, v1: bool) -> Result<(), clap::Error> {
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
        if !self.whole {
            return Ok(());
        }
        let least = SoftDeviceOptions::default().largest_record();
        match self.interface(InterfaceChoice::V1) {
            MigrationInterface::V1(V1Section { size, .. }) if size < least => Err(super::conflict(format!(
                "--device-v1-whole with a data section of {size} bytes: the device's largest transaction has {least}"
            ))),
            _ => Ok(()),
        }
    }
}

//! What `receive` does with devices of the kernel once they run: somebody must hold them, for the last
//! close of a real device resets it.

use super::{NamedDevice, VmmAddress};
use clap::Args;
use clap::error::ErrorKind;

/// Who holds the devices after the migration.
#[derive(Clone, Debug, Default, Args)]
#[group(skip)]
pub(crate) struct Afterwards {
    /// When the devices run here, run `sh -c CMD` with their descriptors open; AIRLIFT_FDS names them,
    /// as in "net0=7 net0.iommufd=8" (beside ID also ID.iommufd or ID.container and ID.group, where
    /// there are). The exit code is then that of CMD.
    #[arg(long, value_name = "CMD", conflicts_with_all = ["vmm", "give", "hold"])]
    pub(crate) then: Option<String>,
    /// When the devices run here, connect to this socket, send one JSON line that names them with
    /// their descriptors (SCM_RIGHTS), and wait for the line {"taken":true}.
    #[arg(long, value_name = "unix:PATH", conflicts_with_all = ["vmm", "hold"])]
    pub(crate) give: Option<VmmAddress>,
    /// When the devices run here, hold them until SIGTERM or SIGINT.
    #[arg(long, conflicts_with = "vmm")]
    pub(crate) hold: bool,
}

impl Afterwards {
    /// One of them was asked for.
    pub(crate) const fn is_any(&self) -> bool {
        self.then.is_some() || self.give.is_some() || self.hold
    }

    /// Refuses devices that nobody would hold after the migration, and a wish that fits no device.
    ///
    /// # Errors
    /// Wrong usage.
    pub(crate) fn check(&self, devices: &[NamedDevice]) -> Result<(), super::Wrong> {
        let wrong = |kind, message: String| Err(super::Wrong { kind, message });
        let own = devices.iter().find(|d| d.address.is_own_kernel_device());
        match own {
            Some(device) if !self.is_any() => wrong(
                ErrorKind::MissingRequiredArgument,
                format!(
                    "{device} would be closed when the migration is over, and the last close of a device resets \
                     it: say who holds it then, with --then CMD, --give unix:PATH or --hold"
                ),
            ),
            None if self.is_any() && !devices.iter().any(|d| d.address.is_kernel_device()) => wrong(
                ErrorKind::ArgumentConflict,
                "--then, --give and --hold are for devices of the kernel, whose descriptors must outlive the \
                 migration; a vfio-user device stays with its server"
                    .into(),
            ),
            _ => Ok(()),
        }
    }
}

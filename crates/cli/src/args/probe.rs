//! `airlift probe`.

use super::DeviceAddress;
use crate::units::Span;
use clap::Args;

/// Says what devices can do for a migration.
#[derive(Clone, Debug, Args)]
pub(crate) struct ProbeArgs {
    /// The devices: vfio-user:PATH, cdev:PATH, pci:BDF, mdev:UUID or fd:N. Without one, this host and
    /// every device of it that a VFIO driver holds.
    #[arg(value_name = "DEVICE")]
    pub(crate) devices: Vec<DeviceAddress>,
    /// How long a device may take to answer.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(crate) timeout: Span,
    /// One JSON object per line.
    #[arg(long)]
    pub(crate) json: bool,
}

//! `airlift sim-vm`.

use super::{NamedSocket, VmmAddress};
use crate::units::{Rate, Size};
use clap::Args;

/// Runs a simulated virtual machine: guest memory, vCPUs that write to it, and a guest driver that
/// uses the devices and checks what they do. Control lines on stdin: `check`, `report`, `quit`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SimVmArgs {
    /// The socket on which it takes `send --vmm` and `receive --vmm`.
    #[arg(long, value_name = "unix:PATH")]
    pub(crate) listen: VmmAddress,
    /// A device that the guest uses. Repeat it for more.
    #[arg(long = "device", value_name = "ID=vfio-user:PATH", required = true)]
    pub(crate) devices: Vec<NamedSocket>,
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = crate::units::guest_memory)]
    pub(crate) memory: Size,
    /// Bytes of guest memory that vCPUs write per second.
    #[arg(long, value_name = "RATE", default_value = "50MiB/s")]
    pub(crate) dirty_rate: Rate,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) vcpus: u16,
    /// The seed of everything that the guest writes.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// The guest does not let devices write into each other's memory.
    #[arg(long)]
    pub(crate) no_peer_dma: bool,
    /// Wait for a migration instead of starting the guest.
    #[arg(long)]
    pub(crate) incoming: bool,
    /// One JSON object per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// End when stdin ends; take no notice of SIGINT.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

//! `airlift soft-device`.

use super::interface::InterfaceChoice;
use super::interface::V1Args;
use crate::units::{Rate, Size, Span};
use clap::Args;
use std::path::PathBuf;

/// What a software device is like; the demo hands the same options on to its device servers.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Bytes of the device's internal memory, all of it allocated and never the same twice.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = crate::units::state_size)]
    pub(crate) state_size: Size,
    /// Bytes of its internal memory that it changes per second.
    #[arg(long, value_name = "RATE", default_value = "1MiB/s")]
    pub(crate) device_dirty_rate: Rate,
    /// Entries that its DMA engine writes per second into each of its rings.
    #[arg(long, value_name = "RATE", default_value = "2000/s")]
    pub(crate) device_dma_rate: Rate,
    /// The device has no PRE_COPY states: all of its state is moved while the guest is stopped.
    #[arg(long)]
    pub(crate) device_no_precopy: bool,
    /// The device has no P2P states.
    #[arg(long)]
    pub(crate) device_no_p2p: bool,
    /// The device does not log its DMA: all memory that it can reach counts as dirty.
    #[arg(long)]
    pub(crate) device_no_dirty_log: bool,
    /// How long the device takes to validate what it has loaded.
    #[arg(long, value_name = "TIME", default_value = "0ms")]
    pub(crate) device_load_time: Span,
    /// Bytes per second that the device takes while it loads; no limit if not given.
    #[arg(long, value_name = "RATE")]
    pub(crate) device_load_rate: Option<Rate>,
    #[command(flatten)]
    pub(crate) v1: V1Args,
    /// The device also loads data that was saved over the other interface; its format is the same.
    #[arg(long)]
    pub(crate) device_accept_other_interface: bool,
}

impl DeviceArgs {
    /// What is right each and wrong together, for devices of which some (`v1`) have interface v1.
    ///
    /// # Errors
    /// Which of them, and why: exit code 2.
    pub(crate) fn check(&self, v1: bool) -> Result<(), super::Wrong> {
        if v1 && self.device_no_precopy {
            return Err(super::conflict(
                "--device-no-precopy does not go with interface v1: every device of it has PRE_COPY",
            ));
        }
        self.v1.check(v1)
    }
}

/// Serves one software device.
#[derive(Clone, Debug, Args)]
pub(crate) struct SoftDeviceArgs {
    /// The UNIX socket to serve on; it is made, and removed at the end.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// The name for its log lines.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) name: String,
    /// The seed of everything that the device generates.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// The interface over which it can be migrated.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = InterfaceChoice::V2)]
    pub(crate) interface: InterfaceChoice,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// One JSON object per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Take whatever is loaded without validation, so that verification must find what is wrong.
    #[arg(long, hide = true)]
    pub(crate) no_validate: bool,
    /// Raise an interrupt inside the arc to STOP_COPY.
    #[arg(long, hide = true)]
    pub(crate) last_arc_interrupt: bool,
    /// Hold the arc out of running for this long.
    #[arg(long, hide = true, value_name = "TIME", default_value = "0ms")]
    pub(crate) stop_delay: Span,
    /// End when stdin ends, or with the line `quit`; take no notice of SIGINT.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

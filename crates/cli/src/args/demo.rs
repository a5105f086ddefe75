//! `airlift demo`.

use super::{DeviceArgs, FaultPhase, KillSpec, Sabotage, TransportChoice};
use crate::units::{Rate, Size, Span};
use clap::Args;

/// One live migration between two hosts that are processes on this machine.
#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// Number of devices.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) devices: u16,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = crate::units::guest_memory)]
    pub(crate) memory: Size,
    /// Bytes of guest memory that the vCPUs write per second.
    #[arg(long, value_name = "RATE", default_value = "50MiB/s")]
    pub(crate) dirty_rate: Rate,
    /// The downtime that the estimate must fit before the guest is stopped.
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    pub(crate) downtime_limit: Span,
    /// Data connections.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) channels: u16,
    /// How the two hosts are connected.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = TransportChoice::Tcp)]
    pub(crate) transport: TransportChoice,
    /// The seed of everything that guest and devices generate; a new one if not given.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Declare that the devices do no DMA to each other. The guest of the demo then sets none up.
    #[arg(long)]
    pub(crate) assume_no_peer_dma: bool,
    /// Kill one process at the beginning of a phase. SIDE is sender, receiver, source-device or
    /// destination-device; PHASE is negotiate, setup, precopy, quiesce, stop-copy, load, commit or run.
    #[arg(long, value_name = "SIDE@PHASE", conflicts_with_all = ["cancel", "cut"])]
    pub(crate) kill: Option<KillSpec>,
    /// Cancel at the beginning of a phase.
    #[arg(long, value_name = "PHASE", value_enum, conflicts_with = "cut", hide_possible_values = true)]
    pub(crate) cancel: Option<FaultPhase>,
    /// Cut the connection between the two hosts at the beginning of a phase.
    #[arg(long, value_name = "PHASE", value_enum, hide_possible_values = true)]
    pub(crate) cut: Option<FaultPhase>,
    /// After a migration that did not complete: a second one to a fresh destination, without the fault.
    #[arg(long)]
    pub(crate) retry: bool,
    /// One JSON object per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// How long one migration may take before it is cancelled.
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub(crate) timeout: Span,
    /// Break one rule, to see that it is noticed.
    #[arg(long, value_name = "NAME", value_enum, hide = true)]
    pub(crate) sabotage: Option<Sabotage>,
}

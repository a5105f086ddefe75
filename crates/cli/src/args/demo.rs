//! `airlift demo`.

use super::{DeviceArgs, FaultPhase, InterfaceChoice, KillSpec, Sabotage, TransportChoice};
use crate::units::{Rate, Size, Span};
use airlift_core::Side;
use clap::{Args, ValueEnum};

/// The interfaces of the demo's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoInterface {
    /// All have the migration region.
    V1,
    /// All have the state machine.
    V2,
    /// They take turns.
    Mixed,
}

/// One live migration between two hosts that are processes on this machine.
#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// Number of devices.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) devices: u16,
    /// The interface of the devices; mixed: every other one, from the first on, has v1. Devices of v1 have no
    /// P2P states, so with them the guest sets up no DMA between devices, and that is declared.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = DemoInterface::V2)]
    pub(crate) interface: DemoInterface,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// With interface v1: bytes of the data section on the destination, if it is to be another one.
    #[arg(long, value_name = "SIZE", value_parser = crate::units::v1_section)]
    pub(crate) device_v1_destination_section: Option<Size>,
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

impl DemoArgs {
    /// The interface of the device at this position.
    pub(crate) const fn interface_of(&self, index: usize) -> InterfaceChoice {
        match self.interface {
            DemoInterface::V1 => InterfaceChoice::V1,
            DemoInterface::V2 => InterfaceChoice::V2,
            DemoInterface::Mixed if index.is_multiple_of(2) => InterfaceChoice::V1,
            DemoInterface::Mixed => InterfaceChoice::V2,
        }
    }

    fn has_v1(&self) -> bool {
        self.interface != DemoInterface::V2
    }

    /// Whether the devices do no DMA to each other: as asked for, or because devices of v1 could not be
    /// stopped without losing some of it.
    pub(crate) fn no_peer_dma(&self) -> bool {
        self.assume_no_peer_dma || (self.has_v1() && self.devices > 1)
    }

    /// What the devices of a side are like.
    pub(crate) fn device_of(&self, side: Side) -> DeviceArgs {
        let mut device = self.device.clone();
        if side == Side::Destination && self.device_v1_destination_section.is_some() {
            device.v1.section = self.device_v1_destination_section;
        }
        device
    }

    /// What is right each and wrong together.
    ///
    /// # Errors
    /// Which of them, and why: exit code 2.
    pub(crate) fn check(&self) -> Result<(), super::Wrong> {
        if self.device_v1_destination_section.is_some() && !self.has_v1() {
            return Err(super::conflict(
                "--device-v1-destination-section is for devices of interface v1: give --interface v1 too",
            ));
        }
        if self.interface == DemoInterface::Mixed && self.devices < 2 {
            return Err(super::conflict("--interface mixed needs two devices at least"));
        }
        self.device.check(self.has_v1())?;
        self.device_of(Side::Destination).check(self.has_v1())
    }
}

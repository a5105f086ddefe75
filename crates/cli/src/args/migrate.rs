//! `airlift send` and `airlift receive`.

use super::{
    Afterwards, FaultPhase, NamedDevice, NamedMemory, Sabotage, StallChoice, StepDeadline, VmmAddress,
};
use crate::units::{Size, Span};
use airlift::link::Uri;
use clap::Args;
use std::path::PathBuf;

/// What is migrated, and how its journal and its output are kept; the same on both sides.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub(crate) struct Attach {
    /// The VMM whose guest is migrated, with the devices that it uses.
    #[arg(long, value_name = "unix:PATH", required_unless_present = "devices")]
    pub(crate) vmm: Option<VmmAddress>,
    /// A device to migrate without a VMM, by the name that pairs it with the other side's. DEVICE is
    /// vfio-user:PATH, cdev:PATH, pci:BDF, mdev:UUID or fd:N (a VFIO device descriptor that this
    /// process was started with). Repeat it for more.
    #[arg(long = "device", value_name = "ID=DEVICE", conflicts_with = "vmm", requires = "no_guest")]
    pub(crate) devices: Vec<NamedDevice>,
    /// No guest uses the devices: nothing is paused, and no memory but that of --memory is moved.
    #[arg(long, conflicts_with = "vmm")]
    pub(crate) no_guest: bool,
    /// Guest memory to move without a VMM: a file, or a descriptor that this process was started with.
    /// Regions of the same ID are paired. KEY is gpa (where the guest and the devices see it, 0 if not
    /// given), size (to the file's end if not given) or offset (in the file). Nobody but the devices
    /// may write to it until this command has ended. `receive` makes the file, or makes it longer, if
    /// size is given. Repeat it for more.
    #[arg(long, value_name = "ID=file:PATH|fd:N[,KEY=N...]", conflicts_with = "vmm", requires = "no_guest")]
    pub(crate) memory: Vec<NamedMemory>,
    /// A directory for the journal, which answers after a crash whether the guest may run here. It
    /// is made if it is not there; without it a new one under the temporary directory is used.
    #[arg(long, value_name = "DIR")]
    pub(crate) journal: Option<PathBuf>,
    /// Write the journal through to the disk, so that it answers after a loss of power too.
    #[arg(long)]
    pub(crate) journal_sync: bool,
    /// Bounds one step, as in stop-copy=60s. STEP is connect, negotiate, setup, precopy, quiesce,
    /// stop-copy, commit, rollback or silence. Repeat it for more.
    #[arg(long = "deadline", value_name = "STEP=TIME")]
    pub(crate) deadlines: Vec<StepDeadline>,
    /// Allow plain TCP to and from other hosts, which anybody on the way can read and change.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// One JSON object per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Take `go` and `cancel` on stdin; cancel when stdin ends.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
    /// Hold at the beginning of this phase until `go` or `cancel` comes on stdin, at most 5 s.
    #[arg(long, hide = true, value_name = "PHASE", requires = "supervised")]
    pub(crate) hold_at: Option<FaultPhase>,
    /// Break one rule or place one fault.
    #[arg(long, hide = true, value_name = "NAME")]
    pub(crate) sabotage: Option<Sabotage>,
}

/// Sends devices to a host that runs `receive`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SendArgs {
    /// Where `receive` listens.
    #[arg(value_name = "tcp:HOST:PORT|unix:PATH")]
    pub(crate) uri: Uri,
    #[command(flatten)]
    pub(crate) attach: Attach,
    /// The downtime that the estimate must fit before the guest is stopped.
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    pub(crate) downtime_limit: Span,
    /// Data connections.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) channels: u16,
    /// What to do when pre-copy does not converge.
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = StallChoice::Wait)]
    pub(crate) on_stall: StallChoice,
    /// Your word that the devices do no DMA to each other: several devices are then taken although
    /// one of them has no P2P states.
    #[arg(long)]
    pub(crate) assume_no_peer_dma: bool,
}

/// Receives devices from a host that runs `send`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Where to listen. With port 0 the system chooses one, which the event `listening` names.
    #[arg(value_name = "tcp:HOST:PORT|unix:PATH")]
    pub(crate) uri: Uri,
    #[command(flatten)]
    pub(crate) attach: Attach,
    #[command(flatten)]
    pub(crate) afterwards: Afterwards,
    /// Bytes of device data that may wait in memory at most.
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub(crate) receive_budget: Size,
    /// How long to wait for a source; for ever if not given.
    #[arg(long, value_name = "TIME")]
    pub(crate) wait: Option<Span>,
}

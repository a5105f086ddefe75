//! `airlift resolve`.

use super::{NamedDevice, VmmAddress};
use clap::Args;
use std::path::PathBuf;

/// Reads the journal of a migration that ended without an answer, and brings the guest back here if
/// it may run here.
#[derive(Clone, Debug, Args)]
pub(crate) struct ResolveArgs {
    /// The directory that `send` or `receive` was given as `--journal`.
    #[arg(long, value_name = "DIR")]
    pub(crate) journal: PathBuf,
    /// The VMM whose guest it is.
    #[arg(long, value_name = "unix:PATH", conflicts_with = "devices")]
    pub(crate) vmm: Option<VmmAddress>,
    /// A device that was migrated without a VMM. Repeat it for more.
    #[arg(long = "device", value_name = "ID=DEVICE", required_unless_present = "vmm")]
    pub(crate) devices: Vec<NamedDevice>,
    /// Your word that the guest does not run on the other side and never will: run it here, even
    /// where the journal alone does not allow it.
    #[arg(long, conflicts_with = "stay_stopped")]
    pub(crate) run_here: bool,
    /// Your word that the guest runs on the other side, or that it shall not run here: leave it stopped.
    #[arg(long)]
    pub(crate) stay_stopped: bool,
    /// One JSON object per line.
    #[arg(long)]
    pub(crate) json: bool,
}

//! One host of the simulation: its journal, its devices, and what its engine is in the middle of.

use super::journal::SimJournal;
use airlift_core::commit::{DestinationAction, Durability, RecordKind, SourceAction};

/// What has become of the devices of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Devices {
    /// They hold the guest's state and are stopped.
    Stopped,
    /// They hold the guest's state and run.
    Running,
    /// They were reset and hold nothing.
    Blank,
    /// They are gone.
    Gone,
}

/// A long operation that the engine was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    RollBack,
    FinishSource,
    StartDevices,
    StartVcpus,
    Reset,
}

/// One host: what is there beside the machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Host {
    pub(super) journal: SimJournal,
    pub(super) devices: Devices,
    pub(super) vcpus: bool,
    /// The guest has run here since it was stopped for the migration.
    pub(super) ran: bool,
    pub(super) rebooted: bool,
    pub(super) appending: Option<RecordKind>,
    pub(super) operation: Option<Operation>,
    /// The next thing that the engine has to do.
    pub(super) source_action: Option<SourceAction>,
    pub(super) destination_action: Option<DestinationAction>,
}

impl Host {
    pub(super) fn new(durability: Durability) -> Self {
        Self {
            journal: SimJournal::new(durability),
            devices: Devices::Stopped,
            vcpus: false,
            ran: false,
            rebooted: false,
            appending: None,
            operation: None,
            source_action: None,
            destination_action: None,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        self.vcpus || self.devices == Devices::Running
    }

    pub(super) fn is_idle(&self) -> bool {
        self.source_action.is_none() && self.destination_action.is_none()
    }

    pub(super) fn die(&mut self) {
        self.vcpus = false;
        self.operation = None;
        self.source_action = None;
        self.destination_action = None;
    }
}

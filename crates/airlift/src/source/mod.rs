//! The source of a whole migration, phase by phase:
//!
//! ```text
//! connect -> negotiate -> setup -> precopy -> quiesce -> stop_copy -> commit
//!      \__________\__________\________\_________\___________\_____ roll_back
//! ```
//! [`session`] holds what all phases share: the protocol's machine, the journal, the connections and
//! the inbox. A phase takes the set of devices in the type of its state and gives it on in the next
//! one; when the protocol orders a rollback it gives the set back as it stands.

mod commit;
mod connect;
mod figures;
mod negotiate;
mod pace;
mod precopy;
mod quiesce;
mod report;
mod roll_back;
mod session;
mod setup;
mod stop_copy;

use crate::clock::Environment;
use crate::control::{CancelGate, Control, Gauges};
use crate::link::Connector;
use crate::machine::Machine;
use crate::options::SourceOptions;
use crate::report::MigrationReport;
use crate::set::{DeviceSet, Recorder};
use airlift_core::commit::Journal;
use airlift_core::{DirtySource, MigrationDevice, Phase, Side};
use roll_back::Standing;
use session::Session;
use std::fmt;
use std::sync::Arc;

/// A device of the source, and who reports its DMA.
pub struct SourceDevice {
    /// The device.
    pub device: Box<dyn MigrationDevice>,
    /// Reports what the device writes by DMA. Without one, all memory that it can reach is taken as
    /// dirty at every sync, and the report says so.
    pub dirty: Option<Box<dyn DirtySource>>,
}

impl fmt::Debug for SourceDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceDevice").field("id", self.device.id()).finish_non_exhaustive()
    }
}

/// What is left when a session has ended: the report, and everything that was lent to it.
pub struct Ended {
    /// How it ended.
    pub report: MigrationReport,
    /// The machine.
    pub machine: Box<dyn Machine>,
    /// The devices, without those that were given up: as before after a rollback, in STOP after a
    /// completed migration, held in STOP_COPY when it is in doubt who runs. A device must be kept open for
    /// as long as the guest uses it, and for as long as it is in doubt: the last close resets it.
    pub devices: Vec<Box<dyn MigrationDevice>>,
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ended").field("report", &self.report).finish_non_exhaustive()
    }
}

/// The source of a whole migration. [`run`](Self::run) ends with the guest on the destination, or
/// with it on the source as before, or in doubt; it says which.
pub struct Source {
    session: Session,
    devices: Vec<SourceDevice>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl Source {
    /// Takes everything that a migration needs; touches nothing yet.
    #[must_use]
    pub fn new(
        machine: Box<dyn Machine>,
        devices: Vec<SourceDevice>,
        connector: Box<dyn Connector>,
        journal: Box<dyn Journal>,
        environment: Environment,
        options: SourceOptions,
    ) -> Self {
        let gauges = Gauges::new(devices.len(), Phase::Connect);
        let control = Control { gauges, gate: CancelGate::new() };
        let recorder = Recorder::new(environment, Side::Source);
        let session = Session::new(machine, connector, journal, recorder, control, options);
        Self { session, devices }
    }

    /// The handle to cancel and watch.
    #[must_use]
    pub fn control(&self) -> Control {
        self.session.control.clone()
    }

    /// Runs the migration, on this thread and those it starts.
    #[must_use]
    pub fn run(self) -> Ended {
        let Self { mut session, devices } = self;
        let mut bare = Vec::with_capacity(devices.len());
        for SourceDevice { device, dirty } in devices {
            session.ids.push(device.id().clone());
            session.dirty_sources.push(dirty);
            bare.push(device);
        }
        let gauges = Arc::clone(&session.control.gauges);
        match DeviceSet::with_gauges(bare, session.recorder.clone(), gauges) {
            Ok(set) => {
                let standing = migrate(&mut session, set);
                session.end(standing)
            }
            Err(error) => {
                let failure = error.into_failure(Side::Source, Phase::Connect);
                session.fail(failure);
                session.end(Standing::Nothing)
            }
        }
    }
}

/// The whole way, as a list of phases. `Err` and `Ok` both hold where the devices stand.
fn migrate(session: &mut Session, set: DeviceSet) -> Standing {
    let way = connect::run(session, set)
        .and_then(|set| negotiate::run(session, set))
        .and_then(|(set, agreed)| setup::run(session, set, agreed))
        .and_then(|(set, moving)| precopy::run(session, set, moving))
        .and_then(|(set, moving)| quiesce::run(session, set, moving))
        .and_then(|(set, moving)| stop_copy::run(session, set, moving))
        .and_then(|set| commit::run(session, set));
    match way {
        Ok(done) => done,
        Err(standing) => roll_back::run(session, standing),
    }
}

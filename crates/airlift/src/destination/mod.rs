//! The destination of a whole migration, phase by phase:
//!
//! ```text
//! listen -> negotiate -> resuming -> load -> commit (hold, start, run)
//!      \_________\___________\________\________\__ reset
//! ```
//! [`session`] holds what all phases share. Before LOADED is sent everything that fails ends with the
//! devices reset; after it this side holds, and what it does is the protocol's to say.

mod commit;
mod door;
mod figures;
mod listen;
mod load;
mod negotiate;
mod report;
mod reset;
mod resuming;
mod session;
mod standing;

use crate::clock::Environment;
use crate::control::{CancelGate, Control, Gauges};
use crate::link::Acceptor;
use crate::machine::Machine;
use crate::options::DestinationOptions;
use crate::set::{DeviceSet, Recorder};
use crate::source::Ended;
use airlift_core::commit::Journal;
use airlift_core::{MigrationDevice, Phase, Side};
use session::{Lent, Session};
use standing::Standing;
use std::fmt;
use std::sync::Arc;

/// The destination of a whole migration. [`run`](Self::run) waits for a source and ends with the
/// guest running here, or with the devices reset, or in doubt; it says which.
pub struct Destination {
    lent: Lent,
    devices: Vec<Box<dyn MigrationDevice>>,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination").field("devices", &self.devices.len()).finish_non_exhaustive()
    }
}

impl Destination {
    /// Takes everything that a migration needs; touches nothing yet. What the devices hold is lost
    /// when a migration begins.
    #[must_use]
    pub fn new(
        machine: Box<dyn Machine>,
        devices: Vec<Box<dyn MigrationDevice>>,
        acceptor: Box<dyn Acceptor>,
        journal: Box<dyn Journal>,
        environment: Environment,
        options: DestinationOptions,
    ) -> Self {
        let gauges = Gauges::new(devices.len(), Phase::Listen);
        let control = Control { gauges, gate: CancelGate::new() };
        let recorder = Recorder::new(environment, Side::Destination);
        Self { lent: Lent { machine, acceptor, journal, recorder, control, options }, devices }
    }

    /// The handle to cancel and watch.
    #[must_use]
    pub fn control(&self) -> Control {
        self.lent.control.clone()
    }

    /// Waits for a source and runs the migration, on this thread and those it starts.
    #[must_use]
    pub fn run(self) -> Ended {
        let Self { mut lent, devices } = self;
        let mut devices = devices;
        let hello = match listen::run(&mut lent, &mut devices) {
            Ok(hello) => hello,
            Err(failure) => return lent.end_unheard(failure, devices),
        };
        let gauges = Arc::clone(&lent.control.gauges);
        let set = DeviceSet::with_gauges(devices, lent.recorder.clone(), gauges);
        let mut session = Session::new(lent, hello.hello.session);
        let standing = match set {
            Ok(set) => migrate(&mut session, set, hello),
            Err(error) => {
                session.fail(error.into_failure(Side::Destination, Phase::Listen));
                Standing::Nothing
            }
        };
        session.end(standing)
    }
}

/// The whole way, as a list of phases. `Err` and `Ok` both hold where the devices stand.
fn migrate(session: &mut Session, set: DeviceSet, hello: listen::Heard) -> Standing {
    let way = negotiate::run(session, set, hello)
        .and_then(|(set, agreed)| resuming::run(session, set, agreed))
        .and_then(|(set, received)| load::run(session, set, received))
        .and_then(|set| commit::run(session, set));
    match way {
        Ok(done) => done,
        Err(standing) => reset::run(session, standing),
    }
}

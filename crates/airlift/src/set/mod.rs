//! A set of devices that are moved together: driven through the phases by whoever holds it.
//!
//! ```text
//! source       DeviceSet -> SavingSet -> StoppedSet -> DrainedSet -> DeviceSet
//! destination  DeviceSet -> LoadingSet -> LoadedSet -> DeviceSet
//! ```
//! Each step consumes the phase before it. A step that fails gives a [`FailedSet`], whose devices
//! can be brought back; every phase of the source can be rolled back, every phase of the destination
//! abandoned. Nothing here opens a connection, decides when to stop, or commits: see
//! [`Source`](crate::Source) for all of that.

mod held;
mod load;
mod loading;
mod members;
mod recorder;
mod save;
mod saving;
mod sink;
mod trace;
mod worker;

pub use load::InFrame;
pub use loading::{Feeder, LoadedSet, LoadingSet};
pub use members::SetError;
pub(crate) use recorder::{Recorder, ms};
pub use save::SaveStatus;
pub use saving::{DrainedSet, Draining, Quiesce, SavingSet, StoppedSet};
pub use sink::{ChunkSink, SetEvent, SinkClosed, StreamFault};

use crate::clock::Environment;
use crate::control::Gauges;
use crate::report::DeviceReport;
use airlift_core::{
    DeviceId, DeviceOffer, DeviceState, MigrationDevice, PausePlan, PeerDma, Phase, Recovered, ResetPolicy,
    RunPlan, Side,
};
use members::Members;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use worker::{Held, Post, misuse};

impl Post {
    /// Walks a device, within the saving group if it is there.
    fn walk(&mut self, target: DeviceState) -> Result<(), StreamFault> {
        let recorder = self.recorder.clone();
        let result = match &mut self.held {
            Held::Idle(idle) => idle.walk(target, &recorder),
            Held::Saving(outgoing) if target.is_saving() => outgoing.saving.walk(target, &recorder),
            Held::Saving(_) => {
                self.close_session();
                return self.walk(target);
            }
            Held::Loading(_) | Held::Gone => {
                return Err(StreamFault::Device(misuse("the device is loading or not here")));
            }
        };
        result.map_err(|error| StreamFault::Transition(Box::new(error)))?;
        self.note(target);
        Ok(())
    }

    /// Gives the bare device away; the worker has nothing more to do.
    fn give_up_device(&mut self) -> Option<Box<dyn MigrationDevice>> {
        self.close_session();
        match std::mem::replace(&mut self.held, Held::Gone) {
            Held::Idle(idle) => Some(idle.device),
            _ => None,
        }
    }
}

/// Devices that no migration has touched, or that one has let go of again.
pub struct DeviceSet {
    members: Members,
}

impl fmt::Debug for DeviceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceSet").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

impl DeviceSet {
    /// Takes devices, in the order in which both sides number them, and starts a worker for each.
    ///
    /// # Errors
    /// When two have the same name or a thread cannot be started.
    pub fn new(
        devices: Vec<Box<dyn MigrationDevice>>,
        side: Side,
        environment: Environment,
    ) -> Result<Self, SetError> {
        let gauges = Gauges::new(devices.len(), Phase::Connect);
        Self::with_gauges(devices, Recorder::new(environment, side), gauges)
    }

    pub(crate) fn with_gauges(
        devices: Vec<Box<dyn MigrationDevice>>,
        recorder: Recorder,
        gauges: Arc<Gauges>,
    ) -> Result<Self, SetError> {
        Ok(Self { members: Members::new(devices, recorder, gauges)? })
    }

    /// The devices' names, in order.
    #[must_use]
    pub fn ids(&self) -> &[DeviceId] {
        self.members.ids()
    }

    /// What the other side must match, for the compatibility report.
    #[must_use]
    pub fn offers(&self) -> Vec<DeviceOffer> {
        (0..self.members.len())
            .map(|i| DeviceOffer {
                id: self.members.ids()[i].clone(),
                identity: self.members.identity(i).clone(),
                capabilities: self.members.capabilities(i),
            })
            .collect()
    }

    /// The state of every device, read now. A device that cannot be read has its error.
    pub fn states(&mut self, deadline: Duration) -> Vec<(DeviceId, Result<DeviceState, StreamFault>)> {
        let answers = self.members.states(deadline);
        answers
            .into_iter()
            .map(|(i, answer)| {
                (self.members.ids()[i].clone(), answer.map_err(StreamFault::Device).and_then(|r| r))
            })
            .collect()
    }

    /// Stops all devices in P2P order: all are quiescent towards their peers before one stops (I14).
    /// For a pause outside of migrations.
    ///
    /// # Errors
    /// When they cannot be stopped together, or one fails. Some may then be stopped: call
    /// [`run`](Self::run).
    pub fn pause(&mut self, peer_dma: PeerDma, deadline: Duration) -> Result<(), SetError> {
        let devices = self.members.plan_devices(deadline)?;
        let plan = PausePlan::new(&devices, peer_dma)?;
        self.walk_stages(plan.stages(), deadline)
    }

    /// Lets all devices run, in the reverse order.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn run(&mut self, peer_dma: PeerDma, deadline: Duration) -> Result<(), SetError> {
        let devices = self.members.plan_devices(deadline)?;
        let plan = RunPlan::new(&devices, peer_dma)?;
        self.walk_stages(plan.stages(), deadline)
    }

    fn walk_stages(&mut self, stages: &[airlift_core::Stage], deadline: Duration) -> Result<(), SetError> {
        self.members.stages(stages, deadline, |_, target| move |post: &mut Post| post.walk(target)).map(drop)
    }

    /// Resets every device. Destroys what the guest sees of them. Gives those that could not be
    /// reset, which are given up.
    pub fn reset(&mut self, deadline: Duration) -> Vec<(DeviceId, airlift_core::DeviceError)> {
        self.members.reset_all(deadline)
    }

    /// What every device did.
    #[must_use]
    pub fn reports(&self) -> Vec<DeviceReport> {
        reports(&self.members)
    }

    /// Ends the workers and gives the devices back, without those that were given up or do not
    /// answer within `deadline`.
    #[must_use]
    pub fn into_devices(self, deadline: Duration) -> Vec<Box<dyn MigrationDevice>> {
        self.members.into_devices(deadline)
    }
}

fn reports(members: &Members) -> Vec<DeviceReport> {
    (0..members.len())
        .map(|i| {
            let status = members.save_status(i);
            DeviceReport {
                id: members.ids()[i].clone(),
                interface: members.capabilities(i).interface,
                initial_bytes: status.initial_bytes,
                precopy_bytes: status.precopy_bytes,
                stop_copy_bytes: status.stop_copy_bytes,
                transitions: members.recorder.transitions(&members.ids()[i]),
                quarantined: members.why_quarantined(i),
                was_reset: members.was_reset[i],
            }
        })
        .collect()
}

/// Devices that were brought back, and what became of each.
#[derive(Debug)]
pub struct RolledBack {
    /// The devices.
    pub set: DeviceSet,
    /// By device, in order.
    pub fates: Vec<Recovered>,
}

/// A step failed. The devices stand where it left them.
pub struct FailedSet {
    members: Members,
    /// What failed.
    pub error: SetError,
}

impl fmt::Debug for FailedSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailedSet").field("error", &self.error).finish_non_exhaustive()
    }
}

impl FailedSet {
    fn new(members: Members, error: SetError) -> Box<Self> {
        Box::new(Self { members, error })
    }

    /// Brings the devices back to the state that each had before.
    #[must_use]
    pub fn roll_back(self, policy: ResetPolicy, deadline: Duration) -> RolledBack {
        roll_back(self.members, policy, deadline)
    }

    /// Ends all sessions without bringing anything back: for a destination, whose devices are reset next.
    #[must_use]
    pub fn into_set(self) -> DeviceSet {
        DeviceSet { members: self.members }
    }
}

fn roll_back(mut members: Members, policy: ResetPolicy, deadline: Duration) -> RolledBack {
    let fates = members.roll_back(policy, deadline);
    RolledBack { set: DeviceSet { members }, fates }
}

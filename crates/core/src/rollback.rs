//! The way back: what becomes of a source's devices when a migration does not happen.
//!
//! [`recover`] decides for one device from the state that was read back; [`Rollback`] takes all of
//! them there in stages, whatever fails on the way, and gives up a device rather than the others.
//! Devices that ran before run again; devices that were stopped before are stopped. A device that
//! can do neither is quarantined: named, with the reason, and not touched again.
//!
//! State is never assumed: every result that comes in is a state that was read after the step
//! (V2-READBACK).

use crate::plan::{Action, Stage, StageKind, Step};
use crate::{Arc, Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceState, path};
use serde::{Deserialize, Serialize};

/// Whether a device may be reset to get it going. A reset destroys what the guest sees of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetPolicy {
    /// It is left as it is and quarantined.
    #[default]
    Never,
    /// It is reset, and that is reported.
    Allowed,
}

/// What to do with a device that was found in some state after a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// It is where it belongs.
    AlreadyThere,
    /// These arcs lead where it belongs.
    Walk(Vec<Arc>),
    /// Only a reset helps, and it is allowed. It leads to RUNNING; these arcs then lead where the
    /// device belongs.
    Reset {
        /// Empty when the device belongs in RUNNING.
        then: Vec<Arc>,
    },
    /// It cannot be brought back.
    Quarantine {
        /// Why, for a person.
        reason: String,
    },
}

/// What is left to do with a device that only a reset gets going.
const ADVICE: &str =
    "let the guest let go of the device, reset it, and give it to the guest anew, or restart the guest";

/// Where a device belongs after a failed migration.
const fn home(ran_before: bool) -> DeviceState {
    if ran_before { DeviceState::Running } else { DeviceState::Stop }
}

/// What brings a device back that was found in `reached`: to RUNNING if it ran before the migration,
/// else to STOP.
///
/// ERROR (V2-ERROR, V1-READBACK), a state that is unknown or that the device lacks, RESUMING (V2-ABORT-LOAD) and
/// a state that could not be read need a reset. A device that is lost or does not answer in time is
/// not reset either: the reset would wait as well.
#[must_use]
pub fn recover(
    reached: &Result<DeviceState, DeviceError>,
    ran_before: bool,
    caps: &Capabilities,
    policy: ResetPolicy,
) -> Recovery {
    let trouble = match reached {
        Ok(DeviceState::Resuming) => "it was left in RESUMING, with a state that is not whole".into(),
        Ok(state) => match path(*state, home(ran_before), caps) {
            Ok(walk) if walk.is_empty() => return Recovery::AlreadyThere,
            Ok(walk) => return Recovery::Walk(walk),
            Err(error) => error.to_string(),
        },
        Err(error) if matches!(error.kind, DeviceErrorKind::Lost | DeviceErrorKind::TimedOut) => {
            return Recovery::Quarantine { reason: error.to_string() };
        }
        Err(error) => format!("its state cannot be read ({error})"),
    };
    match policy {
        ResetPolicy::Never => Recovery::Quarantine {
            reason: format!(
                "{trouble}; a reset destroys what the guest has in it, and is not allowed by policy: {ADVICE}"
            ),
        },
        ResetPolicy::Allowed => match path(DeviceState::Running, home(ran_before), caps) {
            Ok(then) => Recovery::Reset { then },
            Err(error) => Recovery::Quarantine { reason: format!("{trouble}; {error}") },
        },
    }
}

/// A device that is to be brought back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumeDevice {
    /// Its name.
    pub id: DeviceId,
    /// What it can do.
    pub capabilities: Capabilities,
    /// It ran before the migration: only such a device is to run again.
    pub ran_before: bool,
    /// The state it is in, read from the device now, or why that cannot be read.
    pub found: Result<DeviceState, DeviceError>,
}

/// Where a device ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It runs, as before the migration.
    Running,
    /// It is stopped, as before the migration.
    Stopped,
    /// It was given up, and its state is not known to be one that it should be in.
    Quarantined {
        /// Why, for a person.
        reason: String,
    },
}

/// A device after a rollback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// The device.
    pub device: DeviceId,
    /// Where it ended.
    pub fate: Fate,
    /// It was reset on the way: the guest lost what it saw of it, and the machine must be told.
    pub was_reset: bool,
}

/// Steps of one device that may fail before it is given up.
const MAX_FAILURES: u8 = 2;

#[derive(Clone, Debug)]
struct Member {
    device: ResumeDevice,
    /// The step that was handed out and has no result yet.
    pending: Option<Action>,
    failures: u8,
    was_reset: bool,
    quarantined: Option<String>,
}

impl Member {
    fn is_stopped(&self) -> bool {
        self.device.found.as_ref().is_ok_and(|state| !state.is_live())
    }

    /// What is done towards `wish` in a stage of this kind; nothing when it has to wait.
    fn step_in(&self, kind: StageKind, wish: Action) -> Option<Action> {
        match (wish, kind) {
            (Action::Reset, kind) => (kind == StageKind::Reset).then_some(wish),
            (Action::SetState(DeviceState::Running), StageKind::PeerQuiet) => {
                let leaves = self.is_stopped() || self.device.found == Ok(DeviceState::PreCopyP2p);
                let comes_back = leaves && self.device.capabilities.p2p();
                comes_back.then_some(Action::SetState(DeviceState::RunningP2p))
            }
            (Action::SetState(DeviceState::Running), kind) => (kind == StageKind::Run).then_some(wish),
            // A device that belongs in STOP stands in nobody's way.
            (Action::SetState(_), _) => Some(wish),
        }
    }
}

/// The rollback of a source's devices, step by step, with failures.
///
/// Call [`next_stage`](Self::next_stage), carry out its steps in parallel, read back the state of
/// each device and [`report`](Self::report) it, and so on until there is no more stage. It ends: a
/// device whose steps fail twice is quarantined, and so is one whose result is missing when the
/// next stage is asked for.
///
/// Order (V2-P2P-BARRIER): devices with P2P first come back to RUNNING_P2P; then those that must be
/// are reset; then all go to RUNNING, among them the devices without P2P and those that never left
/// PRE_COPY. As long as a device with P2P that ran before is stopped, no step leads another one to
/// RUNNING.
#[derive(Clone, Debug)]
pub struct Rollback {
    members: Vec<Member>,
    policy: ResetPolicy,
}

impl Rollback {
    /// The rollback of these devices.
    #[must_use]
    pub fn new(devices: Vec<ResumeDevice>, policy: ResetPolicy) -> Self {
        let fresh =
            |device| Member { device, pending: None, failures: 0, was_reset: false, quarantined: None };
        Self { members: devices.into_iter().map(fresh).collect(), policy }
    }

    /// The steps to carry out next, in parallel; `None` when every device has met its fate.
    pub fn next_stage(&mut self) -> Option<Stage> {
        for member in &mut self.members {
            if member.pending.take().is_some() && member.quarantined.is_none() {
                member.quarantined = Some("its last step in the rollback has no result".into());
            }
        }
        let wishes = self.wishes();
        let run = Some(Action::SetState(DeviceState::Running));
        let p2p_behind = self
            .members
            .iter()
            .zip(&wishes)
            .any(|(m, wish)| m.is_stopped() && m.device.capabilities.p2p() && *wish == run);
        let kind = if p2p_behind {
            StageKind::PeerQuiet
        } else if wishes.contains(&Some(Action::Reset)) {
            StageKind::Reset
        } else if wishes.contains(&run) {
            StageKind::Run
        } else {
            StageKind::Stop
        };
        let mut steps = Vec::new();
        for (member, wish) in self.members.iter_mut().zip(wishes) {
            let Some(action) = wish.and_then(|wish| member.step_in(kind, wish)) else { continue };
            member.pending = Some(action);
            steps.push(Step { device: member.device.id.clone(), action });
        }
        Stage::of(kind, steps)
    }

    /// What each device still needs. Quarantines those that cannot be helped.
    fn wishes(&mut self) -> Vec<Option<Action>> {
        let policy = self.policy;
        let wish = |member: &mut Member| {
            if member.quarantined.is_some() {
                return None;
            }
            let device = &member.device;
            match recover(&device.found, device.ran_before, &device.capabilities, policy) {
                Recovery::AlreadyThere => None,
                Recovery::Walk(_) => Some(Action::SetState(home(device.ran_before))),
                Recovery::Reset { .. } => Some(Action::Reset),
                Recovery::Quarantine { reason } => {
                    member.quarantined = Some(reason);
                    None
                }
            }
        };
        self.members.iter_mut().map(wish).collect()
    }

    /// The state in which `device` was found after its step. A device that has no step is passed
    /// over.
    pub fn report(&mut self, device: &DeviceId, found: Result<DeviceState, DeviceError>) {
        let Some(member) = self.members.iter_mut().find(|m| m.device.id == *device) else { return };
        let Some(action) = member.pending.take() else { return };
        let reached = found.as_ref().is_ok_and(|state| *state == action.target());
        let now = match &found {
            Ok(state) => format!("it is in {state}"),
            Err(error) => error.to_string(),
        };
        member.device.found = found;
        match (action, reached) {
            (Action::Reset, true) => member.was_reset = true,
            (Action::SetState(_), true) => {}
            (Action::Reset, false) => {
                // It may have been reset halfway: the guest's view is lost in any case.
                member.was_reset = true;
                member.quarantined = Some(format!("its reset failed: {now}"));
            }
            (Action::SetState(target), false) => {
                member.failures += 1;
                if member.failures >= MAX_FAILURES {
                    member.quarantined = Some(format!("it does not go to {target}: {now}"));
                }
            }
        }
    }

    /// Gives a device up: its worker is stuck or gone. It gets no more steps.
    pub fn abandon(&mut self, device: &DeviceId, reason: impl Into<String>) {
        if let Some(member) = self.members.iter_mut().find(|m| m.device.id == *device) {
            member.pending = None;
            member.quarantined = Some(reason.into());
        }
    }

    /// What became of the devices, in the order in which they were given. A device that has not met
    /// its fate when this is called is quarantined.
    #[must_use]
    pub fn finish(self) -> Vec<Recovered> {
        let fate = |member: Member| {
            let home = home(member.device.ran_before);
            let fate = match (member.quarantined, member.device.found) {
                (Some(reason), _) => Fate::Quarantined { reason },
                (None, Ok(state)) if state == home && home == DeviceState::Running => Fate::Running,
                (None, Ok(state)) if state == home => Fate::Stopped,
                (None, Ok(state)) => Fate::Quarantined { reason: format!("it was left in {state}") },
                (None, Err(error)) => Fate::Quarantined { reason: error.to_string() },
            };
            Recovered { device: member.device.id, fate, was_reset: member.was_reset }
        };
        self.members.into_iter().map(fate).collect()
    }
}

/// What a [`Rollback`] of these devices does if nothing more fails: for a report or a dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumePlan {
    stages: Vec<Stage>,
    outcome: Vec<Recovered>,
}

impl ResumePlan {
    /// The plan for these devices.
    #[must_use]
    pub fn new(devices: Vec<ResumeDevice>, policy: ResetPolicy) -> Self {
        let mut rollback = Rollback::new(devices, policy);
        let mut stages = Vec::new();
        while let Some(stage) = rollback.next_stage() {
            for step in &stage.steps {
                rollback.report(&step.device, Ok(step.action.target()));
            }
            stages.push(stage);
        }
        Self { stages, outcome: rollback.finish() }
    }

    /// The stages, in order.
    #[must_use]
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Where each device ends.
    #[must_use]
    pub fn outcome(&self) -> &[Recovered] {
        &self.outcome
    }
}

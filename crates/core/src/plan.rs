//! In which order many devices stop and run: stages of steps, with a barrier behind each stage.
//!
//! Devices may write to each other. A device that has stopped must not be written to, so every
//! device is quiescent towards its peers before the first one stops, and every device answers its
//! peers before the first one runs (V2-P2P-BARRIER).
//!
//! A plan is data. Its user carries out all steps of a stage in parallel, waits for all of them, and
//! goes on with the next stage; when a step fails the plan is over and
//! [`Rollback`](crate::Rollback) says how to go back. Nothing here knows which devices really write
//! to each other: that is declared with [`PeerDma`].

use crate::{Capabilities, DeviceId, DeviceState, Interface, path};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A device that is to take part in a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanDevice {
    /// Its name.
    pub id: DeviceId,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The state it is in, as read from the device.
    pub state: DeviceState,
}

/// Whether devices may write to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerDma {
    /// They may: several devices are accepted only if all have the P2P states.
    #[default]
    Possible,
    /// The embedder declares that they do not (`--assume-no-peer-dma`). Wrongly declared, writes
    /// between devices are lost without a trace.
    AssumeNone,
}

/// What is done with one device in a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Walk it to this state.
    SetState(DeviceState),
    /// Reset it, which leads to RUNNING. Only in a rollback, and only by policy.
    Reset,
}

impl Action {
    /// The state in which the device is when the action has succeeded.
    #[must_use]
    pub const fn target(self) -> DeviceState {
        match self {
            Self::SetState(target) => target,
            Self::Reset => DeviceState::Running,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetState(target) => write!(f, "to {target}"),
            Self::Reset => f.write_str("reset"),
        }
    }
}

/// One action on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The device.
    pub device: DeviceId,
    /// What is done with it.
    pub action: Action,
}

/// What a stage is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StageKind {
    /// Devices become, or come back as, quiescent towards their peers.
    PeerQuiet,
    /// Devices stop.
    Stop,
    /// Devices run.
    Run,
    /// Devices are reset, in a rollback.
    Reset,
}

/// Steps that are carried out in parallel. All of them have ended before the next stage begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What it is for.
    pub kind: StageKind,
    /// Its steps, by the order in which the devices were given; never empty, no device twice.
    pub steps: Vec<Step>,
}

impl Stage {
    /// The stage of these steps; `None` when there are none.
    pub(crate) fn of(kind: StageKind, steps: impl IntoIterator<Item = Step>) -> Option<Self> {
        let steps: Vec<Step> = steps.into_iter().collect();
        (!steps.is_empty()).then_some(Self { kind, steps })
    }
}

/// A device whose state does not allow it to take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfit {
    /// The device.
    pub device: DeviceId,
    /// Its state.
    pub state: DeviceState,
}

/// Why there is no plan for these devices. Every device that is the reason is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum PlanRefusal {
    /// Several devices, and these cannot be made quiescent towards their peers (V2-P2P-BARRIER).
    #[error(
        "several devices are to be stopped in order, and {} no P2P states{}; if the devices do not write to each other, say so with --assume-no-peer-dma",
        have(lacking),
        if *v1 { V1_LACKS_P2P } else { "" }
    )]
    PeerDma {
        /// The devices without P2P.
        lacking: Vec<DeviceId>,
        /// Some of them speak interface v1, which has none (V1-ARCS).
        #[serde(default)]
        v1: bool,
    },
    /// These devices are in a state from which the plan cannot begin.
    #[error("{}", unfit(devices))]
    Unfit {
        /// The devices and their states.
        devices: Vec<Unfit>,
    },
}

/// Why nothing that is done to such a device helps (V1-ARCS).
pub(crate) const V1_LACKS_P2P: &str = " (migration interface v1 knows none)";

fn have(devices: &[DeviceId]) -> String {
    let names: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "has" } else { "have" })
}

fn unfit(devices: &[Unfit]) -> String {
    let each: Vec<_> = devices.iter().map(|u| format!("{} is in {}", u.device, u.state)).collect();
    each.join(", ")
}

/// Takes running devices to STOP_COPY: first all that can to their P2P state, then all to STOP_COPY.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuiescePlan {
    stages: Vec<Stage>,
    peer_dma_assumed_away: bool,
}

impl QuiescePlan {
    /// The plan for these devices. A device that is stopped already takes no part in the first
    /// stage.
    ///
    /// # Errors
    /// When there are several devices, one lacks P2P, and peer DMA is possible; or when a device is
    /// in ERROR, RESUMING or a state that is unknown or lacking.
    pub fn new(devices: &[PlanDevice], peer_dma: PeerDma) -> Result<Self, PlanRefusal> {
        let saves = |d: &PlanDevice| {
            d.state != DeviceState::Resuming && path(d.state, DeviceState::StopCopy, &d.capabilities).is_ok()
        };
        check_fit(devices, saves)?;
        let peer_dma_assumed_away = check_peers(devices, peer_dma)?;
        Ok(Self { stages: stop_stages(devices, DeviceState::StopCopy), peer_dma_assumed_away })
    }

    /// The same without the P2P stage: devices stop one beside the other while their peers still
    /// write to them. Loses such writes. It exists so that a test can show what the stage is for.
    #[must_use]
    pub fn skip_p2p(mut self) -> Self {
        self.stages.retain(|stage| stage.kind != StageKind::PeerQuiet);
        self
    }

    /// The stages, in order.
    #[must_use]
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The plan rests on the declaration that devices do not write to each other. Belongs in the
    /// report.
    #[must_use]
    pub const fn peer_dma_assumed_away(&self) -> bool {
        self.peer_dma_assumed_away
    }
}

/// Takes running devices to STOP in the same order, outside of migrations or before a destination
/// that began to run gives up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausePlan {
    stages: Vec<Stage>,
    peer_dma_assumed_away: bool,
}

impl PausePlan {
    /// The plan for these devices.
    ///
    /// # Errors
    /// As [`QuiescePlan::new`].
    pub fn new(devices: &[PlanDevice], peer_dma: PeerDma) -> Result<Self, PlanRefusal> {
        let stops = |d: &PlanDevice| {
            d.state != DeviceState::Resuming && path(d.state, DeviceState::Stop, &d.capabilities).is_ok()
        };
        check_fit(devices, stops)?;
        let peer_dma_assumed_away = check_peers(devices, peer_dma)?;
        Ok(Self { stages: stop_stages(devices, DeviceState::Stop), peer_dma_assumed_away })
    }

    /// The stages, in order.
    #[must_use]
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// As [`QuiescePlan::peer_dma_assumed_away`].
    #[must_use]
    pub const fn peer_dma_assumed_away(&self) -> bool {
        self.peer_dma_assumed_away
    }
}

/// Takes stopped devices to RUNNING: first all that can to RUNNING_P2P, where they answer their
/// peers and start nothing towards them, then all to RUNNING. For the destination after COMMIT, and
/// for devices that a [`PausePlan`] has stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunPlan {
    stages: Vec<Stage>,
    peer_dma_assumed_away: bool,
}

impl RunPlan {
    /// The plan for these devices. It is also the plan for devices of which some have gone part of
    /// the way.
    ///
    /// # Errors
    /// When there are several devices, one lacks P2P, and peer DMA is possible; or when a device is
    /// in any state but STOP, RUNNING_P2P and RUNNING.
    pub fn new(devices: &[PlanDevice], peer_dma: PeerDma) -> Result<Self, PlanRefusal> {
        let runs = |d: &PlanDevice| {
            let state = matches!(d.state, DeviceState::Stop | DeviceState::RunningP2p | DeviceState::Running);
            state && d.capabilities.has(d.state)
        };
        check_fit(devices, runs)?;
        let peer_dma_assumed_away = check_peers(devices, peer_dma)?;
        let stopped = |d: &&PlanDevice| d.state == DeviceState::Stop && d.capabilities.p2p();
        let quiet = steps(devices.iter().filter(stopped), |_| DeviceState::RunningP2p);
        let run = steps(devices.iter().filter(|d| d.state != DeviceState::Running), |_| DeviceState::Running);
        let stages = [Stage::of(StageKind::PeerQuiet, quiet), Stage::of(StageKind::Run, run)];
        Ok(Self { stages: stages.into_iter().flatten().collect(), peer_dma_assumed_away })
    }

    /// The stages, in order.
    #[must_use]
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// As [`QuiescePlan::peer_dma_assumed_away`].
    #[must_use]
    pub const fn peer_dma_assumed_away(&self) -> bool {
        self.peer_dma_assumed_away
    }
}

fn stop_stages(devices: &[PlanDevice], target: DeviceState) -> Vec<Stage> {
    let quiet = devices.iter().filter_map(|d| {
        let state = match d.state {
            DeviceState::PreCopy => DeviceState::PreCopyP2p,
            DeviceState::Running => DeviceState::RunningP2p,
            _ => return None,
        };
        d.capabilities.has(state).then(|| step(d, state))
    });
    let stop = steps(devices.iter().filter(|d| d.state != target), |_| target);
    let stages = [Stage::of(StageKind::PeerQuiet, quiet), Stage::of(StageKind::Stop, stop)];
    stages.into_iter().flatten().collect()
}

fn step(device: &PlanDevice, target: DeviceState) -> Step {
    Step { device: device.id.clone(), action: Action::SetState(target) }
}

fn steps<'a>(
    devices: impl Iterator<Item = &'a PlanDevice>,
    target: impl Fn(&PlanDevice) -> DeviceState,
) -> impl Iterator<Item = Step> {
    devices.map(move |d| step(d, target(d)))
}

fn check_fit(devices: &[PlanDevice], fit: impl Fn(&PlanDevice) -> bool) -> Result<(), PlanRefusal> {
    let unfit: Vec<_> =
        devices.iter().filter(|d| !fit(d)).map(|d| Unfit { device: d.id.clone(), state: d.state }).collect();
    if unfit.is_empty() { Ok(()) } else { Err(PlanRefusal::Unfit { devices: unfit }) }
}

/// Whether the plan rests on the embedder's word that there is no peer DMA.
fn check_peers(devices: &[PlanDevice], peer_dma: PeerDma) -> Result<bool, PlanRefusal> {
    let lacking = without_p2p(devices.iter().map(|d| (&d.id, &d.capabilities)));
    match peer_dma {
        _ if lacking.is_empty() => Ok(false),
        PeerDma::AssumeNone => Ok(true),
        PeerDma::Possible => {
            let is_v1 = |d: &PlanDevice| d.capabilities.interface == Interface::V1 && lacking.contains(&d.id);
            Err(PlanRefusal::PeerDma { v1: devices.iter().any(is_v1), lacking })
        }
    }
}

/// The devices that make an ordered stop of these impossible: those without P2P, unless there is
/// only one device in all.
pub(crate) fn without_p2p<'a>(
    devices: impl ExactSizeIterator<Item = (&'a DeviceId, &'a Capabilities)>,
) -> Vec<DeviceId> {
    if devices.len() < 2 {
        return Vec::new();
    }
    devices.filter(|(_, caps)| !caps.p2p()).map(|(id, _)| id.clone()).collect()
}

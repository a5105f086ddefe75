//! The arcs between device states and the paths over them, derived from what the states mean.
//!
//! A state stands for two facts: how far the device still moves (running, running without DMA to
//! peers, stopped) and which data session is open (none, saving, loading). A single arc changes one
//! of the two by one step, and a session in which the device has stopped never moves again. All
//! arcs, the folds of devices that lack states, and all combinations follow from that; no table
//! stands here. `tests/arcs_table.rs` holds the interface's table and compares.
//!
//! In interface v1 one write may change both facts at once, so that its arcs are more: see V1-ARCS.
//!
//! Nothing here talks to a device. That a path exists does not mean that a device will complete it.

use crate::{Capabilities, DeviceState, Errno, Interface};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A single step from one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Arc {
    /// The state before.
    pub from: DeviceState,
    /// The state after.
    pub to: DeviceState,
}

impl fmt::Display for Arc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}

/// What an arc does to the device's data session (V2-SESSION).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArcSession {
    /// There is none before and none after.
    None,
    /// A session to read the device's state begins.
    OpensSave,
    /// A session to write the device's state begins.
    OpensLoad,
    /// The session that is open goes on.
    Keeps,
    /// The session that is open is over.
    Ends,
}

impl Arc {
    /// The arc from `from` to `to`. Whether a device has it is for [`arcs`] to say.
    #[must_use]
    pub const fn new(from: DeviceState, to: DeviceState) -> Self {
        Self { from, to }
    }

    /// What this arc does to the data session (V2-SESSION).
    #[must_use]
    pub const fn session(self) -> ArcSession {
        match (Holds::of(self.from), Holds::of(self.to)) {
            (Holds::Nothing, Holds::Nothing) => ArcSession::None,
            (Holds::Saving, Holds::Saving) | (Holds::Loading, Holds::Loading) => ArcSession::Keeps,
            (Holds::Nothing | Holds::Loading, Holds::Saving) => ArcSession::OpensSave,
            (Holds::Nothing | Holds::Saving, Holds::Loading) => ArcSession::OpensLoad,
            (Holds::Saving | Holds::Loading, Holds::Nothing) => ArcSession::Ends,
        }
    }
}

/// Which data session a state has open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Nothing,
    Saving,
    Loading,
}

impl Holds {
    const fn of(state: DeviceState) -> Self {
        match state {
            DeviceState::Resuming => Self::Loading,
            _ if state.is_saving() => Self::Saving,
            _ => Self::Nothing,
        }
    }
}

/// How far a state lets the device move, counted in steps from standing still on a device with
/// these capabilities; `None` for ERROR and unknown values, which no arc touches.
fn motion(state: DeviceState, caps: &Capabilities) -> Option<u8> {
    match state {
        DeviceState::Stop | DeviceState::StopCopy | DeviceState::Resuming => Some(0),
        DeviceState::RunningP2p | DeviceState::PreCopyP2p => Some(1),
        // Without the P2P states the step between running and stopped is a single one.
        DeviceState::Running | DeviceState::PreCopy => Some(if caps.p2p() { 2 } else { 1 }),
        DeviceState::Error | DeviceState::Unknown(_) => None,
    }
}

/// Whether one write of `device_state` leads from one to the other (V1-ARCS). Pre-copy ends running or
/// in stop-and-copy; a device that saved loads only after it has run or stopped.
const fn is_v1_arc(from: Holds, to: Holds, before: u8, after: u8) -> bool {
    match (from, to) {
        (Holds::Nothing, Holds::Nothing) => before != after,
        // Saving starts no device, and stops none at its end.
        (Holds::Nothing, Holds::Saving) => after <= before,
        (Holds::Saving, Holds::Saving) => after < before,
        (Holds::Saving, Holds::Nothing) => after >= before,
        (Holds::Nothing, Holds::Loading) | (Holds::Loading, Holds::Nothing) => true,
        (Holds::Saving | Holds::Loading, Holds::Loading) | (Holds::Loading, Holds::Saving) => false,
    }
}

/// Whether `from -> to` is a single arc of a device with these capabilities (V2-ARCS).
fn is_arc(from: DeviceState, to: DeviceState, caps: &Capabilities) -> bool {
    if !caps.has(from) || !caps.has(to) {
        return false;
    }
    let (Some(before), Some(after)) = (motion(from, caps), motion(to, caps)) else {
        return false;
    };
    if caps.interface == Interface::V1 {
        return is_v1_arc(Holds::of(from), Holds::of(to), before, after);
    }
    match (Holds::of(from), Holds::of(to)) {
        // The session stays: one step of motion. A saving session that has stopped stays stopped
        // (V2-NO-REWIND).
        (a, b) if a == b => before.abs_diff(after) == 1 && !(a == Holds::Saving && before == 0),
        // The session begins or ends: the motion stays.
        (Holds::Nothing, _) | (_, Holds::Nothing) => before == after,
        // From saving to loading and back there is no single step.
        _ => false,
    }
}

/// The single arcs that the driver of a device with these capabilities implements (V2-ARCS, V1-ARCS), by
/// their states' values. Arcs to ERROR are not in it: they cannot be asked for.
#[must_use]
pub fn arcs(caps: &Capabilities) -> Vec<Arc> {
    DeviceState::ALL
        .into_iter()
        .flat_map(|from| DeviceState::ALL.into_iter().map(move |to| Arc { from, to }))
        .filter(|arc| is_arc(arc.from, arc.to, caps))
        .collect()
}

/// Why there is no path between two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum PathError {
    /// The device is in ERROR, which only a reset leaves (V2-ERROR, V1-READBACK).
    #[error("the device is in ERROR, which only a reset leaves")]
    FromError,
    /// ERROR cannot be asked for (V2-ERROR).
    #[error("ERROR cannot be asked for")]
    ToError,
    /// The device is in a state that the interface does not define.
    #[error("the device is in state {0}, which the interface does not define")]
    FromUnknown(u32),
    /// The state asked for is not one that the interface defines.
    #[error("state {0} is not one that the interface defines")]
    ToUnknown(u32),
    /// The device is said to be in a state that its capabilities exclude (V2-CAPABILITIES).
    #[error("the device is in {0}, which its capabilities exclude")]
    FromLacking(DeviceState),
    /// The state asked for is one that the device lacks (V2-CAPABILITIES).
    #[error("the device lacks {0}")]
    ToLacking(DeviceState),
    /// From STOP_COPY no PRE_COPY state can be reached (V2-NO-REWIND).
    #[error("{from} -> {to}: a stopped saving session cannot go back to pre-copy")]
    Rewind {
        /// The state before.
        from: DeviceState,
        /// The state asked for.
        to: DeviceState,
    },
}

impl PathError {
    /// The error number with which an interface v2 device refuses such a request.
    #[must_use]
    pub const fn errno(self) -> Errno {
        Errno::EINVAL
    }
}

/// The arcs that take a device from `from` to `to`, in order; empty when it is there (V2-PATH).
///
/// The path is the shortest one over [`arcs`]. PRE_COPY, PRE_COPY_P2P and STOP_COPY never stand
/// inside it, except where both ends are in that group and its session goes on.
///
/// STOP_COPY -> PRE_COPY and PRE_COPY_P2P are refused here whatever the device has, and must never
/// be sent: there are kernels that loop for ever over them (V2-NO-REWIND).
///
/// # Errors
/// When no such path exists; the error says why.
pub fn path(from: DeviceState, to: DeviceState, caps: &Capabilities) -> Result<Vec<Arc>, PathError> {
    check_ends(from, to, caps)?;
    let inside = |state: DeviceState| !state.is_saving() || (from.is_saving() && to.is_saving());

    // Breadth first from the end, so that the arcs come out in order. At most seven states.
    let mut steps: Vec<(DeviceState, DeviceState)> = vec![(to, to)];
    let mut seen = 0;
    while let Some(&(at, _)) = steps.get(seen) {
        seen += 1;
        if at == from {
            break;
        }
        if at != to && !inside(at) {
            continue;
        }
        for before in DeviceState::ALL {
            if is_arc(before, at, caps) && steps.iter().all(|&(known, _)| known != before) {
                steps.push((before, at));
            }
        }
    }

    let mut walk = Vec::new();
    let mut at = from;
    while at != to {
        let Some(&(_, next)) = steps.iter().find(|&&(state, _)| state == at) else {
            // Every pair that `check_ends` lets through is connected; the table test visits all.
            return Err(PathError::Rewind { from, to });
        };
        walk.push(Arc { from: at, to: next });
        at = next;
    }
    Ok(walk)
}

/// The state behind the next single arc from `from` towards `to`; `from` itself when it is there.
///
/// # Errors
/// As [`path`].
pub fn next(from: DeviceState, to: DeviceState, caps: &Capabilities) -> Result<DeviceState, PathError> {
    Ok(path(from, to, caps)?.first().map_or(from, |arc| arc.to))
}

fn check_ends(from: DeviceState, to: DeviceState, caps: &Capabilities) -> Result<(), PathError> {
    match from {
        DeviceState::Error => return Err(PathError::FromError),
        DeviceState::Unknown(raw) => return Err(PathError::FromUnknown(raw)),
        _ if !caps.has(from) => return Err(PathError::FromLacking(from)),
        _ => {}
    }
    match to {
        DeviceState::Error => return Err(PathError::ToError),
        DeviceState::Unknown(raw) => return Err(PathError::ToUnknown(raw)),
        _ if !caps.has(to) => return Err(PathError::ToLacking(to)),
        DeviceState::PreCopy | DeviceState::PreCopyP2p if from == DeviceState::StopCopy => {
            return Err(PathError::Rewind { from, to });
        }
        _ => {}
    }
    Ok(())
}

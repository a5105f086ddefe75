//! Placing a fault: wait until a side is held at the phase, do it, let it go on.
//!
//! A held engine has announced the phase and done nothing of it, so a fault is always at the same
//! place, however fast the machine is.

use super::child::Cast;
use super::parts::Parts;
use super::{ANSWER, DemoError};
use crate::args::{DemoArgs, FaultPhase, KillSpec, Victim};
use crate::json::Output;
use airlift_core::Side;
use serde::Serialize;
use std::time::{Duration, Instant};

/// A fault and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A process is killed.
    Kill(KillSpec),
    /// The user cancels.
    Cancel(FaultPhase),
    /// The connection is cut.
    Cut(FaultPhase),
}

impl Fault {
    /// The fault that was asked for.
    pub(crate) fn of(args: &DemoArgs) -> Option<Self> {
        let kill = args.kill.map(Self::Kill);
        kill.or_else(|| args.cancel.map(Self::Cancel)).or_else(|| args.cut.map(Self::Cut))
    }

    /// Where it is placed.
    pub(crate) const fn phase(self) -> FaultPhase {
        match self {
            Self::Kill(KillSpec { phase, .. }) | Self::Cancel(phase) | Self::Cut(phase) => phase,
        }
    }

    /// The side that is held for it. A cancel is the source's, which waits during the load too.
    pub(crate) fn held_side(self) -> Side {
        match self {
            Self::Cancel(FaultPhase::Load) => Side::Source,
            fault => fault.phase().held_side(),
        }
    }

    /// In words.
    pub(crate) fn text(self) -> String {
        match self {
            Self::Kill(spec) => format!("the {} is killed at {}", spec.victim.words(), spec.phase.name()),
            Self::Cancel(phase) => format!("the user cancels at {}", phase.name()),
            Self::Cut(phase) => format!("the connection is cut at {}", phase.name()),
        }
    }
}

#[derive(Serialize)]
struct Placed {
    fault: String,
    phase: &'static str,
}

/// Waits for the fault's place and does it. `false`: the migration ended before it came there.
///
/// # Errors
/// When the place is not reached in time, or what was killed does not end.
pub(crate) fn place(
    cast: &mut Cast,
    fault: Fault,
    parts: &Parts<'_>,
    limit: Duration,
    output: &Output,
) -> Result<bool, DemoError> {
    let held = match fault.held_side() {
        Side::Source => parts.sender,
        Side::Destination => parts.receiver,
    };
    let phase = fault.phase().name();
    let reached = cast.until(Instant::now() + limit, &format!("the phase {phase}"), |cast| {
        if cast.facts(held).held {
            return Some(true);
        }
        let ended = |id| cast.facts(id).ended.is_some();
        (ended(parts.sender) || ended(held)).then_some(false)
    })?;
    if !reached {
        return Ok(false);
    }
    output.say(format!("{:>11}  now: {}", "", fault.text()));
    output.event("fault", &Placed { fault: fault.text(), phase });
    match fault {
        Fault::Kill(spec) => {
            let victim = match spec.victim {
                Victim::Sender => parts.sender,
                Victim::Receiver => parts.receiver,
                Victim::SourceDevice => parts.source.devices[0].child,
                Victim::DestinationDevice => parts.destination.devices[0].child,
            };
            cast.kill(victim);
            let what = format!("the end of {}", cast.name(victim));
            cast.until(Instant::now() + ANSWER, &what, |cast| cast.facts(victim).ended.map(drop))?;
        }
        // Where the source is held this is the release too.
        Fault::Cancel(_) => cast.tell(parts.sender, "cancel"),
        Fault::Cut(_) => {
            if let Some(relay) = parts.relay {
                relay.cut();
            }
        }
    }
    if !matches!(fault, Fault::Cancel(_)) || held != parts.sender {
        cast.tell(held, "go");
    }
    Ok(true)
}

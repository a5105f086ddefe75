//! The way back: every device to what it was, in P2P order; then what was shared taken back, access
//! open, the interrupts that were drained given back, vCPUs resumed, and logging off, which the guest
//! need not wait for. Only when all of that is done does the protocol hear of it, and only then is an
//! outcome published (I18).

use super::Ended;
use super::session::Session;
use crate::event::Event;
use crate::set::{ChunkSink, DeviceSet, DrainedSet, Draining, FailedSet, RolledBack, SavingSet, StoppedSet};
use airlift_core::commit::SourceInput;
use airlift_core::{Failure, Fate, Phase, Side};
use std::time::Duration;

/// Where the devices stand.
pub(super) enum Standing {
    Nothing,
    Idle(DeviceSet),
    Saving(SavingSet),
    Stopped(StoppedSet),
    Draining(Draining),
    Drained(DrainedSet),
    Failed(Box<FailedSet>),
}

/// How long the other side has to read our last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) fn run(session: &mut Session, standing: Standing) -> Standing {
    let Some(cause) = session.orders.roll_back.take() else { return standing };
    // Workers that wait for room, and the sweeper, must come back first.
    if let Some(sink) = session.sink.get() {
        sink.close();
    }
    let policy = session.options.reset_policy;
    let deadline = session.options.deadlines.rollback;
    let back = match standing {
        // Nothing was begun with these devices, so nothing is to be undone with them.
        Standing::Nothing => None,
        Standing::Idle(set) => Some(RolledBack { set, fates: Vec::new() }),
        Standing::Saving(set) => Some(set.roll_back(policy, deadline)),
        Standing::Stopped(set) => Some(set.roll_back(policy, deadline)),
        Standing::Draining(set) => Some(set.roll_back(policy, deadline)),
        Standing::Drained(set) => Some(set.roll_back(policy, deadline)),
        Standing::Failed(set) => Some(set.roll_back(policy, deadline)),
    };
    let standing = match back {
        Some(RolledBack { set, fates }) => {
            for end in fates {
                if end.was_reset {
                    let told = session.machine.device_was_reset(&end.device);
                    let error = told.err().map(|e| format!("; the machine: {e}")).unwrap_or_default();
                    session
                        .figures
                        .notes
                        .push(format!("{}: was reset; what the guest had in it is lost{error}", end.device));
                }
                if let Fate::Quarantined { reason } = end.fate {
                    session.figures.notes.push(format!("{}: given up: {reason}", end.device));
                }
            }
            Standing::Idle(set)
        }
        None => Standing::Nothing,
    };
    revive_machine(session);
    tracing::info!(cause = %cause, "the migration was rolled back");
    let now = session.now();
    // An answer to the machine's own order is never out of order.
    let _ = session.protocol.handle(SourceInput::RolledBack, now);
    session.act();
    standing
}

/// Everything of the machine that was changed, back; what fails is a note, and the next is tried.
fn revive_machine(session: &mut Session) {
    let undo = std::mem::take(&mut session.undo);
    let mut troubles = Vec::new();
    let mut note = |what: &str, result: Result<(), crate::machine::MachineError>| {
        if let Err(error) = result {
            troubles.push(format!("{what}: {error}"));
        }
    };
    if undo.released {
        note("what both sides share could not be taken back", session.machine.reclaim_shared());
    }
    if undo.access_closed {
        note("access to the devices stays closed", session.machine.open_device_access());
        if !undo.pending.is_empty() {
            note("interrupts are lost", session.machine.inject_interrupts(&undo.pending));
        }
    }
    if let Some(paused) = undo.paused_at {
        note("the guest does not run", session.machine.resume());
        session.figures.blackout = Some(session.now().since(paused));
    }
    if let Some(mut tracking) = undo.tracking {
        tracking.stop(&mut *session.machine);
    }
    for trouble in troubles {
        let failure = Failure::new(Side::Source, Phase::Quiesce, format!("rollback: {trouble}"));
        session.recorder.emit(&Event::Failed { failure: failure.clone() });
        session.figures.notes.push(failure.message);
    }
}

impl Session {
    /// Ends the connections, asks the machine whether it runs, and makes the report.
    pub(super) fn end(mut self, standing: Standing) -> Ended {
        // A failure before the first phase has its rollback order still open.
        let standing = if self.orders.roll_back.is_some() { run(&mut self, standing) } else { standing };
        let running = self.machine.running();
        if self.line.finish() {
            self.hear_the_end(LAST_WORDS);
            self.line.close();
        }
        if let Some(sink) = self.sink.get() {
            sink.close();
        }
        let set = match standing {
            Standing::Idle(set) => Some(set),
            _ => None,
        };
        let report = self.report(running, set.as_ref());
        let deadline = self.options.deadlines.rollback;
        let devices = set.map(|set| set.into_devices(deadline)).unwrap_or_default();
        Ended { report, machine: self.machine, devices }
    }
}

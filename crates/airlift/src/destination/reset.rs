//! The way out of a failed migration on this side: every session ended, every device reset. Only
//! when that is done does the protocol hear of it, which may then say ABANDONED.

use super::commit;
use super::session::{Lent, Session};
use super::standing::Standing;
use crate::report::{MigrationReport, Outcome, Running};
use crate::source::Ended;
use airlift_core::commit::DestinationInput;
use airlift_core::{DeviceErrorKind, Failure, MigrationDevice};
use std::time::Duration;

/// How long the other side has to read our last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) fn run(session: &mut Session, standing: Standing) -> Standing {
    if !session.orders.reset {
        return standing;
    }
    session.orders.reset = false;
    let (mut set, touched) = match standing {
        Standing::Nothing => {
            session.feed(DestinationInput::DevicesReset);
            return Standing::Nothing;
        }
        Standing::Untouched(set) => (set, false),
        Standing::Idle(set) => (set, true),
        Standing::Loading(set) => (set.abandon(), true),
        Standing::Loaded(set) => (set.abandon(), true),
    };
    // No vCPU has run: what was opened for them is closed while the devices still answer.
    if std::mem::take(&mut session.access_open)
        && let Err(error) = session.machine.close_device_access()
    {
        session.figures.notes.push(format!("access to the devices stays open: {error}"));
    }
    let failed = if touched { set.reset(session.options.deadlines.rollback) } else { Vec::new() };
    for (id, error) in &failed {
        session.figures.notes.push(format!("{id}: could not be reset: {error}"));
    }
    // The source takes it back when it hears ABANDONED: it must be free by then.
    let released = !session.reclaimed || release(session);
    // A device whose server is gone holds nothing any more; one that does not answer may.
    if released && failed.iter().all(|(_, error)| error.kind == DeviceErrorKind::Lost) {
        session.feed(DestinationInput::DevicesReset);
    } else {
        session.feed(DestinationInput::ResetFailed);
    }
    Standing::Idle(set)
}

fn release(session: &mut Session) -> bool {
    let result = session.machine.release_shared();
    session.reclaimed = result.is_err();
    if let Err(error) = result {
        session.figures.notes.push(format!("what both sides share could not be given up again: {error}"));
    }
    !session.reclaimed
}

impl Session {
    /// Ends the connections, asks the machine whether it runs, and makes the report.
    pub(super) fn end(mut self, standing: Standing) -> Ended {
        // A failure before the first phase has its order still open.
        let standing = run(&mut self, standing);
        // In doubt there is nothing to tell.
        if self.figures.committed_at.is_some() && self.figures.outcome != Some(Outcome::InDoubt) {
            commit::linger(&mut self);
        } else if self.line.finish() {
            self.hear_the_end(LAST_WORDS);
        }
        if self.line.finish() {
            self.line.close();
        }
        let running = self.machine.running();
        let set = match standing {
            Standing::Untouched(set) | Standing::Idle(set) => Some(set),
            Standing::Loading(set) => Some(set.abandon()),
            Standing::Loaded(set) => Some(set.abandon()),
            Standing::Nothing => None,
        };
        let report = self.report(running, set.as_ref());
        let devices = set.map(|set| set.into_devices(self.options.deadlines.rollback)).unwrap_or_default();
        Ended { report, machine: self.machine, devices }
    }
}

impl Lent {
    /// Ends before any source was heard.
    pub(super) fn end_unheard(self, failure: Failure, devices: Vec<Box<dyn MigrationDevice>>) -> Ended {
        let Self { mut machine, recorder, control, .. } = self;
        let outcome = if control.gate.is_cancelled() { Outcome::Cancelled } else { Outcome::Aborted };
        let destination_running = match machine.running() {
            Ok(true) => Running::Yes,
            Ok(false) => Running::No,
            Err(_) => Running::Unknown,
        };
        let report = MigrationReport {
            session: String::new(),
            outcome,
            // No source was heard, so nothing is known of one.
            source_running: Running::Unknown,
            destination_running,
            total_ms: recorder.at_ms(recorder.now()),
            downtime_ms: None,
            blackout_ms: None,
            downtime_terms_ms: None,
            rounds: 0,
            devices: Vec::new(),
            memory: crate::report::MemoryReport::default(),
            compatibility: None,
            notes: Vec::new(),
            error: Some(failure),
        };
        Ended { report, machine, devices }
    }
}

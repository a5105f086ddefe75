//! StopCopy: interrupts drained, records saved, **then** the final dirty sync, then everything that
//! is left: devices to their end and the last memory, side by side.

use super::roll_back::Standing;
use super::session::{Session, Wake};
use super::setup::Moving;
use crate::interrupts;
use crate::machine::{MachineRecord, RecordOwner};
use crate::memory::Sweep;
use crate::set::{DrainedSet, Draining, SetEvent, StoppedSet};
use airlift_core::{Errno, Failure, Phase, Side};
use airlift_stream::machine_record::{ENGINE_PREFIX, RecordRef, seal_record};
use airlift_stream::message::Trailer;
use airlift_stream::{FrameBuf, Message};
use crossbeam_channel::Receiver;
use std::time::Duration;

/// How long to look at the devices before the inbox is looked at again.
const GLANCE: Duration = Duration::from_millis(1);

/// How long a record waits for a place on a connection before the inbox is looked at.
const PLACE_WAIT: Duration = Duration::from_millis(10);

/// How long the VMM's transfer of memory is waited for at a time.
const BARRIER_SLICE: Duration = Duration::from_millis(100);

pub(super) fn run(session: &mut Session, set: StoppedSet, moving: Moving) -> Result<DrainedSet, Standing> {
    if !session.enter(Phase::StopCopy) {
        return Err(Standing::Stopped(set));
    }
    let records = match records_and_sync(session, &set.events()) {
        Ok(records) => records,
        Err(halt) => {
            if let Halt::Failed(failure) = halt {
                session.fail(*failure);
            }
            return Err(Standing::Stopped(set));
        }
    };
    let begun = session.now();
    let mut configs = vec![None; session.ids.len()];
    let mut position = 0;
    for record in records {
        match &record.owner {
            RecordOwner::Device(id) => match session.ids.iter().position(|other| other == id) {
                Some(index) => configs[index] = Some(record.data),
                None => {
                    session.fail(fail(format!("a record of {id}, which is not migrated")));
                    return Err(Standing::Stopped(set));
                }
            },
            RecordOwner::Machine => {
                if !send_record(session, &moving, position, &record) {
                    return Err(Standing::Stopped(set));
                }
                position += 1;
            }
        }
    }
    let sweep = match (&moving.sweeper, session.undo.tracking.as_mut()) {
        (Some(sweeper), Some(tracking)) if tracking.dirty_bytes() > 0 => {
            Some(sweeper.sweep(tracking.map(), session.figures.rounds))
        }
        _ => None,
    };
    let set = drain(session, set.drain(configs), sweep, begun)?;
    if moving.sweeper.is_none() && !external_memory(session) {
        return Err(Standing::Drained(set));
    }
    finish_streams(session, set, &moving)
}

/// Why the machine's part was not gone through to its end.
enum Halt {
    Failed(Box<Failure>),
    /// The migration has failed already.
    Fallen,
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Self::Failed(Box::new(failure))
    }
}

fn fail(message: String) -> Failure {
    Failure::new(Side::Source, Phase::StopCopy, message)
}

/// The machine's part of the downtime, in its order. The records may write guest memory, so that the
/// last sync comes after them (I13, V2-DIRTY-FINAL).
///
/// Between its steps the devices, which give their data meanwhile, and the inbox are looked at: what has
/// failed, or was cancelled, need not wait for the steps that are left.
fn records_and_sync(session: &mut Session, events: &Receiver<SetEvent>) -> Result<Vec<MachineRecord>, Halt> {
    let machine_failed =
        |e: crate::machine::MachineError| fail(format!("the machine: {e}")).with_errno(e.errno);
    let early = session.options.test.sync_before_records;
    if early {
        final_sync(session)?;
    }
    let begun = session.now();
    let pending = session.machine.drain_interrupts().map_err(machine_failed)?;
    session.undo.pending.clone_from(&pending);
    look(session, events)?;
    let mut records = session.machine.save_records().map_err(machine_failed)?;
    if records.iter().any(|r| r.owner == RecordOwner::Machine && r.name.starts_with(ENGINE_PREFIX)) {
        return Err(fail(format!(
            "the machine saved a record whose name begins with {ENGINE_PREFIX}: those are the engine's own"
        ))
        .into());
    }
    look(session, events)?;
    if let Some(record) = interrupts::record(&pending).map_err(fail)? {
        records.push(record);
    }
    session.machine.release_shared().map_err(machine_failed)?;
    session.undo.released = true;
    session.figures.records = session.now().since(begun);
    look(session, events)?;
    if !early {
        final_sync(session)?;
        look(session, events)?;
    }
    Ok(records)
}

/// What has happened meanwhile, without waiting.
fn look(session: &mut Session, events: &Receiver<SetEvent>) -> Result<(), Halt> {
    session.catch_up();
    while !session.fallen() {
        let Ok(event) = events.try_recv() else { return Ok(()) };
        session.fail_on(Phase::StopCopy, event);
    }
    Err(Halt::Fallen)
}

fn final_sync(session: &mut Session) -> Result<(), Failure> {
    let begun = session.now();
    if let Some(tracking) = &mut session.undo.tracking {
        tracking.sync(&mut *session.machine).map_err(|e| fail(format!("the final dirty sync: {e}")))?;
    }
    session.figures.final_dirty_sync = session.now().since(begun);
    Ok(())
}

/// Sends a record of the machine. `false`: the migration has failed.
fn send_record(session: &mut Session, moving: &Moving, position: u64, record: &MachineRecord) -> bool {
    // Of its own size: a record can be larger than what pages and devices are sent in.
    let mut buffer = FrameBuf::new(2 + record.name.len() + record.data.len());
    let sealed = seal_record(&mut buffer, RecordRef { name: &record.name, data: &record.data }, position);
    if let Err(error) = sealed {
        session.fail(fail(format!("the record {}: {error}", record.name)));
        return false;
    }
    let mut waiting = Some(buffer);
    while let Some(buffer) = waiting.take() {
        let Ok(back) = moving.sink.outbound().offer_once(buffer, PLACE_WAIT) else {
            lost(session, "the data connections are closed");
            return false;
        };
        waiting = back;
        session.catch_up();
        if session.fallen() {
            return false;
        }
    }
    true
}

/// Waits for the VMM's own transfer of memory, in slices: a cancel, the other side and the deadline
/// are looked at in between. `false`: the migration has failed.
fn external_memory(session: &mut Session) -> bool {
    let begun = session.now();
    let until = begun.after(session.options.deadlines.stop_copy);
    loop {
        let now = session.now();
        let left = until.since(now);
        match session.machine.external_memory_barrier(left.min(BARRIER_SLICE)) {
            Ok(()) => break,
            // This slice is over, the transfer goes on.
            Err(error) if error.errno == Some(Errno::ETIMEDOUT) && left > BARRIER_SLICE => {}
            Err(error) => {
                session.fail_machine(Phase::StopCopy, &error);
                return false;
            }
        }
        session.catch_up();
        if session.fallen() {
            return false;
        }
    }
    session.figures.memory_tail += session.now().since(begun);
    true
}

/// Waits until devices and memory have given everything. The first to end has its whole time as a
/// term, the other one what it took longer: the terms are disjoint.
fn drain(
    session: &mut Session,
    mut draining: Draining,
    sweep: Option<Sweep>,
    begun: airlift_core::Timestamp,
) -> Result<DrainedSet, Standing> {
    let mut memory_done = sweep.is_none().then_some(begun);
    let mut devices_done = None;
    while memory_done.is_none() || devices_done.is_none() {
        let result = if memory_done.is_none() { sweep.as_ref().map(Sweep::result) } else { None };
        let patience = if devices_done.is_none() { Duration::ZERO } else { Duration::from_secs(1) };
        match session.wait(None, result, patience) {
            Wake::Other(Some(Ok((_, stats)))) => {
                memory_done = Some(session.now());
                session.figures.swept(session.figures.rounds, stats);
            }
            Wake::Other(Some(Err(error))) => lost(session, &error),
            Wake::Other(None) => lost(session, "its thread has ended"),
            Wake::Set(_) | Wake::Time => {}
            Wake::Message(other) => session.unexpected(&other),
            Wake::Ordered => return Err(Standing::Draining(draining)),
        }
        if session.fallen() {
            return Err(Standing::Draining(draining));
        }
        if devices_done.is_none() {
            match draining.poll(GLANCE) {
                Ok(true) => devices_done = Some(session.now()),
                Ok(false) => {}
                Err(error) => {
                    session.fail_set(Phase::StopCopy, error);
                    return Err(Standing::Draining(draining));
                }
            }
        }
    }
    let (memory, devices) = (memory_done.unwrap_or(begun), devices_done.unwrap_or(begun));
    session.figures.memory_tail = memory.since(begun).saturating_sub(if devices < memory {
        devices.since(begun)
    } else {
        Duration::ZERO
    });
    session.figures.device_data = devices.since(begun).saturating_sub(if memory <= devices {
        memory.since(begun)
    } else {
        Duration::ZERO
    });
    draining.finish().map_err(|draining| Standing::Draining(*draining))
}

fn lost(session: &mut Session, error: &str) {
    session.catch_up();
    if !session.fallen() {
        session.fail(fail(format!("memory cannot be sent: {error}")));
    }
}

/// FINAL on every data connection, TRAILER for every device.
fn finish_streams(session: &mut Session, set: DrainedSet, moving: &Moving) -> Result<DrainedSet, Standing> {
    let trailers: Vec<_> =
        (0..).zip(set.totals()).map(|(device, totals)| Trailer::of(device, totals)).collect();
    for trailer in trailers {
        session.line.send(&Message::Trailer(trailer));
    }
    if moving.sink.outbound().finish().is_err() {
        lost(session, "the data connections are closed");
        return Err(Standing::Drained(set));
    }
    loop {
        match session.wait(None, Some(moving.sink.outbound().finished()), Duration::from_secs(1)) {
            Wake::Other(Some(())) => break,
            Wake::Other(None) => lost(session, "the data connections are closed"),
            Wake::Set(_) | Wake::Time => {}
            Wake::Message(other) => session.unexpected(&other),
            Wake::Ordered => return Err(Standing::Drained(set)),
        }
        if session.fallen() {
            return Err(Standing::Drained(set));
        }
    }
    session.figures.all_sent = true;
    session.figures.sent = Some(session.now());
    Ok(set)
}

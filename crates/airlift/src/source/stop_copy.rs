//! StopCopy: interrupts drained, records saved, **then** the final dirty sync, then everything that
//! is left: devices to their end and the last memory, side by side.

use super::roll_back::Standing;
use super::session::{Session, Wake};
use super::setup::Moving;
use crate::interrupts;
use crate::machine::{MachineRecord, RecordOwner};
use crate::memory::Sweep;
use crate::set::{DrainedSet, Draining, StoppedSet};
use airlift_core::{Failure, Phase, Side};
use airlift_stream::Message;
use airlift_stream::machine_record::{RecordRef, seal_record};
use airlift_stream::message::Trailer;
use std::time::Duration;

/// How long to look at the devices before the inbox is looked at again.
const GLANCE: Duration = Duration::from_millis(1);

pub(super) fn run(session: &mut Session, set: StoppedSet, moving: Moving) -> Result<DrainedSet, Standing> {
    if !session.enter(Phase::StopCopy) {
        return Err(Standing::Stopped(set));
    }
    let records = match records_and_sync(session) {
        Ok(records) => records,
        Err(failure) => {
            session.fail(failure);
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
                if let Err(failure) = send_record(&moving, position, &record) {
                    session.fail(failure);
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
    let set = drain(session, set.drain(configs), sweep.as_ref(), begun)?;
    if moving.sweeper.is_none()
        && let Err(error) = session.machine.external_memory_barrier(session.options.deadlines.stop_copy)
    {
        session.fail_machine(Phase::StopCopy, &error);
        return Err(Standing::Drained(set));
    }
    finish_streams(session, set, &moving)
}

fn fail(message: String) -> Failure {
    Failure::new(Side::Source, Phase::StopCopy, message)
}

/// The machine's part of the downtime, in its order. The records may write guest memory, so that the
/// last sync comes after them (I13, V2-DIRTY-FINAL).
fn records_and_sync(session: &mut Session) -> Result<Vec<MachineRecord>, Failure> {
    let machine_failed =
        |e: crate::machine::MachineError| fail(format!("the machine: {e}")).with_errno(e.errno);
    let early = session.options.test.sync_before_records;
    if early {
        final_sync(session)?;
    }
    let begun = session.now();
    let pending = session.machine.drain_interrupts().map_err(machine_failed)?;
    session.undo.pending.clone_from(&pending);
    let mut records = session.machine.save_records().map_err(machine_failed)?;
    if let Some(record) = interrupts::record(&pending).map_err(fail)? {
        records.push(record);
    }
    session.machine.release_shared().map_err(machine_failed)?;
    session.undo.released = true;
    session.figures.records = session.now().since(begun);
    if !early {
        final_sync(session)?;
    }
    Ok(records)
}

fn final_sync(session: &mut Session) -> Result<(), Failure> {
    let begun = session.now();
    if let Some(tracking) = &mut session.undo.tracking {
        tracking.sync(&mut *session.machine).map_err(|e| fail(format!("the final dirty sync: {e}")))?;
    }
    session.figures.final_dirty_sync = session.now().since(begun);
    Ok(())
}

fn send_record(moving: &Moving, position: u64, record: &MachineRecord) -> Result<(), Failure> {
    let outbound = moving.sink.outbound();
    let closed = |_| fail("the data connections are closed".into());
    let mut buffer = loop {
        if let Some(buffer) = outbound.buffer(Duration::from_millis(100)).map_err(closed)? {
            break buffer;
        }
    };
    buffer.clear();
    seal_record(&mut buffer, RecordRef { name: &record.name, data: &record.data }, position)
        .map_err(|e| fail(format!("the record {}: {e}", record.name)))?;
    outbound.send_anywhere(buffer).map_err(closed)
}

/// Waits until devices and memory have given everything. The first to end has its whole time as a
/// term, the other one what it took longer: the terms are disjoint.
fn drain(
    session: &mut Session,
    mut draining: Draining,
    sweep: Option<&Sweep>,
    begun: airlift_core::Timestamp,
) -> Result<DrainedSet, Standing> {
    let mut memory_done = sweep.is_none().then_some(begun);
    let mut devices_done = None;
    while memory_done.is_none() || devices_done.is_none() {
        let result = if memory_done.is_none() { sweep.map(Sweep::result) } else { None };
        let patience = if devices_done.is_none() { Duration::ZERO } else { Duration::from_secs(1) };
        match session.wait(None, result, patience) {
            Wake::Other(Some(Ok(stats))) => {
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
                    // A closed way has its reason elsewhere, and that comes first.
                    session.catch_up();
                    if !session.fallen() {
                        session.fail(error.into_failure(Side::Source, Phase::StopCopy));
                    }
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
        session.send(&Message::Trailer(trailer));
    }
    if moving.sink.outbound().finish().is_err() {
        lost(session, "the data connections are closed");
        return Err(Standing::Drained(set));
    }
    while !moving.sink.outbound().is_finished() {
        match session.wait::<()>(None, None, GLANCE) {
            Wake::Set(_) | Wake::Other(_) | Wake::Time => {}
            Wake::Message(other) => session.unexpected(&other),
            Wake::Ordered => return Err(Standing::Drained(set)),
        }
    }
    session.figures.all_sent = true;
    session.figures.sent = Some(session.now());
    Ok(set)
}

//! Load: records restored while the devices are still RESUMING, then RESUMING -> STOP, where each
//! device validates what it was given (V2-VALIDATE). Then LOADED.

use super::resuming::Received;
use super::session::Session;
use super::standing::Standing;
use crate::interrupts;
use crate::machine::{PendingInterrupt, RecordOwner};
use crate::set::{LoadedSet, LoadingSet};
use airlift_core::{Errno, Failure, PeerDma, Phase, Side};
use std::time::Duration;

/// A destination that holds the guest and does not run it.
pub(super) struct Holding {
    pub(super) set: LoadedSet,
    pub(super) pending: Vec<PendingInterrupt>,
    pub(super) peer_dma: PeerDma,
}

/// How long the machine is asked to wait at a time: the inbox is looked at in between.
const SLICE: Duration = Duration::from_millis(100);

/// Waits until the VMM has moved all memory. `false`: the migration has failed.
fn external_memory(session: &mut Session) -> bool {
    let begun = session.now();
    let until = begun.after(session.options.deadlines.stop_copy);
    loop {
        let left = until.since(session.now());
        match session.machine.external_memory_barrier(left.min(SLICE)) {
            Ok(()) => break,
            Err(error) if error.errno == Some(Errno::ETIMEDOUT) && session.now() < until => {
                session.catch_up();
                if session.fallen() {
                    return false;
                }
            }
            Err(error) => {
                session.fail_machine(Phase::Load, &error);
                return false;
            }
        }
    }
    session.figures.memory = session.now().since(begun);
    true
}

pub(super) fn run(session: &mut Session, set: LoadingSet, received: Received) -> Result<Holding, Standing> {
    if !session.enter(Phase::Load) {
        return Err(Standing::Loading(set));
    }
    tracing::debug!(devices = set.ids().len(), "everything has come; the devices take it in");
    if received.external_memory && !external_memory(session) {
        return Err(Standing::Loading(set));
    }
    let begun = session.now();
    let mut pending = Vec::new();
    for record in &received.records {
        if record.name == interrupts::NAME {
            match interrupts::read(&record.data) {
                Ok(drained) => pending = drained,
                Err(message) => {
                    session.fail(Failure::new(Side::Destination, Phase::Load, message));
                    return Err(Standing::Loading(set));
                }
            }
            continue;
        }
        if let RecordOwner::Device(device) = &record.owner {
            tracing::debug!(name: "vfio_load_device_config_state", device = %device, data_size = record.data.len());
        }
        if let Err(error) = session.machine.load_record(record) {
            session.fail_machine(Phase::Load, &error);
            return Err(Standing::Loading(set));
        }
    }
    let configured = session.now();
    session.figures.config = configured.since(begun);
    match set.finish(session.options.deadlines.stop_copy) {
        Ok(set) => {
            session.figures.load = session.now().since(configured);
            let holding = Holding { set, pending, peer_dma: received.peer_dma };
            session.announce(Phase::Loaded);
            session.advance(Phase::Loaded);
            if session.fallen() { Err(Standing::Loaded(holding.set)) } else { Ok(holding) }
        }
        Err(failed) => {
            session.fail(failed.error.clone().into_failure(Side::Destination, Phase::Load));
            Err(Standing::Idle(failed.into_set()))
        }
    }
}

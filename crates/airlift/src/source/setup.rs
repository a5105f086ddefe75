//! Setup: dirty logging on, then every device that can to PRE_COPY, side by side.

use super::negotiate::Agreed;
use super::roll_back::Standing;
use super::session::{Input, Session};
use crate::machine::MachineMemory;
use crate::memory::{DirtyTracking, Sweeper};
use crate::set::{ChunkSink, DeviceSet, SavingSet};
use crate::wire::credit::CreditedSink;
use crate::wire::outbound::{OnLoss, Outbound};
use crate::wire::rehearsal::rehearse;
use airlift_core::{Failure, Phase, Side};
use std::sync::Arc;

/// Bytes that a frame has beside its body: the tag and size of a record, and a closing tag.
const FRAME_OVERHEAD: u32 = 24;

/// What moves the data from now on.
pub(super) struct Moving {
    pub(super) sink: Arc<CreditedSink>,
    /// Sends memory; `None` when the VMM does.
    pub(super) sweeper: Option<Sweeper>,
}

pub(super) fn run(
    session: &mut Session,
    set: DeviceSet,
    agreed: Agreed,
) -> Result<(SavingSet, Moving), Standing> {
    if !session.enter(Phase::Setup) {
        return Err(Standing::Idle(set));
    }
    let moving = match prepare(session, agreed) {
        Ok(moving) => moving,
        Err(failure) => {
            session.fail(failure);
            return Err(Standing::Idle(set));
        }
    };
    session.catch_up();
    if session.fallen() {
        return Err(Standing::Idle(set));
    }
    tracing::info!(devices = session.ids.len(), "saving begins");
    let sink: Arc<dyn ChunkSink> = Arc::clone(&moving.sink) as _;
    match set.start_saving(&sink, session.options.deadlines.setup) {
        Ok(set) => Ok((set, moving)),
        Err(failed) => {
            session.fail_set(Phase::Setup, failed.error.clone());
            Err(Standing::Failed(failed))
        }
    }
}

fn prepare(session: &mut Session, agreed: Agreed) -> Result<Moving, Failure> {
    let fail = |message: String| Failure::new(Side::Source, Phase::Setup, message);
    let mail = session.mail.clone();
    let on_loss: OnLoss = Arc::new(move |lane, error| {
        // The session can be over already.
        let _ = mail.send(Input::DataLost { lane, error });
    });
    let spawner = Arc::clone(&session.recorder.environment.spawner);
    let body = usize::try_from(agreed.max_payload.saturating_sub(FRAME_OVERHEAD)).unwrap_or(0);
    let outbound = Outbound::new(agreed.data, body, session.ids.len(), &*spawner, &on_loss)
        .map_err(|e| fail(e.to_string()))?;
    let sink = Arc::new(CreditedSink::new(outbound.clone(), &agreed.room));
    // The reader of the control connection finds it there from now on.
    if session.sink.set(Arc::clone(&sink)).is_err() {
        return Err(fail("setup was made twice".into()));
    }
    rehearse(session.protocol.session());
    let memory_bytes = agreed.layout.total_bytes();
    let gauges = &session.control.gauges;
    gauges.memory_total.store(memory_bytes, std::sync::atomic::Ordering::Relaxed);
    let sweeper = match agreed.memory {
        MachineMemory::External => {
            for (device, _) in session.ids.iter().zip(&session.dirty_sources).filter(|(_, s)| s.is_some()) {
                let note = format!(
                    "{device}: its dirty log was given to the engine, which does not use it: the VMM moves memory"
                );
                session.figures.notes.push(note);
            }
            None
        }
        MachineMemory::Engine(memory) => {
            let sources = std::mem::take(&mut session.dirty_sources);
            let domains =
                agreed.iova_maps.into_iter().zip(sources).map(|((id, map), source)| (id, map, source));
            let notes = &mut session.figures.notes;
            let tracking =
                DirtyTracking::start(&agreed.layout, domains.collect(), &mut *session.machine, notes)
                    .map_err(|e| fail(format!("dirty tracking: {e}")))?;
            session.undo.tracking = Some(tracking);
            let sweeper = Sweeper::start(memory, outbound, Arc::clone(gauges), &*spawner);
            Some(sweeper.map_err(|e| fail(e.to_string()))?)
        }
    };
    session.figures.memory.bytes_total = memory_bytes;
    session.acknowledged = vec![0; session.ids.len()];
    Ok(Moving { sink, sweeper })
}

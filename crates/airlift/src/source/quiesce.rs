//! Quiesce: downtime begins. vCPUs paused, access closed, all devices to P2P, then to STOP_COPY.

use super::roll_back::Standing;
use super::session::Session;
use super::setup::Moving;
use crate::set::{Quiesce, SavingSet, StoppedSet};
use airlift_core::{PeerDma, Phase};

pub(super) fn run(
    session: &mut Session,
    set: SavingSet,
    moving: Moving,
) -> Result<(StoppedSet, Moving), Standing> {
    if !session.enter(Phase::Quiesce) {
        return Err(Standing::Saving(set));
    }
    let begun = session.now();
    session.figures.paused = Some(begun);
    session.undo.paused_at = Some(begun);
    if let Err(error) = session.machine.pause() {
        session.fail_machine(Phase::Quiesce, &error);
        return Err(Standing::Saving(set));
    }
    session.undo.access_closed = true;
    if let Err(error) = session.machine.close_device_access() {
        session.fail_machine(Phase::Quiesce, &error);
        return Err(Standing::Saving(set));
    }
    let paused = session.now();
    session.figures.pause = paused.since(begun);
    let peer_dma = if session.options.assume_no_peer_dma { PeerDma::AssumeNone } else { PeerDma::Possible };
    let how = Quiesce { peer_dma, skip_p2p: session.options.test.skip_p2p };
    match set.quiesce(how, session.options.deadlines.quiesce) {
        Ok((set, late)) => {
            for id in late {
                let note = format!(
                    "{id}: announced new initial data after the decision to stop (REINIT); its switchover can be slower than estimated"
                );
                session.figures.notes.push(note);
            }
            session.figures.quiesce = session.now().since(paused);
            tracing::info!("the guest is stopped");
            Ok((set, moving))
        }
        Err(failed) => {
            session.fail_set(Phase::Quiesce, failed.error.clone());
            Err(Standing::Failed(failed))
        }
    }
}

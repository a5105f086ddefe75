//! Hold, then run: after LOADED this side waits for COMMIT, ABORT or its own decision to abandon;
//! after COMMIT, one durable record ahead of each step, devices start in P2P order, then the vCPUs.

use super::load::Holding;
use super::session::{Session, Wake};
use super::standing::Standing;
use crate::machine::{MachineError, PendingInterrupt};
use crate::set::{DeviceSet, LoadedSet};
use airlift_core::commit::DestinationInput;
use airlift_core::{PeerDma, Phase, Side};
use std::time::Duration;

const GLANCE: Duration = Duration::from_millis(50);

/// The devices between LOADED and RUNNING.
enum Guest {
    Held(LoadedSet),
    Started(DeviceSet),
}

impl Guest {
    fn standing(self) -> Standing {
        match self {
            Self::Held(set) => Standing::Loaded(set),
            Self::Started(set) => Standing::Idle(set),
        }
    }
}

pub(super) fn run(session: &mut Session, holding: Holding) -> Result<Standing, Standing> {
    let Holding { mut set, pending, peer_dma } = holding;
    set.prepare(peer_dma);
    let mut guest = Guest::Held(set);
    loop {
        match session.wait(None, Duration::from_secs(1)) {
            Wake::Message(other) => session.unexpected(&other),
            Wake::Set(_) | Wake::Data(_) | Wake::Time => {}
            Wake::Ordered => {
                if session.orders.reset {
                    return Err(guest.standing());
                }
                if std::mem::take(&mut session.orders.start_devices) {
                    guest = start_devices(session, guest, &pending, peer_dma)?;
                }
                if std::mem::take(&mut session.orders.start_vcpus) {
                    start_vcpus(session);
                } else if session.protocol.outcome().is_some() {
                    return Ok(guest.standing());
                } else if session.orders.await_reconnection {
                    reconnect(session);
                }
            }
        }
    }
}

/// Everything that can fail comes in here, before the vCPUs are asked for: until then the guest can
/// still go back to the source (C-MAY-HAVE-RUN).
fn start_devices(
    session: &mut Session,
    guest: Guest,
    pending: &[PendingInterrupt],
    peer_dma: PeerDma,
) -> Result<Guest, Standing> {
    let Guest::Held(set) = guest else { return Ok(guest) };
    session.announce(Phase::Running);
    session.figures.start_begun = Some(session.now());
    if let Err(error) = session.machine.reclaim_shared() {
        session.fail_machine(Phase::Running, &error);
        return Err(Standing::Loaded(set));
    }
    // A reset gives it up again, before the source hears ABANDONED.
    session.reclaimed = true;
    let set = match set.run(peer_dma, session.options.deadlines.commit) {
        Ok(set) => set,
        Err(failed) => {
            session.fail(failed.error.clone().into_failure(Side::Destination, Phase::Running));
            return Err(Standing::Idle(failed.into_set()));
        }
    };
    if let Err(error) = connect_devices(session, pending) {
        session.fail_machine(Phase::Running, &error);
        return Err(Standing::Idle(set));
    }
    session.feed(DestinationInput::DevicesStarted);
    Ok(Guest::Started(set))
}

/// Lets the guest reach its devices, and gives it the interrupts that it has not seen.
fn connect_devices(session: &mut Session, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
    session.machine.open_device_access()?;
    session.access_open = true;
    if !pending.is_empty() {
        session.machine.inject_interrupts(pending)?;
    }
    Ok(())
}

fn start_vcpus(session: &mut Session) {
    match session.machine.resume() {
        Ok(()) => {
            session.figures.started = Some(session.now());
            tracing::info!("the guest runs here");
            session.feed(DestinationInput::VcpusStarted);
        }
        Err(error) => session.fail_machine(Phase::Running, &error),
    }
}

/// Takes the source's new connection, if it comes now.
fn reconnect(session: &mut Session) {
    session.orders.await_reconnection = false;
    session.await_source(GLANCE);
    session.orders.await_reconnection |= !session.line.is_open();
}

/// COMMIT has come, and it is known how it ended: waits until the source says that it knows too
/// (W-DONE). A connection that ends without that word may have lost RUNNING or ABANDONED: then the
/// source comes back, and is told again.
pub(super) fn linger(session: &mut Session) {
    let deadlines = session.options.deadlines;
    let until = session.now().after(deadlines.commit);
    let mut alone = session.now();
    while !session.source_knows && session.now() < until {
        if session.line.is_open() {
            session.hear_the_end(until.since(session.now()));
            alone = session.now();
        } else if session.now().since(alone) < deadlines.linger {
            session.catch_up();
            session.await_source(GLANCE);
        } else {
            tracing::warn!("the source may not have heard how the migration ended");
            return;
        }
    }
}

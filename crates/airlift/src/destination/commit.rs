//! Hold, then run: after LOADED this side waits for COMMIT, ABORT or its own decision to abandon;
//! after COMMIT, one durable record ahead of each step, devices start in P2P order, then the vCPUs.

use super::load::Holding;
use super::reset::Standing;
use super::session::{Session, Wake};
use crate::machine::{MachineError, PendingInterrupt};
use crate::set::{DeviceSet, LoadedSet};
use crate::wire::control::ControlLink;
use airlift_core::commit::DestinationInput;
use airlift_core::{PeerDma, Phase, Side};
use airlift_stream::{Limits, Message};
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
    let Holding { set, pending, peer_dma } = holding;
    let mut guest = Guest::Held(set);
    loop {
        let wake = session.wait(None, Duration::from_secs(1));
        match wake {
            Wake::Message(other) => session.unexpected(&other),
            Wake::Set(_) | Wake::Data(_) | Wake::Time => {}
            Wake::Ordered => {
                if session.orders.reset {
                    return Err(guest.standing());
                }
                if std::mem::take(&mut session.orders.start_devices) {
                    guest = start_devices(session, guest, peer_dma)?;
                } else if std::mem::take(&mut session.orders.start_vcpus) {
                    start_vcpus(session, &pending);
                } else if session.protocol.outcome().is_some() {
                    return Ok(guest.standing());
                } else if session.orders.await_reconnection {
                    reconnect(session);
                }
            }
        }
    }
}

fn start_devices(session: &mut Session, guest: Guest, peer_dma: PeerDma) -> Result<Guest, Standing> {
    let Guest::Held(set) = guest else { return Ok(guest) };
    session.announce(Phase::Running);
    session.figures.start_begun = Some(session.now());
    if let Err(error) = session.machine.reclaim_shared() {
        session.fail_machine(Phase::Running, &error);
        return Err(Standing::Loaded(set));
    }
    match set.run(peer_dma, session.options.deadlines.commit) {
        Ok(set) => {
            session.feed(DestinationInput::DevicesStarted);
            Ok(Guest::Started(set))
        }
        Err(failed) => {
            session.fail(failed.error.clone().into_failure(Side::Destination, Phase::Running));
            Err(Standing::Idle(failed.into_set()))
        }
    }
}

fn start_vcpus(session: &mut Session, pending: &[PendingInterrupt]) {
    let started = start(session, pending);
    session.figures.started = Some(session.now());
    match started {
        Ok(()) => {
            tracing::info!(name: "vfio_vmstate_change", running = true);
            session.feed(DestinationInput::VcpusStarted);
        }
        Err(error) => session.fail_machine(Phase::Running, &error),
    }
}

fn start(session: &mut Session, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
    let machine = &mut session.machine;
    machine.open_device_access()?;
    if !pending.is_empty() {
        machine.inject_interrupts(pending)?;
    }
    machine.resume()
}

/// Takes the source's new connection, if it comes now.
fn reconnect(session: &mut Session) {
    session.orders.await_reconnection = false;
    let accepted = session.acceptor.accept(GLANCE);
    let resumed = accepted.ok().flatten().and_then(|stream| {
        stream.set_silence(session.options.deadlines.silence).ok()?;
        let link = ControlLink::new(stream);
        match link.receive(Limits::new(64)) {
            Ok(Message::Resume { session: id }) if id == session.protocol.session() => Some(link),
            _ => None,
        }
    });
    match resumed {
        Some(link) => match session.adopt(link) {
            Ok(()) => session.feed(DestinationInput::Reconnected),
            Err(failure) => session.fail(failure),
        },
        None => session.orders.await_reconnection = session.link.is_none(),
    }
}

/// The guest runs here: waits until the source knows, so that a lost RUNNING can be said again.
pub(super) fn linger(session: &mut Session) {
    let until = session.now().after(session.options.deadlines.commit);
    while session.now() < until {
        if session.link.is_some() {
            let left = until.since(session.now());
            if session.hear_the_end(left) {
                return;
            }
            if session.link.is_some() {
                return;
            }
        }
        reconnect(session);
        session.orders.await_reconnection = false;
    }
}

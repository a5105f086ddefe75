//! Negotiate: the compatibility report, ACCEPT, the data connections, and OPENED in the journal. No
//! device has been touched when this phase ends.

use super::door::Door;
use super::listen::Heard;
use super::session::{Session, Wake};
use super::standing::Standing;
use crate::event::Event;
use crate::link::Stream;
use crate::machine::MachineMemory;
use crate::set::DeviceSet;
use airlift_core::commit::{DestinationInput, Opened};
use airlift_core::{Failure, Limits as OfferLimits, Offer, Phase, Side, compare};
use airlift_stream::frame::{MAX_PAYLOAD, VERSION};
use airlift_stream::message::{Hello, Report, Token};
use airlift_stream::{Limits, Message};
use std::sync::Arc;
use std::time::Duration;

/// Frames of one device that are on their way at most: more do not make one connection faster.
const MOST_ROOM: u64 = 16;

/// And at least: one is written while the next arrives.
const LEAST_ROOM: u64 = 2;

/// The smallest payload that is worth a frame.
const LEAST_PAYLOAD: u64 = 64 << 10;

/// How often the inbox is looked at while data connections are awaited.
const GLANCE: Duration = Duration::from_millis(50);

/// What both sides have agreed on.
pub(super) struct Agreed {
    pub(super) memory: MachineMemory,
    pub(super) data: Vec<Stream>,
    /// Frames of each device that may be on their way.
    pub(super) room: usize,
    /// The largest payload of a device's frame.
    pub(super) max_payload: u32,
    pub(super) assume_no_peer_dma: bool,
}

/// Shares the receive budget out: frames for each device, and how large they may be.
fn share(budget: u64, devices: usize) -> Option<(u64, u32)> {
    let devices = u64::try_from(devices.max(1)).ok()?;
    let each = budget / devices;
    let payload = u64::from(MAX_PAYLOAD).min(each / LEAST_ROOM);
    if payload < LEAST_PAYLOAD {
        return None;
    }
    Some(((each / payload).clamp(LEAST_ROOM, MOST_ROOM), u32::try_from(payload).ok()?))
}

pub(super) fn run(
    session: &mut Session,
    mut set: DeviceSet,
    heard: Heard,
) -> Result<(DeviceSet, Agreed), Standing> {
    let Heard { link, hello } = heard;
    if let Err(failure) = session.adopt(link) {
        session.fail(failure);
        return Err(Standing::Untouched(set));
    }
    if !session.enter(Phase::Negotiate) {
        return Err(Standing::Untouched(set));
    }
    match agree(session, &mut set, &hello) {
        Ok(Some(agreed)) if !session.fallen() => Ok((set, agreed)),
        Ok(_) => Err(Standing::Untouched(set)),
        Err(failure) => {
            session.fail(failure);
            Err(Standing::Untouched(set))
        }
    }
}

fn fail(message: impl Into<String>) -> Failure {
    Failure::new(Side::Destination, Phase::Negotiate, message)
}

fn agree(session: &mut Session, set: &mut DeviceSet, hello: &Hello) -> Result<Option<Agreed>, Failure> {
    let machine_failed =
        |e: crate::machine::MachineError| fail(format!("the machine: {e}")).with_errno(e.errno);
    let blockers = session.machine.blockers().map_err(machine_failed)?;
    if let Some(blocker) = blockers.first() {
        return Err(fail(format!(
            "the machine cannot be a destination now: {}: {}",
            blocker.owner, blocker.reason
        )));
    }
    if !hello.versions.contains(&VERSION) {
        return Err(fail(format!(
            "the source speaks versions {:?} of the wire; this side speaks {VERSION}",
            hello.versions
        )));
    }
    let layout = session.machine.memory_layout().map_err(machine_failed)?;
    let memory = session.machine.memory().map_err(machine_failed)?;
    let budget = session.options.receive_budget;
    let (room, payload) = share(budget, hello.offer.devices.len()).ok_or_else(|| {
        fail(format!(
            "a receive budget of {budget} bytes is too small for {} devices",
            hello.offer.devices.len()
        ))
        .advise("raise the budget: 128 KiB for each device at least")
    })?;
    // The budget bounds device frames alone: nothing keeps the others.
    let max_payload = payload.min(hello.offer.limits.frame_payload);
    if u64::from(max_payload) < LEAST_PAYLOAD {
        return Err(fail(format!(
            "the source sends frames of at most {max_payload} bytes; {LEAST_PAYLOAD} are the least"
        )));
    }
    let channels = hello.offer.limits.channels.clamp(1, session.options.max_channels.clamp(1, 64));
    let own = Offer {
        devices: set.offers(),
        memory: layout,
        memory_external: matches!(memory, MachineMemory::External),
        limits: OfferLimits { receive_budget: budget, frame_payload: max_payload, channels },
        features: Vec::new(),
        assume_no_peer_dma: hello.offer.assume_no_peer_dma,
    };
    let findings = compare(&hello.offer, &own);
    session.recorder.emit(&Event::Compared { report: findings.clone() });
    session.figures.compatibility = Some(findings.clone());
    let compatible = findings.is_compatible();
    let mut tokens = Vec::new();
    if compatible {
        for _ in 0..channels {
            let mut bytes = [0; 16];
            session
                .recorder
                .environment
                .random
                .fill(&mut bytes)
                .map_err(|e| fail(format!("no random token: {e}")))?;
            tokens.push(Token(u128::from_be_bytes(bytes)));
        }
    }
    let room_each = u32::try_from(room).unwrap_or(u32::MAX);
    session.line.send(&Message::Report(Box::new(Report {
        version: VERSION,
        features: Vec::new(),
        limits: own.limits,
        tokens: tokens.clone(),
        device_credits: vec![room_each; hello.offer.devices.len()],
        report: findings.clone(),
    })));
    if !compatible {
        session.figures.incompatible = true;
        let first = findings.refusals().next();
        let text = first.map(|f| f.message.clone()).unwrap_or_default();
        let mut failure = fail(format!("the two sides do not match: {text}"));
        failure.device = first.and_then(|f| f.device.clone());
        failure.advice = first.and_then(|f| f.advice.clone());
        return Err(failure);
    }
    if !accepted(session) {
        return Ok(None);
    }
    let Some(data) = join(session, tokens)? else { return Ok(None) };
    open_journal(session, set)?;
    Ok(Some(Agreed {
        memory,
        data,
        room: usize::try_from(room).unwrap_or(usize::MAX),
        max_payload,
        assume_no_peer_dma: hello.offer.assume_no_peer_dma,
    }))
}

/// Waits for ACCEPT. `false`: the migration has ended.
fn accepted(session: &mut Session) -> bool {
    loop {
        match session.wait(None, Duration::from_secs(1)) {
            Wake::Message(Message::Accept(_)) => return true,
            Wake::Message(other) => session.unexpected(&other),
            Wake::Ordered => return false,
            Wake::Set(_) | Wake::Data(_) | Wake::Time => {}
        }
    }
}

/// Takes as many data connections as there are tokens; a connection without one is shown out.
fn join(session: &mut Session, mut tokens: Vec<Token>) -> Result<Option<Vec<Stream>>, Failure> {
    let mut data = Vec::with_capacity(tokens.len());
    let clock = Arc::clone(&session.recorder.environment.clock);
    let mut door = Door::new(Limits::new(64), session.options.deadlines.silence, clock);
    while !tokens.is_empty() {
        // A source whose last JOIN is on its way goes on already: what it says then is for later.
        session.catch_up();
        if session.fallen() {
            return Ok(None);
        }
        let heard =
            door.next(&mut *session.acceptor, GLANCE).map_err(|e| fail(e.to_string()).with_errno(e.errno))?;
        let Some((stream, message)) = heard else { continue };
        match message {
            Message::Join { session: id, token } if id == session.protocol.session() => {
                match tokens.iter().position(|t| *t == token) {
                    Some(index) => {
                        tokens.swap_remove(index);
                        stream.set_patient().map_err(|e| fail(e.to_string()))?;
                        data.push(stream);
                    }
                    None => tracing::warn!("a data connection came with a token that is not open"),
                }
            }
            other => {
                tracing::warn!(message = %other.kind(), "a data connection of another session was shown out")
            }
        }
    }
    Ok(Some(data))
}

fn open_journal(session: &mut Session, set: &mut DeviceSet) -> Result<(), Failure> {
    let mut devices = Vec::new();
    for (id, state) in set.states(session.options.deadlines.setup) {
        let state =
            state.map_err(|fault| fail(format!("its state cannot be read: {fault}")).on_device(&id))?;
        devices.push((id, state));
    }
    let opened = Opened {
        session: session.protocol.session(),
        side: Side::Destination,
        boot: session.recorder.environment.boot,
        durability: session.options.durability,
        peer: String::new(),
        devices,
    };
    session.feed(DestinationInput::Open(Box::new(opened)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_bounds_what_all_devices_may_have_on_their_way() {
        for devices in 1..=512 {
            let budget = 64 << 20;
            let (room, payload) = share(budget, devices).unwrap();
            assert!(room * u64::from(payload) * devices as u64 <= budget, "{devices} devices");
            assert!(room >= LEAST_ROOM);
        }
        assert_eq!(share(64 << 20, 1), Some((16, 1 << 20)));
        assert!(share(64 << 20, 1024).is_none());
    }
}

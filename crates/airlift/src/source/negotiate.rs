//! Negotiate: HELLO, the compatibility report, ACCEPT, the data connections, and OPENED in the
//! journal. No device has been touched when this phase ends.

use super::connect::Connected;
use super::roll_back::Standing;
use super::session::{Session, Wake};
use crate::event::Event;
use crate::link::Stream;
use crate::machine::{MachineError, MachineMemory};
use crate::set::{DeviceSet, StreamFault};
use airlift_core::commit::{Opened, SourceInput};
use airlift_core::{DeviceId, Failure, IovaMap, Limits, MemoryLayout, Offer, Phase, Side};
use airlift_stream::Message;
use airlift_stream::frame::{MAX_PAYLOAD, VERSION};
use airlift_stream::message::{Accept, Hello, Report};
use std::time::Duration;

/// The smallest payload that is worth a frame, and that a record's tag and size fit into.
const LEAST_PAYLOAD: u32 = 64 << 10;

/// What both sides have agreed on.
pub(super) struct Agreed {
    pub(super) layout: MemoryLayout,
    pub(super) memory: MachineMemory,
    pub(super) iova_maps: Vec<(DeviceId, IovaMap)>,
    /// The data connections; each has sent its JOIN.
    pub(super) data: Vec<Stream>,
    /// Frames of each device that may be sent before the first CREDIT.
    pub(super) room: Vec<u32>,
    /// The largest payload of a device's frame. Memory and records are not under the destination's
    /// receive budget.
    pub(super) max_payload: u32,
}

struct Own {
    layout: MemoryLayout,
    memory: MachineMemory,
    iova_maps: Vec<(DeviceId, IovaMap)>,
}

pub(super) fn run(session: &mut Session, connected: Connected) -> Result<(DeviceSet, Agreed), Standing> {
    let Connected { mut set, link } = connected;
    if !session.enter(Phase::Negotiate) {
        return Err(Standing::Idle(set));
    }
    let own = match own(session) {
        Ok(own) => own,
        Err(error) => {
            session.fail_machine(Phase::Negotiate, &error);
            return Err(Standing::Idle(set));
        }
    };
    let hello = Message::Hello(Box::new(hello(session, &set, &own)));
    if let Err(failure) = session.adopt(link, &hello) {
        session.fail(failure);
        return Err(Standing::Idle(set));
    }
    let Some(report) = report(session) else { return Err(Standing::Idle(set)) };
    match agree(session, &mut set, own, &report) {
        Ok(agreed) if !session.fallen() => Ok((set, agreed)),
        Ok(_) => Err(Standing::Idle(set)),
        Err(failure) => {
            session.fail(failure);
            Err(Standing::Idle(set))
        }
    }
}

fn own(session: &mut Session) -> Result<Own, MachineError> {
    let layout = session.machine.memory_layout()?;
    let memory = session.machine.memory()?;
    let mut iova_maps = Vec::new();
    for id in session.ids.clone() {
        let map = session.machine.iova_map(&id)?;
        iova_maps.push((id, map));
    }
    Ok(Own { layout, memory, iova_maps })
}

fn hello(session: &Session, set: &DeviceSet, own: &Own) -> Hello {
    let channels = session.options.channels.clamp(1, 64);
    Hello {
        versions: vec![VERSION],
        session: session.protocol.session(),
        offer: Offer {
            devices: set.offers(),
            memory: own.layout.clone(),
            memory_external: matches!(own.memory, MachineMemory::External),
            limits: Limits { receive_budget: 0, frame_payload: MAX_PAYLOAD, channels },
            features: Vec::new(),
            assume_no_peer_dma: session.options.assume_no_peer_dma,
        },
    }
}

/// Waits for REPORT. `None`: the migration has failed.
fn report(session: &mut Session) -> Option<Box<Report>> {
    loop {
        match session.wait::<()>(None, None, Duration::from_secs(1)) {
            Wake::Message(Message::Report(report)) => return Some(report),
            Wake::Message(other) => session.unexpected(&other),
            Wake::Ordered => return None,
            Wake::Set(_) | Wake::Other(_) | Wake::Time => {}
        }
    }
}

fn agree(session: &mut Session, set: &mut DeviceSet, own: Own, report: &Report) -> Result<Agreed, Failure> {
    let fail = |message: String| Failure::new(Side::Source, Phase::Negotiate, message);
    session.recorder.emit(&Event::Compared { report: report.report.clone() });
    session.figures.compatibility = Some(report.report.clone());
    if !report.report.is_compatible() {
        session.figures.incompatible = true;
        let refusals: Vec<_> = report.report.refusals().collect();
        let first = refusals.first().map(|f| f.message.clone()).unwrap_or_default();
        let more = refusals.len().saturating_sub(1);
        let text = if more == 0 { first } else { format!("{first} (and {more} more findings)") };
        let mut failure = fail(format!("the two sides do not match: {text}"));
        failure.device = refusals.first().and_then(|f| f.device.clone());
        failure.advice = refusals.iter().find_map(|f| f.advice.clone());
        return Err(failure);
    }
    if session.options.assume_no_peer_dma {
        session
            .figures
            .notes
            .push("declared: the devices do no DMA to each other (--assume-no-peer-dma)".into());
    }
    if report.device_credits.len() != session.ids.len() || report.device_credits.contains(&0) {
        return Err(fail("the destination gives no room for a device".into()));
    }
    if report.version != VERSION || report.tokens.is_empty() {
        return Err(fail(
            "the destination broke the protocol: its REPORT has no version or tokens to go on with".into(),
        ));
    }
    if report.limits.frame_payload < LEAST_PAYLOAD {
        return Err(fail(format!(
            "the destination takes device frames of at most {} bytes; {LEAST_PAYLOAD} are the least",
            report.limits.frame_payload
        )));
    }
    session.line.send(&Message::Accept(Accept::default()));
    let channels = usize::from(session.options.channels.clamp(1, 64)).min(report.tokens.len());
    let mut data = Vec::with_capacity(channels);
    for token in &report.tokens[..channels] {
        let deadlines = session.options.deadlines;
        let stream = session.connector.connect(deadlines.connect).and_then(|stream| {
            stream.set_silence(deadlines.silence)?;
            Ok(stream)
        });
        let stream = stream.map_err(|e| fail(e.to_string()).with_errno(e.errno))?;
        let join = Message::Join { session: session.protocol.session(), token: *token };
        let bytes = join.encode(0).map_err(|e| fail(e.to_string()))?;
        crate::wire::frames::write_all(&stream, &bytes)
            .map_err(|e| fail(format!("a data connection: {e}")).with_errno(e.errno()))?;
        data.push(stream);
    }
    open_journal(session, set)?;
    Ok(Agreed {
        layout: own.layout,
        memory: own.memory,
        iova_maps: own.iova_maps,
        data,
        room: report.device_credits.clone(),
        max_payload: report.limits.frame_payload.min(MAX_PAYLOAD),
    })
}

/// Writes down what a restart must know, before the first device is touched.
fn open_journal(session: &mut Session, set: &mut DeviceSet) -> Result<(), Failure> {
    let mut devices = Vec::new();
    for (id, state) in set.states(session.options.deadlines.setup) {
        match state {
            Ok(state) => devices.push((id, state)),
            Err(fault) => return Err(unreadable(&id, &fault)),
        }
    }
    let opened = Opened {
        session: session.protocol.session(),
        side: Side::Source,
        boot: session.recorder.environment.boot,
        durability: session.options.durability,
        peer: String::new(),
        devices,
    };
    let now = session.now();
    session
        .protocol
        .handle(SourceInput::Open(Box::new(opened)), now)
        .map_err(|e| Failure::new(Side::Source, Phase::Negotiate, e.to_string()))?;
    session.act();
    Ok(())
}

fn unreadable(id: &DeviceId, fault: &StreamFault) -> Failure {
    Failure::new(Side::Source, Phase::Negotiate, format!("its state cannot be read: {fault}")).on_device(id)
}

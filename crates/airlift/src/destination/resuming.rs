//! Resuming: devices and memory take what arrives, until every FINAL, every TRAILER and the end of
//! every device's stream are there and agree. CREDIT goes back as bytes are written.

use super::negotiate::Agreed;
use super::session::{Input, Session, Wake};
use super::standing::Standing;
use crate::machine::{MachineMemory, MachineRecord, RecordOwner};
use crate::set::{DeviceSet, LoadingSet, SetError, SetEvent};
use crate::wire::Pool;
use crate::wire::inbound::{Arrival, Inbound, RecordRoom};
use crate::wire::rehearsal::rehearse;
use airlift_core::{DeviceId, Failure, PeerDma, Phase, Side};
use airlift_stream::message::Trailer;
use airlift_stream::{Limits, Message};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Everything that was received, complete.
pub(super) struct Received {
    pub(super) records: Vec<MachineRecord>,
    pub(super) external_memory: bool,
    pub(super) peer_dma: PeerDma,
}

/// What has come so far, by device where it is a device's.
struct Tally {
    lanes_open: usize,
    trailers: Vec<Option<Trailer>>,
    ended: Vec<Option<Trailer>>,
    configs: Vec<Option<Vec<u8>>>,
    records: BTreeMap<u64, (String, Vec<u8>)>,
    /// Connections over which all memory of the round under way has come.
    round_ends: usize,
}

pub(super) fn run(
    session: &mut Session,
    set: DeviceSet,
    agreed: Agreed,
) -> Result<(LoadingSet, Received), Standing> {
    if !session.enter(Phase::Resuming) {
        return Err(Standing::Untouched(set));
    }
    let set = match set.start_loading(agreed.room, session.options.deadlines.setup) {
        Ok(set) => set,
        Err(failed) => {
            session.fail(failed.error.clone().into_failure(Side::Destination, Phase::Resuming));
            return Err(Standing::Idle(failed.into_set()));
        }
    };
    rehearse(session.protocol.session());
    let external_memory = matches!(agreed.memory, MachineMemory::External);
    let peer_dma = if agreed.assume_no_peer_dma { PeerDma::AssumeNone } else { PeerDma::Possible };
    let lanes = agreed.data.len();
    let streams = match start_readers(session, &set, agreed) {
        Ok(streams) => streams,
        Err(failure) => {
            session.fail(failure);
            return Err(Standing::Loading(set));
        }
    };
    session.figures.ids = set.ids().to_vec();
    let count = set.ids().len();
    let mut tally = Tally {
        lanes_open: lanes,
        trailers: vec![None; count],
        ended: vec![None; count],
        configs: vec![None; count],
        records: BTreeMap::new(),
        round_ends: 0,
    };
    let result = receive(session, &set, &mut tally);
    // Nothing more is expected on the data connections, or nothing more is wanted.
    for stream in streams {
        stream.shutdown();
    }
    if !result {
        return Err(Standing::Loading(set));
    }
    let records = tally.into_records(set.ids());
    Ok((set, Received { records, external_memory, peer_dma }))
}

fn start_readers(
    session: &mut Session,
    set: &LoadingSet,
    agreed: Agreed,
) -> Result<Vec<Arc<crate::link::Stream>>, Failure> {
    let fail = |message: String| Failure::new(Side::Destination, Phase::Resuming, message);
    let payload = usize::try_from(agreed.max_payload).unwrap_or(0);
    let memory = match agreed.memory {
        MachineMemory::Engine(memory) => Some(memory),
        MachineMemory::External => None,
    };
    let spawner = Arc::clone(&session.recorder.environment.spawner);
    let pools: Vec<_> = set.ids().iter().map(|_| Pool::new(agreed.room, payload)).collect();
    session.buffers.clone_from(&pools);
    let records = Arc::new(RecordRoom::default());
    let mut streams: Vec<Arc<crate::link::Stream>> = Vec::with_capacity(agreed.data.len());
    for (lane, stream) in agreed.data.into_iter().enumerate() {
        let mail = session.mail.clone();
        let inbound = Arc::new(Inbound {
            limits: Limits::default(),
            device_payload: payload,
            records: Arc::clone(&records),
            memory: memory.clone(),
            pools: pools.clone(),
            feeder: set.feeder(),
            gauges: Arc::clone(&session.control.gauges),
            deliver: Box::new(move |arrival| {
                // The session can be over already.
                let _ = mail.send(Input::Data { lane, arrival });
            }),
        });
        let stream = Arc::new(stream);
        let started = inbound.read(lane, Arc::clone(&stream), &*spawner);
        streams.push(stream);
        if let Err(error) = started {
            // The readers that there are must not go on.
            streams.iter().for_each(|stream| stream.shutdown());
            return Err(fail(error.to_string()));
        }
    }
    Ok(streams)
}

/// Takes everything. `false`: the migration has failed.
fn receive(session: &mut Session, set: &LoadingSet, tally: &mut Tally) -> bool {
    let events = set.events();
    loop {
        match session.wait(Some(&events), Duration::from_secs(1)) {
            Wake::Set(event) => on_device(session, set, tally, event, &events),
            Wake::Data(arrival) => on_data(session, tally, arrival),
            Wake::Message(Message::Trailer(trailer)) => {
                let slot = usize::try_from(trailer.device).ok().and_then(|i| tally.trailers.get_mut(i));
                match slot {
                    Some(slot @ None) => *slot = Some(trailer),
                    _ => session.unexpected(&Message::Trailer(trailer)),
                }
            }
            Wake::Message(other) => session.unexpected(&other),
            Wake::Time => {}
            Wake::Ordered => return false,
        }
        if session.fallen() {
            return false;
        }
        if tally.lanes_open == 0 && tally.is_complete() {
            return check(session, set.ids(), tally);
        }
    }
}

fn on_data(session: &mut Session, tally: &mut Tally, arrival: Arrival) {
    match arrival {
        Arrival::Record { position, name, data } => {
            if tally.records.insert(position, (name, data)).is_some() {
                session.fail(Failure::new(
                    Side::Destination,
                    Phase::Resuming,
                    format!("the source broke the protocol: two records at place {position}"),
                ));
            }
        }
        Arrival::RoundEnd { round, taken } => {
            taken.store(true, Ordering::Release);
            tally.round_ends += 1;
            // Every connection is open until all rounds have ended.
            if tally.round_ends == tally.lanes_open {
                tally.round_ends = 0;
                session.control.gauges.round.store(round, Ordering::Relaxed);
                session.line.send(&Message::RoundEnd { round });
            }
        }
        Arrival::Final => {
            tally.lanes_open = tally.lanes_open.saturating_sub(1);
        }
        // The session takes it before it gets here.
        Arrival::Lost(_) => {}
    }
}

fn on_device(
    session: &mut Session,
    set: &LoadingSet,
    tally: &mut Tally,
    event: SetEvent,
    events: &crossbeam_channel::Receiver<SetEvent>,
) {
    let mut written: BTreeMap<u32, u32> = BTreeMap::new();
    let mut next = Some(event);
    // What has piled up goes back in one message for each device.
    while let Some(event) = next {
        match event {
            SetEvent::Written { device } => *written.entry(device).or_default() += 1,
            SetEvent::InitialData { device, generation } => {
                session.line.send(&Message::InitAck { device, generation });
            }
            SetEvent::Config { device, data } => {
                if let Some(slot) = slot(&mut tally.configs, device) {
                    *slot = Some(data);
                }
            }
            SetEvent::Ended { device, totals } => {
                if let Some(slot) = slot(&mut tally.ended, device) {
                    *slot = Some(Trailer::of(device, &totals));
                }
            }
            SetEvent::Failed { device, error } => {
                if let Some(id) = usize::try_from(device).ok().and_then(|i| set.ids().get(i)) {
                    let error = SetError::Device { device: id.clone(), fault: error };
                    session.fail(error.into_failure(Side::Destination, Phase::Resuming));
                }
            }
        }
        next = events.try_recv().ok();
    }
    for (device, frames) in written {
        // Behind the end of a stream nothing more needs room.
        if slot(&mut tally.ended, device).is_some_and(|ended| ended.is_none()) {
            session.line.send(&Message::Credit { device, frames });
        }
    }
}

fn slot<T>(slots: &mut [T], device: u32) -> Option<&mut T> {
    slots.get_mut(usize::try_from(device).ok()?)
}

/// What the source says that it sent is what was written (I10, W-TRAILER).
fn check(session: &mut Session, ids: &[DeviceId], tally: &Tally) -> bool {
    for (index, id) in ids.iter().enumerate() {
        if tally.trailers[index] != tally.ended[index] {
            session.fail(
                Failure::new(
                    Side::Destination,
                    Phase::Resuming,
                    format!(
                        "what was sent is not what arrived: {:?} was sent, {:?} was written",
                        tally.trailers[index], tally.ended[index]
                    ),
                )
                .on_device(id),
            );
            return false;
        }
    }
    let in_order = tally.records.keys().copied().eq(0..tally.records.len() as u64);
    if !in_order {
        session.fail(Failure::new(Side::Destination, Phase::Resuming, "a record of the machine is missing"));
    }
    in_order
}

impl Tally {
    fn is_complete(&self) -> bool {
        let all = |slots: &[Option<Trailer>]| slots.iter().all(Option::is_some);
        all(&self.trailers) && all(&self.ended)
    }

    /// Device records first: they are restored while the devices are RESUMING.
    fn into_records(self, ids: &[DeviceId]) -> Vec<MachineRecord> {
        let devices = ids.iter().zip(self.configs).filter_map(|(id, data)| {
            let owner = RecordOwner::Device(id.clone());
            Some(MachineRecord { owner, name: "config".into(), data: data? })
        });
        let machine = self.records.into_values().map(|(name, data)| MachineRecord {
            owner: RecordOwner::Machine,
            name,
            data,
        });
        devices.chain(machine).collect()
    }
}

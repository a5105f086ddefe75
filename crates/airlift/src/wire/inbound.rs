//! Data frames in: one reading thread for each data connection. It verifies every frame, writes
//! memory, and hands device frames to their workers; it never waits for a device.
//!
//! A block of 2 MiB of memory always comes over the same connection (W-MEMORY-LANE), so that a page
//! that is sent twice is written in the right order without any look at rounds.

use super::frames::{WireError, read_header, read_payload};
use super::pool::Pool;
use crate::control::Gauges;
use crate::link::Stream;
use crate::set::Feeder;
use crate::spawn::{Role, SpawnError, Spawner};
use airlift_memory::GuestMemory;
use airlift_stream::machine_record::decode_record;
use airlift_stream::message::DataCount;
use airlift_stream::pages::{decode_pages, decode_zero};
use airlift_stream::{FrameHeader, FrameType, Limits, Message};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The most records of a machine.
const MAX_RECORDS: u64 = 4096;

/// The most bytes of all records of a machine, names included: they wait in memory until they are
/// loaded.
const MAX_RECORD_BYTES: u64 = 64 << 20;

/// What the machine's records have taken of their bounds, over all connections (W-RECORDS).
#[derive(Debug, Default)]
pub(crate) struct RecordRoom {
    count: AtomicU64,
    bytes: AtomicU64,
}

impl RecordRoom {
    fn take(&self, bytes: usize) -> bool {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let taken = self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        count < MAX_RECORDS && taken.saturating_add(bytes as u64) <= MAX_RECORD_BYTES
    }
}

/// What a reader tells the session's thread.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// A record of the machine.
    Record { position: u64, name: String, data: Vec<u8> },
    /// All memory of this round that came over this connection is written (W-ROUND). Whoever takes it
    /// says so: a connection brings one at a time.
    RoundEnd { round: u32, taken: Arc<AtomicBool> },
    /// FINAL came and its counts are right: nothing more comes over this connection.
    Final,
    /// The connection cannot be used any more.
    Lost(WireError),
}

/// What every reader needs.
pub(crate) struct Inbound {
    pub(crate) limits: Limits,
    /// The largest payload of a device's frame: what the receive budget was shared out for. Memory and
    /// records are not under that budget, for no buffer keeps them.
    pub(crate) device_payload: usize,
    /// What is left for the machine's records, shared by all connections.
    pub(crate) records: Arc<RecordRoom>,
    /// Guest memory, unless the VMM moves it.
    pub(crate) memory: Option<GuestMemory>,
    /// Buffers by device: as many as the source was given room for.
    pub(crate) pools: Vec<Pool>,
    pub(crate) feeder: Feeder,
    pub(crate) gauges: Arc<Gauges>,
    pub(crate) deliver: Box<dyn Fn(Arrival) + Send + Sync>,
}

impl Inbound {
    /// Starts a reader of one connection.
    pub(crate) fn read(
        self: &Arc<Self>,
        index: usize,
        stream: Arc<Stream>,
        spawner: &dyn Spawner,
    ) -> Result<(), SpawnError> {
        let inbound = Arc::clone(self);
        spawner.spawn(
            Role::Receiver,
            &format!("recv-{index}"),
            Box::new(move || {
                let arrival = match inbound.run(&stream) {
                    Ok(()) => Arrival::Final,
                    Err(error) => Arrival::Lost(error),
                };
                (inbound.deliver)(arrival);
            }),
        )
    }

    fn run(&self, stream: &Stream) -> Result<(), WireError> {
        let mut scratch = Vec::new();
        let mut count = DataCount::default();
        let taken = Arc::new(AtomicBool::new(true));
        loop {
            let header = read_header(stream, self.limits)?;
            // Bounded by `limits`, which decoding has checked.
            let length = usize::try_from(header.length).unwrap_or(0);
            count.add(&header);
            if header.kind == FrameType::Device {
                self.device(stream, &header, length)?;
                continue;
            }
            scratch.resize(length, 0);
            read_payload(stream, &header, &mut scratch)?;
            match header.kind {
                FrameType::Pages => self.pages(&scratch)?,
                FrameType::Zero => self.zero(&scratch)?,
                FrameType::Record => self.record(&header, &scratch)?,
                FrameType::RoundEnd => {
                    Message::decode(&header, &scratch)?;
                    if !taken.swap(false, Ordering::AcqRel) {
                        return Err(broken("a round that did not wait for the one before (W-ROUND)"));
                    }
                    (self.deliver)(Arrival::RoundEnd { round: header.round, taken: Arc::clone(&taken) });
                }
                FrameType::Unknown(_) => {}
                FrameType::Final => {
                    let Message::Final(said) = Message::decode(&header, &scratch)? else {
                        return Err(broken("FINAL"));
                    };
                    if said != count {
                        return Err(WireError::Protocol(format!(
                            "FINAL counts {} frames of {} bytes; {} of {} arrived (W-FINAL)",
                            said.frames, said.bytes, count.frames, count.bytes
                        )));
                    }
                    return Ok(());
                }
                other => return Err(WireError::Protocol(format!("{other} on a data connection"))),
            }
        }
    }

    fn device(&self, stream: &Stream, header: &FrameHeader, length: usize) -> Result<(), WireError> {
        let index = usize::try_from(header.index).unwrap_or(usize::MAX);
        if length > self.device_payload {
            return Err(WireError::Protocol(format!(
                "a frame of {length} bytes of a device; {} were agreed (W-CREDIT)",
                self.device_payload
            )));
        }
        let pool = self.pools.get(index).ok_or_else(|| broken("a frame of a device that is not there"))?;
        // The source takes room before it sends: without a free buffer it has taken more than it was given.
        let mut payload = pool
            .take(Duration::ZERO)
            .ok_or_else(|| broken("more frames of a device than there is room for (W-CREDIT)"))?;
        read_payload(stream, header, payload.space(length))?;
        if self.feeder.feed(*header, payload) {
            Ok(())
        } else {
            Err(broken("a frame of a device that was given up"))
        }
    }

    fn memory(&self) -> Result<&GuestMemory, WireError> {
        self.memory.as_ref().ok_or_else(|| broken("memory, which the machine moves itself"))
    }

    fn pages(&self, payload: &[u8]) -> Result<(), WireError> {
        let run = decode_pages(payload).map_err(|e| WireError::Protocol(e.to_string()))?;
        self.memory()?.write(run.gpa.0, run.data).map_err(|e| WireError::Protocol(format!("PAGES: {e}")))?;
        self.gauges.memory_sent.fetch_add(run.data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn zero(&self, payload: &[u8]) -> Result<(), WireError> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let memory = self.memory()?;
        for run in decode_zero(payload).map_err(|e| WireError::Protocol(e.to_string()))? {
            let (mut at, mut left) = (run.start.0, run.length);
            // What the file does not hold is zero, and stays without memory behind it: reading it would give it some.
            while let Some(data) = memory.next_data(at, left).filter(|_| left > 0) {
                left -= data - at;
                at = data;
                let len = left.min(ZEROES.len() as u64);
                let zeroes = &ZEROES[..usize::try_from(len).unwrap_or(0)];
                if !is_zero(memory, at, zeroes.len())? {
                    memory.write(at, zeroes).map_err(|e| WireError::Protocol(format!("ZERO: {e}")))?;
                }
                at += len;
                left -= len;
            }
        }
        Ok(())
    }

    fn record(&self, header: &FrameHeader, payload: &[u8]) -> Result<(), WireError> {
        let record = decode_record(payload).map_err(|e| WireError::Protocol(e.to_string()))?;
        if header.sequence >= MAX_RECORDS {
            return Err(broken("more records than a machine may have"));
        }
        if !self.records.take(payload.len()) {
            return Err(broken("more or larger records than a machine may have (W-RECORDS)"));
        }
        (self.deliver)(Arrival::Record {
            position: header.sequence,
            name: record.name.to_owned(),
            data: record.data.to_vec(),
        });
        Ok(())
    }
}

fn broken(what: &str) -> WireError {
    WireError::Protocol(what.to_owned())
}

/// Whether guest memory, which nothing runs on yet, is zero there.
fn is_zero(memory: &GuestMemory, at: u64, len: usize) -> Result<bool, WireError> {
    let mut copy = vec![0; len];
    memory.read(at, &mut copy).map_err(|e| WireError::Protocol(format!("ZERO: {e}")))?;
    Ok(airlift_memory::is_zero(&copy))
}

#[cfg(test)]
mod tests {
    use super::*;

    // W-RECORDS
    #[test]
    fn the_records_of_all_connections_have_one_bound() {
        let room = RecordRoom::default();
        for _ in 0..64 {
            assert!(room.take(1 << 20));
        }
        assert!(!room.take(1), "one byte more than all records may have");
        let room = RecordRoom::default();
        for _ in 0..MAX_RECORDS {
            assert!(room.take(1));
        }
        assert!(!room.take(1), "one record more than there may be");
    }
}

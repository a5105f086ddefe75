//! Dirty pages -> frames: one thread that takes runs out of a map, copies them, and sends them.
//!
//! Zero tests and checksums run on the private copy, never on memory that the guest can change
//! between the test and the copy.

use crate::control::Gauges;
use crate::set::SinkClosed;
use crate::spawn::{Role, SpawnError, Spawner};
use crate::wire::outbound::{Cargo, Outbound};
use airlift_core::{BLOCK_SIZE, DirtyMap, Gpa, GpaRange};
use airlift_memory::{GuestMemory, is_zero};
use airlift_stream::FrameBuf;
use airlift_stream::pages::{MemorySlot, PAGE, seal_pages, seal_zero};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Bytes of one run: small enough that copy, zero test and checksum find it in the cache. A buffer for
/// memory takes it whole.
const RUN: u64 = 256 << 10;

const PAGE_LEN: usize = 4096;

/// Runs of zeroes that are collected before they are sent.
const ZERO_RUNS: usize = 1024;

/// How long to wait for a buffer before the way's end is looked for.
const BUFFER_WAIT: Duration = Duration::from_millis(100);

/// What sweeps have moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SweepStats {
    pub(crate) bytes_sent: u64,
    pub(crate) pages_zero: u64,
    pub(crate) pages: u64,
}

/// A finished sweep: the map, which is empty again and can be used for the next, and what it moved.
pub(crate) type Swept = Result<(DirtyMap, SweepStats), String>;

/// The thread that sweeps.
#[derive(Debug)]
pub(crate) struct Sweeper {
    jobs: Sender<(DirtyMap, u32, Sender<Swept>)>,
}

/// A sweep under way.
#[derive(Debug)]
pub(crate) struct Sweep(Receiver<Swept>);

impl Sweep {
    /// The channel that gives the result, once.
    pub(crate) fn result(&self) -> &Receiver<Swept> {
        &self.0
    }
}

impl Sweeper {
    pub(crate) fn start(
        memory: GuestMemory,
        outbound: Outbound,
        gauges: Arc<Gauges>,
        spawner: &dyn Spawner,
    ) -> Result<Self, SpawnError> {
        let (jobs, inbox) = bounded::<(DirtyMap, u32, Sender<Swept>)>(1);
        spawner.spawn(
            Role::Memory,
            "memory",
            Box::new(move || {
                while let Ok((map, round, reply)) = inbox.recv() {
                    let sweep = Run { memory: &memory, outbound: &outbound, gauges: &gauges, round };
                    // Whoever asked may have given up.
                    let _ = reply.send(sweep.sweep(map));
                }
            }),
        )?;
        Ok(Self { jobs })
    }

    /// Sends every dirty page of `map` as part of `round`.
    pub(crate) fn sweep(&self, map: DirtyMap, round: u32) -> Sweep {
        let (reply, result) = bounded(1);
        // A thread that is gone drops the reply, and the result says so.
        let _ = self.jobs.send((map, round, reply));
        Sweep(result)
    }
}

struct Run<'a> {
    memory: &'a GuestMemory,
    outbound: &'a Outbound,
    gauges: &'a Gauges,
    round: u32,
}

impl Run<'_> {
    fn sweep(&self, mut map: DirtyMap) -> Swept {
        let mut stats = SweepStats::default();
        // Runs of zeroes go over the connection of their block, so each has its own list.
        let mut zeroes: Vec<Vec<GpaRange>> = vec![Vec::new(); self.outbound.lanes()];
        while let Some(range) = map.take_run(RUN) {
            if self.memory.next_data(range.start.0, range.length).is_none() {
                // Reading memory that was never used would give it some.
                stats.pages += range.length / PAGE;
                self.zero(range, &mut stats, &mut zeroes)?;
            } else {
                self.range(range, &mut stats, &mut zeroes)?;
            }
        }
        for runs in &mut zeroes {
            self.flush(runs)?;
        }
        Ok((map, stats))
    }

    fn buffer(&self) -> Result<FrameBuf, String> {
        loop {
            if let Some(mut buffer) = self.outbound.buffer(Cargo::Memory, BUFFER_WAIT).map_err(closed)? {
                buffer.clear();
                return Ok(buffer);
            }
        }
    }

    fn range(
        &self,
        range: GpaRange,
        stats: &mut SweepStats,
        zeroes: &mut [Vec<GpaRange>],
    ) -> Result<(), String> {
        let mut buffer = self.buffer()?;
        let len = usize::try_from(range.length).map_err(|e| e.to_string())?;
        let copy = buffer.payload_mut().get_mut(..len).ok_or("a run is larger than a frame")?;
        self.memory.read(range.start.0, copy).map_err(|e| e.to_string())?;
        stats.pages += range.length / PAGE;
        let pieces = pieces(copy, range.start);
        if let [(whole, false)] = pieces[..] {
            return self.send(buffer, whole, stats);
        }
        for (piece, zero) in pieces {
            if zero {
                self.zero(piece, stats, zeroes)?;
            } else {
                let at = usize::try_from(piece.start.0 - range.start.0).map_err(|e| e.to_string())?;
                let len = usize::try_from(piece.length).map_err(|e| e.to_string())?;
                let mut own = self.buffer()?;
                own.payload_mut()[..len].copy_from_slice(&buffer.payload_mut()[at..at + len]);
                self.send(own, piece, stats)?;
            }
        }
        self.outbound.give_back(buffer, Cargo::Memory);
        Ok(())
    }

    /// Collects a run of zeroes, which lies in one block.
    fn zero(
        &self,
        run: GpaRange,
        stats: &mut SweepStats,
        zeroes: &mut [Vec<GpaRange>],
    ) -> Result<(), String> {
        stats.pages_zero += run.length / PAGE;
        let lane = self.outbound.lane_of(run.start);
        let runs = zeroes.get_mut(lane).ok_or("no connection for a block")?;
        match runs.last_mut() {
            // Runs that follow each other in a block are one (W-MEMORY-LANE).
            Some(last) if last.end() == Some(run.start.0) && !run.start.0.is_multiple_of(BLOCK_SIZE) => {
                last.length += run.length;
            }
            _ => runs.push(run),
        }
        if runs.len() >= ZERO_RUNS {
            self.flush(runs)?;
        }
        Ok(())
    }

    fn slot(&self, at: Gpa) -> MemorySlot {
        let region = self
            .memory
            .regions()
            .iter()
            .position(|r| at.0.checked_sub(r.gpa).is_some_and(|offset| offset < r.mapping.len()));
        MemorySlot {
            region: region.and_then(|r| u32::try_from(r).ok()).unwrap_or(0),
            round: self.round,
            sequence: 0,
        }
    }

    fn send(&self, mut buffer: FrameBuf, run: GpaRange, stats: &mut SweepStats) -> Result<(), String> {
        let len = usize::try_from(run.length).map_err(|e| e.to_string())?;
        seal_pages(&mut buffer, run.start, len, self.slot(run.start)).map_err(|e| e.to_string())?;
        stats.bytes_sent += run.length;
        self.gauges.memory_sent.fetch_add(run.length, Ordering::Relaxed);
        self.outbound.send_memory(run.start, buffer).map_err(closed)
    }

    fn flush(&self, runs: &mut Vec<GpaRange>) -> Result<(), String> {
        let Some(first) = runs.first() else { return Ok(()) };
        let at = first.start;
        let mut buffer = self.buffer()?;
        seal_zero(&mut buffer, runs, self.slot(at)).map_err(|e| e.to_string())?;
        runs.clear();
        self.outbound.send_memory(at, buffer).map_err(closed)
    }
}

fn closed(error: SinkClosed) -> String {
    error.to_string()
}

/// Cuts a copied run into stretches of zero pages and of others; `true`: zero.
fn pieces(copy: &[u8], start: Gpa) -> Vec<(GpaRange, bool)> {
    let mut pieces: Vec<(GpaRange, bool)> = Vec::with_capacity(1);
    let mut at = start.0;
    for page in copy.chunks(PAGE_LEN) {
        let zero = is_zero(page);
        let len = page.len() as u64;
        match pieces.last_mut() {
            Some((range, kind)) if *kind == zero => range.length += len,
            _ => pieces.push((GpaRange::new(at, len), zero)),
        }
        at += len;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_zero_pages_begin_and_end() {
        let mut copy = vec![0; 5 * PAGE_LEN];
        copy[PAGE_LEN * 2 - 1] = 1;
        copy[PAGE_LEN * 2] = 1;
        let cut = pieces(&copy, Gpa(0x10_0000));
        assert_eq!(
            cut,
            [
                (GpaRange::new(0x10_0000, 4096), true),
                (GpaRange::new(0x10_1000, 8192), false),
                (GpaRange::new(0x10_3000, 8192), true),
            ]
        );
    }
}

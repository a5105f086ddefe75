//! The two threads that make a SoftDevice move: the DMA engine and the dirtier. Each works in batches
//! and is at rest between them; who wants to stop the device lowers its level and waits for that.

use super::content::{PAGE, fill_page};
use super::pace::Pace;
use super::registers::{RING_HEADER, RINGS, Ring, ring_bytes};
use super::shared::{Level, Link, Shared, deliver};
use airlift_vfio_user::{DmaAccess, DmaError};
use std::time::{Duration, Instant};

/// Between two batches.
const BREATH: Duration = Duration::from_millis(1);
/// Until an access that failed, or an interrupt that nobody takes, is tried again.
const RETRY: Duration = Duration::from_millis(10);
/// Pages that the dirtier makes at once.
const PAGES_AT_ONCE: u64 = 16;

/// Writes sequences into the rings until the device is dropped.
pub(crate) fn run_dma(shared: &Shared) {
    let mut paces: [Pace; RINGS] = std::array::from_fn(|_| Pace::new());
    let mut retry_at: [Option<Instant>; RINGS] = [None; RINGS];
    let mut core = shared.core();
    loop {
        if core.shutdown {
            return;
        }
        let waiting = core.registers.pending.iter().any(|n| *n > 0);
        let rings = core.registers.rings.iter().any(|ring| ring.enabled);
        let link = core.link.clone().filter(|_| core.level == Level::Full);
        let Some(link) = link.filter(|_| waiting || (rings && core.runs(Level::Full))) else {
            paces.iter_mut().for_each(Pace::halt);
            core = shared.wait(core);
            continue;
        };
        if waiting {
            deliver_pending(&mut core.registers.pending, &link);
        }
        if !core.runs(Level::Full) {
            core = shared.wait_for(core, RETRY);
            continue;
        }
        core.dma_busy = true;
        let registers = core.registers.clone();
        let leaving = core.leaving.clone();
        drop(core);

        let now = Instant::now();
        let mut results = [const { None }; RINGS];
        for (index, ring) in registers.rings.iter().enumerate() {
            if !ring.enabled {
                paces[index].halt();
                continue;
            }
            let rate = if ring.rate == 0 { shared.options.ring_rate } else { ring.rate };
            let due = paces[index].due(now, rate, 1);
            if due == 0 || retry_at[index].is_some_and(|at| now < at) {
                continue;
            }
            let end = ring.iova + ring_bytes(ring.entries);
            let gone = |(at, length): &(u64, u64)| *at < end && ring.iova < at.saturating_add(*length);
            let produced = if leaving.iter().any(gone) { Err(0) } else { produce(&link, ring, due) };
            retry_at[index] = produced.is_err().then(|| now + RETRY);
            results[index] = Some(produced);
        }

        core = shared.core();
        for (index, result) in results.into_iter().enumerate() {
            let Some(result) = result else { continue };
            core.errors += u64::from(result.is_err());
            let (Ok(count) | Err(count)) = result;
            let before = core.registers.rings[index].produced;
            core.registers.rings[index].produced = before + count;
            let every = core.registers.interrupt_every;
            let vectors = shared.options.vectors as usize;
            if let (Some(last), Some(next)) = (before.checked_div(every), (before + count).checked_div(every))
            {
                for _ in last..next {
                    core.raise(index % vectors.max(1));
                }
            }
        }
        core.dma_busy = false;
        shared.notify();
        // Woken early by every change; only what parks the device is acted on before the time is up.
        let until = Instant::now() + BREATH;
        while core.level == Level::Full && !core.shutdown && core.link.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            core = shared.wait_for(core, left);
        }
    }
}

fn deliver_pending(pending: &mut [u64], link: &Link) {
    for (vector, count) in pending.iter_mut().enumerate() {
        while *count > 0 && deliver(link, vector) {
            *count -= 1;
        }
    }
}

/// Writes at most `due` entries; how many were written, also where an access failed.
fn produce(link: &Link, ring: &Ring, due: u64) -> Result<u64, u64> {
    let consumed = link.dma.load_u64(ring.iova).map_err(|_| 0_u64)?;
    // A consumer beyond the producer is a guest that went wrong: nothing is written for it.
    let waiting = ring.produced.checked_sub(consumed).filter(|n| *n <= ring.entries).ok_or(0_u64)?;
    let count = due.min(ring.entries - waiting);
    let mut done = 0;
    while done < count {
        let entry = ring.produced + done;
        let slot = entry % ring.entries;
        let piece = (count - done).min(ring.entries - slot);
        write_run(link, ring.iova + RING_HEADER + slot * 8, entry + 1, piece).map_err(|_| done)?;
        done += piece;
    }
    Ok(done)
}

/// Writes `count` numbers that go up from `first`. The guard marks their pages dirty when they stand.
fn write_run(link: &Link, iova: u64, first: u64, count: u64) -> Result<(), DmaError> {
    let guard = link.dma.map(iova, count * 8, DmaAccess::WRITE)?;
    for i in 0..count {
        guard.store_u64(i * 8, first + i)?;
    }
    Ok(())
}

/// Rewrites pages of internal memory until the device is dropped.
pub(crate) fn run_dirtier(shared: &Shared) {
    let mut pace = Pace::new();
    let mut content = vec![0; PAGE];
    let mut core = shared.core();
    loop {
        if core.shutdown {
            return;
        }
        if !core.runs(Level::NoDma) || shared.options.dirty_rate == 0 {
            pace.halt();
            core = shared.wait(core);
            continue;
        }
        let mut due = pace.due(Instant::now(), shared.options.dirty_rate, PAGE as u64);
        core.dirtier_busy = true;
        while due > 0 && core.level >= Level::NoDma && !core.shutdown {
            for _ in 0..due.min(PAGES_AT_ONCE) {
                // Nobody else changes seed or tick while the dirtier is busy.
                let seed = core.memory.seed();
                let (page, version) = core.memory.step(core.memory.tick() + 1);
                drop(core);
                fill_page(seed, page, version, &mut content);
                core = shared.core();
                core.memory.advance(&content);
                if let Some(save) = core.save.as_mut() {
                    save.rewritten(page);
                }
            }
            due = due.saturating_sub(PAGES_AT_ONCE);
        }
        core.dirtier_busy = false;
        shared.notify();
        let until = Instant::now() + BREATH;
        while core.level >= Level::NoDma && !core.shutdown && core.link.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            core = shared.wait_for(core, left);
        }
    }
}

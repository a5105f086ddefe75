//! What `send` and `receive` do with the engine's events: print them, and hold at a phase when a
//! test asks for it.
//!
//! The engine calls from its own thread, so everything here is quick: a line is written, a bar is
//! moved. Only a hold, which is a test's own wish, blocks.

use crate::json::Output;
use crate::render;
use airlift::{Control, Event, Observer};
use airlift_core::{DeviceId, Phase, Side};
use crossbeam_channel::Receiver;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest hold at a phase.
const HOLD: Duration = Duration::from_secs(5);
/// Time between two progress lines.
const TICK: Duration = Duration::from_millis(100);

/// A phase at which to hold.
#[derive(Debug)]
pub(crate) struct Hold {
    /// The phase.
    pub(crate) phase: Phase,
    /// Ends the hold.
    pub(crate) release: Receiver<()>,
}

#[derive(Serialize)]
struct Held {
    side: Side,
    phase: Phase,
}

/// Prints events, and holds.
#[derive(Debug)]
pub(crate) struct Watcher {
    side: Side,
    output: Arc<Output>,
    hold: Option<Hold>,
    held: AtomicBool,
}

impl Watcher {
    /// For the engine of `side`.
    pub(crate) fn new(side: Side, output: Arc<Output>, hold: Option<Hold>) -> Arc<Self> {
        Arc::new(Self { side, output, hold, held: AtomicBool::new(false) })
    }
}

impl Observer for Watcher {
    fn event(&self, event: &Event) {
        self.output.engine(event);
        if !self.output.is_json()
            && let Some(text) = render::event(event)
        {
            self.output.say(text);
        }
        let Event::Phase { side, phase, .. } = event else { return };
        let Some(hold) = &self.hold else { return };
        if *side == self.side && *phase == hold.phase && !self.held.swap(true, Ordering::AcqRel) {
            self.output.event("held", &Held { side: *side, phase: *phase });
            let _ = hold.release.recv_timeout(HOLD);
        }
    }
}

/// One line of progress.
#[derive(Serialize)]
struct ProgressLine {
    phase: Phase,
    round: u32,
    memory_total: u64,
    memory_sent: u64,
    memory_dirty: u64,
    bandwidth: u64,
    downtime_estimate_ms: f64,
    devices: Vec<DeviceLine>,
}

#[derive(Serialize)]
struct DeviceLine {
    id: DeviceId,
    state: airlift_core::DeviceState,
    bytes: u64,
    initial_bytes: u64,
    dirty_bytes: u64,
}

/// Writes a progress line ten times a second until it is dropped.
#[derive(Debug)]
pub(crate) struct Ticker {
    stop: crossbeam_channel::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Ticker {
    /// Begins, for the devices of this migration in their order. Without `--json` nothing is shown.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(output: Arc<Output>, control: Control, ids: Vec<DeviceId>) -> std::io::Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let thread = std::thread::Builder::new().name("progress".into()).spawn(move || {
            while stopped.recv_timeout(TICK) == Err(crossbeam_channel::RecvTimeoutError::Timeout) {
                output.event("progress", &line(&control, &ids));
            }
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends; no line comes after it.
    pub(crate) fn stop(self) {
        drop(self.stop);
        // The thread does nothing that panics.
        let _ = self.thread.join();
    }
}

fn line(control: &Control, ids: &[DeviceId]) -> ProgressLine {
    let progress = control.progress();
    // Microseconds up to 2^53 are exact; beyond it nobody reads the last digit.
    #[expect(clippy::cast_precision_loss, reason = "only for show")]
    let downtime_estimate_ms = progress.downtime_estimate_us as f64 / 1000.0;
    let device = |(id, d): (&DeviceId, &airlift::DeviceProgress)| DeviceLine {
        id: id.clone(),
        state: d.state,
        bytes: d.bytes,
        initial_bytes: d.initial_bytes,
        dirty_bytes: d.dirty_bytes,
    };
    ProgressLine {
        phase: progress.phase,
        round: progress.round,
        memory_total: progress.memory_total,
        memory_sent: progress.memory_sent,
        memory_dirty: progress.memory_dirty,
        bandwidth: progress.bandwidth,
        downtime_estimate_ms,
        devices: ids.iter().zip(&progress.devices).map(device).collect(),
    }
}

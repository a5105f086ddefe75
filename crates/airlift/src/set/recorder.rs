//! The record of every arc, with its time, and the way of events to the observer.

use super::trace;
use crate::clock::Environment;
use crate::event::{Event, Transition};
use airlift_core::{DeviceId, DeviceState, Side, Timestamp};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Milliseconds of a duration, for reports.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Notes what one side's devices do.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    pub(crate) environment: Environment,
    pub(crate) side: Side,
    origin: Timestamp,
    transitions: Arc<Mutex<Vec<(DeviceId, Transition)>>>,
    /// Set when a worker's device was given up: whatever it is in the middle of, it begins no more arc.
    abandoned: Arc<AtomicBool>,
}

impl Recorder {
    pub(crate) fn new(environment: Environment, side: Side) -> Self {
        let origin = environment.clock.now();
        Self { environment, side, origin, transitions: Arc::default(), abandoned: Arc::default() }
    }

    /// The same record for one worker, with a flag of its own.
    pub(super) fn of_worker(&self) -> Self {
        Self { abandoned: Arc::default(), ..self.clone() }
    }

    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.environment.clock.now()
    }

    /// Milliseconds since the session's start on this side.
    pub(crate) fn at_ms(&self, at: Timestamp) -> f64 {
        ms(at.since(self.origin))
    }

    pub(crate) fn emit(&self, event: &Event) {
        self.environment.observer.event(event);
    }

    /// An arc that began at `begun` has ended, in `to`.
    pub(crate) fn arc(&self, device: &DeviceId, from: DeviceState, to: DeviceState, begun: Timestamp) {
        let took = self.now().since(begun);
        trace::set_state(device, from, to, took);
        let transition =
            Transition { side: self.side, from, to, at_ms: self.at_ms(begun), took_ms: ms(took) };
        self.emit(&Event::Transition { device: device.clone(), transition: transition.clone() });
        self.transitions.lock().unwrap_or_else(PoisonError::into_inner).push((device.clone(), transition));
    }

    /// Every arc of `device`, in order.
    pub(crate) fn transitions(&self, device: &DeviceId) -> Vec<Transition> {
        let all = self.transitions.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|(id, _)| id == device).map(|(_, t)| t.clone()).collect()
    }
}

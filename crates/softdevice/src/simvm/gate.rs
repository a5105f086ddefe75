//! Lets the guest's threads run and stops them, all or none.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    run: bool,
    quit: bool,
    /// Threads that are to come to the gate.
    parties: usize,
    /// Threads that stand at it.
    parked: usize,
}

/// A gate for a fixed number of threads. Closed at first.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// A copy of `!run || quit` that threads look at between two steps.
    halt: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A closed gate for this many threads.
    pub(super) fn new(parties: usize) -> Self {
        Self {
            halt: AtomicBool::new(true),
            state: Mutex::new(State { parties, ..State::default() }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For threads between two steps: whether to come to [`enter`](Self::enter) now.
    pub(super) fn halted(&self) -> bool {
        self.halt.load(Ordering::Acquire)
    }

    /// Waits until the gate is open. `false`: the thread is to end.
    pub(super) fn enter(&self) -> bool {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        while !state.run && !state.quit {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        if state.quit {
            // An ended thread stands at the gate for ever.
            state.parked += 1;
            self.changed.notify_all();
        }
        !state.quit
    }

    /// Sleeps for `time`, or until the gate closes.
    pub(super) fn sleep(&self, time: Duration) {
        let state = self.state();
        if state.run && !state.quit {
            drop(self.changed.wait_timeout(state, time));
        }
    }

    /// Opens the gate.
    pub(super) fn open(&self) {
        let mut state = self.state();
        state.run = true;
        self.halt.store(state.quit, Ordering::Release);
        self.changed.notify_all();
    }

    /// Closes the gate and waits until all threads stand at it. `false`: some did not come in time.
    pub(super) fn close(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        state.run = false;
        self.halt.store(true, Ordering::Release);
        self.changed.notify_all();
        while state.parked < state.parties {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whether the gate is open.
    pub(super) fn is_open(&self) -> bool {
        self.state().run
    }

    /// Tells all threads to end.
    pub(super) fn quit(&self) {
        let mut state = self.state();
        state.quit = true;
        self.halt.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

//! Cancelling from outside: SIGINT, SIGTERM, and the lines `go` and `cancel` on stdin of a process
//! that is supervised.
//!
//! The first signal cancels. Later ones change nothing: the way back is never cut short, because a
//! device that is left on it is a device that does not run.
//!
//! When the migration is over and its devices are held (`--then`, `--give`, `--hold`, or in doubt), the same wishes
//! go to whoever holds them.

use crate::json::Output;
use airlift::{CancelAnswer, Control};
use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::BufRead;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What is told of a cancel.
#[derive(Serialize)]
struct Cancelled {
    by: String,
    answer: &'static str,
    phase: Option<String>,
}

/// Who wants a process that holds devices to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// SIGINT.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// `cancel` on stdin, or its end.
    Supervisor,
}

impl Told {
    /// In words.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
            Self::Supervisor => "the supervisor",
        }
    }
}

/// Takes wishes to cancel from any thread, also before there is a migration to cancel.
pub(crate) struct Canceller {
    output: Arc<Output>,
    control: Mutex<Option<Control>>,
    wanted: AtomicBool,
    /// The migration is over, and devices are held.
    over: AtomicBool,
    /// Nobody supervises any more.
    deserted: AtomicBool,
    told: (Sender<Told>, Receiver<Told>),
}

impl Canceller {
    /// Nothing to cancel yet.
    pub(crate) fn new(output: Arc<Output>) -> Arc<Self> {
        Arc::new(Self {
            output,
            control: Mutex::new(None),
            wanted: AtomicBool::new(false),
            over: AtomicBool::new(false),
            deserted: AtomicBool::new(false),
            told: bounded(16),
        })
    }

    /// From here on wishes come through this channel: the migration is over. A supervisor that has gone
    /// already is one; a signal that came too late to cancel is not, for it was answered.
    pub(crate) fn holding(&self) -> Receiver<Told> {
        self.over.store(true, Ordering::SeqCst);
        if self.deserted.load(Ordering::SeqCst) {
            self.tell(Told::Supervisor);
        }
        self.told.1.clone()
    }

    /// Passes a wish on. `false`: there still is, or will be, a migration to cancel.
    pub(crate) fn tell(&self, told: Told) -> bool {
        let over = self.over.load(Ordering::SeqCst);
        if over {
            // A full channel has told enough.
            let _ = self.told.0.try_send(told);
        }
        over
    }

    /// From here on a cancel goes to `control`; one that was wished for before goes there now.
    pub(crate) fn arm(&self, control: Control) {
        let mut slot = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(control);
        drop(slot);
        if self.wanted.load(Ordering::Acquire) {
            self.cancel("an earlier wish");
        }
    }

    /// Cancels, and says what became of it.
    pub(crate) fn cancel(&self, by: &str) {
        self.wanted.store(true, Ordering::Release);
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (answer, phase) = match control.map(|c| c.cancel()) {
            // `arm` will cancel.
            None | Some(CancelAnswer::Accepted) => ("accepted", None),
            Some(CancelAnswer::TooLate { phase }) => ("too-late", Some(phase.to_string())),
        };
        match &phase {
            None => self.output.say(format!("Cancelled by {by}: going back. The guest stays on the source.")),
            Some(phase) => self.output.say(format!(
                "It is too late to cancel: phase {phase}. The migration can only go forward now."
            )),
        }
        self.output.event("cancel", &Cancelled { by: by.to_owned(), answer, phase });
    }
}

/// Calls `canceller` at SIGINT and SIGTERM from now on.
///
/// # Errors
/// When no signal handler can be installed.
pub(crate) fn cancel_on_signals(canceller: Arc<Canceller>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let seen = AtomicU32::new(0);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            let told = if signal == SIGINT { Told::Interrupt } else { Told::Terminate };
            if canceller.tell(told) {
                continue;
            }
            if seen.fetch_add(1, Ordering::Relaxed) == 0 {
                canceller.cancel(told.words());
            } else {
                canceller.output.say("Still going back; a second signal does not cut that short.");
            }
        }
    })?;
    Ok(())
}

/// Takes no notice of SIGINT: a process of the demo ends when the demo says so, not when the
/// terminal's user cancels. SIGTERM still ends it.
///
/// # Errors
/// When the signal cannot be taken.
pub(crate) fn ignore_interrupt() -> std::io::Result<()> {
    signal_hook::flag::register(SIGINT, Arc::new(AtomicBool::new(false))).map(drop)
}

/// A flag that SIGINT and SIGTERM set.
///
/// # Errors
/// When the signals cannot be taken.
pub(crate) fn flag_on_signals() -> std::io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    Ok(flag)
}

/// Lines of stdin from a thread of their own; the channel ends when stdin does.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn stdin_lines() -> std::io::Result<Receiver<String>> {
    let (to, from): (Sender<String>, _) = bounded(16);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if to.send(line.trim().to_owned()).is_err() {
                break;
            }
        }
    })?;
    Ok(from)
}

/// Obeys `go` and `cancel` on stdin; the end of stdin cancels too, so that a migration does not
/// outlive the demo that started it. The channel gets one value for each `go` or `cancel`.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn supervise(canceller: Arc<Canceller>) -> std::io::Result<Receiver<()>> {
    let (go, released) = bounded(16);
    let lines = stdin_lines()?;
    std::thread::Builder::new().name("supervise".into()).spawn(move || {
        for line in &lines {
            match line.as_str() {
                "go" => {}
                "cancel" if canceller.tell(Told::Supervisor) => {}
                "cancel" => canceller.cancel("the supervisor"),
                _ => continue,
            }
            // A full channel has a release waiting already.
            let _ = go.try_send(());
        }
        canceller.deserted.store(true, Ordering::SeqCst);
        if !canceller.tell(Told::Supervisor) {
            canceller.cancel("the end of stdin");
        }
    })?;
    Ok(released)
}

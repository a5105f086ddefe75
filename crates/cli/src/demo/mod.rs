//! `airlift demo`: two hosts as processes on this machine, one live migration between them.
//!
//! The demo moves no byte of the migration itself. It starts what a user would start on two hosts
//! (`soft-device`, a VMM in the form of `sim-vm`, `receive`, `send`), places a fault when one is
//! asked for, and asks the device servers and the guest what has arrived. The two hosts share no
//! memory, no file and no descriptor: each has its own directory and its own processes.

mod attempt;
mod child;
mod faults;
mod host;
mod overlap;
mod parts;
mod peak;
mod progress;
mod relay;
mod result;
mod summary;
mod verify;

use crate::args::DemoArgs;
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::signals;
use airlift::{Outcome, Random, Running};
use airlift_core::Side;
use attempt::{Attempt, Fault};
use child::Cast;
use host::Host;
use result::DemoResult;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

pub(crate) use airlift_softdevice::simvm::monotonic_ns as now_ns;

/// How long the processes of a host may take to start: a device fills its memory first.
pub(crate) const START: Duration = Duration::from_secs(60);
/// How long a guest may take to show that it runs, and a process to answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(10);

/// The demo itself could not go on; a failed migration is not one of these.
#[derive(Debug)]
pub(crate) struct DemoError(Box<ErrorView>);

impl DemoError {
    /// Of this kind.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(Box::new(ErrorView::new(message)))
    }

    /// The same with its cause.
    pub(crate) fn because(mut self, cause: ErrorView) -> Self {
        self.0.cause = Some(Box::new(cause));
        self
    }

    /// The same with advice.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }
}

/// Runs a demo.
pub(crate) fn run(args: &DemoArgs) -> Exit {
    let output = Arc::new(Output::new(args.json));
    let seed = args.seed.unwrap_or_else(new_seed);
    let result = perform(args, seed, &output).unwrap_or_else(|error| DemoResult::failed(seed, *error.0));
    let exit = exit_of(&result);
    output.event("result", &result);
    output.say(summary::text(&result));
    exit
}

/// 48 bits, so that JSON readers that know only doubles keep it.
fn new_seed() -> u64 {
    let mut bytes = [0; 8];
    if airlift::KernelRandom.fill(&mut bytes[..6]).is_err() {
        return u64::from(std::process::id());
    }
    u64::from_le_bytes(bytes)
}

fn perform(args: &DemoArgs, seed: u64, output: &Arc<Output>) -> Result<DemoResult, DemoError> {
    let interrupted =
        signals::flag_on_signals().map_err(|e| DemoError::new(format!("signals cannot be taken: {e}")))?;
    let audience = progress::Progress::new(Arc::clone(output), args.device.state_size.0);
    let mut cast = Cast::new(Arc::clone(output), Box::new(audience))?;
    output.say(summary::opening(args, seed));

    let ids: Vec<String> = (0..args.devices).map(|n| format!("dev{n}")).collect();
    let source = Host::start(&mut cast, args, seed, Side::Source, 1, &ids)?;
    guest_moves(&mut cast, &source)?;

    let run = |cast: &mut Cast, number, fault, ids: &[String]| {
        let attempt =
            Attempt { args, seed, output, interrupted: &interrupted, number, fault, source: &source };
        let mut result = attempt.run(cast, ids)?;
        result.notes.extend(summary::interface_note(args));
        Ok(result)
    };
    let mut result = run(&mut cast, 1, Fault::of(args), &ids)?;
    let again = args.retry
        && matches!(result.outcome, Outcome::Aborted | Outcome::Cancelled)
        && result.source_running == Running::Yes
        && !is_set(&interrupted);
    let lost = source.devices.iter().find(|d| cast.facts(d.child).ended.is_some());
    if let (true, Some(lost)) = (again, lost) {
        result.notes.push(format!(
            "there was no second migration: the guest still has {}, whose server is gone, and a lost device \
             blocks a migration until it is unplugged",
            lost.id
        ));
    } else if again {
        output.say(summary::between(&result));
        let second = match run(&mut cast, 2, None, &ids) {
            Ok(second) => second,
            Err(error) => DemoResult::failed(seed, *error.0),
        };
        result.retry = Some(Box::new(second));
    }
    cast.end(&source.children());
    Ok(result)
}

/// Waits until vCPUs make steps: until the guest shows that it runs.
///
/// # Errors
/// When it does not in time.
fn guest_moves(cast: &mut Cast, host: &Host) -> Result<(), DemoError> {
    let deadline = Instant::now() + ANSWER;
    let first = verify::steps(&verify::report(cast, host)?);
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
        if verify::steps(&verify::report(cast, host)?) > first {
            return Ok(());
        }
    }
    Err(DemoError::new(format!("the guest on the {} makes no step", host.side)))
}

/// The exit code: a migration that completed and was not found right has failed.
fn exit_of(result: &DemoResult) -> Exit {
    let lost = result.devices.iter().any(|d| d.quarantined.is_some());
    match result.outcome {
        Outcome::Completed if result.error.is_some() || !result.is_verified() => Exit::Failed,
        outcome => Exit::of(outcome, lost),
    }
}

/// Whether a signal has come.
pub(crate) fn is_set(flag: &AtomicBool) -> bool {
    flag.load(std::sync::atomic::Ordering::Acquire)
}

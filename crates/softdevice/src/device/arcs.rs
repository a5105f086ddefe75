//! The thread that carries out what takes time: arcs, resets, the release of memory that the client
//! takes away. And the comparison of all of memory after a load.

use super::content::{PAGE, fill_page};
use super::event::SoftEvent;
use super::loader::LoadSession;
use super::registers::Registers;
use super::saver::SaveSession;
use super::shared::{Core, Level, Shared, now_ns};
use airlift_core::{Arc as StateArc, ArcSession, DeviceState, Errno};
use airlift_vfio_user::Done;
use crossbeam_channel::Receiver;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a comparison waits for a loaded device to run, and then for the rest of the machine.
const LONGEST_HOLD: Duration = Duration::from_millis(500);
const START_TIME: Duration = Duration::from_millis(20);

/// What is to be done.
pub(crate) enum Job {
    Arc {
        arc: StateArc,
        done: Done,
        start_ns: u64,
    },
    Reset {
        done: Done,
        start_ns: u64,
    },
    Release {
        iova: u64,
        length: u64,
        done: Done,
    },
    Check {
        /// Its number; the comparison has begun, for whoever reads the register.
        pass: u64,
    },
}

/// What is checked besides memory, and what is told at the end of a comparison.
struct LoadCheck {
    pass: u64,
    digest: u64,
    digest_agrees: bool,
    tick: u64,
    loads: u64,
}

/// Does jobs in order until the device is dropped.
pub(crate) fn run_jobs(shared: &Arc<Shared>, jobs: &Receiver<Job>) {
    let mut checker: Option<JoinHandle<()>> = None;
    for job in jobs {
        match job {
            Job::Arc { arc, done, start_ns } => {
                let load = make_arc(shared, arc, done, start_ns);
                if let Some(load) = load {
                    start_check(shared, load.pass, Some(load), &mut checker);
                }
            }
            Job::Reset { done, start_ns } => reset(shared, done, start_ns),
            Job::Release { iova, length, done } => release(shared, iova, length, done),
            Job::Check { pass } => start_check(shared, pass, None, &mut checker),
        }
    }
    if let Some(checker) = checker {
        // A panic there was reported by its own thread.
        let _ = checker.join();
    }
}

/// Makes one arc; what is to be compared when it ended a load.
fn make_arc(shared: &Arc<Shared>, arc: StateArc, done: Done, start_ns: u64) -> Option<LoadCheck> {
    let (from, to) = (arc.from, arc.to);
    let result = walk(shared, arc);
    let mut core = shared.core();
    let (errno, reached) = match &result {
        Ok(_) => (None, to),
        Err((errno, reached)) => (Some(*errno), *reached),
    };
    core.state = reached;
    core.level = Level::of(reached);
    let stops = errno.is_none() && Level::of(from) > Level::Parked && Level::of(to) == Level::Parked;
    let stopped = stops.then(|| stopped(shared, &core));
    shared.notify();
    drop(core);
    let end_ns = now_ns();
    match errno {
        None => done.ok(),
        Some(errno) => done.failed(errno, reached),
    }
    shared.tell(SoftEvent::Transition { from, to, start_ns, end_ns, errno, reached });
    if let Some(stopped) = stopped {
        shared.tell(stopped);
    }
    result.ok().flatten()
}

fn stopped(shared: &Shared, core: &Core) -> SoftEvent {
    SoftEvent::Stopped {
        digest: shared.digest(core),
        tick: core.memory.tick(),
        produced: core.registers.rings.iter().map(|ring| ring.produced).collect(),
        raised: core.registers.raised.to_vec(),
    }
}

/// Does what an arc means. The error holds the state that was reached.
fn walk(shared: &Arc<Shared>, arc: StateArc) -> Result<Option<LoadCheck>, (Errno, DeviceState)> {
    if let Some(fail) = shared.options.fail_arc.filter(|fail| fail.arc == arc) {
        return Err((fail.errno, if fail.to_error { DeviceState::Error } else { arc.from }));
    }
    let (before, after) = (Level::of(arc.from), Level::of(arc.to));
    if before == Level::Full && after < Level::Full {
        shared.sleep(shared.options.stop_delay);
    }
    if after < before {
        shared.park(after).map_err(|errno| (errno, arc.from))?;
    }
    if after == Level::Parked && before > Level::Parked {
        let mut core = shared.core();
        if shared.options.interrupt_in_last_arc {
            core.raise(0);
        }
        // From here on what a peer still writes is not part of the state.
        core.bar2_at_stop = Some(shared.read_bar2());
    } else if after > Level::Parked && before == Level::Parked {
        shared.core().bar2_at_stop = None;
    }
    match arc.session() {
        ArcSession::OpensSave => {
            let mut core = shared.core();
            let (id, pages) = (core.session(), core.memory.pages());
            core.save = Some(SaveSession::new(id, pages));
        }
        ArcSession::OpensLoad => {
            let mut load = shared.load();
            let mut core = shared.core();
            core.memory.forget_check();
            let (id, pages) = (core.session(), core.memory.pages());
            *load = Some(LoadSession::new(id, pages));
        }
        ArcSession::Ends if arc.from == DeviceState::Resuming => {
            shared.sleep(shared.options.load_time);
            let refused = match shared.options.load_failure_is_error {
                true => DeviceState::Error,
                false => DeviceState::Resuming,
            };
            return end_load(shared).map(Some).map_err(|errno| (errno, refused));
        }
        ArcSession::Ends => shared.core().save = None,
        ArcSession::None | ArcSession::Keeps => {}
    }
    Ok(None)
}

fn end_load(shared: &Shared) -> Result<LoadCheck, Errno> {
    let mut slot = shared.load();
    // One that is incomplete stays, so that its writer can go on.
    let load = slot.take_if(|load| load.is_complete()).ok_or(Errno::EINVAL)?;
    let mut core = shared.core();
    let end = load.finish(shared, &mut core)?;
    core.loads += 1;
    // From here on the dirtier compares what it overwrites, should it run before the pass begins.
    let pass = core.memory.begin_check();
    Ok(LoadCheck {
        pass,
        digest: shared.digest(&core),
        digest_agrees: end.digest_agrees,
        tick: core.memory.tick(),
        loads: core.loads,
    })
}

fn reset(shared: &Shared, done: Done, start_ns: u64) {
    if let Err(errno) = shared.park(Level::Parked) {
        let state = shared.core().state;
        done.failed(errno, state);
        return;
    }
    *shared.load() = None;
    let pages = {
        let mut core = shared.core();
        core.save = None;
        core.bar2_at_stop = None;
        core.loads = 0;
        core.errors = 0;
        core.registers = Registers::new(shared.options.interrupt_every);
        core.memory.forget_check();
        core.memory.adopt(shared.options.seed, 0);
        core.memory.pages()
    };
    for first in (0..pages).step_by(64) {
        shared.core().memory.make(first..pages.min(first + 64));
    }
    if let Err(error) = shared.bar2.fill(0, shared.options.bar2_size, 0) {
        let state = shared.core().state;
        done.failed(Errno(error.raw_errno()), state);
        return;
    }
    let mut core = shared.core();
    core.state = DeviceState::Running;
    core.level = Level::Full;
    shared.notify();
    drop(core);
    let end_ns = now_ns();
    done.ok();
    shared.tell(SoftEvent::Reset { start_ns, end_ns });
}

/// Lets go of memory that the client takes away, and keeps away from it.
fn release(shared: &Shared, iova: u64, length: u64, done: Done) {
    let mut core = shared.core();
    core.leaving.push((iova, length));
    let state = core.state;
    // A batch that began before is waited for; the next one sees the range.
    let deadline = Instant::now() + Duration::from_secs(10);
    while core.dma_busy {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            drop(core);
            done.failed(Errno::EBUSY, state);
            return;
        }
        core = shared.wait_for(core, left);
    }
    drop(core);
    done.ok();
}

/// Compares all of memory with seed and tick, on a thread of its own: the device may run meanwhile.
fn start_check(
    shared: &Arc<Shared>,
    pass: u64,
    load: Option<LoadCheck>,
    checker: &mut Option<JoinHandle<()>>,
) {
    if let Some(last) = checker.take() {
        // It ends soon: its comparison is no longer the current one.
        let _ = last.join();
    }
    let thread_shared = Arc::clone(shared);
    let run = move || check(&thread_shared, pass, load.as_ref());
    match std::thread::Builder::new().name("soft-check".into()).spawn(run) {
        Ok(thread) => *checker = Some(thread),
        Err(error) => {
            tracing::error!(%error, "memory cannot be compared: no thread");
            shared.core().memory.end_check(false);
        }
    }
}

/// Waits until a device that was loaded runs, and a little longer: the comparison would take the
/// processor from whoever starts the guest just then, and be part of the downtime that it is to judge.
fn let_it_start(shared: &Shared, pass: u64) {
    let end = Instant::now() + LONGEST_HOLD;
    let mut core = shared.core();
    while !core.state.is_live() && !core.shutdown && core.memory.is_checking(pass) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        core = shared.wait_for(core, left);
    }
    drop(core);
    shared.sleep(START_TIME);
}

fn check(shared: &Shared, pass: u64, load: Option<&LoadCheck>) {
    const RUN: usize = 64;
    if load.is_some() {
        let_it_start(shared, pass);
    }
    let mut content = vec![0; RUN * PAGE];
    let pages = shared.core().memory.pages();
    for first in (0..pages).step_by(RUN) {
        let run = first..pages.min(first + RUN);
        // The content is made without the lock; a page that is rewritten meanwhile was compared then.
        let (seed, versions) = {
            let core = shared.core();
            if core.shutdown || !core.memory.is_checking(pass) {
                return;
            }
            (core.memory.seed(), core.memory.versions(run.clone()))
        };
        for ((page, version), out) in run.clone().zip(&versions).zip(content.chunks_exact_mut(PAGE)) {
            fill_page(seed, page, *version, out);
        }
        let mut core = shared.core();
        if !core.memory.is_checking(pass) {
            return;
        }
        for ((page, version), expected) in run.zip(&versions).zip(content.chunks_exact(PAGE)) {
            core.memory.compare(page, Some((expected, *version)));
        }
    }
    let sound = load.is_none_or(|load| load.digest_agrees);
    let mut core = shared.core();
    if !core.memory.is_checking(pass) {
        return;
    }
    let (verified, bad_page) = core.memory.end_check(sound);
    drop(core);
    if let Some(load) = load {
        let (digest, tick, loads) = (load.digest, load.tick, load.loads);
        shared.tell(SoftEvent::Loaded { digest, tick, verified, bad_page, loads });
    }
}

//! Precopy: rounds of dirty memory while devices send what they have, until the estimate of the
//! downtime fits the limit and every generation of initial data is acknowledged.
//!
//! The estimate is made of what can be known while the guest runs: bytes left, the measured
//! bandwidth ([`Pace`]), how fast each device gives and takes its state, the last dirty sync, the round
//! trip. A device that cannot say how much it has
//! before it is stopped is not in it, and the report says so.

use super::pace::Pace;
use super::roll_back::Standing;
use super::session::{Session, Wake};
use super::setup::Moving;
use crate::event::Event;
use crate::memory::{Sweep, SweepStats};
use crate::set::{SaveStatus, SavingSet, ms};
use crate::wire::control::ControlLink;
use airlift_core::{
    Convergence, ConvergenceConfig, Decision, DeviceLeft, DeviceTerms, DowntimeEstimate, Errno,
    EstimateInputs, Failure, Phase, Round, Side, Timestamp, rate,
};
use airlift_stream::Message;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a round lasts at least: with nothing to send, the devices still get time.
const SHORTEST_ROUND: Duration = Duration::from_millis(5);

/// How often the figures are judged for progress. Rounds can be as short as [`SHORTEST_ROUND`], and
/// figures that have not changed within a few of those say nothing.
const JUDGE_EVERY: Duration = Duration::from_millis(400);

/// Judgements without progress that count as a stall: 2 s at least.
const STALL_ROUNDS: u32 = 5;

/// After so long without a byte sent and with no memory to send, nothing will be measured before the
/// stop.
const NOTHING_COMES: Duration = Duration::from_millis(500);

/// After so long it is known how fast a device gives and takes its state, or it is not slow.
const MEASURED: Duration = Duration::from_millis(500);

/// How long to wait for the end of transactions before the devices are looked at again.
const GLANCE: Duration = Duration::from_millis(1);

/// How often the round trip is measured.
const PING_EVERY: Duration = Duration::from_secs(1);

/// What a stop costs beside all that is measured: pause, journal writes, hand-overs between threads.
const FIXED: Duration = Duration::from_millis(1);

pub(super) fn run(
    session: &mut Session,
    mut set: SavingSet,
    moving: Moving,
) -> Result<(SavingSet, Moving), Standing> {
    if !session.enter(Phase::Precopy) {
        return Err(Standing::Saving(set));
    }
    let deadline = session.now().after(session.options.deadlines.precopy);
    let mut convergence = Convergence::new(ConvergenceConfig {
        downtime_limit: session.options.downtime_limit,
        stall_rounds: STALL_ROUNDS,
        policy: session.options.stall_policy,
        deadline: Some(deadline),
    });
    let begun = session.now();
    let mut known = Known { pace: Pace::new(begun), begun, synced: begun, sync: Duration::ZERO };
    let mut judged: Option<Timestamp> = None;
    let mut pinged: Option<Timestamp> = None;
    let mut round = 0;
    loop {
        if pinged.is_none_or(|at| session.now().since(at) >= PING_EVERY) {
            pinged = Some(session.now());
            if let Some(link) = session.line.link() {
                // A connection that cannot be written to fails at its next read or write.
                let _ = link.ping();
            }
        }
        let Some(swept) = one_round(session, &set, &moving, round) else {
            return Err(Standing::Saving(set));
        };
        let taken = session.figures.swept(round, swept.stats);
        known.pace.add(moving.sink.outbound().bytes_sent(), swept.busy, session.now());
        let last = known.synced;
        if let Err(failure) = sync(session, &mut known) {
            session.fail(failure);
            return Err(Standing::Saving(set));
        }
        let status = set.status();
        let figures = judge(session, &set, &status, &moving, &known, last);
        report(session, round, taken, &figures);
        let now = figures.now;
        let fits = figures.estimate.fits(session.options.downtime_limit)
            && figures.devices.iter().all(|d| d.acknowledged);
        let early = now < deadline && now.since(known.begun) < MEASURED;
        if early && is_unmeasured(&status, &moving) {
            round += 1;
            continue;
        }
        if !fits && now < deadline && judged.is_some_and(|at| now.since(at) < JUDGE_EVERY) {
            round += 1;
            continue;
        }
        judged = Some(now);
        match convergence.round(&figures) {
            Decision::Continue => {}
            Decision::Switch { forced } => {
                if let Some(cause) = forced {
                    session.figures.notes.push(format!(
                        "the guest was stopped although the downtime limit is not met: {cause}"
                    ));
                }
                session.figures.announced = figures.devices.iter().map(|d| d.bytes).collect();
                break;
            }
            Decision::Stalled { cause } => {
                let cause = cause.to_string();
                tracing::warn!(cause, "pre-copy does not converge");
                session.recorder.emit(&Event::Stalled { cause });
            }
            Decision::Abort { cause, .. } => {
                session.fail(
                    Failure::new(Side::Source, Phase::Precopy, format!("pre-copy does not converge: {cause}"))
                        .advise("raise the downtime limit, lower the load, add bandwidth, or let the migration stop the guest anyway (--on-stall force)"),
                );
                return Err(Standing::Saving(set));
            }
        }
        round += 1;
    }
    session.figures.rounds = round + 1;
    if !settle(session, &mut set, &moving) {
        return Err(Standing::Saving(set));
    }
    note_what_is_not_known(session, &set, &known, &moving);
    tracing::info!(rounds = session.figures.rounds, "pre-copy has ended");
    Ok((set, moving))
}

/// Waits until no device is in the middle of a transaction, while the guest still runs: the state of such
/// a device must not be changed (V1-OUTSTANDING). What is left of them is in the estimate. `false`: the
/// migration has failed.
fn settle(session: &mut Session, set: &mut SavingSet, moving: &Moving) -> bool {
    if let Err(error) = set.settle(session.options.deadlines.quiesce) {
        session.fail_set(Phase::Precopy, error);
        return false;
    }
    let patience = session.options.deadlines.stop_copy;
    let until = session.now().after(patience);
    let events = set.events();
    while !set.is_settled() {
        match session.wait::<()>(Some(&events), None, GLANCE) {
            Wake::Set(event) => session.fail_on(Phase::Precopy, *event),
            Wake::Message(message) => session.unexpected(&message),
            Wake::Other(_) | Wake::Time => {}
            Wake::Ordered => return false,
        }
        if !session.fallen() && session.now() >= until {
            session.fail(unsettled(set, moving, patience));
        }
        if session.fallen() {
            return false;
        }
    }
    true
}

/// A device gives, or is to take, more than it has until now, and how fast it can is not known yet.
fn is_unmeasured(status: &[SaveStatus], moving: &Moving) -> bool {
    let gives = |s: &SaveStatus| s.generation > 0 && !s.drained && s.read_rate.is_none();
    (0..).zip(status).any(|(device, s)| gives(s) || moving.sink.is_unmeasured(device))
}

/// The failure of a device that is still in the middle of a transaction.
fn unsettled(set: &SavingSet, moving: &Moving, patience: Duration) -> Failure {
    let status = set.status();
    let open = (0..).zip(set.ids().iter().zip(&status)).find(|(_, (_, s))| s.mid_transaction);
    let full = open.is_some_and(|(index, _)| moving.sink.is_full(index));
    let who = if full { "the destination took" } else { "the device gave" };
    let message = format!("{who} no more of a transaction within {patience:?} (V1-OUTSTANDING)");
    let failure = Failure::new(Side::Source, Phase::Precopy, message).with_errno(Some(Errno::ETIMEDOUT));
    match open {
        Some((_, (id, _))) => failure.on_device(id),
        None => failure,
    }
}

/// What is known of a stop before it is made.
struct Known {
    pace: Pace,
    begun: Timestamp,
    /// The last dirty sync: when, and how long it took.
    synced: Timestamp,
    sync: Duration,
}

impl Known {
    /// Nothing has been sent and nothing is there to be sent while the guest runs, so that the
    /// bandwidth stays unknown.
    fn is_silent(&self, now: Timestamp, memory_bytes: u64) -> bool {
        memory_bytes == 0 && self.pace.is_unused() && now.since(self.begun) >= NOTHING_COMES
    }
}

/// A device of which nothing is known before it is stopped.
fn is_unsized(status: &SaveStatus) -> bool {
    status.stop_copy_size.is_none() && status.initial_left.is_none() && status.dirty_left.is_none()
}

fn note_what_is_not_known(session: &mut Session, set: &SavingSet, known: &Known, moving: &Moving) {
    let status = set.status();
    for (id, _) in set.ids().iter().zip(&status).filter(|(_, s)| is_unsized(s)) {
        session.figures.notes.push(format!(
            "{id}: its size cannot be told before the stop; the downtime limit does not cover it"
        ));
    }
    let memory_bytes = session.undo.tracking.as_ref().map_or(0, |t| t.dirty_bytes());
    let left = (0..).zip(&status).any(|(i, s)| s.bytes_left() > 0 || moving.sink.in_flight(i) > 0);
    if left && known.is_silent(session.now(), memory_bytes) {
        session.figures.notes.push(
            "nothing could be sent before the stop, so that the bandwidth is not known; the downtime limit does not cover the devices' data".into(),
        );
    }
}

/// An acknowledgement of initial data that was not announced; the message that broke the rule.
fn acknowledged_too_much(session: &Session, status: &[SaveStatus]) -> Option<Message> {
    (0..)
        .zip(session.acknowledged.iter().zip(status))
        .find(|(_, (acked, s))| **acked > s.generation)
        .map(|(device, (generation, _))| Message::InitAck { device, generation: *generation })
}

/// What a round has done.
struct RoundDone {
    stats: SweepStats,
    /// How long the connections had all that they could take.
    busy: Duration,
}

/// Sends what is dirty. `None`: the migration has failed.
fn one_round(session: &mut Session, set: &SavingSet, moving: &Moving, round: u32) -> Option<RoundDone> {
    session.control.gauges.round.store(round, Ordering::Relaxed);
    let begun = session.now();
    let tracking = session.undo.tracking.as_mut();
    let sweep = match (&moving.sweeper, tracking) {
        (Some(sweeper), Some(tracking)) if tracking.dirty_bytes() > 0 => {
            Some(sweeper.sweep(tracking.map(), round))
        }
        _ => None,
    };
    let events = set.events();
    let mut stats = sweep.is_none().then(SweepStats::default);
    let mut written = sweep.is_none();
    let mut answer_by = None;
    let mut sweeping = Duration::ZERO;
    loop {
        let rest = SHORTEST_ROUND.saturating_sub(session.now().since(begun));
        if let Some(stats) = stats
            && written
            && rest.is_zero()
        {
            let full = moving.sink.outbound().is_busy();
            return Some(RoundDone { stats, busy: if full { session.now().since(begun) } else { sweeping } });
        }
        let patience = if stats.is_some() && written { rest } else { Duration::from_secs(1) };
        let result = if stats.is_some() { None } else { sweep.as_ref().map(Sweep::result) };
        match session.wait(Some(&events), result, patience) {
            // What a destination has not written yet would be waited for in the downtime (W-ROUND).
            Wake::Message(Message::RoundEnd { round: of }) if of == round && stats.is_some() => {
                written = true
            }
            Wake::Message(message) => session.unexpected(&message),
            Wake::Set(event) => session.fail_on(Phase::Precopy, *event),
            Wake::Other(Some(Ok((map, swept)))) => {
                stats = Some(swept);
                sweeping = session.now().since(begun);
                answer_by = Some(session.now().after(session.options.deadlines.stop_copy));
                if moving.sink.outbound().end_round(round).is_err() {
                    memory_failed(session, "its connection has ended");
                }
                if let Some(tracking) = &mut session.undo.tracking {
                    tracking.recycle(map);
                }
            }
            Wake::Other(Some(Err(error))) => memory_failed(session, &error),
            Wake::Other(None) => memory_failed(session, "its thread has ended"),
            Wake::Time => {}
            Wake::Ordered => return None,
        }
        if let Some(device) = acknowledged_too_much(session, &set.status()) {
            session.unexpected(&device);
        }
        if answer_by.is_some_and(|by| session.now() >= by) && !written {
            session.fail(
                Failure::new(
                    Side::Source,
                    Phase::Precopy,
                    format!("the destination has not written the memory of round {round} in time"),
                )
                .with_errno(Some(Errno::ETIMEDOUT)),
            );
        }
        if session.fallen() {
            return None;
        }
    }
}

fn memory_failed(session: &mut Session, error: &str) {
    // A closed way has its reason elsewhere, and that comes first.
    session.catch_up();
    if !session.fallen() {
        session.fail(Failure::new(Side::Source, Phase::Precopy, format!("memory cannot be sent: {error}")));
    }
}

fn sync(session: &mut Session, known: &mut Known) -> Result<(), Failure> {
    let begun = session.now();
    if let Some(tracking) = &mut session.undo.tracking {
        tracking
            .sync(&mut *session.machine)
            .map_err(|e| Failure::new(Side::Source, Phase::Precopy, format!("dirty tracking: {e}")))?;
    }
    known.synced = session.now();
    known.sync = known.synced.since(begun);
    Ok(())
}

fn judge(
    session: &Session,
    set: &SavingSet,
    status: &[SaveStatus],
    moving: &Moving,
    known: &Known,
    last: Timestamp,
) -> Round {
    let now = session.now();
    let memory_bytes = session.undo.tracking.as_ref().map_or(0, |t| t.dirty_bytes());
    let bandwidth = known.pace.bandwidth();
    let left: Vec<_> = (0..)
        .zip(set.ids().iter().zip(status))
        .enumerate()
        .map(|(i, (device, (id, s)))| DeviceLeft {
            id: id.clone(),
            // What the destination has not written yet is still to be done.
            bytes: s.bytes_left().saturating_add(moving.sink.in_flight(device)),
            // The slower end, of those that are known.
            rate: s.read_rate.into_iter().chain(moving.sink.write_rate(device)).min(),
            acknowledged: session.acknowledged.get(i).is_some_and(|a| *a >= s.generation),
        })
        .collect();
    let terms = |left: &DeviceLeft| DeviceTerms {
        id: left.id.clone(),
        stop_copy_bytes: if known.is_silent(now, memory_bytes) { 0 } else { left.bytes },
        initial_bytes: 0,
        dirty_bytes: 0,
        rate: left.rate,
        quiesce: Duration::ZERO,
        load: Duration::ZERO,
    };
    let estimate = DowntimeEstimate::new(&EstimateInputs {
        memory_dirty_bytes: memory_bytes,
        devices: left.iter().map(terms).collect(),
        bandwidth,
        final_dirty_sync: known.sync,
        fixed: FIXED,
        round_trip: session.line.link().and_then(ControlLink::round_trip).unwrap_or_default(),
        round_trips: 2,
    });
    Round {
        now,
        memory_bytes,
        devices: left,
        estimate,
        bandwidth,
        memory_dirty_rate: rate(memory_bytes, now.since(last)),
    }
}

fn report(session: &Session, round: u32, stats: SweepStats, figures: &Round) {
    let gauges = &session.control.gauges;
    let estimate = figures.estimate.total().unwrap_or_default();
    // Each of them is what a device says.
    let device_bytes = figures.devices.iter().fold(0_u64, |sum, d| sum.saturating_add(d.bytes));
    gauges.memory_dirty.store(figures.memory_bytes, Ordering::Relaxed);
    gauges.bandwidth.store(figures.bandwidth.unwrap_or(0), Ordering::Relaxed);
    gauges.estimate_us.store(u64::try_from(estimate.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    session.recorder.emit(&Event::Round {
        round,
        sent_bytes: stats.bytes_sent,
        dirty_bytes: figures.memory_bytes,
        device_bytes,
        bandwidth: figures.bandwidth.unwrap_or(0),
        estimate_ms: ms(estimate),
    });
}

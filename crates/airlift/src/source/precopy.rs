//! Precopy: rounds of dirty memory while devices send what they have, until the estimate of the
//! downtime fits the limit and every generation of initial data is acknowledged.

use super::roll_back::Standing;
use super::session::{Session, Wake};
use super::setup::Moving;
use crate::event::Event;
use crate::memory::{Sweep, SweepStats};
use crate::set::{SaveStatus, SavingSet, SetError, SetEvent, ms};
use airlift_core::{
    Convergence, ConvergenceConfig, Decision, DeviceLeft, DeviceTerms, DowntimeEstimate, EstimateInputs,
    Failure, Phase, Round, Side, Timestamp, rate,
};
use airlift_stream::Message;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a round lasts at least: with nothing to send, the devices still get time.
const SHORTEST_ROUND: Duration = Duration::from_millis(5);

/// Below this many bytes a round says nothing about the bandwidth.
const MEASURABLE: u64 = 1 << 20;

/// Rounds without progress that count as a stall. Rounds can be as short as [`SHORTEST_ROUND`].
const STALL_ROUNDS: u32 = 30;

pub(super) fn run(
    session: &mut Session,
    set: SavingSet,
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
    let mut pace = Pace { sent: 0, at: session.now(), bandwidth: None };
    let mut round = 0;
    loop {
        let Some(stats) = one_round(session, &set, &moving, round) else {
            return Err(Standing::Saving(set));
        };
        let taken = session.figures.swept(round, stats);
        let begun = pace.at;
        pace.measure(moving.sink.outbound().bytes_sent(), session.now());
        if let Err(failure) = sync(session) {
            session.fail(failure);
            return Err(Standing::Saving(set));
        }
        let figures = judge(session, &set, pace.bandwidth, begun);
        report(session, round, taken, &figures);
        match convergence.round(&figures) {
            Decision::Continue => {}
            Decision::Switch { forced } => {
                if let Some(cause) = forced {
                    session.figures.notes.push(format!(
                        "the guest was stopped although the downtime limit is not met: {cause}"
                    ));
                }
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
    tracing::info!(rounds = session.figures.rounds, "pre-copy has ended");
    Ok((set, moving))
}

/// What the connections carry.
struct Pace {
    sent: u64,
    at: Timestamp,
    bandwidth: Option<u64>,
}

impl Pace {
    fn measure(&mut self, sent: u64, now: Timestamp) {
        let bytes = sent.saturating_sub(self.sent);
        if bytes >= MEASURABLE {
            self.bandwidth = rate(bytes, now.since(self.at)).or(self.bandwidth);
        }
        self.sent = sent;
        self.at = now;
    }
}

/// Sends what is dirty. `None`: the migration has failed.
fn one_round(session: &mut Session, set: &SavingSet, moving: &Moving, round: u32) -> Option<SweepStats> {
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
    loop {
        let rest = SHORTEST_ROUND.saturating_sub(session.now().since(begun));
        if let Some(stats) = stats
            && rest.is_zero()
        {
            session.send(&Message::RoundEnd { round });
            return Some(stats);
        }
        let patience = if stats.is_some() { rest } else { Duration::from_secs(1) };
        let result = if stats.is_some() { None } else { sweep.as_ref().map(Sweep::result) };
        match session.wait(Some(&events), result, patience) {
            Wake::Message(message) => session.unexpected(&message),
            Wake::Set(event) => fail_on(session, set, event),
            Wake::Other(Some(Ok(swept))) => stats = Some(swept),
            Wake::Other(Some(Err(error))) => memory_failed(session, &error),
            Wake::Other(None) => memory_failed(session, "its thread has ended"),
            Wake::Time => {}
            Wake::Ordered => return None,
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

fn fail_on(session: &mut Session, set: &SavingSet, event: SetEvent) {
    let SetEvent::Failed { device, error } = event else { return };
    let Some(id) = usize::try_from(device).ok().and_then(|i| set.ids().get(i)) else { return };
    let error = SetError::Device { device: id.clone(), fault: error };
    session.fail(error.into_failure(Side::Source, Phase::Precopy));
}

fn sync(session: &mut Session) -> Result<(), Failure> {
    let Some(tracking) = &mut session.undo.tracking else { return Ok(()) };
    tracking
        .sync(&mut *session.machine)
        .map_err(|e| Failure::new(Side::Source, Phase::Precopy, format!("dirty tracking: {e}")))
}

fn judge(session: &Session, set: &SavingSet, bandwidth: Option<u64>, begun: Timestamp) -> Round {
    let now = session.now();
    let memory_bytes = session.undo.tracking.as_ref().map_or(0, |t| t.dirty_bytes());
    let status = set.status();
    let left = |s: &SaveStatus, i: usize| DeviceLeft {
        id: set.ids()[i].clone(),
        bytes: s.bytes_left(),
        acknowledged: session.acknowledged.get(i).is_some_and(|a| *a >= s.generation),
    };
    let terms = |s: &SaveStatus, i: usize| DeviceTerms {
        id: set.ids()[i].clone(),
        stop_copy_bytes: s.bytes_left(),
        initial_bytes: 0,
        dirty_bytes: 0,
        quiesce: Duration::ZERO,
        load: Duration::ZERO,
    };
    let estimate = DowntimeEstimate::new(&EstimateInputs {
        memory_dirty_bytes: memory_bytes,
        devices: status.iter().enumerate().map(|(i, s)| terms(s, i)).collect(),
        bandwidth,
        final_dirty_sync: Duration::ZERO,
        fixed: Duration::ZERO,
        round_trip: Duration::ZERO,
        round_trips: 2,
    });
    Round {
        now,
        memory_bytes,
        devices: status.iter().enumerate().map(|(i, s)| left(s, i)).collect(),
        estimate,
        bandwidth,
        memory_dirty_rate: rate(memory_bytes, now.since(begun)),
    }
}

fn report(session: &Session, round: u32, stats: SweepStats, figures: &Round) {
    let gauges = &session.control.gauges;
    let estimate = figures.estimate.total().unwrap_or_default();
    let device_bytes = figures.devices.iter().map(|d| d.bytes).sum();
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

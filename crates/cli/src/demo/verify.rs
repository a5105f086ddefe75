//! What has arrived, and where the guest runs: asked of the simulated machines and read from the
//! device servers' logs, never from the engine.

use super::child::{Cast, ChildId};
use super::host::Host;
use super::parts::Parts;
use super::result::{DemoResult, GuestView};
use super::{ANSWER, DemoError, START};
use airlift::{Outcome, Running};
use airlift_softdevice::SoftEvent;
use airlift_softdevice::simvm::SimReport;
use std::time::{Duration, Instant};

/// What the simulated machine of `host` says now.
///
/// # Errors
/// When it does not answer.
pub(crate) fn report(cast: &mut Cast, host: &Host) -> Result<SimReport, DemoError> {
    let seen = cast.facts(host.vm).reports;
    cast.tell(host.vm, "report");
    cast.until_alive(Instant::now() + ANSWER, "its report", &[host.vm], |cast| {
        let facts = cast.facts(host.vm);
        (facts.reports > seen).then(|| facts.report.clone()).flatten()
    })
}

/// The full check by the guest of `host`.
///
/// # Errors
/// When it does not answer.
fn check(cast: &mut Cast, host: &Host) -> Result<SimReport, DemoError> {
    let seen = cast.facts(host.vm).checks;
    cast.tell(host.vm, "check");
    // Devices compare all of their memory, which takes as long as starting did.
    cast.until_alive(Instant::now() + START, "its check", &[host.vm], |cast| {
        let facts = cast.facts(host.vm);
        (facts.checks > seen).then(|| facts.check.clone()).flatten()
    })
}

/// Steps of all vCPUs.
pub(crate) fn steps(report: &SimReport) -> u64 {
    report.vcpu_steps.iter().sum()
}

/// Whether the guest runs on `host`: vCPUs say so, and make steps.
///
/// # Errors
/// When the demo cannot wait any more; a machine that is gone is an answer.
pub(crate) fn where_it_runs(cast: &mut Cast, host: &Host) -> Result<Running, DemoError> {
    if cast.facts(host.vm).ended.is_some() {
        return Ok(Running::Unknown);
    }
    let deadline = Instant::now() + ANSWER;
    let first = report(cast, host)?;
    if !first.running {
        return Ok(Running::No);
    }
    loop {
        std::thread::sleep(Duration::from_millis(5));
        let now = report(cast, host)?;
        if steps(&now) > steps(&first) {
            return Ok(Running::Yes);
        }
        if !now.running {
            return Ok(Running::No);
        }
        if Instant::now() >= deadline {
            return Err(DemoError::new(format!("the guest on the {} runs and makes no step", host.side)));
        }
    }
}

/// Fills in what the guest and the device servers found: on the destination if the guest is there,
/// else on the source.
///
/// # Errors
/// When a machine that is there does not answer.
pub(crate) fn fill_in(cast: &mut Cast, parts: &Parts<'_>, result: &mut DemoResult) -> Result<(), DemoError> {
    let completed = result.outcome == Outcome::Completed;
    let host = match (completed, result.source_running) {
        (true, _) => parts.destination,
        (false, Running::Yes) => parts.source,
        // The guest runs nowhere: there is nobody to ask.
        (false, _) => return Ok(()),
    };
    let found = check(cast, host)?;
    result.guest = Some(GuestView {
        sequence_gaps: found.sequence_gaps,
        sequence_duplicates: found.sequence_duplicates + found.out_of_order,
        interrupts_lost: found.interrupts.lost.unwrap_or(0),
        interrupts_extra: found.interrupts.spurious.unwrap_or(0),
    });
    result.memory.verified = found.memory_verified == Some(true);
    for device in &mut result.devices {
        let guest_says = found
            .devices
            .iter()
            .find(|d| d.id.as_str() == device.id)
            .is_some_and(|d| d.alive && d.verified == Some(true));
        device.verified = guest_says && (!completed || arrived_whole(cast, parts, &device.id)?);
        if device.quarantined.is_none() && !completed {
            let lost = found.devices.iter().find(|d| d.id.as_str() == device.id && !d.alive);
            device.quarantined = lost.map(|d| d.lost.clone().unwrap_or_else(|| "it does not answer".into()));
        }
    }
    result.guest_gap_ms = gap(cast, parts, completed);
    Ok(())
}

/// Whether the destination's server of a device found every byte of what it was given right, and the
/// same digest as the source's server had when it stopped.
fn arrived_whole(cast: &mut Cast, parts: &Parts<'_>, id: &str) -> Result<bool, DemoError> {
    let server = |host: &Host| host.devices.iter().find(|d| d.id == id).map(|d| d.child);
    let (Some(source), Some(destination)) = (server(parts.source), server(parts.destination)) else {
        return Ok(false);
    };
    // The comparison comes some time after the load.
    let what = format!("the comparison of {id} with its seed");
    let loaded = cast.until_alive(Instant::now() + START, &what, &[destination], |cast| {
        cast.facts(destination).soft.iter().rev().find_map(|event| match event {
            SoftEvent::Loaded { digest, verified, .. } => Some((*digest, *verified)),
            _ => None,
        })
    })?;
    Ok(loaded.1 && stopped_with(cast, source) == Some(loaded.0))
}

/// The digest with which a device stopped last.
fn stopped_with(cast: &Cast, server: ChildId) -> Option<u64> {
    cast.facts(server).soft.iter().rev().find_map(|event| match event {
        SoftEvent::Stopped { digest, .. } => Some(*digest),
        _ => None,
    })
}

/// The longest time without a write of the guest over both sides, in milliseconds.
fn gap(cast: &Cast, parts: &Parts<'_>, completed: bool) -> Option<f64> {
    let report = |host: &Host| cast.facts(host.vm).report.clone();
    let source = report(parts.source)?;
    let mut longest = source.max_gap_ns;
    if completed {
        let destination = report(parts.destination)?;
        let between = destination.first_write_ns?.saturating_sub(source.last_write_ns?);
        longest = longest.max(between).max(destination.max_gap_ns);
    }
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds up to 2^53 are exact: 104 days")]
    Some(longest as f64 / 1e6)
}

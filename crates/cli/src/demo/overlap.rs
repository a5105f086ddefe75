//! At most one side is live: the run logs of both hosts laid over each other.
//!
//! The logs are the device servers' own and the simulated machines' own, on the clock that all
//! processes of this machine share; the engine is not asked.

use airlift_core::DeviceState;
use airlift_softdevice::SoftEvent;
use airlift_softdevice::simvm::RunInterval;

/// Something was live in a span of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Live {
    /// What.
    pub(crate) what: String,
    /// When.
    pub(crate) when: RunInterval,
}

fn overlap(a: &RunInterval, b: &RunInterval) -> bool {
    let end = |i: &RunInterval| i.end_ns.unwrap_or(u64::MAX);
    a.start_ns < end(b) && b.start_ns < end(a)
}

/// The first pair of spans of both hosts that share a moment.
pub(crate) fn first_overlap<'a>(source: &'a [Live], destination: &'a [Live]) -> Option<(&'a Live, &'a Live)> {
    source
        .iter()
        .flat_map(|s| destination.iter().map(move |d| (s, d)))
        .find(|(s, d)| overlap(&s.when, &d.when))
}

/// When a device was live by its own log: outside of STOP, STOP_COPY, RESUMING and ERROR while it
/// held guest state.
///
/// `holds_guest`: it held the guest's state from the log's beginning, as on the source. Else it does
/// from the moment that a load ended, and no more after a reset: a device that was opened or reset
/// is idle. `killed_ns` ends everything.
pub(crate) fn device_live(log: &[SoftEvent], holds_guest: bool, killed_ns: Option<u64>) -> Vec<RunInterval> {
    let mut holds = holds_guest;
    // Before its first arc a device runs; a source device has done so since before the demo looked.
    let mut since = holds_guest.then_some(0);
    let mut live = Vec::new();
    for event in log {
        match event {
            SoftEvent::Transition { from, start_ns, end_ns, reached, .. } => {
                if *from == DeviceState::Resuming && *reached == DeviceState::Stop {
                    holds = true;
                }
                match (since, holds && reached.is_live()) {
                    // It may run from the moment that the arc was asked for.
                    (None, true) => since = Some(*start_ns),
                    (Some(start_ns), false) => {
                        live.push(RunInterval { start_ns, end_ns: Some(*end_ns) });
                        since = None;
                    }
                    _ => {}
                }
            }
            SoftEvent::Reset { end_ns, .. } => {
                holds = false;
                if let Some(start_ns) = since.take() {
                    live.push(RunInterval { start_ns, end_ns: Some(*end_ns) });
                }
            }
            SoftEvent::Attached { .. }
            | SoftEvent::Detached { .. }
            | SoftEvent::Stopped { .. }
            | SoftEvent::Loaded { .. } => {}
        }
    }
    if let Some(start_ns) = since {
        live.push(RunInterval { start_ns, end_ns: killed_ns });
    }
    live
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arc(from: DeviceState, to: DeviceState, at: u64) -> SoftEvent {
        SoftEvent::Transition { from, to, start_ns: at, end_ns: at + 10, errno: None, reached: to }
    }

    use DeviceState::{Resuming, Running, RunningP2p, Stop, StopCopy};

    #[test]
    fn a_source_device_is_live_until_it_stops() {
        let log = [arc(Running, RunningP2p, 100), arc(RunningP2p, Stop, 200), arc(Stop, StopCopy, 300)];
        assert_eq!(device_live(&log, true, None), [RunInterval { start_ns: 0, end_ns: Some(210) }]);
        assert_eq!(device_live(&log[..1], true, Some(150)), [RunInterval { start_ns: 0, end_ns: Some(150) }]);
    }

    #[test]
    fn a_destination_device_is_live_only_with_the_guest_in_it() {
        let idle = [arc(Running, RunningP2p, 100), arc(RunningP2p, Stop, 110), arc(Stop, Resuming, 120)];
        assert_eq!(device_live(&idle, false, None), []);
        let mut loaded = idle.to_vec();
        loaded.extend([arc(Resuming, Stop, 200), arc(Stop, RunningP2p, 300)]);
        assert_eq!(device_live(&loaded, false, None), [RunInterval { start_ns: 300, end_ns: None }]);
        loaded.extend([SoftEvent::Reset { start_ns: 400, end_ns: 410 }, arc(Running, RunningP2p, 500)]);
        assert_eq!(device_live(&loaded, false, None), [RunInterval { start_ns: 300, end_ns: Some(410) }]);
    }

    #[test]
    fn one_shared_moment_is_found() {
        let live =
            |what: &str, start_ns, end_ns| Live { what: what.into(), when: RunInterval { start_ns, end_ns } };
        let source = [live("vCPUs", 0, Some(100)), live("dev0", 0, Some(200))];
        assert!(first_overlap(&source, &[live("vCPUs", 200, None)]).is_none());
        let destination = [live("vCPUs", 199, None)];
        let (s, d) = first_overlap(&source, &destination).unwrap();
        assert_eq!((s.what.as_str(), d.what.as_str()), ("dev0", "vCPUs"));
    }
}

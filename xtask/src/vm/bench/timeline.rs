//! One migration by the kernel's clock, cut into terms: the same cuts whoever migrates.
//!
//! The switchover begins with the arc by which the source's device stops to run freely: out of RUNNING or
//! PRE_COPY, into a P2P state or a stopped one, and never back. It ends with the arc into RUNNING on the
//! destination. Each arc's time is that of its beginning, so the time that the last one takes is not in it.

use super::kernel_log::{Act, Event, State};

/// The terms of a switchover, in their order.
pub(super) const TERMS: [(&str, &str); 6] = [
    ("quiesce", "out of RUNNING or PRE_COPY → arc into STOP_COPY"),
    ("read", "→ the last bytes of the source's device read"),
    ("carry", "→ the last bytes written to the destination's device"),
    ("to load", "→ arc RESUMING → STOP"),
    ("load, agree", "→ arc out of STOP"),
    ("start", "→ arc into RUNNING"),
];

/// When each term ended, in microseconds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Timeline {
    pub(super) total: u64,
    /// In the order of [`TERMS`]; their sum is `total`.
    pub(super) terms: [u64; 6],
}

impl Timeline {
    /// Cuts the events of one migration, `bytes` of state from the first device to the second.
    ///
    /// # Errors
    /// An arc is missing, has failed, or comes before what it needs: then no switchover has taken place
    /// as it should, and there is no time for it.
    pub(super) fn of(events: &[Event], bytes: u64) -> Result<Self, String> {
        for device in [0, 1] {
            unbroken(events, device)?;
        }
        let arc = |e: &Event, device: usize| match e.act {
            Act::Arc { from, to } if e.device == device => Some((from, to)),
            _ => None,
        };
        let find = |device: usize, what: &str, fits: &dyn Fn(State, State) -> bool| {
            // The last one: an earlier one was taken back.
            let last = events.iter().rev().find(|e| arc(e, device).is_some_and(|(from, to)| fits(from, to)));
            last.map(|e| e.at).ok_or_else(|| format!("no arc {what}: {}", all(events)))
        };
        let leave =
            find(0, "by which the source stops to run", &|from, to| from.runs_freely() && !to.runs_freely())?;
        let stop_copy = find(0, "of the source into STOP_COPY", &|_, to| to == State::STOP_COPY)?;
        let load = find(1, "RESUMING -> STOP", &|from, to| from == State::RESUMING && to == State::STOP)?;
        let start = find(1, "out of STOP into running", &|from, to| {
            from == State::STOP && to != State::RESUMING && to != State::STOP_COPY
        })?;
        let run = find(1, "into RUNNING", &|_, to| to == State::RUNNING)?;

        let read: u64 = events
            .iter()
            .filter(|e| e.device == 0)
            .map(|e| if let Act::Read(n) = e.act { n } else { 0 })
            .sum();
        let last_read = events.iter().rev().find(|e| e.device == 0 && matches!(e.act, Act::Read(1..)));
        let last_written = events.iter().rev().find(|e| e.device == 1 && matches!(e.act, Act::Written(_)));
        let (Some(last_read), Some(last_written)) = (last_read, last_written) else {
            return Err(format!("no data: {}", all(events)));
        };
        if read != bytes || last_written.act != Act::Written(bytes) {
            return Err(format!("{read} bytes read of {bytes}, and last: {last_written}"));
        }
        let cuts = [leave, stop_copy, last_read.at, last_written.at, load, start, run];
        let mut terms = [0; 6];
        for (term, cut) in terms.iter_mut().zip(cuts.windows(2)) {
            *term = cut[1]
                .checked_sub(cut[0])
                .ok_or_else(|| format!("the moments are not in their order, {cuts:?}: {}", all(events)))?;
        }
        Ok(Self { total: run - leave, terms })
    }
}

/// Each arc must begin where the one before has ended, from RUNNING on: else one has failed, or the device was reset.
fn unbroken(events: &[Event], device: usize) -> Result<(), String> {
    let mut state = State::RUNNING;
    for event in events.iter().filter(|e| e.device == device) {
        if let Act::Arc { from, to } = event.act {
            if from != state {
                return Err(format!("the device was expected in {state}: {event}; all: {}", all(events)));
            }
            state = to;
        }
    }
    Ok(())
}

fn all(events: &[Event]) -> String {
    events.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arc(at: u64, device: usize, from: u8, to: u8) -> Event {
        Event { at, device, act: Act::Arc { from: State(from), to: State(to) } }
    }

    /// As QEMU does it: pre-copy, P2P, and STOP on the source only when all is over.
    fn migration() -> Vec<Event> {
        vec![
            arc(10, 0, 2, 6),
            arc(11, 1, 2, 5),
            arc(12, 1, 5, 1),
            arc(13, 1, 1, 4),
            Event { at: 20, device: 0, act: Act::Read(24) },
            Event { at: 25, device: 1, act: Act::Written(24) },
            arc(100, 0, 6, 7),
            arc(110, 0, 7, 3),
            Event { at: 130, device: 0, act: Act::Read(72) },
            Event { at: 131, device: 0, act: Act::Read(0) },
            Event { at: 160, device: 1, act: Act::Written(96) },
            arc(200, 1, 4, 1),
            arc(250, 1, 1, 5),
            arc(310, 1, 5, 2),
            arc(400, 0, 3, 1),
        ]
    }

    #[test]
    fn terms_are_cut_at_the_same_moments_and_add_up() {
        let timeline = Timeline::of(&migration(), 96).unwrap();
        assert_eq!(timeline, Timeline { total: 210, terms: [10, 20, 30, 40, 50, 60] });
        assert_eq!(timeline.terms.iter().sum::<u64>(), timeline.total);
    }

    #[test]
    fn a_source_that_ran_again_has_stopped_when_it_stopped_for_good() {
        let mut events = migration();
        events.splice(6..6, [arc(40, 0, 6, 7), arc(50, 0, 7, 6)]);
        assert_eq!(Timeline::of(&events, 96).unwrap().total, 210);
    }

    #[test]
    fn without_precopy_the_switchover_begins_with_the_arc_to_p2p() {
        let mut events = migration();
        events.retain(|e| e.at >= 11 && e.at != 20 && e.at != 25);
        events.retain(|e| ![100, 110].contains(&e.at));
        events.splice(3..3, [arc(90, 0, 2, 5), arc(95, 0, 5, 1), arc(110, 0, 1, 3)]);
        events.iter_mut().filter(|e| e.at == 130).for_each(|e| e.act = Act::Read(96));
        assert_eq!(Timeline::of(&events, 96).unwrap().terms[0], 20);
    }

    #[test]
    fn what_did_not_take_place_has_no_time() {
        for missing in [100, 110, 130, 160, 200, 250, 310] {
            let mut events = migration();
            events.retain(|e| e.at != missing);
            assert!(Timeline::of(&events, 96).is_err(), "without {missing}");
        }
        // A reset between two arcs, and too few bytes.
        let mut events = migration();
        events[14] = arc(400, 0, 2, 1);
        assert!(Timeline::of(&events, 96).unwrap_err().contains("was expected in STOP_COPY"));
        assert!(Timeline::of(&migration(), 60).unwrap_err().contains("96 bytes read of 60"));
        // The destination runs before its data has come.
        let mut events = migration();
        events[10].at = 240;
        assert!(Timeline::of(&events, 96).unwrap_err().contains("not in their order"));
    }
}

//! Text for a person: events, errors and reports. Sentences that can be read aloud; figures with
//! their units.

mod error;
mod report;
mod tables;

pub(crate) use error::error_text;
pub(crate) use report::report_text;
pub(crate) use tables::downtime_lines;

use crate::units::{Rate, Size, millis};
use airlift::Event;

/// The line for an event; `None` for one that a person does not want to see as it happens.
pub(crate) fn event(event: &Event) -> Option<String> {
    match event {
        Event::Phase { side, phase, at_ms } => Some(format!("{:>9}  {side}: {phase}", millis(*at_ms))),
        Event::Round { round, sent_bytes, dirty_bytes, device_bytes, bandwidth, estimate_ms } => {
            Some(format!(
                "           round {round}: sent {}, {} of memory and {} of device data are left, {}; \
                 stopping now would take {}",
                Size(*sent_bytes),
                Size(*dirty_bytes),
                Size(*device_bytes),
                Rate(*bandwidth),
                millis(*estimate_ms)
            ))
        }
        Event::Stalled { cause } => Some(format!("           not converging: {cause}")),
        Event::Degraded { message } => Some(format!("           note: {message}")),
        Event::Quarantined { device, reason } => {
            Some(format!("           device {device} is given up: {reason}"))
        }
        Event::Failed { failure } => Some(format!("           failed: {failure}; going back")),
        Event::Compared { .. } | Event::Transition { .. } | Event::InitialDataAcknowledged { .. } => None,
    }
}

//! Listen: until a source says HELLO. Whoever connects and says something else is shown out.

use super::door::Door;
use super::session::Lent;
use crate::event::Event;
use crate::wire::control::ControlLink;
use airlift_core::{DeviceId, Failure, MigrationDevice, Phase, Side};
use airlift_stream::message::Hello;
use airlift_stream::{Limits, Message};
use std::sync::Arc;
use std::time::Duration;

/// How often a cancel is looked for.
const GLANCE: Duration = Duration::from_millis(200);

/// A source, and what it said.
pub(super) struct Heard {
    pub(super) link: ControlLink,
    pub(super) hello: Box<Hello>,
}

/// Waits for a source; then puts `devices` into the order of its HELLO, by which both sides number
/// them. Devices that the source does not have stay behind the others, for the report to name.
pub(super) fn run(lent: &mut Lent, devices: &mut [Box<dyn MigrationDevice>]) -> Result<Heard, Failure> {
    let fail = |message: String| Failure::new(Side::Destination, Phase::Listen, message);
    let at_ms = lent.recorder.at_ms(lent.recorder.now());
    lent.recorder.emit(&Event::Phase { side: Side::Destination, phase: Phase::Listen, at_ms });
    let begun = lent.recorder.now();
    let clock = Arc::clone(&lent.recorder.environment.clock);
    let mut door = Door::new(Limits::default(), lent.options.deadlines.silence, clock);
    loop {
        if lent.control.gate.is_cancelled() {
            return Err(fail("the user of the destination has cancelled".into()));
        }
        if lent.options.listen.is_some_and(|patience| lent.recorder.now().since(begun) >= patience) {
            return Err(fail("no source has come before the deadline".into()));
        }
        let heard =
            door.next(&mut *lent.acceptor, GLANCE).map_err(|e| fail(e.to_string()).with_errno(e.errno))?;
        let Some((stream, message)) = heard else { continue };
        match message {
            Message::Hello(hello) => {
                let place = |id: &DeviceId| {
                    hello.offer.devices.iter().position(|offer| offer.id == *id).unwrap_or(usize::MAX)
                };
                devices.sort_by_key(|device| place(device.id()));
                return Ok(Heard { link: ControlLink::new(stream), hello });
            }
            other => {
                tracing::warn!(message = %other.kind(), "a connection began with another message than HELLO")
            }
        }
    }
}

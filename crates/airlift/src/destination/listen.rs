//! Listen: until a source says HELLO. Whoever connects and says something else is shown out.

use super::session::Lent;
use crate::event::Event;
use crate::wire::control::ControlLink;
use airlift_core::{Failure, MigrationDevice, Phase, Side};
use airlift_stream::message::Hello;
use airlift_stream::{Limits, Message};
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
    loop {
        if lent.control.gate.is_cancelled() {
            return Err(fail("the user of the destination has cancelled".into()));
        }
        if lent.options.listen.is_some_and(|patience| lent.recorder.now().since(begun) >= patience) {
            return Err(fail("no source has come before the deadline".into()));
        }
        let accepted = lent.acceptor.accept(GLANCE).map_err(|e| fail(e.to_string()).with_errno(e.errno))?;
        let Some(stream) = accepted else { continue };
        if let Err(error) = stream.set_silence(lent.options.deadlines.silence) {
            tracing::warn!(error = %error, "a connection was not usable");
            continue;
        }
        let link = ControlLink::new(stream);
        match link.receive(Limits::default()) {
            Ok(Message::Hello(hello)) => {
                let place = |d: &Box<dyn MigrationDevice>| {
                    hello.offer.devices.iter().position(|o| o.id == *d.id()).unwrap_or(usize::MAX)
                };
                devices.sort_by_key(place);
                return Ok(Heard { link, hello });
            }
            Ok(other) => {
                tracing::warn!(message = %other.kind(), "a connection began with another message than HELLO")
            }
            Err(error) => tracing::warn!(error = %error, "a connection began with something else than HELLO"),
        }
    }
}

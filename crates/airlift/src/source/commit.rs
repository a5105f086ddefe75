//! Commit: LOADED is awaited, COMMIT journalled and sent, RUNNING awaited; then the devices go from
//! STOP_COPY to STOP, outside of the downtime. After COMMIT this side never runs by itself again.

use super::roll_back::Standing;
use super::session::{Session, Wake};
use crate::set::DrainedSet;
use crate::wire::control::ControlLink;
use airlift_core::Phase;
use airlift_core::commit::SourceInput;
use airlift_stream::Message;
use std::time::Duration;

/// Between two attempts to reach the destination again.
const RETRY: Duration = Duration::from_millis(250);

pub(super) fn run(session: &mut Session, set: DrainedSet) -> Result<Standing, Standing> {
    if !session.enter(Phase::AwaitLoaded) {
        return ended(session, set);
    }
    loop {
        match session.wait::<()>(None, None, RETRY) {
            Wake::Message(other) => session.unexpected(&other),
            Wake::Set(_) | Wake::Other(_) | Wake::Time => {}
            Wake::Ordered if session.orders.finish => return Ok(finish(session, set)),
            Wake::Ordered if session.orders.reconnect && !session.fallen() => reconnect(session),
            Wake::Ordered => return ended(session, set),
        }
    }
}

/// The session fell or is in doubt: a rollback wants the devices, a doubt holds them as they are.
fn ended(session: &mut Session, set: DrainedSet) -> Result<Standing, Standing> {
    if session.orders.roll_back.is_some() {
        if session.protocol.phase() == Phase::Commit {
            say_done(session);
        }
        Err(Standing::Drained(set))
    } else {
        Ok(Standing::Idle(set.hold()))
    }
}

/// The destination need not wait for a question any more (W-DONE). What is still to be done on this
/// side is none of its business.
fn say_done(session: &mut Session) {
    let done = Message::Done { session: session.protocol.session() };
    session.line.send(&done);
}

fn finish(session: &mut Session, set: DrainedSet) -> Standing {
    session.orders.finish = false;
    say_done(session);
    session.announce(Phase::Done);
    let (set, errors) = set.finish(session.options.deadlines.rollback);
    for error in errors {
        tracing::warn!(error = %error, "a device did not stop after the migration; nothing depends on it");
        session.figures.notes.push(format!("after the migration: {error}"));
    }
    if let Some(mut tracking) = session.undo.tracking.take() {
        tracking.stop(&mut *session.machine);
    }
    tracing::info!("saving has ended");
    let now = session.now();
    // An answer to the machine's own order is never out of order.
    let _ = session.protocol.handle(SourceInput::SourceStopped, now);
    session.act();
    Standing::Idle(set)
}

/// One attempt; the protocol's deadline ends them all.
fn reconnect(session: &mut Session) {
    // Also when nobody has found it to be lost: the destination listens again once it has ended.
    session.line.close();
    let patience = session.options.deadlines.connect.min(Duration::from_secs(1));
    let stream = session.connector.connect(patience).and_then(|stream| {
        stream.set_silence(session.options.deadlines.silence)?;
        Ok(stream)
    });
    let resume = Message::Resume { session: session.protocol.session() };
    let adopted = stream
        .map_err(|e| e.to_string())
        .and_then(|stream| session.adopt(ControlLink::new(stream), &resume).map_err(|e| e.to_string()));
    match adopted {
        Ok(()) => {
            session.orders.reconnect = false;
            let now = session.now();
            // A new connection is taken in every state.
            let _ = session.protocol.handle(SourceInput::Reconnected, now);
            session.act();
        }
        Err(error) => {
            tracing::info!(error, "the destination cannot be reached again yet");
            session.orders.reconnect = false;
            session.pause_before_retry(RETRY);
            session.orders.reconnect |= !session.fallen() && !session.line.is_open();
        }
    }
}

//! The control connection: messages out under a lock, messages in by a thread of its own.
//!
//! The reading thread answers PING and hands CREDIT to the sink at once, so that neither waits for
//! whatever the session's thread is doing. Everything else goes to the session's thread.

use super::frames::{WireError, read_header, read_payload, write_all};
use crate::link::Stream;
use crate::spawn::{Role, SpawnError, Spawner};
use airlift_stream::{FrameType, Limits, Message};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What the reading thread does with a message that it does not answer itself. `Err`: the connection
/// is over, and nothing more will come.
pub(crate) type Deliver = Box<dyn Fn(Result<Message, WireError>) + Send>;

/// The writing half, shared by every thread that has something to say.
#[derive(Clone, Debug)]
pub(crate) struct ControlLink {
    stream: Arc<Stream>,
    // Frames must not be cut by each other; the number is the frame's sequence.
    turn: Arc<Mutex<u64>>,
    sent: Arc<AtomicU64>,
}

impl ControlLink {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream: Arc::new(stream), turn: Arc::default(), sent: Arc::default() }
    }

    /// Sends one message.
    pub(crate) fn send(&self, message: &Message) -> Result<(), WireError> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = message.encode(*turn)?;
        write_all(&self.stream, &bytes)?;
        *turn += 1;
        self.sent.store(*turn, Ordering::Relaxed);
        Ok(())
    }

    /// Messages sent so far; a caller that sees no change for a while sends PING.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Receives one message on the caller's thread, for the handshake.
    pub(crate) fn receive(&self, limits: Limits) -> Result<Message, WireError> {
        receive(&self.stream, limits)
    }

    /// Ends the connection and wakes its reader.
    pub(crate) fn shutdown(&self) {
        self.stream.shutdown();
    }

    /// Says that nothing more will be sent. What was sent still arrives: a connection that is closed
    /// with unread data in it would take the last message along.
    pub(crate) fn finish(&self) {
        self.stream.finish();
    }

    /// Starts the reading thread.
    pub(crate) fn read_on(
        &self,
        spawner: &dyn Spawner,
        limits: Limits,
        deliver: Deliver,
    ) -> Result<(), SpawnError> {
        let link = self.clone();
        spawner.spawn(
            Role::Control,
            "control",
            Box::new(move || {
                loop {
                    match receive(&link.stream, limits) {
                        Ok(Message::Ping(number)) => {
                            // A connection that cannot be written to fails at its next read or write.
                            let _ = link.send(&Message::Pong(number));
                        }
                        Ok(Message::Pong(_)) => {}
                        Ok(message) => deliver(Ok(message)),
                        Err(error) => {
                            deliver(Err(error));
                            return;
                        }
                    }
                }
            }),
        )
    }
}

/// The next message; frames of unknown type that may be skipped are.
pub(crate) fn receive(stream: &Stream, limits: Limits) -> Result<Message, WireError> {
    let mut payload = Vec::new();
    loop {
        let header = read_header(stream, limits)?;
        // Bounded by `limits`, which decoding has checked.
        payload.resize(usize::try_from(header.length).unwrap_or(0), 0);
        read_payload(stream, &header, &mut payload)?;
        if matches!(header.kind, FrameType::Unknown(_)) {
            continue;
        }
        return Ok(Message::decode(&header, &payload)?);
    }
}

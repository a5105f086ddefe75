//! The door: connections that have come, until each has said its first whole message.
//!
//! Anybody can connect and say nothing, or one byte a second. All are listened to side by side, none
//! for longer than [`PATIENCE`], so that such a guest keeps nobody else waiting (W-FIRST). Nothing
//! behind the first message is read. Whether the message may come is the caller's to check.

use crate::link::{Acceptor, LinkError, Stream};
use crate::wire::frames::WireError;
use airlift_core::{Clock, Timestamp};
use airlift_stream::{FrameHeader, HEADER_LEN, Limits, Message, MessageError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

/// How long a connection has for its first message.
const PATIENCE: Duration = Duration::from_secs(2);

/// Connections that are listened to at the same time; more wait in the system's queue.
const MOST: usize = 16;

/// How often a new connection is looked for while others are listened to.
const GLANCE: Duration = Duration::from_millis(5);

/// How much is read at a time: memory grows with what has come, not with what was announced.
const STEP: usize = 64 << 10;

/// A connection whose first message is not complete.
struct Guest {
    stream: Stream,
    until: Timestamp,
    header: Option<FrameHeader>,
    bytes: Vec<u8>,
}

/// Connections whose first message is not complete.
pub(super) struct Door {
    guests: Vec<Guest>,
    limits: Limits,
    silence: Duration,
    clock: Arc<dyn Clock>,
}

impl Door {
    /// First messages are bounded by `limits`; `silence` is what a connection is given once it is in.
    pub(super) fn new(limits: Limits, silence: Duration, clock: Arc<dyn Clock>) -> Self {
        Self { guests: Vec::new(), limits, silence, clock }
    }

    /// Waits at most about `patience` for a connection that has said its first message.
    pub(super) fn next(
        &mut self,
        acceptor: &mut dyn Acceptor,
        patience: Duration,
    ) -> Result<Option<(Stream, Message)>, LinkError> {
        let until = self.clock.now().after(patience);
        loop {
            let left = until.since(self.clock.now());
            let idle = self.guests.is_empty();
            if self.guests.len() < MOST
                && let Some(stream) = acceptor.accept(if idle { left } else { Duration::ZERO })?
            {
                self.admit(stream);
            }
            if let Some(heard) = self.listen(left.min(GLANCE)) {
                return Ok(Some(heard));
            }
            if self.clock.now() >= until {
                return Ok(None);
            }
        }
    }

    fn admit(&mut self, stream: Stream) {
        if let Err(error) = stream.set_silence(self.silence) {
            tracing::warn!(error = %error, "a connection was not usable");
            return;
        }
        let until = self.clock.now().after(PATIENCE);
        self.guests.push(Guest { stream, until, header: None, bytes: Vec::new() });
    }

    /// Listens to all, at most `wait`; gives the first who is done.
    fn listen(&mut self, wait: Duration) -> Option<(Stream, Message)> {
        if self.guests.is_empty() {
            return None;
        }
        let timeout = Timespec::try_from(wait).ok();
        let mut fds: Vec<_> =
            self.guests.iter().map(|guest| PollFd::new(&guest.stream, PollFlags::IN)).collect();
        // An interrupted or failed wait finds nobody, and the guests' time runs on.
        let _ = poll(&mut fds, timeout.as_ref());
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let now = self.clock.now();
        let mut at = 0;
        for ready in ready {
            let guest = &mut self.guests[at];
            match if ready { guest.listen(self.limits) } else { Ok(None) } {
                Ok(Some(message)) => return Some((self.guests.remove(at).stream, message)),
                Ok(None) if now < guest.until => at += 1,
                Ok(None) => {
                    tracing::warn!("a connection did not say its first message in time");
                    self.guests.remove(at);
                }
                Err(error) => {
                    tracing::warn!(error = %error, "a connection began with something else than a message");
                    self.guests.remove(at);
                }
            }
        }
        None
    }
}

impl Guest {
    /// Reads what is there, which does not wait: something is.
    fn listen(&mut self, limits: Limits) -> Result<Option<Message>, WireError> {
        let length = match &self.header {
            None => HEADER_LEN,
            // Bounded by `limits`, which decoding has checked.
            Some(header) => usize::try_from(header.length).unwrap_or(0),
        };
        let have = self.bytes.len();
        let step = (length - have).min(STEP);
        self.bytes.resize(have + step, 0);
        let mut stream = &self.stream;
        let n = match stream.read(&mut self.bytes[have..]) {
            Ok(0) => return Err(WireError::Closed),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(e) => {
                let errno = e.raw_os_error().map(airlift_core::Errno);
                return Err(WireError::Io { message: e.to_string(), errno });
            }
        };
        self.bytes.truncate(have + n);
        if self.bytes.len() < length {
            return Ok(None);
        }
        let header = match self.header {
            Some(header) => header,
            None => {
                let bytes = self.bytes.first_chunk().ok_or(WireError::Closed)?;
                let header = FrameHeader::decode(bytes, limits)?;
                self.bytes.clear();
                self.header = Some(header);
                if header.length > 0 {
                    return Ok(None);
                }
                header
            }
        };
        header.verify(&self.bytes)?;
        let message =
            Message::decode(&header, &self.bytes).map_err(|error: MessageError| WireError::from(error))?;
        Ok(Some(message))
    }
}

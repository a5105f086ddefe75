//! The control connection: messages out under a lock, messages in by a thread of its own.
//!
//! The reading thread answers PING, sends PING itself when it has heard nothing for a third of the
//! connection's silence, and hands CREDIT to the sink at once: none of it waits for whatever the
//! session's thread is doing, so that a long step on both sides is not taken for a loss (W-PING).
//! Everything else goes to the session's thread, bounded by an [`Allowance`].

use super::frames::{WireError, read_header, read_payload, write_all};
use crate::link::Stream;
use crate::spawn::{Role, SpawnError, Spawner};
use airlift_stream::{FrameType, Limits, Message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Looks at a connection that says nothing before it counts as gone; a PING goes out after each but
/// the last.
const LOOKS: u32 = 3;

/// What may wait for the session's thread, in units of small messages.
const INBOX: usize = 1024;

/// What a message that can be large (up to a whole payload) counts: 16 of them may wait.
const LARGE: usize = INBOX / 16;

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
    /// The PING that was sent last, until its PONG comes.
    pinged: Arc<Mutex<Option<(u64, Instant)>>>,
    /// In microseconds; 0 before the first.
    round_trip: Arc<AtomicU64>,
}

impl ControlLink {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream: Arc::new(stream),
            turn: Arc::default(),
            sent: Arc::default(),
            pinged: Arc::default(),
            round_trip: Arc::default(),
        }
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

    /// Messages sent so far.
    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Sends PING; the answer shows that the other side is there, and how far away.
    pub(crate) fn ping(&self) -> Result<(), WireError> {
        let number = self.sent();
        *self.pinged() = Some((number, Instant::now()));
        self.send(&Message::Ping(number))
    }

    fn pinged(&self) -> std::sync::MutexGuard<'_, Option<(u64, Instant)>> {
        self.pinged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ponged(&self, number: u64) {
        let mut pinged = self.pinged();
        if let Some((expected, at)) = *pinged
            && expected == number
        {
            *pinged = None;
            let us = u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.round_trip.store(us.max(1), Ordering::Relaxed);
        }
    }

    /// The round trip as of the last PONG.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        match self.round_trip.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        }
    }

    /// Waits until there is something to read. `Ok(false)`: nothing within `wait`.
    fn readable(&self, wait: Duration) -> Result<bool, WireError> {
        let timeout = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        match poll(&mut [PollFd::new(&*self.stream, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            // An interrupted wait is begun again: a little longer, but not endless.
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(WireError::Io {
                message: error.to_string(),
                errno: Some(airlift_core::Errno(error.raw_os_error())),
            }),
        }
    }

    /// The next message, with a PING after each look that found nothing.
    fn attend(&self, limits: Limits) -> Result<Message, WireError> {
        let silence = self.stream.silence();
        let mut looks = 0;
        if let Some(silence) = silence {
            while !self.readable(silence / LOOKS)? {
                looks += 1;
                if looks >= LOOKS {
                    return Err(WireError::Silent);
                }
                // A connection that cannot be written to fails at its next read or write.
                let _ = self.ping();
            }
        }
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
                    match link.attend(limits) {
                        Ok(Message::Ping(number)) => {
                            // A connection that cannot be written to fails at its next read or write.
                            let _ = link.send(&Message::Pong(number));
                        }
                        Ok(Message::Pong(number)) => link.ponged(number),
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

/// How many messages of one connection may wait for the session's thread (W-INBOX). Its thread can be
/// in a long step; the other side must not fill this side's memory meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Allowance {
    waiting: Arc<AtomicUsize>,
    overrun: AtomicBool,
}

/// The place of a message that waits; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    waiting: Arc<AtomicUsize>,
    weight: usize,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.weight, Ordering::AcqRel);
    }
}

/// What [`Allowance::admit`] says.
#[derive(Debug)]
pub(crate) enum Admission {
    /// There is room.
    Granted(Ticket),
    /// There is none: the connection ends with this. Comes once.
    Refused(WireError),
    /// It was refused before.
    Ended,
}

impl Allowance {
    pub(crate) fn admit(&self, message: &Message) -> Admission {
        if self.overrun.load(Ordering::Acquire) {
            return Admission::Ended;
        }
        let weight = match message {
            Message::InitAck { .. } | Message::RoundEnd { .. } | Message::Trailer(_) => 1,
            _ => LARGE,
        };
        // Taken by the one thread that reads the connection, so that nobody else can add in between.
        if self.waiting.fetch_add(weight, Ordering::AcqRel) + weight <= INBOX {
            return Admission::Granted(Ticket { waiting: Arc::clone(&self.waiting), weight });
        }
        self.overrun.store(true, Ordering::Release);
        Admission::Refused(WireError::Protocol(format!(
            "more messages than may wait ({INBOX}, or {} large ones) came at once; the last was {} (W-INBOX)",
            INBOX / LARGE,
            message.kind()
        )))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawn::StdSpawner;
    use crossbeam_channel::unbounded;
    use std::os::unix::net::UnixStream;

    const LONG: Duration = Duration::from_secs(20);

    // W-PING
    #[test]
    fn the_reader_asks_by_itself_whether_the_other_side_is_there() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (Stream::from(ours), Stream::from(theirs));
        ours.set_silence(Duration::from_millis(90)).unwrap();
        theirs.set_silence(LONG).unwrap();
        let link = ControlLink::new(ours);
        let (deliver, delivered) = unbounded();
        let deliver = Box::new(move |message| drop(deliver.send(message)));
        link.read_on(&StdSpawner, Limits::default(), deliver).unwrap();
        // Nobody waits on our side, as when its thread is in a long step.
        let Message::Ping(number) = receive(&theirs, Limits::default()).unwrap() else { panic!("no PING") };
        write_all(&theirs, &Message::Pong(number).encode(0).unwrap()).unwrap();
        let end = delivered.recv_timeout(LONG).unwrap();
        assert_eq!(end, Err(WireError::Silent), "three looks found nothing");
        assert!(link.round_trip().is_some(), "the PONG was timed");
    }

    // W-INBOX
    #[test]
    fn what_waits_is_bounded_and_what_was_taken_makes_room() {
        let allowance = Allowance::default();
        let small = Message::InitAck { device: 0, generation: 1 };
        let large = Message::Cancel { session: airlift_core::commit::SessionId(1) };
        let admit = |message: &Message| match allowance.admit(message) {
            Admission::Granted(ticket) => ticket,
            refused => panic!("{refused:?}"),
        };
        for _ in 0..10 * INBOX {
            drop(admit(&small));
        }
        let mut held: Vec<_> = (0..INBOX / LARGE - 1).map(|_| admit(&large)).collect();
        held.extend((0..LARGE).map(|_| admit(&small)));
        assert!(matches!(allowance.admit(&small), Admission::Refused(WireError::Protocol(_))));
        drop(held);
        assert!(matches!(allowance.admit(&small), Admission::Ended), "a breach is not forgotten");
    }
}

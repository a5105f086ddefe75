//! One connection of a server: its reading thread, the replies, and the server's own DMA messages.
//!
//! A reading thread takes messages whole and hands them on in order of arrival. What a client has
//! under way is bounded (VU-BOUND): the thread stops reading until something is answered. The second
//! connection has a writing thread beside it, so that answers to it never keep the device thread
//! (VU-UNREAD).

use super::Event;
use super::outbox::Outbox;
use crate::codec::{DmaData, FrameError, Header, MessageType, VersionCaps, command, take};
use crate::dma::DmaPeer;
use crate::transport::{Connection, TransportError};
use crate::{Detach, ServerOptions};
use airlift_core::Errno;
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Payload above the data itself that any message may need.
const HEADROOM: u32 = 64 << 10;
/// Most bytes of requests of one client that are under way.
const MAX_BYTES: usize = 8 << 20;
/// Most requests of one client that are under way.
const MAX_REQUESTS: usize = 128;

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The client's own.
    Primary,
    /// The second one, for migration alone (VU-MIGRATION-SOCKET).
    Migration,
}

/// A message that a client sent, and its share of what the client may have under way.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    _share: Share,
}

#[derive(Debug)]
struct Share {
    conn: Arc<Conn>,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = lock(&self.conn.used);
        used.requests -= 1;
        used.bytes -= self.bytes;
        drop(used);
        self.conn.room.notify_one();
    }
}

#[derive(Debug, Default)]
struct Used {
    requests: usize,
    bytes: usize,
}

/// A connection, shared by its reading thread, the device thread, the data thread and the device's
/// own threads.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) id: u64,
    pub(super) role: Role,
    connection: Connection,
    outbox: Outbox,
    used: Mutex<Used>,
    room: Condvar,
    closed: AtomicBool,
    negotiated: AtomicBool,
    reinit: AtomicBool,
    peer_xfer: AtomicU32,
    max_xfer: u32,
    timeout: Duration,
    asked: Mutex<Asked>,
}

type Answer = Result<Vec<u8>, Errno>;

#[derive(Debug, Default)]
struct Asked {
    next: u16,
    waiting: HashMap<u16, Sender<Answer>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Conn {
    /// Takes a connected socket and starts its threads.
    pub(super) fn start(
        id: u64,
        role: Role,
        stream: UnixStream,
        options: &ServerOptions,
        events: Sender<Event>,
    ) -> std::io::Result<Arc<Self>> {
        let conn = Arc::new(Self {
            id,
            role,
            connection: Connection::new(stream),
            outbox: Outbox::default(),
            used: Mutex::default(),
            room: Condvar::new(),
            closed: AtomicBool::new(false),
            negotiated: AtomicBool::new(false),
            reinit: AtomicBool::new(false),
            peer_xfer: AtomicU32::new(VersionCaps::default().max_data_xfer_size),
            max_xfer: options.max_data_xfer_size,
            timeout: options.message_timeout,
            asked: Mutex::default(),
        });
        if role == Role::Migration {
            let (writer, events) = (Arc::clone(&conn), events.clone());
            std::thread::Builder::new().name("vfu-write".into()).spawn(move || {
                writer.outbox.run(&writer.connection, writer.timeout, || {
                    // The server may have ended before.
                    let _ = events.send(Event::Answered(writer.id));
                });
            })?;
        }
        let reader = Arc::clone(&conn);
        let started = std::thread::Builder::new().name("vfu-read".into()).spawn(move || {
            let why = reader.read_all(&events);
            reader.close();
            let _ = events.send(Event::Closed(reader.id, why));
        });
        if let Err(error) = started {
            conn.close();
            return Err(error);
        }
        Ok(conn)
    }

    /// Ends the connection; all who wait for it are told.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.connection.shutdown();
        self.outbox.close();
        let _used = lock(&self.used);
        self.room.notify_all();
        // The senders go, and with them the waits.
        lock(&self.asked).waiting.clear();
    }

    pub(super) fn peer_gone(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.connection.peer_gone()
    }

    /// VERSION was answered.
    pub(super) fn negotiated(&self, caps: &VersionCaps) {
        self.peer_xfer.store(caps.max_data_xfer_size, Ordering::Release);
        self.negotiated.store(true, Ordering::Release);
    }

    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated.load(Ordering::Acquire)
    }

    /// The client wants to be told of new initial data (V2-REINIT).
    pub(super) fn opt_in_to_reinit(&self) {
        self.reinit.store(true, Ordering::Release);
    }

    pub(super) fn wants_reinit(&self) -> bool {
        self.reinit.load(Ordering::Acquire)
    }

    /// So many answers wait for the client that its further requests have to wait for them;
    /// [`Event::Answered`] tells when none does any more. Never so for the first connection.
    pub(super) fn is_full(&self) -> bool {
        self.outbox.is_full()
    }

    /// Answers a request, from the device thread. A client that does not take its answers loses the
    /// connection. Only for the first connection is that waited for: it is the guest's own (VU-UNREAD).
    pub(super) fn reply(&self, to: Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) {
        self.answer(to, Ok(parts), fds, self.role == Role::Primary);
    }

    /// Answers a request with an error, from the device thread: a header alone (VU-ERROR-REPLY).
    pub(super) fn refuse(&self, to: Header, errno: Errno) {
        self.answer(to, Err(errno), &[], self.role == Role::Primary);
    }

    /// Answers a request, from a thread that may wait until the client takes it.
    pub(super) fn deliver(&self, to: Header, answer: Result<&[&[u8]], Errno>) {
        self.answer(to, answer, &[], true);
    }

    fn answer(&self, to: Header, answer: Result<&[&[u8]], Errno>, fds: &[BorrowedFd<'_>], wait: bool) {
        let command = command::name(to.command);
        let (header, parts) = match answer {
            Ok(parts) => {
                let length: usize = parts.iter().map(|p| p.len()).sum();
                (to.reply(u32::try_from(length).unwrap_or(u32::MAX)), parts)
            }
            Err(errno) => {
                tracing::debug!(command, %errno, "request refused");
                (to.error(u32::try_from(errno.0).unwrap_or(5)), [].as_slice())
            }
        };
        if to.kind == (MessageType::Command { no_reply: true }) {
            return;
        }
        let head = header.encode();
        let mut whole: Vec<&[u8]> = vec![&head];
        whole.extend(parts);
        let sent = if wait {
            let _turn = self.outbox.turn();
            self.connection.send(&whole, fds, Instant::now() + self.timeout)
        } else {
            self.outbox.post(&self.connection, &whole, fds)
        };
        if let Err(error) = sent {
            tracing::debug!(command, %error, "reply not sent");
            self.connection.shutdown();
        }
    }

    fn read_all(self: &Arc<Self>, events: &Sender<Event>) -> Detach {
        loop {
            match self.read_one() {
                Ok(Some(request)) => {
                    if events.send(Event::Request(Arc::clone(self), request)).is_err() {
                        return Detach::Shutdown;
                    }
                }
                Ok(None) => {}
                Err(TransportError::Closed) => return Detach::Closed,
                Err(error) => return Detach::Protocol(error.to_string()),
            }
        }
    }

    /// Reads one message. `None`: it was a reply, or was refused here.
    fn read_one(self: &Arc<Self>) -> Result<Option<Request>, TransportError> {
        let limit = self.max_xfer.saturating_add(HEADROOM);
        let received = self.connection.recv_header(limit, None, None, self.timeout)?;
        let header = received.header;
        let deadline = Instant::now() + self.timeout;
        if let Some(error) = received.refused {
            self.connection.drain(header.payload, deadline)?;
            if matches!(header.kind, MessageType::Command { .. }) {
                let errno = match error {
                    FrameError::TooLong { .. } => Errno::EMSGSIZE,
                    FrameError::TooShort(_) | FrameError::Type(_) => Errno::EINVAL,
                };
                self.deliver(header, Err(errno));
            }
            return Ok(None);
        }
        let length = usize::try_from(header.payload).unwrap_or(usize::MAX);
        if let MessageType::Reply { error } = header.kind {
            let mut payload = vec![0; length];
            self.connection.recv_exact(&mut payload, deadline)?;
            // An unknown number is an answer that came after its deadline.
            if let Some(sender) = lock(&self.asked).waiting.remove(&header.msg_id) {
                let errno = |e| if e == 0 { Errno::EIO } else { Errno(i32::try_from(e).unwrap_or(5)) };
                let _ = sender.send(error.map_or(Ok(payload), |e| Err(errno(e))));
            }
            return Ok(None);
        }
        let share = self.share(length)?;
        let mut payload = vec![0; length];
        self.connection.recv_exact(&mut payload, Instant::now() + self.timeout)?;
        Ok(Some(Request { header, payload, fds: received.fds, _share: share }))
    }

    /// Waits until the client may have another `bytes` bytes under way.
    fn share(self: &Arc<Self>, bytes: usize) -> Result<Share, TransportError> {
        let mut used = lock(&self.used);
        while used.requests >= MAX_REQUESTS || (used.requests > 0 && used.bytes + bytes > MAX_BYTES) {
            if self.closed.load(Ordering::Acquire) {
                return Err(TransportError::Closed);
            }
            used = self.room.wait(used).unwrap_or_else(PoisonError::into_inner);
        }
        used.requests += 1;
        used.bytes += bytes;
        Ok(Share { conn: Arc::clone(self), bytes })
    }

    /// Sends one DMA message to the client and waits for the answer.
    fn ask(&self, number: u16, parts: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let deadline = Instant::now() + self.timeout;
        let id = {
            let mut asked = lock(&self.asked);
            while asked.waiting.contains_key(&asked.next) {
                asked.next = asked.next.wrapping_add(1);
            }
            let id = asked.next;
            asked.next = asked.next.wrapping_add(1);
            asked.waiting.insert(id, sender);
            id
        };
        // After the entry is there: closing clears the entries, so none can wait in vain.
        if self.closed.load(Ordering::Acquire) {
            lock(&self.asked).waiting.remove(&id);
            return Err(Errno::ENOTCONN);
        }
        let length: usize = parts.iter().map(|p| p.len()).sum();
        let head = Header::command(id, number, u32::try_from(length).unwrap_or(u32::MAX)).encode();
        let mut whole: Vec<&[u8]> = vec![&head];
        whole.extend(parts);
        let sent = {
            let _turn = self.outbox.turn();
            self.connection.send(&whole, &[], deadline)
        };
        if sent.is_err() {
            self.connection.shutdown();
            lock(&self.asked).waiting.remove(&id);
            return Err(Errno::ENOTCONN);
        }
        match receiver.recv_deadline(deadline) {
            Ok(answer) => answer,
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => Err(Errno::ENOTCONN),
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                lock(&self.asked).waiting.remove(&id);
                Err(Errno::ETIMEDOUT)
            }
        }
    }

    fn piece(&self) -> usize {
        let size = self.peer_xfer.load(Ordering::Acquire).min(self.max_xfer);
        usize::try_from(size.max(64)).unwrap_or(64)
    }
}

impl DmaPeer for Conn {
    fn dma_read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let mut at = iova;
        for part in buf.chunks_mut(self.piece()) {
            let asked = DmaData { iova: at, count: part.len() as u64 };
            let answer = self.ask(command::DMA_READ, &[asked.as_bytes()])?;
            let (head, data) = take::<DmaData>(&answer).ok_or(Errno::EPROTO)?;
            if head != asked || data.len() != part.len() {
                return Err(Errno::EPROTO);
            }
            part.copy_from_slice(data);
            at += asked.count;
        }
        Ok(())
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut at = iova;
        for part in data.chunks(self.piece()) {
            let asked = DmaData { iova: at, count: part.len() as u64 };
            let answer = self.ask(command::DMA_WRITE, &[asked.as_bytes(), part])?;
            if take::<DmaData>(&answer).is_none_or(|(head, _)| head != asked) {
                return Err(Errno::EPROTO);
            }
            at += asked.count;
        }
        Ok(())
    }
}

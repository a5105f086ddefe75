//! Requests and their replies over one connection, for any number of threads of a client.
//!
//! Several requests may be under way; replies are matched by number and kept until somebody asks for
//! them. While anybody waits, the server's DMA messages are served. After a message that breaks the
//! protocol the channel is dead, and says why to everyone.

use super::ClientOptions;
use super::dma::{DmaHandler, WriteLog};
use crate::codec::{DmaData, Header, MessageType, MigData, RegionAccess, command, take};
use crate::transport::{Connection, Received, TransportError, Waker};
use airlift_core::{DeviceError, DeviceErrorKind, Errno, Interrupter};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Messages that are served in one go when nobody waits for an answer.
const PUMPED: usize = 64;

/// Most requests that were given up and may still be answered.
const MAX_ABANDONED: usize = 64;
/// Most bytes of a message that is skipped; behind a longer one the stream is given up.
const MAX_SKIP: u32 = 64 << 20;

/// The socket, what is under way on it, and the means to wake who waits.
pub(super) struct Channel {
    connection: Connection,
    inner: Mutex<Inner>,
    waker: Waker,
    interruptions: AtomicU64,
    message_timeout: Duration,
    max_xfer: u32,
}

struct Inner {
    next: u16,
    expected: HashMap<u16, Expected>,
    ready: HashMap<u16, Reply>,
    abandoned: usize,
    dead: Option<DeviceError>,
    handler: Option<Box<dyn DmaHandler>>,
    log: Arc<WriteLog>,
}

#[derive(Clone, Copy)]
struct Expected {
    command: u16,
    limit: u32,
    abandoned: bool,
}

/// A request that was sent. It is waited for or given up.
#[derive(Debug)]
#[must_use]
pub(super) struct Ticket {
    id: u16,
    command: u16,
}

/// A reply without the error flag.
#[derive(Debug)]
pub(super) struct Reply {
    error: Option<Errno>,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The channel, held by one thread for one call.
pub(super) struct Call<'a> {
    channel: &'a Channel,
    inner: MutexGuard<'a, Inner>,
    interruptions: u64,
}

/// Where the data of one reply goes without a detour.
struct Direct<'a> {
    id: u16,
    requested: u32,
    head: DataHead,
    buf: &'a mut [u8],
    filled: Option<(usize, Vec<u8>)>,
}

/// What stands before the data of a reply, and says how much there is.
#[derive(Clone, Copy)]
enum DataHead {
    /// MIG_DATA_READ.
    Migration,
    /// REGION_READ.
    Region,
}

impl DataHead {
    const fn length(self) -> usize {
        match self {
            Self::Migration => size_of::<MigData>(),
            Self::Region => size_of::<RegionAccess>(),
        }
    }

    /// The bytes of data, and the payload behind the head; `None` when it is too short or breaks its bounds.
    fn split(self, payload: &[u8]) -> Option<(u32, &[u8])> {
        match self {
            Self::Migration => take::<MigData>(payload).map(|(head, data)| (head.size, data)),
            Self::Region => take::<RegionAccess>(payload).map(|(head, data)| (head.count, data)),
        }
    }
}

fn error_of(error: TransportError, operation: u16) -> DeviceError {
    let operation = command::name(operation);
    let kind = match error {
        TransportError::Closed | TransportError::System(_) => DeviceErrorKind::Lost,
        TransportError::TimedOut | TransportError::Stalled => DeviceErrorKind::TimedOut,
        TransportError::Interrupted => DeviceErrorKind::Interrupted,
        TransportError::Frame(_) => DeviceErrorKind::Protocol,
    };
    let mut result = DeviceError::new(kind, operation, error.to_string());
    if let TransportError::System(errno) = error {
        result.errno = Some(errno);
    }
    result
}

pub(super) fn protocol(operation: u16, message: impl Into<String>) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Protocol, command::name(operation), message)
}

fn length(parts: &[&[u8]]) -> u32 {
    u32::try_from(parts.iter().map(|p| p.len()).sum::<usize>()).unwrap_or(u32::MAX)
}

impl Channel {
    pub(super) fn new(
        stream: UnixStream,
        options: &ClientOptions,
        log: Arc<WriteLog>,
    ) -> Result<Self, DeviceError> {
        let waker = Waker::new().map_err(|e| {
            let errno = e.raw_os_error().map(Errno);
            let error = DeviceError::new(DeviceErrorKind::Lost, "connect", "no descriptor for a wake-up");
            DeviceError { errno, ..error }
        })?;
        Ok(Self {
            connection: Connection::new(stream),
            inner: Mutex::new(Inner {
                next: 0,
                expected: HashMap::new(),
                ready: HashMap::new(),
                abandoned: 0,
                dead: None,
                handler: None,
                log,
            }),
            waker,
            interruptions: AtomicU64::new(0),
            message_timeout: options.message_timeout,
            max_xfer: options.max_data_xfer_size,
        })
    }

    pub(super) fn set_handler(&self, handler: Option<Box<dyn DmaHandler>>) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).handler = handler;
    }

    pub(super) fn shutdown(&self) {
        self.connection.shutdown();
    }

    /// Ends the calls that wait now; later ones are not touched (VU-INTERRUPT).
    pub(super) fn interrupter(self: &Arc<Self>) -> Interrupter {
        // Weak: who may interrupt does not keep the connection, and with it the session, alive.
        let channel = Arc::downgrade(self);
        Interrupter::new(move || {
            if let Some(channel) = channel.upgrade() {
                channel.interruptions.fetch_add(1, Ordering::AcqRel);
                channel.waker.wake();
            }
        })
    }

    /// Takes the channel for a call.
    pub(super) fn call(&self) -> Call<'_> {
        let interruptions = self.interruptions.load(Ordering::Acquire);
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        Call { channel: self, inner, interruptions }
    }

    /// Serves what the server has sent by now, 64 messages at the most. Nothing to do when another thread holds the channel:
    /// it serves while it waits.
    pub(super) fn pump(&self) -> Result<(), DeviceError> {
        let interruptions = self.interruptions.load(Ordering::Acquire);
        let inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(inner)) => inner.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let mut call = Call { channel: self, inner, interruptions };
        call.alive()?;
        for _ in 0..PUMPED {
            match call.receive(Instant::now(), None) {
                Ok(()) => {}
                Err(TransportError::TimedOut | TransportError::Interrupted) => return Ok(()),
                Err(error) => return Err(call.die(error_of(error, command::DMA_READ))),
            }
        }
        Ok(())
    }

    /// Sends a request and waits for its answer.
    pub(super) fn ask(
        &self,
        number: u16,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        limit: u32,
        timeout: Duration,
    ) -> Result<Reply, DeviceError> {
        let mut call = self.call();
        let ticket = call.send(number, parts, fds, limit)?;
        call.wait(&ticket, timeout)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Call<'_> {
    fn alive(&self) -> Result<(), DeviceError> {
        self.inner.dead.clone().map_or(Ok(()), Err)
    }

    /// The channel is of no more use.
    fn die(&mut self, error: DeviceError) -> DeviceError {
        self.channel.connection.shutdown();
        self.inner.dead.get_or_insert_with(|| error.clone());
        self.inner.ready.clear();
        error
    }

    /// Sends a request whose reply has at most `limit` bytes of payload.
    pub(super) fn send(
        &mut self,
        number: u16,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        limit: u32,
    ) -> Result<Ticket, DeviceError> {
        self.alive()?;
        while self.inner.expected.contains_key(&self.inner.next) {
            self.inner.next = self.inner.next.wrapping_add(1);
        }
        let id = self.inner.next;
        self.inner.next = id.wrapping_add(1);
        let head = Header::command(id, number, length(parts)).encode();
        let mut whole: Vec<&[u8]> = vec![&head];
        whole.extend(parts);
        let deadline = Instant::now() + self.channel.message_timeout;
        match self.channel.connection.send(&whole, fds, deadline) {
            Ok(()) => {
                self.inner.expected.insert(id, Expected { command: number, limit, abandoned: false });
                Ok(Ticket { id, command: number })
            }
            // Nothing was sent: the stream is whole.
            Err(error @ TransportError::TimedOut) => Err(error_of(error, number)),
            Err(error) => Err(self.die(error_of(error, number))),
        }
    }

    /// Waits for the answer. A deadline that passes gives the request up; a late answer is skipped.
    pub(super) fn wait(&mut self, ticket: &Ticket, timeout: Duration) -> Result<Reply, DeviceError> {
        let deadline = Instant::now() + timeout;
        loop {
            self.alive()?;
            if let Some(reply) = self.inner.ready.remove(&ticket.id) {
                return match reply.error {
                    None => Ok(reply),
                    Some(errno) => Err(DeviceError::refused(command::name(ticket.command), errno)),
                };
            }
            self.receive_for(ticket, deadline, None)?;
        }
    }

    /// Waits for the answer of a MIG_DATA_READ of `requested` bytes, straight into `buf`. The bytes
    /// of data, and those that found no room in `buf`.
    pub(super) fn wait_data(
        &mut self,
        ticket: &Ticket,
        requested: u32,
        buf: &mut [u8],
        timeout: Duration,
    ) -> Result<(usize, Vec<u8>), DeviceError> {
        let id = ticket.id;
        let direct = Direct { id, requested, head: DataHead::Migration, buf, filled: None };
        self.wait_direct(ticket, direct, timeout)
    }

    /// Waits for the answer of a REGION_READ of as many bytes as `buf` has, straight into it.
    pub(super) fn wait_region(
        &mut self,
        ticket: &Ticket,
        buf: &mut [u8],
        timeout: Duration,
    ) -> Result<(), DeviceError> {
        let (id, length) = (ticket.id, buf.len());
        let requested = u32::try_from(length).unwrap_or(u32::MAX);
        let direct = Direct { id, requested, head: DataHead::Region, buf, filled: None };
        match self.wait_direct(ticket, direct, timeout)? {
            (filled, rest) if filled == length && rest.is_empty() => Ok(()),
            _ => Err(protocol(ticket.command, "the reply has another length")),
        }
    }

    fn wait_direct(
        &mut self,
        ticket: &Ticket,
        mut direct: Direct<'_>,
        timeout: Duration,
    ) -> Result<(usize, Vec<u8>), DeviceError> {
        let deadline = Instant::now() + timeout;
        loop {
            self.alive()?;
            if let Some(filled) = direct.filled.take() {
                return Ok(filled);
            }
            if let Some(reply) = self.inner.ready.remove(&ticket.id) {
                if let Some(errno) = reply.error {
                    return Err(DeviceError::refused(command::name(ticket.command), errno));
                }
                // The size field counts, not the length of the message (VU-SIZE-FIELD).
                let data = direct
                    .head
                    .split(&reply.payload)
                    .filter(|(size, _)| *size <= direct.requested)
                    .and_then(|(size, data)| data.get(..usize::try_from(size).ok()?));
                let Some(data) = data else {
                    let error = protocol(ticket.command, "the reply holds less than it says, or too much");
                    return Err(self.die(error));
                };
                let (now, later) = data.split_at(data.len().min(direct.buf.len()));
                direct.buf[..now.len()].copy_from_slice(now);
                return Ok((now.len(), later.to_vec()));
            }
            self.receive_for(ticket, deadline, Some(&mut direct))?;
        }
    }

    fn receive_for(
        &mut self,
        ticket: &Ticket,
        deadline: Instant,
        mut direct: Option<&mut Direct<'_>>,
    ) -> Result<(), DeviceError> {
        // An interruption may have come while another thread held the channel.
        let interrupted = self.channel.interruptions.load(Ordering::Acquire) != self.interruptions;
        let mut result = match interrupted {
            true => Err(TransportError::Interrupted),
            false => self.receive(deadline, direct.as_deref_mut()),
        };
        // There is always something to receive from a server that never stops sending (VU-FLOOD).
        let answered =
            self.inner.ready.contains_key(&ticket.id) || direct.is_some_and(|d| d.filled.is_some());
        if result.is_ok() && !answered && Instant::now() >= deadline {
            result = Err(TransportError::TimedOut);
        }
        match result {
            Ok(()) => Ok(()),
            Err(TransportError::Interrupted) if !interrupted => {
                // It may have been meant for a call that has ended.
                self.channel.waker.clear();
                Ok(())
            }
            Err(error @ (TransportError::TimedOut | TransportError::Interrupted)) => {
                self.channel.waker.clear();
                self.give_up(ticket);
                Err(error_of(error, ticket.command))
            }
            Err(error) => {
                let error = error_of(error, ticket.command);
                Err(self.inner.dead.clone().unwrap_or_else(|| self.die(error)))
            }
        }
    }

    /// Nobody will ask for this answer any more.
    pub(super) fn give_up(&mut self, ticket: &Ticket) {
        if self.inner.ready.remove(&ticket.id).is_some() {
            return;
        }
        let Some(expected) = self.inner.expected.get_mut(&ticket.id) else { return };
        expected.abandoned = true;
        self.inner.abandoned += 1;
        if self.inner.abandoned > MAX_ABANDONED {
            self.die(DeviceError::new(
                DeviceErrorKind::TimedOut,
                command::name(ticket.command),
                "too many requests were left without an answer",
            ));
        }
    }

    /// Receives one message and puts it where it belongs.
    fn receive(&mut self, deadline: Instant, direct: Option<&mut Direct<'_>>) -> Result<(), TransportError> {
        let channel = self.channel;
        let timeout = channel.message_timeout;
        let received =
            channel.connection.recv_header(u32::MAX, Some(deadline), Some(&channel.waker), timeout)?;
        if let Some(error) = received.refused {
            return Err(error.into());
        }
        match received.header.kind {
            MessageType::Command { .. } => self.serve(&received),
            MessageType::Reply { error } => self.take_reply(received, error, direct),
        }
    }

    fn take_reply(
        &mut self,
        received: Received,
        error: Option<u32>,
        direct: Option<&mut Direct<'_>>,
    ) -> Result<(), TransportError> {
        let connection = &self.channel.connection;
        let header = received.header;
        let deadline = Instant::now() + self.channel.message_timeout;
        let Some(expected) = self.inner.expected.remove(&header.msg_id) else {
            return self.broken(header.command, "a reply to a request that was not made");
        };
        if expected.command != header.command {
            return self.broken(expected.command, "the reply names another command");
        }
        if expected.abandoned {
            self.inner.abandoned -= 1;
        }
        if error.is_some() || expected.abandoned {
            // An error reply should be a header alone, and often is not (VU-ERROR-PAYLOAD).
            if header.payload > MAX_SKIP {
                return self.broken(header.command, "a payload that is too long to be skipped");
            }
            connection.drain(header.payload, deadline)?;
            if !expected.abandoned {
                // An error without a number is still an error (VU-ERRNO-ZERO).
                let number = error.and_then(|e| i32::try_from(e).ok()).filter(|e| *e > 0);
                let error = Some(number.map_or(Errno::EIO, Errno));
                self.inner.ready.insert(header.msg_id, Reply { error, payload: Vec::new(), fds: Vec::new() });
            }
            return Ok(());
        }
        if header.payload > expected.limit {
            return self.broken(header.command, "the reply is longer than was asked for");
        }
        if let Some(direct) = direct.filter(|d| d.id == header.msg_id) {
            return self.take_data(&header, direct, deadline);
        }
        let mut payload = vec![0; usize::try_from(header.payload).unwrap_or(usize::MAX)];
        connection.recv_exact(&mut payload, deadline)?;
        self.inner.ready.insert(header.msg_id, Reply { error: None, payload, fds: received.fds });
        Ok(())
    }

    fn take_data(
        &mut self,
        header: &Header,
        direct: &mut Direct<'_>,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let connection = &self.channel.connection;
        let mut space = [0; size_of::<RegionAccess>()];
        let head = &mut space[..direct.head.length()];
        let Some(behind) = u32::try_from(head.len()).ok().and_then(|n| header.payload.checked_sub(n)) else {
            return self.broken(header.command, "the reply has no size");
        };
        connection.recv_exact(head, deadline)?;
        let size = direct.head.split(head).map_or(u32::MAX, |(size, _)| size);
        if size > direct.requested || size > behind {
            return self.broken(header.command, "the reply holds less than it says, or too much");
        }
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        let now = length.min(direct.buf.len());
        let mut later = vec![0; length - now];
        connection.recv_exact(&mut direct.buf[..now], deadline)?;
        connection.recv_exact(&mut later, deadline)?;
        // There are servers that pad a short answer to the size that was asked for (VU-SIZE-FIELD).
        connection.drain(behind - size, deadline)?;
        direct.filled = Some((now, later));
        Ok(())
    }

    fn broken<T>(&mut self, number: u16, message: &str) -> Result<T, TransportError> {
        self.die(protocol(number, message));
        Err(TransportError::Closed)
    }

    /// Answers a DMA message of the server.
    fn serve(&mut self, received: &Received) -> Result<(), TransportError> {
        let connection = &self.channel.connection;
        let timeout = self.channel.message_timeout;
        let header = received.header;
        let deadline = Instant::now() + timeout;
        let result = if header.payload > self.channel.max_xfer.saturating_add(64) {
            if header.payload > MAX_SKIP {
                return self.broken(header.command, "a payload that is too long to be skipped");
            }
            connection.drain(header.payload, deadline)?;
            Err(Errno::EMSGSIZE)
        } else {
            let mut payload = vec![0; usize::try_from(header.payload).unwrap_or(usize::MAX)];
            connection.recv_exact(&mut payload, deadline)?;
            self.serve_dma(header.command, &payload)
        };
        if header.kind == (MessageType::Command { no_reply: true }) {
            return Ok(());
        }
        let deadline = Instant::now() + timeout;
        match result {
            Ok((head, data)) => {
                let parts: &[&[u8]] = &[head.as_bytes(), &data];
                let reply = header.reply(length(parts)).encode();
                self.channel.connection.send(&[&reply, parts[0], parts[1]], &[], deadline)
            }
            Err(errno) => {
                let reply = header.error(u32::try_from(errno.0).unwrap_or(5)).encode();
                self.channel.connection.send(&[&reply], &[], deadline)
            }
        }
        // A reply that was not sent leaves the server waiting: the connection has stalled.
        .map_err(|e| if e == TransportError::TimedOut { TransportError::Stalled } else { e })
    }

    fn serve_dma(&mut self, number: u16, payload: &[u8]) -> Result<(DmaData, Vec<u8>), Errno> {
        let (head, data) = take::<DmaData>(payload).ok_or(Errno::EINVAL)?;
        if head.count > u64::from(self.channel.max_xfer) || head.iova.checked_add(head.count).is_none() {
            return Err(Errno::EINVAL);
        }
        let count = usize::try_from(head.count).map_err(|_| Errno::EINVAL)?;
        let handler = self.inner.handler.as_mut().ok_or(Errno::EOPNOTSUPP)?;
        match number {
            command::DMA_READ if data.is_empty() => {
                let mut buf = vec![0; count];
                handler.read(head.iova, &mut buf)?;
                Ok((head, buf))
            }
            command::DMA_WRITE if data.len() == count => {
                let result = handler.write(head.iova, data);
                // Also when it failed: a part may have been written.
                self.inner.log.mark(head.iova, head.count);
                result?;
                Ok((head, Vec::new()))
            }
            command::DMA_READ | command::DMA_WRITE => Err(Errno::EINVAL),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
}

//! The bytes of the VMM protocol: one JSON text per line, file descriptors beside it.
//!
//! A [`LineChannel`] carries whole lines over a UNIX stream socket. Descriptors are sent with the
//! first byte of their line and belong to the line that holds the last byte of the read they came
//! with, so that a line that nobody waits for any more cannot hand its descriptors to the next one.
//! Everything is bounded: the line, the descriptors of a line, the time of a wait. What the JSON
//! means is not checked here.

use crate::machine::{PendingInterrupt, RecordOwner};
use airlift_core::{DeviceId, Errno};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The version of the protocol that this crate speaks.
pub const PROTOCOL: u32 = 1;
/// Longest line in bytes, its newline included (VMM-BOUNDS).
pub const MAX_LINE: usize = 1 << 20;
/// Most file descriptors of one line: what Linux lets one message carry (VMM-BOUNDS).
pub const MAX_FDS: usize = 253;
/// Largest content of one machine record in bytes (VMM-BOUNDS).
pub const MAX_RECORD: u64 = 1_000_000;
/// Most records of one machine (VMM-BOUNDS).
pub const MAX_RECORDS: usize = 4096;

/// A line could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The deadline passed with a line incomplete or not begun.
    #[error("no answer before the deadline")]
    TimedOut,
    /// A line is longer than [`MAX_LINE`].
    #[error("a line is longer than {MAX_LINE} bytes")]
    LineTooLong,
    /// A line came with more than [`MAX_FDS`] descriptors, or some were lost for want of free ones.
    #[error("a line has more than {MAX_FDS} file descriptors, or this process has no more free")]
    TooManyFds,
    /// A line is not the JSON that it must be.
    #[error("not a line of this protocol: {0}")]
    Malformed(String),
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] rustix::io::Errno),
}

impl WireError {
    /// The error number that says the same.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Closed => Errno::ECONNRESET,
            Self::TimedOut => Errno::ETIMEDOUT,
            Self::LineTooLong => Errno::EMSGSIZE,
            Self::TooManyFds => Errno::EMFILE,
            Self::Malformed(_) => Errno::EPROTO,
            Self::Io(errno) => Errno(errno.raw_os_error()),
        }
    }
}

/// A line and the descriptors that came with it.
#[derive(Debug)]
pub struct Line {
    /// The text without its newline.
    pub text: Vec<u8>,
    /// Its descriptors, in order, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Lines and descriptors over a UNIX stream socket.
#[derive(Debug)]
pub struct LineChannel {
    stream: UnixStream,
    received: Vec<u8>,
    /// Bytes of `received` that were already searched for a newline.
    searched: usize,
    /// Descriptors, each batch with the index in `received` of the byte that it belongs to.
    batches: VecDeque<(usize, Vec<OwnedFd>)>,
}

impl LineChannel {
    /// Takes over a connected socket.
    #[must_use]
    pub const fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), searched: 0, batches: VecDeque::new() }
    }

    /// Whether the beginning of a line has been received, and not its end.
    #[must_use]
    pub fn in_line(&self) -> bool {
        !self.received.is_empty()
    }

    /// Sends `value` as one line with `fds`.
    ///
    /// # Errors
    /// [`WireError`]; after any but [`WireError::LineTooLong`] and [`WireError::TooManyFds`] a part
    /// of the line may have been sent, and the channel is of no more use.
    pub fn send<T: Serialize>(
        &mut self,
        value: &T,
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), WireError> {
        let mut line = serde_json::to_vec(value).map_err(|e| WireError::Malformed(e.to_string()))?;
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return Err(WireError::LineTooLong);
        }
        if fds.len() > MAX_FDS {
            return Err(WireError::TooManyFds);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut sent = 0;
        while sent < line.len() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(WireError::TooManyFds);
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.stream, &[IoSlice::new(&line[sent..])], &mut control, flags) {
                Ok(n) => sent += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT, Some(deadline))?,
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => return Err(WireError::Closed),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Waits until bytes can be read, without reading them.
    ///
    /// # Errors
    /// When the wait fails or `deadline` passes.
    pub fn wait_readable(&mut self, deadline: Option<Instant>) -> Result<(), WireError> {
        if self.received.is_empty() { self.wait(PollFlags::IN, deadline) } else { Ok(()) }
    }

    /// Receives one line.
    ///
    /// # Errors
    /// [`WireError`]. After [`WireError::TimedOut`] a later call goes on where this one was.
    pub fn receive(&mut self, deadline: Instant) -> Result<Line, WireError> {
        loop {
            if let Some(at) = self.received[self.searched..].iter().position(|&b| b == b'\n') {
                return Ok(self.take_line(self.searched + at));
            }
            self.searched = self.received.len();
            if self.searched >= MAX_LINE {
                return Err(WireError::LineTooLong);
            }
            self.wait(PollFlags::IN, Some(deadline))?;
            self.read_some()?;
        }
    }

    fn take_line(&mut self, newline: usize) -> Line {
        let mut text: Vec<u8> = self.received.drain(..=newline).collect();
        text.pop();
        self.searched = 0;
        let mut fds = Vec::new();
        while self.batches.front().is_some_and(|(at, _)| *at <= newline) {
            if let Some((_, batch)) = self.batches.pop_front() {
                fds.extend(batch);
            }
        }
        for (at, _) in &mut self.batches {
            *at -= newline + 1;
        }
        Line { text, fds }
    }

    fn read_some(&mut self) -> Result<(), WireError> {
        let mut bytes = [0; 16 * 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let room = bytes.len().min(MAX_LINE - self.received.len());
        let message = match rustix::net::recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut bytes[..room])],
            &mut control,
            flags,
        ) {
            Ok(message) => message,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(()),
            Err(rustix::io::Errno::CONNRESET) => return Err(WireError::Closed),
            Err(e) => return Err(e.into()),
        };
        let mut batch = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                batch.extend(fds);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::TooManyFds);
        }
        if message.bytes == 0 {
            return Err(WireError::Closed);
        }
        self.received.extend_from_slice(&bytes[..message.bytes]);
        if !batch.is_empty() {
            let held: usize = self.batches.iter().map(|(_, b)| b.len()).sum();
            if held + batch.len() > MAX_FDS {
                return Err(WireError::TooManyFds);
            }
            self.batches.push_back((self.received.len() - 1, batch));
        }
        Ok(())
    }

    fn wait(&self, events: PollFlags, deadline: Option<Instant>) -> Result<(), WireError> {
        loop {
            let timeout = match deadline {
                None => None,
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(WireError::TimedOut);
                    }
                    Some(timespec(left))
                }
            };
            let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), events)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// A request line, from the migration process to the VMM.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request<P> {
    pub(super) id: u64,
    pub(super) verb: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) params: Option<P>,
}

/// An answer line: exactly one of `ok` and `error`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ok: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<crate::machine::MachineError>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u32,
    pub(super) name: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireDevice {
    pub(super) id: DeviceId,
    pub(super) kind: super::DeviceKind,
    /// Index of its descriptor in the line's.
    pub(super) fd: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireRegion {
    pub(super) id: u32,
    pub(super) fd: usize,
    pub(super) offset: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "kebab-case")]
pub(super) enum WireMemory {
    Engine { regions: Vec<WireRegion> },
    External,
}

/// The dirty bitmap: 64-bit little-endian words in the memfd `fd`, `length` bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireBitmap {
    pub(super) fd: usize,
    pub(super) length: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireRecord {
    pub(super) owner: RecordOwner,
    pub(super) name: String,
    pub(super) offset: u64,
    pub(super) length: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DeviceParams {
    pub(super) device: DeviceId,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Interrupts {
    pub(super) pending: Vec<PendingInterrupt>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Records {
    pub(super) records: Vec<WireRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LoadRecord {
    pub(super) record: WireRecord,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Devices {
    pub(super) devices: Vec<WireDevice>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Blockers {
    pub(super) blockers: Vec<crate::machine::Blocker>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Running {
    pub(super) running: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Barrier {
    pub(super) deadline_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ended {
    pub(super) outcome: String,
}

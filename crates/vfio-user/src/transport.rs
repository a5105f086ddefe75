//! Whole messages over a UNIX stream socket.
//!
//! A [`Connection`] sends and receives with deadlines and bounds. It does not know what messages
//! mean, match replies, or keep two users apart: its owner locks the sending and the receiving side.
//! A body may come in any number of pieces; it is read until it is whole (VU-WHOLE).

use crate::codec::{FrameError, HEADER_SIZE, Header, MAX_FDS};
use airlift_core::Errno;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Sending or receiving failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The peer is gone, or the socket was shut down.
    #[error("the connection is closed")]
    Closed,
    /// No message before the deadline. The connection is still good.
    #[error("no answer before the deadline")]
    TimedOut,
    /// The deadline passed within a message: the connection is of no more use.
    #[error("the peer stopped within a message")]
    Stalled,
    /// The wait was ended by a [`Waker`]. The connection is still good.
    #[error("interrupted")]
    Interrupted,
    /// A header that cannot be.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The system refused a call.
    #[error("socket: {0}")]
    System(Errno),
}

impl From<rustix::io::Errno> for TransportError {
    fn from(errno: rustix::io::Errno) -> Self {
        match errno {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET | rustix::io::Errno::NOTCONN => {
                Self::Closed
            }
            other => Self::System(Errno(other.raw_os_error())),
        }
    }
}

/// Ends a wait for a message from another thread: an eventfd.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// A waker that nobody has used.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        use rustix::event::EventfdFlags;
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Ends the wait that there is, or the next one. Never blocks.
    pub fn wake(&self) {
        // A full counter means that it has been woken often enough.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Forgets that it was used.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A header as it was received, before its payload.
#[derive(Debug)]
pub struct Received {
    /// The header.
    pub header: Header,
    /// Descriptors that came with it, close-on-exec, at most [`MAX_FDS`]; the kernel closes more.
    pub fds: Vec<OwnedFd>,
    /// Set when the message must be refused; its payload must still be read or skipped.
    pub refused: Option<FrameError>,
}

/// One end of a vfio-user connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

/// Longest single wait, so that a deadline far away never overflows what poll takes.
const LONGEST_POLL: Duration = Duration::from_secs(3600);

fn timespec(wait: Duration) -> Timespec {
    let wait = wait.min(LONGEST_POLL);
    Timespec { tv_sec: wait.as_secs().try_into().unwrap_or(3600), tv_nsec: wait.subsec_nanos().into() }
}

impl Connection {
    /// Takes a connected socket. Whether it blocks does not matter.
    #[must_use]
    pub const fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Ends the connection: a call that blocks on either end wakes and fails as closed.
    pub fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }

    /// Whether the peer has closed its end. What it sent before may still be unread.
    #[must_use]
    pub fn peer_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let polled = rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO)));
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        polled.is_err() || fds[0].revents().intersects(gone)
    }

    /// Waits for the socket. `Ok(false)`: the deadline has passed.
    fn wait(
        &self,
        flags: PollFlags,
        deadline: Option<Instant>,
        waker: Option<&Waker>,
    ) -> Result<bool, TransportError> {
        loop {
            let timeout = match deadline {
                None => None,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(false);
                    }
                    Some(timespec(left))
                }
            };
            let mut fds =
                [PollFd::new(&self.stream, flags), PollFd::from_borrowed_fd(self.stream.as_fd(), flags)];
            let number = if let Some(waker) = waker {
                fds[1] = PollFd::new(waker, PollFlags::IN);
                2
            } else {
                1
            };
            match rustix::event::poll(&mut fds[..number], timeout.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => {
                    // What has arrived is taken before an interruption is.
                    if !fds[0].revents().is_empty() {
                        return Ok(true);
                    }
                    return Err(TransportError::Interrupted);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends one message: `parts` in order, with `fds` at its first byte.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] when nothing was sent before the deadline,
    /// [`TransportError::Stalled`] when a part was: the connection must then be given up.
    pub fn send(
        &self,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let mut slices: Vec<IoSlice<'_>> =
            parts.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)).collect();
        let mut left: &mut [IoSlice<'_>] = &mut slices;
        let mut begun = false;
        while !left.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !begun && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(TransportError::System(Errno::E2BIG));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.stream, left, &mut control, flags) {
                Ok(sent) => {
                    begun = begun || sent > 0;
                    IoSlice::advance_slices(&mut left, sent);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, Some(deadline), None)? {
                        let error = if begun { TransportError::Stalled } else { TransportError::TimedOut };
                        return Err(error);
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Receives a header. Payloads up to `limit` bytes are taken; a longer one, and flags that mean
    /// nothing, come back as [`Received::refused`] (VU-BOUND). Without a deadline it waits for ever.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] and [`TransportError::Interrupted`] leave the connection good;
    /// after any other error it must be given up.
    pub fn recv_header(
        &self,
        limit: u32,
        deadline: Option<Instant>,
        waker: Option<&Waker>,
        body_timeout: Duration,
    ) -> Result<Received, TransportError> {
        let mut bytes = [0; HEADER_SIZE];
        let mut fds = Vec::new();
        let mut filled = 0;
        let mut body_deadline = None;
        while filled < HEADER_SIZE {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut iov = [IoSliceMut::new(&mut bytes[filled..])];
            match rustix::net::recvmsg(&self.stream, &mut iov, &mut control, flags) {
                Ok(message) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            // What exceeds the bound is closed here.
                            fds.extend(rights.take(MAX_FDS - fds.len().min(MAX_FDS)));
                        }
                    }
                    if message.bytes == 0 {
                        return Err(TransportError::Closed);
                    }
                    filled += message.bytes;
                    body_deadline = Some(Instant::now() + body_timeout);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if filled == 0 => {
                    if !self.wait(PollFlags::IN, deadline, waker)? {
                        return Err(TransportError::TimedOut);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => {
                    if !self.wait(PollFlags::IN, body_deadline, None)? {
                        return Err(TransportError::Stalled);
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        match Header::decode(bytes, limit) {
            Ok(header) => Ok(Received { header, fds, refused: None }),
            Err((error, Some(header))) => Ok(Received { header, fds, refused: Some(error) }),
            Err((error, None)) => Err(error.into()),
        }
    }

    /// Receives exactly `buf.len()` bytes of a payload, however they come (VU-WHOLE).
    ///
    /// # Errors
    /// [`TransportError::Stalled`] when they are not there before the deadline. After any error the
    /// connection must be given up.
    pub fn recv_exact(&self, buf: &mut [u8], deadline: Instant) -> Result<(), TransportError> {
        let mut filled = 0;
        while filled < buf.len() {
            match rustix::net::recv(&self.stream, &mut buf[filled..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(TransportError::Closed),
                Ok((n, _)) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if !self.wait(PollFlags::IN, Some(deadline), None)? {
                        return Err(TransportError::Stalled);
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Skips `length` bytes of a payload that is not wanted (VU-DRAIN).
    ///
    /// # Errors
    /// As [`recv_exact`](Self::recv_exact).
    pub fn drain(&self, length: u32, deadline: Instant) -> Result<(), TransportError> {
        let mut scratch = [0; 4096];
        let mut left = length;
        while left > 0 {
            let part = left.min(4096);
            self.recv_exact(&mut scratch[..usize::try_from(part).unwrap_or(4096)], deadline)?;
            left -= part;
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const SOON: Duration = Duration::from_secs(20);

    fn pair() -> (Connection, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Connection::new(a), b)
    }

    // VU-WHOLE
    #[test]
    fn a_message_that_comes_byte_by_byte_is_read_whole() {
        let (connection, mut peer) = pair();
        let header = Header::command(7, 9, 5);
        let writer = std::thread::spawn(move || {
            for byte in header.encode().iter().chain(b"hello") {
                peer.write_all(&[*byte]).unwrap();
                std::thread::yield_now();
            }
            peer
        });
        let received = connection.recv_header(64, None, None, SOON).unwrap();
        assert_eq!(received.header, header);
        let mut body = [0; 5];
        connection.recv_exact(&mut body, Instant::now() + SOON).unwrap();
        assert_eq!(&body, b"hello");
        drop(writer.join().unwrap());
        let end = connection.recv_header(64, None, None, SOON).unwrap_err();
        assert_eq!(end, TransportError::Closed);
    }

    #[test]
    fn a_wait_ends_by_its_deadline_a_waker_or_a_shutdown() {
        let (connection, _peer) = pair();
        let wait = |waker| connection.recv_header(64, Some(Instant::now() + SOON), waker, SOON).unwrap_err();
        let now = connection.recv_header(64, Some(Instant::now()), None, SOON).unwrap_err();
        assert_eq!(now, TransportError::TimedOut);
        let waker = Waker::new().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| waker.wake());
            assert_eq!(wait(Some(&waker)), TransportError::Interrupted);
        });
        std::thread::scope(|scope| {
            scope.spawn(|| connection.shutdown());
            assert_eq!(wait(None), TransportError::Closed);
        });
    }

    #[test]
    fn a_sender_that_stops_within_a_message_is_found_out() {
        let (connection, mut peer) = pair();
        peer.write_all(&[1, 2, 3]).unwrap();
        let error = connection.recv_header(64, None, None, Duration::from_millis(5)).unwrap_err();
        assert_eq!(error, TransportError::Stalled);
    }

    // VU-BOUND
    #[test]
    fn surplus_descriptors_are_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let (sender, receiver) = (Connection::new(a), Connection::new(b));
        let (read_end, write_end) = rustix::pipe::pipe().unwrap();
        let fds = [write_end.as_fd(); MAX_FDS];
        let header = Header::command(1, 1, 0).encode();
        sender.send(&[&header], &fds, Instant::now() + SOON).unwrap();
        let received = receiver.recv_header(0, None, None, SOON).unwrap();
        assert_eq!(received.fds.len(), MAX_FDS);
        drop(received);
        drop(write_end);
        // With every copy closed the pipe is at its end.
        assert_eq!(rustix::io::read(&read_end, &mut [0; 1]), Ok(0));
    }
}

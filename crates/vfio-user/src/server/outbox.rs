//! What a connection still has to send: whose turn it is, and the answers that wait.
//!
//! A message is sent whole before the next one begins. Most senders wait for their turn and then for the
//! peer. The device thread must not wait for the second connection, or guest accesses over the first would
//! wait with it (VU-UNREAD): it posts. What the socket does not take at once is kept, in order, and sent by
//! the connection's writing thread; who waits for a turn comes after it.

use super::connection::lock;
use crate::codec::MAX_FDS;
use crate::transport::{Connection, TransportError};
use airlift_core::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many answers may wait before those of further requests have to be made later.
const MAX_ANSWERS: usize = 64;
/// Bytes of them, likewise: what waits is at most one answer more.
const MAX_BYTES: usize = 1 << 20;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Somebody is sending.
    busy: bool,
    closed: bool,
    waiting: VecDeque<Waiting>,
    bytes: usize,
    /// Somebody wants to know when nothing waits any more.
    wanted: bool,
}

/// An answer, or what is left of it.
#[derive(Debug)]
struct Waiting {
    bytes: Vec<u8>,
    /// They go with the first byte: none where that was sent.
    fds: Vec<OwnedFd>,
}

/// The right to send.
pub(super) struct Turn<'a>(&'a Outbox);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).busy = false;
        self.0.changed.notify_all();
    }
}

impl Outbox {
    /// Waits until nobody sends and no answer waits.
    pub(super) fn turn(&self) -> Turn<'_> {
        let mut state = lock(&self.state);
        while state.busy || !state.waiting.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.busy = true;
        Turn(self)
    }

    /// Sends what can be sent at once, and keeps the rest for [`run`](Self::run). Never waits for the peer.
    ///
    /// After an error the connection must be given up.
    pub(super) fn post(
        &self,
        connection: &Connection,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TransportError> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(TransportError::Closed);
        }
        let begun = !state.busy && state.waiting.is_empty();
        let sent = if begun { send_some(connection, parts, fds)? } else { 0 };
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if sent == length {
            return Ok(());
        }
        let fds = if sent > 0 { &[] } else { fds };
        let fds = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<Result<_, _>>();
        let fds = fds.map_err(|_| TransportError::System(Errno::EMFILE))?;
        let bytes = parts.concat().split_off(sent);
        state.bytes += bytes.len();
        state.waiting.push_back(Waiting { bytes, fds });
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether so much waits that no further answer should be made now. Then [`run`](Self::run) tells when
    /// nothing waits any more.
    pub(super) fn is_full(&self) -> bool {
        let mut state = lock(&self.state);
        let full = state.waiting.len() >= MAX_ANSWERS || state.bytes >= MAX_BYTES;
        state.wanted |= full;
        full
    }

    /// The body of the writing thread: sends what was posted, until the end. A peer that does not take an
    /// answer in time loses the connection, and `emptied` is called as if it had.
    pub(super) fn run(&self, connection: &Connection, timeout: Duration, emptied: impl Fn()) {
        while let Some(next) = self.next() {
            let fds: Vec<_> = next.fds.iter().map(AsFd::as_fd).collect();
            let sent = connection.send(&[&next.bytes], &fds, Instant::now() + timeout);
            let mut state = lock(&self.state);
            state.busy = false;
            if let Err(error) = sent {
                tracing::debug!(%error, "answers not sent");
                connection.shutdown();
                state.waiting.clear();
                state.bytes = 0;
            }
            let tell = state.waiting.is_empty() && std::mem::take(&mut state.wanted);
            drop(state);
            self.changed.notify_all();
            if tell {
                emptied();
            }
        }
    }

    /// Waits for an answer and takes it, and the turn with it; `None` at the end.
    fn next(&self) -> Option<Waiting> {
        let mut state = lock(&self.state);
        while !state.closed {
            if !state.busy
                && let Some(next) = state.waiting.pop_front()
            {
                state.busy = true;
                state.bytes -= next.bytes.len();
                return Some(next);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Nothing more is sent.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.waiting.clear();
        state.bytes = 0;
        drop(state);
        self.changed.notify_all();
    }
}

/// Sends as much of a message as the socket takes now; the bytes of it.
fn send_some(
    connection: &Connection,
    parts: &[&[u8]],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, TransportError> {
    let mut slices: Vec<_> = parts.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)).collect();
    let mut left: &mut [IoSlice<'_>] = &mut slices;
    let mut sent = 0;
    while !left.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(TransportError::System(Errno::E2BIG));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(connection, left, &mut control, flags) {
            Ok(n) => {
                sent += n;
                IoSlice::advance_slices(&mut left, n);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SOON: Duration = Duration::from_secs(20);
    /// More than a socket takes.
    const LONG: usize = 4 << 20;

    fn pair() -> (Connection, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        b.set_read_timeout(Some(SOON)).unwrap();
        (Connection::new(a), b)
    }

    /// Ends the writing thread, also of a test that fails.
    struct Closing<'a>(&'a Outbox);

    impl Drop for Closing<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }

    // VU-UNREAD
    #[test]
    fn an_answer_does_not_come_into_the_middle_of_another() {
        let (connection, mut peer) = pair();
        let outbox = Outbox::default();
        let turn = outbox.turn();
        connection.send(&[&[1]], &[], Instant::now() + SOON).unwrap();
        outbox.post(&connection, &[&[3]], &[]).unwrap();
        connection.send(&[&[2]], &[], Instant::now() + SOON).unwrap();
        drop(turn);
        // Behind what waits, with room in the socket.
        outbox.post(&connection, &[&[4]], &[]).unwrap();
        std::thread::scope(|scope| {
            let _closing = Closing(&outbox);
            scope.spawn(|| outbox.run(&connection, SOON, || ()));
            let mut all = [0; 4];
            peer.read_exact(&mut all).unwrap();
            assert_eq!(all, [1, 2, 3, 4]);
        });
    }

    // VU-UNREAD
    #[test]
    fn what_the_socket_does_not_take_is_sent_later_in_order_and_with_its_descriptors() {
        let (connection, mut peer) = pair();
        let outbox = Outbox::default();
        let emptied = AtomicUsize::new(0);
        let (read_end, write_end) = rustix::pipe::pipe().unwrap();
        outbox.post(&connection, &[&[1; 10], &[], &[2; LONG]], &[]).unwrap();
        outbox.post(&connection, &[&[3]], &[write_end.as_fd()]).unwrap();
        drop(write_end);
        assert!(outbox.is_full());
        std::thread::scope(|scope| {
            let _closing = Closing(&outbox);
            scope.spawn(|| {
                outbox.run(&connection, SOON, || {
                    emptied.fetch_add(1, Ordering::Relaxed);
                });
            });
            scope.spawn(|| {
                // Behind what waits.
                let _turn = outbox.turn();
                connection.send(&[&[4]], &[], Instant::now() + SOON).unwrap();
            });
            let mut all = vec![0; 10 + LONG];
            peer.read_exact(&mut all).unwrap();
            assert!(all[..10].iter().all(|b| *b == 1) && all[10..].iter().all(|b| *b == 2));
            let receiver = Connection::new(peer.try_clone().unwrap());
            let mut rest = [0; 2];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut iov = [std::io::IoSliceMut::new(&mut rest[..1])];
            let flags = rustix::net::RecvFlags::CMSG_CLOEXEC;
            rustix::net::recvmsg(&receiver, &mut iov, &mut control, flags).unwrap();
            assert_eq!(control.drain().count(), 1, "the descriptor");
            peer.read_exact(&mut rest[1..]).unwrap();
            assert_eq!(rest, [3, 4]);
        });
        assert_eq!(emptied.load(Ordering::Relaxed), 1);
        assert!(!outbox.is_full());
        drop(read_end);
    }

    // VU-UNREAD
    #[test]
    fn a_peer_that_takes_nothing_loses_the_connection_and_what_waits() {
        let (connection, mut peer) = pair();
        let outbox = Outbox::default();
        for _ in 0..3 {
            outbox.post(&connection, &[&[1; LONG]], &[]).unwrap();
        }
        assert!(outbox.is_full());
        let emptied = || outbox.close();
        outbox.run(&connection, Duration::from_millis(20), emptied);
        assert!(!outbox.is_full());
        drop(outbox.turn());
        assert_eq!(outbox.post(&connection, &[&[1]], &[]), Err(TransportError::Closed));
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        assert!(all.len() < LONG);
    }
}

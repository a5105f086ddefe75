//! One byte stream, TCP or UNIX, with deadlines on every read and write.

use super::LinkError;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connected stream. Reads and writes fail with `WouldBlock` or `TimedOut` when nothing moves for
/// the time set with [`set_silence`](Self::set_silence).
#[derive(Debug)]
pub struct Stream(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self(Kind::Unix(stream))
    }
}

impl TryFrom<TcpStream> for Stream {
    type Error = LinkError;

    /// Takes a connected TCP stream; small messages are sent at once from now on.
    fn try_from(stream: TcpStream) -> Result<Self, LinkError> {
        stream.set_nodelay(true).map_err(|e| LinkError::io("set TCP_NODELAY", &e))?;
        Ok(Self(Kind::Tcp(stream)))
    }
}

impl Stream {
    /// Sets how long a read or a write may wait without a byte moving.
    ///
    /// # Errors
    /// When the socket refuses, or `silence` is zero.
    pub fn set_silence(&self, silence: Duration) -> Result<(), LinkError> {
        match &self.0 {
            Kind::Tcp(s) => {
                s.set_read_timeout(Some(silence)).and_then(|()| s.set_write_timeout(Some(silence)))
            }
            Kind::Unix(s) => {
                s.set_read_timeout(Some(silence)).and_then(|()| s.set_write_timeout(Some(silence)))
            }
        }
        .map_err(|e| LinkError::io("set a timeout", &e))
    }

    /// How long a read may wait without a byte moving; `None`: for ever, or it cannot be told.
    pub(crate) fn silence(&self) -> Option<Duration> {
        match &self.0 {
            Kind::Tcp(s) => s.read_timeout(),
            Kind::Unix(s) => s.read_timeout(),
        }
        .ok()
        .flatten()
    }

    /// Lets reads and writes wait for as long as it takes: for a connection whose life another one
    /// watches.
    ///
    /// # Errors
    /// When the socket refuses.
    pub fn set_patient(&self) -> Result<(), LinkError> {
        match &self.0 {
            Kind::Tcp(s) => s.set_read_timeout(None).and_then(|()| s.set_write_timeout(None)),
            Kind::Unix(s) => s.set_read_timeout(None).and_then(|()| s.set_write_timeout(None)),
        }
        .map_err(|e| LinkError::io("set a timeout", &e))
    }

    /// A second handle to the same stream, so that one thread reads while another writes.
    ///
    /// # Errors
    /// When no file descriptor can be had.
    pub fn try_clone(&self) -> Result<Self, LinkError> {
        match &self.0 {
            Kind::Tcp(s) => s.try_clone().map(Kind::Tcp),
            Kind::Unix(s) => s.try_clone().map(Kind::Unix),
        }
        .map(Self)
        .map_err(|e| LinkError::io("duplicate a connection", &e))
    }

    /// Ends the stream in both directions and wakes whoever waits on it. Errors do not matter: the
    /// stream is then already ended.
    pub fn shutdown(&self) {
        let _ = match &self.0 {
            Kind::Tcp(s) => s.shutdown(Shutdown::Both),
            Kind::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// Ends the writing direction: the other side reads what was sent, then the end.
    pub fn finish(&self) {
        let _ = match &self.0 {
            Kind::Tcp(s) => s.shutdown(Shutdown::Write),
            Kind::Unix(s) => s.shutdown(Shutdown::Write),
        };
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Tcp(s) => s.as_fd(),
            Kind::Unix(s) => s.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(s) => (&*s).read(buf),
            Kind::Unix(s) => (&*s).read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(s) => (&*s).write(buf),
            Kind::Unix(s) => (&*s).write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(s) => (&*s).write_vectored(bufs),
            Kind::Unix(s) => (&*s).write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

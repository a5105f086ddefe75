//! UNIX sockets: to serve on, and connecting to one within a time.

use crate::json::ErrorView;
use airlift_core::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A listening socket whose file is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    /// The socket.
    pub(crate) socket: UnixListener,
    _file: Removed,
}

#[derive(Debug)]
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It may have been removed already.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Listens at `path`. A socket that a killed process left behind is replaced; one on which
    /// somebody listens, and any other file, is refused.
    ///
    /// # Errors
    /// When it is refused, or cannot be made.
    pub(crate) fn bind(path: &Path) -> Result<Self, ErrorView> {
        let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
        if stale {
            // If that fails, so does the bind, and says why.
            let _ = std::fs::remove_file(path);
        }
        match UnixListener::bind(path) {
            Ok(socket) => Ok(Self { socket, _file: Removed(path.to_owned()) }),
            Err(error) => {
                let view = ErrorView::new(format!("cannot listen at {}: {error}", path.display()))
                    .errno(error.raw_os_error().map(Errno));
                Err(match error.kind() {
                    std::io::ErrorKind::AddrInUse => view
                        .advise("another process listens there, or a file is in the way: use another path"),
                    std::io::ErrorKind::NotFound => view.advise("make the directory first"),
                    std::io::ErrorKind::InvalidInput => {
                        view.advise("the path of a UNIX socket has at most 107 bytes: use a shorter one")
                    }
                    _ => view,
                })
            }
        }
    }
}

/// Connects to who listens at `path`, until `deadline`: a listener that takes nobody has a queue that
/// fills, and then a connection waits.
///
/// # Errors
/// The system's; ETIMEDOUT when the time was up.
pub(crate) fn connect(path: &Path, deadline: Instant) -> Result<UnixStream, Errno> {
    let errno = |e: rustix::io::Errno| Errno(e.raw_os_error());
    let address = SocketAddrUnix::new(path).map_err(errno)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.map_err(errno)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::ETIMEDOUT);
        }
        // The kernel bounds a connection by the time for sending.
        set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(errno)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            // The loop's own bound ends it.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(errno(error)),
        }
    }
    set_socket_timeout(&socket, Timeout::Send, None).map_err(errno)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_connection_that_nobody_takes_ends_when_its_time_is_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let soon = |ms| Instant::now() + Duration::from_millis(ms);
        // As many as its queue has room for.
        let mut waiting = vec![connect(&path, soon(10_000)).unwrap()];
        let refused = loop {
            match connect(&path, soon(20)) {
                Ok(stream) if waiting.len() < 8 => waiting.push(stream),
                other => break other.unwrap_err(),
            }
        };
        assert_eq!(refused, Errno::ETIMEDOUT);
        assert_eq!(connect(&dir.path().join("nobody"), soon(10_000)).unwrap_err(), Errno::ENOENT);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let live = Listener::bind(&path).unwrap();
        let refused = Listener::bind(&path).unwrap_err();
        assert_eq!(refused.errno.unwrap().name, "EADDRINUSE");
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(Listener::bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

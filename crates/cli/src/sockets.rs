//! UNIX sockets to serve on.

use crate::json::ErrorView;
use airlift_core::Errno;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

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

#[cfg(test)]
mod tests {
    use super::*;

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

//! Making connections: by address, or by whatever an embedder implements.

use super::{LinkError, Stream, Uri};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Makes connections to the destination. The engine calls it for the control connection, for each
/// data connection, and again when the control connection is lost after COMMIT.
pub trait Connector: Send {
    /// Makes one connection within `deadline`.
    ///
    /// # Errors
    /// When none can be made.
    fn connect(&mut self, deadline: Duration) -> Result<Stream, LinkError>;
}

/// Takes connections of a source.
pub trait Acceptor: Send {
    /// Waits for one connection, at most `deadline`; `None` when none came.
    ///
    /// # Errors
    /// When no connection can be taken any more.
    fn accept(&mut self, deadline: Duration) -> Result<Option<Stream>, LinkError>;
}

/// How addresses are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkOptions {
    /// Allow plain TCP to and from other hosts. Without it, `tcp:` takes loopback addresses only.
    pub insecure: bool,
}

/// Connects to an address.
#[derive(Clone, Debug)]
pub struct UriConnector {
    uri: Uri,
    options: LinkOptions,
}

impl UriConnector {
    /// Connects to `uri`; nothing is opened yet.
    #[must_use]
    pub const fn new(uri: Uri, options: LinkOptions) -> Self {
        Self { uri, options }
    }
}

impl Connector for UriConnector {
    fn connect(&mut self, deadline: Duration) -> Result<Stream, LinkError> {
        let operation = format!("connect {}", self.uri);
        match &self.uri {
            Uri::Unix(path) => {
                // A UNIX connect waits only while the listener's backlog is full.
                UnixStream::connect(path).map(Stream::from).map_err(|e| LinkError::io(operation, &e))
            }
            Uri::Tcp { host, port } => {
                let until = Instant::now() + deadline;
                let mut last = LinkError::new(&operation, "the name has no address");
                for address in resolve(host, *port, &operation)? {
                    guard(&address, self.options, &operation)?;
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(LinkError::new(operation, "no connection before the deadline"));
                    }
                    match TcpStream::connect_timeout(&address, left) {
                        Ok(stream) => return Stream::try_from(stream),
                        Err(e) => last = LinkError::io(&operation, &e),
                    }
                }
                Err(last)
            }
        }
    }
}

fn resolve(host: &str, port: u16, operation: &str) -> Result<Vec<SocketAddr>, LinkError> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    (host, port).to_socket_addrs().map(Iterator::collect).map_err(|e| LinkError::io(operation, &e))
}

fn guard(address: &SocketAddr, options: LinkOptions, operation: &str) -> Result<(), LinkError> {
    if address.ip().is_loopback() || options.insecure {
        return Ok(());
    }
    Err(LinkError::new(
        operation,
        format!(
            "{} is another host and this connection would be neither encrypted nor authenticated; \
                 --insecure allows it on a network that you trust",
            address.ip()
        ),
    ))
}

/// Listens on an address.
#[derive(Debug)]
pub struct UriAcceptor {
    listener: Listener,
    local: Uri,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix { listener: UnixListener, path: PathBuf },
}

impl Drop for UriAcceptor {
    fn drop(&mut self) {
        if let Listener::Unix { path, .. } = &self.listener {
            // The path is ours; that it is gone already does not matter.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl UriAcceptor {
    /// Listens on `uri`. A stale socket at a `unix:` path is replaced; another file is not.
    ///
    /// # Errors
    /// When the address cannot be listened on, or is of another host than loopback without
    /// [`LinkOptions::insecure`].
    pub fn bind(uri: &Uri, options: LinkOptions) -> Result<Self, LinkError> {
        let operation = format!("listen {uri}");
        let io = |e| LinkError::io(&operation, &e);
        match uri {
            Uri::Unix(path) => {
                let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
                if stale {
                    if UnixStream::connect(path).is_ok() {
                        return Err(LinkError::new(operation, "somebody listens there already"));
                    }
                    std::fs::remove_file(path).map_err(io)?;
                }
                let listener = UnixListener::bind(path).map_err(io)?;
                listener.set_nonblocking(true).map_err(io)?;
                Ok(Self { listener: Listener::Unix { listener, path: path.clone() }, local: uri.clone() })
            }
            Uri::Tcp { host, port } => {
                let addresses = resolve(host, *port, &operation)?;
                let first =
                    addresses.first().ok_or_else(|| LinkError::new(&operation, "the name has no address"))?;
                guard(first, options, &operation)?;
                let listener = TcpListener::bind(first).map_err(io)?;
                listener.set_nonblocking(true).map_err(io)?;
                let local = listener.local_addr().map_err(io)?;
                let local = Uri::Tcp { host: local.ip().to_string(), port: local.port() };
                Ok(Self { listener: Listener::Tcp(listener), local })
            }
        }
    }

    /// The address as it is, with the port that the system chose.
    #[must_use]
    pub const fn local_uri(&self) -> &Uri {
        &self.local
    }
}

impl Acceptor for UriAcceptor {
    fn accept(&mut self, deadline: Duration) -> Result<Option<Stream>, LinkError> {
        let operation = format!("accept on {}", self.local);
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let fd = match &self.listener {
                Listener::Tcp(l) => l.as_fd(),
                Listener::Unix { listener, .. } => listener.as_fd(),
            };
            let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match rustix::event::poll(&mut poll, timeout.as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(LinkError::io(operation, &e.into())),
            }
            let accepted = match &self.listener {
                Listener::Tcp(l) => l
                    .accept()
                    .map(|(s, _)| s.set_nonblocking(false).map(|()| s))
                    .map(|r| r.map_err(|e| LinkError::io(&operation, &e)).and_then(Stream::try_from)),
                Listener::Unix { listener, .. } => listener.accept().map(|(s, _)| {
                    s.set_nonblocking(false)
                        .map_err(|e| LinkError::io(&operation, &e))
                        .map(|()| Stream::from(s))
                }),
            };
            match accepted {
                Ok(stream) => return stream.map(Some),
                // The other side can be gone again before it is accepted.
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock
                            | std::io::ErrorKind::ConnectionAborted
                            | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(LinkError::io(operation, &e)),
            }
        }
    }
}

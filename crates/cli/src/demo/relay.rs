//! A relay between the two hosts that can cut every connection through it, as a network does.
//!
//! It exists only with `--cut`. A cut ends all connections at once, and no later one can be made;
//! bytes are never changed.

use super::DemoError;
use airlift::link::Uri;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// One end of a relayed connection.
#[derive(Debug)]
enum End {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl End {
    fn connect(to: &Uri) -> std::io::Result<Self> {
        match to {
            Uri::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port))?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
            Uri::Unix(path) => UnixStream::connect(path).map(Self::Unix),
        }
    }

    fn try_clone(&self) -> std::io::Result<Self> {
        match self {
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
            Self::Unix(s) => s.try_clone().map(Self::Unix),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
        };
    }

    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }

    fn write_all(&mut self, buf: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Tcp(s) => s.write_all(buf),
            Self::Unix(s) => s.write_all(buf),
        }
    }
}

/// What the relay has open. Connections are made under the same lock as the cut, so that none can
/// slip past it.
#[derive(Debug, Default)]
struct Open {
    cut: bool,
    ends: Vec<End>,
}

/// A running relay. It ends with the process.
#[derive(Debug)]
pub(crate) struct Relay {
    uri: Uri,
    open: Arc<Mutex<Open>>,
}

impl Relay {
    /// Relays to `to`, on the same kind of transport; a UNIX socket is made in `dir`.
    ///
    /// # Errors
    /// When it cannot listen.
    pub(crate) fn start(to: &Uri, dir: &Path) -> Result<Self, DemoError> {
        let failed = |e: std::io::Error| DemoError::new(format!("the relay cannot be started: {e}"));
        let open = Arc::new(Mutex::new(Open::default()));
        let shared = Arc::clone(&open);
        let (uri, accept): (_, Box<dyn FnMut() -> std::io::Result<End> + Send>) = match to {
            Uri::Tcp { .. } => {
                let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let accept = move || {
                    let (stream, _) = listener.accept()?;
                    stream.set_nodelay(true)?;
                    Ok(End::Tcp(stream))
                };
                (Uri::Tcp { host: "127.0.0.1".into(), port }, Box::new(accept))
            }
            Uri::Unix(_) => {
                let path = dir.join("relay.sock");
                let listener = UnixListener::bind(&path).map_err(failed)?;
                (Uri::Unix(path), Box::new(move || listener.accept().map(|(s, _)| End::Unix(s))))
            }
        };
        let to = to.clone();
        std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || relay(accept, &to, &shared))
            .map_err(failed)?;
        Ok(Self { uri, open })
    }

    /// Where to connect instead.
    pub(crate) const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Ends every connection, now and from now on.
    pub(crate) fn cut(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.cut = true;
        for end in open.ends.drain(..) {
            end.shutdown(Shutdown::Both);
        }
        drop(open);
        // Wakes the thread, which sees the cut and stops listening. If nobody listens any more, all is well.
        let _ = End::connect(&self.uri);
    }
}

fn relay(mut accept: impl FnMut() -> std::io::Result<End>, to: &Uri, open: &Arc<Mutex<Open>>) {
    while let Ok(near) = accept() {
        let mut state = open.lock().unwrap_or_else(PoisonError::into_inner);
        if state.cut {
            return;
        }
        let made = End::connect(to).and_then(|far| {
            let copies = (near.try_clone()?, far.try_clone()?, near.try_clone()?, far.try_clone()?);
            state.ends.push(far);
            Ok(copies)
        });
        let Ok((near_in, far_out, near_out, far_in)) = made else { continue };
        state.ends.push(near);
        drop(state);
        for (from, to) in [(near_in, far_out), (far_in, near_out)] {
            if std::thread::Builder::new().name("relay".into()).spawn(move || pump(from, to)).is_err() {
                return;
            }
        }
    }
}

fn pump(mut from: End, mut to: End) {
    let mut buf = vec![0; 256 * 1024];
    loop {
        match from.read(&mut buf) {
            Ok(n @ 1..) if to.write_all(&buf[..n]).is_ok() => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // What one side ends, ends for the other; the other direction goes on by itself.
            _ => {
                to.shutdown(Shutdown::Write);
                from.shutdown(Shutdown::Read);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_until_the_cut_and_no_connection_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("far.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let relay = Relay::start(&Uri::Unix(path), dir.path()).unwrap();
        let Uri::Unix(near) = relay.uri() else { panic!("another transport") };

        let mut client = UnixStream::connect(near).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"there").unwrap();
        let mut got = [0; 5];
        server.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"there");
        server.write_all(b"back!").unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"back!");

        relay.cut();
        assert_eq!(client.read(&mut got).unwrap_or(0), 0);
        assert_eq!(server.read(&mut got).unwrap_or(0), 0);
        // The relay's thread may be about to stop listening: until then it ends what it takes.
        if let Ok(mut late) = UnixStream::connect(near) {
            assert_eq!(late.read(&mut got).unwrap_or(0), 0);
        }
    }
}

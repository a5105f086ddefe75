//! The server: makes a [`Device`] migratable, and serves it to one client after the other.
//!
//! ```text
//!  listener --> accept thread --.                        .--> data thread --> Saver, Loader
//!  client  --> reading thread --+--> device thread ------+
//!  migration socket --> reading thread --'   |           '--> replies of region accesses
//!                                            '--> Device
//! ```
//!
//! The device thread is the one that called [`Server::serve`]. It handles requests in their order of
//! arrival. While a [`Done`](crate::Done) is open, requests wait in a queue, except accesses to
//! regions and questions about what the device is; data waits behind a transition, so that a
//! [`Saver`](crate::Saver) or [`Loader`](crate::Loader) never runs during one. Over interface v1 the same
//! session is driven through the migration region, whose accesses wait as data does.
//!
//! The device thread never waits for the migration socket's client: answers that it does not take wait in
//! that connection's outbox, which has a thread of its own, and then its requests do (VU-UNREAD).

mod connection;
mod data;
mod features;
mod operations;
mod outbox;
mod requests;
mod v1;
mod worker;

use crate::codec::DEFAULT_MAX_DATA_XFER_SIZE;
use crate::transport::Waker;
use crate::{Completion, Detach, Device};
use connection::{Conn, Request};
use crossbeam_channel::{Receiver, Sender};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;
use worker::Worker;

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// How long a device may take over one arc, a reset or a change of DMA mappings, and the data
    /// thread over what is queued before an arc. After that the client gets `ETIMEDOUT`, and the
    /// device is taken to be in ERROR. Default: 60 s.
    pub transition_timeout: Duration,
    /// How long a client may take for the rest of a message, for taking a reply and for answering a
    /// DMA message. Default: 10 s.
    pub message_timeout: Duration,
    /// How long a new client may take to send VERSION. Default: 10 s.
    pub handshake_timeout: Duration,
    /// Most bytes of data in one message, in both directions. Default: 1 MiB.
    pub max_data_xfer_size: u32,
    /// Most mappings of a client. Default: 65535.
    pub max_dma_maps: usize,
    /// Most bytes of dirty bitmaps; a log that needs more is refused with `E2BIG`. Default: 64 MiB,
    /// which logs 2 TiB at 4 KiB.
    pub max_log_bytes: u64,
    /// A short MIG_DATA_READ reply is padded with zeroes to the size that was asked for: the sample
    /// client of a widely used C library takes no other (VU-SHORT-READ). Default: off.
    pub pad_short_reads: bool,
    /// Airlift's extensions are offered (`docs/vfio-user-extensions.md`). A device that sets
    /// [`V1Section::whole_transactions`](crate::V1Section::whole_transactions) is not served without them:
    /// one of them is the only way to say it (V1-WHOLE). Default: on.
    pub extensions: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            transition_timeout: Duration::from_secs(60),
            message_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            max_data_xfer_size: DEFAULT_MAX_DATA_XFER_SIZE,
            max_dma_maps: 65535,
            max_log_bytes: 64 << 20,
            pad_short_reads: false,
            extensions: true,
        }
    }
}

/// What the device thread is told.
enum Event {
    /// Somebody connected.
    Incoming(UnixStream),
    /// A client asks.
    Request(Arc<Conn>, Request),
    /// The client has taken all answers on the connection with this number, which was full of them.
    Answered(u64),
    /// A connection ended.
    Closed(u64, Detach),
    /// The device answered the call with this number.
    Completed(u64, Completion),
    /// The data thread has done everything before this number.
    DataIdle(u64),
    /// The server is to end.
    Stop,
}

/// Serves one device over vfio-user, to one client at a time.
pub struct Server {
    device: Box<dyn Device>,
    options: ServerOptions,
    sender: Sender<Event>,
    receiver: Receiver<Event>,
}

/// Ends a server, from any thread.
#[derive(Clone)]
pub struct ServerHandle(Sender<Event>);

impl ServerHandle {
    /// Ends the server: a client that is attached loses its connection, its session is ended as on
    /// any disconnection, and [`Server::serve`] returns. Does nothing when it has ended.
    pub fn stop(&self) {
        let _ = self.0.send(Event::Stop);
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerHandle")
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Server {
    /// A server for this device, which is in RUNNING.
    #[must_use]
    pub fn new(device: Box<dyn Device>, options: ServerOptions) -> Self {
        let (sender, receiver) = crossbeam_channel::unbounded();
        Self { device, options, sender, receiver }
    }

    /// A handle that ends [`serve`](Self::serve).
    #[must_use]
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(self.sender.clone())
    }

    /// Serves clients of `listener`, one after the other, until the handle ends it; gives the device
    /// back. While a client is there, another one is refused: its connection is closed at once, and
    /// the first one notices nothing (VU-ONE-CLIENT). The device's methods run on this thread.
    ///
    /// # Errors
    /// Of kind `InvalidInput`, with a [`DescriptionError`](crate::DescriptionError), when a device that is
    /// described so cannot be served: no client was accepted then. Else when the threads cannot be
    /// started, there is no memory for a migration region, or the listener cannot be used.
    pub fn serve(self, listener: UnixListener) -> io::Result<Box<dyn Device>> {
        listener.set_nonblocking(true)?;
        let waker = Waker::new()?;
        let events = self.sender.clone();
        let ready = self.prepare()?;
        std::thread::scope(|scope| {
            let accepting = &waker;
            std::thread::Builder::new()
                .name("vfu-accept".into())
                .spawn_scoped(scope, move || accept(&listener, accepting, &events))?;
            let result = ready.run(None);
            waker.wake();
            result
        })
    }

    /// Serves one client over a connected socket until it goes, or the handle ends it; gives the
    /// device back. The device's methods run on this thread.
    ///
    /// # Errors
    /// As [`serve`](Self::serve); the connection is closed then.
    pub fn serve_stream(self, stream: UnixStream) -> io::Result<Box<dyn Device>> {
        self.prepare()?.run(Some(stream))
    }

    /// Asks the device what it is, and makes all that can be refused.
    fn prepare(self) -> io::Result<Ready> {
        let (sender, jobs) = crossbeam_channel::unbounded();
        let events = self.sender.clone();
        let worker = Worker::new(self.device, self.options, self.sender, self.receiver, sender)?;
        Ok(Ready { worker, jobs, events })
    }
}

/// A server whose device can be served, before its first client.
struct Ready {
    worker: Worker,
    jobs: Receiver<data::Job>,
    events: Sender<Event>,
}

impl Ready {
    fn run(self, only: Option<UnixStream>) -> io::Result<Box<dyn Device>> {
        let Self { worker, jobs, events } = self;
        let data =
            std::thread::Builder::new().name("vfu-data".into()).spawn(move || data::run(&jobs, &events))?;
        let device = worker.run(only);
        // The worker has dropped its sender: the thread ends with what it is doing.
        if data.join().is_err() {
            tracing::error!("the data thread has panicked");
        }
        Ok(device)
    }
}

fn accept(listener: &UnixListener, waker: &Waker, events: &Sender<Event>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if events.send(Event::Incoming(stream)).is_err() {
                    return;
                }
            }
            Err(error) => {
                let idle = error.kind() == io::ErrorKind::WouldBlock;
                if !idle {
                    tracing::warn!(%error, "a client could not be accepted");
                }
                // Out of descriptors, say: try again a little later.
                let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                let mut fds = [PollFd::new(waker, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
                let polled = if idle {
                    rustix::event::poll(&mut fds, None)
                } else {
                    rustix::event::poll(&mut fds[..1], Some(&pause))
                };
                let broken = polled.is_err_and(|e| e != rustix::io::Errno::INTR);
                if broken || !fds[0].revents().is_empty() {
                    return;
                }
            }
        }
    }
}

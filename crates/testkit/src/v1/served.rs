//! A device that has a number of bytes, to be served over vfio-user by a real server.

use airlift_core::{Arc as StateArc, DeviceState, Errno, MigrationFlags, PrecopyInfo, StateFormat};
use airlift_vfio_user::{
    Attachment, Description, Detach, Device, DmaChange, Done, Loader, MigrationInterface, MigrationSupport,
    Saver, Server, ServerHandle, ServerOptions, V1Section,
};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What a served device has, and how it gives it.
#[derive(Clone, Debug)]
pub struct ServedOptions {
    /// Its data section.
    pub section: V1Section,
    /// Its state.
    pub state: Vec<u8>,
    /// So many bytes of it can be read while it runs.
    pub precopy: usize,
    /// Most bytes of a transaction, above 0; the section bounds it too.
    pub chunk: usize,
    /// The state is given so many times over, from memory that is warm, and what is loaded is counted
    /// and not kept: for measurements. 0: it is given once, and what is loaded is the new state.
    pub repeat: u64,
}

impl ServedOptions {
    /// A device with this state, given in transactions of at most `chunk` bytes, half of them while it
    /// runs.
    #[must_use]
    pub fn new(section: V1Section, state: Vec<u8>, chunk: usize) -> Self {
        let precopy = state.len() / 2;
        Self { section, state, precopy, chunk, repeat: 0 }
    }
}

#[derive(Debug, Default)]
struct Held {
    state: Vec<u8>,
    /// Offset of the next byte to be read, of all repetitions.
    at: u64,
    stopped: bool,
    given: Vec<usize>,
    incoming: Vec<u8>,
    rounds: Vec<usize>,
    taken: u64,
}

#[derive(Clone, Debug)]
struct Shared {
    options: Arc<ServedOptions>,
    held: Arc<Mutex<Held>>,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that can be read up to now.
    fn limit(&self, held: &Held) -> u64 {
        let times = self.options.repeat.max(1);
        if held.stopped {
            return held.state.len() as u64 * times;
        }
        self.options.precopy.min(held.state.len()) as u64
    }
}

/// A device on a socket, with its server in a thread. Dropping it ends the server.
#[derive(Debug)]
pub struct ServedDevice {
    shared: Shared,
    path: PathBuf,
    handle: ServerHandle,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl ServedDevice {
    /// Serves it on a socket in a directory of its own.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn new(options: ServedOptions) -> std::io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("device");
        let listener = UnixListener::bind(&path)?;
        let held = Held { state: options.state.clone(), ..Held::default() };
        let shared = Shared { options: Arc::new(options), held: Arc::new(Mutex::new(held)) };
        let server = Server::new(Box::new(Simple(shared.clone())), ServerOptions::default());
        let handle = server.handle();
        let thread = std::thread::spawn(move || drop(server.serve(listener)));
        Ok(Self { shared, path, handle, thread: Some(thread), _directory: directory })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its state: what it was made with, or what was loaded since.
    #[must_use]
    pub fn state(&self) -> Vec<u8> {
        self.shared.held().state.clone()
    }

    /// Bytes of each transaction that it gave, since it was saved last.
    #[must_use]
    pub fn given(&self) -> Vec<usize> {
        self.shared.held().given.clone()
    }

    /// Bytes of each round that it was given.
    #[must_use]
    pub fn rounds(&self) -> Vec<usize> {
        self.shared.held().rounds.clone()
    }

    /// Bytes that it was given in all.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.shared.held().taken
    }
}

impl Drop for ServedDevice {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // A server that has panicked has said so.
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct Simple(Shared);

impl Device for Simple {
    fn describe(&self) -> Description {
        Description {
            regions: Vec::new(),
            irqs: Vec::new(),
            pci: None,
            migration: Some(MigrationSupport {
                interface: MigrationInterface::V1(self.0.options.section.clone()),
                flags: MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY,
                dma_logging: false,
                reinit: false,
            }),
            format: StateFormat {
                name: "testkit".into(),
                version: 1,
                accepts: vec![1],
                interfaces: Vec::new(),
            },
        }
    }

    fn attach(&mut self, _attachment: Attachment) {}

    fn detach(&mut self, _why: Detach) {}

    fn region_read(&mut self, _region: u32, _offset: u64, _buf: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn dma_changed(&mut self, _change: DmaChange, done: Done) {
        done.ok();
    }

    fn reset(&mut self, done: Done) {
        *self.0.held() = Held::default();
        done.ok();
    }

    fn transition(&mut self, arc: StateArc, done: Done) {
        let mut held = self.0.held();
        held.stopped = arc.to == DeviceState::StopCopy;
        if arc.from == DeviceState::Resuming {
            held.state = std::mem::take(&mut held.incoming);
        }
        drop(held);
        done.ok();
    }

    fn saver(&mut self) -> Result<Box<dyn Saver>, Errno> {
        let mut held = self.0.held();
        held.at = 0;
        held.given.clear();
        drop(held);
        Ok(Box::new(Self(self.0.clone())))
    }

    fn loader(&mut self) -> Result<Box<dyn Loader>, Errno> {
        let mut held = self.0.held();
        held.incoming.clear();
        held.rounds.clear();
        held.taken = 0;
        drop(held);
        Ok(Box::new(Self(self.0.clone())))
    }
}

impl Saver for Simple {
    fn precopy_info(&mut self) -> PrecopyInfo {
        let held = self.0.held();
        let left = self.0.limit(&held).saturating_sub(held.at);
        PrecopyInfo { initial_bytes: left, dirty_bytes: 0, reinit: false }
    }

    fn stop_copy_size(&mut self) -> u64 {
        let held = self.0.held();
        (held.state.len() as u64 * self.0.options.repeat.max(1)).saturating_sub(held.at)
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut held = self.0.held();
        let left = self.0.limit(&held).saturating_sub(held.at);
        let size = held.state.len() as u64;
        let Some(from) = held.at.checked_rem(size) else { return Ok(0) };
        let most = buf.len().min(self.0.options.chunk) as u64;
        let from = usize::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        let count = usize::try_from(left.min(most)).map_err(|_| Errno::EOVERFLOW)?;
        let end = held.state.len().min(from + count);
        let part = held.state.get(from..end).unwrap_or_default();
        buf.get_mut(..part.len()).ok_or(Errno::EINVAL)?.copy_from_slice(part);
        let count = part.len();
        held.at += count as u64;
        if count > 0 && self.0.options.repeat == 0 {
            held.given.push(count);
        }
        Ok(count)
    }
}

impl Loader for Simple {
    fn write(&mut self, data: &[u8]) -> Result<(), Errno> {
        let mut held = self.0.held();
        held.taken += data.len() as u64;
        if self.0.options.repeat == 0 {
            held.incoming.extend_from_slice(data);
            held.rounds.push(data.len());
        }
        Ok(())
    }
}

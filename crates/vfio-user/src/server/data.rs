//! The data thread: reads from savers and writes to loaders, away from guest accesses.
//!
//! It takes jobs in order. Whether a request fits the device's state was checked before; what stands
//! in the data is the device's.

use super::Event;
use super::connection::{Conn, Request};
use super::v1::{Chunk, Task, V1Region};
use crate::codec::{FeatureFlags, FeatureHeader, Header, MigData, PrecopyInfoReply, RegionAccess, feature};
use crate::{Loader, Saver};
use airlift_core::Errno;
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::IntoBytes;

/// Bytes of the head of an access to a region.
const ACCESS: usize = size_of::<RegionAccess>();

/// What the data thread is to do.
pub(super) enum Job {
    /// A session begins.
    Save(Result<Box<dyn Saver>, Errno>),
    /// A session begins. The flag is set when a write has failed.
    Load(Result<Box<dyn Loader>, Errno>, Arc<AtomicBool>),
    /// Reads up to this many bytes for the client; `whole`: a short answer is padded with zeroes.
    Read { conn: Arc<Conn>, request: Request, size: u32, padded: bool },
    /// Writes the request's data.
    Write { conn: Arc<Conn>, request: Request },
    /// Does what an access to the migration region asks for.
    Region { conn: Arc<Conn>, request: Request, region: Arc<V1Region>, task: Task },
    /// Answers PRECOPY_INFO.
    Info { conn: Arc<Conn>, header: Header },
    /// Answers MIG_DATA_SIZE.
    Size { conn: Arc<Conn>, header: Header },
    /// Says when everything before is done.
    Barrier(u64),
    /// Ends the session, and says so; what it left in the region is forgotten.
    End { token: u64, region: Option<Arc<V1Region>> },
}

/// What is open.
pub(super) enum Session {
    None,
    Save(Box<dyn Saver>),
    Load(Box<dyn Loader>, Arc<AtomicBool>),
    /// The device refused to open a session, or a write failed: everything gets this answer.
    Failed(Errno),
}

/// The thread's body: until all senders are gone.
pub(super) fn run(jobs: &Receiver<Job>, events: &Sender<Event>) {
    let mut session = Session::None;
    let mut buffer = Vec::new();
    let mut chunk = Chunk::default();
    for job in jobs {
        match job {
            Job::Save(Ok(saver)) => session = Session::Save(saver),
            Job::Load(Ok(loader), spoiled) => session = Session::Load(loader, spoiled),
            Job::Save(Err(errno)) => session = Session::Failed(errno),
            Job::Load(Err(errno), spoiled) => {
                spoiled.store(true, Ordering::Release);
                session = Session::Failed(errno);
            }
            Job::Read { conn, request, size, padded } => {
                let size = usize::try_from(size).unwrap_or(0);
                if buffer.len() < size {
                    buffer.resize(size, 0);
                }
                match read(&mut session, &mut buffer[..size]) {
                    Ok(filled) => {
                        let shown = if padded { size } else { filled };
                        buffer[filled..shown].fill(0);
                        let length = u32::try_from(filled).unwrap_or(0);
                        let head = MigData { argsz: length + 8, size: length };
                        conn.deliver(request.header, Ok(&[head.as_bytes(), &buffer[..shown]]));
                    }
                    Err(errno) => conn.deliver(request.header, Err(errno)),
                }
            }
            Job::Write { conn, request } => {
                match write(&mut session, request.payload.get(8..).unwrap_or_default()) {
                    Ok(()) => conn.deliver(request.header, Ok(&[])),
                    Err(errno) => conn.deliver(request.header, Err(errno)),
                }
            }
            Job::Region { conn, request, region, task } => {
                let (access, written) = request.payload.split_at(request.payload.len().min(ACCESS));
                match chunk.run(&mut session, &region, task, written) {
                    Ok(data) => conn.deliver(request.header, Ok(&[access, &data])),
                    Err(errno) => conn.deliver(request.header, Err(errno)),
                }
            }
            Job::Info { conn, header } => info(&mut session, &conn, header),
            Job::Size { conn, header } => {
                if let Session::Save(saver) = &mut session {
                    let head = FeatureHeader::new(16, feature::MIG_DATA_SIZE, FeatureFlags::GET);
                    let length = saver.stop_copy_size();
                    conn.deliver(header, Ok(&[head.as_bytes(), length.as_bytes()]));
                } else {
                    conn.deliver(header, Err(Errno::EINVAL));
                }
            }
            Job::Barrier(token) => {
                let _ = events.send(Event::DataIdle(token));
            }
            Job::End { token, region } => {
                session = Session::None;
                buffer = Vec::new();
                chunk = Chunk::default();
                let _ = events.send(Event::DataIdle(token));
                // Beside the arc that waited for this: no session begins to load before it is done.
                if let Some(region) = region {
                    region.wipe();
                }
            }
        }
    }
}

/// Fills the buffer as far as there is data: a short answer means that there is no more (VU-SHORT-READ).
fn read(session: &mut Session, buffer: &mut [u8]) -> Result<usize, Errno> {
    let saver = match session {
        Session::Save(saver) => saver,
        Session::Failed(errno) => return Err(*errno),
        Session::None | Session::Load(..) => return Err(Errno::EINVAL),
    };
    let mut filled = 0;
    while filled < buffer.len() {
        let n = saver.read(&mut buffer[filled..])?;
        if n == 0 {
            break;
        }
        filled = filled.saturating_add(n).min(buffer.len());
    }
    Ok(filled)
}

/// The first write that fails ends the session: what comes after it would leave a hole (V2-WRITE-FINAL).
pub(super) fn write(session: &mut Session, data: &[u8]) -> Result<(), Errno> {
    let (loader, spoiled) = match session {
        Session::Load(loader, spoiled) => (loader, spoiled),
        Session::Failed(errno) => return Err(*errno),
        Session::None | Session::Save(_) => return Err(Errno::EINVAL),
    };
    let result = loader.write(data);
    if let Err(errno) = result {
        spoiled.store(true, Ordering::Release);
        *session = Session::Failed(errno);
    }
    result
}

fn info(session: &mut Session, conn: &Conn, header: Header) {
    let saver = match session {
        Session::Save(saver) => saver,
        Session::Failed(errno) => return conn.deliver(header, Err(*errno)),
        Session::None | Session::Load(..) => return conn.deliver(header, Err(Errno::EINVAL)),
    };
    let info = saver.precopy_info();
    let head = FeatureHeader::new(32, feature::PRECOPY_INFO, FeatureFlags::GET);
    let data = PrecopyInfoReply {
        argsz: 24,
        flags: u32::from(info.reinit && conn.wants_reinit()),
        initial_bytes: info.initial_bytes,
        dirty_bytes: info.dirty_bytes,
    };
    conn.deliver(header, Ok(&[head.as_bytes(), data.as_bytes()]));
}

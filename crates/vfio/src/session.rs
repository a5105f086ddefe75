//! The data sessions of interface v2: one descriptor, which the driver reads a device's state from or
//! writes it to.
//!
//! A session and its device share the descriptor, so that it is closed when the device leaves the state
//! that it belongs to (V2-SESSION). What the data holds is the driver's matter.

use crate::VfioOptions;
use crate::error::{ended, protocol};
use crate::sys::{self, Alarm, CallError};
use airlift_core::{
    Chunk, DeviceError, DeviceErrorKind, DeviceState, Errno, LoadSession, Piece, PrecopyInfo, SaveSession,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vfio_bindings::bindings::vfio::VFIO_PRECOPY_INFO_REINIT;

const READ: &str = "read of the data session";
const WRITE: &str = "write of the data session";
const PRECOPY_INFO: &str = "VFIO_MIG_GET_PRECOPY_INFO";

/// How long readiness is waited for until the call is tried again without it: a driver may never say
/// that it is ready (V2-POLL).
const HINT: Duration = Duration::from_millis(100);
/// Longest pause before a driver is asked again that says it is ready and is not.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Save,
    Load,
}

impl Direction {
    /// Whether a session of this direction is open in `state`.
    const fn spans(self, state: DeviceState) -> bool {
        match self {
            Self::Save => state.is_saving(),
            Self::Load => matches!(state, DeviceState::Resuming),
        }
    }
}

/// What all sessions of a device have in common.
#[derive(Clone, Debug)]
pub(crate) struct Manner {
    /// Whose calls the device's interrupter ends.
    pub(crate) alarm: Alarm,
    /// The bounds of waits.
    pub(crate) options: VfioOptions,
    /// The driver was told to announce new initial data (V2-REINIT).
    pub(crate) reinit: bool,
}

impl Manner {
    /// Makes a read or write that may have to be repeated, until it makes progress or the time is up
    /// (V2-SHORT). It belongs to a call that began at so many `rings` of the alarm.
    fn transfer(
        &self,
        rings: u64,
        fd: BorrowedFd<'_>,
        events: PollFlags,
        mut once: impl FnMut() -> rustix::io::Result<usize>,
    ) -> Result<usize, CallError> {
        let mut pause = Duration::ZERO;
        self.alarm.call_since(rings, self.options.data_timeout, || {
            loop {
                match once() {
                    Ok(bytes) => return Ok(bytes),
                    Err(rustix::io::Errno::AGAIN) => wait(fd, events, &mut pause).map_err(number)?,
                    Err(error) => return Err(number(error)),
                }
            }
        })
    }
}

fn number(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}

/// Waits until `fd` says that it is ready, or for a while. A driver that says so at once, although it
/// has just answered EAGAIN, gets longer and longer pauses.
fn wait(fd: BorrowedFd<'_>, events: PollFlags, pause: &mut Duration) -> rustix::io::Result<()> {
    let timespec = |time: Duration| Timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
    if poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timespec(HINT)))? == 0 {
        *pause = Duration::ZERO;
        return Ok(());
    }
    if !pause.is_zero() {
        poll(&mut [], Some(&timespec(*pause)))?;
    }
    *pause = (*pause * 2).clamp(Duration::from_millis(1), MAX_PAUSE);
    Ok(())
}

/// The descriptor of a data session, shared by the device and the session.
#[derive(Debug)]
pub(crate) struct DataFile {
    direction: Direction,
    manner: Manner,
    shared: Mutex<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `None` when the session is over. A call under way has its own share, so that closing waits for none.
    fd: Option<Arc<OwnedFd>>,
    /// The state, which decides what an answer means.
    state: DeviceState,
    /// Why nothing more is asked of the session.
    failed: Option<DeviceError>,
    /// STOP_COPY has given everything.
    ended: bool,
    /// The driver has no GET_PRECOPY_INFO.
    no_info: bool,
}

impl DataFile {
    /// The session that an arc to `state` has opened.
    pub(crate) fn new(fd: OwnedFd, direction: Direction, state: DeviceState, manner: Manner) -> Self {
        // So that a driver that has to wait says EAGAIN. One that cannot do so blocks, and is interrupted.
        if let Err(error) = fcntl_getfl(&fd).and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK)) {
            tracing::warn!(%error, "a data session cannot be set to O_NONBLOCK");
        }
        let shared = Shared { fd: Some(Arc::new(fd)), state, failed: None, ended: false, no_info: false };
        Self { direction, manner, shared: Mutex::new(shared) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device is now in `state`. `false`: it has left the session, which is closed (V2-SESSION).
    pub(crate) fn moved(&self, state: DeviceState) -> bool {
        let stays = self.direction.spans(state);
        if stays {
            self.lock().state = state;
        } else {
            self.close();
        }
        stays
    }

    /// Closes the descriptor: the session is over (V2-AFTER-END).
    pub(crate) fn close(&self) {
        let fd = self.lock().fd.take();
        drop(fd);
    }

    /// Why the device must not be asked to take in what was written (V2-WRITE-FINAL).
    pub(crate) fn load_failure(&self) -> Option<DeviceError> {
        let failed = self.lock().failed.clone();
        failed.filter(|_| self.direction == Direction::Load)
    }

    /// The descriptor for one call, and the state in which it is made.
    fn begin(&self, operation: &str) -> Result<(Arc<OwnedFd>, DeviceState), DeviceError> {
        let shared = self.lock();
        if let Some(failed) = &shared.failed {
            let message = format!("the session is over, because it has failed before: {}", failed.message);
            return Err(DeviceError { operation: operation.into(), message, ..failed.clone() });
        }
        let fd = shared.fd.as_ref().map(|fd| (Arc::clone(fd), shared.state));
        fd.ok_or_else(|| misuse(operation, "the session is over: the device has left its state"))
    }

    /// Nothing more is asked of the session.
    fn fail(&self, error: DeviceError) -> DeviceError {
        self.lock().failed.get_or_insert(error).clone()
    }
}

pub(crate) fn misuse(operation: &str, message: &str) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Misuse, operation, message)
}

/// What the answer to a read means in `state` (V2-ENOMSG, V2-END).
fn meaning(state: DeviceState, answer: Result<usize, CallError>) -> Result<Piece, DeviceError> {
    let stopped = state == DeviceState::StopCopy;
    match answer {
        Ok(0) if stopped => Ok(Piece::End),
        Ok(0) => Ok(Piece::Drained),
        Ok(len) => Ok(Piece::Data { len, chunk: Chunk::Stream }),
        Err(CallError::Errno(Errno::ENOMSG)) if stopped => Err(DeviceError {
            errno: Some(Errno::ENOMSG),
            ..protocol(READ, "the driver says in STOP_COPY that there may be more later")
        }),
        Err(CallError::Errno(Errno::ENOMSG)) => Ok(Piece::Drained),
        Err(error) => Err(ended(READ, error)),
    }
}

/// Reads a device's state.
#[derive(Debug)]
pub(crate) struct Save(pub(crate) Arc<DataFile>);

impl Drop for Save {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl SaveSession for Save {
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let file = &self.0;
        let (fd, state) = file.begin(PRECOPY_INFO)?;
        if state == DeviceState::StopCopy {
            // V2-PRECOPY-INFO
            return Err(misuse(PRECOPY_INFO, "it is asked in PRE_COPY states only"));
        }
        if file.lock().no_info {
            return Ok(None);
        }
        let manner = &file.manner;
        match manner.alarm.call(manner.options.answer_timeout, || sys::precopy_info(fd.as_fd())) {
            Ok((flags, initial_bytes, dirty_bytes)) => Ok(Some(PrecopyInfo {
                initial_bytes,
                dirty_bytes,
                // Without the opt-in the driver leaves the flags as they were (V2-REINIT).
                reinit: manner.reinit && flags & VFIO_PRECOPY_INFO_REINIT != 0,
            })),
            Err(CallError::Errno(Errno::ENOTTY)) => {
                file.lock().no_info = true;
                Ok(None)
            }
            Err(error) => Err(ended(PRECOPY_INFO, error)),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError> {
        if buf.is_empty() {
            return Err(misuse(READ, "a read into an empty buffer"));
        }
        let file = &self.0;
        let rings = file.manner.alarm.rings();
        let (fd, state) = file.begin(READ)?;
        if file.lock().ended {
            return Ok(Piece::End);
        }
        let once = || rustix::io::read(&*fd, &mut *buf);
        let answer = file.manner.transfer(rings, fd.as_fd(), PollFlags::IN, once);
        let piece = meaning(state, answer).map_err(|error| file.fail(error))?;
        if piece == Piece::End {
            file.lock().ended = true;
        }
        Ok(piece)
    }
}

/// Writes a device's state.
#[derive(Debug)]
pub(crate) struct Load(pub(crate) Arc<DataFile>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl LoadSession for Load {
    fn begin_chunk(&mut self, _total: u64) -> Result<(), DeviceError> {
        self.0.begin(WRITE).map(drop)
    }

    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let file = &self.0;
        let (fd, _) = file.begin(WRITE)?;
        let rings = file.manner.alarm.rings();
        let mut rest = data;
        while !rest.is_empty() {
            let once = || rustix::io::write(&*fd, rest);
            match file.manner.transfer(rings, fd.as_fd(), PollFlags::OUT, once) {
                Ok(0) => return Err(file.fail(protocol(WRITE, "the driver took nothing and gave no error"))),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) => return Err(file.fail(ended(WRITE, error))),
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        self.0.begin(WRITE).map(drop)
    }
}

#[cfg(test)]
mod tests;

//! The VMM's end: answers the requests of one connection out of a [`Machine`](crate::machine::Machine).
//!
//! For a VMM in Rust. It calls the machine on the thread that called [`serve`], one request at a
//! time. A request that the machine refuses is answered with its error and the connection goes on; a
//! line that is not of the protocol ends it.

use super::VmmServer;
use super::bitmap::{SharedBitmap, bitmap_bytes};
use super::client::{read_record, record_file};
use super::wire::{
    Answer, Barrier, Blockers, DeviceParams, Devices, Ended, Hello, Interrupts, Line, LineChannel,
    LoadRecord, PROTOCOL, Records, Request, Running, WireBitmap, WireDevice, WireError, WireMemory,
    WireRecord, WireRegion,
};
use crate::machine::{MachineError, MachineMemory, MachineRecord};
use airlift_core::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long the other side may take over one line, once it has begun it.
const LINE_TIME: Duration = Duration::from_secs(30);

/// How a connection ended.
#[derive(Debug)]
pub enum ServeEnd {
    /// The migration process closed it. The guest is as the last verb left it.
    Closed {
        /// The last outcome that it reported with `migration_ended`; `None` when it reported none,
        /// as when it was killed.
        outcome: Option<String>,
    },
    /// It broke the protocol or the socket failed.
    Broken(WireError),
}

/// Answers requests on `stream` until the other side closes it. Blocks; to end it from another
/// thread, shut the socket down.
///
/// If dirty tracking was started and not stopped, it is stopped at the end (VMM-HANGUP); nothing
/// else of the machine is changed.
pub fn serve<M: VmmServer + ?Sized>(machine: &mut M, stream: UnixStream, name: &str) -> ServeEnd {
    let mut session = Session { machine, name, greeted: false, bitmap: None, outcome: None };
    let mut channel = LineChannel::new(stream);
    let end = loop {
        if let Err(error) = step(&mut session, &mut channel) {
            break match error {
                WireError::Closed if !channel.in_line() => {
                    ServeEnd::Closed { outcome: session.outcome.take() }
                }
                error => ServeEnd::Broken(error),
            };
        }
    };
    if session.bitmap.take().is_some()
        && let Err(error) = session.machine.stop_dirty()
    {
        tracing::warn!(%error, "dirty tracking could not be stopped after the migration process went");
    }
    end
}

fn step<M: VmmServer + ?Sized>(
    session: &mut Session<'_, M>,
    channel: &mut LineChannel,
) -> Result<(), WireError> {
    channel.wait_readable(None)?;
    let Line { text, fds } = channel.receive(Instant::now() + LINE_TIME)?;
    let request: Request<Value> = match serde_json::from_slice(&text) {
        Ok(request) => request,
        Err(error) => {
            let malformed = WireError::Malformed(error.to_string());
            let error = refused("request", Errno::EPROTO, malformed.to_string());
            let answer = Answer { id: 0, ok: None, error: Some(error) };
            channel.send(&answer, &[], Instant::now() + LINE_TIME)?;
            return Err(malformed);
        }
    };
    let result = session.answer(&request.verb, request.params.unwrap_or(Value::Null), fds);
    let sent = match result {
        Ok((value, fds)) => {
            let answer = Answer { id: request.id, ok: Some(value), error: None };
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            channel.send(&answer, &borrowed, Instant::now() + LINE_TIME)
        }
        Err(error) => send_error(channel, request.id, error),
    };
    match sent {
        // Nothing of it was sent: the request still gets its one answer.
        Err(error @ (WireError::LineTooLong | WireError::TooManyFds)) => {
            let error = refused(&request.verb, error.errno(), format!("the answer cannot be sent: {error}"));
            send_error(channel, request.id, error)
        }
        sent => sent,
    }
}

fn send_error(channel: &mut LineChannel, id: u64, error: MachineError) -> Result<(), WireError> {
    channel.send(&Answer { id, ok: None, error: Some(error) }, &[], Instant::now() + LINE_TIME)
}

struct Session<'m, M: VmmServer + ?Sized> {
    machine: &'m mut M,
    name: &'m str,
    greeted: bool,
    bitmap: Option<SharedBitmap>,
    outcome: Option<String>,
}

type Answered = Result<(Value, Vec<OwnedFd>), MachineError>;

impl<M: VmmServer + ?Sized> Session<'_, M> {
    fn answer(&mut self, verb: &str, params: Value, fds: Vec<OwnedFd>) -> Answered {
        if !self.greeted && verb != "hello" {
            return Err(refused(verb, Errno::EPROTO, "the first request must be hello".into()));
        }
        match verb {
            "hello" => self.hello(parse(verb, params)?),
            "devices" => self.devices(),
            "blockers" => content(verb, &Blockers { blockers: self.machine.blockers()? }),
            "memory_layout" => content(verb, &self.machine.memory_layout()?),
            "memory" => self.memory(),
            "iova_map" => {
                let DeviceParams { device } = parse(verb, params)?;
                content(verb, &self.machine.iova_map(&device)?)
            }
            "start_dirty" => self.start_dirty(),
            "sync_dirty" => self.sync_dirty(),
            "stop_dirty" => {
                self.bitmap = None;
                done(self.machine.stop_dirty())
            }
            "pause" => done(self.machine.pause()),
            "resume" => done(self.machine.resume()),
            "close_device_access" => done(self.machine.close_device_access()),
            "open_device_access" => done(self.machine.open_device_access()),
            "drain_interrupts" => content(verb, &Interrupts { pending: self.machine.drain_interrupts()? }),
            "inject_interrupts" => {
                let Interrupts { pending } = parse(verb, params)?;
                done(self.machine.inject_interrupts(&pending))
            }
            "save_records" => self.save_records(),
            "load_record" => self.load_record(parse(verb, params)?, fds),
            "release_shared" => done(self.machine.release_shared()),
            "reclaim_shared" => done(self.machine.reclaim_shared()),
            "device_was_reset" => {
                let DeviceParams { device } = parse(verb, params)?;
                done(self.machine.device_was_reset(&device))
            }
            "running" => content(verb, &Running { running: self.machine.running()? }),
            "external_memory_barrier" => {
                let Barrier { deadline_ms } = parse(verb, params)?;
                done(self.machine.external_memory_barrier(Duration::from_millis(deadline_ms)))
            }
            "migration_ended" => {
                let Ended { outcome } = parse(verb, params)?;
                self.machine.migration_ended(&outcome);
                self.outcome = Some(outcome);
                done(Ok(()))
            }
            _ => Err(refused(verb, Errno::EOPNOTSUPP, "this verb is not known".into())),
        }
    }

    fn hello(&mut self, theirs: Hello) -> Answered {
        if theirs.protocol != PROTOCOL {
            let message = format!("protocol {} is not spoken here, {PROTOCOL} is", theirs.protocol);
            return Err(refused("hello", Errno::EPROTO, message));
        }
        tracing::info!(peer = %theirs.name, "a migration process greets");
        self.greeted = true;
        content("hello", &Hello { protocol: PROTOCOL, name: self.name.to_owned() })
    }

    fn devices(&mut self) -> Answered {
        let mut devices = Vec::new();
        let mut fds = Vec::new();
        for handle in self.machine.devices()? {
            devices.push(WireDevice { id: handle.id, kind: handle.kind, fd: fds.len() });
            fds.push(handle.fd);
        }
        Ok((content("devices", &Devices { devices })?.0, fds))
    }

    fn memory(&mut self) -> Answered {
        if matches!(self.machine.memory()?, MachineMemory::External) {
            return content("memory", &WireMemory::External);
        }
        let files = self.machine.memory_files()?.ok_or_else(|| {
            MachineError::new("memory", "the engine moves memory, and the machine has no files for it")
        })?;
        let mut regions = Vec::new();
        let mut fds = Vec::new();
        for file in files {
            regions.push(WireRegion { id: file.region, fd: fds.len(), offset: file.offset });
            fds.push(file.fd);
        }
        Ok((content("memory", &WireMemory::Engine { regions })?.0, fds))
    }

    fn start_dirty(&mut self) -> Answered {
        let layout = self.machine.memory_layout()?;
        let (bitmap, memory) = SharedBitmap::create(&layout)?;
        let fd = memory
            .try_clone_fd()
            .map_err(|e| MachineError::new("start_dirty", format!("dirty bitmap: {e}")))?;
        self.machine.start_dirty()?;
        self.bitmap = Some(bitmap);
        let answer = WireBitmap { fd: 0, length: bitmap_bytes(&layout).max(8) };
        Ok((content("start_dirty", &answer)?.0, vec![fd]))
    }

    fn sync_dirty(&mut self) -> Answered {
        let bitmap = self
            .bitmap
            .as_ref()
            .ok_or_else(|| MachineError::new("sync_dirty", "dirty tracking was not started"))?;
        let mut outside = None;
        self.machine.sync_dirty(&mut |range| {
            if let Err(error) = bitmap.set(range) {
                outside = Some(error);
            }
        })?;
        done(outside.map_or(Ok(()), Err))
    }

    fn save_records(&mut self) -> Answered {
        let saved = self.machine.save_records()?;
        if saved.is_empty() {
            return content("save_records", &Records { records: Vec::new() });
        }
        let file = record_file(&saved).map_err(|message| MachineError::new("save_records", message))?;
        let mut offset = 0;
        let mut records = Vec::with_capacity(saved.len());
        for MachineRecord { owner, name, data } in saved {
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            records.push(WireRecord { owner, name, offset, length });
            offset += length;
        }
        Ok((content("save_records", &Records { records })?.0, vec![file.into()]))
    }

    fn load_record(&mut self, params: LoadRecord, fds: Vec<OwnedFd>) -> Answered {
        let LoadRecord { record } = params;
        let fd = fds.into_iter().next().ok_or_else(|| {
            refused("load_record", Errno::EPROTO, "the record's content did not come with it".into())
        })?;
        let data = read_record(&File::from(fd), &record)
            .map_err(|message| refused("load_record", Errno::EPROTO, message))?;
        done(self.machine.load_record(&MachineRecord { owner: record.owner, name: record.name, data }))
    }
}

fn refused(verb: &str, errno: Errno, message: String) -> MachineError {
    MachineError { operation: verb.to_owned(), message, errno: Some(errno) }
}

fn parse<T: DeserializeOwned>(verb: &str, params: Value) -> Result<T, MachineError> {
    serde_json::from_value(params).map_err(|e| refused(verb, Errno::EINVAL, format!("params: {e}")))
}

fn content<T: Serialize>(verb: &str, value: &T) -> Answered {
    let value =
        serde_json::to_value(value).map_err(|e| MachineError::new(verb, format!("the answer: {e}")))?;
    Ok((value, Vec::new()))
}

fn done(result: Result<(), MachineError>) -> Answered {
    result.map(|()| (Value::Object(serde_json::Map::new()), Vec::new()))
}

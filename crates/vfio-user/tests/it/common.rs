//! A small device that a test steers and watches, and a server for it.
#![allow(dead_code, reason = "each test file uses a part of it")]

use airlift_core::{
    Arc as StateArc, DeviceId, DeviceState, Errno, Interface, MigrationFlags, PrecopyInfo, StateFormat,
};
use airlift_vfio_user::{
    Attachment, Client, ClientOptions, Description, DescriptionError, Detach, Device, DmaChange, Done,
    IrqDescription, Loader, MigrationInterface, MigrationSupport, PciIds, RegionAreas, RegionDescription,
    RegionMapping, Saver, Server, ServerHandle, ServerOptions, V1Section, VfioUserDevice,
};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const SOON: Duration = Duration::from_secs(20);

/// What the test sees of the device and how it steers it.
#[derive(Default)]
pub(crate) struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) log: Vec<String>,
    pub(crate) registers: Vec<u8>,
    /// Data for PRE_COPY, and for STOP_COPY after it.
    pub(crate) precopy: VecDeque<u8>,
    pub(crate) stop_copy: VecDeque<u8>,
    /// It is served over interface v1, with this data section.
    pub(crate) v1: Option<V1Section>,
    /// Other interfaces whose data it reads.
    pub(crate) interfaces: Vec<Interface>,
    /// Each read of the saver gives at most this much, if set.
    pub(crate) read_limit: Option<usize>,
    pub(crate) reinit: bool,
    pub(crate) loaded: Vec<u8>,
    /// What each read of the saver gave that gave something.
    pub(crate) reads: Vec<usize>,
    /// Reads of the saver that wait until this is false; and how many have waited.
    pub(crate) block_reads: bool,
    pub(crate) blocked: usize,
    /// All reads of the saver fail with this.
    pub(crate) fail_reads: Option<Errno>,
    /// What each write to the loader had.
    pub(crate) writes: Vec<usize>,
    /// The write that would go beyond this many bytes fails.
    pub(crate) load_limit: Option<usize>,
    pub(crate) load_refused: bool,
    /// Transitions, resets and DMA changes are kept open until the test ends them.
    pub(crate) hold: bool,
    pub(crate) held: Vec<Done>,
    /// The next transition fails like this.
    pub(crate) fail: Option<(Errno, DeviceState)>,
    /// The next transition of this name fails like this, those of other names go well.
    pub(crate) fail_arcs: Vec<(&'static str, Errno, DeviceState)>,
    /// The next transition's answer is dropped.
    pub(crate) forget: bool,
    pub(crate) attachment: Option<Attachment>,
    pub(crate) device_state: Option<DeviceState>,
}

impl State {
    /// How this transition fails, if it is to.
    fn failure(&mut self, name: &str) -> Option<(Errno, DeviceState)> {
        let named = self.fail_arcs.iter().position(|(arc, ..)| *arc == name);
        let (_, errno, at) = match named {
            Some(index) => self.fail_arcs.remove(index),
            None => return self.fail.take(),
        };
        Some((errno, at))
    }
}

impl Control {
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let result = f(&mut self.state.lock().unwrap());
        self.changed.notify_all();
        result
    }

    /// Waits until the condition holds.
    pub(crate) fn until(&self, what: &str, mut condition: impl FnMut(&mut State) -> bool) {
        let deadline = Instant::now() + SOON;
        let mut state = self.state.lock().unwrap();
        while !condition(&mut state) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain for {what}; log: {:?}", state.log);
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.with(|s| s.log.clone())
    }

    pub(crate) fn take_log(&self) -> Vec<String> {
        self.with(|s| std::mem::take(&mut s.log))
    }
}

pub(crate) struct TestDevice {
    pub(crate) control: Arc<Control>,
    /// Its states; with none it cannot be migrated.
    pub(crate) flags: MigrationFlags,
    pub(crate) mapping: Option<(Arc<OwnedFd>, RegionAreas)>,
}

impl TestDevice {
    fn finish(&self, done: Done, what: String, reached: impl FnOnce(&mut State)) {
        self.control.with(|s| {
            s.log.push(what.clone());
            if std::mem::take(&mut s.forget) {
                drop(done);
            } else if let Some((errno, at)) = s.failure(&what) {
                s.device_state = Some(at);
                done.failed(errno, at);
            } else {
                reached(s);
                if s.hold { s.held.push(done) } else { done.ok() }
            }
        });
    }
}

impl Device for TestDevice {
    fn describe(&self) -> Description {
        let region = |index, size, mapping| RegionDescription {
            index,
            size,
            readable: true,
            writable: index != 6,
            mapping,
        };
        let mapping = self.mapping.as_ref().map(|(fd, areas)| RegionMapping {
            fd: Arc::clone(fd),
            offset: 4096,
            areas: areas.clone(),
        });
        let (v1, interfaces) = self.control.with(|s| (s.v1.clone(), s.interfaces.clone()));
        Description {
            regions: vec![region(0, 4096, None), region(2, 1 << 20, mapping), region(6, 512, None)],
            irqs: vec![
                IrqDescription { index: 0, count: 1, maskable: true },
                IrqDescription { index: 2, count: 40, maskable: false },
            ],
            pci: Some(PciIds {
                vendor: 0x1af4,
                device: 0x10ff,
                subsystem_vendor: 0x1234,
                subsystem: 0x5678,
                class: 0x02_80_00,
                revision: 3,
            }),
            migration: (!self.flags.is_empty()).then(|| MigrationSupport {
                interface: v1.map_or(MigrationInterface::V2, MigrationInterface::V1),
                flags: self.flags,
                dma_logging: true,
                reinit: true,
            }),
            format: StateFormat { name: "test".into(), version: 3, accepts: vec![2, 3], interfaces },
        }
    }

    fn attach(&mut self, attachment: Attachment) {
        self.control.with(|s| {
            s.log.push(format!("attach {}", attachment.state));
            s.attachment = Some(attachment);
        });
    }

    fn detach(&mut self, why: Detach) {
        let why = match why {
            Detach::Protocol(_) => "protocol".into(),
            other => format!("{other:?}"),
        };
        self.control.with(|s| {
            s.log.push(format!("detach {why}"));
            s.attachment = None;
        });
    }

    fn region_read(&mut self, region: u32, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        match region {
            0 => self.control.with(|s| buf.copy_from_slice(&s.registers[at..at + buf.len()])),
            // A region that gives its own offsets, for transfers of many messages.
            2 => buf.iter_mut().enumerate().for_each(|(i, b)| *b = u8::try_from((at + i) % 251).unwrap()),
            _ => return Err(Errno::EIO),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        match region {
            0 => self.control.with(|s| s.registers[at..at + data.len()].copy_from_slice(data)),
            2 => self.control.with(|s| s.log.push(format!("write {offset} {}", data.len()))),
            _ => return Err(Errno::EIO),
        }
        Ok(())
    }

    fn dma_changed(&mut self, change: DmaChange, done: Done) {
        let what = match change {
            DmaChange::Mapped { iova, length } => format!("map {iova:#x} {length:#x}"),
            DmaChange::Unmapping { iova, length } => format!("unmap {iova:#x} {length:#x}"),
        };
        self.finish(done, what, |_| ());
    }

    fn reset(&mut self, done: Done) {
        self.finish(done, "reset".into(), |s| s.device_state = Some(DeviceState::Running));
    }

    fn transition(&mut self, arc: StateArc, done: Done) {
        self.finish(done, arc.to_string(), |s| s.device_state = Some(arc.to));
    }

    fn saver(&mut self) -> Result<Box<dyn Saver>, Errno> {
        self.control.with(|s| s.log.push("saver".into()));
        Ok(Box::new(TestSaver(Arc::clone(&self.control))))
    }

    fn loader(&mut self) -> Result<Box<dyn Loader>, Errno> {
        let refused = self.control.with(|s| {
            s.log.push("loader".into());
            s.loaded.clear();
            s.load_refused
        });
        if refused {
            return Err(Errno::ENOMEM);
        }
        Ok(Box::new(TestLoader(Arc::clone(&self.control))))
    }
}

struct TestSaver(Arc<Control>);

impl Saver for TestSaver {
    fn precopy_info(&mut self) -> PrecopyInfo {
        self.0.with(|s| PrecopyInfo {
            initial_bytes: s.precopy.len() as u64,
            dirty_bytes: 0,
            reinit: s.reinit,
        })
    }

    fn stop_copy_size(&mut self) -> u64 {
        self.0.with(|s| (s.precopy.len() + s.stop_copy.len()) as u64)
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Errno> {
        self.0.with(|s| s.blocked += usize::from(s.block_reads));
        self.0.until("the end of a blocked read", |s| !s.block_reads);
        self.0.with(|s| {
            if let Some(errno) = s.fail_reads {
                return Err(errno);
            }
            let stopped = s.device_state == Some(DeviceState::StopCopy);
            let limit = buf.len().min(s.read_limit.unwrap_or(usize::MAX));
            let mut n = 0;
            while n < limit {
                let next = s.precopy.pop_front().or_else(|| stopped.then(|| s.stop_copy.pop_front())?);
                let Some(byte) = next else { break };
                buf[n] = byte;
                n += 1;
            }
            if n > 0 {
                s.reads.push(n);
            }
            Ok(n)
        })
    }
}

impl Drop for TestSaver {
    fn drop(&mut self) {
        self.0.with(|s| s.log.push("saver gone".into()));
    }
}

struct TestLoader(Arc<Control>);

impl Loader for TestLoader {
    fn write(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.0.with(|s| {
            if s.load_limit.is_some_and(|limit| s.loaded.len() + data.len() > limit) {
                return Err(Errno::ENOSPC);
            }
            s.loaded.extend(data);
            s.writes.push(data.len());
            Ok(())
        })
    }
}

impl Drop for TestLoader {
    fn drop(&mut self) {
        self.0.with(|s| s.log.push("loader gone".into()));
    }
}

/// A server on a socket in a directory of its own.
pub(crate) struct Served {
    pub(crate) control: Arc<Control>,
    pub(crate) path: PathBuf,
    handle: ServerHandle,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

pub(crate) const FULL: MigrationFlags = MigrationFlags::all();
/// Those of interface v1.
pub(crate) const V1_FLAGS: MigrationFlags = MigrationFlags::STOP_COPY.union(MigrationFlags::PRE_COPY);

pub(crate) fn control() -> Arc<Control> {
    let control = Arc::new(Control::default());
    control.with(|s| s.registers = vec![0; 4096]);
    control
}

pub(crate) fn serve() -> Served {
    serve_with(FULL, ServerOptions::default())
}

pub(crate) fn serve_with(flags: MigrationFlags, options: ServerOptions) -> Served {
    let control = control();
    serve_device(TestDevice { control, flags, mapping: None }, options)
}

/// A device of interface v1 with this data section.
pub(crate) fn serve_v1(section: V1Section) -> Served {
    serve_v1_with(section, ServerOptions::default())
}

pub(crate) fn serve_v1_with(section: V1Section, options: ServerOptions) -> Served {
    let control = control();
    control.with(|s| s.v1 = Some(section));
    serve_device(TestDevice { control, flags: V1_FLAGS, mapping: None }, options)
}

pub(crate) fn serve_device(device: TestDevice, options: ServerOptions) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let control = Arc::clone(&device.control);
    let server = Server::new(Box::new(device), options);
    let handle = server.handle();
    let thread = std::thread::spawn(move || drop(server.serve(listener).unwrap()));
    Served { control, path, handle, thread: Some(thread), _dir: dir }
}

/// Why a device is not served, over a listener and over a stream: the same, and before anybody attached.
pub(crate) fn refused(
    flags: MigrationFlags,
    v1: Option<V1Section>,
    options: &ServerOptions,
) -> std::io::Error {
    let control = control();
    control.with(|s| s.v1 = v1);
    let server = || {
        let device = TestDevice { control: Arc::clone(&control), flags, mapping: None };
        let server = Server::new(Box::new(device), options.clone());
        // One that serves all the same ends at once.
        server.handle().stop();
        server
    };
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let error = server().serve(listener).map(drop).expect_err("a listener that is served");
    let (_client, stream) = UnixStream::pair().unwrap();
    let same = server().serve_stream(stream).map(drop).expect_err("a stream that is served");
    assert_eq!((error.kind(), error.to_string()), (same.kind(), same.to_string()));
    assert_eq!(control.log(), [""; 0]);
    error
}

/// What is wrong with the description of a device that is not served.
pub(crate) fn cause(error: &std::io::Error) -> &DescriptionError {
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    error.get_ref().and_then(|cause| cause.downcast_ref()).expect("a DescriptionError")
}

impl Served {
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.path, options()).unwrap()
    }

    pub(crate) fn device(&self) -> VfioUserDevice {
        VfioUserDevice::connect(id(), &self.path, options()).unwrap()
    }

    pub(crate) fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    pub(crate) fn stop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Nothing of a test that failed may keep the server.
        self.control.with(|s| {
            s.hold = false;
            s.block_reads = false;
            s.held.clear();
        });
        self.stop();
    }
}

pub(crate) fn id() -> DeviceId {
    DeviceId::new("d0").unwrap()
}

pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        message_timeout: SOON,
        transition_timeout: SOON,
        data_timeout: SOON,
        ..Default::default()
    }
}

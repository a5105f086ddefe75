//! What the kernel tests share: devices made for one test and removed after it, the knobs of our driver,
//! mtty's UART, and whole saves and loads through the public interface.
//!
//! Nothing here asserts what a test is about, except that a helper's own step worked.
#![allow(dead_code, reason = "each test file uses a part of it")]

use airlift_core::{
    Capabilities, DeviceId, DeviceState, LoadSession, MigrationDevice, Piece, SaveSession, Session,
};
use airlift_vfio::{DeviceAddress, DeviceFd, OpenOptions, RegionInfo, VfioDevice, VfioOptions, Way, open};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Long enough that only a failure waits for it.
const SOON: Duration = Duration::from_secs(30);

/// An mdev device of this test, removed when it is dropped. Declared before what opens it, so that it is
/// closed by then.
#[derive(Debug)]
pub(crate) struct Mdev {
    pub(crate) uuid: String,
    path: PathBuf,
}

impl Mdev {
    /// A device of a type under `/sys/class/mdev_bus/PARENT`.
    pub(crate) fn new(parent: &str, kind: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let uuid = format!("a117f700-{:04x}-4000-8000-{number:012x}", std::process::id() & 0xffff);
        let create = format!("/sys/class/mdev_bus/{parent}/mdev_supported_types/{kind}/create");
        fs::write(&create, &uuid).unwrap_or_else(|e| panic!("{create}: {e}"));
        let path = PathBuf::from("/sys/bus/mdev/devices").join(&uuid);
        Self { uuid, path }
    }

    /// A device of our own driver: `kind` is `v2`, `v2-plain` and so on.
    pub(crate) fn ours(kind: &str) -> Self {
        Self::new("airlift", &format!("airlift-{kind}"))
    }

    /// The same with so many bytes of state.
    pub(crate) fn sized(kind: &str, state_size: usize) -> Self {
        let mdev = Self::ours(kind);
        mdev.set("state_size", &state_size.to_string());
        mdev
    }

    /// The kernel's own sample, with 1 or 2 ports.
    pub(crate) fn mtty(ports: u32) -> Self {
        Self::new("mtty", &format!("mtty-{ports}"))
    }

    pub(crate) fn address(&self) -> DeviceAddress {
        DeviceAddress::Mdev(self.uuid.clone())
    }

    pub(crate) fn try_set(&self, knob: &str, value: &str) -> io::Result<()> {
        // One write of at least one byte: an empty text is a line.
        fs::OpenOptions::new()
            .write(true)
            .open(self.path.join("airlift").join(knob))?
            .write_all(format!("{value}\n").as_bytes())
    }

    pub(crate) fn set(&self, knob: &str, value: &str) {
        self.try_set(knob, value).unwrap_or_else(|e| panic!("{knob} = {value:?}: {e}"));
    }

    pub(crate) fn get(&self, knob: &str) -> String {
        let path = self.path.join("airlift").join(knob);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
    }

    pub(crate) fn number(&self, knob: &str) -> u64 {
        let text = self.get(knob);
        text.parse().unwrap_or_else(|_| panic!("{knob} is {text:?}"))
    }

    pub(crate) fn digest(&self) -> String {
        self.get("digest")
    }

    /// The device, opened with the usual options.
    pub(crate) fn open(&self, way: Way) -> VfioDevice {
        self.open_with(way, VfioOptions::default())
    }

    pub(crate) fn open_with(&self, way: Way, options: VfioOptions) -> VfioDevice {
        let opened = open(&self.address(), &OpenOptions { way, ..OpenOptions::default() })
            .unwrap_or_else(|e| panic!("{way:?}: {e}; {}", e.advice()));
        VfioDevice::new(id(), opened, options).unwrap_or_else(|e| panic!("{way:?}: {e}"))
    }
}

impl Drop for Mdev {
    fn drop(&mut self) {
        // A test that failed may have left a thread waiting in the driver.
        let _ = self.try_set("block", "");
        let removed = fs::write(self.path.join("remove"), "1");
        if !thread::panicking() {
            removed.unwrap_or_else(|e| panic!("{} cannot be removed: {e}", self.uuid));
        }
    }
}

pub(crate) fn id() -> DeviceId {
    DeviceId::new("dev0").unwrap()
}

/// Short deadlines, for calls that are meant to end by them.
pub(crate) fn impatient() -> VfioOptions {
    let short = Duration::from_millis(100);
    VfioOptions { transition_timeout: short, data_timeout: short, ..VfioOptions::default() }
}

/// Whether this kernel has MIG_PRECOPY_INFOv2.
pub(crate) fn kernel_has_reinit() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    !release.starts_with("6.")
}

/// Waits until `condition` holds.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < until, "never came: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a thread gives, which must end soon.
pub(crate) fn join<T>(what: &str, thread: JoinHandle<T>) -> T {
    wait_for(what, || thread.is_finished());
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Another descriptor of the same open device, as a VMM would pass it.
pub(crate) fn share(device: &VfioDevice) -> OwnedFd {
    device.fd().as_fd().try_clone_to_owned().unwrap()
}

pub(crate) fn bar(fd: &DeviceFd, index: u32) -> RegionInfo {
    fd.region(index).unwrap()
}

/// Writes into the state memory of one of our devices.
pub(crate) fn poke(device: &VfioDevice, offset: u64, data: &[u8]) {
    device.fd().write_region(&bar(device.fd(), 0), offset, data).unwrap();
}

pub(crate) fn peek<const N: usize>(device: &VfioDevice, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    device.fd().read_region(&bar(device.fd(), 0), offset, &mut data).unwrap();
    data
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251).to_le_bytes()[0] ^ seed).collect()
}

/// mtty's registers, at the beginning of BAR 0 (first port) and BAR 1 (second port).
const RXTX: u64 = 0;
const FCR: u64 = 2;
const LSR: u64 = 5;
const SCR: u64 = 7;
const LSR_DATA_READY: u8 = 1;

/// Gives one of mtty's ports a scratch register and a FIFO with this text in it.
pub(crate) fn set_uart(device: &VfioDevice, port: u32, scratch: u8, text: &str) {
    let bar = bar(device.fd(), port);
    let write = |register, value: u8| device.fd().write_region(&bar, register, &[value]).unwrap();
    // FIFOs on, and empty.
    write(FCR, 0x07);
    write(SCR, scratch);
    text.bytes().for_each(|byte| write(RXTX, byte));
}

/// The scratch register and what is in the FIFO, which is empty afterwards.
pub(crate) fn take_uart(device: &VfioDevice, port: u32) -> (u8, String) {
    let bar = bar(device.fd(), port);
    let read = |register| {
        let mut byte = [0];
        device.fd().read_region(&bar, register, &mut byte).unwrap();
        byte[0]
    };
    let mut text = String::new();
    while read(LSR) & LSR_DATA_READY != 0 && text.len() < 64 {
        text.push(char::from(read(RXTX)));
    }
    (read(SCR), text)
}

pub(crate) fn saving(session: Option<Session>) -> Box<dyn SaveSession> {
    match session {
        Some(Session::Save(session)) => session,
        other => panic!("not a session to read from: {other:?}"),
    }
}

pub(crate) fn loading(session: Option<Session>) -> Box<dyn LoadSession> {
    match session {
        Some(Session::Load(session)) => session,
        other => panic!("not a session to write to: {other:?}"),
    }
}

/// Reads in pieces of `size` until there is nothing (more), and says which of the two.
pub(crate) fn read(session: &mut dyn SaveSession, size: usize, into: &mut Vec<u8>) -> Piece {
    let mut buf = vec![0; size];
    loop {
        match session.read(&mut buf).unwrap() {
            Piece::Data { len, .. } => into.extend_from_slice(&buf[..len]),
            other => return other,
        }
    }
}

const PIECE: usize = 1 << 20;

/// Saves with pre-copy where the device has it. The device is in STOP afterwards.
pub(crate) fn save(device: &mut VfioDevice) -> Vec<u8> {
    let mut data = Vec::new();
    let mut session = None;
    if device.capabilities().precopy() {
        let mut precopy = saving(device.set_state(DeviceState::PreCopy).unwrap());
        assert_eq!(read(precopy.as_mut(), PIECE, &mut data), Piece::Drained);
        session = Some(precopy);
    }
    let opened = device.set_state(DeviceState::StopCopy).unwrap();
    let mut session = session.unwrap_or_else(|| saving(opened));
    assert_eq!(read(session.as_mut(), PIECE, &mut data), Piece::End);
    device.set_state(DeviceState::Stop).unwrap();
    data
}

/// Saves without pre-copy, in reads of `size`. The device is in STOP afterwards.
pub(crate) fn save_stopped(device: &mut VfioDevice, size: usize) -> Vec<u8> {
    let mut data = Vec::new();
    let mut session = saving(device.set_state(DeviceState::StopCopy).unwrap());
    assert_eq!(read(session.as_mut(), size, &mut data), Piece::End);
    device.set_state(DeviceState::Stop).unwrap();
    data
}

/// Loads. The device is in RUNNING afterwards.
pub(crate) fn load(device: &mut VfioDevice, data: &[u8]) {
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    session.write(data).unwrap();
    device.set_state(DeviceState::Stop).unwrap();
    device.set_state(DeviceState::Running).unwrap();
}

/// The device can do everything that it is for: a save and a load of what was saved.
pub(crate) fn assert_usable(device: &mut VfioDevice) {
    assert_eq!(device.state(), Ok(DeviceState::Running));
    let data = save(device);
    load(device, &data);
    assert_eq!(device.state(), Ok(DeviceState::Running));
}

/// The states of a device in which it can be found without a fault.
pub(crate) fn states(capabilities: &Capabilities) -> Vec<DeviceState> {
    let all = DeviceState::ALL.into_iter();
    all.filter(|state| *state != DeviceState::Error && capabilities.has(*state)).collect()
}

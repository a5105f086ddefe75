//! What the kernel tests of the command share: devices made for one test and removed after it, the
//! knobs of our driver, mtty's UART, and runs of `send` and `receive`.
//!
//! Nothing here asserts what a test is about, except in [`Pair::migrate`], which is a whole migration that
//! must work.

use crate::common::Process;
use airlift_core::{DeviceId, DeviceState};
use airlift_vfio::{DeviceAddress, OpenOptions, Recover, VfioDevice, VfioOptions};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Long enough that only a failure waits for it.
const SOON: Duration = Duration::from_secs(30);

/// States as the kernel numbers them.
pub(crate) const STOP: u64 = 1;
pub(crate) const RUNNING: u64 = 2;
pub(crate) const STOP_COPY: u64 = 3;
pub(crate) const RESUMING: u64 = 4;
pub(crate) const PRE_COPY_P2P: u64 = 7;

/// Waits until `condition` holds.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < until, "never came: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// An mdev device of this test, removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Mdev {
    pub(crate) uuid: String,
    path: PathBuf,
}

impl Mdev {
    fn new(parent: &str, kind: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let uuid = format!("a117c110-{:04x}-4000-8000-{number:012x}", std::process::id() & 0xffff);
        let create = format!("/sys/class/mdev_bus/{parent}/mdev_supported_types/{kind}/create");
        fs::write(&create, &uuid).unwrap_or_else(|e| panic!("{create}: {e}"));
        let path = PathBuf::from("/sys/bus/mdev/devices").join(&uuid);
        Self { uuid, path }
    }

    /// A device of our driver with so many bytes of state: `kind` is `v2`, `v2-plain` and so on.
    pub(crate) fn ours(kind: &str, state_size: u64) -> Self {
        let mdev = Self::new("airlift", &format!("airlift-{kind}"));
        mdev.set("state_size", &state_size.to_string());
        mdev
    }

    /// The same, and what it holds outlives its last close: so it can be filled before and looked at
    /// after. Real devices do not do that.
    pub(crate) fn lasting(kind: &str, state_size: u64) -> Self {
        let mdev = Self::ours(kind, state_size);
        mdev.set("reset_on_close", "0");
        mdev
    }

    /// The kernel's own sample, with 1 or 2 ports.
    pub(crate) fn mtty(ports: u32) -> Self {
        Self::new("mtty", &format!("mtty-{ports}"))
    }

    /// As on the command line.
    pub(crate) fn address(&self) -> String {
        format!("mdev:{}", self.uuid)
    }

    /// As `--device` takes it.
    pub(crate) fn named(&self, id: &str) -> String {
        format!("{id}={}", self.address())
    }

    fn try_set(&self, knob: &str, value: &str) -> std::io::Result<()> {
        // One write of at least one byte: an empty text is a line.
        let mut file = fs::OpenOptions::new().write(true).open(self.path.join("airlift").join(knob))?;
        file.write_all(format!("{value}\n").as_bytes())
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

    /// What every attempt to migrate it would have changed.
    pub(crate) fn touched(&self) -> Vec<(&'static str, u64)> {
        let counters = ["state", "resets", "reads", "bytes_read", "bytes_written"];
        counters.into_iter().map(|counter| (counter, self.number(counter))).collect()
    }

    /// The device, opened in this process and left in the state in which it is.
    pub(crate) fn open(&self) -> VfioDevice {
        self.open_with(Recover::Leave)
    }

    pub(crate) fn open_with(&self, recover: Recover) -> VfioDevice {
        let address = DeviceAddress::Mdev(self.uuid.clone());
        let opened = airlift_vfio::open(&address, &OpenOptions::default())
            .unwrap_or_else(|e| panic!("{e}; {}", e.advice()));
        used(opened, recover)
    }

    /// Fills the state with bytes that differ from place to place and from seed to seed. A device that an
    /// earlier migration has left in another state than RUNNING is reset.
    pub(crate) fn fill(&self, seed: u8) {
        let device = self.open_with(Recover::Reset);
        fill(&device, seed);
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

/// The name of the one device of most tests.
pub(crate) const NIC: &str = "nic0";

/// An open device as one that can be migrated.
pub(crate) fn used(opened: airlift_vfio::OpenDevice, recover: Recover) -> VfioDevice {
    let options = VfioOptions { recover: Some(recover), ..VfioOptions::default() };
    VfioDevice::new(DeviceId::new(NIC).unwrap(), opened, options).unwrap_or_else(|e| panic!("{e}"))
}

/// Fills the state of one of our devices.
pub(crate) fn fill(device: &VfioDevice, seed: u8) {
    let bar = device.fd().region(0).unwrap();
    let piece: Vec<u8> = (0..1 << 20).map(|at: usize| (at * 7 + at / 251).to_le_bytes()[0] ^ seed).collect();
    let mut at = 0;
    while at < bar.size {
        let length = usize::try_from(bar.size - at).unwrap_or(usize::MAX).min(piece.len());
        device.fd().write_region(&bar, at, &piece[..length]).unwrap();
        at += length as u64;
    }
}

/// mtty's registers, at the beginning of BAR 0 (first port) and BAR 1 (second port).
const RXTX: u64 = 0;
const FCR: u64 = 2;
const LSR: u64 = 5;
const SCR: u64 = 7;
const LSR_DATA_READY: u8 = 1;

/// Gives one of mtty's ports a scratch register and a FIFO with this text in it.
pub(crate) fn set_uart(device: &VfioDevice, port: u32, scratch: u8, text: &str) {
    let bar = device.fd().region(port).unwrap();
    let write = |register, value: u8| device.fd().write_region(&bar, register, &[value]).unwrap();
    // FIFOs on, and empty.
    write(FCR, 0x07);
    write(SCR, scratch);
    text.bytes().for_each(|byte| write(RXTX, byte));
}

/// The scratch register and what is in the FIFO, which is empty afterwards.
pub(crate) fn take_uart(device: &VfioDevice, port: u32) -> (u8, String) {
    let bar = device.fd().region(port).unwrap();
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

/// The command.
pub(crate) fn command(args: &[&str]) -> Command {
    let program = std::env::var_os("AIRLIFT_BIN").unwrap_or_else(|| crate::common::AIRLIFT.into());
    let mut command = Command::new(program);
    command.args(args).stderr(Stdio::inherit());
    command
}

pub(crate) fn start(args: &[&str]) -> Process {
    Process::spawn(command(args))
}

/// A run of the command that is over.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) result: Value,
    pub(crate) code: i32,
}

impl Ended {
    pub(crate) fn of(process: Process) -> Self {
        let (result, code) = process.finish();
        Self { result, code }
    }

    #[track_caller]
    pub(crate) fn must(&self, outcome: &str, code: i32) -> &Value {
        assert_eq!((self.result["outcome"].as_str(), self.code), (Some(outcome), code), "{:#}", self.result);
        &self.result
    }

    /// Everything that went wrong, in one text.
    pub(crate) fn error(&self) -> String {
        self.result["error"].to_string()
    }

    pub(crate) fn notes(&self) -> String {
        self.result["notes"].to_string()
    }
}

/// Starts a destination on loopback without a guest, and says where it listens.
pub(crate) fn receive(args: &[&str]) -> (Process, String) {
    listening(start(&[&["receive", "--no-guest"], args, &["tcp:127.0.0.1:0"]].concat()))
}

pub(crate) fn listening(receive: Process) -> (Process, String) {
    let uri = receive.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    (receive, uri)
}

pub(crate) fn send(args: &[&str], uri: &str) -> Ended {
    Ended::of(start(&[&["send", "--no-guest"], args, &[uri]].concat()))
}

/// Sends a signal to a process of ours.
pub(crate) fn signal(process: &Process, signal: Signal) {
    kill_process(process.pid(), signal).unwrap();
}

/// Ends a `receive --hold`, and gives what it says then.
pub(crate) fn let_go(receive: Process) -> Ended {
    signal(&receive, Signal::TERM);
    Ended::of(receive)
}

/// Two devices of our driver with state of the same size, the source's a lasting one.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) from: Mdev,
    pub(crate) to: Mdev,
}

impl Pair {
    pub(crate) fn new(state_size: u64) -> Self {
        Self { from: Mdev::lasting("v2", state_size), to: Mdev::ours("v2", state_size) }
    }

    /// A whole migration of what is in the source: nothing less than everything must arrive. Gives what
    /// both sides said.
    pub(crate) fn migrate(&self) -> (Ended, Ended) {
        let (receive, uri) = receive(&["--device", &self.to.named(NIC), "--hold"]);
        let sent = send(&["--device", &self.from.named(NIC)], &uri);
        sent.must("completed", 0);
        receive.wait_for("holding");
        assert_eq!(self.to.get("digest"), self.from.get("digest"));
        assert_eq!((self.from.number("state"), self.to.number("state")), (STOP, RUNNING));
        let received = let_go(receive);
        received.must("completed", 0);
        (sent, received)
    }
}

/// How many lanes there are: most of each case is waiting for the other process.
const LANES: usize = 3;

/// Deals the cases out to a few lanes, which run at the same time.
pub(crate) fn side_by_side<T: Sync>(cases: &[T], lane: impl Fn(&mut dyn Iterator<Item = &T>) + Sync) {
    thread::scope(|scope| {
        for number in 0..LANES.min(cases.len()) {
            let lane = &lane;
            scope.spawn(move || lane(&mut cases.iter().skip(number).step_by(LANES)));
        }
    });
}

/// The device runs, in the view of who opens it next.
pub(crate) fn assert_runs(device: &VfioDevice) {
    assert_eq!(device.found_state(), DeviceState::Running);
}

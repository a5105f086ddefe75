//! The life of a device's descriptor: what its last close does, who else holds the device, processes that
//! are killed, and a thousand times open and closed.
//!
//! Processes that hold a device are this program once more, told by its environment.

use crate::support::{Mdev, assert_usable, id, load, peek, poke, save, share, states};
use airlift_core::{DeviceState, MigrationDevice};
use airlift_vfio::{DeviceAddress, OpenError, OpenOptions, VfioDevice, VfioOptions, Way, open};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::{env, fs};

const DEVICE: &str = "AIRLIFT_TEST_HELD_DEVICE";
const STATE: &str = "AIRLIFT_TEST_HELD_STATE";
const WAY: &str = "AIRLIFT_TEST_HELD_WAY";
const READY: &str = "the device is held";

/// In a process that [`Holder`] has started: opens the device, goes to the state, and stays there until
/// the starter is gone.
fn hold_if_told() -> bool {
    let Ok(uuid) = env::var(DEVICE) else { return false };
    let way = if env::var(WAY).unwrap() == "cdev" { Way::Cdev } else { Way::Group };
    let opened = open(&DeviceAddress::Mdev(uuid), &OpenOptions { way, ..OpenOptions::default() }).unwrap();
    let mut device = VfioDevice::new(id(), opened, VfioOptions::default()).unwrap();
    let state = DeviceState::from_raw(env::var(STATE).unwrap().parse().unwrap());
    let _session = device.set_state(state).unwrap();
    println!("{READY}");
    // Ends when the starter does.
    let _ = std::io::stdin().read(&mut [0]);
    true
}

/// A process that holds a device. It is killed when it is dropped.
struct Holder(Child);

impl Holder {
    /// Runs `test` of this program, which begins with [`hold_if_told`].
    fn start(test: &str, mdev: &Mdev, state: DeviceState, way: Way) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", test])
            .env(DEVICE, &mdev.uuid)
            .env(STATE, state.to_raw().to_string())
            .env(WAY, if way == Way::Cdev { "cdev" } else { "group" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let holder = Self(child);
        assert!(output.any(|line| line.contains(READY)), "{test}: {} is not held", mdev.uuid);
        holder
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// K-LAST-CLOSE
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn the_last_close_resets_the_device_and_no_close_before_it_does() {
    for way in [Way::Group, Way::Cdev] {
        let mdev = Mdev::sized("v2", 5000);
        let empty = mdev.digest();
        let device = mdev.open(way);
        poke(&device, 100, b"kept");
        let digest = mdev.digest();
        let kept = share(&device);
        // With its container or iommufd.
        drop(device);
        assert_eq!(mdev.digest(), digest, "{way:?}: somebody has it open");
        drop(kept);
        assert_eq!(mdev.digest(), empty, "{way:?}: nobody has it open");

        // A device that keeps its state, as mtty does, hides that.
        mdev.set("reset_on_close", "0");
        let device = mdev.open(way);
        poke(&device, 100, b"kept");
        drop(device);
        assert_eq!(mdev.digest(), digest, "{way:?}");
        assert_eq!(peek(&mdev.open(way), 100), *b"kept", "{way:?}");
    }
}

/// What is loaded is lost with the last descriptor, unless somebody was given it.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn state_that_was_loaded_lives_as_long_as_somebody_holds_the_device() {
    let (source, destination) = (Mdev::sized("v2", 5000), Mdev::sized("v2", 5000));
    let mut from = source.open(Way::Group);
    poke(&from, 0, b"state");
    let digest = source.digest();
    let data = save(&mut from);
    let mut to = destination.open(Way::Group);
    load(&mut to, &data);
    let given = share(&to);
    drop(to);
    assert_eq!(destination.digest(), digest);
    let mut taken = VfioDevice::from_fd(id(), given, VfioOptions::default()).unwrap();
    assert_eq!(taken.state(), Ok(DeviceState::Running));
    assert_eq!(peek(&taken, 0), *b"state");
    drop(taken);
    assert_ne!(destination.digest(), digest);
}

/// A process is killed in each state, of devices that keep what they were in and of one that does not.
// K-GET-FIRST
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_whose_process_was_killed_in_any_state_is_of_use_to_the_next_one() {
    if hold_if_told() {
        return;
    }
    let this = "life::a_device_whose_process_was_killed_in_any_state_is_of_use_to_the_next_one";
    let (resets, keeps, mtty) = (Mdev::sized("v2", 5000), Mdev::sized("v2", 5000), Mdev::mtty(2));
    keeps.set("reset_on_close", "0");
    let all = states(&resets.open(Way::Group).capabilities());
    assert_eq!(all.len(), 7);
    for (at, state) in all.into_iter().enumerate() {
        let way = [Way::Group, Way::Cdev][at % 2];
        // What a driver without a reset makes of it when the session is gone.
        let kept = match state {
            DeviceState::PreCopy => DeviceState::Running,
            DeviceState::PreCopyP2p => DeviceState::RunningP2p,
            DeviceState::StopCopy => DeviceState::Stop,
            DeviceState::Resuming => DeviceState::Error,
            other => other,
        };
        for (mdev, left) in [(&resets, DeviceState::Running), (&keeps, kept), (&mtty, state)] {
            Holder::start(this, mdev, state, way).kill();
            let mut device = mdev.open(way);
            assert_eq!(device.found_state(), left, "killed in {state}");
            assert_usable(&mut device);
        }
    }
}

// K-BUSY
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_is_held_names_its_holder() {
    if hold_if_told() {
        return;
    }
    let this = "life::a_device_that_is_held_names_its_holder";
    let program = env::current_exe().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let mdev = Mdev::sized("v2", 5000);
    for held in [Way::Group, Way::Cdev] {
        let holder = Holder::start(this, &mdev, DeviceState::PreCopy, held);
        for way in [Way::Group, Way::Cdev] {
            let options = OpenOptions { way, ..OpenOptions::default() };
            let error = open(&mdev.address(), &options).expect_err("it is held");
            let OpenError::Busy { holders, .. } = &error else { panic!("{held:?}, {way:?}: {error}") };
            let found = holders.seen.iter().find(|found| found.pid == holder.0.id());
            let found = found.unwrap_or_else(|| panic!("{held:?}, {way:?}: {error}"));
            assert!(found.command.contains(&program), "{found:?}");
            assert!(error.to_string().contains(&holder.0.id().to_string()), "{error}");
        }
        assert_eq!(mdev.get("state"), DeviceState::PreCopy.to_raw().to_string(), "it goes on with its work");
        holder.kill();
        assert_usable(&mut mdev.open(held));
    }
}

fn count(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

/// What this process has in memory, in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// C90, C94.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_thousand_times_opened_saved_and_closed_leave_nothing_behind() {
    let mdev = Mdev::sized("v2", 100);
    let cycle = |at: u64| {
        let mut device = mdev.open([Way::Group, Way::Cdev][usize::from(at % 2 == 1)]);
        let data = save(&mut device);
        assert_eq!(data.len(), 24 + 16 + 100 + 24);
        // Closed in different states, with the session that there was gone or not.
        match at % 3 {
            0 => {}
            1 => drop(device.set_state(DeviceState::StopCopy).unwrap()),
            _ => load(&mut device, &data),
        }
    };
    (0..500).for_each(cycle);
    let before = (count("/proc/self/fd"), count("/proc/self/task"));
    let memory = resident();
    (500..1000).for_each(cycle);
    assert_eq!((count("/proc/self/fd"), count("/proc/self/task")), before);
    // A page of the kernel's here and there is no leak; a KiB for each time would be.
    assert!(resident() < memory + 400, "{memory} KiB before, {} after", resident());
    assert_eq!(mdev.number("opens"), 1000);
}

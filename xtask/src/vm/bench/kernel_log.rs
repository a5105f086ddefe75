//! The kernel's own view of a device: the driver's debug lines in `/dev/kmsg`, with the kernel's clock.
//!
//! A line is printed when an arc begins. That the arc has come to its end is seen from where the next one
//! of the same device begins; nothing here looks at the device itself.

use super::DEVICES;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// O_NONBLOCK of x86_64, which the VM is: a read at the log's end must not wait.
const NONBLOCK: i32 = 0o4000;
/// The kernel gives one record a read, and none is longer.
const RECORD: usize = 8192;
/// More records than this are no single migration's.
const MOST_RECORDS: usize = 20_000;

/// A state as the driver prints it: a number of `enum vfio_device_mig_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State(pub(super) u8);

impl State {
    pub(super) const STOP: Self = Self(1);
    pub(super) const RUNNING: Self = Self(2);
    pub(super) const STOP_COPY: Self = Self(3);
    pub(super) const RESUMING: Self = Self(4);
    pub(super) const PRE_COPY: Self = Self(6);

    /// Whether the device does all that it wants: neither stopped nor held back from other devices.
    pub(super) fn runs_freely(self) -> bool {
        self == Self::RUNNING || self == Self::PRE_COPY
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 8] =
            ["ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"];
        match NAMES.get(usize::from(self.0)) {
            Some(name) => f.write_str(name),
            None => write!(f, "state {}", self.0),
        }
    }
}

/// What the driver was seen to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// An arc begins.
    Arc { from: State, to: State },
    /// So many bytes of state were read.
    Read(u64),
    /// So many bytes of state have been written in all.
    Written(u64),
}

/// One act of one of the two devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Event {
    /// Microseconds since the kernel has begun.
    pub(super) at: u64,
    /// An index in [`DEVICES`].
    pub(super) device: usize,
    pub(super) act: Act,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = ["source", "destination"].get(self.device).copied().unwrap_or("?");
        match self.act {
            Act::Arc { from, to } => write!(f, "{} {side} {from} -> {to}", self.at),
            Act::Read(bytes) => write!(f, "{} {side} read {bytes}", self.at),
            Act::Written(bytes) => write!(f, "{} {side} written {bytes}", self.at),
        }
    }
}

/// The log from the moment on at which it was opened.
#[derive(Debug)]
pub(super) struct KernelLog(File);

impl KernelLog {
    pub(super) fn from_now() -> Result<Self, String> {
        let open = || {
            let mut file = OpenOptions::new().read(true).custom_flags(NONBLOCK).open("/dev/kmsg")?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        open().map(Self).map_err(|e: io::Error| format!("/dev/kmsg: {e}"))
    }

    /// What the driver has said since.
    pub(super) fn events(&mut self) -> Result<Vec<Event>, String> {
        let mut events = Vec::new();
        let mut record = [0; RECORD];
        for _ in 0..MOST_RECORDS {
            match self.0.read(&mut record) {
                Ok(length) => events.extend(event(&String::from_utf8_lossy(&record[..length]))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(events),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // EPIPE: records were overwritten before they were read.
                Err(e) => return Err(format!("/dev/kmsg: {e}: lines of the driver may be lost")),
            }
        }
        Err(format!("/dev/kmsg: more than {MOST_RECORDS} records of one migration"))
    }
}

/// Reads `PRIORITY,NUMBER,MICROSECONDS,FLAGS[,...];DRIVER DEVICE: WHAT`.
fn event(record: &str) -> Option<Event> {
    let (head, text) = record.split_once(';')?;
    let at = head.split(',').nth(2)?.parse().ok()?;
    let text = text.lines().next()?;
    let (device, what) = DEVICES.iter().enumerate().find_map(|(index, uuid)| {
        text.split_once(uuid).map(|(_, what)| (index, what.trim_start_matches(':').trim()))
    })?;
    let act = if let Some(arc) = what.strip_prefix("mtty_step_state: ") {
        let (from, to) = arc.split_once(" -> ")?;
        Act::Arc { from: State(from.parse().ok()?), to: State(to.parse().ok()?) }
    } else if let Some(read) = what.strip_prefix("mtty_save_read read ") {
        Act::Read(read.parse().ok()?)
    } else {
        let (_, total) = what.strip_prefix("mtty_resume_write received ")?.split_once(", total ")?;
        Act::Written(total.parse().ok()?)
    };
    Some(Event { at, device, act })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_lines_are_read_and_no_others() {
        let line =
            |what: &str| format!("7,301,4244662,-,caller=T7;mtty {}: {what}\n SUBSYSTEM=mdev\n", DEVICES[1]);
        let act = |what: &str| event(&line(what)).map(|e| (e.at, e.device, e.act));
        let arc = Act::Arc { from: State(5), to: State::RUNNING };
        assert_eq!(act("mtty_step_state: 5 -> 2"), Some((4_244_662, 1, arc)));
        assert_eq!(act("mtty_save_read read 24"), Some((4_244_662, 1, Act::Read(24))));
        assert_eq!(act("mtty_resume_write received 72, total 96"), Some((4_244_662, 1, Act::Written(96))));
        // What asks for an arc, not the arc.
        assert_eq!(act("mtty_set_device_state -> 2"), None);
        assert_eq!(act("mtty_save_read ask 4096"), None);
        assert_eq!(event("6,302,4244662,-;BAR0 addr 0xffffffff\n"), None);
        assert_eq!(
            event("7,1,2,-;mtty 00000000-0000-0000-0000-000000000003: mtty_step_state: 5 -> 2\n"),
            None
        );
    }
}

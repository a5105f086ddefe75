//! What `receive` does with devices of the kernel once they run here: runs a command that inherits
//! them, gives them to another process, or holds them. The last close of a real device resets it, so
//! somebody has to. Devices whose migration is in doubt are held too, on either side: what they hold
//! may be the only copy.
//!
//! What the other process does with a descriptor is not checked. DMA mappings that were made for
//! `--memory` belong to this process: who takes the devices over maps its memory anew.

use crate::args::{Afterwards, VmmAddress};
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::open::KernelDevice;
use crate::render;
use crate::signals::{Canceller, Told};
use crate::sockets;
use airlift::Outcome;
use airlift::vmm::{LineChannel, MAX_FDS, WireError};
use airlift_core::{Errno, Side};
use airlift_vfio::Attachment;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// The environment variable that names the descriptors to `--then`.
const VARIABLE: &str = "AIRLIFT_FDS";
/// How long who was given devices may take to say that it has them.
const TAKEN: Duration = Duration::from_secs(30);

/// What the descriptor of a device, or of what its DMA goes through, is called.
struct Named<'a> {
    device: usize,
    /// Nothing for the device itself.
    role: Option<&'static str>,
    fd: BorrowedFd<'a>,
}

/// Every descriptor of the devices, in order; one that several devices share stands once for each.
fn descriptors(kernel: &[KernelDevice]) -> Vec<Named<'_>> {
    let mut all = Vec::new();
    for (device, member) in kernel.iter().enumerate() {
        let mut add = |role, fd| all.push(Named { device, role, fd });
        add(None, member.opened.fd.as_fd());
        match &member.opened.attachment {
            Attachment::Iommufd { iommufd, .. } => add(Some("iommufd"), iommufd.as_fd()),
            Attachment::Container { container, group } => {
                add(Some("container"), container.as_fd());
                add(Some("group"), group.as_fd());
            }
            Attachment::Given => {}
        }
    }
    all
}

/// Does what was asked for, when the migration is complete. Gives the exit code of the process, and
/// what went wrong after the migration.
pub(crate) fn run(
    wish: &Afterwards,
    kernel: &[KernelDevice],
    canceller: &Canceller,
    output: &Output,
) -> (Exit, Option<Box<ErrorView>>) {
    if let Some(command) = &wish.then {
        return match then(command, kernel, canceller, output) {
            Ok(exit) => (exit, None),
            Err(error) => held(*error, kernel, canceller, output),
        };
    }
    if let Some(to) = &wish.give {
        // From here on SIGTERM is no wish to cancel: there is nothing to cancel any more.
        canceller.holding();
        return match give(to, kernel) {
            Ok(()) => {
                output.event("given", &Given { to: to.to_string(), devices: names(kernel) });
                output.say(format!("The devices were given to {to}"));
                (Exit::Done, None)
            }
            Err(error) => held(*error, kernel, canceller, output),
        };
    }
    hold(kernel.iter(), None, canceller, output);
    (Exit::Done, None)
}

/// The devices that this process has opened itself, so that its end would be their last close.
fn own(kernel: &[KernelDevice]) -> impl Iterator<Item = &KernelDevice> {
    kernel.iter().filter(|d| d.own)
}

fn descriptor(device: &KernelDevice) -> RawFd {
    device.opened.fd.as_fd().as_raw_fd()
}

/// Holds the devices of a migration that is in doubt, as far as they are ours: see [`doubt`].
pub(crate) fn hold_in_doubt(kernel: &[KernelDevice], side: Side, canceller: &Canceller, output: &Output) {
    if own(kernel).next().is_some() {
        hold(own(kernel), Some(doubt(side)), canceller, output);
    }
}

/// Why devices are held while it is in doubt where the guest runs, and what is to be done.
const fn doubt(side: Side) -> &'static str {
    match side {
        Side::Source => {
            "it may hold the only copy of what was to be moved. Ask the destination, with its report or airlift \
             resolve there. If the guest runs there, end this process. If it does not and never will, take the \
             descriptor over first (pidfd_getfd) and bring it back: airlift resolve --journal DIR --run-here \
             --device ID=fd:N"
        }
        Side::Destination => {
            "it may hold the only copy of what was moved. Ask the source, with its report or airlift resolve \
             there. If the guest runs there, or is brought back there with --run-here, end this process"
        }
    }
}

/// What becomes of devices of the kernel that this process has opened and closes when it ends: the last
/// close of a real device resets it. On a destination that has completed they are taken care of.
pub(crate) fn closing(kernel: &[KernelDevice], side: Side, outcome: Outcome) -> Vec<String> {
    match (outcome, side) {
        (Outcome::Completed, Side::Source) => {
            let what = "the device here is closed now, which resets it";
            own(kernel).map(|d| format!("{}: {what}", d.id)).collect()
        }
        (Outcome::InDoubt, side) => doubt_notes(kernel, side),
        _ => Vec::new(),
    }
}

/// What the report says of the devices that are held in doubt.
fn doubt_notes(kernel: &[KernelDevice], side: Side) -> Vec<String> {
    let pid = std::process::id();
    let note = |d: &KernelDevice| {
        let fd = descriptor(d);
        format!(
            "{}: process {pid} holds it as descriptor {fd} until SIGTERM or SIGINT: {}",
            d.id,
            doubt(side)
        )
    };
    own(kernel).map(note).collect()
}

#[derive(Serialize)]
struct Given {
    to: String,
    devices: Vec<String>,
}

#[derive(Serialize)]
struct Holding {
    pid: u32,
    devices: Vec<String>,
    /// Which descriptor of this process each of them is.
    descriptors: Vec<RawFd>,
    /// Why, where nobody has asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Then<'a> {
    command: &'a str,
    pid: u32,
}

#[derive(Serialize)]
struct Failed<'a> {
    error: &'a ErrorView,
}

fn names(kernel: &[KernelDevice]) -> Vec<String> {
    kernel.iter().map(|d| d.id.to_string()).collect()
}

/// Nobody has taken the devices, which run: they are held until somebody says that they need not be.
fn held(
    error: ErrorView,
    kernel: &[KernelDevice],
    canceller: &Canceller,
    output: &Output,
) -> (Exit, Option<Box<ErrorView>>) {
    let error = error.on("destination").advise(format!(
        "the migration is complete: the devices run here and process {} still holds them; what they hold is \
         lost when it ends",
        std::process::id()
    ));
    output.event("not-taken", &Failed { error: &error });
    output.say(render::error_text(&error));
    hold(kernel.iter(), None, canceller, output);
    (Exit::DeviceLost, Some(Box::new(error)))
}

/// Holds the devices until a signal, or the supervisor, says to let them go.
fn hold<'a>(
    kernel: impl Iterator<Item = &'a KernelDevice>,
    reason: Option<&'static str>,
    canceller: &Canceller,
    output: &Output,
) {
    let told = canceller.holding();
    let pid = std::process::id();
    let (devices, descriptors): (Vec<_>, Vec<_>) = kernel.map(|d| (d.id.to_string(), descriptor(d))).unzip();
    output.say(format!("Process {pid} holds {} until SIGTERM or SIGINT", devices.join(", ")));
    output.event("holding", &Holding { pid, devices, descriptors, reason });
    // The channel lives as long as the canceller.
    let by = told.recv().map_or("nobody", Told::words);
    output.say(format!("Let go by {by}: the devices are closed, which resets them"));
}

/// Runs the command with the descriptors, and waits for it. Its exit code is ours.
fn then(
    command: &str,
    kernel: &[KernelDevice],
    canceller: &Canceller,
    output: &Output,
) -> Result<Exit, Box<ErrorView>> {
    let failed = |what: &str, e: std::io::Error| {
        Box::new(ErrorView::new(format!("--then: {what}: {e}")).errno(e.raw_os_error().map(Errno)))
    };
    let mut inherited: Vec<OwnedFd> = Vec::new();
    let mut words = Vec::new();
    for Named { device, role, fd } in descriptors(kernel) {
        // Without close-on-exec: the child inherits exactly these.
        let copy = rustix::io::dup(fd).map_err(|e| failed("a descriptor", e.into()))?;
        let role = role.map(|role| format!(".{role}")).unwrap_or_default();
        words.push(format!("{}{role}={}", kernel[device].id, copy.as_raw_fd()));
        inherited.push(copy);
    }
    let told = canceller.holding();
    let mut child = Command::new("sh")
        .args(["-c", command])
        .env(VARIABLE, words.join(" "))
        .spawn()
        .map_err(|e| failed("sh cannot be started", e))?;
    drop(inherited);
    let pid = child.id();
    output.event("then", &Then { command, pid });
    // By descriptor, so that a signal cannot go to another process that got the number later.
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let (to, ended) = crossbeam_channel::bounded(1);
    let waiter = std::thread::Builder::new().name("then".into()).spawn(move || {
        // Nobody listens any more only if this process ends.
        let _ = to.send(child.wait());
    });
    if let Err(e) = waiter {
        return Err(failed("no thread to wait for the command, which runs", e));
    }
    loop {
        crossbeam_channel::select! {
            recv(ended) -> status => {
                return match status {
                    Ok(Ok(status)) => Ok(Exit::Command(code(status))),
                    Ok(Err(e)) => Err(failed("the command's end is not known", e)),
                    Err(_) => Err(Box::new(ErrorView::new("--then: the command's end is not known"))),
                };
            }
            recv(told) -> told => match told {
                // A terminal sends SIGINT to the command too.
                Ok(Told::Interrupt) | Err(_) => {}
                Ok(Told::Terminate | Told::Supervisor) => {
                    if let Ok(pidfd) = &pidfd {
                        // It may have ended meanwhile.
                        let _ = pidfd_send_signal(pidfd, Signal::TERM);
                    }
                }
            },
        }
    }
}

/// As a shell would say it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// The line of `--give`. Numbers are indexes into the descriptors that come with it.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    schema: String,
    event: String,
    devices: Vec<OfferedDevice>,
}

#[derive(Debug, Serialize, Deserialize)]
struct OfferedDevice {
    id: String,
    /// How it was named on our command line.
    address: String,
    fd: usize,
    iommufd: Option<usize>,
    /// The device's number in the iommufd.
    devid: Option<u32>,
    /// The page table, or address space, of the iommufd that it is attached to.
    page_table: Option<u32>,
    container: Option<usize>,
    group: Option<usize>,
}

/// The answer to it.
#[derive(Debug, Deserialize)]
struct Answer {
    taken: bool,
    #[serde(default)]
    error: Option<String>,
}

fn offer(kernel: &[KernelDevice]) -> (Offer, Vec<BorrowedFd<'_>>) {
    let mut devices: Vec<OfferedDevice> = Vec::with_capacity(kernel.len());
    let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
    for Named { device, role, fd } in descriptors(kernel) {
        // What several devices share is sent once.
        let index = fds.iter().position(|f| f.as_raw_fd() == fd.as_raw_fd()).unwrap_or_else(|| {
            fds.push(fd);
            fds.len() - 1
        });
        let member = &kernel[device];
        match (role, devices.last_mut()) {
            (Some("iommufd"), Some(last)) => last.iommufd = Some(index),
            (Some("container"), Some(last)) => last.container = Some(index),
            (Some("group"), Some(last)) => last.group = Some(index),
            _ => {
                let (devid, page_table) = match &member.opened.attachment {
                    Attachment::Iommufd { device, page_table, .. } => (Some(*device), Some(*page_table)),
                    Attachment::Container { .. } | Attachment::Given => (None, None),
                };
                devices.push(OfferedDevice {
                    id: member.id.to_string(),
                    address: member.opened.address.to_string(),
                    fd: index,
                    iommufd: None,
                    devid,
                    page_table,
                    container: None,
                    group: None,
                });
            }
        }
    }
    (Offer { schema: crate::json::SCHEMA.into(), event: "give".into(), devices }, fds)
}

/// Gives the devices to who listens at `to`, and waits until it says that it has them.
fn give(to: &VmmAddress, kernel: &[KernelDevice]) -> Result<(), Box<ErrorView>> {
    let failed = |what: String, errno: Option<Errno>| {
        Box::new(ErrorView::new(format!("the devices could not be given to {to}: {what}")).errno(errno))
    };
    let stream =
        sockets::connect(&to.0, Instant::now() + TAKEN).map_err(|e| failed(e.to_string(), Some(e)))?;
    let (offer, fds) = offer(kernel);
    if fds.len() > MAX_FDS {
        return Err(failed(format!("{} descriptors, at most {MAX_FDS} can be sent", fds.len()), None));
    }
    hand_over(stream, &offer, &fds, TAKEN).map_err(|(what, errno)| failed(what, errno))
}

fn hand_over(
    stream: UnixStream,
    offer: &Offer,
    fds: &[BorrowedFd<'_>],
    within: Duration,
) -> Result<(), (String, Option<Errno>)> {
    let wire = |e: WireError| (e.to_string(), Some(e.errno()));
    let mut channel = LineChannel::new(stream);
    let deadline = Instant::now() + within;
    channel.send(offer, fds, deadline).map_err(wire)?;
    let line = channel.receive(deadline).map_err(wire)?;
    match serde_json::from_slice::<Answer>(&line.text) {
        Ok(Answer { taken: true, .. }) => Ok(()),
        Ok(Answer { error, .. }) => {
            Err((format!("it did not take them: {}", error.as_deref().unwrap_or("it did not say why")), None))
        }
        Err(e) => Err((format!("its answer is not {{\"taken\":true}}: {e}"), Some(Errno::EPROTO))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(answer: &'static str) -> Result<(), (String, Option<Errno>)> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(move || {
            let mut stream = theirs.try_clone().unwrap();
            let mut channel = LineChannel::new(theirs);
            let line = channel.receive(Instant::now() + Duration::from_secs(10)).unwrap();
            let offer: Offer = serde_json::from_slice(&line.text).unwrap();
            assert_eq!(offer.event, "give");
            assert_eq!(line.fds.len(), 1, "the descriptors come with the line");
            std::io::Write::write_all(&mut stream, answer.as_bytes()).unwrap();
        });
        let file = std::fs::File::open("/dev/null").unwrap();
        let offer = Offer { schema: "s".into(), event: "give".into(), devices: Vec::new() };
        let result = hand_over(ours, &offer, &[file.as_fd()], Duration::from_secs(10));
        peer.join().unwrap();
        result
    }

    #[test]
    fn devices_are_given_only_when_they_are_said_to_be_taken() {
        assert_eq!(answered("{\"taken\":true}\n"), Ok(()));
        assert!(answered("{\"taken\":false,\"error\":\"no room\"}\n").unwrap_err().0.contains("no room"));
        assert_eq!(answered("{\"taken\"\n").unwrap_err().1, Some(Errno::EPROTO));
        assert_eq!(answered("").unwrap_err().1, Some(Errno::ECONNRESET), "closed without an answer");
    }

    #[test]
    fn the_end_of_a_command_is_said_as_a_shell_says_it() {
        assert_eq!(code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code(ExitStatus::from_raw(15)), 143);
    }
}

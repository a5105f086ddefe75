//! The command line: one file for each subcommand.
//!
//! Values are parsed into their types here; what needs a look at the host (does the socket exist,
//! does a device answer) is not checked here.

mod afterwards;
mod demo;
mod interface;
mod memory;
mod migrate;
mod probe;
mod resolve;
mod sim_vm;
mod soft_device;
mod values;

pub(crate) use afterwards::Afterwards;
pub(crate) use demo::{DemoArgs, DemoInterface};
pub(crate) use interface::{InterfaceChoice, V1MappingChoice};
pub(crate) use memory::{MemoryPlace, NamedMemory};
pub(crate) use migrate::{Attach, ReceiveArgs, SendArgs};
pub(crate) use probe::ProbeArgs;
pub(crate) use resolve::ResolveArgs;
pub(crate) use sim_vm::SimVmArgs;
pub(crate) use soft_device::{DeviceArgs, SoftDeviceArgs};
pub(crate) use values::{
    DeviceAddress, FaultPhase, KillSpec, NamedDevice, NamedSocket, Sabotage, StallChoice, StepDeadline,
    TransportChoice, Victim, VmmAddress,
};

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

/// Arguments that are right each and wrong together.
#[derive(Debug)]
pub(crate) struct Wrong {
    kind: ErrorKind,
    message: String,
}

fn conflict(message: impl Into<String>) -> Wrong {
    Wrong { kind: ErrorKind::ArgumentConflict, message: message.into() }
}

/// Moves VFIO devices between hosts while the machine that uses them runs.
#[derive(Debug, Parser)]
#[command(name = "airlift", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// What is right each and wrong together.
    ///
    /// # Errors
    /// As the command line's own, of the subcommand that was given: exit code 2.
    pub(crate) fn check(&self) -> Result<(), clap::Error> {
        let (name, checked) = match &self.command {
            Command::Receive(args) => ("receive", args.afterwards.check(&args.attach.devices)),
            Command::SoftDevice(args) => {
                ("soft-device", args.device.check(args.interface == InterfaceChoice::V1))
            }
            Command::Demo(args) => ("demo", args.check()),
            _ => return Ok(()),
        };
        checked.map_err(|Wrong { kind, message }| {
            let mut command = Self::command();
            command.build();
            match command.find_subcommand_mut(name) {
                Some(subcommand) => subcommand.error(kind, message),
                None => command.error(kind, message),
            }
        })
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Two hosts as processes on this machine: soft devices behind real vfio-user sockets, a guest
    /// under load, and one live migration that is verified to the last byte.
    Demo(Box<DemoArgs>),
    /// Serves one software device over vfio-user.
    SoftDevice(SoftDeviceArgs),
    /// Runs a simulated virtual machine that uses vfio-user devices and can be migrated.
    SimVm(SimVmArgs),
    /// Says what devices can do for a migration, what is missing, and what to do about it.
    Probe(ProbeArgs),
    /// Sends devices, and the guest that uses them, to a host that runs `receive`.
    Send(SendArgs),
    /// Receives devices, and the guest that uses them, from a host that runs `send`.
    Receive(ReceiveArgs),
    /// After a crash: reads the journal and says, or does, what may be done with the guest here.
    Resolve(ResolveArgs),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn message(args: &[&str]) -> String {
        Cli::try_parse_from(std::iter::once(&"airlift").chain(args)).unwrap_err().to_string()
    }

    #[test]
    fn wrong_values_are_refused_with_an_example_of_right_ones() {
        assert!(message(&["demo", "--state-size", "big"]).contains("write it as 64MiB, 1GiB or 4096"));
        assert!(message(&["demo", "--downtime-limit", "300"]).contains("write it as 300ms"));
        assert!(message(&["demo", "--kill", "receiver"]).contains("SIDE@PHASE"));
        assert!(message(&["demo", "--kill", "nobody@load"]).contains("source-device"));
        assert!(message(&["demo", "--kill", "sender@nap"]).contains("stop-copy"));
        assert!(message(&["demo", "--devices", "0"]).contains("1..=16"));
        assert!(message(&["demo", "--channels", "65"]).contains("1..=64"));
        assert!(message(&["send", "tcp:127.0.0.1:1", "--vmm", "/run/vmm"]).contains("unix:PATH"));
        assert!(message(&["send", "file:x", "--vmm", "unix:/v"]).contains("not there yet"));
        assert!(message(&["send", "tcp:h:1", "--device", "vfio-user:/x"]).contains("ID=DEVICE"));
        assert!(message(&["probe", "pci:0000:01:00"]).contains("0000:65:00.2"));
        assert!(message(&["probe", "/dev/vfio/1"]).contains("mdev:UUID"));
        let memory = ["send", "tcp:h:1", "--no-guest", "--device", "a=fd:3", "--memory"];
        assert!(message(&[&memory[..], &["ram=/x"]].concat()).contains("file:PATH"));
    }

    #[test]
    fn a_device_without_a_vmm_needs_no_guest() {
        let args = ["send", "tcp:127.0.0.1:1", "--device", "a=vfio-user:/x"];
        assert!(message(&args).contains("--no-guest"), "{}", message(&args));
        assert!(Cli::try_parse_from(["airlift"].iter().chain(&args).chain(&["--no-guest"])).is_ok());
        assert!(message(&["receive", "tcp:127.0.0.1:0"]).contains("--vmm"));
    }

    #[test]
    fn faults_exclude_each_other() {
        assert!(
            message(&["demo", "--kill", "sender@load", "--cancel", "load"]).contains("cannot be used with")
        );
        assert!(message(&["demo", "--cut", "load", "--cancel", "load"]).contains("cannot be used with"));
    }
}

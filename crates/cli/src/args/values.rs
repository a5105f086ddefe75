//! The types of single values on the command line.

use crate::units::Span;
use airlift::Deadlines;
use airlift_core::{DeviceId, Phase, Side};
use clap::ValueEnum;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceAddress {
    /// Behind the socket of a vfio-user server.
    VfioUser(PathBuf),
    /// Driven by the kernel's VFIO.
    Kernel(airlift_vfio::DeviceAddress),
}

impl FromStr for DeviceAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vfio-user", "")) => Err("the path is missing after vfio-user:".into()),
            Some(("vfio-user", path)) => Ok(Self::VfioUser(path.into())),
            Some(("cdev" | "pci" | "mdev" | "fd", _)) => {
                text.parse().map(Self::Kernel).map_err(|e: airlift_vfio::InvalidAddress| e.to_string())
            }
            _ => Err(format!(
                "{text:?} is not a device: write it as vfio-user:PATH, cdev:PATH, pci:BDF, mdev:UUID or fd:N"
            )),
        }
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VfioUser(path) => write!(f, "vfio-user:{}", path.display()),
            Self::Kernel(address) => write!(f, "{address}"),
        }
    }
}

impl DeviceAddress {
    /// Whether it is a device of the kernel.
    pub(crate) const fn is_kernel_device(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }

    /// Whether this process opens a device of the kernel for it, and is then the one whose last close
    /// resets the device. A descriptor that was handed in is somebody else's to close.
    pub(crate) const fn is_own_kernel_device(&self) -> bool {
        matches!(self, Self::Kernel(address) if !matches!(address, airlift_vfio::DeviceAddress::Fd(_)))
    }
}

/// A device with the name that pairs it with the other side's: `ID=DEVICE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedDevice {
    /// The name.
    pub(crate) id: DeviceId,
    /// Where it is.
    pub(crate) address: DeviceAddress,
}

impl FromStr for NamedDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, address) = text.split_once('=').ok_or_else(|| {
            format!("{text:?} has no name: write it as ID=DEVICE, as in net0=pci:0000:65:00.2")
        })?;
        Ok(Self { id: DeviceId::new(id).map_err(|e| e.to_string())?, address: address.parse()? })
    }
}

/// A named device behind a socket: what the simulated machine can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedSocket {
    /// The name.
    pub(crate) id: DeviceId,
    /// The socket of its vfio-user server.
    pub(crate) socket: PathBuf,
}

impl FromStr for NamedSocket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let NamedDevice { id, address } = text.parse()?;
        match address {
            DeviceAddress::VfioUser(socket) => Ok(Self { id, socket }),
            DeviceAddress::Kernel(_) => {
                Err("the simulated machine uses vfio-user devices only: write it as ID=vfio-user:PATH".into())
            }
        }
    }
}

impl fmt::Display for NamedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.id, self.address)
    }
}

/// The socket of a VMM that speaks the protocol of `--vmm`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmmAddress(pub(crate) PathBuf);

impl FromStr for VmmAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            None | Some("") => Err(format!("{text:?} is not the socket of a VMM: write it as unix:PATH")),
            Some(path) => Ok(Self(path.into())),
        }
    }
}

impl fmt::Display for VmmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

/// A point of a migration at which a fault can be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum FaultPhase {
    /// Both sides say what they have; no device was touched.
    Negotiate,
    /// Dirty logging begins, devices go to PRE_COPY.
    Setup,
    /// Rounds of memory and device data, while the guest runs.
    Precopy,
    /// The guest is paused, devices go to P2P and then STOP_COPY.
    Quiesce,
    /// Records, the final dirty sync, and the rest of all data.
    StopCopy,
    /// The destination's devices validate what they have got.
    Load,
    /// The source is about to write COMMIT into its journal.
    Commit,
    /// COMMIT has arrived; the destination is about to run.
    Run,
}

impl FaultPhase {
    /// Every point, in the order of a migration.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 8] = [
        Self::Negotiate,
        Self::Setup,
        Self::Precopy,
        Self::Quiesce,
        Self::StopCopy,
        Self::Load,
        Self::Commit,
        Self::Run,
    ];

    /// The phase of `side` that begins at this point; `None` when that side has none there.
    pub(crate) const fn of(self, side: Side) -> Option<Phase> {
        Some(match (side, self) {
            (_, Self::Negotiate) => Phase::Negotiate,
            (Side::Source, Self::Setup) => Phase::Setup,
            (Side::Source, Self::Precopy) => Phase::Precopy,
            (Side::Source, Self::Quiesce) => Phase::Quiesce,
            (Side::Source, Self::StopCopy) => Phase::StopCopy,
            (Side::Source, Self::Load) => Phase::AwaitLoaded,
            (Side::Source, Self::Commit) => Phase::Commit,
            (Side::Destination, Self::Load) => Phase::Load,
            (Side::Destination, Self::Run) => Phase::Running,
            _ => return None,
        })
    }

    /// Which side is held there: the one whose phase it is.
    pub(crate) const fn held_side(self) -> Side {
        match self {
            Self::Load | Self::Run => Side::Destination,
            _ => Side::Source,
        }
    }

    /// As on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Negotiate => "negotiate",
            Self::Setup => "setup",
            Self::Precopy => "precopy",
            Self::Quiesce => "quiesce",
            Self::StopCopy => "stop-copy",
            Self::Load => "load",
            Self::Commit => "commit",
            Self::Run => "run",
        }
    }
}

/// What `--kill` kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Victim {
    /// The process `airlift send`.
    Sender,
    /// The process `airlift receive`.
    Receiver,
    /// The first device's server on the source.
    SourceDevice,
    /// The first device's server on the destination.
    DestinationDevice,
}

impl Victim {
    /// In words.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Sender => "process airlift send",
            Self::Receiver => "process airlift receive",
            Self::SourceDevice => "server of the source's first device",
            Self::DestinationDevice => "server of the destination's first device",
        }
    }
}

/// `SIDE@PHASE`: whom to kill, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KillSpec {
    /// Whom.
    pub(crate) victim: Victim,
    /// When.
    pub(crate) phase: FaultPhase,
}

fn names<T: ValueEnum>() -> String {
    let names: Vec<_> = T::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
    names.iter().map(clap::builder::PossibleValue::get_name).collect::<Vec<_>>().join(", ")
}

impl FromStr for KillSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (victim, phase) =
            text.split_once('@').ok_or_else(|| "write it as SIDE@PHASE, as in receiver@load".to_owned())?;
        Ok(Self {
            victim: Victim::from_str(victim, false)
                .map_err(|_| format!("SIDE is one of {}", names::<Victim>()))?,
            phase: FaultPhase::from_str(phase, false)
                .map_err(|_| format!("PHASE is one of {}", names::<FaultPhase>()))?,
        })
    }
}

/// How the two hosts of the demo are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportChoice {
    /// TCP on 127.0.0.1.
    Tcp,
    /// A UNIX socket.
    Unix,
}

/// `STEP=TIME`: the deadline of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepDeadline {
    set: fn(&mut Deadlines, Duration),
    time: Duration,
}

impl StepDeadline {
    /// Sets it in `deadlines`.
    pub(crate) fn apply(self, deadlines: &mut Deadlines) {
        (self.set)(deadlines, self.time);
    }
}

/// A step by name, and where its deadline is kept.
type Step = (&'static str, fn(&mut Deadlines, Duration));

const STEPS: [Step; 9] = [
    ("connect", |d, t| d.connect = t),
    ("negotiate", |d, t| d.negotiate = t),
    ("setup", |d, t| d.setup = t),
    ("precopy", |d, t| d.precopy = t),
    ("quiesce", |d, t| d.quiesce = t),
    ("stop-copy", |d, t| d.stop_copy = t),
    ("commit", |d, t| d.commit = t),
    ("rollback", |d, t| d.rollback = t),
    ("silence", |d, t| d.silence = t),
];

impl FromStr for StepDeadline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (step, time) =
            text.split_once('=').ok_or_else(|| "write it as STEP=TIME, as in stop-copy=60s".to_owned())?;
        let (_, set) = STEPS.iter().find(|(name, _)| *name == step).ok_or_else(|| {
            let names: Vec<_> = STEPS.iter().map(|(name, _)| *name).collect();
            format!("STEP is one of {}", names.join(", "))
        })?;
        let Span(time) = time.parse().map_err(|e: crate::units::UnitError| e.to_string())?;
        if time.is_zero() {
            return Err("a deadline of 0 cannot be met".into());
        }
        Ok(Self { set: *set, time })
    }
}

/// What to do when pre-copy does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StallChoice {
    /// Report it and go on.
    Wait,
    /// Stop the guest although the downtime limit will be exceeded.
    Force,
    /// End the migration with the source running.
    Abort,
}

/// One rule broken, or one fault placed, to show that the demo's own verification can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sabotage {
    /// The engine stops devices without taking them all through P2P first.
    SkipP2p,
    /// The engine makes its final dirty sync before the machine's records are saved.
    SyncBeforeRecords,
    /// One byte of a device's data changes after its checksum was checked, and the device does not
    /// validate.
    CorruptDeviceByte,
    /// The same, with a device that validates: it must refuse.
    CorruptDeviceByteChecked,
    /// One byte of guest memory changes on the destination before it runs.
    CorruptMemoryByte,
    /// One page of the last dirty reports is not reported.
    DropDirtyBit,
    /// The device raises an interrupt inside its last arc; it must arrive exactly once.
    LastArcInterrupt,
    /// The first device takes 50 ms longer to stop than the others.
    StopDelay,
}

impl Sabotage {
    /// As on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// Done by `send`.
    pub(crate) const fn is_senders(self) -> bool {
        matches!(self, Self::SkipP2p | Self::SyncBeforeRecords | Self::DropDirtyBit)
    }

    /// Done by `receive`.
    pub(crate) const fn is_receivers(self) -> bool {
        matches!(self, Self::CorruptDeviceByte | Self::CorruptDeviceByteChecked | Self::CorruptMemoryByte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_of_a_migration_is_a_phase_of_the_side_that_is_held() {
        for phase in FaultPhase::ALL {
            assert!(phase.of(phase.held_side()).is_some(), "{}", phase.name());
            assert_eq!(FaultPhase::from_str(phase.name(), false), Ok(phase));
        }
    }

    #[test]
    fn a_deadline_is_set_where_it_is_named() {
        let mut deadlines = Deadlines::default();
        "stop-copy=7s".parse::<StepDeadline>().unwrap().apply(&mut deadlines);
        assert_eq!(deadlines, Deadlines { stop_copy: Duration::from_secs(7), ..Deadlines::default() });
        assert!("nap=7s".parse::<StepDeadline>().unwrap_err().contains("silence"));
        assert!("setup=7".parse::<StepDeadline>().unwrap_err().contains("300ms"));
        assert!("setup=0s".parse::<StepDeadline>().is_err());
    }

    #[test]
    fn a_named_device_reads_back() {
        let text = "net0=vfio-user:/run/a=b.sock";
        let device: NamedDevice = text.parse().unwrap();
        assert_eq!(device.id.as_str(), "net0");
        assert_eq!(device.to_string(), text);
        assert!(!device.address.is_own_kernel_device());
    }

    #[test]
    fn a_device_of_the_kernel_is_our_own_unless_it_was_handed_in() {
        let own = |text: &str| text.parse::<DeviceAddress>().unwrap().is_own_kernel_device();
        assert!(own("pci:65:00.2") && own("cdev:/dev/vfio/devices/vfio0"));
        assert!(own("mdev:00000000-0000-0000-0000-000000000001"));
        assert!(!own("fd:7"));
        assert!("net0=pci:65:00.2".parse::<NamedSocket>().unwrap_err().contains("vfio-user"));
    }
}

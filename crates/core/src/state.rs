//! The states of a migratable device and what a device can do, with the kernel's names and values.
//!
//! Which arcs lead from state to state is not here but in `arcs`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A device's migration state (`enum vfio_device_mig_state`). A state read from outside may be a
/// value that this version does not know: it is kept as [`DeviceState::Unknown`], never guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DeviceState {
    /// The device failed and must be reset (V2-ERROR).
    Error,
    /// Neither runs nor changes.
    Stop,
    /// Runs.
    Running,
    /// Stopped; its state is being read.
    StopCopy,
    /// Stopped; its state is being written.
    Resuming,
    /// Runs, but starts no DMA to other devices.
    #[serde(rename = "RUNNING_P2P")]
    RunningP2p,
    /// Runs; its state is being read.
    PreCopy,
    /// Runs without DMA to other devices; its state is being read.
    #[serde(rename = "PRE_COPY_P2P")]
    PreCopyP2p,
    /// A value that the interface does not define.
    #[serde(untagged)]
    Unknown(u32),
}

impl DeviceState {
    /// Stands where a state could not be read: no interface has this number.
    pub const UNREAD: Self = Self::Unknown(u32::MAX);

    /// The eight states that the interface defines, by value.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The kernel's number for the state.
    #[must_use]
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Error => 0,
            Self::Stop => 1,
            Self::Running => 2,
            Self::StopCopy => 3,
            Self::Resuming => 4,
            Self::RunningP2p => 5,
            Self::PreCopy => 6,
            Self::PreCopyP2p => 7,
            Self::Unknown(raw) => raw,
        }
    }

    /// The state of the kernel's number; every number has one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        match raw {
            0 => Self::Error,
            1 => Self::Stop,
            2 => Self::Running,
            3 => Self::StopCopy,
            4 => Self::Resuming,
            5 => Self::RunningP2p,
            6 => Self::PreCopy,
            7 => Self::PreCopyP2p,
            other => Self::Unknown(other),
        }
    }

    /// In the saving group: PRE_COPY, PRE_COPY_P2P, STOP_COPY. One data session spans the group.
    #[must_use]
    pub const fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }

    /// Runs with its DMA to other devices quiescent.
    #[must_use]
    pub const fn is_p2p(self) -> bool {
        matches!(self, Self::RunningP2p | Self::PreCopyP2p)
    }

    /// Changes by itself: the running states, and every value that is not known to be stopped.
    #[must_use]
    pub const fn is_live(self) -> bool {
        !matches!(self, Self::Stop | Self::StopCopy | Self::Resuming | Self::Error)
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
            Self::Unknown(u32::MAX) => "a state that cannot be read",
            Self::Unknown(raw) => return write!(f, "unknown state {raw}"),
        })
    }
}

bitflags::bitflags! {
    /// Flags of the feature MIGRATION (`struct vfio_device_feature_migration`), as the kernel numbers them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
    pub struct MigrationFlags: u64 {
        /// STOP_COPY and RESUMING are there. Always set on a migratable device.
        const STOP_COPY = 1;
        /// RUNNING_P2P is there.
        const P2P = 2;
        /// PRE_COPY is there.
        const PRE_COPY = 4;
    }
}

/// Which migration interface a device speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interface {
    /// The migration region of Linux 5.8 to 5.17.
    V1,
    /// The state machine of Linux 5.18 and later.
    V2,
}

impl Interface {
    /// The request for another state in the interface's words: the operation of errors about it.
    #[must_use]
    pub const fn set_state(self) -> &'static str {
        match self {
            Self::V1 => "write of device_state",
            Self::V2 => "SET MIG_DEVICE_STATE",
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// What a migratable device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Capabilities {
    /// The interface it speaks.
    pub interface: Interface,
    /// Its states.
    pub flags: MigrationFlags,
    /// It can announce new initial data in PRE_COPY (V2-REINIT).
    pub reinit: bool,
    /// The largest transaction in bytes that it takes while loading; `None`: any segmentation
    /// (V1-WHOLE).
    pub largest_transaction: Option<u64>,
    /// Bytes of its data section: no transaction that it gives is larger. `None` in interface v2, which
    /// has no transactions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_section: Option<u64>,
}

/// A combination of migration flags that the interface leaves undefined (V2-CAPABILITIES).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("undefined combination of migration flags {0:#x}: STOP_COPY must be set and no bit above 0x4")]
pub struct InvalidCapabilities(pub u64);

impl Capabilities {
    /// A v2 device with these flags, without REINIT.
    ///
    /// # Errors
    /// When STOP_COPY is missing or an unknown bit is set (V2-CAPABILITIES).
    pub fn v2(raw_flags: u64) -> Result<Self, InvalidCapabilities> {
        let flags = MigrationFlags::from_bits(raw_flags).ok_or(InvalidCapabilities(raw_flags))?;
        if !flags.contains(MigrationFlags::STOP_COPY) {
            return Err(InvalidCapabilities(raw_flags));
        }
        let interface = Interface::V2;
        Ok(Self { interface, flags, reinit: false, largest_transaction: None, data_section: None })
    }

    /// A v1 device with a data section of so many bytes: PRE_COPY, which every such device has, and no
    /// P2P. `whole`: it takes a transaction only in one round (V1-WHOLE).
    #[must_use]
    pub fn v1(data_section: u64, whole: bool) -> Self {
        Self {
            interface: Interface::V1,
            flags: MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY,
            reinit: false,
            largest_transaction: whole.then_some(data_section),
            data_section: Some(data_section),
        }
    }

    /// It has the P2P states.
    #[must_use]
    pub const fn p2p(&self) -> bool {
        self.flags.contains(MigrationFlags::P2P)
    }

    /// It has the PRE_COPY states.
    #[must_use]
    pub const fn precopy(&self) -> bool {
        self.flags.contains(MigrationFlags::PRE_COPY)
    }

    /// Whether `state` exists on this device.
    #[must_use]
    pub const fn has(&self, state: DeviceState) -> bool {
        match state {
            DeviceState::Error
            | DeviceState::Stop
            | DeviceState::Running
            | DeviceState::StopCopy
            | DeviceState::Resuming => true,
            DeviceState::RunningP2p => self.p2p(),
            DeviceState::PreCopy => self.precopy(),
            DeviceState::PreCopyP2p => self.p2p() && self.precopy(),
            DeviceState::Unknown(_) => false,
        }
    }
}

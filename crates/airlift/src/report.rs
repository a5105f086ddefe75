//! How a migration ended, as each side reports it.

use crate::event::Transition;
use airlift_core::{CompatReport, DeviceId, Failure, Interface};
use serde::{Deserialize, Serialize};

/// The end of a session on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The destination runs.
    Completed,
    /// It failed; the source is as before, or says what is not.
    Aborted,
    /// It was cancelled; the source is as before.
    Cancelled,
    /// The sides do not match; no device was touched.
    Incompatible,
    /// Only the other side, or an operator, can say which side may run.
    InDoubt,
}

impl Outcome {
    /// What the commit protocol's outcome is to the user of this side.
    pub(crate) const fn of(
        protocol: &airlift_core::commit::Outcome,
        incompatible: bool,
        cancelled: bool,
    ) -> Self {
        use airlift_core::commit::Outcome as Protocol;
        match protocol {
            Protocol::Completed => Self::Completed,
            Protocol::Cancelled => Self::Cancelled,
            Protocol::Aborted { .. } if incompatible => Self::Incompatible,
            Protocol::Aborted { .. } if cancelled => Self::Cancelled,
            Protocol::Aborted { .. } => Self::Aborted,
            Protocol::InDoubt { .. } => Self::InDoubt,
        }
    }
}

/// Whether a side runs: known, or not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// It runs.
    Yes,
    /// It does not run.
    No,
    /// This side cannot say.
    Unknown,
}

impl Serialize for Running {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Yes => serializer.serialize_bool(true),
            Self::No => serializer.serialize_bool(false),
            Self::Unknown => serializer.serialize_str("unknown"),
        }
    }
}

impl<'de> Deserialize<'de> for Running {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Known(bool),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Known(true) => Ok(Self::Yes),
            Raw::Known(false) => Ok(Self::No),
            Raw::Text(text) if text == "unknown" => Ok(Self::Unknown),
            Raw::Text(text) => {
                Err(serde::de::Error::custom(format!("neither a bool nor \"unknown\": {text:?}")))
            }
        }
    }
}

/// The terms of the downtime in milliseconds: disjoint on the critical path, their sum is the
/// downtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeTerms {
    /// vCPUs paused and device access closed.
    pub pause: f64,
    /// All devices to P2P, then to STOP_COPY.
    pub quiesce: f64,
    /// Interrupts drained and the machine's records saved.
    pub records: f64,
    /// The last fetch of dirty reports.
    pub final_dirty_sync: f64,
    /// Sending device data. Memory goes at the same time: of the two, the one that ends first has its
    /// whole time as its term, the other one what it took longer. What was still under way to the
    /// destination after the last byte had been given to the connections is in here too.
    pub device_data: f64,
    /// Sending the remaining memory, as [`device_data`](Self::device_data) says; also waiting for
    /// memory that the VMM moves itself, on both sides.
    pub memory: f64,
    /// RESUMING -> STOP on the destination, all devices.
    pub load: f64,
    /// The machine's and the devices' records restored on the destination.
    pub config: f64,
    /// The source's journal write of COMMIT and the destination's writes for LOADED, COMMITTED and
    /// RUN_STARTED. The way of COMMIT over the wire is in `other`.
    pub commit: f64,
    /// Devices STOP -> RUNNING and vCPUs on the destination.
    pub run: f64,
    /// What no other term names: the wire's latency and hand-overs between threads.
    pub other: f64,
}

impl DowntimeTerms {
    /// The sum of all terms but `other`, in milliseconds.
    #[must_use]
    pub fn named(&self) -> f64 {
        self.pause
            + self.quiesce
            + self.records
            + self.final_dirty_sync
            + self.device_data
            + self.memory
            + self.load
            + self.config
            + self.commit
            + self.run
    }
}

/// What a device cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Its name.
    pub id: DeviceId,
    /// The interface it speaks.
    pub interface: Interface,
    /// Bytes of the first generation of initial data.
    pub initial_bytes: u64,
    /// Bytes of device data sent in PRE_COPY, initial data included.
    pub precopy_bytes: u64,
    /// Bytes of device data sent in STOP_COPY.
    pub stop_copy_bytes: u64,
    /// Every arc that this side asked for.
    pub transitions: Vec<Transition>,
    /// Why nothing more is asked of the device, when it was given up.
    pub quarantined: Option<String>,
    /// It was reset: what the guest had in it is lost.
    pub was_reset: bool,
}

/// What memory cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Size of guest memory in bytes.
    pub bytes_total: u64,
    /// Bytes of pages sent, without frames' headers and zero pages.
    pub bytes_sent: u64,
    /// Pages (of 4 KiB) that were zero and sent as such.
    pub pages_zero: u64,
    /// Pages sent again because they were written in the meantime.
    pub pages_resent: u64,
}

/// The report of one side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// The session's id, 32 hexadecimal digits; empty before one was agreed.
    pub session: String,
    /// The end.
    pub outcome: Outcome,
    /// Whether the guest runs on the source, as far as this side knows.
    pub source_running: Running,
    /// Whether the guest runs on the destination, as far as this side knows.
    pub destination_running: Running,
    /// Milliseconds from the first connection to the end.
    pub total_ms: f64,
    /// Milliseconds from the call to pause until RUNNING arrived. Source, completed migrations only.
    pub downtime_ms: Option<f64>,
    /// Milliseconds from the call to pause until vCPUs ran again here, when it was rolled back.
    pub blackout_ms: Option<f64>,
    /// The terms of `downtime_ms`.
    pub downtime_terms_ms: Option<DowntimeTerms>,
    /// Rounds of memory before the stop.
    pub rounds: u32,
    /// By device.
    pub devices: Vec<DeviceReport>,
    /// Memory.
    pub memory: MemoryReport,
    /// The compatibility report, once the sides were compared.
    pub compatibility: Option<CompatReport>,
    /// Declarations and fallbacks that the migration rests on (`assume_no_peer_dma`, a domain whose
    /// pages are all dirty).
    pub notes: Vec<String>,
    /// What failed.
    pub error: Option<Failure>,
}

//! The deterministic centre of Airlift.
//!
//! What a migration *is* stands here as plain data and functions: the device states and the arcs
//! between them, the plans that take many devices through a switchover and back, dirty bitmaps, the
//! downtime estimate, the compatibility report, and the source and destination machines with their
//! commit protocol. Nothing in this crate does I/O, reads a clock or starts a thread: time is a
//! parameter, and effects are values that the caller carries out. That is what lets a simulator run
//! both sides against each other thousands of times a second.
//!
//! The traits that the rest of Airlift is written against ([`MigrationDevice`], [`SaveSession`],
//! [`LoadSession`], [`DirtySource`], [`RegionAccess`]) are here too, so that devices need no other crate.
//!
//! Interface rules are named by their ids in `docs/rules.md` (`V2-ENOMSG` and so on).
#![forbid(unsafe_code)]

mod address;
mod arcs;
pub mod commit;
mod compat;
mod convergence;
mod device;
mod dirty;
mod dirty_map;
mod dirty_source;
mod error;
mod estimate;
mod identity;
mod phase;
mod plan;
pub mod region;
mod rollback;
mod state;
mod time;
pub mod v1;

pub use address::{Gpa, GpaRange, Iova, IovaMap, IovaMapping, IovaRange, MemoryLayout, MemoryRegion};
pub use arcs::{Arc, ArcSession, PathError, arcs, next as next_state, path};
pub use compat::{CompatReport, DeviceOffer, Finding, Limits, Offer, Severity, compare};
pub use convergence::{Convergence, ConvergenceConfig, Decision, DeviceLeft, Round, StallCause, StallPolicy};
pub use device::{
    Chunk, Interrupter, LoadSession, MigrationDevice, Piece, PrecopyInfo, SaveSession, Session,
};
pub use dirty::{BLOCK_SIZE, DirtyBitmap, InvalidRange, MAX_TRACKED_BYTES, PAGE_SIZE, ReportRanges};
pub use dirty_map::{DirtyMap, InvalidLayout};
pub use dirty_source::{DirtyError, DirtySource, DomainId};
pub use error::{DeviceError, DeviceErrorKind, Errno, Failure, TransitionError};
pub use estimate::{DeviceTerms, DowntimeEstimate, EstimateInputs, rate, transfer_time};
pub use identity::{DeviceId, DeviceIdentity, InvalidDeviceId, StateFormat};
pub use phase::{Phase, Side};
pub use plan::{
    Action, PausePlan, PeerDma, PlanDevice, PlanRefusal, QuiescePlan, RunPlan, Stage, StageKind, Step, Unfit,
};
pub use region::{RegionAccess, RegionArea};
pub use rollback::{Fate, Recovered, Recovery, ResetPolicy, ResumeDevice, ResumePlan, Rollback, recover};
pub use state::{Capabilities, DeviceState, Interface, InvalidCapabilities, MigrationFlags};
pub use time::{Clock, Timestamp};

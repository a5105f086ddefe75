//! The device's own side: what the author of a vfio-user server implements.
//!
//! The server does the protocol, combinations of arcs, bounds and error replies. It calls a
//! [`Device`] in the order of arrival on one thread; [`Saver`]s and [`Loader`]s run on another, so
//! that guest accesses do not wait behind migration data.

use crate::{Dma, Done, Irqs, V1Section, V1SectionError};
use airlift_core::{
    Arc as StateArc, DeviceState, Errno, InvalidCapabilities, MigrationFlags, PrecopyInfo, StateFormat,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Number of a region, as in VFIO's PCI numbering: 0-5 BAR, 6 ROM, 7 configuration space, 8 VGA.
pub type RegionIndex = u32;

/// What a device is; asked for once, when the server starts.
#[derive(Clone, Debug)]
pub struct Description {
    /// Regions by index; an index that is left out is a region of size 0.
    pub regions: Vec<RegionDescription>,
    /// Interrupts by index; an index that is left out has count 0.
    pub irqs: Vec<IrqDescription>,
    /// Present on a PCI device.
    pub pci: Option<PciIds>,
    /// Present on a device that can be migrated.
    pub migration: Option<MigrationSupport>,
    /// The format of its state.
    pub format: StateFormat,
}

/// PCI identifiers, served through the first bytes of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
    /// Class code, 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// How a device can be migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationSupport {
    /// Over which interface it is served.
    pub interface: MigrationInterface,
    /// Its states. Over interface v1: STOP_COPY and PRE_COPY, which every device must have there, also
    /// one that has nothing to give in it; and no P2P (V1-ARCS). A device with flags that its interface
    /// does not have is not served ([`DescriptionError`]).
    pub flags: MigrationFlags,
    /// The server logs the DMA that goes through [`Dma`] and serves features 6, 7 and 8.
    pub dma_logging: bool,
    /// It announces new initial data in PRE_COPY, to clients that opted in.
    pub reinit: bool,
}

/// The interface over which clients migrate a device. The device's own side is the same in both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationInterface {
    /// The state machine: features and data messages.
    V2,
    /// The migration region, which the server makes and serves: under the first free index from 9 on.
    /// The device neither describes it nor sees accesses to it. Arcs that a client asks for in one write
    /// come one by one, in the order of V1-ORDER; when one fails in between, the server walks the
    /// device back to RUNNING or STOP, where it was there before, and otherwise takes it to be in ERROR
    /// (V1-READBACK). [`MigrationSupport::reinit`] has no place in this interface.
    V1(V1Section),
}

/// Why a device that is described so is not served: the cause in the error of kind
/// [`InvalidInput`](std::io::ErrorKind::InvalidInput) that [`Server::serve`](crate::Server::serve) and
/// [`Server::serve_stream`](crate::Server::serve_stream) give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// Flags that interface v2 leaves undefined (V2-CAPABILITIES).
    #[error(transparent)]
    Flags(#[from] InvalidCapabilities),
    /// Flags other than those that every device of interface v1 has (V1-ARCS).
    #[error("the flags are {0:?}: interface v1 has STOP_COPY and PRE_COPY, and no P2P")]
    V1Flags(MigrationFlags),
    /// A data section that cannot be (V1-REGION, V1-AREAS).
    #[error(transparent)]
    Section(#[from] V1SectionError),
    /// The device takes whole transactions only, and the server has no way to say so (V1-WHOLE): a source
    /// with a larger section would be found too late.
    #[error(
        "the device takes whole transactions only, which clients learn from an extension: serve it with extensions"
    )]
    WholeTransactions,
    /// Every number that the migration region could have is a region's of the device.
    #[error("no number is left for the migration region")]
    Index,
}

impl From<DescriptionError> for std::io::Error {
    fn from(error: DescriptionError) -> Self {
        Self::new(std::io::ErrorKind::InvalidInput, error)
    }
}

/// One region.
#[derive(Clone, Debug)]
pub struct RegionDescription {
    /// Its number.
    pub index: RegionIndex,
    /// Size in bytes.
    pub size: u64,
    /// A client may read it.
    pub readable: bool,
    /// A client may write it.
    pub writable: bool,
    /// What of it a client may map.
    pub mapping: Option<RegionMapping>,
}

/// The file behind a region that clients may map.
#[derive(Clone, Debug)]
pub struct RegionMapping {
    /// The file, usually a memfd.
    pub fd: Arc<OwnedFd>,
    /// Where the region begins in the file, in bytes.
    pub offset: u64,
    /// What may be mapped.
    pub areas: RegionAreas,
}

/// Which parts of a region may be mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegionAreas {
    /// All of it.
    Whole,
    /// These `(offset, length)` in bytes; the rest is trapped (SPARSE_MMAP).
    Sparse(Vec<(u64, u64)>),
}

/// One interrupt index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqDescription {
    /// Its number: 0 INTx, 1 MSI, 2 MSI-X, 3 ERR, 4 REQ.
    pub index: u32,
    /// How many interrupts it has.
    pub count: u32,
    /// It can be masked and unmasked.
    pub maskable: bool,
}

/// A client came.
#[derive(Debug)]
pub struct Attachment {
    /// Access to the client's memory; lives as long as the attachment.
    pub dma: Dma,
    /// The client's interrupts.
    pub irqs: Irqs,
    /// The migration state as it was kept from before.
    pub state: DeviceState,
}

/// Why a client went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detach {
    /// It closed its connection.
    Closed,
    /// It broke the protocol.
    Protocol(String),
    /// The server is being stopped.
    Shutdown,
}

/// A change of the memory that the client lets the device use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaChange {
    /// Mapped: from now on the range can be used.
    Mapped {
        /// First address.
        iova: u64,
        /// Length in bytes.
        length: u64,
    },
    /// To be unmapped: the device must have let go of it when it completes the call.
    Unmapping {
        /// First address.
        iova: u64,
        /// Length in bytes.
        length: u64,
    },
}

/// A device that a vfio-user server serves.
///
/// Methods are called in the order in which a client's requests arrive, on one thread, and must not
/// block for long. What takes time takes a [`Done`] and answers later; until then the server still
/// answers region accesses.
pub trait Device: Send {
    /// What the device is. Called once.
    fn describe(&self) -> Description;

    /// A client came.
    fn attach(&mut self, attachment: Attachment);

    /// The client went: its memory and interrupts are gone when this returns, the device's own
    /// state stays, workers park. A data session was ended before: from STOP_COPY the device is in
    /// STOP, from PRE_COPY in RUNNING, from RESUMING in ERROR.
    fn detach(&mut self, why: Detach);

    /// Reads from a region that is not mapped, within its bounds.
    ///
    /// # Errors
    /// The error number that the client gets.
    fn region_read(&mut self, region: RegionIndex, offset: u64, buf: &mut [u8]) -> Result<(), Errno>;

    /// Writes to a region, within its bounds.
    ///
    /// # Errors
    /// The error number that the client gets.
    fn region_write(&mut self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// The client's memory changes.
    fn dma_changed(&mut self, change: DmaChange, done: Done);

    /// Resets the device: afterwards it is as it was made, in RUNNING. Savers and loaders are gone.
    fn reset(&mut self, done: Done);

    /// Makes one arc. Combinations are the server's; only arcs that the description's flags have are
    /// asked for. The arc that ends RESUMING comes when the loader has been dropped; it is where the
    /// device validates and may fail.
    fn transition(&mut self, arc: StateArc, done: Done);

    /// A reader of the device's state; asked for after each arc that opens a saving session. It
    /// lives through PRE_COPY, PRE_COPY_P2P and STOP_COPY, on a thread of its own.
    ///
    /// # Errors
    /// The error number that the client's first read gets.
    fn saver(&mut self) -> Result<Box<dyn Saver>, Errno>;

    /// A writer of the device's state; asked for after the arc to RESUMING.
    ///
    /// # Errors
    /// The error number that the client's first write gets.
    fn loader(&mut self) -> Result<Box<dyn Loader>, Errno>;
}

/// Reads a device's state for a client.
///
/// What the client is told of sizes comes from [`precopy_info`](Self::precopy_info) and
/// [`stop_copy_size`](Self::stop_copy_size), which are asked between reads. Neither counts what was read
/// already.
///
/// | | asked for `precopy_info` | asked for `stop_copy_size` |
/// |---|---|---|
/// | v2, PRE_COPY and PRE_COPY_P2P | at each PRECOPY_INFO | at each MIG_DATA_SIZE |
/// | v2, STOP_COPY | never | at each MIG_DATA_SIZE |
/// | v1, PRE_COPY | at each read of `pending_bytes` | at each read of `pending_bytes` |
/// | v1, STOP_COPY | never | at each read of `pending_bytes`, but for the one that finds the end |
///
/// Over v2 both questions are extensions: without
/// [`ServerOptions::extensions`](crate::ServerOptions::extensions) they are never asked.
///
/// Over v1 one number has to say it all. A read of `pending_bytes` first [reads](Self::read) the next chunk,
/// unless one is waiting to be taken, and is then answered with that chunk's bytes and:
///
/// - in PRE_COPY the greater of the two: `initial_bytes` and `dirty_bytes` together, or `stop_copy_size`.
///   So the client knows before the stop what comes after it. As long as nothing can be read now it
///   gets a chunk of 0 bytes, which is a pause (V1-HOLLOW);
/// - in STOP_COPY `stop_copy_size`. Where nothing was read the answer is 0, the end, and no estimate
///   changes that.
pub trait Saver: Send {
    /// Bytes that can still be read in PRE_COPY, from now: of initial data, and of what has changed since
    /// it was read. [`PrecopyInfo::reinit`] is told over v2 alone, to a client that opted in.
    fn precopy_info(&mut self) -> PrecopyInfo;

    /// Estimate of the bytes that would be read if the device were in STOP_COPY now, to the end: for a
    /// device that gives something in PRE_COPY that includes what is left of it.
    fn stop_copy_size(&mut self) -> u64;

    /// Reads the next bytes. 0: in PRE_COPY states nothing now, in STOP_COPY the end. The server
    /// calls again until its buffer is full or 0 is returned. Over interface v1 it does not: what one
    /// call gives is one transaction, whose size the other side keeps (V1-CHUNK).
    ///
    /// # Errors
    /// The error number that the client gets. Over interface v1 the session is over with it: the client
    /// gets nothing else until it leaves the state (V1-LOOP-ERROR).
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Errno>;
}

/// Writes a device's state for a client.
pub trait Loader: Send {
    /// Takes all of `data`. Over interface v1 that is one round: a transaction, or a part of one that is
    /// larger than the section (V1-ROUNDS).
    ///
    /// # Errors
    /// The error number that the client gets; further writes are refused.
    fn write(&mut self, data: &[u8]) -> Result<(), Errno>;
}

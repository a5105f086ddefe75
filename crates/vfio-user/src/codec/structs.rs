//! The fixed parts of the messages, as they stand on the wire.
#![expect(missing_debug_implementations, reason = "zerocopy derives helper types; ours all have Debug")]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct $name {
                $($(#[$fmeta])* pub $field: $type,)*
            }
        )*
    };
}

wire! {
    /// DMA_MAP, 32 bytes; at most one descriptor comes with it.
    DmaMap {
        /// Bytes of this request.
        argsz: u32,
        /// [`DmaMapFlags`].
        flags: u32,
        /// Where the range begins in the file, in bytes.
        offset: u64,
        /// First address.
        iova: u64,
        /// Length in bytes.
        size: u64,
    }
    /// DMA_UNMAP, 24 bytes, echoed in the reply.
    DmaUnmap {
        /// Bytes that the reply may have.
        argsz: u32,
        /// [`DmaUnmapFlags`].
        flags: u32,
        /// First address.
        iova: u64,
        /// Length in bytes.
        size: u64,
    }
    /// DEVICE_GET_INFO, 16 bytes both ways.
    DeviceInfo {
        /// Bytes that the reply may have, or has.
        argsz: u32,
        /// [`DeviceInfoFlags`].
        flags: u32,
        /// Regions there are.
        num_regions: u32,
        /// Interrupt indexes there are.
        num_irqs: u32,
    }
    /// DEVICE_GET_REGION_INFO, 32 bytes both ways; capabilities follow in the reply.
    RegionInfo {
        /// Bytes that the reply may have, or would need.
        argsz: u32,
        /// [`RegionInfoFlags`].
        flags: u32,
        /// The region.
        index: u32,
        /// Where the first capability stands, from the start of this structure; 0: none.
        cap_offset: u32,
        /// Size in bytes.
        size: u64,
        /// Where the region begins in the file that comes with the reply.
        offset: u64,
    }
    /// The head of a region's capability.
    RegionCap {
        /// Which capability; 1 is the list of areas that can be mapped.
        id: u16,
        /// Its version.
        version: u16,
        /// Where the next one stands, from the start of the region info; 0: none.
        next: u32,
        /// For the list of areas: how many there are.
        count: u32,
        /// Not used.
        reserved: u32,
    }
    /// The TYPE capability of a region, number 2.
    RegionTypeCap {
        /// 2.
        id: u16,
        /// Its version, 1.
        version: u16,
        /// Where the next one stands, from the start of the region info; 0: none.
        next: u32,
        /// The type; 3 is migration.
        kind: u32,
        /// The subtype; of migration 1 is the region of interface v1.
        subtype: u32,
    }
    /// One area of a region that can be mapped.
    SparseArea {
        /// Where it begins in the region, in bytes.
        offset: u64,
        /// Length in bytes.
        size: u64,
    }
    /// DEVICE_GET_REGION_IO_FDS, 16 bytes.
    RegionIoFds {
        /// Bytes that the reply may have, or needs.
        argsz: u32,
        /// Not used.
        flags: u32,
        /// The region.
        index: u32,
        /// Entries that follow in the reply.
        count: u32,
    }
    /// DEVICE_GET_IRQ_INFO, 16 bytes both ways.
    IrqInfo {
        /// Bytes that the reply may have, or has.
        argsz: u32,
        /// [`IrqInfoFlags`].
        flags: u32,
        /// The interrupt index.
        index: u32,
        /// Interrupts it has.
        count: u32,
    }
    /// DEVICE_SET_IRQS, 20 bytes and perhaps a byte for each interrupt; descriptors come with it.
    IrqSet {
        /// Bytes of this request.
        argsz: u32,
        /// [`IrqSetFlags`].
        flags: u32,
        /// The interrupt index.
        index: u32,
        /// First interrupt.
        start: u32,
        /// How many.
        count: u32,
    }
    /// REGION_READ and REGION_WRITE, 16 bytes both ways; data follows where there is any.
    RegionAccess {
        /// Where in the region, in bytes.
        offset: u64,
        /// The region.
        region: u32,
        /// Bytes to be read or written, or that were.
        count: u32,
    }
    /// One write of REGION_WRITE_MULTI, 24 bytes, behind a count of 8 bytes.
    RegionWriteMulti {
        /// Where in the region, in bytes.
        offset: u64,
        /// The region.
        region: u32,
        /// Bytes, at most 8.
        count: u32,
        /// The data.
        data: [u8; 8],
    }
    /// DMA_READ and DMA_WRITE, 16 bytes both ways; data follows where there is any.
    DmaData {
        /// First address.
        iova: u64,
        /// Bytes.
        count: u64,
    }
    /// DEVICE_FEATURE, 8 bytes both ways; the feature's data follows.
    FeatureHeader {
        /// Bytes that the reply may have, or needs, from the start of this structure.
        argsz: u32,
        /// The feature's index in the low 16 bits, and [`FeatureFlags`].
        flags: u32,
    }
    /// Data of the feature MIG_DEVICE_STATE.
    MigState {
        /// The state.
        device_state: u32,
        /// Not used over a socket.
        data_fd: u32,
    }
    /// Head of the data of DMA_LOGGING_START; ranges follow.
    LoggingControl {
        /// The page size that is wanted, or was chosen, in bytes.
        page_size: u64,
        /// Ranges that follow; 0: all memory.
        num_ranges: u32,
        /// Not used.
        reserved: u32,
    }
    /// One range of DMA_LOGGING_START.
    LoggingRange {
        /// First address.
        iova: u64,
        /// Length in bytes.
        length: u64,
    }
    /// Head of the data of DMA_LOGGING_REPORT both ways; the bitmap follows in the reply.
    LoggingReport {
        /// First address.
        iova: u64,
        /// Length in bytes.
        length: u64,
        /// Bytes that a bit stands for.
        page_size: u64,
    }
    /// MIG_DATA_READ both ways and MIG_DATA_WRITE; data follows where there is any.
    MigData {
        /// 8 and the bytes of data.
        argsz: u32,
        /// Bytes of data.
        size: u32,
    }
    /// Data of the feature PRECOPY_INFO of Airlift.
    PrecopyInfoReply {
        /// Bytes of this structure.
        argsz: u32,
        /// Bit 0: new initial data, for a client that opted in.
        flags: u32,
        /// Bytes of initial data left.
        initial_bytes: u64,
        /// Bytes of changed data left.
        dirty_bytes: u64,
    }
    /// Head of the data of the feature STATE_FORMAT of Airlift; versions and the name follow.
    StateFormatHeader {
        /// The version that the device writes.
        version: u32,
        /// How many versions it reads; they follow, 4 bytes each.
        accepts: u16,
        /// Bytes of the name, which stands behind the versions. [`StateFormatFlags`] follow it, 4 bytes; an older
        /// server leaves them out.
        name: u16,
    }
    /// Data of the feature MIGRATION_SOCKET of Airlift; a descriptor comes with the reply.
    SocketReply {
        /// Not used, 0.
        flags: u32,
        /// Not used, 0.
        reserved: u32,
    }
}

/// The features, by their indexes.
pub mod feature {
    /// What states the device has.
    pub const MIGRATION: u16 = 1;
    /// The state.
    pub const MIG_DEVICE_STATE: u16 = 2;
    /// Begins to log DMA.
    pub const DMA_LOGGING_START: u16 = 6;
    /// Ends it.
    pub const DMA_LOGGING_STOP: u16 = 7;
    /// Fetches and clears what was logged.
    pub const DMA_LOGGING_REPORT: u16 = 8;
    /// Estimate of the stop-copy data; the kernel's number, not in the protocol's text.
    pub const MIG_DATA_SIZE: u16 = 9;
    /// Opts in to announcements of new initial data; as above.
    pub const MIG_PRECOPY_INFO_V2: u16 = 12;
    /// What pre-copy still has. Airlift's own.
    pub const PRECOPY_INFO: u16 = 0xa100;
    /// The format of the state. Airlift's own.
    pub const STATE_FORMAT: u16 = 0xa101;
    /// A second connection, for migration alone. Airlift's own.
    pub const MIGRATION_SOCKET: u16 = 0xa102;
}

bitflags::bitflags! {
    /// Flags of DMA_MAP.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaMapFlags: u32 {
        /// The server may read.
        const READ = 1;
        /// The server may write.
        const WRITE = 2;
        /// The descriptor is to be mapped (an extension of libvfio-user).
        const MMAP = 4;
    }
    /// Flags of DMA_UNMAP.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaUnmapFlags: u32 {
        /// All mappings; address and size are 0 (an extension of libvfio-user).
        const ALL = 2;
    }
    /// Flags of DEVICE_GET_INFO.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceInfoFlags: u32 {
        /// It can be reset.
        const RESET = 1;
        /// It is a PCI device.
        const PCI = 2;
    }
    /// Flags of DEVICE_GET_REGION_INFO.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionInfoFlags: u32 {
        /// It can be read.
        const READ = 1;
        /// It can be written.
        const WRITE = 2;
        /// It can be mapped.
        const MMAP = 4;
        /// Capabilities follow.
        const CAPS = 8;
    }
    /// Flags of DEVICE_GET_IRQ_INFO.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqInfoFlags: u32 {
        /// It is signalled by eventfds.
        const EVENTFD = 1;
        /// It can be masked.
        const MASKABLE = 2;
        /// It is masked when it fires.
        const AUTOMASKED = 4;
        /// The number of wired interrupts cannot be changed in use.
        const NORESIZE = 8;
    }
    /// Flags of DEVICE_SET_IRQS: one kind of data and one action.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqSetFlags: u32 {
        /// No data: all of the interrupts.
        const NONE = 1;
        /// A byte for each: those that are not 0.
        const BOOL = 2;
        /// A descriptor for each, or none at all.
        const EVENTFD = 4;
        /// Mask.
        const MASK = 8;
        /// Unmask.
        const UNMASK = 16;
        /// Wire, or trigger.
        const TRIGGER = 32;
        /// All kinds of data.
        const DATA = 7;
        /// All actions.
        const ACTION = 56;
    }
    /// Flags behind the name in the feature STATE_FORMAT of Airlift.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct StateFormatFlags: u32 {
        /// The device also reads data of interface v1 in this format.
        const READS_V1 = 1;
        /// The device also reads data of interface v2 in this format.
        const READS_V2 = 2;
        /// The device takes a transaction of interface v1 only in one round (V1-WHOLE).
        const WHOLE_TRANSACTIONS = 4;
    }
    /// Flags of DEVICE_FEATURE, above the index.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FeatureFlags: u32 {
        /// Read the feature.
        const GET = 1 << 16;
        /// Set the feature.
        const SET = 1 << 17;
        /// Ask whether it is there, and change nothing.
        const PROBE = 1 << 18;
    }
}

impl FeatureHeader {
    /// The head of a request for feature `index`.
    #[must_use]
    pub const fn new(argsz: u32, index: u16, flags: FeatureFlags) -> Self {
        // Widening: every index fits.
        Self { argsz, flags: flags.bits() | index as u32 }
    }

    /// The feature's index.
    #[must_use]
    pub const fn index(&self) -> u16 {
        let [low, high, _, _] = self.flags.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// The flags above the index, or `None` when there are unknown ones.
    #[must_use]
    pub const fn operation(&self) -> Option<FeatureFlags> {
        FeatureFlags::from_bits(self.flags & !0xffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_protocol() {
        assert_eq!(size_of::<DmaMap>(), 32);
        assert_eq!(size_of::<DmaUnmap>(), 24);
        assert_eq!(size_of::<DeviceInfo>(), 16);
        assert_eq!(size_of::<RegionInfo>(), 32);
        assert_eq!(size_of::<RegionCap>(), 16);
        assert_eq!(size_of::<IrqSet>(), 20);
        assert_eq!(size_of::<RegionAccess>(), 16);
        assert_eq!(size_of::<RegionWriteMulti>(), 24);
        assert_eq!(size_of::<LoggingReport>(), 24);
        assert_eq!(size_of::<PrecopyInfoReply>(), 24);
        assert_eq!(size_of::<StateFormatHeader>(), 8);
    }

    #[test]
    fn the_index_of_an_own_feature_fits_beside_the_flags() {
        let head = FeatureHeader::new(8, feature::MIGRATION_SOCKET, FeatureFlags::GET);
        assert_eq!(head.flags, 0x0001_a102);
        assert_eq!(head.index(), 0xa102);
        assert_eq!(head.operation(), Some(FeatureFlags::GET));
        assert_eq!(FeatureHeader { argsz: 8, flags: 1 << 19 }.operation(), None);
    }
}

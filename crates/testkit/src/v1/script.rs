//! What a test says of a double: what it is, what it gives, and what goes wrong.

use airlift_core::{Errno, RegionArea};

/// What is accessed, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `device_state` is read.
    ReadState,
    /// `device_state` is written.
    WriteState,
    /// `pending_bytes` is read.
    ReadPending,
    /// `data_offset` is read.
    ReadOffset,
    /// `data_size` is read.
    ReadSize,
    /// `data_size` is written.
    WriteSize,
    /// Data is read through the transport.
    ReadTrapped,
    /// Data is written through the transport.
    WriteTrapped,
    /// Data is copied out of a mapping.
    ReadMapped,
    /// Data is copied into a mapping.
    WriteMapped,
    /// Anything else, which the interface does not allow or which has no effect.
    Other,
}

impl Access {
    /// Whether it moves data.
    #[must_use]
    pub const fn is_data(self) -> bool {
        matches!(self, Self::ReadTrapped | Self::WriteTrapped | Self::ReadMapped | Self::WriteMapped)
    }
}

/// One access, as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it was.
    pub access: Access,
    /// Where, in bytes from the region's start.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

/// What a device does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It refuses; nothing changes.
    Refused(Errno),
    /// It refuses, and these are the bits of its state afterwards; its session is over.
    RefusedInto(Errno, u32),
    /// It is gone, for good.
    Gone,
    /// The field reads like this, whatever the device does. Other accesses are as usual.
    Answers(u64),
    /// It was reset just before, by itself: what it held is lost, and what it would answer is that of a
    /// device that has just been made.
    Reset,
    /// These are the bits of its state from just before, by itself; its session is over.
    Moved(u32),
    /// A write of `device_state` is accepted, and the bits are then these.
    Into(u32),
}

/// When a device does something wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// At accesses of this kind; `None`: of any.
    pub access: Option<Access>,
    /// The first one, counted from now on; 0 is the next.
    pub after: u64,
    /// How many.
    pub times: u64,
    /// What happens.
    pub wrong: Wrong,
}

impl Fault {
    /// The next access of this kind goes wrong.
    #[must_use]
    pub const fn next(access: Access, wrong: Wrong) -> Self {
        Self { access: Some(access), after: 0, times: 1, wrong }
    }

    /// Behind `after` more.
    #[must_use]
    pub const fn after(self, after: u64) -> Self {
        Self { after, ..self }
    }

    /// From then on always.
    #[must_use]
    pub const fn for_ever(self) -> Self {
        Self { times: u64::MAX, ..self }
    }
}

/// What a device gives when it is saved. Anything is allowed by the interface as long as a number that
/// `pending` answers is above 0; `hollow` is what bad devices do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Its state, in transactions; none is empty, or larger than the section.
    pub chunks: Vec<Vec<u8>>,
    /// So many of them it gives while it runs; those that were not taken then come with the rest.
    pub precopy: usize,
    /// So many at the end it makes only when everything before has been taken, one by one: until then
    /// `pending_bytes` does not count them.
    pub late: usize,
    /// What `pending_bytes` answers in turn as long as there is something; empty: what there is.
    pub pending: Vec<u64>,
    /// How often it gives 0 bytes before the transaction of the same place, with bytes pending.
    /// `u32::MAX`: it never comes.
    pub hollow: Vec<u32>,
    /// Where in the section chunks are put, in turn, as far as there is room, in bytes; empty: at its
    /// start. Also where a loading device wants them.
    pub places: Vec<u64>,
}

impl Plan {
    /// These transactions, `precopy` of them while it runs.
    #[must_use]
    pub fn new(chunks: Vec<Vec<u8>>, precopy: usize) -> Self {
        Self { chunks, precopy, ..Self::default() }
    }

    /// All of its bytes.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        self.chunks.concat()
    }
}

/// What a double is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoubleOptions {
    /// Bytes of the data section, above 0.
    pub section: u64,
    /// Where it begins in the region, in bytes: behind the fields.
    pub start: u64,
    /// What of the region is mapped.
    pub areas: Vec<RegionArea>,
    /// Bits of `device_state` besides the three, which never change (V1-RESERVED).
    pub reserved: u32,
    /// What it gives.
    pub plan: Plan,
    /// The only data that it takes; it validates that when RESUMING ends.
    pub expects: Option<Vec<u8>>,
    /// It takes transactions only whole (V1-WHOLE).
    pub whole: bool,
}

impl DoubleOptions {
    /// A device with a section of `section` bytes of which this is mapped.
    #[must_use]
    pub fn new(layout: super::Layout, section: u64) -> Self {
        let (start, areas) = layout.areas(section);
        Self {
            section,
            start,
            areas,
            reserved: 0xa117_0050,
            plan: Plan::default(),
            expects: None,
            whole: false,
        }
    }

    /// That gives this.
    #[must_use]
    pub fn with(self, plan: Plan) -> Self {
        Self { plan, ..self }
    }

    /// That takes only this.
    #[must_use]
    pub fn expecting(self, data: Vec<u8>) -> Self {
        Self { expects: Some(data), ..self }
    }
}

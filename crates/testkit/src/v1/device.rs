//! The double's state machine: what it answers to each access, and what it holds against its user.
//!
//! It shares no code with the devices and users that it tests: numbers of bits and fields, the arcs, and the
//! two loops are written down here once more, from the interface. Whether mapped areas are used as they
//! should be is seen in `region`.

use super::script::{Access, DoubleOptions, Fault, Record, Wrong};
use airlift_core::{DeviceError, DeviceErrorKind, Errno};

/// Where the fields end.
const FIELDS: u64 = 32;
const BITS: u32 = 0b111;
const STOP: u32 = 0b000;
const RUNNING: u32 = 0b001;
const STOP_COPY: u32 = 0b010;
const PRE_COPY: u32 = 0b011;
const RESUMING: u32 = 0b100;
const ERROR: u32 = 0b110;

/// Most accesses to one device: a user that makes more has no end.
const MOST: usize = 1_000_000;

/// What one write of `device_state` may change into what.
const ARCS: [(u32, &[u32]); 5] = [
    (STOP, &[RUNNING, STOP_COPY, RESUMING]),
    (RUNNING, &[STOP, STOP_COPY, PRE_COPY, RESUMING]),
    (STOP_COPY, &[STOP, RUNNING]),
    (PRE_COPY, &[STOP_COPY, RUNNING]),
    (RESUMING, &[STOP, RUNNING]),
];

/// A transaction in the data section.
#[derive(Clone, Copy, Debug)]
struct Staged {
    offset: u64,
    length: u64,
    /// How much of it the user has read, from its first byte on.
    read: u64,
}

/// A round of the resume loop.
#[derive(Clone, Copy, Debug)]
struct Round {
    offset: u64,
    filled: u64,
}

/// The device.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) options: DoubleOptions,
    memory: Vec<u8>,
    raw: u32,
    /// The bits of `device_state` when the user read or wrote it last.
    seen: Option<u32>,
    /// Transactions that were taken in this session.
    cursor: usize,
    hollow: u32,
    staged: Option<Staged>,
    /// `pending_bytes` was read in this iteration; `data_offset` was read since.
    looked: bool,
    asked: bool,
    /// Numbers of pending, and of places, that were used.
    turns: usize,
    places: usize,
    round: Option<Round>,
    pub(super) received: Vec<Vec<u8>>,
    /// What was loaded last.
    pub(super) loaded: Option<Vec<u8>>,
    /// The same in rounds, whatever became of it.
    pub(super) validated: Option<Vec<Vec<u8>>>,
    pub(super) faults: Vec<Fault>,
    pub(super) hits: u64,
    pub(super) records: Vec<Record>,
    pub(super) violations: Vec<String>,
    gone: bool,
}

pub(super) type Answer<T> = Result<T, DeviceError>;

fn refused(errno: Errno) -> DeviceError {
    DeviceError::refused("access to the region", errno)
}

fn gone() -> DeviceError {
    DeviceError::new(DeviceErrorKind::Lost, "access to the region", "the device is gone")
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl Core {
    pub(super) fn new(options: DoubleOptions) -> Self {
        Self {
            memory: vec![0; index(options.start + options.section)],
            raw: options.reserved & !BITS | RUNNING,
            options,
            seen: None,
            cursor: 0,
            hollow: 0,
            staged: None,
            looked: false,
            asked: false,
            turns: 0,
            places: 0,
            round: None,
            received: Vec::new(),
            loaded: None,
            validated: None,
            faults: Vec::new(),
            hits: 0,
            records: Vec::new(),
            violations: Vec::new(),
            gone: false,
        }
    }

    pub(super) const fn raw(&self) -> u32 {
        self.raw
    }

    const fn state(&self) -> u32 {
        self.raw & BITS
    }

    const fn is_saving(&self) -> bool {
        matches!(self.state(), STOP_COPY | PRE_COPY)
    }

    fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    /// As it was made, and without what it held.
    pub(super) fn reset(&mut self) -> Answer<()> {
        if self.gone {
            return Err(gone());
        }
        self.raw = self.raw & !BITS | RUNNING;
        self.forget();
        self.options.plan.chunks.clear();
        self.memory.fill(0);
        self.received.clear();
        self.loaded = None;
        Ok(())
    }

    /// The bits are these; if they were others before, no session is left.
    fn moved(&mut self, bits: u32) {
        if self.state() != bits & BITS {
            self.raw = self.raw & !BITS | bits & BITS;
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.staged = None;
        self.round = None;
        self.looked = false;
        self.asked = false;
        self.cursor = 0;
        self.hollow = self.options.plan.hollow.first().copied().unwrap_or(0);
    }

    /// Whether the user knows in which state the device is.
    fn is_known(&self) -> bool {
        self.seen == Some(self.state())
    }

    fn violation(&mut self, what: &str) {
        if self.violations.len() >= 100 {
            return;
        }
        self.violations.push(format!("access {}: {what}", self.records.len()));
    }

    /// A violation, if the user could know better; and the answer to it.
    fn refuse<T>(&mut self, what: &str) -> Answer<T> {
        if self.is_known() {
            self.violation(what);
        }
        Err(refused(Errno::EINVAL))
    }

    /// Writes an access down, and finds out what goes wrong with it.
    pub(super) fn begin(&mut self, access: Access, offset: u64, length: u64) -> Answer<Option<Wrong>> {
        if self.records.len() >= MOST {
            self.violation("the user has no end");
            self.gone = true;
            return Err(gone());
        }
        self.records.push(Record { access, offset, length });
        let mut hit = None;
        for fault in &mut self.faults {
            if fault.access.is_some_and(|kind| kind != access) {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                hit = hit.or(Some(fault.wrong));
            }
        }
        self.hits += u64::from(hit.is_some());
        match hit {
            Some(Wrong::Gone) => self.gone = true,
            Some(Wrong::Reset) => self.reset()?,
            Some(Wrong::Moved(bits)) => self.moved(bits),
            _ => {}
        }
        if self.gone {
            return Err(gone());
        }
        match hit {
            Some(Wrong::Refused(errno)) => Err(refused(errno)),
            Some(Wrong::RefusedInto(errno, bits)) => {
                self.moved(bits);
                Err(refused(errno))
            }
            other => Ok(other),
        }
    }

    /// An access that the interface does not allow at all.
    pub(super) fn not_a_field<T>(&mut self) -> Answer<T> {
        self.violation("V1-FIELDS: not a field at its own width, and not data");
        Err(refused(Errno::EINVAL))
    }

    pub(super) const fn read_state(&mut self) -> u32 {
        self.seen = Some(self.state());
        self.raw
    }

    pub(super) fn write_state(&mut self, value: u32, wrong: Option<Wrong>) -> Answer<()> {
        let (from, to) = (self.state(), value & BITS);
        if (value ^ self.raw) & !BITS != 0 {
            self.violation("V1-RESERVED: reserved bits are lost");
            return Err(refused(Errno::EINVAL));
        }
        if to > RESUMING {
            self.violation("V1-VALID: bits that cannot be asked for");
            return Err(refused(Errno::EINVAL));
        }
        if let Some(Wrong::Into(bits)) = wrong
            && bits & BITS != to
        {
            self.moved(bits);
            return Ok(());
        }
        if from == to {
            return Ok(());
        }
        if !ARCS.iter().any(|(before, after)| *before == from && after.contains(&to)) {
            return self.refuse("V1-ARCS: no single write leads there");
        }
        let saving = matches!(to, STOP_COPY | PRE_COPY);
        if saving && self.staged.is_some_and(|chunk| chunk.read < chunk.length) {
            self.violation("V1-OUTSTANDING: the state is written in the middle of a chunk");
        }
        if self.round.is_some_and(|round| round.filled > 0) {
            return self.refuse("V1-OUTSTANDING: the state is written in the middle of a round");
        }
        self.make(from, to)
    }

    /// What a write of the state does.
    fn make(&mut self, from: u32, to: u32) -> Answer<()> {
        let was_saving = self.is_saving();
        self.raw = self.raw & !BITS | to;
        self.seen = Some(to);
        if was_saving != self.is_saving() || to == RESUMING {
            self.forget();
        }
        self.looked = false;
        if to == RESUMING {
            self.received.clear();
            (self.loaded, self.validated) = (None, None);
        }
        if from == RESUMING {
            let data = self.received.concat();
            self.round = None;
            if self.options.expects.as_ref().is_some_and(|expected| *expected != data) {
                self.raw = self.raw & !BITS | ERROR;
                return Err(refused(Errno::EIO));
            }
            self.validated = Some(self.received.clone());
            self.loaded = Some(data);
        }
        Ok(())
    }

    /// How many transactions there are for now.
    fn available(&self) -> usize {
        let plan = &self.options.plan;
        let limit = match self.state() {
            PRE_COPY => plan.precopy.min(plan.chunks.len()),
            STOP_COPY => plan.chunks.len(),
            _ => 0,
        };
        let early = plan.chunks.len().saturating_sub(plan.late).max(self.cursor + 1);
        limit.min(early)
    }

    pub(super) fn read_pending(&mut self) -> u64 {
        if let Some(chunk) = self.staged.filter(|_| self.asked) {
            if chunk.read < chunk.length {
                self.violation("V1-PENDING: pending_bytes is read in the middle of a chunk");
            }
            self.staged = None;
            self.cursor += 1;
            self.hollow = self.options.plan.hollow.get(self.cursor).copied().unwrap_or(0);
        } else if self.asked && self.hollow != u32::MAX {
            self.hollow = self.hollow.saturating_sub(1);
        }
        (self.asked, self.looked) = (false, true);
        let there = self.options.plan.chunks.get(self.cursor..self.available()).unwrap_or_default();
        if there.is_empty() {
            return 0;
        }
        let exact = there.iter().map(|chunk| chunk.len() as u64).sum();
        let pending = &self.options.plan.pending;
        let answer = pending.get(self.turns.checked_rem(pending.len()).unwrap_or(0)).copied();
        self.turns += 1;
        answer.unwrap_or(exact)
    }

    /// The next place in the section for so many bytes, from the region's start.
    fn place(&mut self, length: u64) -> u64 {
        let places = &self.options.plan.places;
        let place = places.get(self.places.checked_rem(places.len()).unwrap_or(0)).copied().unwrap_or(0);
        self.places += 1;
        self.options.start + place.min(self.options.section.saturating_sub(length))
    }

    pub(super) fn read_offset(&mut self) -> u64 {
        if self.is_saving() {
            return self.publish();
        }
        if self.state() == RESUMING {
            if self.round.is_some_and(|round| round.filled > 0) {
                self.violation("V1-ROUNDS: data_offset is read in the middle of a round");
            }
            let offset = self.place(1);
            self.round = Some(Round { offset, filled: 0 });
            return offset;
        }
        self.options.start
    }

    fn publish(&mut self) -> u64 {
        if !self.looked && !self.asked && self.is_known() {
            self.violation("V1-PENDING: data_offset is read without pending_bytes before");
        }
        self.asked = true;
        if let Some(chunk) = self.staged {
            return chunk.offset;
        }
        if self.cursor >= self.available() || self.hollow > 0 {
            return self.options.start;
        }
        let Some(chunk) = self.options.plan.chunks.get(self.cursor).cloned() else {
            return self.options.start;
        };
        let length = chunk.len() as u64;
        let offset = self.place(length);
        if let Some(room) = self.memory.get_mut(index(offset)..index(offset) + chunk.len()) {
            room.copy_from_slice(&chunk);
        }
        self.staged = Some(Staged { offset, length, read: 0 });
        offset
    }

    pub(super) fn read_size(&mut self) -> u64 {
        if self.is_saving() && !self.asked && self.is_known() {
            self.violation("V1-PENDING: data_size is read without data_offset before");
        }
        self.staged.map_or(0, |chunk| chunk.length)
    }

    pub(super) fn write_size(&mut self, size: u64) -> Answer<()> {
        if self.state() != RESUMING {
            return self.refuse("data_size is written outside of RESUMING");
        }
        let Some(round) = self.round else {
            return self.refuse("V1-ROUNDS: data_size is written without data_offset before");
        };
        if size > self.size() - round.offset {
            return self.refuse("V1-ROUNDS: data_size is larger than the section");
        }
        if size == 0 || size != round.filled {
            return self.refuse("V1-ROUNDS: data_size is not what was written");
        }
        let taken = self.memory.get(index(round.offset)..index(round.offset + size)).unwrap_or_default();
        self.received.push(taken.to_vec());
        self.round = None;
        Ok(())
    }

    /// Data is read, `mapped` or not; the range is in the region.
    pub(super) fn read_data(&mut self, offset: u64, buf: &mut [u8], mapped: bool) -> Answer<()> {
        let end = offset + buf.len() as u64;
        match &mut self.staged {
            Some(chunk) if offset == chunk.offset + chunk.read && end <= chunk.offset + chunk.length => {
                chunk.read += buf.len() as u64;
            }
            _ if mapped => {
                // Memory is read whatever the device does.
                let _: Answer<()> = self.refuse("V1-BOUNDS: bytes are read that are not the chunk's next");
            }
            _ => return self.refuse("V1-BOUNDS: bytes are read that are not the chunk's next"),
        }
        let there = self.memory.get(index(offset)..index(end)).ok_or_else(|| refused(Errno::EINVAL))?;
        buf.copy_from_slice(there);
        Ok(())
    }

    /// Data is written, `mapped` or not; the range is in the region.
    pub(super) fn write_data(&mut self, offset: u64, data: &[u8], mapped: bool) -> Answer<()> {
        let end = offset + data.len() as u64;
        match &mut self.round {
            Some(round) if self.raw & BITS == RESUMING && offset == round.offset + round.filled => {
                round.filled += data.len() as u64;
            }
            _ if mapped => {
                let _: Answer<()> = self.refuse("V1-ROUNDS: bytes are written that are not the round's next");
            }
            _ => return self.refuse("V1-ROUNDS: bytes are written that are not the round's next"),
        }
        let room = self.memory.get_mut(index(offset)..index(end)).ok_or_else(|| refused(Errno::EINVAL))?;
        room.copy_from_slice(data);
        Ok(())
    }

    /// Whether data of this range is in the section. What is not is the user's fault.
    pub(super) fn check_range(&mut self, offset: u64, length: u64) -> Answer<()> {
        let start = self.options.start.max(FIELDS);
        match offset.checked_add(length) {
            Some(end) if end <= self.size() && offset >= start && length > 0 => Ok(()),
            _ => self.not_a_field(),
        }
    }
}

//! The resume loop: what of the region is to be read or written next, given what was read.
//!
//! A chunk of the source is one transaction (V1-CHUNK). It is written in one round where the data
//! section has room for it, else in rounds as large as the section: `data_offset` is read, the bytes
//! are written there, and `data_size` tells the device to take them (V1-ROUNDS).
//!
//! The loop does no access itself. Whether the device liked what it took shows when it is stopped.

use super::INFO_SIZE;
use super::save::V1Fault;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadStep {
    /// Read `data_offset` and say it with [`LoadLoop::data_offset`].
    ReadDataOffset,
    /// Write bytes of the chunk, and say how many with [`LoadLoop::written`].
    Write {
        /// Where the next of them goes in the region.
        offset: u64,
        /// How many more fit into this round, above 0.
        length: u64,
    },
    /// Write `data_size`, and say that with [`LoadLoop::taken`].
    WriteDataSize {
        /// Bytes of the round.
        size: u64,
    },
    /// The chunk is with the device; or there is none.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Round {
    offset: u64,
    size: u64,
    filled: u64,
}

/// The resume loop of one session.
#[derive(Clone, Debug)]
pub struct LoadLoop {
    region: u64,
    whole: bool,
    total: u64,
    taken: u64,
    round: Option<Round>,
}

impl LoadLoop {
    /// A loop without a chunk, over a region of `region` bytes. `whole`: the device takes a
    /// transaction only in one round (V1-WHOLE).
    #[must_use]
    pub const fn new(region: u64, whole: bool) -> Self {
        Self { region, whole, total: 0, taken: 0, round: None }
    }

    /// A chunk of `total` bytes, above 0, begins.
    ///
    /// # Errors
    /// [`V1Fault::OutOfTurn`] when the one before is not with the device yet, or `total` is 0.
    pub const fn begin(&mut self, total: u64) -> Result<(), V1Fault> {
        if !matches!(self.next(), LoadStep::Done) || total == 0 {
            return Err(V1Fault::OutOfTurn);
        }
        self.total = total;
        self.taken = 0;
        Ok(())
    }

    /// What is to be done next. Asking changes nothing.
    #[must_use]
    pub const fn next(&self) -> LoadStep {
        match self.round {
            None if self.taken == self.total => LoadStep::Done,
            None => LoadStep::ReadDataOffset,
            Some(Round { size, filled, .. }) if filled == size => LoadStep::WriteDataSize { size },
            Some(Round { offset, size, filled }) => {
                // In the region, as `data_offset` has checked.
                LoadStep::Write { offset: offset + filled, length: size - filled }
            }
        }
    }

    /// Bytes of the chunk that the device has taken.
    #[must_use]
    pub const fn taken_bytes(&self) -> u64 {
        self.taken
    }

    /// `data_offset` was read.
    ///
    /// # Errors
    /// [`V1Fault::DataOffset`] when it is not in the data section; [`V1Fault::Whole`] when the chunk
    /// does not fit there and must.
    pub const fn data_offset(&mut self, offset: u64) -> Result<(), V1Fault> {
        if !matches!(self.next(), LoadStep::ReadDataOffset) {
            return Err(V1Fault::OutOfTurn);
        }
        if offset < INFO_SIZE || offset >= self.region {
            return Err(V1Fault::DataOffset { offset, region: self.region });
        }
        let room = self.region - offset;
        let left = self.total - self.taken;
        if self.whole && self.total > room {
            return Err(V1Fault::Whole { total: self.total, room });
        }
        let size = if left < room { left } else { room };
        self.round = Some(Round { offset, size, filled: 0 });
        Ok(())
    }

    /// `bytes` were written where [`LoadStep::Write`] said.
    ///
    /// # Errors
    /// [`V1Fault::OutOfTurn`] when that is more than fits.
    pub const fn written(&mut self, bytes: u64) -> Result<(), V1Fault> {
        match &mut self.round {
            Some(round) if bytes <= round.size - round.filled => {
                round.filled += bytes;
                Ok(())
            }
            _ => Err(V1Fault::OutOfTurn),
        }
    }

    /// `data_size` was written, and the device has taken the round.
    ///
    /// # Errors
    /// [`V1Fault::OutOfTurn`] when the round is not full.
    pub const fn taken(&mut self) -> Result<(), V1Fault> {
        match self.round {
            Some(Round { size, filled, .. }) if filled == size => {
                self.taken += size;
                self.round = None;
                Ok(())
            }
            _ => Err(V1Fault::OutOfTurn),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // V1-CHUNK, V1-ROUNDS
    #[test]
    fn a_chunk_is_one_round_where_it_fits_and_else_as_few_as_the_section_allows() {
        let rounds = |region: u64, total: u64| {
            let mut load = LoadLoop::new(region, false);
            let mut sizes = Vec::new();
            load.begin(total).unwrap();
            loop {
                match load.next() {
                    LoadStep::ReadDataOffset => load.data_offset(0x20).unwrap(),
                    LoadStep::Write { offset, length } => {
                        assert!(offset + length <= region);
                        load.written(length.min(7)).unwrap();
                    }
                    LoadStep::WriteDataSize { size } => {
                        sizes.push(size);
                        load.taken().unwrap();
                    }
                    LoadStep::Done => return sizes,
                }
            }
        };
        assert_eq!(rounds(0x20 + 64, 64), [64]);
        assert_eq!(rounds(0x20 + 64, 1), [1]);
        assert_eq!(rounds(0x20 + 64, 200), [64, 64, 64, 8]);
        assert_eq!(rounds(0x20 + 1, 3), [1, 1, 1]);
    }

    // V1-BOUNDS, V1-WHOLE
    #[test]
    fn where_there_is_no_room_nothing_is_written() {
        let mut load = LoadLoop::new(0x1000, false);
        assert_eq!(load.next(), LoadStep::Done);
        assert_eq!(load.begin(0), Err(V1Fault::OutOfTurn));
        load.begin(5).unwrap();
        assert_eq!(load.begin(5), Err(V1Fault::OutOfTurn));
        for offset in [0, 31, 0x1000, u64::MAX] {
            assert!(matches!(load.data_offset(offset), Err(V1Fault::DataOffset { .. })), "{offset:#x}");
        }
        let mut whole = LoadLoop::new(0x20 + 64, true);
        whole.begin(65).unwrap();
        assert_eq!(whole.data_offset(0x20), Err(V1Fault::Whole { total: 65, room: 64 }));
        let mut whole = LoadLoop::new(0x20 + 64, true);
        whole.begin(64).unwrap();
        whole.data_offset(0x20).unwrap();
        assert_eq!(whole.taken(), Err(V1Fault::OutOfTurn), "the round is not full");
        assert_eq!(whole.written(65), Err(V1Fault::OutOfTurn));
    }
}

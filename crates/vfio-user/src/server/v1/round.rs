//! A round of the resume loop (V1-ROUNDS): whether it has begun, and what of the data section the client
//! has written in it.

use airlift_core::Errno;

/// Pieces apart from each other that a round may have, beside one for each mapped area: who goes through
/// the section in order has one, or one between any two areas.
const PIECES: usize = 64;

/// How far a client is with a round. Offsets are in bytes from the section's start.
#[derive(Debug, Default)]
pub(in crate::server) struct Round {
    /// `data_offset` was read, so that data can be written.
    open: bool,
    /// What was written by messages and that no write of `data_size` has handed over: `(start, end)`, in
    /// order, none touching another.
    written: Vec<(u64, u64)>,
}

impl Round {
    /// `data_offset` was read.
    pub(super) const fn open(&mut self) {
        self.open = true;
    }

    /// Data was written that was not handed over.
    pub(super) const fn has_begun(&self) -> bool {
        !self.written.is_empty()
    }

    /// Data is written, of a section with these mapped areas. Refused before the round is open, and when it
    /// has too many pieces already.
    pub(super) fn write(&mut self, start: u64, end: u64, mapped: &[(u64, u64)]) -> Result<(), Errno> {
        let first = self.written.partition_point(|piece| piece.1 < start);
        let behind = self.written.partition_point(|piece| piece.0 <= end);
        let touched = self.written.get(first..behind).unwrap_or_default();
        if !self.open || (touched.is_empty() && self.written.len() >= PIECES + mapped.len()) {
            return Err(Errno::EINVAL);
        }
        let start = touched.first().map_or(start, |piece| piece.0.min(start));
        let end = touched.last().map_or(end, |piece| piece.1.max(end));
        self.written.splice(first..behind, [(start, end)]);
        Ok(())
    }

    /// Whether the first `size` bytes can be handed over: each was written, or lies in one of these mapped
    /// areas `(start, end)`, which come in order and of which nobody knows.
    pub(super) fn holds(&self, size: u64, mapped: &[(u64, u64)]) -> bool {
        let mut at = 0;
        while self.open && at < size {
            let end = |pieces: &[(u64, u64)]| {
                let next = pieces.get(pieces.partition_point(|piece| piece.1 <= at));
                next.filter(|piece| piece.0 <= at).map(|piece| piece.1)
            };
            match end(&self.written).max(end(mapped)) {
                Some(end) => at = end,
                None => return false,
            }
        }
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opened() -> Round {
        let mut round = Round::default();
        round.open();
        round
    }

    // V1-ROUNDS
    #[test]
    fn a_round_begins_with_data_offset() {
        let mut round = Round::default();
        assert_eq!(round.write(0, 4, &[]), Err(Errno::EINVAL));
        assert!(!round.holds(1, &[(0, 4096)]) && !round.has_begun());
        round.open();
        assert!(round.holds(4096, &[(0, 4096)]) && !round.has_begun());
        round.write(0, 4, &[]).unwrap();
        assert!(round.holds(4, &[]) && !round.holds(5, &[]) && round.has_begun());
    }

    // V1-PRIVATE, VU-BOUND
    #[test]
    fn the_pieces_of_a_round_are_bounded() {
        let mapped = [(0, 4096), (8192, 12_288)];
        let mut round = opened();
        let most = u64::try_from(PIECES + mapped.len()).unwrap();
        for piece in 0..most {
            round.write(10 * piece, 10 * piece + 4, &mapped).unwrap();
        }
        assert_eq!(round.write(5000, 5001, &mapped), Err(Errno::EINVAL));
        // What touches another piece is none more.
        round.write(4, 10, &mapped).unwrap();
        assert_eq!(round.written.first(), Some(&(0, 14)));
        round.write(5000, 5001, &mapped).unwrap();
        round.write(0, 6000, &mapped).unwrap();
        assert_eq!(round.written, [(0, 6000)]);
    }

    proptest! {
        // V1-PRIVATE
        #[test]
        fn a_round_holds_what_was_written_or_is_mapped(
            writes in proptest::collection::vec((0..60_u64, 1..8_u64), 0..20),
            areas in proptest::collection::btree_set(0..8_u64, 0..4),
        ) {
            let mapped: Vec<_> = areas.iter().map(|area| (area * 8, area * 8 + 8)).collect();
            let mut round = opened();
            let mut there = [false; 80];
            let mut put = |start: u64, end: u64| {
                (start..end).for_each(|at| there[usize::try_from(at).unwrap()] = true);
            };
            mapped.iter().for_each(|&(start, end)| put(start, end));
            for (start, length) in writes {
                round.write(start, start + length, &mapped).unwrap();
                put(start, start + length);
            }
            let held = there.iter().position(|there| !there).unwrap() as u64;
            for size in 1..70 {
                prop_assert_eq!(round.holds(size, &mapped), size <= held, "{}", size);
            }
            prop_assert!(round.written.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}

//! Memory runs and machine records.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

use airlift_core::{Gpa, GpaRange};
use airlift_stream::buffer::MAX_BODY;
use airlift_stream::frame::{FrameError, FrameHeader, FrameType, HEADER_LEN, Limits};
use airlift_stream::machine_record::{MAX_RECORD, MachineRecordError, RecordRef, decode_record, seal_record};
use airlift_stream::pages::{
    BLOCK, MemorySlot, PAGE, PageRun, PagesError, blocks, decode_pages, decode_zero, lane, seal_pages,
    seal_zero,
};
use airlift_stream::{Fault, FrameBuf};
use proptest::prelude::*;
use std::num::NonZeroU32;

const SLOT: MemorySlot = MemorySlot { region: 1, round: 4, sequence: 9 };

fn split(frame: &[u8]) -> (FrameHeader, &[u8]) {
    let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
    header.verify(&frame[HEADER_LEN..]).unwrap();
    (header, &frame[HEADER_LEN..])
}

proptest! {
    #[test]
    fn pages_arrive_as_sent(block in 0..u64::MAX / BLOCK + 1, first in 0_u64..400, count in 1_u64..=20, fill in any::<u8>()) {
        let gpa = Gpa(block * BLOCK + first * PAGE);
        let len = usize::try_from(count * PAGE).unwrap();
        let mut buf = FrameBuf::new(len);
        buf.payload_mut().fill(fill);
        seal_pages(&mut buf, gpa, len, SLOT).unwrap();
        let (header, payload) = split(buf.sealed().unwrap());
        prop_assert_eq!((header.kind, header.index, header.round, header.sequence), (FrameType::Pages, 1, 4, 9));
        prop_assert_eq!(decode_pages(payload), Ok(PageRun { gpa, data: &vec![fill; len] }));
    }

    #[test]
    fn zero_runs_arrive_as_sent(runs in prop::collection::vec((0..u64::MAX / BLOCK + 1, 0_u64..256, 1_u64..=256), 1..20)) {
        let runs: Vec<GpaRange> = runs
            .into_iter()
            .map(|(block, first, count)| GpaRange::new(block * BLOCK + first * PAGE, count * PAGE))
            .collect();
        let mut buf = FrameBuf::new(16 * runs.len());
        seal_zero(&mut buf, &runs, SLOT).unwrap();
        let (header, payload) = split(buf.sealed().unwrap());
        prop_assert_eq!(header.kind, FrameType::Zero);
        prop_assert_eq!(decode_zero(payload).unwrap().collect::<Vec<_>>(), runs);
    }

    // What passes is whole pages that end before 2^64, whatever comes.
    #[test]
    fn any_bytes_are_refused_or_whole_pages(
        start in prop_oneof![any::<u64>(), (0_u64..1 << 52).prop_map(|page| page << 12)],
        tail in prop_oneof![prop::collection::vec(any::<u8>(), 0..40), (1_usize..4).prop_map(|n| vec![0; n * 4096])],
    ) {
        let payload = [&start.to_le_bytes()[..], &tail].concat();
        let whole = |range: GpaRange| {
            range.start.0.is_multiple_of(PAGE) && range.length.is_multiple_of(PAGE) && range.length > 0
                && range.start.0.checked_add(range.length - 1).is_some()
        };
        if let Ok(run) = decode_pages(&payload) {
            prop_assert!(whole(GpaRange::new(run.gpa.0, run.data.len() as u64)));
            prop_assert_eq!(run.data, &tail[..]);
        }
        if let Ok(mut runs) = decode_zero(&payload) {
            prop_assert!(runs.all(whole));
        }
        let _ = decode_record(&payload);
    }

    // W-MEMORY-LANE: the pieces cover the range, each within a block, so on one connection.
    #[test]
    fn blocks_cover_a_range(start in any::<u64>(), length in 0_u64..10 * BLOCK, lanes in 1_u32..9) {
        let range = GpaRange::new(start, length);
        let lanes = NonZeroU32::new(lanes).unwrap();
        let mut at = start;
        for piece in blocks(range) {
            prop_assert_eq!(piece.start.0, at);
            prop_assert!(piece.length > 0);
            let last = Gpa(at + (piece.length - 1));
            prop_assert_eq!(lane(piece.start, lanes), lane(last, lanes));
            prop_assert!(lane(last, lanes) < lanes.get());
            at = last.0.saturating_add(1);
        }
        prop_assert_eq!(at, start.saturating_add(length));
    }

    #[test]
    fn machine_records_arrive_as_sent(name in "\\PC{1,40}", data in prop::collection::vec(any::<u8>(), 0..200)) {
        let record = RecordRef { name: &name, data: &data };
        let mut buf = FrameBuf::new(2 + name.len() + data.len());
        seal_record(&mut buf, record, 5).unwrap();
        let (header, payload) = split(buf.sealed().unwrap());
        prop_assert_eq!((header.kind, header.sequence), (FrameType::Record, 5));
        prop_assert_eq!(decode_record(payload), Ok(record));
    }
}

/// W-PAGE-ALIGN, W-MEMORY-LANE.
#[test]
fn runs_that_are_not_pages_of_one_block_are_refused() {
    let unaligned = |start, length| PagesError::Unaligned { start: Gpa(start), length };
    let block = |start, length| PagesError::Block { start: Gpa(start), length };
    let cases = [
        (1, PAGE, unaligned(1, PAGE)),
        (0, PAGE - 1, unaligned(0, PAGE - 1)),
        (0, 0, unaligned(0, 0)),
        (BLOCK - PAGE, 2 * PAGE, block(BLOCK - PAGE, 2 * PAGE)),
        (0u64.wrapping_sub(PAGE), 2 * PAGE, block(0u64.wrapping_sub(PAGE), 2 * PAGE)),
    ];
    for (start, length, error) in cases {
        let len = usize::try_from(length).unwrap();
        let payload = [&start.to_le_bytes()[..], &vec![0; len]].concat();
        assert_eq!(decode_pages(&payload), Err(error.clone()));
        let entry = [start.to_le_bytes(), length.to_le_bytes()].concat();
        let good = [0_u64.to_le_bytes(), PAGE.to_le_bytes()].concat();
        assert_eq!(decode_zero(&[good, entry].concat()).err(), Some(error.clone()));
        let mut buf = FrameBuf::new(3 * 4096);
        assert_eq!(seal_pages(&mut buf, Gpa(start), len, SLOT), Err(error.clone()));
        assert_eq!(seal_zero(&mut buf, &[GpaRange::new(start, length)], SLOT), Err(error.clone()));
        assert_eq!(error.fault(), Fault::PeerMisbehaved);
    }
    assert!(decode_zero(&[0; 24]).is_err());
    assert!(decode_zero(&[]).is_err());
    assert!(decode_pages(&[0; 7]).is_err());
    assert!(seal_zero(&mut FrameBuf::new(64), &[], SLOT).is_err());
    // The last page below 2^64 is one.
    let last = 0_u64.wrapping_sub(PAGE);
    assert!(decode_pages(&[&last.to_le_bytes()[..], &[0; 4096]].concat()).is_ok());
}

#[test]
fn machine_records_are_bounded() {
    let mut buf = FrameBuf::new(MAX_BODY);
    let data = vec![0; MAX_RECORD + 1];
    seal_record(&mut buf, RecordRef { name: "vcpus", data: &data[1..] }, 0).unwrap();
    let long = RecordRef { name: "vcpus", data: &data };
    let too_long = Err(MachineRecordError::TooLong { length: MAX_RECORD + 1 });
    assert_eq!(seal_record(&mut buf, long, 0), too_long);
    assert_eq!(decode_record(&[&[1, 0, b'v'][..], &data].concat()).map(|_| ()), too_long);
    let name = "n".repeat(256);
    for name in ["", &name] {
        let record = RecordRef { name, data: b"" };
        assert_eq!(seal_record(&mut buf, record, 0), Err(MachineRecordError::Name));
    }
    for payload in [&[][..], &[1], &[1, 0], &[0, 0, b'x'], &[1, 0, 0xff], &[5, 0, b'a', b'b']] {
        assert_eq!(decode_record(payload), Err(MachineRecordError::Name));
    }
    let small = seal_record(&mut FrameBuf::new(4), RecordRef { name: "abc", data: b"" }, 0);
    assert!(matches!(small, Err(MachineRecordError::Frame(FrameError::Overflow { .. }))));
}

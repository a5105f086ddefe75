//! Frames: what arrives is what was sent, and damage is never taken for it.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

use airlift_stream::frame::VERSION;
use airlift_stream::{
    FrameBuf, FrameDecoder, FrameError, FrameFlags, FrameHeader, FrameType, HEADER_LEN, Limits, MAX_PAYLOAD,
};
use proptest::prelude::*;

type Owned = (FrameHeader, Vec<u8>);

/// Decodes a whole stream given in chunks of `chunk` bytes.
fn decode(bytes: &[u8], chunk: usize, limits: Limits) -> Result<Vec<Owned>, FrameError> {
    let mut decoder = FrameDecoder::new(limits);
    let mut frames = Vec::new();
    for mut chunk in bytes.chunks(chunk.max(1)) {
        while !chunk.is_empty() {
            let taken = decoder.push(chunk)?;
            assert!(taken > 0, "push makes progress");
            chunk = &chunk[taken..];
            if let Some(frame) = decoder.next_frame()? {
                frames.push((frame.header, frame.payload.to_vec()));
            }
        }
        assert!(decoder.allocated() <= HEADER_LEN + limits.max_payload() as usize);
    }
    decoder.finish()?;
    Ok(frames)
}

fn frame(header: FrameHeader, payload: &[u8]) -> Vec<u8> {
    let mut buf = FrameBuf::new(payload.len());
    buf.append(payload).unwrap();
    buf.finish(header).unwrap().to_vec()
}

fn example() -> FrameHeader {
    FrameHeader { index: 3, sequence: 77, round: 2, ..FrameHeader::new(FrameType::Device) }
}

prop_compose! {
    fn any_header()(
        kind in (0..FrameType::ALL.len()).prop_map(|at| FrameType::ALL[at]),
        hints in any::<u16>(), config in any::<bool>(),
        index in any::<u32>(), sequence in any::<u64>(), round in any::<u32>(),
    ) -> FrameHeader {
        let mut header = FrameHeader { index, sequence, round, ..FrameHeader::new(kind) };
        header.flags.set(FrameFlags::CONFIG, config);
        header.flags |= FrameFlags::from_bits_retain(u32::from(hints) << 16);
        header
    }
}

proptest! {
    #[test]
    fn frames_arrive_as_sent(
        sent in prop::collection::vec((any_header(), prop::collection::vec(any::<u8>(), 0..300)), 0..6),
        chunk in 1_usize..400,
    ) {
        let bytes: Vec<u8> = sent.iter().flat_map(|(header, payload)| frame(*header, payload)).collect();
        let got = decode(&bytes, chunk, Limits::default()).unwrap();
        prop_assert_eq!(got.len(), sent.len());
        for ((header, payload), (sent_header, sent_payload)) in got.iter().zip(&sent) {
            let mut expected = *sent_header;
            expected.seal(sent_payload).unwrap();
            prop_assert_eq!(header, &expected);
            prop_assert_eq!(payload, sent_payload);
        }
    }

    // W-LENGTH: whatever comes, no panic, and `decode` asserts the bound on memory.
    #[test]
    fn any_bytes_are_refused_or_frames(bytes in prop::collection::vec(any::<u8>(), 0..500), chunk in 1_usize..64) {
        let _ = decode(&bytes, chunk, Limits::new(128));
    }

    // The same with a header that looks right.
    #[test]
    fn any_fields_are_refused_or_frames(
        kind in any::<u16>(), flags in any::<u32>(), length in any::<u32>(), tail in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut bytes = example().encode().to_vec();
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&flags.to_le_bytes());
        bytes[28..32].copy_from_slice(&length.to_le_bytes());
        bytes.extend(tail);
        prop_assert!(decode(&bytes, 50, Limits::new(256)).is_err());
    }
}

/// W-CRC: each single bit that flips, in the header or the payload, is noticed, also when a second
/// frame follows that a longer length would reach into.
#[test]
fn every_flipped_bit_is_refused() {
    let good = [frame(example(), b"device state"), frame(example(), &[0x55; 200])].concat();
    let first = HEADER_LEN + 12;
    assert_eq!(decode(&good, 64, Limits::default()).unwrap().len(), 2);
    for bit in 0..first * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&bad, 64, Limits::default()).is_err(), "bit {bit}");
    }
}

#[test]
fn every_cut_is_noticed() {
    let good = frame(example(), b"device state");
    for len in 1..good.len() {
        let need = if len < HEADER_LEN { HEADER_LEN } else { good.len() };
        assert_eq!(
            decode(&good[..len], 5, Limits::default()),
            Err(FrameError::Truncated { have: len, need }),
            "cut to {len} bytes"
        );
    }
    assert_eq!(decode(&[], 5, Limits::default()), Ok(Vec::new()));
}

/// W-LENGTH: a length is refused from the header alone, before anything is read or held for it.
#[test]
fn a_long_payload_is_refused_from_the_header() {
    for length in [101, MAX_PAYLOAD, MAX_PAYLOAD + 1, u32::MAX] {
        let header = FrameHeader { length, ..example() };
        let refused = FrameError::TooLong { kind: FrameType::Device, length, limit: 100 };
        assert_eq!(FrameHeader::decode(&header.encode(), Limits::new(100)), Err(refused.clone()));
        let mut decoder = FrameDecoder::new(Limits::new(100));
        assert_eq!(decoder.push(&header.encode()), Err(refused.clone()));
        assert_eq!(decoder.push(b"more"), Err(refused));
        assert!(decoder.allocated() <= HEADER_LEN + 100);
    }
    assert_eq!(Limits::new(u32::MAX).max_payload(), MAX_PAYLOAD);
}

/// W-LENGTH: an announced megabyte costs nothing until it comes.
#[test]
fn a_length_alone_allocates_nothing() {
    let header = FrameHeader { length: MAX_PAYLOAD, ..example() };
    let mut decoder = FrameDecoder::new(Limits::default());
    decoder.push(&header.encode()).unwrap();
    decoder.push(&[0; 1000]).unwrap();
    assert!(decoder.allocated() < 4096, "{} bytes", decoder.allocated());
    assert_eq!(decoder.next_frame(), Ok(None));
}

/// W-MUST-UNDERSTAND.
#[test]
fn an_unknown_type_is_skipped_unless_it_must_be_understood() {
    let kind = FrameType::from_raw(0x7777);
    let must = frame(FrameHeader::new(kind), b"?");
    assert_eq!(decode(&must, 9, Limits::default()), Err(FrameError::UnknownType { raw: 0x7777 }));

    // Also with flags that only a later version knows.
    let flags = FrameFlags::from_bits_retain(0x40);
    let may = frame(FrameHeader { flags, ..FrameHeader::new(kind) }, b"?");
    let frames = decode(&[may.clone(), frame(example(), b"next")].concat(), 9, Limits::default()).unwrap();
    assert!(frames[0].0.is_skippable());
    assert_eq!(frames[1].1, b"next");

    let mut damaged = may;
    damaged[HEADER_LEN] ^= 1;
    assert!(matches!(decode(&damaged, 9, Limits::default()), Err(FrameError::Checksum { .. })));
}

/// W-FLAGS.
#[test]
fn unknown_flags_are_refused_and_unknown_hints_are_not() {
    let with = |bits| {
        let flags = FrameFlags::from_bits_retain(bits);
        decode(&frame(FrameHeader { flags, ..example() }, b"x"), 100, Limits::default())
    };
    assert_eq!(with(0x8001), Err(FrameError::UnknownFlags { kind: FrameType::Device, flags: 0x8001 }));
    assert_eq!(with(0x8000_0001).unwrap()[0].0.flags.bits(), 0x8000_0001);
}

#[test]
fn another_protocol_or_version_is_named() {
    let mut bytes = frame(example(), b"");
    bytes[4..6].copy_from_slice(&(VERSION + 1).to_le_bytes());
    assert_eq!(decode(&bytes, 100, Limits::default()), Err(FrameError::Version { found: VERSION + 1 }));
    let http = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
    assert_eq!(decode(http, 100, Limits::default()), Err(FrameError::NotAFrame { found: *b"HTTP" }));
    let mut bytes = frame(example(), b"");
    bytes[36] = 1;
    assert_eq!(
        decode(&bytes, 100, Limits::default()),
        Err(FrameError::Reserved { kind: FrameType::Device, found: 1 })
    );
}

/// A buffer is one allocation for its life, and what was sealed is not given out once changed.
#[test]
fn a_buffer_never_grows_and_gives_only_what_is_sealed() {
    let mut buf = FrameBuf::new(100);
    let place = buf.payload_mut().as_ptr();
    assert_eq!(buf.payload_mut().len(), 100);
    assert_eq!(buf.set_len(101), Err(FrameError::Overflow { length: 101, capacity: 100 }));
    buf.set_len(60).unwrap();
    assert!(buf.append(&[0; 41]).is_err());
    buf.append(&[7; 40]).unwrap();
    assert_eq!(buf.sealed(), None);
    let whole = buf.finish(example()).unwrap().to_vec();
    assert_eq!(buf.sealed(), Some(&whole[..]));
    assert_eq!(whole.len(), HEADER_LEN + 100);
    buf.payload_mut()[0] = 1;
    assert_eq!(buf.sealed(), None);
    buf.clear();
    assert_eq!(buf.payload(), b"");
    assert_eq!(buf.payload_mut().as_ptr(), place);
    assert_eq!(FrameBuf::new(usize::MAX).capacity(), airlift_stream::buffer::MAX_BODY);
}

/// The engine's own path: header, then payload into a buffer of its own.
#[test]
fn header_and_payload_can_be_read_apart() {
    let bytes = frame(example(), b"device state");
    let header = FrameHeader::decode(bytes.first_chunk().unwrap(), Limits::default()).unwrap();
    assert_eq!((header.kind, header.index, header.sequence, header.round), (FrameType::Device, 3, 77, 2));
    let payload = &bytes[HEADER_LEN..];
    assert_eq!(header.payload_len(), payload.len());
    header.verify(payload).unwrap();
    assert!(matches!(header.verify(b"device_state"), Err(FrameError::Checksum { .. })));
    assert_eq!(header.verify(b"device"), Err(FrameError::WrongPayload { header: 12, given: 6 }));
}

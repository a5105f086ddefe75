//! A device's stream: what the other side reads is what was written, however it was cut, and nothing
//! else passes.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

use airlift_core::Chunk;
use airlift_stream::digest::StreamDigest;
use airlift_stream::frame::{FrameFlags, FrameHeader, FrameType, HEADER_LEN, Limits};
use airlift_stream::record::{
    Place, RecordDecoder, RecordEncoder, RecordError, RecordEvent, RecordLimits, StreamTotals, Tag,
};
use airlift_stream::{Fault, FrameBuf};
use proptest::prelude::*;

const DEVICE: u32 = 2;

/// An event with its bytes; neighbouring bytes of a DATA record are joined.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Setup,
    Data(u64, Vec<u8>),
    DataEnd,
    InitDataSent(u32),
    ConfigLoadReady,
    Config(Vec<u8>),
    End,
}

fn note(seen: &mut Vec<Seen>, event: RecordEvent<'_>) {
    match event {
        RecordEvent::Setup => seen.push(Seen::Setup),
        RecordEvent::Data { total } => seen.push(Seen::Data(total, Vec::new())),
        RecordEvent::Bytes(bytes) => {
            assert!(!bytes.is_empty());
            let Some(Seen::Data(_, data)) = seen.last_mut() else { panic!("bytes outside DATA") };
            data.extend_from_slice(bytes);
        }
        RecordEvent::DataEnd => {
            let Some(Seen::Data(total, data)) = seen.last() else { panic!("DataEnd outside DATA") };
            assert_eq!(*total, data.len() as u64);
            seen.push(Seen::DataEnd);
        }
        RecordEvent::InitDataSent { generation } => seen.push(Seen::InitDataSent(generation)),
        RecordEvent::ConfigLoadReady => seen.push(Seen::ConfigLoadReady),
        RecordEvent::Config(config) => seen.push(Seen::Config(config.to_vec())),
        RecordEvent::End => seen.push(Seen::End),
    }
}

/// Reads a frame's events; they go behind those of the frames before.
fn feed_into(
    seen: &mut Vec<Seen>,
    decoder: &mut RecordDecoder,
    header: &FrameHeader,
    payload: &[u8],
) -> Result<(), RecordError> {
    let mut frame = decoder.frame(header, payload)?;
    while let Some(event) = frame.next_event()? {
        note(seen, event);
    }
    Ok(())
}

/// Reads a frame that does not begin within a DATA record.
fn feed(decoder: &mut RecordDecoder, header: &FrameHeader, payload: &[u8]) -> Result<(), RecordError> {
    feed_into(&mut Vec::new(), decoder, header, payload)
}

fn device_frame(sequence: u64, flags: FrameFlags) -> FrameHeader {
    let header = FrameHeader { index: DEVICE, sequence, ..FrameHeader::new(FrameType::Device) };
    FrameHeader { flags: header.flags | flags, ..header }
}

/// Feeds payloads as frames 0, 1, 2, … without flags.
fn feed_all<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Seen>, RecordError> {
    let mut decoder = RecordDecoder::new(DEVICE, RecordLimits { max_data: 1 << 20 });
    let mut seen = Vec::new();
    for (at, payload) in payloads.into_iter().enumerate() {
        feed_into(&mut seen, &mut decoder, &device_frame(at as u64, FrameFlags::empty()), payload)?;
    }
    decoder.finish()?;
    Ok(seen)
}

/// What a device's session gives.
#[derive(Clone, Debug)]
enum Step {
    Stream(Vec<u8>),
    /// A transaction in parts.
    Parts(Vec<Vec<u8>>),
    Init,
}

fn any_step() -> impl Strategy<Value = Step> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..100);
    prop_oneof![
        4 => bytes().prop_map(Step::Stream),
        2 => prop::collection::vec(bytes(), 1..4).prop_map(Step::Parts),
        1 => Just(Step::Init),
    ]
}

/// Writes the steps, and a configuration, as frames; tells what a reader must see.
fn write(steps: &[Step], ready: bool, config: Option<&[u8]>) -> (Vec<Vec<u8>>, Vec<Seen>, StreamTotals) {
    let mut encoder = RecordEncoder::new(DEVICE);
    let mut buf = FrameBuf::new(128);
    let mut frames = Vec::new();
    let mut seen = vec![Seen::Setup];
    let mut generation = 0;
    encoder.setup(&mut buf).unwrap();
    frames.push(buf.sealed().unwrap().to_vec());
    for step in steps {
        match step {
            Step::Stream(data) => {
                buf.payload_mut()[..data.len()].copy_from_slice(data);
                encoder.data(&mut buf, data.len(), Chunk::Stream).unwrap();
                frames.push(buf.sealed().unwrap().to_vec());
                seen.extend([Seen::Data(data.len() as u64, data.clone()), Seen::DataEnd]);
            }
            Step::Parts(parts) => {
                let whole = parts.concat();
                let of = whole.len() as u64;
                let mut offset = 0;
                for part in parts {
                    buf.payload_mut()[..part.len()].copy_from_slice(part);
                    encoder.data(&mut buf, part.len(), Chunk::Part { of, offset }).unwrap();
                    frames.push(buf.sealed().unwrap().to_vec());
                    offset += part.len() as u64;
                }
                seen.extend([Seen::Data(of, whole), Seen::DataEnd]);
            }
            Step::Init => {
                generation += 1;
                assert_eq!(encoder.init_data_sent(&mut buf), Ok(generation));
                frames.push(buf.sealed().unwrap().to_vec());
                seen.push(Seen::InitDataSent(generation));
            }
        }
    }
    if ready {
        encoder.config_load_ready(&mut buf).unwrap();
        frames.push(buf.sealed().unwrap().to_vec());
        seen.push(Seen::ConfigLoadReady);
    }
    match config {
        Some(config) => {
            encoder.config(&mut buf, config).unwrap();
            seen.push(Seen::Config(config.to_vec()));
        }
        None => encoder.end(&mut buf).unwrap(),
    }
    frames.push(buf.sealed().unwrap().to_vec());
    seen.push(Seen::End);
    assert_eq!(encoder.place(), Place::Ended);
    (frames, seen, *encoder.totals())
}

fn split(frame: &[u8]) -> (FrameHeader, &[u8]) {
    let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
    let payload = &frame[HEADER_LEN..];
    header.verify(payload).unwrap();
    (header, payload)
}

proptest! {
    // W-TRAILER: both sides count the same.
    #[test]
    fn a_stream_arrives_as_written(
        steps in prop::collection::vec(any_step(), 0..8),
        ready in any::<bool>(),
        config in prop::option::of(prop::collection::vec(any::<u8>(), 0..128)),
    ) {
        let (frames, expected, written) = write(&steps, ready, config.as_deref());
        let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
        let mut seen = Vec::new();
        for frame in &frames {
            let (header, payload) = split(frame);
            prop_assert!(decoder.finish().is_err(), "complete before its last frame");
            feed_into(&mut seen, &mut decoder, &header, payload).unwrap();
        }
        prop_assert_eq!(seen, expected);
        let read = decoder.finish().unwrap();
        prop_assert_eq!(
            (read.frames(), read.bytes(), read.generation(), read.digest()),
            (written.frames(), written.bytes(), written.generation(), written.digest())
        );
        prop_assert_eq!(read.frames(), frames.len() as u64);
        let mut digest = StreamDigest::new();
        frames.iter().for_each(|frame| digest.update(split(frame).1));
        prop_assert_eq!(read.digest(), digest.value());
    }

    // Records may begin and end anywhere in frames, their tags and sizes too.
    #[test]
    fn a_stream_may_be_cut_anywhere(
        steps in prop::collection::vec(any_step(), 0..6),
        cut in 1_usize..40,
    ) {
        let (frames, expected, _) = write(&steps, true, None);
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| split(frame).1).copied().collect();
        prop_assert_eq!(feed_all(bytes.chunks(cut)), Ok(expected));
        for len in 1..bytes.len() {
            prop_assert!(
                matches!(feed_all([&bytes[..len]]), Err(RecordError::Truncated { .. })), "cut to {} bytes", len
            );
        }
    }

    // No panic, no more events than bytes, whatever comes.
    #[test]
    fn any_bytes_are_refused_or_records(
        pieces in prop::collection::vec((0_usize..8, prop::collection::vec(any::<u8>(), 0..20)), 0..12),
        config in any::<bool>(),
    ) {
        let tags = [Tag::Setup, Tag::Data, Tag::InitDataSent, Tag::Config, Tag::ConfigLoadReady, Tag::End];
        let mut bytes = Vec::new();
        for (tag, tail) in &pieces {
            if let Some(tag) = tags.get(*tag) {
                bytes.extend(tag.bytes());
                if *tag == Tag::Data && tail.len() % 3 > 0 {
                    bytes.extend((tail.len() as u64).to_be_bytes());
                }
            }
            bytes.extend(tail);
        }
        let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
        let flags = if config { FrameFlags::CONFIG } else { FrameFlags::empty() };
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let mut seen = Vec::new();
        for (at, payload) in [first, second].into_iter().enumerate() {
            match feed_into(&mut seen, &mut decoder, &device_frame(at as u64, flags), payload) {
                Ok(()) => prop_assert!(seen.len() <= bytes.len() + 2),
                // W-RECORD-ORDER: an error stays.
                Err(error) => {
                    let again = decoder.frame(&device_frame(9, flags), b"more").unwrap_err();
                    prop_assert_eq!(again, error);
                    return Ok(());
                }
            }
        }
    }
}

/// The bytes of a small stream, as QEMU's notes give them for the same records.
#[test]
fn records_have_the_bytes_of_the_field_protocol() {
    let mut encoder = RecordEncoder::new(DEVICE);
    let mut buf = FrameBuf::new(64);
    encoder.setup(&mut buf).unwrap();
    assert_eq!(buf.payload(), 0xffff_ffff_ef10_0003_u64.to_be_bytes());
    buf.payload_mut()[..4].copy_from_slice(&[0xaa, 0xbb, 0xcc, 0xdd]);
    encoder.data(&mut buf, 4, Chunk::Stream).unwrap();
    assert_eq!(
        buf.payload(),
        [0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 4, 0, 0, 0, 0, 0, 0, 0, 4, 0xaa, 0xbb, 0xcc, 0xdd]
    );
    encoder.init_data_sent(&mut buf).unwrap();
    assert_eq!(buf.payload(), 0xffff_ffff_ef10_0005_u64.to_be_bytes());
    encoder.config(&mut buf, &[1, 2]).unwrap();
    assert_eq!(
        buf.payload(),
        [0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 2, 1, 2, 0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 1]
    );
    let (header, _) = split(buf.sealed().unwrap());
    assert!(header.flags.contains(FrameFlags::CONFIG));
    assert_eq!((header.index, header.sequence), (DEVICE, 3));
}

/// The body of the buffer is where the device's bytes stay: nothing moves when the frame is made.
#[test]
fn device_bytes_are_sent_from_where_they_were_read() {
    let mut encoder = RecordEncoder::new(DEVICE);
    let mut buf = FrameBuf::new(64);
    encoder.setup(&mut buf).unwrap();
    let body = buf.payload_mut();
    body.fill(9);
    let place = body.as_ptr();
    encoder.data(&mut buf, 64, Chunk::Stream).unwrap();
    let frame = buf.sealed().unwrap();
    assert_eq!(frame.len(), HEADER_LEN + 16 + 64);
    assert_eq!(frame[HEADER_LEN + 16..].as_ptr(), place);
}

/// W-RECORD-ORDER, for every place and every tag.
#[test]
fn every_tag_in_every_place() {
    let data = |size: u64, bytes: &[u8]| [&Tag::Data.bytes()[..], &size.to_be_bytes(), bytes].concat();
    let setup = Tag::Setup.bytes().to_vec();
    let ready = [setup.clone(), Tag::ConfigLoadReady.bytes().to_vec()].concat();
    let ended = [setup.clone(), Tag::End.bytes().to_vec()].concat();
    let places = [
        (Place::Start, Vec::new(), vec![Tag::Setup]),
        (Place::Records, setup, vec![Tag::Data, Tag::InitDataSent, Tag::ConfigLoadReady, Tag::End]),
        (Place::Ready, ready, vec![Tag::End]),
        (Place::Ended, ended, vec![]),
    ];
    for (place, before, allowed) in places {
        for tag in [Tag::Setup, Tag::Data, Tag::InitDataSent, Tag::ConfigLoadReady, Tag::End, Tag::Config] {
            let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
            let mut sequence = 0;
            if !before.is_empty() {
                feed(&mut decoder, &device_frame(0, FrameFlags::empty()), &before).unwrap();
                sequence = 1;
            }
            assert_eq!(decoder.place(), place);
            let bytes = if tag == Tag::Data { data(1, b"x") } else { tag.bytes().to_vec() };
            let result = feed(&mut decoder, &device_frame(sequence, FrameFlags::empty()), &bytes);
            match result {
                Ok(_) => assert!(allowed.contains(&tag), "{tag} {place}"),
                Err(error) => {
                    assert!(!allowed.contains(&tag), "{tag} {place}: {error}");
                    assert_eq!(error.fault(), Fault::PeerMisbehaved);
                    let expected = match (place, tag) {
                        (Place::Ended, _) => RecordError::AfterEnd,
                        (Place::Records | Place::Ready, Tag::Config) => RecordError::ConfigFrame,
                        _ => RecordError::Order { tag, place },
                    };
                    assert_eq!(error, expected);
                }
            }
        }
    }
    // In one frame too.
    let bytes = [Tag::Setup.bytes(), Tag::End.bytes(), Tag::End.bytes()].concat();
    assert_eq!(feed_all([&bytes[..]]), Err(RecordError::AfterEnd));
    let bytes = [&Tag::Setup.bytes()[..], &Tag::End.bytes(), &[0]].concat();
    assert_eq!(feed_all([&bytes[..]]), Err(RecordError::AfterEnd));
}

/// W-CONFIG-FRAME: CONFIG has a frame of its own, whole, with its END.
#[test]
fn a_config_frame_is_one_config_record() {
    let tag = Tag::Config.bytes();
    let end = Tag::End.bytes();
    let good = [&tag[..], b"config", &end].concat();
    let refused: [(&[u8], bool); 5] = [
        (&good, false),
        (&good[..good.len() - 1], true),
        (&good[1..], true),
        (&tag, true),
        (&tag[..7], true),
    ];
    for (payload, flag) in refused {
        let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
        feed(&mut decoder, &device_frame(0, FrameFlags::empty()), &Tag::Setup.bytes()).unwrap();
        let flags = if flag { FrameFlags::CONFIG } else { FrameFlags::empty() };
        assert_eq!(feed(&mut decoder, &device_frame(1, flags), payload), Err(RecordError::ConfigFrame));
    }
    // Half a tag before it.
    let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
    let before = [&Tag::Setup.bytes()[..], &Tag::Data.bytes()[..3]].concat();
    feed(&mut decoder, &device_frame(0, FrameFlags::empty()), &before).unwrap();
    let result = feed(&mut decoder, &device_frame(1, FrameFlags::CONFIG), &good);
    assert_eq!(result, Err(RecordError::ConfigFrame));
}

/// W-DATA-SIZE.
#[test]
fn a_size_beyond_the_limit_is_refused_before_its_bytes() {
    for size in [0, (1 << 20) + 1, u64::MAX] {
        let bytes = [&Tag::Setup.bytes()[..], &Tag::Data.bytes(), &size.to_be_bytes()].concat();
        assert_eq!(feed_all([&bytes[..]]), Err(RecordError::DataSize { size, limit: 1 << 20 }));
    }
}

/// W-SEQUENCE: a frame that is missing, doubled or of another device is never read as data.
#[test]
fn frames_must_come_in_sequence() {
    let refused = |header: FrameHeader, payload: &[u8]| {
        let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
        feed(&mut decoder, &device_frame(0, FrameFlags::empty()), &Tag::Setup.bytes()).unwrap();
        feed(&mut decoder, &header, payload).unwrap_err()
    };
    let next = device_frame(1, FrameFlags::empty());
    let init = Tag::InitDataSent.bytes();
    for found in [0, 2, u64::MAX] {
        let header = FrameHeader { sequence: found, ..next };
        assert_eq!(refused(header, &init), RecordError::Sequence { expected: 1, found });
    }
    let other = FrameHeader { index: DEVICE + 1, ..next };
    assert_eq!(refused(other, &init), RecordError::WrongFrame { device: DEVICE });
    let pages = FrameHeader { kind: FrameType::Pages, ..next };
    assert_eq!(refused(pages, &init), RecordError::WrongFrame { device: DEVICE });
    assert_eq!(refused(next, b""), RecordError::EmptyFrame);
}

/// An engine that forgets the rest of a frame is told, and not given a stream with a hole.
#[test]
fn a_frame_must_be_read_to_its_end() {
    let mut decoder = RecordDecoder::new(DEVICE, RecordLimits::default());
    let header = device_frame(0, FrameFlags::empty());
    let (setup, end) = (Tag::Setup.bytes(), Tag::End.bytes());
    let mut frame = decoder.frame(&header, &setup).unwrap();
    assert_eq!(frame.next_event(), Ok(Some(RecordEvent::Setup)));
    let next = decoder.frame(&device_frame(1, FrameFlags::empty()), &end);
    assert_eq!(next.unwrap_err(), RecordError::Unread);
}

/// V1-CHUNK: parts of a transaction must follow each other, and are refused before they are sent.
#[test]
fn an_encoder_refuses_what_the_other_side_would() {
    let mut buf = FrameBuf::new(64);
    let mut encoder = RecordEncoder::new(DEVICE);
    let early = encoder.data(&mut buf, 1, Chunk::Stream);
    assert_eq!(early, Err(RecordError::Order { tag: Tag::Data, place: Place::Start }));
    encoder.setup(&mut buf).unwrap();
    assert_eq!(encoder.data(&mut buf, 0, Chunk::Stream), Err(RecordError::EmptyFrame));
    let late = encoder.data(&mut buf, 4, Chunk::Part { of: 100, offset: 4 });
    assert_eq!(late, Err(RecordError::Piece { offset: 4, of: 100, expected: 0 }));
    assert!(encoder.data(&mut buf, 65, Chunk::Stream).is_err());
    encoder.data(&mut buf, 60, Chunk::Part { of: 100, offset: 0 }).unwrap();
    let before = (encoder.totals().frames(), encoder.totals().digest());
    for (len, chunk) in [
        (60, Chunk::Part { of: 100, offset: 60 }),
        (10, Chunk::Part { of: 100, offset: 70 }),
        (10, Chunk::Part { of: 101, offset: 60 }),
        (10, Chunk::Stream),
    ] {
        let result = encoder.data(&mut buf, len, chunk);
        assert!(matches!(result, Err(RecordError::Piece { expected: 60, .. })), "{result:?}");
    }
    let cut = encoder.end(&mut buf);
    assert_eq!(cut, Err(RecordError::Order { tag: Tag::End, place: Place::Data }));
    assert_eq!(before, (encoder.totals().frames(), encoder.totals().digest()));
    encoder.data(&mut buf, 40, Chunk::Part { of: 100, offset: 60 }).unwrap();
    assert!(encoder.config(&mut buf, &[0; 65]).is_err());
    encoder.end(&mut buf).unwrap();
    assert!(encoder.init_data_sent(&mut buf).is_err());
}

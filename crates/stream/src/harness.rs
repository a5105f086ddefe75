//! What the fuzz targets run, and the tests on the checked-in corpus too: any bytes go in, and what
//! must hold of any bytes is asserted. A panic is a finding.
//!
//! Not part of the crate's interface.
#![allow(clippy::panic, reason = "a panic is how a fuzz target reports")]

use crate::frame::{FrameFlags, FrameHeader, FrameType, HEADER_LEN, Limits};
use crate::machine_record::decode_record;
use crate::pages::{decode_pages, decode_zero};
use crate::record::{RecordDecoder, RecordEvent, RecordLimits};
use crate::{FrameDecoder, Message};

/// Frames out of a stream. The first byte chooses how it is cut, and whether the checksums are made
/// right first: a fuzzer cannot find a checksum, and would never get behind it.
pub fn frame_decoder(input: &[u8]) {
    let Some((&mode, stream)) = input.split_first() else { return };
    let limits = Limits::new(1 << 16);
    let mut stream = stream.to_vec();
    if mode & 0x80 != 0 {
        correct_checksums(&mut stream, limits);
    }
    let mut decoder = FrameDecoder::new(limits);
    let mut frames = 0;
    let mut rebuilt = Vec::new();
    for mut chunk in stream.chunks(usize::from(mode & 0x7f) + 1) {
        while !chunk.is_empty() {
            let Ok(taken) = decoder.push(chunk) else { return };
            assert!(taken > 0, "no progress");
            assert!(decoder.allocated() <= HEADER_LEN + limits.max_payload() as usize, "too much memory");
            chunk = &chunk[taken..];
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    frames += 1;
                    rebuilt.extend_from_slice(&frame.header.encode());
                    rebuilt.extend_from_slice(frame.payload);
                    payload(&frame.header, frame.payload);
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }
    assert!(frames * HEADER_LEN <= stream.len());
    assert!(stream.starts_with(&rebuilt), "a frame that does not write the bytes it was read from");
    assert_eq!(decoder.finish().is_ok(), rebuilt.len() == stream.len(), "a lost rest");
}

fn correct_checksums(mut stream: &mut [u8], limits: Limits) {
    while let Some(Ok(mut header)) = stream.first_chunk().map(|bytes| FrameHeader::decode(bytes, limits)) {
        let Some((frame, rest)) = stream.split_at_mut_checked(HEADER_LEN + header.payload_len()) else {
            return;
        };
        let (head, payload) = frame.split_at_mut(HEADER_LEN);
        if header.seal(payload).is_ok() {
            head.copy_from_slice(&header.encode());
        }
        stream = rest;
    }
}

/// What can be read from a frame's payload is consistent, whatever it is.
fn payload(header: &FrameHeader, payload: &[u8]) {
    match header.kind {
        FrameType::Device => records_of(header.sequence, &[payload], header.flags),
        FrameType::Pages => {
            if let Ok(run) = decode_pages(payload) {
                assert_eq!(run.data.len() + 8, payload.len());
            }
        }
        FrameType::Zero => {
            if let Ok(runs) = decode_zero(payload) {
                assert_eq!(runs.len() * 16, payload.len());
            }
        }
        FrameType::Record => {
            if let Ok(record) = decode_record(payload) {
                assert_eq!(2 + record.name.len() + record.data.len(), payload.len());
            }
        }
        _ => message_of(header, payload),
    }
}

/// A control message: the first byte chooses its type, the next four are index and round.
pub fn message(input: &[u8]) {
    let Some((head, payload)) = input.split_first_chunk::<5>() else { return };
    let number = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    let header =
        FrameHeader { index: number, round: number, ..FrameHeader::new(FrameType::from_raw(head[0].into())) };
    message_of(&header, payload);
}

fn message_of(header: &FrameHeader, payload: &[u8]) {
    let Ok(message) = Message::decode(header, payload) else { return };
    // What was accepted can be sent on, and is then the same.
    let frame = match message.encode(header.sequence) {
        Ok(frame) => frame,
        // JSON may be longer when written anew (numbers, escapes) than it came.
        Err(crate::MessageError::Frame(_)) => return,
        Err(error) => panic!("{} was read and cannot be written: {error}", message.kind()),
    };
    let Some((head, payload)) = frame.split_first_chunk() else { panic!("a frame without header") };
    let again = FrameHeader::decode(head, Limits::default())
        .map_err(|error| error.to_string())
        .and_then(|header| Message::decode(&header, payload).map_err(|error| error.to_string()));
    assert_eq!(again, Ok(message));
}

/// A device's stream: the first byte chooses how it is cut into frames, and whether the last frame
/// is one of CONFIG.
pub fn records(input: &[u8]) {
    let Some((&mode, stream)) = input.split_first() else { return };
    let frames: Vec<&[u8]> = stream.chunks(usize::from(mode & 0x7f) + 1).collect();
    let last = if mode & 0x80 == 0 { FrameFlags::empty() } else { FrameFlags::CONFIG };
    records_of(0, &frames, last);
}

fn records_of(first: u64, frames: &[&[u8]], last_flags: FrameFlags) {
    let mut decoder = RecordDecoder::new(0, RecordLimits { max_data: 1 << 30 });
    // Of the DATA record that is open: bytes still to come.
    let mut open: Option<u64> = None;
    let mut events = 0;
    let mut input = 0;
    for (at, payload) in frames.iter().enumerate() {
        let mut header = FrameHeader::new(FrameType::Device);
        header.sequence = first + at as u64;
        if at + 1 == frames.len() {
            header.flags |= last_flags;
        }
        input += payload.len();
        let Ok(mut frame) = decoder.frame(&header, payload) else { return };
        loop {
            let event = match frame.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(_) => return,
            };
            events += 1;
            match (event, open) {
                (RecordEvent::Data { total }, None) => open = Some(total),
                (RecordEvent::Bytes(bytes), Some(left)) => {
                    assert!(!bytes.is_empty());
                    open = Some(
                        left.checked_sub(bytes.len() as u64).unwrap_or_else(|| panic!("too many bytes")),
                    );
                }
                (RecordEvent::DataEnd, Some(0)) => open = None,
                (RecordEvent::Data { .. } | RecordEvent::Bytes(_) | RecordEvent::DataEnd, _) => {
                    panic!("{event:?} with {open:?} bytes open")
                }
                (other, Some(left)) => panic!("{other:?} with {left} bytes open"),
                (_, None) => {}
            }
        }
    }
    assert!(events <= input + 2 * frames.len(), "{events} events from {input} bytes");
    if decoder.finish().is_ok() {
        assert_eq!(open, None);
        assert_eq!(decoder.totals().bytes(), input as u64);
    }
}

//! The bytes of every frame, as version 1 of the wire has them. When one of these tests fails, the
//! format was changed: that needs another version, or the other side of a migration breaks.
//!
//! `AIRLIFT_BLESS=1` writes the files anew.

use crate::samples;
use airlift_stream::frame::{FrameHeader, FrameType, HEADER_LEN, Limits};
use airlift_stream::{FrameDecoder, Message};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The bytes in hexadecimal, the header's fields and then the payload, 32 bytes to a line.
fn to_hex(bytes: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (header, payload) = bytes.split_at(HEADER_LEN);
    let lines = [&header[..16], &header[16..32], &header[32..]].into_iter().chain(payload.chunks(32));
    lines.map(|line| hex(line) + "\n").collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn frames_have_the_bytes_of_the_fixtures() {
    let bless = std::env::var_os("AIRLIFT_BLESS").is_some();
    for (name, bytes) in samples::frames() {
        let path = folder().join(format!("{name}.hex"));
        if bless {
            fs::write(&path, to_hex(&bytes)).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(to_hex(&bytes), golden, "the bytes of {name} have changed");
    }
}

/// What was written by version 1 is read as it was meant.
#[test]
fn fixtures_are_read() {
    for (name, message) in samples::messages() {
        let bytes = from_hex(&fs::read_to_string(folder().join(format!("{name}.hex"))).unwrap());
        let mut decoder = FrameDecoder::new(Limits::default());
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            rest = &rest[decoder.push(rest).unwrap()..];
        }
        let frame = decoder.next_frame().unwrap().unwrap();
        assert_eq!(frame.header.sequence, 6);
        assert_eq!(Message::decode(&frame.header, frame.payload), Ok(message), "{name}");
    }
}

#[test]
fn every_type_has_a_fixture_and_every_fixture_a_type() {
    let frames = samples::frames();
    let kinds: BTreeSet<u16> = frames
        .iter()
        .map(|(_, bytes)| FrameHeader::decode(bytes.first_chunk().unwrap(), Limits::default()).unwrap())
        .map(|header| header.kind.to_raw())
        .collect();
    assert_eq!(kinds, FrameType::ALL.iter().map(|kind| kind.to_raw()).collect());
    let files: BTreeSet<String> = fs::read_dir(folder())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files, frames.iter().map(|(name, _)| format!("{name}.hex")).collect());
}

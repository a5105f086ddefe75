//! The fuzz targets' harness on their checked-in corpus, and what makes that corpus.

use crate::samples;
use airlift_stream::frame::{FrameHeader, HEADER_LEN, Limits};
use airlift_stream::harness;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};

type Harness = fn(&[u8]);

const TARGETS: [(&str, Harness); 3] =
    [("frame_decoder", harness::frame_decoder), ("message", harness::message), ("records", harness::records)];

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

#[test]
fn the_corpus_holds() {
    for (target, harness) in TARGETS {
        let files: Vec<PathBuf> = fs::read_dir(folder(target))
            .unwrap_or_else(|error| panic!("corpus of {target}: {error}"))
            .map(|file| file.unwrap().path())
            .collect();
        assert!(files.len() >= 10, "the corpus of {target} is gone");
        for file in files {
            harness(&fs::read(&file).unwrap());
        }
    }
}

/// Inputs of each target: from every frame of the format, whole and damaged.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut seed = |name: &str, mode: u8, bytes: &[u8]| {
        seeds.push((name.to_owned(), [&[mode], bytes].concat()));
    };
    let all: Vec<u8> = samples::frames().concat_bytes();
    let stream = samples::device_frames();
    let payloads: Vec<&[u8]> = stream.iter().map(|(_, frame)| &frame[HEADER_LEN..]).collect();
    let without_config = payloads[..payloads.len() - 1].concat();
    match target {
        "frame_decoder" => {
            for (name, frame) in samples::frames() {
                seed(name, 0xff, &frame);
            }
            seed("all_in_one", 0x7f, &all);
            seed("all_in_small_pieces", 0x06, &all);
            seed("cut", 0x7f, &all[..all.len() - 1]);
            let mut damaged = all.clone();
            damaged[HEADER_LEN] ^= 0x10;
            seed("damaged", 0x7f, &damaged);
            let mut long = all.clone();
            long[28..32].fill(0xff);
            seed("long", 0x7f, &long);
        }
        "message" => {
            for (name, message) in samples::messages() {
                let frame = message.encode(0).unwrap();
                let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
                let number = header.index.max(header.round).to_le_bytes();
                let kind = u8::try_from(header.kind.to_raw()).unwrap();
                seed(name, kind, &[&number[..], &frame[HEADER_LEN..]].concat());
            }
        }
        _ => {
            for (at, (name, frame)) in stream.iter().enumerate() {
                seed(&format!("until_{name}"), 0x7f, &payloads[..=at].concat());
                seed(&format!("only_{name}"), 0xff, &frame[HEADER_LEN..]);
            }
            seed("whole", 0x7f, &[&without_config[..], &airlift_stream::record::Tag::End.bytes()].concat());
            seed("whole_in_small_pieces", 0x02, &without_config);
        }
    }
    seeds
}

trait ConcatBytes {
    fn concat_bytes(&self) -> Vec<u8>;
}

impl ConcatBytes for Vec<(&'static str, Vec<u8>)> {
    fn concat_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(|(_, bytes)| bytes).copied().collect()
    }
}

/// Writes the corpus anew, after the format has changed; findings of the fuzzer are kept.
#[test]
#[ignore = "writes files"]
fn write_corpus() {
    for (target, _) in TARGETS {
        fs::create_dir_all(folder(target)).unwrap();
        for (name, bytes) in seeds(target) {
            fs::write(folder(target).join(name), bytes).unwrap();
        }
    }
}

proptest! {
    // The harness on damaged seeds: what a fuzzer finds in its first second is found here.
    #[test]
    fn damaged_seeds_hold(
        target in 0_usize..TARGETS.len(), which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let (name, harness) = TARGETS[target];
        let seeds = seeds(name);
        let mut bytes = which.get(&seeds).1.clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        harness(&bytes);
        harness(&bytes[..cut.index(bytes.len())]);
    }
}

//! A 128-bit fingerprint of a state, fast and the same in every run.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Two multiply-rotate lanes with different constants.
#[derive(Debug)]
struct Lanes(u64, u64);

impl Lanes {
    const fn mix(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.1 =
            (self.1.rotate_left(23) ^ word.wrapping_add(0x1656_67b1)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        self.1 ^= self.1 >> 29;
    }
}

impl Hasher for Lanes {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word) ^ (chunk.len() as u64) << 56);
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

pub(super) fn fingerprint(state: &impl Hash) -> u128 {
    let mut lanes = Lanes(0, 0);
    state.hash(&mut lanes);
    lanes.mix(0xff);
    u128::from(lanes.0) << 64 | u128::from(lanes.1)
}

/// A map by fingerprint, which needs no further hashing.
pub(super) type FingerprintMap<V> = HashMap<u128, V, BuildHasherDefault<Taken>>;

/// Takes one word of the fingerprint as the hash.
#[derive(Debug, Default)]
pub(super) struct Taken(u64);

impl Hasher for Taken {
    fn write(&mut self, bytes: &[u8]) {
        let mut lanes = Lanes(self.0, 0);
        lanes.write(bytes);
        self.0 = lanes.1;
    }

    fn write_u128(&mut self, fingerprint: u128) {
        let bytes = fingerprint.to_le_bytes();
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[..8]);
        self.0 = u64::from_le_bytes(word);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

//! Checksums of the wire, against accidents and not against attackers: CRC-32C for each frame and
//! CRC-64/NVME over the whole of a device's stream.

use crc_fast::{CrcAlgorithm, Digest};

/// CRC-32C (Castagnoli) of `parts` in order.
#[must_use]
pub fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    // A 32-bit algorithm leaves the upper half zero.
    u32::try_from(digest.finalize() & 0xffff_ffff).unwrap_or(0)
}

/// A running CRC-64/NVME.
#[derive(Clone, Copy, Debug)]
pub struct StreamDigest(Digest);

impl StreamDigest {
    /// The digest of no bytes.
    #[must_use]
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.finalize()
    }
}

impl Default for StreamDigest {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::{StreamDigest, crc32c};

    // The check values that the catalogue of CRCs gives for "123456789".
    #[test]
    fn known_answers() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[b"1234", b"", b"56789"]), 0xe306_9283);
        let mut digest = StreamDigest::new();
        digest.update(b"12345");
        digest.update(b"6789");
        assert_eq!(digest.value(), 0xae8b_1486_0a79_9888);
    }
}

//! The bytes of a record. All numbers are little-endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `APCI` |
//! | 4 | 2 | version, 1 |
//! | 6 | 1 | interrupt: 0 none, 1 INTx, 2 MSI, 3 MSI-X |
//! | 7 | 1 | 0 |
//! | 8 | 4 | vectors of it that are on: 0, 1, 1 to 32, 1 to 2048 |
//! | 12 | 4 | C, bytes of configuration space: 64 to 4096 |
//! | 16 | 4 | T, bytes of the MSI-X table: 0 where it cannot be read, else 16 for each entry |
//! | 20 | C | configuration space from offset 0; with the BARs and the command register |
//! | 20 + C | T | the MSI-X table |
//!
//! Nothing follows. Whether the space makes sense is not checked here.

use super::layout::{ENTRY, MAX_VECTORS};

const MAGIC: [u8; 4] = *b"APCI";
const VERSION: u16 = 1;
const HEADER: usize = 20;
const CONFIG: std::ops::RangeInclusive<usize> = 64..=4096;

/// Which kind of interrupt is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// None.
    None,
    /// INTx.
    Intx,
    /// So many vectors of MSI.
    Msi(u32),
    /// So many vectors of MSI-X.
    Msix(u32),
}

/// A device's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) mode: Mode,
    pub(super) config: Vec<u8>,
    /// Empty where it could not be read.
    pub(super) table: Vec<u8>,
}

impl Record {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (mode, vectors) = match self.mode {
            Mode::None => (0, 0),
            Mode::Intx => (1, 1),
            Mode::Msi(vectors) => (2, vectors),
            Mode::Msix(vectors) => (3, vectors),
        };
        // Both are bounded by their parts of a device.
        let length = |part: &[u8]| u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = Vec::with_capacity(HEADER + self.config.len() + self.table.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([mode, 0]);
        bytes.extend(vectors.to_le_bytes());
        bytes.extend(length(&self.config));
        bytes.extend(length(&self.table));
        bytes.extend(&self.config);
        bytes.extend(&self.table);
        bytes
    }

    /// The record in `bytes`, or what is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (header, rest) = bytes.split_at_checked(HEADER).ok_or("it is too short")?;
        let number = |at: usize| header[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        if header[..4] != MAGIC {
            return Err("it is no record of a PCI configuration");
        }
        if header[4..6] != VERSION.to_le_bytes() {
            return Err("it is of a version that is not known here");
        }
        let mode = match (header[6], number(8)) {
            (0, 0) => Mode::None,
            (1, 1) => Mode::Intx,
            (2, vectors @ 1..=32) if vectors.is_power_of_two() => Mode::Msi(vectors),
            (3, vectors) if (1..=u32::from(MAX_VECTORS)).contains(&vectors) => Mode::Msix(vectors),
            _ => return Err("its interrupts are not possible"),
        };
        let size = |at| usize::try_from(number(at)).unwrap_or(usize::MAX);
        let (config, table) = (size(12), size(16));
        let possible = table.is_multiple_of(ENTRY) && table <= usize::from(MAX_VECTORS) * ENTRY;
        if header[7] != 0 || !CONFIG.contains(&config) || !possible {
            return Err("its sizes are not possible");
        }
        if rest.len() != config + table {
            return Err("it does not have the length that it says");
        }
        let (config, table) = rest.split_at(config);
        Ok(Self { mode, config: config.into(), table: table.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> Record {
        Record { mode: Mode::Msix(4), config: vec![7; 256], table: vec![9; 64] }
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        for mode in [Mode::None, Mode::Intx, Mode::Msi(32), Mode::Msix(2048)] {
            let record = Record { mode, ..record() };
            assert_eq!(Record::decode(&record.encode()), Ok(record));
        }
    }

    #[test]
    fn the_bytes_are_those_of_version_1() {
        let bytes = record().encode();
        assert_eq!(bytes[..20], *b"APCI\x01\0\x03\0\x04\0\0\0\0\x01\0\0\x40\0\0\0");
        assert_eq!(bytes.len(), 20 + 256 + 64);
    }

    #[test]
    fn a_record_that_was_cut_or_is_of_another_version_is_refused() {
        let bytes = record().encode();
        for length in [0, 3, 19, 20, bytes.len() - 1] {
            assert!(Record::decode(&bytes[..length]).is_err(), "{length}");
        }
        for (at, value) in [(0, b'B'), (4, 2), (6, 4), (7, 1), (8, 0), (9, 9), (12, 1), (13, 0x20), (16, 8)] {
            let mut wrong = bytes.clone();
            wrong[at] = value;
            assert!(Record::decode(&wrong).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut framed = record().encode();
            for (at, byte) in bytes.iter().enumerate().take(framed.len()) {
                framed[at] ^= byte;
            }
            for bytes in [bytes, framed] {
                if let Ok(record) = Record::decode(&bytes) {
                    prop_assert_eq!(record.encode(), bytes);
                }
            }
        }
    }
}

//! A journal in a file: one line of JSON with its checksum for each record.
//!
//! A torn last line is absent. Anything else that cannot be read makes the whole journal unreadable:
//! what it would have said is then in doubt, never guessed.

use airlift_core::Errno;
use airlift_core::commit::{Durability, Journal, JournalError, Record};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// The most bytes of a journal that are read.
const MAX_JOURNAL: u64 = 16 << 20;

/// A journal that lives in one file of one session and side.
#[derive(Debug)]
pub struct FileJournal {
    file: File,
    path: PathBuf,
    durability: Durability,
    /// Bytes of whole records. What is behind them, of an append that failed, is cut off before the
    /// next one: a torn record may only ever be the last.
    whole: u64,
    torn: bool,
}

/// A journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadJournalError {
    /// There is none, or it cannot be opened.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// A line that is not the last is not a record.
    #[error("{}: line {line} is no record; the file was changed by somebody else", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
}

impl FileJournal {
    /// Makes the file; one that exists is refused, so that a session never writes into the records of
    /// another. The file's name is durable when this returns, if `durability` asks for it.
    ///
    /// # Errors
    /// When the file exists or cannot be made.
    pub fn create(path: impl AsRef<Path>, durability: Durability) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        let file = OpenOptions::new().append(true).create_new(true).open(&path)?;
        if durability == Durability::Power {
            let parent =
                path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { file, path, durability, whole: 0, torn: false })
    }

    /// Goes on with the journal of a process that is gone, behind its last whole record, and gives
    /// the records.
    ///
    /// # Errors
    /// When the file cannot be opened or was damaged.
    pub fn reopen(
        path: impl AsRef<Path>,
        durability: Durability,
    ) -> Result<(Self, Vec<Record>), ReadJournalError> {
        let path = path.as_ref().to_owned();
        let (records, whole) = read(&path)?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|error| ReadJournalError::Io { path: path.clone(), error })?;
        Ok((Self { file, path, durability, whole, torn: true }, records))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the records of a journal.
    ///
    /// # Errors
    /// When there is none or it was damaged.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<Record>, ReadJournalError> {
        read(path.as_ref()).map(|(records, _)| records)
    }
}

/// The records, and how many bytes they take.
fn read(path: &Path) -> Result<(Vec<Record>, u64), ReadJournalError> {
    let fail = |error| ReadJournalError::Io { path: path.to_owned(), error };
    let mut text = Vec::new();
    File::open(path).map_err(fail)?.take(MAX_JOURNAL).read_to_end(&mut text).map_err(fail)?;
    let mut records = Vec::new();
    let mut whole = 0;
    for (at, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        // The process died in the middle of a write: that append has not returned.
        let Some(content) = line.strip_suffix(b"\n") else { break };
        let damaged = || ReadJournalError::Damaged { path: path.to_owned(), line: at + 1 };
        records.push(decode(content).ok_or_else(damaged)?);
        whole += line.len() as u64;
    }
    Ok((records, whole))
}

fn checksum(json: &[u8]) -> u32 {
    airlift_stream::digest::crc32c(&[json])
}

fn decode(line: &[u8]) -> Option<Record> {
    let (sum, json) = line.split_at_checked(8)?;
    let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
    let json = json.strip_prefix(b" ")?;
    (checksum(json) == sum).then(|| serde_json::from_slice(json).ok()).flatten()
}

impl Journal for FileJournal {
    fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        let kind = record.kind();
        let fail = |error: io::Error| JournalError {
            record: kind,
            errno: error.raw_os_error().map(Errno),
            message: format!("{}: {error}", self.path.display()),
        };
        let json = serde_json::to_vec(record).map_err(|e| fail(e.into()))?;
        let mut line = format!("{:08x} ", checksum(&json)).into_bytes();
        line.extend_from_slice(&json);
        line.push(b'\n');
        if self.torn {
            self.file.set_len(self.whole).map_err(fail)?;
        }
        self.torn = true;
        self.file.write_all(&line).map_err(fail)?;
        self.torn = false;
        self.whole += line.len() as u64;
        if kind.durability(self.durability) == Durability::Power {
            self.file.sync_data().map_err(fail)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        (dir, path)
    }

    #[test]
    fn a_record_that_was_appended_is_read_back() {
        let (_dir, path) = path();
        let mut journal = FileJournal::create(&path, Durability::Process).unwrap();
        journal.append(&Record::Loaded).unwrap();
        journal.append(&Record::Committed).unwrap();
        assert_eq!(FileJournal::read(&path).unwrap(), [Record::Loaded, Record::Committed]);
    }

    #[test]
    fn a_torn_last_record_is_absent_at_every_length() {
        let (_dir, path) = path();
        let mut journal = FileJournal::create(&path, Durability::Process).unwrap();
        journal.append(&Record::Loaded).unwrap();
        let whole = std::fs::read(&path).unwrap();
        journal.append(&Record::Committed).unwrap();
        let both = std::fs::read(&path).unwrap();
        for len in whole.len()..both.len() {
            std::fs::write(&path, &both[..len]).unwrap();
            let (mut journal, records) = FileJournal::reopen(&path, Durability::Process).unwrap();
            assert_eq!(records, [Record::Loaded], "cut at {len}");
            journal.append(&Record::Running).unwrap();
            assert_eq!(FileJournal::read(&path).unwrap(), [Record::Loaded, Record::Running]);
        }
    }

    #[test]
    fn a_changed_record_makes_the_journal_unreadable() {
        let (_dir, path) = path();
        let mut journal = FileJournal::create(&path, Durability::Process).unwrap();
        journal.append(&Record::Loaded).unwrap();
        let first = std::fs::read(&path).unwrap().len();
        journal.append(&Record::Committed).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[first + 12] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(FileJournal::read(&path), Err(ReadJournalError::Damaged { line: 2, .. })));
    }

    #[test]
    fn a_journal_is_never_shared_by_two_sessions() {
        let (_dir, path) = path();
        let _first = FileJournal::create(&path, Durability::Process).unwrap();
        assert!(FileJournal::create(&path, Durability::Process).is_err());
    }
}

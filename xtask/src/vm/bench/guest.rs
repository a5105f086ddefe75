//! The guest's memory: its size, what is put into it, and whether it has arrived.

use super::random::Random;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Of the guest's memory.
pub(super) const BYTES: u64 = 32 << 20;
/// Where content is put: the firmware of a guest with 32 MiB uses the first MiB and what is above the
/// 31st, and nothing else.
const FROM: u64 = 2 << 20;
pub(super) const MOST_RANDOM_MIB: u32 = 28;
const PAGE: usize = 4096;
/// So many pages may the firmware have written since: it waits, and counts the timer's ticks.
const WRITTEN: usize = 4;

/// What is put into the guest's memory beside what the firmware has there, the same in each run.
#[derive(Debug)]
pub(super) struct Guest {
    content: Vec<u8>,
}

impl Guest {
    /// `mib` of content that neither compression nor a search for zeros makes smaller.
    pub(super) fn new(random: &mut Random, mib: u32) -> Self {
        let numbers = u64::from(mib.min(MOST_RANDOM_MIB)) << 17;
        Self { content: (0..numbers).flat_map(|_| random.next().to_le_bytes()).collect() }
    }

    /// Puts the content into the file that is a guest's memory.
    pub(super) fn fill(&self, memory: &Path) -> Result<(), String> {
        let write = || File::options().write(true).open(memory)?.write_all_at(&self.content, FROM);
        write().map_err(|e| format!("{}: {e}", memory.display()))
    }

    /// Checks that the memory of a guest that runs is the same on both sides.
    pub(super) fn same(&self, source: &Path, destination: &Path) -> Result<(), String> {
        for path in [source, destination] {
            let mut there = vec![0; self.content.len()];
            File::open(path)
                .and_then(|f| f.read_exact_at(&mut there, FROM))
                .map_err(|e| format!("{}: {e}", path.display()))?;
            if there != self.content {
                return Err(format!("{}: the content has not arrived", path.display()));
            }
        }
        pages(source, destination, WRITTEN)
    }

    /// Checks that all of the memory is the same on both sides: there no guest runs.
    pub(super) fn identical(source: &Path, destination: &Path) -> Result<(), String> {
        pages(source, destination, 0)
    }
}

/// Compares two files, of which `may` pages may differ.
fn pages(source: &Path, destination: &Path, may: usize) -> Result<(), String> {
    let read = |path: &Path| fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
    let (one, other) = (read(source)?, read(destination)?);
    if one.len() != other.len() {
        return Err(format!("{}: {} bytes, expected {}", destination.display(), other.len(), one.len()));
    }
    let all = one.chunks(PAGE).zip(other.chunks(PAGE)).enumerate();
    let differ: Vec<usize> = all.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    if differ.len() <= may {
        return Ok(());
    }
    let some: Vec<_> = differ.iter().take(8).collect();
    Err(format!("{}: {} pages differ, {some:?} and so on", destination.display(), differ.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_has_not_arrived_is_seen() {
        let folder = std::env::temp_dir().join(format!("airlift-bench-guest-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (source, destination) = (folder.join("source"), folder.join("destination"));
        let guest = Guest::new(&mut Random::new(1), 3);
        assert_eq!(guest.content.len(), 3 << 20);
        File::create(&source).unwrap().set_len(BYTES).unwrap();
        guest.fill(&source).unwrap();
        fs::copy(&source, &destination).unwrap();
        Guest::identical(&source, &destination).unwrap();

        let open = || File::options().write(true).open(&destination).unwrap();
        let byte = |at: u64| open().write_all_at(&[1], at).unwrap();
        // A running guest may have written a page, memory without one may not.
        byte(BYTES - 1);
        guest.same(&source, &destination).unwrap();
        assert!(Guest::identical(&source, &destination).unwrap_err().contains("1 pages differ, [8191]"));
        // But not many.
        for page in 0..4 {
            byte(page * 4096);
        }
        assert!(guest.same(&source, &destination).unwrap_err().contains("5 pages differ"));
        byte(FROM + 5);
        assert!(guest.same(&source, &destination).unwrap_err().contains("the content has not arrived"));
        open().set_len(8 << 20).unwrap();
        assert!(Guest::identical(&source, &destination).unwrap_err().contains("8388608 bytes"));
        fs::remove_dir_all(&folder).unwrap();
    }
}

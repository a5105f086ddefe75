//! Guest memory without a VMM: the files of `--memory` as a layout and as mappings.
//!
//! The wire numbers regions, and the command line names them: the number of a region is the hash
//! (FNV-1a, 32 bits) of its name, so that both sides number the same name alike whatever else they
//! have, and a name that only one side has is a difference that the comparison refuses. Two names of
//! one side with the same number are refused here.
//!
//! That nobody else writes to the files meanwhile is the user's word and cannot be checked.

use crate::args::{MemoryPlace, NamedMemory};
use crate::json::ErrorView;
use airlift_core::{Errno, Gpa, Iova, IovaMap, IovaMapping, MemoryLayout, MemoryRegion, Side};
use airlift_memory::{Access, GuestMemory, GuestRegion, MemoryError, SharedMemory};
use std::fs::{File, OpenOptions};
use std::path::PathBuf;

/// The page that is declared of every region, in bytes: files are not asked what backs them.
const PAGE: u64 = 4096;

/// The memory of a guest that no VMM brings.
#[derive(Clone, Debug)]
pub(crate) struct FileMemory {
    layout: MemoryLayout,
    memory: GuestMemory,
}

impl FileMemory {
    /// Opens the files. On the destination a file that is not there is made, and one that is too short
    /// is made longer, where the size was given.
    ///
    /// # Errors
    /// When a file cannot be used, or two regions have the same name or share addresses.
    pub(crate) fn open(named: &[NamedMemory], side: Side) -> Result<Self, Box<ErrorView>> {
        let mut regions: Vec<MemoryRegion> = Vec::with_capacity(named.len());
        let mut mappings = Vec::with_capacity(named.len());
        for (at, memory) in named.iter().enumerate() {
            let id = memory.region_number();
            if let Some(other) = named[..at].iter().find(|other| other.region_number() == id) {
                return Err(same_number(memory, other));
            }
            let (region, mapping) = open(memory, id, side)?;
            regions.push(region);
            mappings.push(mapping);
        }
        let memory = GuestMemory::new(mappings).map_err(|e| {
            Box::new(
                ErrorView::new(format!("guest memory: {e}"))
                    .errno(Some(Errno(e.raw_errno())))
                    .advise("give each --memory its own addresses with gpa="),
            )
        })?;
        Ok(Self { layout: MemoryLayout { generation: 0, regions }, memory })
    }

    /// The layout.
    pub(crate) const fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The mappings.
    pub(crate) const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How a device of the kernel reaches it: at the guest's own addresses.
    pub(crate) fn iova_map(&self) -> IovaMap {
        let mapping = |r: &MemoryRegion| IovaMapping { iova: Iova(r.gpa.0), gpa: r.gpa, length: r.size };
        IovaMap::new(self.layout.regions.iter().map(mapping).collect())
    }
}

fn same_number(memory: &NamedMemory, other: &NamedMemory) -> Box<ErrorView> {
    let message = if memory.name == other.name {
        format!("two regions of memory have the name {}", memory.name)
    } else {
        format!("the names {} and {} have the same number on the wire", memory.name, other.name)
    };
    Box::new(ErrorView::new(message).advise("give one of them another name, on both sides"))
}

/// Opens the place. A descriptor is opened anew through /proc, so that the one that was inherited is
/// left as it is.
fn open_file(memory: &NamedMemory, path: &PathBuf, make: bool) -> Result<File, Box<ErrorView>> {
    let made = make && memory.size.is_some() && matches!(memory.place, MemoryPlace::File(_));
    OpenOptions::new().read(true).write(true).create(made).truncate(false).open(path).map_err(|e| {
        let view = ErrorView::new(format!("memory {}: {}: {e}", memory.name, place(memory)))
            .errno(e.raw_os_error().map(Errno));
        Box::new(match (&memory.place, e.kind()) {
            (MemoryPlace::Fd(_), std::io::ErrorKind::NotFound) => {
                view.advise("the descriptor must be open in the process that starts this command")
            }
            (_, std::io::ErrorKind::NotFound) if make => view.advise("give size=, and the file is made"),
            _ => view,
        })
    })
}

fn place(memory: &NamedMemory) -> String {
    match &memory.place {
        MemoryPlace::File(path) => format!("file:{}", path.display()),
        MemoryPlace::Fd(fd) => format!("fd:{fd}"),
    }
}

fn open(memory: &NamedMemory, id: u32, side: Side) -> Result<(MemoryRegion, GuestRegion), Box<ErrorView>> {
    let wrong =
        |message: String| ErrorView::new(format!("memory {}: {}: {message}", memory.name, place(memory)));
    let path = match &memory.place {
        MemoryPlace::File(path) => path.clone(),
        MemoryPlace::Fd(fd) => format!("/proc/self/fd/{fd}").into(),
    };
    let make = side == Side::Destination;
    let file = open_file(memory, &path, make)?;
    let io = |e: std::io::Error| Box::new(wrong(e.to_string()).errno(e.raw_os_error().map(Errno)));
    let mut length = file.metadata().map_err(io)?.len();
    let size = match memory.size {
        Some(size) => size,
        None => length.saturating_sub(memory.offset),
    };
    let end = memory
        .offset
        .checked_add(size)
        .ok_or_else(|| Box::new(wrong("offset= and size= overflow".into())))?;
    if make && memory.size.is_some() && length < end {
        file.set_len(end).map_err(io)?;
        length = end;
    }
    if size == 0 || !size.is_multiple_of(PAGE) {
        return Err(Box::new(
            wrong(format!("{size} bytes from offset {} on are no whole pages of {PAGE}", memory.offset))
                .advise("give the region's size with size="),
        ));
    }
    if memory.gpa.checked_add(size).is_none() {
        return Err(Box::new(wrong("gpa= and its size reach beyond the last address".into())));
    }
    let mapped = SharedMemory::from_fd(file.into(), end)
        .and_then(|shared| shared.map(memory.offset, size, Access::ReadWrite))
        .map_err(|e| {
            let view = wrong(e.to_string()).errno(Some(Errno(e.raw_errno())));
            Box::new(match e {
                MemoryError::TooSmall { .. } => view.advise(format!(
                    "the file has {length} bytes: give a smaller size=, or the file that holds the guest's memory"
                )),
                _ => view,
            })
        })?;
    let region = MemoryRegion { id, gpa: Gpa(memory.gpa), size, page_size: PAGE };
    Ok((region, GuestRegion { gpa: memory.gpa, mapping: mapped }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> NamedMemory {
        text.parse().unwrap()
    }

    #[test]
    fn the_destination_makes_the_file_and_the_source_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("ram=file:{}/m,size=64KiB,offset=4096", dir.path().display());
        assert!(FileMemory::open(&[named(&text)], Side::Source).is_err());
        let memory = FileMemory::open(&[named(&text)], Side::Destination).unwrap();
        assert_eq!(memory.layout().total_bytes(), 64 << 10);
        assert_eq!(std::fs::metadata(dir.path().join("m")).unwrap().len(), (64 << 10) + 4096);
        memory.memory().write(0, b"x").unwrap();
        assert_eq!(std::fs::read(dir.path().join("m")).unwrap()[4096], b'x');
    }

    #[test]
    fn the_size_is_that_of_the_file_where_none_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        std::fs::write(&path, vec![7; 3 * 4096]).unwrap();
        let text = format!("ram=file:{},gpa=1MiB,offset=4096", path.display());
        let memory = FileMemory::open(&[named(&text)], Side::Source).unwrap();
        assert_eq!(memory.layout().regions[0].size, 2 * 4096);
        assert_eq!(memory.iova_map().mappings()[0].iova, Iova(1 << 20));
        std::fs::write(&path, vec![7; 4097]).unwrap();
        let text = format!("ram=file:{}", path.display());
        let error = FileMemory::open(&[named(&text)], Side::Destination).unwrap_err();
        assert!(error.advice.unwrap().contains("size="));
    }

    #[test]
    fn regions_of_one_name_or_one_address_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let text = |name: &str, gpa: &str| {
            format!("{name}=file:{}/{name},size=4096,gpa={gpa}", dir.path().display())
        };
        let open = |texts: [String; 2]| FileMemory::open(&texts.map(|t| named(&t)), Side::Destination);
        assert!(open([text("a", "0"), text("b", "4096")]).is_ok());
        assert!(open([text("a", "0"), text("a", "4096")]).unwrap_err().message.contains("name a"));
        assert!(open([text("a", "0"), text("b", "0")]).unwrap_err().advice.unwrap().contains("gpa="));
    }
}

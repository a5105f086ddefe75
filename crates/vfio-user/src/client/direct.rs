//! The parts of a region that are accessed without messages: through mappings of its file, or by reading
//! and writing the file.
//!
//! The areas are the server's word; here they are bounded, and apart from each other.

use airlift_core::{DeviceError, DeviceErrorKind, Errno, RegionArea};
use airlift_memory::{Access, Mapping, MemoryError, SharedMemory};
use rustix::fs::FileType;
use std::os::fd::OwnedFd;

/// Most areas that are used: a process can have 65,530 mappings by default, for all of its devices.
const MAX_AREAS: usize = 1024;

/// Most bytes of a region that are mapped: address space is not free of charge.
const MAX_LENGTH: u64 = 64 << 30;

/// Areas of a region, and what leads to them. Empty where messages are used.
#[derive(Debug, Default)]
pub(super) struct DirectAreas {
    areas: Vec<RegionArea>,
    way: Way,
}

#[derive(Debug, Default)]
enum Way {
    #[default]
    None,
    /// One mapping for each area.
    Mapped(Vec<Mapping>),
    /// A file that its owner can make smaller, and where the region begins in it.
    File { fd: OwnedFd, base: u64 },
}

impl DirectAreas {
    /// The areas `(offset, length)` of a region that begins at `base` of the file `fd`; and why not all of
    /// them are mapped, if that is so.
    pub(super) fn open(fd: OwnedFd, base: u64, areas: &[(u64, u64)]) -> (Self, Option<String>) {
        let listed = areas.len();
        let areas: Vec<_> = areas.iter().copied().filter(|(_, length)| *length > 0).collect();
        if listed > MAX_AREAS {
            return (
                Self::default(),
                Some(format!("it has {listed} areas, of which {MAX_AREAS} can be mapped")),
            );
        }
        let Some((end, total)) =
            extent(&areas).and_then(|(end, total)| Some((base.checked_add(end)?, total)))
        else {
            return (Self::default(), Some("its areas overlap, or their place in the file cannot be".into()));
        };
        if total > MAX_LENGTH {
            return (Self::default(), Some(format!("{total} bytes, of which {MAX_LENGTH} can be mapped")));
        }
        // Beyond the end of a file a mapping is there and an access is fatal: its size is looked at.
        match SharedMemory::from_fd(fd, end) {
            Ok(file) if file.is_shrink_sealed() => Self::map(&file, base, areas),
            Ok(file) => Self::file(&file, base, areas),
            Err(error) => (Self::default(), Some(error.to_string())),
        }
    }

    fn map(file: &SharedMemory, base: u64, areas: Vec<(u64, u64)>) -> (Self, Option<String>) {
        let (mut mapped, mut mappings, mut why) = (Vec::new(), Vec::new(), None);
        for (offset, length) in areas {
            // Within the file: no overflow.
            match file.map(base + offset, length, Access::ReadWrite) {
                Ok(mapping) => {
                    mapped.push(RegionArea { offset, length });
                    mappings.push(mapping);
                }
                Err(error) => why = why.or_else(|| Some(error.to_string())),
            }
        }
        (Self { areas: mapped, way: Way::Mapped(mappings) }, why)
    }

    fn file(file: &SharedMemory, base: u64, areas: Vec<(u64, u64)>) -> (Self, Option<String>) {
        let why = "its file can be made smaller at any time (no F_SEAL_SHRINK)";
        match file.try_clone_fd() {
            Ok(fd) if is_read_and_written(&fd) => {
                let areas = areas.into_iter().map(|(offset, length)| RegionArea { offset, length }).collect();
                (Self { areas, way: Way::File { fd, base } }, Some(format!("{why}: it is read and written")))
            }
            _ => (Self::default(), Some(format!("{why}, and it cannot be read and written"))),
        }
    }

    pub(super) fn areas(&self) -> &[RegionArea] {
        &self.areas
    }

    /// The area in which `length` bytes at `offset` lie, and where in it.
    fn find(&self, offset: u64, length: usize, operation: &str) -> Result<(usize, u64), DeviceError> {
        let end = offset.saturating_add(length as u64);
        let inside = |area: &RegionArea| offset >= area.offset && end <= area.offset + area.length;
        let found = self.areas.iter().position(inside);
        found.map(|index| (index, offset - self.areas[index].offset)).ok_or_else(|| {
            let message = format!("{length} bytes at {offset:#x} are not in one mapped area");
            DeviceError::new(DeviceErrorKind::Misuse, operation, message)
        })
    }

    /// Copies out of one area.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8], operation: &str) -> Result<(), DeviceError> {
        let (index, at) = self.find(offset, buf.len(), operation)?;
        match &self.way {
            Way::Mapped(mappings) => mappings[index].read(at, buf).map_err(failed(operation)),
            Way::File { fd, base } => whole(operation, buf.len(), |done| {
                rustix::io::pread(fd, &mut buf[done..], base + offset + done as u64)
            }),
            Way::None => Ok(()),
        }
    }

    /// Copies into one area.
    pub(super) fn write(&self, offset: u64, data: &[u8], operation: &str) -> Result<(), DeviceError> {
        let (index, at) = self.find(offset, data.len(), operation)?;
        match &self.way {
            Way::Mapped(mappings) => mappings[index].write(at, data).map_err(failed(operation)),
            // What its owner has cut off grows again here, and is in no mapping of theirs.
            Way::File { fd, base } => whole(operation, data.len(), |done| {
                rustix::io::pwrite(fd, &data[done..], base + offset + done as u64)
            }),
            Way::None => Ok(()),
        }
    }
}

fn failed(operation: &str) -> impl Fn(MemoryError) -> DeviceError {
    move |error| DeviceError::refused(operation, Errno(error.raw_errno()))
}

/// The end of the last area, and the length of all; `None` when they overlap or wrap around.
fn extent(areas: &[(u64, u64)]) -> Option<(u64, u64)> {
    let mut sorted = areas.to_vec();
    sorted.sort_unstable();
    let (mut end, mut total) = (0_u64, 0_u64);
    for (offset, length) in sorted {
        if offset < end {
            return None;
        }
        end = offset.checked_add(length)?;
        total = total.checked_add(length)?;
    }
    Some((end, total))
}

/// Whether the file can be accessed so at all: hugetlbfs cannot be written, for one.
fn is_read_and_written(fd: &OwnedFd) -> bool {
    let regular =
        rustix::fs::fstat(fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile);
    regular && rustix::io::pread(fd, &mut [0; 1], 0).is_ok() && rustix::io::pwrite(fd, &[], 0).is_ok()
}

/// Repeats `access`, which does a part and says how much, until `length` bytes are done.
fn whole(
    operation: &str,
    length: usize,
    mut access: impl FnMut(usize) -> rustix::io::Result<usize>,
) -> Result<(), DeviceError> {
    let mut done = 0;
    while done < length {
        match access(done) {
            Ok(0) => {
                let message = "the file of the region has become smaller";
                return Err(DeviceError::new(DeviceErrorKind::Protocol, operation, message));
            }
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(DeviceError::refused(operation, Errno(errno.raw_os_error()))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const PAGE: u64 = 4096;

    fn unsealed(size: u64) -> OwnedFd {
        let fd = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, size).unwrap();
        fd
    }

    // VU-SEAL
    #[test]
    fn a_file_that_becomes_smaller_is_an_error_and_not_the_end_of_the_process() {
        let fd = unsealed(4 * PAGE);
        let (direct, why) = DirectAreas::open(fd.try_clone().unwrap(), PAGE, &[(PAGE, 2 * PAGE)]);
        assert!(why.unwrap().contains("F_SEAL_SHRINK"));
        assert_eq!(direct.areas(), [RegionArea { offset: PAGE, length: 2 * PAGE }]);
        direct.write(PAGE + 5, b"data", "w").unwrap();
        let mut got = [0; 4];
        direct.read(PAGE + 5, &mut got, "r").unwrap();
        assert_eq!(&got, b"data");
        rustix::io::pread(&fd, &mut got, 2 * PAGE + 5).unwrap();
        assert_eq!(&got, b"data", "where the region lies in the file");
        assert_eq!(direct.read(3 * PAGE - 2, &mut got, "r").unwrap_err().kind, DeviceErrorKind::Misuse);

        ftruncate(&fd, PAGE).unwrap();
        let error = direct.read(PAGE, &mut got, "r").unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::Protocol);
        assert!(error.message.contains("smaller"), "{error}");
    }

    // VU-SEAL
    #[test]
    fn what_is_sealed_is_mapped_and_what_can_only_be_mapped_is_left_to_messages() {
        let sealed = SharedMemory::create("sealed", 2 * PAGE).unwrap();
        let (direct, why) = DirectAreas::open(sealed.try_clone_fd().unwrap(), 0, &[(0, 2 * PAGE)]);
        assert!(matches!(direct.way, Way::Mapped(_)) && why.is_none(), "{why:?}");
        direct.write(PAGE, b"mapped", "w").unwrap();
        let mut got = [0; 6];
        direct.read(PAGE, &mut got, "r").unwrap();
        assert_eq!(&got, b"mapped");

        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), [0; 8192]).unwrap();
        let read_only: OwnedFd = std::fs::File::open(dir.path().join("f")).unwrap().into();
        let (direct, why) = DirectAreas::open(read_only, 0, &[(0, PAGE)]);
        assert!(direct.areas().is_empty() && why.unwrap().contains("cannot be read and written"));
    }

    // V1-MMAP, V1-AREAS
    #[test]
    fn areas_are_bounded_in_number_and_length_and_do_not_overlap() {
        let open = |areas: &[(u64, u64)]| DirectAreas::open(unsealed(1 << 40), 0, areas);
        let many: Vec<_> = (0..MAX_AREAS as u64 + 1).map(|i| (i * PAGE, PAGE)).collect();
        assert_eq!(open(&many[1..]).0.areas().len(), MAX_AREAS);
        for areas in [
            &many[..],
            &[(0, 2 * PAGE), (PAGE, PAGE)],
            &[(0, PAGE), (0, PAGE)],
            &[(PAGE, u64::MAX)],
            &[(0, MAX_LENGTH + PAGE)],
            &[(0, 1 << 41)],
        ] {
            let (direct, why) = open(areas);
            assert!(direct.areas().is_empty() && why.is_some(), "{:?}", &areas[..1]);
        }
        assert!(open(&[(0, 0)]).0.areas().is_empty());
    }
}

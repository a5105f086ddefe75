//! Dirty tracking of an iommufd's page table against the kernel's own mock IOMMU (`IOMMUFD_TEST`), where
//! a request sets the bits that an IOMMU would set. Its pages have 2048 bytes.
#![allow(unsafe_code, reason = "requests of the kernel's mock IOMMU, which no crate has")]

use crate::dirty_container::reported;
use crate::support::kernel_has_reinit;
use airlift_core::{DirtySource, Errno, IovaRange};
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_vfio::{Iommufd, PageTableLog};
use std::os::fd::{AsFd, AsRawFd};

const PAGE: u64 = 4096;
const MOCK_PAGE: u64 = 2048;
/// The mock's first address.
const BASE: u64 = 1 << 24;

/// `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 7)`, `+ 9` and the mock's `+ 32`.
const IOMMU_OPTION: libc::c_ulong = 0x3b87;
const IOMMU_HWPT_ALLOC: libc::c_ulong = 0x3b89;
const IOMMU_TEST_CMD: libc::c_ulong = 0x3ba0;
const OPTION_HUGE_PAGES: u32 = 1;
const ALLOC_DIRTY_TRACKING: u64 = 2;

const OP_MOCK_DOMAIN: u32 = 2;
const OP_MOCK_DOMAIN_FLAGS: u32 = 12;
const OP_DIRTY: u32 = 13;
/// A mock device whose IOMMU cannot track.
const NO_DIRTY: u32 = 1;

fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

fn low(word: u64) -> u32 {
    u32::try_from(word & 0xffff_ffff).unwrap()
}

/// A request whose first word is its size; `N` words.
fn request<const N: usize>(
    iommufd: &Iommufd,
    number: libc::c_ulong,
    words: &mut [u64; N],
) -> Result<(), Errno> {
    // SAFETY: the buffer has the size that its first word states, which each caller takes from the
    // kernel's header; the one pointer that is used leads to a bitmap that outlives the call.
    match unsafe { libc::ioctl(iommufd.as_fd().as_raw_fd(), number, words.as_mut_ptr()) } {
        0.. => Ok(()),
        _ => Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap())),
    }
}

/// A request to the mock: its operation, the object that it is about, and words of its own.
fn mock(iommufd: &Iommufd, op: u32, object: u32, own: [u64; 6]) -> Result<[u64; 6], Errno> {
    let mut words = [0; 9];
    words[0] = pair(72, op);
    words[1] = u64::from(object);
    words[2..8].copy_from_slice(&own);
    request(iommufd, IOMMU_TEST_CMD, &mut words)?;
    Ok(words[2..8].try_into().unwrap())
}

/// A mock device over the iommufd's address space; its number.
fn device(iommufd: &Iommufd, flags: u32) -> u32 {
    let made = mock(iommufd, OP_MOCK_DOMAIN_FLAGS, iommufd.ioas(), [0, pair(0, flags), 0, 0, 0, 0]).unwrap();
    low(made[1])
}

/// A page table for `device`, with a mock device attached to it.
fn page_table(iommufd: &Iommufd, device: u32, flags: u64) -> Result<u32, Errno> {
    // size, flags; device, address space; out id, reserved; data type, data length; data; fault, reserved.
    let mut words = [pair(48, u32::try_from(flags).unwrap()), pair(device, iommufd.ioas()), 0, 0, 0, 0];
    request(iommufd, IOMMU_HWPT_ALLOC, &mut words)?;
    let table = low(words[2]);
    mock(iommufd, OP_MOCK_DOMAIN, table, [0; 6])?;
    Ok(table)
}

/// The mock's device writes: marks these of the mock's own pages, counted from [`BASE`].
fn write(iommufd: &Iommufd, table: u32, pages: &[u64]) {
    let last = *pages.iter().max().unwrap();
    let mut bitmap = vec![0_u64; usize::try_from(last / 64 + 1).unwrap()];
    for page in pages {
        bitmap[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
    }
    let address = bitmap.as_ptr().expose_provenance() as u64;
    let length = (last + 1) * MOCK_PAGE;
    let done = mock(iommufd, OP_DIRTY, table, [0, BASE, length, MOCK_PAGE, address, 0]).unwrap();
    assert_eq!(done[5], pages.len() as u64, "the mock marked other pages");
}

fn memory(length: u64) -> Mapping {
    SharedMemory::create("dma", length).unwrap().map(0, length, Access::ReadWrite).unwrap()
}

/// An iommufd that maps page by page: a page table with larger entries marks all of an entry. `None` where
/// the mock cannot be used: up to 6.12 the kernel gives a mock device to the first IOMMU that it has, so
/// there must be no other. There is one in the test VM; 7.3 can have both.
fn iommufd() -> Option<Iommufd> {
    let others = std::fs::read_dir("/sys/class/iommu").unwrap();
    let names: Vec<_> = others.map(|entry| entry.unwrap().file_name()).collect();
    if !kernel_has_reinit() && names.iter().any(|name| !name.to_string_lossy().contains("mock")) {
        eprintln!("not tested on this kernel: the mock IOMMU cannot be used beside {names:?}");
        return None;
    }
    let iommufd = Iommufd::new().unwrap();
    // size, option; operation (0: set), object; value.
    let mut words = [pair(24, OPTION_HUGE_PAGES), pair(0, iommufd.ioas()), 0];
    request(&iommufd, IOMMU_OPTION, &mut words).unwrap();
    Some(iommufd)
}

/// Pages from [`BASE`], as a report gives them.
fn at(pages: &[(u64, u64)]) -> Vec<(u64, u64)> {
    pages.iter().map(|(first, count)| (BASE + first * PAGE, count * PAGE)).collect()
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_devices_write_is_reported_once_and_exactly() {
    let Some(iommufd) = iommufd() else { return };
    let device = device(&iommufd, 0);
    let table = page_table(&iommufd, device, ALLOC_DIRTY_TRACKING).unwrap();
    let length = 1024 * PAGE;
    iommufd.map(BASE, &memory(length)).unwrap();
    let mut source = PageTableLog::new(iommufd.clone(), iommufd.ioas(), table);
    source.start(&[IovaRange::new(BASE, length)]).unwrap();
    assert_eq!(source.page_size(), PAGE);
    assert_eq!(reported(&mut source, BASE, length), []);
    // Halves of pages, and whole ones: the first, the last, and around the end of a word of bits.
    write(&iommufd, table, &[0, 1, 7, 126, 127, 128, 2047]);
    // Asked for a part, all of the range is fetched, and reported: what is cleared is never left out.
    let all = at(&[(0, 1), (3, 1), (63, 2), (1023, 1)]);
    assert_eq!(reported(&mut source, BASE + 3 * PAGE, PAGE), all);
    assert_eq!(reported(&mut source, BASE, length), []);
    write(&iommufd, table, &[8]);
    // A byte of a page is the page.
    assert_eq!(reported(&mut source, BASE + 4 * PAGE + 1, 1), at(&[(4, 1)]));
    source.stop().unwrap();
    assert!(source.report(IovaRange::new(BASE, length), &mut |_| ()).is_err());
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_new_start_forgets_what_was_before() {
    let Some(iommufd) = iommufd() else { return };
    let device = device(&iommufd, 0);
    let table = page_table(&iommufd, device, ALLOC_DIRTY_TRACKING).unwrap();
    iommufd.map(BASE, &memory(64 * PAGE)).unwrap();
    let mut source = PageTableLog::new(iommufd.clone(), iommufd.ioas(), table);
    let all = [IovaRange::new(BASE, 64 * PAGE)];
    source.start(&all).unwrap();
    write(&iommufd, table, &[2]);
    source.stop().unwrap();
    source.start(&all).unwrap();
    assert_eq!(reported(&mut source, BASE, 64 * PAGE), []);
    write(&iommufd, table, &[4]);
    assert_eq!(reported(&mut source, BASE, 64 * PAGE), at(&[(2, 1)]));
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn ranges_may_cross_mappings_but_not_gaps() {
    let Some(iommufd) = iommufd() else { return };
    let device = device(&iommufd, 0);
    let table = page_table(&iommufd, device, ALLOC_DIRTY_TRACKING).unwrap();
    for first in [0, 16, 48] {
        iommufd.map(BASE + first * PAGE, &memory(16 * PAGE)).unwrap();
    }
    let mut source = PageTableLog::new(iommufd.clone(), iommufd.ioas(), table);
    source.start(&[IovaRange::new(BASE, 32 * PAGE), IovaRange::new(BASE + 48 * PAGE, 16 * PAGE)]).unwrap();
    write(&iommufd, table, &[30, 32, 96]);
    // Asked for with the gap: what is not mapped is not asked of the kernel.
    assert_eq!(reported(&mut source, BASE, 64 * PAGE), at(&[(15, 2), (48, 1)]));
    // Logged with the gap: the kernel would say nothing of what is behind it, and call that a success.
    source.stop().unwrap();
    for (first, count) in [(0, 64), (31, 2), (32, 1), (40, 24)] {
        let refused = source.start(&[IovaRange::new(BASE + first * PAGE, count * PAGE)]).unwrap_err();
        assert_eq!(refused.errno, Some(Errno::ENOENT), "{refused}");
    }
    source.start(&[IovaRange::new(BASE + 50 * PAGE, PAGE)]).unwrap();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_page_table_that_cannot_track_does_not_start() {
    let Some(iommufd) = iommufd() else { return };
    let lame = device(&iommufd, NO_DIRTY);
    assert_eq!(page_table(&iommufd, lame, ALLOC_DIRTY_TRACKING), Err(Errno::EOPNOTSUPP));
    let table = page_table(&iommufd, lame, 0).unwrap();
    iommufd.map(BASE, &memory(PAGE)).unwrap();
    let mut source = PageTableLog::new(iommufd.clone(), iommufd.ioas(), table);
    let refused = source.start(&[IovaRange::new(BASE, PAGE)]).unwrap_err();
    assert_eq!(refused.errno, Some(Errno::EOPNOTSUPP));
    assert_eq!(source.page_size(), 0);
    // An address space is no page table.
    let mut source = PageTableLog::new(iommufd.clone(), iommufd.ioas(), iommufd.ioas());
    assert!(source.start(&[IovaRange::new(BASE, PAGE)]).is_err());
}

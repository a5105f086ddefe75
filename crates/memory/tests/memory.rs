//! What the crate promises: bounds, seals, sharing, no tearing, no access without memory.

use airlift_memory::{Access, GuestMemory, GuestRegion, Mapping, MemoryError, SharedMemory};
use proptest::prelude::*;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

fn mapping(size: u64) -> Mapping {
    let memory = SharedMemory::create("test", size).expect("a memfd");
    memory.map(0, size, Access::ReadWrite).expect("a mapping")
}

#[test]
fn two_mappings_of_one_file_are_the_same_memory() {
    let memory = SharedMemory::create("test", 16384).unwrap();
    let other = SharedMemory::from_fd(memory.try_clone_fd().unwrap(), 16384).unwrap();
    let all = memory.map(0, 16384, Access::ReadWrite).unwrap();
    let upper = other.map(8192, 8192, Access::ReadOnly).unwrap();
    drop((memory, other));
    all.write(8192 + 5, b"shared").unwrap();
    let mut back = [0; 6];
    upper.read(5, &mut back).unwrap();
    assert_eq!(&back, b"shared");
}

#[test]
fn nobody_can_truncate_a_memfd_under_its_mappings() {
    let memory = SharedMemory::create("test", 8192).unwrap();
    assert!(memory.is_shrink_sealed());
    assert!(rustix::fs::ftruncate(memory.fd(), 4096).is_err());
    assert!(rustix::fs::ftruncate(memory.fd(), 16384).is_err());
    let flags = rustix::io::fcntl_getfd(memory.fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn a_file_smaller_than_promised_is_refused() {
    let fd: OwnedFd = SharedMemory::create("test", 4096).unwrap().try_clone_fd().unwrap();
    let error = SharedMemory::from_fd(fd.as_fd().try_clone_to_owned().unwrap(), 4097).unwrap_err();
    assert_eq!(error, MemoryError::TooSmall { expected: 4097, actual: 4096 });
    assert_eq!(SharedMemory::from_fd(fd, 100).unwrap().size(), 100);
}

#[test]
fn mapping_refuses_ranges_outside_of_the_file() {
    let memory = SharedMemory::create("test", 8192).unwrap();
    for (offset, length) in [(0, 8193), (4096, 4097), (8192, 1), (u64::MAX - 4095, 8192), (4096, u64::MAX)] {
        let error = memory.map(offset, length, Access::ReadWrite).unwrap_err();
        assert_eq!(error, MemoryError::OutOfBounds { offset, length, size: 8192 });
    }
    assert_eq!(memory.map(0, 0, Access::ReadOnly).unwrap_err(), MemoryError::Empty);
    let error = memory.map(8, 8, Access::ReadOnly).unwrap_err();
    assert!(matches!(error, MemoryError::Misaligned { offset: 8, .. }), "{error}");
}

#[test]
fn accesses_outside_of_a_mapping_are_refused_and_change_nothing() {
    let m = mapping(4096);
    m.fill(0, 4096, 7).unwrap();
    for (offset, length) in [(4096_u64, 1_usize), (4095, 2), (0, 4097), (u64::MAX, 1), (u64::MAX - 7, 16)] {
        let mut buf = vec![1; length];
        let expected = MemoryError::OutOfBounds { offset, length: length as u64, size: 4096 };
        assert_eq!(m.read(offset, &mut buf), Err(expected.clone()));
        assert!(buf.iter().all(|b| *b == 1));
        assert_eq!(m.write(offset, &buf), Err(expected.clone()));
        assert_eq!(m.fill(offset, length as u64, 0), Err(expected.clone()));
        assert_eq!(m.copy_to(offset, &m, 0, length as u64), Err(expected));
    }
    let mut all = [0; 4096];
    m.read(0, &mut all).unwrap();
    assert!(all.iter().all(|b| *b == 7));
}

#[test]
fn atomics_refuse_what_is_misaligned_or_beyond_the_end() {
    let m = mapping(4096);
    assert_eq!(m.load_u64(4), Err(MemoryError::Misaligned { offset: 4, align: 8 }));
    assert_eq!(m.store_u32(2, 0), Err(MemoryError::Misaligned { offset: 2, align: 4 }));
    for offset in [4096, 4092, u64::MAX - 7] {
        assert!(matches!(m.store_u64(offset, 1), Err(MemoryError::OutOfBounds { .. })));
    }
    m.store_u64(4088, 0x0123_4567_89ab_cdef).unwrap();
    assert_eq!(m.load_u64(4088), Ok(0x0123_4567_89ab_cdef));
    assert_eq!(m.swap_u64(4088, 0b101), Ok(0x0123_4567_89ab_cdef));
    assert_eq!(m.fetch_or_u64(4088, 0b010), Ok(0b101));
    assert_eq!(m.fetch_add_u64(4088, 2), Ok(0b111));
    assert_eq!(m.load_u64(4088), Ok(9));
}

#[test]
fn a_read_only_mapping_refuses_every_write() {
    let m = SharedMemory::create("test", 4096).unwrap().map(0, 4096, Access::ReadOnly).unwrap();
    let source = mapping(4096);
    let results = [
        m.write(0, &[1]),
        m.fill(0, 1, 1),
        m.store_u64(0, 1),
        m.store_u32(0, 1),
        m.swap_u64(0, 1).map(drop),
        m.fetch_or_u64(0, 1).map(drop),
        m.fetch_add_u64(0, 1).map(drop),
        source.copy_to(0, &m, 0, 1),
    ];
    assert_eq!(results, [const { Err(MemoryError::ReadOnly) }; 8]);
    assert_eq!(m.load_u64(0), Ok(0));
}

#[test]
fn words_do_not_tear_while_others_write() {
    let m = mapping(65536);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for pattern in [0x11_u8, 0xee] {
            let (m, stop) = (m.clone(), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    m.write(0, &[pattern; 65536]).unwrap();
                }
            });
        }
        let mut copy = vec![0; 65536];
        for _ in 0..300 {
            m.read(0, &mut copy).unwrap();
            for word in copy.chunks_exact(8) {
                assert!([0, 0x11, 0xee].iter().any(|b| word == [*b; 8]), "torn word {word:x?}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_counter_published_last_is_seen_last() {
    let m = mapping(8192);
    std::thread::scope(|scope| {
        let writer = m.clone();
        scope.spawn(move || {
            for i in 1..=20_000_u64 {
                writer.write(4096, &i.to_ne_bytes()).unwrap();
                writer.store_u64(0, i).unwrap();
            }
        });
        let mut last = 0;
        while last < 20_000 {
            last = m.load_u64(0).unwrap();
            assert!(m.load_u64(4096).unwrap() >= last, "the data is older than its counter");
        }
    });
}

fn guest(layout: &[(u64, u64)]) -> Result<GuestMemory, MemoryError> {
    GuestMemory::new(layout.iter().map(|&(gpa, size)| GuestRegion { gpa, mapping: mapping(size) }).collect())
}

#[test]
fn overlapping_regions_are_refused() {
    let error = guest(&[(8192, 4096), (0, 8193)]).unwrap_err();
    assert_eq!(error, MemoryError::Overlap { first: 0, second: 8192 });
    assert!(guest(&[(u64::MAX - 4094, 4096)]).is_err());
    assert_eq!(guest(&[(8192, 4096), (0, 8192)]).unwrap().total(), 12288);
}

#[test]
fn guest_accesses_split_at_regions_and_stop_at_holes() {
    let memory = guest(&[(0x1000, 4096), (0x2000, 4096), (0x8000, 4096)]).unwrap();
    memory.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
    let mut back = [0; 4];
    memory.read(0x1ffe, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
    memory.regions()[1].mapping.read(0, &mut back[..2]).unwrap();
    assert_eq!(back[..2], [3, 4]);

    assert_eq!(memory.write(0x2ffe, &[9; 4]), Err(MemoryError::Unmapped { gpa: 0x3000 }));
    memory.read(0x2ffe, &mut back[..2]).unwrap();
    assert_eq!(back[..2], [0, 0], "a refused write wrote a part");
    assert_eq!(memory.load_u64(0xfff), Err(MemoryError::Unmapped { gpa: 0xfff }));
    assert!(memory.find(0x9000).is_none());
    assert_eq!(memory.find(0x8fff).map(|(_, offset)| offset), Some(0xfff));
    memory.store_u64(0x8000, 5).unwrap();
    assert_eq!(memory.load_u64(0x8000), Ok(5));
}

proptest! {
    /// Any sequence of writes, fills and copies does to a mapping what it does to a vector.
    #[test]
    fn a_mapping_behaves_as_a_vector(
        operations in prop::collection::vec((0..3_u8, 0..600_usize, 0..600_usize, any::<u8>(), 0..600_usize), 1..20)
    ) {
        let m = mapping(512);
        let mut model = vec![0_u8; 512];
        for (kind, offset, length, byte, to) in operations {
            let fits = offset + length <= 512;
            match kind {
                0 => {
                    let data: Vec<u8> = (0..length).map(|i| byte.wrapping_add(i.to_le_bytes()[0])).collect();
                    prop_assert_eq!(m.write(offset as u64, &data).is_ok(), fits);
                    if fits { model[offset..offset + length].copy_from_slice(&data); }
                }
                1 => {
                    prop_assert_eq!(m.fill(offset as u64, length as u64, byte).is_ok(), fits);
                    if fits { model[offset..offset + length].fill(byte); }
                }
                _ => {
                    // The bounce buffer is larger than the mapping, so overlap is defined here.
                    let fits = fits && to + length <= 512;
                    prop_assert_eq!(m.copy_to(offset as u64, &m, to as u64, length as u64).is_ok(), fits);
                    if fits { model.copy_within(offset..offset + length, to); }
                }
            }
            let mut all = vec![0; 512];
            m.read(0, &mut all).unwrap();
            prop_assert_eq!(&all, &model);
        }
    }

    /// A read at any place gives the bytes of that place.
    #[test]
    fn unaligned_reads(offset in 0..512_u64, length in 0..512_usize) {
        let m = mapping(512);
        let data: Vec<u8> = (0..512_u32).map(|i| i.to_le_bytes()[0]).collect();
        m.write(0, &data).unwrap();
        let mut buf = vec![0; length];
        let start = usize::try_from(offset).unwrap();
        match m.read(offset, &mut buf) {
            Ok(()) => prop_assert_eq!(&buf[..], &data[start..start + length]),
            Err(_) => prop_assert!(start + length > 512),
        }
    }
}

#[test]
fn what_a_file_does_not_hold_is_found_without_bringing_it_into_memory() {
    const MIB: u64 = 1 << 20;
    let shared = SharedMemory::create("holes", 8 * MIB).unwrap();
    let whole = shared.map(0, 8 * MIB, Access::ReadWrite).unwrap();
    let second = shared.map(4 * MIB, 4 * MIB, Access::ReadWrite).unwrap();
    assert_eq!(whole.next_data(0, 8 * MIB), None);
    whole.write(5 * MIB + 100, &[1]).unwrap();
    assert_eq!(whole.next_data(0, 8 * MIB), Some(5 * MIB));
    assert_eq!(second.next_data(0, 4 * MIB), Some(MIB), "offsets are from the mapping's start");
    assert_eq!(whole.next_data(5 * MIB + 8, 64), Some(5 * MIB + 8), "inside of data");
    assert_eq!(whole.next_data(0, 5 * MIB), None, "data that begins where the range ends");
    assert_eq!(whole.next_data(6 * MIB, 2 * MIB), None, "nothing to the file's end");
    let stat = rustix::fs::fstat(shared.fd()).unwrap();
    assert_eq!(stat.st_blocks * 512, 4096, "looking for data has allocated memory");

    let memory = GuestMemory::new(vec![
        GuestRegion { gpa: 0x1000_0000, mapping: shared.map(0, 4 * MIB, Access::ReadWrite).unwrap() },
        GuestRegion { gpa: 0x1000_0000 + 4 * MIB, mapping: second },
    ])
    .unwrap();
    assert_eq!(memory.next_data(0x1000_0000, 8 * MIB), Some(0x1000_0000 + 5 * MIB), "over two regions");
    assert_eq!(memory.next_data(0x1000_0000, 9 * MIB), Some(0x1000_0000 + 5 * MIB));
    assert_eq!(memory.next_data(0x1000_0000 + 6 * MIB, 9 * MIB), Some(0x1000_0000 + 8 * MIB), "no memory");
}

//! The dirty bitmap of a type1 container with a real IOMMU: the emulated VT-d and an e1000e on vfio-pci.
//! The IOMMU tracks nothing, so every page that is mapped counts as dirty in every report.

use crate::support::id;
use airlift_core::{DirtySource, Errno, IovaRange};
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_vfio::{
    Attachment, Container, ContainerLog, OpenDevice, OpenOptions, Tracker, Way, choose, open,
};

const E1000E: &str = "pci:0000:00:05.0";
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn opened(way: Way) -> OpenDevice {
    let address = E1000E.parse().unwrap();
    open(&address, &OpenOptions { way, ..OpenOptions::default() })
        .unwrap_or_else(|e| panic!("{E1000E}: {e}; {}", e.advice()))
}

fn container(device: &OpenDevice) -> &Container {
    match &device.attachment {
        Attachment::Container { container, .. } => container,
        other => panic!("{other:?}"),
    }
}

fn memory(length: u64) -> Mapping {
    SharedMemory::create("dma", length).unwrap().map(0, length, Access::ReadWrite).unwrap()
}

/// What a report of `range` gives, in bytes from 0.
pub(crate) fn reported(source: &mut dyn DirtySource, start: u64, length: u64) -> Vec<(u64, u64)> {
    let mut got = Vec::new();
    source.report(IovaRange::new(start, length), &mut |r| got.push((r.start.0, r.length))).unwrap();
    got
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn every_mapped_page_counts_as_dirty_in_every_report() {
    let device = opened(Way::Group);
    let choice = choose(&id(), &device);
    assert_eq!(choice.tracker, Tracker::Container, "{choice:?}");
    let container = container(&device);
    container.map(0, &memory(2 * MIB)).unwrap();
    container.map(1 << 32, &memory(MIB)).unwrap();
    let mut source = choice.source.unwrap();
    source.start(&[IovaRange::new(0, 2 * MIB), IovaRange::new(1 << 32, MIB)]).unwrap();
    assert_eq!(source.page_size(), PAGE);
    for _ in 0..2 {
        assert_eq!(reported(source.as_mut(), 0, 2 * MIB), [(0, 2 * MIB)]);
        assert_eq!(reported(source.as_mut(), 1 << 32, MIB), [(1 << 32, MIB)]);
    }
    // A part is asked for: the kernel gives whole mappings alone.
    assert_eq!(reported(source.as_mut(), 0x5000, PAGE), [(0, 2 * MIB)]);
    assert_eq!(reported(source.as_mut(), 2 * MIB, MIB), []);
    source.stop().unwrap();
    let late = source.report(IovaRange::new(0, 2 * MIB), &mut |_| ());
    assert!(late.is_err(), "a report after the end is no clean memory");
}

// K-TYPE1-BITMAP
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn it_does_not_matter_in_how_many_pieces_memory_is_mapped() {
    let device = opened(Way::Group);
    let container = container(&device);
    // Three mappings that touch, told as two ranges that cut the one in the middle.
    for at in [0, MIB, 2 * MIB] {
        container.map(at, &memory(MIB)).unwrap();
    }
    let mut source = ContainerLog::new(container.clone());
    let half = MIB + MIB / 2;
    source.start(&[IovaRange::new(0, half), IovaRange::new(half, half)]).unwrap();
    assert_eq!(reported(&mut source, 0, half), [(0, 3 * MIB)]);
    // A range that ends within a mapping: what the kernel refuses is dirty as a whole.
    source.stop().unwrap();
    source.start(&[IovaRange::new(0, half)]).unwrap();
    let mut got = Vec::new();
    let result = source.report(IovaRange::new(0, PAGE), &mut |r| got.push((r.start.0, r.length)));
    assert_eq!(result.unwrap_err().errno, Some(Errno::EINVAL));
    assert_eq!(got, [(0, half)]);
    // Memory that is not mapped has no dirty pages.
    source.stop().unwrap();
    source.start(&[IovaRange::new(1 << 40, MIB)]).unwrap();
    assert_eq!(reported(&mut source, 1 << 40, MIB), []);
    source.stop().unwrap();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_iommu_that_does_not_track_leaves_a_device_in_an_iommufd_without_a_source() {
    let device = opened(Way::Cdev);
    let choice = choose(&id(), &device);
    assert_eq!(choice.tracker, Tracker::None, "{choice:?}");
    assert!(choice.source.is_none());
    let (tracker, found) = &choice.considered[0];
    assert_eq!(*tracker, Tracker::PageTable);
    assert!(found.contains("does not track"), "{found}");
}

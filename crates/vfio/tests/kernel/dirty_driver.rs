//! Exact dirty pages, with DMA that our own driver makes on demand: in a type1 container, and in the
//! device's own log, bound to an iommufd (V2-DIRTY, V2-LOGGING).

use crate::dirty_container::reported;
use crate::support::{Mdev, id};
use airlift_core::{DirtySource, Errno, IovaRange};
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_vfio::{
    Attachment, Container, ContainerLog, DeviceLog, DirtyChoice, OpenDevice, OpenOptions, Tracker, Way,
    choose, open,
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where memory is mapped; not at 0, so that offsets and addresses differ.
const BASE: u64 = 1 << 30;

/// Opened without what a migration needs, in RUNNING.
fn opened(mdev: &Mdev, options: &OpenOptions) -> OpenDevice {
    open(&mdev.address(), options).unwrap_or_else(|e| panic!("{e}; {}", e.advice()))
}

fn by(way: Way) -> OpenOptions {
    OpenOptions { way, ..OpenOptions::default() }
}

/// Maps `length` bytes at [`BASE`] for the device's DMA.
fn map(device: &OpenDevice, length: u64) -> Mapping {
    let memory = SharedMemory::create("dma", length).unwrap().map(0, length, Access::ReadWrite).unwrap();
    match &device.attachment {
        Attachment::Iommufd { iommufd, .. } => iommufd.map(BASE, &memory).unwrap(),
        Attachment::Container { container, .. } => container.map(BASE, &memory).unwrap(),
        Attachment::Given => panic!("opened here"),
    }
    memory
}

fn container(device: &OpenDevice) -> &Container {
    match &device.attachment {
        Attachment::Container { container, .. } => container,
        other => panic!("{other:?}"),
    }
}

/// The device writes `length` bytes at `offset` from [`BASE`].
fn dma(mdev: &Mdev, offset: u64, length: u64) {
    mdev.set("dma", &format!("{} {length} 171", BASE + offset));
}

/// Ranges in bytes from [`BASE`].
fn from_base(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    ranges.iter().map(|(offset, length)| (BASE + offset, *length)).collect()
}

/// The same writes for each exact source; `all` is what it logs.
fn assert_exact(mdev: &Mdev, source: &mut dyn DirtySource, memory: &Mapping) {
    let length = memory.len();
    source.start(&[IovaRange::new(BASE, length)]).unwrap();
    assert_eq!(reported(source, BASE, length), [], "nothing was written since the start");
    dma(mdev, 0, PAGE);
    // A few bytes, a piece over the end of a page, and the last byte.
    dma(mdev, 0x5010, 16);
    dma(mdev, 0x8ff0, 0x20);
    dma(mdev, length - 1, 1);
    let wanted = from_base(&[(0, PAGE), (0x5000, PAGE), (0x8000, 2 * PAGE), (length - PAGE, PAGE)]);
    assert_eq!(reported(source, BASE, length), wanted);
    let mut byte = [0];
    memory.read(0x5010, &mut byte).unwrap();
    assert_eq!(byte, [171], "the device writes to this memory");
    assert_eq!(reported(source, BASE, length), [], "a report clears");
    dma(mdev, 0x3000, 1);
    assert_eq!(reported(source, BASE, length), from_base(&[(0x3000, PAGE)]));
    source.stop().unwrap();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_container_reports_exactly_what_the_device_has_written() {
    let mdev = Mdev::ours("v2");
    let device = opened(&mdev, &by(Way::Group));
    let memory = map(&device, 8 * MIB);
    let mut source = ContainerLog::new(container(&device).clone());
    assert_exact(&mdev, &mut source, &memory);
    assert_exact(&mdev, &mut source, &memory);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_devices_own_log_reports_exactly_what_it_has_written() {
    for way in [Way::Cdev, Way::Group] {
        let mdev = Mdev::ours("v2");
        let device = opened(&mdev, &by(way));
        let memory = map(&device, 8 * MIB);
        let choice = choose(&id(), &device);
        assert_eq!(choice.tracker, Tracker::Device, "{way:?}: {choice:?}");
        let mut source = choice.source.unwrap();
        assert_exact(&mdev, source.as_mut(), &memory);
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_choice_says_what_was_looked_at() {
    let mdev = Mdev::ours("v2");
    let device = opened(&mdev, &by(Way::Cdev));
    let DirtyChoice { considered, reason, .. } = choose(&id(), &device);
    let trackers: Vec<_> = considered.iter().map(|(tracker, _)| *tracker).collect();
    assert_eq!(trackers, [Tracker::PageTable, Tracker::Device, Tracker::Container]);
    assert!(considered[0].1.contains("mediates"), "{considered:?}");
    assert!(reason.contains("DMA_LOGGING"), "{reason}");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_logs_larger_pages_reports_them_whole() {
    let mdev = Mdev::ours("v2");
    mdev.set("log_page_size", "65536");
    let device = opened(&mdev, &by(Way::Cdev));
    let _memory = map(&device, MIB);
    let mut source = DeviceLog::new(&id(), device.fd.clone());
    // Two ranges in one page of the device.
    source.start(&[IovaRange::new(BASE + 0x1000, 0x1000), IovaRange::new(BASE + 0x5000, 0x1000)]).unwrap();
    assert_eq!(source.page_size(), 0x10_000);
    dma(&mdev, 0x5000, 1);
    assert_eq!(reported(&mut source, BASE + 0x1000, 0x1000), from_base(&[(0, 0x10_000)]));
    source.stop().unwrap();
}

// K-RANGES
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn more_ranges_than_the_kernel_takes_are_merged() {
    let mdev = Mdev::ours("v2");
    let device = opened(&mdev, &by(Way::Cdev));
    let _memory = map(&device, 8 * MIB);
    let mut source = DeviceLog::new(&id(), device.fd.clone());
    // The kernel takes 256 at most.
    let ranges: Vec<_> = (0..600).map(|i| IovaRange::new(BASE + i * 3 * PAGE, PAGE)).collect();
    source.start(&ranges).unwrap();
    for i in [0, 1, 299, 599] {
        dma(&mdev, i * 3 * PAGE, 1);
        let page = from_base(&[(i * 3 * PAGE, PAGE)]);
        assert_eq!(reported(&mut source, page[0].0, PAGE), page);
    }
    source.stop().unwrap();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_whose_ranges_are_joined_by_the_driver_still_reports_each() {
    let mdev = Mdev::ours("v2");
    mdev.set("log_max_ranges", "1");
    let device = opened(&mdev, &by(Way::Cdev));
    let _memory = map(&device, MIB);
    let mut source = DeviceLog::new(&id(), device.fd.clone());
    source.start(&[IovaRange::new(BASE, PAGE), IovaRange::new(BASE + 0x80_000, PAGE)]).unwrap();
    dma(&mdev, 0, 1);
    dma(&mdev, 0x80_000, 1);
    let both = from_base(&[(0, PAGE), (0x80_000, PAGE)]);
    assert_eq!(reported(&mut source, 0, u64::MAX), both);
    source.stop().unwrap();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn when_the_device_does_not_log_its_container_does() {
    let mdev = Mdev::ours("v2");
    mdev.set("log_fail", "1");
    let device = opened(&mdev, &by(Way::Group));
    let memory = map(&device, MIB);
    let mut source = choose(&id(), &device).source.unwrap();
    assert!(source.domain().0.starts_with("device:"), "{}", source.domain());
    assert_exact(&mdev, source.as_mut(), &memory);
    assert!(source.domain().0.starts_with("container:"), "{}", source.domain());
    drop(source);
    drop(device);
    // In an iommufd there is nothing to fall back to.
    let device = opened(&mdev, &by(Way::Cdev));
    let _memory = map(&device, MIB);
    let mut source = choose(&id(), &device).source.unwrap();
    let error = source.start(&[IovaRange::new(BASE, MIB)]).unwrap_err();
    assert_eq!(error.errno, Some(Errno::EOPNOTSUPP));
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn one_container_is_one_domain_whose_log_holds_both_devices() {
    let (first, second) = (Mdev::ours("v2"), Mdev::ours("v2"));
    let one = opened(&first, &by(Way::Group));
    let shared = OpenOptions { container: Some(container(&one).clone()), ..by(Way::Group) };
    let other = opened(&second, &shared);
    let _memory = map(&one, MIB);
    let mut source = ContainerLog::new(container(&one).clone());
    assert_eq!(source.domain(), ContainerLog::new(container(&other).clone()).domain());
    source.start(&[IovaRange::new(BASE, MIB)]).unwrap();
    dma(&first, 0x1000, 1);
    dma(&second, 0x4000, 1);
    assert_eq!(reported(&mut source, BASE, MIB), from_base(&[(0x1000, PAGE), (0x4000, PAGE)]));
    source.stop().unwrap();
}

// V2-DIRTY-UNMAP
// V2-DIRTY-UNMAP
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_was_dirty_in_an_unmapped_range_is_told() {
    let mdev = Mdev::ours("v2");
    let device = opened(&mdev, &by(Way::Group));
    let _memory = map(&device, MIB);
    let mut source = ContainerLog::new(container(&device).clone());
    let all = IovaRange::new(BASE, MIB);
    source.start(&[all]).unwrap();
    dma(&mdev, 0x2000, PAGE);
    dma(&mdev, MIB - PAGE, PAGE);
    let told = container(&device).unmap(all, Some(source.page_size())).unwrap();
    let told: Vec<_> = told.iter().map(|r| (r.start.0, r.length)).collect();
    assert_eq!(told, from_base(&[(0x2000, PAGE), (MIB - PAGE, PAGE)]));
    source.stop().unwrap();
}

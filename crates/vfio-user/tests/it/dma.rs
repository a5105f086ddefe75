//! DMA: mapped memory, memory served by messages, guards, and both kinds of dirty log.

use crate::common::*;
use airlift_core::{DeviceState, DirtySource, DomainId, Errno, IovaRange, MigrationDevice, MigrationFlags};
use airlift_memory::{Access, SharedMemory};
use airlift_vfio_user::{Client, Dma, DmaAccess, DmaError, DmaHandler, ServerOptions, VfioUserDevice};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn memory(size: u64) -> SharedMemory {
    SharedMemory::create("guest", size).unwrap()
}

fn map(client: &Client, memory: &SharedMemory, iova: u64, offset: u64, size: u64) {
    let access = DmaAccess::READ | DmaAccess::WRITE;
    client.dma_map(iova, size, access, Some((memory.fd(), offset))).unwrap();
}

fn dma(served: &Served) -> Dma {
    served.control.with(|s| s.attachment.as_ref().unwrap().dma.clone())
}

fn dirty(source: &mut dyn DirtySource, start: u64, length: u64) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    source.report(IovaRange::new(start, length), &mut |r| runs.push((r.start.0, r.length))).unwrap();
    runs
}

#[test]
fn mapped_memory_is_read_and_written_in_place() {
    let served = serve();
    let client = served.client();
    let guest = memory(MIB);
    let view = guest.map(0, MIB, Access::ReadWrite).unwrap();
    map(&client, &guest, 0x10_0000, 0, MIB / 2);
    map(&client, &guest, 0x18_0000, MIB / 2, MIB / 2);
    let dma = dma(&served);

    view.write(0x7fff0, b"across the border of two mappings").unwrap();
    let mut back = vec![0; 33];
    dma.read(0x17_fff0, &mut back).unwrap();
    assert_eq!(back, b"across the border of two mappings");
    dma.write(0x17_fffc, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    view.read(0x7fffc, &mut back[..8]).unwrap();
    assert_eq!(back[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
    dma.store_u64(0x10_0008, 77).unwrap();
    assert_eq!((view.load_u64(8), dma.load_u64(0x10_0008)), (Ok(77), Ok(77)));

    // A guard lies within one mapping; the rest is refused with what was wrong.
    let unmapped = |result: Result<_, DmaError>| matches!(result, Err(DmaError::Unmapped { .. }));
    assert!(unmapped(dma.map(0x17_fff0, 33, DmaAccess::READ)));
    assert!(unmapped(dma.map(0x20_0000, 1, DmaAccess::READ)));
    assert!(unmapped(dma.map(u64::MAX, 2, DmaAccess::READ)));
    let guard = dma.map(0x10_0000, 4096, DmaAccess::READ).unwrap();
    assert!(matches!(guard.write(0, &[1]), Err(DmaError::Denied { .. })));
    assert!(guard.read(4095, &mut [0; 2]).is_err());
    assert!(dma.store_u64(0x10_0001, 1).is_err());

    // Mapped for reading only.
    client.dma_map(0x40_0000, 4096, DmaAccess::READ, Some((guest.fd(), 0))).unwrap();
    assert_eq!(dma.write(0x40_0000, &[1]).unwrap_err().errno(), Errno::EACCES);
}

#[test]
fn maps_and_unmaps_are_checked_and_told_to_the_device() {
    let served = serve();
    let client = served.client();
    let guest = memory(MIB);
    map(&client, &guest, 0x1000, 0, 0x2000);
    let errno = |result: Result<(), airlift_core::DeviceError>| result.unwrap_err().errno;
    let rw = DmaAccess::READ | DmaAccess::WRITE;
    assert_eq!(errno(client.dma_map(0x2000, 0x1000, rw, Some((guest.fd(), 0)))), Some(Errno::EEXIST));
    assert_eq!(errno(client.dma_map(0x8000, 2 * MIB, rw, Some((guest.fd(), 0)))), Some(Errno::EINVAL));
    assert_eq!(errno(client.dma_map(0x8000, 0, rw, None)), Some(Errno::EINVAL));
    assert_eq!(errno(client.dma_map(u64::MAX - 1, 4096, rw, None)), Some(Errno::EINVAL));
    assert_eq!(errno(client.dma_unmap(0x1000, 0x1000)), Some(Errno::ENOENT));

    // A device that refuses a mapping does not have it.
    served.control.with(|s| s.fail = Some((Errno::ENOMEM, DeviceState::Running)));
    assert_eq!(errno(client.dma_map(0x8000, 0x1000, rw, None)), Some(Errno::ENOMEM));
    assert_eq!(dma(&served).mappings().len(), 1);

    // Memory that the device holds is not unmapped under it.
    let guard = dma(&served).map(0x1000, 8, DmaAccess::READ).unwrap();
    assert_eq!(errno(client.dma_unmap(0x1000, 0x2000)), Some(Errno::EBUSY));
    drop(guard);
    client.dma_unmap(0x1000, 0x2000).unwrap();
    assert!(dma(&served).read(0x1000, &mut [0]).is_err());
    let log = served.control.log();
    assert_eq!(log[1], "map 0x1000 0x2000");
    assert_eq!(log.last().unwrap(), "unmap 0x1000 0x2000");

    // With the client all of it goes, for old clones too.
    map(&client, &guest, 0, 0, 4096);
    let old = dma(&served);
    old.write(0, &[1]).unwrap();
    drop(client);
    served.control.until("the detachment", |s| s.log.last().is_some_and(|l| l == "detach Closed"));
    let deadline = std::time::Instant::now() + SOON;
    while old.write(0, &[1]).is_ok() && std::time::Instant::now() < deadline {}
    assert!(old.mappings().is_empty());
}

/// Memory of a client that is served by messages.
#[derive(Clone, Default)]
struct Hidden(Arc<Mutex<Vec<u8>>>);

impl DmaHandler for Hidden {
    fn read(&mut self, iova: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova - 0x10_0000).unwrap();
        let memory = self.0.lock().unwrap();
        buf.copy_from_slice(memory.get(at..at + buf.len()).ok_or(Errno::EFAULT)?);
        Ok(())
    }

    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova - 0x10_0000).unwrap();
        let mut memory = self.0.lock().unwrap();
        memory.get_mut(at..at + data.len()).ok_or(Errno::EFAULT)?.copy_from_slice(data);
        Ok(())
    }
}

// VU-MESSAGE-DIRTY
#[test]
fn memory_without_a_descriptor_is_served_by_messages() {
    let served = serve_with(FULL, ServerOptions { max_data_xfer_size: 8192, ..Default::default() });
    let client = served.client();
    let hidden = Hidden(Arc::new(Mutex::new((0..=255).cycle().take(100_000).collect())));
    client.set_dma_handler(Some(Box::new(hidden.clone())));
    client.dma_map(0x10_0000, 100_000, DmaAccess::READ | DmaAccess::WRITE, None).unwrap();
    let mut log = client.dma_write_log(DomainId("messages".into()));
    log.start(&[]).unwrap();

    let dma = dma(&served);
    // The embedder's event loop serves; the device's thread asks.
    let pumping = {
        let client = client.clone();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                client.pump().unwrap();
                std::thread::yield_now();
            }
        });
        (stop, thread)
    };
    let mut all = vec![0; 50_000];
    dma.read(0x10_0003, &mut all).unwrap();
    assert!(all.iter().enumerate().all(|(i, b)| usize::from(*b) == (i + 3) % 256));
    dma.write(0x10_1ffe, &[9; 4]).unwrap();
    dma.store_u64(0x10_8000, 0x55).unwrap();
    assert_eq!(dma.load_u64(0x10_8000), Ok(0x55));
    assert_eq!(hidden.0.lock().unwrap()[0x1ffe..0x2002], [9; 4]);
    // The handler's own error comes through.
    hidden.0.lock().unwrap().truncate(10);
    assert_eq!(dma.read(0x10_4000, &mut [0]), Err(DmaError::Client(Errno::EFAULT)));
    drop(pumping.0);
    pumping.1.join().unwrap();
    assert_eq!(dirty(&mut log, 0x10_0000, 0x20_000), [(0x10_1000, 0x2000), (0x10_8000, 0x1000)]);

    // A call that waits serves as well: this one ends only when the device has got its answer.
    served.control.with(|s| s.hold = true);
    let control = Arc::clone(&served.control);
    let device = std::thread::spawn(move || {
        control.until("the unmapping", |s| s.held.len() == 1);
        let read = dma.read(0x10_0000, &mut [0; 4]);
        control.with(|s| {
            s.hold = false;
            s.held.remove(0).ok();
        });
        read
    });
    client.dma_unmap(0x10_0000, 100_000).unwrap();
    assert_eq!(device.join().unwrap(), Ok(()));
}

#[test]
fn a_message_that_nobody_serves_ends() {
    let options = ServerOptions { message_timeout: Duration::from_millis(50), ..Default::default() };
    let served = serve_with(FULL, options);
    let client = served.client();
    client.dma_map(0, 4096, DmaAccess::READ, None).unwrap();
    let dma = dma(&served);
    // Nobody pumps; then there is no handler; then there is no client.
    assert_eq!(dma.read(0, &mut [0]), Err(DmaError::Client(Errno::ETIMEDOUT)));
    client.info().unwrap();
    let asking = std::thread::spawn(move || {
        let mut last = Ok(());
        let deadline = std::time::Instant::now() + SOON;
        while !matches!(last, Err(DmaError::Unmapped { .. })) && std::time::Instant::now() < deadline {
            last = dma.read(0, &mut [0]);
        }
        last
    });
    client.shutdown();
    assert!(matches!(asking.join().unwrap(), Err(DmaError::Unmapped { .. })));
}

// V2-DIRTY, VU-LOG-RANGES
#[test]
fn the_devices_log_reports_what_it_wrote() {
    for extensions in [true, false] {
        let served = serve_with(FULL, ServerOptions { extensions, ..Default::default() });
        let client = served.client();
        let guest = memory(4 * MIB);
        map(&client, &guest, 0, 0, 2 * MIB);
        map(&client, &guest, 4 * MIB, 2 * MIB, MIB);
        // Mapped, but not named: the BAR of another device.
        map(&client, &guest, 8 * MIB, 3 * MIB, MIB);
        let device = VfioUserDevice::from_client(id(), client.clone()).unwrap();
        let mut source = device.dirty_source().unwrap();
        assert_eq!(source.page_size(), 0);
        assert!(source.report(IovaRange::new(0, 4096), &mut |_| ()).is_err());
        let dma = dma(&served);
        dma.write(0, &[1]).unwrap();
        source.start(&[IovaRange::new(0, 2 * MIB), IovaRange::new(4 * MIB, MIB)]).unwrap();
        assert_eq!(source.page_size(), 4096);
        assert!(dirty(&mut source, 0, 2 * MIB).is_empty(), "what was written before is not in it");

        dma.write(4095, &[1, 2]).unwrap();
        dma.store_u64(4 * MIB + 8192, 1).unwrap();
        dma.write(8 * MIB, &[1]).unwrap();
        let guard = dma.map(MIB, 3 * 4096, DmaAccess::WRITE).unwrap();
        assert_eq!(dirty(&mut source, 0, 2 * MIB), [(0, 8192)]);
        drop(guard);
        assert_eq!(dirty(&mut source, 0, 2 * MIB), [(MIB, 3 * 4096)]);
        assert_eq!(dirty(&mut source, 4 * MIB, MIB), [(4 * MIB + 8192, 4096)]);
        assert!(dirty(&mut source, 0, 16 * MIB).is_empty());

        // A mapping that goes takes no dirty page with it.
        dma.write(5000, &[1]).unwrap();
        client.dma_unmap(0, 2 * MIB).unwrap();
        assert_eq!(dirty(&mut source, 0, 2 * MIB), [(4096, 4096)]);
        let second = device.dirty_source().unwrap().start(&[IovaRange::new(0, 4096)]).unwrap_err();
        assert_eq!(second.errno, Some(Errno::EBUSY));
        source.stop().unwrap();
        source.start(&[IovaRange::new(0, 4096)]).unwrap();
    }
}

// V2-LOGGING
#[test]
fn a_report_may_be_for_a_part_and_at_coarser_pages() {
    use airlift_vfio_user::codec::{FeatureFlags, LoggingControl, LoggingReport, feature, take};
    use zerocopy::IntoBytes;
    let served = serve();
    let client = served.client();
    let guest = memory(MIB);
    map(&client, &guest, 0, 0, MIB);
    let start = LoggingControl { page_size: 65536, num_ranges: 0, reserved: 0 };
    let reply =
        client.device_feature(feature::DMA_LOGGING_START, FeatureFlags::SET, start.as_bytes(), 0).unwrap();
    assert_eq!(take::<LoggingControl>(&reply).unwrap().0.page_size, 65536);
    // No ranges: what is mapped later is logged too.
    map(&client, &guest, 16 * MIB, 0, MIB);
    let report = |iova, length, page_size, room| {
        let asked = LoggingReport { iova, length, page_size };
        client.device_feature(feature::DMA_LOGGING_REPORT, FeatureFlags::GET, asked.as_bytes(), room)
    };
    let dma = dma(&served);
    dma.write(16 * MIB + 3 * 65536, &[1]).unwrap();
    dma.write(5 * 65536, &[1]).unwrap();
    // A report without room for its bitmap clears nothing.
    assert_eq!(report(0, MIB, 65536, 24).unwrap_err().errno, Some(Errno::EINVAL));
    let bits = |reply: Vec<u8>| u64::from_le_bytes(reply[24..32].try_into().unwrap());
    assert_eq!(bits(report(0, MIB, 131072, 32).unwrap()), 1 << 2);
    assert_eq!(bits(report(16 * MIB + 2 * 65536, 2 * 65536, 65536, 32).unwrap()), 1 << 1);
    assert_eq!(report(0, MIB, 4096, 64).unwrap_err().errno, Some(Errno::EINVAL));
    assert_eq!(report(0, u64::MAX, 65536, 32).unwrap_err().errno, Some(Errno::EINVAL));
}

// VU-GUARD
#[test]
fn a_device_does_not_stop_while_it_holds_memory_for_writing() {
    use DeviceState::{PreCopy, Running, Stop, StopCopy};
    for flags in [MigrationFlags::all(), MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY] {
        let served = serve_with(flags, ServerOptions::default());
        let client = served.client();
        let guest = memory(MIB);
        map(&client, &guest, 0, 0, MIB);
        let mut device = VfioUserDevice::from_client(id(), client.clone()).unwrap();
        for (from, to) in [(Running, Stop), (Running, StopCopy), (PreCopy, StopCopy)] {
            device.set_state(from).unwrap();
            let reading = dma(&served).map(0, 8, DmaAccess::READ).unwrap();
            let writing = dma(&served).map(4096, 8, DmaAccess::WRITE).unwrap();
            let error = device.set_state(to).unwrap_err();
            assert_eq!(error.error.errno, Some(Errno::EBUSY));
            // Nor does it go on from there, until the guard is gone.
            let reached = error.reached.unwrap();
            assert!(!reached.is_live());
            if reached == Stop {
                assert_eq!(device.set_state(StopCopy).unwrap_err().error.errno, Some(Errno::EBUSY));
            }
            drop(writing);
            device.set_state(StopCopy).unwrap();
            device.set_state(Running).unwrap();
            drop(reading);
        }
    }
}

//! What a client asks of a device that is not migration: description, regions, interrupts, clients
//! that come and go.

use crate::common::*;
use airlift_core::{
    DeviceErrorKind, DeviceState, Errno, InvalidCapabilities, MigrationDevice, MigrationFlags,
};
use airlift_vfio_user::codec::{DeviceInfoFlags, IrqInfoFlags, RegionInfoFlags};
use airlift_vfio_user::{Client, DescriptionError, RegionAreas, ServerOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

fn eventfd() -> OwnedFd {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn count(fd: &OwnedFd) -> u64 {
    let mut value = [0; 8];
    if rustix::io::read(fd, &mut value).is_ok() { u64::from_ne_bytes(value) } else { 0 }
}

#[test]
fn the_description_comes_out_as_the_author_wrote_it() {
    let memfd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, 4096 + (1 << 20)).unwrap();
    rustix::io::pwrite(&memfd, b"bar", 4096).unwrap();
    let areas = RegionAreas::Sparse(vec![(0, 4096), (8192, 4096)]);
    let mapping = Some((Arc::new(memfd), areas));
    let device = TestDevice { control: control(), flags: FULL, mapping };
    let served = serve_device(device, ServerOptions::default());
    let client = served.client();

    let info = client.info().unwrap();
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    assert_eq!(info.flags, (DeviceInfoFlags::RESET | DeviceInfoFlags::PCI).bits());

    // The list of areas needs a second request with more room; the descriptor comes with it.
    let bar = client.region_info(2).unwrap();
    assert_eq!((bar.size, bar.offset), (1 << 20, 4096));
    assert_eq!(bar.areas, [(0, 4096), (8192, 4096)]);
    let mut bytes = [0; 3];
    rustix::io::pread(bar.fd.unwrap(), &mut bytes, bar.offset).unwrap();
    assert_eq!(&bytes, b"bar");

    let plain = client.region_info(0).unwrap();
    assert_eq!(plain.flags, RegionInfoFlags::READ | RegionInfoFlags::WRITE);
    assert!(plain.fd.is_none());
    assert_eq!(client.region_info(1).unwrap().size, 0);
    assert_eq!(client.region_info(9).unwrap_err().errno, Some(Errno::EINVAL));

    let irq = client.irq_info(0).unwrap();
    assert_eq!((irq.count, irq.flags), (1, (IrqInfoFlags::EVENTFD | IrqInfoFlags::MASKABLE).bits()));
    assert_eq!(client.irq_info(2).unwrap().count, 40);
    assert_eq!(client.irq_info(1).unwrap().count, 0);

    let mut config = [0; 64];
    client.region_read(7, 0, &mut config).unwrap();
    assert_eq!(config[..4], [0xf4, 0x1a, 0xff, 0x10]);
    assert_eq!(config[8..12], [3, 0x00, 0x80, 0x02]);
    assert_eq!(config[0x2c..0x30], [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(client.region_write(7, 4, &[1]).unwrap_err().errno, Some(Errno::EACCES));
}

#[test]
fn regions_are_accessed_within_their_bounds_only() {
    let options = ServerOptions { max_data_xfer_size: 8192, ..Default::default() };
    let served = serve_with(FULL, options);
    let client = served.client();
    client.region_write(0, 16, b"hello").unwrap();
    let mut back = [0; 5];
    client.region_read(0, 16, &mut back).unwrap();
    assert_eq!(&back, b"hello");

    // More than a message holds is split, and put together again.
    let mut big = vec![0; 20_000];
    client.region_read(2, 100, &mut big).unwrap();
    assert!(big.iter().enumerate().all(|(i, b)| usize::from(*b) == (100 + i) % 251));
    client.region_write(2, 0, &big).unwrap();
    let writes: Vec<_> = served.control.log().into_iter().filter(|l| l.starts_with("write")).collect();
    assert_eq!(writes, ["write 0 8192", "write 8192 8192", "write 16384 3616"]);

    for (region, offset, length) in [(0, 4095, 2), (0, u64::MAX, 1), (1, 0, 1), (77, 0, 1)] {
        let error = client.region_read(region, offset, &mut vec![0; length]).unwrap_err();
        assert_eq!(error.errno, Some(Errno::EINVAL), "region {region} at {offset}");
    }
    assert_eq!(client.region_write(6, 0, &[0]).unwrap_err().errno, Some(Errno::EACCES));
    // The device's own error comes through.
    assert_eq!(client.region_read(6, 0, &mut [0]).unwrap_err().errno, Some(Errno::EIO));
}

#[test]
fn interrupts_reach_the_eventfd_they_are_wired_to() {
    let served = serve();
    let client = served.client();
    let fds: Vec<_> = (0..40).map(|_| eventfd()).collect();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    // More than one message takes.
    client.set_irqs(2, 0, &borrowed).unwrap();
    let irqs = served.control.with(|s| s.attachment.as_ref().unwrap().irqs.clone());
    assert_eq!(irqs.trigger(2, 39), Ok(true));
    assert_eq!(irqs.trigger(2, 39), Ok(true));
    assert_eq!((count(&fds[39]), count(&fds[38])), (2, 0));
    client.trigger_irqs(2, 3, 2).unwrap();
    assert_eq!((count(&fds[3]), count(&fds[4]), count(&fds[5])), (1, 1, 0));
    assert_eq!(irqs.trigger(2, 40), Err(Errno::ENOENT));

    client.unset_irqs(2, 39, 1).unwrap();
    assert_eq!(irqs.trigger(2, 39), Ok(false));
    client.disable_irqs(2).unwrap();
    assert_eq!(irqs.trigger(2, 0), Ok(false));

    // An interrupt that is raised while it is masked comes once, at the unmasking.
    let intx = eventfd();
    client.set_irqs(0, 0, &[intx.as_fd()]).unwrap();
    client.mask_irqs(0, 0, 1, true).unwrap();
    assert_eq!(irqs.trigger(0, 0), Ok(false));
    assert_eq!(irqs.trigger(0, 0), Ok(false));
    assert_eq!(count(&intx), 0);
    client.mask_irqs(0, 0, 1, false).unwrap();
    assert_eq!(count(&intx), 1);
    assert_eq!(client.mask_irqs(2, 0, 1, true).unwrap_err().errno, Some(Errno::EINVAL));
    assert_eq!(client.set_irqs(2, 39, &borrowed[..2]).unwrap_err().errno, Some(Errno::EINVAL));
}

// V2-CAPABILITIES
#[test]
fn flags_that_mean_nothing_are_told_to_whoever_serves_them() {
    for flags in [MigrationFlags::PRE_COPY, MigrationFlags::P2P] {
        let error = refused(flags, None, &ServerOptions::default());
        assert_eq!(cause(&error), &DescriptionError::Flags(InvalidCapabilities(flags.bits())));
        assert!(error.to_string().contains("STOP_COPY must be set"), "{error}");
    }
}

// VU-ONE-CLIENT
#[test]
fn a_second_client_is_refused_and_the_first_notices_nothing() {
    let served = serve();
    let first = served.client();
    first.region_write(0, 0, &[7]).unwrap();
    let error = Client::connect(&served.path, options()).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Lost);
    let mut byte = [0];
    first.region_read(0, 0, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert_eq!(served.control.log(), ["attach RUNNING"]);
    // The next one after it is served at once, also when the end is still being worked off.
    drop(first);
    let next = served.client();
    next.region_read(0, 0, &mut byte).unwrap();
    assert_eq!(served.control.log(), ["attach RUNNING", "detach Closed", "attach RUNNING"]);
}

#[test]
fn stopping_ends_the_client_and_tells_the_device() {
    let mut served = serve();
    let mut device = served.device();
    drop(device.set_state(DeviceState::PreCopy).unwrap());
    served.stop();
    let log = served.control.log();
    assert_eq!(log[log.len() - 3..], ["saver gone", "PRE_COPY -> RUNNING", "detach Shutdown"]);
    assert_eq!(device.state().unwrap_err().kind, DeviceErrorKind::Lost);
}

// VU-VERSION
#[test]
fn the_answer_to_version_is_no_longer_than_the_question() {
    let served = serve();
    let ask = |json: &str, minor: u16| {
        let mut stream = served.raw();
        let mut payload = vec![0, 0];
        payload.extend(minor.to_ne_bytes());
        payload.extend(json.as_bytes());
        if !json.is_empty() {
            payload.push(0);
        }
        let mut message = vec![9, 0, 1, 0];
        message.extend((16 + u32::try_from(payload.len()).unwrap()).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(&payload);
        stream.write_all(&message).unwrap();
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let size = u32::from_ne_bytes(head[4..8].try_into().unwrap());
        let mut reply = vec![0; usize::try_from(size).unwrap() - 16];
        stream.read_exact(&mut reply).unwrap();
        assert!(reply.len() <= payload.len(), "{} after {}", reply.len(), payload.len());
        drop(stream);
        served.control.until("the end", |s| s.log.last().is_some_and(|l| l.starts_with("detach")));
        reply
    };
    let long = ask(
        r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}"#,
        0,
    );
    assert_eq!(long[..4], [0, 0, 0, 0]);
    assert!(long.ends_with(b"}\0") && long.windows(9).any(|w| w == b"migration"));
    let sample = ask(r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1024}}"#, 2);
    assert_eq!(sample[..4], [0, 0, 2, 0]);
    assert_eq!(ask("", 7), [0, 0, 2, 0]);
}

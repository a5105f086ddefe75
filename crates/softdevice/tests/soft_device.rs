//! SoftDevice over a socket, as the engine sees it: what moves, what stops when, and what arrives.

mod common;

use airlift_core::{DeviceState as S, DirtySource, IovaRange, MigrationDevice};
use airlift_softdevice::registers as reg;
use airlift_softdevice::{SoftDevice, SoftDeviceOptions, SoftEvent};
use airlift_vfio_user::{Client, ClientOptions, DmaAccess, Server, ServerOptions, VfioUserDevice};
use common::{Host, IOVA, MEMORY, Ring, drain, small, until};
use std::collections::BTreeSet;
use std::os::unix::net::UnixListener;

/// Guest memory as the engine would have moved it.
fn move_memory(from: &Host, to: &Host) {
    from.guest.copy_to(0, &to.guest, 0, MEMORY).expect("guest memory");
}

#[test]
fn a_busy_device_moves_and_goes_on_where_it_was() {
    let busy = |seed| SoftDeviceOptions { dirty_rate: 8 << 20, interrupt_every: 16, ..small(seed) };
    let (mut source, mut target) = (Host::new(busy(1)), Host::new(busy(2)));
    source.wire();
    target.wire();
    let mut ring = Ring::new(&source.guest, 0, 500);
    source.start_ring(0, IOVA, 500, 20_000, reg::KIND_MEMORY);
    until("entries", || ring.take(u64::MAX) > 0 && ring.taken > 1000);

    let mut session = source.save_session(S::PreCopy);
    let first = session.precopy_info().unwrap().unwrap();
    assert!(first.initial_bytes > 4 << 20, "{first:?}");
    let mut stream = Vec::new();
    let tick = source.get(reg::TICK);
    until("rounds of deltas", || {
        stream.extend(drain(&mut *session, false));
        ring.take(u64::MAX);
        source.get(reg::TICK) > tick + 2000
    });
    assert_eq!(session.precopy_info().unwrap().unwrap().initial_bytes, 0);
    assert!(stream.len() > 5 << 20, "deltas came on top of the initial data: {}", stream.len());

    assert!(source.go(S::PreCopyP2p).is_none());
    assert!(source.go(S::StopCopy).is_none(), "STOP_COPY keeps the session");
    let digest = source.monitor.digest();
    let last = drain(&mut *session, true);
    assert!(last.len() < 4 << 20, "pre-copy left {} bytes", last.len());
    stream.extend(last);

    target.load(&stream);
    assert_eq!(target.get(reg::DIGEST), digest);
    assert_eq!(target.get(reg::SEED), 1);
    move_memory(&source, &target);
    let before = target.get(reg::TICK);
    target.go(S::RunningP2p);
    target.go(S::Running);
    let mut ring = Ring { memory: target.guest.clone(), ..ring };
    let moved = ring.taken;
    until("the sequence to go on", || {
        ring.take(u64::MAX);
        ring.taken > moved + 1000 && target.get(reg::TICK) > before + 100
    });
    assert!(target.verified(), "the whole content, though it changes again");

    target.go(S::RunningP2p);
    let raised = target.get(reg::RAISED_BASE);
    assert!(raised >= ring.taken / 16);
    assert_eq!(source.interrupts(0) + target.interrupts(0), raised, "each interrupt arrived once");
    assert_eq!(target.get(reg::PENDING_BASE), 0);
}

#[test]
fn sizes_that_are_announced_are_those_that_come() {
    let mut host = Host::new(SoftDeviceOptions { dirty_rate: 4 << 20, ..small(1) });
    let mut session = host.save_session(S::PreCopy);
    let initial = session.precopy_info().unwrap().unwrap();
    assert_eq!(initial.dirty_bytes, 0);
    assert_eq!(drain(&mut *session, false).len() as u64, initial.initial_bytes);
    let nothing = session.precopy_info().unwrap().unwrap();
    assert_eq!((nothing.initial_bytes, nothing.dirty_bytes), (0, 0));

    host.set(reg::CONTROL, reg::CONTROL_RUN);
    until("dirtied pages", || host.get(reg::TICK) > 50);
    host.set(reg::CONTROL, 0);
    // The dirtier may be inside a batch when it is switched off: parked it is not.
    host.go(S::PreCopyP2p);
    host.go(S::StopCopy);
    let ticks = host.get(reg::TICK);
    let size = host.device.stop_copy_size().unwrap().unwrap();
    let last = drain(&mut *session, true).len() as u64;
    assert_eq!(last, size);
    // The pages that were rewritten, a head for each run of them, and what is always last.
    let always = 64 * 1024 + 16 + 544 + 16 + 32 + 16;
    assert!(last >= ticks * 4096 + always, "{last} bytes for {ticks} pages");
    assert!(last <= ticks * (4096 + 16) + always, "{last} bytes for {ticks} pages");
}

#[test]
fn without_pre_copy_everything_comes_at_the_stop() {
    let plain = |seed| SoftDeviceOptions { precopy: false, ..small(seed) };
    let (mut source, mut target) = (Host::new(plain(1)), Host::new(plain(2)));
    assert!(!source.device.capabilities().precopy());
    assert!(source.device.set_state(S::PreCopy).is_err());
    let mut session = source.save_session(S::StopCopy);
    let stream = drain(&mut *session, true);
    assert!(stream.len() > 4 << 20);
    target.load(&stream);
    assert_eq!(target.monitor.digest(), source.monitor.digest());
    assert!(target.verified());
}

// V2-P2P, V2-STOPPED
#[test]
fn p2p_parks_dma_and_stop_parks_everything() {
    let mut host = Host::new(SoftDeviceOptions { dirty_rate: 4 << 20, interrupt_every: 1, ..small(1) });
    let mut ring = Ring::new(&host.guest, 0, 100);
    host.start_ring(0, IOVA, 100, 5000, reg::KIND_MEMORY);
    until("entries", || ring.take(u64::MAX) > 0);

    host.go(S::RunningP2p);
    ring.take(u64::MAX);
    let (produced, tick) = (host.produced(0), host.get(reg::TICK));
    assert_eq!(produced, ring.taken, "all that was counted is in memory");
    until("the dirtier", || host.get(reg::TICK) > tick + 200);
    assert_eq!((host.produced(0), ring.take(u64::MAX)), (produced, 0));

    host.go(S::Stop);
    let stopped = host.event(|event| match event {
        SoftEvent::Stopped { digest, tick, .. } => Some((digest, tick)),
        _ => None,
    });
    for _ in 0..500 {
        assert_eq!((host.get(reg::DIGEST), host.get(reg::TICK)), stopped);
    }

    host.go(S::Running);
    until("entries again", || ring.take(u64::MAX) > 0);
}

#[test]
fn a_device_without_p2p_parks_at_the_stop() {
    let mut host = Host::new(SoftDeviceOptions { p2p: false, ..small(1) });
    assert!(!host.device.capabilities().p2p());
    let mut ring = Ring::new(&host.guest, 0, 100);
    host.start_ring(3, IOVA, 100, 5000, reg::KIND_MEMORY);
    until("entries", || ring.take(u64::MAX) > 0);
    host.go(S::Stop);
    ring.take(u64::MAX);
    assert_eq!(host.produced(3), ring.taken);
    for _ in 0..200 {
        assert_eq!(host.produced(3), ring.taken);
    }
    host.go(S::Running);
    until("entries again", || ring.take(u64::MAX) > 0);
}

#[test]
fn a_full_ring_waits_for_its_consumer() {
    let host = Host::new(small(1));
    let mut ring = Ring::new(&host.guest, 8192, 32);
    host.start_ring(0, IOVA + 8192, 32, 100_000, reg::KIND_MEMORY);
    until("a full ring", || host.produced(0) == 32);
    assert_eq!(ring.take(10), 10);
    until("ten more", || host.produced(0) == 42);
    assert_eq!(ring.take(u64::MAX), 32);
    until("a full ring", || host.produced(0) == 74);
}

#[test]
fn the_pages_of_the_entries_are_logged_and_no_others() {
    let host = Host::new(small(1));
    // From the last slots of one page into the next one, and round again.
    host.guest.store_u64(0, 0).unwrap();
    let mut source = host.device.dirty_source().expect("a device that logs");
    let all = IovaRange::new(IOVA, MEMORY);
    source.start(&[all]).unwrap();
    host.start_ring(0, IOVA, 520, 100_000, reg::KIND_MEMORY);
    until("a full ring", || host.produced(0) == 520);
    let mut pages = BTreeSet::new();
    source
        .report(all, &mut |range| pages.extend((range.start.0..range.end().unwrap()).step_by(4096)))
        .unwrap();
    let expected = BTreeSet::from([IOVA + 4096, IOVA + 8192]);
    assert_eq!(pages, expected);
    let mut again = 0;
    source.report(all, &mut |range| again += range.length).unwrap();
    assert_eq!(again, 0, "a report clears");

    let host = Host::new(SoftDeviceOptions { dma_logging: false, ..small(1) });
    assert!(host.device.dirty_source().is_none());
}

/// SD-BAR2-AT-STOP
#[test]
fn what_is_written_to_bar2_after_the_stop_is_lost() {
    let (mut source, mut target) = (Host::new(small(1)), Host::new(small(2)));
    let bar2 = source.bar2();
    bar2.write(100, b"early").unwrap();
    let mut session = source.save_session(S::StopCopy);
    bar2.write(200, b"late").unwrap();
    target.load(&drain(&mut *session, true));
    let mut arrived = [0; 104];
    target.bar2().read(100, &mut arrived).unwrap();
    assert_eq!(&arrived[..5], b"early");
    assert_eq!(arrived[100..], [0; 4]);
}

#[test]
fn a_peer_that_is_not_quiesced_loses_writes_and_one_that_is_loses_none() {
    for quiesce in [false, true] {
        let (mut a, mut b, mut target) = (Host::new(small(1)), Host::new(small(2)), Host::new(small(3)));
        let region = b.client.region_info(2).unwrap();
        let file = region.fd.expect("a file behind BAR2");
        let peer = IOVA + (1 << 32);
        let access = DmaAccess::READ | DmaAccess::WRITE;
        a.client.dma_map(peer, region.size, access, Some((std::os::fd::AsFd::as_fd(&file), 0))).unwrap();
        let mut ring = Ring::new(&b.bar2(), 0, 7000);
        a.start_ring(0, peer, 7000, 10_000, reg::KIND_PEER);
        until("entries in the peer", || ring.take(u64::MAX) > 0);

        let mut session = if quiesce {
            a.go(S::RunningP2p);
            b.save_session(S::StopCopy)
        } else {
            let session = b.save_session(S::StopCopy);
            let stopped = a.produced(0);
            until("a write after the stop", || a.produced(0) > stopped);
            session
        };
        a.go(S::Stop);
        target.load(&drain(&mut *session, true));
        let mut ring = Ring { memory: target.bar2(), ..ring };
        ring.take(u64::MAX);
        let lost = a.produced(0) - ring.taken;
        assert_eq!(lost == 0, quiesce, "{lost} entries lost");
    }
}

#[test]
fn a_device_that_is_held_writes_on_until_it_is_parked() {
    let held = std::time::Duration::from_millis(500);
    let mut host = Host::new(SoftDeviceOptions { stop_delay: held, ..small(1) });
    let mut ring = Ring::new(&host.guest, 0, 100);
    host.start_ring(0, IOVA, 100, 10_000, reg::KIND_MEMORY);
    until("entries", || ring.take(u64::MAX) > 0);
    let device = &mut host.device;
    let end = std::thread::scope(|scope| {
        let moving = scope.spawn(move || device.set_state(S::RunningP2p).map(drop));
        let (before, mut seen) = (ring.taken, 0);
        while !moving.is_finished() {
            ring.take(u64::MAX);
            seen = ring.taken - before;
        }
        moving.join().unwrap().unwrap();
        seen
    });
    assert!(end > 0, "nothing was written while the arc was held");
    ring.take(u64::MAX);
    assert_eq!(host.produced(0), ring.taken);
}

#[test]
fn an_interrupt_inside_the_last_arc_arrives_once() {
    let mut host = Host::new(SoftDeviceOptions { interrupt_in_last_arc: true, ..small(1) });
    host.wire();
    host.go(S::RunningP2p);
    assert_eq!(host.interrupts(0), 0);
    host.go(S::Stop);
    assert_eq!(host.interrupts(0), 1);
    assert_eq!(host.get(reg::RAISED), 1);
    host.go(S::StopCopy);
    host.go(S::Stop);
    assert_eq!((host.interrupts(0), host.get(reg::RAISED)), (0, 1));
}

#[test]
fn an_interrupt_that_nobody_takes_waits_also_across_a_migration() {
    let late = SoftDeviceOptions { interrupt_in_last_arc: true, ..small(1) };
    let (mut source, mut target) = (Host::new(late), Host::new(small(2)));
    let mut session = source.save_session(S::StopCopy);
    assert_eq!(source.get(reg::PENDING_BASE), 1);
    target.load(&drain(&mut *session, true));
    assert_eq!(target.get(reg::PENDING_BASE), 1);
    target.wire();
    target.go(S::Running);
    until("the interrupt", || target.get(reg::PENDING_BASE) == 0);
    assert_eq!((target.interrupts(0), target.get(reg::RAISED)), (1, 1));
}

/// SD-VALIDATE
#[test]
fn a_byte_that_changed_on_the_way_is_refused_or_found() {
    let mut source = Host::new(small(1));
    let mut stream = drain(&mut *source.save_session(S::StopCopy), true);
    let middle = stream.len() / 2;
    stream[middle] ^= 1;

    let mut strict = Host::new(small(2));
    let mut session = strict.load_session();
    session.write(&stream).unwrap();
    drop(session);
    let error = strict.device.set_state(S::Stop).unwrap_err();
    assert_eq!(error.reached, Ok(S::Resuming), "{error}");
    strict.device.reset().unwrap();
    assert_eq!(strict.device.state().unwrap(), S::Running);

    let mut lax = Host::new(SoftDeviceOptions { validate: false, ..small(2) });
    lax.load(&stream);
    lax.go(S::Running);
    assert!(!lax.verified());
    assert_eq!(lax.get(reg::VERIFIED), reg::VERIFIED_NO);
}

#[test]
fn a_wrong_page_is_found_also_when_the_device_overwrites_it_at_once() {
    let mut source = Host::new(small(1));
    let mut stream = drain(&mut *source.save_session(S::StopCopy), true);
    // A byte in every page, whichever is rewritten first; heads, which come every 64 pages, stay.
    for at in (32 + 16 + 400..stream.len() - (66 << 10)).step_by(4096) {
        stream[at] ^= 1;
    }
    let options = SoftDeviceOptions { validate: false, dirty_rate: 1 << 30, ..small(2) };
    let mut target = Host::new(options);
    target.load(&stream);
    target.set(reg::CONTROL, reg::CONTROL_RUN);
    target.go(S::Running);
    assert!(!target.verified());
}

#[test]
fn a_reset_makes_the_device_as_it_was() {
    let mut host = Host::new(SoftDeviceOptions { dirty_rate: 8 << 20, ..small(1) });
    let fresh = host.get(reg::DIGEST);
    let mut ring = Ring::new(&host.guest, 0, 100);
    host.start_ring(0, IOVA, 100, 5000, reg::KIND_MEMORY);
    until("work", || ring.take(u64::MAX) > 0 && host.get(reg::TICK) > 50);
    host.bar2().write(0, b"x").unwrap();
    let _session = host.save_session(S::PreCopy);
    host.device.reset().unwrap();
    assert_eq!(host.device.state().unwrap(), S::Running);
    assert_eq!((host.get(reg::DIGEST), host.get(reg::TICK), host.produced(0)), (fresh, 0, 0));
}

#[test]
fn memory_can_be_taken_away_and_given_back_under_a_running_ring() {
    let host = Host::new(small(1));
    let mut ring = Ring::new(&host.guest, 0, 1000);
    host.start_ring(0, IOVA, 1000, 100_000, reg::KIND_MEMORY);
    for _ in 0..20 {
        until("entries", || ring.take(u64::MAX) > 0);
        host.client.dma_unmap(IOVA, MEMORY).expect("the device lets go");
        let produced = host.produced(0);
        ring.take(u64::MAX);
        assert_eq!(ring.taken, produced);
        host.map_guest();
    }
    until("entries", || ring.take(u64::MAX) > 0);
}

#[test]
fn a_client_that_goes_leaves_a_device_that_the_next_one_finds_running() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("soft.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let device = SoftDevice::new(SoftDeviceOptions { dirty_rate: 4 << 20, ..small(1) }, drop).unwrap();
    let monitor = device.monitor();
    let server = Server::new(Box::new(device), ServerOptions::default());
    let handle = server.handle();
    let serving = std::thread::spawn(move || server.serve(listener).map(drop));
    let connect = || {
        let client = Client::connect(&path, ClientOptions::default());
        let client =
            client.and_then(|c| VfioUserDevice::from_client("soft".to_owned().try_into().unwrap(), c));
        client.ok()
    };
    let set = |device: &VfioUserDevice, register: u64| {
        device.client().region_write(0, register, &1_u64.to_le_bytes()).unwrap();
    };
    let mut first = connect().expect("a client");
    set(&first, reg::CONTROL);
    until("ticks", || monitor.tick() > 10);
    let session = first.set_state(S::PreCopy).unwrap();
    assert!(session.is_some());
    first.client().shutdown();
    drop((session, first));
    let mut second = None;
    until("the next client", || {
        second = connect();
        second.is_some()
    });
    let second = second.unwrap();
    assert_eq!(second.found_state(), S::Running);
    let tick = monitor.tick();
    until("the device to go on", || monitor.tick() > tick);
    set(&second, reg::VERIFIED);
    until("the comparison", || monitor.verified() == reg::VERIFIED_YES);
    handle.stop();
    serving.join().unwrap().unwrap();
}

//! SimVm without devices: it runs, it is migrated by hand through [`Machine`], and it notices.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use airlift::machine::{Machine, MachineMemory, MachineRecord, RecordOwner};
use airlift::vmm::{RemoteVmm, VmmTimeouts, serve};
use airlift_core::{Errno, GpaRange};
use airlift_memory::GuestMemory;
use airlift_softdevice::simvm::{Sabotage, SimMonitor, SimVm, SimVmConfig};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

fn config(incoming: bool) -> SimVmConfig {
    SimVmConfig { memory: 8 << 20, write_rate: 64 << 20, seed: 42, incoming, ..SimVmConfig::default() }
}

/// Waits until the vCPUs have made this many steps more.
fn run_for(monitor: &SimMonitor, steps: u64) {
    let sum = || monitor.report().vcpu_steps.iter().sum::<u64>();
    let (start, until) = (sum(), Instant::now() + LONG);
    while sum() < start + steps {
        assert!(Instant::now() < until, "the vCPUs do not run");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn engine_memory(vm: &mut dyn Machine) -> GuestMemory {
    let MachineMemory::Engine(memory) = vm.memory().unwrap() else { panic!("not external") };
    memory
}

fn copy(from: &GuestMemory, to: &GuestMemory, range: GpaRange) {
    let mut bytes = vec![0; usize::try_from(range.length).unwrap()];
    from.read(range.start.0, &mut bytes).unwrap();
    to.write(range.start.0, &bytes).unwrap();
}

/// Migrates by the rules: tracking before the first copy, records before the last sync.
fn migrate(source: &mut dyn Machine, watch: &SimMonitor, destination: &mut dyn Machine) {
    let (from, to) = (engine_memory(source), engine_memory(destination));
    assert_eq!(source.memory_layout().unwrap(), destination.memory_layout().unwrap());
    source.start_dirty().unwrap();
    for region in source.memory_layout().unwrap().regions {
        copy(&from, &to, GpaRange { start: region.gpa, length: region.size });
    }
    run_for(watch, 500);
    source.sync_dirty(&mut |range| copy(&from, &to, range)).unwrap();
    run_for(watch, 100);
    source.pause().unwrap();
    source.close_device_access().unwrap();
    assert!(source.drain_interrupts().unwrap().is_empty());
    let records = source.save_records().unwrap();
    source.sync_dirty(&mut |range| copy(&from, &to, range)).unwrap();
    source.stop_dirty().unwrap();
    for record in &records {
        destination.load_record(record).unwrap();
    }
    source.release_shared().unwrap();
    destination.reclaim_shared().unwrap();
    destination.open_device_access().unwrap();
    destination.resume().unwrap();
}

fn moved(source: &mut SimVm, destination: &mut SimVm) {
    let watch = source.monitor();
    migrate(source, &watch, destination);
}

fn pair() -> (SimVm, SimVm) {
    let mut source = SimVm::new(config(false)).unwrap();
    source.resume().unwrap();
    run_for(&source.monitor(), 3000);
    (source, SimVm::new(config(true)).unwrap())
}

#[test]
fn a_guest_that_was_moved_whole_is_clean_and_never_ran_twice() {
    let (mut source, mut destination) = pair();
    moved(&mut source, &mut destination);
    let monitor = destination.monitor();
    run_for(&monitor, 2000);
    let report = monitor.check(Instant::now() + LONG);
    assert!(report.is_clean() && report.running, "{report:?}");
    assert_eq!((report.memory_verified, report.memory_bad_pages), (Some(true), 0));

    let before = source.monitor().report();
    assert!(!before.running);
    assert!(source.resume().is_err(), "what both sides share is gone");
    assert!(report.vcpu_steps.iter().zip(&before.vcpu_steps).all(|(now, then)| now > then));
    let [ended] = before.run_intervals[..] else { panic!("{before:?}") };
    let [begun] = report.run_intervals[..] else { panic!("{report:?}") };
    assert!(ended.end_ns.unwrap() <= begun.start_ns && begun.end_ns.is_none());
    assert!(before.last_write_ns.unwrap() <= ended.end_ns.unwrap());
    assert!(report.first_write_ns.unwrap() >= begun.start_ns);
}

#[test]
fn two_machines_behind_sockets_are_moved_alike() {
    let (source, destination) = pair();
    let (watch, monitor) = (source.monitor(), destination.monitor());
    let remote = |mut vm: SimVm| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || (serve(&mut vm, theirs, "simvm"), vm));
        (RemoteVmm::greet(ours, "test", VmmTimeouts::default()).unwrap(), thread)
    };
    let ((mut source, here), (mut destination, there)) = (remote(source), remote(destination));
    migrate(&mut source, &watch, &mut destination);
    run_for(&monitor, 1000);
    assert!(destination.running().unwrap() && !source.running().unwrap());
    source.migration_ended("completed").unwrap();
    drop((source, destination));
    let (_, _source) = here.join().unwrap();
    let (_, _destination) = there.join().unwrap();
    let report = monitor.check(Instant::now() + LONG);
    assert!(report.is_clean() && report.running, "the guest outlives the migration process: {report:?}");
    assert_eq!(watch.report().last_outcome.as_deref(), Some("completed"));
}

#[test]
fn a_page_that_was_not_reported_as_dirty_is_seen() {
    let (mut source, _) = pair();
    // Its vCPUs write nothing, or they would come to the page again and mend it.
    let mut destination = SimVm::new(SimVmConfig { write_rate: 0, ..config(true) }).unwrap();
    source.monitor().sabotage(Sabotage::LoseDirtyPage).unwrap();
    moved(&mut source, &mut destination);
    let report = destination.monitor().check(Instant::now() + LONG);
    assert_eq!((report.memory_verified, report.memory_bad_pages), (Some(false), 1));
    assert!(!report.is_clean());
}

#[test]
fn a_write_of_a_record_that_was_lost_is_a_gap() {
    let (mut source, mut destination) = pair();
    moved(&mut source, &mut destination);
    assert_eq!(destination.monitor().report().record_mismatches, 0);

    let (mut source, mut destination) = pair();
    source.monitor().sabotage(Sabotage::LosePvclockPage).unwrap();
    moved(&mut source, &mut destination);
    let report = destination.monitor().report();
    assert_eq!((report.record_mismatches, report.sequence_gaps), (1, 1));
}

#[test]
fn a_byte_that_was_changed_is_seen() {
    let (source, _) = pair();
    let monitor = source.monitor();
    assert!(monitor.verify_memory().unwrap());
    monitor.sabotage(Sabotage::FlipMemoryByte).unwrap();
    assert!(!monitor.verify_memory().unwrap());
    assert_eq!(monitor.report().memory_verified, None, "a report compares nothing");
    assert_eq!(monitor.check(Instant::now() + LONG).memory_bad_pages, 1);
}

#[test]
fn a_rollback_leaves_a_clean_guest_that_can_be_moved_again() {
    let (mut source, _) = pair();
    source.start_dirty().unwrap();
    source.pause().unwrap();
    source.close_device_access().unwrap();
    source.save_records().unwrap();
    source.release_shared().unwrap();
    source.reclaim_shared().unwrap();
    source.open_device_access().unwrap();
    source.resume().unwrap();
    source.stop_dirty().unwrap();
    assert!(source.running().unwrap());
    let mut destination = SimVm::new(config(true)).unwrap();
    moved(&mut source, &mut destination);
    let report = destination.monitor().check(Instant::now() + LONG);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(source.monitor().report().run_intervals.len(), 2);
}

#[test]
fn calls_in_the_wrong_order_are_refused() {
    let (mut source, mut destination) = pair();
    assert_eq!(source.save_records().unwrap_err().errno, Some(Errno::EBUSY), "the vCPUs run");
    assert!(source.close_device_access().is_err());
    assert!(source.release_shared().is_err());
    assert!(source.sync_dirty(&mut |_| ()).is_err(), "tracking is off");
    assert!(destination.resume().is_err(), "no guest was loaded");
    source.pause().unwrap();
    source.close_device_access().unwrap();
    assert!(source.resume().is_err(), "access is closed");
    let records = source.save_records().unwrap();
    assert!(source.load_record(&records[0]).is_err(), "it has a guest");
    let mut other = SimVm::new(SimVmConfig { seed: 1, ..config(true) }).unwrap();
    assert!(other.load_record(&records[0]).unwrap_err().message.contains("configured in another way"));
    let odd = MachineRecord { owner: RecordOwner::Machine, name: "odd".into(), data: vec![] };
    assert!(destination.load_record(&odd).is_err());
    destination.load_record(&records[0]).unwrap();
    assert!(destination.resume().is_err(), "not reclaimed");
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    for wrong in [
        SimVmConfig { memory: 1 << 20, ..config(false) },
        SimVmConfig { memory: (8 << 20) + 4096, ..config(false) },
        SimVmConfig { vcpus: 0, ..config(false) },
        SimVmConfig { working_set: Some(0), ..config(false) },
        SimVmConfig { ring_entries: 1, ..config(false) },
    ] {
        assert!(SimVm::new(wrong).is_err());
    }
    SimVm::new(SimVmConfig { write_rate: 0, ..config(false) }).unwrap().resume().unwrap();
}

//! SimVm with SoftDevices behind real vfio-user sockets: the driver's checks, a migration by hand
//! with the interface's own calls, and each fault that must be seen.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use airlift::machine::{Machine, MachineMemory, PendingInterrupt};
use airlift::vmm::VmmDevices;
use airlift_core::{
    DeviceId, DeviceState, DirtySource, GpaRange, IovaRange, LoadSession, MigrationDevice, Piece,
    SaveSession, Session,
};
use airlift_memory::GuestMemory;
use airlift_softdevice::simvm::{Sabotage, SimDevice, SimMonitor, SimReport, SimVm, SimVmConfig};
use airlift_softdevice::{SoftDevice, SoftDeviceOptions, SoftMonitor};
use airlift_vfio_user::{ClientOptions, Server, ServerHandle, ServerOptions, VfioUserDevice};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

/// The devices of one host.
struct Host {
    dir: tempfile::TempDir,
    devices: Vec<(ServerHandle, Option<JoinHandle<()>>, SoftMonitor)>,
}

impl Host {
    fn new(devices: u64, options: &SoftDeviceOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let serve = |i| {
            let options = SoftDeviceOptions { seed: options.seed + i, ..options.clone() };
            let device = SoftDevice::new(options, |_| ()).unwrap();
            let monitor = device.monitor();
            let listener = UnixListener::bind(dir.path().join(format!("dev{i}"))).unwrap();
            let server = Server::new(Box::new(device), ServerOptions::default());
            let handle = server.handle();
            let thread = std::thread::spawn(move || drop(server.serve(listener).unwrap()));
            (handle, Some(thread), monitor)
        };
        let devices = (0..devices).map(serve).collect();
        Self { dir, devices }
    }

    fn stop(&mut self, device: usize) {
        self.devices[device].0.stop();
        if let Some(thread) = self.devices[device].1.take() {
            thread.join().unwrap();
        }
    }

    /// Waits until every device has written this many entries more into its ring in memory.
    fn run_for(&self, entries: u64) {
        let until = Instant::now() + LONG;
        for (_, _, device) in &self.devices {
            let start = device.produced()[0];
            while device.produced()[0] < start + entries {
                assert!(Instant::now() < until, "the device writes nothing");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn vm(&self, incoming: bool) -> SimVm {
        SimVm::new(self.config(incoming)).unwrap()
    }

    fn config(&self, incoming: bool) -> SimVmConfig {
        let device = |i| SimDevice {
            id: DeviceId::new(format!("dev{i}")).unwrap(),
            socket: self.dir.path().join(format!("dev{i}")),
        };
        SimVmConfig {
            memory: 8 << 20,
            write_rate: 16 << 20,
            seed: 7,
            devices: (0..self.devices.len()).map(device).collect(),
            incoming,
            ring_rate: 20_000,
            ring_entries: 1024,
            interrupt_every: Some(16),
            ..SimVmConfig::default()
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        (0..self.devices.len()).for_each(|i| self.stop(i));
    }
}

fn small() -> SoftDeviceOptions {
    SoftDeviceOptions { state_size: 2 << 20, dirty_rate: 1 << 20, ..SoftDeviceOptions::default() }
}

fn check(monitor: &SimMonitor) -> SimReport {
    monitor.check(Instant::now() + LONG)
}

/// Waits until the guest has consumed this many entries more.
fn run_for(monitor: &SimMonitor, entries: u64) {
    let until = Instant::now() + LONG;
    let start = monitor.report().entries_consumed;
    while monitor.report().entries_consumed < start + entries {
        assert!(Instant::now() < until, "no entries come: {:?}", monitor.report());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn started(host: &Host) -> SimVm {
    let mut vm = host.vm(false);
    vm.resume().unwrap();
    run_for(&vm.monitor(), 5000);
    vm
}

#[test]
fn a_guest_with_two_devices_is_clean() {
    let host = Host::new(2, &small());
    let vm = started(&host);
    let report = check(&vm.monitor());
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.memory_verified, Some(true));
    assert_eq!((report.interrupts.lost, report.interrupts.spurious), (Some(0), Some(0)));
    assert!(report.interrupts.received > 0);
    for device in &report.devices {
        assert_eq!(device.verified, Some(true));
        assert_eq!(device.rings.len(), 2, "one in memory, one in the BAR of the peer");
        // More than a lap of each: the consumer index reaches the device.
        assert!(device.rings.iter().all(|ring| ring.consumed > 1024), "{report:#?}");
    }
}

#[test]
fn an_interrupt_that_comes_twice_is_seen() {
    let host = Host::new(1, &small());
    let vm = started(&host);
    vm.monitor().sabotage(Sabotage::RaiseTwice).unwrap();
    let until = Instant::now() + LONG;
    // Until the device has raised all that the guest has got, it cannot be told.
    while check(&vm.monitor()).interrupts.spurious != Some(1) {
        assert!(Instant::now() < until);
    }
}

/// How a migration by hand is to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The interrupts that were drained are not injected.
    ForgetInterrupts,
    /// The final sync comes before the records are saved.
    SyncBeforeRecords,
    /// What devices wrote to memory is not asked for at the end.
    ForgetDeviceDirty,
}

/// The devices of a VM as a migration process gets them.
fn migration_devices(vm: &mut SimVm) -> Vec<VfioUserDevice> {
    let devices = vm.devices().unwrap();
    let open = |d: airlift::vmm::DeviceHandle| {
        VfioUserDevice::from_stream(d.id, UnixStream::from(d.fd), ClientOptions::default()).unwrap()
    };
    devices.into_iter().map(open).collect()
}

fn engine_memory(vm: &mut SimVm) -> GuestMemory {
    let MachineMemory::Engine(memory) = vm.memory().unwrap() else { panic!("not external") };
    memory
}

struct Moving {
    from: GuestMemory,
    to: GuestMemory,
    ranges: Vec<IovaRange>,
    logs: Vec<airlift_vfio_user::VfioUserDirtySource>,
}

impl Moving {
    fn copy(&self, range: GpaRange) {
        let mut bytes = vec![0; usize::try_from(range.length).unwrap()];
        self.from.read(range.start.0, &mut bytes).unwrap();
        self.to.write(range.start.0, &bytes).unwrap();
    }

    fn sync_vm(&self, vm: &mut SimVm) {
        vm.sync_dirty(&mut |range| self.copy(range)).unwrap();
    }

    fn sync_devices(&mut self) {
        let mut dirty = Vec::new();
        for log in &mut self.logs {
            for range in &self.ranges {
                log.report(*range, &mut |r| dirty.push(r)).unwrap();
            }
        }
        // The map is the identity.
        dirty.into_iter().for_each(|r| self.copy(GpaRange::new(r.start.0, r.length)));
    }
}

fn set_all(devices: &mut [VfioUserDevice], state: DeviceState) -> Vec<Option<Session>> {
    devices.iter_mut().map(|d| d.set_state(state).unwrap()).collect()
}

fn savers(sessions: Vec<Option<Session>>) -> Vec<Box<dyn SaveSession>> {
    let saver = |s| if let Some(Session::Save(s)) = s { s } else { panic!("no save session") };
    sessions.into_iter().map(saver).collect()
}

fn loaders(sessions: Vec<Option<Session>>) -> Vec<Box<dyn LoadSession>> {
    let loader = |s| if let Some(Session::Load(s)) = s { s } else { panic!("no load session") };
    sessions.into_iter().map(loader).collect()
}

fn migrate(here: &Host, source: &mut SimVm, destination: &mut SimVm, fault: Fault) -> Vec<PendingInterrupt> {
    let (mut ours, mut theirs) = (migration_devices(source), migration_devices(destination));
    let map = source.iova_map(ours[0].id()).unwrap();
    let mut moving = Moving {
        from: engine_memory(source),
        to: engine_memory(destination),
        ranges: map.mappings().iter().map(|m| IovaRange { start: m.iova, length: m.length }).collect(),
        logs: ours.iter().map(|d| d.dirty_source().unwrap()).collect(),
    };
    source.start_dirty().unwrap();
    let ranges = moving.ranges.clone();
    moving.logs.iter_mut().for_each(|log| log.start(&ranges).unwrap());
    for region in source.memory_layout().unwrap().regions {
        moving.copy(GpaRange { start: region.gpa, length: region.size });
    }
    run_for(&source.monitor(), 3000);
    moving.sync_vm(source);
    moving.sync_devices();
    run_for(&source.monitor(), 3000);

    source.pause().unwrap();
    source.close_device_access().unwrap();
    here.run_for(100);
    set_all(&mut ours, DeviceState::RunningP2p);
    let mut saves = savers(set_all(&mut ours, DeviceState::StopCopy));
    let pending = source.drain_interrupts().unwrap();
    if fault == Fault::SyncBeforeRecords {
        moving.sync_vm(source);
    }
    let records = source.save_records().unwrap();
    if fault != Fault::SyncBeforeRecords {
        moving.sync_vm(source);
    }
    if fault != Fault::ForgetDeviceDirty {
        moving.sync_devices();
    }
    source.stop_dirty().unwrap();

    let mut loads = loaders(set_all(&mut theirs, DeviceState::Resuming));
    let mut buf = vec![0; 256 << 10];
    for (save, load) in saves.iter_mut().zip(&mut loads) {
        loop {
            match save.read(&mut buf).unwrap() {
                Piece::Data { len, .. } => load.write(&buf[..len]).unwrap(),
                Piece::End => break,
                Piece::Drained => panic!("not in pre-copy"),
            }
        }
    }
    drop((saves, loads));
    for record in &records {
        destination.load_record(record).unwrap();
    }
    set_all(&mut theirs, DeviceState::Stop);
    source.release_shared().unwrap();
    set_all(&mut ours, DeviceState::Stop);
    set_all(&mut theirs, DeviceState::RunningP2p);
    set_all(&mut theirs, DeviceState::Running);
    destination.reclaim_shared().unwrap();
    destination.open_device_access().unwrap();
    if fault != Fault::ForgetInterrupts {
        destination.inject_interrupts(&pending).unwrap();
    }
    destination.resume().unwrap();
    pending
}

fn moved(options: &SoftDeviceOptions, fault: Fault) -> (SimReport, Vec<PendingInterrupt>) {
    let (here, there) = (Host::new(2, options), Host::new(2, options));
    let (mut source, mut destination) = (started(&here), there.vm(true));
    let pending = migrate(&here, &mut source, &mut destination, fault);
    if fault == Fault::None {
        run_for(&destination.monitor(), 5000);
    }
    (check(&destination.monitor()), pending)
}

#[test]
fn a_guest_that_was_moved_by_the_rules_has_lost_nothing() {
    // An interrupt in the arc that stops each device: it is drained here and arrives there, once.
    let options = SoftDeviceOptions { interrupt_in_last_arc: true, ..small() };
    let (report, pending) = moved(&options, Fault::None);
    assert!(report.is_clean(), "{report:#?}");
    assert!(pending.iter().filter(|p| p.vector == 0).count() == 2, "{pending:?}");
    assert_eq!((report.memory_verified, report.interrupts.lost), (Some(true), Some(0)));
    assert!(report.devices.iter().all(|d| d.verified == Some(true)), "{report:#?}");
}

#[test]
fn interrupts_that_were_drained_and_forgotten_are_lost() {
    let options = SoftDeviceOptions { interrupt_in_last_arc: true, ..small() };
    let (report, pending) = moved(&options, Fault::ForgetInterrupts);
    let forgotten: u64 = pending.iter().map(|p| p.count).sum();
    assert!(forgotten >= 2);
    assert_eq!(report.interrupts.lost, Some(forgotten), "{report:#?}");
}

// I13
#[test]
fn a_sync_before_the_records_is_a_gap() {
    let (report, _) = moved(&small(), Fault::SyncBeforeRecords);
    assert_eq!(report.record_mismatches, 1);
    assert!(report.sequence_gaps >= 1 && !report.is_clean());
}

// I12
#[test]
fn device_writes_that_were_not_copied_are_gaps() {
    let (report, _) = moved(&small(), Fault::ForgetDeviceDirty);
    // What the guest had not consumed is gone; the rings in BARs travel with their devices.
    assert!(report.devices.iter().any(|d| d.rings[0].gaps > 0), "{report:#?}");
    assert!(report.devices.iter().all(|d| d.rings[1].gaps == 0), "{report:#?}");
}

#[test]
fn a_device_that_dies_is_named_and_the_rest_goes_on() {
    let mut host = Host::new(2, &small());
    let mut vm = started(&host);
    host.stop(1);
    let until = Instant::now() + LONG;
    while vm.monitor().report().devices[1].alive {
        assert!(Instant::now() < until, "nobody notices");
        std::thread::sleep(Duration::from_millis(5));
    }
    let report = vm.monitor().report();
    let before = report.devices[0].rings.iter().map(|r| r.consumed).sum::<u64>();
    while vm.monitor().report().devices[0].rings.iter().map(|r| r.consumed).sum::<u64>() < before + 1000 {
        assert!(Instant::now() < until, "the other one stopped too");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(report.running && report.devices[0].alive && report.devices[1].lost.is_some());
    assert!(!report.is_clean());
    let blockers = vm.blockers().unwrap();
    assert_eq!(blockers.iter().map(|b| b.owner.as_str()).collect::<Vec<_>>(), ["dev1"]);
    let devices = vm.devices().unwrap();
    assert_eq!(devices.iter().map(|d| d.id.as_str()).collect::<Vec<_>>(), ["dev0"]);
    vm.pause().unwrap();
    vm.close_device_access().unwrap();
    vm.open_device_access().unwrap();
    vm.resume().unwrap();
}

#[test]
fn a_device_that_was_reset_is_set_up_again() {
    let host = Host::new(2, &small());
    let mut vm = started(&host);
    vm.pause().unwrap();
    let mut devices = migration_devices(&mut vm);
    devices[0].reset().unwrap();
    let id = devices[0].id().clone();
    drop(devices);
    vm.device_was_reset(&id).unwrap();
    vm.resume().unwrap();
    let rings = || vm.monitor().report().devices.iter().flat_map(|d| d.rings.clone()).collect::<Vec<_>>();
    let (start, until) = (rings(), Instant::now() + LONG);
    // Those of the device that was reset begin anew.
    while !rings()
        .iter()
        .zip(&start)
        .enumerate()
        .all(|(i, (r, s))| r.consumed > if i < 2 { 500 } else { s.consumed + 500 })
    {
        assert!(Instant::now() < until, "{:#?}", vm.monitor().report());
        std::thread::sleep(Duration::from_millis(5));
    }
    let report = check(&vm.monitor());
    // What its peer had written into its BAR and the guest had not taken is lost with the reset.
    let gaps: Vec<_> = report.devices.iter().map(|d| (d.rings[0].gaps, d.interrupts.lost)).collect();
    assert_eq!(gaps, [(0, Some(0)), (0, Some(0))], "{report:#?}");
    assert_eq!((report.devices[0].rings[1].gaps, report.interrupts.spurious), (0, Some(0)));
}

#[test]
fn a_migration_process_that_dies_leaves_a_guest_that_can_be_moved() {
    let (here, there) = (Host::new(2, &small()), Host::new(2, &small()));
    let mut source = started(&here);
    let mut devices = migration_devices(&mut source);
    source.start_dirty().unwrap();
    set_all(&mut devices, DeviceState::PreCopy);
    // The process is gone: its sockets close, and the devices go back to RUNNING by themselves.
    drop(devices);
    source.stop_dirty().unwrap();
    let until = Instant::now() + LONG;
    while here.devices.iter().any(|(_, _, device)| device.state() != DeviceState::Running) {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut destination = there.vm(true);
    migrate(&here, &mut source, &mut destination, Fault::None);
    run_for(&destination.monitor(), 2000);
    let report = check(&destination.monitor());
    assert!(report.is_clean(), "{report:#?}");
}

#[test]
fn a_machine_whose_first_migration_was_aborted_takes_the_next() {
    let (here, there) = (Host::new(2, &small()), Host::new(2, &small()));
    let (mut source, mut destination) = (started(&here), there.vm(true));
    // So far that records were loaded; then the devices here are reset, and the source runs on.
    source.pause().unwrap();
    source.close_device_access().unwrap();
    let records = source.save_records().unwrap();
    let mut theirs = migration_devices(&mut destination);
    drop(loaders(set_all(&mut theirs, DeviceState::Resuming)));
    for record in &records {
        destination.load_record(record).unwrap();
    }
    for device in &mut theirs {
        device.reset().unwrap();
        destination.device_was_reset(device.id()).unwrap();
    }
    drop(theirs);
    source.open_device_access().unwrap();
    source.resume().unwrap();
    run_for(&source.monitor(), 1000);

    migrate(&here, &mut source, &mut destination, Fault::None);
    run_for(&destination.monitor(), 2000);
    let report = check(&destination.monitor());
    assert!(report.is_clean(), "{report:#?}");
}

//! Both ends over a socket pair, and each end against a peer that breaks the protocol.

use super::*;
use crate::machine::{Blocker, MachineMemory, MachineRecord, PendingInterrupt, RecordOwner};
use airlift_core::{Errno, Gpa, GpaRange, Iova, IovaMap, IovaMapping, MemoryLayout, MemoryRegion};
use airlift_memory::{Access, GuestMemory, GuestRegion, Mapping, SharedMemory};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// What the double was asked, and what it is to answer.
#[derive(Default)]
struct Script {
    calls: Vec<String>,
    dirty: Vec<GpaRange>,
    records: Vec<MachineRecord>,
    fail: Option<MachineError>,
    external: bool,
}

struct Double {
    script: Arc<Mutex<Script>>,
    memory: [SharedMemory; 2],
    mapping: [Mapping; 2],
    far_ends: Vec<UnixStream>,
}

fn layout() -> MemoryLayout {
    let region = |id, gpa, size| MemoryRegion { id, gpa: Gpa(gpa), size, page_size: 4096 };
    // 65 pages: the bitmap of the second region begins at the third word.
    MemoryLayout { generation: 7, regions: vec![region(0, 0, 65 * 4096), region(4, 4 << 30, MIB)] }
}

impl Double {
    fn new() -> Self {
        let memory = layout().regions.into_iter().map(|r| SharedMemory::create("double", r.size).unwrap());
        let memory: Vec<_> = memory.collect();
        let memory: [SharedMemory; 2] = memory.try_into().unwrap();
        let mapping = [0, 1].map(|i| memory[i].map(0, memory[i].size(), Access::ReadWrite).unwrap());
        Self { script: Arc::default(), memory, mapping, far_ends: Vec::new() }
    }

    fn called(&self, call: impl Into<String>) -> Result<(), MachineError> {
        let mut script = self.script.lock().unwrap();
        script.calls.push(call.into());
        script.fail.take().map_or(Ok(()), Err)
    }
}

impl VmmDevices for Double {
    fn devices(&mut self) -> Result<Vec<DeviceHandle>, MachineError> {
        self.called("devices")?;
        let mut devices = Vec::new();
        for (name, kind) in [("nic0", DeviceKind::VfioUser), ("gpu0", DeviceKind::Vfio)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.far_ends.push(ours);
            devices.push(DeviceHandle { id: DeviceId::new(name).unwrap(), kind, fd: theirs.into() });
        }
        Ok(devices)
    }
    fn memory_files(&mut self) -> Result<Option<Vec<MemoryFile>>, MachineError> {
        let files = layout().regions.into_iter().zip(&self.memory);
        Ok(Some(
            files
                .map(|(r, m)| MemoryFile { region: r.id, fd: m.try_clone_fd().unwrap(), offset: 0 })
                .collect(),
        ))
    }
    fn migration_ended(&mut self, outcome: &str) {
        self.called(format!("migration_ended {outcome}")).unwrap();
    }
}

impl Machine for Double {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        self.called("blockers")?;
        Ok(vec![Blocker { owner: "viommu".into(), reason: "is on".into() }])
    }
    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        self.called("memory_layout")?;
        Ok(layout())
    }
    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        self.called("memory")?;
        if self.script.lock().unwrap().external {
            return Ok(MachineMemory::External);
        }
        let regions = layout().regions.into_iter().zip(&self.mapping);
        let regions = regions.map(|(r, m)| GuestRegion { gpa: r.gpa.0, mapping: m.clone() }).collect();
        Ok(MachineMemory::Engine(GuestMemory::new(regions).unwrap()))
    }
    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError> {
        self.called(format!("iova_map {device}"))?;
        Ok(IovaMap::new(vec![IovaMapping { iova: Iova(0x1000), gpa: Gpa(0), length: MIB }]))
    }
    fn start_dirty(&mut self) -> Result<(), MachineError> {
        self.called("start_dirty")
    }
    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        self.called("sync_dirty")?;
        self.script.lock().unwrap().dirty.drain(..).for_each(dirty);
        Ok(())
    }
    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        self.called("stop_dirty")
    }
    fn pause(&mut self) -> Result<(), MachineError> {
        self.called("pause")
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.called("resume")
    }
    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.called("close_device_access")
    }
    fn open_device_access(&mut self) -> Result<(), MachineError> {
        self.called("open_device_access")
    }
    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        self.called("drain_interrupts")?;
        Ok(interrupts())
    }
    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        assert_eq!(pending, interrupts());
        self.called("inject_interrupts")
    }
    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        self.called("save_records")?;
        Ok(self.script.lock().unwrap().records.clone())
    }
    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        self.called(format!("load_record {} {}", record.name, record.data.len()))?;
        self.script.lock().unwrap().records.push(record.clone());
        Ok(())
    }
    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.called("release_shared")
    }
    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        self.called("reclaim_shared")
    }
    fn device_was_reset(&mut self, device: &DeviceId) -> Result<(), MachineError> {
        self.called(format!("device_was_reset {device}"))
    }
    fn running(&mut self) -> Result<bool, MachineError> {
        self.called("running")?;
        Ok(true)
    }
    fn external_memory_barrier(&mut self, deadline: Duration) -> Result<(), MachineError> {
        self.called(format!("external_memory_barrier {}", deadline.as_millis()))
    }
}

fn interrupts() -> Vec<PendingInterrupt> {
    vec![PendingInterrupt { device: DeviceId::new("nic0").unwrap(), index: 2, vector: 3, count: 5 }]
}

struct Served {
    vmm: RemoteVmm,
    script: Arc<Mutex<Script>>,
    mapping: [Mapping; 2],
    thread: JoinHandle<(ServeEnd, Double)>,
}

impl Served {
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.script.lock().unwrap().calls)
    }
}

/// A served double; the layout has already been asked for.
fn served() -> Served {
    let mut double = Double::new();
    let (script, mapping) = (double.script.clone(), double.mapping.clone());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || (serve(&mut double, theirs, "double"), double));
    let mut vmm = RemoteVmm::greet(ours, "test", VmmTimeouts::default()).unwrap();
    assert_eq!(vmm.name(), "double");
    assert_eq!(vmm.memory_layout().unwrap(), layout());
    let served = Served { vmm, script, mapping, thread };
    served.calls();
    served
}

// VMM-ONE-ANSWER
#[test]
fn every_verb_reaches_the_machine_and_its_answer_comes_back() {
    let mut s = served();
    let id = DeviceId::new("nic0").unwrap();
    let vmm = &mut s.vmm;
    assert_eq!(vmm.blockers().unwrap(), [Blocker { owner: "viommu".into(), reason: "is on".into() }]);
    assert_eq!(vmm.iova_map(&id).unwrap().mappings()[0].iova, Iova(0x1000));
    vmm.start_dirty().unwrap();
    vmm.pause().unwrap();
    vmm.close_device_access().unwrap();
    assert_eq!(vmm.drain_interrupts().unwrap(), interrupts());
    assert_eq!(vmm.save_records().unwrap(), []);
    vmm.sync_dirty(&mut |range| panic!("nothing is dirty, but {range:?}")).unwrap();
    vmm.release_shared().unwrap();
    vmm.reclaim_shared().unwrap();
    vmm.device_was_reset(&id).unwrap();
    vmm.open_device_access().unwrap();
    vmm.inject_interrupts(&interrupts()).unwrap();
    vmm.resume().unwrap();
    vmm.stop_dirty().unwrap();
    assert!(vmm.running().unwrap());
    vmm.external_memory_barrier(Duration::from_millis(1500)).unwrap();
    vmm.migration_ended("completed").unwrap();
    let calls = s.calls();
    assert_eq!(
        calls.iter().filter(|c| *c != "memory_layout").collect::<Vec<_>>(),
        [
            "blockers",
            "iova_map nic0",
            "start_dirty",
            "pause",
            "close_device_access",
            "drain_interrupts",
            "save_records",
            "sync_dirty",
            "release_shared",
            "reclaim_shared",
            "device_was_reset nic0",
            "open_device_access",
            "inject_interrupts",
            "resume",
            "stop_dirty",
            "running",
            "external_memory_barrier 1500",
            "migration_ended completed",
        ]
    );
    drop(s.vmm);
    let (end, _) = s.thread.join().unwrap();
    assert!(matches!(end, ServeEnd::Closed { outcome: Some(o) } if o == "completed"));
}

#[test]
fn guest_memory_is_shared_both_ways_and_may_be_the_vmms_own() {
    let mut s = served();
    let MachineMemory::Engine(memory) = s.vmm.memory().unwrap() else { panic!("not external") };
    memory.store_u64((4 << 30) + 4096, 0x1234).unwrap();
    assert_eq!(s.mapping[1].load_u64(4096).unwrap(), 0x1234);
    s.mapping[0].store_u64(64 * 4096, 99).unwrap();
    assert_eq!(memory.load_u64(64 * 4096).unwrap(), 99);
    s.script.lock().unwrap().external = true;
    assert!(matches!(s.vmm.memory().unwrap(), MachineMemory::External));
}

#[test]
fn a_devices_descriptor_leads_to_that_device() {
    let mut s = served();
    let devices = s.vmm.devices().unwrap();
    let named: Vec<_> = devices.iter().map(|d| (d.id.as_str(), d.kind)).collect();
    assert_eq!(named, [("nic0", DeviceKind::VfioUser), ("gpu0", DeviceKind::Vfio)]);
    for (i, device) in devices.into_iter().enumerate() {
        UnixStream::from(device.fd).write_all(&[u8::try_from(i).unwrap()]).unwrap();
    }
    drop(s.vmm);
    let (_, mut double) = s.thread.join().unwrap();
    for (i, far) in double.far_ends.iter_mut().enumerate() {
        let mut byte = [0xff];
        far.read_exact(&mut byte).unwrap();
        assert_eq!(usize::from(byte[0]), i);
    }
}

// VMM-DIRTY-OR
#[test]
fn dirty_ranges_cross_the_bitmap_once() {
    let mut s = served();
    s.vmm.start_dirty().unwrap();
    let high = 4 << 30;
    // Half a page, a run over a word's end into the last page, and one page of the other region.
    s.script.lock().unwrap().dirty = vec![
        GpaRange::new(0x800, 0x800),
        GpaRange::new(60 * 4096, 5 * 4096),
        GpaRange::new(high, 1),
        GpaRange::new(high + 127 * 4096, 4096),
    ];
    let mut seen = Vec::new();
    s.vmm.sync_dirty(&mut |r| seen.push((r.start.0, r.length))).unwrap();
    let expected = [(0, 4096), (60 * 4096, 5 * 4096), (high, 4096), (high + 127 * 4096, 4096)]
        .map(|(a, l): (u64, u64)| (a, l));
    assert_eq!(seen, expected);
    s.vmm.sync_dirty(&mut |r| panic!("{r:?} was taken before")).unwrap();
    s.script.lock().unwrap().dirty = vec![GpaRange::new(64 * 4096, 2 * 4096)];
    let error = s.vmm.sync_dirty(&mut |_| ()).unwrap_err();
    assert!(error.message.contains("not in the memory layout"), "{error}");
    // What was inside is not lost with it.
    let mut seen = Vec::new();
    s.vmm.sync_dirty(&mut |r| seen.push(r)).unwrap();
    assert_eq!(seen, [GpaRange::new(64 * 4096, 4096)]);
}

#[test]
fn records_travel_whole_and_in_order() {
    let mut s = served();
    let big = MachineRecord {
        owner: RecordOwner::Machine,
        name: "vcpus".into(),
        data: (0..1_000_000_u32).map(|i| i.to_le_bytes()[0]).collect(),
    };
    let device = RecordOwner::Device(DeviceId::new("nic0").unwrap());
    let small = MachineRecord { owner: device, name: "pci".into(), data: vec![] };
    s.vmm.load_record(&big).unwrap();
    s.vmm.load_record(&small).unwrap();
    assert_eq!(s.calls(), ["load_record vcpus 1000000", "load_record pci 0"]);
    assert_eq!(s.vmm.save_records().unwrap(), [big.clone(), small]);
    let too_big = MachineRecord { data: vec![0; 1_000_001], ..big };
    assert!(s.vmm.load_record(&too_big).is_err());
    s.script.lock().unwrap().records = vec![too_big];
    assert!(s.vmm.save_records().unwrap_err().message.contains("at most 1000000"));
    assert!(s.vmm.running().unwrap(), "the connection goes on");
}

#[test]
fn a_refusal_keeps_its_operation_message_and_errno_and_the_connection_goes_on() {
    let mut s = served();
    let refusal = MachineError { errno: Some(Errno::EBUSY), ..MachineError::new("pause", "a vCPU hangs") };
    s.script.lock().unwrap().fail = Some(refusal.clone());
    assert_eq!(s.vmm.pause().unwrap_err(), refusal);
    s.vmm.pause().unwrap();
}

// VMM-HANGUP
#[test]
fn dirty_tracking_ends_with_the_connection() {
    let mut s = served();
    s.vmm.start_dirty().unwrap();
    s.vmm.pause().unwrap();
    s.calls();
    drop(s.vmm);
    let (end, double) = s.thread.join().unwrap();
    assert!(matches!(end, ServeEnd::Closed { outcome: None }));
    assert_eq!(double.script.lock().unwrap().calls, ["stop_dirty"], "and nothing else changes");
}

/// A VMM that answers each request line with the next bytes of `answers`.
fn scripted(answers: Vec<Vec<u8>>) -> (UnixStream, JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut lines = BufReader::new(theirs.try_clone().unwrap());
        let mut seen = Vec::new();
        for answer in answers {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap_or(0) == 0 {
                break;
            }
            seen.push(line);
            let _ = (&theirs).write_all(&answer);
        }
        // Held open until the client goes, so that a missing answer is a hang and not a hangup.
        let _ = lines.read_to_string(&mut String::new());
        seen
    });
    (ours, thread)
}

fn hello() -> Vec<u8> {
    br#"{"id":1,"ok":{"protocol":1,"name":"script"}}"#.iter().copied().chain([b'\n']).collect()
}

fn impatient() -> VmmTimeouts {
    VmmTimeouts { query: Duration::from_secs(20), action: Duration::from_millis(50) }
}

/// The error of a verb that gets `answer`, and whether the connection has stayed of use.
fn failing_with(answer: &[u8]) -> (Errno, bool) {
    let refusal = br#"{"id":3,"error":{"operation":"running","message":"no","errno":null}}"#;
    let refusal = refusal.iter().copied().chain([b'\n']).collect();
    let (stream, _thread) = scripted(vec![hello(), answer.to_vec(), refusal]);
    let mut vmm = RemoteVmm::greet(stream, "test", VmmTimeouts::default()).unwrap();
    let error = vmm.blockers().unwrap_err();
    assert_eq!(error.operation, "blockers");
    let next = vmm.running().unwrap_err();
    (error.errno.unwrap(), !next.message.contains("the VMM is gone"))
}

#[test]
fn answers_that_break_the_protocol_are_typed_errors() {
    let fatal = |errno| (errno, false);
    assert_eq!(failing_with(b"what?\n"), fatal(Errno::EPROTO));
    assert_eq!(failing_with(b"\xff\xfe\n"), fatal(Errno::EPROTO));
    assert_eq!(failing_with(b"{\"id\":2}\n"), fatal(Errno::EPROTO));
    assert_eq!(failing_with(b"{\"id\":9,\"ok\":{}}\n"), fatal(Errno::EPROTO));
    assert_eq!(failing_with(&vec![b' '; MAX_LINE + 1]), fatal(Errno::EMSGSIZE));
    // The lines are still in step, so this one costs only the verb.
    assert_eq!(failing_with(b"{\"id\":2,\"ok\":{\"blockers\":3}}\n"), (Errno::EPROTO, true));
}

// VMM-LATE
#[test]
fn a_vmm_that_hangs_is_a_timeout_and_its_late_answer_is_dropped() {
    let layout = serde_json::to_string(&layout()).unwrap();
    let late = format!("{{\"id\":2,\"ok\":{{}}}}\n{{\"id\":3,\"ok\":{layout}}}\n");
    let (stream, thread) = scripted(vec![hello(), vec![], late.into_bytes()]);
    let mut vmm = RemoteVmm::greet(stream, "test", impatient()).unwrap();
    let error = vmm.pause().unwrap_err();
    assert_eq!((error.operation.as_str(), error.errno), ("pause", Some(Errno::ETIMEDOUT)));
    assert_eq!(vmm.memory_layout().unwrap(), self::layout(), "the next verb gets its own answer");
    drop(vmm);
    assert!(thread.join().unwrap()[1].contains(r#""verb":"pause""#));
}

#[test]
fn a_vmm_that_dies_is_a_typed_error() {
    let (stream, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = RemoteVmm::greet(stream, "test", VmmTimeouts::default()).unwrap_err();
    assert_eq!((error.operation.as_str(), error.errno), ("hello", Some(Errno::ECONNRESET)));
}

#[test]
fn another_version_is_refused_by_both_ends() {
    let (stream, _t) = scripted(vec![b"{\"id\":1,\"ok\":{\"protocol\":2,\"name\":\"new\"}}\n".to_vec()]);
    assert_eq!(
        RemoteVmm::greet(stream, "test", VmmTimeouts::default()).unwrap_err().errno,
        Some(Errno::EPROTO)
    );
    let answers = raw_client(&["{\"id\":1,\"verb\":\"hello\",\"params\":{\"protocol\":2,\"name\":\"x\"}}"]);
    assert!(answers[0].contains("protocol 2 is not spoken"), "{answers:?}");
}

/// Sends these lines to a served double and returns its answers and how the session ended.
fn raw_client(lines: &[&str]) -> Vec<String> {
    let mut double = Double::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || serve(&mut double, theirs, "double"));
    let mut answers = Vec::new();
    let mut reader = BufReader::new(ours.try_clone().unwrap());
    for line in lines {
        if (&ours).write_all(line.as_bytes()).is_err() || (&ours).write_all(b"\n").is_err() {
            break;
        }
        let mut answer = String::new();
        let _ = reader.read_line(&mut answer);
        answers.push(answer);
    }
    drop((ours, reader));
    answers.push(format!("{:?}", thread.join().unwrap()));
    answers
}

#[test]
fn a_client_that_breaks_the_protocol_is_answered_or_dropped() {
    let hello = r#"{"id":1,"verb":"hello","params":{"protocol":1,"name":"x"}}"#;
    let early = raw_client(&[r#"{"id":1,"verb":"pause"}"#]);
    assert!(early[0].contains("must be hello"), "{early:?}");
    let odd = raw_client(&[
        hello,
        r#"{"id":2,"verb":"explode"}"#,
        r#"{"id":3,"verb":"iova_map"}"#,
        r#"{"id":4,"verb":"load_record","params":{"record":{"owner":"machine","name":"a","offset":0,"length":1}}}"#,
        r#"{"id":5,"verb":"sync_dirty"}"#,
        r#"{"id":6,"verb":"running"}"#,
    ]);
    for (id, answer) in odd.iter().enumerate().skip(1).take(4) {
        assert!(answer.starts_with(&format!("{{\"id\":{},\"error\"", id + 1)), "{answer}");
    }
    assert_eq!(odd[5], "{\"id\":6,\"ok\":{\"running\":true}}\n");
    let garbage = raw_client(&[hello, "!"]);
    assert!(garbage[1].contains("error") && garbage[2].contains("Broken"), "{garbage:?}");
    let oversize = raw_client(&[hello, &"x".repeat(MAX_LINE + 1)]);
    assert!(oversize.last().unwrap().contains("LineTooLong"), "{:?}", oversize.last());
}

/// One exchange with a VMM whose second answer is `ok`, with `fds`.
fn answer_with(
    ok: &str,
    fds: &[&SharedMemory],
    ask: impl FnOnce(&mut RemoteVmm) -> Result<(), MachineError>,
) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ok = ok.to_owned();
    let fds: Vec<OwnedFd> = fds.iter().map(|m| m.try_clone_fd().unwrap()).collect();
    let thread = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut channel = LineChannel::new(theirs);
        let hello = serde_json::json!({"id": 1, "ok": {"protocol": 1, "name": "x"}});
        channel.receive(deadline).unwrap();
        channel.send(&hello, &[], deadline).unwrap();
        let mut id = 2;
        while let Ok(line) = channel.receive(deadline) {
            let text = String::from_utf8(line.text).unwrap();
            let value: serde_json::Value = if text.contains("memory_layout") && !ok.contains("generation") {
                serde_json::to_value(layout()).unwrap()
            } else {
                serde_json::from_str(&ok).unwrap()
            };
            let borrowed: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
            channel.send(&serde_json::json!({"id": id, "ok": value}), &borrowed, deadline).unwrap();
            id += 1;
        }
    });
    let mut vmm = RemoteVmm::greet(ours, "test", VmmTimeouts::default()).unwrap();
    let error = ask(&mut vmm).unwrap_err();
    drop(vmm);
    thread.join().unwrap();
    assert_eq!(error.errno.or(Some(Errno::EPROTO)), Some(Errno::EPROTO));
    error.message
}

// VMM-BOUNDS, I15
#[test]
fn what_a_vmm_says_is_bounded_before_it_is_believed() {
    let file = SharedMemory::create("small", 4096).unwrap();
    let records = |offset: u64, length: u64| {
        format!(r#"{{"records":[{{"owner":"machine","name":"a","offset":{offset},"length":{length}}}]}}"#)
    };
    let save = |vmm: &mut RemoteVmm| vmm.save_records().map(drop);
    assert!(answer_with(&records(0, 1_000_001), &[&file], save).contains("at most"));
    assert!(answer_with(&records(4000, 97), &[&file], save).contains("beyond its file"));
    assert!(answer_with(&records(u64::MAX, 2), &[&file], save).contains("beyond its file"));
    assert!(answer_with(&records(0, 1), &[], save).contains("0 came"));
    let memory = |vmm: &mut RemoteVmm| vmm.memory().map(drop);
    let one = r#"{"mode":"engine","regions":[{"id":0,"fd":0,"offset":0}]}"#;
    assert!(answer_with(one, &[&file], memory).contains("promised"), "the file is too small");
    let none = r#"{"mode":"engine","regions":[]}"#;
    assert!(answer_with(none, &[], memory).contains("exactly one file"));
    let dirty = |vmm: &mut RemoteVmm| vmm.start_dirty();
    assert!(answer_with(r#"{"fd":0,"length":8}"#, &[&file], dirty).contains("needs"));
    let regions = |regions: &str| format!(r#"{{"generation":1,"regions":[{regions}]}}"#);
    let layout = |vmm: &mut RemoteVmm| vmm.memory_layout().map(drop);
    let a = r#"{"id":0,"gpa":0,"size":8192,"page_size":4096}"#;
    for (other, why) in [
        (r#"{"id":1,"gpa":4096,"size":4096,"page_size":4096}"#, "overlap"),
        (r#"{"id":0,"gpa":65536,"size":4096,"page_size":4096}"#, "twice"),
        (r#"{"id":1,"gpa":65536,"size":100,"page_size":4096}"#, "whole pages"),
        (r#"{"id":1,"gpa":65536,"size":4096,"page_size":1000}"#, "pages of"),
        (r#"{"id":1,"gpa":18446744073709547520,"size":8192,"page_size":4096}"#, "wraps"),
    ] {
        let message = answer_with(&regions(&format!("{a},{other}")), &[], layout);
        assert!(message.contains(why), "{message}");
    }
}

#[test]
fn descriptors_stay_with_their_line() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let (mut a, mut b) = (LineChannel::new(ours), LineChannel::new(theirs));
    let file = SharedMemory::create("one", 4096).unwrap();
    a.send(&1, &[], deadline).unwrap();
    a.send(&2, &[file.fd(), file.fd()], deadline).unwrap();
    a.send(&3, &[file.fd()], deadline).unwrap();
    let counts: Vec<_> = (0..3).map(|_| b.receive(deadline).unwrap().fds.len()).collect();
    assert_eq!(counts, [0, 2, 1]);
    let many = vec![file.fd(); MAX_FDS + 1];
    assert!(matches!(a.send(&4, &many, deadline), Err(WireError::TooManyFds)));
}

// VMM-NO-DATA-IN-JSON, VMM-ONE-ANSWER
#[test]
fn the_documented_exchange_is_what_happens() {
    let text = include_str!("../../../../docs/vmm-protocol.md");
    let mut double = Double::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || serve(&mut double, theirs, "double"));
    let mut channel = LineChannel::new(ours);
    let deadline = Instant::now() + Duration::from_secs(20);
    let content = SharedMemory::create("record", 4096).unwrap();
    let split = |line: &str| match line.split_once(" + ") {
        Some((json, count)) => (json.to_owned(), count.strip_suffix(" fd").unwrap().parse().unwrap()),
        None => (line.to_owned(), 0_usize),
    };
    let mut exchanges = 0;
    for line in text.lines() {
        if let Some(request) = line.strip_prefix("> ") {
            let (json, fds) = split(request);
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            channel.send(&json, &vec![content.fd(); fds], deadline).unwrap();
        } else if let Some(answer) = line.strip_prefix("< ") {
            let got = channel.receive(deadline).unwrap();
            assert_eq!((String::from_utf8(got.text).unwrap(), got.fds.len()), split(answer));
            exchanges += 1;
        }
    }
    assert_eq!(exchanges, 14);
    drop(channel);
    assert!(matches!(thread.join().unwrap(), ServeEnd::Closed { outcome: Some(_) }));
}

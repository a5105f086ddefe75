//! The events that QEMU's users know: every name, with its fields, from a migration of a v1 and a v2
//! device. Alone in its process, because workers' events reach only a subscriber of the whole process.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod fakes;

use airlift::core::{DeviceId, MigrationDevice};
use airlift::{MachineRecord, RecordOwner};
use fakes::FakeDevice;
use fakes::sides::{Sides, assert_completed};
use fakes::v1::{Region, bytes};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// An event: its name, level and fields.
#[derive(Clone, Debug)]
struct Seen {
    name: &'static str,
    level: Level,
    fields: BTreeMap<&'static str, String>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}").trim_matches('"').to_owned());
    }
}

/// Keeps every event.
#[derive(Clone, Default)]
struct Keep(Arc<Mutex<Vec<Seen>>>);

impl Subscriber for Keep {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let (name, level) = (event.metadata().name(), *event.metadata().level());
        let mut seen = Seen { name, level, fields: BTreeMap::new() };
        event.record(&mut seen);
        self.0.lock().unwrap().push(seen);
    }
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

/// What comes of both devices: name, fields beside the device, level.
const BOTH: [(&str, &[&str], Level); 15] = [
    ("vfio_migration_probe", &["interface"], Level::DEBUG),
    ("vfio_migration_set_state", &["from", "state", "took_us"], Level::DEBUG),
    ("vfio_vmstate_change", &["running", "reason", "dev_state"], Level::DEBUG),
    ("vfio_save_setup", &["precopy"], Level::DEBUG),
    ("vfio_save_buffer", &["data_size"], Level::TRACE),
    (
        "vfio_state_pending_estimate",
        &["precopy", "postcopy", "precopy_init_size", "precopy_dirty_size"],
        Level::TRACE,
    ),
    (
        "vfio_state_pending_exact",
        &["precopy", "postcopy", "precopy_init_size", "precopy_dirty_size"],
        Level::TRACE,
    ),
    ("vfio_save_iterate", &["data_size", "precopy_init_size", "precopy_dirty_size"], Level::TRACE),
    ("vfio_save_complete_precopy", &["precopy_bytes", "stop_copy_bytes", "ret"], Level::DEBUG),
    ("vfio_save_device_config_state", &["data_size"], Level::DEBUG),
    ("vfio_save_cleanup", &[], Level::DEBUG),
    ("vfio_load_state", &["data"], Level::TRACE),
    ("vfio_load_state_device_data", &["data_size"], Level::TRACE),
    ("vfio_load_device_config_state", &["data_size"], Level::DEBUG),
    ("vfio_load_cleanup", &[], Level::DEBUG),
];

/// What comes of the device of v1 alone.
const V1: [(&str, &[&str]); 5] = [
    ("vfio_migration_probe", &["data_section"]),
    ("vfio_update_pending", &["pending"]),
    ("vfio_save_pending", &["precopy", "postcopy", "compatible"]),
    ("vfio_save_buffer", &["data_offset", "data_size", "pending"]),
    ("vfio_load_state_device_data", &["data_offset", "data_size"]),
];

#[test]
fn every_event_comes_with_its_fields_for_v1_and_for_v2() {
    let keep = Keep::default();
    tracing::subscriber::set_global_default(keep.clone()).unwrap();
    let old = Region::new(4096).with(vec![bytes(1, 3000)], vec![bytes(2, 500)]);
    let new = Region::new(1024);
    let devices = |region: &Region| -> Vec<Box<dyn MigrationDevice>> {
        vec![Box::new(region.device("old0", false)), Box::new(FakeDevice::new())]
    };
    let mut sides = Sides::new();
    sides.source.assume_no_peer_dma = true;
    let config = |id: &str| MachineRecord {
        owner: RecordOwner::Device(DeviceId::new(id).unwrap()),
        name: "config".into(),
        data: b"a secret".to_vec(),
    };
    sides.from.records = vec![config("old0"), config("nic0")];
    assert_completed(&sides.migrate(devices(&old), devices(&new)));
    let seen = keep.0.lock().unwrap().clone();

    let of = |name: &str, device: &str| -> Vec<Seen> {
        let matches = |s: &&Seen| s.name == name && s.fields.get("device").is_some_and(|d| d == device);
        seen.iter().filter(matches).cloned().collect()
    };
    for device in ["old0", "nic0"] {
        for (name, fields, level) in BOTH {
            let events = of(name, device);
            assert!(!events.is_empty(), "{device} has no {name}");
            for event in &events {
                let missing: Vec<_> = fields.iter().filter(|f| !event.fields.contains_key(**f)).collect();
                assert!(missing.is_empty(), "{event:?} has no {missing:?}");
                assert_eq!(event.level, level, "{event:?}");
            }
        }
    }
    for (name, fields) in V1 {
        let events = of(name, "old0");
        let good = events.iter().all(|e| fields.iter().all(|f| e.fields.contains_key(f)));
        assert!(good && !events.is_empty(), "{name}: {events:?}");
    }

    // The values are what happened.
    let values = |name: &str, device: &str, field: &str| -> Vec<String> {
        of(name, device).iter().filter_map(|e| e.fields.get(field).cloned()).collect()
    };
    assert_eq!(values("vfio_save_buffer", "old0", "data_size"), ["3000", "500"]);
    assert_eq!(values("vfio_save_buffer", "old0", "data_offset"), ["32", "32"]);
    assert_eq!(values("vfio_load_state_device_data", "old0", "data_size"), ["1024", "1024", "952", "500"]);
    assert_eq!(values("vfio_load_state_device_data", "nic0", "data_size"), ["10", "1000"]);
    assert_eq!(values("vfio_load_state_device_data", "nic0", "data_offset"), Vec::<String>::new());
    assert_eq!(values("vfio_save_complete_precopy", "old0", "stop_copy_bytes"), ["500"]);
    assert_eq!(values("vfio_save_setup", "nic0", "device").len(), 1);
    assert_eq!(values("vfio_save_cleanup", "old0", "device").len(), 1);
    assert_eq!(values("vfio_load_cleanup", "nic0", "device").len(), 1);
    let mut states = values("vfio_migration_set_state", "old0", "state");
    states.sort();
    assert_eq!(states, ["PRE_COPY", "RESUMING", "RUNNING", "STOP", "STOP", "STOP_COPY"]);

    // The device of v2 is prepared, on both sides; v1 knows no P2P.
    let told = |name: &str, device: &str| {
        let text = |e: &Seen| ["running", "reason", "dev_state"].map(|f| e.fields[f].clone()).join(" ");
        of(name, device).iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(
        told("vfio_vmstate_change_prepare", "nic0"),
        ["false finish-migrate PRE_COPY_P2P", "true running RUNNING_P2P"]
    );
    assert_eq!(told("vfio_vmstate_change_prepare", "old0"), Vec::<String>::new());
    for device in ["old0", "nic0"] {
        let expected = ["false finish-migrate STOP_COPY", "true running RUNNING"];
        assert_eq!(told("vfio_vmstate_change", device), expected, "{device}");
    }
    let tags: BTreeSet<_> = values("vfio_load_state", "old0", "data").into_iter().collect();
    let expected = [2, 3, 4, 5].map(|n: u64| format!("{:#x}", 0xffff_ffff_ef10_0000 + n));
    let more = format!("{:#x}", 0xffff_ffff_ef10_0001_u64);
    assert_eq!(tags, expected.into_iter().chain([more]).collect());

    // Once for a phase, of each side.
    let phases = |side: &str| {
        let matches = |s: &&Seen| {
            s.name == "vfio_migration_state_notifier"
                && s.level == Level::INFO
                && s.fields.get("side").is_some_and(|s| s == side)
        };
        seen.iter().filter(matches).map(|s| s.fields["state"].clone()).collect::<Vec<_>>()
    };
    assert!(phases("source").contains(&"stop-copy".to_owned()), "{:?}", phases("source"));
    assert!(phases("destination").contains(&"resuming".to_owned()), "{:?}", phases("destination"));

    // Nobody's state is in a log.
    for event in &seen {
        assert!(event.fields.values().all(|v| !v.contains("secret")), "{event:?}");
    }
}

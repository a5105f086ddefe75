//! `airlift probe` of what the test VM has.

use crate::support::{Mdev, start};
use airlift_core::{DeviceState, MigrationDevice};
use serde_json::Value;
use std::os::fd::AsRawFd;

fn probe(devices: &[&str]) -> (Vec<Value>, Value, i32) {
    let (mut lines, code) = start(&[&["probe"], devices].concat()).collect();
    let result = lines.pop().unwrap();
    assert_eq!(result["event"], "result");
    (lines, result, code)
}

fn one(device: &str) -> (Value, i32) {
    let (mut found, _, code) = probe(&[device]);
    assert_eq!(found.len(), 1, "{found:?}");
    (found.remove(0), code)
}

fn has(list: &Value, name: &str) -> bool {
    list.as_array().unwrap().iter().any(|entry| entry == name)
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn the_sample_driver_can_do_everything() {
    let mdev = Mdev::mtty(2);
    let (found, code) = one(&mdev.address());
    assert_eq!(code, 0, "{found:#}");
    assert_eq!((&found["migratable"], &found["state"]), (&true.into(), &"RUNNING".into()), "{found:#}");
    assert_eq!(
        (&found["p2p"], &found["precopy"], &found["dma_logging"]),
        (&true.into(), &true.into(), &true.into())
    );
    assert_eq!(
        (&found["kernel"]["driver"], &found["kernel"]["mdev_type"]),
        (&"mtty".into(), &"mtty-2".into())
    );
    for feature in ["MIGRATION", "MIG_DEVICE_STATE", "DMA_LOGGING_START", "MIG_DATA_SIZE"] {
        assert!(has(&found["features"], feature), "{feature}: {found:#}");
    }
    assert_eq!(found["identity"]["facts"]["pci-vendor"], "0x4348", "{found:#}");
    assert_eq!(found["kernel"]["dirty"]["tracker"], "device", "{found:#}");
    assert!(!found["kernel"]["dirty"]["reason"].as_str().unwrap().is_empty());
    assert_eq!(found["missing"].as_array().unwrap().len(), 0, "{found:#}");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_a_device_lacks_is_said_with_what_follows_from_it() {
    let mdev = Mdev::ours("v2-plain", 4096);
    let (found, code) = one(&mdev.address());
    assert_eq!(code, 0);
    assert_eq!(found["migratable"], true);
    let missing: Vec<&str> =
        found["missing"].as_array().unwrap().iter().filter_map(|m| m["what"].as_str()).collect();
    assert_eq!(missing, ["the P2P states", "the PRE_COPY states"]);
    // The same with REINIT only where the kernel has it.
    let (found, _) = one(&Mdev::ours("v2", 4096).address());
    assert_eq!(found["reinit"], has(&found["features"], "MIG_PRECOPY_INFOv2"), "{found:#}");
    assert_eq!(found["missing"].as_array().unwrap().len(), 0, "{found:#}");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_an_earlier_migration_left_is_said_and_not_changed() {
    let mdev = Mdev::lasting("v2", 4096);
    mdev.open().set_state(DeviceState::Stop).unwrap();
    let before = mdev.touched();
    let (found, _) = one(&mdev.address());
    assert_eq!(found["state"], "STOP");
    assert!(found["missing"][0]["advice"].as_str().unwrap().contains("airlift resolve"), "{found:#}");
    assert_eq!(mdev.touched(), before);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_without_migration_says_why_and_what_to_do() {
    let (found, code) = one("pci:0000:00:05.0");
    assert_eq!(code, 0, "that is an answer: {found:#}");
    assert_eq!(found["migratable"], false);
    assert_eq!(found["error"], Value::Null);
    assert_eq!(found["kernel"]["driver"], "vfio-pci");
    assert!(found["not_migratable"].as_str().unwrap().contains("no migration"), "{found:#}");
    let advice = found["missing"][0]["advice"].as_str().unwrap();
    assert!(advice.contains("vfio-pci itself cannot migrate"), "{found:#}");
}

// V1-REGION
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_of_interface_v1_shows_its_region() {
    let mdev = Mdev::ours("v1", 4096);
    mdev.set("v1_section", "32768");
    mdev.set("v1_map", "sparse");
    let (found, code) = one(&mdev.address());
    assert_eq!(code, 0, "{found:#}");
    assert_eq!((&found["migratable"], &found["interface"]), (&true.into(), &"v1".into()), "{found:#}");
    assert_eq!((&found["state"], &found["precopy"]), (&"RUNNING".into(), &true.into()), "{found:#}");
    let region = &found["migration_region"];
    assert_eq!((&region["index"], &region["data_section"]), (&9.into(), &32768.into()), "{found:#}");
    assert_eq!((&region["size"], &region["not_mapped"]), (&(4096 + 32768).into(), &Value::Null));
    // In the driver's order, behind the page of the fields.
    let offsets = |at: usize| region["mapped"][at]["offset"].as_u64().unwrap();
    assert_eq!((offsets(0), offsets(1)), (4096 + 3 * 8192, 4096 + 8192), "{found:#}");
    let missing = found["missing"].as_array().unwrap();
    let advice = missing.iter().find(|m| m["what"] == "the P2P states").unwrap()["advice"].as_str().unwrap();
    assert!(advice.contains("--assume-no-peer-dma"), "{found:#}");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn who_holds_a_device_is_named() {
    let mdev = Mdev::ours("v2", 4096);
    let device = mdev.open();
    let (found, code) = one(&mdev.address());
    assert_eq!((&found["migratable"], code), (&false.into(), 1), "{found:#}");
    let message = found["error"]["message"].as_str().unwrap();
    assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
    assert!(found["error"]["advice"].as_str().unwrap().contains("end that process"), "{found:#}");
    assert_eq!(found["error"]["errno"]["name"], "EBUSY", "{found:#}");
    // Handed in, it can be asked.
    let fd = rustix::io::dup(device.fd()).unwrap();
    let (found, code) = one(&format!("fd:{}", fd.as_raw_fd()));
    assert_eq!((&found["migratable"], code), (&true.into(), 0), "{found:#}");
    assert_eq!(found["kernel"]["attachment"], "given");
    drop(fd);
    drop(device);
    let (found, code) = one(&mdev.address());
    assert_eq!((&found["migratable"], code), (&true.into(), 0), "it is free now: {found:#}");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn asked_nothing_it_tells_of_the_host_and_of_every_device() {
    let mdev = Mdev::ours("v2", 4096);
    let held = mdev.open();
    let (found, result, code) = probe(&[]);
    assert_eq!(
        (code, &result["outcome"]),
        (0, &"completed".into()),
        "a busy device is an answer: {result:#}"
    );
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(found[0]["event"], "host");
    assert_eq!(found[0]["kernel"], release.trim());
    assert_eq!(
        (&found[0]["iommufd"]["found"], &found[0]["container"]["found"]),
        (&"ready".into(), &"ready".into())
    );
    assert!(found[0]["iommu_groups"].as_u64().unwrap() >= 2, "{:#}", found[0]);
    let device = |name: &str| found.iter().find(|d| d["device"] == name).unwrap_or_else(|| panic!("{name}"));
    for (name, migratable) in [
        (mdev.address().as_str(), false),
        ("mdev:00000000-0000-0000-0000-000000000001", true),
        ("mdev:00000000-0000-0000-0000-0000000000b1", false),
        ("pci:0000:00:05.0", false),
        ("pci:0000:00:06.0", false),
    ] {
        assert_eq!(device(name)["migratable"], migratable, "{:#}", device(name));
    }
    assert!(device(&mdev.address())["error"]["message"].as_str().unwrap().contains("process"));
    drop(held);
}

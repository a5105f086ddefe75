//! Devices of interface v1, alone and beside those of v2: what completes, and what is refused before
//! any device is touched.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod common;

use common::{Process, demo};
use serde_json::Value;
use std::path::Path;

#[test]
fn devices_of_interface_v1_move_verified_and_the_declaration_is_on_record() {
    for (interface, of) in [("v1", ["v1", "v1"]), ("mixed", ["v1", "v2"])] {
        let demo = demo(&["--interface", interface]);
        demo.assert_completed();
        let devices = demo.result["devices"].as_array().unwrap();
        let interfaces: Vec<_> = devices.iter().map(|d| d["interface"].as_str().unwrap()).collect();
        assert_eq!(interfaces, of);
        assert!(demo.result["notes"].to_string().contains("--assume-no-peer-dma"), "{}", demo.story());
        for device in devices {
            assert!(device["precopy_bytes"].as_u64().unwrap() >= 4 << 20, "{}", demo.story());
            let arcs = device["transitions"].to_string();
            assert!(!arcs.contains("P2P") || device["interface"] == "v2", "{arcs}");
        }
    }
}

// V1-AREAS, V1-ROUNDS
#[test]
fn every_mapping_and_sections_of_other_sizes_give_the_same_device() {
    // Smaller, and no multiple of a page; smaller; larger than the source's.
    for (mapping, odd) in [("trapped", "10007"), ("mapped", "10007"), ("sparse", "50021")] {
        for section in [odd, "64KiB", "4MiB"] {
            let section = ["--device-v1-destination-section", section];
            demo(&[&["--interface", "v1", "--device-v1-mapping", mapping], &section[..]].concat())
                .assert_completed();
        }
    }
    demo(&["--interface", "v1", "--devices", "1", "--device-v1-section", "4999"]).assert_completed();
}

// V1-CHUNK, V1-WHOLE, I11
#[test]
fn a_device_that_takes_only_whole_transactions_gets_them_or_nothing_is_begun() {
    let whole = ["--interface", "v1", "--device-v1-whole"];
    demo(&whole).assert_completed();
    let refused = demo(&[&whole[..], &["--device-v1-destination-section", "512KiB"]].concat());
    assert_eq!(
        (refused.code, &refused.result["outcome"]),
        (4, &"incompatible".into()),
        "{}",
        refused.story()
    );
    let findings = refused.result["compatibility"]["findings"].as_array().unwrap();
    let of = |id: &str| {
        findings.iter().find(|f| f["device"] == id && f["field"] == "capabilities.largest-transaction")
    };
    let finding = of("dev0").unwrap();
    assert_eq!(finding["severity"], "refusal", "{finding:#}");
    assert_eq!((&finding["source"], &finding["destination"]), (&"1048576".into(), &"524288".into()));
    assert!(of("dev1").is_some(), "every device is named");
    assert!(refused.arcs("source", "dev0").is_empty(), "{}", refused.story());
    assert!(refused.arcs("destination", "dev0").is_empty(), "{}", refused.story());
    assert_eq!(refused.result["source_running"], true);
}

/// A device of its own, and where it is.
fn device(path: &Path, more: &[&str]) -> (Process, String) {
    let args = ["soft-device", "--socket", path.to_str().unwrap(), "--state-size", "1MiB"];
    let process = Process::start(&[&args[..], more].concat());
    let uri = process.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    (process, uri)
}

/// Sends devices without a guest; both sides' results and exit codes.
fn migrate(source: &[&str], destination: &[&str]) -> ((Value, i32), (Value, i32)) {
    let named = |uris: &[&str]| {
        let each = uris.iter().enumerate();
        each.flat_map(|(n, uri)| ["--device".to_owned(), format!("d{n}={uri}")]).collect::<Vec<_>>()
    };
    let (here, there) = (named(source), named(destination));
    let all = |subcommand, devices: &[String], uri: &str| {
        let mut args = vec![subcommand, "--no-guest"];
        args.extend(devices.iter().map(String::as_str));
        args.push(uri);
        Process::start(&args)
    };
    let receive = all("receive", &there, "tcp:127.0.0.1:0");
    let uri = receive.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    let sent = all("send", &here, &uri).finish();
    (sent, receive.finish())
}

fn finding<'a>(result: &'a Value, field: &str) -> &'a Value {
    let findings = result["compatibility"]["findings"].as_array().unwrap();
    findings.iter().find(|f| f["field"] == field).unwrap_or_else(|| panic!("no {field}: {result:#}"))
}

// V2-P2P-BARRIER
#[test]
fn several_devices_of_interface_v1_need_the_declaration_and_the_refusal_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let v1 = ["--interface", "v1"];
    let all: Vec<_> = ["a", "b", "c", "d"].map(|name| device(&dir.path().join(name), &v1)).into();
    let uri = |n: usize| all[n].1.as_str();
    let ((sent, code), _) = migrate(&[uri(0), uri(1)], &[uri(2), uri(3)]);
    assert_eq!(code, 4, "{sent:#}");
    let peer = finding(&sent, "peer-dma");
    let text = format!("{} {}", peer["message"], peer["advice"]);
    for words in ["d0, d1", "interface v1", "--assume-no-peer-dma"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // One alone needs nothing.
    let ((sent, code), (_, there)) = migrate(&[uri(0)], &[uri(2)]);
    assert_eq!((code, there), (0, 0), "{sent:#}");
}

// V1-MIX
#[test]
fn data_of_the_other_interface_is_refused_by_name_unless_the_device_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in [("v1", "v2"), ("v2", "v1")] {
        let at = |name: &str| dir.path().join(format!("{from}-{name}"));
        let (_here, source) = device(&at("source"), &["--interface", from]);
        let (there, destination) = device(&at("plain"), &["--interface", to, "--seed", "9"]);
        let ((sent, code), _) = migrate(&[&source], &[&destination]);
        assert_eq!(code, 4, "{sent:#}");
        let interface = finding(&sent, "interface");
        assert_eq!(
            (&interface["source"], &interface["destination"], &interface["severity"]),
            (&from.into(), &to.into(), &"refusal".into())
        );
        drop(there);
        let reads = ["--interface", to, "--seed", "9", "--device-accept-other-interface"];
        let (there, destination) = device(&at("reads"), &reads);
        let ((sent, code), (received, ended)) = migrate(&[&source], &[&destination]);
        assert_eq!((code, ended), (0, 0), "{from} to {to}: {sent:#} {received:#}");
        assert_eq!(finding(&sent, "interface")["severity"], "info");
        assert_eq!(there.wait_for("loaded")["verified"], true, "{from} to {to}");
    }
}

// V1-REGION
#[test]
fn a_probe_shows_the_migration_region() {
    let dir = tempfile::tempdir().unwrap();
    let v1 = ["--interface", "v1", "--device-v1-section", "64KiB", "--device-v1-mapping", "sparse"];
    let (_device, uri) = device(&dir.path().join("d"), &v1);
    let found = Process::start(&["probe", &uri]).wait_for("device");
    assert_eq!((&found["interface"], &found["migratable"]), (&"v1".into(), &true.into()), "{found:#}");
    let region = &found["migration_region"];
    assert_eq!((&region["index"], &region["size"]), (&9.into(), &(4096 + 65536).into()), "{found:#}");
    assert_eq!(region["data_section"], 65536);
    let number = |v: &Value| v.as_u64().unwrap() / 4096;
    let mapped = region["mapped"].as_array().unwrap();
    let areas: Vec<_> = mapped.iter().map(|a| (number(&a["offset"]), number(&a["length"]))).collect();
    assert_eq!(areas, [(7, 3), (2, 1), (4, 2)], "pages, in the device's order");
    assert_eq!(region["not_mapped"], Value::Null);
    let missing: Vec<_> = found["missing"].as_array().unwrap().iter().map(|m| m["what"].clone()).collect();
    assert_eq!(missing, ["the P2P states"], "what is of interface v2 alone is not missing");
    let output = std::process::Command::new(common::AIRLIFT).args(["probe", &uri]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for words in ["interface v1", "region 9, 69632 bytes", "65536 bytes of data section", "mapped in part"] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn the_log_has_the_names_that_users_of_the_interface_know() {
    let dir = tempfile::tempdir().unwrap();
    let v1 = ["--interface", "v1"];
    let (_here, source) = device(&dir.path().join("here"), &v1);
    let (_there, destination) =
        device(&dir.path().join("there"), &["--interface", "v1", "--device-v1-section", "10007"]);
    let logged = |subcommand: &str, uri: &str, device: &str| {
        let mut command = std::process::Command::new(common::AIRLIFT);
        command.args([subcommand, "--no-guest", "--device", &format!("d={device}"), uri]);
        command.env("AIRLIFT_LOG", "trace").stderr(std::process::Stdio::piped());
        Process::spawn(command)
    };
    let mut receive = logged("receive", "tcp:127.0.0.1:0", &destination);
    let read = |mut stderr: std::process::ChildStderr| {
        std::thread::spawn(move || std::io::read_to_string(&mut stderr).unwrap())
    };
    let theirs = read(receive.stderr());
    let uri = receive.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    let mut send = logged("send", &uri, &source);
    let ours = read(send.stderr());
    assert_eq!((send.finish().1, receive.finish().1), (0, 0));
    let (ours, theirs) = (ours.join().unwrap(), theirs.join().unwrap());
    for line in [
        "vfio_migration_probe: device=d interface=v1 data_section=1048576",
        "vfio_update_pending: device=d pending=",
        "vfio_save_pending: device=d precopy=",
        "vfio_save_buffer: device=d data_offset=4096 data_size=",
        "vfio_migration_set_state: device=d from=RUNNING state=PRE_COPY",
    ] {
        assert!(ours.contains(line), "{line} is missing:\n{ours}");
    }
    // No round is larger than the section.
    let round = "vfio_load_state_device_data: device=d data_offset=4096 data_size=10007";
    assert!(theirs.contains(round), "{round} is missing:\n{theirs}");
}

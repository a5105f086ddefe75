//! The subcommands on their own: devices without a guest, probe, resolve, and what they refuse.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod common;

use airlift::FileJournal;
use airlift_core::commit::{Durability, Journal, Opened, Record, RecordKind, SessionId};
use airlift_core::{DeviceId, DeviceState, MigrationDevice, Side};
use airlift_vfio_user::{ClientOptions, VfioUserDevice};
use common::{AIRLIFT, Process};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn run(args: &[&str]) -> (Value, i32) {
    Process::start(args).finish()
}

fn device(path: &Path, seed: &str) -> (Process, String) {
    let socket = path.to_str().unwrap();
    let args = ["soft-device", "--socket", socket, "--state-size", "1MiB", "--seed", seed];
    let process = Process::start(&args);
    let uri = process.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    (process, uri)
}

#[test]
fn a_device_alone_is_sent_and_received_without_a_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (source, from) = device(&dir.path().join("source.sock"), "1");
    let (destination, to) = device(&dir.path().join("destination.sock"), "2");
    let journals = |side: &str| dir.path().join(side).to_str().unwrap().to_owned();

    let (receive, journal) = (format!("nic={to}"), journals("there"));
    let receive = Process::start(&[
        "receive",
        "--no-guest",
        "--device",
        &receive,
        "--journal",
        &journal,
        "tcp:127.0.0.1:0",
    ]);
    let uri = receive.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    let (named, journal) = (format!("nic={from}"), journals("here"));
    let send = ["send", "--no-guest", "--device", &named, "--journal", &journal, &uri];
    let (sent, code) = run(&send);
    assert_eq!((sent["outcome"].as_str(), code), (Some("completed"), 0), "{sent:#}");
    let (received, code) = receive.finish();
    assert_eq!((received["outcome"].as_str(), code), (Some("completed"), 0), "{received:#}");
    let stopped = source.wait_for("stopped");
    let loaded = destination.wait_for("loaded");
    assert_eq!(loaded["verified"], true);
    assert_eq!(loaded["digest"], stopped["digest"]);

    // The journal of a migration that is over is not written over.
    let (again, code) = run(&send);
    assert_eq!(code, 1);
    assert_eq!(again["error"]["errno"]["name"], "EEXIST", "{again:#}");
    assert!(again["error"]["advice"].as_str().unwrap().contains("airlift resolve"), "{again:#}");

    // And it says that the guest is gone from here.
    let (resolved, code) = run(&["resolve", "--journal", &journal, "--device", &named]);
    assert_eq!((resolved["outcome"].as_str(), code), (Some("completed"), 0), "{resolved:#}");
    assert_eq!(resolved["destination_running"], true);
}

#[test]
fn memory_in_files_moves_with_a_device_and_is_paired_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (_source, from) = device(&dir.path().join("source.sock"), "1");
    let (_destination, to) = device(&dir.path().join("destination.sock"), "2");
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut content: Vec<u8> = (0..(1_u32 << 20)).flat_map(u32::to_le_bytes).collect();
    content[4096..8192].fill(0);
    std::fs::write(file("low"), &content).unwrap();
    std::fs::write(file("high"), vec![9; 8192]).unwrap();
    // What was there before must not shine through zero pages.
    std::fs::write(file("low.there"), vec![0xff; content.len()]).unwrap();
    let migrate = |high: &str| {
        let (low_there, high_there) = (file("low.there"), file("high.there"));
        let receive = Process::start(&[
            "receive",
            "--no-guest",
            "--device",
            &format!("nic={to}"),
            "--memory",
            &format!("{high}=file:{high_there},gpa=0x1000000,size=4096"),
            "--memory",
            &format!("low=file:{low_there}"),
            "tcp:127.0.0.1:0",
        ]);
        let uri = receive.wait_for("listening")["uri"].as_str().unwrap().to_owned();
        let (low, high) = (file("low"), file("high"));
        let sent = run(&[
            "send",
            "--no-guest",
            "--device",
            &format!("nic={from}"),
            "--memory",
            &format!("low=file:{low}"),
            "--memory",
            &format!("high=file:{high},gpa=16MiB,size=4096,offset=4096"),
            &uri,
        ]);
        (sent, receive.finish())
    };
    let ((refused, code), _) = migrate("top");
    assert_eq!(code, 4, "{refused:#}");
    let fields: Vec<_> =
        refused["compatibility"]["findings"].as_array().unwrap().iter().map(|f| f["field"].clone()).collect();
    assert!(fields.contains(&"memory.region[high]".into()), "{fields:?}");

    let ((sent, code), (received, there)) = migrate("high");
    assert_eq!((code, there), (0, 0), "{sent:#} {received:#}");
    assert_eq!(sent["memory"]["bytes_total"], content.len() + 4096);
    assert!(std::fs::read(file("low.there")).unwrap() == content, "the memory differs");
    assert_eq!(std::fs::read(file("high.there")).unwrap(), vec![9; 4096]);
}

#[test]
fn a_probe_says_what_a_device_can_do_and_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("d.sock");
    let args = ["soft-device", "--socket", socket.to_str().unwrap(), "--state-size", "1MiB"];
    let process = Process::start(&[&args[..], &["--device-no-p2p", "--device-no-precopy"]].concat());
    let uri = process.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    let probe = Process::start(&["probe", &uri]);
    let found = probe.wait_for("device");
    assert_eq!(found["migratable"], true, "{found:#}");
    assert_eq!(found["state"], "RUNNING");
    assert_eq!((&found["p2p"], &found["precopy"]), (&false.into(), &false.into()));
    assert_eq!(found["states"].as_array().unwrap().len(), 5, "{found:#}");
    let missing: Vec<&str> =
        found["missing"].as_array().unwrap().iter().filter_map(|m| m["what"].as_str()).collect();
    assert_eq!(missing, ["the P2P states", "the PRE_COPY states"]);
    assert_eq!(probe.finish().1, 0);
    let text = Command::new(AIRLIFT).args(["probe", &uri]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("It can be migrated: interface v2"), "{text}");
    assert!(text.contains("Missing: the P2P states: it is refused"), "{text}");
}

#[test]
fn what_is_not_there_is_named_with_advice() {
    let (nobody, code) = run(&["probe", "vfio-user:/nowhere/d.sock"]);
    assert_eq!((nobody["outcome"].as_str(), code), (Some("aborted"), 1));

    let dir = tempfile::tempdir().unwrap();
    let journal = dir.path().join("j");
    let journal = journal.to_str().unwrap();
    let (refused, code) =
        run(&["send", "--vmm", "unix:/nowhere/v.sock", "--journal", journal, "tcp:127.0.0.1:1"]);
    assert_eq!(code, 1);
    assert_eq!(refused["error"]["errno"]["name"], "ENOENT", "{refused:#}");
    assert!(refused["error"]["advice"].as_str().unwrap().contains("start the VMM first"));
    assert_eq!(refused["source_running"], "unknown");
}

#[test]
fn a_destination_that_nobody_listens_at_leaves_the_device_running() {
    let dir = tempfile::tempdir().unwrap();
    let (_device, uri) = device(&dir.path().join("d.sock"), "1");
    let named = format!("nic={uri}");
    let journal = dir.path().join("j");
    let gone = format!("unix:{}", dir.path().join("nobody.sock").display());
    let (refused, code) =
        run(&["send", "--no-guest", "--device", &named, "--journal", journal.to_str().unwrap(), &gone]);
    assert_eq!((refused["outcome"].as_str(), code), (Some("aborted"), 1), "{refused:#}");
    assert_eq!(refused["source_running"], true, "{refused:#}");
    assert_eq!(refused["error"]["phase"], "connect", "{refused:#}");
}

#[test]
fn without_a_journal_there_is_doubt_and_nothing_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let (_device, uri) = device(&dir.path().join("d.sock"), "1");
    stop(&uri);
    let empty = dir.path().to_str().unwrap();
    let (resolved, code) = run(&["resolve", "--journal", empty, "--device", &format!("nic={uri}")]);
    assert_eq!((resolved["outcome"].as_str(), code), (Some("in_doubt"), 3), "{resolved:#}");
    assert_eq!(state_of(&uri), "STOP");
}

/// Leaves the device in STOP, as a sender that was killed in the switchover does.
fn stop(uri: &str) {
    let path = uri.strip_prefix("vfio-user:").unwrap();
    let id = DeviceId::new("nic").unwrap();
    let mut device = VfioUserDevice::connect(id, path, ClientOptions::default()).unwrap();
    device.set_state(DeviceState::Stop).unwrap();
}

fn state_of(uri: &str) -> Value {
    // The server takes the next client when it has seen the last one go.
    loop {
        let probe = Process::start(&["probe", uri]);
        let found = probe.wait_for("device");
        if found["error"].is_null() {
            return found["state"].clone();
        }
    }
}

/// A source's journal with these records behind OPENED.
fn journal(dir: &Path, records: &[Record]) -> String {
    std::fs::create_dir(dir).unwrap();
    let mut journal = FileJournal::create(dir.join("source.journal"), Durability::Process).unwrap();
    let opened = Opened {
        session: SessionId(7),
        side: Side::Source,
        boot: airlift::kernel_boot_id(),
        durability: Durability::Process,
        peer: "tcp:192.0.2.1:4444".into(),
        devices: vec![(DeviceId::new("nic").unwrap(), DeviceState::Running)],
    };
    journal.append(&Record::Opened(Box::new(opened))).unwrap();
    for record in records {
        journal.append(record).unwrap();
    }
    dir.to_str().unwrap().to_owned()
}

#[test]
fn without_commit_a_source_may_run_its_guest_again() {
    let dir = tempfile::tempdir().unwrap();
    let (_device, uri) = device(&dir.path().join("d.sock"), "1");
    stop(&uri);
    assert_eq!(state_of(&uri), "STOP");
    let journal = journal(&dir.path().join("j"), &[]);
    let resolve = ["resolve", "--journal", &journal, "--device", &format!("nic={uri}")];
    let (resolved, code) = run(&resolve);
    assert_eq!((resolved["outcome"].as_str(), code), (Some("completed"), 0), "{resolved:#}");
    assert_eq!(
        (&resolved["source_running"], &resolved["destination_running"]),
        (&true.into(), &false.into())
    );
    assert_eq!(state_of(&uri), "RUNNING");
    // It is on record, and asking again changes nothing.
    let records = FileJournal::read(Path::new(&journal).join("source.journal")).unwrap();
    assert_eq!(records.last().unwrap().kind(), RecordKind::Aborted);
    assert_eq!(run(&resolve).1, 0);
}

#[test]
fn after_commit_a_source_runs_again_on_the_operators_word_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (_device, uri) = device(&dir.path().join("d.sock"), "1");
    stop(&uri);
    let journal = journal(&dir.path().join("j"), &[Record::Commit]);
    let named = format!("nic={uri}");
    let resolve = ["resolve", "--journal", &journal, "--device", &named];
    let (resolved, code) = run(&resolve);
    assert_eq!((resolved["outcome"].as_str(), code), (Some("in_doubt"), 3), "{resolved:#}");
    assert_eq!(
        (&resolved["source_running"], &resolved["destination_running"]),
        (&false.into(), &"unknown".into())
    );
    assert_eq!(state_of(&uri), "STOP", "nothing was started");

    let (resolved, code) = run(&[&resolve[..], &["--stay-stopped"]].concat());
    assert_eq!((resolved["outcome"].as_str(), code), (Some("completed"), 0), "{resolved:#}");
    assert_eq!(state_of(&uri), "STOP");

    let (resolved, code) = run(&[&resolve[..], &["--run-here"]].concat());
    assert_eq!((resolved["outcome"].as_str(), code), (Some("completed"), 0), "{resolved:#}");
    assert_eq!(state_of(&uri), "RUNNING");
    let records = FileJournal::read(Path::new(&journal).join("source.journal")).unwrap();
    assert_eq!(records.last().unwrap().kind(), RecordKind::RolledBack);
}

#[test]
fn a_machine_answers_report_and_check_and_ends_with_quit() {
    let dir = tempfile::tempdir().unwrap();
    let (_device, uri) = device(&dir.path().join("d.sock"), "1");
    let listen = format!("unix:{}", dir.path().join("v.sock").display());
    let named = format!("nic={uri}");
    let mut vm = Process::start(&["sim-vm", "--listen", &listen, "--device", &named, "--memory", "4MiB"]);
    vm.wait_for("listening");
    vm.tell("check");
    let check = vm.wait_for("check");
    assert_eq!((&check["running"], &check["memory_verified"]), (&true.into(), &true.into()), "{check:#}");
    assert_eq!(check["devices"][0]["id"], "nic");
    // A device in use refuses a second client, and the guest notices nothing of it.
    assert_eq!(run(&["probe", &uri]).1, 1);
    vm.tell("check");
    let check = vm.wait_for("check");
    assert_eq!(check["sequence_gaps"], 0);
    assert_eq!(check["devices"][0]["alive"], true);
    vm.tell("quit");
    assert_eq!(vm.finish().1, 0);
}

#[test]
fn wrong_arguments_give_a_result_line_too() {
    let output = Command::new(AIRLIFT).args(["demo", "--json", "--devices", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["event"], "result");
    assert_eq!(line["source_running"], "unknown");
}

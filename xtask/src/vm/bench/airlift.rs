//! One migration by the command `airlift`: two processes, one channel, every option that it does not need
//! at its default.

use super::guest::{BYTES, Guest};
use super::process::Process;
use super::{DEVICES, Place};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Migrates the device and, if it is given, the memory in the file `template`. Gives what Airlift itself
/// says about it.
pub(super) fn migrate(place: &Place, program: &str, template: Option<&Path>) -> Result<Value, String> {
    let uri = format!("unix:{}", place.socket().display());
    let arrived = place.folder.join("airlift-destination.memory");
    let _ = fs::remove_file(&arrived);
    let command = |verb: &str, device: &str, memory: Option<&Path>| {
        let mut command = Command::new(program);
        command.args([verb, &uri, "--no-guest", "--json"]);
        command.arg("--device").arg(format!("mtty=mdev:{device}"));
        if let Some(file) = memory {
            command.arg("--memory").arg(format!("ram=file:{},size={BYTES}", file.display()));
        }
        command
    };
    let mut receive = command("receive", DEVICES[1], template.map(|_| arrived.as_path()));
    // The device stays open for a command that does nothing.
    receive.args(["--then", "true"]);
    let mut destination = Process::start("airlift-receive", &mut receive, &place.folder, true)?;
    loop {
        match destination.line(place.until)? {
            Some(line) if json_of(&line)["event"] == "listening" => break,
            Some(_) => {}
            None => return Err(destination.failed("it has ended before it listened")),
        }
    }
    let mut send = command("send", DEVICES[0], template);
    let mut source = Process::start("airlift-send", &mut send, &place.folder, true)?;
    let said = result(&mut source, place);
    let received = result(&mut destination, place);
    // The source knows better what went wrong; both are ended.
    let (said, received) = match (said, received) {
        (Ok(said), Ok(received)) => (said, received),
        (Err(one), Err(other)) => return Err(format!("{one}; {other}")),
        (Err(error), _) | (_, Err(error)) => return Err(error),
    };
    if let Some(template) = template {
        Guest::identical(template, &arrived)?;
    }
    Ok(json!({
        "downtime_ms": said["downtime_ms"],
        "downtime_terms_ms": said["downtime_terms_ms"],
        "total_ms": said["total_ms"],
        "rounds": said["rounds"],
        "notes": said["notes"],
        "destination_notes": received["notes"],
        "memory": said["memory"],
    }))
}

/// The result that one side prints, if it has completed.
fn result(process: &mut Process, place: &Place) -> Result<Value, String> {
    let mut last = Value::Null;
    while let Some(line) = process.line(place.until)? {
        let event = json_of(&line);
        if event["event"] == "result" || event["event"] == "error" {
            last = event;
        }
    }
    let status = process.end(place.until)?;
    if status.success() && last["outcome"] == "completed" {
        Ok(last)
    } else {
        Err(process.failed(&format!("{status}, {last}")))
    }
}

/// A line as JSON; null if it is none.
fn json_of(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_default()
}

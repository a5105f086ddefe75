//! One migration by QEMU: two processes, one channel, every parameter of the migration at its default.

use super::guest::{BYTES, Guest};
use super::process::Process;
use super::qmp::Qmp;
use super::{DEVICES, Place};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// What SeaBIOS says when it has found nothing to boot, after which it waits.
const READY: &[u8] = b"No bootable device.";

/// One side.
#[derive(Debug)]
struct Side {
    qmp: Qmp,
    process: Process,
    memory: PathBuf,
}

/// Migrates, and gives what QEMU itself says about it. `template` is where the memory that the guest has
/// when the migration begins is kept.
pub(super) fn migrate(place: &Place, guest: &Guest, template: Option<&Path>) -> Result<Value, String> {
    let firmware = place.folder.join("firmware.log");
    let _ = fs::remove_file(&firmware);
    let mut source = Side::start(
        place,
        "qemu-source",
        DEVICES[0],
        &["-chardev", &format!("file,id=log,path={}", firmware.display())],
        place.until,
    )?;
    let mut destination = Side::start(
        place,
        "qemu-destination",
        DEVICES[1],
        &["-incoming", "defer", "-chardev", "null,id=log"],
        place.until,
    )?;
    source.process.look("SeaBIOS's last words", place.until, || {
        let said = fs::read(&firmware).ok()?;
        said.windows(READY.len()).any(|w| w == READY).then_some(())
    })?;
    guest.fill(&source.memory)?;
    if let Some(template) = template {
        fs::copy(&source.memory, template).map_err(|e| format!("{}: {e}", template.display()))?;
    }
    let uri = format!("unix:{}", place.socket().display());
    destination.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
    // The end comes as an event, so that nobody has to ask for it.
    source.qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [{ "capability": "events", "state": true }] }),
    )?;
    source.qmp.execute("migrate", json!({ "uri": uri }))?;
    let status = source.qmp.event("the migration's end", |event| {
        let status = event["data"]["status"].as_str().filter(|_| event["event"] == "MIGRATION")?;
        ["completed", "failed", "cancelled"].contains(&status).then(|| status.to_owned())
    })?;
    let said = source.qmp.execute("query-migrate", json!({}))?;
    if status != "completed" {
        return Err(destination
            .process
            .failed(&source.process.failed(&format!("{status}: {}", said["error-desc"]))));
    }
    destination.qmp.event("RESUME", |event| (event["event"] == "RESUME").then_some(()))?;
    let vfio = said["vfio"]["transferred"].clone();
    guest.same(&source.memory, &destination.memory)?;
    source.quit(place.until)?;
    destination.quit(place.until)?;
    Ok(json!({
        "downtime_ms": said["downtime"],
        "total_ms": said["total-time"],
        "setup_ms": said["setup-time"],
        "device_bytes": vfio,
        "memory_bytes": said["ram"]["transferred"],
        "rounds": said["ram"]["dirty-sync-count"],
    }))
}

impl Side {
    fn start(
        place: &Place,
        name: &'static str,
        device: &str,
        more: &[&str],
        until: Instant,
    ) -> Result<Self, String> {
        let memory = place.folder.join(format!("{name}.memory"));
        let socket = place.folder.join(format!("{name}.qmp"));
        for path in [&memory, &socket] {
            let _ = fs::remove_file(path);
        }
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "q35,memory-backend=ram", "-accel", "tcg", "-smp", "1"]);
        command.args(["-m", &format!("{}", BYTES >> 20)]);
        command.arg("-object");
        command
            .arg(format!("memory-backend-file,id=ram,size={BYTES},mem-path={},share=on", memory.display()));
        command.arg("-device").arg(format!("vfio-pci,sysfsdev=/sys/bus/mdev/devices/{device}"));
        // Where the firmware says how far it is.
        command.args(["-device", "isa-debugcon,iobase=0x402,chardev=log"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(more);
        let mut process = Process::start(name, &mut command, &place.folder, false)?;
        let stream = process.look("QMP", until, || UnixStream::connect(&socket).ok())?;
        let qmp = Qmp::new(stream, until).map_err(|e| process.failed(&e))?;
        Ok(Self { qmp, process, memory })
    }

    fn quit(&mut self, until: Instant) -> Result<(), String> {
        self.qmp.execute("quit", json!({}))?;
        let status = self.process.end(until)?;
        if status.success() { Ok(()) } else { Err(self.process.failed(&status.to_string())) }
    }
}

//! What runs in the VM: all migrations, in a random order, each with new devices, one JSON line for each.
//!
//! A migration counts only if both sides say that it has completed, the driver's lines show each arc of it,
//! the register that was written on the source is read on the destination, and the memory is there. One
//! that fails is said so, and the others go on.

use super::guest::Guest;
use super::kernel_log::KernelLog;
use super::random::Random;
use super::timeline::Timeline;
use super::{DEVICES, Place, airlift, qemu};
use crate::{Checked, Findings};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The program that reads and writes a device's registers, an example of `crates/vfio`.
pub(super) const REGISTER: &str = "region_byte";

/// Rows by name, in the table's order.
pub(super) const ROWS: [&str; 3] = ["QEMU", "Airlift", "Airlift, the device alone"];
/// Row 0 migrates once before all others: it gives the memory that the others move.
const QEMU: usize = 0;
const AIRLIFT: usize = 1;

/// Of one migration, with the start of its processes and their end.
const DEADLINE: Duration = Duration::from_secs(60);
/// A mtty with two ports has so much state.
const STATE: u64 = 96;
/// The scratch register of the first port, which the device itself neither reads nor writes: in BAR 0.
const SCRATCH: [&str; 2] = ["0", "7"];
const AIRLIFT_BIN: &str = "/mnt/bin/airlift";

/// `vm-bench-inside RUNS SEED RANDOM-MIB`.
pub(crate) fn run(args: &[&str]) -> Checked {
    let numbers: Vec<u64> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let [runs, seed, random_mib] = numbers[..] else {
        return Err("vm-bench-inside RUNS SEED RANDOM-MIB: what vm-bench runs in the VM".into());
    };
    let mut random = Random::new(seed);
    let guest = Guest::new(&mut random, small(random_mib));
    let folder = std::env::temp_dir().join("bench");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let bench = Bench { template: folder.join("template.memory"), folder, guest };
    let mut order: Vec<usize> = (0..runs).flat_map(|_| 0..ROWS.len()).collect();
    random.shuffle(&mut order);
    let about = json!({
        "seed": seed, "order": order, "random_mib": random_mib,
        "qemu": version(qemu::PROGRAM)?, "airlift": version(AIRLIFT_BIN)?,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
    });
    println!("{about}");
    // Each row once without being counted: programs and their libraries come from the disk then.
    for row in 0..ROWS.len() {
        println!("{}", bench.one(row, 0));
    }
    for (run, row) in (1..).zip(order) {
        println!("{}", bench.one(row, run));
    }
    // Failed runs are the table's to judge.
    Ok(Findings::default())
}

struct Bench {
    folder: PathBuf,
    /// The guest's memory as it was when QEMU migrated first.
    template: PathBuf,
    guest: Guest,
}

impl Bench {
    fn one(&self, row: usize, run: u64) -> Value {
        let begun = Instant::now();
        let mut line = json!({ "row": row, "run": run });
        match self.migrate(row, run) {
            Ok((timeline, own)) => {
                line["total_us"] = timeline.total.into();
                line["terms_us"] = json!(timeline.terms);
                line["own"] = own;
            }
            Err(error) => line["error"] = error.into(),
        }
        line["seconds"] = begun.elapsed().as_secs_f64().into();
        line
    }

    fn migrate(&self, row: usize, run: u64) -> Result<(Timeline, Value), String> {
        let place = Place { folder: self.folder.clone(), until: Instant::now() + DEADLINE };
        for device in DEVICES {
            make_anew(device)?;
        }
        // What the destination has before is never what it must have after.
        let value = u8::try_from(run % 255).unwrap_or(0);
        register(DEVICES[0], Some(value))?;
        register(DEVICES[1], Some(!value))?;
        let _ = fs::remove_file(place.socket());
        let mut log = KernelLog::from_now()?;
        let own = match row {
            QEMU => {
                let template = (!self.template.exists()).then_some(&*self.template);
                qemu::migrate(&place, &self.guest, template)?
            }
            _ => {
                let memory = (row == AIRLIFT).then_some(&*self.template);
                airlift::migrate(&place, AIRLIFT_BIN, memory)?
            }
        };
        let timeline = Timeline::of(&log.events()?, STATE)?;
        let arrived = register(DEVICES[1], None)?;
        if arrived != value {
            return Err(format!("the scratch register was {value:#04x} and has arrived as {arrived:#04x}"));
        }
        Ok((timeline, own))
    }
}

/// Removes the device and makes a new one: the driver keeps state and registers when nobody has it open.
fn make_anew(device: &str) -> Result<(), String> {
    let write =
        |path: PathBuf, text: &str| fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()));
    let there = Path::new("/sys/bus/mdev/devices").join(device);
    if there.exists() {
        write(there.join("remove"), "1")?;
    }
    write("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create".into(), device)
}

/// Reads the scratch register, after writing it if a value is given.
fn register(device: &str, value: Option<u8>) -> Result<u8, String> {
    let mut command = Command::new(Path::new("/mnt/bin").join(REGISTER));
    command.arg(format!("mdev:{device}")).args(SCRATCH).args(value.map(|v| v.to_string()));
    let output = command.output().map_err(|e| format!("{REGISTER}: {e}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let number = said.trim().strip_prefix("0x").and_then(|hex| u8::from_str_radix(hex, 16).ok());
    number.filter(|_| output.status.success()).ok_or_else(|| {
        format!("{REGISTER} {device}: {}, {said}{}", output.status, String::from_utf8_lossy(&output.stderr))
    })
}

/// The first line that `program --version` prints.
fn version(program: &str) -> Result<String, String> {
    let output = Command::new(program).arg("--version").output().map_err(|e| format!("{program}: {e}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.lines().next().map(str::to_owned).ok_or_else(|| format!("{program} --version says nothing"))
}

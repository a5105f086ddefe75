//! `cargo xtask vm-bench`: QEMU and Airlift move the same device and the same memory, side by side in one VM.
//!
//! This side builds the VM and prints the table; `inside` is what runs in the VM. What is measured, and what
//! is equal for both, is said with the table and in `timeline`. Everything runs on an emulated processor:
//! ratios mean something, milliseconds little.

mod airlift;
mod guest;
mod inside;
mod kernel_log;
mod process;
mod qemu;
mod qmp;
mod random;
mod table;
mod timeline;

pub(crate) use inside::run as inside;

use super::boot::{Boot, End, Wish};
use super::rundir::{self, RunDir};
use super::{build, show, verdict};
use crate::{Checked, Findings};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The source's device and the destination's: two mtty with two ports each.
const DEVICES: [&str; 2] = ["00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"];

const RUNS: u32 = 20;
const MOST_RUNS: u32 = 1000;
const KERNEL: &str = build::KERNELS[0];
/// Two guests, their files and a Debian.
const MEMORY_MIB: u32 = 3072;
const CPUS: u32 = 2;
/// Of the whole VM: so long, and so much more for each run of a row.
const DEADLINE: Duration = Duration::from_secs(300);
const DEADLINE_OF_A_RUN: Duration = Duration::from_secs(30);

/// Where one migration has its files and sockets, and when it is given up.
#[derive(Debug)]
struct Place {
    folder: PathBuf,
    until: Instant,
}

impl Place {
    /// What the two processes are connected by.
    fn socket(&self) -> PathBuf {
        self.folder.join("migration")
    }
}

/// What stands after `vm-bench`.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    runs: u32,
    kernel: String,
    seed: u64,
    /// Of random content in the guest's memory.
    random_mib: u32,
    keep: bool,
}

impl Options {
    fn read(args: &[&str], seed: u64) -> Result<Self, String> {
        let mut options = Self { runs: RUNS, kernel: KERNEL.into(), seed, random_mib: 0, keep: false };
        let mut args = args.iter().copied();
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{name} needs a value"));
            match name {
                "--runs" => {
                    let text = value()?;
                    let runs = text.parse().ok().filter(|n| (1..=MOST_RUNS).contains(n));
                    options.runs = runs.ok_or_else(|| format!("--runs {text}: 1 to {MOST_RUNS}"))?;
                }
                "--kernel" => options.kernel = value()?.to_owned(),
                "--seed" => {
                    let text = value()?;
                    options.seed = text.parse().map_err(|_| format!("--seed {text}: a number"))?;
                }
                "--random" => {
                    let text = value()?;
                    let mib = text.parse().ok().filter(|n| *n <= guest::MOST_RANDOM_MIB);
                    options.random_mib =
                        mib.ok_or_else(|| format!("--random {text}: 0 to {} MiB", guest::MOST_RANDOM_MIB))?;
                }
                "--keep" => options.keep = true,
                _ => return Err(format!("{name}: known are --runs, --kernel, --seed, --random, --keep")),
            }
        }
        Ok(options)
    }
}

/// Runs the benchmark and gives its table.
pub(crate) fn run(root: &Path, args: &[&str]) -> Checked {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let options = Options::read(args, u64::from(now.subsec_nanos()) ^ now.as_secs())?;
    let cache = rundir::cache()?;
    let (airlift, register) = programs(root)?;
    let kernel = build::kernel(root, &cache, &options.kernel)?;
    let root_image = build::root_image(root, &cache)?;
    let mut image = build::base(root, &kernel)?;
    let own = std::env::current_exe().map_err(|e| format!("this program: {e}"))?;
    image.program(&own, "/vm/bin/xtask")?;
    image.program(&airlift, "/bin/airlift")?;
    image.program(&register, &format!("/vm/bin/{}", inside::REGISTER))?;
    let boot = Boot {
        kernel: kernel.image.clone(),
        memory_mib: MEMORY_MIB,
        cpus: CPUS,
        image,
        // Neither side has a use for it, and each device behind it takes time to boot.
        iommu: false,
        root_image: Some(root_image),
        // The driver's lines go into the kernel's log and, at its level, not to the console, where each would take
        // a millisecond.
        options: vec!["vm.dyndbg=mtty.c".into()],
        deadline: DEADLINE + DEADLINE_OF_A_RUN * options.runs,
        wish: Wish::Script(format!(
            "exec /mnt/bin/xtask vm-bench-inside {} {} {}\n",
            options.runs, options.seed, options.random_mib
        )),
    };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let dir = RunDir::new(&cache, options.keep)?;
    let ran = boot.run(&dir, |line| eprintln!("{}", table::brief(line)))?;
    let lines = keep(&cache, &format!("bench-{}.jsonl", kernel.version), &ran.output)?;
    eprintln!("every run: {}", lines.display());
    let mut findings = Findings::default();
    let results = table::Results::read(&ran.output);
    findings.say(format!(
        "Kernel {} and {} processors emulated (QEMU TCG) on {}; load of that machine before: {}.",
        options.kernel,
        CPUS,
        machine(),
        load.split(' ').next().unwrap_or("?")
    ));
    results.print(options.runs, &mut findings);
    match &ran.end {
        End::Code(0) => {}
        End::Code(code) => findings.wrong(format!("vm-bench-inside: exit code {code}")),
        End::NotReady(reason) => findings.wrong(format!("the VM was not made ready: {reason}")),
        End::Died(how) => findings.wrong(format!("the VM died without an exit code: {how}")),
        End::Deadline(limit) => findings.wrong(format!("no end after {} s", limit.as_secs())),
    }
    findings.wrong.extend(verdict::complaints(&ran));
    if ran.end != End::Code(0) {
        keep(&cache, &format!("{}-console.log", kernel.version), &ran.console)?;
        show(&cache, &kernel, &ran);
    }
    Ok(findings)
}

/// Builds the command, and the program that looks into a device: `airlift` and the example of
/// [`inside::REGISTER`].
fn programs(root: &Path) -> Result<(PathBuf, PathBuf), String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--locked",
            "-p",
            "airlift-cli",
            "-p",
            "airlift-vfio",
            "--bin",
            "airlift",
        ])
        .args(["--example", inside::REGISTER, "--message-format=json-render-diagnostics"])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("airlift does not build: {}", output.status));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let find = |name: &str| {
        messages
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|message| message["target"]["name"] == name && message["executable"].is_string())
            .and_then(|message| message["executable"].as_str().map(PathBuf::from))
            .ok_or_else(|| format!("cargo names no program {name}"))
    };
    Ok((find("airlift")?, find(inside::REGISTER)?))
}

/// Keeps a text beside the logs of the VM's other runs, and says where.
fn keep(cache: &Path, name: &str, text: &str) -> Result<PathBuf, String> {
    let logs = cache.join("log");
    let path = logs.join(name);
    let written = fs::create_dir_all(&logs).and_then(|()| fs::write(&path, text));
    written.map(|()| path.clone()).map_err(|e| format!("{}: {e}", path.display()))
}

/// The machine that emulates, in words.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    format!("{cores} cores of {}", model.map_or("an unknown processor", |(_, name)| name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_bounded() {
        let read = |args: &[&str]| Options::read(args, 9);
        let expected = Options { runs: 20, kernel: "6.12".into(), seed: 9, random_mib: 0, keep: false };
        assert_eq!(read(&[]), Ok(expected));
        let all = read(&["--runs", "3", "--kernel", "7.3", "--seed", "5", "--random", "22", "--keep"]);
        assert_eq!(all, Ok(Options { runs: 3, kernel: "7.3".into(), seed: 5, random_mib: 22, keep: true }));
        for wrong in [
            &["--runs", "0"][..],
            &["--runs", "1001"],
            &["--seed", "x"],
            &["--random", "29"],
            &["--seed"],
            &["3"],
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }
}

//! One run of the VM under QEMU's software emulation: its command line, its two serial ports, its end.
//!
//! It does not judge what ran inside: `verdict` does. A run always ends: at its deadline QEMU is killed,
//! and the VM powers itself off a little later should its starter have died.

use super::image::Image;
use super::rundir::RunDir;
use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// The most that is taken of what programs print, and of the kernel's console.
const MOST_TEXT: u64 = 64 << 20;
/// A longer line is handed on in pieces.
const MOST_LINE: u64 = 64 << 10;
/// How much later than its deadline the VM powers itself off.
const LATER: Duration = Duration::from_secs(15);
/// How long QEMU may take to end after its output has.
const END: Duration = Duration::from_secs(10);

/// Two devices behind the emulated VT-d, for tests that need a real IOMMU.
const PCI: [(&str, &str); 2] = [("e1000e,addr=5,romfile=", "0000:00:05.0"), ("edu,addr=6", "0000:00:06.0")];

/// A VM that is to run once.
#[derive(Debug)]
pub(crate) struct Boot {
    /// The kernel's bzImage.
    pub(crate) kernel: PathBuf,
    /// Memory, in MiB.
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    /// The initramfs: `build::base`, and the caller's own files. [`Boot::run`] adds `/vm/run`.
    pub(crate) image: Image,
    /// The emulated VT-d, with two PCI devices behind it on vfio-pci.
    pub(crate) iommu: bool,
    /// An ext4 image with a Debian root, mounted read-only: what runs then runs in it.
    pub(crate) root_image: Option<PathBuf>,
    /// More words for the kernel's command line, later ones win: `loglevel=8`, `vm.dyndbg=mtty.c`.
    pub(crate) options: Vec<String>,
    /// Of the whole run. A [`Wish::Shell`] has none.
    pub(crate) deadline: Duration,
    pub(crate) wish: Wish,
}

/// What the VM is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Runs this script with `sh`. Programs are in `/vm/bin` or, with a root image, in `/mnt/bin`; the
    /// folder `/out`, or `/mnt/out`, is [`RunDir::share`] on this side.
    Script(String),
    /// A shell on this terminal.
    Shell,
}

/// How the VM has ended, and what it has said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) end: End,
    /// The kernel's taint flags at the end.
    pub(crate) tainted: Option<u64>,
    /// What programs have printed. Empty for a shell.
    pub(crate) output: String,
    /// The kernel's console.
    pub(crate) console: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The script has run to its end.
    Code(i32),
    /// The VM's init could not make it ready, for this reason.
    NotReady(String),
    /// The VM is gone without an exit code: a panic, a power off, QEMU's own failure.
    Died(String),
    Deadline(Duration),
}

impl Boot {
    /// Boots, runs, and waits for the end. `line` gets each line that programs print, when it comes.
    ///
    /// # Errors
    /// QEMU cannot be started, files cannot be read or written, or more than 64 MiB were printed. What
    /// goes wrong inside of the VM is no error here, but an [`End`].
    pub(crate) fn run(&self, dir: &RunDir, line: impl FnMut(&str)) -> Result<Ran, String> {
        let mut image = self.image.clone();
        if let Wish::Script(script) = &self.wish {
            image.text("/vm/run", script.clone());
        }
        image.write(&dir.initramfs())?;
        let mut command = Command::new(QEMU);
        command.args(self.arguments(dir));
        let said =
            fs::File::create(dir.qemu_log()).map_err(|e| format!("{}: {e}", dir.qemu_log().display()))?;
        let shell = self.wish == Wish::Shell;
        if shell {
            command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
        } else {
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said);
        }
        let mut qemu = command.spawn().map_err(|e| format!("{QEMU}: {e}"))?;
        let watched = if shell {
            qemu.wait()
                .map(|status| Watched { status: Some(status), output: String::new() })
                .map_err(|e| e.to_string())
        } else {
            watch(&mut qemu, Instant::now() + self.deadline, line)
        };
        if watched.is_err() {
            kill(&mut qemu);
        }
        let watched = watched.map_err(|e| format!("{QEMU}: {e}"))?;
        Ok(Ran {
            end: self.end(dir, watched.status)?,
            tainted: left(dir, "tainted")?.and_then(|t| t.parse().ok()),
            output: watched.output,
            console: text(&dir.console())?.unwrap_or_default().replace('\r', ""),
        })
    }

    fn end(&self, dir: &RunDir, status: Option<ExitStatus>) -> Result<End, String> {
        let Some(status) = status else { return Ok(End::Deadline(self.deadline)) };
        if let Some(reason) = left(dir, "failed")? {
            return Ok(End::NotReady(reason));
        }
        if let Some(code) = left(dir, "exitcode")?.and_then(|code| code.parse().ok()) {
            return Ok(End::Code(code));
        }
        let said = text(&dir.qemu_log())?.unwrap_or_default();
        let said = if said.is_empty() { "it has said nothing" } else { said.trim() };
        Ok(End::Died(format!("{QEMU} ended with {status}; on its standard error: {said}")))
    }

    fn arguments(&self, dir: &RunDir) -> Vec<OsString> {
        let mut all: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: OsString| {
            all.push(name.into());
            if !value.is_empty() {
                all.push(value);
            }
        };
        let path = |before: &str, path: &Path, after: &str| {
            // QEMU's own quoting: a comma in a value is written twice.
            let path = path.to_string_lossy().replace(',', ",,");
            OsString::from(format!("{before}{path}{after}"))
        };
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            add(flag, OsString::new());
        }
        add("-display", "none".into());
        // What the VM does not need costs time under emulation.
        add("-machine", "q35,kernel-irqchip=off,i8042=off,hpet=off".into());
        add("-accel", "tcg,thread=multi,tb-size=256".into());
        add("-cpu", "max,la57=off".into());
        add("-smp", self.cpus.to_string().into());
        add("-m", self.memory_mib.to_string().into());
        add("-kernel", self.kernel.clone().into());
        add("-initrd", dir.initramfs().into());
        // Two serial ports: the kernel's console, and what programs print.
        add("-chardev", path("file,id=console,path=", &dir.console(), ""));
        add("-chardev", "stdio,id=output,signal=off".into());
        add("-serial", "chardev:console".into());
        add("-serial", "chardev:output".into());
        add(
            "-virtfs",
            path("local,path=", &dir.share(), ",mount_tag=out,security_model=none,multidevs=remap"),
        );
        if self.iommu {
            // Without intremap VFIO refuses the IOMMU: it would have unsafe interrupts.
            add("-device", "intel-iommu,intremap=on,aw-bits=48".into());
            for (device, _) in PCI {
                add("-device", device.into());
            }
        }
        if let Some(root) = &self.root_image {
            add("-drive", path("if=none,id=root,format=raw,readonly=on,file=", root, ""));
            add("-device", "virtio-blk-pci,drive=root".into());
        }
        add("-append", self.command_line().into());
        all
    }

    fn command_line(&self) -> String {
        // loglevel=5: warnings of the kernel reach the console, and with them what the verdict looks for.
        let mut words =
            "console=ttyS0 loglevel=5 panic=-1 tsc=reliable no_timer_check nokaslr random.trust_cpu=on"
                .to_owned();
        if self.iommu {
            words.push_str(" intel_iommu=on vm.vfiopci=");
            words.push_str(&PCI.map(|(_, bdf)| bdf).join(","));
        }
        match self.wish {
            Wish::Shell => words.push_str(" vm.shell=1"),
            Wish::Script(_) => words.push_str(&format!(" vm.deadline={}", (self.deadline + LATER).as_secs())),
        }
        if self.root_image.is_some() {
            words.push_str(" vm.root=1");
        }
        for option in &self.options {
            words.push(' ');
            words.push_str(option);
        }
        words
    }
}

struct Watched {
    /// None if the deadline has passed; QEMU is dead then.
    status: Option<ExitStatus>,
    output: String,
}

/// Hands on what QEMU prints until it has ended or the deadline has passed.
fn watch(qemu: &mut Child, deadline: Instant, mut line: impl FnMut(&str)) -> Result<Watched, String> {
    let stdout = qemu.stdout.take().ok_or("its output is not there")?;
    // Bounded: a VM that prints faster than this side reads waits in QEMU.
    let (give, take) = mpsc::sync_channel(1024);
    // The thread ends when QEMU has ended or been killed, or when nobody takes any more.
    let reader = thread::spawn(move || {
        let mut stdout = BufReader::new(stdout);
        loop {
            let mut bytes = Vec::new();
            match (&mut stdout).take(MOST_LINE).read_until(b'\n', &mut bytes) {
                Ok(0) => return Ok(()),
                Ok(_) if give.send(bytes).is_ok() => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    });
    let mut output = String::new();
    let mut in_time = true;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let bytes = match take.recv_timeout(if in_time { left } else { END }) {
            Ok(bytes) => bytes,
            Err(RecvTimeoutError::Timeout) if in_time => {
                // Killed, and then read to the end: the last line names what did not come back.
                in_time = false;
                kill(qemu);
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            // Killed, and still somebody holds its output: it is left to them.
            Err(RecvTimeoutError::Timeout) => return Ok(Watched { status: None, output }),
        };
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        line(text.trim_end_matches('\n'));
        output.push_str(&text);
        if output.len() > usize::try_from(MOST_TEXT).unwrap_or(usize::MAX) {
            return Err(format!("the programs have printed more than {} MiB", MOST_TEXT >> 20));
        }
    }
    if let Ok(Err(e)) = reader.join() {
        return Err(format!("reading its output: {e}"));
    }
    if !in_time {
        return Ok(Watched { status: None, output });
    }
    let status = wait(qemu, Instant::now() + END).map_err(|e| format!("waiting for its end: {e}"))?;
    Ok(Watched { status, output })
}

/// Waits until the child has ended; None, and the child is killed, if it does not.
fn wait(child: &mut Child, until: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            kill(child);
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends the child, if it has not ended already, and takes its status.
fn kill(child: &mut Child) {
    // An error says that it has ended: what was wanted.
    let _ = child.kill();
    let _ = child.wait();
}

/// A one-line file that the VM has left in the share; None if it is empty or not there.
fn left(dir: &RunDir, name: &str) -> Result<Option<String>, String> {
    let text = text(&dir.share().join(name))?;
    Ok(text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()))
}

/// A file's text, at most 64 MiB of it; None if it is not there.
fn text(path: &Path) -> Result<Option<String>, String> {
    let fail = |e: io::Error| format!("{}: {e}", path.display());
    let file = match fs::File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(fail)?,
    };
    let mut bytes = Vec::new();
    file.take(MOST_TEXT + 1).read_to_end(&mut bytes).map_err(fail)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MOST_TEXT {
        return Err(format!("{}: larger than {} MiB", path.display(), MOST_TEXT >> 20));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(wish: Wish) -> Boot {
        Boot {
            kernel: "/k".into(),
            memory_mib: 1024,
            cpus: 2,
            image: Image::default(),
            iommu: true,
            root_image: None,
            options: vec!["loglevel=8".into()],
            deadline: Duration::from_secs(300),
            wish,
        }
    }

    #[test]
    fn the_vm_ends_itself_after_its_deadline_and_an_option_comes_last() {
        let line = boot(Wish::Script(String::new())).command_line();
        assert!(line.contains(" vm.deadline=315 "), "{line}");
        assert!(line.ends_with(" loglevel=8"), "{line}");
        // Somebody sits before a shell: nothing takes it away.
        assert!(!boot(Wish::Shell).command_line().contains("vm.deadline"));
    }

    fn shell(script: &str) -> Child {
        Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn a_process_that_does_not_end_is_killed_and_its_last_line_is_kept() {
        let mut child = shell("printf 'one\\ntest hangs ... '; exec sleep 1000");
        // The deadline is in the past once both pieces are there: nothing else can end the loop.
        let mut lines = Vec::new();
        let watched =
            watch(&mut child, Instant::now() + Duration::from_secs(3), |l| lines.push(l.to_owned())).unwrap();
        assert!(watched.status.is_none());
        assert_eq!(watched.output, "one\ntest hangs ... ");
        assert_eq!(lines, ["one", "test hangs ... "]);
        assert!(child.try_wait().unwrap().is_some());
    }

    #[test]
    fn output_that_does_not_stop_is_cut() {
        let mut child =
            shell("exec yes 0123456789012345678901234567890123456789012345678901234567890123456789");
        let result = watch(&mut child, Instant::now() + Duration::from_secs(120), |_| {});
        kill(&mut child);
        assert!(result.err().unwrap().contains("64 MiB"));
    }
}

//! Who holds a device: processes that have its character device, its group, or a descriptor of it open,
//! found in procfs (K-BUSY).
//!
//! Only descriptors are looked at. A process of another pid namespace cannot be seen at all, and
//! without the right to look, the descriptors of another user's process cannot either: both are said.

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Most descriptors that are looked at, over all processes.
const MAX_DESCRIPTORS: usize = 1 << 20;
/// Most holders that are named.
const MAX_HOLDERS: usize = 16;
/// Most characters of a command.
const MAX_COMMAND: usize = 128;

/// A process that has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command line, as the process gives it, without characters that are not for printing.
    pub command: String,
}

/// The processes that have a device open, as far as they can be seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Those that were seen.
    pub seen: Vec<Holder>,
    /// Processes whose descriptors may not be looked at.
    pub hidden: u32,
}

impl Holders {
    pub(super) fn advice(&self) -> &'static str {
        if self.seen.iter().any(|h| h.pid == std::process::id()) {
            "this process has it already: use the device that is open, or, for another device of the same \
             group, hand in the container of the first"
        } else if !self.seen.is_empty() {
            "end that process, or let it hand the device in (fd:N)"
        } else if self.hidden > 0 {
            "look for it as root: some processes may not be looked at by this user"
        } else {
            "the holder may be in another container (pid namespace): look for it from the host"
        }
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, holder) in self.seen.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}process {} ({})", holder.pid, holder.command)?;
        }
        match (self.seen.is_empty(), self.hidden) {
            (true, 0) => f.write_str("a process that cannot be seen from here"),
            (true, 1) => f.write_str("a process that cannot be seen from here (1 may not be looked at)"),
            (true, hidden) => {
                write!(f, "a process that cannot be seen from here ({hidden} may not be looked at)")
            }
            (false, _) => Ok(()),
        }
    }
}

/// What a holder has open.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    /// Paths of its nodes.
    pub(super) nodes: Vec<PathBuf>,
    /// Its directory in sysfs, which newer kernels give in the fdinfo of a device's descriptor.
    pub(super) sysfs: Option<PathBuf>,
    /// The root of sysfs.
    pub(super) sys: PathBuf,
}

/// Whether this is one of a device's nodes or descriptors.
fn is_wanted(process: &Path, fd: &str, wanted: &Wanted, numbers: &[u64]) -> bool {
    let file = process.join("fd").join(fd);
    let Ok(link) = fs::read_link(&file) else { return false };
    if wanted.nodes.contains(&link) {
        return true;
    }
    // In another mount namespace, or through another node, the path differs and the number does not.
    let number = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        meta.file_type().is_char_device().then(|| meta.rdev())
    };
    if link.to_str().is_some_and(|l| l.contains("vfio-device")) {
        return device_path(&process.join("fdinfo").join(fd), &wanted.sys)
            .is_some_and(|path| Some(path) == wanted.sysfs);
    }
    link.to_str().is_some_and(|l| l.contains("vfio")) && number(&file).is_some_and(|n| numbers.contains(&n))
}

/// The directory in sysfs of the device whose descriptor this is the fdinfo of, where the kernel says it.
pub(super) fn device_path(fdinfo: &Path, sys: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(fdinfo).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?.trim();
    fs::canonicalize(sys.join(path.strip_prefix("/sys/")?)).ok()
}

/// The processes that have one of these open.
pub(super) fn find(wanted: &Wanted, proc: &Path) -> Holders {
    let mut holders = Holders::default();
    let numbers: Vec<u64> =
        wanted.nodes.iter().filter_map(|n| fs::metadata(n).ok()).map(|m| m.rdev()).collect();
    let numbers: Vec<u64> = numbers.into_iter().filter(|n| *n != 0).collect();
    let mut left = MAX_DESCRIPTORS;
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let process = entry.path();
        let Ok(fds) = fs::read_dir(process.join("fd")) else {
            // A process that has ended meanwhile holds nothing.
            holders.hidden += u32::from(process.exists());
            continue;
        };
        let mut fds = fds.flatten().filter_map(|fd| fd.file_name().into_string().ok()).inspect(|_| {
            left = left.saturating_sub(1);
        });
        if fds.any(|fd| is_wanted(&process, &fd, wanted, &numbers)) {
            holders.seen.push(Holder { pid, command: command(&process) });
        }
        if left == 0 || holders.seen.len() == MAX_HOLDERS {
            break;
        }
    }
    holders.seen.sort_by_key(|h| h.pid);
    holders
}

fn command(process: &Path) -> String {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
    let text =
        if words.is_empty() { fs::read_to_string(process.join("comm")).unwrap_or_default() } else { words };
    text.trim().chars().map(|c| if c.is_control() { '?' } else { c }).take(MAX_COMMAND).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn process(proc: &Path, pid: u32, command: &[u8], link: &str) {
        let fd = proc.join(pid.to_string()).join("fd");
        fs::create_dir_all(&fd).unwrap();
        fs::write(proc.join(pid.to_string()).join("cmdline"), command).unwrap();
        symlink(link, fd.join("7")).unwrap();
    }

    #[test]
    fn the_process_that_has_the_group_open_is_named_and_no_other() {
        let proc = tempfile::tempdir().unwrap();
        process(proc.path(), 41, b"qemu-system-x86_64\0-name\0a\x1bb\0", "/dev/vfio/12");
        process(proc.path(), 42, b"other\0", "/dev/vfio/13");
        let wanted = Wanted { nodes: vec!["/dev/vfio/12".into()], ..Wanted::default() };
        let holders = find(&wanted, proc.path());
        let command = "qemu-system-x86_64 -name a?b".into();
        assert_eq!(holders, Holders { seen: vec![Holder { pid: 41, command }], hidden: 0 });
        assert_eq!(holders.to_string(), "process 41 (qemu-system-x86_64 -name a?b)");
    }

    #[test]
    fn a_holder_that_cannot_be_seen_is_said_with_the_reason() {
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir(proc.path().join("77")).unwrap();
        let holders = find(&Wanted::default(), proc.path());
        assert_eq!(holders, Holders { seen: vec![], hidden: 1 });
        assert!(holders.advice().contains("root"));
        assert!(Holders::default().advice().contains("namespace"));
    }

    #[test]
    fn a_device_descriptor_is_recognised_by_its_fdinfo() {
        let tree = tempfile::tempdir().unwrap();
        let (sys, proc) = (tree.path().join("sys"), tree.path().join("proc"));
        fs::create_dir_all(sys.join("devices/pci0/x")).unwrap();
        process(&proc, 9, b"vmm\0", "anon_inode:[vfio-device]");
        fs::create_dir_all(proc.join("9/fdinfo")).unwrap();
        fs::write(proc.join("9/fdinfo/7"), "pos:\t0\nvfio-device-syspath: /sys/devices/pci0/x\n").unwrap();
        let path = fs::canonicalize(sys.join("devices/pci0/x")).unwrap();
        let wanted = |sysfs| Wanted { nodes: vec![], sysfs: Some(sysfs), sys: sys.clone() };
        assert_eq!(find(&wanted(path), &proc).seen.len(), 1);
        assert_eq!(find(&wanted("/elsewhere".into()), &proc).seen.len(), 0);
    }
}

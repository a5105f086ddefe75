//! The cache, and the folder of one run in it: initramfs, consoles, the share with the VM.
//!
//! A run's folder goes away with it, unless it is kept; that of a run that was killed goes away with the
//! next run. The consoles of the last run of each kernel stay in the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where kernels, the root image and logs are kept: `$AIRLIFT_VM_CACHE`, else `airlift-vm` in
/// `$XDG_CACHE_HOME`, else in `~/.cache`.
pub(crate) fn cache() -> Result<PathBuf, String> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    folder("AIRLIFT_VM_CACHE")
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("airlift-vm")))
        .or_else(|| Some(folder("HOME")?.join(".cache/airlift-vm")))
        .ok_or_else(|| "no folder for the VM's cache: set AIRLIFT_VM_CACHE or HOME".into())
}

/// The folder of one run.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    keep: bool,
}

impl RunDir {
    /// Makes a new folder in the cache; with `keep` it stays.
    pub(crate) fn new(cache: &Path, keep: bool) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let runs = cache.join("run");
        let fail = |e: io::Error| format!("{}: {e}", runs.display());
        fs::create_dir_all(&runs).map_err(fail)?;
        clean(&runs);
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = runs.join(name);
        // One of an earlier process with this id, which `clean` took for a living one's.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(fail)?;
        let dir = Self { path, keep };
        fs::create_dir(dir.share()).map_err(fail)?;
        Ok(dir)
    }

    /// What the VM sees as `/out`.
    pub(crate) fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    pub(crate) fn initramfs(&self) -> PathBuf {
        self.path.join("initramfs")
    }

    /// The kernel's console.
    pub(crate) fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What QEMU itself has said.
    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    /// Marks the folder as one that stays: `clean` finds no process for it, and looks for this name.
    fn stay(&self) {
        let kept = self
            .path
            .with_file_name(format!("kept-{}", self.path.file_name().unwrap_or_default().to_string_lossy()));
        let _ = fs::remove_dir_all(&kept);
        match fs::rename(&self.path, &kept) {
            Ok(()) => println!("kept: {}", kept.display()),
            Err(e) => eprintln!("{}: {e}", kept.display()),
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            self.stay();
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes the folders of processes that are gone. What cannot be removed is left to the next run.
fn clean(runs: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let owner = name.split('-').next().and_then(|id| id.parse::<u32>().ok());
        if owner.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_leaves_nothing_behind_and_takes_away_what_a_killed_one_left() {
        let cache = std::env::temp_dir().join(format!("airlift-rundir-{}", std::process::id()));
        // No process has this id: it is above the largest that Linux gives.
        let dead = cache.join("run/4194305-0");
        let kept = cache.join("run/kept-4194305-1");
        fs::create_dir_all(&dead).unwrap();
        fs::create_dir_all(&kept).unwrap();
        let (first, second) = (RunDir::new(&cache, false).unwrap(), RunDir::new(&cache, false).unwrap());
        assert_ne!(first.path, second.path);
        assert!(first.share().is_dir() && !dead.exists() && kept.exists());
        let path = first.path.clone();
        drop(first);
        assert!(!path.exists() && second.share().is_dir());
        drop(second);
        fs::remove_dir_all(&cache).unwrap();
    }
}

//! What a run of the VM is made of: kernels with our driver, the root image, the test programs, and the
//! base of every initramfs.
//!
//! Kernels and the root image are made by scripts in `tests/vm`, which also decide whether anything is to
//! be made again. Programs are those of the workspace's release profile, in its own target folder: a
//! `cargo test --workspace --release` that ran before has made them already.

use super::image::Image;
use serde_json::Value;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The kernels that the suite runs on: the oldest that is supported, and one with PRECOPY_INFOv2.
pub(crate) const KERNELS: [&str; 2] = ["6.12", "7.3"];

/// The kernel suites. Their tests are `#[ignore]`d, so that they run in the VM only.
pub(crate) const SUITES: [Suite; 2] = [
    Suite { name: "airlift-vfio", source: "crates/vfio/tests/kernel/main.rs" },
    Suite { name: "airlift-cli", source: "crates/cli/tests/kernel/main.rs" },
];

/// A test program that runs in the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Suite {
    /// Of the package. In the VM the program is `/vm/bin/NAME`.
    pub(crate) name: &'static str,
    /// The program's source, from the workspace's root.
    pub(crate) source: &'static str,
}

/// The programs for the VM, as cargo has named them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Programs {
    /// The command.
    pub(crate) airlift: PathBuf,
    /// In the order of [`SUITES`].
    pub(crate) suites: Vec<(Suite, PathBuf)>,
}

impl Programs {
    /// Puts the command at `/bin/airlift` and each suite into `/vm/bin`.
    pub(crate) fn add_to(&self, image: &mut Image) -> Result<(), String> {
        image.program(&self.airlift, "/bin/airlift")?;
        for (suite, path) in &self.suites {
            image.program(path, &format!("/vm/bin/{}", suite.name))?;
        }
        Ok(())
    }
}

/// Builds the test programs and the command.
pub(crate) fn programs(root: &Path) -> Result<Programs, String> {
    // The whole workspace with one kind of target, not single packages: so all crates have the features
    // that they have in `cargo test --workspace --release`, and nothing is built twice. The command is built
    // along, as a test of its package needs it.
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["test", "--workspace", "--release", "--no-run", "--locked", "--test", "kernel"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("the kernel suites do not build: cargo test --no-run: {}", output.status));
    }
    named(root, &String::from_utf8_lossy(&output.stdout))
}

/// Finds the programs in cargo's messages, one JSON object a line.
fn named(root: &Path, messages: &str) -> Result<Programs, String> {
    let artifacts: Vec<Value> = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|message: &Value| message["reason"] == "compiler-artifact")
        .collect();
    let find = |source: &str, test: bool| {
        let source = root.join(source);
        artifacts
            .iter()
            .find(|a| {
                a["profile"]["test"] == test
                    && a["target"]["src_path"].as_str().map(Path::new) == Some(&source)
            })
            .and_then(|a| a["executable"].as_str())
            .map(PathBuf::from)
            .ok_or_else(|| format!("{} gives no program: is it there?", source.display()))
    };
    let suites = SUITES
        .iter()
        .map(|suite| Ok((*suite, find(suite.source, true)?)))
        .collect::<Result<Vec<_>, String>>()?;
    Ok(Programs { airlift: find("crates/cli/src/main.rs", false)?, suites })
}

/// A kernel that is built, and our driver for it.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) version: String,
    pub(crate) image: PathBuf,
    pub(crate) driver: PathBuf,
}

/// Builds a kernel and the driver, if that has not been done. The script says what it installs.
pub(crate) fn kernel(root: &Path, cache: &Path, version: &str) -> Result<Kernel, String> {
    script(root, cache, "build-kernel.sh", &[version])?;
    let built = |name: String| {
        let path = cache.join(name);
        if path.is_file() {
            Ok(path)
        } else {
            Err(format!("build-kernel.sh has not made {}", path.display()))
        }
    };
    Ok(Kernel {
        version: version.to_owned(),
        image: built(format!("bzImage-{version}"))?,
        driver: built(format!("airlift-{version}.ko"))?,
    })
}

/// Builds the Debian root with QEMU in it, if that has not been done, and gives its image.
pub(crate) fn root_image(root: &Path, cache: &Path) -> Result<PathBuf, String> {
    script(root, cache, "build-rootfs.sh", &[])?;
    Ok(cache.join("rootfs.img"))
}

fn script(root: &Path, cache: &Path, name: &str, args: &[&str]) -> Result<(), String> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(
            "the test VM is x86_64, and so must be what runs in it; AIRLIFT_VM=skip leaves the VM out".into(),
        );
    }
    let status = Command::new(root.join("tests/vm").join(name))
        .args(args)
        .env("AIRLIFT_VM_CACHE", cache)
        .status()
        .map_err(|e| format!("tests/vm/{name}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("tests/vm/{name} {}: {status}", args.join(" "))) }
}

/// What every initramfs has: busybox, init and the driver.
pub(crate) fn base(root: &Path, kernel: &Kernel) -> Result<Image, String> {
    let mut image = Image::default();
    image.program(&busybox()?, "/bin/busybox")?;
    image.program(&root.join("tests/vm/init"), "/init")?;
    image.file(&kernel.driver, "/vm/airlift.ko");
    Ok(image)
}

fn busybox() -> Result<PathBuf, String> {
    let paths = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/bin:/usr/bin"));
    std::env::split_paths(&paths)
        .map(|folder| folder.join("busybox"))
        .find(|path| path.is_file())
        .ok_or_else(|| "busybox is not in PATH: the VM's init needs it".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(source: &str, test: bool, executable: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","target":{{"src_path":"/w/{source}"}},"profile":{{"test":{test}}},"executable":"{executable}"}}"#
        ) + "\n"
    }

    #[test]
    fn a_suite_is_found_by_its_source_and_a_missing_one_is_an_error() {
        let mut messages = "{\"reason\":\"build-script-executed\"}\n".to_owned();
        messages += &artifact("crates/cli/src/main.rs", true, "/t/airlift-unit-tests");
        messages += &artifact("crates/cli/src/main.rs", false, "/t/airlift");
        messages += &artifact("crates/vfio/tests/kernel/main.rs", true, "/t/kernel-1");
        let missing = named(Path::new("/w"), &messages).unwrap_err();
        assert!(missing.contains("/w/crates/cli/tests/kernel/main.rs"), "{missing}");
        messages += &artifact("crates/cli/tests/kernel/main.rs", true, "/t/kernel-2");
        let programs = named(Path::new("/w"), &messages).unwrap();
        assert_eq!(programs.airlift, Path::new("/t/airlift"));
        let suites: Vec<_> = programs.suites.iter().map(|(s, p)| (s.name, p.as_path())).collect();
        assert_eq!(
            suites,
            [("airlift-vfio", Path::new("/t/kernel-1")), ("airlift-cli", Path::new("/t/kernel-2"))]
        );
    }
}

//! Dependencies between our crates point one way, and unsafe code is in two crates.

use crate::{Checked, Findings, tree};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// A crate, what it may depend on, and what its tests and examples may use beside that.
struct Row {
    name: &'static str,
    may: &'static [&'static str],
    tests_may: &'static [&'static str],
}

const TABLE: &[Row] = &[
    Row { name: "airlift-core", may: &[], tests_may: &[] },
    Row { name: "airlift-memory", may: &[], tests_may: &[] },
    Row { name: "airlift-stream", may: &["airlift-core"], tests_may: &[] },
    Row { name: "airlift-vfio", may: &["airlift-core", "airlift-memory"], tests_may: &[] },
    Row { name: "airlift-vfio-user", may: &["airlift-core", "airlift-memory"], tests_may: &[] },
    Row {
        name: "airlift",
        may: &["airlift-core", "airlift-memory", "airlift-stream", "airlift-vfio", "airlift-vfio-user"],
        tests_may: &["airlift-softdevice"],
    },
    Row {
        name: "airlift-softdevice",
        may: &["airlift", "airlift-core", "airlift-memory", "airlift-vfio-user"],
        tests_may: &["airlift-stream"],
    },
    Row {
        name: "airlift-testkit",
        may: &[
            "airlift",
            "airlift-core",
            "airlift-memory",
            "airlift-softdevice",
            "airlift-stream",
            "airlift-vfio",
            "airlift-vfio-user",
        ],
        tests_may: &[],
    },
    Row {
        name: "airlift-cli",
        may: &[
            "airlift",
            "airlift-core",
            "airlift-memory",
            "airlift-softdevice",
            "airlift-stream",
            "airlift-testkit",
            "airlift-vfio",
            "airlift-vfio-user",
        ],
        tests_may: &[],
    },
    Row { name: "xtask", may: &[], tests_may: &[] },
];

/// The crates that may have unsafe code.
const UNSAFE: &[&str] = &["crates/memory/", "crates/vfio/"];

pub(crate) fn check(root: &Path) -> Checked {
    let metadata = metadata(root, &["--no-deps"])?;
    let mut findings = Findings::default();
    directions(&metadata, &mut findings);
    for file in tree::files(root, "crates", ".rs")? {
        unsafe_code(&file, &mut findings);
    }
    for file in tree::files(root, "xtask", ".rs")? {
        unsafe_code(&file, &mut findings);
    }
    Ok(findings)
}

/// What cargo knows of the workspace.
pub(crate) fn metadata(root: &Path, more: &[&str]) -> Result<Value, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(more)
        .output()
        .map_err(|e| format!("cargo metadata: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata: {e}"))
}

fn directions(metadata: &Value, findings: &mut Findings) {
    let packages = metadata["packages"].as_array().map_or(&[][..], Vec::as_slice);
    let ours: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(row) = TABLE.iter().find(|row| row.name == name) else {
            findings.wrong(format!("{name} is not in the table of xtask/src/deps.rs"));
            continue;
        };
        let mut uses = Vec::new();
        for dependency in package["dependencies"].as_array().map_or(&[][..], Vec::as_slice) {
            let on = dependency["name"].as_str().unwrap_or_default();
            if !ours.contains(&on) {
                continue;
            }
            let for_tests = dependency["kind"].as_str() == Some("dev");
            let allowed = row.may.contains(&on) || for_tests && row.tests_may.contains(&on);
            if !allowed {
                let how = if for_tests { "its tests use" } else { "it depends on" };
                findings.wrong(format!("{name}: {how} {on}, which is the wrong way"));
            }
            uses.push(if for_tests { format!("({on})") } else { on.to_owned() });
        }
        let uses = if uses.is_empty() { "nothing of ours".to_owned() } else { uses.join(" ") };
        findings.say(format!("{name:<20} <- {uses}"));
    }
}

fn unsafe_code(file: &tree::Text, findings: &mut Findings) {
    if UNSAFE.iter().any(|folder| file.path.starts_with(folder)) {
        return;
    }
    // In pieces, so that this file is not a finding of its own.
    let lint = ["(unsafe", "_code)"].concat();
    let root = ["/src/lib.rs", "/src/main.rs"].iter().any(|end| file.path.ends_with(end));
    if root && !file.text.contains(&format!("#![forbid{lint}]")) {
        findings.wrong(format!("{}: a crate without unsafe code forbids it", file.path));
    }
    for attribute in ["allow", "expect", "warn"] {
        if file.text.contains(&format!("{attribute}{lint}")) {
            findings.wrong(format!("{}: unsafe code belongs into {}", file.path, UNSAFE.join(", ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_against_the_direction_is_named() {
        let metadata = serde_json::json!({"packages": [
            {"name": "airlift-core", "dependencies": [{"name": "airlift", "kind": null}, {"name": "serde", "kind": null}]},
            {"name": "airlift", "dependencies": [{"name": "airlift-softdevice", "kind": "dev"}]},
            {"name": "airlift-softdevice", "dependencies": []},
        ]});
        let mut findings = Findings::default();
        directions(&metadata, &mut findings);
        assert_eq!(findings.wrong.len(), 1, "{:?}", findings.wrong);
        assert!(findings.wrong[0].starts_with("airlift-core"));
    }
}

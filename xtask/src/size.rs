//! A file has one subject. A long one rarely has.

use crate::{Checked, Findings, tree};
use std::path::Path;

const LONG: usize = 600;
const TOO_LONG: usize = 1000;

pub(crate) fn check(root: &Path) -> Checked {
    let mut findings = Findings::default();
    let mut files = 0;
    for folder in ["crates", "xtask", "fuzz"] {
        for file in tree::files(root, folder, ".rs")? {
            files += 1;
            let lines = file.text.lines().count();
            if lines > TOO_LONG {
                findings.wrong(format!("{}: {lines} lines, {TOO_LONG} is the most", file.path));
            } else if lines > LONG {
                findings.say(format!("{}: {lines} lines; split it when it grows", file.path));
            }
        }
    }
    findings.say(format!("{files} files, none above {TOO_LONG} lines unless it is named as wrong"));
    Ok(findings)
}

//! Files of the workspace, read in a fixed order. Build output and hidden folders are passed over.

use std::fs;
use std::path::{Path, PathBuf};

/// A text file, and its path from the workspace's root with `/` between names.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Every file below `root`/`folder` whose name ends with `ending`, sorted by path.
pub(crate) fn files(root: &Path, folder: &str, ending: &str) -> Result<Vec<Text>, String> {
    let mut found = Vec::new();
    walk(&root.join(folder), ending, &mut found)?;
    found.sort();
    found
        .into_iter()
        .map(|path| {
            let text = read(&path)?;
            let path = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            Ok(Text { path, text })
        })
        .collect()
}

/// A file's text, or an error that names it.
pub(crate) fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn walk(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let fail = |e: std::io::Error| format!("{}: {e}", folder.display());
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type().map_err(fail)?;
        if kind.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(&entry.path(), ending, found)?;
            }
        } else if name.ends_with(ending) {
            found.push(entry.path());
        }
    }
    Ok(())
}

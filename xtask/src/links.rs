//! Links in `*.md` lead somewhere: to a file of the workspace, and to a heading when they name one.
//! A path in backticks that begins with one of our folders must be there too. Addresses of other
//! hosts are not looked at.

use crate::{Checked, Findings, tree};
use std::path::{Component, Path, PathBuf};

const FOLDERS: [&str; 6] = ["crates/", "docs/", "xtask/", "fuzz/", ".ci/", ".cargo/"];

pub(crate) fn check(root: &Path) -> Checked {
    let mut findings = Findings::default();
    let mut count = 0;
    let files = tree::files(root, ".", ".md")?;
    for file in &files {
        let path = normal(Path::new(&file.path));
        let prose = prose(&file.text);
        for target in targets(&prose) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (to, anchor) = target.split_once('#').unwrap_or((target, ""));
            let to = if to.is_empty() {
                path.clone()
            } else {
                normal(&path.parent().unwrap_or_else(|| Path::new("")).join(to))
            };
            if !root.join(&to).exists() {
                findings.wrong(format!("{}: {target} leads nowhere", path.display()));
            } else if !anchor.is_empty() && to.extension().is_some_and(|e| e == "md") {
                let text = tree::read(&root.join(&to))?;
                if !anchors(&text).any(|a| a == anchor) {
                    findings.wrong(format!("{}: {target}: there is no such heading", path.display()));
                }
            }
        }
        for named in quoted(&prose).filter(|q| FOLDERS.iter().any(|f| q.starts_with(f))) {
            if named.contains(|c: char| " *{<…".contains(c)) {
                continue;
            }
            count += 1;
            if !root.join(named).exists() {
                findings.wrong(format!("{}: `{named}` is not there", path.display()));
            }
        }
    }
    findings.say(format!("{count} links and paths in {} files", files.len()));
    Ok(findings)
}

/// Without `.` and with `..` taken back.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

/// The text without code blocks.
fn prose(text: &str) -> String {
    let mut code = false;
    let mut out = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        } else if !code {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// The targets of `[text](target)`.
fn targets(prose: &str) -> impl Iterator<Item = &str> {
    prose.split("](").skip(1).filter_map(|rest| rest.split(')').next()).filter(|t| !t.contains(' '))
}

/// What stands between backticks.
fn quoted(prose: &str) -> impl Iterator<Item = &str> {
    prose.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// The anchors of a file's headings, as code hosts make them.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    text.lines().filter(|line| line.starts_with('#')).map(|line| {
        line.trim_start_matches('#')
            .trim()
            .to_lowercase()
            .chars()
            .filter_map(|c| match c {
                ' ' => Some('-'),
                c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
                _ => None,
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_outside_of_code_blocks_only() {
        let text = "[a](b.md) and `crates/x`\n```\n[c](d.md)\n```\n[e](../f.md#g-h)\n";
        let prose = prose(text);
        assert_eq!(targets(&prose).collect::<Vec<_>>(), ["b.md", "../f.md#g-h"]);
        assert_eq!(quoted(&prose).collect::<Vec<_>>(), ["crates/x"]);
    }

    #[test]
    fn a_heading_has_the_anchor_that_a_code_host_gives_it() {
        assert_eq!(
            anchors("## V2: the kernel's interface\n").collect::<Vec<_>>(),
            ["v2-the-kernels-interface"]
        );
    }

    #[test]
    fn a_link_that_goes_up_is_taken_from_where_it_stands() {
        assert_eq!(normal(Path::new("./docs/adr/../rules.md")), Path::new("docs/rules.md"));
    }
}

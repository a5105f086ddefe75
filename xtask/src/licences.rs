//! Every dependency has a licence that `deny.toml` allows. It is what cargo-deny checks too, for
//! those who have nothing but cargo; the list is the same one.

use crate::{Checked, Findings, deps, tree};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

pub(crate) fn check(root: &Path) -> Checked {
    let allowed = allowed(&tree::read(&root.join("deny.toml"))?)?;
    // Packages for other systems are never built, and need not have been downloaded.
    let host = host()?;
    let metadata = deps::metadata(root, &["--filter-platform", &host])?;
    let used: Vec<&str> = array(&metadata["resolve"]["nodes"]).filter_map(|n| n["id"].as_str()).collect();
    let mut findings = Findings::default();
    let mut by_licence = BTreeMap::<&str, usize>::new();
    for package in array(&metadata["packages"]) {
        let name = package["name"].as_str().unwrap_or_default();
        if !package["id"].as_str().is_some_and(|id| used.contains(&id)) {
            continue;
        }
        match package["license"].as_str() {
            Some(licence) => {
                *by_licence.entry(licence).or_default() += 1;
                if !satisfies(licence, &allowed) {
                    findings.wrong(format!("{name}: {licence} is not among the licences of deny.toml"));
                }
            }
            None => findings.wrong(format!("{name}: names no licence")),
        }
    }
    for (licence, count) in by_licence {
        findings.say(format!("{count:4}  {licence}"));
    }
    Ok(findings)
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn host() -> Result<String, String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("-vV").output().map_err(|e| format!("rustc: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| "rustc -vV names no host".into())
}

/// The strings of `allow = […]` in the table `[licenses]`.
fn allowed(deny: &str) -> Result<Vec<String>, String> {
    let table = deny.split("\n[licenses]\n").nth(1).ok_or("deny.toml has no [licenses]")?;
    let list = table.split("allow = [").nth(1).and_then(|rest| rest.split(']').next());
    let list = list.ok_or("deny.toml allows no licences")?;
    Ok(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether the terms of one allowed licence are enough. `OR` and `/` need one side, `AND` both; an
/// exception (`WITH`) only gives more rights.
fn satisfies(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let (value, rest) = either(&tokens, allowed);
    value && rest.is_empty()
}

fn either<'a, 'b>(tokens: &'a [&'b str], allowed: &[String]) -> (bool, &'a [&'b str]) {
    let (mut value, mut rest) = both(tokens, allowed);
    while let ["OR", tail @ ..] = rest {
        let (right, tail) = both(tail, allowed);
        value |= right;
        rest = tail;
    }
    (value, rest)
}

fn both<'a, 'b>(tokens: &'a [&'b str], allowed: &[String]) -> (bool, &'a [&'b str]) {
    let (mut value, mut rest) = one(tokens, allowed);
    while let ["AND", tail @ ..] = rest {
        let (right, tail) = one(tail, allowed);
        value &= right;
        rest = tail;
    }
    (value, rest)
}

fn one<'a, 'b>(tokens: &'a [&'b str], allowed: &[String]) -> (bool, &'a [&'b str]) {
    match tokens {
        ["(", tail @ ..] => match either(tail, allowed) {
            (value, [")", tail @ ..]) => (value, tail),
            (_, rest) => (false, rest),
        },
        [name, "WITH", _, tail @ ..] | [name, tail @ ..] => (allowed.iter().any(|a| a == name), tail),
        [] => (false, tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_is_read_as_it_is_meant() {
        let allowed = ["MIT".to_owned(), "Zlib".to_owned()];
        for good in
            ["MIT", "MIT/Apache-2.0", "GPL-3.0 OR (MIT AND Zlib)", "MIT WITH X", "(MIT OR A) AND Zlib"]
        {
            assert!(satisfies(good, &allowed), "{good}");
        }
        for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR A) AND B", "", "(MIT", "MIT )"] {
            assert!(!satisfies(bad, &allowed), "{bad}");
        }
    }
}

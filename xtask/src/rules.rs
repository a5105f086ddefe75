//! The rules of `docs/rules.md`: which code keeps each, and which test would notice.
//!
//! An id counts where it is named. A rule without code or without a test must stand in
//! `docs/rules-uncovered.txt` with a reason, and nothing may stand there that is covered: the list can
//! only become shorter. Whether a test really tests the rule is for its reviewer to say.

use crate::{Checked, Findings, tree};
use std::collections::BTreeMap;
use std::path::Path;

/// Families whose rules need code. An invariant is often kept by no single place.
const NEED_CODE: [&str; 5] = ["V2", "K", "W", "VU", "C"];
const FAMILIES: [&str; 9] = ["V2", "K", "V1", "VU", "W", "C", "VMM", "SD", "I"];

/// Where a rule is named.
#[derive(Debug, Default)]
struct Places {
    code: Vec<String>,
    tests: Vec<String>,
}

pub(crate) fn check(root: &Path) -> Checked {
    let table = tree::read(&root.join("docs/rules.md"))?;
    let uncovered = tree::read(&root.join("docs/rules-uncovered.txt"))?;
    let mut findings = Findings::default();
    let mut rules = BTreeMap::new();
    for id in defined(&table) {
        if rules.insert(id.to_owned(), Places::default()).is_some() {
            findings.wrong(format!("docs/rules.md: {id} is there twice"));
        }
    }
    let mut files = tree::files(root, "crates", ".rs")?;
    files.extend(tree::files(root, "fuzz/fuzz_targets", ".rs")?);
    for file in &files {
        source(file, &mut rules, &mut findings);
    }
    for file in tree::files(root, ".", ".md")? {
        for (number, line) in file.text.lines().enumerate() {
            for id in ids(line).filter(|id| family(id).is_none_or(|f| f != "I")) {
                if !rules.contains_key(id) {
                    findings.wrong(format!("{}:{}: {id} is not in docs/rules.md", file.path, number + 1));
                }
            }
        }
    }
    report(&rules, &excused(&uncovered, &mut findings), &mut findings);
    Ok(findings)
}

/// The ids of the table's rows.
fn defined(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let id = line.strip_prefix("| ")?.split(" |").next()?;
        (ids(id).next() == Some(id)).then_some(id)
    })
}

fn source(file: &tree::Text, rules: &mut BTreeMap<String, Places>, findings: &mut Findings) {
    let whole = ["/tests/", "/testkit/", "fuzz_targets"].iter().any(|part| file.path.contains(part))
        || file.path.ends_with("tests.rs");
    let mut test = whole;
    for (number, line) in file.text.lines().enumerate() {
        // Test modules stand at the end of their file.
        test |= line.trim() == "#[cfg(test)]";
        for id in ids(line) {
            // I1 is a name that a type could have too.
            if family(id) == Some("I") && !line.contains("//") {
                continue;
            }
            let place = format!("{}:{}", file.path.trim_start_matches("crates/"), number + 1);
            match rules.get_mut(id) {
                Some(places) if test => places.tests.push(place),
                Some(places) => places.code.push(place),
                None => findings.wrong(format!("{place}: {id} is not in docs/rules.md")),
            }
        }
    }
}

/// What looks like a rule's id in a text.
fn ids(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'))
        .map(|word| word.trim_end_matches('-'))
        .filter(|word| family(word).is_some())
}

fn family(word: &str) -> Option<&'static str> {
    let invariant = word.strip_prefix('I').is_some_and(|n| {
        !n.starts_with('0') && (1..=2).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit())
    });
    if invariant {
        return Some("I");
    }
    let (family, name) = word.split_once('-')?;
    let name_is_one = name.len() >= 2
        && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'-')
        && name.as_bytes()[0].is_ascii_alphabetic();
    FAMILIES.into_iter().find(|f| *f == family && *f != "I" && name_is_one)
}

/// What a rule has not got, and why.
#[derive(Debug)]
struct Excuse {
    code: bool,
    reason: String,
}

/// `ID test|code reason` by line: `test` for a rule that code keeps and no test names, `code` for one
/// that nothing keeps yet. `#` begins a comment.
fn excused(list: &str, findings: &mut Findings) -> BTreeMap<String, Excuse> {
    let mut excused = BTreeMap::new();
    for line in list.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let mut words = line.splitn(3, ' ');
        let (id, what, reason) = (words.next().unwrap_or(""), words.next(), words.next());
        let (Some(what @ ("test" | "code")), Some(reason)) = (what, reason) else {
            findings.wrong(format!("docs/rules-uncovered.txt: {line:?} is not: ID test|code REASON"));
            continue;
        };
        let excuse = Excuse { code: what == "code", reason: reason.trim().to_owned() };
        if excused.insert(id.to_owned(), excuse).is_some() {
            findings.wrong(format!("docs/rules-uncovered.txt: {id} is there twice"));
        }
    }
    excused
}

fn report(rules: &BTreeMap<String, Places>, excused: &BTreeMap<String, Excuse>, findings: &mut Findings) {
    let brief = |places: &[String]| match places {
        [] => "-".to_owned(),
        [one] => one.clone(),
        [first, more @ ..] => format!("{first} and {} more", more.len()),
    };
    for (id, places) in rules {
        findings.say(format!("{id:<22} {:<58} {}", brief(&places.code), brief(&places.tests)));
        let no_code = places.code.is_empty() && family(id).is_some_and(|f| NEED_CODE.contains(&f));
        let no_test = places.tests.is_empty();
        let list = "docs/rules-uncovered.txt";
        match excused.get(id) {
            Some(_) if !no_code && !no_test => {
                findings.wrong(format!("{id}: it has code and a test now; take it out of {list}"));
            }
            Some(Excuse { code: true, .. }) if !places.code.is_empty() => {
                findings.wrong(format!("{id}: it has code now; in {list} it misses no more than a test"));
            }
            Some(Excuse { code: false, .. }) | None if no_code => {
                findings.wrong(format!("{id}: no code names it"));
            }
            None if no_test => {
                findings.wrong(format!("{id}: no test names it; write one, or give the reason in {list}"));
            }
            _ => {}
        }
    }
    for id in excused.keys().filter(|id| !rules.contains_key(*id)) {
        findings.wrong(format!("docs/rules-uncovered.txt: {id} is not in docs/rules.md"));
    }
    let tested = rules.values().filter(|p| !p.tests.is_empty()).count();
    findings.say(format!("{} rules, {tested} with a test. Not covered:", rules.len()));
    for (id, excuse) in excused {
        let what = if excuse.code { "no code" } else { "no test" };
        findings.say(format!("  {id:<16} {what}: {}", excuse.reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_other_words() {
        let text = "(V2-ENOMSG), I13; W-CREDIT. CRC-32C X-I2 VMM-NO-DATA-IN-JSON, I0 C-3 SD- I123 V2-Endian";
        assert_eq!(ids(text).collect::<Vec<_>>(), ["V2-ENOMSG", "I13", "W-CREDIT", "VMM-NO-DATA-IN-JSON"]);
    }

    fn run(table: &str, text: &str, untested: &str) -> Vec<String> {
        let mut findings = Findings::default();
        let mut rules: BTreeMap<_, _> = defined(table).map(|id| (id.to_owned(), Places::default())).collect();
        let file = tree::Text { path: "crates/a/src/b.rs".into(), text: text.into() };
        source(&file, &mut rules, &mut findings);
        report(&rules, &excused(untested, &mut findings), &mut findings);
        findings.wrong
    }

    #[test]
    fn a_rule_needs_code_and_a_test_or_a_reason() {
        let table = "| W-AB | a rule |\n";
        let code = "// W-AB\n";
        let test = "#[cfg(test)]\nmod tests { // W-AB\n}\n";
        let both = format!("{code}{test}");
        assert_eq!(run(table, &both, ""), Vec::<String>::new());
        assert!(run(table, test, "")[0].contains("no code"));
        assert!(run(table, test, "W-AB test it is hard")[0].contains("no code"));
        assert_eq!(run(table, "", "W-AB code it comes later"), Vec::<String>::new());
        assert!(run(table, code, "")[0].contains("no test"));
        assert_eq!(run(table, code, "W-AB test it is hard"), Vec::<String>::new());
        assert!(run(table, code, "W-AB code it comes later")[0].contains("has code now"));
        assert!(run(table, code, "W-AB test")[0].contains("is not: ID"));
        assert!(run(table, &both, "W-AB test it is hard")[0].contains("a test now"));
        assert!(run("", code, "")[0].contains("not in docs/rules.md"));
    }
}

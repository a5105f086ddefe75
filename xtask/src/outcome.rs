//! How a demo ended, by the last line of `airlift demo --json`.

use crate::{Checked, Findings};
use serde_json::Value;
use std::io::BufRead;

pub(crate) fn check(expected: &str, input: impl BufRead) -> Checked {
    let mut last = None;
    for line in input.lines() {
        last = Some(line.map_err(|e| format!("standard input: {e}"))?);
    }
    let last = last.ok_or("standard input is empty: the demo has said nothing")?;
    let result: Value = serde_json::from_str(&last).map_err(|e| format!("the last line is no JSON: {e}"))?;
    let mut findings = Findings::default();
    let mut expect = |pointer: &str, wanted: Value| {
        let found = result.pointer(pointer).cloned().unwrap_or_default();
        let line = format!("{pointer} = {found}");
        if found == wanted {
            findings.say(line);
        } else {
            findings.wrong(format!("{line}, expected {wanted}"));
        }
    };
    expect("/event", "result".into());
    match expected {
        "completed" => {
            expect("/outcome", "completed".into());
            expect("/source_running", false.into());
            expect("/destination_running", true.into());
            expect("/memory/verified", true.into());
            let devices = result.pointer("/devices").and_then(Value::as_array).map_or(0, Vec::len);
            if devices == 0 {
                return Err("the result names no device".into());
            }
            for index in 0..devices {
                expect(&format!("/devices/{index}/verified"), true.into());
            }
        }
        "source-running" => {
            expect("/outcome", "aborted".into());
            expect("/source_running", true.into());
            expect("/destination_running", false.into());
        }
        other => return Err(format!("{other:?} is not an end: completed or source-running")),
    }
    for counter in ["sequence_gaps", "sequence_duplicates", "interrupts_lost"] {
        expect(&format!("/guest/{counter}"), 0.into());
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"event":"phase"}
{"event":"result","outcome":"completed","source_running":false,"destination_running":true,"memory":{"verified":true},"devices":[{"verified":true}],"guest":{"sequence_gaps":0,"sequence_duplicates":0,"interrupts_lost":0}}"#;

    #[test]
    fn a_verified_end_is_taken_and_each_part_of_it_matters() {
        assert!(check("completed", GOOD.as_bytes()).unwrap().wrong.is_empty());
        for (part, instead) in [
            ("\"completed\"", "\"in_doubt\""),
            ("\"source_running\":false", "\"source_running\":true"),
            ("[{\"verified\":true}]", "[{\"verified\":false}]"),
            ("\"sequence_gaps\":0", "\"sequence_gaps\":1"),
        ] {
            let bad = GOOD.replace(part, instead);
            assert_eq!(check("completed", bad.as_bytes()).unwrap().wrong.len(), 1, "{instead}");
        }
        assert!(check("completed", GOOD.replace("{\"verified\":true}]", "]").as_bytes()).is_err());
        assert!(check("completed", &b""[..]).is_err());
    }

    #[test]
    fn an_end_on_the_source_is_not_a_completed_one() {
        assert!(!check("source-running", GOOD.as_bytes()).unwrap().wrong.is_empty());
    }
}

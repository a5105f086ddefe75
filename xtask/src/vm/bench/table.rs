//! From the VM's lines to the table: medians, quartiles, ratios, and the runs that have failed.

use super::guest;
use super::inside::ROWS;
use super::timeline::TERMS;
use crate::Findings;
use serde_json::Value;
use std::collections::BTreeMap;

/// Airlift's median to QEMU's, with the memory: not more than this is promised.
const PROMISE: f64 = 0.5;

/// All runs of the benchmark.
#[derive(Debug, Default)]
pub(super) struct Results {
    about: Value,
    rows: [Row; ROWS.len()],
}

#[derive(Debug, Default)]
struct Row {
    /// In milliseconds.
    totals: Vec<f64>,
    terms: [Vec<f64>; TERMS.len()],
    /// The downtime that the program itself reports, in milliseconds.
    own: Vec<f64>,
    /// The terms of that downtime, where the program has some: by name, in its order of names.
    own_terms: BTreeMap<String, Vec<f64>>,
    /// What it says beside: the last run's.
    notes: Vec<String>,
    failed: Vec<String>,
}

impl Results {
    /// Reads the lines of `vm-bench-inside`. Run 0 of a row is not counted, unless it has failed.
    pub(super) fn read(output: &str) -> Self {
        let mut results = Self::default();
        for line in output.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()) {
            if line["seed"].is_u64() {
                results.about = line;
                continue;
            }
            let Some(row) =
                line["row"].as_u64().and_then(|row| results.rows.get_mut(usize::try_from(row).ok()?))
            else {
                continue;
            };
            if let Some(error) = line["error"].as_str() {
                row.failed.push(format!("run {}: {error}", line["run"]));
            } else if line["run"] != 0 {
                row.totals.extend(ms(&line["total_us"]));
                for (term, value) in
                    row.terms.iter_mut().zip(line["terms_us"].as_array().into_iter().flatten())
                {
                    term.extend(ms(value));
                }
                let own = &line["own"];
                row.own.extend(own["downtime_ms"].as_f64());
                for (term, value) in own["downtime_terms_ms"].as_object().into_iter().flatten() {
                    row.own_terms.entry(term.clone()).or_default().extend(value.as_f64());
                }
                row.notes = own["notes"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|n| n.as_str().map(str::to_owned))
                    .collect();
            }
        }
        results
    }

    /// Says the table. Runs that failed or are missing, and a promise that is not kept, are wrong.
    pub(super) fn print(&self, runs: u32, findings: &mut Findings) {
        let about = |key: &str| self.about[key].as_str().unwrap_or("?");
        findings.say(format!(
            "In the VM: Linux {}, {}, {}. Seed {}, {runs} runs a row in random order.",
            about("kernel"),
            about("qemu"),
            about("airlift"),
            self.about["seed"]
        ));
        findings.say(format!(
            "One mtty with 2 ports (96 bytes of state) and {} MiB of guest memory, {} MiB of it random and the rest as \
             SeaBIOS leaves it, over one UNIX socket between two processes. Every parameter of the migration is at its \
             default: downtime limit 300 ms for both, QEMU without multifd, Airlift with one data connection. QEMU's guest \
             (q35, TCG) waits in SeaBIOS; Airlift moves a copy of its memory, to which nobody writes.",
            guest::BYTES >> 20,
            self.about["random_mib"]
        ));
        findings.say(
            "Milliseconds from the source's arc out of RUNNING or PRE_COPY to the destination's arc into RUNNING, by the \
             driver's lines in the kernel's log.",
        );
        findings.say("");
        let qemu = median(&self.rows[0].totals);
        findings.say("| | runs | failed | median ms | quartiles | lowest, highest | median to QEMU's | downtime that it reports itself |");
        findings.say("|---|---|---|---|---|---|---|---|");
        for (name, row) in ROWS.iter().zip(&self.rows) {
            findings.say(format!(
                "| {name} | {} | {} | {} | {} to {} | {} to {} | {} | {} |",
                row.totals.len(),
                row.failed.len(),
                shown(median(&row.totals)),
                shown(quantile(&row.totals, 0.25)),
                shown(quantile(&row.totals, 0.75)),
                shown(quantile(&row.totals, 0.0)),
                shown(quantile(&row.totals, 1.0)),
                shown(ratio(median(&row.totals), qemu)),
                shown(median(&row.own)),
            ));
        }
        findings.say("");
        findings.say(format!("| medians of the terms, ms | {} |", ROWS.join(" | ")));
        findings.say(format!("|---|{}", "---|".repeat(ROWS.len())));
        for (index, (name, words)) in TERMS.iter().enumerate() {
            let cells: Vec<_> = self.rows.iter().map(|row| shown(median(&row.terms[index]))).collect();
            findings.say(format!("| {name}: {words} | {} |", cells.join(" | ")));
        }
        findings.say("");
        for (name, row) in ROWS.iter().zip(&self.rows) {
            let terms: Vec<_> =
                row.own_terms.iter().map(|(term, all)| format!("{term} {}", shown(median(all)))).collect();
            if !terms.is_empty() {
                findings.say(format!(
                    "{name}, medians of the terms that it reports itself, ms: {}.",
                    terms.join(", ")
                ));
            }
            for note in &row.notes {
                findings.say(format!("{name} says: {note}"));
            }
        }
        findings.say("");
        for (name, row) in ROWS.iter().zip(&self.rows) {
            for failed in &row.failed {
                findings.wrong(format!("{name}: {failed}"));
            }
            let all = row.totals.len() + row.failed.iter().filter(|f| !f.starts_with("run 0:")).count();
            if u32::try_from(all) != Ok(runs) {
                findings.wrong(format!("{name}: {all} runs of {runs}"));
            }
        }
        match ratio(median(&self.rows[1].totals), qemu) {
            Some(ratio) if ratio <= PROMISE => {
                findings
                    .say(format!("Airlift's median to QEMU's is {ratio:.2}; at most {PROMISE} is promised."));
            }
            Some(ratio) => {
                findings.wrong(format!(
                    "Airlift's median to QEMU's is {ratio:.2}; at most {PROMISE} is promised"
                ));
            }
            None => findings.wrong("there is nothing to compare"),
        }
    }
}

/// A line of `vm-bench-inside` for a reader who waits.
pub(super) fn brief(line: &str) -> String {
    let Ok(value) = serde_json::from_str::<Value>(line) else { return line.to_owned() };
    let row = value["row"].as_u64().and_then(|row| ROWS.get(usize::try_from(row).ok()?));
    match (row, value["error"].as_str()) {
        (Some(row), Some(error)) => format!("run {}, {row}: FAILED: {error}", value["run"]),
        (Some(row), None) => format!("run {}, {row}: {} ms", value["run"], shown(ms(&value["total_us"]))),
        _ => line.to_owned(),
    }
}

fn ms(microseconds: &Value) -> Option<f64> {
    Some(microseconds.as_f64()? / 1000.0)
}

fn ratio(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    Some(one? / other.filter(|o| *o > 0.0)?)
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.2}"))
}

fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The value below which the share `at` of all lies, between two values in proportion.
fn quantile(values: &[f64], at: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    // Walks, so that no number of floating point is an index.
    let mut place = at * f64::from(u32::try_from(last).ok()?);
    let mut index = 0;
    while place >= 1.0 && index < last {
        place -= 1.0;
        index += 1;
    }
    let low = sorted[index];
    Some(low + (sorted[(index + 1).min(last)] - low) * place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        let five = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!((quantile(&five, 0.25), quantile(&five, 0.75)), (Some(2.0), Some(4.0)));
        assert_eq!((quantile(&five, 0.0), quantile(&five, 1.0)), (Some(1.0), Some(5.0)));
        assert_eq!(quantile(&[10.0, 20.0, 30.0, 40.0], 0.25), Some(17.5));
    }

    fn run(row: usize, run: u32, total: u64) -> String {
        let own = json!({ "downtime_ms": 7 });
        json!({ "row": row, "run": run, "total_us": total, "terms_us": [1, 2, 3, 4, 5, total - 15], "own": own })
            .to_string()
            + "\n"
    }

    fn output() -> String {
        let mut all = json!({ "seed": 5, "order": [], "kernel": "6.12" }).to_string() + "\nnot ours\n";
        for row in 0..3 {
            // The first is not counted.
            all += &run(row, 0, 999_000);
        }
        all += &(run(0, 1, 50_000) + &run(1, 2, 20_000) + &run(2, 3, 10_000));
        all += &(run(0, 4, 60_000) + &run(1, 5, 24_000) + &run(2, 6, 12_000));
        all
    }

    fn printed(output: &str) -> Findings {
        let mut findings = Findings::default();
        Results::read(output).print(2, &mut findings);
        findings
    }

    #[test]
    fn the_table_has_medians_of_the_counted_runs_and_their_ratio() {
        let findings = printed(&output());
        assert_eq!(findings.wrong, <[&str; 0]>::default());
        let text = findings.lines.join("\n");
        assert!(
            text.contains("| QEMU | 2 | 0 | 55.00 | 52.50 to 57.50 | 50.00 to 60.00 | 1.00 | 7.00 |"),
            "{text}"
        );
        assert!(text.contains("| Airlift | 2 | 0 | 22.00 |"), "{text}");
        assert!(text.contains("to QEMU's is 0.40"), "{text}");
        assert!(
            text.contains(
                "| quiesce: out of RUNNING or PRE_COPY → arc into STOP_COPY | 0.00 | 0.00 | 0.00 |"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_run_that_failed_or_is_missing_is_wrong() {
        let failed = output()
            .replace(&run(1, 5, 24_000), &(json!({ "row": 1, "run": 5, "error": "no" }).to_string() + "\n"));
        assert_eq!(printed(&failed).wrong, ["Airlift: run 5: no"]);
        let missing = output().replace(&run(1, 5, 24_000), "");
        assert_eq!(printed(&missing).wrong, ["Airlift: 1 runs of 2"]);
        let warming = output()
            .replace(&run(0, 0, 999_000), &(json!({ "row": 0, "run": 0, "error": "no" }).to_string() + "\n"));
        assert_eq!(printed(&warming).wrong, ["QEMU: run 0: no"]);
        assert!(printed("").wrong.contains(&"there is nothing to compare".to_owned()));
    }

    #[test]
    fn a_ratio_above_the_promise_is_wrong() {
        let slow = output().replace("24000", "44000").replace("20000", "40000");
        assert_eq!(printed(&slow).wrong, ["Airlift's median to QEMU's is 0.76; at most 0.5 is promised"]);
    }
}

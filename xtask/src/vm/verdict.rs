//! Whether a run of the kernel suites is a pass: each suite ran, ran tests, none failed, and the kernel
//! has not complained.
//!
//! It reads what was printed and what was left; a suite that prints a false result is believed.

use super::boot::{End, Ran};

/// What the kernel prints when something in it is broken.
const COMPLAINTS: [&str; 9] = [
    "WARNING: ",
    "BUG: ",
    "kernel BUG at",
    "Oops: ",
    "Kernel panic",
    "general protection fault",
    "unable to handle",
    "refcount_t: ",
    "bad page ",
];

/// Taint flags by bit: what the kernel remembers though a message may be lost. The driver's own, out of
/// tree, is none of them.
const TAINTS: [(u32, &str); 4] = [(5, "a bad page"), (7, "an oops"), (9, "a warning"), (14, "a soft lockup")];

/// How many lines of a log are shown.
const TAIL: usize = 40;

/// What a suite is announced with in the programs' output.
pub(crate) const SUITE: &str = "VM: suite ";
/// What its exit code is announced with.
pub(crate) const CODE: &str = "VM: exit code ";

/// The result of all suites on one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) lines: Vec<String>,
    pub(crate) wrong: Vec<String>,
}

/// Judges a run. With a filter a suite may have no test that it fits, but not all of them.
pub(crate) fn judge(ran: &Ran, suites: &[&str], filtered: bool) -> Verdict {
    let mut verdict = Verdict::default();
    let mut passed = 0;
    for suite in suites {
        match suite_result(&ran.output, suite) {
            Ok(counts) if counts.passed == 0 && !filtered => {
                verdict.wrong.push(format!("{suite}: no test ran, which is no pass"));
            }
            Ok(counts) => {
                passed += counts.passed;
                verdict
                    .lines
                    .push(format!("{suite}: {} passed, {} filtered out", counts.passed, counts.filtered));
            }
            Err(wrong) => verdict.wrong.push(format!("{suite}: {wrong}")),
        }
    }
    if filtered && passed == 0 && verdict.wrong.is_empty() {
        verdict.wrong.push("no test fits the filter".into());
    }
    match &ran.end {
        End::Code(0) => {}
        // Said by the suites.
        End::Code(_) if !verdict.wrong.is_empty() => {}
        End::Code(code) => verdict.wrong.push(format!("the VM's script ended with {code}")),
        End::NotReady(reason) => verdict.wrong.push(format!("the VM was not made ready: {reason}")),
        End::Died(how) => verdict.wrong.push(format!("the VM died without an exit code: {how}")),
        End::Deadline(limit) => {
            let last = ran.output.lines().next_back().unwrap_or("nothing");
            verdict
                .wrong
                .push(format!("no end after {} s; the last that was printed: {last}", limit.as_secs()));
        }
    }
    verdict.wrong.extend(complaints(ran));
    verdict
}

/// What the kernel has complained about, each with the first line of it.
pub(crate) fn complaints(ran: &Ran) -> Vec<String> {
    let said: Vec<&str> =
        ran.console.lines().filter(|line| COMPLAINTS.iter().any(|c| line.contains(c))).collect();
    let mut all: Vec<String> = said
        .first()
        .map(|first| format!("the kernel complains ({} lines): {first}", said.len()))
        .into_iter()
        .collect();
    let taints: Vec<_> = TAINTS
        .iter()
        .filter(|(bit, _)| ran.tainted.is_some_and(|flags| flags >> bit & 1 == 1))
        .map(|(_, name)| *name)
        .collect();
    if !taints.is_empty() {
        all.push(format!("the kernel's taint flags say: {}", taints.join(", ")));
    }
    all
}

/// The last lines of a log.
pub(crate) fn tail(text: &str) -> impl Iterator<Item = &str> {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL);
    lines.into_iter().skip(from)
}

#[derive(Debug, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    filtered: u64,
}

/// A suite's counts if it has passed, or what is wrong with it.
fn suite_result(output: &str, suite: &str) -> Result<Counts, String> {
    let begin = format!("{SUITE}{suite}");
    let Some(at) = output.lines().position(|line| line == begin) else {
        return Err("it was not started".into());
    };
    let own = output.lines().skip(at + 1);
    let (mut counts, mut code) = (None, None);
    for line in own.take_while(|line| !line.starts_with(SUITE)) {
        // Not only at the beginning: what a test's child prints may stand before it.
        if let Some((_, result)) = line.split_once("test result: ") {
            counts = counted(result);
        }
        if let Some(text) = line.strip_prefix(CODE) {
            code = text.parse::<i32>().ok();
        }
    }
    match (code, counts) {
        (None, _) => Err("it has not come to its end".into()),
        (Some(code), None) => Err(format!("exit code {code} and no result: it has died")),
        (Some(0), Some(counts)) if counts.failed == 0 => Ok(counts),
        (Some(code), Some(counts)) => {
            Err(format!("{} failed, {} passed, exit code {code}", counts.failed, counts.passed))
        }
    }
}

/// Reads `ok. 3 passed; 0 failed; 0 ignored; 0 measured; 5 filtered out; finished in 0.01s`.
fn counted(result: &str) -> Option<Counts> {
    let of = |name: &str| {
        let part = result.split([';', '.']).map(str::trim).find(|part| part.ends_with(name))?;
        part.split(' ').next()?.parse().ok()
    };
    Some(Counts { passed: of(" passed")?, failed: of(" failed")?, filtered: of(" filtered out")? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PASS: &str =
        "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 5 filtered out; finished in 0.01s";
    const NONE: &str =
        "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 8 filtered out; finished in 0.00s";
    const FAIL: &str =
        "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";

    fn ran(suites: &[(&str, &str, i32)]) -> Ran {
        let output = suites
            .iter()
            .map(|(name, result, code)| format!("{SUITE}{name}\n{result}\n{CODE}{code}\n"))
            .collect();
        let end = End::Code(i32::from(suites.iter().any(|s| s.2 != 0)));
        Ran { end, tainted: Some(1 << 12), output, console: "[    0.2] DMAR: fine\nVM: exit code 0\n".into() }
    }

    fn wrong(ran: &Ran, filtered: bool) -> String {
        judge(ran, &["a", "b"], filtered).wrong.join("\n")
    }

    #[test]
    fn suites_that_ran_tests_on_a_quiet_kernel_pass() {
        let verdict = judge(&ran(&[("a", PASS, 0), ("b", PASS, 0)]), &["a", "b"], false);
        assert_eq!(verdict.wrong, <[&str; 0]>::default());
        assert_eq!(verdict.lines[0], "a: 3 passed, 5 filtered out");
    }

    #[test]
    fn a_suite_without_tests_is_no_pass_unless_a_filter_chose_the_other() {
        let one = ran(&[("a", PASS, 0), ("b", NONE, 0)]);
        assert_eq!(wrong(&one, false), "b: no test ran, which is no pass");
        assert_eq!(wrong(&one, true), "");
        assert_eq!(wrong(&ran(&[("a", NONE, 0), ("b", NONE, 0)]), true), "no test fits the filter");
    }

    #[test]
    fn a_failed_test_is_no_pass_whatever_the_exit_code() {
        for code in [101, 0] {
            let wrong = wrong(&ran(&[("a", FAIL, code), ("b", PASS, 0)]), false);
            assert!(wrong.starts_with("a: 1 failed, 2 passed"), "{wrong}");
        }
        // All passed, and then the program died.
        assert!(wrong(&ran(&[("a", PASS, 139), ("b", PASS, 0)]), false).contains("exit code 139"));
        assert_eq!(
            wrong(&ran(&[("a", "half a li", 134), ("b", PASS, 0)]), false),
            "a: exit code 134 and no result: it has died"
        );
    }

    #[test]
    fn a_result_is_its_own_suites() {
        assert_eq!(wrong(&ran(&[("a", PASS, 0)]), false), "b: it was not started");
        let mut cut = ran(&[("a", PASS, 0)]);
        cut.output.push_str("VM: suite b\n");
        assert_eq!(wrong(&cut, false), "b: it has not come to its end");
    }

    #[test]
    fn a_vm_that_does_not_come_to_its_end_is_no_pass() {
        let all = [("a", PASS, 0), ("b", PASS, 0)];
        let died = Ran { end: End::Died("QEMU".into()), ..ran(&all) };
        assert!(wrong(&died, false).contains("without an exit code"));
        let not_ready = Ran { end: End::NotReady("no mtty".into()), ..ran(&all) };
        assert!(wrong(&not_ready, false).contains("no mtty"));
        let script = Ran { end: End::Code(2), ..ran(&all) };
        assert!(wrong(&script, false).contains("ended with 2"));
        let mut late = Ran { end: End::Deadline(Duration::from_secs(300)), ..ran(&all) };
        late.output.push_str("test waits_for_ever ... ");
        assert!(wrong(&late, false).contains("waits_for_ever"));
    }

    #[test]
    fn a_kernel_that_complains_is_no_pass() {
        for line in [
            "[    3.1] WARNING: CPU: 0 PID: 70 at drivers/vfio/group.c:1",
            "[    3.1] BUG: kernel NULL pointer dereference, address: 0",
            "[    3.1] Oops: general protection fault, 0000",
            "[    3.1] Kernel panic - not syncing",
            "[    3.1] refcount_t: underflow; use-after-free.",
        ] {
            let mut ran = ran(&[("a", PASS, 0), ("b", PASS, 0)]);
            ran.console.push_str(line);
            assert!(wrong(&ran, false).contains(line), "{line}");
        }
    }

    #[test]
    fn a_warning_whose_text_is_lost_is_found_by_the_taint_flags() {
        let ran = Ran { tainted: Some(1 << 9 | 1 << 12), ..ran(&[("a", PASS, 0), ("b", PASS, 0)]) };
        assert_eq!(wrong(&ran, false), "the kernel's taint flags say: a warning");
    }
}

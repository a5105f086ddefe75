//! Checks of the workspace that cargo does not make: `cargo xtask CHECK`.
//!
//! Each check is a module of its own and gives a [`Findings`]: lines to print, and what is wrong.
//! Nothing here is part of the command or of any library.
#![forbid(unsafe_code)]

mod bench;
mod deps;
mod licences;
mod links;
mod outcome;
mod rules;
mod size;
mod tree;
mod vm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask CHECK

  rules      every rule of docs/rules.md: where it is kept and where it is tested
  links      links and paths in *.md lead somewhere
  deps       dependencies between our crates point one way; two crates have unsafe code
  licences   every dependency has a licence that deny.toml allows
  size       files above 600 lines are named, above 1000 refused
  outcome completed|source-running
             reads `airlift demo --json` from standard input and checks how it ended
  bench [PASSES]
             runs the release build's demo in several ways, in turns, and prints the medians; 5 passes
  vm-test [--kernel VERSION]... [--filter TEXT] [--deadline SECONDS] [--option WORD]... [--keep]
             builds test kernels and runs the kernel suites in a VM; AIRLIFT_VM=skip leaves it out
  vm-run [--kernel VERSION] [--root-image] [--deadline SECONDS] [--option WORD]... [--keep] [PROGRAM [ARG]...]
             runs a program in that VM, or a shell; --root-image: in a Debian with QEMU
  vm-bench [--runs N] [--kernel VERSION] [--seed N] [--random MIB] [--keep]
             QEMU and Airlift move the same device and memory in that VM, in random order; 20 runs of each;
             --random: so much of the guest's 32 MiB has random content";

/// What a check says: for the reader, and against the tree.
#[derive(Debug, Default)]
struct Findings {
    lines: Vec<String>,
    wrong: Vec<String>,
}

impl Findings {
    fn say(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    fn wrong(&mut self, line: impl Into<String>) {
        self.wrong.push(line.into());
    }
}

type Checked = Result<Findings, String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let root = root();
    let checked = match args[..] {
        ["rules"] => rules::check(&root),
        ["links"] => links::check(&root),
        ["deps"] => deps::check(&root),
        ["licences"] => licences::check(&root),
        ["size"] => size::check(&root),
        ["bench"] => bench::run(&root, 5),
        ["bench", passes] => {
            passes.parse().map_err(|_| format!("{passes:?} is no number")).and_then(|n| bench::run(&root, n))
        }
        ["vm-test", ref options @ ..] => vm::test(&root, options),
        ["vm-bench", ref options @ ..] => vm::bench(&root, options),
        // What vm-bench runs inside of the VM.
        ["vm-bench-inside", ref options @ ..] => vm::bench_inside(options),
        ["vm-run", ref options @ ..] => vm::run_program(&root, options),
        ["outcome", expected] => outcome::check(expected, std::io::stdin().lock()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let findings = match checked {
        Ok(findings) => findings,
        Err(error) => Findings { wrong: vec![error], ..Findings::default() },
    };
    for line in &findings.lines {
        println!("{line}");
    }
    for line in &findings.wrong {
        eprintln!("wrong: {line}");
    }
    if findings.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The workspace: the folder above this crate's.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

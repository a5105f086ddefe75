//! Runs `airlift demo` and other subcommands as processes, and reads their JSON lines.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// The command under test.
pub(crate) const AIRLIFT: &str = env!("CARGO_BIN_EXE_airlift");

/// Demos that may run at once: each is half a dozen busy processes.
static FREE: (Mutex<u32>, Condvar) = (Mutex::new(2), Condvar::new());

struct Slot;

impl Slot {
    fn take() -> Self {
        let mut free = FREE.1.wait_while(FREE.0.lock().unwrap(), |free| *free == 0).unwrap();
        *free -= 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Ok(mut free) = FREE.0.lock() {
            *free += 1;
        }
        FREE.1.notify_one();
    }
}

/// A demo that has ended.
#[derive(Debug)]
pub(crate) struct Demo {
    /// Its arguments.
    pub(crate) args: String,
    /// Its exit code.
    pub(crate) code: i32,
    /// All of its lines.
    pub(crate) lines: Vec<Value>,
    /// The last of them.
    pub(crate) result: Value,
}

/// Runs a small demo with `--json` and these arguments besides.
pub(crate) fn demo(args: &[&str]) -> Demo {
    let _slot = Slot::take();
    let mut all = vec!["demo", "--json", "--timeout", "60s"];
    if !args.contains(&"--state-size") {
        all.extend(["--state-size", "4MiB"]);
    }
    if !args.contains(&"--memory") {
        all.extend(["--memory", "16MiB"]);
    }
    all.extend(args);
    let output = Command::new(AIRLIFT).args(&all).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let result = lines.last().cloned().unwrap_or_default();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(result["event"], "result", "{all:?} gave no result; stderr: {errors}");
    Demo { args: args.join(" "), code: output.status.code().unwrap_or(-1), lines, result }
}

impl Demo {
    /// What to print when something is not as it must be.
    pub(crate) fn story(&self) -> String {
        format!("demo {}: exit code {}, result {:#}", self.args, self.code, self.result)
    }

    /// The migration completed and everything was found right.
    #[track_caller]
    pub(crate) fn assert_completed(&self) {
        assert_eq!(self.code, 0, "{}", self.story());
        assert_arrived(&self.result, &self.story());
    }

    /// Lines of this event from the process `process` of `host` in the first migration.
    pub(crate) fn events<'a>(&'a self, event: &'a str, host: &'a str, process: &'a str) -> Vec<&'a Value> {
        let wanted = |line: &&Value| {
            line["event"] == event
                && line["host"] == host
                && line["process"] == process
                && (line["attempt"] == 1 || host == "source")
        };
        self.lines.iter().filter(wanted).collect()
    }

    /// `(from, to, start_ns, end_ns)` of the arcs that a device's own server logged.
    pub(crate) fn arcs(&self, host: &str, device: &str) -> Vec<(String, String, u64, u64)> {
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        self.events("transition", host, device)
            .into_iter()
            .map(|t| {
                let time = |key: &str| t[key].as_u64().unwrap();
                (text(&t["from"]), text(&t["to"]), time("start_ns"), time("end_ns"))
            })
            .collect()
    }
}

/// A result of a migration that completed and was verified.
#[track_caller]
pub(crate) fn assert_arrived(result: &Value, story: &str) {
    assert_eq!(result["outcome"], "completed", "{story}");
    assert_eq!(result["source_running"], false, "{story}");
    assert_eq!(result["destination_running"], true, "{story}");
    assert_all_right(result, story);
}

/// The guest found nothing missing, doubled or changed.
#[track_caller]
pub(crate) fn assert_all_right(result: &Value, story: &str) {
    for count in ["sequence_gaps", "sequence_duplicates", "interrupts_lost", "interrupts_extra"] {
        assert_eq!(result["guest"][count], 0, "{count}: {story}");
    }
    assert_eq!(result["memory"]["verified"], true, "{story}");
    for device in result["devices"].as_array().unwrap() {
        assert_eq!(device["verified"], true, "{}: {story}", device["id"]);
    }
}

/// A process of the command that is killed when the test ends before it.
pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: std::sync::mpsc::Receiver<Value>,
}

impl Process {
    /// Starts it with `--json`.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut command = Command::new(AIRLIFT);
        command.args(args).stderr(Stdio::inherit());
        Self::spawn(command)
    }

    /// Starts this command with `--json`.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.arg("--json").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        let out = child.stdout.take().unwrap();
        let (to, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if to.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { child, stdin, lines }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// The next line of this event; other lines are passed over.
    pub(crate) fn wait_for(&self, event: &str) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|e| panic!("no line {event}: {e}"));
            if line["event"] == event {
                return line;
            }
        }
    }

    /// Writes a line to its stdin.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Its standard error, where that is piped.
    pub(crate) fn stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().unwrap()
    }

    /// Kills it, and waits until it is gone: what it had open is closed then.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end, and gives all of its lines that nobody has waited for.
    pub(crate) fn collect(mut self) -> (Vec<Value>, i32) {
        self.stdin = None;
        let lines = self.lines.iter().collect();
        (lines, self.child.wait().unwrap().code().unwrap_or(-1))
    }

    /// Waits for its result and its end.
    pub(crate) fn finish(mut self) -> (Value, i32) {
        let result = self.wait_for("result");
        self.stdin = None;
        (result, self.child.wait().unwrap().code().unwrap_or(-1))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

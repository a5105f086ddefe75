//! The processes of the demo: started, read, told, ended.
//!
//! Every line of every process arrives in one place, [`Cast::until`], and is taken into that
//! process's [`Facts`]; whoever waits, waits for facts. Nothing is inherited but stdin, stdout and
//! stderr, which are pipes.

use super::DemoError;
use crate::json::{Output, ReportView};
use crate::lines::Listening;
use airlift_core::Side;
use airlift_softdevice::SoftEvent;
use airlift_softdevice::simvm::SimReport;
use crossbeam_channel::{Receiver, Sender, unbounded};
use serde::Deserialize;
use serde_json::Value;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest line that is taken from a process.
const MAX_LINE: u64 = 16 << 20;
/// Lines of stderr that are kept for an error's text.
const STDERR_LINES: usize = 12;

/// Names a process of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChildId(usize);

/// What a process is, for output.
#[derive(Clone, Debug)]
pub(crate) struct Name {
    /// Its host.
    pub(crate) side: Side,
    /// The migration that it was started for, from 1.
    pub(crate) attempt: u32,
    /// `send`, `receive`, `sim-vm`, or the device's id.
    pub(crate) role: String,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of the {}", self.role, self.side)
    }
}

/// What is known of a process from its lines.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// It listens there.
    pub(crate) listening: Option<String>,
    /// `send`, `receive`: the phase that began last.
    pub(crate) phase: String,
    /// It is held at a phase.
    pub(crate) held: bool,
    /// `send`, `receive`: its result.
    pub(crate) result: Option<ReportView>,
    /// `resolve`: what it found and did.
    pub(crate) resolved: Option<String>,
    /// `soft-device`: its own log.
    pub(crate) soft: Vec<SoftEvent>,
    /// `sim-vm`: its answers to `report`, counted.
    pub(crate) reports: u64,
    /// `sim-vm`: the last of them.
    pub(crate) report: Option<SimReport>,
    /// `sim-vm`: its answers to `check`, counted.
    pub(crate) checks: u64,
    /// `sim-vm`: the last of them.
    pub(crate) check: Option<SimReport>,
    /// It has ended.
    pub(crate) ended: Option<ExitStatus>,
    /// It was killed by the demo, at this moment of CLOCK_MONOTONIC in nanoseconds.
    pub(crate) killed_ns: Option<u64>,
}

struct Child {
    name: Name,
    process: std::process::Child,
    stdin: Option<ChildStdin>,
    stderr: Arc<Mutex<VecDeque<String>>>,
    is_device: bool,
    facts: Facts,
}

enum Message {
    Line(ChildId, String),
    Ended(ChildId),
}

/// Takes each line of each process, as it comes.
pub(crate) trait Audience {
    /// A line came. `value` is the line's JSON.
    fn line(&mut self, name: &Name, event: &str, value: &Value);
}

/// All processes of a demo.
pub(crate) struct Cast {
    children: Vec<Child>,
    to: Sender<Message>,
    from: Receiver<Message>,
    output: Arc<Output>,
    audience: Box<dyn Audience>,
    program: std::path::PathBuf,
}

impl Cast {
    /// No process yet.
    ///
    /// # Errors
    /// When this program's own path is not known.
    pub(crate) fn new(output: Arc<Output>, audience: Box<dyn Audience>) -> Result<Self, DemoError> {
        let program = std::env::current_exe()
            .map_err(|e| DemoError::new(format!("this program's own path is not known: {e}")))?;
        let (to, from) = unbounded();
        Ok(Self { children: Vec::new(), to, from, output, audience, program })
    }

    /// Starts `airlift` with these arguments.
    ///
    /// # Errors
    /// When the process or its readers cannot be started.
    pub(crate) fn spawn(&mut self, name: Name, args: Vec<OsString>) -> Result<ChildId, DemoError> {
        let id = ChildId(self.children.len());
        let failed = |e: std::io::Error| DemoError::new(format!("{name} cannot be started: {e}"));
        let mut process = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // The terminal's SIGINT is for the demo alone: it then cancels in order.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let stdin = process.stdin.take();
        let stderr = Arc::new(Mutex::new(VecDeque::new()));
        let (out, err) = (process.stdout.take(), process.stderr.take());
        self.children.push(Child {
            name: name.clone(),
            process,
            stdin,
            stderr: Arc::clone(&stderr),
            is_device: !matches!(name.role.as_str(), "send" | "receive" | "sim-vm" | "resolve"),
            facts: Facts::default(),
        });
        let to = self.to.clone();
        std::thread::Builder::new()
            .name("child-out".into())
            .spawn(move || {
                if let Some(out) = out {
                    each_line(out, |line| to.send(Message::Line(id, line)).is_ok());
                }
                let _ = to.send(Message::Ended(id));
            })
            .map_err(failed)?;
        let label = name.to_string();
        let forward = std::env::var_os("AIRLIFT_LOG").is_some();
        std::thread::Builder::new()
            .name("child-err".into())
            .spawn(move || {
                let Some(err) = err else { return };
                each_line(err, |line| {
                    if forward {
                        eprintln!("[{label}] {line}");
                    }
                    let mut kept = stderr.lock().unwrap_or_else(PoisonError::into_inner);
                    if kept.len() == STDERR_LINES {
                        kept.pop_front();
                    }
                    kept.push_back(line);
                    true
                });
            })
            .map_err(failed)?;
        Ok(id)
    }

    /// What is known of a process.
    pub(crate) fn facts(&self, id: ChildId) -> &Facts {
        &self.children[id.0].facts
    }

    /// Its name.
    pub(crate) fn name(&self, id: ChildId) -> &Name {
        &self.children[id.0].name
    }

    /// Its process id.
    pub(crate) fn pid(&self, id: ChildId) -> u32 {
        self.children[id.0].process.id()
    }

    /// Sends a line to a process. One that has ended does not mind.
    pub(crate) fn tell(&mut self, id: ChildId, line: &str) {
        if let Some(stdin) = &mut self.children[id.0].stdin
            && writeln!(stdin, "{line}").and_then(|()| stdin.flush()).is_err()
        {
            self.children[id.0].stdin = None;
        }
    }

    /// Kills a process, by its id and nothing else.
    pub(crate) fn kill(&mut self, id: ChildId) {
        let child = &mut self.children[id.0];
        if child.facts.ended.is_none() {
            // The only error is that it has ended already.
            let _ = child.process.kill();
            child.facts.killed_ns = Some(super::now_ns());
        }
    }

    /// Takes lines until `check` gives an answer.
    ///
    /// # Errors
    /// When `deadline` passes first; `what` names what was waited for.
    pub(crate) fn until<T>(
        &mut self,
        deadline: Instant,
        what: &str,
        mut check: impl FnMut(&Self) -> Option<T>,
    ) -> Result<T, DemoError> {
        loop {
            // Everything that is there first: the answer may rest on several lines.
            while let Ok(message) = self.from.try_recv() {
                self.absorb(message);
            }
            if let Some(answer) = check(self) {
                return Ok(answer);
            }
            match self.from.recv_deadline(deadline) {
                Ok(message) => self.absorb(message),
                Err(_) => return Err(DemoError::new(format!("waited in vain for {what}"))),
            }
        }
    }

    /// As [`until`](Self::until), and fails when one of `needed` ends before the answer is there.
    ///
    /// # Errors
    /// When one of `needed` ends, with its last words; or the deadline passes.
    pub(crate) fn until_alive<T>(
        &mut self,
        deadline: Instant,
        what: &str,
        needed: &[ChildId],
        mut check: impl FnMut(&Self) -> Option<T>,
    ) -> Result<T, DemoError> {
        let answer = self.until(deadline, what, |cast| match check(cast) {
            Some(answer) => Some(Ok(answer)),
            None => needed.iter().find(|id| cast.facts(**id).ended.is_some()).map(|id| Err(*id)),
        });
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ended)) => Err(self.ended_early(ended, what)),
            Err(error) => Err(self.with_last_words(error, needed)),
        }
    }

    fn ended_early(&self, id: ChildId, what: &str) -> DemoError {
        let child = &self.children[id.0];
        let status = child.facts.ended.map(|s| s.to_string()).unwrap_or_default();
        let error = DemoError::new(format!("{} ended ({status}) before {what}", child.name));
        let error = match child.facts.result.as_ref().and_then(|r| r.error.clone()) {
            Some(cause) => error.because(cause),
            None => error,
        };
        self.with_last_words(error, &[id])
    }

    fn with_last_words(&self, error: DemoError, of: &[ChildId]) -> DemoError {
        let mut words = Vec::new();
        for id in of {
            let child = &self.children[id.0];
            let kept = child.stderr.lock().unwrap_or_else(PoisonError::into_inner);
            words.extend(kept.iter().map(|line| format!("{}: {line}", child.name)));
        }
        if words.is_empty() {
            error
        } else {
            error.advise(format!("its last words were: {}", words.join(" | ")))
        }
    }

    fn absorb(&mut self, message: Message) {
        match message {
            Message::Ended(id) => {
                let child = &mut self.children[id.0];
                child.stdin = None;
                // Its output has ended, so it is about to be gone.
                child.facts.ended = child.process.wait().ok();
            }
            Message::Line(id, line) => match serde_json::from_str::<Value>(&line) {
                Ok(value) => self.take(id, value),
                Err(_) => tracing::warn!(%line, "{} wrote a line that is not JSON", self.children[id.0].name),
            },
        }
    }

    fn take(&mut self, id: ChildId, mut value: Value) {
        let child = &mut self.children[id.0];
        let event = value.get("event").and_then(Value::as_str).unwrap_or_default().to_owned();
        let facts = &mut child.facts;
        match event.as_str() {
            "listening" => facts.listening = typed::<Listening>(&value).map(|l| l.uri),
            "phase" => facts.phase = value["phase"].as_str().unwrap_or_default().to_owned(),
            "held" => facts.held = true,
            "result" if child.name.role == "resolve" => {
                facts.resolved = value["message"].as_str().map(ToOwned::to_owned);
            }
            "result" => facts.result = typed(&value),
            "attached" | "detached" | "reset" | "transition" | "stopped" | "loaded" if child.is_device => {
                facts.soft.extend(typed::<SoftEvent>(&value));
            }
            "report" => {
                facts.report = typed(&value);
                facts.reports += 1;
            }
            "check" => {
                facts.check = typed(&value);
                facts.checks += 1;
            }
            _ => {}
        }
        self.audience.line(&child.name, &event, &value);
        if self.output.is_json()
            && let Value::Object(fields) = &mut value
        {
            // A side's own result is not the demo's.
            if event == "result" {
                fields.insert("event".into(), "side-result".into());
            }
            fields.insert("host".into(), child.name.side.to_string().into());
            fields.insert("process".into(), child.name.role.clone().into());
            fields.insert("attempt".into(), child.name.attempt.into());
            self.output.raw(&value.to_string());
        }
    }

    /// Ends these processes: a line, then the end of stdin, then, for one that does not listen, a kill.
    pub(crate) fn end(&mut self, ids: &[ChildId]) {
        for id in ids {
            self.tell(*id, "quit");
            self.children[id.0].stdin = None;
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        let all = |cast: &Self| ids.iter().all(|id| cast.facts(*id).ended.is_some()).then_some(());
        if self.until(deadline, "the end of processes", all).is_err() {
            for id in ids {
                if self.facts(*id).ended.is_none() {
                    tracing::warn!("{} does not end by itself and is killed", self.name(*id));
                    self.kill(*id);
                }
            }
            let deadline = Instant::now() + Duration::from_secs(5);
            let _ = self.until(deadline, "the end of processes", all);
        }
    }
}

impl Drop for Cast {
    /// No process outlives the demo, however it ends.
    fn drop(&mut self) {
        for child in &mut self.children {
            if child.facts.ended.is_none() {
                let _ = child.process.kill();
                let _ = child.process.wait();
            }
        }
    }
}

/// The line's content as `T`; a line that does not fit is logged and left out.
fn typed<T: for<'de> Deserialize<'de>>(value: &Value) -> Option<T> {
    T::deserialize(value)
        .inspect_err(|error| tracing::warn!(%error, %value, "a line of a process does not fit its event"))
        .ok()
}

/// Calls `take` with each line until it says no, the stream ends, or a line is too long.
fn each_line(stream: impl Read, mut take: impl FnMut(String) -> bool) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        match (&mut reader).take(MAX_LINE).read_line(&mut line) {
            Ok(1..) if line.ends_with('\n') => {
                line.pop();
                if !take(line) {
                    return;
                }
            }
            _ => return,
        }
    }
}

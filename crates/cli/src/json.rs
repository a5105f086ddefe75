//! The machine-readable output: one JSON object per line, each with `schema` and `event`, the last
//! one with `event: "result"`.
//!
//! The shapes here are what scripts rely on. They are written apart from the engine's own types, so
//! that a change of those shows up as a compile error here and not as a changed output.

use airlift::{DeviceReport, DowntimeTerms, Event, MemoryReport, MigrationReport, Outcome, Running};
use airlift_core::{CompatReport, Errno, Failure};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::sync::{Mutex, PoisonError};

/// The version of the lines' shape.
pub(crate) const SCHEMA: &str = "airlift.1";

/// Where a subcommand writes: JSON lines, or text for a person, never both.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    // Guards whole lines; the threads of a migration print too.
    line: Mutex<()>,
}

#[derive(Serialize)]
struct Line<'a, T> {
    schema: &'static str,
    event: &'a str,
    #[serde(flatten)]
    body: &'a T,
}

/// A value that names its event itself.
#[derive(Serialize)]
struct Tagged<'a, T> {
    schema: &'static str,
    #[serde(flatten)]
    event: &'a T,
}

/// A failure with its events' shape.
#[derive(Serialize)]
struct Failed {
    failure: ErrorView,
}

impl Output {
    /// JSON lines if `json`, else text.
    pub(crate) const fn new(json: bool) -> Self {
        Self { json, line: Mutex::new(()) }
    }

    /// Whether lines are JSON.
    pub(crate) const fn is_json(&self) -> bool {
        self.json
    }

    fn write(&self, line: &str) {
        let _whole = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = std::io::stdout().lock();
        // A reader that went away must not end a migration.
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    }

    /// One JSON line; nothing when the output is text.
    pub(crate) fn event<T: Serialize>(&self, event: &str, body: &T) {
        if self.json {
            self.serialized(&Line { schema: SCHEMA, event, body });
        }
    }

    /// An event of the engine as a JSON line; nothing when the output is text.
    pub(crate) fn engine(&self, event: &Event) {
        if !self.json {
            return;
        }
        match event {
            Event::Failed { failure } => self.event("failed", &Failed { failure: failure.into() }),
            other => self.tagged(other),
        }
    }

    /// A value that has a field `event` of its own as a JSON line; nothing when the output is text.
    pub(crate) fn tagged<T: Serialize>(&self, event: &T) {
        if self.json {
            self.serialized(&Tagged { schema: SCHEMA, event });
        }
    }

    /// A line that is JSON already, passed on as it is; nothing when the output is text.
    pub(crate) fn raw(&self, line: &str) {
        if self.json {
            self.write(line);
        }
    }

    /// A line for a person; nothing when the output is JSON.
    pub(crate) fn say(&self, text: impl AsRef<str>) {
        if !self.json {
            self.write(text.as_ref());
        }
    }

    fn serialized<T: Serialize>(&self, line: &T) {
        match serde_json::to_string(line) {
            Ok(text) => self.write(&text),
            Err(error) => tracing::error!(%error, "an event cannot be written as JSON"),
        }
    }
}

/// An error number by name and value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrnoView {
    /// The symbolic name; empty when it is not known.
    pub(crate) name: String,
    /// The value.
    pub(crate) number: i32,
}

impl From<Errno> for ErrnoView {
    fn from(errno: Errno) -> Self {
        Self { name: errno.name().unwrap_or_default().to_owned(), number: errno.0 }
    }
}

/// A failure as scripts see it. Every field is always there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrorView {
    /// `source` or `destination`; null when it is neither's alone.
    pub(crate) side: Option<String>,
    /// The device.
    pub(crate) device: Option<String>,
    /// The phase of that side.
    pub(crate) phase: Option<String>,
    /// The device's state.
    pub(crate) state: Option<String>,
    /// The error number.
    pub(crate) errno: Option<ErrnoView>,
    /// What happened.
    pub(crate) message: String,
    /// Why; often the other side's.
    pub(crate) cause: Option<Box<Self>>,
    /// What to do.
    pub(crate) advice: Option<String>,
}

impl From<&Failure> for ErrorView {
    fn from(failure: &Failure) -> Self {
        Self {
            side: Some(failure.side.to_string()),
            device: failure.device.as_ref().map(ToString::to_string),
            phase: Some(failure.phase.to_string()),
            state: failure.state.map(|s| s.to_string()),
            errno: failure.errno.map(Into::into),
            message: failure.message.clone(),
            cause: failure.cause.as_deref().map(|c| Box::new(c.into())),
            advice: failure.advice.clone(),
        }
    }
}

impl ErrorView {
    /// A failure that no side and no device can be named for.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            side: None,
            device: None,
            phase: None,
            state: None,
            errno: None,
            message: message.into(),
            cause: None,
            advice: None,
        }
    }

    /// The same on this side.
    pub(crate) fn on(mut self, side: &str) -> Self {
        self.side = Some(side.to_owned());
        self
    }

    /// The same with the device named.
    pub(crate) fn device(mut self, device: &str) -> Self {
        self.device = Some(device.to_owned());
        self
    }

    /// The same with the phase.
    pub(crate) fn phase(mut self, phase: &str) -> Self {
        self.phase = Some(phase.to_owned());
        self
    }

    /// The same with its cause.
    pub(crate) fn because(mut self, cause: Option<Self>) -> Self {
        self.cause = cause.map(Box::new);
        self
    }

    /// The same with advice.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The same with an error number.
    pub(crate) fn errno(mut self, errno: Option<Errno>) -> Self {
        self.errno = errno.map(Into::into);
        self
    }
}

/// The result line of `send` and of `receive`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ReportView {
    /// Whose report it is: `source` or `destination`.
    pub(crate) side: String,
    /// The session's id.
    pub(crate) session: String,
    /// The end.
    pub(crate) outcome: Outcome,
    /// true, false or "unknown".
    pub(crate) source_running: Running,
    /// true, false or "unknown".
    pub(crate) destination_running: Running,
    /// Milliseconds of the whole session.
    pub(crate) total_ms: f64,
    /// Milliseconds from the call to pause until RUNNING arrived.
    pub(crate) downtime_ms: Option<f64>,
    /// Milliseconds without vCPUs in a rollback.
    pub(crate) blackout_ms: Option<f64>,
    /// The downtime's terms.
    pub(crate) downtime_terms_ms: Option<DowntimeTerms>,
    /// Rounds of memory before the stop.
    pub(crate) rounds: u32,
    /// By device.
    pub(crate) devices: Vec<DeviceReport>,
    /// Memory.
    pub(crate) memory: MemoryReport,
    /// The comparison of the sides.
    pub(crate) compatibility: Option<CompatReport>,
    /// Declarations and fallbacks that it rests on.
    pub(crate) notes: Vec<String>,
    /// What failed.
    pub(crate) error: Option<ErrorView>,
    /// The exit code of the process.
    pub(crate) exit_code: u8,
}

impl ReportView {
    /// The report of `side`.
    pub(crate) fn new(side: &str, report: &MigrationReport) -> Self {
        Self {
            side: side.to_owned(),
            session: report.session.clone(),
            outcome: report.outcome,
            source_running: report.source_running,
            destination_running: report.destination_running,
            total_ms: report.total_ms,
            downtime_ms: report.downtime_ms,
            blackout_ms: report.blackout_ms,
            downtime_terms_ms: report.downtime_terms_ms,
            rounds: report.rounds,
            devices: report.devices.clone(),
            memory: report.memory,
            compatibility: report.compatibility.clone(),
            notes: report.notes.clone(),
            error: report.error.as_ref().map(Into::into),
            exit_code: crate::exit::Exit::of_report(report).code(),
        }
    }

    /// Calls regions of memory by the names that this side gave them, where the comparison calls them by
    /// their numbers.
    pub(crate) fn name_memory(&mut self, named: &[crate::args::NamedMemory]) {
        let name = |text: &mut String| {
            for memory in named {
                let number = format!("memory.region[{}]", memory.region_number());
                *text = text.replace(&number, &format!("memory.region[{}]", memory.name));
            }
        };
        for finding in self.compatibility.iter_mut().flat_map(|c| &mut c.findings) {
            name(&mut finding.field);
        }
    }

    /// The report of a side that failed before there was a session.
    pub(crate) fn refused(side: &str, error: ErrorView, exit: crate::exit::Exit) -> Self {
        Self {
            side: side.to_owned(),
            session: String::new(),
            outcome: Outcome::Aborted,
            // No session was begun: whether the guest runs is as it was, and nobody was asked.
            source_running: Running::Unknown,
            destination_running: if side == "destination" { Running::No } else { Running::Unknown },
            total_ms: 0.0,
            downtime_ms: None,
            blackout_ms: None,
            downtime_terms_ms: None,
            rounds: 0,
            devices: Vec::new(),
            memory: MemoryReport::default(),
            compatibility: None,
            notes: Vec::new(),
            error: Some(error),
            exit_code: exit.code(),
        }
    }
}

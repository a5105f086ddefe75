//! A QMP client: what QEMU is told, and what it says by itself.
//!
//! One command at a time; events that come meanwhile are kept. Nothing is asked again and again: a process
//! that asks takes time from the one that is measured.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// No message of QEMU to us is longer.
const MOST: u64 = 1 << 20;
/// More events than this before an answer are no answer.
const MOST_MESSAGES: usize = 1000;

#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
    until: Instant,
}

impl Qmp {
    /// Takes the greeting. Nothing is waited for after `until`.
    pub(super) fn new(stream: UnixStream, until: Instant) -> Result<Self, String> {
        let mut qmp = Self { stream: BufReader::new(stream), events: Vec::new(), until };
        let greeting = qmp.message()?;
        if greeting["QMP"].is_null() {
            return Err(format!("QMP: no greeting but {greeting}"));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives what the command returns.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}").map_err(|e| format!("QMP {command}: {e}"))?;
        for _ in 0..MOST_MESSAGES {
            let mut message = self.message().map_err(|e| format!("{command}: {e}"))?;
            if !message["event"].is_null() {
                self.events.push(message);
            } else if message["return"].is_null() {
                return Err(format!("QMP {command}: {}", message["error"]));
            } else {
                return Ok(message["return"].take());
            }
        }
        Err(format!("QMP {command}: no answer among {MOST_MESSAGES} messages"))
    }

    /// Waits for the first event, of those that no call has taken, for which `find` gives something.
    pub(super) fn event<T>(&mut self, what: &str, find: impl Fn(&Value) -> Option<T>) -> Result<T, String> {
        for _ in 0..MOST_MESSAGES {
            while !self.events.is_empty() {
                if let Some(found) = find(&self.events.remove(0)) {
                    return Ok(found);
                }
            }
            let message = self.message().map_err(|e| format!("waiting for {what}: {e}"))?;
            self.events.push(message);
        }
        Err(format!("QMP: no {what} among {MOST_MESSAGES} messages"))
    }

    fn message(&mut self) -> Result<Value, String> {
        // A timeout of zero would be none.
        let left =
            self.until.saturating_duration_since(Instant::now()).max(std::time::Duration::from_millis(1));
        let mut line = String::new();
        self.stream.get_ref().set_read_timeout(Some(left)).map_err(|e| format!("QMP: {e}"))?;
        match (&mut self.stream).take(MOST).read_line(&mut line) {
            Ok(0) => Err("QMP: QEMU has closed the connection".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|e| format!("QMP: {e}: {line}")),
            Err(e) => Err(format!("QMP: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn answers_and_events_are_kept_apart() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let said = [
            json!({ "QMP": { "version": {} } }),
            json!({ "return": {} }),
            json!({ "event": "STOP" }),
            json!({ "return": { "status": "running" } }),
            json!({ "event": "MIGRATION", "data": { "status": "completed" } }),
            json!({ "error": { "desc": "no such device" } }),
        ];
        for message in said {
            writeln!(theirs, "{message}").unwrap();
        }
        let mut qmp = Qmp::new(ours, Instant::now() + Duration::from_secs(60)).unwrap();
        assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "running");
        let status = qmp.event("MIGRATION", |e| Some(e["data"]["status"].as_str()?.to_owned())).unwrap();
        assert_eq!(status, "completed");
        assert!(qmp.execute("device_del", json!({})).unwrap_err().contains("no such device"));
        drop(theirs);
        assert!(qmp.event("SHUTDOWN", |e| (e["event"] == "SHUTDOWN").then_some(())).is_err());
    }
}

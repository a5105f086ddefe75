//! A child process that cannot be waited for in vain: every wait has a deadline, and a child that is let
//! go of is killed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at something that cannot be waited for.
const LOOK: Duration = Duration::from_millis(5);
/// How much of what a process has said goes into an error.
const MOST_SAID: usize = 2000;

/// A child whose standard error, and output unless it is read by line, are in a file.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    lines: Option<Receiver<String>>,
}

impl Process {
    /// Starts `command`. With `lines` its output is for [`Process::line`].
    pub(super) fn start(
        name: &'static str,
        command: &mut Command,
        folder: &Path,
        lines: bool,
    ) -> Result<Self, String> {
        let log = folder.join(format!("{name}.log"));
        let file = || {
            File::options()
                .create(true)
                .append(true)
                .open(&log)
                .map_err(|e| format!("{}: {e}", log.display()))
        };
        let _ = fs::remove_file(&log);
        command.stdin(Stdio::null()).stderr(file()?);
        command.stdout(if lines { Stdio::piped() } else { file()?.into() });
        let mut child = command.spawn().map_err(|e| format!("{name}: {e}"))?;
        let lines = child.stdout.take().map(|stdout| {
            // Bounded by what the other end of the pipe prints: both programs print a few lines a second.
            let (give, take) = mpsc::channel();
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if give.send(line).is_err() {
                        break;
                    }
                }
            });
            take
        });
        Ok(Self { name, child, log, lines })
    }

    /// The next line that it prints; None when its output has ended.
    pub(super) fn line(&self, until: Instant) -> Result<Option<String>, String> {
        let Some(lines) = &self.lines else { return Ok(None) };
        match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(self.failed("nothing more was printed in time")),
        }
    }

    /// Looks until there is something, or the process has ended, or the time is over.
    pub(super) fn look<T>(
        &mut self,
        what: &str,
        until: Instant,
        mut find: impl FnMut() -> Option<T>,
    ) -> Result<T, String> {
        loop {
            if let Some(found) = find() {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait().map_err(|e| format!("{}: {e}", self.name))? {
                return Err(self.failed(&format!("{status} before {what}")));
            }
            if Instant::now() >= until {
                return Err(self.failed(&format!("no {what} in time")));
            }
            thread::sleep(LOOK);
        }
    }

    /// Waits for its end.
    pub(super) fn end(&mut self, until: Instant) -> Result<ExitStatus, String> {
        loop {
            if let Some(status) = self.child.try_wait().map_err(|e| format!("{}: {e}", self.name))? {
                return Ok(status);
            }
            if Instant::now() >= until {
                return Err(self.failed("it has not ended in time"));
            }
            thread::sleep(LOOK);
        }
    }

    /// An error with what the process has said.
    pub(super) fn failed(&self, what: &str) -> String {
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said[said.len().saturating_sub(MOST_SAID)..]).trim().to_owned();
        let said =
            if said.is_empty() { "it has said nothing".into() } else { format!("it has said: {said}") };
        format!("{}: {what}; {said}", self.name)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error says that it has ended: what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, lines: bool) -> Process {
        // One folder a test: the log is named by the process.
        let folder = std::env::temp_dir().join(format!(
            "airlift-bench-process-{}-{:?}",
            std::process::id(),
            thread::current().id()
        ));
        fs::create_dir_all(&folder).unwrap();
        Process::start("sh", Command::new("sh").args(["-c", script]), &folder, lines).unwrap()
    }

    #[test]
    fn lines_come_one_by_one_and_the_end_is_seen() {
        let mut child = sh("echo one; echo two; exit 3", true);
        let until = Instant::now() + Duration::from_secs(60);
        assert_eq!(child.line(until), Ok(Some("one".into())));
        assert_eq!(child.line(until), Ok(Some("two".into())));
        assert_eq!(child.line(until), Ok(None));
        assert_eq!(child.end(until).unwrap().code(), Some(3));
        fs::remove_dir_all(child.log.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_process_that_ends_or_hangs_is_an_error_with_its_words() {
        let mut child = sh("echo no such device >&2; exit 1", false);
        let error =
            child.look::<()>("socket", Instant::now() + Duration::from_secs(60), || None).unwrap_err();
        assert!(error.contains("exit status: 1 before socket; it has said: no such device"), "{error}");
        let mut child = sh("exec sleep 1000", false);
        assert!(child.end(Instant::now()).unwrap_err().contains("has not ended in time"));
        fs::remove_dir_all(child.log.parent().unwrap()).unwrap();
    }
}

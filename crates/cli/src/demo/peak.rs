//! The highest anonymous memory of a process, sampled.
//!
//! Guest memory and device memory are shared files and do not count: what counts is what the
//! process itself allocates. Read from `/proc/PID/status` (RssAnon); a peak between two samples is
//! not seen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time between two samples.
const EVERY: Duration = Duration::from_millis(20);

/// Samples one process until it is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Peak {
    highest: Arc<AtomicU64>,
    _stop: crossbeam_channel::Sender<()>,
}

impl Peak {
    /// Begins to sample the process `pid`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn watch(pid: u32) -> std::io::Result<Self> {
        let highest = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&highest);
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        std::thread::Builder::new().name("peak".into()).spawn(move || {
            let path = format!("/proc/{pid}/status");
            while let Some(bytes) = std::fs::read_to_string(&path).ok().as_deref().and_then(rss_anon) {
                shared.fetch_max(bytes, Ordering::Relaxed);
                if stopped.recv_timeout(EVERY) != Err(crossbeam_channel::RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Self { highest, _stop: stop })
    }

    /// The highest value so far, in bytes; 0 when there was no sample.
    pub(crate) fn bytes(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }
}

/// RssAnon of a `/proc/PID/status`, in bytes. A process that has ended has none.
fn rss_anon(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_gives_its_anonymous_bytes() {
        assert_eq!(rss_anon("VmRSS:\t  900 kB\nRssAnon:\t     132 kB\nRssFile:\t 1 kB\n"), Some(132 * 1024));
        assert_eq!(rss_anon("State:\tZ (zombie)\n"), None);
    }
}

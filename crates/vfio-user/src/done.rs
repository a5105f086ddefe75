//! How a device answers a call that takes time.

use airlift_core::{DeviceState, Errno};
use std::fmt;

/// How a call that took a [`Done`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It was carried out.
    Ok,
    /// It failed.
    Failed {
        /// The error number that the client gets.
        errno: Errno,
        /// The state in which the device is now.
        reached: DeviceState,
    },
    /// The [`Done`] was dropped: the device forgot the call, and nobody knows where it stands.
    Dropped,
}

/// Answers one call of a [`Device`](crate::Device), from any thread, once.
///
/// Dropping it without an answer is a failure: the client gets `EIO`, and a device that dropped a
/// transition or a reset is taken to be in ERROR. The server waits for
/// [`ServerOptions::transition_timeout`](crate::ServerOptions); an answer after that is ignored.
pub struct Done {
    complete: Option<Box<dyn FnOnce(Completion) + Send>>,
}

impl Done {
    /// Calls `complete` once, with the answer. For tests of a device without a server.
    #[must_use]
    pub fn new(complete: impl FnOnce(Completion) + Send + 'static) -> Self {
        Self { complete: Some(Box::new(complete)) }
    }

    /// The call was carried out.
    pub fn ok(self) {
        self.finish(Completion::Ok);
    }

    /// The call failed with `errno`, which the client gets. `reached` is the state in which the
    /// device is now; for a change of DMA mappings it is not looked at.
    pub fn failed(self, errno: Errno, reached: DeviceState) {
        self.finish(Completion::Failed { errno, reached });
    }

    fn finish(mut self, completion: Completion) {
        if let Some(complete) = self.complete.take() {
            complete(completion);
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(complete) = self.complete.take() {
            complete(Completion::Dropped);
        }
    }
}

impl fmt::Debug for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Done")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn each_way_to_end_is_told_once() {
        let (tx, rx) = mpsc::channel();
        let done = || {
            let tx = tx.clone();
            Done::new(move |c| tx.send(c).unwrap())
        };
        done().ok();
        done().failed(Errno::EIO, DeviceState::Stop);
        drop(done());
        drop(tx);
        let told: Vec<_> = rx.into_iter().collect();
        let failed = Completion::Failed { errno: Errno::EIO, reached: DeviceState::Stop };
        assert_eq!(told, [Completion::Ok, failed, Completion::Dropped]);
    }
}

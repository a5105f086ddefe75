//! How a device's calls are bounded, and what is done with one that is found in the middle of something.

use std::time::Duration;

/// How a device is driven.
#[derive(Clone, Debug)]
pub struct VfioOptions {
    /// How long one arc, or a reset, may take. Default: 30 s.
    pub transition_timeout: Duration,
    /// How long a read or a write of migration data may make no progress. Default: 30 s.
    pub data_timeout: Duration,
    /// How long the driver may take to say a state or a size. Default: 5 s.
    pub answer_timeout: Duration,
    /// What is done with a device that is found in another state than RUNNING. Default: `None`, which is
    /// [`Recover::Leave`] for a descriptor that was handed in and [`Recover::Reset`] for a device that
    /// this process has opened.
    pub recover: Option<Recover>,
}

impl Default for VfioOptions {
    fn default() -> Self {
        Self {
            transition_timeout: Duration::from_secs(30),
            data_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(5),
            recover: None,
        }
    }
}

/// What is done with a device that is found in another state than RUNNING.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recover {
    /// It is reset: whoever left it so is gone, as nobody else can have it open.
    Reset,
    /// It stays as it is, and [`VfioDevice::found_state`](crate::VfioDevice::found_state) says so: it
    /// belongs to a guest that another process runs.
    Leave,
}

//! Where the devices stand when a phase ends early.

use crate::set::{DeviceSet, LoadedSet, LoadingSet};

/// Where the devices stand.
pub(super) enum Standing {
    Nothing,
    /// No state of them was changed.
    Untouched(DeviceSet),
    Idle(DeviceSet),
    Loading(LoadingSet),
    Loaded(LoadedSet),
}

//! What QEMU's users know as trace events, under the same names: one function for each, called where it
//! happens. `docs/events.md` has them in a table.
//!
//! Fields have QEMU's names; the device is `device`. Whatever comes once for each piece of data is of
//! level trace. No event holds a byte of a device's state.

use airlift_core::{Arc, Capabilities, DeviceId, DeviceState, PrecopyInfo};
use airlift_stream::record::Tag;
use std::time::Duration;

/// A device was taken into a set.
pub(super) fn probe(device: &DeviceId, capabilities: &Capabilities) {
    tracing::debug!(name: "vfio_migration_probe", device = %device, interface = %capabilities.interface, data_section = capabilities.data_section);
}

/// An arc has ended; after a failure in the state that was read back.
pub(super) fn set_state(device: &DeviceId, from: DeviceState, state: DeviceState, took: Duration) {
    tracing::debug!(name: "vfio_migration_set_state", device = %device, from = %from, state = %state, took_us = took.as_micros());
}

/// How far a state lets a device move: 2 as it likes, 1 without DMA to its peers, 0 not at all.
const fn motion(state: DeviceState) -> Option<u8> {
    match state {
        DeviceState::Running | DeviceState::PreCopy => Some(2),
        DeviceState::RunningP2p | DeviceState::PreCopyP2p => Some(1),
        DeviceState::Stop | DeviceState::StopCopy | DeviceState::Resuming => Some(0),
        DeviceState::Error | DeviceState::Unknown(_) => None,
    }
}

/// A device was stopped or started, or prepared for that, by an arc on its way to `to`.
pub(super) fn vmstate(device: &DeviceId, arc: Arc, to: DeviceState) {
    let (Some(before), Some(after)) = (motion(arc.from), motion(arc.to)) else { return };
    // A device that is made ready for loading has no guest yet.
    if before == after || to == DeviceState::Resuming {
        return;
    }
    let running = after > before;
    let reason = match to {
        _ if running => "running",
        DeviceState::StopCopy | DeviceState::PreCopyP2p => "finish-migrate",
        _ => "paused",
    };
    let dev_state = arc.to;
    if after == 1 {
        tracing::debug!(name: "vfio_vmstate_change_prepare", device = %device, running, reason, dev_state = %dev_state);
    } else {
        tracing::debug!(name: "vfio_vmstate_change", device = %device, running, reason, dev_state = %dev_state);
    }
}

/// Saving begins.
pub(super) fn save_setup(device: &DeviceId, precopy: bool) {
    tracing::debug!(name: "vfio_save_setup", device = %device, precopy);
}

/// A piece of a stream that may be cut anywhere was read. What a device of v1 gives, it says itself.
pub(super) fn save_buffer(device: &DeviceId, len: usize) {
    tracing::trace!(name: "vfio_save_buffer", device = %device, data_size = len);
}

/// A piece was sent in pre-copy: what is left is carried on from the last look at the device.
pub(super) fn save_iterate(device: &DeviceId, len: u64, initial: u64, dirty: u64) {
    tracing::trace!(name: "vfio_save_iterate", device = %device, data_size = len, precopy_init_size = initial, precopy_dirty_size = dirty);
    tracing::trace!(name: "vfio_state_pending_estimate", device = %device, precopy = initial.saturating_add(dirty), postcopy = 0_u64,
        precopy_init_size = initial, precopy_dirty_size = dirty);
}

/// The device was asked what it has left.
pub(super) fn pending_exact(device: &DeviceId, info: Option<PrecopyInfo>, size: Option<u64>) {
    // What the device cannot say is not in the event.
    let (initial, dirty) = (info.map(|i| i.initial_bytes), info.map(|i| i.dirty_bytes));
    let precopy = info.map(|i| i.initial_bytes.saturating_add(i.dirty_bytes));
    tracing::trace!(name: "vfio_state_pending_exact", device = %device, precopy, postcopy = 0_u64, stopcopy_size = size,
        precopy_init_size = initial, precopy_dirty_size = dirty);
}

/// The device's stream has been read to its end and sent. `bytes`: in PRE_COPY and in STOP_COPY.
pub(super) fn save_complete(device: &DeviceId, bytes: (u64, u64)) {
    tracing::debug!(name: "vfio_save_complete_precopy", device = %device, precopy_bytes = bytes.0, stop_copy_bytes = bytes.1, ret = 0);
}

/// The device's configuration ends its stream.
pub(super) fn save_config(device: &DeviceId, len: usize) {
    tracing::debug!(name: "vfio_save_device_config_state", device = %device, data_size = len);
}

/// Saving has ended, however it ended.
pub(super) fn save_cleanup(device: &DeviceId) {
    tracing::debug!(name: "vfio_save_cleanup", device = %device);
}

/// A record has come; `data` is its tag.
pub(super) fn load_state(device: &DeviceId, tag: Tag) {
    tracing::trace!(name: "vfio_load_state", device = %device, data = format_args!("{:#x}", tag.to_raw()));
}

/// A record of a stream that may be cut anywhere is with the device. A device of v1 says it itself.
pub(super) fn load_data(device: &DeviceId, data_size: u64) {
    tracing::trace!(name: "vfio_load_state_device_data", device = %device, data_size, ret = 0);
}

/// Loading has ended, however it ended.
pub(super) fn load_cleanup(device: &DeviceId) {
    tracing::debug!(name: "vfio_load_cleanup", device = %device);
}

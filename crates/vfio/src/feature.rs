//! Which features a device has, for showing them. What they mean is in the parts that use them.

use crate::error::refused;
use crate::{DeviceFd, sys};
use airlift_core::DeviceError;
use std::os::fd::AsFd;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
    VFIO_DEVICE_FEATURE_MIGRATION,
};

/// A feature (`VFIO_DEVICE_FEATURE_*`) that matters to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Interface v2 and its states.
    Migration,
    /// The state of interface v2.
    MigDeviceState,
    /// The device logs what it writes by DMA.
    DmaLoggingStart,
    /// The log can be ended.
    DmaLoggingStop,
    /// The log can be read.
    DmaLoggingReport,
    /// The size of the state can be estimated.
    MigDataSize,
    /// Flags of pre-copy info can be switched on, new initial data among them (V2-REINIT).
    MigPrecopyInfoV2,
}

impl Feature {
    /// All of them, by number.
    pub const ALL: [Self; 7] = [
        Self::Migration,
        Self::MigDeviceState,
        Self::DmaLoggingStart,
        Self::DmaLoggingStop,
        Self::DmaLoggingReport,
        Self::MigDataSize,
        Self::MigPrecopyInfoV2,
    ];

    /// Number, the kernel's name, and whether it is one to be set.
    const fn row(self) -> (u32, &'static str, bool) {
        match self {
            Self::Migration => (VFIO_DEVICE_FEATURE_MIGRATION, "MIGRATION", false),
            Self::MigDeviceState => (VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, "MIG_DEVICE_STATE", true),
            Self::DmaLoggingStart => (VFIO_DEVICE_FEATURE_DMA_LOGGING_START, "DMA_LOGGING_START", true),
            Self::DmaLoggingStop => (VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, "DMA_LOGGING_STOP", true),
            Self::DmaLoggingReport => (VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, "DMA_LOGGING_REPORT", false),
            Self::MigDataSize => (VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, "MIG_DATA_SIZE", false),
            Self::MigPrecopyInfoV2 => (VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, "MIG_PRECOPY_INFOv2", true),
        }
    }

    /// The kernel's name, without `VFIO_DEVICE_FEATURE_`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().1
    }
}

impl DeviceFd {
    /// Whether the device has a feature (PROBE).
    ///
    /// # Errors
    /// When the device gives another answer than yes or no.
    pub fn has_feature(&self, feature: Feature) -> Result<bool, DeviceError> {
        let (number, name, set) = feature.row();
        sys::has_feature(self.as_fd(), number, set).map_err(|e| refused(&format!("PROBE {name}"), e))
    }
}

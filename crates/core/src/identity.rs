//! Who a device is: the name that pairs source and destination, and the facts that must agree
//! before its state may be loaded.

use crate::Interface;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The name of a device in a migration; source and destination are paired by it. 1 to 64 bytes of
/// `A-Z a-z 0-9 . _ : -`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceId(String);

/// A text that cannot name a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a device id: {0:?} (1 to 64 of A-Z a-z 0-9 . _ : -)")]
pub struct InvalidDeviceId(pub String);

impl DeviceId {
    /// The id of this text.
    ///
    /// # Errors
    /// When the text is empty, longer than 64 bytes or has another character.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidDeviceId> {
        let text = text.into();
        let good = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        if text.is_empty() || text.len() > 64 || !text.bytes().all(good) {
            return Err(InvalidDeviceId(text));
        }
        Ok(Self(text))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DeviceId {
    type Error = InvalidDeviceId;
    fn try_from(text: String) -> Result<Self, InvalidDeviceId> {
        Self::new(text)
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> Self {
        id.0
    }
}

/// The format of a device's opaque state, as its author names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFormat {
    /// Name of the format.
    pub name: String,
    /// Version that this device writes.
    pub version: u32,
    /// Versions that this device reads.
    pub accepts: Vec<u32>,
    /// Interfaces besides its own whose data this device reads in this format (V1-MIX).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
}

/// What the other side must match before a device's state is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// The state's format, where the device declares one.
    pub format: Option<StateFormat>,
    /// Facts by name (`pci-vendor`, `region0-size`): each must be stated by both sides and be equal,
    /// unless its name begins with [`HOST`](Self::HOST) or [`INFO`](Self::INFO).
    pub facts: BTreeMap<String, String>,
}

impl DeviceIdentity {
    /// Prefix of facts that only the host can tell (`host.driver`, `host.mdev-type`), which a side that
    /// was handed an open device may not see: equal where both sides state them, and a note where one
    /// does.
    pub const HOST: &str = "host.";
    /// Prefix of facts whose difference is a note and never a refusal (`info.kernel`).
    pub const INFO: &str = "info.";
}

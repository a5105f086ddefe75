//! The contents of the messages that open a session.

use super::{MAX_CHANNELS, MAX_DEVICES, MAX_FACTS, MAX_LIST, MAX_REGIONS, MessageError, at_most};
use crate::frame::{FrameHeader, FrameType};
use airlift_core::commit::SessionId;
use airlift_core::{CompatReport, Limits, Offer};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Good for one data connection: 128 random bits, in text 32 hexadecimal digits. Against mix-ups, not
/// against attackers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token(pub u128);

/// A text that is not 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 32 hexadecimal digits")]
pub struct InvalidToken;

impl TryFrom<String> for Token {
    type Error = InvalidToken;
    fn try_from(text: String) -> Result<Self, InvalidToken> {
        // from_str_radix would take a sign.
        if text.len() != 32 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(InvalidToken);
        }
        u128::from_str_radix(&text, 16).map(Self).map_err(|_| InvalidToken)
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        format!("{:032x}", token.0)
    }
}

impl fmt::Debug for Token {
    // A token lets its holder into the session: it is not for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What was sent on, or came over, one data connection: both sides count in the same way (W-FINAL).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataCount {
    /// Frames of bulk data.
    pub frames: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

impl DataCount {
    /// Counts a frame, if it is bulk data.
    pub const fn add(&mut self, header: &FrameHeader) {
        if header.kind.is_data() {
            self.frames = self.frames.saturating_add(1);
            self.bytes = self.bytes.saturating_add(header.length as u64);
        }
    }
}

/// HELLO: who the source is and what it wants to send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Versions of the wire that the source speaks.
    pub versions: Vec<u16>,
    /// The session, chosen by the source.
    pub session: SessionId,
    /// Its devices, memory, limits and features. The order of the devices numbers them for the
    /// whole session.
    pub offer: Offer,
}

/// REPORT: the destination's answer to HELLO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The version of the wire that both speak.
    pub version: u16,
    /// Every finding. With a refusal among them nothing below counts, and no device was touched.
    pub report: CompatReport,
    /// What the destination takes.
    pub limits: Limits,
    /// Which of the source's features it has too.
    pub features: Vec<String>,
    /// One for each data connection that it takes; empty when it is not compatible.
    pub tokens: Vec<Token>,
    /// For each device of HELLO, the frames that may be sent before the first CREDIT (W-CREDIT).
    pub device_credits: Vec<u32>,
}

/// ACCEPT: the source goes on, with these features.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// Features that are in use from now on: some of those in REPORT.
    pub features: Vec<String>,
}

/// TRAILER: what a device's stream held (W-TRAILER).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The device.
    pub device: u32,
    /// Its frames.
    pub frames: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// CRC-64/NVME of their payloads in order.
    pub digest: u64,
    /// Generations of initial data that were sent.
    pub generation: u32,
}

impl Trailer {
    /// The trailer of a stream that was written, or the one to expect of a stream that was read.
    #[must_use]
    pub fn of(device: u32, totals: &crate::record::StreamTotals) -> Self {
        Self {
            device,
            frames: totals.frames(),
            bytes: totals.bytes(),
            digest: totals.digest(),
            generation: totals.generation(),
        }
    }
}

fn check_features(kind: FrameType, features: &[String]) -> Result<(), MessageError> {
    at_most(kind, "features", features.len(), MAX_LIST)?;
    features.iter().try_for_each(|name| at_most(kind, "bytes in a feature's name", name.len(), MAX_LIST))
}

impl Hello {
    pub(super) fn check(&self, kind: FrameType) -> Result<(), MessageError> {
        let Offer { devices, memory, limits, features, .. } = &self.offer;
        at_most(kind, "versions", self.versions.len(), MAX_LIST)?;
        at_most(kind, "devices", devices.len(), MAX_DEVICES)?;
        at_most(kind, "memory regions", memory.regions.len(), MAX_REGIONS)?;
        at_most(kind, "data connections", limits.channels.into(), MAX_CHANNELS)?;
        check_features(kind, features)?;
        devices.iter().try_for_each(|device| {
            let accepts = device.identity.format.as_ref().map_or(0, |format| format.accepts.len());
            at_most(kind, "accepted versions of a state's format", accepts, MAX_LIST)?;
            at_most(kind, "facts of a device", device.identity.facts.len(), MAX_FACTS)
        })
    }
}

impl Report {
    pub(super) fn check(&self, kind: FrameType) -> Result<(), MessageError> {
        at_most(kind, "data connections", self.tokens.len(), MAX_CHANNELS)?;
        at_most(kind, "data connections", self.limits.channels.into(), MAX_CHANNELS)?;
        at_most(kind, "devices", self.device_credits.len(), MAX_DEVICES)?;
        check_features(kind, &self.features)
    }
}

impl Accept {
    pub(super) fn check(&self, kind: FrameType) -> Result<(), MessageError> {
        check_features(kind, &self.features)
    }
}

//! What the destination tells of its part of the downtime, and failures cut to a size that can be sent.

use super::{MAX_DEVICES, MessageError, at_most};
use crate::frame::FrameType;
use airlift_core::{DeviceState, Failure};
use serde::{Deserialize, Serialize};

/// The most transitions that a message tells of: a device makes few in a migration.
const MAX_TRANSITIONS: usize = MAX_DEVICES * 8;

/// A transition that a device of the destination made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTransition {
    /// The device.
    pub device: u32,
    /// The state before.
    pub from: DeviceState,
    /// The state reached.
    pub to: DeviceState,
    /// When it began, in microseconds since the destination's session began.
    pub at_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// LOADED: the destination's terms of the downtime until then, in microseconds. They are disjoint
/// and on the critical path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedTerms {
    /// From the last byte of device data until the last device had left RESUMING.
    pub load_us: u64,
    /// Restoring machine and device records.
    pub config_us: u64,
    /// Writing the last memory after the last byte of it had come.
    pub memory_us: u64,
    /// Making LOADED durable in the journal.
    pub journal_us: u64,
    /// What the devices did so far.
    #[serde(default)]
    pub transitions: Vec<DeviceTransition>,
}

/// RUNNING: the destination's terms of the downtime since COMMIT came, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningTerms {
    /// Making COMMITTED and RUN_STARTED durable in the journal.
    pub commit_us: u64,
    /// From there until devices and vCPUs ran.
    pub run_us: u64,
    /// What the devices did since LOADED.
    #[serde(default)]
    pub transitions: Vec<DeviceTransition>,
}

impl LoadedTerms {
    pub(super) const fn check(&self, kind: FrameType) -> Result<(), MessageError> {
        at_most(kind, "transitions", self.transitions.len(), MAX_TRANSITIONS)
    }
}

impl RunningTerms {
    pub(super) const fn check(&self, kind: FrameType) -> Result<(), MessageError> {
        at_most(kind, "transitions", self.transitions.len(), MAX_TRANSITIONS)
    }
}

const MAX_CAUSES: usize = 16;
const MAX_TEXT: usize = 4096;

/// The failure with at most 16 causes and 4 KiB for each text: even with every byte escaped that is
/// less than a frame. The answer to a long chain of errors must not be an error.
pub(super) fn cut(failure: &Failure) -> Failure {
    let mut chain: Vec<Failure> = Vec::new();
    let mut next = Some(failure);
    while let Some(link) = next.filter(|_| chain.len() <= MAX_CAUSES) {
        chain.push(Failure {
            message: cut_text(&link.message, MAX_TEXT),
            advice: link.advice.as_deref().map(|advice| cut_text(advice, MAX_TEXT)),
            cause: None,
            device: link.device.clone(),
            ..*link
        });
        next = link.cause.as_deref();
    }
    let mut whole: Option<Failure> = None;
    for mut link in chain.into_iter().rev() {
        link.cause = whole.take().map(Box::new);
        whole = Some(link);
    }
    whole.unwrap_or_else(|| failure.clone())
}

/// The text, or as much of its front as is at most `bytes` long.
pub(super) fn cut_text(text: &str, bytes: usize) -> String {
    let end = (0..=text.len().min(bytes)).rev().find(|at| text.is_char_boundary(*at));
    text[..end.unwrap_or(0)].to_owned()
}

//! What the downtime needs of the protocol's code, run once before it.
//!
//! Code that has never run is not in memory yet: a page fault for each page of it, from the disk where
//! the program was not used for long. The last messages of a migration are the first of their kind in
//! their process, so that the guest would wait for that. Nothing is sent here.

use airlift_core::DeviceState;
use airlift_core::commit::SessionId;
use airlift_stream::message::{DataCount, DeviceTransition, LoadedTerms, RunningTerms, Trailer};
use airlift_stream::{FrameHeader, HEADER_LEN, Limits, Message};

/// Encodes and decodes every message of the downtime. How many came back as they were.
pub(crate) fn rehearse(session: SessionId) -> usize {
    let (from, to) = (DeviceState::Resuming, DeviceState::Stop);
    let transitions = vec![DeviceTransition { device: 0, from, to, at_us: 123, took_us: 45 }];
    let loaded = LoadedTerms { transitions: transitions.clone(), ..LoadedTerms::default() };
    let running = RunningTerms { transitions, ..RunningTerms::default() };
    [
        Message::Final(DataCount::default()),
        Message::Trailer(Trailer { device: 0, frames: 0, bytes: 0, digest: 0, generation: 0 }),
        Message::Loaded { session, terms: loaded },
        Message::Commit { session },
        Message::Running { session, terms: running },
        Message::Done { session },
    ]
    .iter()
    .filter(|message| comes_back(message))
    .count()
}

fn comes_back(message: &Message) -> bool {
    let Ok(frame) = message.encode(0) else { return false };
    let Some((head, payload)) = frame.split_first_chunk::<HEADER_LEN>() else { return false };
    let Ok(header) = FrameHeader::decode(head, Limits::default()) else { return false };
    header.verify(payload).is_ok() && Message::decode(&header, payload).is_ok_and(|back| back == *message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_of_the_downtime_is_tried_to_its_end() {
        assert_eq!(rehearse(SessionId(7)), 6);
    }
}

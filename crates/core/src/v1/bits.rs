//! `device_state`: its three bits, the states that they mean, and which of them one write may change
//! into which.
//!
//! The states have the names of interface v2, which mean the same where both have them. Whether a
//! device makes a change is the device's to say.

use crate::DeviceState;

/// The device runs.
pub const RUNNING: u32 = 1;
/// Its state is being read.
pub const SAVING: u32 = 2;
/// Its state is being written.
pub const RESUMING: u32 = 4;
/// The bits that mean something. All others are reserved (V1-RESERVED).
pub const MASK: u32 = 7;

/// Set in the number of a state that the interface does not define, so that it is not taken for one of
/// interface v2, whose numbers are small.
const UNDEFINED: u32 = 0x100;

/// Whether a write of these bits can be accepted at all: with RESUMING no other bit is set
/// (V1-VALID).
#[must_use]
pub const fn is_valid(raw: u32) -> bool {
    raw & RESUMING == 0 || raw & MASK == RESUMING
}

/// The state that the bits mean (V1-BITS). SAVING with RESUMING is ERROR; what the interface does not
/// define is [`DeviceState::Unknown`], with 0x100 added to the bits.
#[must_use]
pub const fn state_of(raw: u32) -> DeviceState {
    match raw & MASK {
        0 => DeviceState::Stop,
        RUNNING => DeviceState::Running,
        SAVING => DeviceState::StopCopy,
        3 => DeviceState::PreCopy,
        RESUMING => DeviceState::Resuming,
        6 => DeviceState::Error,
        bits => DeviceState::Unknown(UNDEFINED | bits),
    }
}

/// The bits of a state; `None` for one that interface v1 does not have (V1-BITS).
#[must_use]
pub const fn bits_of(state: DeviceState) -> Option<u32> {
    Some(match state {
        DeviceState::Stop => 0,
        DeviceState::Running => RUNNING,
        DeviceState::StopCopy => SAVING,
        DeviceState::PreCopy => SAVING | RUNNING,
        DeviceState::Resuming => RESUMING,
        DeviceState::Error => SAVING | RESUMING,
        DeviceState::RunningP2p | DeviceState::PreCopyP2p | DeviceState::Unknown(_) => return None,
    })
}

/// What is to be written to change the three bits of `raw` to `bits`: the reserved ones stay as they
/// were read (V1-RESERVED).
#[must_use]
pub const fn merged(raw: u32, bits: u32) -> u32 {
    raw & !MASK | bits & MASK
}

/// What the change of one bit does to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// RUNNING goes: the device stops.
    Stops,
    /// SAVING without RUNNING: what it holds while it is stopped can be read.
    Saves,
    /// RESUMING comes: what it held is forgotten, for what will be written.
    Resets,
    /// RESUMING goes: what was written is loaded.
    Loads,
    /// RUNNING comes: the device runs.
    Starts,
}

/// What one write that changes the bits of `before` to those of `after` does, in the order in which
/// drivers do it (V1-ORDER).
pub fn effects(before: u32, after: u32) -> impl Iterator<Item = Effect> {
    let came = |bit: u32| before & bit == 0 && after & bit != 0;
    let went = |bit: u32| before & bit != 0 && after & bit == 0;
    let saves = |bits: u32| bits & (SAVING | RUNNING) == SAVING;
    [
        (went(RUNNING), Effect::Stops),
        (!saves(before) && saves(after), Effect::Saves),
        (came(RESUMING), Effect::Resets),
        (went(RESUMING), Effect::Loads),
        (came(RUNNING), Effect::Starts),
    ]
    .into_iter()
    .filter_map(|(happens, effect)| happens.then_some(effect))
}

#[cfg(test)]
mod tests {
    use super::*;

    // V1-BITS, V1-VALID
    #[test]
    fn every_value_has_one_meaning_and_none_is_taken_for_another_interface() {
        let all: Vec<_> = (0..8).map(state_of).collect();
        assert_eq!(
            all[..5],
            [
                DeviceState::Stop,
                DeviceState::Running,
                DeviceState::StopCopy,
                DeviceState::PreCopy,
                DeviceState::Resuming
            ]
        );
        assert_eq!(all[6], DeviceState::Error);
        for raw in [5, 7] {
            assert_eq!(all[raw], DeviceState::Unknown(0x100 | u32::try_from(raw).unwrap()));
            assert_eq!(DeviceState::from_raw(all[raw].to_raw()), all[raw]);
        }
        for raw in 0..8 {
            assert_eq!(is_valid(raw), raw <= 4, "{raw:03b}");
            if let Some(bits) = bits_of(state_of(raw)) {
                assert_eq!(bits, raw);
            }
        }
        assert_eq!(bits_of(DeviceState::RunningP2p), None);
        assert_eq!(state_of(0xffff_fff9), DeviceState::Running, "reserved bits mean nothing");
    }

    // V1-RESERVED
    #[test]
    fn reserved_bits_are_written_as_they_were_read() {
        assert_eq!(merged(0xa117_0051, SAVING), 0xa117_0052);
        assert_eq!(merged(u32::MAX, 0), !MASK);
        assert_eq!(merged(0, u32::MAX), MASK);
    }

    // V1-ORDER
    #[test]
    fn bits_that_change_together_take_effect_in_the_drivers_order() {
        use Effect::{Loads, Resets, Saves, Starts, Stops};
        let made = |before, after| effects(before, after).collect::<Vec<_>>();
        assert_eq!(made(RUNNING, 0), [Stops]);
        assert_eq!(made(RUNNING, SAVING), [Stops, Saves]);
        assert_eq!(made(RUNNING, SAVING | RUNNING), []);
        assert_eq!(made(SAVING | RUNNING, SAVING), [Stops, Saves]);
        assert_eq!(made(SAVING, 0), []);
        assert_eq!(made(RUNNING, RESUMING), [Stops, Resets]);
        assert_eq!(made(RESUMING, RUNNING), [Loads, Starts]);
        assert_eq!(made(RESUMING, 0), [Loads]);
        assert_eq!(made(SAVING, RUNNING), [Starts]);
    }
}

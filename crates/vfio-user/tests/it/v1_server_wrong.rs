//! What the user of a migration region can do wrong: each is answered with EINVAL, changes neither the
//! state nor what is to be read or loaded, and the migration can still be made.

use crate::common::*;
use crate::v1_user::*;
use airlift_vfio_user::{V1Mapping, V1Section};
use proptest::prelude::*;

fn serve(mapping: V1Mapping) -> Served {
    serve_v1(V1Section { size: 8192, mapping, whole_transactions: false })
}

/// A device with 10 bytes in chunks of 4, and the first chunk announced.
fn saving(mapping: V1Mapping) -> (Served, User) {
    let served = serve(mapping);
    served.control.with(|s| {
        s.stop_copy.extend(pattern(10, 1));
        s.read_limit = Some(4);
    });
    let user = served.user();
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.get(PENDING).unwrap(), 10);
    (served, user)
}

/// The whole of it can still be saved, whether the first chunk was fetched or not.
fn saves_all(user: &User) {
    let first = user.fetch().unwrap();
    assert_eq!([first, user.save().concat()].concat(), pattern(10, 1));
    user.set(STOPPED).unwrap();
}

/// A device that loads, and has 100 bytes already.
fn loading(mapping: V1Mapping) -> (Served, User) {
    let served = serve(mapping);
    let user = served.user();
    user.set(RESUMING).unwrap();
    user.load(&pattern(100, 1)).unwrap();
    (served, user)
}

/// What was loaded before and what is loaded now is all that the device gets.
fn loads_all(served: &Served, user: &User) {
    user.load(&pattern(300, 2)).unwrap();
    user.set(RUNNING).unwrap();
    let (loaded, writes) = served.control.with(|s| (s.loaded.clone(), s.writes.clone()));
    assert_eq!(loaded, [pattern(100, 1), pattern(300, 2)].concat());
    assert_eq!(writes, [100, 300]);
}

// V1-STABLE: reading data_offset twice and expecting a new buffer
#[test]
fn a_user_that_does_not_say_that_it_took_a_chunk_gets_the_same_again() {
    let (_served, user) = saving(V1Mapping::Mapped);
    let first = user.fetch().unwrap();
    assert_eq!(user.fetch().unwrap(), first);
    assert_eq!(user.fetch().unwrap(), first);
    assert_eq!([first, user.save().concat()].concat(), pattern(10, 1));
}

// V1-PENDING: not reading pending_bytes after the last chunk
#[test]
fn a_last_chunk_that_was_not_taken_is_gone_with_the_session_and_comes_again_in_the_next() {
    let (served, user) = saving(V1Mapping::Mapped);
    served.control.with(|s| s.read_limit = None);
    assert_eq!(user.fetch().unwrap().len(), 4);
    assert_eq!(user.get(PENDING).unwrap(), 6);
    assert_eq!(user.fetch().unwrap().len(), 6);
    user.set(STOPPED).unwrap();
    assert_eq!((user.get(PENDING).unwrap(), user.get(SIZE).unwrap()), (0, 0), "nothing outlives the session");
    served.control.with(|s| s.stop_copy.extend(pattern(10, 1)));
    user.set(STOP_COPY).unwrap();
    saves_all(&user);
}

// V1-PENDING: pending_bytes taken as exact
#[test]
fn reading_more_than_the_chunk_is_refused() {
    for mapping in [V1Mapping::Trapped, V1Mapping::Sparse(vec![(4096, 4096)])] {
        let (_served, user) = saving(mapping);
        user.refuses(STOP_COPY, "data before data_offset", |u| u.read_raw(u.size - 8192, 4));
        let start = user.get(OFFSET).unwrap();
        user.refuses(STOP_COPY, "pending_bytes of data", |u| u.read_raw(start, 10));
        user.refuses(STOP_COPY, "a byte behind the chunk", |u| u.read_raw(start + 4, 1));
        assert_eq!(user.read_raw(start + 1, 3).unwrap(), pattern(10, 1)[1..4]);
        saves_all(&user);
    }
}

// V1-OUTSTANDING: a state write while a chunk is outstanding, saving
#[test]
fn a_chunk_is_dropped_by_leaving_the_session() {
    let (served, user) = saving(V1Mapping::Mapped);
    user.fetch().unwrap();
    user.set(RUNNING).unwrap();
    assert_eq!((user.get(PENDING).unwrap(), user.get(SIZE).unwrap()), (0, 0));
    // The next session is another one: nothing of the old chunk is in it.
    served.control.with(|s| {
        s.stop_copy.clear();
        s.stop_copy.extend(pattern(10, 1));
    });
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.get(SIZE).unwrap(), 0);
    saves_all(&user);
}

// V1-OUTSTANDING: a state write while a chunk is outstanding, loading
#[test]
fn a_state_write_in_the_middle_of_a_round_is_refused() {
    for mapping in [V1Mapping::Trapped, V1Mapping::Sparse(vec![(4096, 4096)])] {
        let (served, user) = loading(mapping);
        let start = user.get(OFFSET).unwrap();
        let data = pattern(300, 2);
        user.write_raw(start, &data[..200]).unwrap();
        for target in [RUNNING, STOPPED] {
            user.refuses(RESUMING, "a state write in a round", |u| u.set(target));
        }
        // The same state again is no change.
        user.set(RESUMING).unwrap();
        user.write_raw(start + 200, &data[200..]).unwrap();
        user.write_raw(SIZE, &300_u64.to_ne_bytes()).unwrap();
        user.set(RUNNING).unwrap();
        assert_eq!(served.control.with(|s| s.loaded.clone()), [pattern(100, 1), data].concat());
    }
}

// V1-OUTSTANDING
#[test]
fn a_round_that_is_given_up_is_left_by_a_reset() {
    let (served, user) = loading(V1Mapping::Trapped);
    let start = user.get(OFFSET).unwrap();
    user.write_raw(start, &[1; 10]).unwrap();
    user.refuses(RESUMING, "a state write in a round", |u| u.set(RUNNING));
    user.client.reset().unwrap();
    assert_eq!(user.state(), RUNNING);
    user.set(RESUMING).unwrap();
    user.load(&[2; 5]).unwrap();
    user.set(RUNNING).unwrap();
    assert_eq!(served.control.with(|s| s.loaded.clone()), [2; 5]);
}

// V1-RESET: a device that resets in the middle
#[test]
fn a_reset_in_the_middle_ends_the_session_and_the_next_one_is_whole() {
    let (served, user) = saving(V1Mapping::Mapped);
    user.fetch().unwrap();
    user.client.reset().unwrap();
    assert_eq!((user.state(), user.get(PENDING).unwrap(), user.get(SIZE).unwrap()), (RUNNING, 0, 0));
    served.control.with(|s| {
        s.stop_copy.clear();
        s.stop_copy.extend(pattern(10, 1));
    });
    user.set(STOP_COPY).unwrap();
    saves_all(&user);
}

// V1-RESERVED: reserved bits lost by a plain write
#[test]
fn reserved_bits_other_than_those_that_were_read_are_refused() {
    let (_served, user) = saving(V1Mapping::Mapped);
    for raw in [RUNNING | 8, STOPPED | 0x8000_0000, STOP_COPY | 0xffff_fff8, u32::MAX] {
        user.refuses(STOP_COPY, "a reserved bit", |u| u.set(raw));
    }
    // The reserved field is ignored.
    user.write_raw(RESERVED, &[0xff; 4]).unwrap();
    assert_eq!(user.read_raw(RESERVED, 4).unwrap(), [0; 4]);
    saves_all(&user);
}

// V1-VALID
#[test]
fn combinations_that_mean_nothing_and_error_are_refused() {
    let (_served, user) = saving(V1Mapping::Mapped);
    for raw in [5, ERROR, 7] {
        user.refuses(STOP_COPY, "an invalid state", |u| u.set(raw));
    }
    for raw in [PRE_COPY, RESUMING] {
        user.refuses(STOP_COPY, "a state that cannot be reached", |u| u.set(raw));
    }
    saves_all(&user);
}

// V1-FIELDS: a 4-byte read of an 8-byte field, and all other widths and places
#[test]
fn fields_are_accessed_only_whole_and_alone() {
    let fields = [(STATE, 4), (RESERVED, 4), (PENDING, 8), (OFFSET, 8), (SIZE, 8)];
    for mapping in [V1Mapping::Trapped, V1Mapping::Mapped] {
        let (_served, user) = saving(mapping);
        for at in 0..32 {
            for width in [1, 2, 3, 4, 6, 8, 12, 16, 32, 40] {
                if fields.contains(&(at, width)) {
                    continue;
                }
                let what = format!("{width} bytes at {at}");
                user.refuses(STOP_COPY, &what, |u| u.read_raw(at, width));
                user.refuses(STOP_COPY, &what, |u| u.write_raw(at, &vec![0; width]));
            }
        }
        saves_all(&user);
    }
}

// V1-FIELDS
#[test]
fn fields_that_are_read_only_are_not_written() {
    let (_served, user) = saving(V1Mapping::Mapped);
    for field in [PENDING, OFFSET] {
        user.refuses(STOP_COPY, "a field that is read only", |u| u.write_raw(field, &[0; 8]));
    }
    saves_all(&user);
}

// V1-BOUNDS: data_offset below the struct's end
#[test]
fn there_is_no_data_between_the_fields_and_the_section() {
    let (served, user) = loading(V1Mapping::Mapped);
    assert_eq!(user.get(OFFSET).unwrap(), 4096);
    for at in [32, 64, 4000, 4095] {
        user.refuses(RESUMING, "a write before the section", |u| u.write_raw(at, &[1; 2]));
        user.refuses(RESUMING, "a read before the section", |u| u.read_raw(at, 2));
    }
    loads_all(&served, &user);
}

// V1-BOUNDS: data_offset + data_size beyond the region, also by wrap-around
#[test]
fn nothing_beyond_the_region_is_accessed_or_taken() {
    for mapping in [V1Mapping::Trapped, V1Mapping::Sparse(vec![(0, 4096)])] {
        let (served, user) = loading(mapping);
        user.get(OFFSET).unwrap();
        for (at, length) in [(user.size - 1, 2), (user.size, 1), (u64::MAX - 7, 8), (u64::MAX - 3, 8)] {
            user.refuses(RESUMING, "a write beyond the region", |u| u.write_raw(at, &vec![1; length]));
            user.refuses(RESUMING, "a read beyond the region", |u| u.read_raw(at, length));
        }
        for size in [8193, u64::MAX, u64::MAX - 31, 1 << 32, 1 << 63] {
            user.refuses(RESUMING, "a data_size beyond the region", |u| {
                u.write_raw(SIZE, &size.to_ne_bytes())
            });
        }
        loads_all(&served, &user);
    }
}

// V1-ROUNDS, V1-HOLLOW: a data_size of 0
#[test]
fn a_round_has_data_and_begins_with_data_offset() {
    let (served, user) = loading(V1Mapping::Sparse(vec![(4096, 4096)]));
    user.refuses(RESUMING, "data_size without data_offset", |u| u.write_raw(SIZE, &4_u64.to_ne_bytes()));
    user.refuses(RESUMING, "data without data_offset", |u| u.write_raw(4096, &[1; 4]));
    user.get(OFFSET).unwrap();
    user.refuses(RESUMING, "an empty round", |u| u.write_raw(SIZE, &0_u64.to_ne_bytes()));
    loads_all(&served, &user);
}

// V1-ROUNDS
#[test]
fn data_is_written_only_while_the_device_loads_and_read_only_while_it_saves() {
    let (_served, user) = saving(V1Mapping::Trapped);
    user.fetch().unwrap();
    user.refuses(STOP_COPY, "a write of the chunk", |u| u.write_raw(32, &[0; 4]));
    user.refuses(STOP_COPY, "a write of data_size", |u| u.write_raw(SIZE, &4_u64.to_ne_bytes()));
    saves_all(&user);
    for state in [STOPPED, RUNNING] {
        user.set(state).unwrap();
        user.get(OFFSET).unwrap();
        user.refuses(state, "a write of data", |u| u.write_raw(32, &[0; 4]));
        user.refuses(state, "a write of data_size", |u| u.write_raw(SIZE, &4_u64.to_ne_bytes()));
    }
    let (served, user) = loading(V1Mapping::Trapped);
    user.refuses(RESUMING, "a read of what was written", |u| u.read_raw(32, 4));
    loads_all(&served, &user);
}

// V1-FIELDS
#[test]
fn a_write_whose_length_is_not_what_it_says_is_refused() {
    let served = serve(V1Mapping::Trapped);
    let mut stream = served.greeted();
    let write = |count: u32, data: &[u8]| {
        let mut payload = STATE.to_ne_bytes().to_vec();
        payload.extend(REGION.to_ne_bytes());
        payload.extend(count.to_ne_bytes());
        payload.extend(data);
        payload
    };
    for (count, data) in [(4, &[0; 3][..]), (4, &[0; 5]), (4, &[]), (0, &[]), (u32::MAX, &[0; 4])] {
        stream.send(10, &write(count, data));
        assert_eq!(stream.receive().0, 22, "{count} said, {} sent", data.len());
    }
    stream.send(10, &write(4, &STOPPED.to_ne_bytes()));
    assert_eq!(stream.receive().0, 0);
}

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    State(u32),
    Field(u64),
    Round(usize),
    Reset,
}

fn any_access() -> impl Strategy<Value = Access> {
    let place = || prop_oneof![0..40_u64, 4090..4110_u64, 12_280..12_290_u64, any::<u64>()];
    prop_oneof![
        (place(), 0..20_usize).prop_map(|(at, length)| Access::Read(at, length)),
        (place(), proptest::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(at, data)| Access::Write(at, data)),
        (0..8_u32).prop_map(Access::State),
        (1..4_u64).prop_map(|field| Access::Field(field * 8)),
        (0..9000_usize).prop_map(Access::Round),
        Just(Access::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    // V1-BITS, V1-VALID: whatever a user does, the state is one that there is, a refusal changes nothing,
    // and the next migration is whole.
    #[test]
    fn no_order_of_accesses_does_harm(accesses in proptest::collection::vec(any_access(), 1..40)) {
        let served = serve(V1Mapping::Sparse(vec![(4096, 4096)]));
        served.control.with(|s| {
            s.precopy.extend(pattern(9000, 8));
            s.read_limit = Some(4000);
        });
        let user = served.user();
        let mut before = RUNNING;
        for access in accesses {
            let result = match &access {
                Access::Read(at, length) => user.read_raw(*at, *length).map(|_| ()),
                Access::Write(at, data) => user.write_raw(*at, data),
                Access::State(state) => user.set(*state),
                Access::Field(field) => user.get(*field).map(|_| ()),
                Access::Round(length) => user.load(&vec![7; *length]),
                Access::Reset => user.client.reset(),
            };
            let state = user.state();
            match (result, &access) {
                (Err(error), _) => {
                    prop_assert_eq!(error.errno, Some(airlift_core::Errno::EINVAL), "{:?}", access);
                    prop_assert_eq!(state, before);
                }
                (Ok(()), Access::State(wanted)) => prop_assert_eq!(state, *wanted),
                (Ok(()), Access::Reset) => prop_assert_eq!(state, RUNNING),
                // A write of the field itself may have been one that is allowed.
                (Ok(()), Access::Write(STATE, _)) => prop_assert!(state <= RESUMING),
                (Ok(()), _) => prop_assert_eq!(state, before),
            }
            before = state;
        }
        user.client.reset().unwrap();
        served.control.with(|s| {
            s.precopy.clear();
            s.stop_copy = pattern(10_000, 9).into();
        });
        user.set(STOP_COPY).unwrap();
        prop_assert_eq!(user.save().concat(), pattern(10_000, 9));
        user.set(RUNNING).unwrap();
        user.set(RESUMING).unwrap();
        user.load(&pattern(8192, 10)).unwrap();
        user.set(RUNNING).unwrap();
        prop_assert_eq!(served.control.with(|s| s.loaded.clone()), pattern(8192, 10));
    }
}

//! What a data section shows to whom: nothing of another client, nothing of another session, and of what
//! is trapped nothing that was not written in the round.

use crate::common::*;
use crate::v1_user::*;
use airlift_memory::{Access, Mapping, SharedMemory};
use airlift_vfio_user::{Client, ServerOptions, V1Mapping, V1Section};
use std::time::Duration;

const SECTION: u64 = 16_384;

fn serve(mapping: V1Mapping) -> Served {
    serve_v1(V1Section { size: SECTION, mapping, whole_transactions: false })
}

/// The data section as a client finds it in its file, which holds what is trapped too.
struct View(Mapping, u64);

impl View {
    fn of(client: &Client) -> Self {
        let info = client.region_info(REGION).unwrap();
        let memory = SharedMemory::from_fd(info.fd.unwrap(), info.size).unwrap();
        Self(memory.map(0, info.size, Access::ReadWrite).unwrap(), info.size - SECTION)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(SECTION).unwrap()];
        self.0.read(self.1, &mut bytes).unwrap();
        bytes
    }

    fn is_empty(&self) -> bool {
        self.bytes().iter().all(|byte| *byte == 0)
    }

    fn fill(&self, byte: u8) {
        self.0.write(self.1, &vec![byte; usize::try_from(SECTION).unwrap()]).unwrap();
    }
}

// V1-PRIVATE
#[test]
fn a_client_sees_and_changes_nothing_of_another_one() {
    for mapping in [V1Mapping::Mapped, V1Mapping::Sparse(vec![(4096, 4096)])] {
        let served = serve(mapping);
        let size = usize::try_from(SECTION).unwrap();
        let data = pattern(3 * size, 1);
        served.control.with(|s| s.precopy.extend(&data));
        let first = served.user();
        let before = View::of(&first.client);
        first.set(PRE_COPY).unwrap();
        first.get(PENDING).unwrap();
        assert!(first.fetch().unwrap() == data[..size]);
        // It leaves in the middle of a chunk, and keeps its mapping.
        drop(first);
        before.fill(0xee);

        let second = served.user();
        let now = View::of(&second.client);
        assert!(now.is_empty());
        second.set(PRE_COPY).unwrap();
        second.get(PENDING).unwrap();
        // The session of the first one is over and forgotten by now.
        before.fill(0xee);
        assert!(second.fetch().unwrap() == data[size..2 * size]);
        assert!(before.bytes() == vec![0xee; size], "what the second one is given");
        before.fill(0xef);
        assert!(second.fetch().unwrap() == data[size..2 * size], "by messages and by the mapping");
        assert!(now.bytes() == data[size..2 * size]);
        second.set(RUNNING).unwrap();

        // What the second one has written is what is loaded.
        second.set(RESUMING).unwrap();
        second.get(OFFSET).unwrap();
        second.write_data(4096, &data[..size]).unwrap();
        before.fill(0xdd);
        second.write_raw(SIZE, &SECTION.to_ne_bytes()).unwrap();
        assert!(served.control.with(|s| s.loaded.clone()) == data[..size]);
    }
}

// V1-PRIVATE
#[test]
fn what_is_under_way_for_a_client_that_has_gone_is_not_shown_to_the_next() {
    let quick = ServerOptions { transition_timeout: Duration::from_millis(50), ..Default::default() };
    let section = V1Section { size: SECTION, mapping: V1Mapping::Mapped, whole_transactions: false };
    let served = serve_v1_with(section, quick);
    served.control.with(|s| s.precopy.extend(pattern(5000, 1)));
    let access = |offset: u64, count: u32, data: &[u8]| {
        [&offset.to_ne_bytes()[..], &REGION.to_ne_bytes(), &count.to_ne_bytes(), data].concat()
    };
    let mut stream = served.greeted();
    stream.send(10, &access(STATE, 4, &PRE_COPY.to_ne_bytes()));
    assert_eq!(stream.receive().0, 0);
    served.control.with(|s| s.block_reads = true);
    stream.send(9, &access(PENDING, 8, &[]));
    stream.send(9, &access(OFFSET, 8, &[]));
    served.control.until("the read of the saver", |s| s.blocked == 1);
    drop(stream);
    // The saver holds up the end of its session, and the server goes on without it.
    let user = served.user();
    let view = View::of(&user.client);
    served.control.with(|s| s.block_reads = false);
    served.control.until("the end of the session", |s| s.log.iter().any(|l| l == "saver gone"));
    assert!(view.is_empty());
    // What comes next is in the new one.
    user.client.reset().unwrap();
    served.control.with(|s| s.precopy.extend(pattern(300, 2)));
    user.set(PRE_COPY).unwrap();
    assert_eq!(user.save(), [pattern(300, 2)]);
    assert_eq!(view.bytes()[..300], pattern(300, 2));
}

// V1-PRIVATE
#[test]
fn a_session_begins_with_nothing_of_the_one_before() {
    let served = serve(V1Mapping::Mapped);
    let user = served.user();
    let view = View::of(&user.client);
    let data = pattern(10_000, 1);
    // Each way that a session ends, and then both ways that the next one begins.
    let leave: [fn(&User); 3] = [
        |user| user.set(RUNNING).unwrap(),
        |user| user.set(STOPPED).unwrap(),
        |user| user.client.reset().unwrap(),
    ];
    for leave in leave {
        served.control.with(|s| s.stop_copy.extend(&data));
        user.set(STOP_COPY).unwrap();
        assert!(user.save().concat() == data);
        assert!(view.bytes()[..10_000] == data);
        leave(&user);
        user.set(RESUMING).unwrap();
        assert!(view.is_empty());
        // What the device gets is what the client left there: here nothing.
        user.get(OFFSET).unwrap();
        user.write_raw(SIZE, &100_u64.to_ne_bytes()).unwrap();
        assert_eq!(served.control.with(|s| s.loaded.clone()), [0; 100]);
        user.load(&data).unwrap();
        leave(&user);
        served.control.with(|s| s.stop_copy.extend([7; 3]));
        user.set(STOP_COPY).unwrap();
        assert_eq!(user.save(), [[7; 3]]);
        assert!(view.bytes()[3..] == [0; 16_381]);
        user.set(RUNNING).unwrap();
    }
}

// V1-PRIVATE: what a session leaves is cleared beside the arc, and before the next one can bring anything
#[test]
fn nothing_that_a_client_writes_is_lost_with_the_session_before() {
    // So large that it takes a while.
    let size = 64 << 20;
    let served = serve_v1(V1Section { size, mapping: V1Mapping::Mapped, whole_transactions: false });
    let user = served.user();
    let info = user.client.region_info(REGION).unwrap();
    let memory = SharedMemory::from_fd(info.fd.unwrap(), info.size).unwrap();
    let mapping = memory.map(0, info.size, Access::ReadWrite).unwrap();
    let whole = vec![1; usize::try_from(size).unwrap()];
    let last = info.size - 4;
    for turn in 0..5_u32 {
        user.set(RESUMING).unwrap();
        let mut found = [0; 4];
        mapping.read(last, &mut found).unwrap();
        assert_eq!(found, [0; 4], "turn {turn}");
        mapping.write(last, b"here").unwrap();
        user.load(b"first").unwrap();
        mapping.read(last, &mut found).unwrap();
        assert_eq!(&found, b"here", "turn {turn}");
        mapping.write(4096, &whole).unwrap();
        user.set(STOPPED).unwrap();
    }
    assert_eq!(served.control.with(|s| s.loaded.clone()), b"first");
}

/// A round of these pieces, and then of so many bytes, which is refused or taken.
fn round(user: &User, pieces: &[(u64, u64)], size: u64) -> bool {
    let start = user.get(OFFSET).unwrap();
    let data = pattern(16_384, 5);
    for &(at, end) in pieces {
        let (from, to) = (usize::try_from(at).unwrap(), usize::try_from(end).unwrap());
        user.write_raw(start + at, &data[from..to]).unwrap();
    }
    let taken = user.write_raw(SIZE, &size.to_ne_bytes());
    if let Err(error) = &taken {
        assert_eq!(error.errno, Some(airlift_core::Errno::EINVAL));
        assert_eq!(user.state(), RESUMING);
    }
    taken.is_ok()
}

// V1-PRIVATE, V1-ROUNDS
#[test]
fn of_what_is_trapped_only_bytes_of_the_round_are_taken() {
    let served = serve(V1Mapping::Trapped);
    let user = served.user();
    // What a saver gave, and what an earlier round brought, stands there no longer.
    served.control.with(|s| s.stop_copy.extend(pattern(16_384, 3)));
    user.set(STOP_COPY).unwrap();
    user.save();
    user.set(RESUMING).expect_err("no arc leads there");
    user.set(RUNNING).unwrap();
    user.set(RESUMING).unwrap();
    assert!(!round(&user, &[], 32), "nothing was written");
    assert!(!round(&user, &[(0, 10)], 11), "a byte behind it");
    // The round is still open: what is missing can be brought.
    assert!(!round(&user, &[(20, 30), (14, 17)], 30));
    assert!(!round(&user, &[(17, 20)], 30));
    assert!(round(&user, &[(9, 15)], 30), "in any order");
    assert!(!round(&user, &[], 1), "the round before is over");
    assert!(!round(&user, &[(1, 16_384)], 16_384));
    assert!(round(&user, &[(0, 1)], 16_000), "less than was written");
    let (loaded, writes) = served.control.with(|s| (s.loaded.clone(), s.writes.clone()));
    assert_eq!(writes, [30, 16_000]);
    let data = pattern(16_384, 5);
    assert!(loaded == [&data[..30], &data[..16_000]].concat());
}

// V1-PRIVATE, V1-AREAS
#[test]
fn what_is_mapped_needs_no_message_and_what_lies_beside_it_does() {
    let served = serve(V1Mapping::Sparse(vec![(12_288, 4096), (4096, 4096)]));
    let user = served.user();
    user.set(RESUMING).unwrap();
    assert!(!round(&user, &[], 1));
    assert!(!round(&user, &[(0, 4096)], 8193), "the part between the areas");
    assert!(round(&user, &[], 8192));
    assert!(!round(&user, &[(0, 5000)], 16_384));
    assert!(!round(&user, &[(9000, 13_000)], 16_384));
    assert!(round(&user, &[(8000, 9000)], 16_384));
    assert_eq!(served.control.with(|s| s.writes.clone()), [8192, 16_384]);
}

//! A migration region when something fails: the device, its saver or loader, the user's connection; and
//! what goes on beside it.

use crate::common::*;
use crate::v1_user::*;
use airlift_core::{DeviceState, Errno};
use airlift_memory::SharedMemory;
use airlift_vfio_user::{Client, DmaAccess, ServerOptions, V1Mapping, V1Section};
use std::time::Duration;

use DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy};

fn serve(mapping: V1Mapping) -> Served {
    serve_with(mapping, ServerOptions::default())
}

fn serve_with(mapping: V1Mapping, options: ServerOptions) -> Served {
    serve_v1_with(V1Section { size: 8192, mapping, whole_transactions: false }, options)
}

// V1-READBACK
#[test]
fn a_write_that_failed_reads_back_the_state_before_or_error() {
    // From, to, which arc fails and where the device is then, and what is read back.
    for (from, to, arc, at, back) in [
        (RUNNING, STOPPED, "RUNNING -> STOP", Running, RUNNING),
        // In the middle: walked back, because nothing was lost.
        (RUNNING, STOP_COPY, "STOP -> STOP_COPY", Stop, RUNNING),
        (RUNNING, RESUMING, "STOP -> RESUMING", Stop, RUNNING),
        (RUNNING, STOP_COPY, "STOP -> STOP_COPY", StopCopy, RUNNING),
        (STOPPED, STOP_COPY, "STOP -> STOP_COPY", Stop, STOPPED),
        (STOPPED, RUNNING, "STOP -> RUNNING", Running, STOPPED),
        (RUNNING, PRE_COPY, "RUNNING -> PRE_COPY", Running, RUNNING),
        (PRE_COPY, STOP_COPY, "PRE_COPY -> STOP_COPY", PreCopy, PRE_COPY),
        (STOP_COPY, STOPPED, "STOP_COPY -> STOP", StopCopy, STOP_COPY),
        (RESUMING, RUNNING, "RESUMING -> STOP", Resuming, RESUMING),
        // Data was read, forgotten or loaded: there is no way back.
        (RUNNING, RESUMING, "STOP -> RESUMING", Resuming, ERROR),
        (PRE_COPY, STOP_COPY, "PRE_COPY -> STOP_COPY", StopCopy, ERROR),
        (PRE_COPY, STOP_COPY, "PRE_COPY -> STOP_COPY", Running, ERROR),
        (STOP_COPY, RUNNING, "STOP -> RUNNING", Stop, ERROR),
        (RESUMING, RUNNING, "STOP -> RUNNING", Stop, ERROR),
        (RESUMING, STOPPED, "RESUMING -> STOP", DeviceState::Error, ERROR),
        // A state that the interface does not have.
        (RUNNING, STOPPED, "RUNNING -> STOP", DeviceState::RunningP2p, ERROR),
    ] {
        let served = serve(V1Mapping::Mapped);
        let user = served.user();
        user.set(from).unwrap();
        served.control.with(|s| s.fail_arcs = vec![(arc, Errno::ENOSPC, at)]);
        let what = format!("{from:03b} -> {to:03b} at {arc}, left in {at}");
        assert_eq!(errno(user.set(to)), Some(Errno::ENOSPC), "{what}");
        assert_eq!(user.state(), back, "{what}");
        if back == ERROR {
            // Only a reset leaves it.
            for to in 0..8 {
                user.refuses(ERROR, "a state write in ERROR", |u| u.set(to));
            }
            assert_eq!((user.get(PENDING).unwrap(), user.get(SIZE).unwrap()), (0, 0));
            user.client.reset().unwrap();
            assert_eq!(user.state(), RUNNING);
        } else if back != RESUMING {
            // The device is where it is said to be, and can be tried again.
            user.set(to).unwrap();
            assert_eq!(user.state(), to, "{what}");
        }
    }
}

// V1-READBACK
#[test]
fn a_way_back_that_fails_ends_in_error() {
    let served = serve(V1Mapping::Trapped);
    let user = served.user();
    served.control.with(|s| {
        s.fail_arcs = vec![("STOP -> STOP_COPY", Errno::ENOSPC, Stop), ("STOP -> RUNNING", Errno::EIO, Stop)];
    });
    assert_eq!(errno(user.set(STOP_COPY)), Some(Errno::ENOSPC), "the first failure is the answer");
    assert_eq!(user.state(), ERROR);
    let log = served.control.log();
    assert_eq!(log[1..], ["RUNNING -> STOP", "STOP -> STOP_COPY", "STOP -> RUNNING"]);
}

// V1-READBACK
#[test]
fn an_answer_that_never_comes_ends_in_error() {
    let quick = ServerOptions { transition_timeout: Duration::from_millis(50), ..Default::default() };
    let served = serve_with(V1Mapping::Trapped, quick);
    let user = served.user();
    served.control.with(|s| s.hold = true);
    assert_eq!(errno(user.set(STOPPED)), Some(Errno::ETIMEDOUT));
    assert_eq!(user.state(), ERROR);
    served.control.with(|s| {
        s.hold = false;
        s.held.clear();
        s.forget = true;
    });
    user.client.reset().unwrap_err();
    user.client.reset().unwrap();
    served.control.with(|s| s.forget = true);
    assert_eq!(errno(user.set(PRE_COPY)), Some(Errno::EIO));
    assert_eq!(user.state(), ERROR);
}

// VU-GUARD, V1-READBACK
#[test]
fn a_device_that_holds_memory_for_writing_does_not_stop() {
    let served = serve(V1Mapping::Trapped);
    let user = served.user();
    let memory = SharedMemory::create("guest", 1 << 20).unwrap();
    user.client.dma_map(0, 1 << 20, DmaAccess::READ | DmaAccess::WRITE, Some((memory.fd(), 0))).unwrap();
    let dma = served.control.with(|s| s.attachment.as_ref().unwrap().dma.clone());
    for (from, to, back) in [
        (RUNNING, STOPPED, RUNNING),
        (RUNNING, STOP_COPY, RUNNING),
        (RUNNING, RESUMING, RUNNING),
        (PRE_COPY, STOP_COPY, ERROR),
    ] {
        user.set(from).unwrap();
        let guard = dma.map(4096, 8, DmaAccess::WRITE).unwrap();
        assert_eq!(errno(user.set(to)), Some(Errno::EBUSY));
        assert_eq!(user.state(), back, "{from:03b} -> {to:03b}");
        drop(guard);
    }
    user.client.reset().unwrap();
    user.set(STOP_COPY).unwrap();
}

// V1-LOOP-ERROR: a read that fails in the middle
#[test]
fn a_saver_that_fails_ends_the_loop_and_the_device_runs_on() {
    let served = serve(V1Mapping::Mapped);
    let user = served.user();
    served.control.with(|s| {
        s.stop_copy.extend(pattern(10, 1));
        s.read_limit = Some(4);
    });
    user.set(STOP_COPY).unwrap();
    user.get(PENDING).unwrap();
    assert_eq!(user.fetch().unwrap().len(), 4);
    served.control.with(|s| s.fail_reads = Some(Errno::ENXIO));
    assert_eq!(errno(user.get(PENDING)), Some(Errno::ENXIO));
    served.control.with(|s| s.fail_reads = None);
    // Nothing may be read behind what was lost, not even when the saver would give it.
    for field in [PENDING, OFFSET, SIZE] {
        assert_eq!(errno(user.get(field)), Some(Errno::ENXIO));
    }
    assert_eq!(errno(user.read_raw(4096 + 8191, 1)), Some(Errno::ENXIO));
    assert_eq!(served.control.with(|s| s.reads.len()), 1);
    assert_eq!(user.state(), STOP_COPY);
    user.set(RUNNING).unwrap();
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.save().concat(), pattern(10, 1)[4..]);
}

// V2-WRITE-FINAL, V1-LOOP-ERROR
#[test]
fn a_loader_that_fails_spoils_what_was_loaded() {
    let served = serve(V1Mapping::Mapped);
    let user = served.user();
    served.control.with(|s| s.load_limit = Some(150));
    user.set(RESUMING).unwrap();
    user.load(&[1; 100]).unwrap();
    assert_eq!(errno(user.load(&[2; 100])), Some(Errno::ENOSPC));
    assert_eq!(errno(user.load(&[3; 10])), Some(Errno::ENOSPC), "also what would have fitted");
    // It has a hole, and must not be loaded.
    assert_eq!(errno(user.set(RUNNING)), Some(Errno::EIO));
    assert_eq!(user.state(), RESUMING);
    assert!(!served.control.log().contains(&"RESUMING -> STOP".to_owned()));
    user.client.reset().unwrap();
    assert_eq!(user.state(), RUNNING);
}

// V1-LOOP-ERROR
#[test]
fn a_loader_that_cannot_be_had_is_the_answer_to_the_first_round() {
    let served = serve(V1Mapping::Trapped);
    let user = served.user();
    served.control.with(|s| s.load_refused = true);
    user.set(RESUMING).unwrap();
    assert_eq!(errno(user.load(&[1; 10])), Some(Errno::ENOMEM));
    assert_eq!(errno(user.set(RUNNING)), Some(Errno::EIO), "nothing was loaded");
    assert_eq!(user.state(), RESUMING);
    user.client.reset().unwrap();
    assert_eq!(user.state(), RUNNING);
}

// VU-SESSION-END
#[test]
fn the_end_of_the_connection_ends_the_session_in_every_state() {
    for (state, after) in
        [(RUNNING, RUNNING), (STOPPED, STOPPED), (PRE_COPY, RUNNING), (STOP_COPY, STOPPED), (RESUMING, ERROR)]
    {
        let served = serve(V1Mapping::Mapped);
        served.control.with(|s| s.precopy.extend([1; 100]));
        let user = served.user();
        user.set(state).unwrap();
        if state & STOP_COPY != 0 {
            // In the middle of a chunk.
            user.get(PENDING).unwrap();
            user.fetch().unwrap();
        } else if state == RESUMING {
            let start = user.get(OFFSET).unwrap();
            user.write_raw(start + 8191, &[1]).unwrap();
        }
        drop(user);
        let user = served.user();
        assert_eq!(user.state(), after, "after {state:03b}");
        assert_eq!((user.get(PENDING).unwrap(), user.get(SIZE).unwrap()), (0, 0));
    }
}

/// A user on the second connection.
fn second(client: &Client) -> User {
    User::new(Client::from_stream(client.migration_socket().unwrap(), options()).unwrap())
}

// VU-MIGRATION-SOCKET
#[test]
fn the_second_connection_migrates_and_touches_nothing_else() {
    for mapping in [V1Mapping::Trapped, V1Mapping::Mapped] {
        let source = serve(mapping.clone());
        let target = serve(mapping.clone());
        let (guest, other) = (source.client(), target.client());
        let (from, to) = (second(&guest), second(&other));
        assert_eq!(from.mapped() > 0, mapping == V1Mapping::Mapped, "it may map the data section");
        let data = pattern(20_000, 9);
        source.control.with(|s| s.stop_copy.extend(&data));
        from.set(PRE_COPY).unwrap();
        // What comes after the stop is told before it.
        assert_eq!((from.get(PENDING).unwrap(), from.save().len()), (20_000, 0));
        from.set(STOP_COPY).unwrap();
        to.set(RESUMING).unwrap();
        for chunk in from.save() {
            to.load(&chunk).unwrap();
        }
        from.set(STOPPED).unwrap();
        to.set(RUNNING).unwrap();
        assert_eq!(target.control.with(|s| s.loaded.clone()), data);

        let eperm = Some(Errno::EPERM);
        assert_eq!(errno(from.client.region_read(0, 0, &mut [0; 4])), eperm);
        assert_eq!(errno(from.client.region_write(0, 0, &[0; 4])), eperm);
        assert_eq!(errno(from.client.region_write(7, 4, &[0; 4])), eperm);
        assert!(from.client.region_info(2).unwrap().fd.is_none());
        // Both see one state, and the end of the second connection ends its session.
        from.set(STOP_COPY).unwrap();
        let user = User::new(guest);
        assert_eq!(user.state(), STOP_COPY);
        drop(from);
        source
            .control
            .until("the end of the session", |s| s.log.last().is_some_and(|l| l == "STOP_COPY -> STOP"));
        assert_eq!(user.state(), STOPPED);
    }
}

#[test]
fn guest_accesses_are_answered_while_a_saver_takes_its_time() {
    let served = serve(V1Mapping::Mapped);
    let guest = served.client();
    let user = second(&guest);
    served.control.with(|s| {
        s.precopy.extend([5; 3]);
        s.block_reads = true;
    });
    user.set(PRE_COPY).unwrap();
    let reader = std::thread::spawn(move || (user.get(PENDING).unwrap(), user));
    served.control.until("the read of the saver", |s| s.blocked == 1);
    guest.region_write(0, 16, b"guest").unwrap();
    let mut back = [0; 5];
    guest.region_read(0, 16, &mut back).unwrap();
    assert_eq!(&back, b"guest");
    // The state is known too.
    guest.region_read(REGION, STATE, &mut back[..4]).unwrap();
    assert_eq!(back[..4], PRE_COPY.to_ne_bytes());
    assert!(!reader.is_finished());
    served.control.with(|s| s.block_reads = false);
    let (pending, user) = reader.join().unwrap();
    assert_eq!(pending, 3);
    assert_eq!(user.save(), [[5; 3]]);
}

/// The payload of an access to a region.
fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut payload = offset.to_ne_bytes().to_vec();
    payload.extend(region.to_ne_bytes());
    payload.extend(count.to_ne_bytes());
    payload.extend(data);
    payload
}

const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;

// V1-READBACK
#[test]
fn accesses_to_the_region_do_not_overtake_a_state_write() {
    let served = serve(V1Mapping::Trapped);
    let mut stream = served.greeted();
    served.control.with(|s| {
        s.hold = true;
        s.precopy.extend([1; 7]);
    });
    stream.send(REGION_WRITE, &access(REGION, STATE, 4, &PRE_COPY.to_ne_bytes()));
    stream.send(REGION_READ, &access(REGION, STATE, 4, &[]));
    stream.send(REGION_READ, &access(REGION, PENDING, 8, &[]));
    stream.send(REGION_READ, &access(0, 64, 4, &[]));
    // The guest's access is answered first, and the region's own only behind the arc.
    let (error, reply) = stream.receive();
    assert_eq!((error, &reply[..16]), (0, access(0, 64, 4, &[]).as_slice()));
    served.control.with(|s| {
        s.hold = false;
        s.held.remove(0).ok();
    });
    let (error, reply) = stream.receive();
    assert_eq!((error, reply), (0, access(REGION, STATE, 4, &[])), "the write is answered by its head");
    let (error, reply) = stream.receive();
    assert_eq!((error, &reply[16..]), (0, PRE_COPY.to_ne_bytes().as_slice()));
    let (error, reply) = stream.receive();
    assert_eq!((error, &reply[16..]), (0, 7_u64.to_ne_bytes().as_slice()));
}

// V1-PENDING
#[test]
fn a_state_write_waits_for_what_was_asked_of_the_saver_before() {
    let served = serve(V1Mapping::Trapped);
    let mut stream = served.greeted();
    served.control.with(|s| {
        s.precopy.extend([5; 3]);
        s.block_reads = true;
    });
    stream.send(REGION_WRITE, &access(REGION, STATE, 4, &PRE_COPY.to_ne_bytes()));
    assert_eq!(stream.receive().0, 0);
    stream.send(REGION_READ, &access(REGION, PENDING, 8, &[]));
    stream.send(REGION_WRITE, &access(REGION, STATE, 4, &STOP_COPY.to_ne_bytes()));
    stream.send(REGION_READ, &access(0, 0, 4, &[]));
    // When the guest's access is answered, the write before it has begun.
    assert_eq!(stream.receive().1.len(), 20);
    served.control.until("the read of the saver", |s| s.blocked == 1);
    assert!(!served.control.log().contains(&"PRE_COPY -> STOP_COPY".to_owned()));
    served.control.with(|s| s.block_reads = false);
    assert_eq!(stream.receive().1[16..], 3_u64.to_ne_bytes());
    assert_eq!(stream.receive().0, 0);
    assert!(served.control.log().contains(&"PRE_COPY -> STOP_COPY".to_owned()));
}

//! A second connection whose client does not take its answers: it waits alone.

use crate::common::*;
use airlift_core::Errno;
use airlift_vfio_user::codec::{FeatureFlags, FeatureHeader, feature};
use airlift_vfio_user::{Client, ServerOptions, V1Mapping, V1Section};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use zerocopy::IntoBytes;

/// More than a socket takes.
const CHUNK: u32 = 1 << 20;
/// Accesses of the guest while the second connection is stuck.
const ACCESSES: u32 = 200;
/// Requests whose answers no socket takes.
const REQUESTS: usize = 5000;
const MIGRATION_REGION: u32 = 9;

/// The second connection, by hand: what is sent, and apart from it what is received.
struct Peer {
    stream: UnixStream,
    sent: u16,
}

impl Peer {
    fn of(guest: &Client) -> Self {
        let stream = guest.migration_socket().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut peer = Self { stream, sent: 0 };
        let greeting = peer.send(1, &[0, 0, 0, 0]);
        assert_eq!(peer.receive().0, greeting);
        peer
    }

    /// Sends a request; its number.
    fn send(&mut self, command: u16, payload: &[u8]) -> u16 {
        self.sent += 1;
        let size = u32::try_from(payload.len() + 16).unwrap();
        let head = [self.sent.to_ne_bytes(), command.to_ne_bytes()].concat();
        let message = [&head, &size.to_ne_bytes()[..], &[0; 8], payload].concat();
        self.stream.write_all(&message).unwrap();
        self.sent
    }

    /// The number of the next answer, which is no error, and the bytes that follow.
    fn head(&mut self) -> (u16, usize) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(word(12), 0, "an error");
        (u16::from_ne_bytes([head[0], head[1]]), usize::try_from(word(4)).unwrap() - 16)
    }

    fn payload(&mut self, length: usize) -> Vec<u8> {
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).unwrap();
        payload
    }

    /// The number and the payload of the next answer.
    fn receive(&mut self) -> (u16, Vec<u8>) {
        let (number, length) = self.head();
        (number, self.payload(length))
    }

    fn feature(&mut self, index: u16, flags: FeatureFlags, data: &[u8]) -> u16 {
        let head = FeatureHeader::new(4096, index, flags);
        self.send(16, &[head.as_bytes(), data].concat())
    }

    fn region_read(&mut self, offset: u64, count: u32) -> u16 {
        let head =
            [offset.to_ne_bytes(), (u64::from(count) << 32 | u64::from(MIGRATION_REGION)).to_ne_bytes()];
        self.send(9, &head.concat())
    }

    fn region_write(&mut self, offset: u64, data: &[u8]) -> u16 {
        let count = u32::try_from(data.len()).unwrap();
        let words = [MIGRATION_REGION.to_ne_bytes(), count.to_ne_bytes()].concat();
        self.send(10, &[&offset.to_ne_bytes()[..], &words, data].concat())
    }

    /// Begins a dirty log: done at once, and seen over the other connection.
    fn start_log(&mut self) -> u16 {
        let control = [4096_u64, 1, 0, 4096].map(u64::to_ne_bytes).concat();
        self.feature(feature::DMA_LOGGING_START, FeatureFlags::SET, &control)
    }
}

/// Waits until all requests before [`Peer::start_log`] were handled, and makes accesses as a guest.
fn guest_goes_on(guest: &Client) {
    let report = [0_u64, 4096, 4096].map(u64::to_ne_bytes).concat();
    while let Err(error) = guest.device_feature(feature::DMA_LOGGING_REPORT, FeatureFlags::GET, &report, 4096)
    {
        assert_eq!(error.errno, Some(Errno::EINVAL), "{error}");
    }
    for access in 0..ACCESSES {
        guest.region_write(0, 16, &access.to_ne_bytes()).unwrap();
        let mut back = [0; 4];
        guest.region_read(0, 16, &mut back).unwrap();
        assert_eq!(back, access.to_ne_bytes());
    }
}

/// The second connection is still there.
fn is_open(guest: &Client) -> bool {
    match guest.migration_socket() {
        Ok(_) => false,
        Err(error) => error.errno == Some(Errno::EBUSY),
    }
}

/// Over interface v1 or v2, with a chunk to be read in PRE_COPY; the guest's connection.
fn serve_chunk(v1: bool, message_timeout: Duration) -> (Served, Client) {
    let options = ServerOptions { message_timeout, ..Default::default() };
    let section = V1Section { size: CHUNK.into(), mapping: V1Mapping::Trapped, whole_transactions: false };
    let served = if v1 { serve_v1_with(section, options) } else { serve_with(FULL, options) };
    served.control.with(|s| s.precopy.extend((0..CHUNK).map(|i| u8::try_from(i % 251).unwrap())));
    let guest = served.client();
    (served, guest)
}

/// Goes to PRE_COPY and asks for the chunk, of whose answer it takes the head alone; the bytes that follow.
fn leave_a_chunk(peer: &mut Peer, v1: bool) -> usize {
    let asked = if v1 {
        let write = peer.region_write(0, &3_u32.to_ne_bytes());
        assert_eq!(peer.receive().0, write);
        for field in [8, 16] {
            let read = peer.region_read(field, 8);
            assert_eq!(peer.receive().0, read);
        }
        peer.region_read(32, CHUNK)
    } else {
        let state = [6_u32, u32::MAX].map(u32::to_ne_bytes).concat();
        let set = peer.feature(feature::MIG_DEVICE_STATE, FeatureFlags::SET, &state);
        assert_eq!(peer.receive().0, set);
        peer.send(17, &[CHUNK + 8, CHUNK].map(u32::to_ne_bytes).concat())
    };
    let (number, length) = peer.head();
    assert_eq!(number, asked);
    length
}

/// Asks for the state.
fn ask_state(peer: &mut Peer, v1: bool) -> u16 {
    if v1 { peer.region_read(0, 4) } else { peer.feature(feature::MIG_DEVICE_STATE, FeatureFlags::GET, &[]) }
}

// VU-UNREAD
#[test]
fn guest_accesses_are_served_while_data_on_the_second_connection_is_not_taken() {
    for v1 in [true, false] {
        let (_served, guest) = serve_chunk(v1, Duration::from_secs(60));
        let mut peer = Peer::of(&guest);
        let length = leave_a_chunk(&mut peer, v1);
        let state = ask_state(&mut peer, v1);
        let log = peer.start_log();
        guest_goes_on(&guest);
        assert!(is_open(&guest));
        // When they are taken, they are all there, in order.
        let answer = peer.payload(length);
        let chunk = &answer[length - usize::try_from(CHUNK).unwrap()..];
        assert!(chunk.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 251));
        let (number, answer) = peer.receive();
        assert_eq!((number, answer.len()), (state, if v1 { 20 } else { 16 }));
        assert_eq!(peer.receive().0, log);
    }
}

// VU-UNREAD: answers that none of the data thread is before
#[test]
fn guest_accesses_are_served_while_other_answers_are_not_taken() {
    let (_served, guest) = serve_chunk(false, Duration::from_secs(60));
    let mut peer = Peer::of(&guest);
    // A PROBE comes back whole.
    let long = vec![7; 900_000];
    let probe = peer.feature(feature::MIGRATION, FeatureFlags::PROBE | FeatureFlags::GET, &long);
    let state = ask_state(&mut peer, false);
    let log = peer.start_log();
    guest_goes_on(&guest);
    assert!(is_open(&guest));
    let (number, answer) = peer.receive();
    assert_eq!((number, &answer[8..]), (probe, long.as_slice()));
    assert_eq!(peer.receive().0, state);
    assert_eq!(peer.receive().0, log);
}

// VU-UNREAD, VU-BOUND
#[test]
fn requests_wait_when_too_many_answers_do_and_none_is_lost() {
    for v1 in [true, false] {
        let (_served, guest) = serve_chunk(v1, Duration::from_secs(60));
        let mut peer = Peer::of(&guest);
        let log = peer.start_log();
        assert_eq!(peer.receive().0, log);
        let stream = peer.stream.try_clone().unwrap();
        let mut reader = Peer { stream, sent: 0 };
        let asked = std::thread::spawn(move || {
            let long = vec![5; 60_000];
            let probe = FeatureFlags::PROBE | FeatureFlags::GET;
            let mut ask = |turn| match turn % 5 {
                0 => peer.feature(feature::STATE_FORMAT, probe, &long),
                _ => ask_state(&mut peer, v1),
            };
            (0..REQUESTS).map(&mut ask).collect::<Vec<_>>()
        });
        for _ in 0..10 {
            guest_goes_on(&guest);
        }
        assert!(is_open(&guest));
        assert!(!asked.is_finished(), "all was read, and its answers are kept");
        let answered: Vec<_> = (0..REQUESTS).map(|_| reader.receive().0).collect();
        assert_eq!(answered, asked.join().unwrap());
    }
}

// VU-UNREAD, VU-SESSION-END
#[test]
fn a_second_connection_that_takes_no_answers_is_ended_in_time() {
    // Data, or an answer of the device thread in the middle of a session.
    for (v1, data) in [(true, true), (false, true), (false, false)] {
        let (served, guest) = serve_chunk(v1, Duration::from_millis(100));
        let mut peer = Peer::of(&guest);
        if data {
            leave_a_chunk(&mut peer, v1);
        } else {
            let state = [6_u32, u32::MAX].map(u32::to_ne_bytes).concat();
            peer.feature(feature::MIG_DEVICE_STATE, FeatureFlags::SET, &state);
            let probe = FeatureFlags::PROBE | FeatureFlags::GET;
            peer.feature(feature::STATE_FORMAT, probe, &vec![5; 900_000]);
        }
        served.control.until("the end of the session", |s| s.log.iter().any(|l| l == "PRE_COPY -> RUNNING"));
        let mut next = Peer::of(&guest);
        let state = next.feature(feature::STATE_FORMAT, FeatureFlags::GET, &[]);
        assert_eq!(next.receive().0, state);
    }
}

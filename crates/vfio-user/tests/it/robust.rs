//! A server against clients that send anything: it answers or ends the connection, and serves the
//! next client.

use crate::common::*;
use airlift_vfio_user::ServerOptions;
use airlift_vfio_user::codec::{VersionMessage, command};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

fn message(command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![1, 0];
    out.extend(command.to_ne_bytes());
    out.extend(u32::try_from(payload.len() + 16).unwrap().to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 4]);
    out.extend(payload);
    out
}

fn hello() -> Vec<u8> {
    message(command::VERSION, 0, &VersionMessage { major: 0, minor: 0, caps: Default::default() }.encode())
}

fn serve_quickly() -> Served {
    let quick = Duration::from_millis(20);
    serve_with(FULL, ServerOptions { message_timeout: quick, handshake_timeout: quick, ..Default::default() })
}

/// Sends the bytes, takes what is answered, and goes.
fn send(served: &Served, bytes: &[u8]) {
    let mut stream = served.raw();
    // The server may close the connection before all is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

fn still_serves(served: &Served) {
    let client = served.client();
    client.region_write(0, 0, &[42]).unwrap();
    let mut byte = [0];
    client.region_read(0, 0, &mut byte).unwrap();
    assert_eq!(byte, [42]);
}

/// The errno of a request's error reply.
fn errno(stream: &mut UnixStream, bytes: &[u8]) -> u32 {
    stream.write_all(bytes).unwrap();
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
    assert_eq!(word(4), 16, "an error reply is a header alone");
    assert_eq!(word(8), 0x21);
    word(12)
}

// VU-ERROR-REPLY, VU-BOUND, VU-DRAIN
#[test]
fn wrong_requests_get_an_error_and_the_connection_stays() {
    let served = serve();
    let mut stream = served.raw();
    assert_eq!(errno(&mut stream, &message(command::DEVICE_GET_INFO, 0, &[0; 16])), 22, "before VERSION");
    stream.write_all(&hello()).unwrap();
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    let size = u32::from_ne_bytes(head[4..8].try_into().unwrap());
    stream.read_exact(&mut vec![0; usize::try_from(size).unwrap() - 16]).unwrap();

    for number in (1..20).chain([0, 1000, u16::MAX]) {
        if number == command::DEVICE_RESET {
            continue;
        }
        // Nothing, and one byte too few or too many.
        assert_ne!(errno(&mut stream, &message(number, 0, &[])), 0, "{}", command::name(number));
        assert_ne!(errno(&mut stream, &message(number, 0, &[0; 7])), 0, "{}", command::name(number));
    }
    let einval = |stream: &mut UnixStream, number, payload: &[u8]| {
        assert_eq!(errno(stream, &message(number, 0, payload)), 22, "{} {payload:?}", command::name(number));
    };
    // A count that is not that of the data; data that is not there; a size above the bound.
    let access = |count: u32, data: &[u8]| [&[0; 12][..], &count.to_ne_bytes(), data].concat();
    einval(&mut stream, command::REGION_WRITE, &access(4, &[1, 2, 3]));
    einval(&mut stream, command::REGION_WRITE, &access(2, &[1, 2, 3]));
    einval(&mut stream, command::REGION_READ, &access(u32::MAX, &[]));
    einval(&mut stream, command::MIG_DATA_READ, &[255; 8]);
    einval(&mut stream, command::DEVICE_SET_IRQS, &[255; 20]);
    einval(&mut stream, command::DMA_MAP, &[255; 32]);
    // A payload above the bound is skipped and refused; so are flags that mean nothing.
    assert_eq!(errno(&mut stream, &message(command::REGION_WRITE, 0, &vec![0; 2 << 20])), 90);
    assert_eq!(errno(&mut stream, &message(command::REGION_WRITE, 5, &[0; 100])), 22);
    // A reply to nothing is passed over; a command without reply is not answered.
    stream.write_all(&message(command::DMA_READ, 1, &[0; 100])).unwrap();
    stream.write_all(&message(99, 0x10, &[0; 100])).unwrap();
    assert_eq!(errno(&mut stream, &message(99, 0, &[])), 38);
    drop(stream);
    still_serves(&served);
}

// VU-WHOLE, VU-BOUND
#[test]
fn a_client_that_stops_within_a_message_or_says_nothing_is_ended() {
    let served = serve_quickly();
    let wait = |bytes: &[u8]| {
        let mut stream = served.raw();
        stream.write_all(bytes).unwrap();
        // Ends when the server closes the connection.
        let _ = stream.read_to_end(&mut Vec::new());
    };
    wait(&[]);
    wait(&[1, 0, 1]);
    wait(&message(command::VERSION, 0, &[0; 64])[..40]);
    wait(&[hello(), message(command::REGION_WRITE, 0, &[0; 64])[..40].to_vec()].concat());
    let mut short = message(command::DEVICE_RESET, 0, &[]);
    short[4] = 15;
    wait(&[hello(), short].concat());
    still_serves(&served);
    assert!(served.control.log().contains(&"detach protocol".into()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_end_the_server(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let served = serve_quickly();
        send(&served, &bytes);
        send(&served, &[hello(), bytes].concat());
        still_serves(&served);
    }

    #[test]
    fn no_messages_end_the_server(
        messages in proptest::collection::vec(
            (0_u16..20, prop_oneof![Just(0_u32), Just(0x10), any::<u32>()],
             proptest::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(16), Just(255), any::<u8>()], 0..48)),
            0..12,
        )
    ) {
        let served = serve_quickly();
        let mut bytes = hello();
        for (command, flags, payload) in messages {
            bytes.extend(message(command, flags, &payload));
        }
        send(&served, &bytes);
        still_serves(&served);
    }

    #[test]
    fn no_feature_request_ends_the_server(
        requests in proptest::collection::vec(
            (prop_oneof![0_u32..14, 0xa100_u32..0xa104], 0_u32..8, 0_u32..64,
             proptest::collection::vec(prop_oneof![Just(0_u8), 1_u8..8, Just(16), any::<u8>()], 0..48)),
            0..12,
        )
    ) {
        let served = serve_quickly();
        let mut bytes = hello();
        for (index, operation, argsz, data) in requests {
            let mut payload = argsz.to_ne_bytes().to_vec();
            payload.extend((index | operation << 16).to_ne_bytes());
            payload.extend(data);
            bytes.extend(message(command::DEVICE_FEATURE, 0, &payload));
            bytes.extend(message(command::MIG_DATA_READ, 0, &[72, 0, 0, 0, 64, 0, 0, 0]));
            bytes.extend(message(command::MIG_DATA_WRITE, 0, &[10, 0, 0, 0, 2, 0, 0, 0, 1, 2]));
        }
        send(&served, &bytes);
        still_serves(&served);
    }
}

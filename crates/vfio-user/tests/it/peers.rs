//! A client against servers that break the rules, each as some real server does or might.

use crate::common::*;
use airlift_core::{
    DeviceErrorKind, DeviceState, DirtySource, Errno, IovaRange, MigrationDevice, Piece, Session,
};
use airlift_vfio_user::codec::{FeatureFlags, FeatureHeader, VersionMessage, command, feature, take};
use airlift_vfio_user::{Client, ClientOptions, VfioUserDevice};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A request as the fake server sees it.
struct Asked {
    id: u16,
    command: u16,
    payload: Vec<u8>,
}

impl Asked {
    fn feature(&self) -> Option<(u16, FeatureFlags)> {
        let (head, _) = take::<FeatureHeader>(&self.payload)?;
        (self.command == command::DEVICE_FEATURE).then(|| (head.index(), head.operation().unwrap()))
    }
}

fn message(id: u16, command: u16, size: usize, flags: u32, error: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(id.to_ne_bytes());
    out.extend(command.to_ne_bytes());
    out.extend(u32::try_from(size).unwrap().to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(error.to_ne_bytes());
    out.extend(payload);
    out
}

fn reply(asked: &Asked, payload: &[u8]) -> Vec<u8> {
    message(asked.id, asked.command, 16 + payload.len(), 1, 0, payload)
}

fn error(asked: &Asked, errno: u32, payload: &[u8]) -> Vec<u8> {
    message(asked.id, asked.command, 16 + payload.len(), 0x21, errno, payload)
}

/// A server that answers with the bytes that `answer` gives; `None` ends it. VERSION is answered well.
fn fake(mut answer: impl FnMut(&Asked) -> Option<Vec<u8>> + Send + 'static) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        loop {
            let mut head = [0; 16];
            if theirs.read_exact(&mut head).is_err() {
                return;
            }
            let size = u32::from_ne_bytes(head[4..8].try_into().unwrap());
            let mut payload = vec![0; usize::try_from(size).unwrap() - 16];
            theirs.read_exact(&mut payload).unwrap();
            let id = u16::from_ne_bytes([head[0], head[1]]);
            let asked = Asked { id, command: u16::from_ne_bytes([head[2], head[3]]), payload };
            let bytes = if asked.command == command::VERSION {
                let ours = VersionMessage { major: 0, minor: 0, caps: Default::default() };
                Some(reply(&asked, &ours.encode()))
            } else {
                answer(&asked)
            };
            match bytes {
                Some(bytes) if theirs.write_all(&bytes).is_ok() => {}
                _ => return,
            }
        }
    });
    ours
}

fn client(answer: impl FnMut(&Asked) -> Option<Vec<u8>> + Send + 'static) -> Client {
    Client::from_stream(fake(answer), options()).unwrap()
}

/// A device whose state machine is on paper only: enough to be driven.
fn device(
    mut special: impl FnMut(&Asked) -> Option<Vec<u8>> + Send + 'static,
    options: ClientOptions,
) -> VfioUserDevice {
    let mut state = 2_u32;
    let stream = fake(move |asked| {
        if let Some(bytes) = special(asked) {
            return Some(bytes);
        }
        let (get, set, probe) = (FeatureFlags::GET, FeatureFlags::SET, FeatureFlags::PROBE);
        Some(match (asked.command, asked.feature()) {
            (_, Some((1 | 2 | 6 | 7 | 8, flags))) if flags.contains(probe) => reply(asked, &asked.payload),
            (_, Some((1, flags))) if flags == get => {
                reply(asked, &[&asked.payload[..8], &5_u64.to_ne_bytes()].concat())
            }
            (_, Some((2, flags))) if flags == get => {
                reply(asked, &[&asked.payload[..8], &state.to_ne_bytes(), &[0; 4]].concat())
            }
            (_, Some((2, flags))) if flags == set => {
                state = u32::from_ne_bytes(asked.payload[8..12].try_into().unwrap());
                reply(asked, &asked.payload)
            }
            (_, Some((6 | 7, flags))) if flags == set => reply(asked, &asked.payload),
            (command::DEVICE_GET_INFO, _) => reply(asked, &[16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (command::MIG_DATA_WRITE, _) => reply(asked, &[]),
            _ => error(asked, 22, &[]),
        })
    });
    VfioUserDevice::from_stream(id(), stream, options).unwrap()
}

// VU-ERROR-PAYLOAD
#[test]
fn an_error_reply_with_a_payload_is_drained() {
    let client = client(|asked| {
        Some(match asked.command {
            command::REGION_READ => error(asked, 5, &[0xee; 20]),
            _ => reply(asked, &[16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0]),
        })
    });
    assert_eq!(client.region_read(0, 0, &mut [0; 4]).unwrap_err().errno, Some(Errno::EIO));
    assert_eq!(client.info().unwrap().num_regions, 9);
}

// VU-ERRNO-ZERO
#[test]
fn an_error_without_a_number_is_still_an_error() {
    let client = client(|asked| Some(error(asked, 0, &[])));
    let error = client.reset().unwrap_err();
    assert_eq!((error.kind, error.errno), (DeviceErrorKind::Refused, Some(Errno::EIO)));
}

// VU-BOUND
#[test]
fn what_cannot_be_a_reply_ends_the_connection() {
    type Answer = fn(&Asked) -> Option<Vec<u8>>;
    let cases: [(&str, Answer, DeviceErrorKind); 7] = [
        ("another number", |a| Some(message(a.id + 1, a.command, 16, 1, 0, &[])), DeviceErrorKind::Protocol),
        ("another command", |a| Some(message(a.id, 1, 16, 1, 0, &[])), DeviceErrorKind::Protocol),
        (
            "a size below the header",
            |a| Some(message(a.id, a.command, 12, 1, 0, &[])),
            DeviceErrorKind::Protocol,
        ),
        (
            "a size of 4 GiB",
            |a| Some(message(a.id, a.command, 0xffff_ffff, 1, 0, &[])),
            DeviceErrorKind::Protocol,
        ),
        (
            "an endless error",
            |a| Some(message(a.id, a.command, 0xffff_ffff, 0x21, 5, &[])),
            DeviceErrorKind::Protocol,
        ),
        ("no type", |a| Some(message(a.id, a.command, 16, 7, 0, &[])), DeviceErrorKind::Protocol),
        ("the end", |_| None, DeviceErrorKind::Lost),
    ];
    for (what, answer, kind) in cases {
        let client = client(answer);
        let first = client.reset().unwrap_err();
        assert_eq!(first.kind, kind, "{what}: {first}");
        // It stays so, without waiting.
        assert!(client.info().is_err(), "{what}");
    }
}

// VU-WHOLE
#[test]
fn a_reply_that_is_too_short_or_stops_is_found_out() {
    let short = client(|asked| Some(reply(asked, &[1, 2, 3])));
    assert_eq!(short.info().unwrap_err().kind, DeviceErrorKind::Protocol);

    // Half a reply, and then nothing.
    let stream = fake(|asked| Some(message(asked.id, asked.command, 32, 1, 0, &[1, 2, 3])));
    let quick = ClientOptions { message_timeout: Duration::from_millis(50), ..options() };
    let stalled = Client::from_stream(stream, quick.clone()).unwrap();
    assert_eq!(stalled.info().unwrap_err().kind, DeviceErrorKind::TimedOut);
    assert!(stalled.info().is_err());

    // No reply in time: the late one is passed over, and the connection is as good as before.
    let mut late = None;
    let stream = fake(move |asked| match late.take() {
        None => {
            late = Some(reply(asked, &[0; 16]));
            Some(Vec::new())
        }
        Some(bytes) => {
            Some([bytes, reply(asked, &[16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0])].concat())
        }
    });
    let client = Client::from_stream(stream, quick).unwrap();
    assert_eq!(client.info().unwrap_err().kind, DeviceErrorKind::TimedOut);
    assert_eq!(client.info().unwrap().num_regions, 9);
}

#[test]
fn a_version_that_is_not_ours_is_refused() {
    for payload in [&[1, 0, 0, 0][..], &[0, 0, 3, 0], &[0], b"\0\0\0\0{", b"\0\0\0\0{}x"] {
        let payload = payload.to_vec();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut head = [0; 16];
            theirs.read_exact(&mut head).unwrap();
            let bytes =
                message(u16::from_ne_bytes([head[0], head[1]]), 1, 16 + payload.len(), 1, 0, &payload);
            theirs.write_all(&bytes).unwrap();
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        assert_eq!(Client::from_stream(ours, options()).unwrap_err().kind, DeviceErrorKind::Protocol);
        server.join().unwrap();
    }
}

#[test]
fn a_list_of_areas_that_leads_nowhere_is_refused() {
    // cap_offset, then the capability's bytes.
    let cases: [(u32, &[u8]); 4] = [
        (200, &[]),
        (8, &[]),
        (32, &[1, 0, 1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0]),
        (32, &[9, 0, 1, 0, 32, 0, 0, 0]),
    ];
    for (offset, caps) in cases {
        let caps = caps.to_vec();
        let client = client(move |asked| {
            let mut info = Vec::new();
            info.extend(32_u32.to_ne_bytes());
            info.extend(12_u32.to_ne_bytes());
            info.extend(&asked.payload[8..12]);
            info.extend(offset.to_ne_bytes());
            info.extend(4096_u64.to_ne_bytes());
            info.extend(0_u64.to_ne_bytes());
            info.extend(&caps);
            info.truncate(32.max(info.len().min(64)));
            let argsz = u32::try_from(info.len()).unwrap();
            info[..4].copy_from_slice(&argsz.to_ne_bytes());
            let room = u32::from_ne_bytes(asked.payload[..4].try_into().unwrap());
            if argsz > room {
                info.truncate(32);
            }
            Some(reply(asked, &info))
        });
        assert_eq!(client.region_info(0).unwrap_err().kind, DeviceErrorKind::Protocol, "{offset}");
    }
    // A server that is never content.
    let client = client(|asked| {
        let room = u32::from_ne_bytes(asked.payload[..4].try_into().unwrap());
        let mut info = (room + 16).to_ne_bytes().to_vec();
        info.extend(&asked.payload[4..]);
        Some(reply(asked, &info))
    });
    assert_eq!(client.region_info(0).unwrap_err().kind, DeviceErrorKind::Protocol);
}

// VU-EMPTY-REPORT
#[test]
fn a_report_without_payload_is_an_error_and_not_clean_memory() {
    let mut device = device(
        |asked| match asked.feature() {
            Some((feature::DMA_LOGGING_REPORT, flags)) if flags == FeatureFlags::GET => {
                Some(reply(asked, &[]))
            }
            _ => None,
        },
        options(),
    );
    assert_eq!(device.state(), Ok(DeviceState::Running));
    let mut source = device.dirty_source().unwrap();
    source.start(&[IovaRange::new(0, 1 << 20)]).unwrap();
    source.report(IovaRange::new(0, 1 << 20), &mut |_| panic!("nothing was reported")).unwrap_err();
}

// VU-LOG-REQUEST, VU-WRITE-CHUNK, VU-WRITE-ARGSZ
#[test]
fn a_foreign_server_is_asked_for_whole_ranges_and_written_in_small_pieces() {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&seen);
    let mut device = device(
        move |asked| {
            let at = |i: usize| u64::from_ne_bytes(asked.payload[i..i + 8].try_into().unwrap());
            match (asked.command, asked.feature()) {
                (_, Some((feature::DMA_LOGGING_REPORT, flags))) if flags == FeatureFlags::GET => {
                    log.lock().unwrap().push(format!("{:#x}+{:#x}/{}", at(8), at(16), at(24)));
                    // With bits behind the range's last page.
                    let bitmap = u64::MAX.to_le_bytes();
                    Some(reply(asked, &[&asked.payload[..32], &bitmap].concat()))
                }
                (command::MIG_DATA_WRITE, _) => {
                    let size = asked.payload.len() - 8;
                    let argsz = u32::from_ne_bytes(asked.payload[..4].try_into().unwrap());
                    log.lock().unwrap().push(format!("write {size} argsz {argsz}"));
                    None
                }
                _ => None,
            }
        },
        options(),
    );
    let mut source = device.dirty_source().unwrap();
    source.start(&[IovaRange::new(0x10_0000, 0x6000), IovaRange::new(0x20_0000, 0x1000)]).unwrap();
    let mut runs = Vec::new();
    source.report(IovaRange::new(0x10_2000, 0x1000), &mut |r| runs.push((r.start.0, r.length))).unwrap();
    assert_eq!(runs, [(0x10_0000, 0x6000)]);
    assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), ["0x100000+0x6000/4096"]);

    let Some(Session::Load(mut load)) = device.set_state(DeviceState::Resuming).unwrap() else { panic!() };
    load.write(&[0; 70_000]).unwrap();
    load.end_chunk().unwrap();
    let writes = ["write 32768 argsz 32776", "write 32768 argsz 32776", "write 4464 argsz 4472"];
    assert_eq!(*seen.lock().unwrap(), writes);
}

// VU-END, VU-SIZE-FIELD
#[test]
fn short_reads_within_stop_copy_are_not_the_end() {
    // 10 bytes at a time, padded to what was asked for, and data after 0 the second time.
    for broken in [false, true] {
        let mut left = 25_u32;
        let mut zeroes = 0;
        let mut device = device(
            move |asked| {
                if asked.command != command::MIG_DATA_READ {
                    return None;
                }
                let requested = u32::from_ne_bytes(asked.payload[4..8].try_into().unwrap());
                let mut size = left.min(10);
                left -= size;
                if size == 0 {
                    zeroes += 1;
                    if broken && zeroes == 2 {
                        size = 1;
                    }
                }
                let mut payload = (size + 8).to_ne_bytes().to_vec();
                payload.extend(size.to_ne_bytes());
                payload.resize(8 + usize::try_from(requested).unwrap(), 0xaa);
                Some(reply(asked, &payload))
            },
            options(),
        );
        let Some(Session::Save(mut save)) = device.set_state(DeviceState::StopCopy).unwrap() else {
            panic!()
        };
        let mut total = 0;
        let end = loop {
            match save.read(&mut [0; 64]) {
                Ok(Piece::Data { len, .. }) => total += len,
                other => break other,
            }
        };
        assert_eq!(total, 25);
        if broken {
            assert_eq!(end.unwrap_err().kind, DeviceErrorKind::Protocol);
        } else {
            assert_eq!(end, Ok(Piece::End));
        }
    }
}

#[test]
fn a_read_that_says_more_than_it_holds_is_refused() {
    for size in [65_u32, 1 << 30] {
        let mut device = device(
            move |asked| {
                (asked.command == command::MIG_DATA_READ).then(|| {
                    let mut payload = (size + 8).to_ne_bytes().to_vec();
                    payload.extend(size.to_ne_bytes());
                    payload.extend([0; 32]);
                    reply(asked, &payload)
                })
            },
            options(),
        );
        let Some(Session::Save(mut save)) = device.set_state(DeviceState::StopCopy).unwrap() else {
            panic!()
        };
        let error = save.read(&mut [0; 64]).unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::Protocol);
        assert_eq!(save.read(&mut [0; 64]), Err(error));
    }
}

// V2-CAPABILITIES
#[test]
fn undefined_capabilities_and_states_are_not_guessed() {
    let flags = |raw: u64| {
        let stream = fake(move |asked| {
            Some(match asked.feature() {
                Some((1, f)) if f == FeatureFlags::GET => {
                    reply(asked, &[&asked.payload[..8], &raw.to_ne_bytes()].concat())
                }
                Some((2, f)) if f == FeatureFlags::GET => {
                    reply(asked, &[&asked.payload[..8], &[99, 0, 0, 0, 0, 0, 0, 0]].concat())
                }
                Some((1 | 2, _)) => reply(asked, &asked.payload),
                _ if asked.command == command::DEVICE_GET_INFO => {
                    reply(asked, &[16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
                }
                _ => error(asked, 25, &[]),
            })
        });
        VfioUserDevice::from_stream(id(), stream, options())
    };
    assert_eq!(flags(6).unwrap_err().kind, DeviceErrorKind::Unsupported);
    assert_eq!(flags(9).unwrap_err().kind, DeviceErrorKind::Unsupported);
    let mut device = flags(1).unwrap();
    assert_eq!(device.found_state(), DeviceState::Unknown(99));
    assert_eq!(device.set_state(DeviceState::Stop).unwrap_err().error.kind, DeviceErrorKind::Misuse);
}

/// A server that answers VERSION, and everything else with requests of its own that want no reply,
/// without an end; says when it could not send any more.
fn flooding() -> UnixStream {
    let mut asked = 0;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (inner, mut front) = (fake(|_| None), theirs.try_clone().unwrap());
    std::thread::spawn(move || {
        // VERSION is answered as by any other fake server.
        let mut version = inner;
        let mut head = [0; 16];
        while asked == 0 && front.read_exact(&mut head).is_ok() {
            let size = u32::from_ne_bytes(head[4..8].try_into().unwrap());
            let mut rest = vec![0; usize::try_from(size).unwrap() - 16];
            front.read_exact(&mut rest).unwrap();
            version.write_all(&head).unwrap();
            version.write_all(&rest).unwrap();
            let mut answer = [0; 16];
            version.read_exact(&mut answer).unwrap();
            let size = u32::from_ne_bytes(answer[4..8].try_into().unwrap());
            let mut rest = vec![0; usize::try_from(size).unwrap() - 16];
            version.read_exact(&mut rest).unwrap();
            front.write_all(&answer).unwrap();
            front.write_all(&rest).unwrap();
            asked += 1;
        }
        let many = message(1, command::DMA_READ, 16, 0x10, 0, &[]).repeat(4096);
        // A bound, so that a client that never gives up ends too; by then it has another error.
        for _ in 0..2_000 {
            if theirs.write_all(&many).is_err() {
                return;
            }
        }
    });
    ours
}

// VU-FLOOD
#[test]
fn a_server_that_never_stops_sending_does_not_outlast_a_deadline() {
    let quick = ClientOptions { message_timeout: Duration::from_millis(50), ..options() };
    let client = Client::from_stream(flooding(), quick).unwrap();
    assert_eq!(client.info().unwrap_err().kind, DeviceErrorKind::TimedOut);
    // And whoever only serves what has come comes back.
    client.pump().unwrap();
    assert_eq!(client.region_read(0, 0, &mut [0]).unwrap_err().kind, DeviceErrorKind::TimedOut);
}

//! Control messages: what arrives is what was sent, and bounds hold in both directions.

use crate::samples::{self, SESSION};
use airlift_core::commit::{CommitMessage, SessionId};
use airlift_core::{Capabilities, DeviceState, Errno, Failure, Phase, Side};
use airlift_stream::frame::{FrameError, FrameHeader, FrameType, HEADER_LEN, Limits, MAX_PAYLOAD};
use airlift_stream::message::{
    Accept, DataCount, DeviceTransition, Hello, LoadedTerms, MAX_CHANNELS, MAX_DEVICES, MAX_LIST,
    MAX_REGIONS, Message, MessageError, Report, RunningTerms, Token, Trailer,
};
use proptest::prelude::*;

fn decode(frame: &[u8]) -> Result<Message, MessageError> {
    let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
    header.verify(&frame[HEADER_LEN..]).unwrap();
    Message::decode(&header, &frame[HEADER_LEN..])
}

/// A payload that the encoder would not write.
fn decode_raw(kind: FrameType, payload: &[u8]) -> Result<Message, MessageError> {
    Message::decode(&FrameHeader::new(kind), payload)
}

fn any_session() -> impl Strategy<Value = SessionId> {
    any::<u128>().prop_map(SessionId)
}

fn any_transition() -> impl Strategy<Value = DeviceTransition> {
    (any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>()).prop_map(
        |(device, from, to, at_us, took_us)| DeviceTransition {
            device,
            from: DeviceState::from_raw(from % 9),
            to: DeviceState::from_raw(to % 9),
            at_us,
            took_us,
        },
    )
}

fn any_failure() -> impl Strategy<Value = Box<Failure>> {
    let link = (any::<bool>(), "\\PC{0,30}", prop::option::of(1..200), prop::option::of("\\PC{0,20}"));
    prop::collection::vec(link, 1..6).prop_map(|links| {
        let mut whole: Option<Failure> = None;
        for (source, message, errno, advice) in links {
            let side = if source { Side::Source } else { Side::Destination };
            let mut failure = Failure::new(side, Phase::StopCopy, message)
                .with_errno(errno.map(Errno))
                .in_state(source.then_some(DeviceState::PreCopyP2p));
            failure.advice = advice;
            failure.cause = whole.map(Box::new);
            whole = Some(failure);
        }
        Box::new(whole.unwrap())
    })
}

fn any_features() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[a-z-]{1,20}", 0..5)
}

fn any_message() -> impl Strategy<Value = Message> {
    let session = any_session;
    let transitions = || prop::collection::vec(any_transition(), 0..5);
    prop_oneof![
        (prop::collection::vec(any::<u16>(), 0..5), session(), any_features(), any::<u64>()).prop_map(
            |(versions, session, features, receive_budget)| {
                let mut offer = samples::offer();
                offer.features = features;
                offer.limits.receive_budget = receive_budget;
                Message::Hello(Box::new(Hello { versions, session, offer }))
            }
        ),
        (
            prop::collection::vec(any::<u128>(), 0..9),
            prop::collection::vec(any::<u32>(), 0..9),
            any_features()
        )
            .prop_map(|(tokens, device_credits, features)| {
                let Message::Report(mut report) = samples::messages().swap_remove(1).1 else {
                    unreachable!()
                };
                report.tokens = tokens.into_iter().map(Token).collect();
                report.device_credits = device_credits;
                report.features = features;
                Message::Report(report)
            }),
        any_features().prop_map(|features| Message::Accept(Accept { features })),
        (session(), any::<u128>())
            .prop_map(|(session, token)| Message::Join { session, token: Token(token) }),
        session().prop_map(|session| Message::Resume { session }),
        (any::<u32>(), 1..=u32::MAX).prop_map(|(device, frames)| Message::Credit { device, frames }),
        (any::<u32>(), 1..=u32::MAX).prop_map(|(device, generation)| Message::InitAck { device, generation }),
        any::<u32>().prop_map(|round| Message::RoundEnd { round }),
        (any::<u64>(), any::<u64>()).prop_map(|(frames, bytes)| Message::Final(DataCount { frames, bytes })),
        (any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u32>()).prop_map(
            |(device, frames, bytes, digest, generation)| {
                Message::Trailer(Trailer { device, frames, bytes, digest, generation })
            }
        ),
        (session(), any::<[u64; 4]>(), transitions()).prop_map(|(session, us, transitions)| {
            let [load_us, config_us, memory_us, journal_us] = us;
            Message::Loaded {
                session,
                terms: LoadedTerms { load_us, config_us, memory_us, journal_us, transitions },
            }
        }),
        session().prop_map(|session| Message::Commit { session }),
        (session(), any::<[u64; 2]>(), transitions()).prop_map(
            |(session, [commit_us, run_us], transitions)| {
                Message::Running { session, terms: RunningTerms { commit_us, run_us, transitions } }
            }
        ),
        (session(), any_failure()).prop_map(|(session, failure)| Message::Abort { session, failure }),
        (session(), any_failure()).prop_map(|(session, failure)| Message::Abandoned { session, failure }),
        session().prop_map(|session| Message::Cancel { session }),
        any::<u64>().prop_map(Message::Ping),
        any::<u64>().prop_map(Message::Pong),
        session().prop_map(|session| Message::Done { session }),
    ]
}

proptest! {
    #[test]
    fn messages_arrive_as_sent(message in any_message(), sequence in any::<u64>()) {
        let frame = message.encode(sequence).unwrap();
        let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
        prop_assert_eq!((header.kind, header.sequence), (message.kind(), sequence));
        prop_assert_eq!(decode(&frame), Ok(message));
    }

    // A payload that was cut, or has something behind it, is not another message.
    #[test]
    fn messages_have_one_length(message in any_message(), more in 1_usize..4) {
        let frame = message.encode(0).unwrap();
        let payload = &frame[HEADER_LEN..];
        for len in 0..payload.len() {
            prop_assert!(decode_raw(message.kind(), &payload[..len]).is_err(), "cut to {} bytes", len);
        }
        prop_assert!(decode_raw(message.kind(), &[payload, &vec![b'x'; more]].concat()).is_err());
    }

    #[test]
    fn any_bytes_are_refused_or_a_message(kind in 0_u16..0x105, payload in prop::collection::vec(any::<u8>(), 0..80)) {
        let kind = FrameType::from_raw(kind);
        match decode_raw(kind, &payload) {
            Ok(message) => prop_assert_eq!(message.kind(), kind),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

/// What the commit machines say goes over the wire whole, with its session.
#[test]
fn messages_of_the_commit_protocol_go_over_whole() {
    let failure = Box::new(samples::failure());
    for message in [
        CommitMessage::Loaded,
        CommitMessage::Commit,
        CommitMessage::Running,
        CommitMessage::Abort(failure.clone()),
        CommitMessage::Abandoned { cause: failure },
        CommitMessage::Cancel,
    ] {
        let frame = Message::of_commit(SESSION, message.clone()).encode(0).unwrap();
        assert_eq!(decode(&frame).unwrap().to_commit(), Some((SESSION, message)));
    }
    assert_eq!(Message::Ping(1).to_commit(), None);
}

/// W-COUNTS: this side does not send what the other would refuse, and refuses it itself.
#[test]
fn lists_are_bounded_in_both_directions() {
    let hello = |change: &dyn Fn(&mut Hello)| {
        let mut hello = Hello { versions: vec![1], session: SESSION, offer: samples::offer() };
        change(&mut hello);
        (Message::Hello(Box::new(hello.clone())), serde_json::to_vec(&hello).unwrap())
    };
    let report = |change: &dyn Fn(&mut Report)| {
        let Message::Report(mut report) = samples::messages().swap_remove(1).1 else { unreachable!() };
        change(&mut report);
        (Message::Report(report.clone()), serde_json::to_vec(&report).unwrap())
    };
    let region = samples::offer().memory.regions[0];
    let device = samples::offer().devices[0].clone();
    let cases = [
        ("devices", MAX_DEVICES, hello(&|h| h.offer.devices = vec![device.clone(); MAX_DEVICES + 1])),
        ("memory regions", MAX_REGIONS, hello(&|h| h.offer.memory.regions = vec![region; MAX_REGIONS + 1])),
        ("versions", MAX_LIST, hello(&|h| h.versions = vec![1; MAX_LIST + 1])),
        ("features", MAX_LIST, hello(&|h| h.offer.features = vec!["f".into(); MAX_LIST + 1])),
        (
            "bytes in a feature's name",
            MAX_LIST,
            hello(&|h| h.offer.features = vec!["f".repeat(MAX_LIST + 1)]),
        ),
        ("data connections", MAX_CHANNELS, hello(&|h| h.offer.limits.channels = 65)),
        ("data connections", MAX_CHANNELS, report(&|r| r.tokens = vec![Token(1); MAX_CHANNELS + 1])),
        ("devices", MAX_DEVICES, report(&|r| r.device_credits = vec![1; MAX_DEVICES + 1])),
    ];
    for (what, limit, (message, json)) in cases {
        let kind = message.kind();
        let refused = MessageError::TooMany { kind, what, count: limit + 1, limit };
        assert_eq!(message.encode(0), Err(refused.clone()));
        assert_eq!(decode_raw(kind, &json), Err(refused));
    }
}

// V1-WHOLE
#[test]
fn a_hello_says_what_a_device_of_v1_gives_and_takes_and_an_older_one_is_still_read() {
    let mut offer = samples::offer();
    let capabilities = Capabilities::v1(1 << 20, true);
    offer.devices[0].capabilities = capabilities;
    let hello = Hello { versions: vec![1], session: SESSION, offer };
    let message = Message::Hello(Box::new(hello.clone()));
    assert_eq!(decode(&message.encode(0).unwrap()), Ok(message));
    let mut json = serde_json::to_value(&hello).unwrap();
    let fields = json["offer"]["devices"][0]["capabilities"].as_object_mut().unwrap();
    assert_eq!(fields.remove("data_section").unwrap(), 1 << 20);
    let read = decode_raw(FrameType::Hello, &serde_json::to_vec(&json).unwrap()).unwrap();
    let Message::Hello(read) = read else { panic!("not a HELLO") };
    let silent = Capabilities { data_section: None, ..capabilities };
    assert_eq!(read.offer.devices[0].capabilities, silent);
}

#[test]
fn a_message_beyond_a_frame_is_not_made() {
    let mut offer = samples::offer();
    offer.devices[0].identity.facts.insert("serial".into(), "x".repeat(MAX_PAYLOAD as usize));
    let hello = Message::Hello(Box::new(Hello { versions: vec![1], session: SESSION, offer }));
    assert!(matches!(hello.encode(0), Err(MessageError::Frame(FrameError::Overflow { .. }))));
}

/// A failure is the answer to everything that goes wrong, so a long one is cut, not refused.
#[test]
fn a_long_failure_is_cut_and_sent() {
    let mut failure = Failure::new(Side::Source, Phase::Precopy, "first cause");
    for _ in 0..200 {
        let mut outer = Failure::new(Side::Source, Phase::Precopy, "\u{1}é".repeat(5000));
        outer.advice = Some("\u{1}".repeat(9000));
        failure = outer.because(failure);
    }
    let frame = Message::Abort { session: SESSION, failure: Box::new(failure) }.encode(0).unwrap();
    let Ok(Message::Abort { failure, .. }) = decode(&frame) else { panic!("not an ABORT") };
    let mut causes = 0;
    let mut next = failure.cause.as_deref();
    while let Some(cause) = next {
        causes += 1;
        assert!(cause.message.starts_with("\u{1}é") && cause.message.len() <= 4096);
        next = cause.cause.as_deref();
    }
    assert_eq!(causes, 16);
}

/// W-CREDIT, W-INIT: a credit of nothing and generation 0 do not exist.
#[test]
fn zero_credit_and_generation_zero_are_refused() {
    for kind in [FrameType::Credit, FrameType::InitAck] {
        assert_eq!(decode_raw(kind, &[0; 4]), Err(MessageError::Zero { kind }));
    }
    assert!(Message::Credit { device: 0, frames: 0 }.encode(0).is_err());
}

/// Members that a later version adds do not disturb, and bulk data is no message.
#[test]
fn unknown_members_are_ignored_and_data_is_not_a_message() {
    let accept = decode_raw(FrameType::Accept, br#"{"features":["zero"],"later":{"x":1}}"#);
    assert_eq!(accept, Ok(Message::Accept(Accept { features: vec!["zero".into()] })));
    let deep = "[".repeat(100_000);
    assert!(matches!(decode_raw(FrameType::Accept, deep.as_bytes()), Err(MessageError::Json { .. })));
    let long = format!(r#"{{"features":"{}"}}"#, "x".repeat(100_000));
    let Err(MessageError::Json { message, .. }) = decode_raw(FrameType::Accept, long.as_bytes()) else {
        panic!("a text for a list")
    };
    assert!(message.len() <= 256, "an error that is as long as what it refuses");
    for kind in [FrameType::Device, FrameType::Unknown(0x999)] {
        assert_eq!(decode_raw(kind, b""), Err(MessageError::NotAMessage { kind }));
    }
}

/// W-FINAL: only bulk data is counted.
#[test]
fn final_counts_bulk_data_only() {
    let mut count = DataCount::default();
    for (_, frame) in samples::frames() {
        count.add(&FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap());
    }
    let data: Vec<_> = samples::device_frames().into_iter().chain(samples::memory_frames()).collect();
    let bytes: usize = data.iter().map(|(_, frame)| frame.len() - HEADER_LEN).sum();
    assert_eq!(count, DataCount { frames: data.len() as u64, bytes: bytes as u64 });
}

/// A token lets its holder in: it is not printed.
#[test]
fn a_token_is_not_printed() {
    assert!(!format!("{:?}", Message::Join { session: SESSION, token: Token(0xabcdef) }).contains("abcdef"));
}

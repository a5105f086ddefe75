//! One frame of every type, with values that are all different from each other and from zero.

use airlift_core::commit::SessionId;
use airlift_core::{
    Capabilities, Chunk, CompatReport, DeviceId, DeviceIdentity, DeviceOffer, DeviceState, Errno, Failure,
    Finding, Gpa, GpaRange, Limits, MemoryLayout, MemoryRegion, Offer, Phase, Severity, Side, StateFormat,
};
use airlift_stream::FrameBuf;
use airlift_stream::machine_record::{RecordRef, seal_record};
use airlift_stream::message::{
    Accept, DataCount, DeviceTransition, Hello, LoadedTerms, Message, Report, RunningTerms, Token, Trailer,
};
use airlift_stream::pages::{MemorySlot, seal_pages, seal_zero};
use airlift_stream::record::RecordEncoder;

pub(crate) const SESSION: SessionId = SessionId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

pub(crate) fn offer() -> Offer {
    let device = |id: &str, flags| DeviceOffer {
        id: DeviceId::new(id).unwrap(),
        identity: DeviceIdentity {
            format: Some(StateFormat {
                name: "soft".into(),
                version: 3,
                accepts: vec![2, 3],
                interfaces: vec![],
            }),
            facts: [("pci-vendor".into(), "0x1af4".into())].into(),
        },
        capabilities: Capabilities::v2(flags).unwrap(),
    };
    Offer {
        devices: vec![device("a", 7), device("b", 1)],
        memory: MemoryLayout {
            generation: 5,
            regions: vec![MemoryRegion { id: 1, gpa: Gpa(0x1000_0000), size: 0x20_0000, page_size: 4096 }],
        },
        memory_external: false,
        limits: Limits { receive_budget: 64 << 20, frame_payload: 1 << 20, channels: 4 },
        features: vec!["zero".into()],
        assume_no_peer_dma: true,
    }
}

pub(crate) fn failure() -> Failure {
    let cause = Failure::new(Side::Source, Phase::StopCopy, "the device refused")
        .on_device(&DeviceId::new("a").unwrap())
        .with_errno(Some(Errno::EIO))
        .in_state(Some(DeviceState::Error));
    Failure::new(Side::Destination, Phase::Load, "cannot load")
        .because(cause)
        .advise("look at the device's log")
}

fn report() -> Report {
    Report {
        version: 1,
        report: CompatReport {
            findings: vec![Finding {
                device: Some(DeviceId::new("b").unwrap()),
                field: "capabilities.pre-copy".into(),
                source: String::new(),
                destination: "yes".into(),
                severity: Severity::Info,
                message: "the source has no pre-copy".into(),
                advice: None,
            }],
        },
        limits: Limits { receive_budget: 32 << 20, frame_payload: 1 << 19, channels: 2 },
        features: vec!["zero".into()],
        tokens: vec![Token(0xa1 << 120), Token(0xb2)],
        device_credits: vec![16, 17],
    }
}

fn transition() -> DeviceTransition {
    DeviceTransition {
        device: 1,
        from: DeviceState::Resuming,
        to: DeviceState::Stop,
        at_us: 1000,
        took_us: 250,
    }
}

/// One message of every type.
pub(crate) fn messages() -> Vec<(&'static str, Message)> {
    let session = SESSION;
    vec![
        ("hello", Message::Hello(Box::new(Hello { versions: vec![1], session, offer: offer() }))),
        ("report", Message::Report(Box::new(report()))),
        ("accept", Message::Accept(Accept { features: vec!["zero".into()] })),
        ("join", Message::Join { session, token: Token(0xb2) }),
        ("resume", Message::Resume { session }),
        ("credit", Message::Credit { device: 1, frames: 0x0203 }),
        ("init_ack", Message::InitAck { device: 1, generation: 2 }),
        ("round_end", Message::RoundEnd { round: 3 }),
        ("final", Message::Final(DataCount { frames: 0x1122, bytes: 0x33_4455 })),
        (
            "trailer",
            Message::Trailer(Trailer {
                device: 1,
                frames: 0x1122,
                bytes: 0x33_4455,
                digest: 0x8899_aabb_ccdd_eeff,
                generation: 2,
            }),
        ),
        (
            "loaded",
            Message::Loaded {
                session,
                terms: LoadedTerms {
                    load_us: 11,
                    config_us: 12,
                    memory_us: 13,
                    journal_us: 14,
                    transitions: vec![transition()],
                },
            },
        ),
        ("commit", Message::Commit { session }),
        (
            "running",
            Message::Running {
                session,
                terms: RunningTerms { commit_us: 21, run_us: 22, transitions: vec![transition()] },
            },
        ),
        ("abort", Message::Abort { session, failure: Box::new(failure()) }),
        ("abandoned", Message::Abandoned { session, failure: Box::new(failure()) }),
        ("cancel", Message::Cancel { session }),
        ("ping", Message::Ping(0x0102_0304_0506_0708)),
        ("pong", Message::Pong(0x0102_0304_0506_0708)),
        ("done", Message::Done { session }),
    ]
}

/// The frames of a whole device stream, in order.
pub(crate) fn device_frames() -> Vec<(&'static str, Vec<u8>)> {
    let mut encoder = RecordEncoder::new(1);
    let mut buf = FrameBuf::new(64);
    let mut frames = Vec::new();
    let mut keep = |name, buf: &FrameBuf| frames.push((name, buf.sealed().unwrap().to_vec()));
    encoder.setup(&mut buf).unwrap();
    keep("device_setup", &buf);
    encoder.set_round(1);
    buf.payload_mut()[..5].copy_from_slice(b"state");
    encoder.data(&mut buf, 5, Chunk::Stream).unwrap();
    keep("device_data", &buf);
    encoder.init_data_sent(&mut buf).unwrap();
    keep("device_init_data_sent", &buf);
    for (name, offset) in [("device_part_first", 0), ("device_part_last", 3)] {
        buf.payload_mut()[..3].copy_from_slice(b"abc");
        encoder.data(&mut buf, 3, Chunk::Part { of: 6, offset }).unwrap();
        keep(name, &buf);
    }
    encoder.config_load_ready(&mut buf).unwrap();
    keep("device_config_load_ready", &buf);
    encoder.config(&mut buf, b"config space").unwrap();
    keep("device_config", &buf);
    frames
}

/// Frames of memory and of the machine.
pub(crate) fn memory_frames() -> Vec<(&'static str, Vec<u8>)> {
    let slot = MemorySlot { region: 1, round: 2, sequence: 3 };
    let mut buf = FrameBuf::new(4096);
    let mut frames = Vec::new();
    buf.payload_mut().fill(0x5a);
    seal_pages(&mut buf, Gpa(0x1000_3000), 4096, slot).unwrap();
    frames.push(("pages", buf.sealed().unwrap().to_vec()));
    let runs = [GpaRange::new(0x1000_0000, 0x1000), GpaRange::new(0x1010_0000, 0x10_0000)];
    seal_zero(&mut buf, &runs, slot).unwrap();
    frames.push(("zero", buf.sealed().unwrap().to_vec()));
    seal_record(&mut buf, RecordRef { name: "vcpus", data: &[1, 2, 3] }, 4).unwrap();
    frames.push(("record", buf.sealed().unwrap().to_vec()));
    frames
}

/// Every frame of the format, by name.
pub(crate) fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let messages = messages().into_iter().map(|(name, message)| (name, message.encode(6).unwrap()));
    messages.chain(device_frames()).chain(memory_frames()).collect()
}

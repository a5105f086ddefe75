//! The compatibility report: every difference is found in one go, in a fixed order, with what each
//! side has and what can be done.
#![allow(clippy::unwrap_used)]

use airlift_core::{
    Capabilities, CompatReport, DeviceId, DeviceIdentity, DeviceOffer, Gpa, Interface, Limits, MemoryLayout,
    MemoryRegion, Offer, Severity, StateFormat, compare,
};
use proptest::prelude::*;

fn device(name: &str, flags: u64) -> DeviceOffer {
    let format = StateFormat { name: "soft".into(), version: 2, accepts: vec![1, 2], interfaces: vec![] };
    let facts = [("pci-vendor", "0x1af4"), ("region0-size", "4096")];
    DeviceOffer {
        id: DeviceId::new(name).unwrap(),
        identity: DeviceIdentity {
            format: Some(format),
            facts: facts.map(|(name, value)| (name.into(), value.into())).into(),
        },
        capabilities: Capabilities::v2(flags).unwrap(),
    }
}

fn region(id: u32, gpa: u64, size: u64) -> MemoryRegion {
    MemoryRegion { id, gpa: Gpa(gpa), size, page_size: 4096 }
}

fn offer(devices: Vec<DeviceOffer>) -> Offer {
    Offer {
        devices,
        memory: MemoryLayout {
            generation: 3,
            regions: vec![region(0, 0, 1 << 20), region(1, 1 << 32, 1 << 20)],
        },
        memory_external: false,
        limits: Limits { receive_budget: 64 << 20, frame_payload: 1 << 20, channels: 8 },
        features: vec!["zero-pages".into()],
        assume_no_peer_dma: false,
    }
}

fn both() -> (Offer, Offer) {
    let one = offer(vec![device("gpu", 7), device("nic", 7)]);
    (one.clone(), one)
}

/// Device, field, severity of each finding.
fn found(report: &CompatReport) -> Vec<(Option<&str>, &str, Severity)> {
    let of = |f: &'_ airlift_core::Finding| f.severity;
    report
        .findings
        .iter()
        .map(|f| (f.device.as_ref().map(DeviceId::as_str), f.field.as_str(), of(f)))
        .collect()
}

#[test]
fn equal_sides_are_compatible_whatever_their_limits_and_generation() {
    let (source, mut destination) = both();
    destination.limits = Limits { receive_budget: 1, frame_payload: 1, channels: 1 };
    destination.memory.generation = 9;
    let report = compare(&source, &destination);
    assert_eq!(report, CompatReport::default());
    assert!(report.is_compatible());
    assert_eq!(report.to_string(), "compatible");
}

#[test]
fn every_difference_is_found_at_once() {
    let (mut source, mut destination) = both();
    source.devices.push(device("only-here", 7));
    destination.devices.push(device("only-there", 7));
    destination.devices[0].capabilities.interface = Interface::V1;
    destination.devices[0].identity.format.as_mut().unwrap().name = "other".into();
    destination.devices[1].identity.format.as_mut().unwrap().accepts = vec![1];
    destination.devices[1].identity.facts.insert("pci-vendor".into(), "0x10de".into());
    destination.devices[1].identity.facts.remove("region0-size");
    destination.devices[1].identity.facts.insert("firmware".into(), "7".into());
    destination.memory.regions[0].size *= 2;
    destination.memory.regions[0].page_size = 2 << 20;
    destination.memory.regions[1].gpa = Gpa(1 << 33);
    destination.memory.regions.push(region(2, 1 << 40, 4096));
    let report = compare(&source, &destination);
    let (no, note) = (Severity::Refusal, Severity::Info);
    let expected = [
        (None, "memory.regions", no),
        (None, "memory.region[0].size", no),
        (None, "memory.region[0].page_size", note),
        (None, "memory.region[1].gpa", no),
        (None, "memory.region[2]", no),
        (Some("gpu"), "interface", no),
        (Some("gpu"), "format.name", no),
        (Some("nic"), "format.version", no),
        (Some("nic"), "facts.firmware", no),
        (Some("nic"), "facts.pci-vendor", no),
        (Some("nic"), "facts.region0-size", no),
        (Some("only-here"), "device", no),
        (Some("only-there"), "device", no),
    ];
    assert_eq!(found(&report), expected);
    assert!(!report.is_compatible());
    let version = report.findings.iter().find(|f| f.field == "format.version").unwrap();
    assert_eq!((version.source.as_str(), version.destination.as_str()), ("2", "accepts 1"));
    let text = report.to_string();
    assert!(
        text.contains(
            "refused: nic: facts.pci-vendor: the devices differ (source 0x1af4, destination 0x10de)"
        ),
        "{text}"
    );
}

#[test]
fn facts_of_the_host_are_compared_where_both_know_them_and_info_facts_are_notes() {
    let (no, note) = (Severity::Refusal, Severity::Info);
    let with = |facts: &[(&str, &str)]| {
        let mut offer = offer(vec![device("nic", 7)]);
        for (name, value) in facts {
            offer.devices[0].identity.facts.insert((*name).into(), (*value).into());
        }
        offer
    };
    let full = with(&[("host.driver", "mtty"), ("host.mdev-type", "mtty-2"), ("info.kernel", "6.12")]);
    // A VMM's descriptor on one side, an opened device on the other: whichever is the source.
    let handed_in = with(&[("info.kernel", "7.3")]);
    let expected = [
        (Some("nic"), "facts.host.driver", note),
        (Some("nic"), "facts.host.mdev-type", note),
        (Some("nic"), "facts.info.kernel", note),
    ];
    for report in [compare(&full, &handed_in), compare(&handed_in, &full)] {
        assert_eq!(found(&report), expected);
        assert!(report.is_compatible());
    }
    let other = with(&[("host.driver", "mtty"), ("host.mdev-type", "mtty-1")]);
    let report = compare(&full, &other);
    let expected = [(Some("nic"), "facts.host.mdev-type", no), (Some("nic"), "facts.info.kernel", note)];
    assert_eq!(found(&report), expected);
    assert!(!report.is_compatible());
}

#[test]
fn v2_p2p_barrier_several_devices_without_p2p_need_the_declaration() {
    let mut source = offer(vec![device("a", 7), device("b", 5), device("c", 1)]);
    let destination = source.clone();
    let report = compare(&source, &destination);
    let finding = report.refusals().next().unwrap();
    assert_eq!((finding.field.as_str(), finding.source.as_str()), ("peer-dma", "b, c"));
    assert!(finding.advice.as_ref().unwrap().contains("--assume-no-peer-dma"));
    source.assume_no_peer_dma = true;
    let report = compare(&source, &destination);
    assert!(report.is_compatible());
    assert_eq!(found(&report), [(None, "peer-dma", Severity::Info)], "the declaration is on record");
    // The destination's declaration is not the source's.
    source.assume_no_peer_dma = false;
    let declared = Offer { assume_no_peer_dma: true, ..destination.clone() };
    assert!(!compare(&source, &declared).is_compatible());
    // One device alone has no peers.
    let alone = offer(vec![device("c", 1)]);
    assert!(compare(&alone, &alone).findings.is_empty());
}

#[test]
fn a_destination_without_p2p_is_refused_too() {
    let source = offer(vec![device("a", 7), device("b", 7)]);
    let mut destination = offer(vec![device("a", 7), device("b", 1)]);
    let refused = compare(&source, &destination);
    assert_eq!(refused.refusals().next().unwrap().destination, "b");
    destination.assume_no_peer_dma = true;
    assert!(compare(&source, &destination).is_compatible());
}

#[test]
fn differences_that_do_no_harm_are_notes() {
    let mut source = offer(vec![device("a", 7)]);
    let mut destination = offer(vec![device("a", 1)]);
    source.features = vec!["multi-channel".into(), "zero-pages".into()];
    source.devices[0].identity.format = None;
    destination.devices[0].identity.format = None;
    let report = compare(&source, &destination);
    assert!(report.is_compatible());
    let fields: Vec<_> = report.findings.iter().map(|f| f.field.as_str()).collect();
    let expected = ["features.multi-channel", "capabilities.pre-copy", "capabilities.p2p", "format"];
    assert_eq!(fields, expected);
}

#[test]
fn a_format_that_one_side_declares_is_not_guessed_at() {
    let (source, mut destination) = both();
    destination.devices[0].identity.format = None;
    assert_eq!(found(&compare(&source, &destination)), [(Some("gpu"), "format", Severity::Refusal)]);
}

fn v1(name: &str, section: u64, whole: bool) -> DeviceOffer {
    DeviceOffer { capabilities: Capabilities::v1(section, whole), ..device(name, 7) }
}

fn alone(one: DeviceOffer) -> Offer {
    offer(vec![one])
}

// V1-WHOLE
#[test]
fn a_device_that_takes_whole_transactions_must_have_room_for_the_sources() {
    let result = |a, b| compare(&alone(a), &alone(b));
    for (ours, theirs) in [(4096, 4096), (4096, 8192)] {
        assert!(result(v1("a", ours, true), v1("a", theirs, true)).findings.is_empty());
    }
    let refused = result(v1("a", 8192, false), v1("a", 4096, true));
    assert_eq!(found(&refused), [(Some("a"), "capabilities.largest-transaction", Severity::Refusal)]);
    let finding = &refused.findings[0];
    assert_eq!((finding.source.as_str(), finding.destination.as_str()), ("8192", "4096"));
    assert!(finding.advice.as_ref().unwrap().contains("8192 bytes"), "{finding}");
    // Without that requirement a section of any size will do: rounds are made.
    assert!(result(v1("a", 1 << 40, true), v1("a", 1, false)).findings.is_empty());
    // A peer that does not say is a note.
    let mut silent = v1("a", 8192, false);
    silent.capabilities.data_section = None;
    let noted = result(silent, v1("a", 4096, true));
    assert_eq!(found(&noted), [(Some("a"), "capabilities.largest-transaction", Severity::Info)]);
}

// V1-MIX
#[test]
fn another_interface_is_refused_by_name_unless_the_destinations_device_reads_it() {
    let reading = |mut d: DeviceOffer, interface| {
        d.identity.format.as_mut().unwrap().interfaces = vec![interface];
        d
    };
    for (a, b, names) in [
        (v1("a", 4096, false), device("a", 5), ["v1", "v2"]),
        (device("a", 5), v1("a", 4096, false), ["v2", "v1"]),
    ] {
        let report = compare(&alone(a.clone()), &alone(b.clone()));
        assert_eq!(found(&report), [(Some("a"), "interface", Severity::Refusal)]);
        let finding = &report.findings[0];
        assert_eq!([finding.source.as_str(), finding.destination.as_str()], names);
        assert!(finding.advice.as_ref().unwrap().contains(names[0]), "{finding}");
        // What the destination's device reads counts, and only that.
        let of = a.capabilities.interface;
        let report = compare(&alone(a.clone()), &alone(reading(b.clone(), of)));
        assert_eq!(found(&report), [(Some("a"), "interface", Severity::Info)]);
        let report = compare(&alone(reading(a.clone(), of)), &alone(b.clone()));
        assert!(!report.is_compatible());
        let mut other = reading(b, of);
        other.identity.format.as_mut().unwrap().accepts = vec![7];
        let report = compare(&alone(a), &alone(other));
        let expected =
            [(Some("a"), "interface", Severity::Refusal), (Some("a"), "format.version", Severity::Refusal)];
        assert_eq!(found(&report), expected);
    }
}

// V1-MIX, V1-WHOLE
#[test]
fn pieces_of_a_v2_stream_must_fit_a_device_that_takes_them_only_whole() {
    let severity = |section| {
        let mut there = v1("a", section, true);
        there.identity.format.as_mut().unwrap().interfaces = vec![Interface::V2];
        let report = compare(&alone(device("a", 5)), &alone(there));
        report.refusals().next().map(|f| f.field.clone())
    };
    // No piece is larger than a frame.
    assert_eq!(severity(1 << 20), None);
    assert_eq!(severity((1 << 20) - 1).as_deref(), Some("capabilities.largest-transaction"));
}

// V1-ARCS
#[test]
fn a_refusal_for_peer_dma_says_that_v1_has_no_p2p() {
    let pair = offer(vec![v1("old", 4096, false), device("new", 7)]);
    let report = compare(&pair, &pair);
    let text = report.refusals().next().unwrap().to_string();
    assert!(text.contains("old has no P2P states (migration interface v1 knows none)"), "{text}");
    assert!(text.contains("--assume-no-peer-dma"), "{text}");
    let text =
        compare(&offer(vec![device("a", 5), device("b", 5)]), &pair).refusals().next().unwrap().to_string();
    assert!(text.contains("v1 knows none"), "also when only the destination's devices are: {text}");
}

#[test]
fn who_moves_memory_must_be_agreed_and_an_external_layout_is_the_vmms() {
    let (mut source, mut destination) = both();
    source.memory_external = true;
    destination.memory.regions.clear();
    let report = compare(&source, &destination);
    assert_eq!(report.refusals().next().unwrap().field, "memory.external");
    destination.memory_external = true;
    assert!(compare(&source, &destination).is_compatible());
}

#[test]
fn doubled_ids_are_refused() {
    let (mut source, destination) = both();
    source.devices.push(device("nic", 7));
    source.devices.push(device("nic", 7));
    source.memory.regions.push(region(1, 1 << 45, 4096));
    let report = compare(&source, &destination);
    let doubles = [(Some("nic"), "device", Severity::Refusal), (None, "memory.region[1]", Severity::Refusal)];
    assert_eq!(found(&report)[..2], doubles);
    assert!(report.findings[0].message.contains("source"));
}

#[test]
fn reports_and_offers_survive_json() {
    let (source, mut destination) = both();
    destination.devices.pop();
    let report = compare(&source, &destination);
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<CompatReport>(&json).unwrap(), report);
    assert!(json.contains(r#""severity":"refusal""#), "{json}");
    let json = serde_json::to_string(&source).unwrap();
    assert_eq!(serde_json::from_str::<Offer>(&json).unwrap(), source);
    assert!(
        !json.contains("data_section") && !json.contains("interfaces"),
        "older peers know neither: {json}"
    );
    let old = offer(vec![v1("a", 8192, true)]);
    let mut json: serde_json::Value = serde_json::to_value(&old).unwrap();
    assert_eq!(serde_json::from_value::<Offer>(json.clone()).unwrap(), old);
    json["devices"][0]["capabilities"].as_object_mut().unwrap().remove("data_section").unwrap();
    let read = serde_json::from_value::<Offer>(json).unwrap();
    assert_eq!(read.devices[0].capabilities.data_section, None);
    assert_eq!(read.devices[0].capabilities.largest_transaction, Some(8192));
}

fn any_device(name: &'static str) -> impl Strategy<Value = DeviceOffer> {
    (0..4_u64, any::<bool>(), 0..3_u32, any::<bool>()).prop_map(move |(flags, v1, version, format)| {
        let mut offer = device(name, 1 + 2 * flags);
        if v1 {
            offer.capabilities.interface = Interface::V1;
        }
        offer.identity.format.as_mut().unwrap().version = version;
        if !format {
            offer.identity.format = None;
        }
        offer
    })
}

fn any_offer() -> impl Strategy<Value = Offer> {
    let devices = (any_device("a"), any_device("b"), any_device("c"), 0..8_u8);
    let devices = devices.prop_map(|(a, b, c, mask)| {
        let each = [a, b, c].into_iter().enumerate();
        each.filter(|(n, _)| mask & (1 << n) != 0).map(|(_, d)| d).collect::<Vec<_>>()
    });
    (devices, any::<bool>(), any::<bool>(), 0..3_usize).prop_map(|(devices, external, declared, regions)| {
        let mut offer = offer(devices);
        offer.memory_external = external;
        offer.assume_no_peer_dma = declared;
        offer.memory.regions.truncate(regions);
        offer
    })
}

proptest! {
    #[test]
    fn the_order_of_the_lists_does_not_matter(source in any_offer(), destination in any_offer()) {
        let turned = |offer: &Offer| {
            let mut offer = offer.clone();
            offer.devices.reverse();
            offer.memory.regions.reverse();
            offer
        };
        let report = compare(&source, &destination);
        prop_assert_eq!(&report, &compare(&turned(&source), &turned(&destination)));
        // Every finding can be shown, and says what is wrong.
        prop_assert!(report.findings.iter().all(|f| !f.message.is_empty() && !f.field.is_empty()));
        prop_assert_eq!(report.is_compatible(), report.refusals().count() == 0);
    }

    #[test]
    fn a_side_that_is_refused_with_itself_is_refused_for_peer_dma_or_an_old_version(one in any_offer()) {
        let report = compare(&one, &one);
        for finding in report.refusals() {
            prop_assert!(["peer-dma", "format.version"].contains(&finding.field.as_str()), "{}", finding);
        }
    }
}

//! Whether what one side offers can be taken by the other: every finding, not the first.
//!
//! [`compare`] looks at two descriptions and touches no device. What it cannot see (a format that
//! nobody declares, firmware that no fact names) is found by the destination's device when it
//! validates its state.

use crate::plan::{V1_LACKS_P2P, without_p2p};
use crate::{Capabilities, DeviceId, DeviceIdentity, Interface, MemoryLayout, MemoryRegion, StateFormat};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// One device as a side offers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceOffer {
    /// Its name, which pairs it with the other side's.
    pub id: DeviceId,
    /// What must match.
    pub identity: DeviceIdentity,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// The bounds that a side keeps. They differ freely: the smaller one of each holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes that this side reserves for data that has not been written yet.
    pub receive_budget: u64,
    /// Bytes of the largest frame payload that it takes.
    pub frame_payload: u32,
    /// Data connections that it accepts.
    pub channels: u16,
}

/// What one side brings to a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its devices.
    pub devices: Vec<DeviceOffer>,
    /// Its guest memory.
    pub memory: MemoryLayout,
    /// The VMM moves the memory itself.
    pub memory_external: bool,
    /// Its bounds.
    pub limits: Limits,
    /// Optional parts of the protocol that it speaks, by name. What only one side has is not used.
    pub features: Vec<String>,
    /// Its embedder declares that the guest's devices do not write to each other.
    pub assume_no_peer_dma: bool,
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Good to know; the migration can go on.
    Info,
    /// The migration must not begin.
    Refusal,
}

/// One difference, or one thing that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The device it is about; `None` for the machine as a whole.
    pub device: Option<DeviceId>,
    /// What was compared (`interface`, `format.version`, `facts.pci-vendor`, `memory.region[0].gpa`).
    pub field: String,
    /// What the source has; empty when it has nothing.
    pub source: String,
    /// What the destination has; empty when it has nothing.
    pub destination: String,
    /// What it means.
    pub severity: Severity,
    /// What is wrong, for a person.
    pub message: String,
    /// What can be done, where there is something.
    pub advice: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Info => "note",
            Severity::Refusal => "refused",
        };
        write!(f, "{severity}: ")?;
        if let Some(device) = &self.device {
            write!(f, "{device}: ")?;
        }
        write!(f, "{}: {}", self.field, self.message)?;
        let shown = |text: &str| if text.is_empty() { "-".into() } else { text.to_owned() };
        if self.source != self.destination {
            write!(f, " (source {}, destination {})", shown(&self.source), shown(&self.destination))?;
        }
        match &self.advice {
            Some(advice) => write!(f, "; {advice}"),
            None => Ok(()),
        }
    }
}

/// Everything that was found, in a fixed order: the machine's own findings, then devices by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompatReport {
    /// The findings.
    pub findings: Vec<Finding>,
}

impl CompatReport {
    /// Nothing stands in the way.
    #[must_use]
    pub fn is_compatible(&self) -> bool {
        self.refusals().next().is_none()
    }

    /// What stands in the way.
    pub fn refusals(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|f| f.severity == Severity::Refusal)
    }

    fn add(&mut self, finding: Finding) {
        self.findings.push(finding);
    }
}

impl fmt::Display for CompatReport {
    /// One line for each finding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.findings.is_empty() {
            return f.write_str("compatible");
        }
        let lines: Vec<_> = self.findings.iter().map(Finding::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl Finding {
    fn new(severity: Severity, device: Option<&DeviceId>, field: impl Into<String>) -> Self {
        Self {
            device: device.cloned(),
            field: field.into(),
            source: String::new(),
            destination: String::new(),
            severity,
            message: String::new(),
            advice: None,
        }
    }

    fn refusal(device: Option<&DeviceId>, field: impl Into<String>) -> Self {
        Self::new(Severity::Refusal, device, field)
    }

    fn info(device: Option<&DeviceId>, field: impl Into<String>) -> Self {
        Self::new(Severity::Info, device, field)
    }

    fn values(mut self, source: impl Into<String>, destination: impl Into<String>) -> Self {
        (self.source, self.destination) = (source.into(), destination.into());
        self
    }

    fn message(mut self, message: impl Into<String>) -> Self {
        self.message = message.into();
        self
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// Compares what the two sides offer. The report holds every finding. The order in which devices,
/// regions and features are listed does not change it, unless one is listed twice, which is refused.
#[must_use]
pub fn compare(source: &Offer, destination: &Offer) -> CompatReport {
    let mut report = CompatReport::default();
    for (offer, side) in [(source, "source"), (destination, "destination")] {
        refuse_doubles(offer, side, &mut report);
    }
    compare_memory(source, destination, &mut report);
    compare_peer_dma(source, destination, &mut report);
    compare_features(source, destination, &mut report);

    let ours: BTreeMap<_, _> = source.devices.iter().map(|d| (&d.id, d)).collect();
    let theirs: BTreeMap<_, _> = destination.devices.iter().map(|d| (&d.id, d)).collect();
    let ids: BTreeSet<_> = ours.keys().chain(theirs.keys()).copied().collect();
    // No piece of a device's stream is larger than a frame.
    let piece = u64::from(source.limits.frame_payload.min(destination.limits.frame_payload));
    for id in ids {
        match (ours.get(id), theirs.get(id)) {
            (Some(a), Some(b)) => compare_devices(a, b, piece, &mut report),
            (Some(_), None) => report.add(
                Finding::refusal(Some(id), "device")
                    .values("present", "")
                    .message("the destination has no device of this id")
                    .advise("give the destination a device with the same id"),
            ),
            (None, _) => report.add(
                Finding::refusal(Some(id), "device")
                    .values("", "present")
                    .message("the source has no device of this id, so it would start without state")
                    .advise("remove it from the destination, or give the source's device this id"),
            ),
        }
    }
    report
}

fn refuse_doubles(offer: &Offer, side: &str, report: &mut CompatReport) {
    let mut ids: Vec<_> = offer.devices.iter().map(|d| &d.id).collect();
    ids.sort();
    for id in doubles(&ids) {
        report.add(
            Finding::refusal(Some(*id), "device").message(format!("the {side} has this id more than once")),
        );
    }
    let mut regions: Vec<_> = offer.memory.regions.iter().map(|r| r.id).collect();
    regions.sort_unstable();
    for id in doubles(&regions) {
        report.add(
            Finding::refusal(None, format!("memory.region[{id}]"))
                .message(format!("the {side} has this number more than once")),
        );
    }
}

/// What stands more than once in a sorted list, each once.
fn doubles<T: PartialEq>(sorted: &[T]) -> impl Iterator<Item = &T> {
    sorted.chunk_by(PartialEq::eq).filter(|same| same.len() > 1).map(|same| &same[0])
}

fn compare_memory(source: &Offer, destination: &Offer, report: &mut CompatReport) {
    if source.memory_external != destination.memory_external {
        let who = |external| if external { "the VMM" } else { "Airlift" };
        report.add(
            Finding::refusal(None, "memory.external")
                .values(who(source.memory_external), who(destination.memory_external))
                .message("the sides differ in who moves guest memory"),
        );
    }
    if source.memory_external && destination.memory_external {
        // The VMM compares what it moves itself.
        return;
    }
    let ours: BTreeMap<_, _> = source.memory.regions.iter().map(|r| (r.id, r)).collect();
    let theirs: BTreeMap<_, _> = destination.memory.regions.iter().map(|r| (r.id, r)).collect();
    if ours.len() != theirs.len() {
        report.add(
            Finding::refusal(None, "memory.regions")
                .values(ours.len().to_string(), theirs.len().to_string())
                .message("the sides have different numbers of memory regions"),
        );
    }
    let ids: BTreeSet<_> = ours.keys().chain(theirs.keys()).copied().collect();
    for id in ids {
        match (ours.get(&id), theirs.get(&id)) {
            (Some(a), Some(b)) => compare_regions(id, a, b, report),
            (a, b) => {
                let shown = |r: Option<&&MemoryRegion>| r.map_or_else(String::new, |r| show(r));
                report.add(
                    Finding::refusal(None, format!("memory.region[{id}]"))
                        .values(shown(a), shown(b))
                        .message("only one side has this region")
                        .advise("start both machines with the same memory"),
                );
            }
        }
    }
}

fn show(region: &MemoryRegion) -> String {
    format!("{} bytes at {:#x}", region.size, region.gpa.0)
}

fn compare_regions(id: u32, a: &MemoryRegion, b: &MemoryRegion, report: &mut CompatReport) {
    let field = |name| format!("memory.region[{id}].{name}");
    if a.gpa != b.gpa {
        report.add(
            Finding::refusal(None, field("gpa"))
                .values(format!("{:#x}", a.gpa.0), format!("{:#x}", b.gpa.0))
                .message("the guest sees the region at different addresses"),
        );
    }
    if a.size != b.size {
        report.add(
            Finding::refusal(None, field("size"))
                .values(a.size.to_string(), b.size.to_string())
                .message("the region has different sizes")
                .advise("start both machines with the same memory"),
        );
    }
    if a.page_size != b.page_size {
        report.add(
            Finding::info(None, field("page_size"))
                .values(a.page_size.to_string(), b.page_size.to_string())
                .message("the region is backed by pages of different sizes, which is allowed"),
        );
    }
}

/// Several devices must be stopped, and started, in an order that devices without P2P cannot keep
/// (V2-P2P-BARRIER). The source's declaration is about the guest and so holds for both sides.
fn compare_peer_dma(source: &Offer, destination: &Offer, report: &mut CompatReport) {
    let declared = [source.assume_no_peer_dma, source.assume_no_peer_dma || destination.assume_no_peer_dma];
    let lacking = [source, destination]
        .map(|offer| without_p2p(offer.devices.iter().map(|d| (&d.id, &d.capabilities))));
    let names = lacking.each_ref().map(|ids| {
        let mut names: Vec<_> = ids.iter().map(DeviceId::as_str).collect();
        names.sort_unstable();
        names.join(", ")
    });
    if lacking.iter().all(Vec::is_empty) {
        return;
    }
    let mut all: Vec<_> = lacking.iter().flatten().map(DeviceId::as_str).collect();
    all.sort_unstable();
    all.dedup();
    let refused = lacking.iter().zip(declared).any(|(ids, declared)| !ids.is_empty() && !declared);
    let v1 = [source, destination]
        .iter()
        .flat_map(|offer| &offer.devices)
        .any(|d| d.capabilities.interface == Interface::V1 && all.contains(&d.id.as_str()));
    let finding = if refused {
        Finding::refusal(None, "peer-dma")
            .message(format!(
                "several devices, and {} {} no P2P states{}: writes between devices could be lost",
                all.join(", "),
                if all.len() == 1 { "has" } else { "have" },
                if v1 { V1_LACKS_P2P } else { "" },
            ))
            .advise("if the devices do not write to each other, say so with --assume-no-peer-dma")
    } else {
        Finding::info(None, "peer-dma")
            .message("devices without P2P states are accepted: it was declared that devices do not write to each other")
    };
    let [source, destination] = names;
    report.add(finding.values(source, destination));
}

fn compare_features(source: &Offer, destination: &Offer, report: &mut CompatReport) {
    let ours: BTreeSet<_> = source.features.iter().collect();
    let theirs: BTreeSet<_> = destination.features.iter().collect();
    for feature in ours.symmetric_difference(&theirs) {
        let shown = |has| if has { "yes" } else { "" };
        report.add(
            Finding::info(None, format!("features.{feature}"))
                .values(shown(ours.contains(feature)), shown(theirs.contains(feature)))
                .message("only one side has it, so it is not used"),
        );
    }
}

fn compare_devices(a: &DeviceOffer, b: &DeviceOffer, piece: u64, report: &mut CompatReport) {
    compare_interfaces(a, b, report);
    compare_capabilities(a, b, report);
    compare_transactions(a, b, piece, report);
    compare_formats(&a.id, a.identity.format.as_ref(), b.identity.format.as_ref(), report);
    let names: BTreeSet<_> = a.identity.facts.keys().chain(b.identity.facts.keys()).collect();
    for name in names {
        let (ours, theirs) = (a.identity.facts.get(name), b.identity.facts.get(name));
        if ours == theirs {
            continue;
        }
        let both = ours.is_some() && theirs.is_some();
        let (severity, message) = match (Weight::of(name), both) {
            (Weight::Strict | Weight::Known, true) => (Severity::Refusal, "the devices differ"),
            (Weight::Strict, false) => {
                (Severity::Refusal, "only one side states it, so it cannot be compared")
            }
            (Weight::Known, false) => (Severity::Info, "only one side can see it, so it was not compared"),
            (Weight::Note, true) => (Severity::Info, "the sides differ, which is allowed"),
            (Weight::Note, false) => (Severity::Info, "only one side states it"),
        };
        report.add(
            Finding::new(severity, Some(&a.id), format!("facts.{name}"))
                .values(ours.cloned().unwrap_or_default(), theirs.cloned().unwrap_or_default())
                .message(message),
        );
    }
}

/// What a difference in a fact means; its name's prefix says which.
enum Weight {
    /// No prefix: both sides state it, and the same.
    Strict,
    /// `host.`: the same where both state it. A side that was handed an open device may not see what
    /// its host calls it.
    Known,
    /// `info.`: good to know.
    Note,
}

impl Weight {
    fn of(name: &str) -> Self {
        if name.starts_with(DeviceIdentity::HOST) {
            Self::Known
        } else if name.starts_with(DeviceIdentity::INFO) {
            Self::Note
        } else {
            Self::Strict
        }
    }
}

/// Data of one interface means nothing over the other, unless the destination's device itself says that it
/// reads it in a format that both have (V1-MIX).
fn compare_interfaces(a: &DeviceOffer, b: &DeviceOffer, report: &mut CompatReport) {
    let (ours, theirs) = (a.capabilities.interface, b.capabilities.interface);
    if ours == theirs {
        return;
    }
    let (mut same, format) = (CompatReport::default(), |d: &DeviceOffer| d.identity.format.clone());
    compare_formats(&a.id, format(a).as_ref(), format(b).as_ref(), &mut same);
    let reads = format(b).is_some_and(|format| format.interfaces.contains(&ours)) && same.is_compatible();
    let finding = if reads {
        Finding::info(Some(&a.id), "interface").message(format!(
            "the devices speak different migration interfaces; the destination's device declares that it reads data of {ours} in this format"
        ))
    } else {
        Finding::refusal(Some(&a.id), "interface")
            .message(format!(
                "the source's device speaks migration interface {ours} and the destination's {theirs}, whose data differs"
            ))
            .advise(format!(
                "give the destination a device of interface {ours}, or one whose state format declares that it reads data of {ours}"
            ))
    };
    report.add(finding.values(ours.to_string(), theirs.to_string()));
}

fn compare_capabilities(a: &DeviceOffer, b: &DeviceOffer, report: &mut CompatReport) {
    let (id, a, b) = (&a.id, &a.capabilities, &b.capabilities);
    let shown = |has| if has { "yes" } else { "" };
    if a.precopy() != b.precopy() {
        let message = if a.precopy() {
            "the destination could not send pre-copy data back; loading it needs nothing"
        } else {
            "the source has no pre-copy: all of its state is sent while the guest is stopped"
        };
        report.add(
            Finding::info(Some(id), "capabilities.pre-copy")
                .values(shown(a.precopy()), shown(b.precopy()))
                .message(message),
        );
    }
    if a.p2p() != b.p2p() {
        report.add(
            Finding::info(Some(id), "capabilities.p2p")
                .values(shown(a.p2p()), shown(b.p2p()))
                .message("only one side has the P2P states"),
        );
    }
}

/// A destination's device that takes a transaction only as a whole must have room for the largest one
/// that the source can give (V1-WHOLE). `piece`: bytes of the largest piece of a stream that may be cut
/// anywhere; over v1 each is a transaction of its own (V1-MIX).
fn compare_transactions(a: &DeviceOffer, b: &DeviceOffer, piece: u64, report: &mut CompatReport) {
    let Some(taken) = b.capabilities.largest_transaction else { return };
    let produced = match (a.capabilities.interface, b.capabilities.interface) {
        (Interface::V1, _) => a.capabilities.data_section,
        (Interface::V2, Interface::V1) => Some(piece),
        // A v2 stream may be cut anywhere.
        (Interface::V2, Interface::V2) => return,
    };
    let finding = |severity| Finding::new(severity, Some(&a.id), "capabilities.largest-transaction");
    report.add(match produced {
        Some(produced) if produced <= taken => return,
        Some(produced) => finding(Severity::Refusal)
            .values(produced.to_string(), taken.to_string())
            .message("the destination's device takes a transaction only as a whole, and the source can give one that is larger than its data section")
            .advise(format!("give the destination's device a data section of {produced} bytes or more")),
        None => finding(Severity::Info)
            .values("", taken.to_string())
            .message("the source does not say how large its transactions are: one may be too large for the destination's device"),
    });
}

fn compare_formats(
    id: &DeviceId,
    a: Option<&StateFormat>,
    b: Option<&StateFormat>,
    report: &mut CompatReport,
) {
    let (Some(a), Some(b)) = (a, b) else {
        let shown = |f: Option<&StateFormat>| {
            f.map_or_else(String::new, |f| format!("{} version {}", f.name, f.version))
        };
        let finding = if a.is_none() && b.is_none() {
            Finding::info(Some(id), "format").message(
                "neither device declares the format of its state: a mismatch shows when it is loaded",
            )
        } else {
            Finding::refusal(Some(id), "format")
                .message("only one device declares the format of its state, so it cannot be compared")
        };
        report.add(finding.values(shown(a), shown(b)));
        return;
    };
    if a.name != b.name {
        report.add(
            Finding::refusal(Some(id), "format.name")
                .values(&a.name, &b.name)
                .message("the devices' states have different formats"),
        );
    } else if !b.accepts.contains(&a.version) {
        let accepts: Vec<_> = b.accepts.iter().map(u32::to_string).collect();
        report.add(
            Finding::refusal(Some(id), "format.version")
                .values(a.version.to_string(), format!("accepts {}", accepts.join(", ")))
                .message("the destination's device does not read this version")
                .advise("update the destination's device"),
        );
    }
}

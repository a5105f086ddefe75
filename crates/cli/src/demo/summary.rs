//! The demo's words for a person: what is about to happen, and what has.

use super::result::DemoResult;
use crate::args::{DemoArgs, DemoInterface};
use crate::render::{downtime_lines, error_text};
use crate::units::{Size, counted, millis};
use airlift::{Outcome, Running};

/// Before the start.
pub(crate) fn opening(args: &DemoArgs, seed: u64) -> String {
    let devices = if args.devices == 1 { "one device" } else { "devices" };
    let count = if args.devices == 1 { String::new() } else { format!("{} ", args.devices) };
    let opening = format!(
        "Two hosts as processes on this machine: {count}{devices} of {} behind vfio-user sockets, a guest \
         with {} of memory, both written to all the time (seed {seed}).",
        args.device.state_size, args.memory
    );
    match interface_note(args) {
        Some(note) => format!("{opening} Note: {note}."),
        None => opening,
    }
}

/// What interface v1 means for this demo.
pub(crate) fn interface_note(args: &DemoArgs) -> Option<String> {
    let which = match args.interface {
        DemoInterface::V2 => return None,
        DemoInterface::V1 => "the devices have the migration region of interface v1",
        DemoInterface::Mixed => {
            "every other device, from the first on, has the migration region of interface v1, the others have v2"
        }
    };
    let peer = match args.no_peer_dma() {
        true => {
            "; v1 has no P2P states, so the guest sets up no DMA between devices, and --assume-no-peer-dma is given"
        }
        false => "",
    };
    Some(format!("{which}{peer}"))
}

/// Between a migration that did not complete and the second one.
pub(crate) fn between(first: &DemoResult) -> String {
    format!("\n{}\n\nOnce more, to a fresh destination:", text(first))
}

/// The result.
pub(crate) fn text(result: &DemoResult) -> String {
    // A retry's first result was shown before the second began.
    if let Some(retry) = &result.retry {
        return format!("\n{}", text(retry));
    }
    if result.outcome == Outcome::Completed { completed(result) } else { not_completed(result) }
}

fn completed(result: &DemoResult) -> String {
    let mut lines = Vec::new();
    if let Some(error) = &result.error {
        lines.push(error_text(error));
    }
    lines.push(headline(result));
    if let (Some(downtime), Some(terms)) = (result.downtime_ms, &result.downtime_terms_ms) {
        let gap =
            result.guest_gap_ms.map(|gap| format!("; the guest itself wrote nothing for {}", millis(gap)));
        lines.push(format!("\nDowntime {}{}. Where it went:", millis(downtime), gap.unwrap_or_default()));
        lines.extend(downtime_lines(terms));
        lines.push(String::new());
    }
    lines.extend(arrived(result));
    lines.extend(result.notes.iter().map(|note| format!("Note: {note}.")));
    lines.push(format!("Seed {}.", result.seed));
    lines.join("\n")
}

/// The error first, and where the guest is last: that is what stays in view.
fn not_completed(result: &DemoResult) -> String {
    let mut lines = Vec::new();
    if let Some(error) = &result.error {
        lines.push(error_text(error));
    }
    if result.outcome == Outcome::Incompatible
        && let Some(compatibility) = &result.compatibility
    {
        lines.extend(compatibility.findings.iter().map(|finding| format!("  {finding}")));
    }
    for device in &result.devices {
        if let Some(why) = &device.quarantined {
            lines.push(format!("Device {} is lost to the guest: {why}.", device.id));
        }
    }
    if let Some(blackout) = result.blackout_ms {
        lines.push(format!("The guest was paused for {} on the way.", millis(blackout)));
    }
    lines.extend(guest(result));
    lines.extend(result.notes.iter().map(|note| format!("Note: {note}.")));
    lines.push(format!("Seed {}.", result.seed));
    lines.push(headline(result));
    lines.join("\n")
}

fn headline(result: &DemoResult) -> String {
    let verified = if result.is_verified() { "verified" } else { "NOT VERIFIED" };
    match (result.outcome, result.source_running, result.destination_running) {
        (Outcome::Completed, ..) => format!(
            "Completed and {verified} in {}: the guest runs on the destination.",
            millis(result.total_ms)
        ),
        (_, Running::Yes, Running::Yes) => "The guest runs on BOTH sides.".into(),
        (Outcome::Incompatible, Running::Yes, _) => {
            "The two hosts do not match; no device was touched. The guest runs on the source.".into()
        }
        (Outcome::InDoubt, ..) => "In doubt: COMMIT may have been given and nobody can say that the guest \
                                   runs on the destination. It is started on neither side."
            .into(),
        (_, Running::Yes, _) if result.is_verified() => {
            "The guest runs on the source, with nothing missing, doubled or changed.".into()
        }
        (_, Running::Yes, _) => "The guest runs on the source.".into(),
        (_, _, Running::Yes) => "The guest runs on the destination.".into(),
        _ => "The guest runs on neither side, as far as this demo can tell.".into(),
    }
}

/// What came over, and who says so.
fn arrived(result: &DemoResult) -> Vec<String> {
    let word = |right| if right { "every byte right" } else { "WRONG" };
    let mut lines = vec![format!(
        "Memory   {}: {} sent in {} and the stop, {} zero pages, {} pages sent again; {}",
        Size(result.memory.bytes_total),
        Size(result.memory.bytes_sent),
        counted(result.rounds, "round"),
        result.memory.pages_zero,
        result.memory.pages_resent,
        word(result.memory.verified)
    )];
    for device in &result.devices {
        lines.push(format!(
            "{:<8} {} while it ran, {} after the stop; {}",
            device.id,
            Size(device.precopy_bytes),
            Size(device.stop_copy_bytes),
            word(device.verified)
        ));
    }
    lines.extend(guest(result));
    lines.push(format!(
        "Own memory at most: send {}, receive {}.",
        Size(result.peak_anon_bytes.source),
        Size(result.peak_anon_bytes.destination)
    ));
    lines
}

fn guest(result: &DemoResult) -> Option<String> {
    let guest = result.guest?;
    Some(format!(
        "Guest    {} sequence numbers missing, {} doubled; {} interrupts lost, {} too many",
        guest.sequence_gaps, guest.sequence_duplicates, guest.interrupts_lost, guest.interrupts_extra
    ))
}

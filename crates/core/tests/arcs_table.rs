//! The derived arcs and paths against the interface's own table, for every pair of states and every
//! capability set. The table stands here, and only here.
#![allow(clippy::unwrap_used)]

use airlift_core::{Arc, ArcSession, Capabilities, DeviceState, Errno, PathError, arcs, next_state, path};
use std::collections::BTreeSet;

/// Columns and rows: S R P PP SC RE RP; `-` refused. What the next single arc leads to on a device
/// that has every state.
const TABLE: [(&str, [&str; 7]); 8] = [
    ("S", ["S", "RP", "RP", "RP", "SC", "RE", "RP"]),
    ("R", ["RP", "R", "P", "RP", "RP", "RP", "RP"]),
    ("P", ["R", "R", "P", "PP", "PP", "R", "R"]),
    ("PP", ["RP", "RP", "P", "PP", "SC", "RP", "RP"]),
    ("SC", ["S", "S", "-", "-", "SC", "S", "S"]),
    ("RE", ["S", "S", "S", "S", "S", "RE", "S"]),
    ("RP", ["S", "R", "R", "PP", "S", "S", "RP"]),
    ("ERROR", ["-", "-", "-", "-", "-", "-", "-"]),
];
const COLUMNS: [&str; 7] = ["S", "R", "P", "PP", "SC", "RE", "RP"];

fn state(name: &str) -> DeviceState {
    match name {
        "S" => DeviceState::Stop,
        "R" => DeviceState::Running,
        "P" => DeviceState::PreCopy,
        "PP" => DeviceState::PreCopyP2p,
        "SC" => DeviceState::StopCopy,
        "RE" => DeviceState::Resuming,
        "RP" => DeviceState::RunningP2p,
        "ERROR" => DeviceState::Error,
        other => panic!("no state {other}"),
    }
}

fn every_capability_set() -> Vec<Capabilities> {
    [1, 3, 5, 7].map(|raw| Capabilities::v2(raw).unwrap()).to_vec()
}

/// The reference: the cell, and where it names a state that the device lacks, that state's row.
fn by_table(from: DeviceState, to: DeviceState, caps: &Capabilities) -> Option<DeviceState> {
    if !caps.has(from) || !caps.has(to) {
        return None;
    }
    let column = COLUMNS.iter().position(|name| state(name) == to)?;
    let mut row = from;
    loop {
        let cells = TABLE.iter().find(|(name, _)| state(name) == row).unwrap().1;
        if cells[column] == "-" {
            return None;
        }
        row = state(cells[column]);
        if caps.has(row) {
            return Some(row);
        }
    }
}

#[test]
fn next_arc_is_the_tables_for_every_pair_and_capability_set() {
    let mut compared = 0;
    for caps in every_capability_set() {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let derived = next_state(from, to, &caps).ok();
                assert_eq!(derived, by_table(from, to, &caps), "{from} -> {to} with {:?}", caps.flags);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 8 * 8 * 4);
}

#[test]
fn paths_are_what_the_table_walks() {
    for caps in every_capability_set() {
        let single: BTreeSet<Arc> = arcs(&caps).into_iter().collect();
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Ok(walk) = path(from, to, &caps) else { continue };
                let mut at = from;
                for arc in &walk {
                    assert_eq!(arc.from, at);
                    assert_eq!(Some(arc.to), by_table(at, to, &caps), "{from} -> {to} at {at}");
                    assert!(single.contains(arc), "{arc} is no single arc of {:?}", caps.flags);
                    at = arc.to;
                }
                assert_eq!(at, to);
                assert_eq!(walk.is_empty(), from == to);
                let saving_inside = walk.iter().skip(1).any(|arc| arc.from.is_saving());
                assert!(!saving_inside || (from.is_saving() && to.is_saving()), "{from} -> {to}");
            }
        }
    }
}

/// Arcs by name, in groups.
type Parts<'a> = Vec<&'a [(&'a str, &'a str)]>;

fn listed(names: &[(&str, &str)]) -> BTreeSet<Arc> {
    names.iter().map(|(from, to)| Arc::new(state(from), state(to))).collect()
}

// V2-ARCS
#[test]
fn v2_arcs_single_arcs_of_each_capability_set() {
    let common = [("S", "SC"), ("SC", "S"), ("S", "RE"), ("RE", "S")];
    let unfolded = [("R", "RP"), ("RP", "R"), ("RP", "S"), ("S", "RP")];
    let folded = [("R", "S"), ("S", "R")];
    let precopy = [("R", "P"), ("P", "R")];
    let precopy_p2p = [("RP", "PP"), ("PP", "RP"), ("P", "PP"), ("PP", "P"), ("PP", "SC")];
    let expected: [(u64, Parts<'_>); 4] = [
        (1, vec![&common, &folded]),
        (3, vec![&common, &unfolded]),
        (5, vec![&common, &folded, &precopy, &[("P", "SC")]]),
        (7, vec![&common, &unfolded, &precopy, &precopy_p2p]),
    ];
    for (raw, parts) in expected {
        let caps = Capabilities::v2(raw).unwrap();
        let derived: BTreeSet<Arc> = arcs(&caps).into_iter().collect();
        assert_eq!(derived, listed(&parts.concat()), "flags {raw}");
        assert_eq!(derived.len(), arcs(&caps).len(), "no arc twice");
    }
}

#[test]
fn v2_session_opens_keeps_and_ends_as_the_interface_says() {
    let kind = |from: &str, to: &str| Arc::new(state(from), state(to)).session();
    for (from, to) in [("R", "P"), ("RP", "PP"), ("S", "SC")] {
        assert_eq!(kind(from, to), ArcSession::OpensSave, "{from} {to}");
    }
    assert_eq!(kind("S", "RE"), ArcSession::OpensLoad);
    for (from, to) in [("P", "PP"), ("PP", "P"), ("PP", "SC"), ("P", "SC")] {
        assert_eq!(kind(from, to), ArcSession::Keeps, "{from} {to}");
    }
    for (from, to) in [("P", "R"), ("PP", "RP"), ("SC", "S"), ("RE", "S"), ("SC", "ERROR")] {
        assert_eq!(kind(from, to), ArcSession::Ends, "{from} {to}");
    }
    for (from, to) in [("R", "RP"), ("RP", "R"), ("RP", "S"), ("S", "RP"), ("R", "S")] {
        assert_eq!(kind(from, to), ArcSession::None, "{from} {to}");
    }
}

#[test]
fn refusals_say_why() {
    let all = Capabilities::v2(7).unwrap();
    let bare = Capabilities::v2(1).unwrap();
    for caps in every_capability_set() {
        for to in [DeviceState::PreCopy, DeviceState::PreCopyP2p] {
            // V2-NO-REWIND: refused with every capability set, also where the state is lacking.
            assert!(path(DeviceState::StopCopy, to, &caps).is_err());
        }
        for to in DeviceState::ALL {
            assert_eq!(path(DeviceState::Error, to, &caps), Err(PathError::FromError));
            let unknown = DeviceState::from_raw(8);
            assert_eq!(path(unknown, to, &caps), Err(PathError::FromUnknown(8)));
        }
    }
    let rewind = PathError::Rewind { from: DeviceState::StopCopy, to: DeviceState::PreCopy };
    assert_eq!(path(DeviceState::StopCopy, DeviceState::PreCopy, &all), Err(rewind));
    assert_eq!(path(DeviceState::Stop, DeviceState::Error, &all), Err(PathError::ToError));
    assert_eq!(path(DeviceState::Stop, DeviceState::Unknown(77), &all), Err(PathError::ToUnknown(77)));
    let lacking = PathError::ToLacking(DeviceState::RunningP2p);
    assert_eq!(path(DeviceState::Stop, DeviceState::RunningP2p, &bare), Err(lacking));
    let lacking = PathError::FromLacking(DeviceState::PreCopy);
    assert_eq!(path(DeviceState::PreCopy, DeviceState::PreCopy, &bare), Err(lacking));
    assert_eq!(lacking.errno(), Errno::EINVAL);
}

#[test]
fn arcs_are_printed_and_stored_by_the_kernels_names() {
    let arc = Arc::new(DeviceState::PreCopyP2p, DeviceState::StopCopy);
    assert_eq!(arc.to_string(), "PRE_COPY_P2P -> STOP_COPY");
    let json = serde_json::to_string(&arc).unwrap();
    assert_eq!(json, r#"{"from":"PRE_COPY_P2P","to":"STOP_COPY"}"#);
    assert_eq!(serde_json::from_str::<Arc>(&json).unwrap(), arc);
}

//! A data section that is mapped beside one that is trapped: how fast data is read and written, and how often
//! each byte is copied on the user's side.
//!
//! ```text
//! cargo bench -p airlift-testkit --bench v1_section [-- --passes 7 --bytes 1073741824]
//! ```
//!
//! A real vfio-user server serves a device in a thread of this process; the user's side of interface v1 drives
//! it over the socket. Machines drift, so that each pass measures every row once, in turns, and the promise is
//! a ratio of rows of the same pass. What the device gives is always the same 1 MiB and what it takes is not
//! kept: memory of the device is no part of what is measured.
#![allow(clippy::unwrap_used, reason = "a benchmark ends where it must")]

use airlift_core::v1::{REGION_TYPE, V1Control, V1Device};
use airlift_core::{DeviceId, DeviceIdentity, DeviceState, MigrationDevice, Piece, Session};
use airlift_testkit::v1::{Counted, Counts, Layout, ServedDevice, ServedOptions, bytes};
use airlift_vfio_user::{Client, ClientOptions, V1Section, VfioUserRegion};
use std::time::Instant;

/// Bytes of the data section, of a transaction, and of what is read or written at a time.
const SECTION: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Save,
    Load,
}

/// What one row of one pass gave.
struct Measured {
    /// Bytes of data a second.
    rate: f64,
    /// Bytes copied on the user's side, for each byte that was delivered.
    copies: Counts,
    moved: u64,
}

struct Row {
    layout: Layout,
    way: Way,
    runs: Vec<Measured>,
}

/// The user's side over the socket, and its counts.
fn connect(served: &ServedDevice) -> (V1Device<Counted<VfioUserRegion>>, impl Fn() -> Counts) {
    let client = Client::connect(served.path(), ClientOptions::default()).unwrap();
    let regions = client.info().unwrap().num_regions;
    let info = |index| client.region_info(index).ok();
    let is_migration = |index: &u32| info(*index).is_some_and(|region| region.kind == Some(REGION_TYPE));
    let index = (0..regions).find(is_migration).unwrap();
    let control = V1Control {
        reset: Box::new({
            let client = client.clone();
            move || client.reset()
        }),
        interrupter: client.interrupter(),
        whole_transactions: false,
    };
    let details = info(index).unwrap();
    let region = Counted::new(VfioUserRegion::new(client, index, details, true).unwrap());
    let counts = region.counts();
    let id = DeviceId::new("bench").unwrap();
    (V1Device::new(id, DeviceIdentity::default(), region, control).unwrap(), counts)
}

/// Reads the device's data to its end; how much that was.
fn save(device: &mut dyn MigrationDevice, buffer: &mut [u8]) -> u64 {
    let Some(Session::Save(mut session)) = device.set_state(DeviceState::StopCopy).unwrap() else {
        panic!("no session")
    };
    let mut moved = 0;
    loop {
        match session.read(buffer).unwrap() {
            Piece::Data { len, .. } => moved += len as u64,
            Piece::End => return moved,
            Piece::Drained => panic!("a pause in STOP_COPY"),
        }
    }
}

fn load(device: &mut dyn MigrationDevice, buffer: &[u8], total: u64) -> u64 {
    let Some(Session::Load(mut session)) = device.set_state(DeviceState::Resuming).unwrap() else {
        panic!("no session")
    };
    let mut moved = 0;
    while moved < total {
        session.begin_chunk(buffer.len() as u64).unwrap();
        session.write(buffer).unwrap();
        session.end_chunk().unwrap();
        moved += buffer.len() as u64;
    }
    moved
}

fn measure(layout: Layout, way: Way, total: u64) -> Measured {
    let section = V1Section {
        size: SECTION as u64,
        mapping: layout.mapping(SECTION as u64),
        whole_transactions: false,
    };
    let state = bytes(1, SECTION);
    let repeat = (total / SECTION as u64).max(1);
    let options = ServedOptions { repeat, precopy: 0, ..ServedOptions::new(section, state, SECTION) };
    let served = ServedDevice::new(options).unwrap();
    let (mut device, counts) = connect(&served);
    let mut buffer = bytes(2, SECTION);
    let before = counts();
    assert_eq!(before.data(), 0);
    let begun = Instant::now();
    let moved = match way {
        Way::Save => save(&mut device, &mut buffer),
        Way::Load => load(&mut device, &buffer, total),
    };
    let seconds = begun.elapsed().as_secs_f64();
    device.set_state(DeviceState::Stop).unwrap();
    assert_eq!(moved, repeat * SECTION as u64);
    match way {
        Way::Save => assert!(buffer == bytes(1, SECTION), "what was read is the device's"),
        Way::Load => assert_eq!(served.taken(), moved),
    }
    Measured { rate: to_f64(moved) / seconds, copies: counts(), moved }
}

/// Exact up to 2^53: more is not moved.
#[allow(clippy::cast_precision_loss, reason = "said above")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn argument(name: &str) -> Option<u64> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).and_then(|value| value.parse().ok())
}

fn main() {
    // Without this word it is run as a test, for whether it works.
    let benched = std::env::args().any(|argument| argument == "--bench");
    let (passes, total) = if benched { (7, 1 << 30) } else { (1, 16 << 20) };
    let passes = argument("--passes").unwrap_or(passes).clamp(1, 1000);
    let total = argument("--bytes").unwrap_or(total).clamp(SECTION as u64, 1 << 40);
    let mut rows: Vec<Row> = [Way::Save, Way::Load]
        .into_iter()
        .flat_map(|way| [Layout::Mapped, Layout::Trapped].map(|layout| Row { layout, way, runs: Vec::new() }))
        .collect();
    for pass in 0..=passes {
        for row in &mut rows {
            eprintln!("pass {pass} of {passes}: {:?}, {:?}", row.way, row.layout);
            let measured = measure(row.layout, row.way, total);
            // The first one warms up.
            if pass > 0 {
                row.runs.push(measured);
            }
        }
    }
    println!("{total} bytes in transactions of {SECTION}, {passes} passes: medians (lowest-highest)\n");
    println!(
        "| | data section | MiB/s | mapped bytes copied per byte | trapped | accesses to fields per MiB |"
    );
    println!("|---|---|---|---|---|---|");
    for row in &rows {
        print_row(row);
    }
    println!();
    for pair in rows.chunks(2) {
        let ratios =
            pair[0].runs.iter().zip(&pair[1].runs).map(|(mapped, trapped)| mapped.rate / trapped.rate);
        println!(
            "{:?}: a mapped section is {:.2} times as fast as a trapped one",
            pair[0].way,
            median(ratios.collect())
        );
    }
}

fn print_row(row: &Row) {
    let mut rates: Vec<f64> = row.runs.iter().map(|run| run.rate / f64::from(1 << 20)).collect();
    rates.sort_by(f64::total_cmp);
    let last = row.runs.last().unwrap();
    let per_byte = |count: u64| to_f64(count) / to_f64(last.moved);
    println!(
        "| {:?} | {:?} | {:.0} ({:.0}-{:.0}) | {:.3} | {:.3} | {:.1} |",
        row.way,
        row.layout,
        median(rates.clone()),
        rates[0],
        rates[rates.len() - 1],
        per_byte(last.copies.read_mapped + last.copies.write_mapped),
        per_byte(last.copies.read_trapped + last.copies.write_trapped),
        per_byte(last.copies.fields) * f64::from(1 << 20),
    );
}

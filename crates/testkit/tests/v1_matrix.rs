//! Devices of interface v1 from one section to another, over the records of the stream: whatever is mapped,
//! however large the sections and the state are, the destination has the source's bytes, in its transactions.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift_core::{DeviceId, DeviceState, Interface, MigrationDevice};
use airlift_testkit::v1::{
    Double, DoubleOptions, Layout, PAGE, Plan, ServedDevice, ServedOptions, bytes, cut, through_records,
};
use airlift_vfio_user::{ClientOptions, V1Section, VfioUserDevice};

/// The source's section, and its largest transaction.
const SOURCE: u64 = 5 * PAGE;
/// Smaller, equal, larger, and prime: below and above.
const DESTINATIONS: [u64; 5] = [2 * PAGE, SOURCE, 9 * PAGE, 12_289, 24_593];
/// Nothing, a byte, exactly one transaction, many, and not a multiple.
const STATES: [u64; 5] = [0, 1, SOURCE, 6 * SOURCE, 3 * SOURCE + 1234];

fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// In which rounds a section of `section` bytes takes transactions of these sizes (V1-ROUNDS).
fn rounds(chunks: &[usize], section: u64) -> Vec<usize> {
    let section = usize_of(section);
    let of = |chunk: &usize| {
        let (whole, rest) = (chunk / section, chunk % section);
        std::iter::repeat_n(section, whole).chain((rest > 0).then_some(rest)).collect::<Vec<_>>()
    };
    chunks.iter().flat_map(of).collect()
}

/// Every case: the source's layout, the destination's, its section, and the bytes of state.
fn all() -> impl Iterator<Item = (Layout, Layout, u64, u64)> {
    Layout::ALL.into_iter().flat_map(|here| {
        Layout::ALL.into_iter().flat_map(move |there| {
            DESTINATIONS
                .into_iter()
                .flat_map(move |section| STATES.into_iter().map(move |state| (here, there, section, state)))
        })
    })
}

#[test]
fn the_sections_are_what_they_are_said_to_be() {
    for prime in [12_289_u64, 24_593] {
        assert!((2..200).all(|n| prime % n != 0), "{prime}");
    }
    assert_eq!(all().count(), 900);
    assert_eq!(rounds(&[10, 3], 4), [4, 4, 2, 3]);
}

// V1-AREAS, V1-CHUNK, V1-ROUNDS
#[test]
fn every_layout_size_and_state_over_regions_in_memory() {
    for (number, (here, there, section, state)) in all().enumerate() {
        let case = format!("{here:?} -> {there:?} of {section}, {state} bytes");
        let data = bytes(number as u64, usize_of(state));
        let chunks = cut(&data, usize_of(SOURCE));
        let sizes: Vec<_> = chunks.iter().map(Vec::len).collect();
        let precopy = chunks.len() / 2;
        let source = Double::new(DoubleOptions::new(here, SOURCE).with(Plan::new(chunks, precopy)));
        let target = Double::new(DoubleOptions::new(there, section).expecting(data.clone()));
        let (mut from, mut to) = (source.device("d0").unwrap(), target.device("d0").unwrap());
        // Frames that are smaller than a transaction, as large, and larger.
        let body = [1000, 20_480, 65_536][number % 3];
        let digests = through_records(&mut from, &mut to, number % 2 == 0, body).unwrap();
        assert_eq!(digests.0, digests.1, "{case}");
        assert!(target.loaded().as_ref() == Some(&data), "{case}");
        let received: Vec<_> = target.received().iter().map(Vec::len).collect();
        assert_eq!(received, rounds(&sizes, section), "{case}");
        assert_eq!((source.state(), target.state()), (DeviceState::Stop, DeviceState::Running));
        assert_eq!([source.violations(), target.violations()].concat(), Vec::<String>::new(), "{case}");
        assert_eq!((source.misplaced(), target.misplaced()), (0, 0), "{case}");
    }
}

fn serve(layout: Layout, section: u64, state: Vec<u8>) -> ServedDevice {
    let section = V1Section { size: section, mapping: layout.mapping(section), whole_transactions: false };
    ServedDevice::new(ServedOptions::new(section, state, usize_of(SOURCE))).unwrap()
}

fn connect(served: &ServedDevice) -> VfioUserDevice {
    let id = DeviceId::new("d0").unwrap();
    VfioUserDevice::connect(id, served.path(), ClientOptions::default()).unwrap()
}

// V1-AREAS, V1-CHUNK, V1-ROUNDS, V1-REGION
#[test]
fn every_layout_and_size_over_sockets_and_mapped_memory() {
    // Each combination of layouts and sections with one state, so that each section of each layout has all
    // of them.
    for (number, (here, there, section, state)) in all().enumerate() {
        let of_source = Layout::ALL.iter().position(|layout| *layout == here).unwrap();
        let of_target = Layout::ALL.iter().position(|layout| *layout == there).unwrap();
        let of_state = STATES.iter().position(|size| *size == state).unwrap();
        if (of_source + of_target) % STATES.len() != of_state {
            continue;
        }
        let case = format!("{here:?} -> {there:?} of {section}, {state} bytes");
        let data = bytes(number as u64, usize_of(state));
        let source = serve(here, SOURCE, data.clone());
        let target = serve(there, section, b"what was there before".to_vec());
        let (mut from, mut to) = (connect(&source), connect(&target));
        for (device, layout, section) in [(&from, here, SOURCE), (&to, there, section)] {
            assert_eq!(device.capabilities().interface, Interface::V1);
            let region = device.migration_region().unwrap();
            let (start, mapped) = layout.areas(section);
            assert_eq!((region.size, &region.mapped, &region.unmapped), (start + section, &mapped, &None));
        }
        let digests = through_records(&mut from, &mut to, number % 2 == 0, 8192).unwrap();
        assert_eq!(digests.0, digests.1, "{case}");
        assert!(target.state() == data, "{case}");
        let given = source.given();
        assert_eq!(given.iter().sum::<usize>(), data.len(), "{case}");
        assert_eq!(target.rounds(), rounds(&given, section), "{case}");
        assert_eq!(from.state().unwrap(), DeviceState::Stop);
        assert_eq!(to.state().unwrap(), DeviceState::Running);
    }
}

//! The downtime estimate: each term counts, bytes are added, and what is unknown is not called short.
#![allow(clippy::unwrap_used)]

use airlift_core::{DeviceId, DeviceTerms, DowntimeEstimate, EstimateInputs, rate, transfer_time};
use proptest::prelude::*;
use std::time::Duration;

const MS: fn(u64) -> Duration = Duration::from_millis;

fn device(name: &str, bytes: u64, quiesce: u64, load: u64) -> DeviceTerms {
    DeviceTerms {
        id: DeviceId::new(name).unwrap(),
        stop_copy_bytes: bytes,
        initial_bytes: 0,
        dirty_bytes: 0,
        rate: None,
        quiesce: MS(quiesce),
        load: MS(load),
    }
}

fn inputs() -> EstimateInputs {
    EstimateInputs {
        memory_dirty_bytes: 50_000_000,
        devices: vec![device("a", 20_000_000, 30, 100), device("b", 30_000_000, 10, 300)],
        bandwidth: Some(1_000_000_000),
        final_dirty_sync: MS(4),
        fixed: MS(8),
        round_trip: MS(1),
        round_trips: 2,
    }
}

#[test]
fn the_terms_are_those_of_the_model() {
    let estimate = DowntimeEstimate::new(&inputs());
    assert_eq!(estimate.quiesce, MS(30), "devices stop in parallel: the slowest counts");
    assert_eq!(estimate.load, MS(300), "and so they load");
    assert_eq!(estimate.memory, Some(MS(50)));
    assert_eq!(estimate.device_data, Some(MS(50)));
    assert_eq!(estimate.without_transfer(), MS(30 + 4 + 300 + 8 + 2));
    assert_eq!(estimate.total(), Some(MS(444)));
    assert!(estimate.fits(MS(444)) && !estimate.fits(MS(443)));
}

#[test]
fn what_pre_copy_has_left_counts_as_device_bytes() {
    let mut inputs = inputs();
    inputs.devices[0].initial_bytes = 100_000_000;
    inputs.devices[1].dirty_bytes = 50_000_000;
    assert_eq!(DowntimeEstimate::new(&inputs).device_data, Some(MS(200)));
}

#[test]
fn a_device_that_is_slower_than_the_connections_makes_the_transfer_as_long_as_its_own() {
    let mut inputs = inputs();
    // 20 MB at 100 MB/s are 200 ms, of which 50 pass while memory is sent.
    inputs.devices[0].rate = Some(100_000_000);
    let estimate = DowntimeEstimate::new(&inputs);
    assert_eq!((estimate.memory, estimate.device_data), (Some(MS(50)), Some(MS(150))));
    // One that is faster than them changes nothing, and neither does one that has nothing left.
    inputs.devices[0].rate = Some(2_000_000_000);
    inputs.devices[1].rate = Some(2_000_000_000);
    assert_eq!(DowntimeEstimate::new(&inputs).device_data, Some(MS(50)));
    inputs.devices[0] = DeviceTerms { rate: Some(0), ..device("a", 0, 0, 0) };
    assert_eq!(DowntimeEstimate::new(&inputs).device_data, Some(MS(30)));
    inputs.devices[0].dirty_bytes = 1;
    assert!(!DowntimeEstimate::new(&inputs).fits(Duration::from_secs(0)), "it takes nothing");
}

#[test]
fn an_unknown_bandwidth_fits_no_limit_unless_nothing_is_left() {
    for bandwidth in [None, Some(0)] {
        let estimate = DowntimeEstimate::new(&EstimateInputs { bandwidth, ..inputs() });
        assert_eq!((estimate.memory, estimate.total()), (None, None));
        assert!(!estimate.fits(Duration::MAX));
        let nothing = EstimateInputs { bandwidth, ..EstimateInputs::default() };
        assert_eq!(DowntimeEstimate::new(&nothing).total(), Some(Duration::ZERO));
    }
}

#[test]
fn absurd_figures_are_cut_not_wrapped() {
    let mut inputs = inputs();
    inputs.bandwidth = Some(1);
    inputs.memory_dirty_bytes = u64::MAX;
    inputs.devices = vec![device("a", u64::MAX, u64::MAX, u64::MAX), device("b", u64::MAX, 0, 0)];
    inputs.devices[0].dirty_bytes = u64::MAX;
    inputs.round_trip = Duration::MAX;
    let estimate = DowntimeEstimate::new(&inputs);
    assert_eq!(estimate.total(), Some(Duration::MAX));
    assert_eq!(rate(u64::MAX, Duration::from_nanos(1)), Some(u64::MAX));
    assert_eq!(rate(1, Duration::ZERO), None);
}

proptest! {
    /// Against the same in floating point; never shorter than the true time.
    #[test]
    fn transfer_times_are_right(bytes in 1..1_u64 << 50, bandwidth in 1..1_u64 << 40) {
        let time = transfer_time(bytes, Some(bandwidth)).unwrap();
        prop_assert!(time.as_nanos() * u128::from(bandwidth) >= u128::from(bytes) * 1_000_000_000);
        let shorter = time - Duration::from_nanos(1);
        prop_assert!(shorter.as_nanos() * u128::from(bandwidth) < u128::from(bytes) * 1_000_000_000);
    }

    #[test]
    fn more_of_anything_is_never_shorter(more in 0..1_u64 << 40, term in 0..7_usize) {
        let base = DowntimeEstimate::new(&inputs()).total().unwrap();
        let mut with = inputs();
        match term {
            0 => with.memory_dirty_bytes += more,
            1 => with.devices[0].stop_copy_bytes += more,
            2 => with.devices[1].load += MS(more),
            3 => with.devices[0].quiesce += MS(more),
            4 => with.final_dirty_sync += MS(more),
            5 => with.fixed += MS(more),
            _ => with.round_trip += MS(more),
        }
        prop_assert!(DowntimeEstimate::new(&with).total().unwrap() >= base);
    }
}

//! When the guest is stopped: not before the estimate fits and initial data is acknowledged, and a
//! pre-copy that gets nowhere says why.
#![allow(clippy::unwrap_used)]

use airlift_core::{
    Convergence, ConvergenceConfig, Decision, DeviceId, DeviceLeft, DeviceTerms, DowntimeEstimate,
    EstimateInputs, Round, StallCause, StallPolicy, Timestamp,
};
use std::time::Duration;

const LIMIT: Duration = Duration::from_millis(300);
const BANDWIDTH: u64 = 1_000_000_000;
/// What fits the limit at that bandwidth.
const FITS: u64 = BANDWIDTH / 10 * 3;

fn config(policy: StallPolicy) -> ConvergenceConfig {
    ConvergenceConfig { downtime_limit: LIMIT, stall_rounds: 3, policy, deadline: None }
}

fn id() -> DeviceId {
    DeviceId::new("gpu").unwrap()
}

/// A round that leaves these bytes of memory and of one device.
fn round(memory: u64, device: u64, acknowledged: bool) -> Round {
    with_terms(memory, &device_terms(device), acknowledged)
}

fn device_terms(bytes: u64) -> DeviceTerms {
    DeviceTerms {
        id: id(),
        stop_copy_bytes: bytes,
        initial_bytes: 0,
        dirty_bytes: 0,
        rate: None,
        quiesce: Duration::ZERO,
        load: Duration::ZERO,
    }
}

fn with_terms(memory: u64, terms: &DeviceTerms, acknowledged: bool) -> Round {
    let inputs = EstimateInputs {
        memory_dirty_bytes: memory,
        devices: vec![terms.clone()],
        bandwidth: Some(BANDWIDTH),
        ..EstimateInputs::default()
    };
    Round {
        now: Timestamp::default(),
        memory_bytes: memory,
        devices: vec![DeviceLeft { id: id(), bytes: terms.bytes(), rate: terms.rate, acknowledged }],
        estimate: DowntimeEstimate::new(&inputs),
        bandwidth: Some(BANDWIDTH),
        memory_dirty_rate: Some(BANDWIDTH / 10),
    }
}

/// Feeds the same round until something else than `Continue` is said; how many rounds that took.
fn until_said(convergence: &mut Convergence, round: &Round) -> (u32, Decision) {
    for n in 1..100 {
        let decision = convergence.round(round);
        if decision != Decision::Continue {
            return (n, decision);
        }
    }
    panic!("nothing was said in 100 rounds");
}

#[test]
fn switches_when_the_estimate_fits_and_not_a_byte_before() {
    let mut convergence = Convergence::new(config(StallPolicy::Wait));
    assert_eq!(convergence.round(&round(10 * FITS, 0, true)), Decision::Continue);
    assert_eq!(convergence.round(&round(FITS + 1, 0, true)), Decision::Continue);
    assert_eq!(convergence.round(&round(FITS, 0, true)), Decision::Switch { forced: None });
}

// V2-INITIAL, I19
#[test]
fn v2_initial_unacknowledged_initial_data_holds_the_switch() {
    let mut convergence = Convergence::new(config(StallPolicy::Wait));
    assert_eq!(convergence.round(&round(0, 0, false)), Decision::Continue);
    let (_, said) = until_said(&mut convergence, &round(0, 0, false));
    assert_eq!(said, Decision::Stalled { cause: StallCause::InitialData { devices: vec![id()] } });
    assert_eq!(convergence.round(&round(0, 0, true)), Decision::Switch { forced: None });
}

#[test]
fn a_stall_is_said_once_and_again_only_after_progress() {
    let mut convergence = Convergence::new(config(StallPolicy::Wait));
    let stuck = round(2 * FITS, 0, true);
    let (rounds, said) = until_said(&mut convergence, &stuck);
    assert_eq!(rounds, 1 + 3, "the first round is progress, then three that are not");
    assert!(matches!(said, Decision::Stalled { cause: StallCause::NoProgress { .. } }));
    for _ in 0..10 {
        assert_eq!(convergence.round(&stuck), Decision::Continue);
    }
    assert_eq!(convergence.round(&round(2 * FITS - 1, 0, true)), Decision::Continue);
    let (rounds, said) = until_said(&mut convergence, &stuck);
    assert_eq!(rounds, 3);
    assert!(matches!(said, Decision::Stalled { .. }));
}

#[test]
fn slow_progress_is_no_stall() {
    let mut convergence = Convergence::new(config(StallPolicy::Abort));
    for n in 0..50 {
        assert_eq!(convergence.round(&round(10 * FITS - n, 0, true)), Decision::Continue);
        assert_eq!(convergence.round(&round(11 * FITS, 0, true)), Decision::Continue);
    }
}

#[test]
fn the_policy_decides_what_a_stall_leads_to() {
    let stuck = round(2 * FITS, 0, true);
    let (_, said) = until_said(&mut Convergence::new(config(StallPolicy::Force)), &stuck);
    assert!(matches!(said, Decision::Switch { forced: Some(StallCause::NoProgress { .. }) }));
    let (_, said) = until_said(&mut Convergence::new(config(StallPolicy::Abort)), &stuck);
    assert!(matches!(said, Decision::Abort { deadline_passed: false, .. }));
}

#[test]
fn the_deadline_ends_pre_copy_that_still_makes_progress() {
    let deadline = Timestamp(Duration::from_secs(60));
    let late = Round { now: deadline, ..round(2 * FITS, 0, true) };
    for (policy, forced) in
        [(StallPolicy::Wait, false), (StallPolicy::Abort, false), (StallPolicy::Force, true)]
    {
        let config = ConvergenceConfig { deadline: Some(deadline), ..config(policy) };
        let mut convergence = Convergence::new(config);
        assert_eq!(convergence.round(&round(3 * FITS, 0, true)), Decision::Continue);
        match convergence.round(&late) {
            Decision::Switch { forced: Some(_) } => assert!(forced),
            Decision::Abort { deadline_passed, .. } => assert!(deadline_passed && !forced),
            other => panic!("{other:?}"),
        }
        // What fits is not given up for being late.
        let fits = Round { now: deadline, ..round(0, 0, true) };
        assert_eq!(convergence.round(&fits), Decision::Switch { forced: None });
    }
}

/// The cause that a stall with this round is given.
fn cause(round: &Round) -> StallCause {
    match until_said(&mut Convergence::new(config(StallPolicy::Wait)), round).1 {
        Decision::Stalled { cause } => cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn causes_are_named_with_their_figures() {
    let fast = Round { memory_dirty_rate: Some(BANDWIDTH), ..round(2 * FITS, 0, true) };
    let expected = StallCause::MemoryDirtyRate { dirty_rate: BANDWIDTH, bandwidth: BANDWIDTH };
    assert_eq!(cause(&fast), expected);
    assert!(expected.to_string().contains("1000000000 bytes of memory a second"));

    let device = round(0, 2 * FITS, true);
    let StallCause::DeviceData { devices, bandwidth } = cause(&device) else { panic!() };
    assert_eq!((devices[0].bytes, bandwidth), (2 * FITS, BANDWIDTH));

    // By a device that is slower than the connections, and its rate is named.
    let mut terms = device_terms(FITS / 2);
    terms.rate = Some(BANDWIDTH / 4);
    let slow = cause(&with_terms(0, &terms, true));
    assert!(matches!(slow, StallCause::DeviceData { .. }), "{slow:?}");
    assert!(slow.to_string().contains("at 250000000 a second by itself"), "{slow}");

    // Data that still is on its way is the initial data that nobody has acknowledged.
    let initial = round(0, 2 * FITS, false);
    assert_eq!(cause(&initial), StallCause::InitialData { devices: vec![id()] });

    let mut terms = DeviceTerms { load: 2 * LIMIT, ..device_terms(0) };
    let slow_load = with_terms(0, &terms, true);
    assert_eq!(cause(&slow_load), StallCause::FixedTerms { time: 2 * LIMIT, limit: LIMIT });
    // A load that leaves room for few bytes makes device data the cause, not memory.
    terms.load = LIMIT / 2;
    terms.stop_copy_bytes = FITS / 2 + 1;
    assert!(matches!(cause(&with_terms(0, &terms, true)), StallCause::DeviceData { .. }));

    let inputs = EstimateInputs { memory_dirty_bytes: 1, ..EstimateInputs::default() };
    let estimate = DowntimeEstimate::new(&inputs);
    let silent = Round { bandwidth: None, estimate, ..round(1, 0, true) };
    assert_eq!(cause(&silent), StallCause::NoBandwidth);
}

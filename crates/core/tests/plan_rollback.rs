//! The way back, with everything failing: whatever state a failed arc left a device in, it ends
//! running or quarantined and named, never stopped, and never ahead of its peers.
#![allow(clippy::unwrap_used)]

use airlift_core::{
    Action, Arc, Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceState, Errno, Fate, Recovered,
    Recovery, ResetPolicy, ResumeDevice, ResumePlan, Rollback, Stage, StageKind, path, recover,
};

use DeviceState::{PreCopy, PreCopyP2p, Running, RunningP2p, Stop, StopCopy};

type Found = Result<DeviceState, DeviceError>;

fn caps(flags: u64) -> Capabilities {
    Capabilities::v2(flags).unwrap()
}

fn every_outcome() -> Vec<Found> {
    let mut all: Vec<Found> = DeviceState::ALL.map(Ok).to_vec();
    all.push(Ok(DeviceState::Unknown(42)));
    all.push(Err(DeviceError::new(DeviceErrorKind::Lost, "GET", "the server is gone")));
    all.push(Err(DeviceError::new(DeviceErrorKind::TimedOut, "GET", "no answer")));
    all.push(Err(DeviceError::refused("GET", Errno::EIO)));
    all
}

fn device(name: &str, flags: u64, ran_before: bool, found: Found) -> ResumeDevice {
    ResumeDevice { id: DeviceId::new(name).unwrap(), capabilities: caps(flags), ran_before, found }
}

fn fates(rollback: Rollback) -> Vec<(String, Fate)> {
    rollback.finish().into_iter().map(|r| (r.device.to_string(), r.fate)).collect()
}

/// Carries on with every outcome that a step can have, `depth` steps deep; deeper steps succeed.
fn every_way(
    rollback: &Rollback,
    depth: u8,
    visited: &mut u64,
    check: &impl Fn(&Stage),
    end: &impl Fn(Vec<Recovered>),
) {
    let mut rollback = rollback.clone();
    let Some(stage) = rollback.next_stage() else {
        *visited += 1;
        end(rollback.finish());
        return;
    };
    check(&stage);
    let outcomes = if depth > 0 { every_outcome() } else { Vec::new() };
    for step in &stage.steps {
        for outcome in &outcomes {
            let mut other = rollback.clone();
            for s in &stage.steps {
                let found = if s.device == step.device { outcome.clone() } else { Ok(s.action.target()) };
                other.report(&s.device, found);
            }
            every_way(&other, depth - 1, visited, check, end);
        }
    }
    for step in &stage.steps {
        rollback.report(&step.device, Ok(step.action.target()));
    }
    every_way(&rollback, depth.saturating_sub(1), visited, check, end);
}

#[test]
fn after_any_failed_arc_a_device_that_ran_ends_running_or_quarantined() {
    let mut visited = 0;
    for flags in [1, 3, 5, 7] {
        for policy in [ResetPolicy::Never, ResetPolicy::Allowed] {
            // Whatever arc failed, the device was then found in one of these ways.
            for reached in every_outcome() {
                let rollback = Rollback::new(vec![device("a", flags, true, reached)], policy);
                let check = |stage: &Stage| {
                    let reset = stage.steps.iter().any(|s| s.action == Action::Reset);
                    assert!(!reset || policy == ResetPolicy::Allowed, "{stage:?}");
                };
                let end = |end: Vec<Recovered>| match &end[0].fate {
                    Fate::Running => assert!(!end[0].was_reset || policy == ResetPolicy::Allowed),
                    Fate::Quarantined { reason } => assert!(!reason.is_empty()),
                    Fate::Stopped => panic!("a device that ran was left stopped"),
                };
                every_way(&rollback, 4, &mut visited, &check, &end);
            }
        }
    }
    println!("rollback ends visited: {visited}");
    assert!(visited >= 3_000, "{visited}");
}

#[test]
fn a_device_that_was_stopped_before_is_never_run() {
    let mut visited = 0;
    for flags in [1, 3, 5, 7] {
        for reached in every_outcome() {
            let rollback = Rollback::new(vec![device("a", flags, false, reached)], ResetPolicy::Never);
            every_way(
                &rollback,
                2,
                &mut visited,
                &|stage| {
                    assert!(stage.steps.iter().all(|s| s.action == Action::SetState(Stop)), "{stage:?}");
                },
                &|end| assert_ne!(end[0].fate, Fate::Running),
            );
        }
    }
    assert!(visited > 100);
}

/// The rule of order over two and three devices from every pair of states, with failures on the way.
#[test]
fn no_device_runs_while_a_peer_is_stopped() {
    let mut ends = 0;
    for a in every_outcome() {
        for b in every_outcome() {
            for flags in [3, 7] {
                let devices = vec![
                    device("a", flags, true, a.clone()),
                    device("b", 7, true, b.clone()),
                    device("c", 3, true, Ok(StopCopy)),
                ];
                for policy in [ResetPolicy::Never, ResetPolicy::Allowed] {
                    in_order(devices.clone(), policy, &mut ends);
                }
            }
        }
    }
    println!("ordered rollbacks: {ends}");
    assert!(ends > 5_000);
}

/// Runs the rollback with every device failing in turn, in turn at each of its steps, and checks at
/// every stage.
fn in_order(devices: Vec<ResumeDevice>, policy: ResetPolicy, ends: &mut u64) {
    let ways = [None, Some((0, Ok(Stop))), Some((1, Ok(Stop))), Some((2, Ok(StopCopy)))];
    let errors = (0..3).map(|n| Some((n, Ok(DeviceState::Error))));
    for way in ways.into_iter().chain(errors) {
        for failing_stage in 0..3 {
            let mut rollback = Rollback::new(devices.clone(), policy);
            let mut found: Vec<Found> = devices.iter().map(|d| d.found.clone()).collect();
            let mut at = 0;
            while let Some(stage) = rollback.next_stage() {
                assert!(at < 20, "does not end");
                let quarantined = |n: usize| {
                    let fate = rollback.clone().finish()[n].fate.clone();
                    // Not asked for anything although it is not where it belongs: given up.
                    matches!(fate, Fate::Quarantined { .. })
                        && !stage.steps.iter().any(|s| s.device == devices[n].id)
                };
                let runs = stage.steps.iter().any(|s| s.action == Action::SetState(Running));
                for n in 0..devices.len() {
                    let behind = found[n].as_ref().is_ok_and(|s| !s.is_live());
                    assert!(!(runs && behind) || quarantined(n), "{n} is behind {found:?} in {stage:?}");
                }
                if stage.kind == StageKind::PeerQuiet {
                    for step in &stage.steps {
                        let n = devices.iter().position(|d| d.id == step.device).unwrap();
                        let from = found[n].clone().unwrap();
                        let walk = path(from, step.action.target(), &devices[n].capabilities).unwrap();
                        assert!(walk.iter().all(|arc| arc.to != Running), "{from} over RUNNING");
                    }
                }
                for step in &stage.steps {
                    let n = devices.iter().position(|d| d.id == step.device).unwrap();
                    found[n] = match &way {
                        Some((failing, reached)) if *failing == n && at == failing_stage => reached.clone(),
                        _ => Ok(step.action.target()),
                    };
                    rollback.report(&step.device, found[n].clone());
                }
                at += 1;
            }
            for (name, fate) in fates(rollback) {
                assert_ne!(fate, Fate::Stopped, "{name}");
            }
            *ends += 1;
        }
    }
}

#[test]
fn the_plan_from_the_middle_of_a_stop() {
    let devices = vec![
        device("a", 7, true, Ok(StopCopy)),
        device("b", 7, true, Ok(PreCopyP2p)),
        device("c", 1, true, Ok(Stop)),
        device("d", 7, true, Ok(PreCopy)),
        device("e", 7, false, Ok(StopCopy)),
        device("f", 7, true, Ok(DeviceState::Error)),
    ];
    let plan = ResumePlan::new(devices.clone(), ResetPolicy::Never);
    let steps = |n: usize| -> Vec<(String, DeviceState)> {
        let stage = &plan.stages()[n];
        stage.steps.iter().map(|s| (s.device.to_string(), s.action.target())).collect()
    };
    let named = |list: &[(&str, DeviceState)]| -> Vec<(String, DeviceState)> {
        list.iter().map(|(name, state)| ((*name).into(), *state)).collect()
    };
    assert_eq!(plan.stages().len(), 2);
    assert_eq!(steps(0), named(&[("a", RunningP2p), ("b", RunningP2p), ("e", Stop)]));
    assert_eq!(steps(1), named(&[("a", Running), ("b", Running), ("c", Running), ("d", Running)]));
    let fate = |n: usize| plan.outcome()[n].fate.clone();
    assert_eq!((fate(0), fate(3), fate(4)), (Fate::Running, Fate::Running, Fate::Stopped));
    let Fate::Quarantined { reason } = fate(5) else { panic!("{:?}", fate(5)) };
    assert!(reason.contains("ERROR") && reason.contains("policy"), "{reason}");

    let plan = ResumePlan::new(devices, ResetPolicy::Allowed);
    let kinds: Vec<_> = plan.stages().iter().map(|s| s.kind).collect();
    assert_eq!(kinds, [StageKind::PeerQuiet, StageKind::Reset, StageKind::Run]);
    let last = &plan.outcome()[5];
    assert_eq!((&last.fate, last.was_reset), (&Fate::Running, true));
}

#[test]
fn a_failure_before_the_stop_takes_one_stage() {
    let devices = vec![
        device("a", 7, true, Ok(PreCopy)),
        device("b", 3, true, Ok(Running)),
        device("c", 5, true, Ok(PreCopy)),
    ];
    let plan = ResumePlan::new(devices, ResetPolicy::Never);
    assert_eq!(plan.stages().len(), 1);
    assert_eq!(plan.stages()[0].steps.len(), 2);
}

#[test]
fn stuck_and_silent_devices_are_given_up_and_the_others_go_on() {
    let devices = vec![device("a", 3, true, Ok(StopCopy)), device("b", 3, true, Ok(StopCopy))];
    let (a, b) = (devices[0].id.clone(), devices[1].id.clone());
    let mut rollback = Rollback::new(devices.clone(), ResetPolicy::Never);
    let _ = rollback.next_stage().unwrap();
    rollback.abandon(&b, "its worker has not answered for 30 s");
    rollback.report(&a, Ok(RunningP2p));
    let stage = rollback.next_stage().unwrap();
    assert_eq!((stage.kind, stage.steps.len()), (StageKind::Run, 1));
    rollback.report(&a, Ok(Running));
    assert!(rollback.next_stage().is_none());
    let end = rollback.finish();
    assert_eq!(end[0].fate, Fate::Running);
    assert!(matches!(&end[1].fate, Fate::Quarantined { reason } if reason.contains("30 s")));

    // No result at all counts as being stuck.
    let mut rollback = Rollback::new(devices, ResetPolicy::Never);
    let _ = rollback.next_stage().unwrap();
    rollback.report(&a, Ok(RunningP2p));
    let stage = rollback.next_stage().unwrap();
    assert!(stage.steps.iter().all(|s| s.device == a));
}

// V2-ABORT-LOAD: RESUMING is left by a reset.
#[test]
fn recovery_of_one_device() {
    let walk = |states: &[DeviceState]| {
        Recovery::Walk(states.windows(2).map(|pair| Arc::new(pair[0], pair[1])).collect())
    };
    let of = |state, ran, policy| recover(&Ok(state), ran, &caps(7), policy);
    assert_eq!(of(Running, true, ResetPolicy::Never), Recovery::AlreadyThere);
    assert_eq!(of(StopCopy, true, ResetPolicy::Never), walk(&[StopCopy, Stop, RunningP2p, Running]));
    assert_eq!(of(StopCopy, false, ResetPolicy::Never), walk(&[StopCopy, Stop]));
    assert_eq!(of(PreCopy, true, ResetPolicy::Never), walk(&[PreCopy, Running]));
    for lost in [DeviceState::Error, DeviceState::Resuming, DeviceState::Unknown(8)] {
        assert_eq!(of(lost, true, ResetPolicy::Allowed), Recovery::Reset { then: Vec::new() });
        assert!(matches!(of(lost, true, ResetPolicy::Never), Recovery::Quarantine { .. }));
    }
    let then = vec![Arc::new(Running, RunningP2p), Arc::new(RunningP2p, Stop)];
    assert_eq!(of(DeviceState::Error, false, ResetPolicy::Allowed), Recovery::Reset { then });
    // A device that does not answer would not answer a reset.
    let gone = Err(DeviceError::new(DeviceErrorKind::TimedOut, "GET", "no answer"));
    assert!(matches!(recover(&gone, true, &caps(7), ResetPolicy::Allowed), Recovery::Quarantine { .. }));
}

#[test]
fn a_device_whose_steps_fail_is_tried_twice_and_holds_nobody_up_for_longer() {
    let devices = vec![device("a", 3, true, Ok(StopCopy)), device("b", 3, true, Ok(StopCopy))];
    let (a, b) = (devices[0].id.clone(), devices[1].id.clone());
    let mut rollback = Rollback::new(devices, ResetPolicy::Never);
    let mut kinds = Vec::new();
    let mut tries = 0;
    while let Some(stage) = rollback.next_stage() {
        kinds.push(stage.kind);
        for step in &stage.steps {
            let stuck = step.device == b;
            tries += u32::from(stuck);
            rollback.report(&step.device, Ok(if stuck { StopCopy } else { step.action.target() }));
        }
        assert!(kinds.len() < 10);
    }
    assert_eq!(tries, 2);
    // The first device waits for the second try, and runs when the other one is given up.
    assert_eq!(kinds, [StageKind::PeerQuiet, StageKind::PeerQuiet, StageKind::Run]);
    let end = rollback.finish();
    assert_eq!((&end[0].device, &end[0].fate), (&a, &Fate::Running));
    assert!(matches!(&end[1].fate, Fate::Quarantined { reason } if reason.contains("STOP_COPY")));
}

//! Plans over several devices: all are quiescent before one stops, all answer before one runs, and
//! what cannot be ordered is refused by name (V2-P2P-BARRIER).
#![allow(clippy::unwrap_used)]

use airlift_core::{
    Action, Capabilities, DeviceId, DeviceState, PausePlan, PeerDma, PlanDevice, PlanRefusal, QuiescePlan,
    RunPlan, Stage, StageKind, Unfit, path,
};

use DeviceState::{PreCopy, PreCopyP2p, Running, RunningP2p, Stop, StopCopy};

fn device(name: &str, flags: u64, state: DeviceState) -> PlanDevice {
    let capabilities = Capabilities::v2(flags).unwrap();
    PlanDevice { id: DeviceId::new(name).unwrap(), capabilities, state }
}

fn steps(stage: &Stage) -> Vec<(&str, DeviceState)> {
    stage.steps.iter().map(|s| (s.device.as_str(), s.action.target())).collect()
}

/// All states that the devices go through, arc by arc, with every arc of a stage before the next.
fn walk(
    devices: &[PlanDevice],
    stages: &[Stage],
    mut each: impl FnMut(&[DeviceState], &Stage),
) -> Vec<DeviceState> {
    let mut states: Vec<_> = devices.iter().map(|d| d.state).collect();
    for stage in stages {
        for step in &stage.steps {
            let n = devices.iter().position(|d| d.id == step.device).unwrap();
            let Action::SetState(target) = step.action else { panic!("a plan resets") };
            for arc in path(states[n], target, &devices[n].capabilities).unwrap() {
                states[n] = arc.to;
                each(&states, stage);
            }
        }
    }
    states
}

const RUNNING_STATES: [(u64, DeviceState); 8] = [
    (3, Running),
    (3, RunningP2p),
    (3, Stop),
    (7, Running),
    (7, RunningP2p),
    (7, PreCopy),
    (7, PreCopyP2p),
    (7, Stop),
];

// I14
#[test]
fn no_device_stops_while_another_can_still_write_to_it() {
    let mut checked = 0;
    for (a_flags, a) in RUNNING_STATES {
        for (b_flags, b) in RUNNING_STATES {
            for (c_flags, c) in RUNNING_STATES {
                let devices = [device("a", a_flags, a), device("b", b_flags, b), device("c", c_flags, c)];
                let quiesce = QuiescePlan::new(&devices, PeerDma::Possible).unwrap();
                let pause = PausePlan::new(&devices, PeerDma::Possible).unwrap();
                for (stages, end) in [(quiesce.stages(), StopCopy), (pause.stages(), Stop)] {
                    let ended = walk(&devices, stages, |states, stage| {
                        let writes = states.iter().any(|s| matches!(s, Running | PreCopy));
                        let someone_stops = stage.kind == StageKind::Stop;
                        assert!(!(writes && someone_stops), "{states:?} in {stage:?}");
                        assert!(someone_stops || stage.kind == StageKind::PeerQuiet);
                    });
                    assert_eq!(ended, [end; 3]);
                    checked += 1;
                }
                assert!(!quiesce.peer_dma_assumed_away());
            }
        }
    }
    assert_eq!(checked, 2 * 8 * 8 * 8);
}

#[test]
fn stages_of_a_mixed_set_under_the_declaration() {
    let devices = [device("gpu", 7, PreCopy), device("nic", 3, Running), device("old", 1, Running)];
    let plan = QuiescePlan::new(&devices, PeerDma::AssumeNone).unwrap();
    assert!(plan.peer_dma_assumed_away());
    assert_eq!(steps(&plan.stages()[0]), [("gpu", PreCopyP2p), ("nic", RunningP2p)]);
    assert_eq!(steps(&plan.stages()[1]), [("gpu", StopCopy), ("nic", StopCopy), ("old", StopCopy)]);
    assert_eq!(plan.stages().len(), 2);
    let skipped = plan.skip_p2p();
    assert_eq!(skipped.stages().len(), 1);
    assert_eq!(skipped.stages()[0].kind, StageKind::Stop);
}

#[test]
fn several_devices_without_p2p_are_refused_by_name() {
    let devices = [device("a", 7, Running), device("b", 5, Running), device("c", 1, Running)];
    let lacking = vec![devices[1].id.clone(), devices[2].id.clone()];
    let refusal = PlanRefusal::PeerDma { lacking, v1: false };
    assert_eq!(QuiescePlan::new(&devices, PeerDma::Possible), Err(refusal.clone()));
    assert_eq!(PausePlan::new(&devices, PeerDma::Possible), Err(refusal.clone()));
    let stopped = devices.clone().map(|d| PlanDevice { state: Stop, ..d });
    assert_eq!(RunPlan::new(&stopped, PeerDma::Possible), Err(refusal.clone()));
    assert!(refusal.to_string().contains("b, c have no P2P"), "{refusal}");
    assert!(refusal.to_string().contains("--assume-no-peer-dma"), "{refusal}");
    // A device alone has no peers.
    let alone = QuiescePlan::new(&devices[2..], PeerDma::Possible).unwrap();
    assert_eq!(steps(&alone.stages()[0]), [("c", StopCopy)]);
    assert!(!alone.peer_dma_assumed_away());
}

// V1-ARCS
#[test]
fn several_devices_of_v1_are_refused_and_the_text_says_that_v1_has_no_p2p() {
    let v1 = |id| PlanDevice { capabilities: Capabilities::v1(4096, false), ..device(id, 7, Running) };
    let devices = [device("a", 7, Running), v1("old")];
    let refusal = QuiescePlan::new(&devices, PeerDma::Possible).unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("old has no P2P states (migration interface v1 knows none)"), "{text}");
    // Declared, the device of v2 still goes through its P2P state, and v1 stops with one write.
    let plan = QuiescePlan::new(&devices, PeerDma::AssumeNone).unwrap();
    assert_eq!(steps(&plan.stages()[0]), [("a", RunningP2p)]);
    assert_eq!(steps(&plan.stages()[1]), [("a", StopCopy), ("old", StopCopy)]);
    assert!(plan.peer_dma_assumed_away());
}

#[test]
fn devices_in_unfit_states_are_refused_by_name() {
    let odd = [DeviceState::Error, DeviceState::Resuming, DeviceState::Unknown(9), PreCopy];
    for state in odd {
        let devices = [device("a", 3, Running), device("b", 3, state)];
        let unfit = vec![Unfit { device: devices[1].id.clone(), state }];
        let refusal = PlanRefusal::Unfit { devices: unfit };
        assert_eq!(QuiescePlan::new(&devices, PeerDma::Possible), Err(refusal.clone()), "{state}");
        assert_eq!(PausePlan::new(&devices, PeerDma::Possible), Err(refusal), "{state}");
    }
    // To run, a device must have been loaded: STOP, or further.
    for state in [StopCopy, DeviceState::Resuming, DeviceState::Error, PreCopy] {
        assert!(RunPlan::new(&[device("a", 7, state)], PeerDma::Possible).is_err(), "{state}");
    }
}

#[test]
fn no_device_runs_before_all_answer_their_peers() {
    for a in [Stop, RunningP2p, Running] {
        for b in [Stop, RunningP2p] {
            let devices = [device("a", 7, a), device("b", 3, b)];
            let plan = RunPlan::new(&devices, PeerDma::Possible).unwrap();
            let ended = walk(&devices, plan.stages(), |states, stage| {
                assert!(stage.kind == StageKind::PeerQuiet || !states.contains(&Stop), "{states:?}");
                assert!(stage.kind == StageKind::Run || states[1] != Running, "{states:?}");
            });
            assert_eq!(ended, [Running; 2]);
        }
    }
    let plan = RunPlan::new(&[device("a", 7, Running)], PeerDma::Possible).unwrap();
    assert!(plan.stages().is_empty());
    let folded = RunPlan::new(&[device("a", 1, Stop)], PeerDma::Possible).unwrap();
    assert_eq!(steps(&folded.stages()[0]), [("a", Running)]);
}

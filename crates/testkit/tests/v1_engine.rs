//! The engine over a device that judges its user: whatever fails at whatever access, the engine keeps the
//! rules of the interface, and no device is taken for saved or loaded that is not.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift::set::{ChunkSink, Feeder, LoadingSet, Quiesce, SetError, SetEvent, SinkClosed};
use airlift::{DeviceSet, Environment, PooledBuf};
use airlift_core::{DeviceState, Errno, Fate, ResetPolicy, Side};
use airlift_stream::{FrameBuf, FrameHeader, HEADER_LEN, Limits};
use airlift_testkit::v1::{Double, DoubleOptions, Fault, Layout, Plan, Wrong, bytes, cut};
use std::sync::Mutex;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(20);

/// Hands every frame to the other side at once.
struct Through {
    feeder: Mutex<Option<Feeder>>,
    body: usize,
}

impl ChunkSink for Through {
    fn buffer(&self, _device: u32, _wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        Ok(Some(FrameBuf::new(self.body)))
    }

    fn send(&self, _device: u32, frame: FrameBuf) -> Result<(), SinkClosed> {
        let frame = frame.sealed().unwrap();
        let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
        let feeder = self.feeder.lock().unwrap();
        let fed =
            feeder.as_ref().is_some_and(|f| f.feed(header, PooledBuf::from(frame[HEADER_LEN..].to_vec())));
        if fed { Ok(()) } else { Err(SinkClosed) }
    }
}

fn set(double: &Double, side: Side) -> DeviceSet {
    let device = double.device("nic0").unwrap();
    DeviceSet::new(vec![Box::new(device)], side, Environment::default()).unwrap()
}

/// How a move by sets alone has ended: on the source's side, and on the destination's.
struct Moved {
    source: Result<(), SetError>,
    destination: Result<(), SetError>,
    /// Of the source's device, where it was brought back.
    fate: Option<Fate>,
}

/// Waits until the destination's stream has ended or failed.
fn loaded(loading: LoadingSet) -> Result<(), SetError> {
    let events = loading.events();
    loop {
        match events.recv_timeout(LONG).unwrap() {
            SetEvent::Ended { .. } => break,
            SetEvent::Failed { error, .. } => {
                return Err(SetError::Device { device: loading.ids()[0].clone(), fault: error });
            }
            _ => {}
        }
    }
    match loading.finish(LONG) {
        Ok(_) => Ok(()),
        Err(failed) => Err(failed.error.clone()),
    }
}

fn migrate(here: &Double, there: &Double, body: usize) -> Moved {
    let nobody = |error| Moved { source: Ok(()), destination: Err(error), fate: None };
    let loading = match set(there, Side::Destination).start_loading(100_000, LONG) {
        Ok(loading) => loading,
        Err(failed) => return nobody(failed.error.clone()),
    };
    let through = std::sync::Arc::new(Through { feeder: Mutex::new(Some(loading.feeder())), body });
    let sink: std::sync::Arc<dyn ChunkSink> = std::sync::Arc::clone(&through) as _;
    let source = set(here, Side::Source).start_saving(&sink, LONG);
    let (error, back) = match source.and_then(|saving| saving.quiesce(Quiesce::default(), LONG)) {
        Err(failed) => (failed.error.clone(), failed.roll_back(ResetPolicy::Never, LONG)),
        Ok((stopped, _)) => {
            let mut draining = stopped.drain(vec![None]);
            match draining.poll(LONG) {
                Ok(true) => {
                    let destination = loaded(loading);
                    let _ = draining.finish().unwrap().finish(LONG);
                    return Moved { source: Ok(()), destination, fate: None };
                }
                Ok(false) => panic!("it hangs"),
                Err(error) => (error, draining.roll_back(ResetPolicy::Never, LONG)),
            }
        }
    };
    *through.feeder.lock().unwrap() = None;
    let _ = loading.abandon().reset(LONG);
    let destination = Ok(());
    Moved { source: Err(error), destination, fate: Some(back.fates[0].fate.clone()) }
}

fn doubles(layout: Layout) -> (Double, Double, Vec<u8>) {
    let data = bytes(7, 5000);
    let plan = Plan::new(cut(&data, 1800), 2);
    let here = Double::new(DoubleOptions::new(layout, 4096).with(plan));
    // Smaller than a transaction: rounds are made.
    let there = Double::new(DoubleOptions::new(layout, 1024).expecting(data.clone()));
    (here, there, data)
}

fn judge(what: &str, here: &Double, there: &Double) {
    for (side, double) in [("source", here), ("destination", there)] {
        let violations = double.violations();
        assert!(violations.is_empty(), "{what}: the {side}'s user did {violations:?}");
    }
}

// V1-CHUNK, V1-AREAS, V1-OUTSTANDING
#[test]
fn the_engine_keeps_the_rules_whatever_is_mapped_and_however_frames_are_cut() {
    for layout in Layout::ALL {
        for body in [64, 1000, 1 << 16] {
            let (here, there, data) = doubles(layout);
            let moved = migrate(&here, &there, body);
            assert!(moved.source.is_ok() && moved.destination.is_ok(), "{layout:?}, frames of {body}");
            assert_eq!(there.loaded().as_ref(), Some(&data));
            judge(&format!("{layout:?}, frames of {body}"), &here, &there);
        }
    }
}

/// The ways in which an access can go wrong that a user can notice.
const ALL: [Wrong; 4] = [
    Wrong::Refused(Errno::EIO),
    // SAVING with RESUMING: ERROR.
    Wrong::RefusedInto(Errno::EIO, 6),
    Wrong::Gone,
    Wrong::Moved(6),
];

// V1-LOOP-ERROR, V1-READBACK, V1-OUTSTANDING
#[test]
fn the_engine_keeps_the_rules_whatever_access_fails() {
    let mut hits = 0;
    for at_source in [true, false] {
        for wrong in ALL {
            for after in 0.. {
                assert!(after < 1000, "there is no end");
                let (here, there, data) = doubles(Layout::Trapped);
                let failing = if at_source { &here } else { &there };
                // The first access is made when the device is taken.
                failing.fail(Fault { access: None, after: after + 1, times: 1, wrong });
                let moved = migrate(&here, &there, 1000);
                let what = format!("{wrong:?} at access {after} of the source ({at_source})");
                judge(&what, &here, &there);
                if moved.source.is_ok() && moved.destination.is_ok() {
                    assert_eq!(there.loaded().as_ref(), Some(&data), "{what}: taken for loaded");
                }
                match moved.fate {
                    Some(Fate::Running) => assert_eq!(here.state(), DeviceState::Running, "{what}"),
                    Some(Fate::Quarantined { reason }) => assert!(!reason.is_empty(), "{what}"),
                    Some(Fate::Stopped) => panic!("{what}: a device that ran is stopped"),
                    None => {}
                }
                if failing.hits() == 0 {
                    break;
                }
                hits += 1;
            }
        }
    }
    assert!(hits > 200, "{hits} accesses have gone wrong");
}

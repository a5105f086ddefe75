//! The destination's phases of a set: taking data, loaded.

use super::load::{InFrame, Incoming};
use super::members::Members;
use super::sink::{SetEvent, StreamFault};
use super::worker::{Held, Post, Worker, misuse};
use super::{DeviceSet, FailedSet, SetError};
use airlift_core::{DeviceId, DeviceState, PeerDma, RunPlan};
use airlift_stream::FrameHeader;
use crossbeam_channel::{Receiver, Sender};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::wire::PooledBuf;

impl DeviceSet {
    /// Takes every device to RESUMING, at the same time. `room` is how many frames of each device may
    /// be on their way (W-CREDIT). A device that is in ERROR or in the middle of something is reset
    /// first: on this side nothing is lost by that.
    ///
    /// # Errors
    /// When a device fails.
    pub fn start_loading(mut self, room: usize, deadline: Duration) -> Result<LoadingSet, Box<FailedSet>> {
        self.members.forget_events();
        let which = self.members.present();
        let gauges = Arc::clone(&self.members.gauges);
        let answers = self.members.ask(&which, deadline, |_| {
            let gauges = Arc::clone(&gauges);
            move |post: &mut Post| post.begin_loading(room, gauges)
        });
        match self.members.all_ok(answers) {
            Ok(_) => Ok(LoadingSet { members: self.members }),
            Err(error) => Err(FailedSet::new(self.members, error)),
        }
    }
}

impl Post {
    fn begin_loading(&mut self, room: usize, gauges: Arc<crate::control::Gauges>) -> Result<(), StreamFault> {
        self.begin();
        match self.state()? {
            DeviceState::Running | DeviceState::RunningP2p | DeviceState::Stop => {}
            _ => self.device()?.reset()?,
        }
        let Held::Idle(idle) = std::mem::replace(&mut self.held, Held::Gone) else {
            return Err(StreamFault::Device(misuse("the device has a session already")));
        };
        match Incoming::begin(idle, self.index, room, self.events.clone(), gauges, &self.recorder) {
            Ok(incoming) => {
                self.held = Held::Loading(Box::new(incoming));
                self.note(DeviceState::Resuming);
                Ok(())
            }
            Err(refused) => {
                let (idle, error) = *refused;
                self.held = Held::Idle(idle);
                Err(StreamFault::Transition(Box::new(error)))
            }
        }
    }

    /// Towards RUNNING.
    fn run_on(&mut self, target: DeviceState) -> Result<(), StreamFault> {
        let Held::Idle(idle) = &mut self.held else {
            return Err(StreamFault::Device(misuse("the device is not loaded")));
        };
        idle.run(target, &self.recorder).map_err(|error| StreamFault::Transition(Box::new(error)))?;
        self.note(target);
        Ok(())
    }

    fn finish_loading(&mut self) -> Result<(), StreamFault> {
        match std::mem::replace(&mut self.held, Held::Gone) {
            Held::Loading(incoming) => {
                let (idle, result) = incoming.finish(&self.recorder);
                self.held = Held::Idle(idle);
                if result.is_ok() {
                    self.note(DeviceState::Stop);
                }
                result
            }
            other => {
                self.held = other;
                Err(StreamFault::Device(misuse("the device is not loading")))
            }
        }
    }
}

/// Devices in RESUMING that write what is fed to them.
pub struct LoadingSet {
    members: Members,
}

impl fmt::Debug for LoadingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadingSet").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

/// Hands frames to a loading set, from any thread.
#[derive(Clone)]
pub struct Feeder(Vec<Option<Sender<InFrame>>>);

impl fmt::Debug for Feeder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Feeder")
    }
}

impl Feeder {
    /// As [`LoadingSet::feed`].
    #[must_use]
    pub fn feed(&self, header: FrameHeader, payload: PooledBuf) -> bool {
        let index = usize::try_from(header.index).unwrap_or(usize::MAX);
        let Some(Some(frames)) = self.0.get(index) else { return false };
        // Of a worker that is gone the session learns elsewhere.
        let _ = frames.send(InFrame { header, payload });
        true
    }
}

impl LoadingSet {
    /// Takes a DEVICE frame whose checksum was verified. Never blocks: whoever feeds keeps to the room
    /// that was given. `false`: there is no such device.
    #[must_use]
    pub fn feed(&self, header: FrameHeader, payload: PooledBuf) -> bool {
        self.feeder().feed(header, payload)
    }

    /// A handle that feeds from other threads.
    #[must_use]
    pub fn feeder(&self) -> Feeder {
        Feeder((0..self.members.len()).map(|i| self.members.worker(i).map(Worker::frames)).collect())
    }

    /// What workers say: room that is free again, generations of initial data, ends, failures.
    #[must_use]
    pub fn events(&self) -> Receiver<SetEvent> {
        self.members.events.clone()
    }

    /// The devices' names, in order.
    #[must_use]
    pub fn ids(&self) -> &[DeviceId] {
        self.members.ids()
    }

    /// RESUMING -> STOP, all at the same time: the devices validate what they were given. Every stream
    /// must have ended ([`SetEvent::Ended`]).
    ///
    /// # Errors
    /// When a device refuses its state or fails. All must then be reset.
    pub fn finish(mut self, deadline: Duration) -> Result<LoadedSet, Box<FailedSet>> {
        let which = self.members.present();
        let answers = self.members.ask(&which, deadline, |_| Post::finish_loading);
        match self.members.all_ok(answers) {
            Ok(_) => Ok(LoadedSet { members: self.members, plan: None }),
            Err(error) => Err(FailedSet::new(self.members, error)),
        }
    }

    /// Ends loading; the devices are to be reset with [`DeviceSet::reset`].
    #[must_use]
    pub fn abandon(self) -> DeviceSet {
        DeviceSet { members: self.members }
    }
}

/// Devices in STOP that hold the other side's state.
pub struct LoadedSet {
    members: Members,
    /// How they are to run, where that was asked before.
    plan: Option<(PeerDma, RunPlan)>,
}

impl fmt::Debug for LoadedSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadedSet").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

impl LoadedSet {
    /// Plans how the devices are to run, so that [`run`](Self::run) need not: while COMMIT is waited for there
    /// is time for it.
    pub(crate) fn prepare(&mut self, peer_dma: PeerDma) {
        // What cannot be planned is said when it is to be done.
        self.plan = self.plan_run(peer_dma).ok().map(|plan| (peer_dma, plan));
    }

    fn plan_run(&mut self, peer_dma: PeerDma) -> Result<RunPlan, SetError> {
        match self.plan.take() {
            Some((of, plan)) if of == peer_dma => Ok(plan),
            _ => Ok(RunPlan::new(&self.members.in_state(DeviceState::Stop), peer_dma)?),
        }
    }

    /// Lets all devices run: all to RUNNING_P2P, a barrier, then all to RUNNING.
    ///
    /// # Errors
    /// When one fails. No vCPU must run then; the devices are to be reset.
    pub fn run(mut self, peer_dma: PeerDma, deadline: Duration) -> Result<DeviceSet, Box<FailedSet>> {
        let result = self.plan_run(peer_dma).and_then(|plan| {
            self.members
                .stages(plan.stages(), deadline, |_, target| move |post: &mut Post| post.run_on(target))
        });
        match result {
            Ok(_) => Ok(DeviceSet { members: self.members }),
            Err(error) => Err(FailedSet::new(self.members, error)),
        }
    }

    /// Gives them up; the devices are to be reset with [`DeviceSet::reset`].
    #[must_use]
    pub fn abandon(self) -> DeviceSet {
        DeviceSet { members: self.members }
    }
}

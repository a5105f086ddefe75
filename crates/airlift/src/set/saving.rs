//! The source's phases of a set: saving while running, stopped, drained.

use super::members::{Members, SetError};
use super::save::{Outgoing, SaveStatus, SaveStream};
use super::sink::{ChunkSink, SetEvent, StreamFault};
use super::worker::{Answer, Held, Post, misuse};
use super::{DeviceSet, FailedSet, RolledBack, reports, roll_back, trace};
use crate::report::DeviceReport;
use airlift_core::{
    DeviceError, DeviceErrorKind, DeviceId, DeviceState, Interface, PeerDma, QuiescePlan, ResetPolicy,
    StageKind,
};
use airlift_stream::StreamTotals;
use crossbeam_channel::{Receiver, Select, TryRecvError};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl DeviceSet {
    /// Takes every running device that can to PRE_COPY, at the same time; from then on the devices'
    /// workers send their data to `sink` by themselves. Devices without PRE_COPY run on untouched.
    ///
    /// # Errors
    /// When a device fails; [`FailedSet::roll_back`] brings all back.
    pub fn start_saving(
        mut self,
        sink: &Arc<dyn ChunkSink>,
        deadline: Duration,
    ) -> Result<SavingSet, Box<FailedSet>> {
        self.members.forget_events();
        let states = self.members.states(deadline);
        // Noted for every device, also when one does not answer: a rollback brings each back to what it
        // was, and one that ran must not be taken for one that did not.
        for (index, state) in &states {
            self.members.ran_before[*index] = !matches!(state, Ok(Ok(state)) if !state.is_live());
        }
        if let Err(error) = self.members.all_ok(states) {
            return Err(FailedSet::new(self.members, error));
        }
        self.members.open_way(sink);
        let which = self.members.present();
        let gauges = Arc::clone(&self.members.gauges);
        let precopy: Vec<bool> =
            (0..self.members.len()).map(|i| self.members.capabilities(i).precopy()).collect();
        let answers = self.members.ask(&which, deadline, |index| {
            let sink = Arc::clone(sink);
            let gauges = Arc::clone(&gauges);
            let precopy = precopy[index];
            move |post: &mut Post| post.begin_saving(sink, gauges, precopy)
        });
        match self.members.in_time(self.members.all_ok(answers), deadline) {
            Ok(_) => Ok(SavingSet { members: self.members }),
            Err(error) => Err(FailedSet::new(self.members, error)),
        }
    }
}

impl Post {
    fn begin_saving(
        &mut self,
        sink: Arc<dyn ChunkSink>,
        gauges: Arc<crate::control::Gauges>,
        precopy: bool,
    ) -> Result<(), StreamFault> {
        self.begin();
        let (index, status) = (self.index, Arc::clone(&self.status));
        let stream = SaveStream::new(index, self.device()?, sink, status, gauges);
        let precopy = precopy && self.state()? == DeviceState::Running;
        trace::save_setup(self.device()?.id(), precopy);
        if !precopy {
            let size = self.device()?.stop_copy_size()?;
            self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner).stop_copy_size = size;
            self.waiting = Some(stream);
            return Ok(());
        }
        let Held::Idle(idle) = std::mem::replace(&mut self.held, Held::Gone) else {
            return Err(StreamFault::Device(misuse("the device has a session already")));
        };
        match Outgoing::begin(idle, stream, &self.recorder) {
            Ok(outgoing) => {
                self.held = Held::Saving(Box::new(outgoing));
                self.note(DeviceState::PreCopy);
                Ok(())
            }
            Err(refused) => {
                let (idle, fault) = *refused;
                self.held = Held::Idle(idle);
                Err(fault)
            }
        }
    }

    /// Begins no further transaction.
    fn settle(&mut self) -> Result<(), StreamFault> {
        if let Held::Saving(outgoing) = &mut self.held {
            outgoing.settle();
        }
        Ok(())
    }

    /// To the P2P state; `true` when the device has announced new initial data too late. A transaction that
    /// is under way may take `patience`.
    fn quiesce_p2p(&mut self, target: DeviceState, patience: Duration) -> Result<bool, StreamFault> {
        let recorder = self.recorder.clone();
        let late = match &mut self.held {
            Held::Saving(outgoing) => {
                outgoing.quiesce_p2p(&recorder, patience)?;
                outgoing.late_reinit()?
            }
            _ => {
                self.walk(target)?;
                false
            }
        };
        self.note(target);
        Ok(late)
    }

    /// To STOP_COPY; `true` as for [`quiesce_p2p`](Self::quiesce_p2p), where there was no such step.
    fn stop(&mut self, patience: Duration) -> Result<bool, StreamFault> {
        let recorder = self.recorder.clone();
        self.held = match std::mem::replace(&mut self.held, Held::Gone) {
            Held::Saving(mut outgoing) => {
                let result = outgoing.stop(&recorder, patience);
                self.held = Held::Saving(outgoing);
                let late = result?;
                self.note(DeviceState::StopCopy);
                return Ok(late);
            }
            Held::Idle(idle) => {
                let Some(stream) = self.waiting.take() else {
                    self.held = Held::Idle(idle);
                    return Err(StreamFault::Device(misuse("saving has not begun")));
                };
                match Outgoing::begin_stopped(idle, stream, &recorder) {
                    Ok(outgoing) => Held::Saving(Box::new(outgoing)),
                    Err(refused) => {
                        let (idle, fault) = *refused;
                        self.held = Held::Idle(idle);
                        return Err(fault);
                    }
                }
            }
            other => {
                self.held = other;
                return Err(StreamFault::Device(misuse("the device is not being saved")));
            }
        };
        self.note(DeviceState::StopCopy);
        Ok(false)
    }

    fn drain(&mut self, config: Option<&[u8]>) -> Result<StreamTotals, StreamFault> {
        match &mut self.held {
            Held::Saving(outgoing) => outgoing.drain(config),
            _ => Err(StreamFault::Device(misuse("the device is not being saved"))),
        }
    }
}

/// How devices are stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quiesce {
    /// Whether devices may write to each other.
    pub peer_dma: PeerDma,
    /// Leave out the step through P2P; see [`TestOptions`](crate::TestOptions).
    pub skip_p2p: bool,
}

/// Devices of which those with PRE_COPY are in it and send what they have; all run.
pub struct SavingSet {
    members: Members,
}

impl fmt::Debug for SavingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavingSet").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

impl SavingSet {
    /// What is known of each device, in order.
    #[must_use]
    pub fn status(&self) -> Vec<SaveStatus> {
        (0..self.members.len()).map(|i| self.members.save_status(i)).collect()
    }

    /// The devices' names, in order.
    #[must_use]
    pub fn ids(&self) -> &[DeviceId] {
        self.members.ids()
    }

    /// What workers find by themselves: [`SetEvent::Failed`].
    #[must_use]
    pub fn events(&self) -> Receiver<SetEvent> {
        self.members.events.clone()
    }

    /// Lets no device begin another transaction, so that [`quiesce`](Self::quiesce) need not wait for the
    /// end of one while the guest is paused (V1-OUTSTANDING). Those under way go on:
    /// [`is_settled`](Self::is_settled) says when they have ended. Devices of interface v2 have none and
    /// stream on.
    ///
    /// # Errors
    /// When a device does not answer within `deadline`.
    pub fn settle(&mut self, deadline: Duration) -> Result<(), SetError> {
        let mut which = self.members.present();
        which.retain(|&index| self.members.capabilities(index).interface == Interface::V1);
        let answers = self.members.ask(&which, deadline, |_| Post::settle);
        self.members.in_time(self.members.all_ok(answers).map(drop), deadline)
    }

    /// No device is in the middle of a transaction. Stays so after [`settle`](Self::settle).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        (0..self.members.len()).all(|index| !self.members.save_status(index).mid_transaction)
    }

    /// Stops all devices: all to P2P, a barrier, then all to STOP_COPY (I14). The vCPUs must have
    /// been paused and access to devices closed. From here on workers send what the stopped devices have to
    /// the sink; [`StoppedSet::drain`] waits for the end of it.
    ///
    /// A transaction that is under way is read and sent to its end first, within half of `deadline`.
    ///
    /// Gives the stopped set and the devices that announced new initial data too late
    /// (V2-REINIT): their switchover may be slower than estimated.
    ///
    /// # Errors
    /// When the devices cannot be stopped together, or one fails. When one does not answer within
    /// `deadline`, the sink is closed: it may be the other side that it waits for, and a device is not given
    /// up for that.
    pub fn quiesce(
        mut self,
        how: Quiesce,
        deadline: Duration,
    ) -> Result<(StoppedSet, Vec<DeviceId>), Box<FailedSet>> {
        match self.stop_in_order(how, deadline) {
            Ok(late) => Ok((StoppedSet { members: self.members }, late)),
            Err(error) => Err(FailedSet::new(self.members, error)),
        }
    }

    fn stop_in_order(&mut self, how: Quiesce, deadline: Duration) -> Result<Vec<DeviceId>, SetError> {
        let devices = self.members.plan_devices(deadline);
        let devices = self.members.in_time(devices, deadline)?;
        let mut plan = QuiescePlan::new(&devices, how.peer_dma)?;
        if how.skip_p2p {
            plan = plan.skip_p2p();
        }
        // The other half of the time is the arc's.
        let patience = deadline / 2;
        let late = self.members.stages(plan.stages(), deadline, |kind, target| {
            move |post: &mut Post| match kind {
                StageKind::PeerQuiet => post.quiesce_p2p(target, patience),
                StageKind::Stop | StageKind::Run | StageKind::Reset => post.stop(patience),
            }
        })?;
        // A device that was in STOP_COPY already has no stage and no session: it was not ours.
        let ids = self.members.ids();
        Ok(late.into_iter().filter(|(_, is)| *is).map(|(index, _)| ids[index].clone()).collect())
    }

    /// Ends saving: every device back to what it was.
    #[must_use]
    pub fn roll_back(self, policy: ResetPolicy, deadline: Duration) -> RolledBack {
        roll_back(self.members, policy, deadline)
    }

    /// What every device did so far.
    #[must_use]
    pub fn reports(&self) -> Vec<DeviceReport> {
        reports(&self.members)
    }
}

/// Devices in STOP_COPY.
pub struct StoppedSet {
    members: Members,
}

impl fmt::Debug for StoppedSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoppedSet").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

impl StoppedSet {
    /// The devices' names, in order.
    #[must_use]
    pub fn ids(&self) -> &[DeviceId] {
        self.members.ids()
    }

    /// What workers find by themselves, from before the stop on: [`SetEvent::Failed`].
    #[must_use]
    pub fn events(&self) -> Receiver<SetEvent> {
        self.members.events.clone()
    }

    /// Reads every device to its end, at the same time; workers have begun to by themselves. `configs` are the devices'
    /// configuration records, by position in the set; a device without one has `None`.
    #[must_use]
    pub fn drain(self, configs: Vec<Option<Vec<u8>>>) -> Draining {
        let mut configs = configs.into_iter();
        let drains = (0..self.members.len())
            .map(|index| {
                let config = configs.next().flatten();
                self.members.worker(index).map_or(Drain::Nobody, |worker| {
                    Drain::Running(worker.ask(move |post: &mut Post| post.drain(config.as_deref())))
                })
            })
            .collect();
        Draining { members: self.members, drains }
    }

    /// Every device back to what it was. The sink is best closed before: a worker that waits in it is waited for until `deadline`.
    #[must_use]
    pub fn roll_back(self, policy: ResetPolicy, deadline: Duration) -> RolledBack {
        roll_back(self.members, policy, deadline)
    }
}

/// Devices whose last data is being read and sent.
pub struct Draining {
    members: Members,
    drains: Vec<Drain>,
}

/// One device of a set that is being drained.
enum Drain {
    Running(Answer<Result<StreamTotals, StreamFault>>),
    Done(Box<StreamTotals>),
    /// The device was given up before.
    Nobody,
}

impl fmt::Debug for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Draining").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

impl Draining {
    /// Waits for at most `wait`. `true`: every device has given everything. A device that fails is seen
    /// at once, whatever the others are doing.
    ///
    /// # Errors
    /// When a device failed.
    pub fn poll(&mut self, wait: Duration) -> Result<bool, SetError> {
        let until = Instant::now() + wait;
        loop {
            let mut select = Select::new();
            let mut running = Vec::new();
            for (index, drain) in self.drains.iter().enumerate() {
                match drain {
                    Drain::Running(answer) => {
                        select.recv(&answer.0);
                        running.push(index);
                    }
                    Drain::Done(_) => {}
                    Drain::Nobody => return Err(self.lost(index, "it was given up")),
                }
            }
            if running.is_empty() {
                return Ok(true);
            }
            let Ok(ready) = select.ready_deadline(until) else { return Ok(false) };
            let index = running[ready];
            let Drain::Running(answer) = &self.drains[index] else { continue };
            match answer.0.try_recv() {
                Ok(Ok(totals)) => self.drains[index] = Drain::Done(Box::new(totals)),
                Ok(Err(fault)) => {
                    return Err(SetError::Device { device: self.members.ids()[index].clone(), fault });
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(self.lost(index, "its worker has ended")),
            }
        }
    }

    fn lost(&self, index: usize, why: &str) -> SetError {
        let error = DeviceError::new(DeviceErrorKind::Lost, "device worker", why);
        SetError::Device { device: self.members.ids()[index].clone(), fault: StreamFault::Device(error) }
    }

    /// The set, when [`poll`](Self::poll) has said that all is drained.
    ///
    /// # Errors
    /// Gives itself back while a device still drains.
    pub fn finish(self) -> Result<DrainedSet, Box<Self>> {
        let done = |drain: &Drain| match drain {
            Drain::Done(totals) => Some(**totals),
            Drain::Running(_) | Drain::Nobody => None,
        };
        match self.drains.iter().map(done).collect() {
            Some(totals) => Ok(DrainedSet { members: self.members, totals }),
            None => Err(Box::new(self)),
        }
    }

    /// Every device back to what it was. The sink is best closed before: a worker that waits in it is waited for until `deadline`.
    #[must_use]
    pub fn roll_back(self, policy: ResetPolicy, deadline: Duration) -> RolledBack {
        roll_back(self.members, policy, deadline)
    }
}

/// Devices in STOP_COPY that have given everything.
pub struct DrainedSet {
    members: Members,
    totals: Vec<StreamTotals>,
}

impl fmt::Debug for DrainedSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainedSet").field("devices", &self.members.ids()).finish_non_exhaustive()
    }
}

impl DrainedSet {
    /// What each device's stream held, in order; the other side must have the same (W-TRAILER).
    #[must_use]
    pub fn totals(&self) -> &[StreamTotals] {
        &self.totals
    }

    /// The guest runs on the other side: STOP_COPY -> STOP, all at the same time. Outside of the
    /// downtime. A device that fails is reported and given up; nothing depends on it any more.
    #[must_use]
    pub fn finish(mut self, deadline: Duration) -> (DeviceSet, Vec<SetError>) {
        self.members.forget_way();
        let which = self.members.present();
        let answers = self.members.ask(&which, deadline, |_| {
            |post: &mut Post| {
                post.close_session();
                post.walk(DeviceState::Stop)
            }
        });
        let mut errors = Vec::new();
        for (index, answer) in answers {
            if let Err(fault) = answer.map_err(StreamFault::Device).and_then(|r| r) {
                errors.push(SetError::Device { device: self.members.ids()[index].clone(), fault });
            }
        }
        (DeviceSet { members: self.members }, errors)
    }

    /// Every device back to what it was.
    #[must_use]
    pub fn roll_back(self, policy: ResetPolicy, deadline: Duration) -> RolledBack {
        roll_back(self.members, policy, deadline)
    }

    /// What every device did so far.
    #[must_use]
    pub fn reports(&self) -> Vec<DeviceReport> {
        reports(&self.members)
    }

    /// Leaves the devices as they are, in STOP_COPY: after COMMIT, when it is in doubt who runs.
    #[must_use]
    pub fn hold(self) -> DeviceSet {
        DeviceSet { members: self.members }
    }
}

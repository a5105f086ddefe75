//! The devices of a set, asked side by side, each by its own worker, with one deadline for all.

use super::recorder::Recorder;
use super::save::SaveStatus;
use super::sink::{ChunkSink, SetEvent, StreamFault};
use super::worker::{Answer, NoAnswer, Post, Worker};
use crate::control::Gauges;
use crate::event::Event;
use airlift_core::{
    Action, Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Failure, Fate,
    MigrationDevice, Phase, PlanDevice, PlanRefusal, Recovered, ResetPolicy, ResumeDevice, Rollback, Side,
    Stage, StageKind,
};
use crossbeam_channel::{Receiver, unbounded};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a device that was interrupted has to answer before it is given up.
const GRACE: Duration = Duration::from_secs(1);

/// A step of a set failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SetError {
    /// One device failed. When several did, the first in the set's order; the others are in the
    /// transitions.
    #[error("{device}: {fault}")]
    Device {
        /// The device.
        device: DeviceId,
        /// How.
        fault: StreamFault,
    },
    /// The devices cannot be taken through the step together.
    #[error(transparent)]
    Plan(#[from] PlanRefusal),
    /// A thread could not be started.
    #[error(transparent)]
    Spawn(#[from] crate::spawn::SpawnError),
    /// Two devices have the same name.
    #[error("two devices are named {0}")]
    Twice(DeviceId),
}

impl SetError {
    /// The error as the report has it.
    #[must_use]
    pub fn into_failure(self, side: Side, phase: Phase) -> Failure {
        let mut failure = Failure::new(side, phase, self.to_string());
        match self {
            Self::Device { device, fault } => {
                failure.device = Some(device);
                let (state, errno) = match &fault {
                    StreamFault::Device(error) => (None, error.errno),
                    StreamFault::Transition(error) => {
                        (error.reached.as_ref().ok().copied(), error.error.errno)
                    }
                    StreamFault::Closed(_) | StreamFault::Stream(_) => (None, None),
                };
                failure.state = state;
                failure.errno = errno;
                failure.message = fault.to_string();
                failure.advice = advice(&fault, side).map(str::to_owned);
            }
            // What can be done is in the text.
            Self::Plan(_) | Self::Spawn(_) | Self::Twice(_) => {}
        }
        failure
    }
}

fn advice(fault: &StreamFault, side: Side) -> Option<&'static str> {
    let (error, reached, loaded) = match fault {
        StreamFault::Device(error) => (error, None, false),
        StreamFault::Transition(error) => {
            let loaded = matches!(error.from, DeviceState::Stop | DeviceState::RunningP2p);
            (&error.error, error.reached.as_ref().ok(), loaded)
        }
        StreamFault::Closed(_) | StreamFault::Stream(_) => return None,
    };
    match (&error.kind, side) {
        (_, Side::Source) if reached == Some(&DeviceState::Error) => Some(
            "only a reset gets the device going again, and it destroys what the guest has in it: let the guest let go of it first, or restart the guest",
        ),
        (DeviceErrorKind::Lost, _) => Some(
            "look at the log of the device's server or driver: it ended, closed the connection, or the device was reset",
        ),
        (DeviceErrorKind::TimedOut, _) => {
            Some("the device did not answer in time; a longer deadline can be set if it is only slow")
        }
        (DeviceErrorKind::Refused, Side::Destination) if loaded => Some(
            "the device took the state in and does not run with it: look at the log of the device's server or driver",
        ),
        (DeviceErrorKind::Refused, Side::Destination) => Some(
            "the device refused the state: compare its size, type and version with the source's device, and look at the log of its server or driver",
        ),
        (DeviceErrorKind::Refused, Side::Source) => {
            Some("the device refused what it was asked: look at the log of its server or driver")
        }
        _ => None,
    }
}

/// The devices of one side.
pub(super) struct Members {
    workers: Vec<Option<Worker>>,
    ids: Vec<DeviceId>,
    capabilities: Vec<Capabilities>,
    identities: Vec<DeviceIdentity>,
    pub(super) ran_before: Vec<bool>,
    quarantined: Vec<Option<(DeviceErrorKind, String)>>,
    pub(super) was_reset: Vec<bool>,
    pub(super) recorder: Recorder,
    pub(super) gauges: Arc<Gauges>,
    pub(super) events: Receiver<SetEvent>,
    /// Where the devices' data goes, and the first of them that was late because of it.
    way: Way,
}

/// The way of the data of devices that are being saved.
#[derive(Default)]
enum Way {
    #[default]
    None,
    Open(Arc<dyn ChunkSink>),
    /// Closed, because this device did not answer.
    ClosedFor(usize),
}

/// One answer of each device that was asked.
pub(super) type Answers<R> = Vec<(usize, Result<R, DeviceError>)>;

impl Members {
    pub(super) fn new(
        devices: Vec<Box<dyn MigrationDevice>>,
        recorder: Recorder,
        gauges: Arc<Gauges>,
    ) -> Result<Self, SetError> {
        let (sender, events) = unbounded();
        let count = devices.len();
        let mut workers = Vec::with_capacity(count);
        for (index, device) in devices.into_iter().enumerate() {
            let id = device.id().clone();
            if workers.iter().flatten().any(|w: &Worker| w.id == id) {
                return Err(SetError::Twice(id));
            }
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            workers.push(Some(Worker::start(device, index, &recorder, Arc::clone(&gauges), sender.clone())?));
        }
        let of = |f: fn(&Worker) -> Capabilities| workers.iter().flatten().map(f).collect::<Vec<_>>();
        let capabilities = of(|w| w.capabilities);
        let ids = workers.iter().flatten().map(|w| w.id.clone()).collect();
        let identities = workers.iter().flatten().map(|w| w.identity.clone()).collect();
        Ok(Self {
            workers,
            ids,
            capabilities,
            identities,
            ran_before: vec![false; count],
            quarantined: vec![None; count],
            was_reset: vec![false; count],
            recorder,
            gauges,
            events,
            way: Way::None,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }

    pub(super) fn ids(&self) -> &[DeviceId] {
        &self.ids
    }

    pub(super) fn capabilities(&self, index: usize) -> Capabilities {
        self.capabilities[index]
    }

    pub(super) fn identity(&self, index: usize) -> &DeviceIdentity {
        &self.identities[index]
    }

    pub(super) fn worker(&self, index: usize) -> Option<&Worker> {
        self.workers.get(index)?.as_ref()
    }

    pub(super) fn save_status(&self, index: usize) -> SaveStatus {
        self.worker(index).map(Worker::save_status).unwrap_or_default()
    }

    fn index_of(&self, id: &DeviceId) -> Option<usize> {
        self.ids.iter().position(|other| other == id)
    }

    /// The devices' data goes to `sink` from now on.
    pub(super) fn open_way(&mut self, sink: &Arc<dyn ChunkSink>) {
        self.way = Way::Open(Arc::clone(sink));
    }

    /// No device is being saved any more.
    pub(super) fn forget_way(&mut self) {
        self.way = Way::None;
    }

    /// Ends the devices' waits in the sink, for a device that is late. `false`: nothing is being saved.
    fn close_way(&mut self, index: usize) -> bool {
        if let Way::Open(sink) = &self.way {
            tracing::warn!(device = %self.ids[index], "no answer in time: the way of the devices' data is closed");
            sink.close();
            self.way = Way::ClosedFor(index);
        }
        matches!(self.way, Way::ClosedFor(_))
    }

    /// What a step of saving has given, unless its time was spent on waiting for the other side: without
    /// its data's way, a device that has answered since cannot be saved, but it is a healthy one (I2).
    pub(super) fn in_time<T>(&self, result: Result<T, SetError>, deadline: Duration) -> Result<T, SetError> {
        let Way::ClosedFor(index) = self.way else { return result };
        match result {
            Err(error) if !matches!(error, SetError::Device { fault: StreamFault::Closed(_), .. }) => {
                Err(error)
            }
            _ => {
                let why = format!(
                    "no answer within {deadline:?}: it waited for the other side to take its data, or is slow"
                );
                let error = DeviceError::new(DeviceErrorKind::TimedOut, "device worker", why);
                Err(SetError::Device { device: self.ids[index].clone(), fault: StreamFault::Device(error) })
            }
        }
    }

    /// Asks the devices in `which` at the same time and waits for all. One that does not answer in
    /// time is freed from waiting for the other side, then interrupted, and given up if that does not
    /// help.
    pub(super) fn ask<R: Send + 'static, F>(
        &mut self,
        which: &[usize],
        deadline: Duration,
        mut job: impl FnMut(usize) -> F,
    ) -> Answers<R>
    where
        F: FnOnce(&mut Post) -> R + Send + 'static,
    {
        let asked: Vec<_> = which
            .iter()
            .map(|&index| (index, self.workers[index].as_ref().map(|worker| worker.ask(job(index)))))
            .collect();
        let until = Instant::now() + deadline;
        let mut answers = Vec::with_capacity(asked.len());
        for (index, answer) in asked {
            let result = match answer {
                None => Err(self.given_up(index)),
                Some(answer) => match answer.wait(until) {
                    Ok(result) => Ok(result),
                    Err(NoAnswer::Dead) => {
                        Err(self.quarantine(index, DeviceErrorKind::Lost, "its worker has ended"))
                    }
                    Err(NoAnswer::Late) => self.wake(index, &answer).ok_or_else(|| {
                        let why = format!("no answer within {deadline:?}");
                        self.quarantine(index, DeviceErrorKind::TimedOut, &why)
                    }),
                },
            };
            answers.push((index, result));
        }
        answers
    }

    /// The answer of a device that is late, if it comes after all.
    fn wake<R>(&mut self, index: usize, answer: &Answer<R>) -> Option<R> {
        // An interrupter wakes a call of the device, never a wait in the sink. Where that was all, the call
        // that follows it need not be interrupted.
        if self.close_way(index)
            && let Ok(result) = answer.wait(Instant::now() + GRACE)
        {
            return Some(result);
        }
        let woken = self.workers[index].as_ref().is_some_and(Worker::interrupt);
        let grace = if woken { GRACE } else { Duration::ZERO };
        answer.wait(Instant::now() + grace).ok()
    }

    /// Every device that has not been given up.
    pub(super) fn present(&self) -> Vec<usize> {
        (0..self.len()).filter(|&i| self.workers[i].is_some()).collect()
    }

    /// What it was given up for: one that did not answer in time is not one that is gone.
    fn given_up(&self, index: usize) -> DeviceError {
        match &self.quarantined[index] {
            Some((kind, why)) => DeviceError::new(kind.clone(), "device worker", why.clone()),
            None => DeviceError::new(DeviceErrorKind::TimedOut, "device worker", "it was given up"),
        }
    }

    /// Why nothing more is asked of a device, if that is so.
    pub(super) fn why_quarantined(&self, index: usize) -> Option<String> {
        self.quarantined[index].as_ref().map(|(_, why)| why.clone())
    }

    /// Drops what workers said in an earlier session.
    pub(super) fn forget_events(&self) {
        while self.events.try_recv().is_ok() {}
    }

    /// Leaves the device behind, with its worker.
    fn quarantine(&mut self, index: usize, kind: DeviceErrorKind, why: &str) -> DeviceError {
        if let Some(worker) = self.workers[index].take() {
            worker.abandon();
        }
        self.note_quarantine(index, kind.clone(), why);
        DeviceError::new(kind, "device worker", why)
    }

    fn note_quarantine(&mut self, index: usize, kind: DeviceErrorKind, why: &str) {
        if self.quarantined[index].is_none() {
            self.quarantined[index] = Some((kind, why.to_owned()));
            let device = self.ids[index].clone();
            tracing::warn!(device = %device, reason = why, "a device is given up");
            self.recorder.emit(&Event::Quarantined { device, reason: why.to_owned() });
        }
    }

    /// Turns answers that are themselves results into the first error, if there is one.
    pub(super) fn all_ok<R>(
        &self,
        answers: Answers<Result<R, StreamFault>>,
    ) -> Result<Vec<(usize, R)>, SetError> {
        let mut good = Vec::with_capacity(answers.len());
        for (index, answer) in answers {
            match answer.map_err(StreamFault::Device).and_then(|r| r) {
                Ok(value) => good.push((index, value)),
                Err(fault) => return Err(SetError::Device { device: self.ids[index].clone(), fault }),
            }
        }
        Ok(good)
    }

    /// Reads the state of every device.
    pub(super) fn states(&mut self, deadline: Duration) -> Answers<Result<DeviceState, StreamFault>> {
        let which = self.present();
        self.ask(&which, deadline, |_| |post: &mut Post| post.state().map_err(StreamFault::Device))
    }

    /// The devices as plans want them, with states read now.
    pub(super) fn plan_devices(&mut self, deadline: Duration) -> Result<Vec<PlanDevice>, SetError> {
        let states = self.states(deadline);
        let states = self.all_ok(states)?;
        let device = |(index, state): (usize, DeviceState)| PlanDevice {
            id: self.ids[index].clone(),
            capabilities: self.capabilities[index],
            state,
        };
        Ok(states.into_iter().map(device).collect())
    }

    /// The devices as plans want them, all in a state that they were seen in.
    pub(super) fn in_state(&self, state: DeviceState) -> Vec<PlanDevice> {
        self.present()
            .into_iter()
            .map(|index| PlanDevice {
                id: self.ids[index].clone(),
                capabilities: self.capabilities[index],
                state,
            })
            .collect()
    }

    /// Carries out stages: every step of one at the same time, and all of it before the next begins. Gives
    /// what each step has given.
    ///
    /// A device that is alone waits for nobody: all of its steps are one call, which saves the way to its
    /// worker and back in between.
    pub(super) fn stages<R, F>(
        &mut self,
        stages: &[Stage],
        deadline: Duration,
        job: impl Fn(StageKind, DeviceState) -> F,
    ) -> Result<Vec<(usize, R)>, SetError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Post) -> Result<R, StreamFault> + Send + 'static,
    {
        let jobs: Vec<Vec<(usize, F)>> = stages
            .iter()
            .map(|stage| {
                let steps = stage.steps.iter();
                steps
                    .filter_map(|step| {
                        Some((self.index_of(&step.device)?, job(stage.kind, step.action.target())))
                    })
                    .collect()
            })
            .collect();
        let mut done = Vec::new();
        if let [only] = self.present()[..] {
            let mut own: Vec<F> =
                jobs.into_iter().flatten().filter(|(index, _)| *index == only).map(|(_, job)| job).collect();
            if own.is_empty() {
                return Ok(done);
            }
            let deadline = deadline.saturating_mul(u32::try_from(own.len()).unwrap_or(1));
            let answers = self.ask(&[only], deadline, |_| {
                let own = std::mem::take(&mut own);
                move |post: &mut Post| own.into_iter().map(|job| job(post)).collect::<Result<Vec<R>, _>>()
            });
            for (index, results) in self.in_time(self.all_ok(answers), deadline)? {
                done.extend(results.into_iter().map(|result| (index, result)));
            }
            return Ok(done);
        }
        for stage in jobs {
            let which: Vec<_> = stage.iter().map(|(index, _)| *index).collect();
            let mut stage = stage.into_iter();
            // Asked in the order of `which`, so that each gets its own.
            let answers = self.ask(&which, deadline, |_| {
                let job = stage.next().map(|(_, job)| job);
                move |post: &mut Post| {
                    job.map_or_else(
                        || Err(StreamFault::Device(super::worker::misuse("no step"))),
                        |job| job(post),
                    )
                }
            });
            done.extend(self.in_time(self.all_ok(answers), deadline)?);
        }
        Ok(done)
    }

    /// Brings every device back to what it was before the migration, as far as it can be (I2, I6).
    pub(super) fn roll_back(&mut self, policy: ResetPolicy, deadline: Duration) -> Vec<Recovered> {
        let everyone: Vec<_> = (0..self.len()).collect();
        let found = self.ask(&everyone, deadline, |_| {
            |post: &mut Post| {
                post.close_session();
                let found = post.device()?.state()?;
                let by_itself = post.was_reset_under_us(found);
                post.note(found);
                Ok((found, by_itself))
            }
        });
        self.forget_way();
        let mut by_itself = vec![false; self.len()];
        let devices = found
            .into_iter()
            .map(|(index, answer)| ResumeDevice {
                id: self.ids[index].clone(),
                capabilities: self.capabilities[index],
                ran_before: self.ran_before[index],
                found: answer.and_then(|r| r).map(|(state, was_reset)| {
                    by_itself[index] = was_reset;
                    state
                }),
            })
            .collect();
        let mut rollback = Rollback::new(devices, policy);
        while let Some(stage) = rollback.next_stage() {
            let steps: Vec<_> = stage
                .steps
                .iter()
                .filter_map(|step| Some((self.index_of(&step.device)?, step.action)))
                .collect();
            let which: Vec<_> = steps.iter().map(|(index, _)| *index).collect();
            let answers = self.ask(&which, deadline, |index| {
                let action = steps.iter().find(|(i, _)| *i == index).map(|(_, action)| *action);
                move |post: &mut Post| walk_back(post, action)
            });
            for (index, answer) in answers {
                rollback.report(&self.ids[index], answer.and_then(|r| r));
            }
        }
        let mut recovered = rollback.finish();
        for (index, end) in recovered.iter_mut().enumerate() {
            // What the guest saw of it is lost, whoever has reset it.
            end.was_reset |= by_itself[index];
            self.was_reset[index] |= end.was_reset;
            if let Fate::Quarantined { reason } = &end.fate {
                self.note_quarantine(index, DeviceErrorKind::Refused, reason);
            }
        }
        recovered
    }

    /// Resets every device that can be asked. Gives those that could not be.
    pub(super) fn reset_all(&mut self, deadline: Duration) -> Vec<(DeviceId, DeviceError)> {
        let everyone: Vec<_> = (0..self.len()).collect();
        let answers = self.ask(&everyone, deadline, |_| reset);
        let mut failed = Vec::new();
        for (index, answer) in answers {
            match answer.and_then(|r| r) {
                Ok(()) => self.was_reset[index] = true,
                Err(error) => {
                    self.note_quarantine(index, error.kind.clone(), &format!("its reset failed: {error}"));
                    failed.push((self.ids[index].clone(), error));
                }
            }
        }
        failed
    }

    /// Ends the workers and gives the devices that are still at hand.
    pub(super) fn into_devices(mut self, deadline: Duration) -> Vec<Box<dyn MigrationDevice>> {
        let which = self.present();
        let answers = self.ask(&which, deadline, |_| |post: &mut Post| post.give_up_device());
        answers.into_iter().filter_map(|(_, answer)| answer.ok().flatten()).collect()
    }
}

fn walk_back(post: &mut Post, action: Option<Action>) -> Result<DeviceState, DeviceError> {
    // A step that fails is not the end: the state that is read back decides what comes next (I6).
    match action {
        Some(Action::SetState(target)) => {
            if let Err(error) = post.walk(target) {
                tracing::warn!(error = %error, "a step of the rollback failed");
            }
        }
        Some(Action::Reset) => reset(post)?,
        None => {}
    }
    post.state()
}

fn reset(post: &mut Post) -> Result<(), DeviceError> {
    post.close_session();
    let begun = post.recorder.now();
    let recorder = post.recorder.clone();
    let device = post.device()?;
    let from = device.state().unwrap_or(DeviceState::UNREAD);
    device.reset()?;
    let to = device.state()?;
    recorder.arc(device.id(), from, to, begun);
    post.note(to);
    Ok(())
}

//! One thread for each device, because an arc blocks (V2-BLOCKING). It owns the device; whoever wants something of it asks by a call and
//! waits for the answer, with a deadline.
//!
//! Between calls the worker does what its device's state asks for: in pre-copy it streams, in
//! RESUMING it writes what arrives. A call that a device never answers leaves thread and device
//! behind (quarantined); nothing waits for them.

use super::held::Idle;
use super::load::{InFrame, Incoming};
use super::recorder::Recorder;
use super::save::{Outgoing, SaveStatus, SaveStream, Step};
use super::sink::{SetEvent, StreamFault};
use super::trace;
use crate::control::{DeviceGauges, Gauges};
use crate::spawn::{Role, SpawnError};
use airlift_core::{
    Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Interrupter,
    MigrationDevice,
};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, never, unbounded};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A device and what it is in the middle of.
pub(super) enum Held {
    Idle(Idle),
    Saving(Box<Outgoing>),
    Loading(Box<Incoming>),
    /// Moved out, for the length of a call or for good.
    Gone,
}

/// What a worker's calls work on.
pub(super) struct Post {
    pub(super) held: Held,
    /// The stream of a device without PRE_COPY, until the stop opens its session.
    pub(super) waiting: Option<SaveStream>,
    pub(super) recorder: Recorder,
    pub(super) status: Arc<Mutex<SaveStatus>>,
    pub(super) gauges: Arc<Gauges>,
    pub(super) index: u32,
    pub(super) events: Sender<SetEvent>,
    /// A stream that failed by itself is not stepped again.
    failed: bool,
}

impl Post {
    /// The device, whatever it is in the middle of.
    pub(super) fn device(&mut self) -> Result<&mut dyn MigrationDevice, DeviceError> {
        match &mut self.held {
            Held::Idle(idle) => Ok(&mut *idle.device),
            Held::Saving(outgoing) => Ok(&mut *outgoing.saving.device),
            Held::Loading(_) => Err(misuse("the device is loading")),
            Held::Gone => Err(misuse("the device is not here")),
        }
    }

    pub(super) fn state(&mut self) -> Result<DeviceState, DeviceError> {
        let state = self.device()?.state()?;
        self.note(state);
        Ok(state)
    }

    fn gauge(&self) -> Option<&DeviceGauges> {
        self.gauges.devices.get(usize::try_from(self.index).ok()?)
    }

    pub(super) fn note(&self, state: DeviceState) {
        if let Some(gauge) = self.gauge() {
            gauge.state.store(state.to_raw(), Ordering::Relaxed);
        }
    }

    /// Whether the device, found in this state, was reset without having been asked: it was stopped, or
    /// quiet, when it was seen last, and nobody but itself can have let it run (V1-RESET, V2-STALE).
    pub(super) fn was_reset_under_us(&self, found: DeviceState) -> bool {
        let noted = self.gauge().map(|gauge| DeviceState::from_raw(gauge.state.load(Ordering::Relaxed)));
        let ours = matches!(noted, Some(DeviceState::StopCopy | DeviceState::PreCopyP2p));
        ours && found == DeviceState::Running
    }

    /// Ends whatever session there is and holds the bare device.
    pub(super) fn close_session(&mut self) {
        self.waiting = None;
        self.held = match std::mem::replace(&mut self.held, Held::Gone) {
            Held::Saving(outgoing) => Held::Idle(outgoing.close()),
            Held::Loading(incoming) => Held::Idle(incoming.abandon()),
            other => other,
        };
    }

    /// Forgets what an earlier session left: a set can be used again.
    pub(super) fn begin(&mut self) {
        self.failed = false;
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = SaveStatus::default();
    }

    fn step(&mut self) -> Step {
        if self.failed {
            return Step::Parked;
        }
        let Held::Saving(outgoing) = &mut self.held else {
            return Step::Parked;
        };
        outgoing.step(self.recorder.now()).unwrap_or_else(|error| self.fail(error))
    }

    fn take(&mut self, frame: InFrame) {
        if self.failed {
            return;
        }
        let result = match &mut self.held {
            Held::Loading(incoming) => incoming.take(frame),
            _ => Err(StreamFault::Device(misuse("a frame for a device that is not loading"))),
        };
        if let Err(error) = result {
            self.fail(error);
        }
    }

    fn fail(&mut self, error: StreamFault) -> Step {
        self.failed = true;
        // A closed way is somebody else's failure, and known there.
        if !matches!(error, StreamFault::Closed(_)) {
            let _ = self.events.send(SetEvent::Failed { device: self.index, error });
        }
        Step::Parked
    }
}

pub(super) fn misuse(message: &str) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Misuse, "device worker", message)
}

type Job = Box<dyn FnOnce(&mut Post) + Send>;

/// The handle to a device's thread.
pub(super) struct Worker {
    pub(super) id: DeviceId,
    pub(super) capabilities: Capabilities,
    pub(super) identity: DeviceIdentity,
    pub(super) status: Arc<Mutex<SaveStatus>>,
    interrupter: Interrupter,
    jobs: Sender<Job>,
    frames: Sender<InFrame>,
    recorder: Recorder,
}

impl Worker {
    /// Starts the thread.
    pub(super) fn start(
        device: Box<dyn MigrationDevice>,
        index: u32,
        recorder: &Recorder,
        gauges: Arc<Gauges>,
        events: Sender<SetEvent>,
    ) -> Result<Self, SpawnError> {
        let (jobs, inbox) = unbounded::<Job>();
        let (frames, arriving) = unbounded::<InFrame>();
        let recorder = recorder.of_worker();
        trace::probe(device.id(), &device.capabilities());
        let status = Arc::new(Mutex::new(SaveStatus::default()));
        let worker = Self {
            id: device.id().clone(),
            capabilities: device.capabilities(),
            identity: device.identity().clone(),
            status: Arc::clone(&status),
            interrupter: device.interrupter(),
            jobs,
            frames,
            recorder: recorder.clone(),
        };
        let post = Post {
            held: Held::Idle(Idle { device }),
            waiting: None,
            recorder: recorder.clone(),
            status,
            gauges,
            index,
            events,
            failed: false,
        };
        recorder.environment.spawner.spawn(
            Role::Device,
            &format!("dev-{index}"),
            Box::new(move || run(post, &inbox, arriving)),
        )?;
        Ok(worker)
    }

    /// Asks the worker to do something with its device.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Post) -> R + Send + 'static,
    ) -> Answer<R> {
        let (reply, answer) = bounded(1);
        let job: Job = Box::new(move |post| {
            // Whoever asked may have given up.
            let _ = reply.send(f(post));
        });
        // A worker that is gone drops the reply, and the answer says so.
        let _ = self.jobs.send(job);
        Answer(answer)
    }

    /// Where frames for the device go in. Bounded by the room that the other side was given.
    pub(super) fn frames(&self) -> Sender<InFrame> {
        self.frames.clone()
    }

    pub(super) fn interrupt(&self) -> bool {
        self.interrupter.interrupt()
    }

    /// Gives the device up: calls that wait are dropped, and the one under way begins no more arc.
    pub(super) fn abandon(&self) {
        self.recorder.abandon();
    }

    pub(super) fn save_status(&self) -> SaveStatus {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer that has not come yet.
pub(super) struct Answer<R>(pub(super) Receiver<R>);

/// No answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// Not before the deadline.
    Late,
    /// The worker is gone: a panic in the device's implementation.
    Dead,
}

impl<R> Answer<R> {
    pub(super) fn wait(&self, until: Instant) -> Result<R, NoAnswer> {
        self.0.recv_deadline(until).map_err(|e| match e {
            RecvTimeoutError::Timeout => NoAnswer::Late,
            RecvTimeoutError::Disconnected => NoAnswer::Dead,
        })
    }
}

fn run(mut post: Post, inbox: &Receiver<Job>, arriving: Receiver<InFrame>) {
    let mut frames = arriving;
    while !post.recorder.is_abandoned() {
        let wait = match post.step() {
            Step::Again => match inbox.try_recv() {
                Ok(job) => {
                    if !post.recorder.is_abandoned() {
                        job(&mut post);
                        // Whoever asked goes first: with few processors it would wait for what comes next here.
                        std::thread::yield_now();
                    }
                    continue;
                }
                Err(TryRecvError::Empty) => continue,
                Err(TryRecvError::Disconnected) => return,
            },
            Step::Wait(wait) => Some(wait),
            Step::Parked => None,
        };
        let timeout = wait.map_or_else(never, crossbeam_channel::after);
        crossbeam_channel::select_biased! {
            recv(inbox) -> job => match job {
                Ok(job) if !post.recorder.is_abandoned() => {
                    job(&mut post);
                    std::thread::yield_now();
                }
                Ok(_) => return,
                Err(_) => return,
            },
            recv(frames) -> frame => match frame {
                Ok(frame) => post.take(frame),
                Err(_) => frames = never(),
            },
            recv(timeout) -> _ => {}
        }
    }
}

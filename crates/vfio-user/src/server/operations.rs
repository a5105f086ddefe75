//! Operations that take time: transitions, resets, changes of DMA mappings, and the end of a client.
//!
//! One is open at a time. It goes from step to step as the data thread and the device answer; each
//! step has a deadline. A combination of arcs is walked here, arc by arc, and a failure leaves the
//! state where the device says it is (V2-READBACK).

use super::connection::Conn;
use super::data::Job;
use super::v1::Round;
use super::worker::{OpenSession, Worker};
use super::{Event, Request};
use crate::codec::Header;
use crate::{Completion, Detach, DmaChange, Done};
use airlift_core::{Arc as StateArc, ArcSession, DeviceState, Errno, path};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Whom to answer.
pub(super) struct Asker {
    pub(super) conn: Arc<Conn>,
    pub(super) header: Header,
    /// What the answer repeats.
    pub(super) echo: Vec<u8>,
    /// Kept until the answer: the client's share of what may be under way.
    pub(super) _request: Request,
}

enum Kind {
    /// SET of the state.
    SetState(Asker),
    /// DEVICE_RESET.
    Reset(Asker),
    /// DMA_MAP.
    Map { asker: Asker, iova: u64, length: u64 },
    /// DMA_UNMAP; those after the first of the list are still to be done.
    Unmap { asker: Asker, ranges: VecDeque<(u64, u64)> },
    /// A connection has ended, and its session with it. `why`: it was the client's own.
    End { owner: u64, why: Option<Detach> },
}

enum Step {
    /// The data thread works off what it has; then comes this arc, or what is not an arc.
    Data(Option<StateArc>),
    /// The device makes this arc, or does what is not an arc.
    Device(Option<StateArc>),
}

/// A write of device_state, which leaves the state before it or ERROR when it fails (V1-READBACK).
struct StateWrite {
    before: DeviceState,
    /// Why it failed; the device is being walked back.
    failed: Option<Errno>,
}

/// An operation that is open.
pub(super) struct Operation {
    kind: Kind,
    arcs: VecDeque<StateArc>,
    /// It is a write of device_state (interface v1).
    write: Option<StateWrite>,
    step: Step,
    token: u64,
    deadline: Instant,
}

impl Operation {
    pub(super) const fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Worker {
    fn open(&mut self, kind: Kind, arcs: VecDeque<StateArc>) {
        let deadline = Instant::now() + self.options.transition_timeout;
        self.operation =
            Some(Operation { kind, arcs, write: None, step: Step::Device(None), token: 0, deadline });
    }

    /// Sets the next step of the open operation; the number that its answer must have.
    fn step(&mut self, step: Step) -> u64 {
        let token = self.token();
        let deadline = Instant::now() + self.options.transition_timeout;
        if let Some(operation) = &mut self.operation {
            operation.step = step;
            operation.token = token;
            operation.deadline = deadline;
        }
        token
    }

    fn done(&self, token: u64) -> Done {
        let sender = self.sender.clone();
        Done::new(move |completion| {
            // The server may have ended before.
            let _ = sender.send(Event::Completed(token, completion));
        })
    }

    /// SET of the state: walks there.
    pub(super) fn set_state(&mut self, asker: Asker, target: DeviceState) {
        let Some(caps) = self.caps else { return asker.conn.refuse(asker.header, Errno::ENOTTY) };
        match path(self.state, target, &caps) {
            Ok(arcs) => {
                self.open(Kind::SetState(asker), arcs.into());
                self.next_arc();
            }
            Err(error) => {
                tracing::debug!(%error, "transition refused");
                asker.conn.refuse(asker.header, error.errno());
            }
        }
    }

    /// A write of device_state: makes these arcs.
    pub(super) fn walk_migration(&mut self, asker: Asker, walk: Vec<StateArc>) {
        let before = self.state;
        self.open(Kind::SetState(asker), walk.into());
        if let Some(operation) = &mut self.operation {
            operation.write = Some(StateWrite { before, failed: None });
        }
        self.next_arc();
    }

    /// How a write of device_state ends that was walked so far; `None` when the device is walked back
    /// first. It is where nothing but the run was lost: from RUNNING and STOP. Whatever else is neither
    /// the state before nor ERROR becomes ERROR (V1-READBACK).
    fn settle(&mut self, result: Result<(), Errno>) -> Option<Result<(), Errno>> {
        let at = self.state;
        let Some(write) = self.operation.as_mut().and_then(|o| o.write.as_mut()) else { return Some(result) };
        let (errno, first) = match (write.failed, result) {
            (None, Ok(())) => return Some(Ok(())),
            (None, Err(errno)) => (errno, true),
            (Some(errno), _) => (errno, false),
        };
        write.failed = Some(errno);
        let before = write.before;
        if at == before {
            return Some(Err(errno));
        }
        // In RESUMING what the device held is forgotten.
        let kept = matches!(before, DeviceState::Running | DeviceState::Stop) && at != DeviceState::Resuming;
        let back = self.caps.filter(|_| first && kept).and_then(|caps| path(at, before, &caps).ok());
        match (back, &mut self.operation) {
            (Some(back), Some(operation)) => {
                tracing::debug!(%at, %before, "a write of device_state has failed: back");
                operation.arcs = back.into();
                self.next_arc();
                None
            }
            _ => {
                self.state = DeviceState::Error;
                Some(Err(errno))
            }
        }
    }

    fn next_arc(&mut self) {
        let next = self.operation.as_mut().map(|o| o.arcs.pop_front());
        let arc = match next {
            None => return,
            Some(None) => return self.finish(Ok(())),
            Some(Some(arc)) => arc,
        };
        // The device has said before that it stopped (VU-GUARD).
        if arc.from == DeviceState::Stop && arc.to == DeviceState::StopCopy && self.guard_lives(arc) {
            return self.finish(Err(Errno::EBUSY));
        }
        match arc.session() {
            ArcSession::Keeps => {
                let token = self.step(Step::Data(Some(arc)));
                self.send_job(Job::Barrier(token));
            }
            // The loader goes before the arc that validates what it took.
            ArcSession::Ends => {
                let token = self.step(Step::Data(Some(arc)));
                self.end_session(token);
            }
            // The section is wiped of the session before: what a client writes next must stay (V1-PRIVATE).
            ArcSession::OpensLoad if self.region.is_some() => {
                let token = self.step(Step::Data(Some(arc)));
                self.send_job(Job::Barrier(token));
            }
            ArcSession::None | ArcSession::OpensSave | ArcSession::OpensLoad => self.call_device(arc),
        }
    }

    fn call_device(&mut self, arc: StateArc) {
        let token = self.step(Step::Device(Some(arc)));
        tracing::debug!(from = %arc.from, to = %arc.to, "arc begins");
        let done = self.done(token);
        self.device.transition(arc, done);
    }

    fn guard_lives(&self, arc: StateArc) -> bool {
        let Some(guard) = self.dma.write_guard() else { return false };
        tracing::warn!(
            from = %arc.from,
            to = %arc.to,
            iova = guard.iova,
            length = guard.length,
            age_ms = guard.age.as_millis(),
            "refused: the device still holds memory for writing"
        );
        true
    }

    fn send_job(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the data thread is gone");
        }
    }

    /// Lets the data thread end the session, and say so with this number.
    fn end_session(&self, token: u64) {
        self.send_job(Job::End { token, region: self.region.clone() });
    }

    /// Hands data requests over, in the order of arrival.
    pub(super) fn data_job(&self, job: Job) {
        self.send_job(job);
    }

    /// The data thread has done what was before the step.
    pub(super) fn data_idle(&mut self, token: u64) {
        let Some(operation) = &self.operation else { return };
        if operation.token != token {
            return;
        }
        let Step::Data(arc) = operation.step else { return };
        match arc {
            Some(arc) => {
                let spoiled = self.session.as_ref().is_some_and(|s| s.spoiled.load(Ordering::Acquire));
                if arc.from == DeviceState::Resuming && spoiled {
                    // What was written has a hole: it must not be loaded (V2-WRITE-FINAL).
                    return self.finish(Err(Errno::EIO));
                }
                self.call_device(arc);
            }
            None if matches!(operation.kind, Kind::Reset(_)) => {
                let token = self.step(Step::Device(None));
                let done = self.done(token);
                self.device.reset(done);
            }
            // The end of a connection in RESUMING: what was written is of no use.
            None => {
                self.state = DeviceState::Error;
                self.session = None;
                self.finish(Ok(()));
            }
        }
    }

    /// The device has answered.
    pub(super) fn completed(&mut self, token: u64, completion: Completion) {
        let Some(operation) = &self.operation else { return };
        if operation.token != token {
            tracing::warn!(?completion, "the device answered after its deadline");
            return;
        }
        let Step::Device(arc) = operation.step else { return };
        match (&operation.kind, completion) {
            (Kind::Map { .. } | Kind::Unmap { .. }, completion) => self.dma_completed(completion),
            (_, Completion::Ok) => match arc {
                Some(arc) => self.arc_made(arc),
                None => {
                    self.state = DeviceState::Running;
                    self.session = None;
                    self.finish(Ok(()));
                }
            },
            (_, Completion::Failed { errno, reached }) => {
                self.state = reached;
                self.finish(Err(errno));
            }
            (_, Completion::Dropped) => {
                self.state = DeviceState::Error;
                self.finish(Err(Errno::EIO));
            }
        }
    }

    fn arc_made(&mut self, arc: StateArc) {
        tracing::debug!(from = %arc.from, to = %arc.to, "arc made");
        self.state = arc.to;
        let owner = match self.operation.as_ref().map(|o| &o.kind) {
            Some(Kind::SetState(asker)) => asker.conn.id,
            _ => 0,
        };
        let spoiled = Arc::new(AtomicBool::new(false));
        match arc.session() {
            ArcSession::OpensSave => {
                let saver = self.device.saver();
                self.send_job(Job::Save(saver));
                self.session = Some(OpenSession { owner, spoiled, round: Round::default() });
            }
            ArcSession::OpensLoad => {
                let loader = self.device.loader();
                self.send_job(Job::Load(loader, Arc::clone(&spoiled)));
                self.session = Some(OpenSession { owner, spoiled, round: Round::default() });
            }
            ArcSession::Ends => self.session = None,
            ArcSession::None | ArcSession::Keeps => {}
        }
        // A device that has stopped holds no memory for writing (VU-GUARD).
        if arc.from.is_live() && !arc.to.is_live() && self.guard_lives(arc) {
            return self.finish(Err(Errno::EBUSY));
        }
        self.next_arc();
    }

    pub(super) fn operation_timed_out(&mut self) {
        let Some(operation) = &self.operation else { return };
        tracing::warn!("an operation of the device has exceeded its deadline");
        match (&operation.kind, &operation.step) {
            (Kind::Map { .. } | Kind::Unmap { .. }, _) => self.dma_failed(Errno::ETIMEDOUT),
            (Kind::End { .. }, Step::Data(None)) => {
                // Half a state was written, whether the loader ever ends or not.
                self.state = DeviceState::Error;
                self.finish(Err(Errno::ETIMEDOUT));
            }
            (_, Step::Data(_)) => self.finish(Err(Errno::ETIMEDOUT)),
            (_, Step::Device(_)) => {
                self.state = DeviceState::Error;
                self.finish(Err(Errno::ETIMEDOUT));
            }
        }
    }

    /// DEVICE_RESET.
    pub(super) fn reset(&mut self, asker: Asker) {
        self.open(Kind::Reset(asker), VecDeque::new());
        let token = self.step(Step::Data(None));
        self.end_session(token);
    }

    /// The operation is over.
    fn finish(&mut self, result: Result<(), Errno>) {
        let Some(result) = self.settle(result) else { return };
        let Some(operation) = self.operation.take() else { return };
        // A session has no place in these states, however they were reached.
        if !self.state.is_saving() && self.state != DeviceState::Resuming && self.session.take().is_some() {
            self.end_session(0);
        }
        match operation.kind {
            Kind::SetState(asker)
            | Kind::Reset(asker)
            | Kind::Map { asker, .. }
            | Kind::Unmap { asker, .. } => match result {
                Ok(()) => asker.conn.reply(asker.header, &[&asker.echo], &[]),
                Err(errno) => asker.conn.refuse(asker.header, errno),
            },
            Kind::End { owner, why } => {
                if let Err(errno) = result {
                    tracing::warn!(%errno, state = %self.state, "a session could not be ended in order");
                }
                if self.session.as_ref().is_some_and(|s| s.owner == owner || why.is_some()) {
                    self.session = None;
                    self.end_session(0);
                }
                if let Some(why) = why {
                    self.detach(why);
                }
            }
        }
    }

    /// DMA_MAP: the range is mapped; the device is told.
    pub(super) fn mapped(&mut self, asker: Asker, iova: u64, length: u64) {
        self.open(Kind::Map { asker, iova, length }, VecDeque::new());
        let token = self.step(Step::Device(None));
        let done = self.done(token);
        self.device.dma_changed(DmaChange::Mapped { iova, length }, done);
    }

    /// DMA_UNMAP: the device lets go of the ranges, one after the other.
    pub(super) fn unmap(&mut self, asker: Asker, ranges: VecDeque<(u64, u64)>) {
        self.open(Kind::Unmap { asker, ranges }, VecDeque::new());
        self.next_unmap();
    }

    fn next_unmap(&mut self) {
        let next = match self.operation.as_ref().map(|o| &o.kind) {
            Some(Kind::Unmap { ranges, .. }) => ranges.front().copied(),
            _ => None,
        };
        let Some((iova, length)) = next else { return self.finish(Ok(())) };
        let token = self.step(Step::Device(None));
        let done = self.done(token);
        self.device.dma_changed(DmaChange::Unmapping { iova, length }, done);
    }

    fn dma_completed(&mut self, completion: Completion) {
        match completion {
            Completion::Ok => {}
            Completion::Failed { errno, .. } => return self.dma_failed(errno),
            Completion::Dropped => return self.dma_failed(Errno::EIO),
        }
        let range = match self.operation.as_mut().map(|o| &mut o.kind) {
            Some(Kind::Unmap { ranges, .. }) => ranges.pop_front(),
            _ => return self.finish(Ok(())),
        };
        match range.map(|(iova, length)| self.dma.remove(iova, length)) {
            Some(Err(errno)) => self.finish(Err(errno)),
            Some(Ok(())) | None => self.next_unmap(),
        }
    }

    /// A range that the device refused is not mapped; one that it did not let go of stays.
    fn dma_failed(&mut self, errno: Errno) {
        if let Some(Operation { kind: Kind::Map { iova, length, .. }, .. }) = &self.operation {
            let (iova, length) = (*iova, *length);
            if let Err(errno) = self.dma.remove(iova, length) {
                tracing::warn!(%errno, iova, length, "a mapping that the device refused stays");
            }
        }
        self.finish(Err(errno));
    }

    /// A connection has ended: so does the session that it opened (VU-SESSION-END).
    pub(super) fn closed(&mut self, id: u64, why: Detach) {
        let primary = self.primary.as_ref().is_some_and(|c| c.id == id);
        let migration = self.migration.as_ref().is_some_and(|c| c.id == id);
        if !primary && !migration {
            return;
        }
        tracing::debug!(?why, primary, "connection ended");
        if migration {
            self.migration = None;
            self.parked.clear();
        }
        let owns = self.session.as_ref().is_some_and(|s| primary || s.owner == id);
        let why = primary.then_some(why);
        self.open(Kind::End { owner: id, why }, VecDeque::new());
        let target = match self.state {
            _ if !owns => None,
            DeviceState::StopCopy => Some(DeviceState::Stop),
            DeviceState::PreCopy => Some(DeviceState::Running),
            DeviceState::PreCopyP2p => Some(DeviceState::RunningP2p),
            DeviceState::Resuming => {
                let token = self.step(Step::Data(None));
                return self.end_session(token);
            }
            _ => None,
        };
        if let (Some(target), Some(operation)) = (target, &mut self.operation) {
            operation.arcs.push_back(StateArc::new(self.state, target));
        }
        self.next_arc();
    }
}

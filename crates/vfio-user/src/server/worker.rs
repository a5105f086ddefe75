//! The device thread: who is attached, what is queued, and which event comes next.

use super::connection::{Conn, Request, Role};
use super::data::Job;
use super::operations::Operation;
use super::v1::{Round, V1Region};
use super::{Event, ServerOptions};
use crate::codec::{
    DEFAULT_MAX_DATA_XFER_SIZE, FeatureFlags, FeatureHeader, VersionCaps, VersionMessage, command, feature,
    take,
};
use crate::{Attachment, Description, DescriptionError, Detach, Device, Dma, Irqs, MigrationInterface};
use airlift_core::{Capabilities, DeviceState, Errno, MigrationFlags};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// What waits for an operation to end.
pub(super) enum Queued {
    Request(Arc<Conn>, Request),
    Closed(u64, Detach),
}

/// The data session that is open.
pub(super) struct OpenSession {
    /// The connection that opened it; with its end the session ends.
    pub(super) owner: u64,
    /// A write has failed (V2-WRITE-FINAL).
    pub(super) spoiled: Arc<AtomicBool>,
    /// Over interface v1, while it loads.
    pub(super) round: Round,
}

/// The device thread's state.
pub(super) struct Worker {
    pub(super) device: Box<dyn Device>,
    pub(super) description: Description,
    /// What the device itself can do, arc by arc: as of interface v2 over both interfaces.
    pub(super) caps: Option<Capabilities>,
    /// The migration region, over interface v1.
    pub(super) region: Option<Arc<V1Region>>,
    pub(super) options: ServerOptions,
    pub(super) sender: Sender<Event>,
    receiver: Receiver<Event>,
    pub(super) jobs: Sender<Job>,
    pub(super) dma: Dma,
    pub(super) irqs: Irqs,
    pub(super) state: DeviceState,
    pub(super) session: Option<OpenSession>,
    pub(super) primary: Option<Arc<Conn>>,
    pub(super) migration: Option<Arc<Conn>>,
    pub(super) operation: Option<Operation>,
    queue: VecDeque<Queued>,
    /// Requests of the second connection that wait until its client takes its answers (VU-UNREAD).
    pub(super) parked: Vec<(Arc<Conn>, Request)>,
    next_id: u64,
    handshake: Option<Instant>,
    attached: bool,
    waiting: Option<UnixStream>,
    single: bool,
    stopping: bool,
}

impl Worker {
    /// An error of kind `InvalidInput` holds a [`DescriptionError`].
    pub(super) fn new(
        device: Box<dyn Device>,
        options: ServerOptions,
        sender: Sender<Event>,
        receiver: Receiver<Event>,
        jobs: Sender<Job>,
    ) -> io::Result<Self> {
        let description = device.describe();
        let (caps, region) = migration(&description, &options)?;
        let irqs = Irqs::new(&description.irqs);
        Ok(Self {
            device,
            caps,
            region,
            dma: Dma::new(options.max_log_bytes),
            irqs,
            description,
            options,
            sender,
            receiver,
            jobs,
            state: DeviceState::Running,
            session: None,
            primary: None,
            migration: None,
            operation: None,
            queue: VecDeque::new(),
            parked: Vec::new(),
            next_id: 1,
            handshake: None,
            attached: false,
            waiting: None,
            single: false,
            stopping: false,
        })
    }

    /// Runs until it is stopped, or until `only`, where given, has gone.
    pub(super) fn run(mut self, only: Option<UnixStream>) -> Box<dyn Device> {
        if let Some(stream) = only {
            self.single = true;
            self.accept(stream);
        }
        while !self.finished() {
            let deadline = match (&self.operation, self.handshake) {
                (Some(operation), _) => Some(operation.deadline()),
                (None, handshake) => handshake,
            };
            let event = match deadline {
                None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self.receiver.recv_deadline(deadline),
            };
            match event {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => self.deadline_passed(),
                // The worker holds a sender itself: this cannot come.
                Err(RecvTimeoutError::Disconnected) => break,
            }
            while self.operation.is_none() {
                match self.queue.pop_front() {
                    None => break,
                    Some(Queued::Request(conn, request)) => self.request(&conn, request),
                    Some(Queued::Closed(id, why)) => self.closed(id, why),
                }
            }
        }
        self.device
    }

    fn finished(&self) -> bool {
        (self.stopping || self.single) && self.primary.is_none() && self.operation.is_none()
    }

    pub(super) fn token(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Incoming(stream) => self.incoming(stream),
            Event::Request(conn, request) => {
                // Later requests do not overtake queued ones, but for those that never wait.
                if self.operation.is_none() || self.never_waits(&request) {
                    self.request(&conn, request);
                } else {
                    self.queue.push_back(Queued::Request(conn, request));
                }
            }
            Event::Answered(id) => {
                if self.migration.as_ref().is_some_and(|conn| conn.id == id) {
                    for (conn, request) in std::mem::take(&mut self.parked) {
                        self.handle(Event::Request(conn, request));
                    }
                }
            }
            Event::Closed(id, why) => self.queue.push_back(Queued::Closed(id, why)),
            Event::Completed(token, completion) => self.completed(token, completion),
            Event::DataIdle(token) => self.data_idle(token),
            Event::Stop => {
                self.stopping = true;
                self.waiting = None;
                if let Some(primary) = &self.primary {
                    self.queue.push_back(Queued::Closed(primary.id, Detach::Shutdown));
                    primary.close();
                }
            }
        }
    }

    /// Requests that are answered while an operation is open: they need no order among transitions.
    fn never_waits(&self, request: &Request) -> bool {
        matches!(
            request.header.command,
            command::VERSION
                | command::REGION_READ
                | command::REGION_WRITE
                | command::REGION_WRITE_MULTI
                | command::DEVICE_GET_INFO
                | command::DEVICE_GET_REGION_INFO
                | command::DEVICE_GET_IRQ_INFO
        ) && !self.is_migration_access(request)
    }

    fn incoming(&mut self, stream: UnixStream) {
        if self.stopping {
            return;
        }
        match &self.primary {
            None => self.accept(stream),
            // The client has gone, and its end is still being worked off: the new one waits for that.
            Some(primary) if primary.peer_gone() && self.waiting.is_none() => self.waiting = Some(stream),
            Some(_) => tracing::info!("a second client was refused"),
        }
    }

    fn accept(&mut self, stream: UnixStream) {
        let id = self.token();
        match Conn::start(id, Role::Primary, stream, &self.options, self.sender.clone()) {
            Ok(conn) => {
                self.primary = Some(conn);
                self.handshake = Instant::now().checked_add(self.options.handshake_timeout);
            }
            Err(error) => tracing::error!(%error, "a client could not be served"),
        }
    }

    fn deadline_passed(&mut self) {
        if self.operation.is_some() {
            self.operation_timed_out();
        } else if self.handshake.take().is_some()
            && let Some(primary) = &self.primary
        {
            tracing::info!("a client sent no VERSION in time");
            primary.close();
        }
    }

    fn request(&mut self, conn: &Arc<Conn>, request: Request) {
        let header = request.header;
        if !self.is_current(conn) {
            return;
        }
        // Behind those that are parked already, in order. Each keeps its share of what may be under way, so
        // that the client is soon not read any more.
        if conn.role == Role::Migration && (!self.parked.is_empty() || conn.is_full()) {
            return self.parked.push((Arc::clone(conn), request));
        }
        if header.command == command::VERSION {
            return self.version(conn, &request);
        }
        if !conn.is_negotiated() {
            return conn.refuse(header, Errno::EINVAL);
        }
        if conn.role == Role::Migration && !self.allowed_for_migration(&request) {
            return conn.refuse(header, Errno::EPERM);
        }
        // A second connection whose peer has gone makes room for the next one, once its session is over.
        if asks_for_socket(&request)
            && let Some(old) = self.migration.as_ref().filter(|old| old.peer_gone())
        {
            let id = old.id;
            self.closed(id, Detach::Closed);
            if self.operation.is_some() {
                return self.queue.push_front(Queued::Request(Arc::clone(conn), request));
            }
        }
        self.dispatch(conn, request);
    }

    fn is_current(&self, conn: &Conn) -> bool {
        let of = |slot: &Option<Arc<Conn>>| slot.as_ref().is_some_and(|c| c.id == conn.id);
        of(&self.primary) || of(&self.migration)
    }

    /// VERSION: the minor version is the smaller one; the answer is no longer than the question
    /// (VU-VERSION).
    fn version(&mut self, conn: &Arc<Conn>, request: &Request) {
        let header = request.header;
        let theirs = match VersionMessage::decode(&request.payload) {
            Ok(theirs) if theirs.major == 0 && request.fds.is_empty() && !conn.is_negotiated() => theirs,
            Ok(_) => return conn.refuse(header, Errno::EINVAL),
            Err(error) => {
                tracing::debug!(%error, "VERSION refused");
                return conn.refuse(header, Errno::EINVAL);
            }
        };
        // No client sees what another one left or does in its data section (V1-PRIVATE).
        if conn.role == Role::Primary
            && let Some(region) = &self.region
        {
            match region.renewed() {
                Ok(region) => self.region = Some(Arc::new(region)),
                Err(error) => {
                    tracing::error!(%error, "a client could not be served");
                    conn.refuse(header, Errno::ENOMEM);
                    return conn.close();
                }
            }
        }
        let max_data_xfer_size = self.options.max_data_xfer_size;
        let caps = VersionCaps {
            max_msg_fds: 16,
            max_data_xfer_size,
            migration_pgsize: self.caps.is_some().then_some(4096),
        };
        let ours = VersionMessage { major: 0, minor: theirs.minor.min(2), caps };
        let answer = ours.encode_within(request.payload.len());
        if answer.len() == 4 && max_data_xfer_size < DEFAULT_MAX_DATA_XFER_SIZE {
            tracing::warn!("the client's VERSION leaves no room to say max_data_xfer_size");
        }
        conn.negotiated(&theirs.caps);
        conn.reply(header, &[&answer], &[]);
        if conn.role == Role::Primary {
            self.handshake = None;
            self.attached = true;
            // Clones of the memory of clients before stay without mappings.
            self.dma = Dma::new(self.options.max_log_bytes);
            let attachment = Attachment { dma: self.dma.clone(), irqs: self.irqs.clone(), state: self.state };
            self.device.attach(attachment);
        }
    }

    /// The primary connection has gone and its session is over.
    pub(super) fn detach(&mut self, why: Detach) {
        if let Some(migration) = self.migration.take() {
            migration.close();
        }
        self.parked.clear();
        if let Some(primary) = self.primary.take() {
            primary.close();
        }
        if std::mem::take(&mut self.attached) {
            self.device.detach(why);
        }
        self.dma.clear();
        self.irqs.clear();
        self.handshake = None;
        if let Some(stream) = self.waiting.take() {
            self.accept(stream);
        }
    }
}

/// What a device that is described so can do, and its migration region.
fn migration(
    description: &Description,
    options: &ServerOptions,
) -> io::Result<(Option<Capabilities>, Option<Arc<V1Region>>)> {
    let Some(support) = &description.migration else { return Ok((None, None)) };
    let region = match &support.interface {
        MigrationInterface::V2 => None,
        MigrationInterface::V1(section) => {
            if support.flags != MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY {
                return Err(DescriptionError::V1Flags(support.flags).into());
            }
            if section.whole_transactions && !options.extensions {
                return Err(DescriptionError::WholeTransactions.into());
            }
            Some(Arc::new(V1Region::of(description, section)?))
        }
    };
    let caps = Capabilities::v2(support.flags.bits()).map_err(DescriptionError::from)?;
    Ok((Some(Capabilities { reinit: support.reinit, ..caps }), region))
}

fn asks_for_socket(request: &Request) -> bool {
    let head = take::<FeatureHeader>(&request.payload).map(|(head, _)| head);
    request.header.command == command::DEVICE_FEATURE
        && head.is_some_and(|h| {
            h.index() == feature::MIGRATION_SOCKET && h.operation() == Some(FeatureFlags::GET)
        })
}

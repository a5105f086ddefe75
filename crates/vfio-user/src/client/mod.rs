//! The client: what a VMM uses to drive a device that another process serves.
//!
//! A [`Client`] speaks the protocol for any number of threads. It does not know which state a device
//! may be in for which request, nor does it migrate: [`VfioUserDevice`](crate::VfioUserDevice) does.

mod channel;
mod device;
mod direct;
mod dirty;
mod dma;
mod identity;
mod region;
mod region_info;
mod session;
mod v2;

pub use device::VfioUserDevice;
pub use dirty::VfioUserDirtySource;
pub use dma::{DmaHandler, DmaWriteLog};
pub use region::VfioUserRegion;
pub use region_info::RegionDetails;

use crate::DmaAccess;
use crate::codec::{
    DEFAULT_MAX_DATA_XFER_SIZE, DeviceInfo, DmaMap, DmaUnmap, FeatureFlags, FeatureHeader, IrqInfo, IrqSet,
    IrqSetFlags, MAX_FDS, RegionAccess, VersionCaps, VersionMessage, command, feature, take,
};
use airlift_core::{DeviceError, DeviceErrorKind, DomainId, Errno, Interrupter};
use channel::{Channel, protocol};
use dma::WriteLog;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// How long the server may take to answer a request that is not named below. Default: 10 s.
    pub message_timeout: Duration,
    /// How long the server may take for a reset, a change of DMA mappings, and for each arc of a
    /// transition. Default: 75 s, above what Airlift's own server gives its device, so that its
    /// answer arrives.
    pub transition_timeout: Duration,
    /// How long the server may take to answer one read or write of migration data. Default: 60 s.
    pub data_timeout: Duration,
    /// Most bytes of data in one message that this client takes and sends. Default: 1 MiB.
    pub max_data_xfer_size: u32,
    /// Reads of migration data under way in STOP_COPY. Default: 4.
    pub read_pipeline: usize,
    /// Writes of migration data under way, towards servers that read whole messages. Default: 4.
    pub write_pipeline: usize,
    /// Most bytes of migration data or region data in one message towards servers that may lose what
    /// arrives in two pieces. Default: 32 KiB (VU-WRITE-CHUNK).
    pub foreign_write_chunk: u32,
    /// A device that is found in another state than RUNNING is brought to RUNNING: by a transition,
    /// or by a reset from ERROR and RESUMING. That destroys what an unfinished migration has left
    /// there. Default: off; the state is reported (VU-STALE).
    pub recover_stale: bool,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            message_timeout: Duration::from_secs(10),
            transition_timeout: Duration::from_secs(75),
            data_timeout: Duration::from_secs(60),
            max_data_xfer_size: DEFAULT_MAX_DATA_XFER_SIZE,
            read_pipeline: 4,
            write_pipeline: 4,
            foreign_write_chunk: 32 << 10,
            recover_stale: false,
        }
    }
}

/// A connection to a vfio-user server. Clones are the same connection; any thread may use it. A call
/// that waits holds the connection, and serves the server's DMA messages meanwhile.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

struct Shared {
    channel: Arc<Channel>,
    options: ClientOptions,
    version: VersionMessage,
    log: Arc<WriteLog>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("version", &self.0.version).finish_non_exhaustive()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.channel.as_fd()
    }
}

/// Most bytes of a feature's reply.
const MAX_FEATURE: u32 = (64 << 20) + 64;

fn lost(operation: &str, error: &rustix::io::Errno) -> DeviceError {
    let errno = Some(Errno(error.raw_os_error()));
    DeviceError { errno, ..DeviceError::new(DeviceErrorKind::Lost, operation, "cannot connect") }
}

/// Connects without blocking in the kernel: a listener whose queue is full is tried again.
fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, DeviceError> {
    let deadline = Instant::now() + timeout;
    let address = SocketAddrUnix::new(path).map_err(|e| lost("connect", &e))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| lost("connect", &e))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(errno) => return Err(lost("connect", &errno)),
        }
    }
}

impl Client {
    /// Connects to the server at `path` and agrees on the version.
    ///
    /// # Errors
    /// When nobody listens there, or the server refuses: a server that already has a client closes
    /// the connection.
    pub fn connect(path: impl AsRef<Path>, options: ClientOptions) -> Result<Self, DeviceError> {
        let stream = connect(path.as_ref(), options.message_timeout)?;
        Self::from_stream(stream, options)
    }

    /// Agrees on the version over a connected socket, which may be a migration socket.
    ///
    /// # Errors
    /// When the server does not answer, refuses, or speaks another version.
    pub fn from_stream(stream: UnixStream, options: ClientOptions) -> Result<Self, DeviceError> {
        let log = Arc::new(WriteLog::default());
        let channel = Arc::new(Channel::new(stream, &options, Arc::clone(&log))?);
        let caps = VersionCaps {
            max_msg_fds: 16,
            max_data_xfer_size: options.max_data_xfer_size,
            migration_pgsize: Some(4096),
        };
        let ours = VersionMessage { major: 0, minor: 2, caps };
        let asked = channel.ask(command::VERSION, &[&ours.encode()], &[], 4096, options.message_timeout);
        let reply = asked.map_err(|mut error| {
            if error.kind == DeviceErrorKind::Lost {
                error.message = "the server closed the connection; it may have a client already".into();
            }
            error
        })?;
        let version = VersionMessage::decode(&reply.payload)
            .map_err(|error| protocol(command::VERSION, error.to_string()))?;
        if version.major != 0 || version.minor > ours.minor {
            let text = format!("the server speaks version {}.{}", version.major, version.minor);
            return Err(protocol(command::VERSION, text));
        }
        Ok(Self(Arc::new(Shared { channel, options, version, log })))
    }

    /// The version and capabilities that the server answered.
    #[must_use]
    pub fn version(&self) -> &VersionMessage {
        &self.0.version
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    fn channel(&self) -> &Channel {
        &self.0.channel
    }

    /// Most bytes of data in one message, by both sides' bounds.
    fn max_xfer(&self) -> u32 {
        self.0.options.max_data_xfer_size.min(self.0.version.caps.max_data_xfer_size).max(64)
    }

    /// Ends the connection; calls that wait fail, on every clone.
    pub fn shutdown(&self) {
        self.0.channel.shutdown();
    }

    /// Wakes the calls that wait now; they fail as interrupted, and the connection stays good. What
    /// they asked for may still be carried out (VU-INTERRUPT).
    #[must_use]
    pub fn interrupter(&self) -> Interrupter {
        self.0.channel.interrupter()
    }

    /// Who carries out the server's DMA messages: needed when memory is mapped without a descriptor.
    pub fn set_dma_handler(&self, handler: Option<Box<dyn DmaHandler>>) {
        self.0.channel.set_handler(handler);
    }

    /// A dirty source of the pages that the server writes by DMA messages through this client.
    #[must_use]
    pub fn dma_write_log(&self, domain: DomainId) -> DmaWriteLog {
        DmaWriteLog::new(Arc::clone(&self.0.log), domain)
    }

    /// Serves the DMA messages that have arrived, without waiting. To be called when the client's
    /// descriptor is readable and no call is under way that would serve them.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn pump(&self) -> Result<(), DeviceError> {
        self.0.channel.pump()
    }

    fn ask(&self, number: u16, parts: &[&[u8]], limit: u32) -> Result<channel::Reply, DeviceError> {
        self.0.channel.ask(number, parts, &[], limit, self.0.options.message_timeout)
    }

    fn fixed<T>(number: u16, payload: &[u8]) -> Result<(T, &[u8]), DeviceError>
    where
        T: zerocopy::FromBytes + zerocopy::Immutable + zerocopy::KnownLayout,
    {
        take::<T>(payload).ok_or_else(|| protocol(number, "the reply is too short"))
    }

    /// How many regions and interrupts the device has.
    ///
    /// # Errors
    /// When the server refuses or does not answer, as for all requests.
    pub fn info(&self) -> Result<DeviceInfo, DeviceError> {
        let asked = DeviceInfo { argsz: 16, flags: 0, num_regions: 0, num_irqs: 0 };
        let reply = self.ask(command::DEVICE_GET_INFO, &[asked.as_bytes()], 4096)?;
        Ok(Self::fixed::<DeviceInfo>(command::DEVICE_GET_INFO, &reply.payload)?.0)
    }

    /// What interrupt index `index` is.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, DeviceError> {
        let asked = IrqInfo { argsz: 16, flags: 0, index, count: 0 };
        let reply = self.ask(command::DEVICE_GET_IRQ_INFO, &[asked.as_bytes()], 4096)?;
        Ok(Self::fixed::<IrqInfo>(command::DEVICE_GET_IRQ_INFO, &reply.payload)?.0)
    }

    /// Lets the device use `size` bytes from `iova`: those of `file` from an offset, which the server
    /// maps, or, without a file, memory that the [`DmaHandler`] serves.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn dma_map(
        &self,
        iova: u64,
        size: u64,
        access: DmaAccess,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), DeviceError> {
        let offset = file.map_or(0, |(_, offset)| offset);
        let fd = file.map(|(fd, _)| fd);
        let map = DmaMap { argsz: 32, flags: access.bits(), offset, iova, size };
        let timeout = self.0.options.transition_timeout;
        self.0.channel.ask(command::DMA_MAP, &[map.as_bytes()], fd.as_slice(), 4096, timeout)?;
        Ok(())
    }

    /// Takes back a range that was mapped, exactly as it was mapped.
    ///
    /// # Errors
    /// When the server refuses (the device still uses it: `EBUSY`) or does not answer.
    pub fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), DeviceError> {
        let unmap = DmaUnmap { argsz: 24, flags: 0, iova, size };
        let timeout = self.0.options.transition_timeout;
        self.0.channel.ask(command::DMA_UNMAP, &[unmap.as_bytes()], &[], 4096, timeout)?;
        Ok(())
    }

    /// Reads `buf.len()` bytes at `offset` of a region, in as many messages as it takes.
    ///
    /// # Errors
    /// When the server refuses or does not answer, or answers with another length.
    pub fn region_read(&self, region: u32, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let number = command::REGION_READ;
        let piece = self.max_xfer();
        let mut at = offset;
        for part in buf.chunks_mut(usize::try_from(piece).unwrap_or(4096)) {
            let count = u32::try_from(part.len()).unwrap_or(piece);
            let asked = RegionAccess { offset: at, region, count };
            let reply = self.ask(number, &[asked.as_bytes()], piece + 64)?;
            let (head, data) = Self::fixed::<RegionAccess>(number, &reply.payload)?;
            if head.count != count || data.len() != part.len() {
                return Err(protocol(number, "the reply has another length"));
            }
            part.copy_from_slice(data);
            at = at.saturating_add(u64::from(count));
        }
        Ok(())
    }

    /// Writes `data` at `offset` of a region, in as many messages as it takes, and waits until all of
    /// it has reached the device.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let number = command::REGION_WRITE;
        let piece = self.max_xfer().min(self.0.options.foreign_write_chunk).max(8);
        let mut at = offset;
        for part in data.chunks(usize::try_from(piece).unwrap_or(4096)) {
            let count = u32::try_from(part.len()).unwrap_or(piece);
            let asked = RegionAccess { offset: at, region, count };
            let reply = self.ask(number, &[asked.as_bytes(), part], 4096)?;
            let (head, _) = Self::fixed::<RegionAccess>(number, &reply.payload)?;
            if head.count != count {
                return Err(protocol(number, "not all was written"));
            }
            at = at.saturating_add(u64::from(count));
        }
        Ok(())
    }

    fn irqs(
        &self,
        flags: IrqSetFlags,
        index: u32,
        start: u32,
        count: u32,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let set = IrqSet { argsz: 20, flags: flags.bits(), index, start, count };
        let timeout = self.0.options.message_timeout;
        self.0.channel.ask(command::DEVICE_SET_IRQS, &[set.as_bytes()], fds, 4096, timeout)?;
        Ok(())
    }

    /// Wires interrupts of `index` from `start` on to these eventfds.
    ///
    /// # Errors
    /// When the server refuses or does not answer; some may then be wired.
    pub fn set_irqs(&self, index: u32, start: u32, fds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        let most = usize::try_from(self.0.version.caps.max_msg_fds).unwrap_or(1).clamp(1, MAX_FDS);
        let mut at = start;
        for part in fds.chunks(most) {
            let count = u32::try_from(part.len()).unwrap_or(0);
            self.irqs(IrqSetFlags::EVENTFD | IrqSetFlags::TRIGGER, index, at, count, part)?;
            at = at.saturating_add(count);
        }
        Ok(())
    }

    /// Takes the eventfds of `count` interrupts away.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn unset_irqs(&self, index: u32, start: u32, count: u32) -> Result<(), DeviceError> {
        self.irqs(IrqSetFlags::EVENTFD | IrqSetFlags::TRIGGER, index, start, count, &[])
    }

    /// Disables all interrupts of `index`.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn disable_irqs(&self, index: u32) -> Result<(), DeviceError> {
        self.irqs(IrqSetFlags::NONE | IrqSetFlags::TRIGGER, index, 0, 0, &[])
    }

    /// Makes the server signal `count` interrupts, as if the device had raised them.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn trigger_irqs(&self, index: u32, start: u32, count: u32) -> Result<(), DeviceError> {
        self.irqs(IrqSetFlags::NONE | IrqSetFlags::TRIGGER, index, start, count, &[])
    }

    /// Masks (`true`) or unmasks `count` interrupts. One raised meanwhile comes at the unmasking.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn mask_irqs(&self, index: u32, start: u32, count: u32, masked: bool) -> Result<(), DeviceError> {
        let action = if masked { IrqSetFlags::MASK } else { IrqSetFlags::UNMASK };
        self.irqs(IrqSetFlags::NONE | action, index, start, count, &[])
    }

    /// Resets the device.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn reset(&self) -> Result<(), DeviceError> {
        let timeout = self.0.options.transition_timeout;
        self.0.channel.ask(command::DEVICE_RESET, &[], &[], 4096, timeout)?;
        Ok(())
    }

    /// One DEVICE_FEATURE request: feature `index`, with `data`; at most `room` bytes of data come
    /// back. The reply's data.
    ///
    /// # Errors
    /// When the server refuses (an unknown feature: `EINVAL` or `ENOTTY`) or does not answer.
    pub fn device_feature(
        &self,
        index: u16,
        flags: FeatureFlags,
        data: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, DeviceError> {
        let timeout = self.0.options.message_timeout;
        Ok(self.feature(index, flags, data, room, timeout)?.0)
    }

    fn feature(
        &self,
        index: u16,
        flags: FeatureFlags,
        data: &[u8],
        room: u32,
        timeout: Duration,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), DeviceError> {
        let number = command::DEVICE_FEATURE;
        let sent = u32::try_from(data.len()).unwrap_or(MAX_FEATURE);
        let argsz = room.max(sent).saturating_add(8);
        if argsz > MAX_FEATURE {
            return Err(DeviceError::new(
                DeviceErrorKind::Misuse,
                command::name(number),
                "more data than a feature can have",
            ));
        }
        let head = FeatureHeader::new(argsz, index, flags);
        let reply = self.0.channel.ask(number, &[head.as_bytes(), data], &[], argsz, timeout)?;
        let (_, data) = Self::fixed::<FeatureHeader>(number, &reply.payload)?;
        Ok((data.to_vec(), reply.fds))
    }

    /// Whether the device has a feature, for these operations. Changes nothing.
    ///
    /// # Errors
    /// When the server does not answer. A refusal means that the feature is not there (VU-PROBE).
    pub fn has_feature(&self, index: u16, operations: FeatureFlags) -> Result<bool, DeviceError> {
        match self.device_feature(index, operations | FeatureFlags::PROBE, &[], 0) {
            Ok(_) => Ok(true),
            Err(error) if error.kind == DeviceErrorKind::Refused => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A second connection to the same device, for a migration process: it speaks vfio-user from
    /// VERSION on, and can do no more than migrate (VU-MIGRATION-SOCKET). Guest accesses over this
    /// client never wait behind its data.
    ///
    /// # Errors
    /// `EBUSY` while the one that was made before is still in use; [`DeviceErrorKind::Unsupported`]
    /// when the server does not have this extension.
    pub fn migration_socket(&self) -> Result<UnixStream, DeviceError> {
        let operation = "MIGRATION_SOCKET";
        if !self.has_feature(feature::MIGRATION_SOCKET, FeatureFlags::GET)? {
            return Err(DeviceError::new(
                DeviceErrorKind::Unsupported,
                operation,
                "the server offers no second connection",
            ));
        }
        let timeout = self.0.options.message_timeout;
        let (_, mut fds) = self.feature(feature::MIGRATION_SOCKET, FeatureFlags::GET, &[], 8, timeout)?;
        let fd = fds.pop().filter(|_| fds.is_empty());
        fd.map(UnixStream::from).ok_or_else(|| {
            DeviceError::new(DeviceErrorKind::Protocol, operation, "the reply holds no single descriptor")
        })
    }
}

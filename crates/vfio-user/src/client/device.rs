//! A device behind a socket, as the engine drives it.
//!
//! The connection may be the VMM's own or a migration socket. What the device is able to do is asked
//! for once, at the beginning; its state is asked for each time (V2-STALE).

use super::session::{Load, Manner, Save, SharedFlow};
use super::{Client, ClientOptions, VfioUserDirtySource};
use crate::codec::{DeviceInfoFlags, FeatureFlags, MigState, StateFormatHeader, command, feature, take};
use airlift_core::{
    Arc as StateArc, ArcSession, Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity,
    DeviceState, DomainId, Interrupter, MigrationDevice, Session, StateFormat, TransitionError, path,
};
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Longest wait for the state after a call that was interrupted or timed out.
const READ_BACK: Duration = Duration::from_secs(2);
/// Bytes of data that a state's format may have.
const MAX_FORMAT: u32 = 4096;

/// A migratable device that a vfio-user server serves.
#[derive(Debug)]
pub struct VfioUserDevice {
    id: DeviceId,
    client: Client,
    capabilities: Capabilities,
    identity: DeviceIdentity,
    found: DeviceState,
    manner: Manner,
    data_size: bool,
    logging: bool,
    airlift: bool,
    flow: SharedFlow,
}

fn unsupported(what: &str, message: &str) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Unsupported, what, message)
}

impl VfioUserDevice {
    /// Connects to the server at `path`.
    ///
    /// # Errors
    /// As [`from_client`](Self::from_client), and when nobody listens there.
    pub fn connect(
        id: DeviceId,
        path: impl AsRef<Path>,
        options: ClientOptions,
    ) -> Result<Self, DeviceError> {
        Self::from_client(id, Client::connect(path, options)?)
    }

    /// Uses a connected socket: usually the migration socket that a VMM handed over.
    ///
    /// # Errors
    /// As [`from_client`](Self::from_client).
    pub fn from_stream(
        id: DeviceId,
        stream: UnixStream,
        options: ClientOptions,
    ) -> Result<Self, DeviceError> {
        Self::from_client(id, Client::from_stream(stream, options)?)
    }

    /// Uses a client that there is. Asks for the state first: on some servers an unfinished
    /// migration of the client before makes everything else fail (VU-STALE).
    ///
    /// # Errors
    /// [`DeviceErrorKind::Unsupported`] when the device cannot be migrated; otherwise when the server
    /// refuses or breaks the protocol.
    pub fn from_client(id: DeviceId, client: Client) -> Result<Self, DeviceError> {
        let (get, set) = (FeatureFlags::GET, FeatureFlags::SET);
        if !client.has_feature(feature::MIG_DEVICE_STATE, get | set)? {
            return Err(unsupported("PROBE MIG_DEVICE_STATE", "the device cannot be migrated"));
        }
        let mut found = state_of(&client, client.options().message_timeout)?;
        if found != DeviceState::Running && client.options().recover_stale {
            tracing::warn!(device = %id, state = %found, "an unfinished migration is cleared away");
            recover(&client, found)?;
            found = state_of(&client, client.options().message_timeout)?;
        }
        let reply = client.device_feature(feature::MIGRATION, get, &[], 8)?;
        let (flags, _) = take::<u64>(&reply)
            .ok_or_else(|| super::channel::protocol(command::DEVICE_FEATURE, "MIGRATION has no flags"))?;
        let mut capabilities = Capabilities::v2(flags).map_err(|error| {
            DeviceError::new(DeviceErrorKind::Unsupported, "GET MIGRATION", error.to_string())
        })?;
        let precopy_info = client.has_feature(feature::PRECOPY_INFO, get)?;
        let has_format = client.has_feature(feature::STATE_FORMAT, get)?;
        let airlift = precopy_info || has_format;
        let data_size = client.has_feature(feature::MIG_DATA_SIZE, get)?;
        let reinit = precopy_info && client.has_feature(feature::MIG_PRECOPY_INFO_V2, set)?;
        if reinit {
            client.device_feature(feature::MIG_PRECOPY_INFO_V2, set, &[], 0)?;
        }
        capabilities.reinit = reinit;
        let logging = client.has_feature(feature::DMA_LOGGING_START, set)?
            && client.has_feature(feature::DMA_LOGGING_REPORT, get)?;
        let format = if has_format { Some(state_format(&client)?) } else { None };
        let facts = facts(&client).map_err(|mut error| {
            if found != DeviceState::Running {
                error.message = format!("{} (an unfinished migration left it in {found})", error.message);
            }
            error
        })?;
        let options = client.options();
        let manner = Manner {
            precopy_info,
            reinit,
            write_chunk: if airlift { client.max_xfer() } else { options.foreign_write_chunk },
            writes: if airlift { options.write_pipeline } else { 1 },
        };
        let identity = DeviceIdentity { format, facts };
        let flow = SharedFlow::new();
        Ok(Self { id, client, capabilities, identity, found, manner, data_size, logging, airlift, flow })
    }

    /// The state in which the device was found. Another one than RUNNING is left over from an
    /// unfinished migration (VU-STALE).
    #[must_use]
    pub const fn found_state(&self) -> DeviceState {
        self.found
    }

    /// The connection, shared.
    #[must_use]
    pub const fn client(&self) -> &Client {
        &self.client
    }

    /// The device's own log of its DMA, where it has one. Shares the device's connection, and is
    /// named after the device.
    #[must_use]
    pub fn dirty_source(&self) -> Option<VfioUserDirtySource> {
        let domain = DomainId(self.id.to_string());
        self.logging.then(|| VfioUserDirtySource::new(self.client.clone(), domain, self.airlift))
    }

    fn set(&self, target: DeviceState, arcs: usize) -> Result<(), DeviceError> {
        let each = self.client.options().transition_timeout;
        let timeout = each.saturating_mul(u32::try_from(arcs.max(1)).unwrap_or(8));
        set_state(&self.client, target, timeout)
    }

    fn failed(&self, from: DeviceState, to: DeviceState, error: DeviceError) -> TransitionError {
        // Never guessed (V2-READBACK). A server that is stuck is not waited for twice.
        let slow = matches!(error.kind, DeviceErrorKind::TimedOut | DeviceErrorKind::Interrupted);
        let usual = self.client.options().message_timeout;
        let reached = state_of(&self.client, if slow { usual.min(READ_BACK) } else { usual });
        if let Ok(state) = reached {
            self.flow.moved(state, false);
        }
        TransitionError { from, to, reached, error }
    }
}

fn state_of(client: &Client, timeout: Duration) -> Result<DeviceState, DeviceError> {
    let operation = "GET MIG_DEVICE_STATE";
    let got = client.feature(feature::MIG_DEVICE_STATE, FeatureFlags::GET, &[], 8, timeout);
    let (reply, _) = got.map_err(|e| DeviceError { operation: operation.into(), ..e })?;
    let (state, _) = take::<MigState>(&reply)
        .ok_or_else(|| DeviceError::new(DeviceErrorKind::Protocol, operation, "the reply is too short"))?;
    Ok(DeviceState::from_raw(state.device_state))
}

fn set_state(client: &Client, target: DeviceState, timeout: Duration) -> Result<(), DeviceError> {
    let wanted = MigState { device_state: target.to_raw(), data_fd: u32::MAX };
    let set = client.feature(feature::MIG_DEVICE_STATE, FeatureFlags::SET, wanted.as_bytes(), 8, timeout);
    set.map(|_| ()).map_err(|e| DeviceError { operation: "SET MIG_DEVICE_STATE".into(), ..e })
}

/// Brings a device that an unfinished migration has left behind to RUNNING.
fn recover(client: &Client, found: DeviceState) -> Result<(), DeviceError> {
    let timeout = client.options().transition_timeout;
    match found {
        DeviceState::Running => Ok(()),
        DeviceState::Error | DeviceState::Unknown(_) => client.reset(),
        // A reset ends loading; where it does not change the state, a transition must.
        DeviceState::Resuming => {
            client.reset()?;
            match state_of(client, timeout)? {
                DeviceState::Running => Ok(()),
                _ => set_state(client, DeviceState::Running, timeout),
            }
        }
        _ => set_state(client, DeviceState::Running, timeout),
    }
}

fn state_format(client: &Client) -> Result<StateFormat, DeviceError> {
    let operation = "GET STATE_FORMAT";
    let wrong = |text: &str| DeviceError::new(DeviceErrorKind::Protocol, operation, text);
    let data = client.device_feature(feature::STATE_FORMAT, FeatureFlags::GET, &[], MAX_FORMAT)?;
    let (head, rest) = take::<StateFormatHeader>(&data).ok_or_else(|| wrong("the reply is too short"))?;
    let versions = usize::from(head.accepts) * 4;
    let (versions, rest) = rest.split_at_checked(versions).ok_or_else(|| wrong("versions are missing"))?;
    let name = rest.get(..usize::from(head.name)).ok_or_else(|| wrong("the name is missing"))?;
    let name = str::from_utf8(name).map_err(|_| wrong("the name is no text"))?;
    let accepts = versions.as_chunks::<4>().0.iter().map(|v| u32::from_ne_bytes(*v)).collect();
    Ok(StateFormat { name: name.into(), version: head.version, accepts, interfaces: Vec::new() })
}

/// What must be equal on the other side: regions, interrupts and PCI ids.
fn facts(client: &Client) -> Result<BTreeMap<String, String>, DeviceError> {
    let info = client.info()?;
    if info.num_regions > 128 || info.num_irqs > 128 {
        return Err(super::channel::protocol(command::DEVICE_GET_INFO, "implausible numbers of regions"));
    }
    let mut facts = BTreeMap::new();
    facts.insert("region-count".into(), info.num_regions.to_string());
    facts.insert("irq-count".into(), info.num_irqs.to_string());
    let mut config = 0;
    for index in 0..info.num_regions {
        let region = client.region_info(index)?;
        if region.size > 0 {
            facts.insert(format!("region{index}-size"), region.size.to_string());
        }
        if index == 7 {
            config = region.size;
        }
    }
    if DeviceInfoFlags::from_bits_truncate(info.flags).contains(DeviceInfoFlags::PCI) && config >= 64 {
        let mut space = [0; 64];
        client.region_read(7, 0, &mut space)?;
        let short = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        facts.insert("pci-vendor".into(), format!("{:#06x}", short(0)));
        facts.insert("pci-device".into(), format!("{:#06x}", short(2)));
        facts.insert("pci-revision".into(), format!("{:#04x}", space[8]));
        let class = u32::from_le_bytes([space[9], space[10], space[11], 0]);
        facts.insert("pci-class".into(), format!("{class:#08x}"));
        facts.insert("pci-subsystem-vendor".into(), format!("{:#06x}", short(0x2c)));
        facts.insert("pci-subsystem".into(), format!("{:#06x}", short(0x2e)));
    }
    Ok(facts)
}

impl MigrationDevice for VfioUserDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        state_of(&self.client, self.client.options().message_timeout)
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        let usual = self.client.options().message_timeout;
        let from = match state_of(&self.client, usual) {
            Ok(from) => from,
            Err(error) => {
                let from = DeviceState::Unknown(u32::MAX);
                return Err(TransitionError { from, to: target, reached: Err(error.clone()), error });
            }
        };
        let arcs = match path(from, target, &self.capabilities) {
            Ok(arcs) => arcs,
            Err(error) => {
                let error = DeviceError {
                    errno: Some(error.errno()),
                    ..DeviceError::new(DeviceErrorKind::Misuse, "SET MIG_DEVICE_STATE", error.to_string())
                };
                return Err(TransitionError { from, to: target, reached: Ok(from), error });
            }
        };
        if arcs.is_empty() {
            return Ok(None);
        }
        // A write that failed is known before the device is asked to load what has a hole.
        if let Err(error) = self.flow.settle(&self.client)
            && from == DeviceState::Resuming
        {
            return Err(self.failed(from, target, error));
        }
        if let Err(error) = self.set(target, arcs.len()) {
            return Err(self.failed(from, target, error));
        }
        let sessions = || arcs.iter().copied().map(StateArc::session);
        let saves = sessions().any(|s| s == ArcSession::OpensSave);
        let loads = sessions().any(|s| s == ArcSession::OpensLoad);
        let epoch = self.flow.moved(target, saves || loads);
        let (client, flow, manner) = (self.client.clone(), self.flow.clone(), self.manner);
        Ok(if saves {
            Some(Session::Save(Box::new(Save { client, flow, epoch, manner })))
        } else if loads {
            Some(Session::Load(Box::new(Load { client, flow, epoch, manner })))
        } else {
            None
        })
    }

    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        if !self.data_size {
            return Ok(None);
        }
        let timeout = self.client.options().data_timeout;
        let got = self.client.feature(feature::MIG_DATA_SIZE, FeatureFlags::GET, &[], 8, timeout);
        match got {
            Ok((reply, _)) => Ok(take::<u64>(&reply).map(|(size, _)| size)),
            // It may fail, and there is none outside of a saving session.
            Err(error) if error.kind == DeviceErrorKind::Refused => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        // What is under way ends with the reset; its answers are of no interest.
        let _ = self.flow.settle(&self.client);
        self.client.reset()?;
        self.flow.moved(DeviceState::Running, false);
        Ok(())
    }

    fn interrupter(&self) -> Interrupter {
        self.client.interrupter()
    }
}

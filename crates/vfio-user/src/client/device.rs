//! A device behind a socket, as the engine drives it, over whichever interface its server has.
//!
//! The connection may be the VMM's own or a migration socket. What the device is able to do is asked
//! for once, at the beginning; its state is asked for each time (V2-STALE).

use super::identity::{facts, state_format};
use super::v2::{self, V2};
use super::{Client, ClientOptions, VfioUserDirtySource, VfioUserRegion};
use crate::codec::{FeatureFlags, feature};
use airlift_core::v1::{MigrationRegion, REGION_TYPE, V1Control, V1Device};
use airlift_core::{
    Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, DomainId, Interrupter,
    MigrationDevice, RegionAccess, Session, TransitionError,
};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Most regions that are looked through for the one of interface v1.
const MAX_REGIONS: u32 = 128;

/// A migratable device that a vfio-user server serves: over interface v2 where the server has it, or
/// over the migration region of interface v1.
#[derive(Debug)]
pub struct VfioUserDevice {
    id: DeviceId,
    client: Client,
    identity: DeviceIdentity,
    found: DeviceState,
    logging: bool,
    airlift: bool,
    speaks: Speaks,
}

/// The interface of a device.
#[derive(Debug)]
enum Speaks {
    V1(Box<V1Device<VfioUserRegion>>, MigrationRegion),
    V2(V2),
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
        if client.has_feature(feature::MIG_DEVICE_STATE, get | set)? {
            Self::with_v2(id, client)
        } else {
            Self::with_v1(id, client)
        }
    }

    fn with_v2(id: DeviceId, client: Client) -> Result<Self, DeviceError> {
        let timeout = client.options().message_timeout;
        let mut found = v2::state_of(&client, timeout)?;
        if found != DeviceState::Running && client.options().recover_stale {
            tracing::warn!(device = %id, state = %found, "an unfinished migration is cleared away");
            v2::recover(&client, found)?;
            found = v2::state_of(&client, timeout)?;
        }
        let about = About::ask(&client, None).map_err(|error| left_in(found, error))?;
        let v2 = V2::new(client.clone(), about.airlift)?;
        Ok(about.device(id, client, found, Speaks::V2(v2)))
    }

    fn with_v1(id: DeviceId, client: Client) -> Result<Self, DeviceError> {
        let (index, region) = migration_region(&client)?;
        let about = About::ask(&client, Some(index))?;
        let region = VfioUserRegion::new(client.clone(), index, region, about.airlift)?;
        let resets = client.clone();
        let control = V1Control {
            reset: Box::new(move || resets.reset()),
            interrupter: client.interrupter(),
            whole_transactions: about.whole_transactions,
        };
        let mut view = MigrationRegion {
            index,
            size: region.size(),
            mapped: region.mapped().to_vec(),
            unmapped: region.unmapped().map(str::to_owned),
            data_section: 0,
            whole_transactions: about.whole_transactions,
        };
        let mut device = V1Device::new(id.clone(), about.identity.clone(), region, control)?;
        view.data_section = device.capabilities().data_section.unwrap_or(0);
        let mut found = device.state()?;
        if found != DeviceState::Running && client.options().recover_stale {
            tracing::warn!(device = %id, state = %found, "an unfinished migration is cleared away");
            recover_v1(&mut device, found)?;
            found = device.state()?;
        }
        Ok(about.device(id, client, found, Speaks::V1(Box::new(device), view)))
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

    /// The migration region of a device of interface v1.
    #[must_use]
    pub const fn migration_region(&self) -> Option<&MigrationRegion> {
        match &self.speaks {
            Speaks::V1(_, region) => Some(region),
            Speaks::V2(_) => None,
        }
    }
}

/// What is asked of a device whatever its interface is.
struct About {
    identity: DeviceIdentity,
    whole_transactions: bool,
    logging: bool,
    airlift: bool,
}

impl About {
    fn ask(client: &Client, migration: Option<u32>) -> Result<Self, DeviceError> {
        let (get, set) = (FeatureFlags::GET, FeatureFlags::SET);
        let has_format = client.has_feature(feature::STATE_FORMAT, get)?;
        let airlift = has_format || client.has_feature(feature::PRECOPY_INFO, get)?;
        let logging = client.has_feature(feature::DMA_LOGGING_START, set)?
            && client.has_feature(feature::DMA_LOGGING_REPORT, get)?;
        let (format, whole_transactions) = match has_format {
            true => state_format(client).map(|(format, whole)| (Some(format), whole))?,
            false => (None, false),
        };
        let identity = DeviceIdentity { format, facts: facts(client, migration)? };
        Ok(Self { identity, whole_transactions, logging, airlift })
    }

    fn device(self, id: DeviceId, client: Client, found: DeviceState, speaks: Speaks) -> VfioUserDevice {
        let Self { identity, logging, airlift, .. } = self;
        VfioUserDevice { id, client, identity, found, logging, airlift, speaks }
    }
}

fn left_in(found: DeviceState, mut error: DeviceError) -> DeviceError {
    if found != DeviceState::Running {
        error.message = format!("{} (an unfinished migration left it in {found})", error.message);
    }
    error
}

/// Finds the region of interface v1 (V1-REGION).
fn migration_region(client: &Client) -> Result<(u32, super::RegionDetails), DeviceError> {
    for index in 0..client.info()?.num_regions.min(MAX_REGIONS) {
        match client.region_info(index) {
            Ok(region) if region.kind == Some(REGION_TYPE) => return Ok((index, region)),
            Ok(_) => {}
            // Numbers may have gaps.
            Err(error) if error.kind == DeviceErrorKind::Refused => {}
            Err(error) => return Err(error),
        }
    }
    let message = "the device cannot be migrated: it has neither interface v2 nor the migration region of v1";
    Err(DeviceError::new(DeviceErrorKind::Unsupported, "PROBE MIG_DEVICE_STATE", message))
}

/// Brings a device that an unfinished migration has left behind to RUNNING.
fn recover_v1(device: &mut V1Device<VfioUserRegion>, found: DeviceState) -> Result<(), DeviceError> {
    match found {
        DeviceState::Error | DeviceState::Unknown(_) | DeviceState::Resuming => device.reset(),
        _ => device.set_state(DeviceState::Running).map(drop).map_err(|error| error.error),
    }
}

impl MigrationDevice for VfioUserDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn capabilities(&self) -> Capabilities {
        match &self.speaks {
            Speaks::V1(device, _) => device.capabilities(),
            Speaks::V2(v2) => v2.capabilities,
        }
    }

    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        match &mut self.speaks {
            Speaks::V1(device, _) => device.state(),
            Speaks::V2(v2) => v2.state(),
        }
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        match &mut self.speaks {
            Speaks::V1(device, _) => device.set_state(target),
            Speaks::V2(v2) => v2.set_state(target),
        }
    }

    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        match &mut self.speaks {
            Speaks::V1(device, _) => device.stop_copy_size(),
            Speaks::V2(v2) => v2.stop_copy_size(),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        match &mut self.speaks {
            Speaks::V1(device, _) => device.reset(),
            Speaks::V2(v2) => v2.reset(),
        }
    }

    fn interrupter(&self) -> Interrupter {
        self.client.interrupter()
    }
}

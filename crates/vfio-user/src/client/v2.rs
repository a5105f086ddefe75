//! A device behind a socket with interface v2: its state by features, its data by messages.

use super::Client;
use super::session::{Load, Manner, Save, SharedFlow};
use crate::codec::{FeatureFlags, MigState, command, feature, take};
use airlift_core::{
    Arc as StateArc, ArcSession, Capabilities, DeviceError, DeviceErrorKind, DeviceState, Session,
    TransitionError, path,
};
use std::time::Duration;
use zerocopy::IntoBytes;

/// Longest wait for the state after a call that was interrupted or timed out.
const READ_BACK: Duration = Duration::from_secs(2);

/// Interface v2 of a device.
#[derive(Debug)]
pub(super) struct V2 {
    client: Client,
    pub(super) capabilities: Capabilities,
    manner: Manner,
    data_size: bool,
    flow: SharedFlow,
}

impl V2 {
    /// Asks what the device can do. `airlift`: the server has Airlift's extensions.
    pub(super) fn new(client: Client, airlift: bool) -> Result<Self, DeviceError> {
        let (get, set) = (FeatureFlags::GET, FeatureFlags::SET);
        let reply = client.device_feature(feature::MIGRATION, get, &[], 8)?;
        let (flags, _) = take::<u64>(&reply)
            .ok_or_else(|| super::channel::protocol(command::DEVICE_FEATURE, "MIGRATION has no flags"))?;
        let mut capabilities = Capabilities::v2(flags).map_err(|error| {
            DeviceError::new(DeviceErrorKind::Unsupported, "GET MIGRATION", error.to_string())
        })?;
        let precopy_info = client.has_feature(feature::PRECOPY_INFO, get)?;
        let data_size = client.has_feature(feature::MIG_DATA_SIZE, get)?;
        let reinit = precopy_info && client.has_feature(feature::MIG_PRECOPY_INFO_V2, set)?;
        if reinit {
            client.device_feature(feature::MIG_PRECOPY_INFO_V2, set, &[], 0)?;
        }
        capabilities.reinit = reinit;
        let options = client.options();
        let manner = Manner {
            precopy_info,
            reinit,
            write_chunk: if airlift { client.max_xfer() } else { options.foreign_write_chunk },
            writes: if airlift { options.write_pipeline } else { 1 },
        };
        Ok(Self { client, capabilities, manner, data_size, flow: SharedFlow::new() })
    }

    pub(super) fn state(&self) -> Result<DeviceState, DeviceError> {
        state_of(&self.client, self.client.options().message_timeout)
    }

    pub(super) fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
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

    pub(super) fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
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

    pub(super) fn reset(&mut self) -> Result<(), DeviceError> {
        // What is under way ends with the reset; its answers are of no interest.
        let _ = self.flow.settle(&self.client);
        self.client.reset()?;
        self.flow.moved(DeviceState::Running, false);
        Ok(())
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

pub(super) fn state_of(client: &Client, timeout: Duration) -> Result<DeviceState, DeviceError> {
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
pub(super) fn recover(client: &Client, found: DeviceState) -> Result<(), DeviceError> {
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

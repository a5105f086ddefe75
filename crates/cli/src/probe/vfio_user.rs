//! Probing a device behind a vfio-user socket.

use super::{Missing, Probed, Protocol};
use crate::json::ErrorView;
use airlift_core::{DeviceError, DeviceErrorKind, DeviceId, Interface, MigrationDevice};
use airlift_vfio_user::codec::{FeatureFlags, feature};
use airlift_vfio_user::{Client, ClientOptions, VfioUserDevice};
use std::path::Path;
use std::time::Duration;

/// The features that matter to a migration: number, name, and what must be possible with it.
const FEATURES: [(u16, &str, FeatureFlags); 9] = [
    (feature::MIGRATION, "MIGRATION", FeatureFlags::GET),
    (feature::MIG_DEVICE_STATE, "MIG_DEVICE_STATE", FeatureFlags::SET),
    (feature::DMA_LOGGING_START, "DMA_LOGGING_START", FeatureFlags::SET),
    (feature::DMA_LOGGING_STOP, "DMA_LOGGING_STOP", FeatureFlags::SET),
    (feature::DMA_LOGGING_REPORT, "DMA_LOGGING_REPORT", FeatureFlags::GET),
    (feature::MIG_DATA_SIZE, "MIG_DATA_SIZE", FeatureFlags::GET),
    (feature::PRECOPY_INFO, "PRECOPY_INFO", FeatureFlags::GET),
    (feature::STATE_FORMAT, "STATE_FORMAT", FeatureFlags::GET),
    (feature::MIGRATION_SOCKET, "MIGRATION_SOCKET", FeatureFlags::GET),
];

/// Fills `probed` in.
pub(super) fn probe(path: &Path, timeout: Duration, probed: &mut Probed) {
    if let Err(error) = ask(path, timeout, probed) {
        // A device without migration is an answer, not an error.
        if error.kind == DeviceErrorKind::Unsupported {
            probed.missing.push(Missing::new(
                "migration",
                "the device cannot be saved or loaded",
                "serve it with a server that offers the features MIGRATION and MIG_DEVICE_STATE, or the migration region of interface v1",
            ));
        } else {
            probed.error = Some(view(&probed.device, &error));
        }
    }
}

fn ask(path: &Path, timeout: Duration, probed: &mut Probed) -> Result<(), DeviceError> {
    let options = ClientOptions {
        message_timeout: timeout,
        transition_timeout: timeout,
        data_timeout: timeout,
        ..ClientOptions::default()
    };
    let client = Client::connect(path, options)?;
    let version = client.version();
    probed.protocol = Some(Protocol {
        version: format!("{}.{}", version.major, version.minor),
        max_data_xfer_size: version.caps.max_data_xfer_size,
        max_msg_fds: version.caps.max_msg_fds,
    });
    for (number, name, operation) in FEATURES {
        if client.has_feature(number, operation)? {
            probed.features.push(name);
        }
    }
    let id = DeviceId::new("probed")
        .map_err(|e| DeviceError::new(DeviceErrorKind::Misuse, "probe", e.to_string()))?;
    let mut device = VfioUserDevice::from_client(id, client)?;
    let capabilities = device.capabilities();
    probed.can(&capabilities, device.identity());
    probed.state = Some(device.state()?);
    probed.migration_region = device.migration_region().map(Into::into);
    probed.dma_logging = device.dirty_source().is_some();
    missing(probed);
    Ok(())
}

/// What a device that can be migrated still lacks, the most important first.
fn missing(probed: &mut Probed) {
    probed.lacks_states();
    if !probed.dma_logging {
        probed.lacks(
            "DMA logging",
            "all memory that it can reach counts as written at every sync, unless an IOMMU tracks it",
            "expect all of that memory to move while the guest is stopped",
        );
    }
    let v2 = probed.interface == Some(Interface::V2);
    if v2 && probed.precopy && !probed.features.contains(&"PRECOPY_INFO") {
        probed.lacks(
            "the extension PRECOPY_INFO",
            "how much pre-copy has left is not known, so the downtime is estimated from what was sent",
            "none is needed; the estimate is less exact",
        );
    }
    if !probed.features.contains(&"STATE_FORMAT") {
        probed.lacks(
            "the extension STATE_FORMAT",
            "whether the other side can load its state shows only when it does",
            "use the same version of the device server on both sides",
        );
    }
}

fn view(device: &str, error: &DeviceError) -> ErrorView {
    let view = ErrorView::new(error.to_string()).device(device).errno(error.errno);
    match error.kind {
        DeviceErrorKind::Lost => view.advise(
            "is the server there, and has it no other client? A server takes one client at a time: \
             stop what uses the device, or ask that VMM",
        ),
        DeviceErrorKind::TimedOut => view.advise("the server is there and does not answer: look at its log"),
        DeviceErrorKind::Protocol => view.advise("is it a vfio-user server?"),
        _ => view,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_core::{Capabilities, DeviceIdentity, DeviceState};

    #[test]
    fn a_device_that_is_not_there_is_an_error_with_advice() {
        let mut probed = Probed { device: "vfio-user:/nowhere/at/all".into(), ..Probed::default() };
        probe(Path::new("/nowhere/at/all"), Duration::from_secs(1), &mut probed);
        let error = probed.error.unwrap();
        assert!(error.advice.is_some() || error.errno.is_some(), "{error:?}");
        assert_eq!(error.device.as_deref(), Some("vfio-user:/nowhere/at/all"));
    }

    #[test]
    fn a_device_of_interface_v1_does_not_lack_what_is_of_v2() {
        let mut probed = Probed { state: Some(DeviceState::Running), ..Probed::default() };
        probed.can(&Capabilities::v1(4096, false), &DeviceIdentity::default());
        probed.features = vec!["STATE_FORMAT"];
        probed.dma_logging = true;
        missing(&mut probed);
        let [missing] = &probed.missing[..] else { panic!("{:?}", probed.missing) };
        assert_eq!(missing.what, "the P2P states");
        assert!(missing.advice.contains("interface v1 has none"), "{missing:?}");
        assert!(missing.advice.contains("--assume-no-peer-dma"), "{missing:?}");
    }

    #[test]
    fn a_plain_device_lacks_what_it_lacks() {
        let with = |flags: u64, features: &[&'static str]| {
            let mut probed = Probed { state: Some(DeviceState::Running), ..Probed::default() };
            probed.can(&Capabilities::v2(flags).unwrap(), &DeviceIdentity::default());
            probed.features = features.to_vec();
            probed.dma_logging = !features.is_empty();
            missing(&mut probed);
            probed.missing.into_iter().map(|m| m.what).collect::<Vec<_>>()
        };
        assert_eq!(
            with(1, &[]),
            ["the P2P states", "the PRE_COPY states", "DMA logging", "the extension STATE_FORMAT"]
        );
        assert_eq!(with(7, &["PRECOPY_INFO", "STATE_FORMAT"]), [""; 0]);
    }
}

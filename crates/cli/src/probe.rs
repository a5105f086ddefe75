//! `airlift probe`: what devices can do for a migration, what is missing, and what to do about it.
//!
//! A probe connects, asks and goes; it changes nothing. A device that serves one client at a time
//! and has one refuses the probe, which says so.

use crate::args::{DeviceAddress, ProbeArgs};
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::render;
use airlift::Running;
use airlift_core::{
    Capabilities, DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Interface,
    MigrationDevice,
};
use airlift_vfio_user::codec::{FeatureFlags, feature};
use airlift_vfio_user::{Client, ClientOptions, VfioUserDevice};
use serde::Serialize;
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

/// One device.
#[derive(Debug, Serialize)]
struct Probed {
    device: String,
    /// It can be migrated.
    migratable: bool,
    interface: Option<Interface>,
    state: Option<DeviceState>,
    /// The states that it has.
    states: Vec<DeviceState>,
    p2p: bool,
    precopy: bool,
    dma_logging: bool,
    reinit: bool,
    identity: Option<DeviceIdentity>,
    protocol: Option<Protocol>,
    /// Features by name.
    features: Vec<&'static str>,
    /// What is missing, with its consequence and what to do.
    missing: Vec<Missing>,
    error: Option<ErrorView>,
}

/// What was agreed at the connection.
#[derive(Debug, Serialize)]
struct Protocol {
    version: String,
    max_data_xfer_size: u32,
    max_msg_fds: u32,
}

/// Something that a device lacks.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Missing {
    what: &'static str,
    consequence: &'static str,
    advice: &'static str,
}

#[derive(Serialize)]
struct Summary {
    outcome: &'static str,
    source_running: Running,
    destination_running: Running,
    devices: usize,
    migratable: usize,
}

/// Probes every device that was named.
pub(crate) fn run(args: &ProbeArgs) -> Exit {
    let output = Output::new(args.json);
    let mut migratable = 0;
    let mut failed = false;
    for address in &args.devices {
        let probed = probe(address, args.timeout.0);
        output.event("device", &probed);
        output.say(text(&probed));
        migratable += usize::from(probed.migratable);
        failed |= probed.error.is_some();
    }
    let summary = Summary {
        outcome: if failed { "aborted" } else { "completed" },
        source_running: Running::Unknown,
        destination_running: Running::Unknown,
        devices: args.devices.len(),
        migratable,
    };
    output.event("result", &summary);
    if failed { Exit::Failed } else { Exit::Done }
}

fn probe(address: &DeviceAddress, timeout: Duration) -> Probed {
    let mut probed = Probed {
        device: address.to_string(),
        migratable: false,
        interface: None,
        state: None,
        states: Vec::new(),
        p2p: false,
        precopy: false,
        dma_logging: false,
        reinit: false,
        identity: None,
        protocol: None,
        features: Vec::new(),
        missing: Vec::new(),
        error: None,
    };
    if let Err(error) = ask(address, timeout, &mut probed) {
        // A device without migration is an answer, not an error.
        if error.kind == DeviceErrorKind::Unsupported {
            probed.missing.push(Missing {
                what: "migration",
                consequence: "the device cannot be saved or loaded",
                advice: "serve it with a server that offers the features MIGRATION and MIG_DEVICE_STATE",
            });
        } else {
            probed.error = Some(view(address, &error));
        }
    }
    probed
}

fn ask(address: &DeviceAddress, timeout: Duration, probed: &mut Probed) -> Result<(), DeviceError> {
    let DeviceAddress::VfioUser(path) = address;
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
    probed.migratable = true;
    probed.interface = Some(capabilities.interface);
    probed.state = Some(device.state()?);
    probed.states = DeviceState::ALL.into_iter().filter(|s| capabilities.has(*s)).collect();
    probed.p2p = capabilities.p2p();
    probed.precopy = capabilities.precopy();
    probed.reinit = capabilities.reinit;
    probed.dma_logging = device.dirty_source().is_some();
    probed.identity = Some(device.identity().clone());
    probed.missing = missing(&capabilities, probed);
    Ok(())
}

/// What a device that can be migrated still lacks, the most important first.
fn missing(capabilities: &Capabilities, probed: &Probed) -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut lacks = |is_there: bool, what, consequence, advice| {
        if !is_there {
            missing.push(Missing { what, consequence, advice });
        }
    };
    lacks(
        probed.state == Some(DeviceState::Running),
        "the state RUNNING",
        "an earlier migration of the device was not finished",
        "find out what became of it with airlift resolve, or reset the device if nothing of it is needed",
    );
    lacks(
        capabilities.p2p(),
        "the P2P states",
        "it is refused in a migration together with other devices: writes between them could be lost",
        "migrate it alone, or declare with --assume-no-peer-dma that the devices do no DMA to each other",
    );
    lacks(
        capabilities.precopy(),
        "the PRE_COPY states",
        "all of its state moves while the guest is stopped, so the downtime grows with its size",
        "give the downtime limit room for it",
    );
    lacks(
        probed.dma_logging,
        "DMA logging",
        "all memory that it can reach counts as written at every sync, unless an IOMMU tracks it",
        "expect all of that memory to move while the guest is stopped",
    );
    lacks(
        probed.features.contains(&"PRECOPY_INFO") || !capabilities.precopy(),
        "the extension PRECOPY_INFO",
        "how much pre-copy has left is not known, so the downtime is estimated from what was sent",
        "none is needed; the estimate is less exact",
    );
    lacks(
        probed.features.contains(&"STATE_FORMAT"),
        "the extension STATE_FORMAT",
        "whether the other side can load its state shows only when it does",
        "use the same version of the device server on both sides",
    );
    missing
}

fn view(address: &DeviceAddress, error: &DeviceError) -> ErrorView {
    let view = ErrorView::new(error.to_string()).device(&address.to_string()).errno(error.errno);
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

fn text(probed: &Probed) -> String {
    let mut lines = vec![probed.device.clone()];
    if let Some(error) = &probed.error {
        lines.extend(render::error_text(error).lines().map(|line| format!("  {line}")));
        return lines.join("\n");
    }
    if let Some(interface) = probed.interface {
        let names: Vec<String> = probed.states.iter().map(ToString::to_string).collect();
        let interface = match interface {
            Interface::V1 => "interface v1",
            Interface::V2 => "interface v2",
        };
        lines.push(format!("  It can be migrated: {interface}, states {}", names.join(", ")));
    } else {
        lines.push("  It cannot be migrated.".into());
    }
    if let Some(state) = probed.state {
        lines.push(format!("  It is in {state}."));
    }
    if let Some(identity) = &probed.identity {
        if let Some(format) = &identity.format {
            lines.push(format!(
                "  Its state has the format {} {}, and it reads versions {:?}.",
                format.name, format.version, format.accepts
            ));
        }
        let facts: Vec<String> = identity.facts.iter().map(|(k, v)| format!("{k} {v}")).collect();
        lines.push(format!("  The other side must match: {}", facts.join(", ")));
    }
    if let Some(protocol) = &probed.protocol {
        lines.push(format!(
            "  vfio-user {}, messages of up to {} bytes; features {}",
            protocol.version,
            protocol.max_data_xfer_size,
            probed.features.join(", ")
        ));
    }
    for missing in &probed.missing {
        lines.push(format!(
            "  Missing: {}: {}. Advice: {}.",
            missing.what, missing.consequence, missing.advice
        ));
    }
    if probed.migratable && probed.missing.is_empty() {
        lines.push("  Nothing is missing.".into());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probed() -> Probed {
        let address: DeviceAddress = "vfio-user:/nowhere/at/all".parse().unwrap();
        let mut probed = probe(&address, Duration::from_secs(1));
        probed.error = None;
        probed
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_with_advice() {
        let address: DeviceAddress = "vfio-user:/nowhere/at/all".parse().unwrap();
        let error = probe(&address, Duration::from_secs(1)).error.unwrap();
        assert!(error.advice.is_some() || error.errno.is_some(), "{error:?}");
        assert_eq!(error.device.as_deref(), Some("vfio-user:/nowhere/at/all"));
    }

    #[test]
    fn a_plain_device_lacks_what_it_lacks() {
        let mut probed = probed();
        probed.state = Some(DeviceState::Running);
        let what: Vec<_> =
            missing(&Capabilities::v2(1).unwrap(), &probed).into_iter().map(|m| m.what).collect();
        assert_eq!(
            what,
            ["the P2P states", "the PRE_COPY states", "DMA logging", "the extension STATE_FORMAT"]
        );
        probed.dma_logging = true;
        probed.features = vec!["PRECOPY_INFO", "STATE_FORMAT"];
        assert_eq!(missing(&Capabilities::v2(7).unwrap(), &probed), []);
    }
}

//! `airlift probe`: what devices and this host can do for a migration, what is missing, and what to do
//! about it.
//!
//! A probe opens or connects, asks and goes; it changes no state. A device that is in use refuses the
//! probe, which says by whom. Opening a real device of the kernel that nobody uses resets it.

mod host;
mod kernel;
mod text;
mod vfio_user;

use crate::args::{DeviceAddress, ProbeArgs};
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::lines::Bystander;
use crate::render;
use airlift::Running;
use airlift_core::v1::MigrationRegion;
use airlift_core::{Capabilities, DeviceIdentity, DeviceState, Interface, RegionArea};
use host::Host;
use serde::Serialize;
use std::borrow::Cow;
use std::time::Duration;

/// One device.
#[derive(Debug, Default, Serialize)]
struct Probed {
    device: String,
    /// It can be migrated.
    migratable: bool,
    /// Why not, where the driver says it.
    not_migratable: Option<String>,
    interface: Option<Interface>,
    state: Option<DeviceState>,
    /// The states that it has.
    states: Vec<DeviceState>,
    p2p: bool,
    precopy: bool,
    dma_logging: bool,
    reinit: bool,
    identity: Option<DeviceIdentity>,
    /// For a device of interface v1.
    migration_region: Option<RegionView>,
    /// For a vfio-user device.
    protocol: Option<Protocol>,
    /// For a device of the kernel.
    kernel: Option<KernelView>,
    /// Features by name.
    features: Vec<&'static str>,
    /// What is missing, with its consequence and what to do.
    missing: Vec<Missing>,
    error: Option<ErrorView>,
}

/// The migration region of interface v1.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct RegionView {
    /// Its number.
    index: u32,
    /// Bytes.
    size: u64,
    /// Bytes of the data section at the most.
    data_section: u64,
    /// What is mapped here, in the device's order.
    mapped: Vec<AreaView>,
    /// Why a part that could be mapped is not.
    not_mapped: Option<String>,
    /// It takes a transaction only as its source gave it.
    whole_transactions: bool,
}

/// A part of a region.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct AreaView {
    offset: u64,
    length: u64,
}

impl From<&MigrationRegion> for RegionView {
    fn from(region: &MigrationRegion) -> Self {
        let view = |area: &RegionArea| AreaView { offset: area.offset, length: area.length };
        Self {
            index: region.index,
            size: region.size,
            data_section: region.data_section,
            mapped: region.mapped.iter().map(view).collect(),
            not_mapped: region.unmapped.clone(),
            whole_transactions: region.whole_transactions,
        }
    }
}

/// What was agreed at the connection.
#[derive(Debug, Serialize)]
struct Protocol {
    version: String,
    max_data_xfer_size: u32,
    max_msg_fds: u32,
}

/// What the host knows of a device.
#[derive(Debug, Default, Serialize)]
struct KernelView {
    /// The driver that is bound to it.
    driver: Option<String>,
    /// An mdev's type.
    mdev_type: Option<String>,
    /// The number of its IOMMU group.
    iommu_group: Option<u32>,
    /// The name of its character device, where the kernel has them.
    cdev: Option<String>,
    /// What its DMA goes through: `iommufd`, `container` or `given`.
    attachment: Option<&'static str>,
    /// Who reports what it writes by DMA.
    dirty: Option<DirtyView>,
}

/// The choice of who reports what a device writes by DMA.
#[derive(Debug, Serialize)]
struct DirtyView {
    /// `device`, `page-table`, `container` or `none`.
    tracker: String,
    /// Why this one.
    reason: String,
    /// What there was to choose from, and what was found of each.
    considered: Vec<Considered>,
}

#[derive(Debug, Serialize)]
struct Considered {
    tracker: String,
    finding: String,
}

/// Something that a device lacks.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Missing {
    what: Cow<'static, str>,
    consequence: Cow<'static, str>,
    advice: Cow<'static, str>,
}

impl Missing {
    fn new(
        what: impl Into<Cow<'static, str>>,
        consequence: impl Into<Cow<'static, str>>,
        advice: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { what: what.into(), consequence: consequence.into(), advice: advice.into() }
    }
}

#[derive(Serialize)]
struct Summary {
    outcome: &'static str,
    source_running: Running,
    destination_running: Running,
    devices: usize,
    migratable: usize,
}

/// Probes every device that was named; without one, the host and every device that a VFIO driver holds.
pub(crate) fn run(args: &ProbeArgs) -> Exit {
    let output = Output::new(args.json);
    let all = args.devices.is_empty();
    let mut devices = args.devices.clone();
    if all {
        let host = Host::look();
        output.event("host", &host);
        output.say(text::host(&host));
        match host::devices() {
            Ok((found, unaddressed)) => {
                for name in unaddressed {
                    output.say(format!(
                        "{name}\n  It is bound to a VFIO driver and has no character device to open it by."
                    ));
                }
                devices = found;
            }
            Err(error) => {
                output.say(render::error_text(&error));
                output.event("result", &Bystander::failed(*error));
                return Exit::Failed;
            }
        }
    }
    let mut migratable = 0;
    let mut failed = false;
    for address in &devices {
        let probed = probe(address, args.timeout.0);
        output.event("device", &probed);
        output.say(text::device(&probed));
        migratable += usize::from(probed.migratable);
        failed |= probed.error.is_some();
    }
    // Asked what there is, a device that is in use is an answer.
    let failed = failed && !all;
    let summary = Summary {
        outcome: if failed { "aborted" } else { "completed" },
        source_running: Running::Unknown,
        destination_running: Running::Unknown,
        devices: devices.len(),
        migratable,
    };
    output.event("result", &summary);
    if failed { Exit::Failed } else { Exit::Done }
}

fn probe(address: &DeviceAddress, timeout: Duration) -> Probed {
    let mut probed = Probed { device: address.to_string(), ..Probed::default() };
    match address {
        DeviceAddress::VfioUser(path) => vfio_user::probe(path, timeout, &mut probed),
        DeviceAddress::Kernel(address) => kernel::probe(address, timeout, &mut probed),
    }
    probed
}

impl Probed {
    /// Takes over what every device that can be migrated says of itself.
    fn can(&mut self, capabilities: &Capabilities, identity: &DeviceIdentity) {
        self.migratable = true;
        self.interface = Some(capabilities.interface);
        self.states = DeviceState::ALL.into_iter().filter(|s| capabilities.has(*s)).collect();
        self.p2p = capabilities.p2p();
        self.precopy = capabilities.precopy();
        self.reinit = capabilities.reinit;
        self.identity = Some(identity.clone());
    }

    fn lacks(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        consequence: impl Into<Cow<'static, str>>,
        advice: impl Into<Cow<'static, str>>,
    ) {
        self.missing.push(Missing::new(what, consequence, advice));
    }

    /// What a device that can be migrated still lacks, whatever drives it, the most important first.
    fn lacks_states(&mut self) {
        if self.state != Some(DeviceState::Running) {
            self.lacks(
                "the state RUNNING",
                "an earlier migration of the device was not finished",
                "find out what became of it with airlift resolve, or reset the device if nothing of it is needed",
            );
        }
        if !self.p2p {
            self.lacks(
                "the P2P states",
                "it is refused in a migration together with other devices: writes between them could be lost",
                if self.interface == Some(Interface::V1) {
                    "interface v1 has none; migrate it alone, or declare with --assume-no-peer-dma that the devices do no DMA to each other"
                } else {
                    "migrate it alone, or declare with --assume-no-peer-dma that the devices do no DMA to each other"
                },
            );
        }
        if !self.precopy {
            self.lacks(
                "the PRE_COPY states",
                "all of its state moves while the guest is stopped, so the downtime grows with its size",
                "give the downtime limit room for it",
            );
        }
    }
}

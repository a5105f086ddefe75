//! Opening the devices that the arguments or a VMM name: vfio-user ones, and those of the kernel with
//! what their DMA goes through, their dirty source and their configuration.
//!
//! A device of the kernel that this process opens itself was reset by being opened (a mediated one
//! may not have been): it is idle, and one that is not RUNNING is the rest of an earlier migration and
//! is reset. A device that was handed in is in use, and is taken as it is.

use crate::args::{DeviceAddress, NamedDevice};
use crate::json::ErrorView;
use crate::memory::FileMemory;
use airlift::SourceDevice;
use airlift::vmm::{DeviceHandle, DeviceKind, RemoteVmm};
use airlift_core::{DeviceId, DeviceState, DirtySource, Errno, MigrationDevice};
use airlift_vfio::{
    Attachment, OpenDevice, OpenError, OpenOptions, PciConfig, Recover, VfioDevice, VfioOptions,
};
use airlift_vfio_user::{ClientOptions, VfioUserDevice};
use std::os::unix::net::UnixStream;

/// What devices are opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be sent: they must run.
    Send,
    /// To be received into.
    Receive,
    /// To go on where a migration ended: the state that they are in is what is asked for.
    Resolve,
}

/// A device of the kernel, beside what the engine has of it.
#[derive(Clone, Debug)]
pub(crate) struct KernelDevice {
    /// Its name.
    pub(crate) id: DeviceId,
    /// Its descriptor, and what its DMA goes through. The device stays open as long as this is kept.
    pub(crate) opened: OpenDevice,
    /// Its configuration, if it is a PCI device.
    pub(crate) config: Option<PciConfig>,
    /// This process has opened it.
    pub(crate) own: bool,
}

/// Devices, open.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// For the engine.
    pub(crate) devices: Vec<SourceDevice>,
    /// Those of the kernel among them.
    pub(crate) kernel: Vec<KernelDevice>,
    /// What the report must say.
    pub(crate) notes: Vec<String>,
}

/// Opens the devices that were named on the command line, and maps `memory` for the DMA of those that
/// this process has opened itself.
///
/// # Errors
/// When one cannot be opened or cannot be migrated.
pub(crate) fn named(
    named: &[NamedDevice],
    purpose: Purpose,
    memory: Option<&FileMemory>,
) -> Result<Opened, Box<ErrorView>> {
    let mut opened = Opened::default();
    let mut options = OpenOptions::default();
    for device in named {
        match &device.address {
            DeviceAddress::VfioUser(path) => {
                let client = VfioUserDevice::connect(device.id.clone(), path, ClientOptions::default());
                let client = client.map_err(|e| format!("{}: {e}", device.address));
                opened.devices.push(with_log(&device.id, client)?);
            }
            DeviceAddress::Kernel(address) => {
                let found = airlift_vfio::open(address, &options)
                    .map_err(|e| Box::new(open_error(&e).device(device.id.as_str())))?;
                share(&mut options, &found.attachment);
                opened.kernel(&device.id, found, device.address.is_own_kernel_device(), purpose)?;
            }
        }
    }
    if let Some(memory) = memory {
        for device in opened.kernel.iter().filter(|d| d.own) {
            map(device, memory)?;
        }
    }
    Ok(opened)
}

/// The devices that a VMM hands over.
///
/// # Errors
/// When it does not, or one of them cannot be migrated.
pub(crate) fn from_vmm(vmm: &mut RemoteVmm, purpose: Purpose) -> Result<Opened, Box<ErrorView>> {
    let handles = vmm
        .devices()
        .map_err(|e| Box::new(ErrorView::new(format!("the VMM's devices: {e}")).errno(e.errno)))?;
    let mut opened = Opened::default();
    for DeviceHandle { id, kind, fd } in handles {
        match kind {
            DeviceKind::VfioUser => {
                let stream = UnixStream::from(fd);
                let client = VfioUserDevice::from_stream(id.clone(), stream, ClientOptions::default());
                opened.devices.push(with_log(&id, client.map_err(|e| e.to_string()))?);
            }
            DeviceKind::Vfio => {
                let device = VfioDevice::from_fd(id.clone(), fd, VfioOptions::default());
                let device = device.map_err(|e| not_migratable(&id, &e))?;
                opened.take(&id, device, false, purpose)?;
            }
        }
    }
    Ok(opened)
}

/// Devices that are opened later use what this one uses.
fn share(options: &mut OpenOptions, attachment: &Attachment) {
    match attachment {
        Attachment::Iommufd { iommufd, .. } => options.iommufd = Some(iommufd.clone()),
        Attachment::Container { container, .. } => options.container = Some(container.clone()),
        Attachment::Given => {}
    }
}

/// An error of opening with what to do about it.
pub(crate) fn open_error(error: &OpenError) -> ErrorView {
    ErrorView::new(error.to_string()).errno(error.errno()).advise(error.advice())
}

fn not_migratable(id: &DeviceId, error: &airlift_core::DeviceError) -> Box<ErrorView> {
    Box::new(
        ErrorView::new(error.to_string())
            .device(id.as_str())
            .errno(error.errno)
            .advise("see what the device can do: airlift probe DEVICE"),
    )
}

impl Opened {
    fn kernel(
        &mut self,
        id: &DeviceId,
        found: OpenDevice,
        own: bool,
        purpose: Purpose,
    ) -> Result<(), Box<ErrorView>> {
        // What an earlier migration left is reset, unless it is what was asked for.
        let recover = (purpose == Purpose::Resolve).then_some(Recover::Leave);
        let options = VfioOptions { recover, ..VfioOptions::default() };
        let device = VfioDevice::new(id.clone(), found, options).map_err(|e| not_migratable(id, &e))?;
        self.take(id, device, own, purpose)
    }

    fn take(
        &mut self,
        id: &DeviceId,
        device: VfioDevice,
        own: bool,
        purpose: Purpose,
    ) -> Result<(), Box<ErrorView>> {
        let state = device.found_state();
        if state != DeviceState::Running {
            if own && purpose != Purpose::Resolve {
                self.notes.push(format!(
                    "{id}: it was found in {state}, the rest of an earlier migration, and was reset first"
                ));
            } else if purpose == Purpose::Send {
                let mut view = ErrorView::new(format!(
                    "the device is in {state}: only one that runs can be sent"
                ))
                .device(id.as_str())
                .advise(
                    "an earlier migration of it was not finished: airlift resolve says what became of it; \
                         its VMM can also reset it",
                );
                view.state = Some(state.to_string());
                return Err(Box::new(view));
            }
        }
        let config = device.config();
        let opened = device.opened().clone();
        // Without a source the engine says itself what that means.
        let dirty = airlift_vfio::choose(id, &opened).source;
        self.kernel.push(KernelDevice { id: id.clone(), opened, config, own });
        self.devices.push(SourceDevice { device: Box::new(device), dirty });
        Ok(())
    }
}

/// Maps `memory` at the guest's own addresses in what the device's DMA goes through; what is mapped
/// there already, for another device, is left.
fn map(device: &KernelDevice, memory: &FileMemory) -> Result<(), Box<ErrorView>> {
    for region in memory.memory().regions() {
        let here = |mapped: Vec<airlift_core::IovaRange>| mapped.iter().any(|r| r.start.0 == region.gpa);
        let result = match &device.opened.attachment {
            Attachment::Iommufd { iommufd, .. } if !here(iommufd.mapped()) => {
                iommufd.map(region.gpa, &region.mapping)
            }
            Attachment::Container { container, .. } if !here(container.mapped()) => {
                container.map(region.gpa, &region.mapping)
            }
            Attachment::Iommufd { .. } | Attachment::Container { .. } | Attachment::Given => Ok(()),
        };
        result.map_err(|e| {
            let view = ErrorView::new(format!("memory at {:#x} cannot be mapped for its DMA: {e}", region.gpa))
                .device(device.id.as_str())
                .errno(e.errno);
            Box::new(match e.errno {
                Some(Errno::ENOMEM) => {
                    view.advise("all of the memory is pinned: raise the limit of locked memory (ulimit -l)")
                }
                Some(Errno::EINVAL | Errno::ERANGE) => view.advise(
                    "the IOMMU cannot map these addresses (some are reserved, as those of MSI): choose others with gpa=",
                ),
                _ => view,
            })
        })?;
    }
    Ok(())
}

fn with_log(id: &DeviceId, opened: Result<VfioUserDevice, String>) -> Result<SourceDevice, Box<ErrorView>> {
    let device = opened.map_err(|message| {
        Box::new(
            ErrorView::new(message)
                .device(id.as_str())
                .advise("see what the device says for itself: airlift probe vfio-user:PATH"),
        )
    })?;
    let dirty = device.dirty_source().map(|log| Box::new(log) as Box<dyn DirtySource>);
    Ok(SourceDevice { device: Box::new(device) as Box<dyn MigrationDevice>, dirty })
}

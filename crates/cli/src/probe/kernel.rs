//! Probing a device of the kernel.

use super::{Considered, DirtyView, KernelView, Probed};
use crate::json::ErrorView;
use crate::open;
use airlift_core::{DeviceError, DeviceErrorKind, DeviceId, MigrationDevice};
use airlift_vfio::{
    Attachment, DeviceAddress, DeviceFd, Feature, OpenDevice, OpenOptions, Recover, VfioDevice, VfioOptions,
};
use std::time::Duration;

/// Fills `probed` in.
pub(super) fn probe(address: &DeviceAddress, timeout: Duration, probed: &mut Probed) {
    let opened = match airlift_vfio::open(address, &OpenOptions::default()) {
        Ok(opened) => opened,
        Err(error) => {
            probed.error = Some(open::open_error(&error).device(&probed.device));
            return;
        }
    };
    probed.kernel = Some(host_view(&opened));
    let driver = opened.sysfs.as_ref().and_then(|s| s.driver.clone());
    if let Err(error) = ask(opened, timeout, probed) {
        // A device without migration is an answer, not an error.
        if error.kind == DeviceErrorKind::Unsupported {
            probed.not_migratable = Some(error.message);
            probed.lacks("migration", "the device cannot be saved or loaded", advice(driver.as_deref()));
        } else {
            probed.error = Some(
                ErrorView::new(error.to_string())
                    .device(&probed.device)
                    .errno(error.errno)
                    .advise("the kernel's log (dmesg) may say more"),
            );
        }
    }
}

/// What to do about a driver without migration.
fn advice(driver: Option<&str>) -> String {
    match driver {
        // It serves every PCI device and knows the state of none.
        Some("vfio-pci") => {
            "vfio-pci itself cannot migrate: bind the device's own VFIO driver if there is one \
                             (mlx5_vfio_pci, hisi_acc_vfio_pci, qat_vfio_pci, virtio_vfio_pci, …)"
                .into()
        }
        Some(driver) => {
            format!("use a kernel whose {driver} has migration interface v2 or v1, or another device")
        }
        None => "use a driver that has migration interface v2 or v1".into(),
    }
}

fn host_view(opened: &OpenDevice) -> KernelView {
    let mut view = KernelView {
        attachment: Some(match &opened.attachment {
            Attachment::Iommufd { .. } => "iommufd",
            Attachment::Container { .. } => "container",
            Attachment::Given => "given",
        }),
        ..KernelView::default()
    };
    if let Some(sysfs) = &opened.sysfs {
        view.driver.clone_from(&sysfs.driver);
        view.mdev_type.clone_from(&sysfs.mdev_type);
        view.iommu_group = sysfs.iommu_group;
        view.cdev.clone_from(&sysfs.cdev);
    }
    view
}

fn ask(opened: OpenDevice, timeout: Duration, probed: &mut Probed) -> Result<(), DeviceError> {
    probed.features = features(&opened.fd)?;
    let id = DeviceId::new("probed")
        .map_err(|e| DeviceError::new(DeviceErrorKind::Misuse, "probe", e.to_string()))?;
    // Nothing is changed: what an earlier migration left stays as it is.
    let options =
        VfioOptions { answer_timeout: timeout, recover: Some(Recover::Leave), ..VfioOptions::default() };
    let choice = airlift_vfio::choose(&id, &opened);
    let device = VfioDevice::new(id, opened, options)?;
    probed.can(&device.capabilities(), device.identity());
    probed.state = Some(device.found_state());
    probed.migration_region = device.migration_region().map(Into::into);
    probed.dma_logging = probed.features.contains(&"DMA_LOGGING_START");
    let tracked = choice.source.is_some();
    if let Some(kernel) = &mut probed.kernel {
        kernel.dirty = Some(DirtyView {
            tracker: choice.tracker.to_string(),
            reason: choice.reason,
            considered: choice
                .considered
                .into_iter()
                .map(|(tracker, finding)| Considered { tracker: tracker.to_string(), finding })
                .collect(),
        });
    }
    missing(probed, tracked);
    Ok(())
}

/// What a device that can be migrated still lacks, the most important first.
fn missing(probed: &mut Probed, tracked: bool) {
    probed.lacks_states();
    if !tracked {
        probed.lacks(
            "dirty tracking of its DMA",
            "all memory that it can reach counts as written at every sync",
            "expect all of that memory to move while the guest is stopped",
        );
    }
}

/// The features that matter to a migration, by name.
fn features(fd: &DeviceFd) -> Result<Vec<&'static str>, DeviceError> {
    let mut names = Vec::new();
    for feature in Feature::ALL {
        if fd.has_feature(feature)? {
            names.push(feature.name());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_core::{Capabilities, DeviceIdentity, DeviceState};

    #[test]
    fn a_device_that_is_not_there_is_an_error_with_advice() {
        let address: DeviceAddress = "mdev:00000000-0000-0000-0000-00000000dead".parse().unwrap();
        let mut probed = Probed { device: address.to_string(), ..Probed::default() };
        probe(&address, Duration::from_secs(1), &mut probed);
        let error = probed.error.unwrap();
        assert!(error.advice.is_some(), "{error:?}");
        assert_eq!(error.device.as_deref(), Some("mdev:00000000-0000-0000-0000-00000000dead"));
        assert!(!probed.migratable);
    }

    #[test]
    fn memory_that_nobody_tracks_is_missing_tracking() {
        let mut probed = Probed { state: Some(DeviceState::Running), ..Probed::default() };
        probed.can(&Capabilities::v2(7).unwrap(), &DeviceIdentity::default());
        missing(&mut probed, true);
        assert_eq!(probed.missing, []);
        missing(&mut probed, false);
        assert_eq!(probed.missing[0].what, "dirty tracking of its DMA");
        probed.missing.clear();
        probed.state = Some(DeviceState::StopCopy);
        missing(&mut probed, true);
        assert_eq!(probed.missing[0].what, "the state RUNNING");
    }

    #[test]
    fn the_generic_driver_is_named_as_the_reason() {
        assert!(advice(Some("vfio-pci")).contains("mlx5_vfio_pci"));
        assert!(advice(Some("mbochs")).contains("mbochs"));
    }
}

//! What a probe found, for a person.

use super::host::Host;
use super::{Considered, KernelView, Probed, RegionView};
use crate::render;
use airlift_core::{DeviceIdentity, Interface};

/// A device.
pub(super) fn device(probed: &Probed) -> String {
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
        let because =
            probed.not_migratable.as_ref().map(|why| format!(", because {why}")).unwrap_or_default();
        lines.push(format!("  It cannot be migrated{because}."));
    }
    if let Some(state) = probed.state {
        lines.push(format!("  It is in {state}."));
    }
    if let Some(region) = &probed.migration_region {
        lines.push(of_region(region));
    }
    if let Some(identity) = &probed.identity {
        if let Some(format) = &identity.format {
            lines.push(format!(
                "  Its state has the format {} {}, and it reads versions {:?}.",
                format.name, format.version, format.accepts
            ));
            for interface in &format.interfaces {
                lines.push(format!("  It also reads what was saved over interface {interface}."));
            }
        }
        let facts = |wanted: &dyn Fn(&str) -> bool| {
            let found = identity.facts.iter().filter(|(name, _)| wanted(name));
            found.map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ")
        };
        let for_information = |name: &str| name.starts_with(DeviceIdentity::INFO);
        lines.push(format!("  The other side must match: {}", facts(&|name| !for_information(name))));
        if identity.facts.keys().any(|name| for_information(name)) {
            lines.push(format!("  For information: {}", facts(&for_information)));
        }
    }
    if let Some(protocol) = &probed.protocol {
        lines.push(format!(
            "  vfio-user {}, messages of up to {} bytes; features {}",
            protocol.version,
            protocol.max_data_xfer_size,
            probed.features.join(", ")
        ));
    }
    if let Some(kernel) = &probed.kernel {
        lines.extend(of_kernel(kernel));
        if !probed.features.is_empty() {
            lines.push(format!("  Features: {}", probed.features.join(", ")));
        }
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

fn of_region(region: &RegionView) -> String {
    let RegionView { index, size, data_section, mapped, not_mapped, whole_transactions } = region;
    let areas: Vec<String> =
        mapped.iter().map(|area| format!("{} bytes at {:#x}", area.length, area.offset)).collect();
    let bytes: u64 = mapped.iter().map(|area| area.length).sum();
    let mut mapping = match (mapped.is_empty(), bytes >= *data_section) {
        (true, _) => "trapped: each byte goes through a read or a write".to_owned(),
        (false, true) => "mapped".to_owned(),
        (false, false) => format!("mapped in part ({})", areas.join(", ")),
    };
    if let Some(why) = not_mapped {
        mapping += &format!("; not all that could be is mapped, because {why}");
    }
    let whole = if *whole_transactions { "; it takes transactions only whole" } else { "" };
    format!(
        "  Its migration region is region {index}, {size} bytes, with up to {data_section} bytes of data section, {mapping}{whole}."
    )
}

fn of_kernel(kernel: &KernelView) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = |what: &str, value: Option<String>| parts.extend(value.map(|v| format!("{what} {v}")));
    part("driver", kernel.driver.clone());
    part("mdev type", kernel.mdev_type.clone());
    part("IOMMU group", kernel.iommu_group.map(|g| g.to_string()));
    part("character device", kernel.cdev.clone());
    part("DMA through", kernel.attachment.map(str::to_owned));
    let mut lines = Vec::new();
    if !parts.is_empty() {
        lines.push(format!("  On this host: {}", parts.join(", ")));
    }
    if let Some(dirty) = &kernel.dirty {
        lines.push(format!("  Its writes by DMA are tracked by: {}: {}", dirty.tracker, dirty.reason));
        for Considered { tracker, finding } in &dirty.considered {
            lines.push(format!("    {tracker}: {finding}"));
        }
    }
    lines
}

/// The host.
pub(super) fn host(host: &Host) -> String {
    let mut lines = vec![format!("This host: kernel {}", host.kernel)];
    for (what, node) in [("iommufd", &host.iommufd), ("VFIO containers", &host.container)] {
        let advice = node.advice.map(|advice| format!(". Advice: {advice}")).unwrap_or_default();
        lines.push(format!("  {what} ({}): {}{advice}.", node.path, node.found));
    }
    lines.push(match host.iommu_groups {
        0 => "  No IOMMU groups: no device can be assigned. Advice: switch the IOMMU on in the firmware and on the kernel's command line (intel_iommu=on)."
            .to_owned(),
        count => format!("  {count} IOMMU groups."),
    });
    if host.devices == 0 {
        lines.push("  No device is bound to a VFIO driver.".into());
    }
    lines.join("\n")
}

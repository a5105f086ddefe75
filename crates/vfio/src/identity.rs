//! Who a device is: what must be equal on the other side before the device's state may be loaded there.
//!
//! Names are those that vfio-user devices use where they mean the same. That two drivers of one name
//! read each other's data cannot be seen here: the kernel has no name for a state's format.

use crate::pci::capabilities;
use crate::region::MAX_REGIONS;
use crate::{DeviceFd, DeviceFlags, OpenDevice, RegionInfo};
use airlift_core::v1::REGION_TYPE;
use airlift_core::{DeviceError, DeviceIdentity, Errno, MigrationFlags};
use std::collections::BTreeMap;
use std::path::Path;
use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_REGIONS};

/// Most interrupt indexes that a device may state.
const MAX_IRQS: u32 = 128;
/// Bytes of the configuration header that every PCI device has.
const HEADER: usize = 64;
/// Most bytes of a configuration space.
const MAX_CONFIG: u64 = 4096;
/// Most bytes of a text from sysfs or procfs that become a fact.
const MAX_TEXT: usize = 128;

/// A device's identity. The driver declares no format of its state.
pub(crate) fn identity(opened: &OpenDevice, flags: MigrationFlags) -> Result<DeviceIdentity, DeviceError> {
    let mut facts = BTreeMap::new();
    let pci = hardware(&opened.fd, &mut facts)?;
    if let Some(region) = pci {
        let mut config = vec![0; usize::try_from(region.size.min(MAX_CONFIG)).unwrap_or(HEADER)];
        opened.fd.read_region(&region, 0, &mut config)?;
        pci_facts(&config, &mut facts);
    }
    host(opened, flags, &mut facts);
    Ok(DeviceIdentity { format: None, facts })
}

/// Regions and interrupts; the configuration space, where the device is PCI. The migration region is its
/// interface's and no part of the device (V1-REGION).
fn hardware(fd: &DeviceFd, facts: &mut BTreeMap<String, String>) -> Result<Option<RegionInfo>, DeviceError> {
    let info = fd.info()?;
    if info.regions > MAX_REGIONS || info.irqs > MAX_IRQS {
        let message = format!("{} regions and {} interrupt indexes", info.regions, info.irqs);
        return Err(crate::error::protocol("VFIO_DEVICE_GET_INFO", message));
    }
    // Numbers behind the last region that is one come and go with the interface.
    let (mut count, mut config) = (0, None);
    if info.flags.contains(DeviceFlags::PCI) {
        count = VFIO_PCI_NUM_REGIONS;
    }
    for index in 0..info.regions {
        let region = match fd.region(index) {
            Ok(region) => region,
            // Numbers have gaps: vfio-pci refuses that of VGA for devices that are none.
            Err(error) if error.errno == Some(Errno::EINVAL) => continue,
            Err(error) => return Err(error),
        };
        if region.kind == Some(REGION_TYPE) {
            continue;
        }
        if region.size > 0 {
            facts.insert(format!("region{index}-size"), region.size.to_string());
            count = count.max(index + 1);
        }
        if index == VFIO_PCI_CONFIG_REGION_INDEX && info.flags.contains(DeviceFlags::PCI) {
            config = Some(region);
        }
    }
    facts.insert("region-count".into(), count.to_string());
    facts.insert("irq-count".into(), info.irqs.to_string());
    for index in 0..info.irqs {
        let vectors = fd.irq_count(index)?;
        if vectors > 0 {
            facts.insert(format!("irq{index}-count"), vectors.to_string());
        }
    }
    Ok(config.filter(|region| region.size >= HEADER as u64))
}

/// Ids, class and the layout of capabilities, from a configuration space of at least [`HEADER`] bytes.
fn pci_facts(config: &[u8], facts: &mut BTreeMap<String, String>) {
    let short = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    let class = u32::from_le_bytes([config[9], config[10], config[11], 0]);
    facts.insert("pci-vendor".into(), format!("{:#06x}", short(0)));
    facts.insert("pci-device".into(), format!("{:#06x}", short(2)));
    facts.insert("pci-revision".into(), format!("{:#04x}", config[8]));
    facts.insert("pci-class".into(), format!("{class:#08x}"));
    facts.insert("pci-subsystem-vendor".into(), format!("{:#06x}", short(0x2c)));
    facts.insert("pci-subsystem".into(), format!("{:#06x}", short(0x2e)));
    let (mut usual, mut extended) = (Vec::new(), Vec::new());
    for capability in capabilities(config) {
        if capability.extended {
            extended.push(format!("{:04x}@{:02x}", capability.id, capability.offset));
        } else {
            usual.push(format!("{:02x}@{:02x}", capability.id, capability.offset));
        }
    }
    for (name, layout) in [("pci-capabilities", usual), ("pci-extended-capabilities", extended)] {
        if !layout.is_empty() {
            facts.insert(name.into(), layout.join(","));
        }
    }
}

/// What the host says of the device, where it is known which one it is.
fn host(opened: &OpenDevice, flags: MigrationFlags, facts: &mut BTreeMap<String, String>) {
    let mut add = |prefix: &str, name: &str, value: Option<String>| {
        if let Some(value) = value {
            facts.insert(format!("{prefix}{name}"), value);
        }
    };
    if let Some(sysfs) = &opened.sysfs {
        add(DeviceIdentity::HOST, "driver", sysfs.driver.clone());
        add(DeviceIdentity::HOST, "mdev-type", sysfs.mdev_type.clone());
        add(DeviceIdentity::INFO, "driver-version", text(&sysfs.path.join("driver/module/version")));
    }
    add(DeviceIdentity::INFO, "kernel", text(Path::new("/proc/sys/kernel/osrelease")));
    let names: Vec<_> = flags.iter_names().map(|(name, _)| name).collect();
    add(DeviceIdentity::INFO, "migration-flags", Some(names.join("|")));
}

/// The first line of a small file, as far as a fact may be long.
fn text(path: &Path) -> Option<String> {
    let content = std::fs::read_to_string(path).ok()?;
    let line: String = content.lines().next()?.trim().chars().take(MAX_TEXT).collect();
    Some(line).filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(size: usize) -> Vec<u8> {
        let mut image = vec![0; size];
        image[..4].copy_from_slice(&[0x48, 0x43, 0x53, 0x32]);
        image[6] = 0x10;
        image[8..12].copy_from_slice(&[0x10, 0x02, 0x00, 0x07]);
        image[0x2c..0x30].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        image[0x34] = 0x40;
        image[0x40..0x42].copy_from_slice(&[0x01, 0x50]);
        image[0x50..0x52].copy_from_slice(&[0x05, 0x00]);
        image
    }

    fn facts(image: &[u8]) -> BTreeMap<String, String> {
        let mut facts = BTreeMap::new();
        pci_facts(image, &mut facts);
        facts
    }

    #[test]
    fn ids_and_class_are_read_as_the_other_transports_write_them() {
        let facts = facts(&image(256));
        for (name, value) in [
            ("pci-vendor", "0x4348"),
            ("pci-device", "0x3253"),
            ("pci-revision", "0x10"),
            ("pci-class", "0x070002"),
            ("pci-subsystem-vendor", "0x1234"),
            ("pci-subsystem", "0x5678"),
            ("pci-capabilities", "01@40,05@50"),
        ] {
            assert_eq!(facts[name], value, "{name}");
        }
        assert!(!facts.contains_key("pci-extended-capabilities"));
    }

    #[test]
    fn capabilities_at_other_offsets_are_another_layout() {
        let mut moved = image(256);
        moved[0x41] = 0x60;
        moved[0x60] = 0x05;
        assert_eq!(facts(&moved)["pci-capabilities"], "01@40,05@60");
        let mut none = image(256);
        none[6] = 0;
        assert!(!facts(&none).contains_key("pci-capabilities"), "the pointer means nothing without the bit");
    }

    #[test]
    fn a_chain_that_loops_or_leads_outside_ends() {
        let mut looped = image(256);
        looped[0x51] = 0x40;
        assert_eq!(facts(&looped)["pci-capabilities"], "01@40,05@50");
        let mut low = image(256);
        low[0x51] = 0x08;
        assert_eq!(facts(&low)["pci-capabilities"], "01@40,05@50");
        // mtty's space has an odd size; the last link must lie in it whole.
        let mut end = image(255);
        end[0x51] = 0xfc;
        assert_eq!(facts(&end)["pci-capabilities"], "01@40,05@50");
    }

    #[test]
    fn extended_capabilities_are_walked_over_holes_and_loops() {
        let mut express = image(4096);
        // A hole that leads on, AER version 2 at 0x140, and a vendor's at 0xffc that leads back.
        express[0x100..0x104].copy_from_slice(&0x1400_0000_u32.to_le_bytes());
        express[0x140..0x144].copy_from_slice(&0xffc2_0001_u32.to_le_bytes());
        express[0xffc..0x1000].copy_from_slice(&0x1001_000b_u32.to_le_bytes());
        assert_eq!(facts(&express)["pci-extended-capabilities"], "0001@140,000b@ffc");
        let mut gone = image(4096);
        gone[0x100..0x104].fill(0xff);
        assert!(!facts(&gone).contains_key("pci-extended-capabilities"));
        assert!(!facts(&image(4096)).contains_key("pci-extended-capabilities"));
    }
}

//! Who a device behind a socket is: the format of its state, and what must be equal on the other side.

use super::Client;
use super::channel::protocol;
use crate::codec::{
    DeviceInfoFlags, FeatureFlags, StateFormatFlags, StateFormatHeader, command, feature, take,
};
use airlift_core::{DeviceError, DeviceErrorKind, Interface, StateFormat};
use std::collections::BTreeMap;

/// Regions that every PCI device has numbers for, and that of its configuration space.
const PCI_REGIONS: u32 = 9;
const PCI_CONFIG: u32 = 7;

/// Bytes of data that a state's format may have.
const MAX_FORMAT: u32 = 4096;

/// The format of the device's state, and whether it takes transactions of interface v1 only whole.
pub(super) fn state_format(client: &Client) -> Result<(StateFormat, bool), DeviceError> {
    let operation = "GET STATE_FORMAT";
    let wrong = |text: &str| DeviceError::new(DeviceErrorKind::Protocol, operation, text);
    let data = client.device_feature(feature::STATE_FORMAT, FeatureFlags::GET, &[], MAX_FORMAT)?;
    let (head, rest) = take::<StateFormatHeader>(&data).ok_or_else(|| wrong("the reply is too short"))?;
    let versions = usize::from(head.accepts) * 4;
    let (versions, rest) = rest.split_at_checked(versions).ok_or_else(|| wrong("versions are missing"))?;
    let (name, rest) =
        rest.split_at_checked(usize::from(head.name)).ok_or_else(|| wrong("the name is missing"))?;
    // Older servers end with the name.
    let flags = take::<u32>(rest).map_or(0, |(flags, _)| flags);
    let flags = StateFormatFlags::from_bits_truncate(flags);
    let readable = [(StateFormatFlags::READS_V1, Interface::V1), (StateFormatFlags::READS_V2, Interface::V2)];
    let interfaces = readable.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, i)| i).collect();
    let name = str::from_utf8(name).map_err(|_| wrong("the name is no text"))?;
    let accepts = versions.as_chunks::<4>().0.iter().map(|v| u32::from_ne_bytes(*v)).collect();
    let format = StateFormat { name: name.into(), version: head.version, accepts, interfaces };
    Ok((format, flags.contains(StateFormatFlags::WHOLE_TRANSACTIONS)))
}

/// What must be equal on the other side: regions, interrupts and PCI ids. The region `migration` is its
/// interface's and no part of the device (V1-REGION).
pub(super) fn facts(
    client: &Client,
    migration: Option<u32>,
) -> Result<BTreeMap<String, String>, DeviceError> {
    let info = client.info()?;
    if info.num_regions > 128 || info.num_irqs > 128 {
        return Err(protocol(command::DEVICE_GET_INFO, "implausible numbers of regions"));
    }
    let mut facts = BTreeMap::new();
    facts.insert("irq-count".into(), info.num_irqs.to_string());
    // Numbers behind the last region that is one come and go with the interface.
    let pci = DeviceInfoFlags::from_bits_truncate(info.flags).contains(DeviceInfoFlags::PCI);
    let (mut count, mut config) = (if pci { PCI_REGIONS } else { 0 }, 0);
    for index in (0..info.num_regions).filter(|index| Some(*index) != migration) {
        let region = match client.region_info(index) {
            Ok(region) => region,
            // Numbers may have gaps.
            Err(error) if error.kind == DeviceErrorKind::Refused => continue,
            Err(error) => return Err(error),
        };
        if region.size > 0 {
            facts.insert(format!("region{index}-size"), region.size.to_string());
            count = count.max(index + 1);
        }
        if index == PCI_CONFIG {
            config = region.size;
        }
    }
    facts.insert("region-count".into(), count.to_string());
    if pci && config >= 64 {
        let mut space = [0; 64];
        client.region_read(PCI_CONFIG, 0, &mut space)?;
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

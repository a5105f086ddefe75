//! The migration region of interface v1 through [`KernelRegion`], with our own driver: found by its type,
//! fields by single accesses, data mapped, trapped, or partly both.

use crate::support::Mdev;
use airlift_core::region::{read_data, read_u32, read_u64, write_data, write_u32};
use airlift_core::{DeviceErrorKind, Errno, RegionAccess};
use airlift_vfio::{KernelRegion, OpenDevice, OpenOptions, Way, find_migration_region, open};

fn opened(mdev: &Mdev) -> OpenDevice {
    open(&mdev.address(), &OpenOptions { way: Way::Group, ..OpenOptions::default() })
        .unwrap_or_else(|e| panic!("{e}; {}", e.advice()))
}

fn region(device: &OpenDevice) -> KernelRegion {
    find_migration_region(&device.fd).unwrap().unwrap()
}

const SECTION: u64 = 0x8000;
const STATE: u32 = 7;
const RUNNING: u32 = 1;
/// The data section is the user's to write.
const RESUMING: u32 = 4;

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_without_interface_v1_has_no_such_region() {
    let mdev = Mdev::ours("v2");
    assert!(find_migration_region(&opened(&mdev).fd).unwrap().is_none());
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn data_is_the_same_however_the_section_is_mapped() {
    for (map, mapped) in [("trapped", 0), ("mapped", 1), ("sparse", 2)] {
        let mdev = Mdev::ours("v1");
        mdev.set("v1_section", &SECTION.to_string());
        mdev.set("v1_map", map);
        let device = opened(&mdev);
        let mut region = region(&device);
        assert_eq!(region.mapped().len(), mapped, "{map}: {:?}", region.info());
        // The other bits are the device's, which keeps some of them set.
        let state = read_u32(&mut region, 0).unwrap();
        assert_eq!(state & STATE, RUNNING, "{map}");
        write_u32(&mut region, 0, state & !STATE | RESUMING).unwrap();
        assert_eq!(read_u32(&mut region, 0).unwrap() & STATE, RESUMING, "{map}");
        let section = read_u64(&mut region, 16).unwrap();
        assert!(section >= 32 && section + SECTION <= region.size(), "{map}: {section:#x}");
        let data: Vec<u8> = (0..SECTION).map(|i| (i * 7 + i / 251).to_le_bytes()[0]).collect();
        write_data(&mut region, section, &data).unwrap();
        let mut got = vec![0; data.len()];
        region.read_trapped(section, &mut got).unwrap();
        assert!(got == data, "{map}: what was written by the fast way is not what the device has");
        got.fill(0);
        read_data(&mut region, section, &mut got).unwrap();
        assert!(got == data, "{map}");
        device.fd.reset(std::time::Duration::from_secs(30)).unwrap();
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_field_at_another_width_is_refused_by_the_driver() {
    let mdev = Mdev::ours("v1");
    let device = opened(&mdev);
    let mut region = region(&device);
    // data_offset has 8 bytes.
    let error = region.read_trapped(16, &mut [0; 4]).unwrap_err();
    assert_eq!((error.kind, error.errno), (DeviceErrorKind::Refused, Some(Errno::EINVAL)));
    let error = region.read_trapped(region.size() - 4, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Misuse);
}

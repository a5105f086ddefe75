//! The PCI configuration, which migration data does not hold: the command carries it.

use crate::support::{Mdev, NIC, assert_runs, let_go, receive, send};
use airlift_vfio::{DeviceFd, VfioDevice};

const CONFIG: u32 = 7;
const BAR2: u32 = 2;
const COMMAND: u64 = 0x04;
const BAR_0: u64 = 0x10;
const BAR_2: u64 = 0x18;
const LINE: u64 = 0x3c;
const MSI: u64 = 0x50;
const MSIX: u64 = 0x70;

fn write(fd: &DeviceFd, at: u64, bytes: &[u8]) {
    fd.write_region(&fd.region(CONFIG).unwrap(), at, bytes).unwrap();
}

/// Configuration space, and the MSI-X table.
fn registers(device: &VfioDevice) -> (Vec<u8>, Vec<u8>) {
    let (mut config, mut table) = (vec![0; 256], vec![0; 64]);
    device.fd().read_region(&device.fd().region(CONFIG).unwrap(), 0, &mut config).unwrap();
    device.fd().read_region(&device.fd().region(BAR2).unwrap(), 0, &mut table).unwrap();
    (config, table)
}

/// What a guest's driver does to a device before it uses it.
fn common(fd: &DeviceFd) {
    write(fd, BAR_0, &0xfe00_0000_u32.to_le_bytes());
    write(fd, BAR_2, &0xfebf_1000_u32.to_le_bytes());
    write(fd, LINE, &[11]);
    // Memory, bus mastering, no INTx.
    write(fd, COMMAND, &0x0406_u16.to_le_bytes());
}

fn use_msi(fd: &DeviceFd) {
    common(fd);
    write(fd, MSI + 4, &0xfee0_1000_u32.to_le_bytes());
    write(fd, MSI + 8, &1_u32.to_le_bytes());
    write(fd, MSI + 12, &0x4123_u16.to_le_bytes());
    write(fd, MSI + 16, &2_u32.to_le_bytes());
    // Two vectors, on.
    write(fd, MSI + 2, &0x0191_u16.to_le_bytes());
}

fn use_msix(fd: &DeviceFd) {
    common(fd);
    let bar = fd.region(BAR2).unwrap();
    for vector in 0..4_u8 {
        let address = 0xfee0_0000_u32 | u32::from(vector) << 12;
        let masked = u32::from(vector == 2);
        let entry = [address, 0, 0x40 + u32::from(vector), masked].map(u32::to_le_bytes).concat();
        fd.write_region(&bar, u64::from(vector) * 16, &entry).unwrap();
    }
    write(fd, MSIX + 2, &0x8003_u16.to_le_bytes());
}

fn moves(use_it: fn(&DeviceFd)) -> (Vec<u8>, Vec<u8>) {
    let (from, to) = (Mdev::lasting("v2", 64 << 10), Mdev::lasting("v2", 64 << 10));
    let before = registers(&to.open());
    let source = from.open();
    use_it(source.fd());
    let expected = registers(&source);
    drop(source);
    assert_ne!(expected, before, "the source was configured");

    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    send(&["--device", &from.named(NIC)], &uri).must("completed", 0);
    receive.wait_for("holding");
    let_go(receive).must("completed", 0);
    let device = to.open();
    assert_runs(&device);
    let got = registers(&device);
    assert_eq!(got, expected);
    got
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn command_bars_and_msi_are_on_the_destination_as_they_were() {
    let (config, _) = moves(use_msi);
    // What the test wrote is what it reads: the driver has all of these registers.
    assert_eq!(config[4..6], 0x0406_u16.to_le_bytes());
    assert_eq!(config[0x10..0x14], 0xfe00_0000_u32.to_le_bytes());
    assert_eq!(config[0x52] & 0x71, 0x11, "on, with two vectors");
    assert_eq!(config[0x54..0x5e], [0x00, 0x10, 0xe0, 0xfe, 1, 0, 0, 0, 0x23, 0x41]);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn the_msix_table_is_on_the_destination_as_it_was() {
    let (config, table) = moves(use_msix);
    assert_eq!(config[0x73] & 0x80, 0x80, "on");
    assert_eq!(table[32..48], [0, 0x20, 0xe0, 0xfe, 0, 0, 0, 0, 0x42, 0, 0, 0, 1, 0, 0, 0]);
}

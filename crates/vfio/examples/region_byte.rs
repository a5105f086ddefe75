//! Reads one byte of a device's region, after writing it if a value is given: how a device's own registers are
//! looked at before and after a migration.
//!
//! `region_byte DEVICE REGION OFFSET [VALUE]`, as in `region_byte mdev:83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 0 7 90`:
//! BAR 0, byte 7. Opening the device may reset it, and closing it surely does: only software devices such as mtty
//! keep what was written.

use airlift_vfio::{OpenOptions, open};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (address, region, offset, value) = match &args[..] {
        [address, region, offset] => (address, region, offset, None),
        [address, region, offset, value] => (address, region, offset, Some(value)),
        _ => return Err("usage: region_byte DEVICE REGION OFFSET [VALUE]".into()),
    };
    let device = open(&address.parse()?, &OpenOptions::default())?;
    let region = device.fd.region(region.parse()?)?;
    let offset = offset.parse()?;
    if let Some(value) = value {
        device.fd.write_region(&region, offset, &[value.parse()?])?;
    }
    let mut byte = [0];
    device.fd.read_region(&region, offset, &mut byte)?;
    println!("{:#04x}", byte[0]);
    Ok(())
}

//! Saves a device into memory with pre-copy, resets it, and loads it again.
//!
//! `save_load DEVICE`: `mdev:UUID`, `pci:BDF` or `cdev:PATH` of an idle device with migration interface v2.

use airlift_core::{DeviceId, DeviceState, MigrationDevice, Piece, SaveSession, Session};
use airlift_vfio::{DeviceAddress, OpenOptions, VfioDevice, VfioOptions, open};
use std::error::Error;

/// Walks to a state; the kernel's view of each step is in debugfs, `vfio/DEVICE/migration/state`.
fn walk(device: &mut VfioDevice, to: DeviceState) -> Result<Option<Session>, Box<dyn Error>> {
    println!("{} -> {to}", device.state()?);
    Ok(device.set_state(to)?)
}

/// Reads until the driver has nothing (more): a pre-copy state drains, STOP_COPY ends.
fn read(session: &mut dyn SaveSession, saved: &mut Vec<u8>) -> Result<(), Box<dyn Error>> {
    let (before, mut buf) = (saved.len(), vec![0; 1 << 20]);
    while let Piece::Data { len, .. } = session.read(&mut buf)? {
        saved.extend(&buf[..len]);
    }
    println!("  read {} bytes", saved.len() - before);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let address: DeviceAddress = std::env::args().nth(1).ok_or("which device?")?.parse()?;
    let opened = open(&address, &OpenOptions::default())?;
    let mut device = VfioDevice::new(DeviceId::new("device")?, opened, VfioOptions::default())?;
    let can = device.capabilities();
    println!("{address}: {:?}, found in {}", can.flags, device.found_state());

    // Save. In PRE_COPY the guest would go on; it is stopped on the way to STOP_COPY.
    let mut saved = Vec::new();
    let mut saving = None;
    if can.precopy() {
        saving = walk(&mut device, DeviceState::PreCopy)?;
        let Some(Session::Save(session)) = &mut saving else { return Err("no session".into()) };
        println!("  pre-copy has {:?}", session.precopy_info()?);
        read(session.as_mut(), &mut saved)?;
        if can.p2p() {
            walk(&mut device, DeviceState::PreCopyP2p)?;
        }
    }
    saving = walk(&mut device, DeviceState::StopCopy)?.or(saving);
    let Some(Session::Save(session)) = &mut saving else { return Err("no session".into()) };
    read(session.as_mut(), &mut saved)?;
    walk(&mut device, DeviceState::Stop)?;

    device.reset()?;
    println!("reset, now {}", device.state()?);

    // Load. RESUMING -> STOP is where the driver takes the data in and may refuse it.
    let Some(Session::Load(mut session)) = walk(&mut device, DeviceState::Resuming)? else {
        return Err("no session".into());
    };
    session.write(&saved)?;
    println!("  wrote {} bytes", saved.len());
    walk(&mut device, DeviceState::Stop)?;
    walk(&mut device, DeviceState::Running).map(drop)
}

//! Saves a device into memory with pre-copy, resets it, and loads it again.
//!
//! `save_load DEVICE`: `mdev:UUID`, `pci:BDF` or `cdev:PATH` of an idle device with migration interface v2 or v1.

use airlift_core::{Chunk, DeviceId, DeviceState, MigrationDevice, Piece, SaveSession, Session};
use airlift_vfio::{DeviceAddress, OpenOptions, VfioDevice, VfioOptions, open};
use std::error::Error;

/// Walks to a state; the kernel's view of each step is in debugfs, `vfio/DEVICE/migration/state`.
fn walk(device: &mut VfioDevice, to: DeviceState) -> Result<Option<Session>, Box<dyn Error>> {
    println!("{} -> {to}", device.state()?);
    Ok(device.set_state(to)?)
}

/// Reads until the driver has nothing (more): a pre-copy state drains, STOP_COPY ends. A chunk of interface v1
/// stays what it is, and what v2 gives may be cut anywhere.
fn read(session: &mut dyn SaveSession, saved: &mut Vec<Vec<u8>>) -> Result<(), Box<dyn Error>> {
    let (mut bytes, mut buf) = (0, vec![0; 1 << 20]);
    while let Piece::Data { len, chunk } = session.read(&mut buf)? {
        if !matches!(chunk, Chunk::Part { offset: 1.., .. }) {
            saved.push(Vec::new());
        }
        saved.last_mut().ok_or("a chunk without a beginning")?.extend(&buf[..len]);
        bytes += len;
    }
    println!("  read {bytes} bytes");
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let address: DeviceAddress = std::env::args().nth(1).ok_or("which device?")?.parse()?;
    let opened = open(&address, &OpenOptions::default())?;
    let mut device = VfioDevice::new(DeviceId::new("device")?, opened, VfioOptions::default())?;
    let can = device.capabilities();
    println!("{address}: {:?}, {:?}, found in {}", can.interface, can.flags, device.found_state());

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
    for chunk in &saved {
        session.begin_chunk(chunk.len() as u64)?;
        session.write(chunk)?;
        session.end_chunk()?;
    }
    println!("  wrote {} bytes in {} pieces", saved.iter().map(Vec::len).sum::<usize>(), saved.len());
    walk(&mut device, DeviceState::Stop)?;
    walk(&mut device, DeviceState::Running).map(drop)
}

//! What the tests of interface v1 share: devices with a section of some kind, and saves and loads that
//! keep chunks what they are.

use crate::support::{Mdev, loading, saving};
use airlift_core::region::{read_u32, write_u32};
use airlift_core::v1::{DEVICE_STATE, bits};
use airlift_core::{Chunk, DeviceState, LoadSession, MigrationDevice, Piece, SaveSession};
use airlift_vfio::{DeviceFd, KernelRegion, VfioDevice, find_migration_region};
use std::os::fd::AsFd;

/// How much of a section is mapped, and its bytes.
pub(crate) type Section = (&'static str, u64);

/// A device of interface v1 with so many bytes of state.
pub(crate) fn made(state_size: usize, (map, section): Section) -> Mdev {
    let mdev = Mdev::sized("v1", state_size);
    mdev.set("v1_section", &section.to_string());
    mdev.set("v1_map", map);
    mdev
}

/// Adds what a read gave to the chunks that there are (V1-CHUNK).
pub(crate) fn keep(chunks: &mut Vec<Vec<u8>>, chunk: Chunk, data: &[u8]) {
    let Chunk::Part { of, offset } = chunk else { panic!("{chunk:?} of a device of interface v1") };
    if offset == 0 {
        chunks.push(Vec::new());
    }
    let last = chunks.last_mut().unwrap();
    assert_eq!(last.len() as u64, offset, "in its order and without a gap");
    last.extend_from_slice(data);
    assert!(last.len() as u64 <= of);
}

/// Reads in pieces of `size` until there is nothing (more), and says which of the two.
pub(crate) fn read_chunks(session: &mut dyn SaveSession, size: usize, into: &mut Vec<Vec<u8>>) -> Piece {
    let mut buf = vec![0; size];
    loop {
        match session.read(&mut buf).unwrap() {
            Piece::Data { len, chunk } => keep(into, chunk, &buf[..len]),
            other => return other,
        }
    }
}

/// Larger than a page and no multiple of one: chunks are read in several pieces.
pub(crate) const PIECE: usize = 10_007;

/// Saves with pre-copy, `meanwhile` done in it. The device is in STOP afterwards.
pub(crate) fn save_chunks(device: &mut VfioDevice, meanwhile: impl FnOnce(&VfioDevice)) -> Vec<Vec<u8>> {
    let mut chunks = Vec::new();
    let mut session = saving(device.set_state(DeviceState::PreCopy).unwrap());
    assert_eq!(read_chunks(session.as_mut(), PIECE, &mut chunks), Piece::Drained);
    meanwhile(device);
    assert_eq!(read_chunks(session.as_mut(), PIECE, &mut chunks), Piece::Drained);
    device.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(read_chunks(session.as_mut(), PIECE, &mut chunks), Piece::End);
    assert_eq!(session.read(&mut [0; 8]), Ok(Piece::End), "and stays so");
    device.set_state(DeviceState::Stop).unwrap();
    chunks
}

pub(crate) fn write_chunk(session: &mut dyn LoadSession, chunk: &[u8]) {
    session.begin_chunk(chunk.len() as u64).unwrap();
    chunk.chunks(PIECE).for_each(|piece| session.write(piece).unwrap());
    session.end_chunk().unwrap();
}

/// Loads. The device is in RUNNING afterwards.
pub(crate) fn load_chunks(device: &mut VfioDevice, chunks: &[Vec<u8>]) {
    let mut session = loading(device.set_state(DeviceState::Resuming).unwrap());
    chunks.iter().for_each(|chunk| write_chunk(session.as_mut(), chunk));
    device.set_state(DeviceState::Running).unwrap();
}

/// A save and a load of what was saved.
pub(crate) fn assert_usable(device: &mut VfioDevice) {
    assert_eq!(device.state(), Ok(DeviceState::Running));
    let chunks = save_chunks(device, |_| {});
    load_chunks(device, &chunks);
    assert_eq!(device.state(), Ok(DeviceState::Running));
}

/// Brings a device that runs to `from`, with data where it is RESUMING.
pub(crate) fn bring(
    device: &mut VfioDevice,
    from: DeviceState,
    chunks: &[Vec<u8>],
) -> Option<airlift_core::Session> {
    let mut session = device.set_state(from).unwrap();
    if let Some(airlift_core::Session::Load(load)) = &mut session {
        chunks.iter().for_each(|chunk| write_chunk(load.as_mut(), chunk));
    }
    session
}

/// The region as somebody else who has the same open device uses it.
pub(crate) fn region_of(device: &VfioDevice) -> KernelRegion {
    let fd = DeviceFd::new(device.fd().as_fd().try_clone_to_owned().unwrap());
    find_migration_region(&fd).unwrap().unwrap()
}

pub(crate) fn raw_state(device: &VfioDevice) -> u32 {
    read_u32(&mut region_of(device), DEVICE_STATE).unwrap()
}

pub(crate) fn write_raw_state(device: &VfioDevice, raw: u32) {
    write_u32(&mut region_of(device), DEVICE_STATE, raw).unwrap();
}

/// An arc as the driver's knobs name it.
pub(crate) fn arc(from: DeviceState, to: DeviceState) -> String {
    format!("{} {}", bits::bits_of(from).unwrap(), bits::bits_of(to).unwrap())
}

//! The example of the device author, migrated from one server to another.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../examples/minimal_device.rs"]
#[allow(dead_code, reason = "the example is a program; only its device is used here")]
mod minimal_device;

use airlift_core::{DeviceId, DeviceState, MigrationDevice, Piece, Session};
use airlift_memory::{Access, SharedMemory};
use airlift_vfio_user::{Client, ClientOptions, DmaAccess, Server, ServerOptions, VfioUserDevice};
use minimal_device::Counter;
use std::os::unix::net::UnixStream;

fn start() -> VfioUserDevice {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::new(Box::new(Counter::default()), ServerOptions::default());
    std::thread::spawn(move || drop(server.serve_stream(theirs).unwrap()));
    let client = Client::from_stream(ours, ClientOptions::default()).unwrap();
    VfioUserDevice::from_client(DeviceId::new("counter").unwrap(), client).unwrap()
}

fn value(device: &VfioUserDevice) -> u64 {
    let mut bytes = [0; 8];
    device.client().region_read(0, 0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn the_counter_moves_and_counts_on() {
    let mut source = start();
    let guest = SharedMemory::create("guest", 4096).unwrap();
    source.client().dma_map(0, 4096, DmaAccess::WRITE, Some((guest.fd(), 0))).unwrap();
    for _ in 0..3 {
        source.client().region_write(0, 8, &64_u64.to_le_bytes()).unwrap();
    }
    assert_eq!(guest.map(0, 4096, Access::ReadOnly).unwrap().load_u64(64), Ok(2));

    let Ok(Some(Session::Save(mut save))) = source.set_state(DeviceState::StopCopy) else { panic!() };
    let mut buf = [0; 64];
    let Ok(Piece::Data { len, .. }) = save.read(&mut buf) else { panic!() };
    assert_eq!(save.read(&mut buf[len..]), Ok(Piece::End));

    let mut destination = start();
    let Ok(Some(Session::Load(mut load))) = destination.set_state(DeviceState::Resuming) else { panic!() };
    load.write(&buf[..len]).unwrap();
    load.end_chunk().unwrap();
    destination.set_state(DeviceState::Running).unwrap();
    assert_eq!(value(&destination), 3);

    // Too little is refused where the device validates.
    let Ok(Some(Session::Load(mut load))) = destination.set_state(DeviceState::Resuming) else { panic!() };
    load.write(&buf[..len - 1]).unwrap();
    load.end_chunk().unwrap();
    let error = destination.set_state(DeviceState::Stop).unwrap_err();
    assert_eq!(error.reached, Ok(DeviceState::Resuming));
}

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

fn start(v1: bool) -> VfioUserDevice {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::new(Box::new(Counter::new(v1)), ServerOptions::default());
    std::thread::spawn(move || drop(server.serve_stream(theirs).unwrap()));
    let client = Client::from_stream(ours, ClientOptions::default()).unwrap();
    VfioUserDevice::from_client(DeviceId::new("counter").unwrap(), client).unwrap()
}

fn value(device: &VfioUserDevice) -> u64 {
    let mut bytes = [0; 8];
    device.client().region_read(0, 0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn count(device: &VfioUserDevice, times: usize) {
    for _ in 0..times {
        device.client().region_write(0, 8, &64_u64.to_le_bytes()).unwrap();
    }
}

fn moves_and_counts_on(v1: bool) {
    let mut source = start(v1);
    let guest = SharedMemory::create("guest", 4096).unwrap();
    source.client().dma_map(0, 4096, DmaAccess::WRITE, Some((guest.fd(), 0))).unwrap();
    count(&source, 2);
    let mut buf = [0; 64];
    let session = if source.capabilities().precopy() {
        let session = source.set_state(DeviceState::PreCopy).unwrap();
        let Some(Session::Save(mut save)) = session else { panic!() };
        // Nothing comes before the stop, and how much it will be is known.
        assert_eq!(save.read(&mut buf), Ok(Piece::Drained));
        let info = save.precopy_info().unwrap().unwrap();
        assert_eq!((info.initial_bytes, info.dirty_bytes), (0, 8));
        count(&source, 1);
        assert!(source.set_state(DeviceState::StopCopy).unwrap().is_none());
        Some(Session::Save(save))
    } else {
        count(&source, 1);
        source.set_state(DeviceState::StopCopy).unwrap()
    };
    assert_eq!(guest.map(0, 4096, Access::ReadOnly).unwrap().load_u64(64), Ok(2));

    let Some(Session::Save(mut save)) = session else { panic!() };
    let Ok(Piece::Data { len: 8, .. }) = save.read(&mut buf) else { panic!() };
    assert_eq!(save.read(&mut buf[8..]), Ok(Piece::End));

    let mut destination = start(v1);
    let load = |destination: &mut VfioUserDevice, state: &[u8]| {
        let Ok(Some(Session::Load(mut load))) = destination.set_state(DeviceState::Resuming) else {
            panic!()
        };
        load.begin_chunk(state.len() as u64).unwrap();
        load.write(state).unwrap();
        load.end_chunk().unwrap();
    };
    load(&mut destination, &buf[..8]);
    destination.set_state(DeviceState::Running).unwrap();
    assert_eq!(value(&destination), 3);

    // Too little is refused where the device validates.
    load(&mut destination, &buf[..7]);
    let error = destination.set_state(DeviceState::Stop).unwrap_err();
    assert_eq!(error.reached, Ok(DeviceState::Resuming));
}

#[test]
fn the_counter_moves_and_counts_on() {
    moves_and_counts_on(false);
}

// V1-REGION, V1-HOLLOW
#[test]
fn the_counter_moves_over_interface_v1_as_well() {
    let device = start(true);
    let region = device.migration_region().unwrap();
    assert_eq!((region.data_section, region.mapped.len(), region.whole_transactions), (4096, 1, false));
    moves_and_counts_on(true);
}

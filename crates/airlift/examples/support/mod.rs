//! Two hosts in one process, for the examples: software devices behind real vfio-user sockets.

use airlift::core::DeviceId;
use airlift_softdevice::simvm::{SimDevice, SimVmConfig};
use airlift_softdevice::{SoftDevice, SoftDeviceOptions};
use airlift_vfio_user::{MigrationInterface, Server, ServerHandle, ServerOptions};
use std::error::Error;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// The devices of one host. Their servers end with it.
pub(crate) struct Host {
    dir: tempfile::TempDir,
    servers: Vec<(ServerHandle, JoinHandle<()>)>,
}

impl Host {
    /// A host with this many devices of 8 MiB of state, served over this interface.
    pub(crate) fn new(devices: u64, interface: &MigrationInterface) -> Result<Self, Box<dyn Error>> {
        let dir = tempfile::tempdir()?;
        let mut servers = Vec::new();
        for i in 0..devices {
            let options = SoftDeviceOptions {
                seed: 7 + i,
                state_size: 8 << 20,
                dirty_rate: 1 << 20,
                interface: interface.clone(),
                ..SoftDeviceOptions::default()
            };
            let device = SoftDevice::new(options, |_event| ())?;
            let listener = UnixListener::bind(dir.path().join(format!("nic{i}")))?;
            let server = Server::new(Box::new(device), ServerOptions::default());
            let handle = server.handle();
            servers.push((handle, std::thread::spawn(move || drop(server.serve(listener)))));
        }
        Ok(Self { dir, servers })
    }

    /// The devices' names and sockets.
    pub(crate) fn sockets(&self) -> Vec<(DeviceId, PathBuf)> {
        let name = |i| DeviceId::new(format!("nic{i}")).ok();
        (0..self.servers.len())
            .filter_map(|i| Some((name(i)?, self.dir.path().join(format!("nic{i}")))))
            .collect()
    }

    /// A guest of 64 MiB that uses all devices of the host.
    #[allow(dead_code, reason = "a VMM that drives the devices itself brings its own guest")]
    pub(crate) fn guest(&self, incoming: bool) -> SimVmConfig {
        let devices = self.sockets().into_iter().map(|(id, socket)| SimDevice { id, socket }).collect();
        SimVmConfig { memory: 64 << 20, devices, incoming, ..SimVmConfig::default() }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (handle, thread) in self.servers.drain(..) {
            handle.stop();
            let _ = thread.join();
        }
    }
}

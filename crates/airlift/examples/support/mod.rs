//! Two hosts in one process, for the examples: software devices behind real vfio-user sockets.

use airlift::core::DeviceId;
use airlift_softdevice::simvm::{SimDevice, SimVmConfig};
use airlift_softdevice::{SoftDevice, SoftDeviceOptions};
use airlift_vfio_user::{Server, ServerHandle, ServerOptions};
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
    /// A host with this many devices of 8 MiB of state.
    pub(crate) fn new(devices: u64) -> Result<Self, Box<dyn Error>> {
        let dir = tempfile::tempdir()?;
        let mut servers = Vec::new();
        for i in 0..devices {
            let options = SoftDeviceOptions {
                seed: 7 + i,
                state_size: 8 << 20,
                dirty_rate: 1 << 20,
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

    /// The socket of a device.
    pub(crate) fn socket(&self, device: usize) -> PathBuf {
        self.dir.path().join(format!("nic{device}"))
    }

    /// A guest of 64 MiB that uses all devices of the host.
    pub(crate) fn guest(&self, incoming: bool) -> Result<SimVmConfig, Box<dyn Error>> {
        let mut devices = Vec::new();
        for i in 0..self.servers.len() {
            devices.push(SimDevice { id: DeviceId::new(format!("nic{i}"))?, socket: self.socket(i) });
        }
        Ok(SimVmConfig { memory: 64 << 20, devices, incoming, ..SimVmConfig::default() })
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

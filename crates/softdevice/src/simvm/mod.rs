//! SimVm: a machine without an instruction set whose guest notices what a migration breaks.
//!
//! Its vCPUs are threads that write whole pages whose content follows from seed, page and step. Its
//! driver consumes the rings that [SoftDevices](crate::SoftDevice) fill in guest memory and in the BARs
//! of their peers, and counts what is missing, doubled or out of order. One of its records writes guest
//! memory when it is saved. It is a [`Machine`](airlift::machine::Machine), so that an engine or
//! [`airlift::vmm::serve`] can migrate it, and it talks to its devices over vfio-user.
//!
//! It checks content and counters, and refuses calls in the wrong order. It knows nothing of streams,
//! rounds or connections.

mod clock;
mod config;
mod content;
mod driver;
mod gate;
mod irq;
mod layout;
mod machine;
mod memory;
mod port;
mod records;
mod report;
mod shared;
mod vcpu;

pub use clock::{RunInterval, monotonic_ns};
pub use config::{MAX_DEVICES, MAX_MEMORY, MAX_VCPUS, MIN_MEMORY, SimDevice, SimVmConfig, SimVmError};
pub use report::{InterruptReport, RingReport, Sabotage, SimDeviceReport, SimMonitor, SimReport};

use airlift_core::DeviceId;
use clock::RunLog;
use gate::Gate;
use memory::VmMemory;
use port::Port;
use shared::{Driver, PvClock, Sabotages, Shared, Status, locked};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A machine whose guest notices. Made paused; its threads end when it is dropped.
#[derive(Debug)]
pub struct SimVm {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl SimVm {
    /// Makes the machine and connects its devices. A machine that is not incoming has booted when this
    /// returns (memory filled, devices reset and programmed); [`Machine::resume`] starts it. An incoming
    /// one waits for records and memory.
    ///
    /// [`Machine::resume`]: airlift::machine::Machine::resume
    ///
    /// # Errors
    /// When the configuration is refused, a device does not answer as a SoftDevice, or the system
    /// refuses memory or threads.
    pub fn new(config: SimVmConfig) -> Result<Self, SimVmError> {
        config.check()?;
        let memory = VmMemory::new(&config)?;
        let ports =
            config.devices.iter().map(|d| Port::connect(d, &memory)).collect::<Result<Vec<_>, _>>()?;
        let driver = Driver::new(&config, &memory, &ports);
        let vcpus = usize::try_from(config.vcpus).unwrap_or(0);
        let status = Status {
            alive: false,
            access: !config.incoming,
            owner: !config.incoming,
            tracking: false,
            pvclock: PvClock::default(),
            record_mismatches: 0,
            drained: Vec::new(),
            last_outcome: None,
        };
        let shared = Arc::new(Shared {
            memory,
            gate: Gate::new(vcpus + 1),
            log: RunLog::default(),
            steps: std::iter::repeat_with(Mutex::default).take(vcpus).collect(),
            ports,
            driver: Mutex::new(driver),
            status: Mutex::new(status),
            sabotage: Sabotages::default(),
            config,
        });
        if !shared.config.incoming {
            shared.boot()?;
        }
        let mut vm = Self { shared, threads: Vec::new() };
        vm.spawn("driver", Shared::run_driver)?;
        for vcpu in 0..vcpus {
            vm.spawn(&format!("vcpu{vcpu}"), move |shared| vcpu::run(shared, vcpu))?;
        }
        Ok(vm)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> Result<(), SimVmError> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&shared))
            .map_err(|source| SimVmError::System { what: "thread", source })?;
        self.threads.push(thread);
        Ok(())
    }

    /// A view for other threads.
    #[must_use]
    pub fn monitor(&self) -> SimMonitor {
        SimMonitor(Arc::clone(&self.shared))
    }

    /// The names of the devices, in order.
    #[must_use]
    pub fn device_ids(&self) -> Vec<DeviceId> {
        self.shared.ports.iter().map(|port| port.id.clone()).collect()
    }
}

impl Drop for SimVm {
    fn drop(&mut self) {
        self.shared.gate.quit();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What a guest does before its vCPUs run: fills memory, resets and programs its devices.
    fn boot(&self) -> Result<(), SimVmError> {
        self.memory.boot()?;
        let failed = |port: &Port, operation, message| SimVmError::Device {
            device: port.id.clone(),
            operation,
            message,
        };
        for port in &self.ports {
            port.reset().map_err(|why| failed(port, "reset", why))?;
        }
        let mut driver = locked(&self.driver);
        for (i, port) in self.ports.iter().enumerate() {
            self.wire(i).map_err(|why| failed(port, "wire", why))?;
        }
        for (device, port) in driver.devices.iter_mut().zip(&self.ports) {
            self.set_up(device, port).map_err(|why| failed(port, "set up", why))?;
        }
        locked(&self.status).alive = true;
        Ok(())
    }
}

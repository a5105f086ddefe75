//! One host of the demo: its device servers and its simulated machine, in a directory of its own.

use super::child::{Cast, ChildId, Name};
use super::{DemoError, START};
use crate::args::{DemoArgs, InterfaceChoice, Sabotage, V1MappingChoice};
use crate::units::Span;
use airlift_core::Side;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A device and its server.
#[derive(Debug)]
pub(crate) struct Server {
    /// The device's name.
    pub(crate) id: String,
    /// The server's process.
    pub(crate) child: ChildId,
    socket: PathBuf,
}

/// A running host.
#[derive(Debug)]
pub(crate) struct Host {
    /// Which.
    pub(crate) side: Side,
    /// Its devices.
    pub(crate) devices: Vec<Server>,
    /// Its simulated machine.
    pub(crate) vm: ChildId,
    dir: TempDir,
}

/// Arguments of a process, built up.
pub(crate) struct Args(Vec<OsString>);

impl Args {
    /// Of this subcommand, whose output is JSON and which the demo supervises.
    pub(crate) fn new(subcommand: &str) -> Self {
        Self(vec![subcommand.into(), "--json".into(), "--supervised".into()])
    }

    /// As [`new`](Self::new), for a process that ends by itself.
    pub(crate) fn bare(subcommand: &str) -> Self {
        Self(vec![subcommand.into(), "--json".into()])
    }

    /// With `--option value`.
    pub(crate) fn with(mut self, option: &str, value: impl Into<OsString>) -> Self {
        self.0.extend([option.into(), value.into()]);
        self
    }

    /// With `--option value` if there is a value.
    pub(crate) fn with_some(self, option: &str, value: Option<impl Into<OsString>>) -> Self {
        match value {
            Some(value) => self.with(option, value),
            None => self,
        }
    }

    /// With a flag, if it is set.
    pub(crate) fn flag(mut self, option: &str, set: bool) -> Self {
        if set {
            self.0.push(option.into());
        }
        self
    }

    /// With a positional argument.
    pub(crate) fn positional(mut self, value: impl Into<OsString>) -> Self {
        self.0.push(value.into());
        self
    }

    /// The arguments.
    pub(crate) fn done(self) -> Vec<OsString> {
        self.0
    }
}

impl Host {
    /// Starts the device servers and then the machine, and waits until it can be migrated.
    ///
    /// # Errors
    /// When a process does not start in time.
    pub(crate) fn start(
        cast: &mut Cast,
        args: &DemoArgs,
        seed: u64,
        side: Side,
        attempt: u32,
        ids: &[String],
    ) -> Result<Self, DemoError> {
        let dir = tempfile::Builder::new()
            .prefix("airlift-")
            .tempdir()
            .map_err(|e| DemoError::new(format!("the {side} has no directory: {e}")))?;
        let mut devices = Vec::with_capacity(ids.len());
        for (index, id) in ids.iter().enumerate() {
            let socket = dir.path().join(format!("{id}.sock"));
            let name = Name { side, attempt, role: id.clone() };
            let child = cast.spawn(name, device_args(args, seed, side, index, id, &socket).done())?;
            devices.push(Server { id: id.clone(), child, socket });
        }
        let deadline = Instant::now() + START;
        let servers: Vec<ChildId> = devices.iter().map(|d| d.child).collect();
        cast.until_alive(deadline, "the device servers listened", &servers, |cast| {
            servers.iter().all(|id| cast.facts(*id).listening.is_some()).then_some(())
        })?;

        let mut vm = Args::new("sim-vm")
            .with("--listen", prefixed("unix:", &dir.path().join("vmm.sock")))
            .with("--memory", args.memory.argument())
            .with("--dirty-rate", args.dirty_rate.0.to_string())
            .with("--seed", seed.to_string())
            .flag("--no-peer-dma", args.no_peer_dma())
            .flag("--incoming", side == Side::Destination);
        for device in &devices {
            vm = vm.with("--device", prefixed(&format!("{}=vfio-user:", device.id), &device.socket));
        }
        let vm = cast.spawn(Name { side, attempt, role: "sim-vm".into() }, vm.done())?;
        cast.until_alive(deadline, "the simulated machine was ready", &[vm], |cast| {
            cast.facts(vm).listening.is_some().then_some(())
        })?;
        Ok(Self { side, devices, vm, dir })
    }

    /// The socket of its machine, as `--vmm` takes it.
    pub(crate) fn vmm(&self) -> OsString {
        prefixed("unix:", &self.dir.path().join("vmm.sock"))
    }

    /// A path in its directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Every process.
    pub(crate) fn children(&self) -> Vec<ChildId> {
        // The machine first: it is the devices' client.
        std::iter::once(self.vm).chain(self.devices.iter().map(|d| d.child)).collect()
    }
}

/// `prefix` and a path, which may be any bytes.
fn prefixed(prefix: &str, path: &std::path::Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text
}

fn device_args(
    args: &DemoArgs,
    seed: u64,
    side: Side,
    index: usize,
    id: &str,
    socket: &std::path::Path,
) -> Args {
    let device = &args.device_of(side);
    let interface = args.interface_of(index);
    let v1 = Some(&device.v1).filter(|_| interface == InterfaceChoice::V1);
    let sabotaged = |what| args.sabotage == Some(what);
    let on_source = side == Side::Source;
    // A destination device begins with other content than the source's: what is found there after
    // the load can only have come over the wire.
    let salt = if on_source { 0x5eed } else { 0xd1ff };
    let own_seed = seed.wrapping_mul(1_000_003).wrapping_add(index as u64 * 7919 + salt) >> 1;
    let delayed = sabotaged(Sabotage::StopDelay) || sabotaged(Sabotage::SkipP2p);
    let delay = if on_source && index == 0 && delayed { Duration::from_millis(50) } else { Duration::ZERO };
    Args::new("soft-device")
        .with("--socket", socket)
        .with("--name", id)
        .with("--seed", own_seed.to_string())
        .with("--state-size", device.state_size.argument())
        .with("--device-dirty-rate", device.device_dirty_rate.0.to_string())
        .with("--device-dma-rate", device.device_dma_rate.0.to_string())
        .with("--device-load-time", device.device_load_time.argument())
        .with_some("--device-load-rate", device.device_load_rate.map(|r| r.0.to_string()))
        .with("--stop-delay", Span(delay).argument())
        .with("--interface", interface.name())
        .with_some("--device-v1-section", v1.and_then(|v1| v1.section).map(|size| size.argument()))
        .with_some("--device-v1-mapping", v1.and_then(|v1| v1.mapping).map(V1MappingChoice::name))
        .flag("--device-v1-whole", v1.is_some_and(|v1| v1.whole))
        .flag("--device-accept-other-interface", device.device_accept_other_interface)
        .flag("--device-no-precopy", device.device_no_precopy)
        .flag("--device-no-p2p", device.device_no_p2p)
        .flag("--device-no-dirty-log", device.device_no_dirty_log)
        .flag("--last-arc-interrupt", on_source && sabotaged(Sabotage::LastArcInterrupt))
        .flag("--no-validate", !on_source && sabotaged(Sabotage::CorruptDeviceByte))
}

//! What `send` and `receive` hand to the engine: machine, devices, journal, surroundings. Devices are
//! opened in `open`.

use crate::args::{Attach, Sabotage, VmmAddress};
use crate::exit::Exit;
use crate::json::{ErrorView, Output, ReportView};
use crate::memory::FileMemory;
use crate::no_guest::NoGuest;
use crate::open::{self, KernelDevice, Opened, Purpose};
use crate::render;
use crate::signals::{self, Canceller};
use crate::vmm::Vmm;
use crate::watcher::{Hold, Watcher};
use airlift::machine::Machine;
use airlift::vmm::{RemoteVmm, VmmTimeouts};
use airlift::{Deadlines, Environment, FileJournal, SourceDevice};
use airlift_core::commit::{Durability, Journal};
use airlift_core::{Errno, Side};
use airlift_testkit::faults::{CorruptingDevice, FaultyMachine, LastPageLost, MachineFaults};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The byte of a device's state that is changed on request: inside the first record of a software
/// device's memory, whatever its size.
const CORRUPTED_BYTE: u64 = 2_000;

/// Everything that both sides of the engine need.
pub(crate) struct Prepared {
    /// The machine.
    pub(crate) machine: Box<dyn Machine>,
    /// The devices, with their dirty logs.
    pub(crate) devices: Vec<SourceDevice>,
    /// Those of the kernel among them. They stay open as long as these are kept.
    pub(crate) kernel: Vec<KernelDevice>,
    /// What the report must say of the way they were opened.
    pub(crate) notes: Vec<String>,
    /// The journal.
    pub(crate) journal: Box<dyn Journal>,
    /// Threads, clock, observer.
    pub(crate) environment: Environment,
    /// Takes wishes to cancel.
    pub(crate) canceller: Arc<Canceller>,
    /// The VMM, to be told how it ended.
    pub(crate) vmm: Option<Vmm>,
}

/// Opens what the arguments name. Nothing is touched: no device changes its state.
///
/// # Errors
/// When a VMM, a device or the journal cannot be opened.
pub(crate) fn prepare(attach: &Attach, side: Side, output: &Arc<Output>) -> Result<Prepared, Box<ErrorView>> {
    let on_side = |error: ErrorView| Box::new(error.on(&side.to_string()));
    let canceller = Canceller::new(Arc::clone(output));
    let io = |what: &str, e: &std::io::Error| {
        on_side(ErrorView::new(format!("{what}: {e}")).errno(e.raw_os_error().map(Errno)))
    };
    signals::cancel_on_signals(Arc::clone(&canceller)).map_err(|e| io("signals cannot be taken", &e))?;
    let release = if attach.supervised {
        Some(signals::supervise(Arc::clone(&canceller)).map_err(|e| io("stdin cannot be read", &e))?)
    } else {
        None
    };
    let hold = attach.hold_at.zip(release).and_then(|(at, release)| {
        let phase = at.of(side)?;
        Some(Hold { phase, release })
    });
    let environment = Environment::default().with_observer(Watcher::new(side, Arc::clone(output), hold));

    let purpose = if side == Side::Source { Purpose::Send } else { Purpose::Receive };
    let mut vmm = None;
    let (machine, opened): (Box<dyn Machine>, _) = match &attach.vmm {
        Some(address) => {
            let mut remote = greet(address).map_err(|e| on_side(*e))?;
            let opened = open::from_vmm(&mut remote, purpose).map_err(|e| on_side(*e))?;
            let shared = Vmm::new(remote);
            vmm = Some(shared.clone());
            (Box::new(shared), opened)
        }
        None => {
            let (machine, opened) = no_guest(attach, side, purpose).map_err(|e| on_side(*e))?;
            (Box::new(machine), opened)
        }
    };
    let Opened { devices, kernel, notes } = opened;
    let (machine, devices) = sabotaged(attach.sabotage, machine, devices);
    let journal = journal(attach, side).map_err(|e| on_side(*e))?;
    Ok(Prepared { machine, devices, kernel, notes, journal: Box::new(journal), environment, canceller, vmm })
}

/// The devices without a guest, and the memory that was named with them.
fn no_guest(attach: &Attach, side: Side, purpose: Purpose) -> Result<(NoGuest, Opened), Box<ErrorView>> {
    let memory = match attach.memory.as_slice() {
        [] => None,
        named => Some(FileMemory::open(named, side)?),
    };
    let opened = open::named(&attach.devices, purpose, memory.as_ref())?;
    let reach = opened.kernel.iter().map(|d| d.id.clone()).collect();
    let configs = opened.kernel.iter().filter_map(|d| Some((d.id.clone(), d.config.clone()?))).collect();
    let machine = NoGuest::new(side == Side::Source).with_memory(memory, reach).with_configs(configs);
    Ok((machine, opened))
}

/// Greets the VMM at `address`.
///
/// # Errors
/// When nobody answers there.
pub(crate) fn greet(address: &VmmAddress) -> Result<RemoteVmm, Box<ErrorView>> {
    let advice = "start the VMM first; its option for migrations names this socket";
    let stream = UnixStream::connect(&address.0).map_err(|e| {
        let message = format!("the VMM at {address} cannot be reached: {e}");
        Box::new(ErrorView::new(message).errno(e.raw_os_error().map(Errno)).advise(advice))
    })?;
    RemoteVmm::greet(stream, "airlift", VmmTimeouts::default()).map_err(|e| {
        Box::new(ErrorView::new(format!("the VMM at {address}: {e}")).errno(e.errno).advise(advice))
    })
}

/// Places the fault that was asked for.
fn sabotaged(
    sabotage: Option<Sabotage>,
    machine: Box<dyn Machine>,
    mut devices: Vec<SourceDevice>,
) -> (Box<dyn Machine>, Vec<SourceDevice>) {
    let mut faults = MachineFaults::default();
    match sabotage {
        Some(Sabotage::DropDirtyBit) => faults.lose_last_page = Some(LastPageLost::new()),
        Some(Sabotage::CorruptMemoryByte) => faults.corrupt_memory = true,
        Some(Sabotage::CorruptDeviceByte | Sabotage::CorruptDeviceByteChecked) => {
            if !devices.is_empty() {
                let SourceDevice { device, dirty } = devices.remove(0);
                let device = Box::new(CorruptingDevice::new(device, CORRUPTED_BYTE));
                devices.insert(0, SourceDevice { device, dirty });
            }
            return (machine, devices);
        }
        _ => return (machine, devices),
    }
    (Box::new(FaultyMachine::new(machine, faults)), devices)
}

/// The bounds of every step.
pub(crate) fn deadlines(attach: &Attach) -> Deadlines {
    let mut deadlines = Deadlines::default();
    for deadline in &attach.deadlines {
        deadline.apply(&mut deadlines);
    }
    deadlines
}

/// The journal's file of `side` in the directory `dir`.
pub(crate) fn journal_path(dir: &Path, side: Side) -> PathBuf {
    dir.join(format!("{side}.journal"))
}

fn journal(attach: &Attach, side: Side) -> Result<FileJournal, Box<ErrorView>> {
    let failed = |dir: &Path, e: &std::io::Error| {
        let view = ErrorView::new(format!("the journal in {} cannot be made: {e}", dir.display()))
            .errno(e.raw_os_error().map(Errno));
        Box::new(if e.kind() == std::io::ErrorKind::AlreadyExists {
            view.advise(format!(
                "it holds an earlier migration: see what became of it with airlift resolve --journal {}, \
                 then use another directory",
                dir.display()
            ))
        } else {
            view
        })
    };
    let dir = match &attach.journal {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(|e| failed(dir, &e))?;
            dir.clone()
        }
        None => {
            let parent = std::env::temp_dir();
            let dir = tempfile::Builder::new().prefix("airlift-journal-").tempdir_in(&parent);
            // It stays: it is what answers after a crash.
            dir.map_err(|e| failed(&parent, &e))?.keep()
        }
    };
    let durability = if attach.journal_sync { Durability::Power } else { Durability::Process };
    FileJournal::create(journal_path(&dir, side), durability).map_err(|e| failed(&dir, &e))
}

/// Reports a migration that could not begin.
pub(crate) fn refuse(output: &Output, side: Side, error: ErrorView) -> Exit {
    let exit = Exit::Failed;
    let report = ReportView::refused(&side.to_string(), error, exit);
    output.event("result", &report);
    output.say(render::report_text(&report));
    exit
}

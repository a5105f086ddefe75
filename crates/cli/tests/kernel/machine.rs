//! A VMM of the tests: one region of memory, one device of the kernel that it has opened and keeps, and
//! records. Its guest writes a page when it is asked for dirty pages the first time, and its device
//! writes one by DMA when it is paused.

use crate::support::{Mdev, NIC, RESUMING, used};
use airlift::machine::{
    Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt, RecordOwner,
};
use airlift::vmm::{DeviceHandle, DeviceKind, MemoryFile, ServeEnd, VmmDevices, serve};
use airlift_core::{DeviceId, Gpa, GpaRange, Iova, IovaMap, IovaMapping, MemoryLayout, MemoryRegion};
use airlift_memory::{Access, GuestMemory, GuestRegion, SharedMemory};
use airlift_vfio::{Attachment, Recover, VfioDevice};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) const MEMORY: u64 = 1 << 20;
pub(crate) const PAGE: u64 = 4096;
const GPA: u64 = 0x20_0000;
/// Pages that change while the migration goes on.
pub(crate) const BY_GUEST: u64 = 3;
pub(crate) const BY_DMA: u64 = 9;

/// Which side it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

/// The VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    role: Role,
    mdev: Arc<Mdev>,
    pub(crate) device: VfioDevice,
    shared: SharedMemory,
    pub(crate) memory: GuestMemory,
    pub(crate) running: bool,
    wrote: bool,
    /// Records that were loaded, in their order.
    pub(crate) loaded: Vec<MachineRecord>,
    /// What it was told of the end.
    pub(crate) ended: Option<String>,
}

impl Vmm {
    /// A VMM with its device open. On the source the guest runs, and memory has content.
    pub(crate) fn new(role: Role, mdev: &Arc<Mdev>) -> Self {
        let device = mdev.open();
        let shared = SharedMemory::create("vmm", MEMORY).unwrap();
        let mapping = shared.map(0, MEMORY, Access::ReadWrite).unwrap();
        match &device.opened().attachment {
            Attachment::Iommufd { iommufd, .. } => iommufd.map(GPA, &mapping).unwrap(),
            Attachment::Container { container, .. } => container.map(GPA, &mapping).unwrap(),
            Attachment::Given => unreachable!("opened here"),
        }
        let memory = GuestMemory::new(vec![GuestRegion { gpa: GPA, mapping }]).unwrap();
        if role == Role::Source {
            for page in 0..MEMORY / PAGE {
                memory.fill(GPA + page * PAGE, PAGE, page.to_le_bytes()[0]).unwrap();
            }
        }
        let mdev = Arc::clone(mdev);
        let running = role == Role::Source;
        Self { role, mdev, device, shared, memory, running, wrote: false, loaded: Vec::new(), ended: None }
    }

    /// The records that the source saves.
    pub(crate) fn records() -> Vec<MachineRecord> {
        let record =
            |owner, name: &str, data: &[u8]| MachineRecord { owner, name: name.into(), data: data.into() };
        vec![
            record(RecordOwner::Machine, "cpu", b"registers"),
            record(
                RecordOwner::Device(DeviceId::new(NIC).unwrap()),
                "config",
                b"the VMM's own configuration",
            ),
        ]
    }

    /// All of its memory.
    pub(crate) fn content(&self) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(MEMORY).unwrap()];
        self.memory.read(GPA, &mut all).unwrap();
        all
    }

    /// Serves one migration process at `socket`; gives the VMM back, and how it ended.
    pub(crate) fn serve(mut self, socket: &Path) -> JoinHandle<(Self, ServeEnd)> {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let end = serve(&mut self, stream, "mock");
            (self, end)
        })
    }

    /// The device as the VMM sees it now, through the descriptor that it has had all the time.
    pub(crate) fn look(&self) -> VfioDevice {
        used(self.device.opened().clone(), Recover::Leave)
    }
}

impl VmmDevices for Vmm {
    fn devices(&mut self) -> Result<Vec<DeviceHandle>, MachineError> {
        let fd = self.device.fd().as_fd().try_clone_to_owned().unwrap();
        Ok(vec![DeviceHandle { id: DeviceId::new(NIC).unwrap(), kind: DeviceKind::Vfio, fd }])
    }

    fn memory_files(&mut self) -> Result<Option<Vec<MemoryFile>>, MachineError> {
        Ok(Some(vec![MemoryFile { region: 0, fd: self.shared.try_clone_fd().unwrap(), offset: 0 }]))
    }

    fn migration_ended(&mut self, outcome: &str) {
        self.ended = Some(outcome.to_owned());
    }
}

impl Machine for Vmm {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        Ok(Vec::new())
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        let region = MemoryRegion { id: 0, gpa: Gpa(GPA), size: MEMORY, page_size: PAGE };
        Ok(MemoryLayout { generation: 1, regions: vec![region] })
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        Ok(MachineMemory::Engine(self.memory.clone()))
    }

    fn iova_map(&mut self, _device: &DeviceId) -> Result<IovaMap, MachineError> {
        Ok(IovaMap::new(vec![IovaMapping { iova: Iova(GPA), gpa: Gpa(GPA), length: MEMORY }]))
    }

    fn start_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        if !std::mem::replace(&mut self.wrote, true) {
            let start = GPA + BY_GUEST * PAGE;
            self.memory.fill(start, PAGE, 0xcc).unwrap();
            dirty(GpaRange { start: Gpa(start), length: PAGE });
        }
        Ok(())
    }

    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        // The device still runs: only the last fetch of its log can tell of this.
        self.mdev.set("dma", &format!("{:#x} {PAGE} 0xdd", GPA + BY_DMA * PAGE));
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.running = true;
        Ok(())
    }

    fn close_device_access(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn open_device_access(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        Ok(Vec::new())
    }

    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        assert!(pending.is_empty());
        Ok(())
    }

    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        Ok(Self::records())
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        assert_eq!(self.role, Role::Destination);
        assert_eq!(self.mdev.number("state"), RESUMING, "records are restored while the device is RESUMING");
        self.loaded.push(record.clone());
        Ok(())
    }

    fn release_shared(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn device_was_reset(&mut self, _device: &DeviceId) -> Result<(), MachineError> {
        // Of a destination that was to be loaded: there is nothing to arm anew.
        assert_eq!(self.role, Role::Destination);
        Ok(())
    }

    fn running(&mut self) -> Result<bool, MachineError> {
        Ok(self.running)
    }

    fn external_memory_barrier(&mut self, _deadline: Duration) -> Result<(), MachineError> {
        Err(MachineError::new("external_memory_barrier", "its memory is moved by the engine"))
    }
}

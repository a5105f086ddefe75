//! The machine's records: what travels of the guest beside memory and devices, as JSON.

use super::content::PAGE_BYTES;
use super::irq::MSIX;
use super::layout::bar_address;
use super::shared::{DriverRecord, PvClock, Shared, locked, peer_of};
use airlift::machine::{MachineError, MachineRecord, RecordOwner};
use airlift_core::{DeviceId, Errno};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// Names of the records, in the order in which they are saved.
pub(super) const VCPUS: &str = "vcpus";
pub(super) const PVCLOCK: &str = "pvclock";
pub(super) const PCI: &str = "pci";
pub(super) const DRIVER: &str = "driver";

/// The vCPUs, and what the other side must have been configured with.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VcpuRecord {
    memory: u64,
    seed: u64,
    working_set: Option<u64>,
    ring_entries: u64,
    steps: Vec<u64>,
}

/// A device's configuration, in place of PCI configuration space: what the guest has wired.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PciRecord {
    interrupt_index: u32,
    vectors: usize,
    /// The BAR that the guest has mapped for this device's DMA.
    peer: Option<PeerBar>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PeerBar {
    device: DeviceId,
    address: u64,
    size: u64,
}

fn save<T: Serialize>(owner: RecordOwner, name: &str, content: &T) -> Result<MachineRecord, MachineError> {
    let data = serde_json::to_vec(content)
        .map_err(|e| MachineError::new("save_records", format!("record {name}: {e}")))?;
    Ok(MachineRecord { owner, name: name.to_owned(), data })
}

fn misfit(name: &str, why: impl std::fmt::Display) -> MachineError {
    let message = format!("record {name}: {why}");
    MachineError { errno: Some(Errno::EINVAL), ..MachineError::new("load_record", message) }
}

fn read<T: DeserializeOwned>(record: &MachineRecord) -> Result<T, MachineError> {
    serde_json::from_slice(&record.data).map_err(|e| misfit(&record.name, e))
}

impl Shared {
    /// All records. The pvclock writes its guest page while it is saved.
    pub(super) fn save_records(&self) -> Result<Vec<MachineRecord>, MachineError> {
        let vcpus = self.vcpu_record(self.steps.iter().map(|s| *locked(s)).collect());
        let mut records = vec![save(RecordOwner::Machine, VCPUS, &vcpus)?];
        let clock = {
            let mut status = locked(&self.status);
            status.pvclock.saves += 1;
            status.pvclock
        };
        if !self.sabotage.lose_pvclock_page.swap(false, Ordering::Relaxed) {
            self.write_pvclock(clock.saves).map_err(|e| MachineError::new("save_records", e.to_string()))?;
        }
        records.push(save(RecordOwner::Machine, PVCLOCK, &clock)?);
        for (i, port) in self.ports.iter().enumerate() {
            records.push(save(RecordOwner::Device(port.id.clone()), PCI, &self.pci_record(i))?);
        }
        records.push(save(RecordOwner::Machine, DRIVER, &locked(&self.driver).record(&self.ports))?);
        Ok(records)
    }

    fn vcpu_record(&self, steps: Vec<u64>) -> VcpuRecord {
        let config = &self.config;
        VcpuRecord {
            memory: self.memory.pages.total * PAGE_BYTES,
            seed: config.seed,
            working_set: config.working_set,
            ring_entries: config.ring_entries,
            steps,
        }
    }

    fn pci_record(&self, i: usize) -> PciRecord {
        let peer = peer_of(&self.config, i).map(|peer| PeerBar {
            device: self.ports[peer].id.clone(),
            address: bar_address(peer as u64),
            size: self.ports[peer].bar2.len(),
        });
        PciRecord { interrupt_index: MSIX, vectors: self.ports[i].vectors.count(), peer }
    }

    /// Restores one record; what the configuration of this side does not fit is refused.
    pub(super) fn load_record(&self, record: &MachineRecord) -> Result<(), MachineError> {
        match (&record.owner, record.name.as_str()) {
            (RecordOwner::Machine, VCPUS) => self.load_vcpus(record),
            (RecordOwner::Machine, PVCLOCK) => {
                // Its page may come later than this: they are compared when the guest is to run.
                locked(&self.status).pvclock = read::<PvClock>(record)?;
                Ok(())
            }
            (RecordOwner::Machine, DRIVER) => {
                let content: DriverRecord = read(record)?;
                locked(&self.driver).load(content, &self.ports).map_err(|why| misfit(DRIVER, why))
            }
            // A device has one record, and its stream need not carry the name.
            (RecordOwner::Device(id), _) => {
                let i = self
                    .ports
                    .iter()
                    .position(|port| port.id == *id)
                    .ok_or_else(|| misfit(PCI, format!("no device {id} here")))?;
                if read::<PciRecord>(record)? != self.pci_record(i) {
                    return Err(misfit(PCI, format!("device {id} is wired in another way here")));
                }
                self.wire(i).map_err(|why| misfit(PCI, format!("device {id}: {why}")))
            }
            (_, name) => Err(misfit(name, "no such record")),
        }
    }

    fn load_vcpus(&self, record: &MachineRecord) -> Result<(), MachineError> {
        let content: VcpuRecord = read(record)?;
        if content.steps.len() != self.steps.len() || content != self.vcpu_record(content.steps.clone()) {
            return Err(misfit(VCPUS, "this machine is configured in another way"));
        }
        for (ours, theirs) in self.steps.iter().zip(content.steps) {
            *locked(ours) = theirs;
        }
        locked(&self.status).alive = true;
        Ok(())
    }

    /// What the guest wires of a device: its interrupts, and the BAR of its peer for DMA.
    pub(super) fn wire(&self, i: usize) -> Result<(), String> {
        self.ports[i].wire_interrupts()?;
        match peer_of(&self.config, i) {
            Some(peer) => self.ports[i].map_peer(&self.ports[peer], bar_address(peer as u64)),
            None => Ok(()),
        }
    }
}

//! Interrupts that a device raised before the stop and the guest has not seen: they travel as one
//! more record of the machine, with a name that no machine's own record may have.

use crate::machine::{MachineRecord, PendingInterrupt, RecordOwner};

/// The record's name.
pub(crate) const NAME: &str = "airlift/interrupts";

/// The record of these interrupts; `None` when there are none.
pub(crate) fn record(pending: &[PendingInterrupt]) -> Result<Option<MachineRecord>, String> {
    if pending.is_empty() {
        return Ok(None);
    }
    let data = serde_json::to_vec(pending).map_err(|e| e.to_string())?;
    Ok(Some(MachineRecord { owner: RecordOwner::Machine, name: NAME.into(), data }))
}

/// Reads the record.
pub(crate) fn read(data: &[u8]) -> Result<Vec<PendingInterrupt>, String> {
    serde_json::from_slice(data).map_err(|e| format!("the record {NAME}: {e}"))
}

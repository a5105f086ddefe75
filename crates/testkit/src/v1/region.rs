//! The double as tests hold it, and its region as users access it.

use super::device::{Answer, Core};
use super::script::{Access, DoubleOptions, Fault, Record, Wrong};
use airlift_core::v1::bits::state_of;
use airlift_core::v1::{V1Control, V1Device};
use airlift_core::{
    DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Interrupter, RegionAccess,
    RegionArea,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device with a migration region in memory. Clones are the same device: one is a test's, to look at it
/// and to make it fail, while another one is used.
#[derive(Clone, Debug)]
pub struct Double(Arc<Mutex<Core>>);

/// The region of a [`Double`].
#[derive(Debug)]
pub struct DoubleRegion {
    double: Double,
    size: u64,
    areas: Vec<RegionArea>,
}

impl Double {
    /// A device that runs.
    #[must_use]
    pub fn new(options: DoubleOptions) -> Self {
        Self(Arc::new(Mutex::new(Core::new(options))))
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its region.
    #[must_use]
    pub fn region(&self) -> DoubleRegion {
        let core = self.core();
        DoubleRegion {
            double: self.clone(),
            size: core.options.start + core.options.section,
            areas: core.options.areas.clone(),
        }
    }

    /// What the user's side needs besides the region.
    #[must_use]
    pub fn control(&self) -> V1Control {
        let double = self.clone();
        let whole_transactions = self.core().options.whole;
        V1Control {
            reset: Box::new(move || double.core().reset()),
            interrupter: Interrupter::unable(),
            whole_transactions,
        }
    }

    /// The real user's side over it.
    ///
    /// # Errors
    /// As [`V1Device::new`], and when `id` names no device.
    pub fn device(&self, id: &str) -> Result<V1Device<DoubleRegion>, DeviceError> {
        let id = DeviceId::new(id)
            .map_err(|error| DeviceError::new(DeviceErrorKind::Misuse, "make a device", error.to_string()))?;
        V1Device::new(id, DeviceIdentity::default(), self.region(), self.control())
    }

    /// From now on this goes wrong too.
    pub fn fail(&self, fault: Fault) {
        self.core().faults.push(fault);
    }

    /// From now on nothing goes wrong, except that a device that is gone stays so.
    pub fn heal(&self) {
        self.core().faults.clear();
    }

    /// How many accesses have gone wrong.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.core().hits
    }

    /// `device_state` as it is.
    #[must_use]
    pub fn raw(&self) -> u32 {
        self.core().raw()
    }

    /// The state that it is in.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        state_of(self.raw())
    }

    /// The transactions that it holds: those of its plan, unless a reset has lost them.
    #[must_use]
    pub fn content(&self) -> Vec<Vec<u8>> {
        self.core().options.plan.chunks.clone()
    }

    /// What it was given since RESUMING began, in rounds.
    #[must_use]
    pub fn received(&self) -> Vec<Vec<u8>> {
        self.core().received.clone()
    }

    /// What it has loaded, and not lost by a reset since.
    #[must_use]
    pub fn loaded(&self) -> Option<Vec<u8>> {
        self.core().loaded.clone()
    }

    /// What it took when it left RESUMING last, in rounds, also if a reset has lost it since.
    #[must_use]
    pub fn validated(&self) -> Option<Vec<Vec<u8>>> {
        self.core().validated.clone()
    }

    /// How many accesses there were.
    #[must_use]
    pub fn accesses(&self) -> usize {
        self.core().records.len()
    }

    /// All accesses, in order.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.core().records.clone()
    }

    /// How many accesses of this kind there were.
    #[must_use]
    pub fn count(&self, access: Access) -> usize {
        self.core().records.iter().filter(|record| record.access == access).count()
    }

    /// How many accesses through the transport have touched data that is mapped. The interface allows them;
    /// V1-AREAS does not.
    #[must_use]
    pub fn misplaced(&self) -> usize {
        let core = self.core();
        let trapped = |record: &&Record| matches!(record.access, Access::ReadTrapped | Access::WriteTrapped);
        let touches = |record: &&Record| {
            let end = record.offset.saturating_add(record.length);
            core.options
                .areas
                .iter()
                .any(|area| area.length > 0 && record.offset < area.offset + area.length && area.offset < end)
        };
        core.records.iter().filter(trapped).filter(touches).count()
    }

    /// What the user did that the interface does not allow.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.core().violations.clone()
    }
}

/// An access through the transport.
const fn trapped(offset: u64, length: u64, write: bool) -> Access {
    match (offset, length, write) {
        (0, 4, false) => Access::ReadState,
        (0, 4, true) => Access::WriteState,
        (8, 8, false) => Access::ReadPending,
        (16, 8, false) => Access::ReadOffset,
        (24, 8, false) => Access::ReadSize,
        (24, 8, true) => Access::WriteSize,
        (0..32, ..) => Access::Other,
        (.., false) => Access::ReadTrapped,
        (.., true) => Access::WriteTrapped,
    }
}

fn fill(buf: &mut [u8], from: &[u8]) {
    for (to, from) in buf.iter_mut().zip(from) {
        *to = *from;
    }
}

fn number<const N: usize>(data: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    fill(&mut bytes, data);
    bytes
}

impl DoubleRegion {
    /// The range lies in one mapped area.
    fn check_mapped(&self, offset: u64, length: u64) -> Answer<()> {
        let inside = |area: &RegionArea| {
            offset >= area.offset && offset.saturating_add(length) <= area.offset + area.length
        };
        if self.areas.iter().any(inside) {
            return Ok(());
        }
        let message = format!("{length} bytes at {offset:#x} are not in one mapped area");
        Err(DeviceError::new(DeviceErrorKind::Misuse, "access to a mapping", message))
    }
}

impl RegionAccess for DoubleRegion {
    fn size(&self) -> u64 {
        self.size
    }

    fn mapped(&self) -> &[RegionArea] {
        &self.areas
    }

    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Answer<()> {
        let mut core = self.double.core();
        let length = buf.len() as u64;
        let access = trapped(offset, length, false);
        let wrong = core.begin(access, offset, length)?;
        let value = match access {
            Access::ReadState => u64::from(core.read_state()),
            Access::ReadPending => core.read_pending(),
            Access::ReadOffset => core.read_offset(),
            Access::ReadSize => core.read_size(),
            Access::ReadTrapped => {
                core.check_range(offset, length)?;
                return core.read_data(offset, buf, false);
            }
            _ if (offset, length) == (4, 4) => 0,
            _ => return core.not_a_field(),
        };
        let value = if let Some(Wrong::Answers(lie)) = wrong { lie } else { value };
        match u32::try_from(value) {
            Ok(value) if length == 4 => fill(buf, &value.to_ne_bytes()),
            _ => fill(buf, &value.to_ne_bytes()),
        }
        Ok(())
    }

    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Answer<()> {
        let mut core = self.double.core();
        let length = data.len() as u64;
        let access = trapped(offset, length, true);
        let wrong = core.begin(access, offset, length)?;
        match access {
            Access::WriteState => core.write_state(u32::from_ne_bytes(number(data)), wrong),
            Access::WriteSize => core.write_size(u64::from_ne_bytes(number(data))),
            Access::WriteTrapped => {
                core.check_range(offset, length)?;
                core.write_data(offset, data, false)
            }
            _ if (offset, length) == (4, 4) => Ok(()),
            _ => core.not_a_field(),
        }
    }

    fn read_mapped(&mut self, offset: u64, buf: &mut [u8]) -> Answer<()> {
        self.check_mapped(offset, buf.len() as u64)?;
        let mut core = self.double.core();
        core.begin(Access::ReadMapped, offset, buf.len() as u64)?;
        core.read_data(offset, buf, true)
    }

    fn write_mapped(&mut self, offset: u64, data: &[u8]) -> Answer<()> {
        self.check_mapped(offset, data.len() as u64)?;
        let mut core = self.double.core();
        core.begin(Access::WriteMapped, offset, data.len() as u64)?;
        core.write_data(offset, data, true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DoubleOptions, Layout, Plan, bytes};
    use super::*;

    /// One access of a user that is under suspicion: a state, a field to be read, data, or a size.
    enum Do {
        Set(u32),
        Get(u64),
        Read(u64, usize),
        Write(u64, usize),
        Size(u64),
    }
    use Do::{Get, Read, Set, Size, Write};

    const PENDING: u64 = 8;
    const OFFSET: u64 = 16;
    const SIZE: u64 = 24;

    fn violations(steps: &[Do]) -> Vec<String> {
        let plan = Plan::new(vec![bytes(1, 40), bytes(2, 10)], 1);
        let double = Double::new(DoubleOptions::new(Layout::Trapped, 64).with(plan));
        let mut region = double.region();
        let mut raw = [0; 4];
        region.read_trapped(0, &mut raw).unwrap();
        let reserved = u32::from_ne_bytes(raw) & !7;
        for step in steps {
            // What is refused is seen in the violations.
            let _ = match *step {
                Set(bits) => region.write_trapped(0, &(reserved | bits).to_ne_bytes()),
                Get(field) => region.read_trapped(field, &mut [0; 8]),
                Read(at, length) => region.read_trapped(at, &mut vec![0; length]),
                Write(at, length) => region.write_trapped(at, &vec![1; length]),
                Size(size) => region.write_trapped(SIZE, &size.to_ne_bytes()),
            };
        }
        double.violations()
    }

    #[test]
    fn users_that_keep_the_rules_are_not_accused() {
        let chunk = [Get(PENDING), Get(PENDING), Get(OFFSET), Get(SIZE), Get(OFFSET), Get(SIZE)];
        let mut steps = vec![Set(3)];
        steps.extend(chunk);
        steps.extend([
            Read(32, 30),
            Read(62, 10),
            Get(PENDING),
            Set(2),
            Get(PENDING),
            Get(OFFSET),
            Get(SIZE),
        ]);
        steps.extend([Read(32, 10), Get(PENDING), Set(1), Set(4), Get(OFFSET), Get(OFFSET), Write(32, 64)]);
        steps.extend([Size(64), Get(OFFSET), Write(32, 1), Size(1), Set(0), Set(1)]);
        assert_eq!(violations(&steps), Vec::<String>::new());
    }

    #[test]
    fn users_that_break_a_rule_are_found() {
        let cases: [(&str, Vec<Do>); 13] = [
            ("V1-VALID", vec![Set(6)]),
            ("V1-VALID", vec![Set(5)]),
            ("V1-ARCS", vec![Set(2), Set(3)]),
            ("V1-ARCS", vec![Set(3), Set(4)]),
            ("V1-PENDING", vec![Set(2), Get(OFFSET)]),
            ("V1-PENDING", vec![Set(2), Get(PENDING), Get(SIZE)]),
            ("V1-PENDING", vec![Set(2), Get(PENDING), Get(OFFSET), Read(32, 39), Get(PENDING)]),
            ("V1-BOUNDS", vec![Set(2), Get(PENDING), Get(OFFSET), Read(33, 4)]),
            ("V1-BOUNDS", vec![Set(2), Get(PENDING), Get(OFFSET), Read(32, 41)]),
            ("V1-ROUNDS", vec![Set(4), Get(OFFSET), Write(32, 64), Size(65)]),
            ("V1-ROUNDS", vec![Set(4), Get(OFFSET), Write(32, 10), Size(11)]),
            ("V1-ROUNDS", vec![Set(4), Get(OFFSET), Write(32, 5), Size(5), Size(5)]),
            ("V1-OUTSTANDING", vec![Set(4), Get(OFFSET), Write(32, 5), Set(1)]),
        ];
        for (number, (rule, steps)) in cases.into_iter().enumerate() {
            let found = violations(&steps);
            assert_eq!(found.len(), 1, "{number}: {found:?}");
            assert!(found[0].contains(rule), "{number}: {found:?}");
        }
    }
}

//! Interrupts of a served device: eventfds that the client gave.
//!
//! Masking is kept here, so that a device only ever triggers. What an interrupt means is not known.

use crate::IrqDescription;
use crate::codec::IrqSetFlags;
use airlift_core::Errno;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The client's interrupts. Clones are the same interrupts; any thread may trigger.
#[derive(Clone, Debug)]
pub struct Irqs(Arc<Mutex<BTreeMap<u32, Index>>>);

#[derive(Debug)]
struct Index {
    maskable: bool,
    vectors: Vec<Vector>,
}

#[derive(Debug, Default)]
struct Vector {
    fd: Option<OwnedFd>,
    masked: bool,
    pending: bool,
}

impl Vector {
    /// `true` when somebody was told.
    fn fire(&mut self) -> bool {
        if self.masked {
            self.pending = true;
            return false;
        }
        let Some(fd) = &self.fd else { return false };
        // A descriptor that would block (it need not be an eventfd) must not hold the device up.
        let mut poll = [PollFd::new(fd, PollFlags::OUT)];
        let ready = rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let writable = ready.is_ok_and(|n| n > 0) && poll[0].revents().contains(PollFlags::OUT);
        writable && rustix::io::write(fd, &1_u64.to_ne_bytes()) == Ok(8)
    }
}

impl Irqs {
    pub(crate) fn new(descriptions: &[IrqDescription]) -> Self {
        let index = |d: &IrqDescription| {
            let count = usize::try_from(d.count).unwrap_or(usize::MAX);
            let vectors = std::iter::repeat_with(Vector::default).take(count).collect();
            (d.index, Index { maskable: d.maskable, vectors })
        };
        Self(Arc::new(Mutex::new(descriptions.iter().map(index).collect())))
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u32, Index>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises interrupt `vector` of `index`. `true` when the client was signalled; `false` when it
    /// has wired no eventfd there, or has masked the interrupt: it is then raised at the unmasking.
    ///
    /// # Errors
    /// `ENOENT` when the device has no such interrupt.
    pub fn trigger(&self, index: u32, vector: u32) -> Result<bool, Errno> {
        let mut table = self.table();
        let vector = usize::try_from(vector).unwrap_or(usize::MAX);
        let entry = table.get_mut(&index).and_then(|i| i.vectors.get_mut(vector));
        Ok(entry.ok_or(Errno::ENOENT)?.fire())
    }

    /// Forgets all eventfds and masks: the client is gone.
    pub(crate) fn clear(&self) {
        for index in self.table().values_mut() {
            index.vectors.iter_mut().for_each(|v| *v = Vector::default());
        }
    }

    /// Carries out SET_IRQS. `bools` is what follows the request's fixed part.
    pub(crate) fn apply(
        &self,
        index: u32,
        start: u32,
        count: u32,
        flags: IrqSetFlags,
        bools: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let data = flags & IrqSetFlags::DATA;
        let action = flags & IrqSetFlags::ACTION;
        if data.bits().count_ones() != 1 || action.bits().count_ones() != 1 {
            return Err(Errno::EINVAL);
        }
        let mut table = self.table();
        let entry = table.get_mut(&index).ok_or(Errno::EINVAL)?;
        if action != IrqSetFlags::TRIGGER && !entry.maskable {
            return Err(Errno::EINVAL);
        }
        if count == 0 {
            // Only "disable the whole index" has no interrupts.
            if data != IrqSetFlags::NONE || action != IrqSetFlags::TRIGGER || start != 0 {
                return Err(Errno::EINVAL);
            }
            entry.vectors.iter_mut().for_each(|v| *v = Vector::default());
            return Ok(());
        }
        let first = usize::try_from(start).map_err(|_| Errno::EINVAL)?;
        let number = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
        let end = first.checked_add(number).ok_or(Errno::EINVAL)?;
        let vectors = entry.vectors.get_mut(first..end).ok_or(Errno::EINVAL)?;

        if data == IrqSetFlags::EVENTFD {
            if action != IrqSetFlags::TRIGGER {
                return Err(Errno::EOPNOTSUPP);
            }
            // As many descriptors as interrupts, or none to take them away.
            if fds.is_empty() {
                vectors.iter_mut().for_each(|v| v.fd = None);
            } else if fds.len() == number {
                vectors.iter_mut().zip(fds).for_each(|(v, fd)| v.fd = Some(fd));
            } else {
                return Err(Errno::EINVAL);
            }
            return Ok(());
        }
        if data == IrqSetFlags::BOOL && bools.len() != number {
            return Err(Errno::EINVAL);
        }
        for (i, vector) in vectors.iter_mut().enumerate() {
            if data == IrqSetFlags::BOOL && bools[i] == 0 {
                continue;
            }
            if action == IrqSetFlags::TRIGGER {
                vector.fire();
            } else if action == IrqSetFlags::MASK {
                vector.masked = true;
            } else {
                vector.masked = false;
                if std::mem::take(&mut vector.pending) {
                    vector.fire();
                }
            }
        }
        Ok(())
    }
}

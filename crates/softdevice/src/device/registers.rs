//! The registers in BAR0 and the layout of rings: what a guest driver is written against.
//!
//! Every register is a little-endian u64. Reads may have any size and place; writes are of 8 aligned
//! bytes. Writes are refused (EBUSY) in STOP_COPY, RESUMING and ERROR, and to a ring's settings while
//! it is enabled.
//!
//! ```text
//!  0x000 MAGIC      r   0x008 VERSION    r   0x010 CONTROL  rw  0x018 SEED       r
//!  0x020 TICK       r   0x028 STATE_SIZE r   0x030 DIGEST   r   0x038 VERIFIED   rw
//!  0x040 LOADS      r   0x048 RAISED     r   0x050 ERRORS   r   0x058 BAR2_SIZE  r
//!  0x060 INTERRUPT_EVERY rw                  0x068 VECTORS  r
//!  0x080 + 8 v      raised interrupts of vector v (0 to 7)                       r
//!  0x0c0 + 8 v      of these, not yet delivered: no eventfd was wired            r
//!  0x100 + 0x40 r   ring r (0 to 7):
//!       +0x00 IOVA  rw  +0x08 ENTRIES rw  +0x10 KIND rw  +0x18 ENABLE   rw
//!       +0x20 RATE  rw  +0x28 PRODUCED r  +0x30 VECTOR r
//! ```
//!
//! A ring is `4096 + 8 * ENTRIES` bytes of memory at IOVA, in guest memory or in the BAR of a peer:
//!
//! ```text
//!  +0        u64 consumer index: entries that the guest has taken. Written by the guest alone.
//!  +4096     u64 slot[ENTRIES]: entry i (from 0) is in slot i % ENTRIES and holds i + 1
//! ```
//!
//! The device reads the consumer index and never overwrites an entry that was not taken: a full ring
//! waits. Memory that a ring starts on must hold 0 in every slot.

use airlift_core::Errno;

/// Number of rings.
pub const RINGS: usize = 8;
/// The most vectors.
pub const MAX_VECTORS: usize = 8;
/// Bytes before a ring's first slot.
pub const RING_HEADER: u64 = 4096;
/// The most entries of a ring.
pub const MAX_ENTRIES: u64 = 1 << 20;

/// What [`MAGIC`] reads as: `ALSOFTDV`.
pub const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"ALSOFTDV");
/// What [`VERSION`] reads as.
pub const VERSION_VALUE: u64 = 1;

/// [`MAGIC_VALUE`].
pub const MAGIC: u64 = 0x00;
/// [`VERSION_VALUE`].
pub const VERSION: u64 = 0x08;
/// Bit 0: DMA engine and dirtier run ([`CONTROL_RUN`]).
pub const CONTROL: u64 = 0x10;
/// In [`CONTROL`]: the device works.
pub const CONTROL_RUN: u64 = 1;
/// Seed of internal memory; comes with a load.
pub const SEED: u64 = 0x18;
/// Steps that the dirtier has made.
pub const TICK: u64 = 0x20;
/// Bytes of internal memory.
pub const STATE_SIZE: u64 = 0x28;
/// Digest of the whole state: internal memory, registers, BAR2.
pub const DIGEST: u64 = 0x30;
/// Whether memory is what seed and tick say: 0 no, 1 yes, 2 being compared, 3 never compared. A load
/// begins a comparison, and so does a write of 1.
pub const VERIFIED: u64 = 0x38;
/// In [`VERIFIED`]: memory, or a loaded state, is wrong.
pub const VERIFIED_NO: u64 = 0;
/// In [`VERIFIED`]: all of it was right.
pub const VERIFIED_YES: u64 = 1;
/// In [`VERIFIED`]: the comparison goes on.
pub const VERIFIED_RUNNING: u64 = 2;
/// In [`VERIFIED`]: nothing was compared since the device was made or reset.
pub const VERIFIED_NEVER: u64 = 3;
/// Loads completed since the device was made or reset.
pub const LOADS: u64 = 0x40;
/// Interrupts raised, of all vectors.
pub const RAISED: u64 = 0x48;
/// DMA accesses that failed; each is tried again later.
pub const ERRORS: u64 = 0x50;
/// Bytes of BAR2.
pub const BAR2_SIZE: u64 = 0x58;
/// Entries of a ring for each interrupt; 0: none.
pub const INTERRUPT_EVERY: u64 = 0x60;
/// Number of vectors.
pub const VECTORS: u64 = 0x68;
/// Interrupts raised of vector 0; further vectors follow at 8 bytes.
pub const RAISED_BASE: u64 = 0x80;
/// Interrupts of vector 0 that wait for an eventfd; further vectors follow at 8 bytes.
pub const PENDING_BASE: u64 = 0xc0;
/// The first ring.
pub const RING_BASE: u64 = 0x100;
/// Bytes from ring to ring.
pub const RING_STRIDE: u64 = 0x40;
/// Of a ring: where it is, a multiple of 8.
pub const RING_IOVA: u64 = 0x00;
/// Of a ring: its slots, 1 to [`MAX_ENTRIES`].
pub const RING_ENTRIES: u64 = 0x08;
/// Of a ring: [`KIND_MEMORY`] or [`KIND_PEER`]. Only a label: DMA is the same.
pub const RING_KIND: u64 = 0x10;
/// Of a ring: 1 enabled, 0 not.
pub const RING_ENABLE: u64 = 0x18;
/// Of a ring: entries in a second; 0: the device's default.
pub const RING_RATE: u64 = 0x20;
/// Of a ring: entries written, ever.
pub const RING_PRODUCED: u64 = 0x28;
/// Of a ring: the vector that it raises.
pub const RING_VECTOR: u64 = 0x30;
/// In [`RING_KIND`]: guest memory.
pub const KIND_MEMORY: u64 = 0;
/// In [`RING_KIND`]: the BAR of a peer device.
pub const KIND_PEER: u64 = 1;

/// Bytes of BAR0.
pub const BAR0_SIZE: u64 = 4096;

/// Offset of a register of ring `ring`.
#[must_use]
pub const fn ring_register(ring: usize, register: u64) -> u64 {
    RING_BASE + ring as u64 * RING_STRIDE + register
}

/// Bytes of memory that a ring of `entries` slots takes.
#[must_use]
pub const fn ring_bytes(entries: u64) -> u64 {
    RING_HEADER + entries * 8
}

/// One ring, as it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ring {
    pub(crate) iova: u64,
    pub(crate) entries: u64,
    pub(crate) kind: u64,
    pub(crate) enabled: bool,
    pub(crate) rate: u64,
    pub(crate) produced: u64,
}

impl Ring {
    fn is_valid(&self) -> bool {
        let fits = self.entries >= 1
            && self.entries <= MAX_ENTRIES
            && self.iova.is_multiple_of(8)
            && self.iova.checked_add(ring_bytes(self.entries)).is_some();
        fits || !self.enabled
    }
}

/// The registers that are state: saved, loaded, and part of the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) control: u64,
    pub(crate) interrupt_every: u64,
    pub(crate) raised: [u64; MAX_VECTORS],
    pub(crate) pending: [u64; MAX_VECTORS],
    pub(crate) rings: [Ring; RINGS],
}

/// Words of the saved form: seed, tick, and all that [`Registers`] holds.
pub(crate) const SAVED_WORDS: usize = 4 + 2 * MAX_VECTORS + 6 * RINGS;
/// Bytes of the saved form.
pub(crate) const SAVED_BYTES: usize = SAVED_WORDS * 8;

impl Registers {
    pub(crate) fn new(interrupt_every: u64) -> Self {
        Self {
            control: 0,
            interrupt_every,
            raised: [0; MAX_VECTORS],
            pending: [0; MAX_VECTORS],
            rings: [Ring::default(); RINGS],
        }
    }

    pub(crate) fn save(&self, seed: u64, tick: u64) -> Vec<u8> {
        let mut words = vec![seed, tick, self.control, self.interrupt_every];
        words.extend(self.raised);
        words.extend(self.pending);
        for r in &self.rings {
            words.extend([r.iova, r.entries, r.kind, u64::from(r.enabled), r.rate, r.produced]);
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Seed, tick and registers of a saved form; `None` when a value is out of its range.
    pub(crate) fn load(bytes: &[u8]) -> Option<(u64, u64, Self)> {
        if bytes.len() != SAVED_BYTES {
            return None;
        }
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut next = || words.next();
        let (seed, tick) = (next()?, next()?);
        let mut registers = Self::new(0);
        registers.control = next()?;
        registers.interrupt_every = next()?;
        for value in registers.raised.iter_mut().chain(&mut registers.pending) {
            *value = next()?;
        }
        for ring in &mut registers.rings {
            let (iova, entries, kind) = (next()?, next()?, next()?);
            let (enabled, rate, produced) = (next()?, next()?, next()?);
            *ring = Ring { iova, entries, kind, enabled: enabled == 1, rate, produced };
            if enabled > 1 || kind > KIND_PEER || rate > crate::SoftDeviceOptions::MAX_RING_RATE {
                return None;
            }
        }
        let good = registers.control <= CONTROL_RUN && registers.rings.iter().all(Ring::is_valid);
        good.then_some((seed, tick, registers))
    }

    /// Writes a register that a guest may write; the caller handles those that do something.
    pub(crate) fn write(&mut self, offset: u64, value: u64) -> Result<(), Errno> {
        match offset {
            CONTROL if value <= CONTROL_RUN => self.control = value,
            INTERRUPT_EVERY => self.interrupt_every = value,
            RING_BASE.. => return self.write_ring(offset - RING_BASE, value),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn write_ring(&mut self, offset: u64, value: u64) -> Result<(), Errno> {
        let index = usize::try_from(offset / RING_STRIDE).map_err(|_| Errno::EINVAL)?;
        let ring = self.rings.get_mut(index).ok_or(Errno::EINVAL)?;
        let register = offset % RING_STRIDE;
        if register == RING_ENABLE {
            let changed = Ring { enabled: value == 1, ..*ring };
            if value > 1 || !changed.is_valid() {
                return Err(Errno::EINVAL);
            }
            *ring = changed;
            return Ok(());
        }
        if ring.enabled && register != RING_RATE {
            return Err(Errno::EBUSY);
        }
        match register {
            RING_IOVA => ring.iova = value,
            RING_ENTRIES if value <= MAX_ENTRIES => ring.entries = value,
            RING_KIND if value <= KIND_PEER => ring.kind = value,
            RING_RATE if value <= crate::SoftDeviceOptions::MAX_RING_RATE => ring.rate = value,
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    /// Reads a register of a ring or vector; `None`: there is none at `offset`.
    pub(crate) fn read(&self, offset: u64, vectors: u32) -> Option<u64> {
        let word = |base: u64| usize::try_from((offset - base) / 8).ok();
        match offset {
            RAISED => Some(self.raised.iter().fold(0, |sum, n| sum.wrapping_add(*n))),
            RAISED_BASE..PENDING_BASE => self.raised.get(word(RAISED_BASE)?).copied(),
            PENDING_BASE..RING_BASE => self.pending.get(word(PENDING_BASE)?).copied(),
            RING_BASE.. => {
                let index = usize::try_from((offset - RING_BASE) / RING_STRIDE).ok()?;
                let ring = self.rings.get(index)?;
                Some(match (offset - RING_BASE) % RING_STRIDE {
                    RING_IOVA => ring.iova,
                    RING_ENTRIES => ring.entries,
                    RING_KIND => ring.kind,
                    RING_ENABLE => u64::from(ring.enabled),
                    RING_RATE => ring.rate,
                    RING_PRODUCED => ring.produced,
                    RING_VECTOR => index as u64 % u64::from(vectors.max(1)),
                    _ => return None,
                })
            }
            CONTROL => Some(self.control),
            INTERRUPT_EVERY => Some(self.interrupt_every),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_what_is_loaded() {
        let mut registers = Registers::new(7);
        registers.control = 1;
        registers.raised[3] = 9;
        registers.pending[1] = 2;
        registers.rings[5] = Ring { iova: 4096, entries: 16, kind: 1, enabled: true, rate: 5, produced: 77 };
        let saved = registers.save(11, 12);
        assert_eq!(saved.len(), SAVED_BYTES);
        assert_eq!(Registers::load(&saved), Some((11, 12, registers)));
    }

    #[test]
    fn a_ring_beyond_its_bounds_is_not_loaded() {
        let mut registers = Registers::new(0);
        registers.rings[0] = Ring { iova: u64::MAX - 7, entries: 16, enabled: true, ..Ring::default() };
        assert_eq!(Registers::load(&registers.save(0, 0)), None);
        registers.rings[0] = Ring { entries: MAX_ENTRIES + 1, enabled: true, ..Ring::default() };
        assert_eq!(Registers::load(&registers.save(0, 0)), None);
    }

    #[test]
    fn a_ring_keeps_its_settings_while_it_is_enabled() {
        let mut registers = Registers::new(0);
        let at = |register| ring_register(2, register);
        assert_eq!(registers.write(at(RING_ENABLE), 1), Err(Errno::EINVAL), "a ring without entries");
        registers.write(at(RING_ENTRIES), 8).unwrap();
        registers.write(at(RING_IOVA), 4096).unwrap();
        registers.write(at(RING_ENABLE), 1).unwrap();
        assert_eq!(registers.write(at(RING_IOVA), 0), Err(Errno::EBUSY));
        assert_eq!(registers.write(at(RING_ENTRIES), 4), Err(Errno::EBUSY));
        registers.write(at(RING_RATE), 10).unwrap();
        assert_eq!(registers.write(at(RING_PRODUCED), 0), Err(Errno::EBUSY));
        registers.write(at(RING_ENABLE), 0).unwrap();
        assert_eq!(registers.write(at(RING_PRODUCED), 0), Err(Errno::EINVAL));
        assert_eq!(registers.read(at(RING_ENTRIES), 4), Some(8));
        assert_eq!(registers.read(ring_register(7, RING_VECTOR), 4), Some(3));
    }
}

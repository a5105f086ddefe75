//! Which registers of a configuration are restored, which bits of them, and which must have stuck.
//!
//! Only bits that a guest's driver sets and that have no effect beyond the function are here. Left
//! out on purpose: status bits, which are cleared by writing; built-in self test; function level resets;
//! power states (the device is in D0 when it is loaded); payload size, phantom functions and ARI, which
//! belong to the host's bus; address translation and PASID, which belong to the host's IOMMU; VPD and
//! vendor capabilities, where a write may mean anything.

use super::layout::{self, BARS, COMMAND, ERRORS, EXPRESS, Msi};

/// Bits of the command register that are restored: decoding, bus mastering, special cycles, write and
/// invalidate, parity, SERR, fast back-to-back, INTx disable.
pub(super) const COMMAND_BITS: u16 = 0x075f;
/// Decoding of I/O and memory.
pub(super) const DECODE: u16 = 0x0003;
/// Bus mastering.
pub(super) const MASTER: u16 = 0x0004;
/// INTx is off.
pub(super) const INTX_OFF: u16 = 0x0400;

/// Device control: error reports, relaxed ordering, extended tags, no snoop, size of read requests.
const EXPRESS_CONTROL: u32 = 0x790f | 0x0010;
/// Device control 2: completion timeouts, ID-based ordering.
const EXPRESS_CONTROL_2: u32 = 0x031f;

/// A register, or some bits of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Register {
    /// Its name, for messages.
    pub(super) name: String,
    /// Where it is in the configuration space.
    pub(super) offset: u16,
    /// Its bytes: 1, 2 or 4.
    pub(super) width: u8,
    /// The bits that are restored; others stay as they are.
    pub(super) bits: u32,
    /// Those of them that must read back as they were written.
    pub(super) must: u32,
}

impl Register {
    fn new(name: impl Into<String>, offset: u16, width: u8, bits: u32) -> Self {
        Self { name: name.into(), offset, width, bits, must: 0 }
    }

    fn must(self, bits: u32) -> Self {
        Self { must: bits, ..self }
    }
}

/// The base address registers.
pub(super) fn bars() -> Vec<Register> {
    let bar = |n: u16| Register::new(format!("BAR {n}"), BARS + 4 * n, 4, u32::MAX).must(u32::MAX);
    let rom = Register::new("expansion ROM BAR", 0x30, 4, u32::MAX);
    (0..6).map(bar).chain([rom]).collect()
}

/// The rest of the header, and capabilities other than those for interrupts.
pub(super) fn plain(config: &[u8]) -> Vec<Register> {
    let mut all = vec![
        Register::new("cache line size", 0x0c, 1, 0xff),
        Register::new("latency timer", 0x0d, 1, 0xff),
        Register::new("interrupt line", 0x3c, 1, 0xff),
    ];
    if let Some(at) = layout::find(config, false, EXPRESS) {
        all.push(Register::new("PCI Express device control", at + 8, 2, EXPRESS_CONTROL));
        let version = layout::word(config, at + 2).map_or(0, |flags| flags & 0xf);
        if version >= 2 {
            all.push(Register::new("PCI Express device control 2", at + 0x28, 2, EXPRESS_CONTROL_2));
        }
    }
    if let Some(at) = layout::find(config, true, ERRORS) {
        all.push(Register::new("mask of uncorrectable errors", at + 0x08, 4, u32::MAX));
        all.push(Register::new("severity of uncorrectable errors", at + 0x0c, 4, u32::MAX));
        all.push(Register::new("mask of correctable errors", at + 0x14, 4, u32::MAX));
    }
    // A capability at the end of a space that is shorter than it.
    all.retain(|r| usize::from(r.offset) + usize::from(r.width) <= config.len());
    all
}

/// Address and data of MSI, which must stick where MSI is `on`.
pub(super) fn msi(msi: Msi, on: bool) -> Vec<Register> {
    let must = |register: Register| {
        if on {
            let bits = register.bits;
            register.must(bits)
        } else {
            register
        }
    };
    let mut all = vec![must(Register::new("MSI address", msi.address(), 4, 0xffff_fffc))];
    all.extend(msi.address_high().map(|at| must(Register::new("upper MSI address", at, 4, u32::MAX))));
    all.push(must(Register::new("MSI data", msi.data(), 2, 0xffff)));
    all
}

/// The mask of MSI, after its vectors are on: to switch them on may change it.
pub(super) fn msi_mask(msi: Msi) -> Option<Register> {
    msi.mask().map(|at| Register::new("MSI mask", at, 4, u32::MAX))
}

/// Control of MSI or MSI-X, of which `bits` are restored and `must` stick.
pub(super) fn message_control(name: &str, offset: u16, bits: u16, must: u16) -> Register {
    Register::new(name, offset, 2, bits.into()).must(must.into())
}

/// The command register, at the very end.
pub(super) fn command() -> Register {
    let must = DECODE | MASTER | INTX_OFF;
    Register::new("command", COMMAND, 2, COMMAND_BITS.into()).must(must.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_dangerous_is_written() {
        let config = layout::tests::example();
        let all = [bars(), plain(&config), vec![command()]].concat();
        let covers = |at: u16, bit: u32| {
            all.iter().any(|r| {
                (r.offset..r.offset + u16::from(r.width)).contains(&at)
                    && r.bits >> (u32::from(at - r.offset) * 8) & (1 << bit) != 0
            })
        };
        // Status, BIST, header type, capability pointer.
        for at in [0x06, 0x07, 0x0f, 0x0e, 0x34] {
            assert!((0..8).all(|bit| !covers(at, bit)), "{at:#x}");
        }
        // Of PCI Express at 0x70: reset, payload size, phantom functions; device status; ARI.
        assert!(!covers(0x79, 7) && !covers(0x78, 5) && !covers(0x79, 1) && !covers(0x7a, 0));
        assert!(!covers(0x98, 5));
        // Ids and links of capabilities.
        assert!((0x50..0x54).chain(0x60..0x64).chain(0x70..0x74).all(|at| !covers(at, 0)));
        assert!(covers(0x04, 2) && covers(0x10, 4) && covers(0x79, 4));
    }

    #[test]
    fn registers_beyond_the_end_of_the_space_are_left_out() {
        let mut config = layout::tests::example();
        config.truncate(0x90);
        assert!(plain(&config).iter().all(|r| r.offset < 0x90));
    }
}

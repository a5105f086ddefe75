//! Where things are in a PCI configuration space: the capability chains, MSI and MSI-X.
//!
//! The bytes may come from another host, so that every offset is checked and every walk ends. What a
//! capability means apart from the two for interrupts is not looked at.

/// Offset of the command register.
pub(super) const COMMAND: u16 = 0x04;
/// Offset of the status register.
const STATUS: u16 = 0x06;
/// Its bit that says that there is a chain of capabilities.
const STATUS_CAPABILITIES: u16 = 0x10;
/// Offset of the header type.
pub(super) const HEADER_TYPE: u16 = 0x0e;
/// Offset of the first base address register.
pub(super) const BARS: u16 = 0x10;
/// Offset of the pointer to the first capability.
const FIRST_CAPABILITY: u16 = 0x34;
/// Where capabilities may begin.
const CAPABILITIES: u16 = 0x40;
/// Where extended capabilities begin.
const EXTENDED: u16 = 0x100;

/// Capability ids.
pub(super) const MSI: u16 = 0x05;
pub(super) const EXPRESS: u16 = 0x10;
pub(super) const MSIX: u16 = 0x11;
/// Extended capability id of error reporting.
pub(super) const ERRORS: u16 = 0x01;

/// Most vectors of MSI-X.
pub(super) const MAX_VECTORS: u16 = 2048;
/// Bytes of an entry of the MSI-X table.
pub(super) const ENTRY: usize = 16;

/// One capability of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Capability {
    /// Whether it is in the extended configuration space, which has ids of its own.
    pub(crate) extended: bool,
    /// Its id.
    pub(crate) id: u16,
    /// Where it begins.
    pub(crate) offset: u16,
}

/// The two bytes at an offset, if they are there.
pub(super) fn word(config: &[u8], at: u16) -> Option<u16> {
    config.get(usize::from(at)..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
}

/// The four bytes at an offset, if they are there.
pub(super) fn long(config: &[u8], at: u16) -> Option<u32> {
    config.get(usize::from(at)..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// The capabilities of both chains, in their order. A chain that leads outside of the space, back, or
/// nowhere ends there.
pub(crate) fn capabilities(config: &[u8]) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    let seen = |found: &[Capability], at| found.iter().any(|c| c.offset == at);
    if word(config, STATUS).is_some_and(|status| status & STATUS_CAPABILITIES != 0) {
        let pointer = |at: u16| config.get(usize::from(at)).map_or(0, |b| u16::from(*b & 0xfc));
        let mut at = pointer(FIRST_CAPABILITY);
        while at >= CAPABILITIES && !seen(&found, at) {
            // A capability has four bytes at least.
            let Some(&[id, ..]) = config.get(usize::from(at)..).and_then(|c| c.first_chunk::<4>()) else {
                break;
            };
            if id == 0xff {
                break;
            }
            found.push(Capability { extended: false, id: id.into(), offset: at });
            at = pointer(at + 1);
        }
    }
    let mut at = EXTENDED;
    let mut links = 0;
    while at >= EXTENDED && !seen(&found, at) && links < 1024 {
        let Some(header) = long(config, at).filter(|header| *header != u32::MAX) else { break };
        let [low, high, ..] = header.to_le_bytes();
        let id = u16::from_le_bytes([low, high]);
        // Id 0 is a capability that was hidden at the head of the chain.
        if id != 0 {
            found.push(Capability { extended: true, id, offset: at });
        }
        at = u16::try_from(header >> 20).unwrap_or(0) & 0xffc;
        links += 1;
    }
    found
}

/// Where a capability of this id begins.
pub(super) fn find(config: &[u8], extended: bool, id: u16) -> Option<u16> {
    let all = capabilities(config);
    all.into_iter().find(|c| c.extended == extended && c.id == id).map(|c| c.offset)
}

/// The MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Msi {
    /// Offset of its control register.
    pub(super) control: u16,
    /// Whether it has addresses of 64 bits.
    wide: bool,
    /// Whether vectors can be masked.
    maskable: bool,
}

impl Msi {
    pub(super) const ENABLE: u16 = 1;
    /// The bits that say how many vectors are used.
    pub(super) const COUNT: u16 = 0x70;

    pub(super) fn find(config: &[u8]) -> Option<Self> {
        let control = find(config, false, MSI)? + 2;
        let flags = word(config, control)?;
        Some(Self { control, wide: flags & 0x80 != 0, maskable: flags & 0x100 != 0 })
    }

    pub(super) const fn address(self) -> u16 {
        self.control + 2
    }

    pub(super) const fn address_high(self) -> Option<u16> {
        if self.wide { Some(self.control + 6) } else { None }
    }

    pub(super) const fn data(self) -> u16 {
        self.control + if self.wide { 10 } else { 6 }
    }

    pub(super) const fn mask(self) -> Option<u16> {
        if self.maskable { Some(self.data() + 4) } else { None }
    }

    /// Vectors that a control register with this value uses.
    pub(super) const fn used(flags: u16) -> u32 {
        1 << ((flags & Self::COUNT) >> 4)
    }
}

/// The MSI-X capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Msix {
    /// Offset of its control register.
    pub(super) control: u16,
    /// Entries of its table.
    pub(super) entries: u16,
    /// The BAR that holds the table.
    pub(super) bar: u8,
    /// Where the table begins in the BAR.
    pub(super) offset: u32,
}

impl Msix {
    pub(super) const ENABLE: u16 = 0x8000;
    pub(super) const MASK_ALL: u16 = 0x4000;

    pub(super) fn find(config: &[u8]) -> Option<Self> {
        let at = find(config, false, MSIX)?;
        let entries = (word(config, at + 2)? & (MAX_VECTORS - 1)) + 1;
        let table = long(config, at + 4)?;
        let [bar, ..] = table.to_le_bytes();
        Some(Self { control: at + 2, entries, bar: bar & 7, offset: table & !7 }).filter(|m| m.bar < 6)
    }

    /// Bytes of the table.
    pub(super) fn table_size(self) -> usize {
        usize::from(self.entries) * ENTRY
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A function with MSI at 0x50, MSI-X with 4 entries in BAR 1 at 0x60, PCI Express at 0x70, error
    /// reporting at 0x100 and something at 0x140.
    pub(in crate::pci) fn example() -> Vec<u8> {
        let mut config = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x86, 0x80, 0xd3, 0x10]);
        put(0x06, &[0x10]);
        put(0x10, &[0x0c, 0, 0, 0xfe, 0, 0, 0, 0]);
        put(0x34, &[0x50]);
        // 64 bits, maskable, up to 4 vectors.
        put(0x50, &[0x05, 0x60, 0x84, 0x01]);
        put(0x60, &[0x11, 0x70, 3, 0, 0x01, 0x20, 0, 0, 0x01, 0x30, 0, 0]);
        put(0x70, &[0x10, 0, 2, 0]);
        put(0x100, &0x1401_0001_u32.to_le_bytes());
        put(0x140, &0x0001_0018_u32.to_le_bytes());
        config
    }

    #[test]
    fn both_chains_are_walked() {
        let found: Vec<_> = capabilities(&example()).iter().map(|c| (c.extended, c.id, c.offset)).collect();
        let wanted = [
            (false, 5, 0x50),
            (false, 0x11, 0x60),
            (false, 0x10, 0x70),
            (true, 1, 0x100),
            (true, 0x18, 0x140),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn chains_that_lead_astray_end() {
        let mut config = example();
        config[0x71] = 0x50;
        assert_eq!(capabilities(&config).len(), 5, "a circle");
        config[0x71] = 0x10;
        assert_eq!(capabilities(&config).len(), 5, "a link into the header");
        config[0x100..0x104].copy_from_slice(&0xfff1_0001_u32.to_le_bytes());
        assert_eq!(capabilities(&config).len(), 4, "an extended link to the end, where nothing is");
        config[0x06] = 0;
        assert_eq!(capabilities(&config).len(), 1, "no chain, whatever the pointer says");
        assert_eq!(capabilities(&[0xff; 255]), []);
        assert_eq!(capabilities(&[]), []);
        config.truncate(0x60);
        config[0x06] = 0x10;
        assert_eq!(capabilities(&config).len(), 1, "a space that ends before the chain does");
    }

    #[test]
    fn registers_of_interrupts_are_where_the_capability_says() {
        let msi = Msi::find(&example()).unwrap();
        let wide = (msi.address(), msi.address_high(), msi.data(), msi.mask());
        assert_eq!(wide, (0x54, Some(0x58), 0x5c, Some(0x60)));
        let mut config = example();
        config[0x52] = 0;
        config[0x53] = 0;
        let msi = Msi::find(&config).unwrap();
        assert_eq!((msi.address(), msi.address_high(), msi.data(), msi.mask()), (0x54, None, 0x58, None));
        let msix = Msix::find(&config).unwrap();
        assert_eq!((msix.entries, msix.bar, msix.offset, msix.table_size()), (4, 1, 0x2000, 64));
        config[0x64] = 7;
        assert_eq!(Msix::find(&config), None, "no BAR of this number");
    }
}

//! Saving and restoring the configuration of a PCI device (K-CONFIG).

use super::access::{Access, Kernel, Message};
use super::layout::{self, BARS, COMMAND, HEADER_TYPE, Msi, Msix, capabilities, long, word};
use super::record::{Mode, Record};
use super::registers::{self, COMMAND_BITS, DECODE, INTX_OFF, MASTER, Register};
use crate::fd::{DeviceFd, DeviceFlags};
use airlift_core::{DeviceError, DeviceErrorKind, Errno};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most bytes of configuration space.
const MAX_CONFIG: u64 = 4096;
/// Least bytes: the header.
const MIN_CONFIG: u64 = 64;
const SAVE: &str = "save of the PCI configuration";
const RESTORE: &str = "restore of the PCI configuration";

/// The configuration of a PCI device, as it shows through VFIO: what a VMM calls the device's own record.
///
/// A VMM that emulates configuration space, as most do, has a record of its own and needs none of this. It
/// is what the command uses, and what a VMM without such emulation can use.
///
/// Registers are restored, and the kinds of interrupt are switched on, but **vectors signal nobody**:
/// eventfds are the VMM's, who gives them with [`DeviceFd::set_eventfds`] before the guest runs. Pending
/// bits are not in the record; a guest's interrupt that was pending is the VMM's too.
///
/// vfio-pci keeps the MSI-X table of the hardware for itself: reads of it give ones, writes are dropped,
/// and the table that the guest sees is the VMM's. Then there is no table in the record, and that is no error.
/// A table that is there and cannot be read is one.
#[derive(Clone, Debug)]
pub struct PciConfig {
    device: Kernel,
    /// A table was read here. Clones share.
    seen: Seen,
}

/// Whether an MSI-X table was ever read: then one that is missing later is not hidden, but lost.
type Seen = Arc<AtomicBool>;

impl PciConfig {
    /// That of this device; `None` when it is not PCI.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn new(fd: &DeviceFd) -> Result<Option<Self>, DeviceError> {
        if !fd.info()?.flags.contains(DeviceFlags::PCI) {
            return Ok(None);
        }
        Ok(Some(Self { device: Kernel::new(fd)?, seen: Seen::default() }))
    }

    /// The configuration as a record, of at most 37 KiB. Nothing of the device changes. The device should be
    /// stopped, so that it does not change itself meanwhile.
    ///
    /// # Errors
    /// When the device refuses an access, or its configuration space has no possible size; when the MSI-X table
    /// cannot be read, or was seen before and is not now.
    pub fn save(&self) -> Result<Vec<u8>, DeviceError> {
        save(&self.device, &self.seen).map(|record| record.encode())
    }

    /// Whether the configuration can be saved, and is one that [`restore`](Self::restore) would take. Writes
    /// nothing, so that it can be asked before a migration begins, when refusing costs nothing.
    ///
    /// # Errors
    /// As [`save`](Self::save) and [`restore`](Self::restore).
    pub fn check(&self) -> Result<(), DeviceError> {
        check(&self.device, &self.seen)
    }

    /// Restores a record, while the device is RESUMING and has all of its data: before RESUMING -> STOP, where it
    /// validates. Bus mastering is switched on last, so that it does no DMA with half of a configuration.
    ///
    /// The order: the command register without decoding and bus mastering; BARs; capabilities; MSI or MSI-X with its
    /// vectors; the MSI-X table; the command register as it was saved.
    ///
    /// # Errors
    /// When the record is damaged, or of a device with another layout (nothing is then written); when a
    /// register that must take its value does not (it is named), or the host has too few vectors. What was
    /// written until then stays: reset the device.
    pub fn restore(&self, record: &[u8]) -> Result<(), DeviceError> {
        restore(&self.device, record)
    }
}

fn wrong(operation: &str, message: impl Into<String>) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Refused, operation, message)
}

fn read_config(device: &impl Access, operation: &str) -> Result<Vec<u8>, DeviceError> {
    let size = device.config_size();
    let size = usize::try_from(size.min(MAX_CONFIG)).ok().filter(|_| size >= MIN_CONFIG);
    let Some(size) = size else {
        return Err(wrong(operation, format!("a configuration space of {} bytes", device.config_size())));
    };
    let mut config = vec![0; size];
    device.read_config(0, &mut config)?;
    Ok(config)
}

/// Which kind of interrupt a configuration has switched on.
fn mode(config: &[u8]) -> Mode {
    let on = |at, bit| word(config, at).filter(|flags| flags & bit != 0);
    if let Some(msix) = Msix::find(config).filter(|m| on(m.control, Msix::ENABLE).is_some()) {
        return Mode::Msix(msix.entries.into());
    }
    if let Some(flags) = Msi::find(config).and_then(|m| on(m.control, Msi::ENABLE)) {
        return Mode::Msi(Msi::used(flags).min(32));
    }
    let pin = config.get(0x3d).copied().unwrap_or(0);
    if pin != 0 && on(COMMAND, INTX_OFF).is_none() { Mode::Intx } else { Mode::None }
}

fn save(device: &impl Access, seen: &Seen) -> Result<Record, DeviceError> {
    let config = read_config(device, SAVE)?;
    // Without decoding of memory there is no table to read.
    let decodes = word(&config, COMMAND).is_some_and(|command| command & 2 != 0);
    let table = match Msix::find(&config).filter(|_| decodes) {
        None => Vec::new(),
        Some(msix) => {
            let table = read_table(device, msix)?;
            let seen = seen.fetch_or(!table.is_empty(), Ordering::AcqRel);
            if seen && table.is_empty() {
                return Err(wrong(SAVE, "the MSI-X table was there before, and now the driver gives none"));
            }
            table
        }
    };
    Ok(Record { mode: mode(&config), config, table })
}

fn check(device: &impl Access, seen: &Seen) -> Result<(), DeviceError> {
    let record = Record::decode(&save(device, seen)?.encode())
        .map_err(|reason| wrong(SAVE, format!("the record: {reason}")))?;
    fits(&record, &read_config(device, SAVE)?)?;
    check_vectors(device, record.mode)
}

/// The MSI-X table; empty where the driver keeps it for itself.
///
/// # Errors
/// When the driver neither gives it nor refuses it as one that keeps it: without it the guest's interrupts
/// would be lost without a word.
fn read_table(device: &impl Access, msix: Msix) -> Result<Vec<u8>, DeviceError> {
    let mut table = vec![0; msix.table_size()];
    match device.read_bar(msix.bar, msix.offset.into(), &mut table) {
        // No entry has reserved bits set, so this is what a driver gives that hides the table.
        Ok(()) if table.iter().all(|byte| *byte == 0xff) => Ok(Vec::new()),
        Ok(()) => Ok(table),
        Err(error) if matches!(error.errno, Some(Errno::EINVAL | Errno::EACCES)) => {
            tracing::debug!(%error, "the driver keeps the MSI-X table for itself");
            Ok(Vec::new())
        }
        Err(error) => {
            let message = format!("the MSI-X table cannot be read: {}", error.message);
            Err(DeviceError { message, ..error })
        }
    }
}

fn restore(device: &impl Access, record: &[u8]) -> Result<(), DeviceError> {
    let record = Record::decode(record).map_err(|reason| wrong(RESTORE, format!("the record: {reason}")))?;
    let found = read_config(device, RESTORE)?;
    fits(&record, &found)?;
    let config = &record.config;
    let msix = Msix::find(config);
    check_vectors(device, record.mode)?;

    let command = word(config, COMMAND).unwrap_or(0);
    write_command(device, command & !(DECODE | MASTER))?;
    for register in registers::bars().iter().chain(&registers::plain(config)) {
        // Nothing that was written so far reaches these, so that most need no access at all.
        if !is_there(config, &found, register) {
            put(device, config, register)?;
        }
    }
    restore_messages(device, &record, &found)?;
    if let Some(msix) = msix.filter(|_| !record.table.is_empty()) {
        write_command(device, command & !MASTER)?;
        write_table(device, msix, &record.table)?;
    }
    put(device, config, &registers::command())
}

/// Whether a record is sound, and of a device with the layout of the one `found`.
fn fits(record: &Record, found: &[u8]) -> Result<(), DeviceError> {
    if let Some(difference) = difference(&record.config, found) {
        return Err(wrong(RESTORE, format!("the record is of a device with another layout: {difference}")));
    }
    let table = Msix::find(&record.config).map(|m| m.table_size());
    if !record.table.is_empty() && table != Some(record.table.len()) {
        return Err(wrong(RESTORE, "the record: its MSI-X table has another size than its device says"));
    }
    if record.mode != mode(&record.config) {
        return Err(wrong(RESTORE, "the record: its interrupts are not those of its configuration space"));
    }
    Ok(())
}

/// What differs between the layouts of two configuration spaces.
fn difference(saved: &[u8], found: &[u8]) -> Option<String> {
    if saved.len() != found.len() {
        return Some(format!("{} bytes of configuration space, here {}", saved.len(), found.len()));
    }
    for (name, at) in [("vendor and device", 0), ("subsystem", 0x2c)] {
        let (saved, found) = (long(saved, at)?, long(found, at)?);
        if saved != found {
            return Some(format!("{name} {saved:08x}, here {found:08x}"));
        }
    }
    let header = |config: &[u8]| config.get(usize::from(HEADER_TYPE)).map_or(0, |b| b & 0x7f);
    if header(saved) != 0 || header(found) != 0 {
        return Some(format!("header types {} and {}, only 0 is supported", header(saved), header(found)));
    }
    if bar_types(saved) != bar_types(found) {
        return Some(format!("BAR types {:x?}, here {:x?}", bar_types(saved), bar_types(found)));
    }
    let chain = |config| -> Vec<String> {
        let text = |c: layout::Capability| {
            format!("{}{:#04x}@{:#x}", if c.extended { "extended " } else { "" }, c.id, c.offset)
        };
        capabilities(config).into_iter().map(text).collect()
    };
    if chain(saved) != chain(found) {
        return Some(format!("capabilities {}, here {}", chain(saved).join(", "), chain(found).join(", ")));
    }
    if Msi::find(saved) != Msi::find(found) {
        return Some("another form of MSI".into());
    }
    (Msix::find(saved) != Msix::find(found)).then(|| "another size or place of the MSI-X table".into())
}

/// The low bits of each BAR that say what it is; `None` for the upper half of one of 64 bits.
fn bar_types(config: &[u8]) -> [Option<u32>; 6] {
    let mut types = [None; 6];
    let mut upper = false;
    for (n, entry) in (0..).zip(types.iter_mut()) {
        let value = long(config, BARS + 4 * n).unwrap_or(0);
        // Bit 0: I/O, with one type bit more; else memory, with three.
        *entry = (!upper).then_some(if value & 1 != 0 { value & 3 } else { value & 0xf });
        upper = !upper && value & 0b111 == 0b100;
    }
    types
}

fn check_vectors(device: &impl Access, mode: Mode) -> Result<(), DeviceError> {
    let (kind, wanted) = match mode {
        Mode::None | Mode::Intx => return Ok(()),
        Mode::Msi(vectors) => (Message::Msi, vectors),
        Mode::Msix(vectors) => (Message::Msix, vectors),
    };
    let has = device.vectors(kind)?;
    if has < wanted {
        let name = kind.name();
        return Err(wrong(
            RESTORE,
            format!("{wanted} vectors of {name} are wanted, the device here has {has}"),
        ));
    }
    Ok(())
}

/// MSI and MSI-X: addresses and data, then the vectors, then what the registers add.
fn restore_messages(device: &impl Access, record: &Record, found: &[u8]) -> Result<(), DeviceError> {
    match mode(found) {
        Mode::Msi(_) => device.enable(Message::Msi, 0)?,
        Mode::Msix(_) => device.enable(Message::Msix, 0)?,
        Mode::None | Mode::Intx => {}
    }
    let config = &record.config;
    if let Some(msi) = Msi::find(config) {
        let on = matches!(record.mode, Mode::Msi(_));
        for register in registers::msi(msi, on) {
            put(device, config, &register)?;
        }
        if let Mode::Msi(vectors) = record.mode {
            device.enable(Message::Msi, vectors)?;
        }
        // vfio-pci takes the enable bit only when the vectors are on.
        let must = if on { Msi::ENABLE | Msi::COUNT } else { 0 };
        put(
            device,
            config,
            &registers::message_control("MSI control", msi.control, Msi::ENABLE | Msi::COUNT, must),
        )?;
        if let Some(mask) = registers::msi_mask(msi) {
            put(device, config, &mask)?;
        }
    }
    if let Some(msix) = Msix::find(config) {
        if let Mode::Msix(vectors) = record.mode {
            device.enable(Message::Msix, vectors)?;
        }
        let bits = Msix::ENABLE | Msix::MASK_ALL;
        put(device, config, &registers::message_control("MSI-X control", msix.control, bits, Msix::ENABLE))?;
    }
    Ok(())
}

/// Writes the table, entry by entry: masked, address and data, and then its own mask.
fn write_table(device: &impl Access, msix: Msix, table: &[u8]) -> Result<(), DeviceError> {
    let (entries, _) = table.as_chunks::<{ layout::ENTRY }>();
    for (number, entry) in (0_u64..).zip(entries) {
        let at = u64::from(msix.offset) + number * layout::ENTRY as u64;
        device.write_bar(msix.bar, at + 12, &1_u32.to_le_bytes())?;
        for part in [0, 4, 8, 12] {
            device.write_bar(msix.bar, at + part as u64, &entry[part..part + 4])?;
        }
        let mut back = [0; layout::ENTRY];
        device.read_bar(msix.bar, at, &mut back)?;
        if back[..12] != entry[..12] {
            return Err(wrong(RESTORE, format!("entry {number} of the MSI-X table did not take its value")));
        }
    }
    Ok(())
}

fn write_command(device: &impl Access, command: u16) -> Result<(), DeviceError> {
    let mut now = [0; 2];
    device.read_config(COMMAND.into(), &mut now)?;
    let value = u16::from_le_bytes(now) & !COMMAND_BITS | command & COMMAND_BITS;
    device.write_config(COMMAND.into(), &value.to_le_bytes())
}

/// Whether a register's bits that are restored are the same in both configuration spaces.
fn is_there(saved: &[u8], found: &[u8], register: &Register) -> bool {
    let from = usize::from(register.offset);
    let value = |config: &[u8]| -> Option<u32> {
        let mut bytes = [0; 4];
        let register = config.get(from..from + usize::from(register.width).min(4))?;
        bytes[..register.len()].copy_from_slice(register);
        Some(u32::from_le_bytes(bytes))
    };
    value(saved).zip(value(found)).is_some_and(|(saved, found)| (saved ^ found) & register.bits == 0)
}

/// Puts the bits of a register that are restored, and sees whether those that must have stuck did.
fn put(device: &impl Access, config: &[u8], register: &Register) -> Result<(), DeviceError> {
    let width = usize::from(register.width).min(4);
    let read = || -> Result<u32, DeviceError> {
        let mut bytes = [0; 4];
        device.read_config(register.offset.into(), &mut bytes[..width])?;
        Ok(u32::from_le_bytes(bytes))
    };
    let mut saved = [0; 4];
    let from = usize::from(register.offset);
    match config.get(from..from + width) {
        Some(bytes) => saved[..width].copy_from_slice(bytes),
        None => return Ok(()),
    }
    let wanted = u32::from_le_bytes(saved) & register.bits;
    let now = read()?;
    // A write that changes nothing may still have an effect, or be refused.
    if now & register.bits == wanted {
        return Ok(());
    }
    let value = now & !register.bits | wanted;
    device.write_config(register.offset.into(), &value.to_le_bytes()[..width])?;
    let back = read()?;
    let missed = (back ^ wanted) & register.bits;
    if missed & register.must != 0 {
        let (name, at) = (&register.name, register.offset);
        let message = format!("register {name} at {at:#x} reads {back:#x} after {value:#x} was written");
        return Err(wrong(RESTORE, message));
    }
    if missed != 0 {
        tracing::debug!(register = register.name, wanted, back, "a register kept bits of its own");
    }
    Ok(())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;

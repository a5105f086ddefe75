use super::*;
use std::cell::RefCell;

/// What a device was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Did {
    Config(u64, Vec<u8>),
    Bar(u64),
    Enable(Message, u32),
}

/// A device in memory that behaves as vfio-pci does where it matters: message interrupts are switched on by
/// request, their enable bits follow.
struct Fake {
    config: RefCell<Vec<u8>>,
    bar: RefCell<Vec<u8>>,
    hides_table: bool,
    /// What a read of a BAR fails with.
    no_bar: Option<Errno>,
    /// Bytes of the configuration space that take no write.
    fixed: Vec<u64>,
    vectors: u32,
    did: RefCell<Vec<Did>>,
}

const TABLE: usize = 0x2000;

impl Fake {
    fn new(config: Vec<u8>) -> Self {
        Self {
            config: RefCell::new(config),
            bar: RefCell::new(vec![0; 0x4000]),
            hides_table: false,
            no_bar: None,
            fixed: Vec::new(),
            vectors: 4,
            did: RefCell::default(),
        }
    }

    fn byte(&self, at: usize) -> u8 {
        self.config.borrow()[at]
    }
}

impl Access for Fake {
    fn config_size(&self) -> u64 {
        self.config.borrow().len() as u64
    }

    fn read_config(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.config.borrow()[at..at + buf.len()]);
        Ok(())
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.did.borrow_mut().push(Did::Config(offset, data.into()));
        for (at, byte) in (offset..).zip(data).filter(|(at, _)| !self.fixed.contains(at)) {
            self.config.borrow_mut()[usize::try_from(at).unwrap()] = *byte;
        }
        Ok(())
    }

    fn read_bar(&self, _: u8, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        if self.config.borrow()[4] & 2 == 0 {
            return Err(DeviceError::refused("read of a BAR", Errno::EIO));
        }
        if let Some(errno) = self.no_bar {
            return Err(DeviceError::refused("read of a BAR", errno));
        }
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bar.borrow()[at..at + buf.len()]);
        if self.hides_table {
            buf.fill(0xff);
        }
        Ok(())
    }

    fn write_bar(&self, _: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        if self.config.borrow()[4] & 2 == 0 {
            return Err(DeviceError::refused("write of a BAR", Errno::EIO));
        }
        self.did.borrow_mut().push(Did::Bar(offset));
        let at = usize::try_from(offset).unwrap();
        self.bar.borrow_mut()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn vectors(&self, _: Message) -> Result<u32, DeviceError> {
        Ok(self.vectors)
    }

    fn enable(&self, kind: Message, count: u32) -> Result<(), DeviceError> {
        self.did.borrow_mut().push(Did::Enable(kind, count));
        let (at, bit) = match kind {
            Message::Msi => (0x52, 1),
            Message::Msix => (0x63, 0x80),
        };
        let mut config = self.config.borrow_mut();
        config[at] = config[at] & !bit | if count > 0 { bit } else { 0 };
        Ok(())
    }
}

/// A device as the guest has left it: MSI-X on, table written, BARs moved, bus mastering on.
fn used() -> Fake {
    let mut config = layout::tests::example();
    config[0x04] = 0x06;
    config[0x05] = 0x04;
    config[0x13] = 0xfd;
    config[0x3c] = 11;
    config[0x63] = 0x80;
    config[0x79] = 0x20;
    let device = Fake::new(config);
    device.bar.borrow_mut()[TABLE..TABLE + 64].copy_from_slice(&std::array::from_fn::<_, 64, _>(|i| {
        // Vector control has one bit.
        if i % 16 >= 12 { u8::from(i % 32 == 12) } else { u8::try_from(i + 1).unwrap() }
    }));
    device
}

fn saved(device: &Fake) -> Result<Record, DeviceError> {
    save(device, &Seen::default())
}

#[test]
fn what_the_guest_has_set_arrives_in_another_device() {
    let (from, to) = (used(), Fake::new(layout::tests::example()));
    let record = saved(&from).unwrap();
    assert_eq!(record.mode, Mode::Msix(4));
    restore(&to, &record.encode()).unwrap();
    assert_eq!(*to.config.borrow(), *from.config.borrow());
    assert_eq!(*to.bar.borrow(), *from.bar.borrow());
}

// K-CONFIG
#[test]
fn bus_mastering_comes_last_and_decoding_after_the_bars() {
    let to = Fake::new(layout::tests::example());
    // As a driver may leave it after a reset.
    to.config.borrow_mut()[0x04] = 0x07;
    restore(&to, &saved(&used()).unwrap().encode()).unwrap();
    let did = to.did.borrow();
    let command = |want: &dyn Fn(u8) -> bool| {
        did.iter().position(|d| matches!(d, Did::Config(4, data) if want(data[0]))).unwrap()
    };
    let at = |wanted: &dyn Fn(&Did) -> bool| did.iter().position(wanted).unwrap();
    let bar = at(&|d| matches!(d, Did::Config(0x10, _)));
    let vectors = at(&|d| *d == Did::Enable(Message::Msix, 4));
    let table = at(&|d| matches!(d, Did::Bar(_)));
    let order =
        [command(&|b| b & 7 == 0), bar, vectors, command(&|b| b & 7 == 2), table, command(&|b| b & 4 != 0)];
    assert!(order.is_sorted(), "{order:?} of {did:?}");
    assert_eq!(order[5], did.len() - 1);
}

#[test]
fn a_table_that_the_driver_keeps_is_left_to_it() {
    let (from, to) = (used(), Fake { hides_table: true, ..Fake::new(layout::tests::example()) });
    let from = Fake { hides_table: true, ..from };
    let record = saved(&from).unwrap();
    assert!(record.table.is_empty());
    restore(&to, &record.encode()).unwrap();
    assert!(!to.did.borrow().iter().any(|d| matches!(d, Did::Bar(_))));
    assert_eq!(to.byte(0x63), 0x80);
}

// K-CONFIG
#[test]
fn a_table_that_cannot_be_read_is_not_left_out() {
    for errno in [Errno::EINVAL, Errno::EACCES] {
        let device = Fake { no_bar: Some(errno), ..used() };
        assert!(saved(&device).unwrap().table.is_empty(), "a driver that keeps it may refuse it");
    }
    for errno in [Errno::EIO, Errno::ETIMEDOUT, Errno::ENODEV] {
        let device = Fake { no_bar: Some(errno), ..used() };
        let error = saved(&device).unwrap_err();
        assert_eq!(error.errno, Some(errno));
        assert!(error.message.contains("MSI-X table"), "{error}");
        assert!(check(&device, &Seen::default()).is_err(), "before a migration begins");
    }
}

// K-CONFIG
#[test]
fn a_table_that_was_seen_and_is_gone_is_not_taken_as_hidden() {
    let mut device = used();
    let seen = Seen::default();
    check(&device, &seen).unwrap();
    device.hides_table = true;
    assert!(save(&device, &seen).unwrap_err().message.contains("was there before"));
    device.hides_table = false;
    device.no_bar = Some(Errno::EINVAL);
    assert!(save(&device, &seen).is_err());
    device.no_bar = None;
    assert_eq!(save(&device, &seen).unwrap().table.len(), 64);
}

#[test]
fn msi_is_switched_on_before_its_control_register_is_written() {
    let from = Fake::new(layout::tests::example());
    {
        let mut config = from.config.borrow_mut();
        config[0x52] |= 0x21;
        config[0x54..0x5e].copy_from_slice(&[0, 0x10, 0xe0, 0xfe, 1, 0, 0, 0, 0x41, 0]);
    }
    let to = Fake::new(layout::tests::example());
    let record = saved(&from).unwrap();
    assert_eq!(record.mode, Mode::Msi(4));
    restore(&to, &record.encode()).unwrap();
    assert_eq!(*to.config.borrow(), *from.config.borrow());
    let did = to.did.borrow();
    let enable = did.iter().position(|d| *d == Did::Enable(Message::Msi, 4)).unwrap();
    let control = did.iter().position(|d| matches!(d, Did::Config(0x52, _))).unwrap();
    assert!(enable < control);
}

#[test]
fn interrupts_of_an_earlier_guest_are_switched_off() {
    let from = Fake::new(layout::tests::example());
    let to = used();
    restore(&to, &saved(&from).unwrap().encode()).unwrap();
    assert_eq!((to.byte(0x63), to.byte(0x04)), (0, 0));
}

#[test]
fn a_register_that_does_not_stick_is_named() {
    let record = saved(&used()).unwrap().encode();
    for (fixed, name) in [(0x13, "BAR 0"), (0x04, "command")] {
        let to = Fake { fixed: vec![fixed], ..Fake::new(layout::tests::example()) };
        to.config.borrow_mut()[0x04] = 2;
        let error = restore(&to, &record).unwrap_err();
        assert!(error.message.contains(name), "{error}");
    }
    // Nobody relies on this one.
    let to = Fake { fixed: vec![0x0c], ..Fake::new(layout::tests::example()) };
    restore(&to, &record).unwrap();
}

#[test]
fn another_layout_is_refused_before_anything_is_written() {
    let record = saved(&used()).unwrap().encode();
    let changes: [(usize, u8, &str); 6] = [
        (0x00, 0x87, "vendor"),
        (0x2c, 1, "subsystem"),
        (0x10, 0x08, "BAR types"),
        (0x51, 0x70, "capabilities"),
        (0x62, 7, "MSI-X"),
        (0x0e, 1, "header"),
    ];
    for (at, value, word) in changes {
        let to = Fake::new(layout::tests::example());
        to.config.borrow_mut()[at] = value;
        let error = restore(&to, &record).unwrap_err();
        assert!(error.message.contains(word), "{error}");
        assert!(to.did.borrow().is_empty());
    }
    let to = Fake { vectors: 3, ..Fake::new(layout::tests::example()) };
    assert!(restore(&to, &record).unwrap_err().message.contains("4 vectors"));
    assert!(to.did.borrow().is_empty());
}

#[test]
fn a_record_that_contradicts_itself_is_refused() {
    let good = saved(&used()).unwrap();
    let to = Fake::new(layout::tests::example());
    for record in [
        Record { mode: Mode::Msix(3), ..good.clone() },
        Record { mode: Mode::None, ..good.clone() },
        Record { table: vec![0; 32], ..good },
    ] {
        assert!(restore(&to, &record.encode()).is_err());
    }
    assert!(to.did.borrow().is_empty());
}

#[test]
fn the_upper_half_of_a_wide_bar_has_no_type() {
    let mut config = layout::tests::example();
    config[0x14] = 0x0f;
    config[0x18] = 0x01;
    assert_eq!(bar_types(&config), [Some(0xc), None, Some(1), Some(0), Some(0), Some(0)]);
}

#[test]
fn a_configuration_is_checked_without_a_write() {
    let device = used();
    check(&device, &Seen::default()).unwrap();
    assert!(device.did.borrow().is_empty(), "{:?}", device.did.borrow());
    // A bridge: nothing that a restore would take.
    let mut bridge = vec![0; 256];
    bridge[0x0e] = 1;
    assert!(check(&Fake::new(bridge), &Seen::default()).unwrap_err().to_string().contains("header types"));
}

//! A device of interface v1 whose region is in memory: it follows the interface, counts what moves, and
//! does one thing wrong where a test asks for it.

use airlift::core::v1::{DATA_OFFSET, DATA_SIZE, DEVICE_STATE, INFO_SIZE, PENDING_BYTES, bits};
use airlift::core::v1::{V1Control, V1Device};
use airlift::core::{
    DeviceError, DeviceErrorKind, DeviceId, DeviceIdentity, DeviceState, Errno, Interrupter, RegionAccess,
    RegionArea, StateFormat,
};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What one access does instead of what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// It is refused, and nothing changes.
    Refused,
    /// It is refused, and the device is in ERROR.
    Error,
    /// The device was reset just before; except before a write of `device_state`: between the look at
    /// the state and the write that changes it there is a gap in which the interface cannot tell.
    Reset,
    /// The device is gone for good.
    Gone,
}

/// How much was read from one device and not yet written to another.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    read: AtomicU64,
    written: AtomicU64,
    pub(crate) most: AtomicU64,
}

/// What the device is.
struct Core {
    state: u32,
    section: Vec<u8>,
    /// What it gives while it runs, and what only after the stop; one entry is one transaction.
    precopy: Vec<Vec<u8>>,
    stopped: Vec<Vec<u8>>,
    queue: VecDeque<Vec<u8>>,
    /// `data_offset` was read since `pending_bytes`.
    staged: bool,
    data_size: u64,
    loaded: Vec<u8>,
    /// What it had when it began to run.
    started_with: Vec<u8>,
    rounds: Vec<u64>,
    accesses: u64,
    wrong: Option<(u64, Wrong)>,
    hook: Option<(u64, Box<dyn FnOnce() + Send>)>,
    gone: bool,
    /// The write of this state fails, into ERROR.
    breaks_in: Option<DeviceState>,
    /// It is reset when so many more bytes of data have moved.
    resets_after: Option<usize>,
    /// It does not take what was loaded.
    picky: bool,
    balance: Option<Arc<Balance>>,
    slow: Duration,
    /// Each read of data takes so long.
    slow_data: Duration,
    guest: Option<Arc<Mutex<bool>>>,
    read_while_paused: bool,
}

/// The device. Clones share it, so that a test can look at it from outside.
#[derive(Clone)]
pub(crate) struct Region {
    size: u64,
    core: Arc<Mutex<Core>>,
}

/// Bytes that are not the same anywhere.
pub(crate) fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 13).to_le_bytes()[0] ^ seed).collect()
}

impl Region {
    /// A running device with a data section of `section` bytes.
    pub(crate) fn new(section: usize) -> Self {
        let core = Core {
            // A reserved bit, which must never be lost (V1-RESERVED).
            state: bits::RUNNING | 0x80,
            section: vec![0; section],
            precopy: Vec::new(),
            stopped: Vec::new(),
            queue: VecDeque::new(),
            staged: false,
            data_size: 0,
            loaded: Vec::new(),
            started_with: Vec::new(),
            rounds: Vec::new(),
            accesses: 0,
            wrong: None,
            hook: None,
            gone: false,
            breaks_in: None,
            resets_after: None,
            picky: false,
            balance: None,
            slow: Duration::ZERO,
            slow_data: Duration::ZERO,
            guest: None,
            read_while_paused: false,
        };
        Self { size: INFO_SIZE + section as u64, core: Arc::new(Mutex::new(core)) }
    }

    /// With these transactions, before and after the stop.
    pub(crate) fn with(self, precopy: Vec<Vec<u8>>, stopped: Vec<Vec<u8>>) -> Self {
        let mut core = self.core.lock().unwrap();
        (core.precopy, core.stopped) = (precopy, stopped);
        drop(core);
        self
    }

    /// The access of this number goes wrong; 0 is the first.
    pub(crate) fn wrong(&self, access: u64, what: Wrong) {
        self.core.lock().unwrap().wrong = Some((access, what));
    }

    /// Calls `hook` at the access of this number.
    pub(crate) fn at_access(&self, access: u64, hook: impl FnOnce() + Send + 'static) {
        self.core.lock().unwrap().hook = Some((access, Box::new(hook)));
    }

    /// The write of `state` fails, and the device is in ERROR.
    pub(crate) fn fail_entry(&self, state: DeviceState) {
        self.core.lock().unwrap().breaks_in = Some(state);
    }

    /// The device resets itself when so many bytes of its data have moved.
    pub(crate) fn reset_after(&self, bytes: usize) {
        self.core.lock().unwrap().resets_after = Some(bytes);
    }

    /// Refuses what was loaded.
    pub(crate) fn make_picky(&self) {
        self.core.lock().unwrap().picky = true;
    }

    /// Each round of loading, and each chunk that is saved, takes so long.
    pub(crate) fn make_slow(&self, by: Duration) {
        self.core.lock().unwrap().slow = by;
    }

    /// Each read of its data takes so long.
    pub(crate) fn make_data_slow(&self, by: Duration) {
        self.core.lock().unwrap().slow_data = by;
    }

    pub(crate) fn count_in(&self, balance: &Arc<Balance>) {
        self.core.lock().unwrap().balance = Some(Arc::clone(balance));
    }

    /// Whether the guest runs, for [`read_while_paused`](Self::read_while_paused).
    pub(crate) fn watch(&self, guest: &Arc<Mutex<bool>>) {
        self.core.lock().unwrap().guest = Some(Arc::clone(guest));
    }

    /// Data was read in PRE_COPY while the guest was paused.
    pub(crate) fn read_while_paused(&self) -> bool {
        self.core.lock().unwrap().read_while_paused
    }

    pub(crate) fn reset(&self) {
        self.core.lock().unwrap().reset();
    }

    pub(crate) fn state_now(&self) -> DeviceState {
        bits::state_of(self.core.lock().unwrap().state)
    }

    pub(crate) fn loaded(&self) -> Vec<u8> {
        self.core.lock().unwrap().loaded.clone()
    }

    /// What it held when it began to run: a reset after that is the guest's own business.
    pub(crate) fn started_with(&self) -> Vec<u8> {
        self.core.lock().unwrap().started_with.clone()
    }

    /// The sizes of what was written in one round each.
    pub(crate) fn rounds(&self) -> Vec<u64> {
        self.core.lock().unwrap().rounds.clone()
    }

    pub(crate) fn accesses(&self) -> u64 {
        self.core.lock().unwrap().accesses
    }

    pub(crate) fn keeps_reserved_bits(&self) -> bool {
        self.core.lock().unwrap().state & !bits::MASK == 0x80
    }

    /// The device over it, as the engine takes it.
    pub(crate) fn device(&self, id: &str, whole: bool) -> V1Device<Self> {
        self.device_of(id, whole, None)
    }

    pub(crate) fn device_of(&self, id: &str, whole: bool, format: Option<StateFormat>) -> V1Device<Self> {
        let core = Arc::clone(&self.core);
        let reset = move || {
            let mut core = core.lock().unwrap();
            if core.gone {
                return Err(gone());
            }
            core.reset();
            Ok(())
        };
        let control = V1Control {
            reset: Box::new(reset),
            interrupter: Interrupter::unable(),
            whole_transactions: whole,
        };
        let identity = DeviceIdentity { format, ..DeviceIdentity::default() };
        V1Device::new(DeviceId::new(id).unwrap(), identity, self.clone(), control).unwrap()
    }
}

fn gone() -> DeviceError {
    DeviceError::new(DeviceErrorKind::Lost, "access to the region", "the device is gone")
}

impl Core {
    fn reset(&mut self) {
        self.state = bits::RUNNING | 0x80;
        (self.staged, self.data_size) = (false, 0);
        self.queue.clear();
        self.loaded.clear();
        self.rounds.clear();
    }

    fn enter_error(&mut self) {
        self.state = self.state & !bits::MASK | bits::SAVING | bits::RESUMING;
    }

    /// `len` bytes of data have moved.
    fn moved(&mut self, len: usize) {
        match self.resets_after {
            Some(left) if left <= len => {
                self.resets_after = None;
                self.reset();
            }
            Some(left) => self.resets_after = Some(left - len),
            None => {}
        }
    }

    /// Counts an access, and lets it go wrong. `changes`: it writes `device_state`.
    fn access(&mut self, changes: bool) -> Result<(), DeviceError> {
        let number = self.accesses;
        self.accesses += 1;
        if let Some((_, hook)) = self.hook.take_if(|(at, _)| *at == number) {
            hook();
        }
        match self.wrong {
            Some((at, what)) if at == number => match what {
                Wrong::Refused => return Err(DeviceError::refused("access to the region", Errno::EIO)),
                Wrong::Error => {
                    self.enter_error();
                    return Err(DeviceError::refused("access to the region", Errno::EIO));
                }
                Wrong::Reset if changes => {}
                Wrong::Reset => self.reset(),
                Wrong::Gone => self.gone = true,
            },
            _ => {}
        }
        if self.gone { Err(gone()) } else { Ok(()) }
    }

    fn is(&self, state: DeviceState) -> bool {
        bits::state_of(self.state) == state
    }

    fn set_state(&mut self, to: u32) -> Result<(), DeviceError> {
        let refused = || DeviceError::refused("write of device_state", Errno::EINVAL);
        let error = self.is(DeviceState::Error);
        if error || !bits::is_valid(to) || (self.is(DeviceState::Resuming) && self.picky) {
            return Err(refused());
        }
        let (before, after) = (bits::state_of(self.state), bits::state_of(to));
        if self.breaks_in == Some(after) {
            self.enter_error();
            return Err(DeviceError::refused("write of device_state", Errno::EIO));
        }
        if after.is_saving() {
            if !before.is_saving() {
                let early = self.precopy.iter().cloned();
                self.queue = early.collect();
                self.staged = false;
            }
            if after == DeviceState::StopCopy {
                let late = self.stopped.iter().cloned();
                self.queue.extend(late);
            }
        }
        if after == DeviceState::Resuming {
            self.loaded.clear();
            self.rounds.clear();
        }
        if after == DeviceState::Running {
            self.started_with.clone_from(&self.loaded);
        }
        self.state = to;
        Ok(())
    }

    fn read_field(&mut self, offset: u64) -> u64 {
        match offset {
            PENDING_BYTES => {
                if std::mem::take(&mut self.staged) {
                    self.queue.pop_front();
                }
                let saving = bits::state_of(self.state).is_saving();
                if saving { self.queue.iter().map(|chunk| chunk.len() as u64).sum() } else { 0 }
            }
            DATA_OFFSET => {
                if bits::state_of(self.state).is_saving() {
                    self.staged = true;
                    let chunk = self.queue.front().map(Vec::as_slice).unwrap_or_default();
                    self.section[..chunk.len()].copy_from_slice(chunk);
                    self.data_size = chunk.len() as u64;
                }
                INFO_SIZE
            }
            DATA_SIZE => self.data_size,
            other => panic!("a read of 8 bytes at {other:#x}"),
        }
    }

    fn take(&mut self, size: u64) -> Result<(), DeviceError> {
        if !self.is(DeviceState::Resuming) {
            return Err(DeviceError::refused("write of data_size", Errno::EINVAL));
        }
        let len = usize::try_from(size).unwrap();
        self.loaded.extend_from_slice(&self.section[..len]);
        self.rounds.push(size);
        Ok(())
    }

    fn note_read(&mut self, len: u64) {
        if let Some(balance) = &self.balance {
            let read = balance.read.fetch_add(len, Ordering::SeqCst) + len;
            balance.most.fetch_max(read - balance.written.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        let paused = self.guest.as_ref().is_some_and(|runs| !*runs.lock().unwrap());
        self.read_while_paused |= paused && self.is(DeviceState::PreCopy);
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset - INFO_SIZE).unwrap()
}

impl RegionAccess for Region {
    fn size(&self) -> u64 {
        self.size
    }

    fn mapped(&self) -> &[RegionArea] {
        &[]
    }

    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let mut core = self.core.lock().unwrap();
        core.access(false)?;
        if offset == DEVICE_STATE {
            buf.copy_from_slice(&core.state.to_ne_bytes());
        } else if offset < INFO_SIZE {
            if offset == DATA_OFFSET && bits::state_of(core.state).is_saving() && !core.staged {
                std::thread::sleep(core.slow);
            }
            let value = core.read_field(offset);
            buf.copy_from_slice(&value.to_ne_bytes());
        } else {
            std::thread::sleep(core.slow_data);
            buf.copy_from_slice(&core.section[at(offset)..][..buf.len()]);
            core.note_read(buf.len() as u64);
            core.moved(buf.len());
        }
        Ok(())
    }

    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut core = self.core.lock().unwrap();
        core.access(offset == DEVICE_STATE)?;
        match offset {
            DEVICE_STATE => core.set_state(u32::from_ne_bytes(data.try_into().unwrap())),
            DATA_SIZE => {
                let slow = core.slow;
                core.take(u64::from_ne_bytes(data.try_into().unwrap()))?;
                drop(core);
                std::thread::sleep(slow);
                Ok(())
            }
            _ => {
                core.section[at(offset)..][..data.len()].copy_from_slice(data);
                if let Some(balance) = &core.balance {
                    balance.written.fetch_add(data.len() as u64, Ordering::SeqCst);
                }
                core.moved(data.len());
                Ok(())
            }
        }
    }

    fn read_mapped(&mut self, _offset: u64, _buf: &mut [u8]) -> Result<(), DeviceError> {
        unreachable!("nothing is mapped")
    }

    fn write_mapped(&mut self, _offset: u64, _data: &[u8]) -> Result<(), DeviceError> {
        unreachable!("nothing is mapped")
    }
}

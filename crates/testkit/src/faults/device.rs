//! A device that is given one wrong byte while it loads.

use airlift_core::{
    Capabilities, DeviceError, DeviceId, DeviceIdentity, DeviceState, Interrupter, LoadSession,
    MigrationDevice, Session, TransitionError,
};

/// Passes everything on to a device, but flips the lowest bit of one byte of what is loaded into it:
/// behind every check of the stream, as a fault of the host's memory would.
pub struct CorruptingDevice {
    inner: Box<dyn MigrationDevice>,
    at: u64,
}

impl std::fmt::Debug for CorruptingDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CorruptingDevice").field("at", &self.at).finish_non_exhaustive()
    }
}

impl CorruptingDevice {
    /// Flips a bit of the byte at offset `at` of each load session of `inner`.
    #[must_use]
    pub fn new(inner: Box<dyn MigrationDevice>, at: u64) -> Self {
        Self { inner, at }
    }
}

impl MigrationDevice for CorruptingDevice {
    fn id(&self) -> &DeviceId {
        self.inner.id()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn identity(&self) -> &DeviceIdentity {
        self.inner.identity()
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        self.inner.state()
    }

    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        Ok(match self.inner.set_state(target)? {
            Some(Session::Load(inner)) => {
                Some(Session::Load(Box::new(CorruptingLoad { inner, at: self.at, written: 0 })))
            }
            other => other,
        })
    }

    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError> {
        self.inner.stop_copy_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.inner.reset()
    }

    fn interrupter(&self) -> Interrupter {
        self.inner.interrupter()
    }
}

struct CorruptingLoad {
    inner: Box<dyn LoadSession>,
    at: u64,
    written: u64,
}

impl LoadSession for CorruptingLoad {
    fn begin_chunk(&mut self, total: u64) -> Result<(), DeviceError> {
        self.inner.begin_chunk(total)
    }

    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let offset = self.at.checked_sub(self.written).and_then(|o| usize::try_from(o).ok());
        self.written += data.len() as u64;
        match offset.filter(|o| *o < data.len()) {
            None => self.inner.write(data),
            Some(offset) => {
                let mut changed = data.to_vec();
                changed[offset] ^= 1;
                self.inner.write(&changed)
            }
        }
    }

    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        self.inner.end_chunk()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl LoadSession for Sink {
        fn begin_chunk(&mut self, _total: u64) -> Result<(), DeviceError> {
            Ok(())
        }
        fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(())
        }
        fn end_chunk(&mut self) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    #[test]
    fn exactly_one_byte_changes_however_the_data_is_cut() {
        let sent: Vec<u8> = (0..=255).collect();
        for cut in [1, 7, 100, 101, 256] {
            let got = Arc::new(Mutex::new(Vec::new()));
            let mut load = CorruptingLoad { inner: Box::new(Sink(Arc::clone(&got))), at: 100, written: 0 };
            for piece in sent.chunks(cut) {
                load.write(piece).unwrap();
            }
            let got = got.lock().unwrap();
            let wrong: Vec<usize> = (0..256).filter(|&i| got[i] != sent[i]).collect();
            assert_eq!(wrong, [100], "cut into {cut}");
        }
    }
}

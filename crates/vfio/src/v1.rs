//! Interface v1 of a kernel device: core's [`V1Device`] over the device's migration region.
//!
//! What is added to it: which region that is, how long an access may take, and that an interruption
//! ends the call under way also when it comes between two of its accesses. What the fields mean, and in
//! which order they are used, is not looked at here.

use crate::region::{Bell, find_migration_region};
use crate::{DeviceFd, KernelRegion, VfioOptions};
use airlift_core::region::read_u32;
use airlift_core::v1::{DEVICE_STATE, MigrationRegion, V1Control, V1Device, bits};
use airlift_core::{
    Capabilities, DeviceError, DeviceId, DeviceIdentity, DeviceState, Interrupter, LoadSession,
    MigrationDevice, Piece, PrecopyInfo, RegionAccess, SaveSession, Session, TransitionError,
};

/// A device with interface v1.
#[derive(Debug)]
pub(crate) struct V1 {
    device: V1Device<KernelRegion>,
    region: MigrationRegion,
    bell: Bell,
}

impl V1 {
    /// Uses the device's migration region, and says in which state the device is. `None`: it has no such
    /// region. Changes nothing.
    ///
    /// # Errors
    /// When the region cannot be used as one (V1-REGION), or the driver does not answer in time.
    pub(crate) fn new(
        id: DeviceId,
        fd: &DeviceFd,
        options: &VfioOptions,
    ) -> Result<Option<(Self, DeviceState)>, DeviceError> {
        let Some(region) = find_migration_region(fd)? else { return Ok(None) };
        let bell = Bell::new(fd.alarm().clone());
        let mut region = region.with_bell(bell.clone()).with_timeout(options.answer_timeout);
        let found = bits::state_of(read_u32(&mut region, DEVICE_STATE)?);
        // From here on an access may be what makes data, or an arc: it takes as long as the device does.
        let timeout = options.transition_timeout;
        let region = region.with_timeout(timeout);
        let mut view = MigrationRegion {
            index: region.info().index,
            size: region.size(),
            mapped: region.mapped().to_vec(),
            unmapped: region.unmapped().map(str::to_owned),
            data_section: 0,
            // A driver of the kernel has no way to say so.
            whole_transactions: false,
        };
        let (resets, alarm) = (fd.clone(), fd.alarm().clone());
        let control = V1Control {
            reset: Box::new(move || resets.reset(timeout)),
            interrupter: Interrupter::new(move || alarm.ring()),
            whole_transactions: view.whole_transactions,
        };
        // Who it is asks for more than the region, and is answered by whoever holds this.
        let device = V1Device::new(id, DeviceIdentity::default(), region, control)?;
        view.data_section = device.capabilities().data_section.unwrap_or(0);
        Ok(Some((Self { device, region: view, bell }, found)))
    }

    pub(crate) const fn region(&self) -> &MigrationRegion {
        &self.region
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        self.device.capabilities()
    }

    pub(crate) fn state(&mut self) -> Result<DeviceState, DeviceError> {
        self.bell.begin();
        self.device.state()
    }

    pub(crate) fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError> {
        self.bell.begin();
        let session = self.device.set_state(target)?;
        let bell = self.bell.clone();
        Ok(session.map(|session| match session {
            Session::Save(session) => Session::Save(Box::new(Heard { session, bell })),
            Session::Load(session) => Session::Load(Box::new(Heard { session, bell })),
        }))
    }

    pub(crate) fn reset(&mut self) -> Result<(), DeviceError> {
        self.bell.begin();
        self.device.reset()
    }

    pub(crate) fn interrupter(&self) -> Interrupter {
        self.device.interrupter()
    }
}

/// A data session of which each call is ended by an interruption that comes while it is made.
struct Heard<S: ?Sized> {
    bell: Bell,
    session: Box<S>,
}

impl SaveSession for Heard<dyn SaveSession> {
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        self.bell.begin();
        self.session.precopy_info()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError> {
        self.bell.begin();
        self.session.read(buf)
    }
}

impl LoadSession for Heard<dyn LoadSession> {
    fn begin_chunk(&mut self, total: u64) -> Result<(), DeviceError> {
        self.session.begin_chunk(total)
    }

    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.bell.begin();
        self.session.write(data)
    }

    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        self.session.end_chunk()
    }
}

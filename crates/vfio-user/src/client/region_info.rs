//! What a region is: GET_REGION_INFO and the capabilities behind its answer.
//!
//! Lists are bounded and walked forward only. Whether areas overlap is not looked at: who uses them copes.

use super::Client;
use super::channel::protocol;
use crate::codec::{RegionCap, RegionInfo, RegionInfoFlags, RegionTypeCap, SparseArea, command, take};
use airlift_core::DeviceError;
use std::os::fd::OwnedFd;
use zerocopy::IntoBytes;

/// Most bytes of a region info with its capabilities.
const MAX_REGION_INFO: u32 = 1 << 20;
/// Number of the capability that lists the areas that may be mapped.
const SPARSE: u16 = 1;
/// Number of the capability that says what a region is for.
const TYPE: u16 = 2;

/// What a region is.
#[derive(Debug)]
pub struct RegionDetails {
    /// Size in bytes.
    pub size: u64,
    /// What can be done with it.
    pub flags: RegionInfoFlags,
    /// Type and subtype of a region that is no usual one of PCI; 3, 1 is the migration region of
    /// interface v1 (V1-REGION).
    pub kind: Option<(u32, u32)>,
    /// The file to be mapped, where there is one.
    pub fd: Option<OwnedFd>,
    /// Where the region begins in the file, in bytes.
    pub offset: u64,
    /// The areas `(offset, length)` that may be mapped; empty with [`fd`](Self::fd): all of it.
    pub areas: Vec<(u64, u64)>,
}

impl Client {
    /// What region `index` is. Asks again where the answer needs more room.
    ///
    /// # Errors
    /// When the server refuses, does not answer, or its capabilities break their own bounds.
    pub fn region_info(&self, index: u32) -> Result<RegionDetails, DeviceError> {
        let number = command::DEVICE_GET_REGION_INFO;
        let mut argsz = 32;
        for _ in 0..3 {
            let asked = RegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
            let mut reply = self.ask(number, &[asked.as_bytes()], argsz)?;
            let (info, _) = Self::fixed::<RegionInfo>(number, &reply.payload)?;
            if info.index != index {
                return Err(protocol(number, "the reply is about another region"));
            }
            if info.argsz > argsz {
                if info.argsz > MAX_REGION_INFO {
                    return Err(protocol(number, "the capabilities are too long"));
                }
                argsz = info.argsz;
                continue;
            }
            let flags = RegionInfoFlags::from_bits_truncate(info.flags);
            let found = if flags.contains(RegionInfoFlags::CAPS) {
                capabilities(&reply.payload, &info)?
            } else {
                Capabilities::default()
            };
            let fd = if reply.fds.is_empty() { None } else { Some(reply.fds.swap_remove(0)) };
            let Capabilities { areas, kind } = found;
            return Ok(RegionDetails { size: info.size, flags, kind, fd, offset: info.offset, areas });
        }
        Err(protocol(number, "the server always wants more room"))
    }
}

#[derive(Default)]
struct Capabilities {
    areas: Vec<(u64, u64)>,
    kind: Option<(u32, u32)>,
}

/// The capabilities that are known here; those of other kinds are passed over.
fn capabilities(payload: &[u8], info: &RegionInfo) -> Result<Capabilities, DeviceError> {
    let number = command::DEVICE_GET_REGION_INFO;
    let wrong = || protocol(number, "the capabilities do not fit the reply");
    let mut found = Capabilities::default();
    let mut at = usize::try_from(info.cap_offset).map_err(|_| wrong())?;
    let mut last = 0;
    while at != 0 {
        // Forward only: a list that leads back would never end.
        if at < size_of::<RegionInfo>() || at <= last {
            return Err(wrong());
        }
        last = at;
        let rest = payload.get(at..).ok_or_else(wrong)?;
        let head = rest.first_chunk::<8>().ok_or_else(wrong)?;
        let id = u16::from_ne_bytes([head[0], head[1]]);
        let next = u32::from_ne_bytes([head[4], head[5], head[6], head[7]]);
        match id {
            SPARSE if found.areas.is_empty() => found.areas = areas(rest, info)?,
            TYPE if found.kind.is_none() => {
                let (cap, _) = take::<RegionTypeCap>(rest).ok_or_else(wrong)?;
                found.kind = Some((cap.kind, cap.subtype));
            }
            _ => {}
        }
        at = usize::try_from(next).map_err(|_| wrong())?;
    }
    Ok(found)
}

fn areas(cap: &[u8], info: &RegionInfo) -> Result<Vec<(u64, u64)>, DeviceError> {
    let number = command::DEVICE_GET_REGION_INFO;
    let wrong = || protocol(number, "the list of areas does not fit the reply");
    let (cap, mut rest) = take::<RegionCap>(cap).ok_or_else(wrong)?;
    let mut areas = Vec::new();
    for _ in 0..cap.count {
        let (area, behind) = take::<SparseArea>(rest).ok_or_else(wrong)?;
        if area.offset.checked_add(area.size).is_none_or(|end| end > info.size) {
            return Err(protocol(number, "an area exceeds its region"));
        }
        areas.push((area.offset, area.size));
        rest = behind;
    }
    Ok(areas)
}

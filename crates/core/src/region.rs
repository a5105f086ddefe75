//! Access to a region of a device, as interface v1 needs it: fields by single accesses, data through
//! whatever of the region is mapped and by reads and writes for the rest.
//!
//! [`RegionAccess`] is what a transport implements (the kernel's VFIO, vfio-user); the functions here
//! cut an access into pieces that a transport can make. Nobody gets a slice of memory that a device
//! changes: bytes are copied.
//!
//! Not checked here: what fields mean, and that mapped areas really are mapped.

use crate::{DeviceError, DeviceErrorKind};

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionArea {
    /// Where it begins in the region, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

impl RegionArea {
    fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// One region of a device. Offsets are from the region's start, in bytes.
pub trait RegionAccess: Send + 'static {
    /// Its size in bytes, above 0.
    fn size(&self) -> u64;

    /// What of it is mapped, in no order; areas lie in the region. Empty where nothing is: mapping is
    /// never compulsory.
    fn mapped(&self) -> &[RegionArea];

    /// Whether the device declares areas of it as mappable, whether or not they could be mapped here. What
    /// it lays out by pages for that is laid out so in any case.
    fn is_mappable(&self) -> bool {
        !self.mapped().is_empty()
    }

    /// Reads `buf` through the transport, mapped or not. 1, 2, 4 or 8 bytes at a multiple of their
    /// number are one access of that width; anything longer is cut into accesses as large as the
    /// transport takes.
    ///
    /// # Errors
    /// When the range is not in the region, or the device refuses or is gone.
    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes `data` through the transport, in accesses as [`read_trapped`](Self::read_trapped).
    ///
    /// # Errors
    /// As [`read_trapped`](Self::read_trapped); how much was written is then not known.
    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError>;

    /// Copies out of one mapped area, in which all of the range lies.
    ///
    /// # Errors
    /// When there is no such area.
    fn read_mapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies into one mapped area, in which all of the range lies.
    ///
    /// # Errors
    /// As [`read_mapped`](Self::read_mapped), and when the area cannot be written.
    fn write_mapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError>;
}

/// A piece of an access, made in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionPiece {
    /// Where it begins in the region, in bytes.
    pub offset: u64,
    /// Its length in bytes, above 0.
    pub length: u64,
    /// It lies in one mapped area; otherwise in none.
    pub mapped: bool,
}

/// Cuts `length` bytes at `offset` of a region of `size` bytes into pieces, by address and without
/// gaps: in a mapped area up to its end, elsewhere up to the next mapped area. `areas` may be in any
/// order and overlap.
///
/// # Errors
/// [`DeviceErrorKind::Misuse`] when the range does not lie in the region.
pub fn pieces(
    size: u64,
    areas: &[RegionArea],
    offset: u64,
    length: u64,
) -> Result<impl Iterator<Item = RegionPiece> + use<'_>, DeviceError> {
    let end = offset.checked_add(length).filter(|end| *end <= size).ok_or_else(|| {
        let message = format!("{length} bytes at {offset:#x} are not in a region of {size} bytes");
        DeviceError::new(DeviceErrorKind::Misuse, "access to a region", message)
    })?;
    let mut at = offset;
    Ok(std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        // Of areas that overlap the one that reaches furthest; each step gets beyond `at`.
        let inside = areas.iter().filter(|a| a.offset <= at && a.end() > at).map(|a| a.end()).max();
        let (stop, mapped) = match inside {
            Some(stop) => (stop, true),
            None => {
                let next = areas.iter().filter(|a| a.offset > at && a.length > 0).map(|a| a.offset).min();
                (next.unwrap_or(end), false)
            }
        };
        let piece = RegionPiece { offset: at, length: stop.min(end) - at, mapped };
        at += piece.length;
        Some(piece)
    }))
}

/// Reads data: the range may cross mapped and other parts.
///
/// # Errors
/// When the range is not in the region, or an access fails.
pub fn read_data<R: RegionAccess + ?Sized>(
    region: &mut R,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), DeviceError> {
    let list = list(region, offset, buf.len())?;
    let mut rest = buf;
    for (piece, length) in list {
        let (part, after) = rest.split_at_mut(length);
        rest = after;
        if piece.mapped {
            region.read_mapped(piece.offset, part)?;
        } else {
            region.read_trapped(piece.offset, part)?;
        }
    }
    Ok(())
}

/// Writes data: the range may cross mapped and other parts.
///
/// # Errors
/// As [`read_data`]; how much was written is then not known.
pub fn write_data<R: RegionAccess + ?Sized>(
    region: &mut R,
    offset: u64,
    data: &[u8],
) -> Result<(), DeviceError> {
    let list = list(region, offset, data.len())?;
    let mut rest = data;
    for (piece, length) in list {
        let (part, after) = rest.split_at(length);
        rest = after;
        if piece.mapped {
            region.write_mapped(piece.offset, part)?;
        } else {
            region.write_trapped(piece.offset, part)?;
        }
    }
    Ok(())
}

/// The pieces with their lengths as indexes; they add up to `length`.
fn list<R: RegionAccess + ?Sized>(
    region: &R,
    offset: u64,
    length: usize,
) -> Result<Vec<(RegionPiece, usize)>, DeviceError> {
    let pieces = pieces(region.size(), region.mapped(), offset, length as u64)?;
    // No piece is longer than `length`.
    Ok(pieces.map(|piece| (piece, usize::try_from(piece.length).unwrap_or(length))).collect())
}

/// Reads a field of 4 bytes in the host's byte order, by one access.
///
/// # Errors
/// When the field is misaligned or not in the region, or the device refuses.
pub fn read_u32<R: RegionAccess + ?Sized>(region: &mut R, offset: u64) -> Result<u32, DeviceError> {
    let mut bytes = [0; 4];
    field(region, offset, 4)?;
    region.read_trapped(offset, &mut bytes)?;
    Ok(u32::from_ne_bytes(bytes))
}

/// Reads a field of 8 bytes in the host's byte order, by one access.
///
/// # Errors
/// As [`read_u32`].
pub fn read_u64<R: RegionAccess + ?Sized>(region: &mut R, offset: u64) -> Result<u64, DeviceError> {
    let mut bytes = [0; 8];
    field(region, offset, 8)?;
    region.read_trapped(offset, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Writes a field of 4 bytes in the host's byte order, by one access.
///
/// # Errors
/// As [`read_u32`].
pub fn write_u32<R: RegionAccess + ?Sized>(
    region: &mut R,
    offset: u64,
    value: u32,
) -> Result<(), DeviceError> {
    field(region, offset, 4)?;
    region.write_trapped(offset, &value.to_ne_bytes())
}

/// Writes a field of 8 bytes in the host's byte order, by one access.
///
/// # Errors
/// As [`read_u32`].
pub fn write_u64<R: RegionAccess + ?Sized>(
    region: &mut R,
    offset: u64,
    value: u64,
) -> Result<(), DeviceError> {
    field(region, offset, 8)?;
    region.write_trapped(offset, &value.to_ne_bytes())
}

fn field<R: RegionAccess + ?Sized>(region: &R, offset: u64, width: u64) -> Result<(), DeviceError> {
    let inside = offset.checked_add(width).is_some_and(|end| end <= region.size());
    if inside && offset.is_multiple_of(width) {
        return Ok(());
    }
    let message = format!("a field of {width} bytes at {offset:#x} is misaligned or not in the region");
    Err(DeviceError::new(DeviceErrorKind::Misuse, "access to a region", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(offset: u64, length: u64) -> RegionArea {
        RegionArea { offset, length }
    }

    fn cut(areas: &[RegionArea], offset: u64, length: u64) -> Vec<(u64, u64, bool)> {
        let all = pieces(0x10_000, areas, offset, length).unwrap();
        all.map(|p| (p.offset, p.length, p.mapped)).collect()
    }

    #[test]
    fn a_range_is_cut_where_mapped_areas_begin_and_end() {
        // Not sorted, as drivers give them.
        let areas = [area(0x4000, 0x1000), area(0x1000, 0x1000)];
        assert_eq!(
            cut(&areas, 0x800, 0x4800),
            [(0x800, 0x800, false), (0x1000, 0x1000, true), (0x2000, 0x2000, false), (0x4000, 0x1000, true),]
        );
        assert_eq!(cut(&areas, 0x1800, 0x10), [(0x1800, 0x10, true)]);
        assert_eq!(cut(&areas, 0x5000, 0xb000), [(0x5000, 0xb000, false)]);
        assert_eq!(cut(&areas, 0x1000, 0), []);
    }

    #[test]
    fn areas_that_touch_overlap_or_are_empty_lose_no_byte() {
        assert_eq!(
            cut(&[area(0x2000, 0x1000), area(0x1000, 0x1000)], 0x1000, 0x2000),
            [(0x1000, 0x1000, true), (0x2000, 0x1000, true)]
        );
        assert_eq!(cut(&[area(0, 0x1000), area(0, 0x3000)], 0, 0x3000), [(0, 0x3000, true)]);
        assert_eq!(cut(&[area(0x100, 0)], 0, 0x200), [(0, 0x200, false)]);
        assert_eq!(cut(&[area(0, u64::MAX)], 8, 8), [(8, 8, true)]);
    }

    #[test]
    fn a_range_outside_of_the_region_is_refused_also_by_wrap_around() {
        assert!(pieces(0x1000, &[], 0xff8, 9).is_err());
        assert!(pieces(0x1000, &[], u64::MAX, 2).is_err());
        assert_eq!(pieces(0x1000, &[], 0xff8, 8).unwrap().count(), 1);
    }

    /// A region whose mapped and trapped parts are separate, and which notes its accesses.
    struct Region {
        bytes: Vec<u8>,
        areas: Vec<RegionArea>,
        accesses: Vec<(&'static str, u64, usize)>,
    }

    impl Region {
        fn new(areas: &[RegionArea]) -> Self {
            let bytes = (0..=u8::MAX).cycle().take(0x4000).collect();
            Self { bytes, areas: areas.to_vec(), accesses: Vec::new() }
        }

        fn get(&mut self, way: &'static str, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
            self.accesses.push((way, offset, buf.len()));
            let at = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
            Ok(())
        }

        fn put(&mut self, way: &'static str, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
            self.accesses.push((way, offset, data.len()));
            let at = usize::try_from(offset).unwrap();
            self.bytes[at..at + data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    impl RegionAccess for Region {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }
        fn mapped(&self) -> &[RegionArea] {
            &self.areas
        }
        fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
            self.get("trapped", offset, buf)
        }
        fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
            self.put("trapped", offset, data)
        }
        fn read_mapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
            self.get("mapped", offset, buf)
        }
        fn write_mapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
            self.put("mapped", offset, data)
        }
    }

    #[test]
    fn data_that_crosses_parts_is_whole_in_both_directions() {
        let mut region = Region::new(&[area(0x3000, 0x1000), area(0x1000, 0x1000)]);
        let mut got = vec![0; 0x2800];
        read_data(&mut region, 0xc00, &mut got).unwrap();
        assert_eq!(got, region.bytes[0xc00..0x3400]);
        let ways = [
            ("trapped", 0xc00, 0x400),
            ("mapped", 0x1000, 0x1000),
            ("trapped", 0x2000, 0x1000),
            ("mapped", 0x3000, 0x400),
        ];
        assert_eq!(region.accesses, ways);
        region.accesses.clear();
        let data: Vec<u8> = (0..0x2800_u32).map(|i| i.to_le_bytes()[1]).collect();
        write_data(&mut region, 0xc00, &data).unwrap();
        assert_eq!(region.bytes[0xc00..0x3400], data);
        assert_eq!(region.accesses, ways);
    }

    #[test]
    fn fields_are_one_access_of_their_width_also_in_a_mapped_area() {
        let mut region = Region::new(&[area(0, 0x4000)]);
        write_u64(&mut region, 8, 0x0102_0304_0506_0708).unwrap();
        assert_eq!(read_u64(&mut region, 8).unwrap(), 0x0102_0304_0506_0708);
        write_u32(&mut region, 4, 7).unwrap();
        assert_eq!(read_u32(&mut region, 4).unwrap(), 7);
        let made = [("trapped", 8, 8), ("trapped", 8, 8), ("trapped", 4, 4), ("trapped", 4, 4)];
        assert_eq!(region.accesses, made);
        assert!(read_u64(&mut region, 12).is_err());
        assert!(read_u32(&mut region, 0x4000).is_err());
        assert_eq!(region.accesses.len(), made.len());
    }
}

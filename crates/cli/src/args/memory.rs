//! `--memory`: guest memory that no VMM brings.
//!
//! Whether the file is there, is long enough, or overlaps another is not checked here.

use crate::units::Size;
use airlift_core::DeviceId;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// Granularity of addresses, sizes and offsets in bytes: what the wire carries.
const PAGE: u64 = 4096;

/// Where a region of guest memory is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MemoryPlace {
    /// A file.
    File(PathBuf),
    /// A descriptor that this process was started with.
    Fd(RawFd),
}

/// A region of guest memory with the name that pairs it with the other side's:
/// `ID=file:PATH|fd:N[,gpa=N][,size=N][,offset=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedMemory {
    /// The name; of the same alphabet as a device's.
    pub(crate) name: String,
    /// Where it is kept.
    pub(crate) place: MemoryPlace,
    /// Where the guest and its devices see it, in bytes.
    pub(crate) gpa: u64,
    /// Where it begins in the file, in bytes.
    pub(crate) offset: u64,
    /// Its size in bytes; to the file's end where it is not given.
    pub(crate) size: Option<u64>,
}

impl NamedMemory {
    /// The number that a region of this name has on both sides: FNV-1a of the name.
    pub(crate) fn region_number(&self) -> u32 {
        self.name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
    }
}

/// Bytes: `64MiB`, `4096`, `0x1000`; whole pages.
fn pages(key: &str, text: &str) -> Result<u64, String> {
    let bytes = match text.strip_prefix("0x") {
        Some(hex) => {
            u64::from_str_radix(hex, 16).map_err(|_| format!("{key}={text} is not a hexadecimal number"))?
        }
        None => text.parse::<Size>().map_err(|e| format!("{key}: {e}, or as 0x1000"))?.0,
    };
    if bytes.is_multiple_of(PAGE) {
        Ok(bytes)
    } else {
        Err(format!("{key}={text} is not a multiple of {PAGE}"))
    }
}

impl FromStr for NamedMemory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "write it as ID=file:PATH or ID=fd:N, with ,gpa=N ,size=N ,offset=N where they are needed";
        let (name, rest) = text.split_once('=').ok_or_else(|| format!("{text:?} has no name: {form}"))?;
        let name = DeviceId::new(name).map_err(|e| e.to_string())?.as_str().to_owned();
        let mut parts = rest.split(',');
        let place = match parts.next().and_then(|place| place.split_once(':')) {
            Some(("file", path)) if !path.is_empty() => MemoryPlace::File(path.into()),
            Some(("fd", number)) => MemoryPlace::Fd(
                number
                    .parse()
                    .ok()
                    .filter(|fd| *fd >= 0)
                    .ok_or_else(|| format!("{number:?} is no descriptor"))?,
            ),
            _ => return Err(format!("{rest:?} is neither a file nor a descriptor: {form}")),
        };
        let mut memory = Self { name, place, gpa: 0, offset: 0, size: None };
        let mut seen: Vec<&str> = Vec::new();
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            if seen.contains(&key) {
                return Err(format!("{key}= is there twice"));
            }
            seen.push(key);
            match key {
                "gpa" => memory.gpa = pages(key, value)?,
                "offset" => memory.offset = pages(key, value)?,
                "size" => match pages(key, value)? {
                    0 => return Err("size= must be above 0".into()),
                    size => memory.size = Some(size),
                },
                _ => {
                    return Err(format!("{part:?} is none of gpa=, size= and offset= (a path has no comma)"));
                }
            }
        }
        if memory.gpa.checked_add(memory.size.unwrap_or(PAGE)).is_none() {
            return Err("gpa= and size= reach beyond the last address".into());
        }
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_name_is_the_same_on_every_host() {
        // The published values of FNV-1a: a change here is a change of the wire.
        for (name, number) in [("a", 0xe40c_292c), ("foobar", 0xbf9c_f968)] {
            let memory: NamedMemory = format!("{name}=file:/m").parse().unwrap();
            assert_eq!(memory.region_number(), number);
        }
    }

    #[test]
    fn memory_is_a_place_and_where_the_guest_sees_it() {
        let memory: NamedMemory =
            "ram=file:/dev/shm/g=1,gpa=0x100000,size=32MiB,offset=4096".parse().unwrap();
        let expected = NamedMemory {
            name: "ram".into(),
            place: MemoryPlace::File("/dev/shm/g=1".into()),
            gpa: 1 << 20,
            offset: 4096,
            size: Some(32 << 20),
        };
        assert_eq!(memory, expected);
        let memory: NamedMemory = "ram=fd:7".parse().unwrap();
        assert_eq!((memory.place, memory.gpa, memory.size), (MemoryPlace::Fd(7), 0, None));
    }

    #[test]
    fn what_cannot_be_guest_memory_is_refused() {
        for text in [
            "",
            "ram",
            "=file:/x",
            "ram=/x",
            "ram=file:",
            "ram=fd:",
            "ram=fd:-1",
            "ram=file:/x,gpa=1",
            "ram=file:/x,size=0",
            "ram=file:/x,size=4097",
            "ram=file:/x,size=4096,size=4096",
            "ram=file:/x,gap=0",
            "ram=file:/x,gpa=0xffffffffffffffff",
            "ram=file:/x,gpa=0xfffffffffffff000,size=8192",
            "a b=file:/x",
        ] {
            assert!(text.parse::<NamedMemory>().is_err(), "{text}");
        }
    }
}

//! The addresses by which devices are named.
//!
//! Only their form is checked; names of `pci:` and `mdev:` can then be put into a path of sysfs.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// How a device is named: `cdev:PATH`, `pci:BDF`, `mdev:UUID` or `fd:N`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeviceAddress {
    /// A character device (`/dev/vfio/devices/vfioN`).
    Cdev(PathBuf),
    /// A PCI function: domain, bus, device and function, as sysfs writes them (`0000:65:00.2`).
    Pci(String),
    /// A mediated device, by its UUID in lower case.
    Mdev(String),
    /// A device descriptor that this process has.
    Fd(RawFd),
}

/// Text that is no device address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no device address: {reason}")]
pub struct InvalidAddress {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl FromStr for DeviceAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let wrong = |reason| InvalidAddress { text: text.into(), reason };
        let (kind, rest) =
            text.split_once(':').ok_or_else(|| wrong("cdev:, pci:, mdev: or fd: is missing"))?;
        match kind {
            "cdev" if rest.is_empty() => Err(wrong("cdev: needs a path such as /dev/vfio/devices/vfio0")),
            "cdev" => Ok(Self::Cdev(rest.into())),
            "pci" => bdf(rest).map(Self::Pci).ok_or_else(|| {
                wrong("pci: needs an address such as 0000:65:00.2 (the domain may be left out)")
            }),
            "mdev" => uuid(rest)
                .map(Self::Mdev)
                .ok_or_else(|| wrong("mdev: needs a UUID, 8-4-4-4-12 hexadecimal digits")),
            "fd" => rest
                .parse()
                .ok()
                .filter(|fd| *fd >= 0 && !rest.starts_with('+'))
                .map(Self::Fd)
                .ok_or_else(|| wrong("fd: needs the number of a descriptor")),
            _ => Err(wrong("only cdev:, pci:, mdev: and fd: are known")),
        }
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cdev(path) => write!(f, "cdev:{}", path.display()),
            Self::Pci(bdf) => write!(f, "pci:{bdf}"),
            Self::Mdev(uuid) => write!(f, "mdev:{uuid}"),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// A PCI address in the form that sysfs uses, or `None`.
pub(super) fn bdf(text: &str) -> Option<String> {
    let text = text.to_ascii_lowercase();
    let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
        let good = digits.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
        good.then(|| u32::from_str_radix(part, 16).ok()).flatten()
    };
    let (front, function) = text.rsplit_once('.')?;
    let (front, device) = front.rsplit_once(':')?;
    let (domain, bus) = front.rsplit_once(':').unwrap_or(("0000", front));
    // Domains above 16 bits exist (VMD) and are written with more digits.
    let (domain, bus) = (hex(domain, 4..=8)?, hex(bus, 2..=2)?);
    let (device, function) = (hex(device, 2..=2)?, hex(function, 1..=1)?);
    (device < 32 && function < 8).then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}"))
}

/// A UUID in lower case, or `None`.
pub(super) fn uuid(text: &str) -> Option<String> {
    let mut parts = text.split('-');
    for length in [8, 4, 4, 4, 12] {
        parts.next().filter(|p| p.len() == length && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
    }
    parts.next().is_none().then(|| text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<String> {
        text.parse::<DeviceAddress>().ok().map(|a| a.to_string())
    }

    #[test]
    fn addresses_are_brought_into_the_form_of_sysfs() {
        assert_eq!(parse("pci:65:00.2").as_deref(), Some("pci:0000:65:00.2"));
        assert_eq!(parse("pci:10000:E1:1f.7").as_deref(), Some("pci:10000:e1:1f.7"));
        assert_eq!(
            parse("mdev:ABCDEF00-0000-0000-0000-00000000000A").as_deref(),
            Some("mdev:abcdef00-0000-0000-0000-00000000000a")
        );
        assert_eq!(parse("cdev:/dev/vfio/devices/vfio0").as_deref(), Some("cdev:/dev/vfio/devices/vfio0"));
        assert_eq!(parse("fd:7").as_deref(), Some("fd:7"));
    }

    #[test]
    fn what_could_lead_to_another_path_or_is_no_address_is_refused() {
        for text in [
            "",
            "pci",
            "pci:",
            "pci:65:00",
            "pci:65:20.0",
            "pci:65:00.8",
            "pci:../65:00.0",
            "pci:0:65:00.0",
            "mdev:../../x",
            "mdev:00000000-0000-0000-0000-0000000000",
            "mdev:",
            "fd:",
            "fd:-1",
            "fd:+1",
            "fd:x",
            "cdev:",
            "usb:1",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

//! Sizes, rates and durations as people write them, and how they are printed.
//!
//! `64MiB`, `1GiB`, `4096`; `10MiB/s`, `1000/s`; `300ms`, `1.5s`. Whether a value makes sense for
//! an option is not checked here.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A text that is not a size, a rate or a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}: write it as {example}")]
pub(crate) struct UnitError {
    text: String,
    what: &'static str,
    example: &'static str,
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

/// The size of a device's state: whole pages, at least one.
pub(crate) fn state_size(text: &str) -> Result<Size, String> {
    multiple(text, 4096, 4096)
}

/// The size of a data section of interface v1: 1 byte to 1 GiB.
pub(crate) fn v1_section(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    if (1..=1 << 30).contains(&size.0) { Ok(size) } else { Err("it must be 1 byte to 1GiB".into()) }
}

/// The size of a simulated guest's memory: a multiple of 64 KiB, at least 2 MiB.
pub(crate) fn guest_memory(text: &str) -> Result<Size, String> {
    multiple(text, 64 << 10, airlift_softdevice::simvm::MIN_MEMORY)
}

fn multiple(text: &str, of: u64, least: u64) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    if size.0 < least || !size.0.is_multiple_of(of) {
        return Err(format!("it must be a multiple of {} KiB, and at least {} KiB", of >> 10, least >> 10));
    }
    Ok(size)
}

/// Bytes, or events, per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) u64);

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

const BINARY: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Splits `1.5GiB` into its number, in thousandths, and its unit.
fn split(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.len() > 3 || part.contains('.') || (number.contains('.') && part.is_empty()) {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let thousandths: u64 = format!("{part:0<3}").parse().ok()?;
    Some((whole.checked_mul(1000)?.checked_add(thousandths)?, unit.trim_start()))
}

/// `thousandths / 1000 * unit`, without overflow.
fn scaled(thousandths: u64, unit: u64) -> Option<u64> {
    u64::try_from(u128::from(thousandths) * u128::from(unit) / 1000).ok()
}

fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let factor = match unit {
        "" | "B" => 1,
        // One letter counts in binary, as QEMU's size options do.
        "K" | "k" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => BINARY.iter().find(|(name, _)| *name == unit)?.1,
    };
    if factor == 1 && !number.is_multiple_of(1000) {
        return None;
    }
    scaled(number, factor)
}

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        bytes(text).map(Self).ok_or_else(|| UnitError {
            text: text.to_owned(),
            what: "size",
            example: "64MiB, 1GiB or 4096",
        })
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        bytes(text.strip_suffix("/s").unwrap_or(text)).map(Self).ok_or_else(|| UnitError {
            text: text.to_owned(),
            what: "rate",
            example: "10MiB/s or 1000/s",
        })
    }
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let micros = split(text).and_then(|(number, unit)| {
            let factor = match unit {
                "us" => 1,
                "ms" => 1_000,
                "s" => 1_000_000,
                "m" | "min" => 60_000_000,
                "h" => 3_600_000_000,
                // A number alone could be seconds or milliseconds: it is not guessed.
                _ if number == 0 => 0,
                _ => return None,
            };
            scaled(number, factor)
        });
        micros.map(|m| Self(Duration::from_micros(m))).ok_or_else(|| UnitError {
            text: text.to_owned(),
            what: "duration",
            example: "300ms, 1.5s or 2m",
        })
    }
}

impl fmt::Display for Size {
    /// Exact when it is a whole number of a unit, else one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = BINARY.iter().rev().find(|(_, unit)| self.0 >= *unit);
        match unit {
            None => write!(f, "{} B", self.0),
            Some((name, unit)) if self.0.is_multiple_of(*unit) => write!(f, "{} {name}", self.0 / unit),
            Some((name, unit)) => {
                let tenths = u128::from(self.0) * 10 / u128::from(*unit);
                write!(f, "{}.{} {name}", tenths / 10, tenths % 10)
            }
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

impl Size {
    /// The size as an argument that [`FromStr`] reads back to the same number.
    pub(crate) fn argument(self) -> String {
        self.0.to_string()
    }
}

impl Span {
    /// The span as an argument; whole microseconds.
    pub(crate) fn argument(self) -> String {
        format!("{}us", self.0.as_micros())
    }
}

/// `1 round`, `2 rounds`.
pub(crate) fn counted(count: u32, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}

/// Milliseconds for a person: whole above 100, else with one or two decimals.
pub(crate) fn millis(ms: f64) -> String {
    if ms >= 100.0 {
        format!("{ms:.0} ms")
    } else if ms >= 10.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{ms:.2} ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("1GiB", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("16M", 16 << 20),
            ("10 KiB", 10 << 10),
            ("2MB", 2_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "MiB", "1.", ".5MiB", "1.5", "-1", "64mib", "1.2345GiB", "99999999TiB", "1..2K"] {
            assert!(text.parse::<Size>().is_err(), "{text} was taken");
        }
    }

    #[test]
    fn rates_may_carry_per_second() {
        assert_eq!("10MiB/s".parse(), Ok(Rate(10 << 20)));
        assert_eq!("1000/s".parse(), Ok(Rate(1000)));
        assert_eq!("1000".parse(), Ok(Rate(1000)));
        assert!("1000/m".parse::<Rate>().is_err());
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!("300ms".parse(), Ok(Span(Duration::from_millis(300))));
        assert_eq!("1.5s".parse(), Ok(Span(Duration::from_millis(1500))));
        assert_eq!("0".parse(), Ok(Span(Duration::ZERO)));
        let error = "300".parse::<Span>().unwrap_err();
        assert_eq!(error.to_string(), "\"300\" is not a duration: write it as 300ms, 1.5s or 2m");
    }

    #[test]
    fn what_is_printed_is_what_a_person_would_say() {
        assert_eq!(Size(64 << 20).to_string(), "64 MiB");
        assert_eq!(Size(1 << 30).to_string(), "1 GiB");
        assert_eq!(Size(1_600_000).to_string(), "1.5 MiB");
        assert_eq!(Size(12).to_string(), "12 B");
        assert_eq!(Rate(10 << 20).to_string(), "10 MiB/s");
        assert_eq!(millis(0.123), "0.12 ms");
        assert_eq!(millis(312.4), "312 ms");
    }

    #[test]
    fn an_argument_reads_back() {
        assert_eq!(Size(12345).argument().parse(), Ok(Size(12345)));
        let span = Span(Duration::from_micros(1_500_001));
        assert_eq!(span.argument().parse(), Ok(span));
    }
}

//! Blocks, sizes, time.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Sub};

pub use std::time::Duration;

/// Size of a block: the unit of checksums, of redirect-on-write and of atomicity.
pub const BLOCK_SIZE: usize = 4096;
/// [`BLOCK_SIZE`] as `u64`.
pub const BLOCK_SIZE_U64: u64 = BLOCK_SIZE as u64;
/// Size of a chunk unless the volume says otherwise: 64 MiB.
pub const CHUNK_SIZE_DEFAULT: u64 = 64 << 20;

/// A point of monotonic time in nanoseconds. The origin is arbitrary and differs between nodes: only differences count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Instant(pub u64);

impl Instant {
    /// Time since `earlier`; zero when `earlier` is later.
    pub fn saturating_since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_sub(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// A text that is not a size such as `4096`, `512K`, `10M`, `1.5G` or `2TiB`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size; write bytes or a number with K, M, G, T or P, as in 10G")]
pub struct ParseSizeError {
    text: String,
}

/// Parses a size in bytes; suffixes are binary (`1K` = 1024), an ending `B` or `iB` is allowed, case does not matter.
///
/// # Errors
/// [`ParseSizeError`] when the text is no size or exceeds `u64`.
pub fn parse_size(text: &str) -> Result<u64, ParseSizeError> {
    let bad = || ParseSizeError { text: text.to_owned() };
    let lower = text.trim().to_ascii_lowercase();
    let body = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let (digits, shift) = match body.char_indices().last() {
        Some((at, 'k')) => (&body[..at], 10),
        Some((at, 'm')) => (&body[..at], 20),
        Some((at, 'g')) => (&body[..at], 30),
        Some((at, 't')) => (&body[..at], 40),
        Some((at, 'p')) => (&body[..at], 50),
        _ => (body, 0),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let fraction: f64 = digits.parse().map_err(|_| bad())?;
    let bytes = fraction * (1u64 << shift) as f64;
    if shift == 0 || !bytes.is_finite() || !(0.0..1.8e19).contains(&bytes) {
        return Err(bad());
    }
    Ok(bytes as u64)
}

/// Prints a size for people: three significant digits, binary units.
pub fn format_size(bytes: u64) -> impl fmt::Display {
    struct Size(u64);
    impl fmt::Display for Size {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
            let mut value = self.0 as f64;
            let mut unit = 0;
            while value >= 1024.0 && unit + 1 < UNITS.len() {
                value /= 1024.0;
                unit += 1;
            }
            let digits = if unit == 0 || value >= 100.0 {
                0
            } else if value >= 10.0 {
                1
            } else {
                2
            };
            f.pad(&format!("{value:.digits$} {}", UNITS[unit]))
        }
    }
    Size(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("2tb"), Ok(2 << 40));
        for bad in ["", "G", "1.5", "-1", "nan", "20000P", "1e400G", "4 K X"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(format_size(1536).to_string(), "1.50 KiB");
        assert_eq!(format_size(64 << 20).to_string(), "64.0 MiB");
    }
}

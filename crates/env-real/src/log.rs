//! The log of a daemon: lines on standard error.
//!
//! Under systemd (`JOURNAL_STREAM` is set) a line carries a priority prefix and the journal adds the time; elsewhere it
//! starts with the time in UTC.

use crate::clock;
use std::io::Write;
use std::sync::LazyLock;

/// Where the log lines of a reactor go.
pub type LogSink = Box<dyn FnMut(&str)>;

/// A sink that writes to standard error.
pub fn stderr_sink() -> LogSink {
    Box::new(write_line)
}

/// Writes one line to standard error.
pub fn write_line(line: &str) {
    static JOURNAL: LazyLock<bool> = LazyLock::new(|| std::env::var_os("JOURNAL_STREAM").is_some());
    let text = if *JOURNAL { format!("<6>{line}\n") } else { format!("{} {line}\n", utc(clock::wall_ns())) };
    // A daemon whose standard error is gone goes on without a log.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// RFC 3339 in UTC with milliseconds.
///
/// Source of the calendar arithmetic: Howard Hinnant, "chrono-compatible low-level date algorithms" (civil_from_days).
pub fn utc(wall_ns: u64) -> String {
    let (seconds, millis) = (wall_ns / 1_000_000_000, wall_ns / 1_000_000 % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468; // Days since 0000-03-01, so that leap days end a year.
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Lets a burst of lines through and then one per second, so that a hostile peer cannot fill the log.
#[derive(Debug)]
pub(crate) struct LogLimiter {
    tokens: u32,
    refilled: cairn_types::Instant,
}

const BURST_MAX: u32 = 50;

impl LogLimiter {
    pub(crate) fn new() -> Self {
        Self { tokens: BURST_MAX, refilled: cairn_types::Instant(0) }
    }

    pub(crate) fn allows(&mut self, now: cairn_types::Instant) -> bool {
        let seconds = now.saturating_since(self.refilled).as_secs();
        if seconds > 0 {
            self.tokens = self.tokens.saturating_add(u32::try_from(seconds).unwrap_or(u32::MAX)).min(BURST_MAX);
            self.refilled = now;
        }
        let allowed = self.tokens > 0;
        self.tokens -= u32::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_types::Instant;

    #[test]
    fn times_print_as_people_write_them() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_399_999_000_000), "2000-02-28T23:59:59.999Z");
        assert_eq!(utc(951_868_799_000_000_000), "2000-02-29T23:59:59.000Z");
        assert_eq!(utc(4_107_542_400_000_000_000), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn a_flood_of_lines_is_cut_to_one_per_second() {
        let mut limiter = LogLimiter::new();
        let start = Instant(1_000_000_000_000);
        assert_eq!((0..1000).filter(|_| limiter.allows(start)).count(), BURST_MAX as usize);
        assert!(limiter.allows(Instant(1_001_000_000_000)));
        assert!(!limiter.allows(Instant(1_001_500_000_000)));
    }
}

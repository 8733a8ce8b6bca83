//! The two clocks of this machine.

use crate::sys;
use cairn_types::Instant;
use cairn_wire::Now;

/// Both clocks, read now. Every reactor of one host shares the monotonic origin (`CLOCK_MONOTONIC`).
pub fn now() -> Now {
    Now { mono: sys::monotonic(), wall_ns: wall_ns() }
}

/// The monotonic clock alone.
pub fn monotonic() -> Instant {
    sys::monotonic()
}

/// Nanoseconds since 1970; zero on a machine whose clock stands before that.
pub fn wall_ns() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "this module is where the shell reads the clock")]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

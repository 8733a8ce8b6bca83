//! The nouns of Cairn: identifiers, units, epochs, redundancy. Plain data, no behaviour beyond parsing and printing.
//!
//! Start at [`ids`] for who is who, [`redundancy`] for `replicas=N[:M]`, [`units`] for blocks, sizes and time.

pub mod ids;
pub mod level;
pub mod redundancy;
pub mod units;

pub use ids::*;
pub use level::Level;
pub use redundancy::{FailureDomain, Redundancy, RedundancyError};
pub use units::{BLOCK_SIZE, BLOCK_SIZE_U64, CHUNK_SIZE_DEFAULT, Duration, Instant, format_size, parse_size};

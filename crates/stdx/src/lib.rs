//! Small helpers every layer may use: deterministic randomness, deterministic hash maps, checksums, the planted-bug
//! switch, logs that do not repeat themselves. Nothing here does IO, reads a clock or depends on another crate of ours.

pub mod checksum;
pub mod hash;
pub mod planted;
pub mod repeats;
pub mod rng;

pub use hash::{FixedMap, FixedSet};
pub use rng::Rng;

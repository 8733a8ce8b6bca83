//! Checkers, one file per invariant or method. Checkers see everything; cores see only their events.

pub mod file;
pub mod holders;
pub mod names;
pub mod shadow;
pub mod zone;

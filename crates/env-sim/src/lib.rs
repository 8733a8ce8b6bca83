//! The simulated world: what `cairn-env-real` does with a kernel, done in memory, deterministically, with faults.
//!
//! Start at [`disk::SimDisk`]: a disk of 512-byte sectors that forgets, tears, rots and fails on request.

pub mod disk;

pub use disk::{Fault, Misdeed, OpKind, SimDisk};

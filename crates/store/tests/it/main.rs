//! Layer L1: the store against a model, through every crash and fault one disk can have.
//!
//! `CAIRN_STORE_SEEDS` sets the seeds of the random loops, `CAIRN_STORE_STATES` the crash states of the enumeration.

mod crash;
mod enumerate;
mod faults;
mod forged;
mod full;
mod golden;
mod harness;
mod model;
#[cfg(feature = "planted")]
mod planted;
mod semantics;
mod smoke;

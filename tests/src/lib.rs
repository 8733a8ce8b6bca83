//! What system tests are made of: real processes of the released executable, started, killed and cleaned up by id.
//!
//! Each test owns one cluster in a directory of its own ([`cluster::Cluster`]), a limit of time for everything, and
//! checkers that know what was acknowledged ([`stamped`]) or what was copied ([`tree`]). Nothing passes by waiting for
//! a fixed time: [`process::poll`] looks for a condition until a deadline.

pub mod chaos;
pub mod cluster;
pub mod fault_disk;
pub mod hosts;
pub mod nbd;
pub mod process;
pub mod stamped;
pub mod tree;

//! The client core against real chunk servers and the real metadata state machine, in virtual time.

mod data;
mod faults;
#[cfg(feature = "planted")]
mod plants;
mod world;

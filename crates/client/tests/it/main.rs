//! The client core against real chunk servers and the real metadata state machine, in virtual time.

mod data;
mod faults;
mod full;
#[cfg(feature = "planted")]
mod plants;
mod world;

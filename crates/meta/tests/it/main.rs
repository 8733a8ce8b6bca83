//! The state machine from outside: commands in, answers and effects out.

mod ailing;
mod bugs;
mod leases;
mod misc;
mod namespace;
mod rebalance;
mod recover;
mod rename;
mod repair;
mod replace;
mod support;

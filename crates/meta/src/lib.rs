//! The metadata state machine: namespace, volumes, leases, chunk maps, chunk servers, repair planning.
//!
//! [`Meta`] is a deterministic function of the log: no clock, no randomness, no hash order, no IO. Time comes with the
//! commands. Its state is an ordered store ([`Kv`]) plus a few resident records that are written to it at checkpoints;
//! a server starts from its last checkpoint and replays the log from there. See `docs/design/metadata.md` and
//! `docs/formats/metadata.md`.
//!
//! Invariants, asserted where they could break:
//! - a refused call changes nothing;
//! - I6 an exclusive lease has one holder, and each exclusive grant a fresh epoch;
//! - I7 a replica set changes only together with the version of its chunk;
//! - rule 13: a chunk never loses its last current replica;
//! - I8 the sums by state are those of the chunks there are;
//! - I11 equal log index, equal digest, on every server;
//! - I15 nothing of a level above the cluster's is logged or written;
//! - I18 a numbered call takes effect once.
//!
//! Start at [`Meta`] in `state.rs` for the frame, [`Command`] for what goes in, `chunks.rs` for the heart, [`recover`]
//! for what is done when all of it is lost.

mod ailing;
mod check;
mod chunks;
mod command;
pub mod config;
mod events;
mod full;
mod inodes;
mod jobs;
mod keys;
mod kv;
mod leases;
mod level;
mod lineage;
mod members;
mod namespace;
pub mod placement;
mod rebalance;
pub mod record;
pub mod recover;
mod removal;
mod rename;
mod repair;
mod servers;
mod sessions;
mod stat;
mod state;
mod userkv;
mod volumes;

pub use chunks::ALLOCATE_MAX;
pub use command::{Answer, Applied, Command, CommandError, MetaEffect, Recipient};
pub use inodes::SIZE_MAX;
pub use kv::{BaseKv, Kv, MemKv, Memtable, Overlay, Pairs};
pub use servers::{ORDERS_MAX, REPORT_MAX};
pub use sessions::{SESSION_TERM_MS, SESSION_WINDOW};
pub use state::Meta;
pub use userkv::KV_KEY_MAX;

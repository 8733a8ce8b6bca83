//! The client: volumes over chunks. A library that every front end links; never a second hop on the data path.
//!
//! [`ClientCore`] is the pure part: the session with the metadata servers, leases, chunk maps, replication, reads,
//! flushes, reconciliation, as a [`cairn_wire::Process`] that the simulator drives as it is. [`LocalClient`] runs it on
//! a tokio `current_thread` runtime, [`Client`] on a thread of its own. [`cluster`] finds and writes the cluster files
//! of a host.
//!
//! Invariants this crate answers for (`docs/design/client.md` tells how): a write is acknowledged when every replica of
//! the version in force has it (I1, I3); every request carries epoch and version (I5, I6, I7); overlapping operations
//! are ordered, so that no read sees a half-replicated write (I3); the settled mark never passes a write that a replica
//! may still lose (I1); retried calls take effect once (I18).
//!
//! Start at [`ClientCore`] for the state, at `volume/mod.rs` for the data path.

pub mod cluster;
mod config;
mod core;
mod handle;
mod io;
mod servers;
mod session;
mod shell;
mod slab;
mod timers;
mod volume;

pub use config::*;
pub use core::{ClientCore, Completion, Notice, OpenDone, VolumeHandle};
pub use handle::Client;
pub use session::CallDone;
pub use shell::{LocalClient, LocalVolume};

//! Replicated log of the metadata servers: a sans-IO core around Raft with its own write-ahead log.
//!
//! [`Consensus`] is stepped with ticks, messages, disk completions and proposals; everything it wants done leaves
//! through [`Output`]. The consensus algorithm is `raft` 0.7 (TiKV); none of its types leave this crate, and neither
//! wire nor disk sees its protobuf encoding.
//!
//! Invariants (I11 of the verification plan, refined; `docs/design/consensus.md` gives the reasons):
//! - C1: nothing that promises (a vote, an acknowledgement, a term) is sent before what it promises is durable;
//! - C2: a bad tail of the log is cut, a bad middle is an error that names its offset;
//! - C3: entries are emitted once, in index order, only when committed and durable here;
//! - C4: an instance that lost its log neither votes nor acknowledges under its old id;
//! - C5: a read index is confirmed by a majority after the read was asked for;
//! - C6: the configuration in force at the base of the log is stored with the base;
//! - C7: the durable commit index covers every configuration change but the last in the log.
//!
//! Start at [`consensus`] for the calls, `node.rs` for the flow of a turn, [`format`] for the bytes on disk, [`wire`]
//! for the bytes between nodes, `wal.rs` for space and durability, `recover.rs` for opening.

pub mod config;
pub mod consensus;
mod entry;
pub mod error;
pub mod format;
pub mod members;
mod node;
mod opening;
pub mod output;
mod reads;
mod recover;
mod snapshot;
mod store;
mod wal;
pub mod wire;

pub use config::{Config, Initial, LOG_SIZE_MAX, LOG_SIZE_MIN};
pub use consensus::Consensus;
pub use error::{NotLeader, OpenError, ProposeError, ReadIndexError, ReceiveError, SnapshotError};
pub use members::{Change, ChangeError, Member, Members};
pub use output::{
    Committed, CommittedKind, Opened, Output, PeerStatus, Role, RoleChange, SnapshotMeta, SnapshotWanted, Status,
};

//! The metadata server: consensus and the metadata state machine glued into one [`cairn_wire::Process`], and its shell.
//!
//! A call that changes something becomes a command in the log, is applied by every server, and is answered by the
//! leader once applied there. A read waits for a read index and is answered from the state. What only the leader needs
//! to know (who renewed when, figures of the last heartbeats) never enters the log. The state is an overlay over a
//! durable [`base`] image; the log before the image is compacted away.
//!
//! Start at [`core::MdsCore`]; then [`calls`] for what happens to a call, [`duty`] for what a leader does by itself,
//! [`group`] for the other servers, [`checkpoint`] and [`image`] for the durable state, [`room`] for full disks and
//! servers that lag, [`backup`] and [`disaster`] for
//! when it is lost.

mod backup;
pub mod backup_file;
pub mod base;
mod calls;
mod checkpoint;
pub mod core;
pub mod disaster;
mod duty;
mod group;
mod image;
pub mod image_file;
mod levels;
pub mod redb_base;
pub mod repository;
mod room;
pub mod shell;

pub use base::{Base, MemBase, Room};
pub use core::{MdsConfig, MdsCore};

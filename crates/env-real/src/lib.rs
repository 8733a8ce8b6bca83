//! The real shell: drives any [`cairn_wire::Process`] with sockets, an io_uring and the clocks of this machine.
//!
//! One [`Reactor`] lives on one thread. Sockets belong to tokio (`current_thread`, epoll), disks to one ring; both were
//! measured best on their own ground (`docs/design/runtime.md`). Invariants kept here:
//! - a process is stepped by one task at a time and never from inside its own step;
//! - a link is authenticated before its [`Up`](cairn_wire::NetEvent::Up), and nothing follows its `Down`;
//! - a disk request completes exactly once, within its deadline, and its memory outlives the kernel's use of it;
//! - memory per link and per disk is bounded, before authentication to a few kilobytes.
//!
//! Start reading at [`reactor`], then [`ring`] for disks and [`link`] for sockets. This is the only crate that asks the
//! system for the time, and `unsafe` stands only in [`sys`] and [`ring`].

mod awake;
pub mod clock;
pub mod cutter;
pub mod disk;
mod fill;
mod level;
mod link;
pub mod log;
pub mod offline;
mod output;
pub mod reactor;
mod ring;
mod socket;
mod sys;

pub use disk::{Disk, DiskOptions, OpenDiskError};
pub use level::release_level;
pub use offline::OfflineDisk;
pub use reactor::{Identity, Reactor, ReactorConfig, ReactorOptions, Stats, Stopped, block_on_local};
pub use sys::{free_bytes, random_bytes, reserve_range};

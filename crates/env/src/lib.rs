//! What a core knows of the world: buffers, disk requests and their completions.
//!
//! A core never opens a file or a socket. It is stepped with events and leaves *effects* behind; the shell
//! (`cairn-env-real`) or the simulator (`cairn-env-sim`) carries them out. This crate holds the vocabulary both share.

pub mod block;
pub mod buf;
pub mod disk;

pub use buf::{Buf, BufMut};
pub use disk::{DISK_ALIGNMENT, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskRequest, IoId};
